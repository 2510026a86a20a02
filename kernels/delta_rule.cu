// The gated delta rule: attention with a state S [key_dim, value_dim] of each value head, row by
// row. With q and k normalised, beta = sigmoid(b) and decay = exp(-exp(rate) softplus(a + bias)):
//   S = decay S, e = v - S^T k, S += k (beta e)^T, out = S^T q
// Backward, with G the gradient of S, from the last row to the first:
//   G += q dout^T, de = beta G^T k, dbeta = k . G e, dk = beta G e, dv = de, G = decay (G - k de^T)
// and from the first to the last, with S as above: dq = S dout, dk -= (decay S) de. The gradient of
// ln(decay) is the sum of q dq + k dk' - beta dbeta over the row and all that follow, dk' being the
// second part of dk. Rows: from normalised keys to keys. Sums: the gradients of rate and bias.
//   shapes   qkv, dqkv [rows, 2 key_heads key_dim + value_heads value_dim], out, dout [rows,
//            value_heads, value_dim], rate, bias [value_heads], bf16 or f32; gates and dgates
//            2 value_heads columns (b, then a) of rows of their own stride; state [value_heads,
//            slots, key_dim, value_dim], errors (e) [value_heads, rows, value_dim], drate, dbias
//            f32; spans [sequences, 4]: first row, rows, position of the first, slot; scratch
//            [value_heads, rows, 2 key_dim + value_dim + 2] f32: dq, dk, dv, dbeta, dln(decay)
//   tiling   a block a value head of a sequence: LANES threads a column of S, each with EACH rows
//            of it in registers, for all rows of the sequence; q and k of TOKENS rows in shared
//            memory. Rows: a block a row. Sums: a block a head
//   memory   S never leaves registers but from and to its slot. Bytes a row of a head in bf16:
//            forward 4 key_dim + 4 value_dim, and 4 value_dim for e; backward that twice, and
//            scratch written once and read twice
//   numerics all in f32. Sums over key_dim: EACH in ascending order, then lanes; over value_dim:
//            columns of a warp as a tree, warps in ascending order. No state is rounded
//   needs    key_dim and value_dim <= DIM: the launcher checks
#include "include/activation.cuh"
#include "include/reduce.cuh"

// Largest head.
constexpr int DIM = 128;
constexpr int LANES = 4;
constexpr int EACH = 32;
constexpr int THREADS = 512;
constexpr int WARPS = 16;
static_assert(EACH * LANES == DIM && LANES * DIM == THREADS && WARPS * 32 == THREADS, "a thread a part of a column");
// Rows whose queries and keys are in shared memory.
constexpr int TOKENS = 4;
// Bytes of shared memory: queries, keys and gates, and backward the parts of two sums of each warp.
constexpr int SHARED = 4128;
constexpr int SHARED_BACKWARD = 73760;
static_assert(SHARED == 4 * TOKENS * (2 * DIM + 2), "forward");
static_assert(SHARED_BACKWARD == SHARED + 4 * TOKENS * (2 * WARPS + 2) * DIM, "backward");
constexpr int ROW_THREADS = 128;

// Sizes and inputs.
template <class T>
struct Rule {
    const T* qkv;
    const T* gates;
    const T* rate;
    const T* bias;
    int rows, key_heads, value_heads, key_dim, value_dim, g_first, g_stride;

    __device__ __forceinline__ int keys() const { return key_heads * key_dim; }
    __device__ __forceinline__ int64_t qkv_cols() const { return 2 * keys() + int64_t(value_heads) * value_dim; }
    // Query (0) or key (1) of a key head.
    __device__ __forceinline__ const T* key(int64_t row, int which, int head) const {
        return qkv + row * qkv_cols() + which * keys() + head * key_dim;
    }
    __device__ __forceinline__ float value(int64_t row, int head, int column) const {
        return widen(qkv[row * qkv_cols() + 2 * keys() + head * value_dim + column]);
    }
    __device__ __forceinline__ int64_t out(int64_t row, int head) const { return (row * value_heads + head) * value_dim; }
    __device__ __forceinline__ int group() const { return value_heads / key_heads; }
    __device__ __forceinline__ int scratch_cols() const { return 2 * key_dim + value_dim + 2; }
};

