// Matrix products of a linear layer on tensor cores: y = x Wᵀ + b + r, act(x Wᵀ + b), and both
// gradients.
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

//                       BM   BN  WM  WN  DEPTH STAGES
using T128x128 = Tile<128, 128, 64, 64, 32, 4>;
using T64x64 = Tile<64, 64, 32, 32, 32, 4>;
using T64x32 = Tile<64, 32, 16, 32, 64, 6>;
using T16x32 = Tile<16, 32, 16, 16, 128, 4>;

template <class T, class F>
static __device__ __forceinline__ void tile(int m, int n, F f) {
    Shared shared;
    char* room = shared.take<char>(T::SHARED, 128);
    const RasterTile at = raster(blockIdx.x, (m + T::BM - 1) / T::BM, (n + T::BN - 1) / T::BN);
    f(at.down * T::BM, at.across * T::BN, reinterpret_cast<bf16*>(room), reinterpret_cast<float*>(room));
}

static __device__ __forceinline__ void add(Packet<bf16>& x, const Packet<bf16>& y) {
    for (int i = 0; i < 8; ++i) x.x[i] += y.x[i];
}

// y = x Wᵀ + bias + residual, or dx = dy W, where `w` is read by columns.
template <class T, bool COLUMNS>
static __device__ void forward(bf16* y, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual, int m, int n, int k) {
    tile<T>(m, n, [&](int i0, int j0, bf16* room, float* out) {
        Sums<T> sums;
        const Operand r = {w, n, COLUMNS ? n : k, j0, T::BN / 2};
        product<T, false, COLUMNS>(sums, nullptr, Operand{x, m, k, i0, T::BM / 2}, r, k, room);
        give<T, false>(sums, out, [&](int row, int col, Packet<bf16> v) {
            if (i0 + row >= m || j0 + col >= n) return;
            const int64_t at = (int64_t(i0 + row) * n + j0 + col) / 8;
            if (bias != nullptr) add(v, load(bias, (j0 + col) / 8));
            if (residual != nullptr) add(v, load(residual, at));
            store(y, at, v);
        });
    });
}

// up = x Wᵀ + bias, and y = act(up), or act(gate) * partner for n outputs and n partners.
template <class T, bool GATED>
static __device__ void activated(bf16* y, bf16* up, const bf16* x, const bf16* w, const bf16* bias, int m, int n, int k, int act) {
    constexpr int WIDTH = GATED ? T::BN / 2 : T::BN;
    Shared shared;
    char* memory = shared.take<char>(T::SHARED, 128);
    const RasterTile at = raster(blockIdx.x, (m + T::BM - 1) / T::BM, (n + WIDTH - 1) / WIDTH);
    const int i0 = at.down * T::BM, j0 = at.across * WIDTH, cols = GATED ? 2 * n : n;
    Sums<T> sums;
    const Operand r = {w, cols, k, j0, GATED ? n : T::BN / 2};
    product<T, false, false>(sums, nullptr, Operand{x, m, k, i0, T::BM / 2}, r, k, reinterpret_cast<bf16*>(memory));
    // What the function is given is what is kept.
    auto finish = [&](Packet<bf16>& v, int row, int col) {
        if (bias != nullptr) add(v, load(bias, col / 8));
        store(up, (int64_t(row) * cols + col) / 8, v);
        unpack(v.x, pack(v.x));
    };
    auto put = [&](Packet<bf16>& v, int row, int col) { store(y, (int64_t(row) * n + col) / 8, v); };
    float* out = reinterpret_cast<float*>(memory);
    if constexpr (GATED) {
        give<T, true>(sums, out, [&](int row, int col, Packet<bf16> gate, Packet<bf16> partner) {
            row += i0, col += j0;
            if (row >= m || col >= n) return;
            finish(gate, row, col);
            finish(partner, row, col + n);
            with_activation(act, [&](auto curve) {
                for (int i = 0; i < 8; ++i) gate.x[i] = curve.at(gate.x[i]).y * partner.x[i];
            });
            put(gate, row, col);
        });
    } else {
        give<T, false>(sums, out, [&](int row, int col, Packet<bf16> v) {
            row += i0, col += j0;
            if (row >= m || col >= n) return;
            finish(v, row, col);
            with_activation(act, [&](auto curve) {
                for (int i = 0; i < 8; ++i) v.x[i] = curve.at(v.x[i]).y;
            });
            put(v, row, col);
        });
    }
}

// dw += dyᵀ x, and dbias += the sums of dy's columns.
template <class T>
static __device__ void backward_weight(float* dw, float* dbias, const bf16* dy, const bf16* x, int m, int n, int k) {
    tile<T>(n, k, [&](int i0, int j0, bf16* room, float* out) {
        Sums<T> sums;
        const Operand l = {dy, n, n, i0, T::BM / 2}, r = {x, k, k, j0, T::BN / 2};
        if (dbias != nullptr && j0 == 0) {
            float ones[T::WM / 16][4] = {};
            product<T, true, true, true>(sums, ones, l, r, m, room);
            // Each column of the product with ones is the sum; the first warp of each row of warps
            // has the first.
            for (int i = 0; i < T::WM / 16 && T::col() == 0 && ptx::lane() % 4 == 0; ++i) {
                const int row = i0 + T::row() + 16 * i + ptx::lane() / 4;
                if (row < n) dbias[row] += ones[i][0];
                if (row + 8 < n) dbias[row + 8] += ones[i][2];
            }
        } else {
            product<T, true, true>(sums, nullptr, l, r, m, room);
        }
        give<T, false>(sums, out, [&](int row, int col, Packet<bf16> v) {
            if (i0 + row >= n || j0 + col >= k) return;
            const int64_t at = (int64_t(i0 + row) * k + j0 + col) / 4;
            for (int h = 0; h < 2; ++h) {
                Packet<float> sum = load(dw, at + h);
                for (int i = 0; i < 4; ++i) sum.x[i] += v.x[4 * h + i];
                store(dw, at + h, sum);
            }
        });
    });
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
