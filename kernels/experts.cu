// Products of a mixture of experts: the pairs of a row and an expert, sorted by expert, each by the
// weights of its own: scores = x Wᵀ + b of the router, y = x Wᵀ + b, glu(x Wᵀ + b), and gradients.
//   shapes   w [experts, n, k], bias [experts, n]; expert e has pairs offsets[e] to offsets[e + 1];
//            x, dx [pairs, k] and y, dy [pairs, n] bf16, or where there are `rows`, pair p is row
//            rows[p] of it; gated: up [pairs, 2 n], y [pairs, n]; dw, dbias as w and bias, f32.
//            scores: x [m, k], w [n, k], logits [m, n] f32. weights, dweights f32, by order[p] and
//            by p
//   tiling   a tile of an expert's pairs a block (include/tiles.cuh). Only the device has counted
//            an expert's pairs: the grid has as many blocks as there may be tiles, and each finds
//            its own among the offsets, 32 experts at a time. The gradient of weights: a tile of an
//            expert's dw a block
//   memory   as in matmul.cu for each expert; gathered rows are read from where they are
//   numerics as in matmul.cu: each sum one chain in ascending steps of 16, of a weight's gradient
//            over its expert's pairs: a pair does not see the others. An expert without pairs: dw
//            stays. Functions in f32, of the rounded up
//   needs    n and k multiples of 8 (scores: k), bf16 buffers at 16 bytes; the launcher checks
#include "include/activation.cuh"
#include "include/reduce.cuh"
#include "include/tiles.cuh"

constexpr int THREADS = 256;

//                   BM  BN  WM  WN  DEPTH STAGES
using T64x32 = Tile<64, 32, 16, 32, 64, 6>;
using T16x32 = Tile<16, 32, 16, 16, 128, 4>;

// Lines of `x`: number i is line rows[i], or i where there are no rows.
struct Lines {
    const bf16* x;
    const uint32_t* rows;
    int ld;

    __device__ __forceinline__ int64_t at(int i) const { return int64_t(rows != nullptr ? int(rows[i]) : i) * ld; }
};

// As Loader, of lines that lie anywhere: `count` rows of the tile from `first` on are columns of
// the lines, or lines themselves.
template <class T, int ROWS, bool COLUMNS>
struct GatherLoader;

// By lines: line `begin + first + i` of the tile's row i.
template <class T, int ROWS>
struct GatherLoader<T, ROWS, false> {
    static constexpr int LINE = T::DEPTH / 8, STEP = T::THREADS / LINE, EACH = ROWS / STEP;
    const bf16* x;
    int64_t at[EACH]; // of this thread's chunk; -1: the row is not there
    int depth;

    __device__ __forceinline__ GatherLoader(const Lines& lines, int begin, int first, int count, int depth) : x(lines.x), depth(depth) {
        for (int i = 0; i < EACH; ++i) {
            const int row = first + int(threadIdx.x) / LINE + i * STEP;
            at[i] = row < count ? lines.at(begin + row) + int(threadIdx.x) % LINE * 8 : -1;
        }
    }
    __device__ __forceinline__ void copy(bf16* to, int k0) const {
        const int line = int(threadIdx.x) / LINE, c = int(threadIdx.x) % LINE;
        for (int i = 0; i < EACH; ++i) {
            const bool there = at[i] >= 0 && k0 + c * 8 < depth;
            ptx::copy_async(to + chunk<LINE>(line + i * STEP, c) * 8, there ? x + at[i] + k0 : x, there ? 0 : 16);
        }
    }
};

// By columns: k is line `begin + k`, a row of the tile one of its columns from `first` on.
template <class T, int ROWS>
struct GatherLoader<T, ROWS, true> {
    static constexpr int LINE = ROWS / 8, STEP = T::THREADS / LINE, EACH = T::DEPTH / STEP;
    Lines lines;
    int begin, column, depth;

    __device__ __forceinline__ GatherLoader(const Lines& lines, int begin, int first, int count, int depth)
        : lines(lines), begin(begin), column(first + int(threadIdx.x) % LINE * 8), depth(depth) {
        if (column >= count) column = -1;
    }
    __device__ __forceinline__ void copy(bf16* to, int k0) const {
        const int line = int(threadIdx.x) / LINE, c = int(threadIdx.x) % LINE;
        for (int i = 0; i < EACH; ++i) {
            const int k = k0 + line + i * STEP;
            const bool there = column >= 0 && k < depth;
            ptx::copy_async(to + chunk<LINE>(line + i * STEP, c) * 8, there ? lines.x + lines.at(begin + k) + column : lines.x, there ? 0 : 16);
        }
    }
};

// A tile of an expert's pairs: those from `begin + first` on of the `count` that begin at `begin`.
struct PairTile {
    int expert, begin, first, count;
};

