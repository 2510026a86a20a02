// The token with the largest z + g as a row's logits come along, g = -log(-log u) of each token
// anew: a draw from softmax(z) (Gumbel 1954). A token's u is a function of its address and its id
// alone (include/philox.cuh), bit for bit as src/ops/logprob/sample.rs.
#pragma once

#include "online_softmax.cuh"
#include "philox.cuh"

// The best so far; the lowest id among equals. A NaN is never chosen.
struct Choice {
    float score = -INFINITY, z = 0.0f;
    uint32_t token = 0;

    __device__ __forceinline__ void add(const Choice& other) {
        if (other.score > score || (other.score == score && other.token < token)) *this = other;
    }
};

// What sampling keeps of a part of a row: two packets of a partial.
struct Sampled {
    State state;
    Choice best;

    __device__ __forceinline__ void add(const Sampled& other) {
        state.add(other.state);
        best.add(other.best);
    }
};

static __device__ __forceinline__ Sampled shuffle_xor(const Sampled& s, int lanes) {
    Sampled out;
    out.state = shuffle_xor(s.state, lanes);
    out.best.score = ptx::shuffle_xor(s.best.score, lanes);
    out.best.z = ptx::shuffle_xor(s.best.z, lanes);
    out.best.token = ptx::shuffle_xor(s.best.token, lanes);
    return out;
}

static __device__ __forceinline__ void store_partial(float* partial, int64_t at, const Sampled& s) {
    store_partial(partial, 2 * at, s.state);
    store(partial, 2 * at + 1, Packet<float>{{s.best.score, s.best.z, ptx::bits_float(s.best.token), 0.0f}});
}

static __device__ __forceinline__ Sampled load_sampled(const float* partial, int64_t at) {
    const Packet<float> p = load(partial, 2 * at + 1);
    return {load_partial(partial, 2 * at), {p.x[0], p.x[1], ptx::float_bits(p.x[2])}};
}

// The words of four tokens of a row: `token`, which is even and whose bit 3 is 0, the next, and
// those 8 further. They are what a lane has of the sums of mma and of wgmma.
static __device__ __forceinline__ Philox words(const Philox& row, uint32_t token) {
    const uint32_t four = token / 16 * 4 + token / 2 % 4;
    return philox4x32(four, row.word[0], row.word[1], 0, uint64_t(row.word[3]) << 32 | row.word[2]);
}

// From 1 - u, which is exact where u is near 1 and the token may win.
static __device__ __forceinline__ float gumbel(uint32_t word) {
    const float rest = fminf((float(word) + 0.5f) * 0x1p-32f, 0x1.fffffep-1f);
    return -logf(-log1pf(-rest));
}

// How tokens are drawn: row r at samples[r] and positions[r].
struct Draws {
    Stream stream;
    const uint64_t* samples;
    const uint32_t* positions;
    bool greedy; // the largest z
};

// Adds a lane's share of a tile, sums that reduce() bent.
static __device__ __forceinline__ void choose(Choice& best, const float (&x)[Lane::COUNT], int v, int end, float scale,
                                              const Draws& draws, int row) {
    const bool greedy = draws.greedy;
    const Philox key = greedy ? Philox{} : draw(draws.stream, draws.samples[row], draws.positions[row]);
#pragma unroll
    for (int q = 0; q < Lane::COUNT; q += 4) {
        const uint32_t token = v + Lane::column(q);
        Philox word;
        if (!greedy) word = words(key, token);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Choice c;
            c.token = v + Lane::column(q + i), c.z = x[q + i] * scale, c.score = greedy ? c.z : c.z + gumbel(word.word[i]);
            // Ids ascend.
            if (int(c.token) < end && c.score > best.score) best = c;
        }
    }
}
