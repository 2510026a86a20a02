// Losses of a policy over the tokens of its samples: a surrogate of the ratio x = e^(logp - old),
// of the token or of its sequence, and of the advantage; plus kl_coef k(logp, ref) w, minus
// entropy_coef entropy; d/dlogp and d/dentropy. src/ops/policy_loss.rs has the formulas, in the
// same order
//   shapes   columns and gradients [tokens] f32; offsets [sequences + 1]; partial [blocks, SUMS +
//            MAXIMA] f64. ref_logp, entropy, weights and dentropy may be null: 0, 0, 1, not written
//   tiling   a block a sequence at a time, `share` sequences a block; a thread takes tokens 256
//            apart; sums.cu adds the blocks
//   memory   reads every column once, logp, old_logp and advantages once more for the ratio of a
//            sequence; writes every gradient once: 16 to 32 bytes a token
//   numerics f64 from the loads on, one rounding on the way out; sums in an order of the sequences'
//            lengths only
//   needs    offsets that ascend and stay inside the columns: the op checks. Sequences begin at any
//            token, so a lane takes one token
#include "include/columns.cuh"

constexpr int THREADS = 256;
constexpr int SUMS = 9, MAXIMA = 1;

// The kinds of `Surrogate`, as its `code` numbers them.
enum Kind { CLIP, CISPO, SAPO, GMPO, VESPO, DPPO_TV, DPPO_KL, DPPO_RATIO, LIKELIHOOD };
// `RatioLevel`, in its order.
enum Level { TOKEN, SEQUENCE, SEQUENCE_SUM };
// `KlWeight`, in its order.
enum KlWeight { RATIO, SCORE, ONE };
// The estimators of src/ops/kl.rs; 0 is no KL term, k3 is the last.
constexpr int K1 = 1, K2 = 2;
// Bounds of a log-ratio in VESPO; the second is log 1e-8.
constexpr double MOST = 20.0, LEAST = -18.420680743952367;

// A number and its derivative in the log-prob.
struct Value {
    double value, slope;
};

struct Numbers {
    double logp, old, ref, entropy, advantage;
};

