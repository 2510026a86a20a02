// Pairwise loss of the reward model: softplus(-m) + centre (c + r)^2 with m = c - r - margin, and
// d/dc, d/dr. As all losses over tokens, see include/token_loss.cuh; a token is a pair here, its
// two scores side by side; scale = 1 / denominator.
#include "include/token_loss.cuh"

struct BradleyTerry : TokenLoss<1, 2, 5, 0, 2, 2> {
    double centre, scale;

    __device__ Result operator()(const double* x) const {
        const double c = x[0], r = x[1], m = c - r - x[2];
        // In the form in which neither sign overflows.
        const double e = exp(-fabs(m));
        const double loss = (m < 0.0 ? -m : 0.0) + log1p(e);
        const double wrong = (m >= 0.0 ? e : 1.0) / (1.0 + e);
        const double pull = 2.0 * centre * (c + r);
        return {{(pull - wrong) * scale, (pull + wrong) * scale},
                {1.0, (loss + centre * (c + r) * (c + r)) * scale, c > r ? 1.0 : 0.0, c - r, c + r}};
    }
};

KERNEL(THREADS, bradley_terry_forward)(OPTIONAL float* dscores, double* partial, const float* scores, OPTIONAL const float* margins,
                                       OPTIONAL const float* weights, int count, int share, double centre, double scale) {
    token_loss(BradleyTerry{{}, centre, scale}, {{dscores}, {scores}, {weights, margins}}, partial, count, share);
}
