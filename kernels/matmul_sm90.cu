// Matrix products of a linear layer on Hopper: those of matmul.cu by wgmma and TMA.
//   shapes   as in matmul.cu. Tensor maps have a swizzle of 128 bytes; those of operands have boxes
//            of 64 k by a tile's rows (half of R's), or by columns of 64 by 64; those of results
//            boxes of 64 rows by 64 columns
//   tiling   a block a multiprocessor, which goes on to further tiles while it sends results; the
//            tile's size is in the kernel's name. 128x256 and 128x128: two blocks are a cluster
//            that loads the shared operand once
//   memory   as in matmul.cu; results in bf16 go out by TMA from shared memory, 64 x 64 at a time,
//            under the next tile
//   numerics as in matmul.cu, with the sums of wgmma: rows do not see their batch in any tile
//   needs    n and k multiples of 8, bf16 buffers at 16 bytes, a row or more of the reduced axis
#include "include/activation.cuh"
#include "include/tiles_sm90.cuh"

//                BN  CONSUMERS STAGES CLUSTER
using T128x256 = Tile<256, 2, 4, 2>;
using T128x128 = Tile<128, 2, 6, 2>;
using T64x64 = Tile<64, 1, 8, 1>;
using T64x32 = Tile<32, 1, 12, 1>;

// Two neighbours, 8 j + c and the next of row r + 8 h, as ptx::wgmma_bf16 has them.
template <int COUNT>
static __device__ __forceinline__ float2 two(const float (&d)[COUNT], int j, int h) {
    return float2{d[4 * j + 2 * h], d[4 * j + 2 * h + 1]};
}
static __device__ __forceinline__ float2 unpack(uint32_t v) {
    return float2{ptx::bits_float(v << 16), ptx::bits_float(v & 0xFFFF0000u)};
}
static __device__ __forceinline__ uint32_t pack(float2 v) { return ptx::pack_bf16(v.x, v.y); }
static __device__ __forceinline__ float2 operator+(float2 a, float2 b) { return float2{a.x + b.x, a.y + b.y}; }

// What is added where there is nothing to add: -0, so that 0 keeps its sign.
constexpr uint32_t NOTHING = 0x80008000u;

// Where results go: to a map, or, from narrow tiles, to lines of `width` at `to`.
struct Results {
    const ptx::TensorMap* map;
    bf16* to;
    int width;
};
// Eights of columns that are put there at once.
template <int COLUMNS>
constexpr int TURN = COLUMNS < 64 ? COLUMNS / 8 : 8;

// Puts EIGHTS eights from row i0 and column j0 on, f(j, h) packed, where row < m and column < n.
template <class T, int EIGHTS, class F>
static __device__ __forceinline__ void put(const Results& out, const Ring<T>& ring, int group, int& sent, int i0, int j0, int m, int n, F f) {
    if constexpr (T::SENDS) {
        send(ring, group, sent, out.map, j0, i0, f);
    } else {
#pragma unroll
        for (int j = 0; j < EIGHTS; ++j) {
            for (int h = 0; h < 2; ++h) {
                const int row = i0 + own_row() + 8 * h, col = j0 + 8 * j + own_col();
                if (row < m && col < n) *reinterpret_cast<uint32_t*>(out.to + int64_t(row) * out.width + col) = f(j, h);
            }
        }
    }
}

// The bias of EIGHTS eights from column j0 on, all on their way before the first is used.
template <int EIGHTS>
static __device__ __forceinline__ void load_bias(uint32_t (&out)[EIGHTS], const bf16* bias, int j0, int n) {
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) {
        const int col = j0 + 8 * j + own_col();
        out[j] = bias != nullptr && col < n ? *reinterpret_cast<const uint32_t*>(bias + col) : NOTHING;
    }
}

