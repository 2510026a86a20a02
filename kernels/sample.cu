// The next token of each row: temperature, top-k, top-p and min-p, in this order, then one uniform
// number u. With w[i] = e^(scale z[i] - max scale z), the token is the first id at which the sum of
// the kept weights exceeds u times their total. Greedy: the lowest id among the largest logits.
//   shapes   tokens [rows] u32; z [rows, stride] bf16 or f32, vocab of each row; samples [rows] u64
//            and positions [rows] u32, the row's address; scratch [rows, vocab] f32, for top-k and
//            top-p only
//   tiling   one block a row. Sums and maxima: packets where the row has whole ones. Draw: each
//            warp sums a 16th of the row, the part that holds the draw is divided again, 5 times
//            for 200,000 tokens. top-k and top-p: a threshold, 3 of its 30 bits a round: 8 sums say
//            which 8th of the weights in question it is in; each thread keeps its own list of
//            those, which shrinks in place
//   memory   reads z twice: 8 bytes a logit in f32, greedy once, 4 bytes; top-k and top-p each add
//            a read of z, a write of scratch and the reads of lists that shrink
//   numerics weights have the CPU's bits. Their sums are integers, multiples of 2^-44: exact, so
//            that no order shows and a row's token depends on nothing but its logits and its
//            address
//   needs    1 <= vocab < 2^19. A row with a NaN, or without a finite maximum, gets token 0
#include "include/philox.cuh"
#include "include/reduce.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = 16;
// 16 are 8 rounds, not 10, but need 94 registers, not 64: half as many blocks at a time.
constexpr int WAYS = 8;
constexpr int AHEAD = 4; // loads in flight a thread
constexpr float UNIT = 17592186044416.0f; // 2^44: 2^19 weights of at most 1 fit in 63 bits
constexpr uint32_t ONE = 0x3F800000;      // the bits of the largest weight, 1

// e^x as the CPU computes it: x = n ln 2 + r, a polynomial in r, 2^n in two steps so that results
// below the normal range round instead of vanishing. For x <= 0.
static __device__ __forceinline__ float exponential(float x) {
    const float c = x < -104.0f ? -104.0f : x;
    constexpr float MAGIC = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    const float n = fmaf(c, 1.44269504f, MAGIC) - MAGIC;
    float r = fmaf(n, -0.6933594f, c);
    r = fmaf(n, 2.1219444e-4f, r);
    float p = fmaf(1.9875691e-4f, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r * r, r) + 1.0f;
    const int whole = int(n), half = whole >> 1;
    return p * ptx::bits_float(uint32_t(half + 127) << 23) * ptx::bits_float(uint32_t(whole - half + 127) << 23);
}

// f(i, z[i]) for the share of [begin, end) that number `own` of `owners` threads takes.
template <class T, class F>
static __device__ __forceinline__ void each(const T* z, int begin, int end, int own, int owners, F f) {
    using P = Packet<T>;
    // Rows need not begin at a packet.
    const int past = int(reinterpret_cast<uintptr_t>(z + begin) % 16 / sizeof(T));
    const int lead = past == 0 ? begin : begin + P::WIDTH - past, first = lead < end ? lead : end;
    const int packets = (end - first) / P::WIDTH, last = first + packets * P::WIDTH;
    if (begin + own < first) f(begin + own, widen(z[begin + own]));
#pragma unroll 4
    for (int p = own; p < packets; p += owners) {
        const P v = load(z + first, p);
        for (int j = 0; j < P::WIDTH; ++j) f(first + p * P::WIDTH + j, v.x[j]);
    }
    if (last + own < end) f(last + own, widen(z[last + own]));
}

// Sums over the warp, WAYS of them: lane l gets number l / 4. Each step halves what a lane carries:
// it gives one half to the lane across and takes the other.
static __device__ __forceinline__ uint64_t warp_sums(uint64_t (&x)[WAYS]) {
#pragma unroll
    for (int half = WAYS / 2; half > 0; half /= 2) {
        const bool high = (ptx::lane() & half * 4) != 0;
        for (int j = 0; j < half; ++j) {
            const uint64_t other = ptx::shuffle_xor(high ? x[j] : x[j + half], half * 4);
            x[j] = (high ? x[j + half] : x[j]) + other;
        }
    }
    for (int d = 32 / WAYS / 2; d > 0; d /= 2) x[0] += ptx::shuffle_xor(x[0], d);
    return x[0];
}

