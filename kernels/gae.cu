// Generalised advantages: A_t = delta_t + c A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, c = gamma
// lambda; return_t = A_t + V_t; V and A after a sequence's last token are 0
//   shapes   advantages, returns, rewards, values [tokens] f32; offsets [sequences + 1]
//   tiling   a block a sequence, which it walks from its end, 256 tokens at a time: a scan in each
//            warp (t and t + 1, then 2, 4, 8, 16 apart), then warps in order, then the chunks
//            before
//   memory   reads rewards and values once, writes both outputs once: 16 bytes a token; values are
//            read again one token on, which is meant to hit L1
//   numerics f64, one rounding on the way out; the order of additions is that of the tokens'
//            distance from their sequence's end: bits do not depend on where a sequence lies
//   needs    offsets that ascend and stay inside the columns: the op checks. Sequences begin at any
//            token, so a lane takes one token: a warp's access is 128 bytes in a row, but not 16 a
//            thread
#include "include/kernel.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

KERNEL(THREADS, gae_forward)(float* advantages, float* returns, const float* rewards, const float* values, const uint32_t* offsets,
                             float gamma, float lambda) {
    Shared shared;
    double* room = shared.take<double>(WARPS);
    const int lane = ptx::lane(), warp = threadIdx.x / 32;
    const double g = gamma, c = g * lambda;
    // c^(lane + 1), and c^32: what an advantage is worth that many tokens before.
    double weight = c, power = c;
    for (int d = 1; d < 32; d *= 2, power *= power) {
        if (lane & d) weight *= power;
    }
    const int64_t start = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
    double carry = 0.0;
    for (int64_t chunk = end; chunk > start; chunk -= THREADS) {
        const int64_t t = chunk - 1 - threadIdx.x;
        double a = 0.0, value = 0.0;
        if (t >= start) {
            value = values[t];
            a = rewards[t] + g * (t + 1 < end ? double(values[t + 1]) : 0.0) - value;
        }
        double step = c;
        for (int d = 1; d < 32; d *= 2, step *= step) {
            const double later = ptx::shuffle_up(a, d);
            if (lane >= d) a += step * later;
        }
        if (lane == 31) room[warp] = a;
        __syncthreads();
        double before = carry;
        for (int w = 0; w < WARPS; ++w) {
            if (w == warp) a += weight * before;
            before = room[w] + power * before;
        }
        carry = before;
        if (t >= start) {
            advantages[t] = float(a);
            returns[t] = float(a + value);
        }
        // Nobody may write the room again before all have read it.
        __syncthreads();
    }
}
