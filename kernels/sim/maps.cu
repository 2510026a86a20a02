// What each lane holds of a tensor core's operands: the test gives every lane its registers, or a
// shared matrix of distinct numbers, and knows from NVIDIA's tables (PTX ISA, "Matrix
// multiply-accumulate operation using mma instruction") what must come out. The simulator and a GPU
// are held to the same bits.
#include "../include/kernel.cuh"

// d[lane] = A B of all lanes' a[lane], 4 registers, and b[lane], 2 registers; all are exact in f32.
KERNEL(32, map_mma)(float* d, const uint32_t* a, const uint32_t* b, int zero) {
    const int l = threadIdx.x;
    const uint32_t fa[4] = {a[4 * l], a[4 * l + 1], a[4 * l + 2], a[4 * l + 3]}, fb[2] = {b[2 * l], b[2 * l + 1]};
    float sum[4] = {float(zero), float(zero), float(zero), float(zero)};
    ptx::mma_bf16(sum, fa, fb);
    for (int i = 0; i < 4; ++i) d[4 * l + i] = sum[i];
}

// out[lane], 4 registers: four matrices of 8 x 8 numbers of 16 bits, x [4, 8, 8], as ldmatrix hands
// them out; `transposed` or not.
KERNEL(32, map_matrix)(uint32_t* out, const uint32_t* x, const uint32_t* unused, int transposed) {
    Shared shared;
    uint32_t* room = shared.take<uint32_t>(128);
    for (int i = 0; i < 4; ++i) room[4 * threadIdx.x + i] = x[4 * threadIdx.x + i] + 0 * unused[threadIdx.x];
    __syncthreads();
    uint32_t v[4];
    if (transposed != 0) {
        ptx::load_matrix_transposed(v, room + 4 * threadIdx.x);
    } else {
        ptx::load_matrix(v, room + 4 * threadIdx.x);
    }
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = v[i];
}
