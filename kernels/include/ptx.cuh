// Every instruction that CUDA C++ has no word for, each with a device body (PTX or a compiler
// intrinsic) and a simulator body. The only file with inline PTX; a test looks for strays.
//
// In the simulator each function also takes the place it is called from, for reports.
#pragma once

#include <stdint.h>

#ifdef WARPO_SIM
#define PTX_AT ::sim::Site at = {}
#define PTX_AND_AT , PTX_AT
#define PTX_PASS , at
#else
#define PTX_AT
#define PTX_AND_AT
#define PTX_PASS
#endif

namespace ptx {

constexpr unsigned WARP = 0xffffffffu;

// -- warps: all 32 lanes call these together ----

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

#ifdef WARPO_SIM
namespace host {
template <class T>
struct Lanes {
    T values[32];
    T operator[](int lane) const { return values[lane]; }
};
template <class T>
Lanes<T> exchange(::sim::Warp kind, const T& v, ::sim::Site at) {
    Lanes<T> all;
    ::sim::exchange(kind, WARP, &v, sizeof v, all.values, at);
    return all;
}
}  // namespace host
#endif

// The value of lane `lane() ^ lanes`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int lanes PTX_AND_AT) {
#ifdef WARPO_SIM
    return host::exchange(::sim::Warp::Shuffle, v, at)[lane() ^ lanes];
#else
    return __shfl_xor_sync(WARP, v, lanes);
#endif
}

// The value of lane `from`.
template <class T>
__device__ __forceinline__ T shuffle(T v, int from PTX_AND_AT) {
#ifdef WARPO_SIM
    return host::exchange(::sim::Warp::Shuffle, v, at)[from & 31];
#else
    return __shfl_sync(WARP, v, from);
#endif
}

// The value of lane `lane() - by`; the first `by` lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_up(T v, int by PTX_AND_AT) {
#ifdef WARPO_SIM
    return host::exchange(::sim::Warp::Shuffle, v, at)[lane() < by ? lane() : lane() - by];
#else
    return __shfl_up_sync(WARP, v, by);
#endif
}

// The value of lane `lane() + by`; the last `by` lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_down(T v, int by PTX_AND_AT) {
#ifdef WARPO_SIM
    return host::exchange(::sim::Warp::Shuffle, v, at)[lane() + by > 31 ? lane() : lane() + by];
#else
    return __shfl_down_sync(WARP, v, by);
#endif
}

// Bit i: lane i said yes.
__device__ __forceinline__ unsigned ballot(bool yes PTX_AND_AT) {
#ifdef WARPO_SIM
    const auto all = host::exchange(::sim::Warp::Vote, yes, at);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(all[i]) << i;
    return bits;
#else
    return __ballot_sync(WARP, yes);
#endif
}

// Lanes wait for each other and see each other's writes.
__device__ __forceinline__ void sync_warp(PTX_AT) {
#ifdef WARPO_SIM
    ::sim::exchange(::sim::Warp::Sync, WARP, nullptr, 0, nullptr, at);
#else
    __syncwarp();
#endif
}

