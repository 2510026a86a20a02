// What a tensor core makes of a product in bf16 with sums in f32, as it is known of Hopper (Fasi et
// al. 2021, "Numerical behavior of NVIDIA tensor cores"; Li et al. 2024, "FTTN"): 16 products and
// the old sum are aligned to the largest of them and cut off two bits below the last of an f32's;
// their sum is exact, and rounded toward zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sim {
namespace {

// Products that are summed at once, and bits that are kept below those of the largest term.
constexpr int DEPTH = 16, EXTRA = 2;
// Of the last bit that is kept: its exponent below that of the largest term.
constexpr int LAST = 23 + EXTRA;

// The number of a bf16, the low half of `bits`.
float wide(uint32_t bits) {
    float x;
    bits <<= 16;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Eight columns.
using Floats = float __attribute__((vector_size(32), aligned(4), may_alias));
using Ints = int32_t __attribute__((vector_size(32), aligned(4), may_alias));

// One sum, of any numbers: NaN and infinities as everywhere, and what is out of reach for the
// faster form.
float sum_of_any(const double (&terms)[DEPTH + 1]) {
    double most = 0.0, plain = 0.0;
    for (double t : terms) most = std::fmax(most, std::fabs(t)), plain += t;
    if (most == 0.0 || !std::isfinite(plain)) return float(plain);
    const int last = std::ilogb(most) - LAST;
    double kept = 0.0;
    for (double t : terms) kept += std::trunc(std::ldexp(t, -last));
    const double sum = std::ldexp(kept, last);
    const float near = float(sum);
    return std::isfinite(near) && std::fabs(near) > std::fabs(sum) ? std::nextafterf(near, 0.0f) : near;
}

bool any(const Ints& x) {
    int64_t half[4];
    std::memcpy(half, &x, sizeof half);
    return (half[0] | half[1] | half[2] | half[3]) != 0;
}

// Whether any of n numbers has a larger magnitude than that of these bits: as whole numbers they
// are ordered, with NaN above all.
inline __attribute__((always_inline)) bool any_above(int32_t bits, const float* x, int n) {
    Ints above = {};
    for (int i = 0; i < n; i += 8) above |= (*reinterpret_cast<const Ints*>(x + i) & 0x7FFFFFFF) > bits;
    return any(above);
}

// Where column i of b [16, n] has its number k: eight columns lie together.
inline int in_columns(int k, int i) { return i / 8 * 8 * DEPTH + k * 8 + i % 8; }

// d[rows, n] = a[rows, 16] b[16, n], and the old d where it `add`s; n is a multiple of 8, rows are
// at most 64.
__attribute__((target_clones("avx2", "default"), optimize("O3")))
void multiply(float* d, const float* a, const float* b, int rows, int n, bool add) {
    // Much of a tile is zeros in tests: products with zeros are skipped, unless some are of a NaN.
    constexpr int32_t FINITE = 0x7F7FFFFF;
    const bool wild = any_above(FINITE, a, rows * DEPTH) || any_above(FINITE, b, n * DEPTH);
    bool zeros[64];
    for (int m = 0; m < rows; ++m) zeros[m] = !wild && !any_above(0, a + m * DEPTH, DEPTH);
    for (int i = 0; i < n; i += 8, b += 8 * DEPTH) {
        const bool nothing = !wild && !any_above(0, b, 8 * DEPTH);
        for (int m = 0; m < rows; ++m) {
            const float* own = a + m * DEPTH;
            Floats& out = *reinterpret_cast<Floats*>(d + m * n + i);
            const Floats old = add ? out : Floats{};
            if (nothing || zeros[m]) {
                out = old + 0.0f;
                continue;
            }
            Floats terms[DEPTH];
            Ints most = reinterpret_cast<const Ints&>(old) & 0x7FFFFFFF;
            for (int k = 0; k < DEPTH; ++k) {
                terms[k] = own[k] * *reinterpret_cast<const Floats*>(b + 8 * k);
                const Ints size = reinterpret_cast<const Ints&>(terms[k]) & 0x7FFFFFFF;
                most = most > size ? most : size;
            }
            Ints exponent = most >> 23;
            const Ints far = (exponent > 127 + 121) | ((exponent <= LAST) & (most != 0));
            exponent = exponent > LAST ? exponent : LAST + 1;
            // 2^-last and 2^last.
            const Ints up = (2 * 127 + LAST - exponent) << 23;
            const Ints down = (exponent - LAST) << 23;
            Ints sum = __builtin_convertvector(old * reinterpret_cast<const Floats&>(up), Ints);
            for (const Floats& t : terms) sum += __builtin_convertvector(t * reinterpret_cast<const Floats&>(up), Ints);
            Floats near = __builtin_convertvector(sum, Floats);
            // What was rounded away from zero is one too large.
            const Ints back = __builtin_convertvector(near, Ints);
            reinterpret_cast<Ints&>(near) += (sum < 0 ? back < sum : back > sum);
            out = near * reinterpret_cast<const Floats&>(down);
            if (__builtin_expect(!any(far), 1)) continue;
            for (int c = 0; c < 8; ++c) {
                if (far[c] == 0) continue;
                double each[DEPTH + 1];
                for (int k = 0; k < DEPTH; ++k) each[k] = double(own[k]) * b[8 * k + c];
                each[DEPTH] = old[c];
                d[m * n + i + c] = sum_of_any(each);
            }
        }
    }
}

}  // namespace
}  // namespace sim
