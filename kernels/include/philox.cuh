// Philox 4x32-10 (Salmon et al. 2011), bit for bit as src/rng.rs: a number is a function of its
// address (seed, step, sample, position, purpose) and of nothing else.
#pragma once

#include "kernel.cuh"

// Four independent words.
struct Philox {
    uint32_t word[4];
};

// Ten rounds over a 128-bit counter.
__device__ __forceinline__ Philox philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = ptx::multiply_high(M0, c0), low0 = M0 * c0;
        const uint32_t high1 = ptx::multiply_high(M1, c2), low1 = M1 * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += W0;
        k1 += W1;
    }
    return Philox{{c0, c1, c2, c3}};
}

// What the draws of a launch share.
struct Stream {
    uint64_t seed, step;
    uint32_t purpose;
};

// The words at an address; of `step` the low 28 bits, as the purpose takes the other 4.
__device__ __forceinline__ Philox draw(const Stream& stream, uint64_t sample, uint32_t position) {
    const uint32_t where = (uint32_t(stream.step) & 0x0FFFFFFF) | stream.purpose << 28;
    return philox4x32(position, where, uint32_t(sample), uint32_t(sample >> 32), stream.seed);
}

// Uniform in [0, 1) with 24 bits, exact in f32.
__device__ __forceinline__ float uniform(const Stream& stream, uint64_t sample, uint32_t position) {
    return float(draw(stream, sample, position).word[0] >> 8) * (1.0f / 16777216.0f);
}
