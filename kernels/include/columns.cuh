// What the losses share: columns of one float a token, and sums over all tokens in f64. A block has
// a share of the tokens and leaves a row of partial sums, which sums.cu adds up. The share is an
// argument that depends on the number of tokens only, and so does which numbers are added in which
// order.
#pragma once

#include "reduce.cuh"

// Tokens that a thread takes at once.
constexpr int EACH = Packet<float>::WIDTH;

// f(i) for tokens i to i + 3 of the block's share, which is whole packets but for the last.
template <class F>
__device__ __forceinline__ void each_four(int tokens, int share, F f) {
    const int64_t start = int64_t(blockIdx.x) * share, end = start + share < tokens ? start + share : tokens;
    for (int64_t i = start + int64_t(threadIdx.x) * EACH; i < end; i += blockDim.x * EACH) f(i);
}

// Whether the 4 tokens from i can be accessed at once: a micro-batch may begin at any token.
__device__ __forceinline__ bool whole(const float* x, int64_t i, int tokens) {
    return i + EACH <= tokens && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// The 4 tokens from i, 0 beyond the last.
__device__ __forceinline__ Packet<float> load_tokens(const float* x, int64_t i, int tokens) {
    if (whole(x, i, tokens)) return load(x, i / EACH);
    Packet<float> out;
    for (int j = 0; j < EACH; ++j) out.x[j] = i + j < tokens ? x[i + j] : 0.0f;
    return out;
}

__device__ __forceinline__ void store_tokens(float* x, int64_t i, int tokens, const Packet<float>& v) {
    if (whole(x, i, tokens)) return store(x, i / EACH, v);
    for (int j = 0; j < EACH; ++j) {
        if (i + j < tokens) x[i + j] = v.x[j];
    }
}

// Writes the block's row of `partial`: x over all its threads, SUMS sums, then MAXIMA maxima of
// what is at least 0.
template <int SUMS, int MAXIMA = 0>
__device__ __forceinline__ void write_sums(double* partial, double (&x)[SUMS + MAXIMA]) {
    constexpr int N = SUMS + MAXIMA;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, i = threadIdx.x;
    Shared shared;
    double* room = shared.take<double>(warps * N);
    for (int k = 0; k < N; ++k) {
        x[k] = k < SUMS ? warp_reduce<Sum>(x[k]) : warp_reduce<Max>(x[k]);
        if (ptx::lane() == 0) room[warp * N + k] = x[k];
    }
    __syncthreads();
    if (i >= N) return;
    double all = room[i];
    for (int w = 1; w < warps; ++w) all = i < SUMS ? Sum::of(all, room[w * N + i]) : Max::of(all, room[w * N + i]);
    partial[int64_t(blockIdx.x) * N + i] = all;
}
