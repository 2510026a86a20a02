// Gradients of causal attention on Hopper: those of attention_backward.cu by wgmma and TMA.
//   shapes   as in attention_backward.cu. Tensor maps have a swizzle of 128 bytes: q [rows,
//            q_heads, D] and dout, boxes of whole positions by a group of heads by 64 columns; kv
//            [rows, 2 kv_heads, D], of a tile of keys by 64 columns. turns: two for each tile of
//            queries and head where heads are wider than 128
//   tiling   a block takes a tile of keys of one head after the other: 128, of which a warpgroup
//            has 64; K and V stay in shared memory, dK and dV in registers. A warp loads tiles of
//            up to 64 rows of queries and dout to a ring of stages. Scores are made transposed, so
//            that p and ds go from the registers that they come in to dv and dk; for dq ds goes
//            through shared memory, and the warpgroups take turns to multiply it. Heads wider than
//            128: 64 keys, of scores a warpgroup has half the queries, of gradients half the
//            columns, and both p and ds go through shared memory
//   memory   keys and values once, queries and dout once for a tile of keys, f32 sums of dq read
//            and written as often, from L2
//   numerics as in attention_backward.cu, with the sums of wgmma; those of dq go on from what the
//            tiles before have summed
//   needs    as in attention_backward.cu
#include "include/attention_backward.cuh"
#include "include/tiles_sm90.cuh"

// Keys of a tile, and of one of heads wider than 128: as many as leave dk and dv in registers.
constexpr int KEYS = 128;
constexpr int KEYS_256 = 64;
// Rows of a tile of queries, the most.
constexpr int ROWS = 64;

// Heads of D columns; STAGES of queries and dout.
template <int D_>
struct Plan {
    static constexpr int D = D_, STAGES = D <= 64 ? 4 : D <= 128 ? 3 : 2;
    // Whether warpgroups have queries and columns, not keys.
    static constexpr bool WIDE = D > 128;
    static constexpr int COUNT = WIDE ? KEYS_256 : KEYS;
    // Boxes of 64 columns.
    static constexpr int BOXES = (D + 63) / 64;
    // A warpgroup computes the scores of QUERIES queries and COLS columns of the gradients, by
    // products of SUMS: whole boxes, as in attention_sm90.cu.
    static constexpr int QUERIES = WIDE ? 32 : 64, COLS = WIDE ? D / 2 : D, SUMS = WIDE ? COLS : 64 * BOXES;
    // Bytes of 64 columns of queries and of keys, of all columns, and of p or ds.
    static constexpr int BOX = ROWS * 128, KEY_BOX = COUNT * 128;
    static constexpr int HALF = BOXES * BOX, TILE = BOXES * KEY_BOX, WEIGHTS = COUNT * 128;
};

// A step: a tile of queries that a tile of keys meets.
struct Step {
    int keys_at, keys, position;  // batch row, count and position of the keys
    int at, first, count;         // batch row and position of row 0, rows; 0: the end
    int turn, before;             // of dq: whose sums, and the tiles of keys that come before
    int g;
    bool begins, ends, last;      // the first and the last of these keys; the last of these queries
};

// What forward left of a step's rows, and the step.
struct Facts {
    float base[ROWS], delta[ROWS];
    Step step;
};

// What a block's threads share.
template <class P>
struct Block {
    // Two of p and of ds: one is read while the next is written.
    char *keys, *values, *stages, *slopes, *weights;
    Facts* facts;
    // Barriers of stages, and of keys and values.
    uint64_t *full, *empty, *keys_full, *keys_empty;

    // `used` rows of a stage are loaded.
    __device__ __forceinline__ explicit Block(int used) {
        Shared shared;
        keys = shared.take<char>(P::TILE, 1024);
        values = shared.take<char>(P::TILE, 1024);
        stages = shared.take<char>(2 * P::STAGES * P::HALF, 1024);
        slopes = shared.take<char>(2 * P::WEIGHTS, 1024);
        weights = P::WIDE ? shared.take<char>(2 * P::WEIGHTS, 1024) : nullptr;
        facts = shared.take<Facts>(P::STAGES);
        full = shared.take<uint64_t>(P::STAGES);
        empty = shared.take<uint64_t>(P::STAGES);
        keys_full = shared.take<uint64_t>(1);
        keys_empty = shared.take<uint64_t>(1);
        if (threadIdx.x == 0) {
            for (int s = 0; s < P::STAGES; ++s) ptx::mbarrier_init(full + s, 1), ptx::mbarrier_init(empty + s, 8);
            ptx::mbarrier_init(keys_full, 1), ptx::mbarrier_init(keys_empty, 8);
            ptx::fence_barrier_init();
        }
        // The others are multiplied, by zeros.
        for (int b = 0; b < 2 * P::STAGES * P::BOXES; ++b) clear(stages + b * P::BOX, used, ROWS, threadIdx.x, blockDim.x);
        ptx::fence_async();
        __syncthreads();
    }

