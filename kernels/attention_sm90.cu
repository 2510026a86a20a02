// Causal attention over pages of keys and values on Hopper: that of attention.cu by wgmma and TMA.
//   shapes   as in attention.cu, with pages of 128 positions, of 64 for heads of 256. Tensor maps
//            have a swizzle of 128 bytes: q [rows, q_heads, D] has boxes of `most` positions by a
//            group of heads by 64 columns, k and v [pages kv_heads, PAGE, D] those of a page by 64
//            columns. stash [blocks, D / 2 + 4, 128 CONSUMERS] f32
//   tiling   a warpgroup has `most` positions by the heads of a group, up to 64 rows; a block takes
//            a part and a group after the other. wide: two warpgroups, a part of 2 `most`
//            positions, one multiplies while the other weighs. narrow: one warpgroup and more
//            blocks a multiprocessor, for parts of few positions. A thread brings pages to a ring
//            of slots, and the next part's queries. A block's scores are multiplied beside the
//            values of the block before
//   memory   as in attention.cu; keys and values once for both warpgroups
//   numerics as in attention.cu, with the sums of wgmma: a row has the same bits in wide and
//            narrow, in every batch, chunk and page order. A NaN of v spoils the rows that share a
//            part
//   needs    as in attention.cu; `most` times the group up to 64
#include "include/attention.cuh"
#include "include/tiles_sm90.cuh"

// Positions of a page, and of one of heads of more than 128: as many as leave scores, their weights
// and the sums in registers.
constexpr int PAGE = 128;
constexpr int WIDE_HEAD_PAGE = 64;

// Heads of D columns; CONSUMERS warpgroups of 64 rows; STAGES slots of a page of keys or of values;
// ROOMS for queries of a part.
template <int D_, int CONSUMERS_>
struct Plan {
    static constexpr int D = D_, CONSUMERS = CONSUMERS_;
    static constexpr int STAGES = CONSUMERS == 2 ? (D <= 64 ? 8 : 5) : D <= 64 ? 6 : D <= 128 ? 3 : 5;
    static constexpr int ROOMS = CONSUMERS == 2 ? (D <= 128 ? 2 : 1) : D <= 64 || D > 128 ? 2 : 1;
    static constexpr int POSITIONS = D <= 128 ? PAGE : WIDE_HEAD_PAGE;
    static_assert(STAGES >= 3, "pages that are brought before queries");
    // Registers from the warpgroup that brings to those that multiply; not where one of these has a
    // multiprocessor.
    static constexpr bool MOVES = CONSUMERS > 1 || D <= 128;
    // Whether parts go on from others: those of rows that are decoded.
    static constexpr bool KEEPS = CONSUMERS == 1;
    // Bytes of 64 columns of a page, of all of them, and of a warpgroup's queries.
    static constexpr int BOXES = (D + 63) / 64, BOX = POSITIONS * 128, SLOT = BOXES * BOX, QUERY = BOXES * 8192;
};

// What a block does at a time: a part, group `g` of heads. No rows: the end.
struct Task {
    Part part;
    int g;
};

// What a block's threads share.
template <class P>
struct Block {
    char *slots, *queries;
    // Of slots and of rooms.
    uint64_t *full, *empty, *asked, *answered;
    // What is asked for in a room.
    Task* tasks;

    __device__ __forceinline__ Block() {
        Shared shared;
        slots = shared.take<char>(P::STAGES * P::SLOT, 1024);
        queries = shared.take<char>(P::ROOMS * P::CONSUMERS * P::QUERY, 1024);
        full = shared.take<uint64_t>(P::STAGES);
        empty = shared.take<uint64_t>(P::STAGES);
        asked = shared.take<uint64_t>(P::ROOMS);
        answered = shared.take<uint64_t>(P::ROOMS);
        tasks = shared.take<Task>(P::ROOMS);
        if (threadIdx.x == 0) {
            for (int s = 0; s < P::STAGES; ++s) ptx::mbarrier_init(full + s, 1), ptx::mbarrier_init(empty + s, 4 * P::CONSUMERS);
            for (int r = 0; r < P::ROOMS; ++r) ptx::mbarrier_init(asked + r, 1), ptx::mbarrier_init(answered + r, 4 * P::CONSUMERS);
            ptx::fence_barrier_init();
        }
        __syncthreads();
    }
};

// Rooms in turn, as Turn has slots.
template <class P>
struct Rooms {
    static constexpr int STAGES = P::ROOMS;
};

// What is attended to.
struct Input {
    const ptx::TensorMap *q, *k, *v;
    const uint32_t *tiles, *pages;
    int count, slots, q_heads, kv_heads, most;
};

