// The LM head and the log-probs of its targets, without logits in memory: x = h Wᵀ, z = cap tanh(x
// / cap) / temperature (z = x / temperature without a cap), lse = log sum_v e^z_v, logp = z_target
// - lse, entropy = -sum_v p_v log p_v. sample: the token with the largest z + g
// (include/gumbel.cuh), a draw from the softmax of z; its logp, lse. top: the same, and the k <= 32
// tokens with the largest z (include/top.cuh); their logp. Backward: dx_v = (dlogp (1{v = target} -
// p_v) - dentropy p_v (z_v - lse + entropy)) (1 - tanh²) / temperature, dh = dx W, dw += dxᵀ h.
//   shapes   h [rows, d] and w [vocab, d] bf16; targets [rows]; logp, lse and entropy [rows] f32;
//            partial [rows, chunks, 4] f32: of a chunk of CHUNK columns the maximum, the sum of
//            e^(z - maximum), the same weighted by z - maximum, and the target's z, or 0.
//            from_logits: z [rows, vocab] bf16 or f32 for h and w. sample: samples and positions
//            [rows], a row's address; partial [rows, chunks, 8], with the best of the chunk: z + g,
//            z, its id. top: lists [rows, chunks, k] of keys, the best of the chunk; tokens and
//            logp [rows, k] Backward takes a slice of the vocabulary: dz [rows, width] bf16, its
//            columns and zeros up to a multiple of 8; sums [rows, d] f32, of dh over the slices so
//            far; dh [rows, d] bf16, dw [vocab, d] f32
//   tiling   a block has some rows and a chunk, whose 8 tiles of 128 columns it computes one after
//            the other; stages of the next tile are on their way while one is reduced. A warp that
//            has whole rows of a tile reduces them from registers; of 16 rows the warps share the
//            columns, so the sums go through shared memory. merge: a warp a row. top: a warp keeps
//            its rows' lists in shared memory; a tile goes there too, for the warp to take a row
//            after the other, four columns a lane. Then four warps a row merge the lists of its
//            chunks Backward: tiles as in matmul.cu, one a block; hidden of few tiles in quarters
//            of them
//   memory   W is read once for 8 tiles of rows that run together, h from L2; 16 bytes a row and
//            chunk are written (sample: 32; top: 32 + 8 k) Backward writes and reads dz twice, and
//            the sums once a slice
//   numerics the order is one for all tiles and any number of rows: of each 128 columns lane c of 4
//            takes 8 j + 2 c and the next, j ascending; so all of the chunk, online; then lanes 1,
//            then 2 apart; then each lane of a warp merges chunks 32 apart, ascending, and lanes
//            16, 8, .. 1 apart. A NaN makes its row NaN, as does a target beyond the vocabulary. dz
//            is rounded to bf16 before it is multiplied; dh is rounded once, after the last slice,
//            slices in ascending order
//   needs    d a multiple of 8, h and w at 16 bytes; the launcher checks
#include "include/gumbel.cuh"
#include "include/tiles.cuh"
#include "include/top.cuh"

constexpr int WARPS = 4; // of merge and pick: a row each; of top: of a row
constexpr int GROUPS = 64; // of from_logits: a chunk each at a time
constexpr int AHEAD = 8; // of top: lists that a warp loads at once

//                          BM   BN  WM   WN  DEPTH STAGES
using T128 = Tile<128, COLUMNS, 32, COLUMNS, 32, 4>;
using T64 = Tile<64, COLUMNS, 16, COLUMNS, 64, 3>;
using T16 = Tile<16, COLUMNS, 16, 64, 64, 4>;
// Where there are lists beside them.
using Top64 = Tile<64, COLUMNS, 16, COLUMNS, 32, 4>;
using Top16 = T16;

