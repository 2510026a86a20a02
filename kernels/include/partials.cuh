// Sums over rows that are kept by columns, such as the gradient of a norm's weights, in two stages
// of one fixed order: each block sums the rows of its share, then a second kernel adds the blocks'
// sums to the gradient. The share is an argument that depends on nothing but the shapes: were it
// made from the number of blocks, a smaller device would give other bits.
#pragma once

#include "elements.cuh"

// Whether a row is fetched while the one before it is summed, so that loads are always under way,
// though only one block fits a multiprocessor. In f32 there are not the registers for it.
template <class T>
constexpr bool AHEAD = sizeof(T) == 2;

// A thread's share of a row of x and of the gradient dy that came to it, packed.
template <int PACKETS>
struct Fetched {
    uint4 x[PACKETS], dy[PACKETS];
};
// From packets `x_at` of x and `dy_at` of dy on.
template <int PACKETS, class T>
__device__ __forceinline__ Fetched<PACKETS> fetch_row(const T* x, int64_t x_at, const T* dy, int64_t dy_at, int packets, int group) {
    Fetched<PACKETS> out;
    for (int i = 0; i < PACKETS; ++i) {
        const int p = threadIdx.x % group + i * group;
        if (p >= packets) continue;
        out.x[i] = fetch(x, x_at + p);
        out.dy[i] = fetch(dy, dy_at + p);
    }
    return out;
}

// out[c] = the sum over the block's groups, in their order, of what they hold: thread `lane` of a
// group of `group` has packets lane, lane + group, ... of its row of sums. `room` holds blockDim /
// group rows of `cols`. All threads of the block call it.
template <int PACKETS, int N>
__device__ __forceinline__ void write_partial(float* out, const Elements<N> (&mine)[PACKETS], float* room, int cols, int group) {
    const int groups = blockDim.x / group, lane = threadIdx.x % group;
    float* own = room + threadIdx.x / group * cols;
    for (int i = 0; i < PACKETS; ++i) {
        const int p = lane + i * group;
        if (p < cols / N) put<N>(own, p, mine[i]);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        float sum = 0.0f;
        for (int g = 0; g < groups; ++g) sum += room[g * cols + c];
        out[c] = sum;
    }
    // Nobody may write the room again before all have read it.
    __syncthreads();
}

// out[c] += the sum over b of partial[b, c], `count` rows of `cols`. A block owns 32 columns, one a
// lane, so that a warp reads whole lines of 128 bytes; warp w adds rows w, w + warps, ..., then
// warps are added in order. `room` holds blockDim floats.
__device__ __forceinline__ void add_partials(float* out, const float* partial, int count, int cols, float* room) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + ptx::lane();
    float sum = 0.0f;
    if (c < cols) {
#pragma unroll 8
        for (int b = warp; b < count; b += warps) sum += partial[int64_t(b) * cols + c];
    }
    room[threadIdx.x] = sum;
    __syncthreads();
    if (warp != 0 || c >= cols) return;
    for (int w = 1; w < warps; ++w) sum += room[w * 32 + ptx::lane()];
    out[c] += sum;
}
