// Weighted negative log-likelihood: dlogp[t] = -w[t] / denominator and the sum of -w[t] logp[t];
// with `dft` both times e^logp[t]. As all losses over tokens, see include/token_loss.cuh;
// scale = 1 / denominator.
#include "include/token_loss.cuh"

struct Nll : TokenLoss<1, 1, 2> {
    double scale;
    int dft;
    __device__ Result operator()(const double* x) const {
        const double p = dft ? exp(x[0]) : 1.0;
        return {{-p * scale}, {1.0, -p * x[0]}};
    }
};

KERNEL(THREADS, nll_forward)(OPTIONAL float* dlogp, double* partial, const float* logp, const float* weights, int tokens, int share,
                             double scale, int dft) {
    token_loss(Nll{{}, scale, dft}, {{dlogp}, {logp}, {weights}}, partial, tokens, share);
}
