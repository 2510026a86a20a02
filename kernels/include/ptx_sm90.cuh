// The instructions of Hopper (sm_90a), as those of ptx.cuh: mbarriers that expect bytes, TMA,
// wgmma, proxy fences, register moves. Files that include this are named *_sm90.cu.
#pragma once

#include "ptx.cuh"

#if defined(WARPO_SIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

namespace ptx {

// The thread that initialised mbarriers makes them known to the TMA unit and to the cluster; then a
// barrier.
__device__ __forceinline__ void fence_barrier_init() {
    PTX_EITHER(::sim::fence_barrier_init(), asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"));
}

// One arrival, and `bytes` more that asynchronous copies must bring before the phase is complete.
__device__ __forceinline__ void mbarrier_expect(uint64_t* bar, int bytes PTX_AND_AT) {
    PTX_EITHER(::sim::mbarrier_expect(bar, bytes, at),
               asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                            ::"r"(address(bar)), "r"(bytes) : "memory"));
}

// An arrival at the same mbarrier of block `rank` of the cluster: that a slot was read, not what
// was written here.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* bar, int rank PTX_AND_AT) {
    PTX_EITHER(::sim::mbarrier_arrive_at(bar, rank, at),
               asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                            "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
                            ::"r"(address(bar)), "r"(rank) : "memory"));
}

// Copies the box of a matrix that begins at column x and row y to shared memory; its bytes complete
// at `bar`.
__device__ __forceinline__ void tma_load(void* to, const TensorMap* map, int x, int y, uint64_t* bar PTX_AND_AT) {
    PTX_EITHER(::sim::tma_load(to, map, {2, {x, y, 0}}, bar, 0, at),
               asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                            "[%0], [%1, {%2, %3}], [%4];"
                            ::"r"(address(to)), "l"(map), "r"(x), "r"(y), "r"(address(bar)) : "memory"));
}

// The same of a tensor of three dimensions, x the innermost.
__device__ __forceinline__ void tma_load(void* to, const TensorMap* map, int x, int y, int z, uint64_t* bar PTX_AND_AT) {
    PTX_EITHER(::sim::tma_load(to, map, {3, {x, y, z}}, bar, 0, at),
               asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                            "[%0], [%1, {%2, %3, %4}], [%5];"
                            ::"r"(address(to)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(address(bar)) : "memory"));
}

// The same, to that place in each block of the cluster with a bit in `blocks`, and its mbarrier.
__device__ __forceinline__ void tma_load_multicast(void* to, const TensorMap* map, int x, int y, uint64_t* bar,
                                                   uint16_t blocks PTX_AND_AT) {
    PTX_EITHER(::sim::tma_load(to, map, {2, {x, y, 0}}, bar, blocks, at),
               asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                            "[%0], [%1, {%2, %3}], [%4], %5;"
                            ::"r"(address(to)), "l"(map), "r"(x), "r"(y), "r"(address(bar)), "h"(blocks) : "memory"));
}

// Copies a box from shared memory, but for what lies outside the matrix.
__device__ __forceinline__ void tma_store(const TensorMap* map, int x, int y, const void* from PTX_AND_AT) {
    PTX_EITHER(::sim::tma_store(map, x, y, from, at),
               asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                            ::"l"(map), "r"(x), "r"(y), "r"(address(from)) : "memory"));
}

__device__ __forceinline__ void tma_store_commit() {
    PTX_EITHER(::sim::tma_store_commit(), asm volatile("cp.async.bulk.commit_group;" ::: "memory"));
}

// Until at most `PENDING` of this thread's groups still read shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read(PTX_AT) {
    PTX_EITHER(::sim::tma_store_wait(PENDING, false, at),
               asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory"));
}

// What this thread wrote to shared memory is seen by TMA stores and by wgmma.
__device__ __forceinline__ void fence_async() {
    PTX_EITHER(::sim::fence_async(), asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));
}

// Rank of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    PTX_EITHER(rank = ::sim::cluster_rank(), asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
    return int(rank);
}