// y = x Wᵀ + bias + residual, or dx = dy W, where `w` is read by columns.
template <class T, bool COLUMNS>
static __device__ void forward(const Results& y, const ptx::TensorMap* x, const ptx::TensorMap* w, const bf16* bias, const bf16* residual,
                               int m, int n, int k) {
    int sent = 0;
    each_tile<T, false, COLUMNS>(Operands{x, w, T::BN / 2, k}, m, n, T::BN, [&](const Ring<T>& ring, Phase<T>& phase, int group, int i0, int j0) {
        constexpr int EIGHTS = TURN<T::BN>;
        float sums[T::BN / 2], none[4];
        multiply<T, false, COLUMNS>(sums, none, ring, phase, k, group);
#pragma unroll
        for (int j = 0; j < T::BN / 8; j += EIGHTS) {
            const int first = j0 + 8 * j;
            if (first >= n) break;
            uint32_t added[EIGHTS], old[2 * EIGHTS];
            load_bias(added, bias, first, n);
#pragma unroll
            for (int i = 0; i < 2 * EIGHTS; ++i) {
                const int row = i0 + own_row() + 8 * (i % 2), col = first + 8 * (i / 2) + own_col();
                const bool there = residual != nullptr && row < m && col < n;
                old[i] = there ? *reinterpret_cast<const uint32_t*>(residual + int64_t(row) * n + col) : NOTHING;
            }
            put<T, EIGHTS>(y, ring, group, sent, i0, first, m, n, [&](int i, int h) {
                return pack(two(sums, j + i, h) + unpack(added[i]) + unpack(old[2 * i + h]));
            });
        }
    });
}

// up = x Wᵀ + bias, and y = act(up), or act(gate) * partner for n outputs and n partners, which
// have a place of their own.
template <class T, bool GATED>
static __device__ void activated(const Results& y, const Results& gate, const Results& partner, const ptx::TensorMap* x,
                                 const ptx::TensorMap* w, const bf16* bias, int m, int n, int k, int act) {
    constexpr int WIDTH = GATED ? T::BN / 2 : T::BN, PARTNER = T::BN / 16, EIGHTS = TURN<WIDTH>;
    int sent = 0;
    const Operands o = {x, w, GATED ? n : T::BN / 2, k};
    each_tile<T, false, false>(o, m, n, WIDTH, [&](const Ring<T>& ring, Phase<T>& phase, int group, int i0, int j0) {
        float sums[T::BN / 2], none[4];
        multiply<T, false, false>(sums, none, ring, phase, k, group);
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j += EIGHTS) {
            const int first = j0 + 8 * j;
            if (first >= n) break;
            uint32_t added[EIGHTS], more[EIGHTS];
            load_bias(added, bias, first, n);
            load_bias(more, GATED && bias != nullptr ? bias + n : nullptr, first, n);
            // What the function is given is what is kept.
            auto up = [&](int i, int h) { return pack(two(sums, j + i, h) + unpack(added[i])); };
            auto other = [&](int i, int h) { return pack(two(sums, PARTNER + j + i, h) + unpack(more[i])); };
            put<T, EIGHTS>(gate, ring, group, sent, i0, first, m, n, up);
            if constexpr (GATED) put<T, EIGHTS>(partner, ring, group, sent, i0, first, m, n, other);
            auto made = [](auto curve, uint32_t up, uint32_t other) {
                const float2 v = unpack(up), u = unpack(other), f = {curve.at(v.x).y, curve.at(v.y).y};
                return pack(GATED ? float2{f.x * u.x, f.y * u.y} : f);
            };
            if constexpr (T::SENDS) {
                // From what was just sent, so that the function's code is there once: the gate was
                // in this buffer before, and the partner, or what there is without a gate, is in
                // the other.
                send_written(ring, group, sent, y.map, first, i0, [&](char* buffer, char* before) {
                    with_activation(act, [&](auto curve) {
                        each_word<1>(buffer, [&](uint32_t& word, int, int) {
                            const uint32_t last = *reinterpret_cast<uint32_t*>(before + (reinterpret_cast<char*>(&word) - buffer));
                            word = made(curve, GATED ? word : last, last);
                        });
                    });
                });
            } else {
                with_activation(act, [&](auto curve) {
                    put<T, EIGHTS>(y, ring, group, sent, i0, first, m, n, [&](int i, int h) {
                        return made(curve, up(i, h), GATED ? other(i, h) : 0);
                    });
                });
            }
        }
    });
}