// Brings pages and queries, in the order of their use. One thread calls it.
template <class P>
static __device__ __forceinline__ void bring(const Block<P>& block, const Input& in) {
    Turn<P> slot;
    Turn<Rooms<P>> room;
    const int group = in.q_heads / in.kv_heads;
    // Once the room's last task is done.
    auto ask = [&](const Task& task) {
        ptx::mbarrier_wait(block.answered + room.slot, room.parity ^ 1);
        block.tasks[room.slot] = task;
    };
    // Parts come longest first. Rounds go forth and back: who has the longest of one has the
    // shortest of the next.
    const int blocks = gridDim.x, all = in.count * in.kv_heads;
    for (int round = 0; round * blocks < all; ++round) {
        const int item = round * blocks + (round % 2 == 0 ? int(blockIdx.x) : blocks - 1 - int(blockIdx.x));
        if (item >= all) break;
        const Part part(in.tiles, item / in.kv_heads);
        const int g = item % in.kv_heads;
        auto page = [&](const ptx::TensorMap* map, uint32_t id) {
            uint64_t* full = block.full + slot.slot;
            ptx::mbarrier_wait(block.empty + slot.slot, slot.parity ^ 1);
            ptx::mbarrier_expect(full, P::SLOT);
            char* to = block.slots + slot.slot * P::SLOT;
            for (int c = 0; c < P::BOXES; ++c) ptx::tma_load(to + c * P::BOX, map, 64 * c, 0, int(id) * in.kv_heads + g, full);
            slot.next();
        };
        // A page's number is on its way while others are brought.
        const uint32_t* ids = in.pages + part.pages;
        const auto id = [&](int b) { return b < part.end ? ids[b] : 0; };
        uint32_t own = id(part.begin), next = id(part.begin + 1);
        auto queries = [&] {
            ask(Task{part, g});
            const int warpgroups = part.rows > in.most ? 2 : 1;
            uint64_t* asked = block.asked + room.slot;
            ptx::mbarrier_expect(asked, warpgroups * P::BOXES * in.most * group * 128);
            for (int w = 0; w < warpgroups; ++w) {
                char* to = block.queries + (room.slot * P::CONSUMERS + w) * P::QUERY;
                for (int c = 0; c < P::BOXES; ++c) ptx::tma_load(to + c * 8192, in.q, 64 * c, g * group, part.at + w * in.most, asked);
            }
            room.next();
        };
        if (P::ROOMS > 1 || part.begin == part.end) queries();
        if (part.begin < part.end) page(in.k, own);
        for (int b = part.begin; b < part.end; ++b) {
            const uint32_t after = id(b + 2);
            if (b + 1 < part.end) page(in.k, next);
            page(in.v, own);
            own = next, next = after;
            // The only room is free once the part before is done: the first pages do not wait for
            // that.
            if (P::ROOMS == 1 && b == part.begin) queries();
        }
    }
    ask(Task{Part{}, 0});
    ptx::mbarrier_arrive(block.asked + room.slot);
}

// Rows of a part: row i is position i / group from row `at` of the batch on, and head `head` + i %
// group. A warp has 16 of the `rows` rows, from `top` on.
struct Rows {
    int at, head, group, top, rows, q_heads;

    // Writes what the warp has computed of its rows, which goes through their place in `room`.
    template <int D>
    __device__ __forceinline__ void put(bf16* out, float* lse, char* room, const float (&o)[D / 2], const float (&inverse)[2],
                                        const float (&sum)[2]) const {
        constexpr int PACKETS = D / 8;
        const int lane = ptx::lane();
        for (int r = 0; r < 2; ++r) {
            const int row = top + 8 * r + lane / 4;
            if (lane % 4 == 0 && row < rows) lse[(at + row / group) * int64_t(q_heads) + head + row % group] = sum[r];
            // 0 is added so that a zero has one sign whatever was masked.
#pragma unroll
            for (int j = 0; j < PACKETS; ++j) {
                const float* two = o + 4 * j + 2 * r;
                *reinterpret_cast<uint32_t*>(room + j / 8 * 8192 + row * 128 + (j % 8 ^ lane / 4) * 16 + lane % 4 * 4) =
                    ptx::pack_bf16(fmaf(two[0], inverse[r], 0.0f), fmaf(two[1], inverse[r], 0.0f));
            }
        }
        ptx::sync_warp();
        for (int i = lane; i < 16 * PACKETS; i += 32) {
            const int row = top + i / PACKETS, c = i % PACKETS;
            if (row >= rows) break;
            bf16* to = out + ((at + row / group) * int64_t(q_heads) + head + row % group) * D;
            reinterpret_cast<uint4*>(to)[c] = *reinterpret_cast<const uint4*>(room + c / 8 * 8192 + row * 128 + (c % 8 ^ row % 8) * 16);
        }
    }
};