// beta of a row, the logarithm of its decay, and its derivative by a.
struct Gates {
    float beta, log, slope;
};
template <class T>
static __device__ Gates gates_of(const T* gates, const T* rate, const T* bias, int heads, int head) {
    const float x = widen(gates[heads + head]) + widen(bias[head]), fast = -expf(widen(rate[head]));
    const float softplus = Max::of(x, 0.0f) + log1pf(expf(-fabsf(x)));
    return {sigmoid(widen(gates[head])).s, fast * softplus, fast * sigmoid(x).s};
}
template <class T>
static __device__ Gates gates_of(const Rule<T>& rule, int64_t row, int head) {
    return gates_of(rule.gates + row * rule.g_stride + rule.g_first, rule.rate, rule.bias, rule.value_heads, head);
}

// 1 / sqrt(sum x^2 + eps) of a key head's vector; a warp's.
template <class T>
static __device__ float unit(const T* x, int dim) {
    float sum = 0.0f;
    for (int i = ptx::lane(); i < dim; i += 32) sum = fmaf(widen(x[i]), widen(x[i]), sum);
    return 1.0f / sqrtf(warp_reduce<Sum>(sum) + 1e-6f);
}

// Queries, keys and gates of some rows of a head.
struct Tile {
    float *q, *k, *gate;

    __device__ Tile(Shared& shared) {
        q = shared.take<float>(TOKENS * DIM);
        k = shared.take<float>(TOKENS * DIM);
        gate = shared.take<float>(TOKENS * 2);
    }
    template <class T>
    __device__ void fill(const Rule<T>& rule, int head, int64_t row, int count) {
        // Nobody reads the rows before any more.
        __syncthreads();
        const int warp = threadIdx.x / 32, t = warp / 2, which = warp % 2;
        if (t < count) {
            const T* x = rule.key(row + t, which, head / rule.group());
            const float scale = unit(x, rule.key_dim) * (which == 0 ? 1.0f / sqrtf(float(rule.key_dim)) : 1.0f);
            float* to = (which == 0 ? q : k) + t * DIM;
            for (int i = ptx::lane(); i < DIM; i += 32) to[i] = i < rule.key_dim ? widen(x[i]) * scale : 0.0f;
            if (which == 0 && ptx::lane() == 0) {
                const Gates g = gates_of(rule, row + t, head);
                gate[2 * t] = g.beta;
                gate[2 * t + 1] = expf(g.log);
            }
        }
        __syncthreads();
    }
};

// The sum over the lanes of a column, in all of them.
static __device__ __forceinline__ float over_lanes(float x) {
    x += ptx::shuffle_xor(x, 1);
    return x + ptx::shuffle_xor(x, 2);
}

// Lanes MASK apart add their sums, each for one half of 2 COUNT, to the first of `x`.
template <int COUNT, int MASK>
static __device__ __forceinline__ int fold(float (&x)[EACH]) {
    const bool high = ptx::lane() & MASK;
    for (int i = 0; i < COUNT; ++i) {
        const float send = high ? x[i] : x[i + COUNT], keep = high ? x[i + COUNT] : x[i];
        x[i] = keep + ptx::shuffle_xor(send, MASK);
    }
    return high ? COUNT : 0;
}

// Adds x[i] over the columns of the warp and writes the sums, those of row i LANES + lane to `to`.
static __device__ void over_columns(float (&x)[EACH], float* to) {
    static_assert(LANES == 4 && EACH == 32, "8 columns a warp, 4 sums a lane at last");
    int first = fold<16, 16>(x);
    first += fold<8, 8>(x);
    first += fold<4, 4>(x);
    for (int i = 0; i < 4; ++i) to[(first + i) * LANES + ptx::lane() % LANES] = x[i];
}