// A weight in units.
static __device__ __forceinline__ uint64_t mass(uint32_t bits) { return uint64_t(ptx::bits_float(bits) * UNIT); }

// A row's logits and what makes weights of them.
template <class T>
struct Row {
    const T* z;
    int vocab;
    float scale, top;

    __device__ __forceinline__ uint32_t bits(float logit) const {
        return ptx::float_bits(exponential(logit * scale - top));
    }
};

// The first id at which the sum of f(id, its weight's bits) exceeds `at(sum of all)`, which is less
// than that sum. `room` holds a sum for each warp.
template <class T, class F, class At>
static __device__ int find(const Row<T>& row, F f, At at, uint64_t* room) {
    const int warp = threadIdx.x / 32;
    int begin = 0, end = row.vocab;
    uint64_t before = 0, goal = 0;
    for (bool first = true; first || end - begin > 1; first = false) {
        const int part = (end - begin + WARPS - 1) / WARPS;
        const int from = begin + warp * part, to = from + part < end ? from + part : end;
        uint64_t sum = 0;
        if (from < to) each(row.z, from, to, ptx::lane(), 32, [&](int i, float x) { sum += f(i, row.bits(x)); });
        sum = warp_reduce<Sum>(sum);
        if (ptx::lane() == 0) room[warp] = sum;
        __syncthreads();
        if (first) {
            uint64_t all = 0;
            for (int w = 0; w < WARPS; ++w) all += room[w];
            goal = at(all);
        }
        int w = 0;
        for (; w < WARPS - 1 && before + room[w] <= goal; ++w) before += room[w];
        begin += w * part;
        end = begin + part < end ? begin + part : end;
        // Nobody may write the room again before all have read it.
        __syncthreads();
    }
    return begin;
}

// Where the sum of f over weights, from the largest down, reaches a goal.
struct Cut {
    uint32_t bits;  // the largest weight such that the sum of those at least as large reaches it
    uint64_t above; // the sum of the larger ones
    uint64_t from;  // and with those that are equal
    uint64_t all;   // the sum of all
};

// The cut among weights of at least `low`, whose sum reaches the goal. `list` [vocab] is scratch,
// `room` holds WAYS sums for each warp and for the block.
template <class T, class F, class Goal>
static __device__ Cut cut(const Row<T>& row, uint32_t low, F f, Goal goal_of, float* list, uint64_t* room) {
    Cut c = {low, 0, 0, 0};
    uint32_t high = ONE + 1;
    uint64_t goal = 0;
    int count = (row.vocab - int(threadIdx.x) + THREADS - 1) / THREADS;
    for (bool first = true; first || high - c.bits > 1; first = false) {
        const uint32_t step = (high - c.bits + WAYS - 1) / WAYS;
        uint64_t sums[WAYS] = {};
        int left = 0;
        for (int i = 0; i < count; i += AHEAD) {
            uint32_t w[AHEAD];
            for (int a = 0; a < AHEAD; ++a) {
                const int at = (i + a) * THREADS + threadIdx.x;
                w[a] = i + a >= count ? high : first ? row.bits(widen(row.z[at])) : ptx::float_bits(list[at]);
            }
            for (int a = 0; a < AHEAD; ++a) {
                if (w[a] < c.bits || w[a] >= high) continue;
                list[left++ * THREADS + threadIdx.x] = ptx::bits_float(w[a]);
                const uint64_t x = f(w[a]);
                for (int j = 0; j < WAYS; ++j) sums[j] += w[a] - c.bits >= j * step ? x : 0;
            }
        }
        count = left;
        const uint64_t own = warp_sums(sums);
        if (ptx::lane() % 4 == 0) room[threadIdx.x / 32 * WAYS + ptx::lane() / 4] = own;
        __syncthreads();
        uint64_t* total = room + WARPS * WAYS;
        if (threadIdx.x < WAYS) {
            uint64_t sum = c.above;
            for (int w = 0; w < WARPS; ++w) sum += room[w * WAYS + threadIdx.x];
            total[threadIdx.x] = sum;
        }
        __syncthreads();
        if (first) {
            c.all = total[0];
            goal = goal_of(c.all);
        }
        int j = 0;
        while (j + 1 < WAYS && c.bits + (j + 1) * step < high && total[j + 1] >= goal) ++j;
        c.from = total[j];
        if (j + 1 < WAYS && c.bits + (j + 1) * step < high) {
            c.above = total[j + 1];
            high = c.bits + (j + 1) * step;
        }
        c.bits += j * step;
    }
    return c;
}

