// Clipped value loss: scale * max((v - ret)^2, (clip(v, old - c, old + c) - ret)^2) / 2, and d/dv.
// As all losses over tokens, see include/token_loss.cuh; scale = coefficient / denominator. Without
// a clip `old` is null and the clip infinite.
#include "include/token_loss.cuh"

struct ValueLoss : TokenLoss<3, 1, 5> {
    double clip, scale;

    __device__ Result operator()(const double* x) const {
        const double v = x[0], old = x[1], ret = x[2], error = v - ret;
        double loss = 0.5 * error * error, slope = error, clipped = 0.0;
        if (!(v >= old - clip && v <= old + clip)) {
            const double bound = v < old ? old - clip : old + clip;
            const double bounded = 0.5 * (bound - ret) * (bound - ret);
            if (bounded > loss) {
                loss = bounded;
                slope = 0.0;
                clipped = 1.0;
            } else if (bounded == loss) {
                slope *= 0.5;  // as torch.max at a tie
            } else if (bounded != bounded) {
                loss = slope = bounded;
            }
        }
        return {{slope * scale}, {1.0, loss * scale, v, clipped, error * error}};
    }
};

KERNEL(THREADS, value_loss_forward)(OPTIONAL float* dv, double* partial, const float* v, OPTIONAL const float* old, const float* returns,
                                    OPTIONAL const float* weights, int tokens, int share, double clip, double scale) {
    token_loss(ValueLoss{{}, clip, scale}, {{dv}, {v, old, returns}, {weights}}, partial, tokens, share);
}
