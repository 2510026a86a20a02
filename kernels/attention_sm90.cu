// Causal attention over pages of keys and values on Hopper: that of attention.cu by wgmma and TMA.
//   shapes   as in attention.cu, with pages of 128 positions, of 64 for heads of 256. Tensor maps
//            have a swizzle of 128 bytes: q [rows, q_heads, D] has boxes of `most` positions by a
//            group of heads by 64 columns, k and v [pages kv_heads, PAGE, D] those of a page by 64
//            columns. block_partials [blocks, D / 2 + 4, 128 CONSUMERS] f32
//   tiling   a warpgroup has `most` positions by the heads of a group, up to 64 rows; a block takes
//            a tile and a group after the other. wide: two warpgroups, a tile of 2 `most`
//            positions, one multiplies while the other weighs. narrow: one warpgroup and more
//            blocks a multiprocessor, for tiles of few positions. A thread loads pages to a ring
//            of stages, and the next tile's queries. A block's scores are multiplied beside the
//            values of the block before
//   memory   as in attention.cu; keys and values once for both warpgroups
//   numerics as in attention.cu, with the sums of wgmma: a row has the same bits in wide and
//            narrow, in every batch, chunk and page order. A NaN of v spoils the rows that share a
//            tile
//   needs    as in attention.cu; `most` times the group up to 64
#include "include/attention.cuh"
#include "include/tiles_sm90.cuh"

// Positions of a page, and of one of heads of more than 128: as many as leave scores, their weights
// and the sums in registers.
constexpr int PAGE = 128;
constexpr int PAGE_256 = 64;

// Heads of D columns; CONSUMERS warpgroups of 64 rows; STAGES of a page of keys or of values;
// QUERY_STAGES of a tile's queries.
template <int D_, int CONSUMERS_>
struct Plan {
    static constexpr int D = D_, CONSUMERS = CONSUMERS_;
    static constexpr int STAGES = CONSUMERS == 2 ? (D <= 64 ? 8 : 5) : D <= 64 ? 6 : D <= 128 ? 3 : 5;
    static constexpr int QUERY_STAGES = CONSUMERS == 2 ? (D <= 128 ? 2 : 1) : D <= 64 || D > 128 ? 2 : 1;
    static constexpr int POSITIONS = D <= 128 ? PAGE : PAGE_256;
    static_assert(STAGES >= 3, "pages that are brought before queries");
    // Registers from the warpgroup that loads to those that multiply; not where one of these has a
    // multiprocessor.
    static constexpr bool MOVES = CONSUMERS > 1 || D <= 128;
    // Whether tiles go on from others: those of rows that are decoded.
    static constexpr bool KEEPS = CONSUMERS == 1;
    // Bytes of 64 columns of a page, of all of them, and of a warpgroup's queries.
    static constexpr int BOXES = (D + 63) / 64, BOX = POSITIONS * 128, STAGE = BOXES * BOX, QUERY = BOXES * 8192;
    // Columns that are multiplied: whole boxes, zeros beyond the head. No kernel that is known to
    // run on a GPU multiplies a part of a box's columns.
    static constexpr int COLUMNS = 64 * BOXES;
};

// What a block does at a time: a tile, group `g` of heads. No rows: the end.
struct Task {
    WorkTile tile;
    int g;
};

// What a block's threads share.
template <class P>
struct Block {
    char *stages, *queries;
    // Barriers of the stages of pages, and of queries.
    uint64_t *full, *empty, *query_full, *query_empty;
    // What the queries of a stage are for.
    Task* tasks;

    __device__ __forceinline__ Block() {
        Shared shared;
        stages = shared.take<char>(P::STAGES * P::STAGE, 1024);
        queries = shared.take<char>(P::QUERY_STAGES * P::CONSUMERS * P::QUERY, 1024);
        full = shared.take<uint64_t>(P::STAGES);
        empty = shared.take<uint64_t>(P::STAGES);
        query_full = shared.take<uint64_t>(P::QUERY_STAGES);
        query_empty = shared.take<uint64_t>(P::QUERY_STAGES);
        tasks = shared.take<Task>(P::QUERY_STAGES);
        if (threadIdx.x == 0) {
            for (int s = 0; s < P::STAGES; ++s) ptx::mbarrier_init(full + s, 1), ptx::mbarrier_init(empty + s, 4 * P::CONSUMERS);
            for (int r = 0; r < P::QUERY_STAGES; ++r) ptx::mbarrier_init(query_full + r, 1), ptx::mbarrier_init(query_empty + r, 4 * P::CONSUMERS);
            ptx::fence_barrier_init();
        }
        __syncthreads();
    }
};