    // Rows [from, to) of 64 columns become 0, by thread `own` of `threads`.
    static __device__ __forceinline__ void clear(char* box, int from, int to, int own, int threads) {
        for (int i = 8 * from + own; i < 8 * to; i += threads) reinterpret_cast<uint4*>(box)[i] = uint4{0, 0, 0, 0};
    }
};

// What is differentiated.
struct Input {
    const ptx::TensorMap *q, *dout, *kv;
    const float *lse, *delta;
    const uint32_t *tiles, *visits;
    int count, q_heads, kv_heads, most;
};

// Brings keys and values, queries and dout, in the order of their use. A warp calls it.
template <class P>
static __device__ __forceinline__ void produce(const Block<P>& block, const Input& in, const Scoring& by) {
    Phase<P> phase;
    const Groups group(in.q_heads / in.kv_heads);
    const int lane = ptx::lane(), used = in.most * group.size;
    int parity = 1;
    each_item(in.count * in.kv_heads, [&](int item) {
        const Keys keys(in.tiles, item / in.kv_heads);
        const int g = item % in.kv_heads, head = g * group.size;
        Steps<ROWS> next(in.visits, keys, group, used);
        for (bool begins = true; next.there(); begins = false, phase.next()) {
            const Rows<ROWS> rows = next.rows;
            const Visit visit = next.visit();
            const Among among(keys, visit, rows, by, P::COUNT);
            Step step = {keys.at, keys.count, keys.position, rows.at, rows.first, rows.count, (visit.turns + next.t) * in.kv_heads + g,
                         among.before, g, begins, false, among.last};
            next.advance();
            step.ends = !next.there();
            float base[2], delta[2];
            for (int h = 0; h < 2; ++h) {
                const int row = lane + 32 * h;
                const bool there = row < rows.count;
                const int64_t at = rows.at * int64_t(in.q_heads) + head + (there ? rows.offset(row, in.q_heads, 1) : 0);
                base[h] = there ? in.lse[at] * LOG2E : 0.0f, delta[h] = there ? in.delta[at] : 0.0f;
            }
            Facts& facts = block.facts[phase.stage];
            uint64_t* full = block.full + phase.stage;
            ptx::mbarrier_wait(block.empty + phase.stage, phase.parity ^ 1);
            for (int h = 0; h < 2; ++h) facts.base[lane + 32 * h] = base[h], facts.delta[lane + 32 * h] = delta[h];
            if (lane == 0) facts.step = step;
            ptx::sync_warp();
            if (lane == 0) {
                ptx::mbarrier_expect(full, 2 * P::BOXES * used * 128);
                char* to = block.stages + 2 * phase.stage * P::HALF;
                for (int c = 0; c < P::BOXES; ++c) {
                    ptx::tma_load(to + c * P::BOX, in.q, 64 * c, head, rows.at, full);
                    ptx::tma_load(to + P::HALF + c * P::BOX, in.dout, 64 * c, head, rows.at, full);
                }
            }
            if (!begins) continue;
            // Once the keys before are done with.
            ptx::mbarrier_wait(block.keys_empty, parity);
            parity ^= 1;
            if (lane == 0) {
                ptx::mbarrier_expect(block.keys_full, 2 * P::TILE);
                for (int c = 0; c < P::BOXES; ++c) {
                    ptx::tma_load(block.keys + c * P::KEY_BOX, in.kv, 64 * c, g, keys.at, block.keys_full);
                    ptx::tma_load(block.values + c * P::KEY_BOX, in.kv, 64 * c, in.kv_heads + g, keys.at, block.keys_full);
                }
            }
        }
    });
    ptx::mbarrier_wait(block.empty + phase.stage, phase.parity ^ 1);
    if (lane == 0) {
        block.facts[phase.stage].step.count = 0;
        ptx::mbarrier_arrive(block.full + phase.stage);
    }
}

