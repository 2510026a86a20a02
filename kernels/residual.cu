// Residual connection: y[i] += x[i].
//   shapes   y, x [count] bf16 or f32
//   tiling   a thread a packet of 16 bytes, and one for each of the count % packet at the end
//   memory   reads both and writes y: 6 bytes an element in bf16, 12 in f32
//   numerics the sum in f32, rounded once: in f32 the bits of the CPU
//   needs    y and x 16-byte aligned, fewer than 2^31 threads: the launcher checks
#include "include/elements.cuh"

constexpr int THREADS = 256;

template <class T>
static __device__ void add(T* y, const T* x, uint64_t count) {
    each_packet<Packet<T>::WIDTH>(count, [&](auto width, int64_t i) {
        constexpr int N = decltype(width)::N;
        Elements<N> sum = take<N>(y, i);
        const Elements<N> more = take<N>(x, i);
        for (int j = 0; j < N; ++j) sum.x[j] += more.x[j];
        put<N>(y, i, sum);
    });
}

#define KERNELS(T) \
    KERNEL(THREADS, residual_add_##T)(PACKED T* y, PACKED const T* x, uint64_t count) { add(y, x, count); }
EACH_DTYPE(KERNELS)
