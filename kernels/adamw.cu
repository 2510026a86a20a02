// AdamW over the flat buffer of all tensors: g' = scale g, m = b1 m + (1 - b1) g', v = b2 v + (1 -
// b2) g'^2, p = keep p - step m / (root sqrt(v) + eps), where keep = 1 - lr decay, step = lr / (1 -
// b1^t) and root = 1 / sqrt(1 - b2^t) come rounded from the host.
//   shapes   p, m, v, g [n] f32; copy [n] bf16, the new p rounded, or none; starts [groups]: group
//            i is the elements from LINE starts[i] to LINE starts[i + 1], and groups 0, 2, 4, ...
//            decay; starts[0] is 0
//   tiling   256 threads a block; thread t owns packets t and t + 256 of the block's 512 packets of
//            4. A block looks its first group up once and walks on from there
//   memory   reads p, m, v and g, writes p, m and v: 16 + 12 bytes an element, 14 with the copy
//   numerics f32; each element by itself, in the operations and the order of the CPU: the same bits
//   needs    buffers 16-byte aligned, starts ascending; n may be any number
#include "include/kernel.cuh"

constexpr int THREADS = 256;
// 8 loads in flight a thread; with 4 there is room for half as many blocks.
constexpr int PACKETS = 2;
// Elements that a group begins at a multiple of: tensors begin on a cache line.
constexpr int LINE = 16;

struct Constants {
    float keep, beta1, fresh1, beta2, fresh2, step, root, epsilon, scale;
};

static __device__ __forceinline__ void update(float& p, float& m, float& v, float g, float keep, const Constants& k) {
    g *= k.scale;
    m = fmaf(m, k.beta1, k.fresh1 * g);
    v = fmaf(v, k.beta2, k.fresh2 * g * g);
    p = p * keep - k.step * m / fmaf(sqrtf(v), k.root, k.epsilon);
}

// The last of the groups that begin at `line` or before.
static __device__ int group_of(const uint32_t* starts, int groups, uint64_t line) {
    int low = 0, high = groups;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (starts[middle] <= line ? low : high) = middle;
    }
    return low;
}

KERNEL(THREADS, adamw_step_f32)(PACKED float* p, PACKED float* m, PACKED float* v, PACKED const float* g,
                                OPTIONAL PACKED bf16* copy, uint64_t n, const uint32_t* starts, int groups, float keep,
                                float beta1, float fresh1, float beta2, float fresh2, float step, float root, float epsilon,
                                float scale) {
    using P = Packet<float>;
    const Constants k = {keep, beta1, fresh1, beta2, fresh2, step, root, epsilon, scale};
    const uint64_t first = uint64_t(blockIdx.x) * THREADS * PACKETS, whole = n / P::WIDTH;
    P ps[PACKETS], ms[PACKETS], vs[PACKETS], gs[PACKETS];
    for (int i = 0; i < PACKETS; ++i) {
        const uint64_t at = first + i * THREADS + threadIdx.x;
        if (at >= whole) continue;
        ps[i] = load(p, at);
        ms[i] = load(m, at);
        vs[i] = load(v, at);
        gs[i] = load(g, at);
    }
    int group = group_of(starts, groups, first * P::WIDTH / LINE);
#pragma unroll
    for (int i = 0; i < PACKETS; ++i) {
        const uint64_t at = first + i * THREADS + threadIdx.x;
        if (at >= whole) continue;
        while (group + 1 < groups && starts[group + 1] <= at * P::WIDTH / LINE) ++group;
        const float stay = group % 2 == 0 ? keep : 1.0f;
        for (int j = 0; j < P::WIDTH; ++j) update(ps[i].x[j], ms[i].x[j], vs[i].x[j], gs[i].x[j], stay, k);
        store(p, at, ps[i]);
        store(m, at, ms[i]);
        store(v, at, vs[i]);
        if (copy != nullptr) {
            reinterpret_cast<uint2*>(copy)[at] =
                uint2{ptx::pack_bf16(ps[i].x[0], ps[i].x[1]), ptx::pack_bf16(ps[i].x[2], ps[i].x[3])};
        }
    }
    // Elements that do not fill a packet.
    const uint64_t e = whole * P::WIDTH + threadIdx.x;
    if (blockIdx.x != gridDim.x - 1 || e >= n) return;
    update(p[e], m[e], v[e], g[e], group_of(starts, groups, e / LINE) % 2 == 0 ? keep : 1.0f, k);
    if (copy != nullptr) copy[e] = narrow<bf16>(p[e]);
}