// What a lane's scores see. `key` counts from the tile's first key; `column` is a row of queries.
struct Sight {
    int key, column, keys, position;
    const Rows<ROWS>& rows;
    bool clear;

    // Whether element i of the lane's, of ptx::wgmma_bf16, is seen.
    __device__ __forceinline__ bool sees(int i, const Scoring& by) const {
        const int k = key + i / 2 % 2 * 8, row = column + i / 4 * 8 + i % 2, p = rows.first + rows.after(row);
        return row < rows.count && k < keys && position + k <= p && position + k >= by.from(p);
    }
};

// Each of N columns' lse and delta: f(i, x) of element i.
template <int N, class F>
static __device__ __forceinline__ void each_column(const float* of, F f) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        const float2 two = *reinterpret_cast<const float2*>(of + 8 * j);
        f(4 * j, two.x), f(4 * j + 1, two.y), f(4 * j + 2, two.x), f(4 * j + 3, two.y);
    }
}

// From y to weights; 0 where nothing is seen.
template <int N, bool MASKED>
static __device__ __forceinline__ void weigh(float (&x)[N / 2], const float* base, const Scoring& by, const Sight& sight) {
    each_column<N>(base, [&](int i, float b) {
        x[i] = ptx::exp2(fmaf(x[i], by.factor, -b));
        // What lies beyond may be anything, NaN too: selected away, not multiplied.
        if (MASKED && !sight.sees(i, by)) x[i] = 0.0f;
    });
}

// The barriers of a block: of ds in either half of its buffer; of a warpgroup; of both.
constexpr int SLOPES = 1, OWN = 3, BOTH = 5;