// A ring of queries, as Phase goes through it.
template <class P>
struct QueryStages {
    static constexpr int STAGES = P::QUERY_STAGES;
};

// What is attended to.
struct Input {
    const ptx::TensorMap *q, *k, *v;
    const uint32_t *tiles, *pages;
    int count, slots, q_heads, kv_heads, most;
};

// Brings pages and queries, in the order of their use. One thread calls it.
template <class P>
static __device__ __forceinline__ void produce(const Block<P>& block, const Input& in) {
    Phase<P> phase;
    Phase<QueryStages<P>> query_phase;
    const int group = in.q_heads / in.kv_heads;
    // Once the stage's last task is done.
    auto ask = [&](const Task& task) {
        ptx::mbarrier_wait(block.query_empty + query_phase.stage, query_phase.parity ^ 1);
        block.tasks[query_phase.stage] = task;
    };
    each_item(in.count * in.kv_heads, [&](int item) {
        const WorkTile tile(in.tiles, item / in.kv_heads);
        const int g = item % in.kv_heads;
        auto page = [&](const ptx::TensorMap* map, uint32_t id) {
            uint64_t* full = block.full + phase.stage;
            ptx::mbarrier_wait(block.empty + phase.stage, phase.parity ^ 1);
            ptx::mbarrier_expect(full, P::STAGE);
            char* to = block.stages + phase.stage * P::STAGE;
            for (int c = 0; c < P::BOXES; ++c) ptx::tma_load(to + c * P::BOX, map, 64 * c, 0, int(id) * in.kv_heads + g, full);
            phase.next();
        };
        // A page's number is on its way while others are brought.
        const uint32_t* ids = in.pages + tile.pages;
        const auto id = [&](int b) { return b < tile.end ? ids[b] : 0; };
        uint32_t own = id(tile.begin), next = id(tile.begin + 1);
        auto queries = [&] {
            ask(Task{tile, g});
            const int warpgroups = tile.rows > in.most ? 2 : 1;
            uint64_t* full = block.query_full + query_phase.stage;
            ptx::mbarrier_expect(full, warpgroups * P::BOXES * in.most * group * 128);
            for (int w = 0; w < warpgroups; ++w) {
                char* to = block.queries + (query_phase.stage * P::CONSUMERS + w) * P::QUERY;
                for (int c = 0; c < P::BOXES; ++c) ptx::tma_load(to + c * 8192, in.q, 64 * c, g * group, tile.at + w * in.most, full);
            }
            query_phase.next();
        };
        if (P::QUERY_STAGES > 1 || tile.begin == tile.end) queries();
        if (tile.begin < tile.end) page(in.k, own);
        for (int b = tile.begin; b < tile.end; ++b) {
            const uint32_t after = id(b + 2);
            if (b + 1 < tile.end) page(in.k, next);
            page(in.v, own);
            own = next, next = after;
            // The only stage of queries is free once the tile before is done: the first pages do
            // not wait for that.
            if (P::QUERY_STAGES == 1 && b == tile.begin) queries();
        }
    });
    ask(Task{WorkTile{}, 0});
    ptx::mbarrier_arrive(block.query_full + query_phase.stage);
}

// The barriers of a block: whose turn it is to multiply, and those of a warpgroup's own.
constexpr int TURNS = 1, OWN = 3;

