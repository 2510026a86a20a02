// Matrix products of a linear layer on Hopper: those of matmul.cu by wgmma and TMA (include/tiles_sm90.cuh).
//   shapes   as in matmul.cu. Tensor maps have a swizzle of 128 bytes; those of operands have boxes of 64 k by a tile's
//            rows (half of R's), or by columns of 64 by 64; those of results boxes of 64 rows by 64 columns
//   tiling   a block a multiprocessor, which goes on to further tiles while it sends results; the tile's size is in the
//            kernel's name. 128x256: two blocks are a cluster that brings the shared operand once
//   memory   as in matmul.cu; results in bf16 go out by TMA from shared memory, 64 x 64 at a time, under the next tile
//   numerics as in matmul.cu, with the sums of wgmma: rows do not see their batch in any of these tiles
//   needs    n and k multiples of 8, all bf16 buffers at 16 bytes, at least one row of the reduced axis
#include "include/curves.cuh"
#include "include/tiles_sm90.cuh"

//                BN  CONSUMERS STAGES CLUSTER
using Wide = Tile<256, 2, 4, 2>;
using Mid = Tile<128, 2, 6, 1>;
using Few = Tile<64, 1, 8, 1>;
using Fewest = Tile<32, 1, 12, 1>;

// Two neighbours, 8 j + c and the next of row r + 8 h, as ptx::wgmma_bf16 has them.
template <int COUNT>
static __device__ __forceinline__ float2 two(const float (&d)[COUNT], int j, int h) {
    return float2{d[4 * j + 2 * h], d[4 * j + 2 * h + 1]};
}
static __device__ __forceinline__ float2 unpack(uint32_t v) {
    return float2{ptx::bits_float(v << 16), ptx::bits_float(v & 0xFFFF0000u)};
}
static __device__ __forceinline__ float2 load_two(const bf16* p, int64_t at) {
    return unpack(*reinterpret_cast<const uint32_t*>(p + at));
}
static __device__ __forceinline__ void store_two(bf16* p, int64_t at, uint32_t v) { *reinterpret_cast<uint32_t*>(p + at) = v; }
static __device__ __forceinline__ float2 operator+(float2 a, float2 b) { return float2{a.x + b.x, a.y + b.y}; }

// The first row and column of this thread's numbers.
static __device__ __forceinline__ int own_row() { return threadIdx.x % 128 / 32 * 16 + ptx::lane() / 4; }
static __device__ __forceinline__ int own_col() { return ptx::lane() % 4 * 2; }

// Results of a tile: 2 packed of row r + 8 h, columns 8 j + c, go to rows below `m` and columns below `n` of a matrix: to
// a map, or, from narrow tiles, to lines of `width` at `to`.
struct Results {
    const ptx::TensorMap* map;
    bf16* to;
    int width;
};
template <class T, int COLUMNS, class F>
static __device__ __forceinline__ void put(const Results& out, const Ring<T>& ring, int group, int& sent, int i0, int j0, int m, int n, F f) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
        const int col = j0 + 8 * j;
        if constexpr (T::SENDS) {
            if (j % 8 == 0 && col < n) send(ring, group, sent, out.map, col, i0, [&](int i, int h) { return f(j + i, h); });
        } else {
            for (int h = 0; h < 2; ++h) {
                const int row = i0 + own_row() + 8 * h;
                if (row < m && col < n) store_two(out.to, int64_t(row) * out.width + col + own_col(), f(j, h));
            }
        }
    }
}

// y = x Wᵀ + bias + residual, or dx = dy W, where `w` is read by columns.
template <class T, bool COLUMNS>
static __device__ void forward(const Results& y, const ptx::TensorMap* x, const ptx::TensorMap* w, const bf16* bias, const bf16* residual,
                               int m, int n, int k) {
    const int down = (m + T::BM - 1) / T::BM, across = (n + T::BN - 1) / T::BN;
    int sent = 0;
    each_tile<T, false, COLUMNS>(Operands{x, w, T::BN / 2, k}, down, across, T::BN, [&](const Ring<T>& ring, Turn<T>& turn, int group, int i0, int j0) {
        float sums[T::BN / 2], none[4];
        multiply<T, false, COLUMNS>(sums, none, ring, turn, k, group);
        auto finish = [&](int j, int h) {
            const int row = i0 + own_row() + 8 * h, col = j0 + 8 * j + own_col();
            float2 v = two(sums, j, h);
            if (row < m && col < n) {
                if (bias != nullptr) v = v + load_two(bias, col);
                if (residual != nullptr) v = v + load_two(residual, int64_t(row) * n + col);
            }
            return ptx::pack_bf16(v.x, v.y);
        };
        put<T, T::BN>(y, ring, group, sent, i0, j0, m, n, finish);
    });
}

