// The LM head and the log-probs of its targets on Hopper: that of logprob.cu by wgmma and TMA
// (include/tiles_sm90.cuh).
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

// With a TOP also the lists of the k best.
template <class T, bool TOP = false>
static __device__ void sample(float* partial, const ptx::TensorMap* h, const ptx::TensorMap* w, int rows, int vocab, int d, float scale,
                              float cap, const Draws& draws, uint64_t* lists = nullptr, int k = 0) {
    const int down = (rows + T::BM - 1) / T::BM, chunks = (vocab + CHUNK - 1) / CHUNK;
    const Scaling by(scale, cap);
    State states[2];
    Choice best[2];
    each_tile<T, false, false, CHUNK / T::BN>(Operands{h, w, T::BN / 2, d}, down, chunks, CHUNK,
                                             [&](const Ring<T>& ring, Phase<T>& phase, int group, int i0, int j0) {
        if (j0 % CHUNK == 0) {
            for (int i = 0; i < 2; ++i) states[i] = State(), best[i] = Choice();
        }
        const int warp = threadIdx.x / 32 - 4, first = i0 + threadIdx.x % 128 / 32 * 16;
        const Lists top(ring.out, warp, k);
        float sums[T::BN / 2], none[4];
        multiply<T, false, false>(sums, none, ring, phase, d, group);
#pragma unroll
        for (int v = 0; v < T::BN; v += COLUMNS) {
            if (j0 + v >= vocab) break;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float x[Lane::COUNT];
#pragma unroll
                for (int q = 0; q < Lane::COUNT; ++q) x[q] = sums[v / 2 + q / 2 * 4 + 2 * i + q % 2];
                reduce(states[i], x, vocab - j0 - v, ~0u, by);
                const int row = i0 + own_row() + 8 * i;
                if (row < rows) choose(best[i], x, j0 + v, vocab, by.scale, draws, row);
                if constexpr (TOP) top.add(x, 8 * i, rows - first - 8 * i, j0 + v, vocab, by.scale);
            }
        }
        if (j0 % CHUNK != CHUNK - T::BN) return;
        if constexpr (TOP) top.store(lists, first, rows, j0 / CHUNK, chunks);
        for (int i = 0; i < 2; ++i) {
            const int row = i0 + own_row() + 8 * i;
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                states[i].add(shuffle_xor(states[i], lanes));
                best[i].add(shuffle_xor(best[i], lanes));
            }
            if (own_col() == 0 && row < rows) store_choice(partial, int64_t(row) * chunks + j0 / CHUNK, states[i], best[i]);
        }
    });
}

template <class T>
static __device__ void forward(float* partial, const ptx::TensorMap* h, const ptx::TensorMap* w, const uint32_t* targets, int rows,
                               int vocab, int d, float scale, float cap) {
    const int down = (rows + T::BM - 1) / T::BM, chunks = (vocab + CHUNK - 1) / CHUNK;
    const Scaling by(scale, cap);
    State states[2];
    uint32_t target[2];
    each_tile<T, false, false, CHUNK / T::BN>(Operands{h, w, T::BN / 2, d}, down, chunks, CHUNK,
                                             [&](const Ring<T>& ring, Phase<T>& phase, int group, int i0, int j0) {
        if (j0 % CHUNK == 0) {
            for (int i = 0; i < 2; ++i) {
                const int row = i0 + own_row() + 8 * i;
                states[i] = State();
                target[i] = row < rows ? targets[row] : ~0u;
            }
        }
        float sums[T::BN / 2], none[4];
        multiply<T, false, false>(sums, none, ring, phase, d, group);
#pragma unroll
        for (int v = 0; v < T::BN; v += COLUMNS) {
            if (j0 + v >= vocab) break;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float x[Lane::COUNT];
#pragma unroll
                for (int q = 0; q < Lane::COUNT; ++q) x[q] = sums[v / 2 + q / 2 * 4 + 2 * i + q % 2];
                reduce(states[i], x, vocab - j0 - v, target[i] - j0 - v, by);
            }
        }
        if (j0 % CHUNK != CHUNK - T::BN) return;
        for (int i = 0; i < 2; ++i) {
            const int row = i0 + own_row() + 8 * i;
            for (int lanes = 1; lanes < 4; lanes *= 2) states[i].add(shuffle_xor(states[i], lanes));
            if (own_col() == 0 && row < rows) store_partial(partial, int64_t(row) * chunks + j0 / CHUNK, states[i]);
        }
    });
}

// Sends the warpgroup's results from row i0 and column j0 on, those of row r + 8 h and columns 8 j
// + c in made[2 j + h].
template <class T>
static __device__ __forceinline__ void send_all(const Ring<T>& ring, int group, int& sent, const ptx::TensorMap* map, int i0, int j0,
                                                int width, const uint32_t (&made)[T::BN / 4]) {
#pragma unroll
    for (int j = 0; j < T::BN / 8; j += 8) {
        if (j0 + 8 * j >= width) break;
        send(ring, group, sent, map, j0 + 8 * j, i0, [&](int i, int h) { return made[2 * (j + i) + h]; });
    }
}

