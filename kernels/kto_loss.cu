// KTO's loss of single completions: w (1 - S(beta (D - kl))) of a good one, w' (1 - S(beta (kl -
// D))) of a bad one, S the logistic function, D the completion's log-ratio. As all losses over
// sequences, see include/sequence_loss.cuh; a completion is good where its label is above 0;
// scale = 1 / denominator.
#include "include/sequence_loss.cuh"

struct KtoLoss : SequenceLoss<1, 7> {
    double beta, kl, desirable, undesirable, scale;

    __device__ Result operator()(const SequenceSums* x, double label) const {
        const double good = label > 0.0 ? 1.0 : 0.0, sign = label > 0.0 ? 1.0 : -1.0;
        const double weight = label > 0.0 ? desirable : undesirable;
        const double z = sign * beta * (x->ratio - kl), e = exp(-fabs(z));
        const double lost = (z >= 0.0 ? e : 1.0) / (1.0 + e), won = (z >= 0.0 ? 1.0 : e) / (1.0 + e);
        const double own = weight * scale, reward = beta * x->ratio, bad = 1.0 - good;
        return {{{-sign * beta * own * lost * won, 0.0}},
                {1.0, own * lost, good, good * reward, bad * reward, good * x->logp, bad * x->logp}};
    }
};

KERNEL(THREADS, kto_loss_forward)(float* dlogp, double* partial, const float* logp, OPTIONAL const float* ref_logp,
                                  OPTIONAL const float* weights, const uint32_t* offsets, const float* labels, int units, int share,
                                  double beta, double kl, double desirable, double undesirable, double scale) {
    sequence_loss(KtoLoss{{}, beta, kl, desirable, undesirable, scale}, {dlogp, logp, ref_logp, weights, offsets}, labels, partial,
                  units, share);
}