// Attends to the rows of warp number `warp` in each tile.
template <class P>
static __device__ __forceinline__ void consume(bf16* out, float* lse, float* block_partials, float* partials, const Block<P>& block, const Input& in,
                                              const Scoring& by, int warp) {
    constexpr int D = P::D, N = P::POSITIONS, THREADS = 128 * P::CONSUMERS;
    const int group = in.q_heads / in.kv_heads, lane = ptx::lane(), w = P::CONSUMERS > 1 ? warp / 4 : 0, top = warp % 4 * 16;
    const BlockPartials<D> running = {block_partials + int64_t(blockIdx.x) * THREADS * BlockPartials<D>::EACH, THREADS, int(threadIdx.x)};
    const Partials<D> carried = {partials, in.slots, in.q_heads};
    Phase<P> phase;
    Phase<QueryStages<P>> query_phase;
    // Takes the next stage once it is full.
    auto take = [&] {
        const int stage = phase.stage;
        ptx::mbarrier_wait(block.full + stage, phase.parity);
        phase.next();
        return stage;
    };
    // The first turn is warpgroup 0's.
    if (P::CONSUMERS > 1 && w == 1) ptx::barrier_arrive(TURNS, 256);
    for (;; query_phase.next()) {
        ptx::mbarrier_wait(block.query_full + query_phase.stage, query_phase.parity);
        const Task* task = block.tasks + query_phase.stage;
        const WorkTile& tile = task->tile;
        // The same in a warp, and known to be.
        const int all = ptx::shuffle(tile.rows, 0), begin = ptx::shuffle(tile.begin, 0), end = ptx::shuffle(tile.end, 0);
        if (all == 0) break;
        const int first = ptx::shuffle(tile.first, 0) + w * in.most, left = all - w * in.most;
        const int rows = (left < in.most ? left : in.most) * group;
        if (rows <= 0) {
            // Slots go by; no lane before the others have seen them.
            for (int i = 2 * begin; i < 2 * end; ++i) {
                const int stage = take();
                ptx::sync_warp();
                arrive(block.empty + stage);
            }
            arrive(block.query_empty + query_phase.stage);
            continue;
        }
        // One warpgroup multiplies at a time, and the other computes weights.
        const bool turns = P::CONSUMERS > 1 && all > in.most;
        auto begin_turn = [&] {
            if (turns) ptx::barrier(TURNS + w, 256);
        };
        auto end_turn = [&] {
            if (turns) ptx::barrier_arrive(TURNS + 1 - w, 256);
        };
        float x[N / 2], o[P::COLUMNS / 2] = {}, keep[2];
        uint32_t weights[N / 16][4] = {};
        Softmax soft;
        const WarpRows own(top, rows, first, group);
        char* query = block.queries + (query_phase.stage * P::CONSUMERS + w) * P::QUERY;
        const uint64_t q = ptx::operand(query, 0, 1024);
        auto multiply_keys = [&](int stage) {
            const uint64_t k = ptx::operand(block.stages + stage * P::STAGE, 0, 1024);
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                const int c = i / 4, step = i % 4 * 32;
                const uint64_t a = ptx::operand_advance(q, c * 8192 + step), b = ptx::operand_advance(k, c * P::BOX + step);
                ptx::wgmma_bf16<N, false, false>(x, a, b, i > 0);
            }
            ptx::wgmma_commit();
        };
        auto multiply_values = [&](int stage) {
            const uint64_t v = ptx::operand(block.stages + stage * P::STAGE, P::BOX, 1024);
#pragma unroll
            for (int i = 0; i < N / 16; ++i) ptx::wgmma_bf16<P::COLUMNS, true>(o, weights[i], ptx::operand_advance(v, i * 2048), true);
            ptx::wgmma_commit();
        };
        // A warp whose rows are all beyond the tile has nothing to weigh.
        const bool busy = top < rows;
        bool merged = false;
        // Partial i of the lane's row, at `row` and `head` of the tile.
        auto partial = [&](int i, int row, int head) { return carried.at(i, tile.slot + row, task->g * group + head); };
        // Ends a part of the softmax.
        auto restart = [&] {
            if (merged) running.fold(soft, o, by);
            running.put(soft, o);
            merged = true;
            soft = Softmax();
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
        };
        const int reads = P::KEEPS ? ptx::shuffle(tile.reads, 0) : 0;
        for (int i = 0; i < reads; ++i) {
            if (i > 0) restart();
            own.each([&](int r, int row, int head) { carried.get(partial(tile.first_read + i, row, head), soft, o, r); });
        }

        // Tiles that only merge see no keys.
        const bool attends = !P::KEEPS || begin < end;
        int keys, values;
        if (attends) {
            keys = take();
            begin_turn();
            ptx::wgmma_fence();
            multiply_keys(keys);
            end_turn();
            ptx::wgmma_wait<0>();
            ptx::wgmma_keep(x);
            arrive(block.empty + keys);
            if (reads > 0 && begin * N % SPLIT == 0) restart();
            if (busy) {
                own.weigh<N>(soft, x, keep, begin, by);
                if (reads > 0) rescale<D>(o, keep);
                pack_weights(weights, x);
            }
        }
        for (int b = begin + 1; b < end; ++b) {
            keys = take();
            begin_turn();
            ptx::wgmma_keep(x);
            ptx::wgmma_keep(o);
            ptx::wgmma_keep(weights);
            ptx::wgmma_fence();
            multiply_keys(keys);
            values = take();
            ptx::wgmma_fence();
            multiply_values(values);
            end_turn();
            ptx::wgmma_wait<1>();
            ptx::wgmma_keep(x);
            arrive(block.empty + keys);
            if (b * N % SPLIT == 0) {
                // Once in a while: the values so far are waited for, too.
                ptx::wgmma_wait<0>();
                ptx::wgmma_keep(o);
                restart();
            }
            if (busy) own.weigh<N>(soft, x, keep, b, by);
            ptx::wgmma_wait<0>();
            ptx::wgmma_keep(o);
            ptx::wgmma_keep(weights);
            arrive(block.empty + values);
            if (!busy) continue;
            rescale<D>(o, keep);
            pack_weights(weights, x);
        }
        if (attends) {
            values = take();
            ptx::wgmma_keep(o);
            ptx::wgmma_keep(weights);
            ptx::wgmma_fence();
            multiply_values(values);
            ptx::wgmma_wait<0>();
            ptx::wgmma_keep(o);
            ptx::wgmma_keep(weights);
            arrive(block.empty + values);
        }
        if (busy && merged) running.fold(soft, o, by);
        // All warps' products have read the queries, whose memory reads what goes out.
        ptx::barrier(OWN + w, 128);
        if (P::KEEPS && tile.writes >= 0) {
            own.each([&](int r, int row, int head) { carried.put(partial(tile.writes, row, head), soft, o, r); });
        } else if (busy) {
            float inverse[2], sum[2];
            soft.finish(inverse, sum, by);
            // Read now: registers.
            const int64_t begin = (tile.at + w * in.most) * int64_t(in.q_heads) + task->g * group;
            own.each([&](int r, int row, int head) {
                if (lane % 4 == 0) lse[begin + row * int64_t(in.q_heads) + head] = sum[r];
            });
            own.write<D>(out + begin * D, o, inverse, in.q_heads, [&](int row, int c) {
                return query + c / 8 * 8192 + row * 128 + (c % 8 ^ row % 8) * 16;
            });
        }
        // TMA may load other queries there.
        ptx::fence_async();
        ptx::sync_warp();
        arrive(block.query_empty + query_phase.stage);
    }
    // The last turn was given to warpgroup 0.
    if (P::CONSUMERS > 1 && w == 0) ptx::barrier(TURNS, 256);
}

