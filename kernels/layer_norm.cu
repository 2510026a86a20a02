// LayerNorm over the last axis: y[r,c] = (x[r,c] - mean[r]) * rstd[r] * w[c] + b[c], mean[r] =
// mean_c x[r,c], rstd[r] = 1 / sqrt(mean_c (x[r,c] - mean[r])^2 + eps).
//   shapes   x, y, dx, dy [rows, cols] and w, b [cols] bf16 or f32; mean, rstd [rows] f32, kept;
//            dw, db [cols] f32; partial [2, ceil(rows / SHARE), cols] f32, scratch: first for dw,
//            then for db
//   tiling   `group` threads a row, a power of two from 32 to 512, 512 / group rows a block at a
//            time; thread t of a group owns packets t, t + group, ..., at most 16 elements: the
//            whole row stays in registers, in backward packed, beside the next one and as many sums
//            for dw and for db. backward: a block takes SHARE rows
//   memory   forward reads x and writes y once, 4 bytes an element in bf16, 8 in f32; add_forward,
//            x += r first, 8 (16), where two passes take 10 (20); backward reads x and dy and
//            writes dx once, 6 bytes (12), with `add` reads it, too, 8 (16), and writes and reads
//            partial, 16 / SHARE bytes
//   numerics sums in f32, fused, the variance from the deviations, in a second pass over registers;
//            one rounding on the way out. dw and db: rows of a group in order, groups in order,
//            blocks in order, then added to what is there
//   needs    cols a multiple of the packet and at most 512 * 16; rows, w and b 16-byte aligned: the
//            launcher checks
#include "include/partials.cuh"
#include "include/reduce.cuh"

constexpr int THREADS = 512;
constexpr int ELEMENTS = 16;
// Rows of a block in backward: half as many make twice the blocks, and twice the traffic of partial
// sums.
constexpr int SHARE = 32;

// Packets that a thread holds of a row.
template <class T>
constexpr int PACKETS = ELEMENTS / Packet<T>::WIDTH;

template <class T, class Rows>
static __device__ void forward(T* y, float* mean, float* rstd, Rows x, const T* w, const T* b, int rows, int cols, float eps,
                               int group) {
    constexpr int N = Packet<T>::WIDTH;
    Shared shared;
    float* room = shared.take<float>(THREADS / 32);
    const int packets = cols / N, lane = threadIdx.x % group;
    const int row = blockIdx.x * (THREADS / group) + threadIdx.x / group;
    const int64_t base = int64_t(row) * packets;
    Elements<N> v[PACKETS<T>];
    float sum[1] = {0.0f}, squares[1] = {0.0f};
    for (int i = 0; i < PACKETS<T>; ++i) {
        const int p = lane + i * group;
        if (row >= rows || p >= packets) continue;
        v[i] = x(base + p);
        for (int j = 0; j < N; ++j) sum[0] += v[i].x[j];
    }
    group_sum(sum, group, room);
    const float m = sum[0] / cols;
    for (int i = 0; i < PACKETS<T>; ++i) {
        if (row >= rows || lane + i * group >= packets) continue;
        for (int j = 0; j < N; ++j) {
            v[i].x[j] -= m;
            squares[0] = fmaf(v[i].x[j], v[i].x[j], squares[0]);
        }
    }
    group_sum(squares, group, room);
    if (row >= rows) return;
    const float r = 1.0f / sqrtf(squares[0] / cols + eps);
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
    for (int i = 0; i < PACKETS<T>; ++i) {
        const int p = lane + i * group;
        if (p >= packets) continue;
        const Elements<N> weight = take<N>(w, p), bias = take<N>(b, p);
        for (int j = 0; j < N; ++j) v[i].x[j] = fmaf(v[i].x[j] * r, weight.x[j], bias.x[j]);
        put<N>(y, base + p, v[i]);
    }
}