// All threads of all blocks of the cluster wait for each other.
__device__ __forceinline__ void cluster_sync(PTX_AT) {
    PTX_EITHER(::sim::cluster_sync(at),
               asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"));
}

// Every warp of a warpgroup takes more registers a thread, or gives some back: a multiple of 8.
template <int REGISTERS>
__device__ __forceinline__ void registers_up(PTX_AT) {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "what setmaxnreg takes");
    PTX_EITHER(::sim::registers(REGISTERS, true, at), asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)));
}
template <int REGISTERS>
__device__ __forceinline__ void registers_down(PTX_AT) {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "what setmaxnreg takes");
    PTX_EITHER(::sim::registers(REGISTERS, false, at), asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)));
}

// True in one lane of a warp, always the same.
__device__ __forceinline__ bool elect(PTX_AT) {
    uint32_t one;
    PTX_EITHER(one = ::sim::elect(at),
               asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one)));
    return one != 0;
}

// -- products of a warpgroup: its 128 threads call these together ----
//
// An operand in shared memory is a descriptor. With its swizzle of 128 bytes, bits 4 to 6 of every
// address are xored with bits 7 to 9, as TMA does; a tile begins on a multiple of 1024 bytes.
//   Rows of k ("K-major"): 64 numbers of k, 128 bytes, for each m (or n); groups of 8 are
//     `stride_bytes` apart, `leading_bytes` is not used. The next 16 of k are 32 bytes on.
//   Columns ("MN-major"): 64 numbers of m, 128 bytes, for each k; groups of 8 k are `stride_bytes`
//     apart, the next 64 of m `leading_bytes`. The next 16 of k are 2 `stride_bytes` on.
__device__ __forceinline__ uint64_t operand(const void* shared, int leading_bytes, int stride_bytes PTX_AND_AT) {
    const uint64_t start = address(shared PTX_PASS) >> 4 & 0x3FFF, leading = leading_bytes >> 4 & 0x3FFF;
    return start | leading << 16 | uint64_t(stride_bytes >> 4 & 0x3FFF) << 32 | uint64_t(1) << 62;
}

// The operand that begins `bytes` further on.
__device__ __forceinline__ uint64_t operand_advance(uint64_t operand, int bytes) { return operand + uint64_t(bytes >> 4); }

// Before the first product, and wherever anything else has used accumulators or written A's
// registers.
__device__ __forceinline__ void wgmma_fence(PTX_AT) {
    PTX_EITHER(::sim::wgmma_fence(at), asm volatile("wgmma.fence.sync.aligned;" ::: "memory"));
}

__device__ __forceinline__ void wgmma_commit(PTX_AT) {
    PTX_EITHER(::sim::wgmma_commit(at), asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"));
}

// Until at most `PENDING` groups are under way; then wgmma_keep what they have computed.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait(PTX_AT) {
    PTX_EITHER(::sim::wgmma_wait(PENDING, at), asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"));
}

// Keeps the compiler from moving reads or writes of d across: a product may be under way.
template <int COUNT>
__device__ __forceinline__ void wgmma_keep(float (&d)[COUNT]) {
#ifdef WARPO_SIM
    (void)d;
#else
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// The same of A's registers, which are read until the products are done.
template <int STEPS>
__device__ __forceinline__ void wgmma_keep(uint32_t (&a)[STEPS][4]) {
#ifdef WARPO_SIM
    (void)a;
#else
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(a[i][j])::"memory");
    }
#endif
}

#ifndef WARPO_SIM
// One wgmma of every width: LIST are the numbers of the accumulators, VALUES themselves, and the
// others the numbers of the operands that follow.
#define WGMMA_START(N, ADD)                                 \
    "{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "
#define WGMMA_SHARED(N, LIST, VALUES, A, B, ADD, TA, TB)                                                   \
    if constexpr (2 * COUNT == N)                                                                          \
    asm volatile(WGMMA_START(N, ADD) "{" LIST "}, %" #A ", %" #B ", add, 1, 1, %" #TA ", %" #TB ";\n}"     \
                 : VALUES                                                                                  \
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(A_COLUMNS)), "n"(int(B_COLUMNS)))
#define WGMMA_REGISTERS(N, LIST, VALUES, A0, A1, A2, A3, B, ADD, TB)                                       \
    if constexpr (2 * COUNT == N)                                                                          \
    asm volatile(WGMMA_START(N, ADD) "{" LIST "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B          \
                                     ", add, 1, 1, %" #TB ";\n}"                                           \
                 : VALUES                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(B_COLUMNS)))
