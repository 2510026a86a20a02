// Columns of wider rows, copied or gated by others: y = x act(g), and dg = dy x act'(g), each of
// its own columns: row r of x begins at x + r x_stride + x_first. And a gate for each row:
// y = x sigmoid(g), its backward dy *= sigmoid(g) and dg[r] = sigmoid'(g[r]) sum_c dy x.
//   shapes   y, x, g, dg: `cols` columns of rows of their own stride; dy [rows, cols]; bf16 or f32.
//            `act`: place in the enum Gate. Of rows: y, x, dy [rows, cols], g and dg [rows] f32
//   tiling   a thread an element, columns of a row side by side; backward of rows: a warp a row,
//            lane l owns columns l, l + 32, ...
//   memory   reads inputs once and writes outputs once; bytes an element in bf16: copy 4, forward
//            6, backward 8, rows 4, their backward 6; twice that in f32
//   numerics in f32, one rounding on the way out; the sum of a row in an order of cols alone
//   needs    fewer than 2^31 threads: the launcher checks
#include "include/activation.cuh"
#include "include/reduce.cuh"

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

template <class T>
static __device__ void rows_backward(T* dy, float* dg, const T* x, const float* g, int rows, int cols) {
    const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const auto [s, rest] = sigmoid(g[row]);
    T* own = dy + int64_t(row) * cols;
    float sum = 0.0f;
    for (int c = ptx::lane(); c < cols; c += 32) {
        const float d = widen(own[c]);
        sum = fmaf(d, widen(x[int64_t(row) * cols + c]), sum);
        own[c] = narrow<T>(d * s);
    }
    sum = warp_reduce<Sum>(sum);
    if (ptx::lane() == 0) dg[row] = s * rest * sum;
}

#define KERNELS(T) \
    KERNEL(THREADS, gate_rows_##T)(T* y, const T* x, const float* g, int rows, int cols) { \
        each_of_columns(rows, cols, [&](int64_t r, int c) { \
            y[r * cols + c] = narrow<T>(widen(x[r * cols + c]) * sigmoid(g[r]).s); \
        }); \
    } \
    KERNEL(THREADS, gate_rows_backward_##T)(T* dy, float* dg, const T* x, const float* g, int rows, int cols) { \
        rows_backward(dy, dg, x, g, rows, cols); \
    } \
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