// `threads` threads of the block, whole warps, wait for each other at barrier `id`, 1 to 15.
__device__ __forceinline__ void barrier(int id, int threads PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::barrier(at, id, threads);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts among the `threads` threads of barrier `id`, without waiting for the others: they see what
// was written before.
__device__ __forceinline__ void barrier_arrive(int id, int threads PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::barrier_arrive(at, id, threads);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// -- numbers ----

// The number of the lowest bit that is 1; one is.
__device__ __forceinline__ int lowest(unsigned bits) {
#ifdef WARPO_SIM
    return __builtin_ctz(bits);
#else
    return __ffs(int(bits)) - 1;
#endif
}

// High half of a 32 x 32 bit product.
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef WARPO_SIM
    return uint32_t(uint64_t(a) * b >> 32);
#else
    return __umulhi(a, b);
#endif
}

__device__ __forceinline__ uint32_t float_bits(float x) {
#ifdef WARPO_SIM
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
#else
    return __float_as_uint(x);
#endif
}

__device__ __forceinline__ float bits_float(uint32_t u) {
#ifdef WARPO_SIM
    float x;
    memcpy(&x, &u, 4);
    return x;
#else
    return __uint_as_float(u);
#endif
}

// 1 / x, to the last bit but one.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef WARPO_SIM
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 2^x: one instruction, within 2^-22 of the true value, 0 below the normal numbers.
__device__ __forceinline__ float exp2(float x) {
#ifdef WARPO_SIM
    const float y = ::exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Two bf16, the first in the low half, rounded to nearest even; NaN becomes the quiet NaN 0x7FFF.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef WARPO_SIM
    auto one = [](float x) -> uint32_t {
        const uint32_t u = float_bits(x);
        if (x != x) return 0x7FFF;
        return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    };
    return one(low) | one(high) << 16;
#else
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
#endif
}

// Four floats at once, at a multiple of 16 bytes: of a plain store of four the compiler may make
// four.
__device__ __forceinline__ void store_four(float* p, const float (&x)[4] PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::aligned(p, 16, at);
    for (int i = 0; i < 4; ++i) p[i] = x[i];
#else
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
#endif
}

// *p becomes the least of what it was and all that are brought, whatever their order.
__device__ __forceinline__ void atomic_min(uint64_t* p, uint64_t x) {
#ifdef WARPO_SIM
    uint64_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (x < old && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
#else
    atomicMin(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
#endif
}

// -- turns: blocks that run together add to the same global memory one after the other ----

// Until the turn is `mine`. One thread waits; behind a barrier its block sees what the blocks
// before it have written. The launch is one of blocks that run together (Launch::together), or they
// might wait for one that never starts.
__device__ __forceinline__ void turn_wait(const uint32_t* turn, uint32_t mine PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::turn_wait(turn, mine, at);
#else
    uint32_t now;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    } while (now != mine);
#endif
}

// The turn is `next` from here on: one thread says so, behind a barrier after what its block has
// written.
__device__ __forceinline__ void turn_pass(uint32_t* turn, uint32_t next PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::turn_pass(turn, next, at);
#else
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(next) : "memory");
#endif
}

// -- asynchronous copies to shared memory ----

// 16 bytes; the last `zeros` of them are 0 instead of read.
__device__ __forceinline__ void copy_async(void* to, const void* from, int zeros PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::copy_async(to, from, 16, zeros, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(16 - zeros) : "memory");
#endif
}

__device__ __forceinline__ void copy_commit() {
#ifdef WARPO_SIM
    ::sim::copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `PENDING` of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait(PTX_AT) {
#ifdef WARPO_SIM
    ::sim::copy_wait(PENDING, at);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// -- barriers that count arrivals in shared memory ----

// One thread initialises; then a block barrier.
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int arrivals PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::mbarrier_init(bar, arrivals, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(bar));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::mbarrier_arrive(bar, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(bar));
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(address) : "memory");
#endif
}

// Until the phase of this parity (0 first) is complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, int parity PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::mbarrier_wait(bar, parity, at);
#else
#if __CUDA_ARCH__ >= 900
#define PTX_WAIT "mbarrier.try_wait"  // sleeps for a while before it says no
#else
#define PTX_WAIT "mbarrier.test_wait"
#endif
    const uint32_t address = uint32_t(__cvta_generic_to_shared(bar));
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\n" PTX_WAIT ".parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(address), "r"(parity)
            : "memory");
    }
#endif
}

// -- tensor cores ----

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, 16
// bytes each, and gets in out[i] two neighbours of matrix i: row l / 4, columns 2 (l % 4) and the
// next.
__device__ __forceinline__ void load_matrix(uint32_t (&out)[4], const void* row PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::aligned(row, 16, at);
    const auto rows = host::exchange(::sim::Warp::Matrix, row, at);
    for (int i = 0; i < 4; ++i) memcpy(&out[i], static_cast<const char*>(rows[8 * i + lane() / 4]) + lane() % 4 * 4, 4);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
#endif
}