// The tile of HEIGHT pairs that comes as number t; an expert of -1 if there are fewer. Whole warps
// call it.
template <int HEIGHT>
static __device__ __forceinline__ PairTile pair_tile(const uint32_t* offsets, int experts, int t) {
    for (int base = 0; base < experts; base += 32) {
        const int e = base + ptx::lane() < experts ? base + ptx::lane() : experts - 1;
        const int begin = offsets[e], count = base + ptx::lane() < experts ? int(offsets[e + 1]) - begin : 0;
        const int tiles = (count + HEIGHT - 1) / HEIGHT, end = warp_scan(tiles);
        const unsigned past = ptx::ballot(end > t);
        if (past != 0) {
            const int who = ptx::lowest(past), before = ptx::shuffle(end - tiles, who);
            return {base + who, ptx::shuffle(begin, who), (t - before) * HEIGHT, ptx::shuffle(count, who)};
        }
        t -= ptx::shuffle(end, 31);
    }
    return {-1, 0, 0, 0};
}

// A tile of the product of an expert's pairs, lines of `l`, with its weights, `r_rows` rows or, by
// columns, lines of k: f(expert, pair, col, x...). Of a PAIR the weights are two halves.
template <class T, bool COLUMNS, bool PAIR, class F>
static __device__ __forceinline__ void each_of_pairs(const uint32_t* offsets, int experts, const Lines& l, const bf16* w, int n, int depth, F f) {
    constexpr int WIDTH = PAIR ? T::BN / 2 : T::BN;
    const int across = (n + WIDTH - 1) / WIDTH;
    const RasterTile at = raster(blockIdx.x, gridDim.x / across, across);
    const PairTile tile = pair_tile<T::BM>(offsets, experts, at.down);
    if (tile.expert < 0) return;
    const int all = PAIR ? 2 * n : n, first = at.across * WIDTH;
    const Operand r = {w + int64_t(tile.expert) * all * depth, all, COLUMNS ? n : depth, first, PAIR ? n : T::BN / 2};
    const GatherLoader<T, T::BM, false> left(l, tile.begin, tile.first, tile.count, depth);
    const Loader<T, T::BN, COLUMNS> right(r, depth);
    each_eight_of<T, false, COLUMNS, PAIR, false>(left, right, depth, [&](int row, int col, auto... x) {
        row += tile.first, col += first;
        if (row < tile.count && col < n) f(tile.expert, tile.begin + row, col, x...);
    }, nullptr, 0);
}

// y = x Wᵀ + bias, or dx = dy W, where `w` is read by columns.
template <class T, bool COLUMNS>
static __device__ void forward(bf16* y, const Lines& x, const bf16* w, const bf16* bias, const uint32_t* offsets, int experts, int n, int k) {
    each_of_pairs<T, COLUMNS, false>(offsets, experts, x, w, n, k, [&](int expert, int pair, int col, Elements<8> v) {
        if (bias != nullptr) add(v, load(bias, (int64_t(expert) * n + col) / 8));
        store(y, (int64_t(pair) * n + col) / 8, v);
    });
}

// f(gate) (up + more) within limits, 0 for none; comparisons keep a NaN.
struct Glu {
    int act;
    float limit;

    __device__ __forceinline__ float gate(float x) const { return limit > 0.0f && x > limit ? limit : x; }
    __device__ __forceinline__ float up(float x) const {
        if (!(limit > 0.0f)) return x;
        return 1.0f + (x > limit ? limit : x < -limit ? -limit : x);
    }
};

// up = x Wᵀ + bias, and y = glu(up) for n gates and n partners.
template <class T>
static __device__ void gated(bf16* y, bf16* up, const Lines& x, const bf16* w, const bf16* bias, const uint32_t* offsets, int experts, int n,
                             int k, Glu glu) {
    each_of_pairs<T, false, true>(offsets, experts, x, w, n, k, [&](int expert, int pair, int col, Elements<8> v, Elements<8> u) {
        // What the function is given is what is kept.
        auto finish = [&](Elements<8>& v, int col) {
            if (bias != nullptr) add(v, load(bias, (int64_t(expert) * 2 * n + col) / 8));
            store(up, (int64_t(pair) * 2 * n + col) / 8, v);
            unpack(v.x, pack(v.x));
        };
        finish(v, col);
        finish(u, col + n);
        with_activation(glu.act, [&](auto curve) {
            for (int i = 0; i < 8; ++i) v.x[i] = curve.at(glu.gate(v.x[i])).y * glu.up(u.x[i]);
        });
        store(y, (int64_t(pair) * n + col) / 8, v);
    });
}

