// What attention of all families and directions shares: what a block does, and the softmax of a row
// as its scores come along, in one order. Scores lie as sums of mma and of wgmma do: of N columns
// lane l has 8 j + c and the next, with c = 2 (l % 4), of two rows: x[4 j..] of row l / 4, x[4 j +
// 2..] of the row 8 further.
#pragma once

#include "kernel.cuh"

// Columns of a head.
#define EACH_HEAD_SIZE(X) X(64) X(80) X(96) X(128) X(256)

constexpr float LOG2E = 1.4426950408889634f;
// Positions after which a row's softmax starts anew; the parts are merged in ascending order. So
// parts of a long sequence can be computed side by side, with the bits of one after the other.
constexpr int SPLIT = 1024;

// Rows of queries that attend together: `rows` rows of the batch from row `at` on, all heads of a
// group; consecutive positions of a sequence from `first` on, or rows that all see all they are
// given. They see blocks [begin, end) of keys, whose pages are listed from `pages` on. A tile may
// go on from partials [first_read, first_read + reads) of its rows, of which the first row's is
// number `slot`; and writes partial `writes`, or finishes where that is negative. Eight words,
// which src/ops/attention/partition.rs writes.
struct WorkTile {
    int at, rows, first, pages, begin, end, slot, first_read, reads, writes;

    WorkTile() = default;
    __device__ __forceinline__ WorkTile(const uint32_t* words, int t) {
        const uint32_t* w = words + 8 * int64_t(t);
        at = w[0], rows = w[1], first = w[2], pages = w[3], begin = w[4], end = w[5], slot = w[6];
        first_read = w[7] & 0xFF, reads = w[7] >> 8 & 0xFF, writes = int(w[7] >> 16) - 1;
    }
};

// How weights are made of products: s = cap tanh(product scale / cap), or product scale without a
// cap; a position sees the `window` positions up to itself, or all where that is 0.
struct Scoring {
    // s = unit y, with y = tanh(product inside), or the product; ds / dproduct = scale (1 - y^2),
    // or scale.
    float scale, inside, unit;
    float factor; // unit log2 e
    bool capped;
    int window;
    __device__ __forceinline__ Scoring(float scale, float cap, int window) : scale(scale), capped(cap > 0.0f), window(window) {
        inside = capped ? scale / cap : 1.0f, unit = capped ? cap : scale, factor = unit * LOG2E;
    }
    // tanh(product inside), to 2^-22 of 1: a score's error is that of an f32 of the cap's size.
    // Without branches, as all columns are computed side by side.
    __device__ __forceinline__ float bend(float x) const {
        return fmaf(-2.0f, ptx::reciprocal(1.0f + ptx::exp2(x * (inside * (2.0f * LOG2E)))), 1.0f);
    }
    // The first position that position p sees.
    __device__ __forceinline__ int from(int p) const { return window > 0 && p >= window ? p - window + 1 : 0; }
};

// The softmax of a lane's two rows so far: largest y, and the lane's share of sum e^(s - largest).
struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};

    // Turns a block's products into weights, and says what to multiply with what was accumulated
    // before. MASKED: row i sees columns [from[i], to[i]) of the block only; others have weight 0,
    // and nothing visible changes nothing, exactly.
    template <int N, bool MASKED>
    __device__ __forceinline__ void weigh(float (&x)[N / 2], float (&keep)[2], const Scoring& by, const int (&from)[2], const int (&to)[2]) {
        const int c = ptx::lane() % 4 * 2;
        if (by.capped) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) x[i] = by.bend(x[i]);
        }
        float base[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float most = -INFINITY;
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                for (int e = 0; e < 2; ++e) {
                    float& y = x[4 * j + 2 * r + e];
                    // What lies beyond may be anything, NaN too: selected away, not multiplied.
                    if (MASKED && !(8 * j + c + e >= from[r] && 8 * j + c + e < to[r])) y = -INFINITY;
                    most = fmaxf(most, y);
                }
            }
            most = fmaxf(most, ptx::shuffle_xor(most, 1));
            most = fmaxf(most, ptx::shuffle_xor(most, 2));
            most = fmaxf(top[r], most);
            keep[r] = top[r] == -INFINITY ? 0.0f : ptx::exp2((top[r] - most) * by.factor);
            base[r] = most == -INFINITY ? 0.0f : most * by.factor;
            top[r] = most;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float part = 0.0f;
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                for (int e = 0; e < 2; ++e) {
                    float& y = x[4 * j + 2 * r + e];
                    y = ptx::exp2(fmaf(y, by.factor, -base[r]));
                    part += y;
                }
            }
            sum[r] = fmaf(sum[r], keep[r], part);
        }
    }

    // Adds the next part of the same rows: what to multiply with either's accumulators.
    __device__ __forceinline__ void merge(const Softmax& next, float (&keep)[2], float (&take)[2], const Scoring& by) {
        for (int r = 0; r < 2; ++r) {
            const float most = fmaxf(top[r], next.top[r]);
            keep[r] = top[r] == -INFINITY ? 0.0f : ptx::exp2((top[r] - most) * by.factor);
            take[r] = next.top[r] == -INFINITY ? 0.0f : ptx::exp2((next.top[r] - most) * by.factor);
            sum[r] = fmaf(sum[r], keep[r], next.sum[r] * take[r]);
            top[r] = most;
        }
    }

    // The sums of all lanes: what accumulators are divided by, and the log-sum-exp.
    __device__ __forceinline__ void finish(float (&inverse)[2], float (&lse)[2], const Scoring& by) {
        for (int r = 0; r < 2; ++r) {
            float all = sum[r] + ptx::shuffle_xor(sum[r], 1);
            all += ptx::shuffle_xor(all, 2);
            inverse[r] = 1.0f / all;
            lse[r] = fmaf(top[r], by.unit, logf(all));
        }
    }
};