template <class T>
static __device__ void forward(const Rule<T>& rule, T* out, float* errors, float* state, const uint32_t* spans, int slots) {
    Shared shared;
    Tile tile(shared);
    const int head = blockIdx.x % rule.value_heads;
    const uint32_t* span = spans + int64_t(blockIdx.x / rule.value_heads) * 4;
    const int64_t at = span[0], end = at + span[1];
    const int column = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const bool there = column < rule.value_dim;
    float s[EACH] = {};
    float* slot = state == nullptr ? nullptr : state + (int64_t(head) * slots + span[3]) * rule.key_dim * rule.value_dim + column;
    if (slot != nullptr && span[2] > 0 && there) {
        for (int i = 0; i < EACH; ++i) {
            if (i * LANES + lane < rule.key_dim) s[i] = slot[int64_t(i * LANES + lane) * rule.value_dim];
        }
    }
    for (int64_t row = at; row < end; row += TOKENS) {
        const int count = end - row < TOKENS ? int(end - row) : TOKENS;
        tile.fill(rule, head, row, count);
        for (int t = 0; t < count; ++t) {
            const float *q = tile.q + t * DIM + lane, *k = tile.k + t * DIM + lane;
            const float beta = tile.gate[2 * t], decay = tile.gate[2 * t + 1];
            float sum = 0.0f;
            for (int i = 0; i < EACH; ++i) {
                s[i] *= decay;
                sum = fmaf(k[i * LANES], s[i], sum);
            }
            const float e = (there ? rule.value(row + t, head, column) : 0.0f) - over_lanes(sum), change = beta * e;
            float y = 0.0f;
            for (int i = 0; i < EACH; ++i) {
                s[i] = fmaf(k[i * LANES], change, s[i]);
                y = fmaf(q[i * LANES], s[i], y);
            }
            y = over_lanes(y);
            if (there && lane == 0) {
                errors[(int64_t(head) * rule.rows + row + t) * rule.value_dim + column] = e;
                out[rule.out(row + t, head) + column] = narrow<T>(y);
            }
        }
    }
    if (slot == nullptr || !there) return;
    for (int i = 0; i < EACH; ++i) {
        if (i * LANES + lane < rule.key_dim) slot[int64_t(i * LANES + lane) * rule.value_dim] = s[i];
    }
}

// Sum i of the parts of all warps, in ascending order.
static __device__ __forceinline__ float over_warps(const float* parts, int i) {
    float sum = parts[i];
    for (int w = 1; w < WARPS; ++w) sum += parts[w * DIM + i];
    return sum;
}

// x . y over DIM numbers in shared memory; a warp's.
static __device__ __forceinline__ float dot(const float* x, const float* y) {
    float sum = 0.0f;
    for (int i = ptx::lane(); i < DIM; i += 32) sum = fmaf(x[i], y[i], sum);
    return warp_reduce<Sum>(sum);
}