// The sums of each tile of columns [first, end) in turn, for f(first column, sums).
template <class T, class F>
static __device__ __forceinline__ void each_tile(const Operand& l, const bf16* w, int first, int end, int depth, bf16* room, F f) {
    constexpr int STAGE = T::DEPTH * (T::BM + T::BN), LEFT = T::DEPTH * T::BM;
    auto right_of = [&](int v) { return Loader<T, T::BN, false>(Operand{w, end, depth, v, T::BN / 2}, depth); };
    const Loader<T, T::BM, false> left(l, depth);
    Loader<T, T::BN, false> right = right_of(first);
    const int steps = (depth + T::DEPTH - 1) / T::DEPTH;
    int next = first, k = 0; // what is loaded next
    auto copy = [&](int stage) {
        if (next < end) {
            bf16* to = room + stage % T::STAGES * STAGE;
            left.copy(to, k * T::DEPTH);
            right.copy(to + LEFT, k * T::DEPTH);
            if (++k == steps) {
                k = 0;
                next += T::BN;
                right = right_of(next);
            }
        }
        ptx::copy_commit();
    };
    int stage = 0;
    for (; stage < T::STAGES - 1; ++stage) copy(stage);
    for (int v = first; v < end; v += T::BN) {
        Sums<T> sums;
        for (int s = 0; s < steps; ++s, ++stage) {
            ptx::copy_wait<T::STAGES - 2>();
            // All have the stage, and all are done with the one before it, which is filled again.
            __syncthreads();
            copy(stage);
            multiply<T, false, false, false>(sums, nullptr, room + (stage + 1) % T::STAGES * STAGE);
        }
        f(v, sums);
    }
    ptx::copy_wait<0>();
}

// What a block does: the rows of a tile and a chunk of the vocabulary, columns [first, end); with a
// TOP, lists of the rows.
template <class T, bool TOP = false>
struct Part {
    // Whether warps share columns.
    static constexpr bool SHARE = T::WN < COLUMNS;
    // Rows of a lane: two of each fragment, or one where warps share columns.
    static constexpr int ROWS = SHARE ? 1 : T::WM / 8;
    static_assert(!SHARE || T::THREADS == T::BM * 4, "four lanes a row");
    using Lists = Top<8 * ROWS>;
    static constexpr int LISTS = T::THREADS / 32 * Lists::BYTES;
    static_assert(!TOP || T::OPERANDS + (SHARE ? T::SUMS : 0) + LISTS <= 99 * 1024, "what a block has of sm_86");

    bf16* room;
    float* exchange;
    char* lists;
    int chunks, chunk, first, end, top;

    __device__ __forceinline__ Part(int rows, int vocab) {
        Shared shared;
        room = shared.take<bf16>(T::OPERANDS / 2, 128);
        exchange = SHARE ? shared.take<float>(T::BM * T::BN) : nullptr;
        lists = TOP ? shared.take<char>(LISTS) : nullptr;
        chunks = (vocab + CHUNK - 1) / CHUNK;
        const RasterTile at = raster(blockIdx.x, (rows + T::BM - 1) / T::BM, chunks);
        chunk = at.across, first = chunk * CHUNK, end = first + CHUNK < vocab ? first + CHUNK : vocab, top = at.down * T::BM;
    }
    // First row of the warp.
    __device__ __forceinline__ int first_row() const { return top + (SHARE ? int(threadIdx.x) / 32 * 8 : T::row()); }
    // Row of the lane's number r.
    __device__ __forceinline__ int row(int r) const {
        return first_row() + 8 * r + ptx::lane() / 4;
    }
    // Gives f each tile's share of a lane: f(number of its row, first column of the tile, sums).
    template <class F>
    __device__ __forceinline__ void each(const bf16* h, const bf16* w, int rows, int d, F f) const {
        each_tile<T>(Operand{h, rows, d, top, T::BM / 2}, w, first, end, d, room, [&](int v, Sums<T>& sums) {
            float x[Lane::COUNT];
            if constexpr (SHARE) {
                spread(sums, exchange);
                __syncthreads();
                // The next tile is spread after another barrier.
                for (int j = 0; j < COLUMNS / 8; ++j) {
                    const float2 two = *reinterpret_cast<const float2*>(eight<T>(exchange, threadIdx.x / 4, j) + threadIdx.x % 4 * 2);
                    x[2 * j] = two.x, x[2 * j + 1] = two.y;
                }
                f(0, v, x);
            } else {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                    for (int q = 0; q < Lane::COUNT; ++q) x[q] = sums.x[r / 2][q / 2][r % 2 * 2 + q % 2];
                    f(r, v, x);
                }
            }
        });
    }
    // Writes what the lanes have of their rows.
    template <class S>
    __device__ __forceinline__ void write(float* partial, S (&parts)[ROWS], int rows) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) write_part(partial, int64_t(row(r)) * chunks + chunk, parts[r], row(r) < rows);
    }
};