template <class T>
static __device__ void next(uint32_t* tokens, const T* z, const uint64_t* samples, const uint32_t* positions, float* scratch,
                            int vocab, int stride, float scale, int top_k, float top_p, float min_p,
                            const Stream& stream) {
    Shared shared;
    float* maxima = shared.take<float>(WARPS);
    uint64_t* room = shared.take<uint64_t>((WARPS + 1) * WAYS);
    Row<T> row = {z + int64_t(blockIdx.x) * stride, vocab, scale, -INFINITY};
    float* list = scratch + int64_t(blockIdx.x) * vocab;
    each(row.z, 0, vocab, threadIdx.x, THREADS, [&](int, float x) { row.top = Max::of(row.top, x); });
    row.top = block_reduce<Max>(row.top, maxima) * scale;
    if (!(fabsf(row.top) < INFINITY)) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = 0;
        return;
    }
    uint32_t least = 0;       // bits of the smallest weight that is kept
    int last_tie = INT32_MAX; // and the last id that is kept of those with this weight
    if (top_k > 0 && top_k < vocab) {
        auto one = [](uint32_t) { return uint64_t(1); };
        least = cut(row, 0, one, [&](uint64_t) { return uint64_t(top_k); }, list, room).bits;
    }
    if (top_p < 1.0f) {
        // What may be dropped, from the least likely up.
        auto allowed = [&](uint64_t all) { return uint64_t((1.0 - double(top_p)) * double(all)); };
        const Cut c = cut(row, least, mass, [&](uint64_t all) { return all - allowed(all); }, list, room);
        least = c.bits;
        // Tokens that tie with the last kept one stay in the order of their ids, as many as the
        // mass allows.
        const uint64_t ties = (c.from - c.above) / mass(least);
        if (ties > 1) {
            const uint64_t can = (allowed(c.all) - (c.all - c.from)) / mass(least), stay = can < ties ? ties - can : 1;
            auto tie = [&](int, uint32_t w) { return uint64_t(w == least); };
            last_tie = find(row, tie, [&](uint64_t) { return stay - 1; }, room);
        }
    }
    if (min_p > 0.0f && ptx::float_bits(min_p) > least) {
        least = ptx::float_bits(min_p);
        last_tie = INT32_MAX;
    }
    const float u = uniform(stream, samples[blockIdx.x], positions[blockIdx.x]);
    auto kept = [&](int i, uint32_t w) { return w > least || (w == least && i <= last_tie) ? mass(w) : 0; };
    const int token = find(row, kept, [&](uint64_t all) { return uint64_t(double(u) * double(all)); }, room);
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

template <class T>
static __device__ void greedy(uint32_t* tokens, const T* z, int vocab, int stride) {
    Shared shared;
    uint64_t* room = shared.take<uint64_t>(WARPS);
    const T* row = z + int64_t(blockIdx.x) * stride;
    // The logit's bits as an ordered integer, then the id, the lower the better: one maximum.
    uint64_t best = 0;
    each(row, 0, vocab, threadIdx.x, THREADS, [&](int i, float x) {
        // -0 is 0, and a NaN is less than all others.
        const uint32_t bits = ptx::float_bits(x != x ? -INFINITY : x + 0.0f);
        const uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
        const uint64_t key = uint64_t(order) << 32 | uint32_t(~i);
        best = Max::of(best, key);
    });
    best = block_reduce<Max>(best, room);
    if (threadIdx.x != 0) return;
    const float first = widen(row[0]);
    // As on the CPU: nothing is larger than a NaN that comes first.
    tokens[blockIdx.x] = first != first ? 0 : ~uint32_t(best);
}

#define KERNELS(T) \
    KERNEL(THREADS, sample_next_##T)(uint32_t* tokens, const T* z, const uint64_t* samples, const uint32_t* positions, \
        float* scratch, int vocab, int stride, float scale, int top_k, float top_p, float min_p, uint64_t seed, uint64_t step, \
        uint32_t purpose) { \
        const Stream stream = {seed, step, purpose}; \
        next(tokens, z, samples, positions, scratch, vocab, stride, scale, top_k, top_p, min_p, stream); \
    } \
    KERNEL(THREADS, sample_greedy_##T)(uint32_t* tokens, const T* z, int vocab, int stride) { greedy(tokens, z, vocab, stride); }
EACH_DTYPE(KERNELS)
