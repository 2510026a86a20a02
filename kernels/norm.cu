// RMSNorm and LayerNorm over the last axis: y[r,c] = n[r,c] * w[c] (+ b[c]). RMSNorm, number 0: n =
// x * rstd, rstd[r] = 1 / sqrt(mean_c x[r,c]^2 + eps). LayerNorm, number 1: n = (x - mean) * rstd,
// mean[r] = mean_c x[r,c], rstd[r] = 1 / sqrt(mean_c (x[r,c] - mean[r])^2 + eps). With `one_plus`
// 1 + w stands for w. RMSNorm's means run over `unpadded` of the cols: the others are 0.
//   shapes   x, dx and y, dy: row r is `cols` elements of bf16 or f32 from r / heads * stride + r %
//            heads * cols on; w, b [cols]; mean, rstd [rows] f32, kept; dw, db [cols] f32; partial
//            [LAYER ? 2 : 1, ceil(rows / SHARE), cols] f32, scratch: first for dw, then for db
//   tiling   `group` threads a row, a power of two from 32 to 512, 512 / group rows a block at a
//            time; thread t of a group owns packets t, t + group, ..., at most 16 elements: the
//            whole row stays in registers, in backward packed, beside the next one and as many sums
//            for dw and for db. backward: a block takes SHARE rows
//   memory   forward reads x and writes y once, 4 bytes an element in bf16, 8 in f32; backward
//            reads x and dy and writes dx once, 6 bytes (12), with `add` reads it, too, 8 (16), and
//            writes and reads partial, 8 / SHARE bytes, LayerNorm 16 / SHARE
//   numerics sums in f32, fused, the variance from the deviations, in a second pass over registers;
//            one rounding on the way out. dw and db: rows of a group in order, groups in order,
//            blocks in order, then added to what is there
//   needs    cols and strides multiples of the packet, cols at most 512 * 16; rows, w and b 16-byte
//            aligned: the launcher checks
#include "include/elements.cuh"
#include "include/reduce.cuh"

constexpr int THREADS = 512;
constexpr int ELEMENTS = 16;
// Rows of a block in backward. Half as many make twice the blocks, but 8 % more traffic (RMSNorm).
constexpr int SHARE = 32;

// Packets that a thread holds of a row.
template <class T>
constexpr int PACKETS = ELEMENTS / Packet<T>::WIDTH;

// Whether a row is fetched while the one before it is summed, so that loads are always under way,
// though only one block fits a multiprocessor. In f32 there are not the registers for it.
template <class T>
constexpr bool AHEAD = sizeof(T) == 2;

// A thread's share of a row of x and of the gradient dy that came to it, packed.
template <int PACKETS>
struct Fetched {
    uint4 x[PACKETS], dy[PACKETS];
};

// out[c] = the sum over the block's groups, in their order, of what they hold: thread `lane` of a
// group of `group` has packets lane, lane + group, ... of its row of sums. `room` holds blockDim /
// group rows of `cols`. All threads of the block call it.
template <int PACKETS, int N>
__device__ __forceinline__ void write_partial(float* out, const Elements<N> (&mine)[PACKETS], float* room, int cols, int group) {
    const int groups = blockDim.x / group, lane = threadIdx.x % group;
    float* own = room + threadIdx.x / group * cols;
    for (int i = 0; i < PACKETS; ++i) {
        const int p = lane + i * group;
        if (p < cols / N) put<N>(own, p, mine[i]);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        float sum = 0.0f;
        for (int g = 0; g < groups; ++g) sum += room[g * cols + c];
        out[c] = sum;
    }
    // Nobody may write the room again before all have read it.
    __syncthreads();
}

// Where rows are, in packets.
struct Rows {
    int rows, cols, unpadded, heads, stride;

    template <class T>
    __device__ __forceinline__ int64_t begin(int row) const {
        return (int64_t(row / heads) * stride + row % heads * cols) / Packet<T>::WIDTH;
    }
};

// Packet p of the weight, in f32.
template <class T>
static __device__ __forceinline__ Elements<Packet<T>::WIDTH> weight_of(const T* w, int p, int one_plus) {
    constexpr int N = Packet<T>::WIDTH;
    Elements<N> weight = take<N>(w, p);
    for (int j = 0; j < N; ++j) weight.x[j] = one_plus != 0 ? 1.0f + weight.x[j] : weight.x[j];
    return weight;
}

