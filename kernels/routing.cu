// Top-k routing: which experts a row goes to, its weights, the sorted pairs, and how what experts
// make of it comes together: y[r] = sum_j weights[r, j] x[places[r, j]] + onto[r].
//   shapes   logits [rows, experts], weights, dweights f32; chosen, places [rows, top]; rows, pairs
//            (row top + slot) of each sorted pair [count = rows top]; offsets [experts + 1]; counts
//            [ceil(count / SHARE), experts]: pairs of each expert in a share, then where they
//            begin; x [count, cols] and y, onto [rows, cols] bf16 or f32; dlogits [rows, stride]
//   tiling   choose, balance, backward: a warp a row. count, place: a block a share of pairs; scan:
//            one block, a thread an expert. combine: a thread a packet of 16 bytes of y, or an
//            element where a row is no whole number of packets (`width` 1)
//   memory   choose reads the logits top + 2 times, all but one from L1; combine reads top rows of
//            x and one of y or onto, and writes y: 2 (top + 2) bytes an element in bf16
//   numerics all in f32. Of equal logits the lower expert is chosen, NaN before all. Weights: sums
//            over slots in order, over experts in an order of their number alone. Sorting is by
//            counting, stable. combine: slots in order, fused, then onto, rounded once
//   needs    experts <= 1024, top <= experts; where `width` is a packet: x, y and onto 16-byte
//            aligned, cols % packet == 0; fewer than 2^31 threads: the launcher checks
#include "include/elements.cuh"
#include "include/reduce.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
// Pairs that a block counts and places, one a thread.
constexpr int SHARE = 256;

// The larger logit first, a NaN before all and -0 equal to 0; of equals the lower expert. Neither 0
// nor all ones.
static __device__ __forceinline__ uint64_t key(float z, int expert) {
    const uint32_t bits = ptx::float_bits(z + 0.0f);
    const uint32_t order = z != z ? 0xFFFFFFFEu : bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
    return uint64_t(order) << 32 | ~uint32_t(expert);
}

// exp(z - most) of the softmax over all experts, and 1 / their sum.
struct Softmax {
    float most, sum;

    __device__ __forceinline__ Softmax(const float* z, int experts) : most(-INFINITY), sum(0.0f) {
        for (int e = ptx::lane(); e < experts; e += 32) most = Max::of(z[e], most);
        most = warp_reduce<Max>(most);
        for (int e = ptx::lane(); e < experts; e += 32) sum += expf(z[e] - most);
        sum = warp_reduce<Sum>(sum);
    }
    __device__ __forceinline__ float at(float z) const { return expf(z - most) / sum; }
};

KERNEL(THREADS, routing_choose)(uint32_t* chosen, float* weights, const float* logits, int rows, int experts, int top, int renormalised) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const float* z = logits + int64_t(row) * experts;
    uint32_t* own = chosen + int64_t(row) * top;
    uint64_t last = ~0ull;
    float most = 0.0f, sum = 0.0f;
    for (int j = 0; j < top; ++j) {
        uint64_t best = 0;
        for (int e = ptx::lane(); e < experts; e += 32) {
            const uint64_t one = key(z[e], e);
            if (one < last && one > best) best = one;
        }
        last = warp_reduce<Max>(best);
        const uint32_t expert = ~uint32_t(last);
        if (j == 0) most = z[expert];
        sum += expf(z[expert] - most);
        if (ptx::lane() == 0) own[j] = expert;
    }
    ptx::sync_warp();
    if (renormalised == 0) sum = Softmax(z, experts).sum;
    for (int j = ptx::lane(); j < top; j += 32) weights[int64_t(row) * top + j] = expf(z[own[j]] - most) / sum;
}

// The experts of the block's share of pairs, in shared memory; of no pair none.
static __device__ __forceinline__ const uint32_t* share(const uint32_t* chosen, int count) {
    Shared shared;
    uint32_t* own = shared.take<uint32_t>(SHARE);
    const int pair = blockIdx.x * SHARE + threadIdx.x;
    own[threadIdx.x] = pair < count ? chosen[pair] : ~0u;
    __syncthreads();
    return own;
}

KERNEL(THREADS, routing_count)(uint32_t* counts, const uint32_t* chosen, int count, int experts) {
    const uint32_t* own = share(chosen, count);
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        int n = 0;
        for (int i = 0; i < SHARE; ++i) n += own[i] == uint32_t(e);
        counts[int64_t(blockIdx.x) * experts + e] = n;
    }
}

// Counts become the places where each share's pairs of an expert begin.
KERNEL(THREADS, routing_scan)(uint32_t* counts, uint32_t* offsets, int shares, int experts) {
    Shared shared;
    int* totals = shared.take<int>(experts + 1);
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        int sum = 0;
        for (int s = 0; s < shares; ++s) sum += counts[int64_t(s) * experts + e];
        totals[e] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int before = 0;
        for (int base = 0; base < experts; base += 32) {
            const int e = base + ptx::lane(), own = e < experts ? totals[e] : 0, end = before + warp_scan(own);
            if (e < experts) totals[e] = end - own;
            before = ptx::shuffle(end, 31);
        }
        if (ptx::lane() == 0) totals[experts] = before;
    }
    __syncthreads();
    for (int e = threadIdx.x; e <= experts; e += THREADS) {
        int at = totals[e];
        offsets[e] = at;
        for (int s = 0; s < shares && e < experts; ++s) {
            uint32_t* own = counts + int64_t(s) * experts + e;
            const int n = *own;
            *own = at;
            at += n;
        }
    }
}