// dw += dyᵀ x, and dbias += the sums of dy's columns.
template <class T>
static __device__ void backward_weight(float* dw, float* dbias, const ptx::TensorMap* dy, const ptx::TensorMap* x, int m, int n, int k) {
    bool filled = false;
    each_tile<T, true, true>(Operands{dy, x, 0, m}, n, k, T::BN, [&](const Ring<T>& ring, Phase<T>& phase, int group, int i0, int j0) {
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
            multiply<T, true, true, true>(sums, ones, ring, phase, m, group, column);
            // Every column of the product is the sum; the first lane of a row has the first.
            for (int h = 0; h < 2; ++h) {
                const int row = i0 + own_row() + 8 * h;
                if (own_col() == 0 && row < n) dbias[row] += ones[2 * h];
            }
        } else {
            multiply<T, true, true>(sums, ones, ring, phase, m, group);
        }
#pragma unroll
        for (int j = 0; j < T::BN / 8; j += 8) {
            // All of 64 columns are on their way before the first is used.
            float2 old[16];
            auto each = [&](auto f) {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int row = i0 + own_row() + 8 * (i % 2), col = j0 + 8 * (j + i / 2) + own_col();
                    if (row < n && col < k) f(i, reinterpret_cast<float2*>(dw + int64_t(row) * k + col));
                }
            };
            each([&](int i, float2* p) { old[i] = *p; });
            each([&](int i, float2* p) { *p = old[i] + two(sums, j + i / 2, i % 2); });
        }
    });
}

#define EACH_TILE(X) X(128x256) X(128x128)
#define KERNELS(TILE) \
    KERNEL(384, matmul_sm90_forward_##TILE##_bf16, 2)(TENSOR_MAP y, TENSOR_MAP x, TENSOR_MAP w, \
        OPTIONAL PACKED const bf16* bias, OPTIONAL PACKED const bf16* residual, int m, int n, int k) { \
        forward<T##TILE, false>(Results{&y}, &x, &w, bias, residual, m, n, k); \
    } \
    KERNEL(384, matmul_sm90_activated_##TILE##_bf16, 2)(TENSOR_MAP y, TENSOR_MAP gate, TENSOR_MAP partner, TENSOR_MAP x, \
        TENSOR_MAP w, OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) { \
        activated<T##TILE, false>(Results{&y}, Results{&gate}, Results{&partner}, &x, &w, bias, m, n, k, act); \
    } \
    KERNEL(384, matmul_sm90_gated_##TILE##_bf16, 2)(TENSOR_MAP y, TENSOR_MAP gate, TENSOR_MAP partner, TENSOR_MAP x, \
        TENSOR_MAP w, OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) { \
        activated<T##TILE, true>(Results{&y}, Results{&gate}, Results{&partner}, &x, &w, bias, m, n, k, act); \
    } \
    KERNEL(384, matmul_sm90_backward_input_##TILE##_bf16, 2)(TENSOR_MAP dx, TENSOR_MAP dy, TENSOR_MAP w, int m, int n, int k) { \
        forward<T##TILE, true>(Results{&dx}, &dy, &w, nullptr, nullptr, m, k, n); \
    } \
    KERNEL(384, matmul_sm90_backward_weight_##TILE##_bf16, 2)(PACKED float* dw, OPTIONAL float* dbias, TENSOR_MAP dy, \
        TENSOR_MAP x, int m, int n, int k) { \
        backward_weight<T##TILE>(dw, dbias, &dy, &x, m, n, k); \
    }
EACH_TILE(KERNELS)

// Tiles of few rows, whose results go to memory without TMA.
#define EACH_DIRECT_TILE(X) X(64x64) X(64x32)
#define DIRECT(TILE) \
    KERNEL(256, matmul_sm90_forward_direct_##TILE##_bf16)(PACKED bf16* y, TENSOR_MAP x, TENSOR_MAP w, \
        OPTIONAL PACKED const bf16* bias, OPTIONAL PACKED const bf16* residual, int m, int n, int k) { \
        forward<T##TILE, false>(Results{nullptr, y, n}, &x, &w, bias, residual, m, n, k); \
    } \
    KERNEL(256, matmul_sm90_activated_direct_##TILE##_bf16)(PACKED bf16* y, PACKED bf16* up, TENSOR_MAP x, TENSOR_MAP w, \
        OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) { \
        const Results results = {nullptr, up, n}; \
        activated<T##TILE, false>(Results{nullptr, y, n}, results, results, &x, &w, bias, m, n, k, act); \
    } \
    KERNEL(256, matmul_sm90_gated_direct_##TILE##_bf16)(PACKED bf16* y, PACKED bf16* up, TENSOR_MAP x, TENSOR_MAP w, \
        OPTIONAL PACKED const bf16* bias, int m, int n, int k, int act) { \
        const Results gate = {nullptr, up, 2 * n}, partner = {nullptr, up + n, 2 * n}; \
        activated<T##TILE, true>(Results{nullptr, y, n}, gate, partner, &x, &w, bias, m, n, k, act); \
    }
EACH_DIRECT_TILE(DIRECT)