template <bool LAYER, class T>
static __device__ void forward(T* y, float* mean, float* rstd, const T* x, const T* w, const T* b, Rows in, int y_stride,
                               int one_plus, float eps, int group) {
    constexpr int N = Packet<T>::WIDTH;
    Shared shared;
    float* room = shared.take<float>(THREADS / 32);
    const int rows = in.rows, cols = in.cols, packets = cols / N, lane = threadIdx.x % group;
    const int row = blockIdx.x * (THREADS / group) + threadIdx.x / group;
    const int64_t from = in.begin<T>(row), to = Rows{rows, cols, in.unpadded, in.heads, y_stride}.begin<T>(row);
    Elements<N> v[PACKETS<T>];
    float sum[1] = {0.0f}, squares[1] = {0.0f};
    for (int i = 0; i < PACKETS<T>; ++i) {
        const int p = lane + i * group;
        if (row >= rows || p >= packets) continue;
        v[i] = take<N>(x, from + p);
        for (int j = 0; j < N; ++j) {
            if (LAYER) {
                sum[0] += v[i].x[j];
            } else {
                squares[0] = fmaf(v[i].x[j], v[i].x[j], squares[0]);
            }
        }
    }
    float m = 0.0f;
    if constexpr (LAYER) {
        group_sum(sum, group, room);
        m = sum[0] / cols;
        for (int i = 0; i < PACKETS<T>; ++i) {
            if (row >= rows || lane + i * group >= packets) continue;
            for (int j = 0; j < N; ++j) {
                v[i].x[j] -= m;
                squares[0] = fmaf(v[i].x[j], v[i].x[j], squares[0]);
            }
        }
    }
    group_sum(squares, group, room);
    if (row >= rows) return;
    const float root = 1.0f / sqrtf(squares[0] / (LAYER ? cols : in.unpadded) + eps);
    // NaN where squares overflowed: zeros would hide it.
    const float r = root + 0.0f / root;
    if (lane == 0) {
        if (LAYER) mean[row] = m;
        rstd[row] = r;
    }
    for (int i = 0; i < PACKETS<T>; ++i) {
        const int p = lane + i * group;
        if (p >= packets) continue;
        const Elements<N> weight = weight_of(w, p, one_plus), bias = b != nullptr ? take<N>(b, p) : Elements<N>{};
        for (int j = 0; j < N; ++j) {
            v[i].x[j] = LAYER ? fmaf(v[i].x[j] * r, weight.x[j], bias.x[j]) : v[i].x[j] * (r * weight.x[j]);
        }
        put<N>(y, to + p, v[i]);
    }
}

