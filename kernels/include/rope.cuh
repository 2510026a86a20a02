// Turns pairs of a head's elements by the angles of a position.
#pragma once

#include "kernel.cuh"

// (a, b) becomes (a cos - b sin, b cos + a sin), each product and sum rounded, as on the CPU.
static __device__ __forceinline__ void rotate_pair(float& a, float& b, float cos, float sin) {
    const float u = a, v = b;
    a = u * cos - v * sin;
    b = v * cos + u * sin;
}
