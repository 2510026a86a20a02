// The LM head and the log-probs of its targets on Hopper: logprob.cu by wgmma and TMA.
//   shapes   as in logprob.cu, with the same partials and lists, which its merge, pick and top
//            take. Tensor maps have a swizzle of 128 bytes; those of operands have boxes of 64 of
//            the reduced axis by a tile's rows (half of w's), w of hidden and results 64 by 64
//   tiling   a block goes from chunk to chunk of the vocabulary; for one it has rows, whose tiles
//            it computes one after the other while the next one's operands come. 128x256: two
//            warpgroups, and two blocks are a cluster that loads w once. 128x128 and 64x128: where
//            there are no more rows than that, and for top, which needs shared memory for lists.
//            Backward: tiles as in matmul_sm90.cu, whose backward_weight makes dw
//   memory   as in logprob.cu; dz and dh go out by TMA from shared memory, 64 x 64 at a time, under
//            the next tile
//   numerics as in logprob.cu, with the sums of wgmma: the same bits in all tiles
//   needs    d a multiple of 8, h and w at 16 bytes, at least one row
#include "include/gumbel.cuh"
#include "include/tiles_sm90.cuh"
#include "include/top.cuh"

//                 BN  CONSUMERS STAGES CLUSTER SENDS
using T128x256 = Tile<256, 2, 4, 2, false>;
using T128x128 = Tile<128, 2, 6, 1, false>;
using T64x128 = Tile<128, 1, 8, 1, false>;
// With lists of the 16 rows of a warp.
using Lists = Top<16>;
template <int CONSUMERS, int STAGES>
struct WithTop : Tile<128, CONSUMERS, STAGES, 1, false> {
    using T = Tile<128, CONSUMERS, STAGES, 1, false>;
    static constexpr int OUT_BYTES = 4 * CONSUMERS * Lists::BYTES;
    static_assert(STAGES * T::STAGE + (STAGES + 1) * 16 + OUT_BYTES <= 227 * 1024, "what a block has");
};
using Top128x128 = WithTop<2, 5>;
using Top64x128 = WithTop<1, 8>;
// Tiles of the gradients, as in matmul_sm90.cu.
using Hidden128x256 = Tile<256, 2, 4, 2>;
using Hidden128x128 = Tile<128, 2, 6, 2>;

// The products whose parts are asked for, and where these go: lists of the k best, too, where tiles
// have memory for them.
struct Parts {
    const ptx::TensorMap *h, *w;
    int rows, vocab, d;
    float* partial;
    uint64_t* lists;
    int k;
};

// A chunk's part, S, of each of a lane's two rows: begin(i, row) of row i, then add(part, x, i,
// row, v) the lane's share x of each tile, whose first column is v.
template <class T, class S, class Begin, class Add>
static __device__ __forceinline__ void each_part(const Parts& to, const Scaling& by, Begin begin, Add add) {
    constexpr bool TOP = T::OUT_BYTES > 0;
    const int rows = to.rows, vocab = to.vocab, chunks = (vocab + CHUNK - 1) / CHUNK;
    S parts[2];
    each_tile<T, false, false, CHUNK / T::BN>(Operands{to.h, to.w, T::BN / 2, to.d}, rows, vocab, CHUNK,
                                             [&](const Ring<T>& ring, Phase<T>& phase, int group, int i0, int j0) {
        const int warp = threadIdx.x / 32 - 4, first = i0 + threadIdx.x % 128 / 32 * 16;
        if (j0 % CHUNK == 0) {
            for (int i = 0; i < 2; ++i) parts[i] = S(), begin(i, i0 + own_row() + 8 * i);
        }
        const Lists top(ring.out, warp, to.k);
        float sums[T::BN / 2], none[4];
        multiply<T, false, false>(sums, none, ring, phase, to.d, group);
#pragma unroll
        for (int v = 0; v < T::BN; v += COLUMNS) {
            if (j0 + v >= vocab) break;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float x[Lane::COUNT];
#pragma unroll
                for (int q = 0; q < Lane::COUNT; ++q) x[q] = sums[v / 2 + q / 2 * 4 + 2 * i + q % 2];
                add(parts[i], x, i, i0 + own_row() + 8 * i, j0 + v);
                if constexpr (TOP) top.add(x, 8 * i, rows - first - 8 * i, j0 + v, vocab, by.scale);
            }
        }
        if (j0 % CHUNK != CHUNK - T::BN) return;
        if constexpr (TOP) top.store(to.lists, first, rows, j0 / CHUNK, chunks);
        for (int i = 0; i < 2; ++i) {
            const int row = i0 + own_row() + 8 * i;
            write_part(to.partial, int64_t(row) * chunks + j0 / CHUNK, parts[i], row < rows);
        }
    });
}

