// A loss over sequences: a functor computes the derivatives and sums of a unit of sequences from
// their log-probs, summed over tokens; `sequence_loss` makes these sums, writes the gradients of
// tokens, and reduces the sums of units
//   shapes   logp, ref_logp, weights, dlogp [tokens] f32; offsets [UNIT units + 1]; single [units]
//            f32; partial [blocks, SUMS + MAXIMA] f64. ref_logp, weights and single may be null:
//            0, 1 and 0 then
//   tiling   a block a unit at a time, `share` units a block; a thread takes tokens 256 apart;
//            sums.cu adds the blocks
//   memory   reads every column once to sum, weights once more to write dlogp: 12 bytes a token,
//            16 with a reference, 24 with weights
//   numerics f64 from the loads on, one rounding on the way out; sums in an order of the sequence's
//            length only, then of the number of units
//   needs    offsets that ascend and stay inside the columns: the op checks. Sequences begin at any
//            token, so a lane takes one token
// src/ops/sequence_loss.rs says how to add a loss.
#pragma once

#include "columns.cuh"

constexpr int THREADS = 256;

// The log-probs of a sequence: sum_t w_t (logp_t - ref_t), sum_t logp_t, and its tokens.
struct SequenceSums {
    double ratio, logp, tokens;
};

// d loss / d each of the first two.
struct SequenceGrads {
    double ratio, logp;
};

// What a functor derives from. It returns derivatives, then sums in the order of the struct in
// Rust, then maxima, of numbers of at least 0.
template <int UNIT_, int SUMS_, int MAXIMA_ = 0>
struct SequenceLoss {
    static constexpr int UNIT = UNIT_, SUMS = SUMS_, MAXIMA = MAXIMA_;
    struct Result {
        SequenceGrads grads[UNIT];
        double sums[SUMS + MAXIMA];
    };
};

struct SequenceColumns {
    float* dlogp;
    const float *logp, *ref_logp, *weights;
    const uint32_t* offsets;
};

template <class L>
__device__ __forceinline__ void sequence_loss(const L& loss, const SequenceColumns& at, const float* single, double* partial,
                                              int units, int share) {
    Shared shared;
    // Room for the sums at the end.
    double* room = shared.take<double>(THREADS / 32 * (L::SUMS + L::MAXIMA));
    double sums[L::SUMS + L::MAXIMA] = {};
    const int64_t first = int64_t(blockIdx.x) * share, last = first + share < units ? first + share : units;
    for (int64_t u = first; u < last; ++u) {
        SequenceSums x[L::UNIT];
#pragma unroll
        for (int k = 0; k < L::UNIT; ++k) {
            const int64_t start = at.offsets[u * L::UNIT + k], end = at.offsets[u * L::UNIT + k + 1];
            double ratio = 0.0, all = 0.0;
            for (int64_t t = start + threadIdx.x; t < end; t += THREADS) {
                const double logp = at.logp[t], ref = at.ref_logp == nullptr ? 0.0 : double(at.ref_logp[t]);
                all += logp;
                ratio += (at.weights == nullptr ? 1.0 : double(at.weights[t])) * (logp - ref);
            }
            x[k].ratio = block_reduce<Sum>(ratio, room);
            x[k].logp = block_reduce<Sum>(all, room);
            x[k].tokens = double(end - start);
        }
        const typename L::Result result = loss(x, single == nullptr ? 0.0 : double(single[u]));
#pragma unroll
        for (int k = 0; k < L::UNIT; ++k) {
            const int64_t start = at.offsets[u * L::UNIT + k], end = at.offsets[u * L::UNIT + k + 1];
            for (int64_t t = start + threadIdx.x; t < end; t += THREADS) {
                const double weight = at.weights == nullptr ? 1.0 : double(at.weights[t]);
                at.dlogp[t] = float(weight * result.grads[k].ratio + result.grads[k].logp);
            }
        }
        if (threadIdx.x > 0) continue;
        for (int k = 0; k < L::SUMS; ++k) sums[k] += result.sums[k];
        for (int k = L::SUMS; k < L::SUMS + L::MAXIMA; ++k) sums[k] = Max::of(sums[k], result.sums[k]);
    }
    write_sums<L::SUMS, L::MAXIMA>(partial, sums);
}