// The barriers of a block: whose turn it is to multiply, and those of a warpgroup's own.
constexpr int TURNS = 1, OWN = 3;

// Attends to the rows of warp number `warp` in each part.
template <class P>
static __device__ __forceinline__ void attend(bf16* out, float* lse, float* stash, float* states, const Block<P>& block, const Input& in,
                                              const Scoring& by, int warp) {
    constexpr int D = P::D, N = P::POSITIONS, THREADS = 128 * P::CONSUMERS;
    const int group = in.q_heads / in.kv_heads, lane = ptx::lane(), w = P::CONSUMERS > 1 ? warp / 4 : 0, top = warp % 4 * 16;
    const Stash<D> kept = {stash + int64_t(blockIdx.x) * THREADS * Stash<D>::EACH, THREADS, int(threadIdx.x)};
    const States<D> carried = {states, in.slots, in.q_heads};
    Turn<P> slot;
    Turn<Rooms<P>> room;
    auto arrive = [&](uint64_t* bar) {
        if (lane == 0) ptx::mbarrier_arrive(bar);
    };
    // Takes the next slot once it is full.
    auto take = [&] {
        const int taken = slot.slot;
        ptx::mbarrier_wait(block.full + taken, slot.parity);
        slot.next();
        return taken;
    };
    // The first turn is warpgroup 0's.
    if (P::CONSUMERS > 1 && w == 1) ptx::barrier_arrive(TURNS, 256);
    for (;; room.next()) {
        ptx::mbarrier_wait(block.asked + room.slot, room.parity);
        const Task* task = block.tasks + room.slot;
        const Part& part = task->part;
        // The same in a warp, and known to be.
        const int all = ptx::shuffle(part.rows, 0), begin = ptx::shuffle(part.begin, 0), end = ptx::shuffle(part.end, 0);
        if (all == 0) break;
        const int first = ptx::shuffle(part.first, 0) + w * in.most, left = all - w * in.most;
        const int rows = (left < in.most ? left : in.most) * group;
        if (rows <= 0) {
            // Slots go by; no lane before the others have seen them.
            for (int i = 2 * begin; i < 2 * end; ++i) {
                const int taken = take();
                ptx::sync_warp();
                arrive(block.empty + taken);
            }
            arrive(block.answered + room.slot);
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
        float x[N / 2], o[D / 2] = {}, keep[2];
        uint32_t weights[N / 16][4] = {};
        Softmax soft;
        // Of the lane's rows.
        int position[2];
        for (int r = 0; r < 2; ++r) position[r] = first + (top + 8 * r + lane / 4) / group;
        const int least = first + top / group, last = first + (top + 15) / group;
        char* query = block.queries + (room.slot * P::CONSUMERS + w) * P::QUERY;
        const uint64_t q = ptx::operand(query, 0, 1024);
        auto multiply_keys = [&](int taken) {
            const uint64_t k = ptx::operand(block.slots + taken * P::SLOT, 0, 1024);
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                const int c = i / 4, step = i % 4 * 32;
                const uint64_t a = ptx::operand_advance(q, c * 8192 + step), b = ptx::operand_advance(k, c * P::BOX + step);
                ptx::wgmma_bf16<N, false, false>(x, a, b, i > 0);
            }
            ptx::wgmma_commit();
        };
        auto multiply_values = [&](int taken) {
            const uint64_t v = ptx::operand(block.slots + taken * P::SLOT, P::BOX, 1024);
#pragma unroll
            for (int i = 0; i < N / 16; ++i) ptx::wgmma_bf16<D, true>(o, weights[i], ptx::operand_advance(v, i * 2048), true);
            ptx::wgmma_commit();
        };
        auto weigh = [&](int b) {
            int from[2], to[2];
            for (int r = 0; r < 2; ++r) from[r] = by.from(position[r]) - b * N, to[r] = position[r] + 1 - b * N;
            if (by.from(last) <= b * N && (b + 1) * N <= least + 1) {
                soft.weigh<N, false>(x, keep, by, from, to);
            } else {
                soft.weigh<N, true>(x, keep, by, from, to);
            }
        };
        auto pack = [&] {
#pragma unroll
            for (int i = 0; i < N / 16; ++i) pack_weights(weights[i], x, i);
        };
        // A warp whose rows are all beyond the part has nothing to weigh.
        const bool busy = top < rows;
        bool merged = false;
        // f(r, row, head) of each of the lane's rows that is there: its place in the part, its
        // head.
        auto each_row = [&](auto f) {
            for (int r = 0; r < 2; ++r) {
                const int row = top + 8 * r + lane / 4;
                if (row < rows) f(r, row / group, task->g * group + row % group);
            }
        };
        // Ends a part of the softmax.
        auto restart = [&] {
            if (merged) {
                kept.add(soft, o, by);
            } else {
                kept.put(soft, o);
            }
            merged = true;
            soft = Softmax();
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
        };
        const int takes = P::KEEPS ? ptx::shuffle(part.takes, 0) : 0;
        for (int i = 0; i < takes; ++i) {
            if (i > 0) restart();
            each_row([&](int r, int row, int head) { carried.get(carried.at(part.taken + i, part.slot + row, head), soft, o, r); });
        }

        // Parts that only merge see no keys.
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
            if (takes > 0 && begin * N % SPLIT == 0) restart();
            if (busy) {
                weigh(begin);
                if (takes > 0) rescale<D>(o, keep);
                pack();
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
            if (busy) weigh(b);
            ptx::wgmma_wait<0>();
            ptx::wgmma_keep(o);
            ptx::wgmma_keep(weights);
            arrive(block.empty + values);
            if (!busy) continue;
            rescale<D>(o, keep);
            pack();
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
        if (busy && merged) kept.fold(soft, o, by);
        // All warps' products have read the queries, whose room takes what goes out.
        ptx::barrier(OWN + w, 128);
        if (P::KEEPS && part.gives >= 0) {
            each_row([&](int r, int row, int head) { carried.put(carried.at(part.gives, part.slot + row, head), soft, o, r); });
        } else if (busy) {
            float inverse[2], sum[2];
            soft.finish(inverse, sum, by);
            // Read now: registers.
            const Rows own = {part.at + w * in.most, task->g * group, group, top, rows, in.q_heads};
            own.put<D>(out, lse, query, o, inverse, sum);
        }
        // TMA may bring other queries there.
        ptx::fence_async();
        ptx::sync_warp();
        arrive(block.answered + room.slot);
    }
    // The last turn was given to warpgroup 0.
    if (P::CONSUMERS > 1 && w == 0) ptx::barrier(TURNS, 256);
}

template <class P>
static __device__ __forceinline__ void forward(bf16* out, float* lse, float* stash, float* states, const Input& in, const Scoring& by) {
    const Block<P> block;
    // The same in a warp, and known to be.
    const int warp = ptx::shuffle(int(threadIdx.x) / 32, 0);
    if (warp / 4 == P::CONSUMERS) {
        if constexpr (P::MOVES) ptx::registers_down<24>();
        if (threadIdx.x % 128 < 32 && ptx::elect()) bring(block, in);
    } else {
        if constexpr (P::MOVES) ptx::registers_up<P::CONSUMERS == 1 ? 232 : 240>();
        attend(out, lse, stash, states, block, in, by, warp);
    }
}

// For prefill 128 rows; for decoding 64, and two blocks beside each other where they fit.
#define FORWARD(D) \
    KERNEL(384, attention_sm90_forward_128x##D##_bf16, 1)(PACKED bf16* out, float* lse, TENSOR_MAP q, TENSOR_MAP k, \
        TENSOR_MAP v, const uint32_t* tiles, const uint32_t* pages, OPTIONAL float* stash, OPTIONAL float* states, int count, \
        int slots, int q_heads, int kv_heads, int most, float scale, float cap, int window) { \
        const Input in = {&q, &k, &v, tiles, pages, count, slots, q_heads, kv_heads, most}; \
        forward<Plan<D, 2>>(out, lse, stash, states, in, Scoring(scale, cap, window)); \
    } \
    KERNEL(256, attention_sm90_forward_64x##D##_bf16, 1, D <= 128 ? 2 : 0)(PACKED bf16* out, float* lse, TENSOR_MAP q, \
        TENSOR_MAP k, TENSOR_MAP v, const uint32_t* tiles, const uint32_t* pages, OPTIONAL float* stash, \
        OPTIONAL float* states, int count, int slots, int q_heads, int kv_heads, int most, float scale, float cap, \
        int window) { \
        const Input in = {&q, &k, &v, tiles, pages, count, slots, q_heads, kv_heads, most}; \
        forward<Plan<D, 1>>(out, lse, stash, states, in, Scoring(scale, cap, window)); \
    }
EACH_HEAD_SIZE(FORWARD)