// The number itself if it is none.
__device__ __forceinline__ double bounded(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// The estimate of one token from d = log-prob less that of the reference, in nats, and its
// derivative in the log-prob, the token held fixed.
__device__ __forceinline__ Value kl(int estimator, double d) {
    if (estimator == K1) return {d, 1.0};
    if (estimator == K2) return {0.5 * d * d, d};
    const double e = exp(-d);
    return {e - 1.0 + d, 1.0 - e};
}

struct PolicyLoss {
    int kind;
    double p0, p1, p2, p3;
    int level, estimator, kl_weight;
    double kl_coef, entropy_coef;

    // What a token adds to the log-ratio of its sequence.
    __device__ __forceinline__ double part(double log_ratio, double a) const {
        if (kind == VESPO) return bounded(log_ratio, -MOST, MOST);
        if (kind != GMPO) return log_ratio;
        return a > 0.0 && log_ratio > p1 ? p1 : a <= 0.0 && log_ratio < -p0 ? -p0 : log_ratio;
    }

    // Whether DPPO drops a token. One that is no number is kept.
    __device__ __forceinline__ bool masked(const Numbers& x, double* sums) const {
        const double p = exp(x.logp), q = exp(x.old);
        double up = p - q, down = q - p;
        if (kind == DPPO_KL) {
            const double d = q * (x.old - x.logp) + (1.0 - q) * log((1.0 - q + 1e-8) / (1.0 - p + 1e-8));
            up = p > q ? d : 0.0;
            down = p < q ? d : 0.0;
        }
        const bool above = x.advantage > 0.0 && up > p1, below = x.advantage <= 0.0 && down > p0;
        sums[5] = below;
        sums[6] = above;
        return above || below;
    }

    __device__ __forceinline__ Value surrogate(const Numbers& x, double log_ratio, double gain, double* sums) const {
        const double a = x.advantage, ratio = exp(log_ratio), free = -a * ratio;
        switch (kind) {
            case CLIP: {
                const double bound = -a * (ratio < p0 ? p0 : p1);
                Value out = {free, free};
                if (!(ratio >= p0 && ratio <= p1)) {
                    if (bound > free) {
                        out = {bound, 0.0};
                        sums[5] = ratio < p0;
                        sums[6] = ratio > p1;
                    } else if (!(bound < free || ratio != ratio)) {
                        out.slope = 0.5 * free;  // as torch.max at a tie
                    }
                }
                if (a < 0.0 && out.value > -a * p2) {
                    out = {-a * p2, 0.0};
                    sums[7] = 1.0;
                }
                return {out.value, gain * out.slope};
            }
            case CISPO: {
                sums[5] = ratio < p0;
                sums[6] = ratio > p1;
                const double slope = -a * bounded(ratio, p0, p1);
                return {slope * x.logp, slope};
            }
            case SAPO: {
                const double tau = a > 0.0 ? p0 : p1, e = exp(-tau * (ratio - 1.0)), s = 1.0 / (1.0 + e);
                return {-a * (4.0 / tau) * s, gain * (-a * 4.0 * s * (e / (1.0 + e)) * ratio)};
            }
            case GMPO: {
                const double own = x.logp - x.old;
                const bool above = a > 0.0 && own > p1, below = a <= 0.0 && own < -p0;
                sums[5] = below;
                sums[6] = above;
                return {free, above || below ? 0.0 : free};
            }
            case VESPO: {
                const double k = a >= 0.0 ? p0 : p2, lambda = a >= 0.0 ? p1 : p3, w = bounded(log_ratio, LEAST, MOST);
                const double slope = -a * exp(lambda + k * w - lambda * exp(w));
                return {slope * x.logp, slope};
            }
            case DPPO_TV:
            case DPPO_KL: {
                if (masked(x, sums)) return {0.0, 0.0};
                const double slope = -a * (ratio > p2 ? p2 : ratio);
                return {slope * x.logp, slope};
            }
            case DPPO_RATIO: {
                const double kept = masked(x, sums) ? 0.0 : free;
                return {kept + p2 * log_ratio * log_ratio, gain * (kept + 2.0 * p2 * log_ratio)};
            }
            case LIKELIHOOD: return {-a * x.logp, -a};
        }
        return {};
    }

    // The derivative of a token's loss, and what it adds to the sums, whose order is that of
    // `PolicySums`.
    __device__ __forceinline__ double token(const Numbers& x, double whole, double gain, double scale,
                                            double (&sums)[SUMS + MAXIMA]) const {
        const double own = x.logp - x.old, own_ratio = exp(own);
        auto [loss, slope] = level == TOKEN ? surrogate(x, own, 1.0, sums) : surrogate(x, whole, gain, sums);
        sums[0] = 1.0;
        sums[2] = loss;
        if (estimator != 0) {
            auto [k, dk] = kl(estimator, x.logp - x.ref);
            sums[3] = k;
            if (kl_weight != ONE) dk += k;
            if (kl_weight == RATIO) {
                k *= own_ratio;
                dk *= own_ratio;
            }
            loss += kl_coef * k;
            slope += kl_coef * dk;
        }
        sums[1] = (loss - entropy_coef * x.entropy) * scale;
        sums[4] = x.entropy;
        sums[8] = own_ratio - 1.0 - own;
        sums[9] = fabs(own);
        return slope * scale;
    }
};

KERNEL(THREADS, policy_loss_forward, 1, 2)(float* dlogp, OPTIONAL float* dentropy, double* partial, const float* logp,
                                     const float* old_logp, OPTIONAL const float* ref_logp, OPTIONAL const float* entropy,
                                     const float* advantages, OPTIONAL const float* weights, const uint32_t* offsets, int sequences,
                                     int share, int kind, double p0, double p1, double p2, double p3, int level, int means,
                                     int estimator, int kl_weight, double kl_coef, double entropy_coef, double denominator) {
    const PolicyLoss loss{kind, p0, p1, p2, p3, level, estimator, kl_weight, kl_coef, entropy_coef};
    Shared shared;
    // Room for the sums at the end.
    double* room = shared.take<double>(THREADS / 32 * (SUMS + MAXIMA));
    double sums[SUMS + MAXIMA] = {};
    const int64_t first = int64_t(blockIdx.x) * share, last = first + share < sequences ? first + share : sequences;
    for (int64_t s = first; s < last; ++s) {
        const int64_t start = offsets[s], end = offsets[s + 1];
        const double n = double(end - start);
        double whole = 0.0;
        if (level != TOKEN) {
            for (int64_t t = start + threadIdx.x; t < end; t += THREADS) {
                whole += loss.part(double(logp[t]) - double(old_logp[t]), advantages[t]);
            }
            whole = block_reduce<Sum>(whole, room);
            if (level == SEQUENCE) whole /= n;
        }
        const double gain = level == SEQUENCE_SUM ? n : 1.0, scale = 1.0 / ((means ? n : 1.0) * denominator);
        for (int64_t t = start + threadIdx.x; t < end; t += THREADS) {
            const Numbers x = {logp[t], old_logp[t], ref_logp == nullptr ? 0.0 : double(ref_logp[t]),
                               entropy == nullptr ? 0.0 : double(entropy[t]), advantages[t]};
            const double weight = weights == nullptr ? 1.0 : double(weights[t]);
            double more[SUMS + MAXIMA] = {};
            dlogp[t] = float(weight * loss.token(x, whole, gain, scale, more));
            if (dentropy != nullptr) dentropy[t] = float(weight * (-entropy_coef * scale));
            for (int k = 0; k < SUMS; ++k) sums[k] += weight * more[k];
            sums[SUMS] = Max::of(sums[SUMS], more[SUMS]);
        }
    }
    write_sums<SUMS, MAXIMA>(partial, sums);
}