// Warp number `warp` of those that multiply.
template <class P>
static __device__ __forceinline__ void differentiate(bf16* dqkv, float* sums, uint32_t* turns, const Block<P>& block, const Input& in,
                                                     const Scoring& by, int warp) {
    constexpr int D = P::D, N = P::QUERIES, COLS = P::COLS, SUMS = P::SUMS;
    // Whether dq has registers beside those of ds.
    constexpr bool ROOMY = SUMS <= 64;
    const int lane = ptx::lane(), w = warp / 4, top = warp % 4 * 16, cols = (in.q_heads + 2 * in.kv_heads) * D;
    const Groups group(in.q_heads / in.kv_heads);
    // The warpgroup's first key, query and column of gradients.
    const int key0 = P::WIDE ? 0 : 64 * w, query0 = P::WIDE ? 32 * w : 0, box0 = P::WIDE ? w * P::BOXES / 2 : 0;
    const int own_key = key0 + top + lane / 4, own_column = query0 + lane % 4 * 2;
    const int used = in.most * group.size;
    float dk[SUMS / 2], dv[SUMS / 2];
    Phase<P> phase;
    // The turn to pass on once all have written, and the tiles of keys that are added by then.
    int owed = -1, added = 0;
    auto pass = [&] {
        ptx::barrier(OWN + w, 128);
        if (threadIdx.x % 128 == 0 && owed >= 0) ptx::turn_pass(turns + owed, added);
        owed = -1;
    };
    int parity = 0;
    const uint64_t key_rows = ptx::operand(block.keys + key0 * 128, 0, 1024), value_rows = ptx::operand(block.values + key0 * 128, 0, 1024);
    const uint64_t key_columns = ptx::operand(block.keys + box0 * P::KEY_BOX, P::KEY_BOX, 1024);
    for (int count = 0;; ++count, phase.next()) {
        ptx::mbarrier_wait(block.full + phase.stage, phase.parity);
        const Facts& facts = block.facts[phase.stage];
        // The same in a warp, and known to be.
        auto same = [](int x) { return ptx::shuffle(x, 0); };
        Rows<ROWS> rows(group);
        rows.count = same(facts.step.count);
        if (rows.count == 0) break;
        rows.first = same(facts.step.first);
        const int keys = same(facts.step.keys), position = same(facts.step.position);
        char *query = block.stages + 2 * phase.stage * P::HALF, *grad = query + P::HALF;
        const bool begins = same(facts.step.begins);
        if (begins) {
            ptx::mbarrier_wait(block.keys_full, parity);
            parity ^= 1;
#pragma unroll
            for (int i = 0; i < SUMS / 2; ++i) dk[i] = dv[i] = 0.0f;
        }
        // What follows rows and keys in memory belongs to others: not even zeros may multiply it.
        if (rows.count < used || (begins && keys < P::COUNT)) {
            for (int c = 0; c < 2 * P::BOXES; ++c) block.clear(query + c * P::BOX, rows.count, used, threadIdx.x, 256);
            for (int c = 0; begins && c < P::BOXES; ++c) block.clear(block.keys + c * P::KEY_BOX, keys, P::COUNT, threadIdx.x, 256);
            ptx::fence_async();
            ptx::barrier(BOTH, 256);
        }

        // Products of keys with queries, and of values with dout, transposed.
        float x[N / 2], dp[N / 2];
        auto multiply = [&](float(&to)[N / 2], uint64_t left, const char* tile) {
            const uint64_t right = ptx::operand(tile + query0 * 128, 0, 1024);
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                const int c = i / 4, step = i % 4 * 32;
                ptx::wgmma_bf16<N, false, false>(to, ptx::operand_advance(left, c * P::KEY_BOX + step),
                                                 ptx::operand_advance(right, c * P::BOX + step), i > 0);
            }
            ptx::wgmma_commit();
        };
        ptx::wgmma_fence();
        multiply(x, key_rows, query);
        multiply(dp, value_rows, grad);
        // Beside them: it takes a while.
        if (owed >= 0) pass();
        Sight sight = {own_key, own_column, keys, position, rows, false};
        const int first_key = position + key0 + top, last_key = first_key + 15;
        // Rows that are never brought are zeros, and give nothing.
        sight.clear = rows.count == used && key0 + top + 16 <= keys && last_key <= rows.first + rows.after(query0) &&
                      by.from(rows.first + rows.after(query0 + N - 1)) <= first_key;
        auto weights = [&] {
            const float* base = facts.base + own_column;
            if (sight.clear) {
                weigh<N, false>(x, base, by, sight);
            } else {
                weigh<N, true>(x, base, by, sight);
            }
        };
        ptx::wgmma_wait<1>();
        ptx::wgmma_keep(x);
        if (by.capped) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) x[i] = by.bend(x[i]);
        } else {
            weights();
        }
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(dp);
        each_column<N>(facts.delta + own_column, [&](int i, float delta) { dp[i] -= delta; });
        if (by.capped) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) dp[i] *= (1.0f - x[i]) * (1.0f + x[i]);
            weights();
        }
