// A block's tile of a matrix product on Hopper: C[i, j] = sum over k of L[i, k] R[j, k], by wgmma
// from shared memory that TMA fills. One warpgroup loads operands, the others multiply, 64 rows
// each; a ring of stages with a barrier for full and one for empty stands between them. Every sum
// is one chain over k, 16 at a time in ascending order, in every tile.
#pragma once

#include "kernel.cuh"
#include "ptx_sm90.cuh"
#include "raster.cuh"

// 64 rows for each of CONSUMERS warpgroups, BN columns, 64 of k a stage, STAGES of them; CLUSTER
// blocks, 1 or 2, that stand below each other share the stage's R: each loads half of it to both.
// Wide tiles SEND their results by TMA; narrow ones, of a few rows, write them.
template <int BN_, int CONSUMERS_, int STAGES_, int CLUSTER_, bool SENDS_ = BN_ >= 128>
struct Tile {
    static constexpr int BM = 64 * CONSUMERS_, BN = BN_, CONSUMERS = CONSUMERS_, STAGES = STAGES_, CLUSTER = CLUSTER_;
    static constexpr int DEPTH = 64, THREADS = 128 * (CONSUMERS + 1);
    static constexpr int LEFT = BM * DEPTH * 2, RIGHT = BN * DEPTH * 2, STAGE = LEFT + RIGHT;
    // Bytes of a warpgroup's 64 rows of 64 results in bf16; two are under way.
    static constexpr int OUT = 64 * 64 * 2;
    static constexpr bool SENDS = SENDS_;
    // Bytes of shared memory beside the stages: for these, or what a tile made of this one says.
    static constexpr int OUT_BYTES = SENDS ? 2 * CONSUMERS * OUT : 0;
};

// What a block's threads share.
template <class T>
struct Ring {
    char* stages;
    char* out;
    uint64_t *full, *empty;

    __device__ __forceinline__ Ring() {
        Shared shared;
        stages = shared.take<char>(T::STAGES * T::STAGE, 1024);
        out = T::OUT_BYTES > 0 ? shared.take<char>(T::OUT_BYTES, 1024) : nullptr;
        full = shared.take<uint64_t>(T::STAGES);
        empty = shared.take<uint64_t>(T::STAGES);
        if (threadIdx.x == 0) {
            for (int s = 0; s < T::STAGES; ++s) {
                ptx::mbarrier_init(full + s, 1);
                // Every warp that multiplies says to every block that loads that it is done.
                ptx::mbarrier_init(empty + s, 4 * T::CONSUMERS * T::CLUSTER);
            }
            ptx::fence_barrier_init();
        }
        sync();
    }
    // All threads of all blocks that share stages.
    static __device__ __forceinline__ void sync() {
        if constexpr (T::CLUSTER > 1) {
            ptx::cluster_sync();
        } else {
            __syncthreads();
        }
    }
};

// A place in the ring: a stage, and the parity of its barriers' phase.
template <class T>
struct Phase {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == T::STAGES) stage = 0, parity ^= 1;
    }
};

// A warp's arrival.
static __device__ __forceinline__ void arrive(uint64_t* bar) {
    if (ptx::lane() == 0) ptx::mbarrier_arrive(bar);
}

// What the producer needs to know of a product; the second half of R's rows begins `apart` rows
// after the first.
struct Operands {
    const ptx::TensorMap *left, *right;
    int apart, depth;
};