template <class T>
static __device__ void sample(const Parts& to, float scale, float cap, const Draws& draws) {
    const Scaling by(scale, cap);
    each_part<T, Sampled>(to, by, [](int, int) {}, [&](Sampled& part, float (&x)[Lane::COUNT], int, int row, int v) {
        reduce(part.state, x, to.vocab - v, ~0u, by);
        if (row < to.rows) choose(part.best, x, v, to.vocab, by.scale, draws, row);
    });
}

template <class T>
static __device__ void forward(const Parts& to, float scale, float cap, const uint32_t* targets) {
    const Scaling by(scale, cap);
    uint32_t target[2];
    auto begin = [&](int i, int row) { target[i] = row < to.rows ? targets[row] : ~0u; };
    each_part<T, State>(to, by, begin, [&](State& part, float (&x)[Lane::COUNT], int i, int, int v) {
        reduce(part, x, to.vocab - v, target[i] - v, by);
    });
}

// Adds the product of dz and `n` rows of w to the sums, or, where they are the first, writes it;
// the last are rounded to dh.
template <class T>
static __device__ void hidden(const ptx::TensorMap* dh, float* sums, const ptx::TensorMap* dz, const ptx::TensorMap* w, int rows, int n,
                              int d, int first, int last) {
    int sent = 0;
    each_tile<T, false, true>(Operands{dz, w, 0, n}, rows, d, T::BN,
                              [&](const Ring<T>& ring, Phase<T>& phase, int group, int i0, int j0) {
        float own[T::BN / 2], none[4];
        multiply<T, false, true>(own, none, ring, phase, n, group);
        uint32_t made[T::BN / 4];
#pragma unroll
        for (int j = 0; j < T::BN / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = i0 + own_row() + 8 * i, col = j0 + 8 * j + own_col();
                float2 v = {own[4 * j + 2 * i], own[4 * j + 2 * i + 1]};
                if (row < rows && col < d) {
                    float2* at = reinterpret_cast<float2*>(sums + int64_t(row) * d + col);
                    if (first == 0) v = float2{at->x + v.x, at->y + v.y};
                    if (last == 0) *at = v;
                }
                made[2 * j + i] = ptx::pack_bf16(v.x, v.y);
            }
        }
        if (last == 0) return;
#pragma unroll
        for (int v = 0; v < T::BN; v += 64) {
            if (j0 + v >= d) break;
            send(ring, group, sent, dh, j0 + v, i0, [&](int j, int h) { return made[v / 4 + 2 * j + h]; });
        }
    });
}

// Tile, threads, blocks of a cluster, blocks that share the registers.
#define EACH_TILE(X) X(128x256, 384, 2, 1) X(128x128, 384, 1, 1) X(64x128, 256, 1, 0)
#define KERNELS(TILE, THREADS, CLUSTER, BESIDE) \
    KERNEL(THREADS, logprob_sm90_forward_##TILE##_bf16, CLUSTER, BESIDE)(PACKED float* partial, TENSOR_MAP h, TENSOR_MAP w, \
        const uint32_t* targets, int rows, int vocab, int d, float scale, float cap) { \
        forward<T##TILE>(Parts{&h, &w, rows, vocab, d, partial}, scale, cap, targets); \
    } \
    KERNEL(THREADS, logprob_sm90_sample_##TILE##_bf16, CLUSTER, BESIDE)(PACKED float* partial, TENSOR_MAP h, TENSOR_MAP w, \
        const uint64_t* samples, const uint32_t* positions, int rows, int vocab, int d, float scale, float cap, uint64_t seed, \
        uint64_t step, uint32_t purpose, int greedy) { \
        const Draws draws = {Stream{seed, step, purpose}, samples, positions, greedy != 0}; \
        sample<T##TILE>(Parts{&h, &w, rows, vocab, d, partial}, scale, cap, draws); \
    }
EACH_TILE(KERNELS)

#define EACH_TOP_TILE(X) X(128x128, 384, 1) X(64x128, 256, 0)
#define SAMPLE_TOP(TILE, THREADS, BESIDE) \
    KERNEL(THREADS, logprob_sm90_sample_top_##TILE##_bf16, 1, BESIDE)(PACKED float* partial, uint64_t* lists, TENSOR_MAP h, \
        TENSOR_MAP w, const uint64_t* samples, const uint32_t* positions, int rows, int vocab, int d, float scale, float cap, \
        uint64_t seed, uint64_t step, uint32_t purpose, int greedy, int k) { \
        const Draws draws = {Stream{seed, step, purpose}, samples, positions, greedy != 0}; \
        sample<Top##TILE>(Parts{&h, &w, rows, vocab, d, partial, lists, k}, scale, cap, draws); \
    }
