// Gradients of causal attention (attention.cu): with p[r, j] = e^(s[r, j] - lse[r]) and delta[r] =
// dout[r] . out[r],
//   ds[r, j] = p[r, j] (dout[r] . v[j] - delta[r]) ds/dproduct, dv[j] = sum_r p[r, j] dout[r],
//   dk[j] = sum_r ds[r, j] q[r], dq[r] = sum_j ds[r, j] k[j], r over the heads of a group.
//   shapes   dqkv, qkv [rows, (q_heads + 2 kv_heads) D] bf16; dout, out [rows, q_heads D] bf16;
//            lse, delta [rows, q_heads] f32; sums [rows, q_heads D] f32; turns [tiles of queries,
//            kv_heads]; tiles [count, 8], visits [visits, 8]
//   tiling   a block takes a tile of keys of one head after the other: holds K and V in shared
//            memory, dK and dV in registers, and visits the tiles of queries that see it: TILE
//            rows, positions and for each the heads of the group
//   memory   keys and values once, queries and dout once for TILE keys, f32 sums of dq read and
//            written as often, from L2
//   numerics f32 sums; p and ds rounded to bf16 for products; dq over tiles of keys in ascending
//            order, a prefix's first, dk and dv over tiles of queries in the order of the visits:
//            bits depend on the sequence and those that share its prefix. A NaN spoils no other
//   needs    D a multiple of 16, groups up to 64, buffers at 16 bytes; blocks that run together
#include "include/attention_backward.cuh"

constexpr int THREADS = 256;
constexpr int TILE = 64;
// Heads wider than 128 take smaller tiles: larger ones do not fit shared memory.
constexpr int THREADS_256 = 128;
constexpr int TILE_256 = 32;

// Where a lane's 16 bytes lie in lines of `LINE` chunks: those of the row and chunk that it was
// made with, and of others `down` rows (whole eights) and c chunks on, where c has no bit below 8
// that the first chunk has.
template <int LINE>
struct Spot {
    int bytes;
    __device__ __forceinline__ Spot(int row, int c) : bytes((row * LINE + (c ^ row % 8)) * 16) {}
    template <class T>
    __device__ __forceinline__ T* of(T* x, int down, int c) const {
        return x + ((bytes ^ c % 8 * 16) + (down * LINE + c / 8 * 8) * 16) / int(sizeof(T));
    }
};

// Who computes what.
template <int WIDTH>
struct Plan {
    static constexpr int D = WIDTH, SIZE = D <= 128 ? TILE : TILE_256, COUNT = D <= 128 ? THREADS : THREADS_256;
    static constexpr int WARPS = COUNT / 32;
    // Scores: a warp has 16 queries and as many times 16 keys.
    static constexpr int DOWN = SIZE / 16, KEYS = SIZE / 16 * DOWN / WARPS;
    // Gradients: as many times 16 rows; of the head's columns every STEP-th 16.
    static constexpr int STEP = D % 64 == 0 ? 4 : 2, ROWS = DOWN * STEP / WARPS, COLS = (D / 16 + STEP - 1) / STEP;
    using Sums = float[ROWS][COLS][8];
    // Tiles of heads and of scores in shared memory.
    using Heads = Lines<D, SIZE>;
    using Weights = Lines<64, SIZE>;
};

// What a lane's warp has of a step, and where the lane finds it. Of scores: 16 rows of queries from
// `top` on, and keys from `left` on. Of gradients: rows from 16 `down` on, and columns from 16
// `across` on.
template <class P>
struct Warp {
    int lane, top, left, across, down;
    // Rows of queries and dout, of keys and values; columns of either.
    Spot<P::Heads::LINE> query, key, column;
    // The lane's own, rows of ds, columns of p and ds.
    Spot<P::Weights::LINE> score, row, transposed;
    __device__ __forceinline__ Warp(int lane, int warp)
        : lane(lane), top(warp % P::DOWN * 16), left(warp / P::DOWN * P::KEYS * 16), across(warp % P::STEP),
          down(warp / P::STEP * P::ROWS), query(top + lane % 16, lane / 16), key(left + lane / 16 * 8 + lane % 8, lane / 8 % 2),
          column(lane % 16, 2 * across + lane / 16), score(top + lane / 4, left / 8), row(16 * down + lane % 16, lane / 16),
          transposed(lane / 16 * 8 + lane % 8, 2 * down + lane / 8 % 2) {}
    // Whether the head has the warp's columns number j.
    __device__ __forceinline__ bool has(int j) const { return P::D / 16 % P::STEP == 0 || j * P::STEP + across < P::D / 16; }
};

