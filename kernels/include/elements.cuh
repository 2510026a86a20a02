// Who takes which elements in the kernels that treat each element by itself: packets of 16 bytes
// where there are whole ones, single elements where not.
#pragma once

#include "kernel.cuh"

// Elements N i, N i + 1, ... of p: one element, or as many loads or stores of 128 bits as N
// elements fill.
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

// A number that the compiler knows.
template <int VALUE>
struct Width {
    static constexpr int N = VALUE;
};

// f(Width<N>, i) for packets of N of `count` elements in a row, f(Width<1>, i) for the count % N
// left over: a thread for each of the two kinds.
template <int N, class F>
__device__ __forceinline__ void each_packet(uint64_t count, F f) {
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, packets = count / N;
    if (i < packets) {
        f(Width<N>(), int64_t(i));
    } else if (i < packets + count % N) {
        f(Width<1>(), int64_t(packets * (N - 1) + i));
    }
}

// f(Width<N>): N a packet of T if `width` says so, else 1.
template <class T, class F>
__device__ __forceinline__ void with_width(int width, F f) {
    if (width == Packet<T>::WIDTH) {
        f(Width<Packet<T>::WIDTH>());
    } else {
        f(Width<1>());
    }
}

// f(Width<N>, row, i) for the i-th N of `cols` elements of each row, N as of with_width: a thread
// for each, fewer than 2^31 in all.
template <class T, class F>
__device__ __forceinline__ void each_of_rows(int rows, int cols, int width, F f) {
    with_width<T>(width, [&](auto known) {
        const unsigned each = cols / decltype(known)::N, i = blockIdx.x * blockDim.x + threadIdx.x, row = i / each;
        if (row < unsigned(rows)) f(known, int(row), int(i % each));
    });
}
