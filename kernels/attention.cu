// Causal attention over pages of keys and values: out[r, h] = sum_j w[j] v[j, g], w =
// softmax_j(s[r, j]), s[r, j] = scale q[r, h] . k[j, g], or cap tanh of it / cap; g = h / group,
// and row r sees the positions up to its own, or the last `window` of them. lse[r, h] = log sum_j
// e^s[r, j]. Training, prefill and decoding are this one kernel.
//   shapes   qkv [rows, (q_heads + 2 kv_heads) D] bf16; out [rows, q_heads D] bf16; lse [rows,
//            q_heads] f32; k and v [pages, kv_heads, PAGE, D] bf16; tiles [tiles, 8]
//            (include/attention.cuh); block_partials [blocks, D / 2 + 4, THREADS] f32, where a tile
//            sees more than SPLIT positions; partials [partials, slots, q_heads, D + 8] f32, where
//            tiles go on from others. append: runs [runs, 5] are batch row, rows, first position,
//            first page of the list, positions after them that get zeros; table as in rope.cu
//   tiling   a block takes a tile and a group of heads after the other: up to 64 rows, position by
//            position and for each the heads of the group, 16 a warp; a page of keys comes while
//            values are multiplied, and the other way round
//   memory   q and out once; keys and values once for 64 rows
//   numerics rows see pages from position 0 on, in ascending order, one at a time; f32 sums,
//            weights rounded to bf16 for the product with v but not for their sum; softmax starts
//            anew each SPLIT positions. So a row has the same bits in every batch, chunk and page
//            order. A NaN of v spoils the rows that share a tile
//   needs    D a multiple of 16, groups up to 64, buffers at 16 bytes, scale > 0; values of a page
//            that were not written are 0: append sees to it
#include "include/attention.cuh"
#include "include/elements.cuh"
#include "include/rope.cuh"

constexpr int THREADS = 128;
constexpr int PAGE = 64;