// x[8 j..] = products of a warp's 16 rows of queries with 16 rows of keys from 16 j on.
template <class P>
static __device__ __forceinline__ void multiply(float (&x)[P::KEYS * 8], const bf16* queries, const bf16* keys, const Warp<P>& w) {
#pragma unroll
    for (int i = 0; i < P::KEYS * 8; ++i) x[i] = 0.0f;
    // 64 columns at once, not all of them, as copies above: registers.
#pragma unroll 1
    for (int from = 0; from < P::D; from += 64) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (P::D % 64 != 0 && from + 16 * i >= P::D) break;
            uint32_t a[4];
            ptx::load_matrix(a, w.query.of(queries + from, 0, 2 * i));
#pragma unroll
            for (int j = 0; j < P::KEYS; ++j) {
                uint32_t b[4];
                ptx::load_matrix(b, w.key.of(keys + from, 16 * j, 2 * i));
                add_product(x, j, a, b);
            }
        }
    }
}

// What a lane's two rows of queries see: row r sees columns [from[r], to[r]) of the warp's, all
// columns if `clear`. `base` and `delta` come from the forward pass.
struct Sight {
    int from[2], to[2];
    float base[2], delta[2];
    bool clear;

    // Statistics of the group's first head begin at `lse` and `delta`.
    template <class P>
    __device__ __forceinline__ Sight(const Rows<P::SIZE>& rows, const Keys& keys, const Scoring& by, const Warp<P>& w, const float* lse,
                                     const float* deltas, int q_heads) {
        const int begin = keys.position + w.left, end = begin + 16 * P::KEYS;
        for (int r = 0; r < 2; ++r) {
            const int row = w.top + 8 * r + w.lane / 4, p = rows.first + rows.after(row), after = p - keys.position;
            const bool there = row < rows.count;
            const int at = there ? rows.offset(row, q_heads, 1) : 0;
            from[r] = by.from(p) - begin, to[r] = (after < keys.count ? after + 1 : keys.count) - w.left;
            if (!there) to[r] = from[r];
            base[r] = lse[at] * LOG2E, delta[r] = deltas[at];
        }
        clear = rows.count == P::SIZE && end <= keys.position + keys.count && end <= rows.first + rows.after(w.top) + 1 &&
                by.from(rows.first + rows.after(w.top + 15)) <= begin;
    }
};

// From y and (dout . v - delta) dy / dproduct to weights and the gradient of the products. MASKED:
// what is not seen gets 0.
template <class P, bool MASKED>
static __device__ __forceinline__ void weigh(float (&x)[P::KEYS * 8], float (&dp)[P::KEYS * 8], const Scoring& by, const Sight& sight) {
    const int c = ptx::lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < P::KEYS * 8; ++i) {
        const int r = i / 2 % 2, column = i / 4 * 8 + c + i % 2;
        x[i] = ptx::exp2(fmaf(x[i], by.factor, -sight.base[r]));
        dp[i] *= x[i] * by.scale;
        // What lies beyond may be anything, NaN too: selected away, not multiplied.
        if (MASKED && !(column >= sight.from[r] && column < sight.to[r])) x[i] = dp[i] = 0.0f;
    }
}

// From products and dout . v to weights and the gradient of the products.
template <class P>
static __device__ __forceinline__ void differentiate(float (&x)[P::KEYS * 8], float (&dp)[P::KEYS * 8], const Scoring& by,
                                                     const Sight& sight) {
#pragma unroll
    for (int i = 0; i < P::KEYS * 8; ++i) dp[i] -= sight.delta[i / 2 % 2];
    if (by.capped) {
#pragma unroll
        for (int i = 0; i < P::KEYS * 8; ++i) {
            x[i] = by.bend(x[i]);
            dp[i] *= (1.0f - x[i]) * (1.0f + x[i]);
        }
    }
    if (sight.clear) {
        weigh<P, false>(x, dp, by, sight);
    } else {
        weigh<P, true>(x, dp, by, sight);
    }
}