template <class T>
static __device__ void forward(float* partial, const bf16* h, const bf16* w, const uint32_t* targets, int rows, int vocab, int d,
                               float scale, float cap) {
    using P = Part<T>;
    const P part(rows, vocab);
    const Scaling by(scale, cap);
    State states[P::ROWS];
    uint32_t target[P::ROWS];
#pragma unroll
    for (int r = 0; r < P::ROWS; ++r) target[r] = part.row(r) < rows ? targets[part.row(r)] : ~0u;
    part.each(h, w, rows, d, [&](int r, int v, float (&x)[Lane::COUNT]) {
        reduce(states[r], x, part.end - v, target[r] - v, by);
    });
    part.write(partial, states, rows);
}

// With a TOP also the lists of the k best.
template <class T, bool TOP = false>
static __device__ void sample(float* partial, const bf16* h, const bf16* w, int rows, int vocab, int d, float scale, float cap,
                              const Draws& draws, uint64_t* lists = nullptr, int k = 0) {
    using P = Part<T, TOP>;
    const P part(rows, vocab);
    const Scaling by(scale, cap);
    Sampled parts[P::ROWS];
    const typename P::Lists top(part.lists, threadIdx.x / 32, k);
    part.each(h, w, rows, d, [&](int r, int v, float (&x)[Lane::COUNT]) {
        reduce(parts[r].state, x, part.end - v, ~0u, by);
        const int row = part.row(r);
        if (row < rows) choose(parts[r].best, x, v, part.end, by.scale, draws, row);
        if constexpr (TOP) top.add(x, 8 * r, rows - part.first_row() - 8 * r, v, part.end, by.scale);
    });
    if constexpr (TOP) top.store(lists, part.first_row(), rows, part.chunk, part.chunks);
    part.write(partial, parts, rows);
}

// A warp writes what the chunks of its row say.
template <class F>
static __device__ __forceinline__ void finish(float* logp, float* lse, float* entropy, const uint32_t* targets, int row, int vocab, F part) {
    const State s = merge_parts<State>(vocab, part);
    if (ptx::lane() != 0) return;
    const float log_sum = logf(s.sum), all = s.top + log_sum;
    lse[row] = all;
    logp[row] = targets[row] < uint32_t(vocab) ? s.target - all : NAN;
    if (entropy != nullptr) entropy[row] = log_sum - s.weighted / s.sum;
}

KERNEL(128, logprob_merge)(float* logp, float* lse, OPTIONAL float* entropy, PACKED const float* partial, const uint32_t* targets,
                           int rows, int vocab) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const int64_t first = int64_t(row) * ((vocab + CHUNK - 1) / CHUNK);
    finish(logp, lse, entropy, targets, row, vocab, [&](int c) { return load_partial(partial, first + c); });
}

KERNEL(128, logprob_pick)(uint32_t* tokens, float* logp, float* lse, PACKED const float* partial, int rows, int vocab) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const int64_t first = int64_t(row) * ((vocab + CHUNK - 1) / CHUNK);
    const auto [s, best] = merge_parts<Sampled>(vocab, [&](int c) { return load_sampled(partial, first + c); });
    if (ptx::lane() != 0) return;
    const float all = s.top + logf(s.sum);
    tokens[row] = best.token, lse[row] = all, logp[row] = best.z - all;
}

