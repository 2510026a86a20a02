// PPO's policy loss: max(-A rho, -A clip(rho, low, high)), at most -A dual for A < 0, rho = e^(logp
// - old); plus kl_coef k(logp, ref), times rho if unbiased, minus entropy_coef entropy; d/dlogp and
// d/dentropy
//   shapes   all columns [tokens] f32; ref_logp null without a KL term, entropy and dentropy null
//            where there are none; partial [blocks, 9] f64 in the order of the constants below;
//            scale = 1 / denominator; dual is infinite where it is off
//   tiling   4 tokens a thread at a time, `share` tokens a block; sums.cu adds the blocks
//   memory   one pass, everything read and written once: 16 bytes a token, 4 more with a KL term, 4
//            with entropies, 4 with their gradient
//   numerics f64 from the loads on, as on the CPU: where logp = old, rho is 1 and approx_kl 0
//            exactly; a tie outside the range has half the slope, as torch.max; sums in an order of
//            the number of tokens only, a NaN stays in the maximum
//   needs    a share of whole packets. Columns begin anywhere, and are accessed 16 bytes at once
//            where that is possible
#include "include/kl.cuh"
#include "include/tokens.cuh"

constexpr int THREADS = 256;
constexpr int LOSS = 0, POLICY = 1, KL = 2, ENTROPY = 3, CLIPPED_LOW = 4, CLIPPED_HIGH = 5, DUAL_CLIPPED = 6, APPROX_KL = 7;
constexpr int SUMS = 8, MAX_LOG_RATIO = 8;

// The clipped surrogate and its derivative in logp.
struct Clipped {
    double loss, slope;
};

static __device__ __forceinline__ Clipped clipped(double a, double ratio, double low, double high, double (&sums)[SUMS + 1]) {
    const double free = -a * ratio;
    if (ratio >= low && ratio <= high) return {free, free};
    const double bound = -a * (ratio < low ? low : high);
    if (bound > free) {
        sums[CLIPPED_LOW] += ratio < low ? 1.0 : 0.0;
        sums[CLIPPED_HIGH] += ratio < low ? 0.0 : 1.0;
        return {bound, 0.0};
    }
    return {free, bound < free || ratio != ratio ? free : 0.5 * free};
}

KERNEL(THREADS, ppo_loss_forward)(float* dlogp, OPTIONAL float* dentropy, double* partial, const float* logp, const float* old_logp,
                                  OPTIONAL const float* ref_logp, OPTIONAL const float* entropy, const float* advantages, int tokens,
                                  int share, double low, double high, double dual, int estimator, int unbiased, double kl_coef,
                                  double entropy_coef, double scale) {
    double sums[SUMS + 1] = {};
    each_four(tokens, share, [&](int64_t i) {
        const Packet<float> now = load_tokens(logp, i, tokens), old = load_tokens(old_logp, i, tokens);
        const Packet<float> adv = load_tokens(advantages, i, tokens);
        Packet<float> ref = {}, ent = {}, d, dent;
        if (ref_logp != nullptr) ref = load_tokens(ref_logp, i, tokens);
        if (entropy != nullptr) ent = load_tokens(entropy, i, tokens);
        for (int j = 0; j < EACH; ++j) {
            // Beyond the last token all columns are 0, and so is what they add to the sums.
            const double log_ratio = double(now.x[j]) - double(old.x[j]), ratio = exp(log_ratio), a = adv.x[j];
            auto [loss, slope] = clipped(a, ratio, low, high, sums);
            if (a < 0.0 && loss > -a * dual) {
                loss = -a * dual;
                slope = 0.0;
                sums[DUAL_CLIPPED] += 1.0;
            }
            sums[POLICY] += loss;
            if (ref_logp != nullptr) {
                const auto [k, dk] = kl(estimator, double(now.x[j]) - double(ref.x[j]));
                sums[KL] += k;
                // The value of the weighted estimate is rho k; its gradient rho (dk + k).
                loss += kl_coef * (unbiased ? ratio * k : k);
                slope += kl_coef * (unbiased ? ratio * (dk + k) : dk);
            }
            if (entropy != nullptr) {
                sums[ENTROPY] += ent.x[j];
                loss -= entropy_coef * ent.x[j];
            }
            sums[LOSS] += loss * scale;
            sums[APPROX_KL] += ratio - 1.0 - log_ratio;
            sums[MAX_LOG_RATIO] = Max::of(sums[MAX_LOG_RATIO], fabs(log_ratio));
            d.x[j] = float(slope * scale);
            dent.x[j] = float(-entropy_coef * scale);
        }
        store_tokens(dlogp, i, tokens, d);
        if (dentropy != nullptr) store_tokens(dentropy, i, tokens, dent);
    });
    write_sums<SUMS, 1>(partial, sums);
}