// Scales accumulators of D columns, row by row.
template <int D>
static __device__ __forceinline__ void rescale(float* o, const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= by[i / 2 % 2];
}

// The items of a block, of `all` that come longest first. Rounds go there and back: who has the
// longest of one has the shortest of the next.
template <class F>
static __device__ __forceinline__ void each_item(int all, F f) {
    const int blocks = gridDim.x;
    for (int round = 0; round * blocks < all; ++round) {
        const int item = round * blocks + (round % 2 == 0 ? int(blockIdx.x) : blocks - 1 - int(blockIdx.x));
        if (item < all) f(item);
    }
}

// A warp's 16 rows, from `top` on, of a tile of `rows`: positions, and for each a group's heads.
struct WarpRows {
    int top, rows, group, first, last, position[2];  // `first` and `last` are the warp's own

    __device__ __forceinline__ WarpRows(int top, int rows, int first, int group)
        : top(top), rows(rows), group(group), first(first + top / group), last(first + (top + 15) / group) {
        for (int r = 0; r < 2; ++r) position[r] = first + own(r) / group;
    }
    // The lane's row number r.
    __device__ __forceinline__ int own(int r) const { return top + 8 * r + ptx::lane() / 4; }

    // f(r, position, head) of each of the lane's rows that is there, counted from the tile's first.
    template <class F>
    __device__ __forceinline__ void each(F f) const {
        for (int r = 0; r < 2; ++r) {
            if (own(r) < rows) f(r, own(r) / group, own(r) % group);
        }
    }

    // Softmax::weigh of the products with block b of N keys.
    template <int N>
    __device__ __forceinline__ void weigh(Softmax& soft, float (&x)[N / 2], float (&keep)[2], int b, const Scoring& by) const {
        int from[2], to[2];
        for (int r = 0; r < 2; ++r) from[r] = by.from(position[r]) - b * N, to[r] = position[r] + 1 - b * N;
        if (by.from(last) <= b * N && (b + 1) * N <= first + 1) {
            soft.weigh<N, false>(x, keep, by, from, to);
        } else {
            soft.weigh<N, true>(x, keep, by, from, to);
        }
    }

    // Writes accumulators of D columns, times the row's `inverse`, to rows and heads from `out` on.
    // `chunk(row, c)` is where a row's 16 bytes lie in shared memory until all are there.
    template <int D, class At>
    __device__ __forceinline__ void write(bf16* out, const float* o, const float (&inverse)[2], int q_heads, At chunk) const {
        const int lane = ptx::lane();
        for (int r = 0; r < 2; ++r) {
            // 0 is added so that a zero has one sign whatever was masked.
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                const float* two = o + 4 * j + 2 * r;
                reinterpret_cast<uint32_t*>(chunk(own(r), j))[lane % 4] =
                    ptx::pack_bf16(fmaf(two[0], inverse[r], 0.0f), fmaf(two[1], inverse[r], 0.0f));
            }
        }
        ptx::sync_warp();
        for (int i = lane; i < 16 * (D / 8); i += 32) {
            const int row = top + i / (D / 8), c = i % (D / 8);
            if (row >= rows) break;
            bf16* to = out + (row / group * int64_t(q_heads) + row % group) * D;
            reinterpret_cast<uint4*>(to)[c] = *reinterpret_cast<const uint4*>(chunk(row, c));
        }
    }
};