// After pick. A block a row.
KERNEL(128, logprob_top)(uint32_t* tokens, float* logp, const float* lse, const uint64_t* lists, int vocab, int k) {
    const int chunks = (vocab + CHUNK - 1) / CHUNK, warp = threadIdx.x / 32, lane = ptx::lane();
    const int64_t row = blockIdx.x;
    Shared shared;
    uint64_t* all = shared.take<uint64_t>(WARPS * MOST);
    uint64_t best = 0;
    for (int c0 = warp; c0 < chunks; c0 += WARPS * AHEAD) {
        uint64_t next[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int c = c0 + WARPS * i;
            next[i] = lane < k && c < chunks ? lists[(row * chunks + c) * k + lane] : 0;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) insert(best, next[i], k);
    }
    all[threadIdx.x] = best;
    __syncthreads();
    if (warp != 0) return;
    for (int w = 1; w < WARPS; ++w) insert(best, all[w * MOST + lane], k);
    if (lane >= k) return;
    tokens[row * k + lane] = token_of(best), logp[row * k + lane] = z_of(best) - lse[row];
}

// A block a row, four lanes a chunk.
template <class T>
static __device__ void from_logits(float* logp, float* lse, float* entropy, const T* z, const uint32_t* targets, int vocab,
                                   float scale, float cap) {
    const int chunks = (vocab + CHUNK - 1) / CHUNK, row = blockIdx.x;
    const uint32_t target = targets[row];
    Shared shared;
    float* partial = shared.take<float>(4 * chunks);
    const Scaling by(scale, cap);
    const T* x = z + int64_t(row) * vocab;
    for (int c0 = 0; c0 < chunks; c0 += GROUPS) {
        // Lanes without a chunk of their own go along, as shuffles need them.
        const int c = c0 + threadIdx.x / 4, first = c * CHUNK, end = first + CHUNK < vocab ? first + CHUNK : vocab;
        State s;
        for (int v = first; v < end; v += COLUMNS) {
            float mine[Lane::COUNT];
            for (int q = 0; q < Lane::COUNT; ++q) mine[q] = v + Lane::column(q) < end ? widen(x[v + Lane::column(q)]) : 0.0f;
            reduce(s, mine, end - v, target - v, by);
        }
        write_part(partial, c, s, c < chunks);
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    finish(logp, lse, entropy, targets, row, vocab, [&](int c) { return load_partial(partial, c); });
}

// Adds the product of dz and `n` rows of w to the sums, or, where they are the first, writes it;
// the last are rounded to dh.
template <class T>
static __device__ void hidden(bf16* dh, float* sums, const bf16* dz, const bf16* w, int rows, int n, int width, int d, int first, int last) {
    each_eight<T, false, true>(Operand{dz, rows, width}, Operand{w, d, d}, n, [&](int row, int col, Elements<8> x) {
        const int64_t i = (int64_t(row) * d + col) / 8;
        add(x, first == 0 ? take<8>(sums, i) : Elements<8>{});
        if (last != 0) {
            store(dh, i, x);
        } else {
            put<8>(sums, i, x);
        }
    });
}

// Rows of a tile, threads.
#define EACH_TILE(X) X(128, 128) X(64, 128) X(16, 64)
#define KERNELS(ROWS, THREADS) \
    KERNEL(THREADS, logprob_forward_##ROWS##_bf16)(PACKED float* partial, PACKED const bf16* h, PACKED const bf16* w, \
        const uint32_t* targets, int rows, int vocab, int d, float scale, float cap) { \
        forward<T##ROWS>(partial, h, w, targets, rows, vocab, d, scale, cap); \
    } \
    KERNEL(THREADS, logprob_sample_##ROWS##_bf16)(PACKED float* partial, PACKED const bf16* h, PACKED const bf16* w, \
        const uint64_t* samples, const uint32_t* positions, int rows, int vocab, int d, float scale, float cap, uint64_t seed, \
        uint64_t step, uint32_t purpose, int greedy) { \
        const Draws draws = {Stream{seed, step, purpose}, samples, positions, greedy != 0}; \
        sample<T##ROWS>(partial, h, w, rows, vocab, d, scale, cap, draws); \
    }
EACH_TILE(KERNELS)

#define EACH_TOP_TILE(X) X(64, 128) X(16, 64)
#define SAMPLE_TOP(ROWS, THREADS) \
    KERNEL(THREADS, logprob_sample_top_##ROWS##_bf16)(PACKED float* partial, uint64_t* lists, PACKED const bf16* h, \
        PACKED const bf16* w, const uint64_t* samples, const uint32_t* positions, int rows, int vocab, int d, float scale, \
        float cap, uint64_t seed, uint64_t step, uint32_t purpose, int greedy, int k) { \
        const Draws draws = {Stream{seed, step, purpose}, samples, positions, greedy != 0}; \
        sample<Top##ROWS, true>(partial, h, w, rows, vocab, d, scale, cap, draws, lists, k); \
    }
EACH_TOP_TILE(SAMPLE_TOP)

#define FROM_LOGITS(T) \
    KERNEL(256, logprob_from_logits_##T)(float* logp, float* lse, OPTIONAL float* entropy, const T* z, const uint32_t* targets, \
        int vocab, float scale, float cap) { \
        from_logits(logp, lse, entropy, z, targets, vocab, scale, cap); \
    }
EACH_DTYPE(FROM_LOGITS)

// The gradient of the products with `n` columns of the vocabulary, of which the first is number
// `first`; zeros up to `width`, the next multiple of 8.
KERNEL(128, logprob_gradient_bf16)(PACKED bf16* dz, PACKED const bf16* h, PACKED const bf16* w, const uint32_t* targets,
                                   const float* lse, const float* dlogp, OPTIONAL const float* entropy,
                                   OPTIONAL const float* dentropy, int rows, int n, int width, int first, int d, float scale,
                                   float cap) {
    const Scaling by(scale, cap);
    each_eight<T128x128, false, false>(Operand{h, rows, d}, Operand{w, n, d}, d, [&](int row, int col, Elements<8> x) {
        const float all = lse[row], dl = dlogp[row];
        const float de = dentropy != nullptr ? dentropy[row] : 0.0f, ent = dentropy != nullptr ? entropy[row] : 0.0f;
        const uint32_t target = targets[row] - first - col;
        for (int i = 0; i < 8; ++i) {
            const float y = by.cap > 0.0f ? by.bend(x.x[i]) : x.x[i], bent = y * by.inverse;
            const float z = y * by.scale - all, p = power(z);
            const float g = (uint32_t(i) == target ? dl : 0.0f) - p * (dl + de * (z + ent));
            x.x[i] = col + i < n ? g * by.scale * ((1.0f - bent) * (1.0f + bent)) : 0.0f;
        }
        store(dz, (int64_t(row) * width + col) / 8, x);
    });
}

#define EACH_HIDDEN_TILE(X) X(128x128) X(64x64)
#define HIDDEN(TILE) \
    KERNEL(128, logprob_hidden_##TILE##_bf16)(PACKED bf16* dh, PACKED float* sums, PACKED const bf16* dz, PACKED const bf16* w, \
        int rows, int n, int width, int d, int first, int last) { \
        hidden<T##TILE>(dh, sums, dz, w, rows, n, width, d, first, last); \
    }
EACH_HIDDEN_TILE(HIDDEN)

// dw += dzᵀ h for `n` columns of dz, whose rows are `width` long.
KERNEL(128, logprob_weight_bf16)(PACKED float* dw, PACKED const bf16* dz, PACKED const bf16* h, int rows, int n, int width, int d) {
    each_eight<T128x128, true, true>(Operand{dz, n, width}, Operand{h, d, d}, rows, [&](int row, int col, const Elements<8>& x) {
        add_at(dw, (int64_t(row) * d + col) / 8, x);
    });
}
