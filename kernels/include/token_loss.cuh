// A loss over tokens, and over pairs: a functor computes a token's gradients and sums from its
// numbers; `token_loss` loads the columns, weights and writes what comes back, and reduces the sums
//   shapes   columns and gradients [count] f32, PER elements a token; singles [count / PER] f32,
//            the first are the weights; partial [blocks, SUMS + MAXIMA] f64. Any column may be
//            null: its numbers are 0, its weights 1
//   tiling   4 elements a thread at a time, `share` elements a block; sums.cu adds the blocks
//   memory   one pass: reads every column once, writes every gradient once, 4 bytes an element
//   numerics f64 from the loads on, as on the CPU, one rounding on the way out; sums in an order of
//            the number of elements only; a NaN stays in a maximum
//   needs    a share of whole packets. Columns begin anywhere, and are accessed 16 bytes at once
//            where that is possible
// src/ops/token_loss.rs says how to add a loss.
#pragma once

#include "columns.cuh"

constexpr int THREADS = 256;

// What a functor returns: gradients, then sums in the order of the struct in Rust, of which the
// first is 1, so that over all tokens it is their weight; then maxima, of numbers of at least 0.
template <int GRADS, int SUMS, int MAXIMA = 0>
struct TokenResult {
    double grads[GRADS];
    double sums[SUMS + MAXIMA];
};

// What a functor derives from: the sizes of its columns.
template <int COLUMNS_, int GRADS_, int SUMS_, int MAXIMA_ = 0, int PER_ = 1, int SINGLES_ = 1>
struct TokenLoss {
    static constexpr int COLUMNS = COLUMNS_, GRADS = GRADS_, SUMS = SUMS_, MAXIMA = MAXIMA_, PER = PER_, SINGLES = SINGLES_;
    // PER numbers of each column, then one of each single after the weights.
    static constexpr int INPUTS = COLUMNS * PER + SINGLES - 1;
    using Result = TokenResult<GRADS, SUMS, MAXIMA>;
};

template <class L>
struct TokenColumns {
    float* grads[L::GRADS / L::PER];
    const float* columns[L::COLUMNS];
    const float* singles[L::SINGLES];
};

// The numbers of the tokens of elements i to i + 3, where a token has one.
template <int PER>
__device__ __forceinline__ Packet<float> load_single(const float* x, int64_t i, int count) {
    Packet<float> out = {};
    if (x == nullptr) return out;
    if constexpr (PER == 1) {
        out = load_tokens(x, i, count);
    } else {
        for (int j = 0; j < EACH / PER && i + j * PER < count; ++j) out.x[j] = x[i / PER + j];
    }
    return out;
}

template <class L>
__device__ __forceinline__ void token_loss(const L& loss, const TokenColumns<L>& at, double* partial, int count, int share) {
    constexpr int PER = L::PER, OUT = L::GRADS / PER;
    double sums[L::SUMS + L::MAXIMA] = {};
    each_four(count, share, [&](int64_t i) {
        Packet<float> in[L::COLUMNS], single[L::SINGLES], out[OUT] = {};
        for (int c = 0; c < L::COLUMNS; ++c) in[c] = load_single<1>(at.columns[c], i, count);
        for (int c = 0; c < L::SINGLES; ++c) single[c] = load_single<PER>(at.singles[c], i, count);
        for (int j = 0; j < EACH / PER && i + j * PER < count; ++j) {
            double x[L::INPUTS];
            for (int k = 0; k < L::COLUMNS * PER; ++k) x[k] = in[k / PER].x[j * PER + k % PER];
            for (int c = 1; c < L::SINGLES; ++c) x[L::COLUMNS * PER + c - 1] = single[c].x[j];
            const double weight = at.singles[0] == nullptr ? 1.0 : double(single[0].x[j]);
            const typename L::Result token = loss(x);
            for (int k = 0; k < L::SUMS; ++k) sums[k] += weight * token.sums[k];
            for (int k = L::SUMS; k < L::SUMS + L::MAXIMA; ++k) sums[k] = Max::of(sums[k], token.sums[k]);
            for (int k = 0; k < L::GRADS; ++k) out[k / PER].x[j * PER + k % PER] = float(weight * token.grads[k]);
        }
        for (int c = 0; c < OUT; ++c) {
            if (at.grads[c] != nullptr) store_tokens(at.grads[c], i, count, out[c]);
        }
    });
    write_sums<L::SUMS, L::MAXIMA>(partial, sums);
}
