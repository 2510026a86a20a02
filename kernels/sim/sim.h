// The simulator, seen from a kernel: CUDA's vocabulary for the host compiler. Force-included before
// each .cu file, so kernels have no line for it.
//
// Each CUDA thread is a fibre; sim.cpp runs them in a seeded order and switches at every barrier,
// warp exchange and wait. What an instruction does is in include/ptx.cuh, beside its device form.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define WARPO_SIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
// Static shared memory has no redzones: kernels carve theirs from the launch's
// (include/kernel.cuh).
#define __shared__ _Pragma("GCC error \"__shared__ is not simulated: carve dynamic shared memory\"")

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace sim {

// Where in the source a thread waits, for reports.
struct Site {
    const char* file;
    int line;
    // As the default of a parameter: where the function is called.
    constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};
#define SIM_SITE (::sim::Site{__FILE__, __LINE__})

// Where the running thread stands.
struct Place {
    uint3 thread_index, block_index;
    dim3 block_size, grid_size;
};
// One of each host thread, at an address that is known when the library is loaded.
extern __thread const Place* here __attribute__((tls_model("initial-exec")));

// All threads of the block, or `threads` of them at a numbered barrier.
void barrier(Site site, int id = 0, int threads = 0);
void barrier_arrive(Site site, int id, int threads);

// What the lanes of a warp do together. All lanes of `mask` call it with the same kind; each brings
// a value of `bytes` and gets the 32 of them, which stay until it calls again.
constexpr size_t MAX_VALUE = 64;
using Values = char[32][MAX_VALUE];
enum class Warp { Sync, Shuffle, Vote, Mma, Matrix, Elect };
const Values& exchange(Warp kind, unsigned mask, const void* value, size_t bytes, Site site);

// What a lane brings to Warp::Mma: ptx::mma_bf16's operands. The last lane that comes computes the
// product of all.
struct Fragments {
    float d[4];
    uint32_t a[4], b[2];
};

// An mbarrier: `arrivals` arrivals complete a phase.
void mbarrier_init(uint64_t* bar, int arrivals, Site site);
void mbarrier_arrive(uint64_t* bar, Site site);
void mbarrier_wait(uint64_t* bar, int parity, Site site);

// A number in global memory that says whose turn it is, for blocks that run together.
void turn_wait(const uint32_t* turn, uint32_t mine, Site site);
void turn_pass(uint32_t* turn, uint32_t next, Site site);

// cp.async: the copy happens as late as allowed, at the wait; until then the destination is NaN.
void copy_async(void* to, const void* from, size_t bytes, size_t zeros, Site site);
void copy_commit();
void copy_wait(int pending, Site site);

// -- Hopper ----------------------------------------

void fence_barrier_init();
void mbarrier_expect(uint64_t* bar, int bytes, Site site);
void mbarrier_arrive_at(uint64_t* bar, int rank, Site site);

// A tensor map's 128 bytes.
struct Map {
    uint64_t base;
    uint32_t element_bytes, rank;
    // From the innermost out: elements; bytes between neighbours.
    uint64_t dims[4], strides[4];
    uint32_t box[4];
    // 0, 32, 64 or 128 bytes.
    uint32_t swizzle;
    char unused[28];
};
static_assert(sizeof(Map) == 128);

// Where a box begins, from the innermost dimension out.
struct Corner {
    int rank;
    int at[3];
};

// TMA: the copy happens at a random time, at the latest when all threads wait; until then the
// destination is NaN. `blocks`: of the cluster; 0 is this one.
void tma_load(void* to, const void* map, Corner corner, uint64_t* bar, unsigned blocks, Site site);
// The source is read at the wait for it, and global memory written at the wait for that or at the
// end.
void tma_store(const void* map, int x, int y, const void* from, Site site);
void tma_store_commit();
void tma_store_wait(int pending, bool written, Site site);
void fence_async();

int cluster_rank();
void cluster_sync(Site site);
void registers(int count, bool up, Site site);
bool elect(Site site);

// What a descriptor holds: bytes from the start of the block's shared memory.
uint32_t shared_address(const void* p, Site site);

// wgmma: products are computed at the first wait for them; until its own wait each thread's
// accumulators are NaN.
struct Product {
    float* d;
    int count;             // of accumulators a thread
    const uint32_t* regs;  // A in registers, or null
    uint64_t a, b;
    bool add, a_columns, b_columns;
};
void wgmma_fence(Site site);
void wgmma(const Product& product, Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);

// Region `index` of the block's shared memory, at `offset` of the launch's bytes; redzones lie
// between.
void* carve(int index, size_t offset, size_t bytes, Site site);

// Stops the launch with a report.
[[noreturn]] void fail(const char* what, Site site);

// Checks the alignment of an access of `bytes`.
inline void aligned(const void* p, size_t bytes, Site site) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned packet", site);
}

// Kernels by name, with a function that unpacks the driver's arguments.
using Call = void (*)(void** args);
void enter(const char* name, int threads, Call call, int cluster = 1, int beside = 1);

template <auto F>
struct Unpack;
template <class... A, void (*F)(A...)>
struct Unpack<F> {
    static void call(void** args) { call(args, std::index_sequence_for<A...>{}); }
    template <size_t... I>
    static void call(void** args, std::index_sequence<I...>) {
        F(read<A>(args[I])...);
    }
    // The driver's caller aligns nothing.
    template <class T>
    static T read(const void* p) {
        T x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
};

struct Entry {
    Entry(const char* name, Call call, int threads, int cluster = 1, int beside = 1) {
        enter(name, threads, call, cluster, beside);
    }
};
// Written by the tests for every KERNEL line: its threads, the blocks of its cluster, and those
// that share registers.
#define SIM_ENTER(name, ...) static ::sim::Entry sim_entry_##name(#name, &::sim::Unpack<&name>::call, __VA_ARGS__);

}  // namespace sim

#define threadIdx (::sim::here->thread_index)
#define blockIdx (::sim::here->block_index)
#define blockDim (::sim::here->block_size)
#define gridDim (::sim::here->grid_size)
#define __syncthreads() ::sim::barrier(SIM_SITE)