// The same, each matrix transposed: out[i] holds rows 2 (l % 4) and the next of column l / 4.
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&out)[4], const void* row PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::aligned(row, 16, at);
    const auto rows = host::exchange(::sim::Warp::Matrix, row, at);
    for (int i = 0; i < 4; ++i) {
        uint16_t two[2];
        for (int j = 0; j < 2; ++j) {
            memcpy(&two[j], static_cast<const char*>(rows[8 * i + lane() % 4 * 2 + j]) + lane() / 4 * 2, 2);
        }
        out[i] = two[0] | uint32_t(two[1]) << 16;
    }
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
#endif
}

// D += A B, A [16, 16] and B [16, 8] in bf16, D [16, 8] in f32. Of lane l, with r = l / 4 and c = 2
// (l % 4): a[0] = A[r, c..], a[1] = A[r + 8, c..], a[2] = A[r, c + 8..], a[3] = A[r + 8, c + 8..];
// b[0] = B[c.., r], b[1] = B[c + 8.., r]; d = D[r, c..] and D[r + 8, c..], two each.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_AND_AT) {
#ifdef WARPO_SIM
    struct Fragments {
        uint32_t a[4], b[2];
    } mine;
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    const auto all = host::exchange(::sim::Warp::Mma, mine, at);
    auto half = [](uint32_t two, int i) { return bits_float(i == 0 ? two << 16 : two & 0xFFFF0000u); };
    const int row = lane() / 4, col = lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        // The sum of the products is rounded once here; the hardware's order of additions is not
        // told.
        double sum = d[i];
        for (int k = 0; k < 16; ++k) {
            const int r = row + i / 2 * 8, c = col + i % 2;
            const Fragments fa = all[r % 8 * 4 + k % 8 / 2], fb = all[c * 4 + k % 8 / 2];
            sum += double(half(fa.a[r / 8 + k / 8 * 2], k % 2)) * half(fb.b[k / 8], k % 2);
        }
        d[i] = float(sum);
    }
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// -- Hopper (sm_90a): files that use these are named *_sm90.cu ----

// A tensor in global memory as the TMA unit sees it; the host encodes it. In the simulator the
// bytes are those of sim::Map.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

#if defined(WARPO_SIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// The thread that initialised mbarriers makes them known to the TMA unit and to the cluster; then a
// barrier.
__device__ __forceinline__ void fence_barrier_init() {
#ifdef WARPO_SIM
    ::sim::fence_barrier_init();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival, and `bytes` more that asynchronous copies must bring before the phase is complete.
__device__ __forceinline__ void mbarrier_expect(uint64_t* bar, int bytes PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::mbarrier_expect(bar, bytes, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(bar));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
#endif
}

// An arrival at the same mbarrier of block `rank` of the cluster: that a slot was read, not what
// was written here.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* bar, int rank PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::mbarrier_arrive_at(bar, rank, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(bar));
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(address),
        "r"(rank)
        : "memory");
#endif
}

// Copies the box of a matrix that begins at column x and row y to shared memory; its bytes complete
// at `bar`.
__device__ __forceinline__ void tma_load(void* to, const TensorMap* map, int x, int y, uint64_t* bar PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::tma_load(to, map, {2, {x, y, 0}}, bar, 0, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(to)), barrier = uint32_t(__cvta_generic_to_shared(bar));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            address),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
#endif
}

// The same of a tensor of three dimensions, x the innermost.
__device__ __forceinline__ void tma_load(void* to, const TensorMap* map, int x, int y, int z, uint64_t* bar PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::tma_load(to, map, {3, {x, y, z}}, bar, 0, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(to)), barrier = uint32_t(__cvta_generic_to_shared(bar));
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            address),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
#endif
}

// The same, to the same place in every block of the cluster whose bit is in `blocks`, each with its
// own mbarrier.
__device__ __forceinline__ void tma_load_multicast(void* to, const TensorMap* map, int x, int y, uint64_t* bar,
                                                   uint16_t blocks PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::tma_load(to, map, {2, {x, y, 0}}, bar, blocks, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(to)), barrier = uint32_t(__cvta_generic_to_shared(bar));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(address),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
        : "memory");
#endif
}