template <int D>
static __device__ void forward(bf16* out, float* lse, const bf16* qkv, const bf16* k, const bf16* v, const uint32_t* tiles,
                               const uint32_t* pages, float* block_partials, float* partials, int count, int slots, int q_heads, int kv_heads,
                               const Scoring& by) {
    using L = Lines<D>;
    Shared shared;
    bf16 *query = shared.take<bf16>(L::SIZE, 128), *key = shared.take<bf16>(L::SIZE, 128), *value = shared.take<bf16>(L::SIZE, 128);
    const int group = q_heads / kv_heads, lane = ptx::lane(), warp = threadIdx.x / 32, top = warp * 16;
    const int64_t cols = int64_t(q_heads + 2 * kv_heads) * D;
    const BlockPartials<D> running = {block_partials + int64_t(blockIdx.x) * THREADS * BlockPartials<D>::EACH, THREADS, int(threadIdx.x)};
    const Partials<D> carried = {partials, slots, q_heads};
    for (int item = blockIdx.x; item < count * kv_heads; item += gridDim.x) {
        const WorkTile tile(tiles, item / kv_heads);
        const int g = item % kv_heads, rows = tile.rows * group;
        // The queries, and pages of keys and of values in turn, are each a group of copies.
        auto load = [&](bf16* to, const bf16* from, int b) {
            if (b < tile.end) {
                const bf16* page = from + (int64_t(pages[tile.pages + b]) * kv_heads + g) * (PAGE * D);
                L::template copy<THREADS>(to, page, [](int row) { return row * D; });
            }
            ptx::copy_commit();
        };
        L::template copy<THREADS>(query, qkv + tile.at * cols + g * group * D, [&](int row) {
            return row < rows ? row / group * int(cols) + row % group * D : -1;
        });
        load(key, k, tile.begin);
        load(value, v, tile.begin);
        Softmax soft;
        float o[D / 2] = {};
        bool merged = false;
        const WarpRows own(top, rows, tile.first, group);
        // Partial i of the lane's row, at `row` and `head` of the tile.
        auto partial = [&](int i, int row, int head) { return carried.at(i, tile.slot + row, g * group + head); };
        for (int i = 0; i < tile.reads; ++i) {
            if (i > 0) running.put(soft, o), soft = Softmax();
            own.each([&](int r, int row, int head) { carried.get(partial(tile.first_read + i, row, head), soft, o, r); });
            if (i > 0) running.fold(soft, o, by);
        }
        for (int b = tile.begin; b < tile.end; ++b) {
            float x[PAGE / 2] = {}, keep[2];
            uint32_t weights[PAGE / 16][4];
            // Keys are here.
            ptx::copy_wait<1>();
            __syncthreads();
            if (top < rows) {
                // Not all of them at once: registers.
#pragma unroll 2
                for (int i = 0; i < D / 16; ++i) {
                    uint32_t q[4];
                    ptx::load_matrix(q, query + L::at(top + lane % 16, 2 * i + lane / 16));
#pragma unroll
                    for (int j = 0; j < PAGE / 16; ++j) {
                        uint32_t two[4];
                        ptx::load_matrix(two, key + L::at(16 * j + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                        add_product(x, j, q, two);
                    }
                }
            }
            __syncthreads();
            load(key, k, b + 1);
            if (top < rows) {
                if (b * PAGE % SPLIT == 0 && (b > tile.begin || tile.reads > 0)) {
                    if (merged) running.fold(soft, o, by);
                    running.put(soft, o);
                    merged = true;
                    soft = Softmax();
#pragma unroll
                    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
                }
                own.weigh<PAGE>(soft, x, keep, b, by);
                rescale<D>(o, keep);
                pack_weights(weights, x);
            }
            // Values are here.
            ptx::copy_wait<1>();
            __syncthreads();
            if (top < rows) {
#pragma unroll
                for (int i = 0; i < PAGE / 16; ++i) {
#pragma unroll
                    for (int j = 0; j < D / 16; ++j) {
                        uint32_t two[4];
                        ptx::load_matrix_transposed(two, value + L::at(16 * i + lane % 16, 2 * j + lane / 16));
                        add_product(o, j, weights[i], two);
                    }
                }
            }
            __syncthreads();
            load(value, v, b + 1);
        }
        // Where there were no keys, the queries of all have come only now.
        ptx::copy_wait<0>();
        __syncthreads();
        if (top < rows) {
            if (merged) running.fold(soft, o, by);
        }
        if (top < rows && tile.writes >= 0) {
            own.each([&](int r, int row, int head) { carried.put(partial(tile.writes, row, head), soft, o, r); });
        } else if (top < rows) {
            float inverse[2], all[2];
            soft.finish(inverse, all, by);
            const int64_t begin = int64_t(tile.at) * q_heads + g * group;
            own.each([&](int r, int row, int head) {
                if (lane % 4 == 0) lse[begin + int64_t(row) * q_heads + head] = all[r];
            });
            // The warp's queries were read.
            own.write<D>(out + begin * D, o, inverse, q_heads, [&](int row, int c) { return query + L::at(row, c); });
        }
        // Before the next tile's queries come.
        __syncthreads();
    }
}

// A block a run of rows and a group of heads: queries and keys are rotated in place, keys and
// values go to their pages, and zeros for values after them. Without a table none is rotated.
KERNEL(THREADS, attention_append_bf16, 1, 4)(PACKED bf16* k, PACKED bf16* v, PACKED bf16* qkv, PACKED OPTIONAL const float* table,
                                             const uint32_t* runs, const uint32_t* pages, int q_heads, int kv_heads, int d, int page,
                                             int entries) {
    const uint32_t* run = runs + 5 * int64_t(blockIdx.x / kv_heads);
    const int at = run[0], rows = run[1], first = run[2], zeros = run[4], g = blockIdx.x % kv_heads;
    const int group = q_heads / kv_heads, packets = d / 8, half = packets / 2;
    const uint32_t* ids = pages + run[3];
    const int64_t cols = int64_t(q_heads + 2 * kv_heads) * d;
    // First packet of a row in its page.
    auto slot = [&](int row) {
        const int position = first + row;
        return ((int64_t(ids[position / page]) * kv_heads + g) * page + position % page) * packets;
    };
    // Packets p of both halves of a row's head, turned in place; NaN at positions not in the table.
    auto turn = [&](bf16* head, int row, int p, Packet<bf16>& a, Packet<bf16>& b) {
        a = load(head, p), b = load(head, half + p);
        if (table == nullptr) return;
        const int position = first + row;
        if (position < entries) {
            const float* angles = table + int64_t(position) * d;
            const Elements<8> cos = take<8>(angles, p), sin = take<8>(angles, half + p);
            for (int j = 0; j < 8; ++j) rotate_pair(a.x[j], b.x[j], cos.x[j], sin.x[j]);
        } else {
            for (int j = 0; j < 8; ++j) a.x[j] = b.x[j] = NAN;
        }
        store(head, p, a);
        store(head, half + p, b);
    };
    Packet<bf16> a, b;
    for (int i = threadIdx.x; table != nullptr && i < rows * group * half; i += THREADS) {
        const int row = i / (group * half);
        turn(qkv + (at + row) * cols + (g * group + i / half % group) * d, row, i % half, a, b);
    }
    for (int i = threadIdx.x; i < rows * half; i += THREADS) {
        const int row = i / half, p = i % half;
        turn(qkv + (at + row) * cols + (q_heads + g) * d, row, p, a, b);
        store(k, slot(row) + p, a);
        store(k, slot(row) + half + p, b);
    }
    for (int i = threadIdx.x; i < (rows + zeros) * packets; i += THREADS) {
        const int row = i / packets, p = i % packets;
        Packet<bf16> x = {};
        if (row < rows) x = load(qkv + (at + row) * cols + (q_heads + kv_heads + g) * d, p);
        store(v, slot(row) + p, x);
    }
}

#define FORWARD(D) \
    KERNEL(THREADS, attention_forward_##D##_bf16, 1, D == 128 ? 3 : 0)(PACKED bf16* out, float* lse, PACKED const bf16* qkv, \
        PACKED const bf16* k, PACKED const bf16* v, const uint32_t* tiles, const uint32_t* pages, OPTIONAL float* block_partials, \
        OPTIONAL float* partials, int count, int slots, int q_heads, int kv_heads, float scale, float cap, int window) { \
        const Scoring by(scale, cap, window); \
        forward<D>(out, lse, qkv, k, v, tiles, pages, block_partials, partials, count, slots, q_heads, kv_heads, by); \
    }
EACH_HEAD_SIZE(FORWARD)