KERNEL(THREADS, routing_place)(uint32_t* rows, uint32_t* pairs, uint32_t* places, const uint32_t* chosen, const uint32_t* starts, int count,
                               int experts, int top) {
    const uint32_t* own = share(chosen, count);
    const int pair = blockIdx.x * SHARE + threadIdx.x;
    if (pair >= count) return;
    const uint32_t expert = own[threadIdx.x];
    int at = starts[int64_t(blockIdx.x) * experts + expert];
    for (int i = 0; i < int(threadIdx.x); ++i) at += own[i] == expert;
    places[pair] = at;
    pairs[at] = pair;
    rows[at] = pair / top;
}

template <class T>
static __device__ void combine(T* y, const T* x, const T* onto, const uint32_t* places, const float* weights, int rows, int cols, int top,
                               int width) {
    each_of_rows<T>(rows, cols, width, [&](auto known, int row, int i) {
        constexpr int N = decltype(known)::N;
        Elements<N> sum = {};
        for (int j = 0; j < top; ++j) {
            const int64_t pair = int64_t(row) * top + j;
            const float w = weights != nullptr ? weights[pair] : 1.0f;
            const Elements<N> v = take<N>(x + int64_t(places[pair]) * cols, i);
            for (int a = 0; a < N; ++a) sum.x[a] = fmaf(w, v.x[a], sum.x[a]);
        }
        const Elements<N> old = take<N>((onto != nullptr ? onto : y) + int64_t(row) * cols, i);
        for (int a = 0; a < N; ++a) sum.x[a] += old.x[a];
        put<N>(y + int64_t(row) * cols, i, sum);
    });
}

// experts f_e: the pairs of an expert divided by the rows.
static __device__ __forceinline__ float load_of(const uint32_t* offsets, int e, int experts, int rows) {
    return float(offsets[e + 1] - offsets[e]) * (float(experts) / float(rows));
}
// sum_e experts f_e p_e
static __device__ __forceinline__ float unbalance(const Softmax& p, const float* z, const uint32_t* offsets, int experts, int rows) {
    float sum = 0.0f;
    for (int e = ptx::lane(); e < experts; e += 32) sum = fmaf(p.at(z[e]), load_of(offsets, e, experts, rows), sum);
    return warp_reduce<Sum>(sum);
}

KERNEL(THREADS, routing_balance)(float* column, const float* logits, const uint32_t* offsets, int rows, int experts) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const float* z = logits + int64_t(row) * experts;
    const float sum = unbalance(Softmax(z, experts), z, offsets, experts, rows);
    if (ptx::lane() == 0) column[row] = sum;
}

template <class T>
static __device__ void backward(T* dlogits, const float* dweights, const uint32_t* places, const float* logits, const uint32_t* chosen,
                                const float* weights, const uint32_t* offsets, float balance, int rows, int experts, int top,
                                int renormalised, int stride) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const float* z = logits + int64_t(row) * experts;
    const int64_t first = int64_t(row) * top;
    const Softmax p(z, experts);
    float mean = 0.0f;
    for (int j = 0; j < top; ++j) mean = fmaf(weights[first + j], dweights[places[first + j]], mean);
    const float own = balance > 0.0f ? unbalance(p, z, offsets, experts, rows) : 0.0f;
    for (int e = ptx::lane(); e < stride; e += 32) {
        float d = 0.0f;
        if (e < experts) {
            d = renormalised != 0 ? 0.0f : -p.at(z[e]) * mean;
            for (int j = 0; j < top; ++j) {
                if (chosen[first + j] == uint32_t(e)) d = weights[first + j] * (dweights[places[first + j]] - mean);
            }
            if (balance > 0.0f) d += balance * p.at(z[e]) * (load_of(offsets, e, experts, rows) - own);
        }
        dlogits[int64_t(row) * stride + e] = narrow<T>(d);
    }
}

#define KERNELS(T) \
    KERNEL(THREADS, routing_combine_##T)(T* y, const T* x, OPTIONAL const T* onto, const uint32_t* places, OPTIONAL const float* weights, \
        int rows, int cols, int top, int width) { \
        combine(y, x, onto, places, weights, rows, cols, top, width); \
    } \
    KERNEL(THREADS, routing_backward_##T)(T* dlogits, const float* dweights, const uint32_t* places, const float* logits, \
        const uint32_t* chosen, const float* weights, const uint32_t* offsets, float balance, int rows, int experts, int top, \
        int renormalised, int stride) { \
        backward(dlogits, dweights, places, logits, chosen, weights, offsets, balance, rows, experts, top, renormalised, stride); \
    }
EACH_DTYPE(KERNELS)