template <class T>
static __device__ void backward(const Rule<T>& rule, float* scratch, const T* dout, const float* errors, const uint32_t* spans) {
    Shared shared;
    Tile tile(shared);
    // Parts of sums over columns: TOKENS x WARPS x DIM, and the sums.
    float* first = shared.take<float>(TOKENS * WARPS * DIM);
    float* second = shared.take<float>(TOKENS * WARPS * DIM);
    float* sums = shared.take<float>(TOKENS * 2 * DIM);
    const int head = blockIdx.x % rule.value_heads, warp = threadIdx.x / 32;
    const uint32_t* span = spans + int64_t(blockIdx.x / rule.value_heads) * 4;
    const int64_t at = span[0], end = at + span[1];
    const int column = threadIdx.x / LANES, lane = threadIdx.x % LANES, cols = rule.scratch_cols();
    const bool there = column < rule.value_dim;
    scratch += int64_t(head) * rule.rows * cols;
    errors += int64_t(head) * rule.rows * rule.value_dim;
    float s[EACH] = {};
    for (int64_t stop = end; stop > at; stop -= TOKENS) {
        const int count = stop - at < TOKENS ? int(stop - at) : TOKENS;
        const int64_t row = stop - count;
        tile.fill(rule, head, row, count);
        for (int t = count - 1; t >= 0; --t) {
            const float *q = tile.q + t * DIM + lane, *k = tile.k + t * DIM + lane;
            const float beta = tile.gate[2 * t], decay = tile.gate[2 * t + 1];
            const float d = there ? widen(dout[rule.out(row + t, head) + column]) : 0.0f;
            const float e = there ? errors[(row + t) * rule.value_dim + column] : 0.0f;
            float sum = 0.0f, parts[EACH];
            for (int i = 0; i < EACH; ++i) {
                s[i] = fmaf(q[i * LANES], d, s[i]);
                sum = fmaf(k[i * LANES], s[i], sum);
                parts[i] = s[i] * e;
            }
            const float de = beta * over_lanes(sum);
            over_columns(parts, first + (t * WARPS + warp) * DIM);
            for (int i = 0; i < EACH; ++i) s[i] = decay * fmaf(-k[i * LANES], de, s[i]);
            if (there && lane == 0) scratch[(row + t) * cols + 2 * rule.key_dim + column] = de;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count * DIM; i += THREADS) {
            const int t = i / DIM, c = i % DIM;
            const float sum = over_warps(first + t * WARPS * DIM, c);
            sums[i] = sum;
            if (c < rule.key_dim) scratch[(row + t) * cols + rule.key_dim + c] = tile.gate[2 * t] * sum;
        }
        __syncthreads();
        if (warp < count) {
            const float dbeta = dot(tile.k + warp * DIM, sums + warp * DIM);
            if (ptx::lane() == 0) scratch[(row + warp + 1) * cols - 2] = dbeta;
        }
    }
    for (int i = 0; i < EACH; ++i) s[i] = 0.0f;
    for (int64_t row = at; row < end; row += TOKENS) {
        const int count = end - row < TOKENS ? int(end - row) : TOKENS;
        tile.fill(rule, head, row, count);
        for (int t = 0; t < count; ++t) {
            const float* k = tile.k + t * DIM + lane;
            const float beta = tile.gate[2 * t], decay = tile.gate[2 * t + 1];
            const float d = there ? widen(dout[rule.out(row + t, head) + column]) : 0.0f;
            const float de = there ? scratch[(row + t) * cols + 2 * rule.key_dim + column] : 0.0f;
            const float change = there ? beta * errors[(row + t) * rule.value_dim + column] : 0.0f;
            float parts[EACH];
            for (int i = 0; i < EACH; ++i) {
                s[i] *= decay;
                parts[i] = s[i] * de;
            }
            over_columns(parts, first + (t * WARPS + warp) * DIM);
            for (int i = 0; i < EACH; ++i) {
                s[i] = fmaf(k[i * LANES], change, s[i]);
                parts[i] = s[i] * d;
            }
            over_columns(parts, second + (t * WARPS + warp) * DIM);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count * DIM; i += THREADS) {
            const int t = i / DIM, c = i % DIM;
            const float dk = over_warps(first + t * WARPS * DIM, c), dq = over_warps(second + t * WARPS * DIM, c);
            sums[i] = dk;
            sums[TOKENS * DIM + i] = dq;
            if (c >= rule.key_dim) continue;
            float* to = scratch + (row + t) * cols;
            to[c] = dq;
            to[rule.key_dim + c] -= dk;
        }
        __syncthreads();
        if (warp < count) {
            const float q = dot(tile.q + warp * DIM, sums + (TOKENS + warp) * DIM), k = dot(tile.k + warp * DIM, sums + warp * DIM);
            float* to = scratch + (row + warp + 1) * cols;
            if (ptx::lane() == 0) to[-1] = q - k - tile.gate[2 * warp] * to[-2];
        }
    }
    __syncthreads();
    if (warp > 0) return;
    // Each row's sum over itself and what follows, 32 rows at a time.
    float after = 0.0f;
    for (int64_t stop = end; stop > at; stop -= 32) {
        const int64_t row = stop - 1 - ptx::lane();
        float x = row >= at ? scratch[(row + 1) * cols - 1] : 0.0f;
        for (int d = 1; d < 32; d *= 2) {
            const float before = ptx::shuffle_up(x, d);
            if (ptx::lane() >= d) x += before;
        }
        x += after;
        if (row >= at) scratch[(row + 1) * cols - 1] = x;
        after = ptx::shuffle(x, 31);
    }
}

