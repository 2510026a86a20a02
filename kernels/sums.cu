// The last step of all sums over tokens: total[i] = sum_p partial[p, i], for the last `maxima` of
// them the maximum
//   shapes   partial [parts, numbers], total [numbers] f64
//   tiling   one block, a warp a number
//   memory   reads partial once, 8 bytes a number of a part
//   numerics f64; lane l adds parts l, l + 32, ..., then lanes as in every warp's sum: an order of
//            the number of parts only. A NaN stays in a maximum, which is 0 or more
//   needs    nothing
#include "include/reduce.cuh"

// As many as all kernels over tokens have.
constexpr int THREADS = 256;

KERNEL(THREADS, sums_total)(double* total, const double* partial, int parts, int numbers, int maxima) {
    for (int i = threadIdx.x / 32; i < numbers; i += THREADS / 32) {
        const bool sum = i < numbers - maxima;
        double x = 0.0;
        for (int p = ptx::lane(); p < parts; p += 32) {
            const double y = partial[p * numbers + i];
            x = sum ? Sum::of(x, y) : Max::of(x, y);
        }
        x = sum ? warp_reduce<Sum>(x) : warp_reduce<Max>(x);
        if (ptx::lane() == 0) total[i] = x;
    }
}