// sums += p^T x of a warp: p [SIZE queries, keys], x [SIZE, D].
template <class P>
static __device__ __forceinline__ void add_transposed(typename P::Sums& sums, const bf16* p, const bf16* x, const Warp<P>& w) {
#pragma unroll
    for (int k = 0; k < P::SIZE; k += 16) {
        uint32_t a[P::ROWS][4];
#pragma unroll
        for (int m = 0; m < P::ROWS; ++m) ptx::load_matrix_transposed(a[m], w.transposed.of(p, k, 2 * m));
#pragma unroll
        for (int j = 0; j < P::COLS; ++j) {
            if (!w.has(j)) continue;
            uint32_t b[4];
            ptx::load_matrix_transposed(b, w.column.of(x, k, 2 * P::STEP * j));
#pragma unroll
            for (int m = 0; m < P::ROWS; ++m) {
                add_product(sums[m][j], 0, a[m], b);
            }
        }
    }
}

// A tile of queries' gradient, of which a tile of keys adds its share to what those before it have:
// of 16 columns a lane's four are neighbours in the sums, as they are in its registers.
template <class P>
struct Share {
    float* sums;  // of row 0's position and the group's first head
    bf16* out;
    bool first, last;
    int cols, place[P::ROWS][2];  // a row's head in the sums; below 0 where there is no row
    Packet<float> before[P::ROWS][2];

    __device__ __forceinline__ Share(float* sums, bf16* out, int cols, int q_heads, const Rows<P::SIZE>& rows, bool first, bool last,
                                     const Warp<P>& w)
        : sums(sums + 16 * w.across + 4 * (w.lane % 4)), out(out), first(first), last(last), cols(cols) {
#pragma unroll
        for (int m = 0; m < P::ROWS; ++m) {
            for (int r = 0; r < 2; ++r) {
                const int row = 16 * (w.down + m) + 8 * r + w.lane / 4;
                place[m][r] = row < rows.count ? rows.offset(row, q_heads, 1) : -1;
            }
        }
    }

    __device__ __forceinline__ float* at(int m, int r, int j) const { return sums + (place[m][r] * P::D + 16 * P::STEP * j); }

    // Reads what there is of the warp's columns number j.
    __device__ __forceinline__ void recall(int j, const Warp<P>& w) {
#pragma unroll
        for (int m = 0; m < P::ROWS; ++m) {
            for (int r = 0; r < 2; ++r) {
                before[m][r] = Packet<float>{};
                if (!first && place[m][r] >= 0 && w.has(j)) before[m][r] = load(at(m, r, j), 0);
            }
        }
    }

    // Adds to that, and writes it.
    __device__ __forceinline__ void add(const float (&x)[P::ROWS][8], int j, const Rows<P::SIZE>& rows, const Warp<P>& w) const {
#pragma unroll
        for (int m = 0; m < P::ROWS; ++m) {
            for (int r = 0; r < 2; ++r) {
                Packet<float> sum = before[m][r];
                for (int e = 0; e < 4; ++e) sum.x[e] += x[m][2 * r + e / 2 * 4 + e % 2];
                if (place[m][r] < 0) continue;
                if (last) {
                    bf16* to = out + rows.offset(16 * (w.down + m) + 8 * r + w.lane / 4, cols, P::D);
                    uint32_t* two = reinterpret_cast<uint32_t*>(to + 16 * (P::STEP * j + w.across)) + w.lane % 4;
                    two[0] = ptx::pack_bf16(sum.x[0], sum.x[1]);
                    two[4] = ptx::pack_bf16(sum.x[2], sum.x[3]);
                } else {
                    ptx::store_four(at(m, r, j), sum.x);
                }
            }
        }
    }