template <class T>
static __device__ void to_rows(const Rule<T>& rule, T* dqkv, T* dgates, const float* scratch, int d_first, int d_stride) {
    const int64_t row = blockIdx.x;
    const int cols = rule.scratch_cols(), dim = rule.key_dim, heads = rule.value_heads;
    auto of = [&](int head) { return scratch + (int64_t(head) * rule.rows + row) * cols; };
    T* to = dqkv + row * rule.qkv_cols();
    for (int i = threadIdx.x / 32; i < 2 * rule.key_heads; i += ROW_THREADS / 32) {
        const int which = i % 2, head = i / 2;
        const T* x = rule.key(row, which, head);
        const float inverse = unit(x, dim), factor = which == 0 ? 1.0f / sqrtf(float(dim)) : 1.0f;
        // d and x . d of value heads together.
        float d[DIM / 32], along = 0.0f;
        for (int j = 0; j < DIM / 32; ++j) {
            const int c = j * 32 + ptx::lane();
            d[j] = 0.0f;
            if (c >= dim) continue;
            for (int h = 0; h < rule.group(); ++h) d[j] += of(head * rule.group() + h)[which * dim + c];
            along = fmaf(d[j], widen(x[c]), along);
        }
        along = warp_reduce<Sum>(along) * inverse * inverse;
        for (int j = 0; j < DIM / 32; ++j) {
            const int c = j * 32 + ptx::lane();
            if (c < dim) to[which * rule.keys() + head * dim + c] = narrow<T>(factor * inverse * fmaf(-along, widen(x[c]), d[j]));
        }
    }
    for (int i = threadIdx.x; i < heads * rule.value_dim; i += ROW_THREADS) {
        to[2 * rule.keys() + i] = narrow<T>(of(i / rule.value_dim)[2 * dim + i % rule.value_dim]);
    }
    T* gate = dgates + row * d_stride + d_first;
    for (int head = threadIdx.x; head < heads; head += ROW_THREADS) {
        const Gates g = gates_of(rule, row, head);
        gate[head] = narrow<T>(of(head)[cols - 2] * g.beta * (1.0f - g.beta));
        gate[heads + head] = narrow<T>(g.slope * of(head)[cols - 1]);
    }
}

template <class T>
static __device__ void sums(float* drate, float* dbias, const float* scratch, const T* gates, const T* rate, const T* bias, int rows,
                            int heads, int cols, int g_first, int g_stride) {
    Shared shared;
    float* room = shared.take<float>(WARPS);
    const int head = blockIdx.x;
    float by_rate = 0.0f, by_bias = 0.0f;
    for (int64_t row = threadIdx.x; row < rows; row += THREADS) {
        const float d = scratch[(int64_t(head) * rows + row + 1) * cols - 1];
        const Gates g = gates_of(gates + row * g_stride + g_first, rate, bias, heads, head);
        by_rate = fmaf(d, g.log, by_rate);
        by_bias = fmaf(d, g.slope, by_bias);
    }
    by_rate = block_reduce<Sum>(by_rate, room);
    by_bias = block_reduce<Sum>(by_bias, room);
    if (threadIdx.x == 0) {
        drate[head] += by_rate;
        dbias[head] += by_bias;
    }
}
#define KERNELS(T) \
    KERNEL(THREADS, delta_rule_forward_##T)(T* out, float* errors, OPTIONAL float* state, const T* qkv, const T* gates, \
        const T* rate, const T* bias, const uint32_t* spans, int rows, int slots, int key_heads, int value_heads, int key_dim, \
        int value_dim, int g_first, int g_stride) { \
        const Rule<T> rule{qkv, gates, rate, bias, rows, key_heads, value_heads, key_dim, value_dim, g_first, g_stride}; \
        forward(rule, out, errors, state, spans, slots); \
    } \
    KERNEL(THREADS, delta_rule_backward_##T)(float* scratch, const T* dout, const T* qkv, const float* errors, const T* gates, \
        const T* rate, const T* bias, const uint32_t* spans, int rows, int key_heads, int value_heads, int key_dim, int value_dim, \
        int g_first, int g_stride) { \
        const Rule<T> rule{qkv, gates, rate, bias, rows, key_heads, value_heads, key_dim, value_dim, g_first, g_stride}; \
        backward(rule, scratch, dout, errors, spans); \
    } \
    KERNEL(ROW_THREADS, delta_rule_rows_##T)(T* dqkv, T* dgates, const float* scratch, const T* qkv, const T* gates, const T* rate, \
        const T* bias, int rows, int key_heads, int value_heads, int key_dim, int value_dim, int g_first, int g_stride, \
        int d_first, int d_stride) { \
        const Rule<T> rule{qkv, gates, rate, bias, rows, key_heads, value_heads, key_dim, value_dim, g_first, g_stride}; \
        to_rows(rule, dqkv, dgates, scratch, d_first, d_stride); \
    } \
    KERNEL(THREADS, delta_rule_sums_##T)(float* drate, float* dbias, const float* scratch, const T* gates, const T* rate, \
        const T* bias, int rows, int value_heads, int cols, int g_first, int g_stride) { \
        sums(drate, dbias, scratch, gates, rate, bias, rows, value_heads, cols, g_first, g_stride); \
    }
EACH_DTYPE(KERNELS)