#pragma unroll
        for (int i = 0; i < N / 2; ++i) dp[i] *= x[i];
        if (!sight.clear) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) dp[i] = sight.sees(i, by) ? dp[i] : 0.0f;
        }
        uint32_t p[N / 16][4], ds[N / 16][4];
        pack_weights(p, x);
        pack_weights(ds, dp);

        const uint64_t query_columns = ptx::operand(query + box0 * P::BOX, P::BOX, 1024);
        const uint64_t grad_columns = ptx::operand(grad + box0 * P::BOX, P::BOX, 1024);
        if constexpr (!P::WIDE) {
            ptx::wgmma_keep(dk);
            ptx::wgmma_keep(dv);
            ptx::wgmma_fence();
#pragma unroll
            for (int i = 0; i < N / 16; ++i) ptx::wgmma_bf16<SUMS, true>(dv, p[i], ptx::operand_advance(grad_columns, i * 2048), true);
            ptx::wgmma_commit();
        }
        // A row of keys has 64 queries; a lane has 4 bytes of each of its chunks of 16.
        char* const slopes = block.slopes + count % 2 * P::WEIGHTS;
        char* const weight = P::WIDE ? block.weights + count % 2 * P::WEIGHTS : nullptr;
        auto put = [&](char* to, const uint32_t(&from)[N / 16][4]) {
#pragma unroll
            for (int i = 0; i < N / 16; ++i) {
                for (int e = 0; e < 4; ++e) {
                    const int chunk = query0 / 8 + 2 * i + e / 2;
                    *reinterpret_cast<uint32_t*>(to + (own_key + e % 2 * 8) * 128 + (chunk ^ lane / 4) * 16 + lane % 4 * 4) = from[i][e];
                }
            }
        };
        put(slopes, ds);
        if constexpr (P::WIDE) {
            put(weight, p);
        } else {
            // Only now: registers of a product under way must not even be read.
            ptx::wgmma_fence();
#pragma unroll
            for (int i = 0; i < N / 16; ++i) ptx::wgmma_bf16<SUMS, true>(dk, ds[i], ptx::operand_advance(query_columns, i * 2048), true);
            ptx::wgmma_commit();
        }
        ptx::fence_async();
        // All of ds is there for the warpgroup whose step it is; the other goes on. The buffer is
        // written again two steps on: between, at the next step's barrier, both meet again, which
        // come there when their products of this step are done.
        const bool adds = P::WIDE || count % 2 == w;
        if (adds) {
            ptx::barrier(SLOPES + count % 2, 256);
        } else {
            ptx::barrier_arrive(SLOPES + count % 2, 256);
        }
        if constexpr (P::WIDE) {
            const uint64_t weight_rows = ptx::operand(weight, 0, 1024), slope_rows = ptx::operand(slopes, 0, 1024);
            ptx::wgmma_keep(dk);
            ptx::wgmma_keep(dv);
            ptx::wgmma_fence();
#pragma unroll
            for (int i = 0; i < ROWS / 16; ++i) {
                ptx::wgmma_bf16<SUMS, false, true>(dv, ptx::operand_advance(weight_rows, i * 32), ptx::operand_advance(grad_columns, i * 2048), true);
            }
#pragma unroll
            for (int i = 0; i < ROWS / 16; ++i) {
                ptx::wgmma_bf16<SUMS, false, true>(dk, ptx::operand_advance(slope_rows, i * 32), ptx::operand_advance(query_columns, i * 2048), true);
            }
            ptx::wgmma_commit();
        }
        if (adds) {
            if constexpr (!P::WIDE) {
                // The registers of p are used again, and those of ds where dq needs more.
                ptx::wgmma_wait<ROOMY ? 1 : 0>();
                ptx::wgmma_keep(dv);
                ptx::wgmma_keep(p);
                if (!ROOMY) ptx::wgmma_keep(dk), ptx::wgmma_keep(ds);
            }
            // A lane's four of 16 columns are neighbours in the sums, as they are in its registers.
            const int before = same(facts.step.before);
            owed = P::WIDE ? 2 * same(facts.step.turn) + w : same(facts.step.turn), added = before + 1;
            float dq[SUMS / 2];
            // f(d, sum, out) of 16 columns, of each of the lane's rows. Where those are is read
            // again each time: registers.
            auto each_four = [&](auto f) {
                const int at = same(facts.step.at), head = same(facts.step.g) * group.size;
                for (int r = 0; r < 2; ++r) {
                    const int own = top + 8 * r + lane / 4;
                    if (own >= rows.count) continue;
                    const int p = group.whole(own), h = head + own - p * group.size;
                    const int64_t row = at + p;
                    float* sum = sums + (row * in.q_heads + h) * D + 64 * box0 + 4 * (lane % 4);
                    bf16* out = dqkv + row * cols + h * D + 64 * box0 + 2 * (lane % 4);
#pragma unroll
                    for (int i = 0; i < COLS / 16; ++i) f(dq + 8 * i + 2 * r, reinterpret_cast<float4*>(sum + 16 * i), out + 16 * i);
                }
            };
#pragma unroll
            for (int i = 0; i < SUMS / 2; ++i) dq[i] = 0.0f;
            if (before > 0) {
                if (threadIdx.x % 128 == 0) ptx::turn_wait(turns + owed, before);
                ptx::barrier(OWN + w, 128);
                each_four([](float* d, const float4* sum, bf16*) {
                    const float4 x = *sum;
                    d[0] = x.x, d[1] = x.y, d[4] = x.z, d[5] = x.w;
                });
            }
            const uint64_t slope_columns = ptx::operand(slopes, 0, 1024);
            ptx::wgmma_keep(dq);
            ptx::wgmma_fence();
#pragma unroll
            for (int i = 0; i < P::COUNT / 16; ++i) {
                ptx::wgmma_bf16<SUMS, true, true>(dq, ptx::operand_advance(slope_columns, i * 2048),
                                                  ptx::operand_advance(key_columns, i * 2048), true);
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();
            ptx::wgmma_keep(dq);
            const bool last = same(facts.step.last);
            if (last) {
                each_four([&](const float* d, float4*, bf16* out) {
                    reinterpret_cast<uint32_t*>(out)[0] = ptx::pack_bf16(d[0] * by.scale, d[1] * by.scale);
                    reinterpret_cast<uint32_t*>(out)[4] = ptx::pack_bf16(d[4] * by.scale, d[5] * by.scale);
                });
            } else {
                each_four([](const float* d, float4* sum, bf16*) { *sum = float4{d[0], d[1], d[4], d[5]}; });
            }
        } else {
            ptx::wgmma_wait<0>();
            ptx::wgmma_keep(p);
        }
        ptx::wgmma_keep(dk);
        ptx::wgmma_keep(dv);
        if (!P::WIDE && (ROOMY || !adds)) ptx::wgmma_keep(ds);
        const bool ends = same(facts.step.ends);
        const int keys_at = same(facts.step.keys_at), g = same(facts.step.g);
        ptx::sync_warp();
        arrive(block.empty + phase.stage);
        if (!ends) continue;
        // The warpgroup's own values were read for the last time, behind this by all of its warps:
        // their buffer takes what goes out.
        pass();
        bf16* out = dqkv + keys_at * int64_t(cols) + (in.q_heads + g) * D + 64 * box0;
        auto write = [&](const float* from, bf16* out, float scale) {
            char* buffer = block.values + box0 * P::KEY_BOX;
#pragma unroll
            for (int j = 0; j < COLS / 8; ++j) {
                for (int r = 0; r < 2; ++r) {
                    *reinterpret_cast<uint32_t*>(buffer + j / 8 * P::KEY_BOX + (own_key + 8 * r) * 128 + (j % 8 ^ lane / 4) * 16 + lane % 4 * 4) =
                        ptx::pack_bf16(from[4 * j + 2 * r] * scale, from[4 * j + 2 * r + 1] * scale);
                }
            }
            ptx::sync_warp();
            for (int i = lane; i < 16 * (COLS / 8); i += 32) {
                const int row = key0 + top + i / (COLS / 8), c = i % (COLS / 8);
                if (row >= keys) break;
                reinterpret_cast<uint4*>(out + row * int64_t(cols))[c] =
                    *reinterpret_cast<const uint4*>(buffer + c / 8 * P::KEY_BOX + row * 128 + (c % 8 ^ row % 8) * 16);
            }
            ptx::sync_warp();
        };
        // ds is without the scale.
        write(dk, out, by.scale);
        write(dv, out + in.kv_heads * D, 1.0f);
        // TMA may load others there.
        ptx::fence_async();
        ptx::sync_warp();
        arrive(block.keys_empty);
    }
}

