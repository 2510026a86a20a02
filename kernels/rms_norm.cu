// RMSNorm over the last axis: y[r,c] = x[r,c] * rstd[r] * w[c], rstd[r] = 1 / sqrt(mean_c x[r,c]^2
// + eps).
//   shapes   x, y, dx, dy [rows, cols] and w [cols] bf16 or f32; rstd [rows] f32, kept; dw [cols]
//            f32; partial [ceil(rows / SHARE), cols] f32, scratch
//   tiling   `group` threads a row, a power of two from 32 to 512, 512 / group rows a block at a
//            time; thread t of a group owns packets t, t + group, ..., at most 16 elements: the
//            whole row stays in registers, in backward packed, beside the next one and as many sums
//            for dw. backward: a block takes SHARE rows
//   memory   forward reads x and writes y once, 4 bytes an element in bf16, 8 in f32; add_forward,
//            x += r first, 8 (16), where two passes take 10 (20); backward reads x and dy and
//            writes dx once, 6 bytes (12), with `add` reads it, too, 8 (16), and writes and reads
//            partial, 8 / SHARE bytes
//   numerics sums in f32, fused, one rounding on the way out. dw: rows of a group in order, groups
//            in order, blocks in order, then added to what is there
//   needs    cols a multiple of the packet and at most 512 * 16; rows and w 16-byte aligned: the
//            launcher checks
#include "include/partials.cuh"
#include "include/reduce.cuh"

constexpr int THREADS = 512;
constexpr int ELEMENTS = 16;
// Rows of a block in backward. Half as many make twice the blocks, but partial sums of 8 % of the
// traffic.
constexpr int SHARE = 32;

// Packets that a thread holds of a row.
template <class T>
constexpr int PACKETS = ELEMENTS / Packet<T>::WIDTH;

template <class T, class Rows>
static __device__ void forward(T* y, float* rstd, Rows x, const T* w, int rows, int cols, float eps, int group) {
    constexpr int N = Packet<T>::WIDTH;
    Shared shared;
    float* room = shared.take<float>(THREADS / 32);
    const int packets = cols / N, lane = threadIdx.x % group;
    const int row = blockIdx.x * (THREADS / group) + threadIdx.x / group;
    const int64_t base = int64_t(row) * packets;
    Elements<N> v[PACKETS<T>];
    float squares[1] = {0.0f};
    for (int i = 0; i < PACKETS<T>; ++i) {
        const int p = lane + i * group;
        if (row >= rows || p >= packets) continue;
        v[i] = x(base + p);
        for (int j = 0; j < N; ++j) squares[0] = fmaf(v[i].x[j], v[i].x[j], squares[0]);
    }
    group_sum(squares, group, room);
    if (row >= rows) return;
    const float r = 1.0f / sqrtf(squares[0] / cols + eps);
    if (lane == 0) rstd[row] = r;
    for (int i = 0; i < PACKETS<T>; ++i) {
        const int p = lane + i * group;
        if (p >= packets) continue;
        const Elements<N> weight = take<N>(w, p);
        for (int j = 0; j < N; ++j) v[i].x[j] *= r * weight.x[j];
        put<N>(y, base + p, v[i]);
    }
}