// dw[e] += dyᵀ x, and dbias[e] += the sums of dy's columns, over the pairs of each expert.
template <class T>
static __device__ void backward_weight(float* dw, float* dbias, const Lines& dy, const Lines& x, const uint32_t* offsets, int n, int k) {
    const int down = (n + T::BM - 1) / T::BM, across = (k + T::BN - 1) / T::BN;
    const int expert = blockIdx.x / (down * across), begin = offsets[expert], depth = int(offsets[expert + 1]) - begin;
    if (depth == 0) return;
    const RasterTile at = raster(blockIdx.x % (down * across), down, across);
    const int row0 = at.down * T::BM, col0 = at.across * T::BN;
    const GatherLoader<T, T::BM, true> left(dy, begin, row0, n, depth);
    const GatherLoader<T, T::BN, true> right(x, begin, col0, k, depth);
    float* sums = dbias != nullptr && at.across == 0 ? dbias + int64_t(expert) * n + row0 : nullptr;
    each_eight_of<T, true, true, false, true>(left, right, depth, [&](int row, int col, const Elements<8>& v) {
        row += row0, col += col0;
        if (row < n && col < k) add_at(dw, ((int64_t(expert) * n + row) * k + col) / 8, v);
    }, sums, n - row0);
}

// dup = w dact glu'(up), dweights = dact . act, and dact becomes w act: a warp a pair.
template <class T>
static __device__ void glu_backward(T* dup, T* dact, float* dweights, const T* act, const T* up, const float* weights, const uint32_t* order,
                                    int pairs, int cols, Glu glu, int width) {
    const int pair = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (pair >= pairs) return;
    const float w = weights[order[pair]];
    float sum = 0.0f;
    with_width<T>(width, [&](auto known) {
        constexpr int N = decltype(known)::N;
        T* own = dact + int64_t(pair) * cols;
        const T* from = up + int64_t(pair) * 2 * cols;
        T* to = dup + int64_t(pair) * 2 * cols;
        with_activation(glu.act, [&](auto curve) {
            for (int i = ptx::lane(); i < cols / N; i += 32) {
                const int partner = cols / N + i;
                Elements<N> d = take<N>(own, i), a = take<N>(act + int64_t(pair) * cols, i);
                Elements<N> gate = take<N>(from, i), u = take<N>(from, partner);
                for (int j = 0; j < N; ++j) {
                    sum = fmaf(d.x[j], a.x[j], sum);
                    const float g = w * d.x[j], bound = glu.gate(gate.x[j]), most = fabsf(u.x[j]);
                    const Point at = curve.at(bound);
                    const bool past = glu.limit > 0.0f && gate.x[j] > glu.limit, cut = glu.limit > 0.0f && most > glu.limit;
                    gate.x[j] = past ? 0.0f : g * glu.up(u.x[j]) * at.slope;
                    u.x[j] = cut ? 0.0f : g * at.y;
                    a.x[j] *= w;
                }
                put<N>(to, i, gate);
                put<N>(to, partner, u);
                put<N>(own, i, a);
            }
        });
    });
    sum = warp_reduce<Sum>(sum);
    if (ptx::lane() == 0) dweights[pair] = sum;
}

// dweights[p] += dy . bias of its expert: a warp a pair.
template <class T>
static __device__ void bias_weights(float* dweights, const T* dy, const T* bias, const uint32_t* rows, const uint32_t* order,
                                    const uint32_t* chosen, int pairs, int cols, int width) {
    const int pair = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (pair >= pairs) return;
    const T* d = dy + int64_t(rows[pair]) * cols;
    const T* b = bias + int64_t(chosen[order[pair]]) * cols;
    float sum = 0.0f;
    with_width<T>(width, [&](auto known) {
        constexpr int N = decltype(known)::N;
        for (int i = ptx::lane(); i < cols / N; i += 32) {
            const Elements<N> x = take<N>(d, i), y = take<N>(b, i);
            for (int j = 0; j < N; ++j) sum = fmaf(x.x[j], y.x[j], sum);
        }
    });
    sum = warp_reduce<Sum>(sum);
    if (ptx::lane() == 0) dweights[pair] += sum;
}

// dbias[e] += sum of w dy over its pairs, in ascending order: a thread a packet of an expert.
template <class T>
static __device__ void bias(float* dbias, const T* dy, const float* weights, const uint32_t* offsets, const uint32_t* rows,
                            const uint32_t* order, int experts, int cols, int width) {
    // Rows that are loaded together: their order in the sum stays.
    constexpr int AHEAD = 4;
    each_of_rows<T>(experts, cols, width, [&](auto known, int expert, int i) {
        constexpr int N = decltype(known)::N;
        const int begin = offsets[expert], end = offsets[expert + 1];
        if (begin == end) return;
        float* out = dbias + int64_t(expert) * cols;
        Elements<N> sum = {};
        for (int p = begin; p < end; p += AHEAD) {
            Elements<N> v[AHEAD];
            float w[AHEAD];
            for (int a = 0; a < AHEAD; ++a) {
                if (p + a >= end) continue;
                v[a] = take<N>(dy + int64_t(rows[p + a]) * cols, i);
                w[a] = weights[order[p + a]];
            }
            for (int a = 0; a < AHEAD; ++a) {
                if (p + a >= end) continue;
                for (int j = 0; j < N; ++j) sum.x[j] = fmaf(w[a], v[a].x[j], sum.x[j]);
            }
        }
        Elements<N> old = take<N>(out, i);
        for (int j = 0; j < N; ++j) old.x[j] += sum.x[j];
        put<N>(out, i, old);
    });
}

