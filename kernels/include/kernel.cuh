// What every kernel begins with: its entry, its shared memory, its packets of 16 bytes.
#pragma once

#include "ptx.cuh"

// An entry point: KERNEL(threads, name)(parameters) { ... }. build.rs reads this line and writes
// the Rust struct of its arguments; README.md tells of parameters and of lists of instances.
//
// KERNEL(threads, name, blocks): blocks that follow each other in x are a cluster; a block has a
// multiprocessor's registers to itself, which ptxas must know to heed setmaxnreg, so a kernel that
// moves registers between its warpgroups is of this form, be it with 1. KERNEL(threads, name, 1,
// beside): so many blocks share the registers, 0: as many as fit. A number may be a constant, or a
// <= b ? c : d of such.
#define KERNEL(...) KERNEL_PICK(__VA_ARGS__, KERNEL_BESIDE, KERNEL_OF_CLUSTER, KERNEL_OF_BLOCK, )(__VA_ARGS__)
#define KERNEL_PICK(threads, name, blocks, beside, pick, ...) pick
#define KERNEL_OF_BLOCK(threads, name)                                      \
    static_assert((threads) % 32 == 0 && (threads) <= 1024, "whole warps"); \
    extern "C" __global__ void __launch_bounds__(threads) name
#define KERNEL_OF_CLUSTER(threads, name, blocks) KERNEL_BESIDE(threads, name, blocks, 1)
#define KERNEL_BESIDE(threads, name, blocks, beside)                        \
    static_assert((threads) % 32 == 0 && (threads) <= 1024, "whole warps"); \
    extern "C" __global__ void __launch_bounds__(threads, beside) KERNEL_CLUSTER_##blocks name
#define KERNEL_CLUSTER_1
#define KERNEL_CLUSTER_2 __cluster_dims__(2, 1, 1)

// Marks a pointer parameter that may be null, an Option in Rust.
#define OPTIONAL
// Marks a pointer parameter read or written in packets: the launch checks its alignment.
#define PACKED
// Type of a parameter: the map of a matrix from which TMA copies boxes.
#ifdef WARPO_SIM
#define TENSOR_MAP const ptx::TensorMap
#else
#define TENSOR_MAP const __grid_constant__ ptx::TensorMap
#endif

#ifndef WARPO_SIM
extern __shared__ __align__(1024) char launch_shared[];
#endif

// Carves arrays out of the launch's shared memory; every thread carves the same in the same order.
class Shared {
    int offset_ = 0;
    int index_ = 0;

  public:
    // Every array begins on a multiple of 16 bytes, or of `align`.
    template <class T>
    __device__ T* take(int count, int align = 16 PTX_AND_AT) {
        offset_ = (offset_ + align - 1) / align * align;
        const int start = offset_;
        offset_ += count * int(sizeof(T));
#ifdef WARPO_SIM
        return static_cast<T*>(::sim::carve(index_++, start, count * sizeof(T), at));
#else
        ++index_;
        return reinterpret_cast<T*>(launch_shared + start);
#endif
    }
};

struct bf16 {
    uint16_t bits;
};
using f32 = float;

// What is stored, of a kernel that is compiled for both.
#define EACH_DTYPE(X) X(bf16) X(f32)

__device__ __forceinline__ float widen(bf16 x) { return ptx::bits_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(float x) { return x; }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    return bf16{uint16_t(ptx::pack_bf16(x, 0.0f) & 0xFFFF)};
}
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}

// N neighbours as floats.
template <int N>
struct Elements {
    static constexpr int WIDTH = N;
    float x[N];
};
// 16 bytes of T: 8 of bf16, 4 of f32.
template <class T>
using Packet = Elements<16 / sizeof(T)>;

__device__ __forceinline__ void unpack(float (&x)[8], uint4 v) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = ptx::bits_float(w[i] << 16);
        x[2 * i + 1] = ptx::bits_float(w[i] & 0xFFFF0000u);
    }
}
__device__ __forceinline__ void unpack(float (&x)[4], uint4 v) {
    x[0] = ptx::bits_float(v.x);
    x[1] = ptx::bits_float(v.y);
    x[2] = ptx::bits_float(v.z);
    x[3] = ptx::bits_float(v.w);
}
__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return uint4{ptx::pack_bf16(x[0], x[1]), ptx::pack_bf16(x[2], x[3]), ptx::pack_bf16(x[4], x[5]),
                 ptx::pack_bf16(x[6], x[7])};
}
__device__ __forceinline__ uint4 pack(const float (&x)[4]) {
    return uint4{ptx::float_bits(x[0]), ptx::float_bits(x[1]), ptx::float_bits(x[2]), ptx::float_bits(x[3])};
}

// Packet `i` of p as it lies there: one load of 128 bits.
template <class T>
__device__ __forceinline__ uint4 fetch(const T* p, int64_t i PTX_AND_AT) {
    PTX_EITHER(::sim::aligned(p, 16, at), );
    return reinterpret_cast<const uint4*>(p)[i];
}
// Packet `i` of p: one load or store of 128 bits.
template <class T>
__device__ __forceinline__ Packet<T> load(const T* p, int64_t i PTX_AND_AT) {
    Packet<T> out;
    unpack(out.x, fetch(p, i PTX_PASS));
    return out;
}
template <class T>
__device__ __forceinline__ void store(T* p, int64_t i, const Packet<T>& v PTX_AND_AT) {
    PTX_EITHER(::sim::aligned(p, 16, at), );
    reinterpret_cast<uint4*>(p)[i] = pack(v.x);
}