// up = x Wᵀ + bias, and y = act(up), or act(gate) * partner for n outputs and n partners.
template <class T, bool GATED>
static __device__ void activated(const Results& y, const Results& gate, const Results& partner, const ptx::TensorMap* x,
                                 const ptx::TensorMap* w, const bf16* bias, int m, int n, int k, int act) {
    constexpr int WIDTH = GATED ? T::BN / 2 : T::BN, PARTNER = T::BN / 16;
    const int down = (m + T::BM - 1) / T::BM, across = (n + WIDTH - 1) / WIDTH;
    int sent = 0;
    const Operands o = {x, w, GATED ? n : T::BN / 2, k};
    each_tile<T, false, false>(o, down, across, WIDTH, [&](const Ring<T>& ring, Turn<T>& turn, int group, int i0, int j0) {
        float sums[T::BN / 2], none[4];
        multiply<T, false, false>(sums, none, ring, turn, k, group);
        // What the function is given is what is kept.
        uint32_t kept[T::BN / 4];
#pragma unroll
        for (int j = 0; j < T::BN / 8; ++j) {
            const bool partner = GATED && j >= PARTNER;
            const int col = j0 + 8 * (partner ? j - PARTNER : j) + own_col();
            for (int h = 0; h < 2; ++h) {
                float2 v = two(sums, j, h);
                if (bias != nullptr && col < n) v = v + load_two(bias, partner ? n + col : col);
                kept[2 * j + h] = ptx::pack_bf16(v.x, v.y);
            }
        }
        auto of = [&](int first) { return [&kept, first](int j, int h) { return kept[2 * (first + j) + h]; }; };
        put<T, WIDTH>(gate, ring, group, sent, i0, j0, m, n, of(0));
        if constexpr (GATED) put<T, WIDTH>(partner, ring, group, sent, i0, j0, m, n, of(PARTNER));
        // A choice for every four numbers, and so not all of them in registers at once.
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j) {
            with_activation(act, [&](auto curve) {
                for (int h = 0; h < 2; ++h) {
                    const float2 v = unpack(kept[2 * j + h]);
                    float2 made = {curve.at(v.x).y, curve.at(v.y).y};
                    if constexpr (GATED) {
                        const float2 u = unpack(kept[2 * (PARTNER + j) + h]);
                        made = float2{made.x * u.x, made.y * u.y};
                    }
                    kept[2 * j + h] = ptx::pack_bf16(made.x, made.y);
                }
            });
        }
        put<T, WIDTH>(y, ring, group, sent, i0, j0, m, n, of(0));
    });
}

// dw += dyᵀ x, and dbias += the sums of dy's columns.
template <class T>
static __device__ void backward_weight(float* dw, float* dbias, const ptx::TensorMap* dy, const ptx::TensorMap* x, int m, int n, int k) {
    const int down = (n + T::BM - 1) / T::BM, across = (k + T::BN - 1) / T::BN;
    bool filled = false;
    each_tile<T, true, true>(Operands{dy, x, 0, m}, down, across, T::BN, [&](const Ring<T>& ring, Turn<T>& turn, int group, int i0, int j0) {
        float sums[T::BN / 2], ones[4];
        if (dbias != nullptr && j0 == 0) {
            // 8 rows of 64 ones, where other kernels have their results.
            char* column = ring.out + group * 1024;
            if (!filled) {
                reinterpret_cast<uint2*>(column)[threadIdx.x % 128] = uint2{0x3F803F80u, 0x3F803F80u};
                ptx::fence_async();
                ptx::barrier(1 + group, 128);
                filled = true;
            }
            multiply<T, true, true, true>(sums, ones, ring, turn, m, group, column);
            // Every column of the product is the sum; the first lane of a row has the first.
            for (int h = 0; h < 2; ++h) {
                const int row = i0 + own_row() + 8 * h;
                if (own_col() == 0 && row < n) dbias[row] += ones[2 * h];
            }
        } else {
            multiply<T, true, true>(sums, ones, ring, turn, m, group);
        }
#pragma unroll
        for (int j = 0; j < T::BN / 8; ++j) {
            for (int h = 0; h < 2; ++h) {
                const int row = i0 + own_row() + 8 * h, col = j0 + 8 * j + own_col();
                if (row >= n || col >= k) continue;
                float2* to = reinterpret_cast<float2*>(dw + int64_t(row) * k + col);
                *to = *to + two(sums, j, h);
            }
        }
    });
}

KERNEL(384, matmul_sm90_forward_128x256_bf16, 2)(TENSOR_MAP y, TENSOR_MAP x, TENSOR_MAP w, OPTIONAL PACKED const bf16* bias,
                                            OPTIONAL PACKED const bf16* residual, int m, int n, int k) {
    forward<Wide, false>(Results{&y}, &x, &w, bias, residual, m, n, k);
}

KERNEL(384, matmul_sm90_forward_128x128_bf16, 1)(TENSOR_MAP y, TENSOR_MAP x, TENSOR_MAP w, OPTIONAL PACKED const bf16* bias,
                                            OPTIONAL PACKED const bf16* residual, int m, int n, int k) {
    forward<Mid, false>(Results{&y}, &x, &w, bias, residual, m, n, k);
}

KERNEL(256, matmul_sm90_forward_64x64_bf16)(PACKED bf16* y, TENSOR_MAP x, TENSOR_MAP w, OPTIONAL PACKED const bf16* bias,
                                           OPTIONAL PACKED const bf16* residual, int m, int n, int k) {
    forward<Few, false>(Results{nullptr, y, n}, &x, &w, bias, residual, m, n, k);
}

