// The k tokens of a row with the largest z as its logits come along (Milakov and Gimelshein 2018,
// algorithm 4). A warp keeps a row's list, sorted, lane i number i. A number of a list is a key: an
// order of all z and tokens, so what is best is the same in whatever order they come.
#pragma once

#include "online_softmax.cuh"

// A list's numbers: a lane each.
constexpr int MOST = 32;

// The larger z, a NaN below all and -0 equal to 0; of equals the lower token. 0 is no token's.
static __device__ __forceinline__ uint64_t key(float z, uint32_t token) {
    const uint32_t bits = ptx::float_bits(z + 0.0f);
    const uint32_t order = z != z ? 0 : bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
    return uint64_t(order) << 32 | ~token;
}
static __device__ __forceinline__ uint32_t token_of(uint64_t key) { return ~uint32_t(key); }
static __device__ __forceinline__ float z_of(uint64_t key) {
    const uint32_t order = uint32_t(key >> 32);
    if (order == 0) return NAN;
    return ptx::bits_float(order >> 31 != 0 ? order & 0x7FFFFFFFu : ~order);
}

// Adds a candidate of each lane to the warp's list, of which the first k count.
static __device__ __forceinline__ void insert(uint64_t& mine, uint64_t candidate, int k) {
    // What is no longer among them when its turn comes changes nothing that counts.
    for (unsigned who = ptx::ballot(candidate > ptx::shuffle(mine, k - 1)); who != 0; who &= who - 1) {
        const uint64_t one = ptx::shuffle(candidate, ptx::lowest(who)), above = ptx::shuffle_up(mine, 1);
        const uint64_t next = ptx::lane() == 0 || above > one ? one : above;
        mine = next > mine ? next : mine;
    }
}

// A warp's lists of ROWS rows of a chunk, in shared memory.
template <int ROWS>
class Top {
    // Stride of a tile's row: 8 elements of padding, so that no bank is asked twice.
    static constexpr int LINE = COLUMNS + 8, TILE = 8 * LINE * 4;
    char* room_;
    int warp_, k_;

    __device__ __forceinline__ float* line(int r) const { return reinterpret_cast<float*>(room_ + warp_ * BYTES) + r * LINE; }
    // This lane's number of a row's list.
    __device__ __forceinline__ uint64_t& own(int r) const {
        return reinterpret_cast<uint64_t*>(room_ + warp_ * BYTES + TILE)[r * MOST + ptx::lane()];
    }

  public:
    // Bytes of shared memory for a warp. The launcher computes the same.
    static constexpr int BYTES = TILE + ROWS * MOST * 8;

    // `room` holds BYTES for each warp.
    __device__ __forceinline__ Top(char* room, int warp, int k) : room_(room), warp_(warp), k_(k) {}
    // Adds a lane's share of a tile, sums that reduce() bent: of the warp's rows from `first` on
    // eight, of which `rows` are there, and of columns those from v on.
    __device__ __forceinline__ void add(const float (&x)[Lane::COUNT], int first, int rows, int v, int end, float scale) const {
        float* to = line(ptx::lane() / 4);
#pragma unroll
        for (int q = 0; q < Lane::COUNT; q += 2) {
            *reinterpret_cast<float2*>(to + Lane::column(q)) = float2{x[q] * scale, x[q + 1] * scale};
        }
        ptx::sync_warp();
#pragma unroll 1
        for (int r = 0; r < 8 && r < rows; ++r) {
            uint64_t mine = v % CHUNK == 0 ? 0 : own(first + r), candidates[COLUMNS / 32];
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; ++i) {
                const int col = 32 * i + ptx::lane();
                candidates[i] = v + col < end ? key(line(r)[col], v + col) : 0;
            }
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; ++i) insert(mine, candidates[i], k_);
            own(first + r) = mine;
        }
        // The next tile is written here.
        ptx::sync_warp();
    }
    // Writes the lists to lists [rows, chunks, k]; the warp's rows begin at `first`.
    __device__ __forceinline__ void store(uint64_t* lists, int first, int rows, int chunk, int chunks) const {
        if (ptx::lane() >= k_) return;
        for (int r = 0; r < ROWS && first + r < rows; ++r) {
            lists[(int64_t(first + r) * chunks + chunk) * k_ + ptx::lane()] = own(r);
        }
    }
};
