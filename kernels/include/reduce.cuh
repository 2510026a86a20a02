// Sums and maxima of a warp and of a block, each in one fixed order: two runs give equal bits.
#pragma once

#include "kernel.cuh"

struct Sum {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return a + b;
    }
};
// NaN wins, so that a bad number is not dropped.
struct Max {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return a > b || a != a ? a : b;
    }
};

// The same value in all lanes: lanes 16 apart first, then 8, 4, 2, 1.
template <class Op, class T>
__device__ __forceinline__ T warp_reduce(T x) {
    for (int d = 16; d > 0; d /= 2) x = Op::of(x, ptx::shuffle_xor(x, d));
    return x;
}

// The sum over this lane and those before it, of whole numbers.
__device__ __forceinline__ int warp_scan(int x) {
    for (int d = 1; d < 32; d *= 2) {
        const int before = ptx::shuffle_up(x, d);
        if (ptx::lane() >= d) x += before;
    }
    return x;
}

// The same value in all threads; `room` holds a number for each warp. Warps are added in ascending
// order. All threads of the block call it.
template <class Op, class T>
__device__ __forceinline__ T block_reduce(T x, T* room) {
    x = warp_reduce<Op>(x);
    const int warps = blockDim.x / 32;
    if (warps == 1) return x;
    if (ptx::lane() == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = room[0];
    for (int w = 1; w < warps; ++w) x = Op::of(x, room[w]);
    // Nobody may write the room again before all have read it.
    __syncthreads();
    return x;
}

// Sums over the `group` threads of a row, the same in all of them; a group is a power of two from
// 32 to blockDim, groups lie side by side, and their warps are added in ascending order. `room`
// holds K floats for each warp. All threads of the block call it.
template <int K>
__device__ __forceinline__ void group_sum(float (&x)[K], int group, float* room) {
    for (int k = 0; k < K; ++k) x[k] = warp_reduce<Sum>(x[k]);
    if (group == 32) return;
    const int warp = threadIdx.x / 32, first = threadIdx.x / group * (group / 32);
    if (ptx::lane() == 0) {
        for (int k = 0; k < K; ++k) room[warp * K + k] = x[k];
    }
    __syncthreads();
    for (int k = 0; k < K; ++k) x[k] = 0.0f;
    for (int w = 0; w < group / 32; ++w) {
        for (int k = 0; k < K; ++k) x[k] += room[(first + w) * K + k];
    }
    // Nobody may write the room again before all have read it.
    __syncthreads();
}
