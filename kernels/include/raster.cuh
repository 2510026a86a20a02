// Which tile of a matrix product comes when.
#pragma once

#include "kernel.cuh"

// The tile of C, of `down` by `across` of them, that comes as number t: eight of a column, then
// those of the next column, so that tiles computed together share rows of both operands in the L2
// cache.
struct RasterTile {
    int down, across;
};
static __device__ __forceinline__ RasterTile raster(int t, int down, int across) {
    constexpr int BAND = 8;
    const int band = t / (BAND * across), first = band * BAND, high = down - first < BAND ? down - first : BAND;
    const int in = t - first * across;
    return {first + in % high, in / high};
}
