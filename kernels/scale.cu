// Multipliers and soft-caps: x[i] = factor x[i], with cap > 0 then x[i] = cap tanh(x[i] / cap).
//   shapes   x [count] bf16 or f32
//   tiling   a thread a packet of 16 bytes, and one for each of the count % packet at the end
//   memory   reads and writes x: 4 bytes an element in bf16, 8 in f32
//   numerics the product in f32, rounded once: in f32 the bits of the CPU; with a cap within 4
//            units in the last place of it
//   needs    x 16-byte aligned, fewer than 2^31 threads: the launcher checks
#include "include/elements.cuh"
#include "include/online_softmax.cuh"

constexpr int THREADS = 256;

template <class T>
static __device__ void in_place(T* x, uint64_t count, float factor, float cap) {
    const Scaling by(factor, cap);
    each_packet<Packet<T>::WIDTH>(count, [&](auto width, int64_t i) {
        constexpr int N = decltype(width)::N;
        Elements<N> v = take<N>(x, i);
        for (int j = 0; j < N; ++j) {
            v.x[j] *= by.scale;
            if (by.cap > 0.0f) v.x[j] = by.bend(v.x[j]);
        }
        put<N>(x, i, v);
    });
}

#define KERNELS(T) \
    KERNEL(THREADS, scale_in_place_##T)(PACKED T* x, uint64_t count, float factor, float cap) { in_place(x, count, factor, cap); }
EACH_DTYPE(KERNELS)