// Where thread `own` of `threads` keeps merged partials of its rows: maxima, sums, accumulators.
template <int D>
struct BlockPartials {
    // Volatile, so that few of them are loaded at once: registers.
    volatile float* room;
    int threads, own;
    static constexpr int EACH = D / 2 + 4;

    __device__ __forceinline__ volatile float& at(int i) const { return room[i * threads + own]; }

    __device__ __forceinline__ void put(const Softmax& s, const float* o) const {
        for (int r = 0; r < 2; ++r) at(r) = s.top[r], at(2 + r) = s.sum[r];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) at(4 + i) = o[i];
    }
    // What is kept, merged with the partial that follows it.
    __device__ __forceinline__ void fold(Softmax& s, float* o, const Scoring& by) const {
        float keep[2], take[2];
        Softmax all;
        for (int r = 0; r < 2; ++r) all.top[r] = at(r), all.sum[r] = at(2 + r);
        all.merge(s, keep, take, by);
        s = all;
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] = fmaf(at(4 + i), keep[i / 2 % 2], o[i] * take[i / 2 % 2]);
    }
};

// Partials of rows between launches, [partials, slots, q_heads, D + 8]: the accumulators, the four
// lanes' sums, the maximum.
template <int D>
struct Partials {
    float* x;
    int slots, q_heads;

    // Partial i of a slot and head.
    __device__ __forceinline__ float* at(int i, int slot, int head) const {
        return x + ((int64_t(i) * slots + slot) * q_heads + head) * (D + 8);
    }
    // For the lane's row number r.
    static __device__ __forceinline__ void put(float* to, const Softmax& s, const float* o, int r) {
        const int c = ptx::lane() % 4;
        to[D + c] = s.sum[r];
        if (c == 0) to[D + 4] = s.top[r];
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            *reinterpret_cast<float2*>(to + 8 * j + 2 * c) = float2{o[4 * j + 2 * r], o[4 * j + 2 * r + 1]};
        }
    }
    static __device__ __forceinline__ void get(const float* from, Softmax& s, float* o, int r) {
        const int c = ptx::lane() % 4;
        s.sum[r] = from[D + c], s.top[r] = from[D + 4];
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            const float2 two = *reinterpret_cast<const float2*>(from + 8 * j + 2 * c);
            o[4 * j + 2 * r] = two.x, o[4 * j + 2 * r + 1] = two.y;
        }
    }
};

// Weights of 16 columns each, rounded: a[] of ptx::mma_bf16, and A of ptx::wgmma_bf16.
template <int STEPS>
static __device__ __forceinline__ void pack_weights(uint32_t (&a)[STEPS][4], const float (&x)[8 * STEPS]) {
#pragma unroll
    for (int i = 0; i < 4 * STEPS; ++i) a[i / 4][i % 4] = ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
}

// Where a row's 16-byte chunks lie in shared memory: rows of whole 128 bytes, so that 8 rows that
// ldmatrix reads at one chunk lie in different banks.
template <int D, int ROWS = 64>
struct Lines {
    static constexpr int CHUNKS = D / 8, LINE = (D + 63) / 64 * 8, SIZE = ROWS * LINE * 8;
    static __device__ __forceinline__ int at(int row, int c) { return (row * LINE + (c ^ row % 8)) * 8; }

    // THREADS threads copy ROWS rows, each `offset(row)` elements after `from`, or none if below 0.
    template <int THREADS, class F>
    static __device__ __forceinline__ void copy(bf16* to, const bf16* from, F offset) {
        constexpr int ALL = ROWS * CHUNKS;
#pragma unroll 4
        for (int k = 0; k < ALL; k += THREADS) {
            const int i = k + threadIdx.x;
            if (ALL % THREADS != 0 && i >= ALL) break;
            const int row = i / CHUNKS, c = i % CHUNKS, first = offset(row);
            ptx::copy_async(to + at(row, c), first < 0 ? from : from + (first + 8 * c), first < 0 ? 16 : 0);
        }
    }
};

// x[8 j..] += a b: columns 16 j to 16 j + 15, of b as ptx::load_matrix has it.
template <int COUNT>
static __device__ __forceinline__ void add_product(float (&x)[COUNT], int j, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    for (int h = 0; h < 2; ++h) {
        float* to = x + 8 * j + 4 * h;
        float d[4] = {to[0], to[1], to[2], to[3]};
        const uint32_t eight[2] = {b[2 * h], b[2 * h + 1]};
        ptx::mma_bf16(d, a, eight);
        for (int e = 0; e < 4; ++e) to[e] = d[e];
    }
}