#define WGMMA_V4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_V8(i) WGMMA_V4(i), WGMMA_V4(i + 4)
#define WGMMA_V16(i) WGMMA_V8(i), WGMMA_V8(i + 8)
#define WGMMA_V32(i) WGMMA_V16(i), WGMMA_V16(i + 16)
#define WGMMA_V40(i) WGMMA_V32(i), WGMMA_V8(i + 32)
#define WGMMA_V48(i) WGMMA_V32(i), WGMMA_V16(i + 32)
#define WGMMA_V64(i) WGMMA_V32(i), WGMMA_V32(i + 32)
#define WGMMA_V128(i) WGMMA_V64(i), WGMMA_V64(i + 64)
#define WGMMA_L4 "%0, %1, %2, %3"
#define WGMMA_L8 WGMMA_L4 \
    ", %4, %5, %6, %7"
#define WGMMA_L16 WGMMA_L8 \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_L32 WGMMA_L16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_L40 WGMMA_L32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_L48 WGMMA_L40 \
    ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_L64 WGMMA_L32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_L128 WGMMA_L64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#endif

// D += A B, or D = A B without `add`: A [64, 16] and B [16, N] in bf16, D [64, N] in f32. Of thread
// t of the warpgroup, with r = 16 (t / 32) + t % 32 / 4 and c = 2 (t % 4): d[4 j..] = D[r, 8 j +
// c], D[r, 8 j + c + 1] and the same of row r + 8. A_COLUMNS, B_COLUMNS: how the operand lies. N is
// 8, 16, 32, 64, 80, 96, 128 or 256.
template <int N, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool add PTX_AND_AT) {
    constexpr int COUNT = N / 2;
#ifdef WARPO_SIM
    ::sim::wgmma({d, COUNT, nullptr, a, b, add, A_COLUMNS, B_COLUMNS}, at);
#else
    WGMMA_SHARED(8, WGMMA_L4, WGMMA_V4(0), 4, 5, 6, 7, 8);
    WGMMA_SHARED(16, WGMMA_L8, WGMMA_V8(0), 8, 9, 10, 11, 12);
    WGMMA_SHARED(32, WGMMA_L16, WGMMA_V16(0), 16, 17, 18, 19, 20);
    WGMMA_SHARED(64, WGMMA_L32, WGMMA_V32(0), 32, 33, 34, 35, 36);
    WGMMA_SHARED(80, WGMMA_L40, WGMMA_V40(0), 40, 41, 42, 43, 44);
    WGMMA_SHARED(96, WGMMA_L48, WGMMA_V48(0), 48, 49, 50, 51, 52);
    WGMMA_SHARED(128, WGMMA_L64, WGMMA_V64(0), 64, 65, 66, 67, 68);
    WGMMA_SHARED(256, WGMMA_L128, WGMMA_V128(0), 128, 129, 130, 131, 132);
#endif
}

// The same, A in registers: a[0] = A[r, c..], a[1] = A[r + 8, c..], a[2] = A[r, c + 8..], a[3] =
// A[r + 8, c + 8..].
template <int N, bool B_COLUMNS>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add PTX_AND_AT) {
    constexpr int COUNT = N / 2;
#ifdef WARPO_SIM
    ::sim::wgmma({d, COUNT, a, 0, b, add, false, B_COLUMNS}, at);
#else
    WGMMA_REGISTERS(8, WGMMA_L4, WGMMA_V4(0), 4, 5, 6, 7, 8, 9, 10);
    WGMMA_REGISTERS(16, WGMMA_L8, WGMMA_V8(0), 8, 9, 10, 11, 12, 13, 14);
    WGMMA_REGISTERS(32, WGMMA_L16, WGMMA_V16(0), 16, 17, 18, 19, 20, 21, 22);
    WGMMA_REGISTERS(64, WGMMA_L32, WGMMA_V32(0), 32, 33, 34, 35, 36, 37, 38);
    WGMMA_REGISTERS(80, WGMMA_L40, WGMMA_V40(0), 40, 41, 42, 43, 44, 45, 46);
    WGMMA_REGISTERS(96, WGMMA_L48, WGMMA_V48(0), 48, 49, 50, 51, 52, 53, 54);
    WGMMA_REGISTERS(128, WGMMA_L64, WGMMA_V64(0), 64, 65, 66, 67, 68, 69, 70);
    WGMMA_REGISTERS(256, WGMMA_L128, WGMMA_V128(0), 128, 129, 130, 131, 132, 133, 134);
#endif
}

}  // namespace ptx

#endif
