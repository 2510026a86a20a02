// Per-token KL to the reference, for rewards: out[t] = scale * k(logp[t] - reference[t]), and the
// sum of k
//   shapes   out, logp, reference [tokens] f32; partial [blocks, 1] f64
//   tiling   4 tokens a thread at a time, `share` tokens a block; sums.cu adds the blocks
//   memory   reads both log-probs once, writes out once: 12 bytes a token
//   numerics f64 from the loads on, as on the CPU, one rounding on the way out; sums in an order of
//            the number of tokens only
//   needs    a share of whole packets. Columns begin anywhere, and are accessed 16 bytes at once
//            where that is possible
#include "include/kl.cuh"
#include "include/tokens.cuh"

constexpr int THREADS = 256;

KERNEL(THREADS, kl_forward)(float* out, double* partial, const float* logp, const float* reference, int tokens, int share,
                            int estimator, double scale) {
    double sum[1] = {};
    each_four(tokens, share, [&](int64_t i) {
        const Packet<float> l = load_tokens(logp, i, tokens), r = load_tokens(reference, i, tokens);
        Packet<float> y;
        for (int j = 0; j < EACH; ++j) {
            // Beyond the last token both are 0, and so is every estimate.
            const double k = kl(estimator, double(l.x[j]) - double(r.x[j])).value;
            sum[0] += k;
            y.x[j] = float(scale * k);
        }
        store_tokens(out, i, tokens, y);
    });
    write_sums<1>(partial, sum);
}