// With n = (x - mean) rstd and g = dy w: dx = rstd (g - mean_c(g) - n mean_c(g n)), with `add` dx
// += that, and the sums over the block's rows of dy n and of dy.
template <class T>
static __device__ void backward(T* dx, float* partial, const T* dy, const T* x, const T* w, const float* mean, const float* rstd,
                                int rows, int cols, int group, int add) {
    constexpr int N = Packet<T>::WIDTH;
    const int groups = THREADS / group, lane = threadIdx.x % group, packets = cols / N;
    Shared shared;
    float* room = shared.take<float>(2 * THREADS / 32);
    float* sums = shared.take<float>(groups * cols);
    const int first = blockIdx.x * SHARE, end = rows - first < SHARE ? rows : first + SHARE;
    const int own = threadIdx.x / group;
    Elements<N> dw[PACKETS<T>] = {}, db[PACKETS<T>] = {};
    auto next = fetch_row<PACKETS<T>>(x, dy, first + own, end, packets, group);
    float next_m = first + own < end ? mean[first + own] : 0.0f, next_r = first + own < end ? rstd[first + own] : 0.0f;
    for (int at = first; at < end; at += groups) {
        const int row = at + own, after = row + groups;
        const bool there = row < end;
        const int64_t base = int64_t(row) * packets;
        const auto now = next;
        const float m = next_m, r = next_r;
        if (AHEAD<T>) next = fetch_row<PACKETS<T>>(x, dy, after, end, packets, group);
        next_m = after < end ? mean[after] : 0.0f;
        next_r = after < end ? rstd[after] : 0.0f;
        float dots[2] = {0.0f, 0.0f};
        for (int i = 0; i < PACKETS<T>; ++i) {
            const int p = lane + i * group;
            if (!there || p >= packets) continue;
            Packet<T> v, g;
            unpack(v.x, now.x[i]);
            unpack(g.x, now.dy[i]);
            const Elements<N> weight = take<N>(w, p);
            for (int j = 0; j < N; ++j) {
                const float n = (v.x[j] - m) * r;
                dw[i].x[j] = fmaf(g.x[j], n, dw[i].x[j]);
                db[i].x[j] += g.x[j];
                dots[0] += g.x[j] * weight.x[j];
                dots[1] = fmaf(g.x[j] * weight.x[j], n, dots[1]);
            }
        }
        group_sum(dots, group, room);
        const float shift = dots[0] / cols, pull = dots[1] / cols;
        for (int i = 0; i < PACKETS<T>; ++i) {
            const int p = lane + i * group;
            if (!there || p >= packets) continue;
            Packet<T> v, g;
            unpack(v.x, now.x[i]);
            unpack(g.x, now.dy[i]);
            const Elements<N> weight = take<N>(w, p);
            Elements<N> sum = add != 0 ? take<N>(dx, base + p) : Elements<N>{};
            for (int j = 0; j < N; ++j) {
                sum.x[j] += fmaf(-((v.x[j] - m) * r), pull, g.x[j] * weight.x[j] - shift) * r;
            }
            put<N>(dx, base + p, sum);
        }
        if (!AHEAD<T>) next = fetch_row<PACKETS<T>>(x, dy, after, end, packets, group);
    }
    const int blocks = (rows + SHARE - 1) / SHARE;
    write_partial(partial + blockIdx.x * int64_t(cols), dw, sums, cols, group);
    write_partial(partial + (blocks + blockIdx.x) * int64_t(cols), db, sums, cols, group);
}

KERNEL(THREADS, layer_norm_forward_bf16)(PACKED bf16* y, float* mean, float* rstd, PACKED const bf16* x, PACKED const bf16* w,
                                         PACKED const bf16* b, int rows, int cols, float eps, int group) {
    forward(y, mean, rstd, Plain<bf16>{x}, w, b, rows, cols, eps, group);
}

KERNEL(THREADS, layer_norm_forward_f32)(PACKED float* y, float* mean, float* rstd, PACKED const float* x, PACKED const float* w,
                                        PACKED const float* b, int rows, int cols, float eps, int group) {
    forward(y, mean, rstd, Plain<float>{x}, w, b, rows, cols, eps, group);
}

KERNEL(THREADS, layer_norm_add_forward_bf16)(PACKED bf16* y, float* mean, float* rstd, PACKED bf16* x, PACKED const bf16* r,
                                         PACKED const bf16* w, PACKED const bf16* b, int rows, int cols, float eps, int group) {
    forward(y, mean, rstd, Added<bf16>{x, r}, w, b, rows, cols, eps, group);
}

KERNEL(THREADS, layer_norm_add_forward_f32)(PACKED float* y, float* mean, float* rstd, PACKED float* x, PACKED const float* r,
                                         PACKED const float* w, PACKED const float* b, int rows, int cols, float eps, int group) {
    forward(y, mean, rstd, Added<float>{x, r}, w, b, rows, cols, eps, group);
}

KERNEL(THREADS, layer_norm_backward_bf16)(PACKED bf16* dx, float* partial, PACKED const bf16* dy, PACKED const bf16* x,
                                          PACKED const bf16* w, const float* mean, const float* rstd, int rows, int cols,
                                          int group, int add) {
    backward(dx, partial, dy, x, w, mean, rstd, rows, cols, group, add);
}

KERNEL(THREADS, layer_norm_backward_f32)(PACKED float* dx, float* partial, PACKED const float* dy, PACKED const float* x,
                                         PACKED const float* w, const float* mean, const float* rstd, int rows, int cols,
                                         int group, int add) {
    backward(dx, partial, dy, x, w, mean, rstd, rows, cols, group, add);
}

// Row 0 of the grid adds to dw, row 1 to db; `count` is ceil(rows / SHARE).
KERNEL(THREADS, layer_norm_add_partials)(float* dw, float* db, const float* partial, int count, int cols) {
    Shared shared;
    float* room = shared.take<float>(THREADS);
    const bool bias = blockIdx.y == 1;
    add_partials(bias ? db : dw, bias ? partial + int64_t(count) * cols : partial, count, cols, room);
}
