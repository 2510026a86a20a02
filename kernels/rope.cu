// Rotary position embedding in place: in each of the first `heads` heads of a row, the pair (a, b)
// = (x[i], x[i + half]) becomes (a cos - b sin, b cos + a sin), the angle being that of the row's
// position and of i. `sign` 1 rotates forward; -1 rotates back, which is the gradient.
//   shapes   x [rows, row_len] bf16 or f32, row_len >= heads * 2 half; positions [rows];
//            table [entries, 2 half] f32: the cosines of a position, then its sines
//   tiling   a thread a packet of 16 bytes of one half of a head and its partners in the other
//            half; a thread a pair where a half or a row is no whole number of packets (`width` 1)
//   memory   reads and writes rotated elements once, 4 bytes an element in bf16, 8 in f32; a row
//            of the table is read by each head, from L1 after the first
//   numerics products and sum in f32, not fused, one rounding on the way out: in f32 the bits of
//            the CPU. A position beyond the table gives NaN, which the step's check finds, and
//            reads nothing
//   needs    where `width` is a packet: x and table 16-byte aligned, half and row_len whole
//            packets; fewer than 2^31 threads: the launcher checks
#include "include/elements.cuh"
#include "include/rope.cuh"

constexpr int THREADS = 256;

template <class T>
static __device__ void rotate(T* x, const uint32_t* positions, const float* table, int rows, int row_len, int heads, int half,
                            int entries, float sign, int width) {
    each_of_rows<T>(rows, heads * half, width, [&](auto known, int row, int i) {
        constexpr int N = decltype(known)::N;
        const int each = half / N, p = i % each;
        T* head = x + int64_t(row) * row_len + i / each * 2 * half;
        const uint32_t position = positions[row];
        Elements<N> a = take<N>(head, p), b = take<N>(head, each + p);
        if (position < uint32_t(entries)) {
            const float* angles = table + int64_t(position) * 2 * half;
            const Elements<N> cos = take<N>(angles, p), sin = take<N>(angles, each + p);
            for (int j = 0; j < N; ++j) rotate_pair(a.x[j], b.x[j], cos.x[j], sin.x[j] * sign);
        } else {
            for (int j = 0; j < N; ++j) a.x[j] = b.x[j] = NAN;
        }
        put<N>(head, p, a);
        put<N>(head, each + p, b);
    });
}

#define KERNELS(T) \
    KERNEL(THREADS, rope_rotate_##T)(T* x, const uint32_t* positions, const float* table, int rows, int row_len, int heads, \
        int half, int entries, float sign, int width) { \
        rotate(x, positions, table, rows, row_len, heads, half, entries, sign, width); \
    }
EACH_DTYPE(KERNELS)