template <class P>
static __device__ __forceinline__ void backward(bf16* dqkv, float* sums, uint32_t* turns, const Input& in, const Scoring& by) {
    const Block<P> block(in.most * (in.q_heads / in.kv_heads));
    // The same in a warp, and known to be.
    const int warp = ptx::shuffle(int(threadIdx.x) / 32, 0);
    if (warp / 4 == 2) {
        ptx::registers_down<24>();
        if (warp == 8) produce(block, in, by);
    } else {
        ptx::registers_up<240>();
        differentiate(dqkv, sums, turns, block, in, by, warp);
    }
}

#define DQKV(D) \
    KERNEL(384, attention_backward_sm90_dqkv_##D##_bf16, 1)(PACKED bf16* dqkv, PACKED float* sums, uint32_t* turns, \
        TENSOR_MAP q, TENSOR_MAP dout, TENSOR_MAP kv, const float* lse, const float* delta, const uint32_t* tiles, \
        const uint32_t* visits, int count, int q_heads, int kv_heads, int most, float scale, float cap, int window) { \
        const Input in = {&q, &dout, &kv, lse, delta, tiles, visits, count, q_heads, kv_heads, most}; \
        backward<Plan<D>>(dqkv, sums, turns, in, Scoring(scale, cap, window)); \
    }
EACH_HEAD_SIZE(DQKV)
