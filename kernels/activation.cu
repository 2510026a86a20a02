// Activations y = act(x), plain and gated (y = act(gate) * up), and their gradients.
//   shapes   plain: x, y, dx, dy [count]; gated: gate_up, dgate_up [rows, 2 cols] with gate and up
//            side by side, y, dy [rows, cols]; bf16 or f32. `act`: place in the enum Activation
//   tiling   a thread a packet of 16 bytes; plain: a thread an element for the count % packet at
//            the end; gated: a thread an element where a row is not whole packets (`width` 1)
//   memory   reads inputs once and writes outputs once; bytes an element of y in bf16: forward 4,
//            backward 6, gated forward 6, gated backward 10; twice that in f32
//   numerics all in f32, one rounding on the way out (include/activation.cuh)
//   needs    plain: 16-byte aligned buffers; gated, where `width` is a packet: the same, and cols %
//            packet == 0; fewer than 2^31 threads: the launcher checks
#include "include/activation.cuh"
#include "include/elements.cuh"

constexpr int THREADS = 256;

template <class T>
static __device__ void forward(T* y, const T* x, uint64_t count, int act) {
    each_packet<Packet<T>::WIDTH>(count, [&](auto width, int64_t i) {
        constexpr int N = decltype(width)::N;
        Elements<N> v = take<N>(x, i);
        with_activation(act, [&](auto curve) {
            for (int j = 0; j < N; ++j) v.x[j] = curve.at(v.x[j]).y;
        });
        put<N>(y, i, v);
    });
}

template <class T>
static __device__ void backward(T* dx, const T* dy, const T* x, uint64_t count, int act) {
    each_packet<Packet<T>::WIDTH>(count, [&](auto width, int64_t i) {
        constexpr int N = decltype(width)::N;
        Elements<N> g = take<N>(dy, i);
        const Elements<N> v = take<N>(x, i);
        with_activation(act, [&](auto curve) {
            for (int j = 0; j < N; ++j) g.x[j] *= curve.at(v.x[j]).slope;
        });
        put<N>(dx, i, g);
    });
}

template <class T>
static __device__ void gated_forward(T* y, const T* gate_up, int rows, int cols, int act, int width) {
    each_of_rows<T>(rows, cols, width, [&](auto known, int row, int i) {
        constexpr int N = decltype(known)::N;
        const int partner = cols / N + i;
        const T* x = gate_up + int64_t(row) * 2 * cols;
        Elements<N> gate = take<N>(x, i);
        const Elements<N> up = take<N>(x, partner);
        with_activation(act, [&](auto curve) {
            for (int j = 0; j < N; ++j) gate.x[j] = curve.at(gate.x[j]).y * up.x[j];
        });
        put<N>(y + int64_t(row) * cols, i, gate);
    });
}

// dgate = dy up act'(gate), dup = dy act(gate).
template <class T>
static __device__ void gated_backward(T* dgate_up, const T* dy, const T* gate_up, int rows, int cols, int act, int width) {
    each_of_rows<T>(rows, cols, width, [&](auto known, int row, int i) {
        constexpr int N = decltype(known)::N;
        const int partner = cols / N + i;
        const int64_t base = int64_t(row) * 2 * cols;
        const Elements<N> g = take<N>(dy + int64_t(row) * cols, i);
        Elements<N> gate = take<N>(gate_up + base, i), up = take<N>(gate_up + base, partner);
        with_activation(act, [&](auto curve) {
            for (int j = 0; j < N; ++j) {
                const Point at = curve.at(gate.x[j]);
                gate.x[j] = g.x[j] * up.x[j] * at.slope;
                up.x[j] = g.x[j] * at.y;
            }
        });
        put<N>(dgate_up + base, i, gate);
        put<N>(dgate_up + base, partner, up);
    });
}

#define KERNELS(T) \
    KERNEL(THREADS, activation_forward_##T)(PACKED T* y, PACKED const T* x, uint64_t count, int act) { \
        forward(y, x, count, act); \
    } \
    KERNEL(THREADS, activation_backward_##T)(PACKED T* dx, PACKED const T* dy, PACKED const T* x, uint64_t count, int act) { \
        backward(dx, dy, x, count, act); \
    } \
    KERNEL(THREADS, activation_gated_forward_##T)(T* y, const T* gate_up, int rows, int cols, int act, int width) { \
        gated_forward(y, gate_up, rows, cols, act, width); \
    } \
    KERNEL(THREADS, activation_gated_backward_##T)(T* dgate_up, const T* dy, const T* gate_up, int rows, int cols, int act, \
        int width) { \
        gated_backward(dgate_up, dy, gate_up, rows, cols, act, width); \
    }
EACH_DTYPE(KERNELS)
