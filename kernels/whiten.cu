// Whitening over all tokens: moments (count, mean, sum of squared deviations), then
// x = (x - mean) * rstd + back
//   shapes   x [tokens] f32; partial [blocks, 3], moments [3] f64: count, mean, squares
//   tiling   4 tokens a thread at a time, `share` tokens a block; a second launch merges the blocks
//   memory   moments read x once, 4 bytes a token; apply reads and writes it once, 8 bytes
//   numerics f64; a thread merges its tokens one by one, threads and blocks are added about the
//            mean of all: as exact as two passes over x; sums in an order of the number of tokens
//            only
//   needs    a token or more, a share of whole packets. The column begins anywhere, and is accessed
//            16 bytes at once where that is possible
#include "include/columns.cuh"

constexpr int THREADS = 256;

struct Moments {
    double count, mean, squares;
};

// The moments of both together, b not empty.  (Chan et al. 1979)
static __device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
    const double count = a.count + b.count, d = b.mean - a.mean, part = b.count / count;
    return {count, a.mean + d * part, a.squares + b.squares + d * d * a.count * part};
}

// Writes the moments of what all threads of the block have, each its own.
static __device__ __forceinline__ void write_merged(double* to, const Moments& own) {
    Shared shared;
    double* room = shared.take<double>(THREADS / 32);
    const double count = block_reduce<Sum>(own.count, room);
    const double mean = block_reduce<Sum>(own.count * own.mean, room) / count, d = own.mean - mean;
    const double squares = block_reduce<Sum>(own.squares + own.count * d * d, room);
    if (threadIdx.x != 0) return;
    to[0] = count;
    to[1] = mean;
    to[2] = squares;
}

KERNEL(THREADS, whiten_partial)(double* partial, const float* x, int tokens, int share) {
    Moments own = {};
    each_four(tokens, share, [&](int64_t i) {
        const Packet<float> v = load_tokens(x, i, tokens);
        for (int j = 0; j < EACH; ++j) {
            if (i + j < tokens) own = merge(own, {1.0, v.x[j], 0.0});
        }
    });
    write_merged(partial + 3 * int64_t(blockIdx.x), own);
}

KERNEL(THREADS, whiten_moments)(double* moments, const double* partial, int parts) {
    Moments own = {};
    for (int p = threadIdx.x; p < parts; p += THREADS) {
        own = merge(own, {partial[3 * p], partial[3 * p + 1], partial[3 * p + 2]});
    }
    write_merged(moments, own);
}

KERNEL(THREADS, whiten_apply)(float* x, int tokens, int share, double mean, double rstd, double back) {
    each_four(tokens, share, [&](int64_t i) {
        Packet<float> v = load_tokens(x, i, tokens);
        for (int j = 0; j < EACH; ++j) v.x[j] = float((v.x[j] - mean) * rstd + back);
        store_tokens(x, i, tokens, v);
    });
}