    // All of it: ds k.
    __device__ __forceinline__ void add_product_of(const bf16* slopes, const bf16* key, const Rows<P::SIZE>& rows, const Warp<P>& w) {
        uint32_t a[P::SIZE / 16][P::ROWS][4];
#pragma unroll
        for (int k = 0; k < P::SIZE / 16; ++k) {
            for (int m = 0; m < P::ROWS; ++m) ptx::load_matrix(a[k][m], w.row.of(slopes, 16 * m, 2 * k));
        }
#pragma unroll
        for (int j = 0; j < P::COLS; ++j) {
            if (!w.has(j)) continue;
            float x[P::ROWS][8] = {};
#pragma unroll
            for (int k = 0; k < P::SIZE / 16; ++k) {
                uint32_t b[4];
                ptx::load_matrix_transposed(b, w.column.of(key, 16 * k, 2 * P::STEP * j));
#pragma unroll
                for (int m = 0; m < P::ROWS; ++m) {
                    add_product(x[m], 0, a[k][m], b);
                }
            }
            add(x, j, rows, w);
            if (j + 1 < P::COLS) recall(j + 1, w);
        }
    }
};

// Writes the warp's part of dk or dv, `count` rows that are `cols` apart.
template <class P>
static __device__ __forceinline__ void write(bf16* out, const typename P::Sums& x, int cols, int count, const Warp<P>& w) {
#pragma unroll
    for (int m = 0; m < P::ROWS; ++m) {
        for (int r = 0; r < 2; ++r) {
            const int row = 16 * (w.down + m) + 8 * r + w.lane / 4;
            if (row >= count) continue;
#pragma unroll
            for (int j = 0; j < P::COLS; ++j) {
                if (!w.has(j)) continue;
                uint32_t* two = reinterpret_cast<uint32_t*>(out + row * cols + 16 * (P::STEP * j + w.across)) + w.lane % 4;
                const float* d = x[m][j] + 2 * r;
                two[0] = ptx::pack_bf16(d[0], d[1]);
                two[4] = ptx::pack_bf16(d[4], d[5]);
            }
        }
    }
}

