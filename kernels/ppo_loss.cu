// PPO's policy loss: max(-A rho, -A clip(rho, low, high)), at most -A dual for A < 0, rho = e^(logp
// - old); plus kl_coef k(logp, ref), times rho if unbiased, minus entropy_coef entropy; d/dlogp and
// d/dentropy. As all losses over tokens, see include/token_loss.cuh; scale = 1 / denominator; dual
// is infinite where it is off, the estimator is 0 and ref_logp null without a KL term.
#include "include/token_loss.cuh"

// The estimators of src/ops/kl.rs; k3 is the last.
constexpr int K1 = 1, K2 = 2;

struct Kl {
    double value, slope;
};

// The estimate of one token from d = log-prob less that of the reference, in nats, and its
// derivative in the log-prob, the token held fixed.
__device__ __forceinline__ Kl kl(int estimator, double d) {
    if (estimator == K1) return {d, 1.0};
    if (estimator == K2) return {0.5 * d * d, d};
    const double e = exp(-d);
    return {e - 1.0 + d, 1.0 - e};
}

struct PpoLoss : TokenLoss<5, 2, 9, 1> {
    double low, high, dual;
    int estimator, unbiased;
    double kl_coef, entropy_coef, scale;

    __device__ Result operator()(const double* x) const {
        const double logp = x[0], old = x[1], ref = x[2], entropy = x[3], a = x[4];
        const double log_ratio = logp - old, ratio = exp(log_ratio), free = -a * ratio;
        const double bound = -a * (ratio < low ? low : high);
        double loss = free, slope = free, clipped = 0.0, dual_clipped = 0.0, k = 0.0;
        if (!(ratio >= low && ratio <= high)) {
            if (bound > free) {
                loss = bound;
                slope = 0.0;
                clipped = 1.0;
            } else if (!(bound < free || ratio != ratio)) {
                slope = 0.5 * free;  // as torch.max at a tie
            }
        }
        if (a < 0.0 && loss > -a * dual) {
            loss = -a * dual;
            slope = 0.0;
            dual_clipped = 1.0;
        }
        const double policy = loss;
        if (estimator != 0) {
            const auto [value, dk] = kl(estimator, logp - ref);
            k = value;
            // The value of the weighted estimate is rho k; its gradient rho (dk + k).
            loss += kl_coef * (unbiased ? ratio * k : k);
            slope += kl_coef * (unbiased ? ratio * (dk + k) : dk);
        }
        loss -= entropy_coef * entropy;
        const double below = ratio < low ? clipped : 0.0;
        return {{slope * scale, -entropy_coef * scale},
                {1.0, loss * scale, policy, k, entropy, below, clipped - below, dual_clipped, ratio - 1.0 - log_ratio,
                 fabs(log_ratio)}};
    }
};

KERNEL(THREADS, ppo_loss_forward)(OPTIONAL float* dlogp, OPTIONAL float* dentropy, double* partial, const float* logp, const float* old_logp,
                                  OPTIONAL const float* ref_logp, OPTIONAL const float* entropy, const float* advantages,
                                  OPTIONAL const float* weights, int tokens, int share, double low, double high, double dual,
                                  int estimator, int unbiased, double kl_coef, double entropy_coef, double scale) {
    token_loss(PpoLoss{{}, low, high, dual, estimator, unbiased, kl_coef, entropy_coef, scale},
               {{dlogp, dentropy}, {logp, old_logp, ref_logp, entropy, advantages}, {weights}}, partial, tokens, share);
}
