// Kernels for Hopper that make the mistake they are told to, to show that the simulator finds it;
// the test says what it must say. `mistake` 0 is none, which must be clean.
#include "../include/kernel.cuh"
#include "../include/ptx_sm90.cuh"

// y [128, 64] = A B^T for A [128, 256] and B [64, 256], the sum of the first half of k taken away
// from that of the second: TMA fills two slots of 64 k, a warpgroup each multiplies 64 rows.
constexpr int SLOTS = 2, STEPS = 4;
enum { FEW_BYTES = 1, MANY_BYTES, NO_INIT_FENCE, EARLY_READ, STRIDE, NO_FENCE, NO_FENCE_AGAIN, EARLY_RELEASE, LATE_WRITE };

KERNEL(384, fault90_product, 1)(float* y, TENSOR_MAP a, TENSOR_MAP b, int mistake) {
    Shared shared;
    bf16* left = shared.take<bf16>(SLOTS * 128 * 64, 1024);
    bf16* right = shared.take<bf16>(SLOTS * 64 * 64, 1024);
    uint64_t* full = shared.take<uint64_t>(SLOTS);
    uint64_t* empty = shared.take<uint64_t>(SLOTS);
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            ptx::mbarrier_init(full + i, 1);
            ptx::mbarrier_init(empty + i, 2);
        }
        if (mistake != NO_INIT_FENCE) ptx::fence_barrier_init();
    }
    __syncthreads();
    const int group = threadIdx.x / 128 - 1, t = threadIdx.x % 128;
    if (group < 0) {
        ptx::registers_down<40>();
        if (t >= 32 || !ptx::elect()) return;
        const int bytes = (128 + 64) * 64 * 2 - (mistake == FEW_BYTES ? 4096 : 0) + (mistake == MANY_BYTES ? 4096 : 0);
        for (int k = 0; k < STEPS; ++k) {
            const int slot = k % SLOTS;
            if (k >= SLOTS) ptx::mbarrier_wait(empty + slot, (k / SLOTS - 1) % 2);
            ptx::mbarrier_expect(full + slot, bytes);
            ptx::tma_load(left + slot * 128 * 64, &a, 64 * k, 0, full + slot);
            ptx::tma_load(right + slot * 64 * 64, &b, 64 * k, 0, full + slot);
        }
        return;
    }
    ptx::registers_up<232>();
    float d[32] = {};
    float early = 0.0f;
    for (int k = 0; k < STEPS; ++k) {
        const int slot = k % SLOTS;
        ptx::mbarrier_wait(full + slot, k / SLOTS % 2);
        if (mistake == EARLY_RELEASE && t == 0) ptx::mbarrier_arrive(empty + slot);
        const uint64_t rows = ptx::operand(left + slot * 128 * 64 + group * 64 * 64, 0, mistake == STRIDE ? 512 : 1024);
        const uint64_t cols = ptx::operand(right + slot * 64 * 64, 0, 1024);
        if (k == STEPS / 2) {
            for (int i = 0; i < 32; ++i) d[i] = -d[i];
        }
        ptx::wgmma_keep(d);
        if (mistake != NO_FENCE && (mistake != NO_FENCE_AGAIN || k == 0)) ptx::wgmma_fence();
        for (int i = 0; i < 4; ++i) {
            const uint64_t a_i = ptx::operand_advance(rows, 32 * i), b_i = ptx::operand_advance(cols, 32 * i);
            ptx::wgmma_bf16<64, false, false>(d, a_i, b_i, k + i > 0);
        }
        ptx::wgmma_commit();
        if (mistake == EARLY_READ) early = d[0];
        if (mistake == LATE_WRITE) d[0] = 0.0f;
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(d);
        if (mistake != EARLY_RELEASE && t == 0) ptx::mbarrier_arrive(empty + slot);
    }
    if (mistake == EARLY_READ) d[0] = early;
    for (int i = 0; i < 32; ++i) {
        const int row = group * 64 + t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + 2 * (t % 4) + i % 2;
        y[row * 64 + col] = d[i];
    }
}