template <int WIDTH>
static __device__ void backward(bf16* dqkv, float* sums, uint32_t* turns, const bf16* dout, const bf16* qkv, const float* lse,
                                const float* delta, const uint32_t* tiles, const uint32_t* visits, int count, int q_heads,
                                int kv_heads, const Scoring& by) {
    using P = Plan<WIDTH>;
    constexpr int D = P::D, SIZE = P::SIZE, ROOM = P::Heads::SIZE;
    Shared shared;
    bf16 *key = shared.take<bf16>(ROOM, 128), *value = shared.take<bf16>(ROOM, 128);
    bf16 *query = shared.take<bf16>(2 * ROOM, 128), *grad = shared.take<bf16>(ROOM, 128);
    bf16 *weights = shared.take<bf16>(P::Weights::SIZE, 128), *slopes = shared.take<bf16>(P::Weights::SIZE, 128);
    const Warp<P> w(ptx::lane(), threadIdx.x / 32);
    const Groups group(q_heads / kv_heads);
    const int cols = (q_heads + 2 * kv_heads) * D;
    each_item(count * kv_heads, [&](int item) {
        const Keys keys(tiles, item / kv_heads);
        const int g = item % kv_heads, head = g * group.size;
        Steps<SIZE> next(visits, keys, group);
        // Queries, and dout, of a step are each a group of copies.
        auto load = [&](bf16* to, const bf16* from, int width) {
            if (next.there()) {
                P::Heads::template copy<P::COUNT>(to, from + next.rows.at * int64_t(width) + head * D,
                        [&](int i) { return i < next.rows.count ? next.rows.offset(i, width, D) : -1; });
            }
            ptx::copy_commit();
        };
        auto load_keys = [&](bf16* to, int column) {
            P::Heads::template copy<P::COUNT>(to, qkv + keys.at * int64_t(cols) + column, [&](int i) { return i < keys.count ? i * cols : -1; });
        };
        load_keys(key, (q_heads + g) * D);
        load(query, qkv, cols);
        load_keys(value, (q_heads + kv_heads + g) * D);
        load(grad, dout, q_heads * D);
        typename P::Sums dk = {}, dv = {};
        // The turn that the block has, or had until all have written: then it passes it on.
        uint32_t* turn = nullptr;
        int mine = 0, stage = 0;
        while (next.there()) {
            const Rows<SIZE> rows = next.rows;
            const Visit visit = next.visit();
            uint32_t* const passed = turn;
            const int next_turn = mine + 1;
            turn = turns + (visit.turns + next.t) * int64_t(kv_heads) + g;
            const Among among(keys, visit, rows, by, SIZE);
            mine = among.before;
            const bool last = among.last;
            next.advance();
            const int64_t first = rows.at * int64_t(q_heads) + head;
            const Sight sight(rows, keys, by, w, lse + first, delta + first, q_heads);
            // Queries are here, and keys; what the last step read and wrote, all have.
            ptx::copy_wait<1>();
            __syncthreads();
            if (passed != nullptr && threadIdx.x == 0) ptx::turn_pass(passed, next_turn);
            const bf16* q = query + stage * ROOM;
            stage ^= 1;
            load(query + stage * ROOM, qkv, cols);
            float x[P::KEYS * 8], dp[P::KEYS * 8];
            multiply(x, q, key, w);
            // dout is here, and values.
            ptx::copy_wait<1>();
            __syncthreads();
            multiply(dp, grad, value, w);
            differentiate<P>(x, dp, by, sight);
#pragma unroll
            for (int i = 0; i < P::KEYS * 8; i += 2) {
                // A lane has 4 bytes of a chunk.
                const int down = i / 2 % 2 * 8, chunk = i / 4;
                reinterpret_cast<uint32_t*>(w.score.of(weights, down, chunk))[w.lane % 4] = ptx::pack_bf16(x[i], x[i + 1]);
                reinterpret_cast<uint32_t*>(w.score.of(slopes, down, chunk))[w.lane % 4] = ptx::pack_bf16(dp[i], dp[i + 1]);
            }
            __syncthreads();
            add_transposed(dv, weights, grad, w);
            if (mine > 0 && threadIdx.x == 0) ptx::turn_wait(turn, mine);
            // dout was read, and it is our turn.
            __syncthreads();
            load(grad, dout, q_heads * D);
            Share<P> share(sums + first * D, dqkv + rows.at * int64_t(cols) + head * D, cols, q_heads, rows, mine == 0, last, w);
            share.recall(0, w);
            add_transposed(dk, slopes, q, w);
            share.add_product_of(slopes, key, rows, w);
        }
        ptx::copy_wait<0>();
        // Before the next tile's keys come.
        __syncthreads();
        if (threadIdx.x == 0) ptx::turn_pass(turn, mine + 1);
        bf16* out = dqkv + keys.at * int64_t(cols) + (q_heads + g) * D;
        write(out, dk, cols, keys.count, w);
        write(out + kv_heads * D, dv, cols, keys.count, w);
    });
}

// Eight lanes a row of a head; and no turn was taken yet.
KERNEL(THREADS, attention_backward_delta_bf16)(float* delta, uint32_t* turns, PACKED const bf16* dout, PACKED const bf16* out, int heads,
                                               int d, int count) {
    const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    if (i < count) turns[i] = 0;
    const int64_t row = i / 8;
    float sum = 0.0f;
    if (row < heads) {
        for (int at = i % 8; at < d / 8; at += 8) {
            const Packet<bf16> a = load(dout, row * (d / 8) + at), b = load(out, row * (d / 8) + at);
            for (int e = 0; e < 8; ++e) sum = fmaf(a.x[e], b.x[e], sum);
        }
    }
    for (int by = 1; by < 8; by *= 2) sum += ptx::shuffle_xor(sum, by);
    if (row < heads && i % 8 == 0) delta[row] = sum;
}

#define DQKV(D) \
    KERNEL(D <= 128 ? THREADS : THREADS_256, attention_backward_dqkv_##D##_bf16)(PACKED bf16* dqkv, PACKED float* sums, \
        uint32_t* turns, PACKED const bf16* dout, PACKED const bf16* qkv, const float* lse, const float* delta, \
        const uint32_t* tiles, const uint32_t* visits, int count, int q_heads, int kv_heads, float scale, float cap, \
        int window) { \
        const Scoring by(scale, cap, window); \
        backward<D>(dqkv, sums, turns, dout, qkv, lse, delta, tiles, visits, count, q_heads, kv_heads, by); \
    }
EACH_HEAD_SIZE(DQKV)
