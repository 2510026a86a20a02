// Rows of a table: y[r] = table[ids[r]], or += with `add`; backward: dtable[ids[r]] += dy[r].
//   shapes   y, dy [rows, cols] and table [entries, cols] bf16 or f32; ids [rows]; dtable [entries,
//            cols] f32, or as dy where rows are put back from where they were picked (scatter);
//            sorted [rows], scratch
//   tiling   forward: a thread a packet of 16 bytes, or an element where a row is no whole number
//            of packets (`width` 1). backward: a lane a row finds the row's place in the order of
//            (id, row); then a thread a packet of the first row of each id adds all rows of that id
//   memory   forward reads a row of the table and writes one of y: 4 bytes an element in bf16 (6
//            with `add`); backward reads dy once, 2 bytes an element in bf16, and reads and writes
//            the touched rows of dtable, 8 bytes an element. The order takes rows^2 comparisons of
//            integers, 3e8 for 16k rows where one layer of width 1024 takes 4e11 FLOPs, and no
//            scratch but `sorted`; a radix sort would be several kernels
//   numerics sums in f32, in ascending row order, beginning with what dtable holds, rounded once:
//            in f32 the bits of the CPU; a place is a count, so no order of threads can show in it.
//            An id beyond the table gives NaN, which the step's check finds, and no gradient
//   needs    where `width` is a packet: y, table, dtable and dy 16-byte aligned, cols % packet ==
//            0; fewer than 2^31 threads: the launcher checks
#include "include/elements.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

template <class T>
static __device__ void forward(T* y, const uint32_t* ids, const T* table, int rows, int entries, int cols, int add, int width) {
    each_of_rows<T>(rows, cols, width, [&](auto known, int row, int i) {
        constexpr int N = decltype(known)::N;
        const uint32_t id = ids[row];
        T* out = y + int64_t(row) * cols;
        Elements<N> v;
        if (id < uint32_t(entries)) {
            v = take<N>(table + int64_t(id) * cols, i);
        } else {
            for (int j = 0; j < N; ++j) v.x[j] = NAN;
        }
        if (add != 0) {
            const Elements<N> old = take<N>(out, i);
            for (int j = 0; j < N; ++j) v.x[j] += old.x[j];
        }
        put<N>(out, i, v);
    });
}

// sorted[place] = id << 32 | row, where the place of a row is the number of rows before it in the
// order of (id, row). A block counts for 32 rows, one a lane, each of its warps among its share of
// all rows.
KERNEL(THREADS, embedding_sort)(uint64_t* sorted, const uint32_t* ids, int rows) {
    Shared shared;
    int* counts = shared.take<int>(THREADS);
    const int warp = threadIdx.x / 32, first = blockIdx.x * 32, row = first + ptx::lane();
    const int end = first + 32 < rows ? first + 32 : rows;
    const uint32_t id = row < rows ? ids[row] : 0;
    int count = 0;
    for (int r = warp; r < first; r += WARPS) count += ids[r] <= id;
    for (int r = first + warp; r < end; r += WARPS) count += ids[r] < id || (ids[r] == id && r < row);
    for (int r = end + warp; r < rows; r += WARPS) count += ids[r] < id;
    counts[threadIdx.x] = count;
    __syncthreads();
    if (warp != 0 || row >= rows) return;
    int place = 0;
    for (int w = 0; w < WARPS; ++w) place += counts[w * 32 + ptx::lane()];
    sorted[place] = uint64_t(id) << 32 | uint32_t(row);
}

template <class D, class T>
static __device__ void backward(D* dtable, const uint64_t* sorted, const T* dy, int rows, int entries, int cols, int width) {
    // Rows that are loaded together: their order in the sum stays.
    constexpr int AHEAD = 4;
    each_of_rows<T>(rows, cols, width, [&](auto known, int place, int i) {
        constexpr int N = decltype(known)::N;
        const uint32_t id = sorted[place] >> 32;
        const bool owner = place == 0 || uint32_t(sorted[place - 1] >> 32) != id;
        if (!owner || id >= uint32_t(entries)) return;
        D* out = dtable + int64_t(id) * cols;
        Elements<N> sum = take<N>(out, i);
        bool more = true;
        for (int next = place; more; next += AHEAD) {
            Elements<N> v[AHEAD];
            bool mine[AHEAD];
            for (int k = 0; k < AHEAD; ++k) {
                const uint64_t key = next + k < rows ? sorted[next + k] : ~0ull;
                mine[k] = uint32_t(key >> 32) == id;
                if (mine[k]) v[k] = take<N>(dy + int64_t(uint32_t(key)) * cols, i);
            }
            for (int k = 0; k < AHEAD; ++k) {
                if (!mine[k]) continue;
                for (int j = 0; j < N; ++j) sum.x[j] += v[k].x[j];
            }
            more = mine[AHEAD - 1];
        }
        put<N>(out, i, sum);
    });
}

#define KERNELS(T) \
    KERNEL(THREADS, embedding_forward_##T)(T* y, const uint32_t* ids, const T* table, int rows, int entries, int cols, int add, \
        int width) { \
        forward(y, ids, table, rows, entries, cols, add, width); \
    } \
    KERNEL(THREADS, embedding_backward_##T)(float* dtable, const uint64_t* sorted, const T* dy, int rows, int entries, int cols, \
        int width) { \
        backward(dtable, sorted, dy, rows, entries, cols, width); \
    } \
    KERNEL(THREADS, embedding_scatter_##T)(T* dtable, const uint64_t* sorted, const T* dy, int rows, int entries, int cols, \
        int width) { \
        backward(dtable, sorted, dy, rows, entries, cols, width); \
    }
EACH_DTYPE(KERNELS)