// Copies a box from shared memory, but for what lies outside the matrix.
__device__ __forceinline__ void tma_store(const TensorMap* map, int x, int y, const void* from PTX_AND_AT) {
#ifdef WARPO_SIM
    ::sim::tma_store(map, x, y, from, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(from));
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x), "r"(y),
                 "r"(address)
                 : "memory");
#endif
}

__device__ __forceinline__ void tma_store_commit() {
#ifdef WARPO_SIM
    ::sim::tma_store_commit();
#else
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until at most `PENDING` of this thread's groups still read shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read(PTX_AT) {
#ifdef WARPO_SIM
    ::sim::tma_store_wait(PENDING, false, at);
#else
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
#endif
}

// Until at most `PENDING` of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait(PTX_AT) {
#ifdef WARPO_SIM
    ::sim::tma_store_wait(PENDING, true, at);
#else
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
#ifdef WARPO_SIM
    (void)map;
#else
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// What this thread wrote to shared memory is seen by TMA stores and by wgmma.
__device__ __forceinline__ void fence_async() {
#ifdef WARPO_SIM
    ::sim::fence_async();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
#ifdef WARPO_SIM
    return ::sim::cluster_rank();
#else
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
#endif
}

// All threads of all blocks of the cluster wait for each other.
__device__ __forceinline__ void cluster_sync(PTX_AT) {
#ifdef WARPO_SIM
    ::sim::cluster_sync(at);
#else
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Every warp of a warpgroup takes more registers a thread, or gives some back: a multiple of 8 from
// 24 to 256.
template <int REGISTERS>
__device__ __forceinline__ void registers_up(PTX_AT) {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "what setmaxnreg takes");
#ifdef WARPO_SIM
    ::sim::registers(REGISTERS, true, at);
#else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS>
__device__ __forceinline__ void registers_down(PTX_AT) {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "what setmaxnreg takes");
#ifdef WARPO_SIM
    ::sim::registers(REGISTERS, false, at);
#else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// True in one lane of a warp, always the same.
__device__ __forceinline__ bool elect(PTX_AT) {
#ifdef WARPO_SIM
    return ::sim::elect(at);
#else
    uint32_t one;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
    return one != 0;
#endif
}

// -- products of a warpgroup: its 128 threads call these together ----
//
// An operand in shared memory is a descriptor. With its swizzle of 128 bytes, bits 4 to 6 of every
// address are xored with bits 7 to 9, as TMA does; a tile begins on a multiple of 1024 bytes.
//   Rows of k ("K-major"): 64 numbers of k, 128 bytes, for each m (or n); groups of 8 are
//   `stride_bytes` apart.
//     `leading_bytes` is not used. The next 16 of k are 32 bytes on.
//   Columns ("MN-major"): 64 numbers of m, 128 bytes, for each k; groups of 8 k are `stride_bytes`
//   apart, the next
//     64 of m `leading_bytes`. The next 16 of k are 2 `stride_bytes` on.
__device__ __forceinline__ uint64_t operand(const void* shared, int leading_bytes, int stride_bytes PTX_AND_AT) {
#ifdef WARPO_SIM
    const uint32_t address = ::sim::shared_address(shared, at);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
#endif
    return (address >> 4 & 0x3FFF) | uint64_t(leading_bytes >> 4 & 0x3FFF) << 16 | uint64_t(stride_bytes >> 4 & 0x3FFF) << 32 |
           uint64_t(1) << 62;
}

// The operand that begins `bytes` further on.
__device__ __forceinline__ uint64_t operand_advance(uint64_t operand, int bytes) { return operand + uint64_t(bytes >> 4); }

// Before the first product, and wherever anything else has used accumulators or written A's
// registers.
__device__ __forceinline__ void wgmma_fence(PTX_AT) {
#ifdef WARPO_SIM
    ::sim::wgmma_fence(at);
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit(PTX_AT) {
#ifdef WARPO_SIM
    ::sim::wgmma_commit(at);
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most `PENDING` groups are under way; then wgmma_keep what they have computed.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait(PTX_AT) {
#ifdef WARPO_SIM
    ::sim::wgmma_wait(PENDING, at);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// Keeps the compiler from moving what reads or writes d across this point: it does not know that a
// product is under way.
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

#endif  // Hopper

}  // namespace ptx