// The gradient of the products with `n` columns of the vocabulary, of which the first is number
// `first`; zeros up to `width`.
template <class T>
static __device__ void gradient(const ptx::TensorMap* dz, const ptx::TensorMap* h, const ptx::TensorMap* w, const uint32_t* targets,
                                const float* lse, const float* dlogp, const float* entropy, const float* dentropy, int rows, int n,
                                int width, int first, int d, float scale, float cap) {
    const int down = (rows + T::BM - 1) / T::BM, across = (n + T::BN - 1) / T::BN;
    int sent = 0;
    each_tile<T, false, false>(Operands{h, w, T::BN / 2, d}, down, across, T::BN,
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
            send(ring, group, sent, dz, j0 + v, i0, [&](int j, int h) { return made[2 * j + h]; });
        }
    });
}

// Adds the product of dz and `n` rows of w to the sums, or, where they are the first, writes it;
// the last are rounded to dh.
template <class T>
static __device__ void hidden(const ptx::TensorMap* dh, float* sums, const ptx::TensorMap* dz, const ptx::TensorMap* w, int rows, int n,
                              int d, int first, int last) {
    const int down = (rows + T::BM - 1) / T::BM, across = (d + T::BN - 1) / T::BN;
    int sent = 0;
    each_tile<T, false, true>(Operands{dz, w, 0, n}, down, across, T::BN,
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
        if (last != 0) send_all(ring, group, sent, dh, i0, j0, d, made);
    });
}

// Tile, threads, blocks of a cluster, blocks that share the registers.
#define EACH_TILE(X) X(128x256, 384, 2, 1) X(128x128, 384, 1, 1) X(64x128, 256, 1, 0)
#define KERNELS(TILE, THREADS, CLUSTER, BESIDE) \
    KERNEL(THREADS, logprob_sm90_forward_##TILE##_bf16, CLUSTER, BESIDE)(PACKED float* partial, TENSOR_MAP h, TENSOR_MAP w, \
        const uint32_t* targets, int rows, int vocab, int d, float scale, float cap) { \
        forward<T##TILE>(partial, &h, &w, targets, rows, vocab, d, scale, cap); \
    } \
    KERNEL(THREADS, logprob_sm90_sample_##TILE##_bf16, CLUSTER, BESIDE)(PACKED float* partial, TENSOR_MAP h, TENSOR_MAP w, \
        const uint64_t* samples, const uint32_t* positions, int rows, int vocab, int d, float scale, float cap, uint64_t seed, \
        uint64_t step, uint32_t purpose, int greedy) { \
        const Draws draws = {Stream{seed, step, purpose}, samples, positions, greedy != 0}; \
        sample<T##TILE>(partial, &h, &w, rows, vocab, d, scale, cap, draws); \
    }
EACH_TILE(KERNELS)

#define EACH_TOP_TILE(X) X(128x128, 384, 1) X(64x128, 256, 0)
#define SAMPLE_TOP(TILE, THREADS, BESIDE) \
    KERNEL(THREADS, logprob_sm90_sample_top_##TILE##_bf16, 1, BESIDE)(PACKED float* partial, uint64_t* lists, TENSOR_MAP h, \
        TENSOR_MAP w, const uint64_t* samples, const uint32_t* positions, int rows, int vocab, int d, float scale, float cap, \
        uint64_t seed, uint64_t step, uint32_t purpose, int greedy, int k) { \
        const Draws draws = {Stream{seed, step, purpose}, samples, positions, greedy != 0}; \
        sample<Top##TILE, true>(partial, &h, &w, rows, vocab, d, scale, cap, draws, lists, k); \
    }
EACH_TOP_TILE(SAMPLE_TOP)

KERNEL(384, logprob_sm90_gradient_bf16, 2)(TENSOR_MAP dz, TENSOR_MAP h, TENSOR_MAP w, const uint32_t* targets, const float* lse,
                                      const float* dlogp, OPTIONAL const float* entropy, OPTIONAL const float* dentropy, int rows,
                                      int n, int width, int first, int d, float scale, float cap) {
    gradient<Hidden128x256>(&dz, &h, &w, targets, lse, dlogp, entropy, dentropy, rows, n, width, first, d, scale, cap);
}

#define EACH_HIDDEN_TILE(X) X(128x256) X(128x128)
#define HIDDEN(TILE) \
    KERNEL(384, logprob_sm90_hidden_##TILE##_bf16, 2)(TENSOR_MAP dh, PACKED float* sums, TENSOR_MAP dz, TENSOR_MAP w, \
        int rows, int n, int d, int first, int last) { \
        hidden<Hidden##TILE>(&dh, sums, &dz, &w, rows, n, d, first, last); \
    }
EACH_HIDDEN_TILE(HIDDEN)
