// The activation functions, by their places in the Rust enum Activation. No left tail is lost in a
// difference: the tanh form is written with a sigmoid, 1 + tanh(u) = 2 s(2u), and 1 + erf(u) is
// erfc(-u).
#pragma once

#include "kernel.cuh"

// The value and the derivative at a point; the compiler drops the one that is not used.
struct Point {
    float y, slope;
};

// s = 1 / (1 + exp(-x)) and 1 - s, neither by cancellation.
struct Sigmoid {
    float s, rest;
};
__device__ __forceinline__ Sigmoid sigmoid(float x) {
    const float e = expf(-fabsf(x)), near = ptx::reciprocal(1.0f + e), far = e * near;
    return x < 0.0f ? Sigmoid{far, near} : Sigmoid{near, far};
}

struct GeluTanh {
    static __device__ __forceinline__ Point at(float x) {
        // x s(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        constexpr float C = 1.5957691216057308f, A = 0.044715f;
        const float x2 = x * x;
        const auto [s, rest] = sigmoid(C * x * fmaf(A, x2, 1.0f));
        return {x * s, fmaf(x * s * rest, C * fmaf(3.0f * A, x2, 1.0f), s)};
    }
};

struct Gelu {
    static __device__ __forceinline__ Point at(float x) {
        const float cdf = 0.5f * erfcf(x * -0.70710678118654752f);
        const float pdf = expf(-0.5f * x * x) * 0.39894228040143268f;
        return {x * cdf, fmaf(x, pdf, cdf)};
    }
};

struct Silu {
    static __device__ __forceinline__ Point at(float x) {
        const auto [s, rest] = sigmoid(x);
        return {x * s, s * fmaf(x, rest, 1.0f)};
    }
};

struct Relu {
    static __device__ __forceinline__ Point at(float x) {
        // x * 0 keeps a NaN
        return x > 0.0f ? Point{x, 1.0f} : Point{x * 0.0f, 0.0f};
    }
};

struct QuickGelu {
    static __device__ __forceinline__ Point at(float x) {
        constexpr float K = 1.702f;
        const auto [s, rest] = sigmoid(K * x);
        return {x * s, s * fmaf(K * x, rest, 1.0f)};
    }
};

// f(the activation), so that each loop is compiled for one function.
template <class F>
__device__ __forceinline__ void with_activation(int act, F f) {
    switch (act) {
        case 0: return f(GeluTanh());
        case 1: return f(Gelu());
        case 2: return f(Silu());
        case 3: return f(Relu());
        case 4: return f(QuickGelu());
    }
}
