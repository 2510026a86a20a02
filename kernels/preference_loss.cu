// Losses on pairs of completions, chosen and rejected: DPO and its relatives, over the log-ratios
// of whole completions; src/ops/preference_loss.rs has the formulas, in the same order. As all
// losses over sequences, see include/sequence_loss.cuh; kinds has a kind a byte, the first lowest;
// scale = 1 / pairs, sft = its coefficient / chosen tokens of the step.
#include "include/sequence_loss.cuh"

// The kinds of `PreferenceKind`, in its order; 0 is none.
enum Kind {
    NONE,
    SIGMOID,
    SIGMOID_NORM,
    HINGE,
    IPO,
    IPO_SUM,
    ROBUST,
    EXO_PAIR,
    NCA_PAIR,
    BCO_PAIR,
    SPPO_HARD,
    APO_ZERO,
    APO_DOWN,
    DISCOPOP,
    ODDS_RATIO
};

// -log of the logistic function, written so that neither sign overflows.
__device__ __forceinline__ double softplus_minus(double x) {
    return (x > 0.0 ? 0.0 : -x) + log1p(exp(-fabs(x)));
}

__device__ __forceinline__ double logistic(double x) {
    const double e = exp(-fabs(x));
    return (x >= 0.0 ? 1.0 : e) / (1.0 + e);
}

// A number, and its derivatives in the numbers of the chosen and of the rejected completion.
struct Term {
    double value, chosen, rejected;
};

struct Shaped {
    double value, slope;
};

struct PreferenceLoss : SequenceLoss<2, 8> {
    uint32_t kinds;
    double weight0, weight1, weight2;
    int divergence;
    double alpha;
    int wpo;
    double beta, smoothing, margin, tau, scale, sft;

    static __device__ __forceinline__ bool normalises(int kind) { return kind == SIGMOID_NORM || kind == IPO || kind == ODDS_RATIO; }

    __device__ __forceinline__ Shaped shape(double d) const {
        const double c = alpha - 1.0;
        if (divergence == 1) return {-expm1(-d), exp(-d)};
        if (divergence == 2) return {0.69314718055994530942 - softplus_minus(d), logistic(-d)};
        if (divergence == 3 && c != 0.0) return {expm1(c * d) / c, exp(c * d)};
        return {d, 1.0};
    }

    // A function of z, whose derivative is dz.
    __device__ __forceinline__ Term of_z(double value, double dz) const { return {value, beta * dz, -beta * dz}; }

