// Attention sinks: a logit of each head that joins the softmax of attention, after it: out *=
// sigmoid(lse - sink), lse += log(1 + exp(sink - lse)); backward: dsinks -= sum_r exp(sink - lse)
// (dout . out), of out and lse with sinks.
//   shapes   out, dout [rows, heads, d] bf16 or f32, sinks [heads] of the same; lse [rows, heads],
//            dsinks [heads] f32
//   tiling   forward: a warp a row and head; backward: a block a head, its warps rows WARPS apart.
//            Where d is no whole number of packets, a packet is one element (`width` 1)
//   memory   forward reads and writes out, 4 bytes an element in bf16; backward reads dout and out
//   numerics in f32, out rounded once more; rows of a warp in ascending order, warps in order
//   needs    where `width` is a packet: out and dout 16-byte aligned, d % packet == 0: the launcher
//            checks
#include "include/elements.cuh"
#include "include/reduce.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

template <class T>
static __device__ void forward(T* out, float* lse, const T* sinks, int rows, int heads, int d, int width) {
    const int64_t i = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (i >= int64_t(rows) * heads) return;
    const float own = lse[i], sink = widen(sinks[i % heads]), e = expf(-fabsf(own - sink));
    const float p = (own < sink ? e : 1.0f) / (1.0f + e);
    with_width<T>(width, [&](auto known) {
        constexpr int N = decltype(known)::N;
        for (int c = ptx::lane(); c < d / N; c += 32) {
            Elements<N> v = take<N>(out + i * d, c);
            for (int j = 0; j < N; ++j) v.x[j] *= p;
            put<N>(out + i * d, c, v);
        }
    });
    // All lanes have read it.
    ptx::sync_warp();
    if (ptx::lane() == 0) lse[i] = Max::of(own, sink) + log1pf(e);
}

template <class T>
static __device__ void backward(float* dsinks, const T* dout, const T* out, const float* lse, const T* sinks, int rows, int heads, int d,
                                int width) {
    Shared shared;
    float* room = shared.take<float>(WARPS);
    const int head = blockIdx.x;
    const float sink = widen(sinks[head]);
    float sum = 0.0f;
    with_width<T>(width, [&](auto known) {
        constexpr int N = decltype(known)::N;
        for (int row = threadIdx.x / 32; row < rows; row += WARPS) {
            const int64_t i = int64_t(row) * heads + head;
            const float p = expf(sink - lse[i]);
            for (int c = ptx::lane(); c < d / N; c += 32) {
                const Elements<N> g = take<N>(dout + i * d, c), v = take<N>(out + i * d, c);
                for (int j = 0; j < N; ++j) sum = fmaf(p * g.x[j], v.x[j], sum);
            }
        }
    });
    sum = block_reduce<Sum>(sum, room);
    if (threadIdx.x == 0) dsinks[head] -= sum;
}

#define KERNELS(T) \
    KERNEL(THREADS, sinks_forward_##T)(T* out, float* lse, const T* sinks, int rows, int heads, int d, int width) { \
        forward(out, lse, sinks, rows, heads, d, width); \
    } \
    KERNEL(THREADS, sinks_backward_##T)(float* dsinks, const T* dout, const T* out, const float* lse, const T* sinks, int rows, \
        int heads, int d, int width) { \
        backward(dsinks, dout, out, lse, sinks, rows, heads, d, width); \
    }
EACH_DTYPE(KERNELS)