EACH_TOP_TILE(SAMPLE_TOP)

// The gradient of the products with `n` columns of the vocabulary, of which the first is number
// `first`; zeros up to `width`.
KERNEL(384, logprob_sm90_gradient_bf16, 2)(TENSOR_MAP dz, TENSOR_MAP h, TENSOR_MAP w, const uint32_t* targets, const float* lse,
                                      const float* dlogp, OPTIONAL const float* entropy, OPTIONAL const float* dentropy, int rows,
                                      int n, int width, int first, int d, float scale, float cap) {
    using T = Hidden128x256;
    int sent = 0;
    each_tile<T, false, false>(Operands{&h, &w, T::BN / 2, d}, rows, n, T::BN,
                               [&](const Ring<T>& ring, Phase<T>& phase, int group, int i0, int j0) {
        // A logit z has p = e^(z - all) and the gradient -p (dlogp + dentropy (z - all + entropy))
        // = p (slope + bend (z - all)).
        float all[2] = {}, slope[2] = {}, bend[2] = {};
        bool plain = cap == 0.0f && j0 + T::BN <= n;
        for (int i = 0; i < 2; ++i) {
            const int row = i0 + own_row() + 8 * i;
            if (row >= rows) continue;
            const float dl = dlogp[row], de = dentropy != nullptr ? dentropy[row] : 0.0f;
            all[i] = lse[row];
            slope[i] = -(dentropy != nullptr ? fmaf(de, entropy[row], dl) : dl) * scale;
            bend[i] = -de * scale;
            plain = plain && targets[row] - first - j0 >= uint32_t(T::BN);
        }
        plain = ptx::ballot(!plain) == 0;
        float sums[T::BN / 2], none[4];
        multiply<T, false, false>(sums, none, ring, phase, d, group);
        // A part of 64 columns after the other, and so not all of them in registers twice.
#pragma unroll
        for (int v = 0; v < T::BN; v += 64) {
            if (j0 + v >= width) break;
            uint32_t made[16];
            if (plain) {
#pragma unroll
                for (int q = 0; q < 16; ++q) {
                    float g[2];
                    for (int e = 0; e < 2; ++e) {
                        const float z = fmaf(sums[v / 2 + 2 * q + e], scale, -all[q % 2]);
                        g[e] = power(z) * fmaf(bend[q % 2], z, slope[q % 2]);
                    }
                    made[q] = ptx::pack_bf16(g[0], g[1]);
                }
            } else {
                // A cap, the end of the vocabulary, or a target: few tiles have one.
                const Scaling by(scale, cap);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int row = i0 + own_row() + 8 * i, col = j0 + v + own_col();
                    const uint32_t target = row < rows ? targets[row] - first - col : ~0u;
                    const float own = row < rows ? dlogp[row] * scale : 0.0f;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        float g[2];
                        for (int e = 0; e < 2; ++e) {
                            const float x = sums[v / 2 + 4 * j + 2 * i + e], y = cap > 0.0f ? by.bend(x) : x;
                            const float z = fmaf(y, scale, -all[i]);
                            g[e] = power(z) * fmaf(bend[i], z, slope[i]);
                            if (target == uint32_t(8 * j + e)) g[e] += own;
                            if (cap > 0.0f) g[e] *= (1.0f - y * by.inverse) * (1.0f + y * by.inverse);
                            if (col + 8 * j + e >= n) g[e] = 0.0f;
                        }
                        made[2 * j + i] = ptx::pack_bf16(g[0], g[1]);
                    }
                }
            }
            send(ring, group, sent, &dz, j0 + v, i0, [&](int j, int h) { return made[2 * j + h]; });
        }
    });
}

#define EACH_HIDDEN_TILE(X) X(128x256) X(128x128)
#define HIDDEN(TILE) \
    KERNEL(384, logprob_sm90_hidden_##TILE##_bf16, 2)(TENSOR_MAP dh, PACKED float* sums, TENSOR_MAP dz, TENSOR_MAP w, \
        int rows, int n, int d, int first, int last) { \
        hidden<Hidden##TILE>(&dh, sums, &dz, &w, rows, n, d, first, last); \
    }
EACH_HIDDEN_TILE(HIDDEN)
