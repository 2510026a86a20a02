// Clipped value loss: scale * max((v - ret)^2, (clip(v, old - c, old + c) - ret)^2) / 2, and d/dv
//   shapes   dv, v, old, returns [tokens] f32, old null without a clip; partial [blocks, 4] f64 in
//            the order of the constants below; scale = coefficient / denominator
//   tiling   4 tokens a thread at a time, `share` tokens a block; sums.cu adds the blocks
//   memory   reads v, old and returns once, writes dv once: 16 bytes a token, 12 without a clip
//   numerics f64 from the loads on, as on the CPU; a tie has half the slope, as torch.max; sums in
//            an order of the number of tokens only
//   needs    a share of whole packets. Columns begin anywhere, and are accessed 16 bytes at once
//            where that is possible
#include "include/tokens.cuh"

constexpr int THREADS = 256;
constexpr int LOSS = 0, VALUE = 1, CLIPPED = 2, SQUARES = 3, SUMS = 4;

KERNEL(THREADS, value_loss_forward)(float* dv, double* partial, const float* v, OPTIONAL const float* old, const float* returns,
                                    int tokens, int share, double clip, double scale) {
    double sums[SUMS] = {};
    each_four(tokens, share, [&](int64_t i) {
        const Packet<float> values = load_tokens(v, i, tokens), targets = load_tokens(returns, i, tokens);
        // Without a clip each value is its own old one.
        const Packet<float> before = old == nullptr ? values : load_tokens(old, i, tokens);
        Packet<float> d;
        for (int j = 0; j < EACH; ++j) {
            // Beyond the last token all columns are 0, and so is what they add to the sums.
            const double x = values.x[j], ret = targets.x[j], o = before.x[j];
            const double error = x - ret;
            double loss = 0.5 * error * error, slope = error;
            if (old != nullptr && !(x >= o - clip && x <= o + clip)) {
                const double bound = x < o ? o - clip : o + clip;
                const double bounded = 0.5 * (bound - ret) * (bound - ret);
                if (bounded > loss) {
                    sums[CLIPPED] += 1.0;
                    loss = bounded;
                    slope = 0.0;
                } else if (bounded == loss) {
                    slope *= 0.5;
                } else if (bounded != bounded) {
                    loss = slope = bounded;
                }
            }
            sums[LOSS] += loss * scale;
            sums[VALUE] += x;
            sums[SQUARES] += error * error;
            d.x[j] = float(slope * scale);
        }
        store_tokens(dv, i, tokens, d);
    });
    write_sums<SUMS>(partial, sums);
}
