// Who takes which elements in the kernels that treat each element by itself: packets of 16 bytes where
// there are whole ones, single elements where not.
#pragma once

#include "kernel.cuh"

// N neighbours as floats.
template <int N>
struct Elements {
    float x[N];
};

// Elements N i, N i + 1, ... of p: one element, or as many loads or stores of 128 bits as N elements fill.
template <int N, class T>
__device__ __forceinline__ Elements<N> take(const T* p, int64_t i PTX_AND_AT) {
    Elements<N> out;
    if constexpr (N == 1) {
        out.x[0] = widen(p[i]);
    } else {
        constexpr int WIDTH = Packet<T>::WIDTH;
        static_assert(N % WIDTH == 0, "whole packets");
        for (int k = 0; k < N / WIDTH; ++k) {
            const Packet<T> packet = load(p, i * (N / WIDTH) + k PTX_PASS);
            for (int j = 0; j < WIDTH; ++j) out.x[k * WIDTH + j] = packet.x[j];
        }
    }
    return out;
}
template <int N, class T>
__device__ __forceinline__ void put(T* p, int64_t i, const Elements<N>& v PTX_AND_AT) {
    if constexpr (N == 1) {
        p[i] = narrow<T>(v.x[0]);
    } else {
        constexpr int WIDTH = Packet<T>::WIDTH;
        static_assert(N % WIDTH == 0, "whole packets");
        for (int k = 0; k < N / WIDTH; ++k) {
            Packet<T> packet;
            for (int j = 0; j < WIDTH; ++j) packet.x[j] = v.x[k * WIDTH + j];
            store(p, i * (N / WIDTH) + k, packet PTX_PASS);
        }
    }
}