// Brings the operands of tile (i0, j0). One thread calls it.
template <class T, bool L_COLUMNS, bool R_COLUMNS>
static __device__ __forceinline__ void produce(const Ring<T>& ring, Phase<T>& phase, const Operands& o, int i0, int j0) {
    const int rank = T::CLUSTER > 1 ? ptx::cluster_rank() : 0;
    for (int k = 0; k < o.depth; k += T::DEPTH) {
        uint64_t* full = ring.full + phase.stage;
        char *left = ring.stages + phase.stage * T::STAGE, *right = left + T::LEFT;
        // Both blocks are done with what the stage held.
        ptx::mbarrier_wait(ring.empty + phase.stage, phase.parity ^ 1);
        ptx::mbarrier_expect(full, T::STAGE);
        if constexpr (L_COLUMNS) {
            for (int b = 0; b < T::BM / 64; ++b) ptx::tma_load(left + b * 8192, o.left, i0 + 64 * b, k, full);
        } else {
            ptx::tma_load(left, o.left, k, i0, full);
        }
        auto load_right = [&](char* to, int x, int y) {
            if constexpr (T::CLUSTER > 1) {
                ptx::tma_load_multicast(to, o.right, x, y, full, 3);
            } else {
                ptx::tma_load(to, o.right, x, y, full);
            }
        };
        if constexpr (R_COLUMNS) {
            constexpr int EACH = T::BN / 64 / T::CLUSTER;
            for (int b = rank * EACH; b < (rank + 1) * EACH; ++b) load_right(right + b * 8192, j0 + 64 * b, k);
        } else {
            for (int h = 0; h < 2; ++h) {
                if (T::CLUSTER == 1 || h == rank) load_right(right + h * T::RIGHT / 2, k, j0 + h * o.apart);
            }
        }
        phase.next();
    }
}

// The warpgroup's 64 rows of the tile's sums, as of ptx::wgmma_bf16; where ONES, `ones` gets the
// sums of L's rows, as a product with `column`, 8 rows of ones. All threads of the warpgroup call
// it, number `group` of the consumers.
template <class T, bool L_COLUMNS, bool R_COLUMNS, bool ONES = false>
static __device__ __forceinline__ void multiply(float (&sums)[T::BN / 2], float (&ones)[4], const Ring<T>& ring, Phase<T>& phase, int depth,
                                                int group, const void* column = nullptr) {
    // By rows, the next 8 are 1024 bytes on; by columns, the next 8 of k are, and the next 64 rows
    // 8192.
    constexpr int L_STEP = L_COLUMNS ? 2048 : 32, R_STEP = R_COLUMNS ? 2048 : 32;
    auto release = [&](int stage) {
        if constexpr (T::CLUSTER > 1) {
            if (ptx::lane() < T::CLUSTER) ptx::mbarrier_arrive_at(ring.empty + stage, ptx::lane());
        } else {
            arrive(ring.empty + stage);
        }
    };
    int before = -1;
    for (int k = 0; k < depth; k += T::DEPTH) {
        const char* left = ring.stages + phase.stage * T::STAGE;
        const uint64_t l = ptx::operand(left + group * 8192, 8192, 1024), r = ptx::operand(left + T::LEFT, 8192, 1024);
        ptx::mbarrier_wait(ring.full + phase.stage, phase.parity);
        ptx::wgmma_keep(sums);
        if constexpr (ONES) ptx::wgmma_keep(ones);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < T::DEPTH / 16; ++i) {
            const uint64_t li = ptx::operand_advance(l, i * L_STEP);
            ptx::wgmma_bf16<T::BN, L_COLUMNS, R_COLUMNS>(sums, li, ptx::operand_advance(r, i * R_STEP), k + i > 0);
            if constexpr (ONES) ptx::wgmma_bf16<8, L_COLUMNS, false>(ones, li, ptx::operand(column, 0, 1024), k + i > 0);
        }
        ptx::wgmma_commit();
        // The products of the stage before are done: it may be filled again.
        ptx::wgmma_wait<1>();
        if (before >= 0) release(before);
        before = phase.stage;
        phase.next();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(sums);
    if constexpr (ONES) ptx::wgmma_keep(ones);
    release(before);
}

// The first row and column of this thread's sums in a warpgroup's part of a tile.
static __device__ __forceinline__ int own_row() { return threadIdx.x % 128 / 32 * 16 + ptx::lane() / 4; }
static __device__ __forceinline__ int own_col() { return ptx::lane() % 4 * 2; }

