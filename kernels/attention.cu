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
                L::template copy<THREADS>(to, page, [&](int row) { return page + row * D; });
            }
            ptx::copy_commit();
        };
        L::template copy<THREADS>(query, qkv, [&](int row) {
            return row < rows ? qkv + (tile.at + row / group) * cols + (g * group + row % group) * D : nullptr;
        });
        load(key, k, tile.begin);
        load(value, v, tile.begin);
        Softmax soft;
        float o[D / 2] = {};
        bool merged = false;
        // Positions of the lane's two rows.
        int position[2];
        for (int r = 0; r < 2; ++r) position[r] = tile.first + (top + 8 * r + lane / 4) / group;
        const int first = tile.first + top / group, last = tile.first + (top + 15) / group;
        // f(r, row, head) of each of the lane's rows that is there: its place in the tile, its
        // head.
        auto each_row = [&](auto f) {
            for (int r = 0; r < 2; ++r) {
                const int row = top + 8 * r + lane / 4;
                if (row < rows) f(r, row / group, g * group + row % group);
            }
        };
        for (int i = 0; i < tile.reads; ++i) {
            if (i > 0) running.put(soft, o), soft = Softmax();
            each_row([&](int r, int row, int head) { carried.get(carried.at(tile.first_read + i, tile.slot + row, head), soft, o, r); });
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
                        add_product(x, 2 * j, q, two[0], two[1]);
                        add_product(x, 2 * j + 1, q, two[2], two[3]);
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
                int from[2], to[2];
                for (int r = 0; r < 2; ++r) from[r] = by.from(position[r]) - b * PAGE, to[r] = position[r] + 1 - b * PAGE;
                if (by.from(last) <= b * PAGE && (b + 1) * PAGE <= first + 1) {
                    soft.weigh<PAGE, false>(x, keep, by, from, to);
                } else {
                    soft.weigh<PAGE, true>(x, keep, by, from, to);
                }
                rescale<D>(o, keep);
#pragma unroll
                for (int i = 0; i < PAGE / 16; ++i) pack_weights(weights[i], x, i);
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
                        add_product(o, 2 * j, weights[i], two[0], two[1]);
                        add_product(o, 2 * j + 1, weights[i], two[2], two[3]);
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
            if (tile.writes >= 0) {
                each_row([&](int r, int row, int head) { carried.put(carried.at(tile.writes, tile.slot + row, head), soft, o, r); });
            }
        }
        if (top < rows && tile.writes < 0) {
            float inverse[2], all[2];
            soft.finish(inverse, all, by);
            each_row([&](int r, int row, int head) {
                if (lane % 4 == 0) lse[int64_t(tile.at + row) * q_heads + head] = all[r];
            });
            for (int r = 0; r < 2; ++r) {
                const int row = top + 8 * r + lane / 4;
                // The warp's queries were read. 0 is added so that a zero has one sign whatever was
                // masked.
#pragma unroll
                for (int j = 0; j < D / 8; ++j) {
                    const float* two = o + 4 * j + 2 * r;
                    *reinterpret_cast<uint32_t*>(query + L::at(row, j) + lane % 4 * 2) =
                        ptx::pack_bf16(fmaf(two[0], inverse[r], 0.0f), fmaf(two[1], inverse[r], 0.0f));
                }
            }
            ptx::sync_warp();
            for (int i = lane; i < 16 * L::CHUNKS; i += 32) {
                const int row = top + i / L::CHUNKS, c = i % L::CHUNKS;
                if (row >= rows) continue;
                bf16* to = out + (tile.at + row / group) * int64_t(q_heads) * D + (g * group + row % group) * D;
                reinterpret_cast<uint4*>(to)[c] = *reinterpret_cast<const uint4*>(query + L::at(row, c));
            }
        }
        // Before the next tile's queries come.
        __syncthreads();
    }
}

// A block a run of rows and a group of heads: queries and keys are rotated in place, keys and
// values go to their pages, and zeros for the values after them. Without a table nothing is
// rotated.
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
    // Turns packets p of a head, or makes it NaN at a position that the table does not have.
    auto rotated = [&](Packet<bf16>& a, Packet<bf16>& b, int row, int p) {
        const int position = first + row;
        if (position < entries) {
            const float* angles = table + int64_t(position) * d;
            const Elements<8> cos = take<8>(angles, p), sin = take<8>(angles, half + p);
            for (int j = 0; j < 8; ++j) rotate_pair(a.x[j], b.x[j], cos.x[j], sin.x[j]);
        } else {
            for (int j = 0; j < 8; ++j) a.x[j] = b.x[j] = NAN;
        }
    };
    if (table != nullptr) {
        for (int i = threadIdx.x; i < rows * group * half; i += THREADS) {
            const int row = i / (group * half), p = i % half;
            bf16* head = qkv + (at + row) * cols + (g * group + i / half % group) * d;
            Packet<bf16> a = load(head, p), b = load(head, half + p);
            rotated(a, b, row, p);
            store(head, p, a);
            store(head, half + p, b);
        }
    }
    for (int i = threadIdx.x; i < rows * half; i += THREADS) {
        const int row = i / half, p = i % half;
        bf16* head = qkv + (at + row) * cols + (q_heads + g) * d;
        Packet<bf16> a = load(head, p), b = load(head, half + p);
        if (table != nullptr) {
            rotated(a, b, row, p);
            store(head, p, a);
            store(head, half + p, b);
        }
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
