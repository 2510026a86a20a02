// What wgmma and TMA make of shared memory and registers: the test lays operands out by the tables
// of the PTX ISA ("Asynchronous warpgroup level matrix instructions", "Tensor data movement") and
// knows what must come out.
#include "../include/kernel.cuh"
#include "../include/ptx_sm90.cuh"

constexpr int LEFT = 8192, RIGHT = 65536;

template <int N, bool A_COLUMNS, bool B_COLUMNS, bool REGISTERS>
__device__ void product(float* out, const uint32_t* regs, const char* left, const char* right) {
    float d[N / 2];
    const uint64_t a = ptx::operand(left, 0, 1024), b = ptx::operand(right, 8192, 2048);
    const int t = threadIdx.x;
    uint32_t fragment[2][4];
    for (int k = 0; k < 2; ++k) {
        for (int i = 0; i < 4; ++i) fragment[k][i] = regs[8 * t + 4 * k + i];
    }
    ptx::wgmma_fence();
    for (int k = 0; k < 2; ++k) {
        const uint64_t bk = ptx::operand_advance(b, k * (B_COLUMNS ? 2 * 2048 : 32));
        if constexpr (REGISTERS) {
            ptx::wgmma_bf16<N, B_COLUMNS>(d, fragment[k], bk, k > 0);
        } else {
            ptx::wgmma_bf16<N, A_COLUMNS, B_COLUMNS>(d, ptx::operand_advance(a, k * (A_COLUMNS ? 2 * 1024 : 32)), bk, k > 0);
        }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(d);
    for (int i = 0; i < N / 2; ++i) out[t * (N / 2) + i] = d[i];
}

// out [128, N / 2]: each thread's part of A B for A [64, 32] and B [32, N]. `operands`: 64 KiB of B
// as it lies in shared memory, then 8 KiB of A; regs [128, 2, 4]: A in registers. `form`: 1: A by
// columns; 2: B by columns; 4: A in registers.
template <int N>
__device__ void form_of(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    Shared shared;
    uint32_t* right = shared.take<uint32_t>(RIGHT / 4, 1024);
    uint32_t* left = shared.take<uint32_t>(LEFT / 4, 1024);
    for (int i = threadIdx.x; i < RIGHT / 4; i += 128) right[i] = operands[i];
    for (int i = threadIdx.x; i < LEFT / 4; i += 128) left[i] = operands[RIGHT / 4 + i];
    ptx::fence_async();
    __syncthreads();
    const char *l = reinterpret_cast<char*>(left), *r = reinterpret_cast<char*>(right);
    if (form == 0) product<N, false, false, false>(out, regs, l, r);
    if (form == 1) product<N, true, false, false>(out, regs, l, r);
    if (form == 2) product<N, false, true, false>(out, regs, l, r);
    if (form == 3) product<N, true, true, false>(out, regs, l, r);
    if (form == 4) product<N, false, false, true>(out, regs, l, r);
    if (form == 6) product<N, false, true, true>(out, regs, l, r);
}

KERNEL(128, map_wgmma_8)(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    form_of<8>(out, regs, operands, form);
}
KERNEL(128, map_wgmma_16)(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    form_of<16>(out, regs, operands, form);
}
KERNEL(128, map_wgmma_32)(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    form_of<32>(out, regs, operands, form);
}
KERNEL(128, map_wgmma_64)(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    form_of<64>(out, regs, operands, form);
}
KERNEL(128, map_wgmma_80)(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    form_of<80>(out, regs, operands, form);
}
KERNEL(128, map_wgmma_96)(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    form_of<96>(out, regs, operands, form);
}
KERNEL(128, map_wgmma_128)(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    form_of<128>(out, regs, operands, form);
}
KERNEL(128, map_wgmma_256)(float* out, const uint32_t* regs, const uint32_t* operands, int form) {
    form_of<256>(out, regs, operands, form);
}

// out [bytes]: a box as it lies in shared memory after TMA has loaded it; load(room, full) begins
// that.
template <class F>
__device__ void brought(uint32_t* out, uint32_t bytes, F load) {
    Shared shared;
    uint32_t* room = shared.take<uint32_t>(bytes / 4, 1024);
    uint64_t* full = shared.take<uint64_t>(1);
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::fence_barrier_init();
        ptx::mbarrier_expect(full, bytes);
        load(room, full);
    }
    ptx::sync_warp();
    ptx::mbarrier_wait(full, 0);
    for (uint32_t i = threadIdx.x; i < bytes / 4; i += 32) out[i] = room[i];
}

// The box that begins at column x and row y of the matrix.
KERNEL(32, map_tma)(uint32_t* out, TENSOR_MAP in, uint32_t bytes, int x, int y) {
    brought(out, bytes, [&](uint32_t* room, uint64_t* full) { ptx::tma_load(room, &in, x, y, full); });
}

// And at plane z of a tensor.
KERNEL(32, map_tma_planes)(uint32_t* out, TENSOR_MAP in, uint32_t bytes, int x, int y, int z) {
    brought(out, bytes, [&](uint32_t* room, uint64_t* full) { ptx::tma_load(room, &in, x, y, z, full); });
}
