// Causal depthwise convolutions over a few rows: u[t, c] = sum_j w[c, j] x[t - taps + 1 + j, c],
// zeros before a sequence, y = u or silu(u); and their gradients. Rows of a continued sequence
// follow those in its slot of the state.
//   shapes   y, dy [rows, channels], x and dx columns of rows of their own stride, w [channels,
//            taps], state [slots, taps - 1, channels], bf16 or f32; spans [sequences, 4]: first
//            row, rows, position of the first, slot; partial [sequences, taps, channels],
//            dw [channels, taps] f32
//   tiling   a thread a channel of a sequence, which walks its rows with the last ones in
//            registers; channels side by side. Sum: a thread a weight
//   memory   reads x, and dy, once and writes y or dx once: 4 bytes an element in bf16, backward 6
//   numerics in f32, taps in ascending order, one rounding on the way out; dw: the rows of a
//            sequence in ascending order, then sequences
//   needs    taps <= TAPS: the launcher checks
#include "include/activation.cuh"

constexpr int THREADS = 128;
// Most taps.
constexpr int TAPS = 4;

// The last rows of a channel, the newest last.
struct Taps {
    float x[TAPS];
    __device__ __forceinline__ void push(float next) {
        for (int j = 0; j + 1 < TAPS; ++j) x[j] = x[j + 1];
        x[TAPS - 1] = next;
    }
};

// sum_j w[j] x[j] of the last `taps`, oldest first.
static __device__ __forceinline__ float convolve(const Taps& w, const Taps& x, int taps) {
    float u = 0.0f;
    for (int j = 0; j < TAPS; ++j) {
        if (j >= TAPS - taps) u = fmaf(w.x[j], x.x[j], u);
    }
    return u;
}

template <class T>
static __device__ Taps weights(const T* w, int channel, int taps) {
    Taps out;
    for (int j = 0; j < TAPS; ++j) out.x[j] = j < TAPS - taps ? 0.0f : widen(w[int64_t(channel) * taps + j - (TAPS - taps)]);
    return out;
}

template <class T>
static __device__ void forward(T* y, T* state, const T* x, const T* w, const uint32_t* spans, int channels, int taps, int silu,
                               int x_first, int x_stride, int blocks) {
    const int channel = blockIdx.x % blocks * THREADS + threadIdx.x;
    if (channel >= channels) return;
    const uint32_t* span = spans + int64_t(blockIdx.x / blocks) * 4;
    const int64_t at = span[0], rows = span[1];
    const Taps weight = weights(w, channel, taps);
    Taps last = {};
    T* kept = state == nullptr ? nullptr : state + int64_t(span[3]) * (taps - 1) * channels + channel;
    if (kept != nullptr && span[2] > 0) {
        for (int j = 1; j < TAPS; ++j) {
            if (j > TAPS - taps) last.x[j] = widen(kept[int64_t(j - 1 - (TAPS - taps)) * channels]);
        }
    }
    for (int64_t r = at; r < at + rows; ++r) {
        last.push(widen(x[r * x_stride + x_first + channel]));
        const float u = convolve(weight, last, taps);
        y[r * channels + channel] = narrow<T>(silu ? Silu::at(u).y : u);
    }
    if (kept == nullptr) return;
    for (int j = 1; j < TAPS; ++j) {
        if (j > TAPS - taps) kept[int64_t(j - 1 - (TAPS - taps)) * channels] = narrow<T>(last.x[j]);
    }
}

template <class T>
static __device__ void backward(T* dx, float* partial, const T* dy, const T* x, const T* w, const uint32_t* spans, int channels,
                                int taps, int silu, int x_first, int x_stride, int d_first, int d_stride, int blocks) {
    const int channel = blockIdx.x % blocks * THREADS + threadIdx.x, sequence = blockIdx.x / blocks;
    if (channel >= channels) return;
    const uint32_t* span = spans + int64_t(sequence) * 4;
    const int64_t at = span[0], rows = span[1];
    const Taps weight = weights(w, channel, taps);
    Taps last = {}, du = {}, dw = {};
    // du of rows behind the last one is 0.
    for (int64_t t = 0; t < rows + taps - 1; ++t) {
        const int64_t r = at + t;
        float d = 0.0f;
        if (t < rows) {
            last.push(widen(x[r * x_stride + x_first + channel]));
            const float u = convolve(weight, last, taps);
            d = widen(dy[r * channels + channel]) * (silu ? Silu::at(u).slope : 1.0f);
            for (int j = 0; j < TAPS; ++j) {
                if (j >= TAPS - taps) dw.x[j] = fmaf(d, last.x[j], dw.x[j]);
            }
        }
        du.push(d);
        if (t < taps - 1) continue;
        // The newest du meets the oldest weight.
        float sum = 0.0f;
        for (int j = 0; j < TAPS; ++j) {
            if (j >= TAPS - taps) sum = fmaf(weight.x[j], du.x[TAPS - 1 - (j - (TAPS - taps))], sum);
        }
        dx[(r - (taps - 1)) * d_stride + d_first + channel] = narrow<T>(sum);
    }
    for (int j = 0; j < TAPS; ++j) {
        if (j >= TAPS - taps) partial[(int64_t(sequence) * taps + j - (TAPS - taps)) * channels + channel] = dw.x[j];
    }
}

#define KERNELS(T) \
    KERNEL(THREADS, short_conv_forward_##T)(T* y, OPTIONAL T* state, const T* x, const T* w, const uint32_t* spans, int channels, \
        int taps, int silu, int x_first, int x_stride, int blocks) { \
        forward(y, state, x, w, spans, channels, taps, silu, x_first, x_stride, blocks); \
    } \
    KERNEL(THREADS, short_conv_backward_##T)(T* dx, float* partial, const T* dy, const T* x, const T* w, const uint32_t* spans, \
        int channels, int taps, int silu, int x_first, int x_stride, int d_first, int d_stride, int blocks) { \
        backward(dx, partial, dy, x, w, spans, channels, taps, silu, x_first, x_stride, d_first, d_stride, blocks); \
    }
EACH_DTYPE(KERNELS)

// dw[c, j] += the partial sums of all sequences.
KERNEL(THREADS, short_conv_sum)(float* dw, const float* partial, int channels, int taps, int sequences) {
    const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= int64_t(channels) * taps) return;
    const int64_t channel = i / taps, tap = i % taps;
    float sum = dw[i];
    for (int64_t s = 0; s < sequences; ++s) sum += partial[(s * taps + tap) * channels + channel];
    dw[i] = sum;
}
