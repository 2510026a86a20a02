// Log-sum-exp of a row's logits as its parts come along: the same order, and so the same bits, in
// every kernel of the LM head. Of each 128 columns lane c of 4 takes 8 j + 2 c and the next, j
// ascending: what a lane has of the sums of mma and of wgmma.
#pragma once

#include "kernel.cuh"

// Columns whose log-sum-exp is written: of a row, the partials are merged in the end.
constexpr int CHUNK = 1024;
// Columns that a lane reduces at once.
constexpr int COLUMNS = 128;

constexpr float LOG2E = 1.4426950408889634f;

// e^x, within 2^-22 of 1 for x <= 0.
static __device__ __forceinline__ float power(float x) { return ptx::exp2(x * LOG2E); }

// What z is made of x by; cap 0 is none.
struct Scaling {
    float scale, cap, inverse;
    __device__ __forceinline__ Scaling(float scale, float cap) : scale(scale), cap(cap), inverse(cap > 0.0f ? 1.0f / cap : 0.0f) {}
    // cap tanh(x / cap): all but the temperature.
    __device__ __forceinline__ float bend(float x) const { return cap * tanhf(x * inverse); }
};

// Log-sum-exp of a part of a row.
struct State {
    float top = -INFINITY, sum = 0.0f, weighted = 0.0f, target = 0.0f;

    // Moves the maximum up to `to`. A part that is empty so far has sums of 0.
    __device__ __forceinline__ void raise(float to) {
        const float moved = top == -INFINITY ? 0.0f : top - to, keep = power(moved);
        weighted = fmaf(sum, moved, weighted) * keep;
        sum *= keep;
        top = to;
    }
    // The same bits whichever is added to the other.
    __device__ __forceinline__ void add(State other) {
        const float to = fmaxf(top, other.top);
        raise(to);
        other.raise(to);
        sum += other.sum;
        weighted += other.weighted;
        target += other.target;
    }
};

static __device__ __forceinline__ State shuffle_xor(const State& s, int lanes) {
    State out;
    out.top = ptx::shuffle_xor(s.top, lanes);
    out.sum = ptx::shuffle_xor(s.sum, lanes);
    out.weighted = ptx::shuffle_xor(s.weighted, lanes);
    out.target = ptx::shuffle_xor(s.target, lanes);
    return out;
}

static __device__ __forceinline__ void store_partial(float* partial, int64_t at, const State& s) {
    store(partial, at, Packet<float>{{s.top, s.sum, s.weighted, s.target}});
}

static __device__ __forceinline__ State load_partial(const float* partial, int64_t at) {
    const Packet<float> p = load(partial, at);
    State s;
    s.top = p.x[0], s.sum = p.x[1], s.weighted = p.x[2], s.target = p.x[3];
    return s;
}

// Writes number `at` of the parts, of which each of four lanes has a share.
template <class S>
static __device__ __forceinline__ void write_part(float* partial, int64_t at, S& s, bool there) {
    for (int lanes = 1; lanes < 4; lanes *= 2) s.add(shuffle_xor(s, lanes));
    if (threadIdx.x % 4 == 0 && there) store_partial(partial, at, s);
}

// The whole of a row, in all lanes of a warp, from its chunks' parts.
template <class S, class F>
static __device__ __forceinline__ S merge_parts(int vocab, F part) {
    S s;
    for (int c = ptx::lane(); c < (vocab + CHUNK - 1) / CHUNK; c += 32) s.add(part(c));
    for (int lanes = 16; lanes > 0; lanes /= 2) s.add(shuffle_xor(s, lanes));
    return s;
}

// One lane's columns of a tile of COLUMNS.
struct Lane {
    static constexpr int COUNT = COLUMNS / 4;
    // Column of a lane's number q.
    static __device__ __forceinline__ int column(int q) { return q / 2 * 8 + threadIdx.x % 4 * 2 + q % 2; }
};

// Adds a lane's share x of a tile, of which `count` columns are in the vocabulary. `target` counts
// from the tile's first column. NaN passes through the sum.
template <bool WHOLE>
static __device__ __forceinline__ void visit(State& s, const float (&x)[Lane::COUNT], int count, uint32_t target, float scale) {
    float top = -INFINITY;
#pragma unroll
    for (int q = 0; q < Lane::COUNT; ++q) top = fmaxf(top, WHOLE || Lane::column(q) < count ? x[q] : -INFINITY);
    // Rounding is monotonic: the largest product is the product of the largest.
    s.raise(fmaxf(s.top, top * scale));
    float sum = 0.0f, weighted = 0.0f;
#pragma unroll
    for (int q = 0; q < Lane::COUNT; ++q) {
        if (!WHOLE && Lane::column(q) >= count) continue;
        const float z = x[q] * scale - s.top, e = power(z);
        sum += e;
        weighted = fmaf(e, z, weighted);
    }
    s.sum += sum;
    s.weighted += weighted;
    if (target < uint32_t(COLUMNS)) {
#pragma unroll
        for (int q = 0; q < Lane::COUNT; ++q) {
            if (uint32_t(Lane::column(q)) == target) s.target = x[q] * scale;
        }
    }
}

static __device__ __forceinline__ void reduce(State& s, float (&x)[Lane::COUNT], int count, uint32_t target, const Scaling& by) {
    if (by.cap > 0.0f) {
#pragma unroll
        for (int q = 0; q < Lane::COUNT; ++q) x[q] = by.bend(x[q]);
    }
    if (count >= COLUMNS) {
        visit<true>(s, x, count, target, by.scale);
    } else {
        visit<false>(s, x, count, target, by.scale);
    }
}
