// Pairwise loss of the reward model: softplus(-m) + centre (c + r)^2 with m = c - r - margin, and
// d/dc, d/dr
//   shapes   dscores, scores [count] f32: chosen, rejected, chosen, ...; margins [count / 2] f32 or
//            null; partial [blocks, 4] f64 in the order of the constants below; scale = 1 /
//            denominator
//   tiling   2 pairs a thread at a time, `share` scores a block; sums.cu adds the blocks
//   memory   reads scores and margins once, writes dscores once: 20 bytes a pair, 16 without
//            margins
//   numerics f64 from the loads on, as on the CPU, in the form in which neither sign overflows;
//            sums in an order of the number of pairs only
//   needs    a share of whole packets. Columns begin anywhere, and are accessed 16 bytes at once
//            where that is possible
#include "include/tokens.cuh"

constexpr int THREADS = 256;
constexpr int LOSS = 0, RIGHT = 1, DIFFERENCE = 2, SCORE = 3, SUMS = 4;

KERNEL(THREADS, bradley_terry_forward)(float* dscores, double* partial, const float* scores, OPTIONAL const float* margins, int count,
                                       int share, double centre, double scale) {
    double sums[SUMS] = {};
    each_four(count, share, [&](int64_t i) {
        const Packet<float> s = load_tokens(scores, i, count);
        Packet<float> d = {};
        for (int j = 0; j < EACH && i + j < count; j += 2) {
            const double c = s.x[j], r = s.x[j + 1];
            const double m = c - r - (margins == nullptr ? 0.0 : double(margins[(i + j) / 2]));
            const double e = exp(-fabs(m));
            const double loss = (m < 0.0 ? -m : 0.0) + log1p(e);
            const double wrong = (m >= 0.0 ? e : 1.0) / (1.0 + e);
            const double pull = 2.0 * centre * (c + r);
            sums[LOSS] += (loss + centre * (c + r) * (c + r)) * scale;
            sums[RIGHT] += c > r ? 1.0 : 0.0;
            sums[DIFFERENCE] += c - r;
            sums[SCORE] += c + r;
            d.x[j] = float((pull - wrong) * scale);
            d.x[j + 1] = float((pull + wrong) * scale);
        }
        store_tokens(dscores, i, count, d);
    });
    write_sums<SUMS>(partial, sums);
}
