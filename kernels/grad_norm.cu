// The norm of the gradients: sum_i x[i]^2; and the least i whose x[i] is NaN or infinite.
//   shapes   x [n] f32; partial [parts], total [1] f64; index [1] u64, 2^64 - 1 if all are finite
//   tiling   squares: a block a part of `groups` groups of 256 chunks, 4 threads a chunk; thread t
//            of a chunk owns packets t, t + 4, ... bad: a warp a chunk, 8 chunks a block
//   memory   reads x once, 4 bytes an element
//   numerics as the CPU adds, so the same bits: element i in lane i % 16 of its chunk, fused; the
//            lanes as a tree, in f32; the chunks of a group in order, the groups of a part, then
//            the parts, in f64. Parts depend on n alone. The least index is the same in any order
//   needs    x 16-byte aligned; n may be any number
#include "include/kernel.cuh"

constexpr int CHUNK = 4096;
constexpr int GROUP = 256;
constexpr int THREADS = 512;
constexpr int BAD_THREADS = 256;
constexpr int LANES = 16;

using P = Packet<float>;

// Elements of chunk `i` of n; none beyond the last.
static __device__ int length(uint64_t i, uint64_t n) {
    const uint64_t first = i * CHUNK;
    return int(first >= n ? 0 : n - first < CHUNK ? n - first : CHUNK);
}

// The sum of the squares of a chunk of `count` elements, in the first thread of its OWNERS.
static __device__ float squares(const float* from, int count) {
    constexpr int OWNERS = LANES / P::WIDTH;
    const int own = threadIdx.x % OWNERS, packets = count / P::WIDTH;
    float lanes[P::WIDTH] = {};
#pragma unroll 8
    for (int p = own; p < packets; p += OWNERS) {
        const P v = load(from, p);
        for (int j = 0; j < P::WIDTH; ++j) lanes[j] = fmaf(v.x[j], v.x[j], lanes[j]);
    }
    if (packets % OWNERS == own) {
        // Elements that do not fill a packet.
        for (int j = 0; j < count % P::WIDTH; ++j) {
            const float v = from[packets * P::WIDTH + j];
            lanes[j] = fmaf(v, v, lanes[j]);
        }
    }
    // Lane i gets lane i + 8, then i + 4, i + 2, i + 1.
    for (int d = OWNERS / 2; d > 0; d /= 2) {
        for (int j = 0; j < P::WIDTH; ++j) lanes[j] += ptx::shuffle_xor(lanes[j], d);
    }
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

KERNEL(THREADS, grad_norm_squares_f32)(double* partial, PACKED const float* x, uint64_t n, int groups) {
    constexpr int OWNERS = LANES / P::WIDTH, TOGETHER = THREADS / OWNERS;
    Shared shared;
    float* room = shared.take<float>(GROUP);
    double total = 0.0;
    for (int g = 0; g < groups; ++g) {
        const uint64_t first = (uint64_t(blockIdx.x) * groups + g) * GROUP;
        for (int c = threadIdx.x / OWNERS; c < GROUP; c += TOGETHER) {
            const float sum = squares(x + (first + c) * CHUNK, length(first + c, n));
            if (threadIdx.x % OWNERS == 0) room[c] = sum;
        }
        __syncthreads();
        double part = 0.0;
        for (int c = 0; c < GROUP && threadIdx.x == 0; ++c) part += double(room[c]);
        total += part;
        // Nobody may write the room again before all is added.
        __syncthreads();
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

KERNEL(32, grad_norm_sum)(double* total, const double* partial, int parts) {
    if (threadIdx.x != 0) return;
    double sum = 0.0;
#pragma unroll 8
    for (int i = 0; i < parts; ++i) sum += partial[i];
    *total = sum;
}

KERNEL(BAD_THREADS, grad_norm_bad_f32)(uint64_t* index, PACKED const float* x, uint64_t n) {
    const uint64_t chunk = uint64_t(blockIdx.x) * (BAD_THREADS / 32) + threadIdx.x / 32;
    const int count = length(chunk, n), packets = count / P::WIDTH;
    const float* from = x + chunk * CHUNK;
    int first = CHUNK;
    // x * 0 is 0 for every finite x.
    auto look = [&](int i, float v) {
        if (v * 0.0f != 0.0f && i < first) first = i;
    };
#pragma unroll 8
    for (int p = ptx::lane(); p < packets; p += 32) {
        const P v = load(from, p);
        for (int j = 0; j < P::WIDTH; ++j) look(p * P::WIDTH + j, v.x[j]);
    }
    if (ptx::lane() < count % P::WIDTH) {
        const int i = packets * P::WIDTH + ptx::lane();
        look(i, from[i]);
    }
    for (int d = 16; d > 0; d /= 2) {
        const int other = ptx::shuffle_xor(first, d);
        first = other < first ? other : first;
    }
    if (ptx::lane() == 0 && first < CHUNK) ptx::atomic_min(index, chunk * CHUNK + first);
}
