// Every instruction that CUDA C++ has no word for, each with a device body (PTX or a compiler
// intrinsic) and a simulator body. Inline PTX stands here and in ptx_sm90.cuh only; a test looks
// for strays.
//
// In the simulator each function also takes the place it is called from, for reports. PTX_EITHER
// has the simulator's body first, then the device's.
#pragma once

#include <stdint.h>

#ifdef WARPO_SIM
#define PTX_AT ::sim::Site at = {}
#define PTX_AND_AT , PTX_AT
#define PTX_PASS , at
#define PTX_EITHER(simulator, device) simulator
#else
#define PTX_AT
#define PTX_AND_AT
#define PTX_PASS
#define PTX_EITHER(simulator, device) device
#endif

namespace ptx {

constexpr unsigned WARP = 0xffffffffu;

// -- warps: all 32 lanes call these together ----

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

#ifdef WARPO_SIM
namespace host {
template <class T>
struct Lanes {
    const ::sim::Values& values;
    T operator[](int lane) const {
        T v;
        memcpy(&v, values[lane], sizeof v);
        return v;
    }
};
template <class T>
Lanes<T> exchange(::sim::Warp kind, const T& v, ::sim::Site at) {
    return {::sim::exchange(kind, WARP, &v, sizeof v, at)};
}
}  // namespace host
#endif

// The value of lane `lane() ^ lanes`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int lanes PTX_AND_AT) {
    return PTX_EITHER(host::exchange(::sim::Warp::Shuffle, v, at)[lane() ^ lanes], __shfl_xor_sync(WARP, v, lanes));
}

// The value of lane `from`.
template <class T>
__device__ __forceinline__ T shuffle(T v, int from PTX_AND_AT) {
    return PTX_EITHER(host::exchange(::sim::Warp::Shuffle, v, at)[from & 31], __shfl_sync(WARP, v, from));
}

// The value of lane `lane() - by`; the first `by` lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_up(T v, int by PTX_AND_AT) {
    return PTX_EITHER(host::exchange(::sim::Warp::Shuffle, v, at)[lane() < by ? lane() : lane() - by],
                      __shfl_up_sync(WARP, v, by));
}

// The value of lane `lane() + by`; the last `by` lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_down(T v, int by PTX_AND_AT) {
    return PTX_EITHER(host::exchange(::sim::Warp::Shuffle, v, at)[lane() + by > 31 ? lane() : lane() + by],
                      __shfl_down_sync(WARP, v, by));
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
    PTX_EITHER(::sim::exchange(::sim::Warp::Sync, WARP, nullptr, 0, at), __syncwarp());
}

// `threads` threads of the block, whole warps, wait for each other at barrier `id`, 1 to 15.
__device__ __forceinline__ void barrier(int id, int threads PTX_AND_AT) {
    PTX_EITHER(::sim::barrier(at, id, threads), asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

// Counts among the `threads` threads of barrier `id`, without waiting for the others: they see what
// was written before.
__device__ __forceinline__ void barrier_arrive(int id, int threads PTX_AND_AT) {
    PTX_EITHER(::sim::barrier_arrive(at, id, threads), asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

// -- numbers ----

// The number of the lowest bit that is 1; one is.
__device__ __forceinline__ int lowest(unsigned bits) {
    return PTX_EITHER(__builtin_ctz(bits), __ffs(int(bits)) - 1);
}

// High half of a 32 x 32 bit product.
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) {
    return PTX_EITHER(uint32_t(uint64_t(a) * b >> 32), __umulhi(a, b));
}

__device__ __forceinline__ uint32_t float_bits(float x) {
    uint32_t u;
    PTX_EITHER(memcpy(&u, &x, 4), u = __float_as_uint(x));
    return u;
}

__device__ __forceinline__ float bits_float(uint32_t u) {
    float x;
    PTX_EITHER(memcpy(&x, &u, 4), x = __uint_as_float(u));
    return x;
}

// 1 / x, to the last bit but one.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    PTX_EITHER(y = 1.0f / x, asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x)));
    return y;
}

// 2^x: one instruction, within 2^-22 of the true value, 0 below the normal numbers.
__device__ __forceinline__ float exp2(float x) {
    float y;
    PTX_EITHER(y = ::exp2f(x), asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)));
    return PTX_EITHER(y < 1.17549435e-38f ? 0.0f : y, y);
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

// The turn is `next` from here on: one thread says so, behind a barrier after its block's writes.
__device__ __forceinline__ void turn_pass(uint32_t* turn, uint32_t next PTX_AND_AT) {
    PTX_EITHER(::sim::turn_pass(turn, next, at),
               asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(next) : "memory"));
}

// A place in shared memory, as instructions name it.
__device__ __forceinline__ uint32_t address(const void* shared PTX_AND_AT) {
    return PTX_EITHER(::sim::shared_address(shared, at), uint32_t(__cvta_generic_to_shared(shared)));
}

// -- asynchronous copies to shared memory ----

// 16 bytes; the last `zeros` of them are 0 instead of read.
__device__ __forceinline__ void copy_async(void* to, const void* from, int zeros PTX_AND_AT) {
    PTX_EITHER(::sim::copy_async(to, from, 16, zeros, at),
               asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                            ::"r"(address(to)), "l"(from), "r"(16 - zeros) : "memory"));
}

__device__ __forceinline__ void copy_commit() {
    PTX_EITHER(::sim::copy_commit(), asm volatile("cp.async.commit_group;" ::: "memory"));
}

// Until at most `PENDING` of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait(PTX_AT) {
    PTX_EITHER(::sim::copy_wait(PENDING, at), asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"));
}

// -- barriers that count arrivals in shared memory ----

// One thread initialises; then a block barrier.
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int arrivals PTX_AND_AT) {
    PTX_EITHER(::sim::mbarrier_init(bar, arrivals, at),
               asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(arrivals) : "memory"));
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar PTX_AND_AT) {
    PTX_EITHER(::sim::mbarrier_arrive(bar, at),
               asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}"
                            ::"r"(address(bar)) : "memory"));
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
    uint32_t done = 0;
    while (!done) {
        asm volatile("{\n.reg .pred p;\n" PTX_WAIT ".parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(address(bar)), "r"(parity) : "memory");
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
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address(row)) : "memory");
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
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address(row)) : "memory");
#endif
}

// D += A B, A [16, 16] and B [16, 8] in bf16, D [16, 8] in f32. Of lane l, with r = l / 4 and c = 2
// (l % 4): a[0] = A[r, c..], a[1] = A[r + 8, c..], a[2] = A[r, c + 8..], a[3] = A[r + 8, c + 8..];
// b[0] = B[c.., r], b[1] = B[c + 8.., r]; d = D[r, c..] and D[r + 8, c..], two each.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_AND_AT) {
#ifdef WARPO_SIM
    const ::sim::Fragments mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    memcpy(d, host::exchange(::sim::Warp::Mma, mine, at)[lane()].d, sizeof d);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// A tensor in global memory as the TMA unit sees it; the host encodes it. In the simulator the
// bytes are those of sim::Map.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

}  // namespace ptx
