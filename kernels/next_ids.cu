// Ids of rows from tokens that a pass before drew: ids[rows[i]] = tokens[from[i]].
//   shapes   ids [all], rows and from [count], tokens [drawn], all u32; no row twice
//   tiling   a thread a token
//   memory   reads rows, from and a token, writes an id: 16 bytes a token. A decoding pass has some
//            hundred tokens, so that its time is that of a launch
//   numerics none. A token beyond those that were drawn gives an id that no table has, whose row
//            becomes NaN; a row beyond all is left out
//   needs    fewer than 2^31 threads: the launcher checks
#include "include/kernel.cuh"

constexpr int THREADS = 256;

KERNEL(THREADS, next_ids_forward)(uint32_t* ids, const uint32_t* rows, const uint32_t* from, const uint32_t* tokens, int count,
                                  int all, int drawn) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= unsigned(count)) return;
    const uint32_t row = rows[i], source = from[i];
    if (row < uint32_t(all)) ids[row] = source < uint32_t(drawn) ? tokens[source] : UINT32_MAX;
}