// y [384] = x: a warpgroup gives registers to the two others. 1: fewer than they ask for.
KERNEL(384, fault90_registers, 1)(float* y, const float* x, int mistake) {
    if (threadIdx.x < 128) {
        if (mistake == 0) {
            ptx::registers_down<40>();
        } else {
            ptx::registers_down<56>();
        }
    } else {
        ptx::registers_up<232>();
    }
    y[threadIdx.x] = x[threadIdx.x];
}

// y [64, 64] = A B^T for A and B [64, 64], which the threads themselves bring to shared memory,
// swizzled. 1: no proxy fence after that.
KERNEL(128, fault90_proxy)(float* y, PACKED const bf16* a, PACKED const bf16* b, int mistake) {
    Shared shared;
    bf16* left = shared.take<bf16>(64 * 64, 1024);
    bf16* right = shared.take<bf16>(64 * 64, 1024);
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 8; i += 128) {
        const int at = i / 8 * 8 + (i % 8 ^ i / 8 % 8);
        store(left, at, load(a, i));
        store(right, at, load(b, i));
    }
    if (mistake == 0) ptx::fence_async();
    __syncthreads();
    float d[32];
    const uint64_t rows = ptx::operand(left, 0, 1024), cols = ptx::operand(right, 0, 1024);
    ptx::wgmma_fence();
    for (int i = 0; i < 4; ++i) {
        ptx::wgmma_bf16<64, false, false>(d, ptx::operand_advance(rows, 32 * i), ptx::operand_advance(cols, 32 * i), i > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(d);
    for (int i = 0; i < 32; ++i) {
        y[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + 2 * (t % 4) + i % 2] = d[i];
    }
}

// y [64, 8] = A B^T for A [64, 64], two numbers a word, and B [8, 64]: A goes through registers,
// its next 16 columns while the last are multiplied. 1: only one fence for all of them.
KERNEL(128, fault90_fragments)(float* y, const uint32_t* a, PACKED const bf16* b, int mistake) {
    Shared shared;
    bf16* right = shared.take<bf16>(8 * 64, 1024);
    const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4;
    if (t < 64) store(right, t / 8 * 8 + (t % 8 ^ t / 8), load(b, t));
    ptx::fence_async();
    __syncthreads();
    float d[4];
    uint32_t fragment[2][4];
    for (int k = 0; k < 4; ++k) {
        uint32_t(&f)[4] = fragment[k % 2];
        for (int i = 0; i < 4; ++i) f[i] = a[(row + i % 2 * 8) * 32 + 8 * k + t % 4 + i / 2 * 4];
        if (mistake == 0 || k == 0) ptx::wgmma_fence();
        ptx::wgmma_bf16<8, false>(d, f, ptx::operand_advance(ptx::operand(right, 0, 1024), 32 * k), k > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(d);
    for (int i = 0; i < 4; ++i) y[(row + i / 2 * 8) * 8 + 2 * (t % 4) + i % 2] = d[i];
}

// Copies the matrix x to y, both [60, 56], by boxes of [64, 64] that TMA loads and stores. What
// lies outside must not matter. 1: no proxy fence between stores to shared memory and the TMA
// store; 2: the thread exits before its store has read; 3: shared memory is written again before;
// 4: plain reads of what is swizzled; 5: an mbarrier that is waited for again in the phase that it
// is in; 6: an mbarrier that one thread does not wait for; 7: as 3, by another thread; 8: an
// mbarrier that goes on while others wait; 9: a block that exits while TMA brings something; 10: a
// matrix that is loaded as a tensor of three dimensions.
KERNEL(64, fault90_copy)(bf16* unused, TENSOR_MAP x, TENSOR_MAP y, int mistake) {
    Shared shared;
    bf16* in = shared.take<bf16>(64 * 64, 1024);
    bf16* out = shared.take<bf16>(64 * 64, 1024);
    uint64_t* full = shared.take<uint64_t>(2);
    const int t = threadIdx.x;
    if (t == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init(full + 1, 1);
        ptx::fence_barrier_init();
        ptx::mbarrier_expect(full, 64 * 64 * 2);
        if (mistake == 10) {
            ptx::tma_load(in, &x, 0, 0, 0, full);
        } else {
            ptx::tma_load(in, &x, 0, 0, full);
        }
    }
    __syncthreads();
    if (mistake == 8 && t < 32) ptx::mbarrier_wait(full + 1, 0);
    for (int i = 0; mistake == 8 && t == 32 && i < 2; ++i) ptx::mbarrier_arrive(full + 1);
    if (mistake == 9) return;
    if (mistake != 6 || t != 5) ptx::mbarrier_wait(full, 0);
    if (mistake == 5) ptx::mbarrier_wait(full, 1);
    for (int i = 0; i < 8; ++i) {
        store(out, 8 * t + (i ^ t % 8), load(in, 8 * t + (mistake == 4 ? i : i ^ t % 8)));
    }
    if (mistake != 1) ptx::fence_async();
    __syncthreads();
    if (t == 0) {
        ptx::tma_store(&y, 0, 0, out);
        ptx::tma_store_commit();
        if (mistake == 3) out[0] = bf16{0};
        if (mistake != 2) ptx::tma_store_wait_read<0>();
    }
    if (mistake == 7 && t == 1) out[0] = bf16{0};
}

// y [32] = 2 (2 (2 x[0] + x[1]) + x[2]) for x [3, 32]: of two warps one adds and the other doubles,
// in turns. 1: the turn is passed on before it is over; 2: it is not passed on in the end.
KERNEL(64, fault90_turns)(float* y, const float* x, int mistake) {
    Shared shared;
    float* sum = shared.take<float>(32);
    const int w = threadIdx.x / 32, l = threadIdx.x % 32;
    for (int k = 0; k < 3; ++k) {
        if (w == 0) {
            if (k > 0) ptx::barrier(1, 64);
            sum[l] = x[32 * k + l] + (k > 0 ? sum[l] : 0.0f);
            ptx::barrier_arrive(2, 64);
        } else {
            ptx::barrier(2, 64);
            const float old = sum[l];
            if (mistake == 1) ptx::barrier_arrive(1, 64);
            // Lanes that others go on without.
            ptx::sync_warp();
            sum[l] = 2.0f * old;
            if (mistake == 0 || (mistake == 2 && k < 2)) ptx::barrier_arrive(1, 64);
        }
    }
    if (w == 0) {
        ptx::barrier(1, 64);
        y[l] = sum[l];
    }
}

// y [2, 64]: sums of the rows of x [3 * 64, 64] over three tiles, in both blocks of a cluster: each
// loads half of every tile for both. 1: the other block is not told that the tile was read; 2: no
// block waits for the other before it exits; 3: nor before it uses the other's mbarriers.
KERNEL(64, fault90_cluster, 2)(float* y, TENSOR_MAP x, int mistake) {
    Shared shared;
    bf16* tile = shared.take<bf16>(64 * 64, 128);
    uint64_t* full = shared.take<uint64_t>(1);
    uint64_t* empty = shared.take<uint64_t>(1);
    const int t = threadIdx.x, rank = ptx::cluster_rank();
    if (t == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init(empty, 2);
        ptx::fence_barrier_init();
    }
    if (mistake == 3) {
        __syncthreads();
    } else {
        ptx::cluster_sync();
    }
    float sum = 0.0f;
    for (int k = 0; k < 3; ++k) {
        if (t == 0) {
            if (k > 0) ptx::mbarrier_wait(empty, (k - 1) % 2);
            ptx::mbarrier_expect(full, 64 * 64 * 2);
            ptx::tma_load_multicast(tile + rank * 32 * 64, &x, 0, k * 64 + rank * 32, full, 3);
        }
        ptx::mbarrier_wait(full, k % 2);
        for (int i = 0; i < 64; ++i) sum += widen(tile[t * 64 + i]);
        __syncthreads();
        if (t < 2 && (mistake != 1 || t == rank)) ptx::mbarrier_arrive_at(empty, t);
    }
    y[blockIdx.x * 64 + t] = sum;
    if (mistake != 2) ptx::cluster_sync();
}