template <class P>
static __device__ __forceinline__ void forward(bf16* out, float* lse, float* block_partials, float* partials, const Input& in, const Scoring& by) {
    const Block<P> block;
    // The same in a warp, and known to be.
    const int warp = ptx::shuffle(int(threadIdx.x) / 32, 0);
    if (warp / 4 == P::CONSUMERS) {
        if constexpr (P::MOVES) ptx::registers_down<24>();
        if (threadIdx.x % 128 < 32 && ptx::elect()) produce(block, in);
    } else {
        if constexpr (P::MOVES) ptx::registers_up<P::CONSUMERS == 1 ? 232 : 240>();
        consume(out, lse, block_partials, partials, block, in, by, warp);
    }
}

// For prefill 128 rows; for decoding 64, and two blocks beside each other where they fit.
#define FORWARD(D) \
    KERNEL(384, attention_sm90_forward_128x##D##_bf16, 1)(PACKED bf16* out, float* lse, TENSOR_MAP q, TENSOR_MAP k, \
        TENSOR_MAP v, const uint32_t* tiles, const uint32_t* pages, OPTIONAL float* block_partials, OPTIONAL float* partials, int count, \
        int slots, int q_heads, int kv_heads, int most, float scale, float cap, int window) { \
        const Input in = {&q, &k, &v, tiles, pages, count, slots, q_heads, kv_heads, most}; \
        forward<Plan<D, 2>>(out, lse, block_partials, partials, in, Scoring(scale, cap, window)); \
    } \
    KERNEL(256, attention_sm90_forward_64x##D##_bf16, 1, D <= 128 ? 2 : 0)(PACKED bf16* out, float* lse, TENSOR_MAP q, \
        TENSOR_MAP k, TENSOR_MAP v, const uint32_t* tiles, const uint32_t* pages, OPTIONAL float* block_partials, \
        OPTIONAL float* partials, int count, int slots, int q_heads, int kv_heads, int most, float scale, float cap, \
        int window) { \
        const Input in = {&q, &k, &v, tiles, pages, count, slots, q_heads, kv_heads, most}; \
        forward<Plan<D, 1>>(out, lse, block_partials, partials, in, Scoring(scale, cap, window)); \
    }
EACH_HEAD_SIZE(FORWARD)