// Runs the tiles of a product of `rows` by `cols` over all blocks, `width` columns a tile: each
// block takes one, then the one a grid further on. consume(ring, phase, group, i0, j0) computes
// what a consumer has of a tile, 64 rows from i0 on. A block takes BESIDE tiles that stand beside
// each other in turn.
template <class T, bool L_COLUMNS, bool R_COLUMNS, int BESIDE = 1, class Consume>
static __device__ __forceinline__ void each_tile(const Operands& o, int rows, int cols, int width, Consume consume) {
    const Ring<T> ring;
    // The same in a warp, and known to be.
    const int group = ptx::shuffle(int(threadIdx.x) / 128, 0), rank = T::CLUSTER > 1 ? ptx::cluster_rank() : 0;
    const int down = (rows + T::BM - 1) / T::BM, across = (cols + width - 1) / width;
    const int groups = (down + T::CLUSTER - 1) / T::CLUSTER, step = int(gridDim.x) / T::CLUSTER;
    Phase<T> phase;
    auto tiles = [&](auto f) {
        for (int t = int(blockIdx.x) / T::CLUSTER; t < groups * across; t += step) {
            const RasterTile at = raster(t, groups, across);
            const int i0 = (at.down * T::CLUSTER + rank) * T::BM, j0 = at.across * width;
#pragma unroll 1
            for (int b = 0; b < BESIDE; ++b) f(i0, j0 + b * T::BN);
        }
    };
    if (group == 0) {
        if constexpr (T::CONSUMERS > 1) ptx::registers_down<40>();
        if (threadIdx.x < 32 && ptx::elect()) {
            tiles([&](int i0, int j0) { produce<T, L_COLUMNS, R_COLUMNS>(ring, phase, o, i0, j0); });
        }
    } else {
        if constexpr (T::CONSUMERS > 1) ptx::registers_up<232>();
        tiles([&](int i0, int j0) { consume(ring, phase, group - 1, i0 + 64 * (group - 1), j0); });
        // Nobody may leave while shared memory is read.
        if (T::SENDS && threadIdx.x % 128 == 0) ptx::tma_store_wait_read<0>();
    }
    // Nor while another block may still signal here.
    if constexpr (T::CLUSTER > 1) ptx::cluster_sync();
}

// Sends 64 columns of the warpgroup's rows, from column x and row y of the matrix; `sent` counts
// what it has sent, and `write(buffer, other)` puts it to `buffer`, where `other` is the buffer
// before, which may still be read. All threads of the warpgroup call it.
template <class T, class F>
static __device__ __forceinline__ void send_written(const Ring<T>& ring, int group, int& sent, const ptx::TensorMap* map, int x, int y, F write) {
    char* buffers = ring.out + 2 * group * T::OUT;
    char *buffer = buffers + sent % 2 * T::OUT, *other = buffers + (sent + 1) % 2 * T::OUT;
    ++sent;
    const bool first = threadIdx.x % 128 == 0;
    // What was sent from here two turns ago has been read.
    if (first) ptx::tma_store_wait_read<1>();
    ptx::barrier(1 + group, 128);
    write(buffer, other);
    ptx::fence_async();
    ptx::barrier(1 + group, 128);
    if (first) {
        ptx::tma_store(map, x, y, buffer);
        ptx::tma_store_commit();
    }
}

// This thread's words of such a buffer: f(word, j, h) of row r + 8 h, columns 8 j + c and the next,
// of ptx::wgmma_bf16's r and c, placed as TMA swizzles, the eights of a row by the row. Unrolled
// where f has the words in registers.
template <int UNROLL, class F>
static __device__ __forceinline__ void each_word(char* buffer, F f) {
    const int row = own_row();
#pragma unroll UNROLL
    for (int j = 0; j < 8; ++j) {
        for (int h = 0; h < 2; ++h) {
            f(*reinterpret_cast<uint32_t*>(buffer + (row + 8 * h) * 128 + (j ^ row % 8) * 16 + ptx::lane() % 4 * 4), j, h);
        }
    }
}

// The same of results f(j, h), packed.
template <class T, class F>
static __device__ __forceinline__ void send(const Ring<T>& ring, int group, int& sent, const ptx::TensorMap* map, int x, int y, F f) {
    send_written(ring, group, sent, map, x, y, [&](char* buffer, char*) {
        each_word<8>(buffer, [&](uint32_t& word, int j, int h) { word = f(j, h); });
    });
}