// With g = dy w: dx = rstd (g - n mean_c(g n)), for LayerNorm less rstd mean_c(g), with `add` dx +=
// that, and the sums over the block's rows of dy n and of dy.
template <bool LAYER, class T>
static __device__ void backward(T* dx, float* partial, const T* dy, const T* x, const T* w, const float* mean, const float* rstd,
                                Rows in, int y_stride, int one_plus, int group, int add) {
    constexpr int N = Packet<T>::WIDTH, SUMS = LAYER ? 2 : 1;
    const int rows = in.rows, cols = in.cols, groups = THREADS / group, lane = threadIdx.x % group, packets = cols / N;
    const Rows out = {rows, cols, in.unpadded, in.heads, y_stride};
    Shared shared;
    float* room = shared.take<float>(SUMS * THREADS / 32);
    float* sums = shared.take<float>(groups * cols);
    const int first = blockIdx.x * SHARE, end = rows - first < SHARE ? rows : first + SHARE;
    const int own = threadIdx.x / group;
    Elements<N> dw[PACKETS<T>] = {}, db[LAYER ? PACKETS<T> : 1] = {};
    const auto fetch_row = [&](int row) {
        Fetched<PACKETS<T>> fetched;
        const int64_t x_at = in.begin<T>(row), dy_at = out.begin<T>(row);
        for (int i = 0; i < PACKETS<T>; ++i) {
            const int p = lane + i * group;
            if (p >= (row < end ? packets : 0)) continue;
            fetched.x[i] = fetch(x, x_at + p);
            fetched.dy[i] = fetch(dy, dy_at + p);
        }
        return fetched;
    };
    auto next = fetch_row(first + own);
    float next_m = LAYER && first + own < end ? mean[first + own] : 0.0f, next_r = first + own < end ? rstd[first + own] : 0.0f;
    for (int at = first; at < end; at += groups) {
        const int row = at + own, after = row + groups;
        const bool there = row < end;
        const int64_t base = in.begin<T>(row);
        const auto now = next;
        const float m = next_m, r = next_r;
        if (AHEAD<T>) next = fetch_row(after);
        if (LAYER) next_m = after < end ? mean[after] : 0.0f;
        next_r = after < end ? rstd[after] : 0.0f;
        // Row sums of g n (RMSNorm: g x) and of g.
        float dots[SUMS] = {};
        for (int i = 0; i < PACKETS<T>; ++i) {
            const int p = lane + i * group;
            if (!there || p >= packets) continue;
            Packet<T> v, g;
            unpack(v.x, now.x[i]);
            unpack(g.x, now.dy[i]);
            const Elements<N> weight = weight_of(w, p, one_plus);
            for (int j = 0; j < N; ++j) {
                const float n = LAYER ? (v.x[j] - m) * r : v.x[j] * r;
                dw[i].x[j] = fmaf(g.x[j], n, dw[i].x[j]);
                dots[0] = fmaf(g.x[j] * weight.x[j], LAYER ? n : v.x[j], dots[0]);
                if constexpr (LAYER) {
                    db[i].x[j] += g.x[j];
                    dots[1] += g.x[j] * weight.x[j];
                }
            }
        }
        group_sum(dots, group, room);
        const float pull = LAYER ? dots[0] / cols : dots[0] / in.unpadded * r * r;
        for (int i = 0; i < PACKETS<T>; ++i) {
            const int p = lane + i * group;
            if (!there || p >= packets) continue;
            Packet<T> v, g;
            unpack(v.x, now.x[i]);
            unpack(g.x, now.dy[i]);
            const Elements<N> weight = weight_of(w, p, one_plus);
            Elements<N> sum = add != 0 ? take<N>(dx, base + p) : Elements<N>{};
            for (int j = 0; j < N; ++j) {
                float d = g.x[j] * weight.x[j], n = v.x[j];
                if constexpr (LAYER) {
                    d -= dots[1] / cols;
                    n = (v.x[j] - m) * r;
                }
                sum.x[j] += fmaf(-n, pull, d) * r;
            }
            put<N>(dx, base + p, sum);
        }
        if (!AHEAD<T>) next = fetch_row(after);
    }
    const int blocks = (rows + SHARE - 1) / SHARE;
    write_partial(partial + blockIdx.x * int64_t(cols), dw, sums, cols, group);
    if constexpr (LAYER) write_partial(partial + (blocks + blockIdx.x) * int64_t(cols), db, sums, cols, group);
}

// RMSNorm is number 0, LayerNorm 1.
#define EACH_NORM(X) X(0, bf16) X(0, f32) X(1, bf16) X(1, f32)
#define KERNELS(NORM, T) \
    KERNEL(THREADS, norm_forward_##NORM##_##T)(PACKED T* y, OPTIONAL float* mean, float* rstd, PACKED const T* x, \
        PACKED const T* w, OPTIONAL PACKED const T* b, int rows, int cols, int unpadded, int heads, int x_stride, \
        int y_stride, int one_plus, float eps, int group) { \
        forward<NORM == 1>(y, mean, rstd, x, w, b, {rows, cols, unpadded, heads, x_stride}, y_stride, one_plus, eps, group); \
    } \
    KERNEL(THREADS, norm_backward_##NORM##_##T)(PACKED T* dx, float* partial, PACKED const T* dy, PACKED const T* x, \
        PACKED const T* w, OPTIONAL const float* mean, const float* rstd, int rows, int cols, int unpadded, int heads, \
        int x_stride, int y_stride, int one_plus, int group, int add) { \
        backward<NORM == 1>(dx, partial, dy, x, w, mean, rstd, {rows, cols, unpadded, heads, x_stride}, y_stride, one_plus, group, add); \
    }
EACH_NORM(KERNELS)

// out[c] += the sum over b of partial[b, c], b < `count` = ceil(rows / SHARE), out being dw and, of
// blocks of y = 1, db. A block owns 32 columns, one a lane, so that a warp reads whole lines of 128
// bytes; warp w adds rows w, w + warps, ..., then warps are added in order.
KERNEL(THREADS, norm_add_partials)(float* dw, OPTIONAL float* db, const float* partial, int count, int cols) {
    Shared shared;
    float* room = shared.take<float>(THREADS);
    float* out = blockIdx.y == 0 ? dw : db;
    partial += int64_t(blockIdx.y) * count * cols;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + ptx::lane();
    float sum = 0.0f;
    if (c < cols) {
#pragma unroll 8
        for (int b = warp; b < count; b += warps) sum += partial[int64_t(b) * cols + c];
    }
    room[threadIdx.x] = sum;
    __syncthreads();
    if (warp != 0 || c >= cols) return;
    for (int w = 1; w < warps; ++w) sum += room[w * 32 + ptx::lane()];
    out[c] += sum;
}