// With g = dy w: dx = rstd (g - x rstd^2 mean_c(g x)), with `add` dx += that, and the sums over the
// block's rows of dy x rstd.
template <class T>
static __device__ void backward(T* dx, float* partial, const T* dy, const T* x, const T* w, const float* rstd, int rows, int cols,
                                int group, int add) {
    constexpr int N = Packet<T>::WIDTH;
    const int groups = THREADS / group, lane = threadIdx.x % group, packets = cols / N;
    Shared shared;
    float* room = shared.take<float>(THREADS / 32);
    float* sums = shared.take<float>(groups * cols);
    const int first = blockIdx.x * SHARE, end = rows - first < SHARE ? rows : first + SHARE;
    const int own = threadIdx.x / group;
    Elements<N> dw[PACKETS<T>] = {};
    auto next = fetch_row<PACKETS<T>>(x, dy, first + own, end, packets, group);
    float next_r = first + own < end ? rstd[first + own] : 0.0f;
    for (int at = first; at < end; at += groups) {
        const int row = at + own, after = row + groups;
        const bool there = row < end;
        const int64_t base = int64_t(row) * packets;
        const auto now = next;
        const float r = next_r;
        if (AHEAD<T>) next = fetch_row<PACKETS<T>>(x, dy, after, end, packets, group);
        next_r = after < end ? rstd[after] : 0.0f;
        float dot[1] = {0.0f};
        for (int i = 0; i < PACKETS<T>; ++i) {
            const int p = lane + i * group;
            if (!there || p >= packets) continue;
            Packet<T> v, g;
            unpack(v.x, now.x[i]);
            unpack(g.x, now.dy[i]);
            const Elements<N> weight = take<N>(w, p);
            for (int j = 0; j < N; ++j) {
                dw[i].x[j] = fmaf(g.x[j], v.x[j] * r, dw[i].x[j]);
                dot[0] = fmaf(g.x[j] * weight.x[j], v.x[j], dot[0]);
            }
        }
        group_sum(dot, group, room);
        const float pull = dot[0] / cols * r * r;
        for (int i = 0; i < PACKETS<T>; ++i) {
            const int p = lane + i * group;
            if (!there || p >= packets) continue;
            Packet<T> v, g;
            unpack(v.x, now.x[i]);
            unpack(g.x, now.dy[i]);
            const Elements<N> weight = take<N>(w, p);
            Elements<N> sum = add != 0 ? take<N>(dx, base + p) : Elements<N>{};
            for (int j = 0; j < N; ++j) sum.x[j] += fmaf(-v.x[j], pull, g.x[j] * weight.x[j]) * r;
            put<N>(dx, base + p, sum);
        }
        if (!AHEAD<T>) next = fetch_row<PACKETS<T>>(x, dy, after, end, packets, group);
    }
    write_partial(partial + blockIdx.x * int64_t(cols), dw, sums, cols, group);
}

KERNEL(THREADS, rms_norm_forward_bf16)(PACKED bf16* y, float* rstd, PACKED const bf16* x, PACKED const bf16* w, int rows, int cols,
                                       float eps, int group) {
    forward(y, rstd, Plain<bf16>{x}, w, rows, cols, eps, group);
}

KERNEL(THREADS, rms_norm_forward_f32)(PACKED float* y, float* rstd, PACKED const float* x, PACKED const float* w, int rows,
                                      int cols, float eps, int group) {
    forward(y, rstd, Plain<float>{x}, w, rows, cols, eps, group);
}

KERNEL(THREADS, rms_norm_add_forward_bf16)(PACKED bf16* y, float* rstd, PACKED bf16* x, PACKED const bf16* r,
                                           PACKED const bf16* w, int rows, int cols, float eps, int group) {
    forward(y, rstd, Added<bf16>{x, r}, w, rows, cols, eps, group);
}

KERNEL(THREADS, rms_norm_add_forward_f32)(PACKED float* y, float* rstd, PACKED float* x, PACKED const float* r,
                                           PACKED const float* w, int rows, int cols, float eps, int group) {
    forward(y, rstd, Added<float>{x, r}, w, rows, cols, eps, group);
}

KERNEL(THREADS, rms_norm_backward_bf16)(PACKED bf16* dx, float* partial, PACKED const bf16* dy, PACKED const bf16* x,
                                        PACKED const bf16* w, const float* rstd, int rows, int cols, int group, int add) {
    backward(dx, partial, dy, x, w, rstd, rows, cols, group, add);
}

KERNEL(THREADS, rms_norm_backward_f32)(PACKED float* dx, float* partial, PACKED const float* dy, PACKED const float* x,
                                       PACKED const float* w, const float* rstd, int rows, int cols, int group, int add) {
    backward(dx, partial, dy, x, w, rstd, rows, cols, group, add);
}

// `count` is ceil(rows / SHARE).
KERNEL(THREADS, rms_norm_add_partials)(float* dw, const float* partial, int count, int cols) {
    Shared shared;
    add_partials(dw, partial, count, cols, shared.take<float>(THREADS));
}