    __device__ __forceinline__ Term term(int kind, double a, double b, double own) const {
        const double z = beta * (a - b) - (own + margin), right = logistic(z), wrong = logistic(-z);
        double e = smoothing;
        switch (kind) {
            case SIGMOID:
            case SIGMOID_NORM:
                return of_z((1.0 - e) * softplus_minus(z) + e * softplus_minus(-z), e * right - (1.0 - e) * wrong);
            case HINGE:
                return z >= 1.0 ? of_z(0.0, 0.0) : of_z(1.0 - z, -1.0);
            case IPO:
            case IPO_SUM: {
                const double off = a - b - 0.5 / beta;
                return {off * off, 2.0 * off, -2.0 * off};
            }
            case ROBUST:
                return of_z(((1.0 - e) * softplus_minus(z) - e * softplus_minus(-z)) / (1.0 - 2.0 * e),
                            (-e * right - (1.0 - e) * wrong) / (1.0 - 2.0 * e));
            case EXO_PAIR: {
                if (!(e > 0.0)) e = 1e-3;
                const double no = log(e), yes = log1p(-e);
                return of_z(right * (-softplus_minus(z) - yes) + wrong * (-softplus_minus(-z) - no), right * wrong * (z - yes + no));
            }
            case NCA_PAIR: {
                const double half = 0.5 * (softplus_minus(-beta * a) + softplus_minus(-beta * b));
                return {softplus_minus(beta * a) + half, beta * (0.5 * logistic(beta * a) - logistic(-beta * a)),
                        0.5 * beta * logistic(beta * b)};
            }
            case BCO_PAIR:
                return {softplus_minus(beta * a) + softplus_minus(-beta * b), -beta * logistic(-beta * a), beta * logistic(beta * b)};
            case SPPO_HARD: {
                const double c = a - 0.5 / beta, r = b + 0.5 / beta;
                return {c * c + r * r, 2.0 * c, 2.0 * r};
            }
            case APO_ZERO: {
                const double c = logistic(beta * a), no_c = logistic(-beta * a), r = logistic(beta * b), no_r = logistic(-beta * b);
                return {no_c + r, -beta * c * no_c, beta * r * no_r};
            }
            case APO_DOWN: {
                const double c = logistic(beta * a), no_c = logistic(-beta * a), d = beta * right * wrong;
                return {c + wrong, beta * c * no_c - d, d};
            }
            case DISCOPOP: {
                const double w = logistic(z / tau), no_w = logistic(-z / tau), nll = softplus_minus(z);
                // w e^-z, where e^-z alone may overflow.
                const double tail = exp(-softplus_minus(z / tau) - z);
                return of_z((1.0 - w) * nll + tail, -(w * no_w / tau) * nll - (1.0 - w) * wrong + tail * (no_w / tau - 1.0));
            }
            case ODDS_RATIO: {
                // 1 - p of p = e^x.
                const double c = -expm1(a), r = -expm1(b), odds = (a - b) - (log(c) - log(r));
                // Not by way of the odds, which are 0 / 0 where the chosen one is certain.
                const double d = beta / (c + exp(a - b) * r);
                return {beta * softplus_minus(odds), -d, d * c / r};
            }
        }
        return {};
    }

    __device__ Result operator()(const SequenceSums* x, double own) const {
        const SequenceSums &c = x[0], &r = x[1];
        double loss = 0.0, dc = 0.0, dr = 0.0;
        for (int i = 0; i < 3; ++i) {
            const int kind = (kinds >> (8 * i)) & 255;
            if (kind == NONE) continue;
            const double nc = normalises(kind) ? c.tokens : 1.0, nr = normalises(kind) ? r.tokens : 1.0;
            const Shaped a = shape(c.ratio / nc), b = shape(r.ratio / nr);
            const Term t = term(kind, a.value, b.value, own);
            const double weight = i == 0 ? weight0 : i == 1 ? weight1 : weight2;
            loss += weight * t.value;
            dc += weight * t.chosen * a.slope / nc;
            dr += weight * t.rejected * b.slope / nr;
        }
        double weight = 1.0;
        if (wpo) {
            const double mean = c.logp / c.tokens + r.logp / r.tokens;
            weight = exp(mean > 0.0 ? 0.0 : mean);
        }
        const bool means = normalises(kinds & 255);
        const double chosen = beta * c.ratio / (means ? c.tokens : 1.0), rejected = beta * r.ratio / (means ? r.tokens : 1.0);
        const double own_scale = weight * scale;
        return {{{own_scale * dc, -sft}, {own_scale * dr, 0.0}},
                {1.0, own_scale * loss - sft * c.logp, chosen > rejected ? 1.0 : 0.0, chosen, rejected, c.logp, r.logp, weight}};
    }
};

KERNEL(THREADS, preference_loss_forward)(float* dlogp, double* partial, const float* logp, OPTIONAL const float* ref_logp,
                                         OPTIONAL const float* weights, const uint32_t* offsets, OPTIONAL const float* margins,
                                         int units, int share, uint32_t kinds, double weight0, double weight1, double weight2,
                                         int divergence, double alpha, int wpo, double beta, double smoothing, double margin,
                                         double tau, double scale, double sft) {
    const PreferenceLoss loss{{},  kinds, weight0,   weight1, weight2, divergence, alpha,
                              wpo, beta,  smoothing, margin,  tau,     scale,      sft};
    sequence_loss(loss, {dlogp, logp, ref_logp, weights, offsets}, margins, partial, units, share);
}