#define EACH_TILE(X) X(128x128, 128) X(64x64, 128) X(64x32, 128) X(16x32, 64)
#define FORWARD(TILE, THREADS) \
    KERNEL(THREADS, experts_forward_##TILE##_bf16)(PACKED bf16* y, PACKED const bf16* x, PACKED const bf16* w, \
        OPTIONAL PACKED const bf16* bias, const uint32_t* offsets, int experts, int n, int k) { \
        forward<T##TILE, false>(y, Lines{x, nullptr, k}, w, bias, offsets, experts, n, k); \
    } \
    KERNEL(THREADS, experts_gated_##TILE##_bf16)(PACKED bf16* y, PACKED bf16* up, PACKED const bf16* x, PACKED const bf16* w, \
        OPTIONAL PACKED const bf16* bias, const uint32_t* offsets, OPTIONAL const uint32_t* rows, int experts, int n, int k, int act, \
        float limit) { \
        gated<T##TILE>(y, up, Lines{x, rows, k}, w, bias, offsets, experts, n, k, Glu{act, limit}); \
    }
EACH_TILE(FORWARD)

#define EACH_ROUTER_TILE(X) X(64x32, 128) X(16x32, 64)
#define SCORES(TILE, THREADS) \
    KERNEL(THREADS, experts_scores_##TILE##_bf16)(float* logits, PACKED const bf16* x, PACKED const bf16* w, \
        OPTIONAL const bf16* bias, int m, int n, int k) { \
        each_eight<T##TILE, false, false>(Operand{x, m, k}, Operand{w, n, k}, k, [&](int row, int col, const Elements<8>& v) { \
            for (int i = 0; i < 8 && col + i < n; ++i) { \
                logits[int64_t(row) * n + col + i] = v.x[i] + (bias != nullptr ? widen(bias[col + i]) : 0.0f); \
            } \
        }); \
    }
EACH_ROUTER_TILE(SCORES)

#define EACH_BACKWARD_TILE(X) X(128x128) X(64x64)
#define BACKWARD(TILE) \
    KERNEL(128, experts_backward_input_##TILE##_bf16)(PACKED bf16* dx, PACKED const bf16* dy, PACKED const bf16* w, \
        const uint32_t* offsets, OPTIONAL const uint32_t* rows, int experts, int n, int k) { \
        forward<T##TILE, true>(dx, Lines{dy, rows, n}, w, nullptr, offsets, experts, k, n); \
    } \
    KERNEL(128, experts_backward_weight_##TILE##_bf16)(PACKED float* dw, OPTIONAL float* dbias, PACKED const bf16* dy, \
        PACKED const bf16* x, const uint32_t* offsets, OPTIONAL const uint32_t* dy_rows, OPTIONAL const uint32_t* x_rows, int n, int k, \
        int experts) { \
        backward_weight<T##TILE>(dw, dbias, Lines{dy, dy_rows, n}, Lines{x, x_rows, k}, offsets, n, k); \
    }
EACH_BACKWARD_TILE(BACKWARD)

#define KERNELS(T) \
    KERNEL(THREADS, experts_glu_backward_##T)(PACKED T* dup, PACKED T* dact, float* dweights, PACKED const T* act, PACKED const T* up, \
        const float* weights, const uint32_t* order, int pairs, int cols, int act_kind, float limit, int width) { \
        glu_backward(dup, dact, dweights, act, up, weights, order, pairs, cols, Glu{act_kind, limit}, width); \
    } \
    KERNEL(THREADS, experts_bias_weights_##T)(float* dweights, const T* dy, const T* bias, const uint32_t* rows, const uint32_t* order, \
        const uint32_t* chosen, int pairs, int cols, int width) { \
        bias_weights(dweights, dy, bias, rows, order, chosen, pairs, cols, width); \
    } \
    KERNEL(THREADS, experts_bias_##T)(float* dbias, const T* dy, const float* weights, const uint32_t* offsets, const uint32_t* rows, \
        const uint32_t* order, int experts, int cols, int width) { \
        bias(dbias, dy, weights, offsets, rows, order, experts, cols, width); \
    }
EACH_DTYPE(KERNELS)