KERNEL(256, matmul_sm90_forward_64x32_bf16)(PACKED bf16* y, TENSOR_MAP x, TENSOR_MAP w, OPTIONAL PACKED const bf16* bias,
                                           OPTIONAL PACKED const bf16* residual, int m, int n, int k) {
    forward<Fewest, false>(Results{nullptr, y, n}, &x, &w, bias, residual, m, n, k);
}

KERNEL(384, matmul_sm90_activated_128x256_bf16, 2)(TENSOR_MAP y, TENSOR_MAP gate, TENSOR_MAP partner, TENSOR_MAP x, TENSOR_MAP w,
                                          OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) {
    activated<Wide, false>(Results{&y}, Results{&gate}, Results{&partner}, &x, &w, bias, m, n, k, act);
}

KERNEL(384, matmul_sm90_gated_128x256_bf16, 2)(TENSOR_MAP y, TENSOR_MAP gate, TENSOR_MAP partner, TENSOR_MAP x, TENSOR_MAP w,
                                          OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) {
    activated<Wide, true>(Results{&y}, Results{&gate}, Results{&partner}, &x, &w, bias, m, n, k, act);
}

KERNEL(384, matmul_sm90_activated_128x128_bf16, 1)(TENSOR_MAP y, TENSOR_MAP gate, TENSOR_MAP partner, TENSOR_MAP x, TENSOR_MAP w,
                                          OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) {
    activated<Mid, false>(Results{&y}, Results{&gate}, Results{&partner}, &x, &w, bias, m, n, k, act);
}

KERNEL(384, matmul_sm90_gated_128x128_bf16, 1)(TENSOR_MAP y, TENSOR_MAP gate, TENSOR_MAP partner, TENSOR_MAP x, TENSOR_MAP w,
                                          OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) {
    activated<Mid, true>(Results{&y}, Results{&gate}, Results{&partner}, &x, &w, bias, m, n, k, act);
}

KERNEL(256, matmul_sm90_activated_64x64_bf16)(PACKED bf16* y, PACKED bf16* up, TENSOR_MAP x, TENSOR_MAP w, OPTIONAL PACKED const bf16* bias,
                                         int m, int n, int k, int act) {
    activated<Few, false>(Results{nullptr, y, n}, Results{nullptr, up, n}, Results{nullptr, up, n}, &x, &w, bias, m, n, k, act);
}

KERNEL(256, matmul_sm90_gated_64x64_bf16)(PACKED bf16* y, PACKED bf16* up, TENSOR_MAP x, TENSOR_MAP w, OPTIONAL PACKED const bf16* bias,
                                         int m, int n, int k, int act) {
    activated<Few, true>(Results{nullptr, y, n}, Results{nullptr, up, 2 * n}, Results{nullptr, up + n, 2 * n}, &x, &w, bias, m, n, k, act);
}

KERNEL(256, matmul_sm90_activated_64x32_bf16)(PACKED bf16* y, PACKED bf16* up, TENSOR_MAP x, TENSOR_MAP w, OPTIONAL PACKED const bf16* bias,
                                         int m, int n, int k, int act) {
    activated<Fewest, false>(Results{nullptr, y, n}, Results{nullptr, up, n}, Results{nullptr, up, n}, &x, &w, bias, m, n, k, act);
}

KERNEL(256, matmul_sm90_gated_64x32_bf16)(PACKED bf16* y, PACKED bf16* up, TENSOR_MAP x, TENSOR_MAP w, OPTIONAL PACKED const bf16* bias,
                                         int m, int n, int k, int act) {
    activated<Fewest, true>(Results{nullptr, y, n}, Results{nullptr, up, 2 * n}, Results{nullptr, up + n, 2 * n}, &x, &w, bias, m, n, k, act);
}

KERNEL(384, matmul_sm90_backward_input_128x256_bf16, 2)(TENSOR_MAP dx, TENSOR_MAP dy, TENSOR_MAP w, int m, int n, int k) {
    forward<Wide, true>(Results{&dx}, &dy, &w, nullptr, nullptr, m, k, n);
}

KERNEL(384, matmul_sm90_backward_weight_128x256_bf16, 2)(PACKED float* dw, OPTIONAL float* dbias, TENSOR_MAP dy, TENSOR_MAP x, int m, int n, int k) {
    backward_weight<Wide>(dw, dbias, &dy, &x, m, n, k);
}

KERNEL(384, matmul_sm90_backward_input_128x128_bf16, 1)(TENSOR_MAP dx, TENSOR_MAP dy, TENSOR_MAP w, int m, int n, int k) {
    forward<Mid, true>(Results{&dx}, &dy, &w, nullptr, nullptr, m, k, n);
}

KERNEL(384, matmul_sm90_backward_weight_128x128_bf16, 1)(PACKED float* dw, OPTIONAL float* dbias, TENSOR_MAP dy, TENSOR_MAP x, int m, int n, int k) {
    backward_weight<Mid>(dw, dbias, &dy, &x, m, n, k);
}
