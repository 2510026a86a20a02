// The estimators of src/ops/kl.rs.
#pragma once

#include "kernel.cuh"

constexpr int K1 = 1;
constexpr int K2 = 2;

struct Kl {
    double value, slope;
};

// The estimate of one token from d = log-prob less that of the reference, in nats, and its
// derivative in the log-prob, the token held fixed; k3 if neither of the above.
__device__ __forceinline__ Kl kl(int estimator, double d) {
    if (estimator == K1) return {d, 1.0};
    if (estimator == K2) return {0.5 * d * d, d};
    const double e = exp(-d);
    return {e - 1.0 + d, 1.0 - e};
}
