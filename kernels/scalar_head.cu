// One number a row: y[r] = h[r] . w; backward: dh[r] = dy[r] w, dw += sum_r dy[r] h[r].
//   shapes   h, dh [rows, d] and w [d] bf16 or f32; y, dy [rows] and dw [d] f32
//   tiling   forward: a warp a row, lane l owns packets l, l + 32, ... backward: a block COLS
//            columns of all rows, a thread a packet of rows THREADS / packets apart: dw needs no
//            second pass and no scratch, and a hidden size of 4096 makes 128 blocks. Where d is no
//            whole number of packets, a packet is one element (`width` 1)
//   memory   forward reads h once, 2 bytes an element in bf16, 4 in f32; backward reads h and
//            writes dh, 4 bytes (8)
//   numerics sums in f32, fused; of y in an order of d alone, of dw of rows alone, then added to
//            what is there; dh rounded once
//   needs    h, dh and w 16-byte aligned: the launcher checks
#include "include/elements.cuh"
#include "include/reduce.cuh"

constexpr int THREADS = 512;
constexpr int COLS = 32;
constexpr int WARPS = THREADS / 32;

template <class T>
static __device__ void forward(float* y, const T* h, const T* w, int rows, int d, int width) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    with_width<T>(width, [&](auto known) {
        constexpr int N = decltype(known)::N;
        const T* own = h + int64_t(row) * d;
        float sum = 0.0f;
#pragma unroll 4
        for (int p = ptx::lane(); p < d / N; p += 32) {
            const Elements<N> v = take<N>(own, p), weight = take<N>(w, p);
            for (int j = 0; j < N; ++j) sum = fmaf(v.x[j], weight.x[j], sum);
        }
        sum = warp_reduce<Sum>(sum);
        if (ptx::lane() == 0) y[row] = sum;
    });
}

template <class T>
static __device__ void backward(T* dh, float* dw, const float* dy, const T* h, const T* w, int rows, int d, int width) {
    // Rows that are loaded together, before dh is written: the compiler does not know that it is
    // not h.
    constexpr int AHEAD = 4;
    Shared shared;
    // A row of COLS sums for each warp.
    float* room = shared.take<float>(THREADS);
    with_width<T>(width, [&](auto known) {
        constexpr int N = decltype(known)::N, PACKETS = COLS / N, LANES = THREADS / PACKETS;
        const int own = threadIdx.x % PACKETS, p = blockIdx.x * PACKETS + own;
        const int all = p < d / N ? rows : 0;
        Elements<N> weight = {}, sum = {};
        if (all > 0) weight = take<N>(w, p);
        for (int first = threadIdx.x / PACKETS; first < all; first += AHEAD * LANES) {
            Elements<N> v[AHEAD];
            float g[AHEAD];
            for (int k = 0; k < AHEAD; ++k) {
                const int row = first + k * LANES;
                if (row >= all) continue;
                g[k] = dy[row];
                v[k] = take<N>(h + int64_t(row) * d, p);
            }
            for (int k = 0; k < AHEAD; ++k) {
                const int row = first + k * LANES;
                if (row >= all) continue;
                Elements<N> out;
                for (int j = 0; j < N; ++j) {
                    sum.x[j] = fmaf(g[k], v[k].x[j], sum.x[j]);
                    out.x[j] = g[k] * weight.x[j];
                }
                put<N>(dh + int64_t(row) * d, p, out);
            }
        }
        // Lanes with the same columns, then warps in ascending order.
        for (int apart = 16; apart >= PACKETS; apart /= 2) {
            for (int j = 0; j < N; ++j) sum.x[j] += ptx::shuffle_xor(sum.x[j], apart);
        }
        if (ptx::lane() >= PACKETS) return;
        for (int j = 0; j < N; ++j) room[threadIdx.x / 32 * COLS + own * N + j] = sum.x[j];
    });
    __syncthreads();
    const int c = threadIdx.x, at = blockIdx.x * COLS + c;
    if (c >= COLS || at >= d) return;
    float sum = room[c];
    for (int warp = 1; warp < WARPS; ++warp) sum += room[warp * COLS + c];
    dw[at] += sum;
}

#define KERNELS(T) \
    KERNEL(THREADS, scalar_head_forward_##T)(float* y, PACKED const T* h, PACKED const T* w, int rows, int d, int width) { \
        forward(y, h, w, rows, d, width); \
    } \
    KERNEL(THREADS, scalar_head_backward_##T)(PACKED T* dh, float* dw, const float* dy, PACKED const T* h, PACKED const T* w, \
        int rows, int d, int width) { \
        backward(dh, dw, dy, h, w, rows, d, width); \
    }
EACH_DTYPE(KERNELS)
