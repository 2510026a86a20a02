// Weighted negative log-likelihood: dlogp[t] = -w[t] / denominator, loss = -sum_t w[t] logp[t] /
// denominator
//   shapes   dlogp, logp, weights [tokens] f32; partial [blocks, 1] f64; scale = 1 / denominator
//   tiling   4 tokens a thread at a time, `share` tokens a block; sums.cu adds the blocks
//   memory   reads logp and weights once, writes dlogp once: 12 bytes a token
//   numerics f64 from the loads on, as on the CPU; sums in an order of the number of tokens only
//   needs    a share of whole packets. Columns begin anywhere, and are accessed 16 bytes at once
//            where that is possible
#include "include/tokens.cuh"

constexpr int THREADS = 256;

KERNEL(THREADS, nll_forward)(float* dlogp, double* partial, const float* logp, const float* weights, int tokens, int share,
                             double scale) {
    double sum[1] = {};
    each_four(tokens, share, [&](int64_t i) {
        const Packet<float> l = load_tokens(logp, i, tokens), w = load_tokens(weights, i, tokens);
        Packet<float> d;
        for (int j = 0; j < EACH; ++j) {
            sum[0] -= double(w.x[j]) * double(l.x[j]) * scale;
            d.x[j] = float(-double(w.x[j]) * scale);
        }
        store_tokens(dlogp, i, tokens, d);
    });
    write_sums<1>(partial, sum);
}
