// Weighted negative log-likelihood: dlogp[t] = -w[t] / denominator and the sum of -w[t] logp[t]. As
// all losses over tokens, see include/token_loss.cuh; scale = 1 / denominator.
#include "include/token_loss.cuh"

struct Nll : TokenLoss<1, 1, 2> {
    double scale;
    __device__ Result operator()(const double* x) const { return {{-scale}, {1.0, -x[0]}}; }
};

KERNEL(THREADS, nll_forward)(OPTIONAL float* dlogp, double* partial, const float* logp, const float* weights, int tokens, int share,
                             double scale) {
    token_loss(Nll{{}, scale}, {{dlogp}, {logp}, {weights}}, partial, tokens, share);
}
