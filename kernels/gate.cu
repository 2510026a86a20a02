// Columns of wider rows, copied or gated by others: y = x act(g), and dg = dy x act'(g), each of
// its own columns: row r of x begins at x + r x_stride + x_first.
//   shapes   y, x, g, dg: `cols` columns of rows of their own stride; dy [rows, cols]; bf16 or f32.
//            `act`: place in the enum Gate
//   tiling   a thread an element, columns of a row side by side
//   memory   reads inputs once and writes outputs once; bytes an element in bf16: copy 4, forward
//            6, backward 8; twice that in f32
//   numerics in f32, one rounding on the way out
//   needs    fewer than 2^31 threads: the launcher checks
#include "include/activation.cuh"

constexpr int THREADS = 256;

// The value of the gate `act` and its derivative at g.
static __device__ Point gate(int act, float g) {
    if (act == 0) return Silu::at(g);
    if (act == 2) return {g, 1.0f};
    const auto [s, rest] = sigmoid(g);
    return {s, s * rest};
}

// f(row, column) of the thread's element.
template <class F>
static __device__ void each_of_columns(int rows, int cols, F f) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = i / unsigned(cols);
    if (row < unsigned(rows)) f(int64_t(row), int(i % unsigned(cols)));
}

#define KERNELS(T) \
    KERNEL(THREADS, gate_copy_##T)(T* y, const T* x, int rows, int cols, int y_first, int y_stride, int x_first, int x_stride) { \
        each_of_columns(rows, cols, [&](int64_t r, int c) { y[r * y_stride + y_first + c] = x[r * x_stride + x_first + c]; }); \
    } \
    KERNEL(THREADS, gate_forward_##T)(T* y, const T* x, const T* g, int rows, int cols, int y_first, int y_stride, int x_first, \
        int x_stride, int g_first, int g_stride, int act) { \
        each_of_columns(rows, cols, [&](int64_t r, int c) { \
            const float value = widen(x[r * x_stride + x_first + c]); \
            y[r * y_stride + y_first + c] = narrow<T>(value * gate(act, widen(g[r * g_stride + g_first + c])).y); \
        }); \
    } \
    KERNEL(THREADS, gate_backward_##T)(T* dg, const T* dy, const T* x, const T* g, int rows, int cols, int d_first, int d_stride, \
        int x_first, int x_stride, int g_first, int g_stride, int act) { \
        each_of_columns(rows, cols, [&](int64_t r, int c) { \
            const float value = widen(dy[r * cols + c]) * widen(x[r * x_stride + x_first + c]); \
            dg[r * d_stride + d_first + c] = narrow<T>(value * gate(act, widen(g[r * g_stride + g_first + c])).slope); \
        }); \
    }
EACH_DTYPE(KERNELS)
