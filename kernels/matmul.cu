// Matrix products of a linear layer: y = x Wᵀ + b + r, act(x Wᵀ + b), and both gradients.
//   shapes   x [m, k], w [n, k], y, dy and residual [m, n], bias [n] bf16; dx [m, k] bf16; dw [n,
//            k], dbias [n] f32. activated: up [m, n] = x Wᵀ + b, act [m, n], or, gated, act [m, n /
//            2] = f(up's first half) * its second
//   tiling   a tile of C a block (include/tiles.cuh), its size in the kernel's name; which one is
//            for which shape is told by the table in src/ops/matmul/tiles.rs. Of a gated product
//            half the tile's columns are gates and half their partners, so that a block has both
//   memory   a tile reads (BM + BN) k elements, most from L2, since blocks that run together share
//            rows or columns; the sums go to shared memory once, so that what is read and written
//            with them is 16 bytes wide
//   numerics f32 sums, each one chain over the reduced axis in ascending steps of 16, in every
//            tile: rows do not see their batch. y is rounded once; act is made from the rounded up,
//            as by activation.cu. dw += adds the sum of this call to what is there: its bits depend
//            on how rows are split over calls
//   needs    n and k multiples of 8, all bf16 buffers at 16 bytes; the launcher checks
#include "include/activation.cuh"
#include "include/tiles.cuh"

//                   BM  BN  WM  WN  DEPTH STAGES
using T64x32 = Tile<64, 32, 16, 32, 64, 6>;
using T16x32 = Tile<16, 32, 16, 16, 128, 4>;

// y = x Wᵀ + bias + residual, or dx = dy W, where `w` is read by columns.
template <class T, bool COLUMNS>
static __device__ void forward(bf16* y, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual, int m, int n, int k) {
    each_eight<T, false, COLUMNS>(Operand{x, m, k}, Operand{w, n, COLUMNS ? n : k}, k, [&](int row, int col, Elements<8> v) {
        const int64_t at = (int64_t(row) * n + col) / 8;
        if (bias != nullptr) add(v, load(bias, col / 8));
        if (residual != nullptr) add(v, load(residual, at));
        store(y, at, v);
    });
}

static __device__ __forceinline__ void multiply(Elements<8>& x, const Elements<8>& y) {
    for (int i = 0; i < 8; ++i) x.x[i] *= y.x[i];
}

// up = x Wᵀ + bias, and y = act(up), or act(gate) * partner for n outputs and n partners.
template <class T, bool GATED>
static __device__ void activated(bf16* y, bf16* up, const bf16* x, const bf16* w, const bf16* bias, int m, int n, int k, int act) {
    const int cols = GATED ? 2 * n : n;
    // What the function is given is what is kept.
    auto finish = [&](Elements<8>& v, int row, int col) {
        if (bias != nullptr) add(v, load(bias, col / 8));
        store(up, (int64_t(row) * cols + col) / 8, v);
        unpack(v.x, pack(v.x));
    };
    const Operand r = {w, cols, k, 0, n};
    each_eight<T, false, false, GATED>(Operand{x, m, k}, r, k, [&](int row, int col, Elements<8> v, auto... partner) {
        finish(v, row, col);
        (finish(partner, row, col + n), ...);
        with_activation(act, [&](auto curve) {
            for (int i = 0; i < 8; ++i) v.x[i] = curve.at(v.x[i]).y;
        });
        (multiply(v, partner), ...);
        store(y, (int64_t(row) * n + col) / 8, v);
    });
}

// dw += dyᵀ x, and dbias += the sums of dy's columns.
template <class T>
static __device__ void backward_weight(float* dw, float* dbias, const bf16* dy, const bf16* x, int m, int n, int k) {
    auto f = [&](int row, int col, const Elements<8>& v) { add_at(dw, (int64_t(row) * k + col) / 8, v); };
    each_eight<T, true, true, false, true>(Operand{dy, n, n}, Operand{x, k, k}, m, f, dbias);
}

#define EACH_TILE(X) X(128x128, 128) X(64x64, 128) X(64x32, 128) X(16x32, 64)
#define KERNELS(TILE, THREADS) \
    KERNEL(THREADS, matmul_forward_##TILE##_bf16)(PACKED bf16* y, PACKED const bf16* x, PACKED const bf16* w, \
        OPTIONAL PACKED const bf16* bias, OPTIONAL PACKED const bf16* residual, int m, int n, int k) { \
        forward<T##TILE, false>(y, x, w, bias, residual, m, n, k); \
    } \
    KERNEL(THREADS, matmul_activated_##TILE##_bf16)(PACKED bf16* y, PACKED bf16* up, PACKED const bf16* x, \
        PACKED const bf16* w, OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) { \
        activated<T##TILE, false>(y, up, x, w, bias, m, n, k, act); \
    } \
    KERNEL(THREADS, matmul_gated_##TILE##_bf16)(PACKED bf16* y, PACKED bf16* up, PACKED const bf16* x, \
        PACKED const bf16* w, OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) { \
        activated<T##TILE, true>(y, up, x, w, bias, m, n, k, act); \
    }
EACH_TILE(KERNELS)

#define EACH_BACKWARD_TILE(X) X(128x128) X(64x64)
#define BACKWARD(TILE) \
    KERNEL(128, matmul_backward_input_##TILE##_bf16)(PACKED bf16* dx, PACKED const bf16* dy, PACKED const bf16* w, \
        int m, int n, int k) { \
        forward<T##TILE, true>(dx, dy, w, nullptr, nullptr, m, k, n); \
    } \
    KERNEL(128, matmul_backward_weight_##TILE##_bf16)(PACKED float* dw, OPTIONAL float* dbias, PACKED const bf16* dy, \
        PACKED const bf16* x, int m, int n, int k) { \
        backward_weight<T##TILE>(dw, dbias, dy, x, m, n, k); \
    }
EACH_BACKWARD_TILE(BACKWARD)
