// Kernels with one mistake each, to show that the simulator (and on a GPU, compute-sanitizer) finds
// it. The test names for each who must speak up. `fault` 0 is the kernel without its mistake, which
// must be clean.
#include "../include/reduce.cuh"

// y[i] = x[255 - i] through shared memory. 1: no barrier between write and read.
KERNEL(256, fault_missing_barrier)(float* y, const float* x, int fault) {
    Shared shared;
    float* room = shared.take<float>(256);
    room[threadIdx.x] = x[threadIdx.x];
    if (fault == 0) __syncthreads();
    y[threadIdx.x] = room[255 - threadIdx.x];
}

// 1: reads one element past the end of a shared array.
KERNEL(64, fault_off_by_one)(float* y, const float* x, int fault) {
    Shared shared;
    float* room = shared.take<float>(64);
    room[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const int i = threadIdx.x + fault;
    y[threadIdx.x] = room[fault == 0 ? i % 64 : i];
}

// The sum of a warp, from lane 0. 1: takes it from a lane that a one-way reduction leaves half
// done.
KERNEL(32, fault_wrong_lane)(float* y, const float* x, int fault) {
    float s = x[threadIdx.x];
    for (int d = 16; d > 0; d /= 2) s += ptx::shuffle_down(s, d);
    y[threadIdx.x] = ptx::shuffle(s, fault);
}

// A copy of 16 bytes a thread through cp.async. 1: the copy is committed, but not waited for before
// use.
KERNEL(32, fault_missing_wait)(float* y, const float* x, int fault) {
    Shared shared;
    float* room = shared.take<float>(128);
    ptx::copy_async(room + 4 * threadIdx.x, x + 4 * threadIdx.x, 0);
    ptx::copy_commit();
    if (fault == 0) ptx::copy_wait<0>();
    store(y, threadIdx.x, load(room, threadIdx.x));
    if (fault != 0) ptx::copy_wait<0>();
}

// 1: half of the lanes pass a barrier that the others never reach.
KERNEL(64, fault_divergent_barrier)(float* y, const float* x, int fault) {
    if (fault == 0 || threadIdx.x % 2 == 0) __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

// Each block sums 64 numbers. 1: all blocks add to one float of global memory, without order.
KERNEL(64, fault_global_race)(float* y, const float* x, int fault) {
    Shared shared;
    float* room = shared.take<float>(2);
    const float s = block_reduce<Sum>(x[blockIdx.x * 64 + threadIdx.x], room);
    // All threads of a block write the same value in the faulty form: a race that shared memory has
    // no part in.
    if (fault == 0 && threadIdx.x == 0) y[blockIdx.x] = s;
    if (fault != 0) y[blockIdx.x] = y[blockIdx.x] * 0.0f + s + threadIdx.x;
}

// 1: leaves the last element unwritten.
KERNEL(64, fault_unwritten_output)(float* y, const float* x, int fault) {
    if (int(threadIdx.x) < 64 - fault) y[threadIdx.x] = x[threadIdx.x];
}

// 1: packets begin at an address that is no multiple of 16.
KERNEL(32, fault_misaligned_packet)(float* y, const float* x, int fault) {
    store(y, threadIdx.x, load(x + fault, threadIdx.x));
}

// y [16, 8] = A B for A [16, 16] and B [8, 16] (its rows are columns). 1: a[1] and a[2] in each
// other's place.
KERNEL(32, fault_wrong_fragment)(float* y, const bf16* a, const bf16* b, int fault) {
    const int r = threadIdx.x / 4, c = threadIdx.x % 4 * 2;
    auto two = [](const bf16* p) { return p[0].bits | uint32_t(p[1].bits) << 16; };
    uint32_t fa[4] = {two(a + r * 16 + c), two(a + (r + 8) * 16 + c), two(a + r * 16 + c + 8), two(a + (r + 8) * 16 + c + 8)};
    const uint32_t fb[2] = {two(b + r * 16 + c), two(b + r * 16 + c + 8)};
    if (fault != 0) {
        const uint32_t swap = fa[1];
        fa[1] = fa[2];
        fa[2] = swap;
    }
    float d[4] = {};
    ptx::mma_bf16(d, fa, fb);
    for (int i = 0; i < 4; ++i) y[(r + i / 2 * 8) * 8 + c + i % 2] = d[i];
}

// y[i] = 4 x[i] + 2 x[64 + i] + x[128 + i]: three blocks in turn, each a thread a number.
enum { MISSING = 1, EARLY, LOST };
static __device__ void add_in_turn(float* y, const float* x, uint32_t* turn, int mistake) {
    const uint32_t mine = blockIdx.x;
    if (mine > 0 && threadIdx.x == 0 && mistake != MISSING) ptx::turn_wait(turn, mine);
    __syncthreads();
    const float before = mine > 0 ? 2.0f * y[threadIdx.x] : 0.0f;
    y[threadIdx.x] = before + x[64 * mine + threadIdx.x];
    if (mistake != EARLY) __syncthreads();
    if (threadIdx.x == 0 && mistake != LOST) ptx::turn_pass(turn, mine + 1);
}

// 1: does not wait for its turn.
KERNEL(64, fault_missing_turn)(float* y, const float* x, uint32_t* turn, int fault) { add_in_turn(y, x, turn, fault * MISSING); }

// 1: passes the turn before all threads of the block have written.
KERNEL(64, fault_early_turn)(float* y, const float* x, uint32_t* turn, int fault) { add_in_turn(y, x, turn, fault * EARLY); }

// 1: never passes the turn.
KERNEL(64, fault_lost_turn)(float* y, const float* x, uint32_t* turn, int fault) { add_in_turn(y, x, turn, fault * LOST); }

// 1: the launch does not say that its blocks run together.
KERNEL(64, fault_turn_apart)(float* y, const float* x, uint32_t* turn, int fault) { add_in_turn(y, x, turn, 0); }
