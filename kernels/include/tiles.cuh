// A block's tile of a matrix product on the tensor cores of sm_80 and newer: C[i, j] = sum over k
// of L[i, k] R[j, k]. Every sum is one chain over k, 16 at a time in ascending order, and nothing
// but k and the operands goes into it: so a row of C has the same bits in every tile, at every
// place in it, and with any number of rows.
#pragma once

#include "elements.cuh"
#include "raster.cuh"

// A tile of BM x BN, of which a warp has WM x WN; DEPTH of k are a stage, STAGES of them under way.
template <int BM_, int BN_, int WM_, int WN_, int DEPTH_, int STAGES_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, DEPTH = DEPTH_, STAGES = STAGES_;
    static constexpr int ACROSS = BN / WN, THREADS = BM / WM * ACROSS * 32;
    static constexpr int OPERANDS = STAGES * DEPTH * (BM + BN) * 2, SUMS = BM * BN * 4;
    // Bytes of shared memory: the stages, and after them the sums. The launcher computes the same.
    static constexpr int SHARED = OPERANDS > SUMS ? OPERANDS : SUMS;
    static_assert(BM % WM == 0 && BN % WN == 0 && WM % 16 == 0 && WN % 16 == 0 && DEPTH % 16 == 0, "whole fragments");

    // Row and column of the warp's part.
    static __device__ __forceinline__ int row() { return threadIdx.x / 32 / ACROSS * WM; }
    static __device__ __forceinline__ int col() { return threadIdx.x / 32 % ACROSS * WN; }
};

// Those of the layers' and of the LM head's gradients.
using T128x128 = Tile<128, 128, 64, 64, 32, 4>;
using T64x64 = Tile<64, 64, 32, 32, 32, 4>;

// The warp's part of C: element e of [i][j] is that of ptx::mma_bf16 in fragment (i, j).
template <class T>
struct Sums {
    float x[T::WM / 16][T::WN / 8][4] = {};
};

// Where a tile's rows are: `count` rows of k that lie in lines of `ld` elements, or, by columns,
// lines of rows that lie k after k. The second half of the tile begins `apart` rows after the
// first: half a tile, but for pairs.
struct Operand {
    const bf16* x;
    int count, ld, first, apart;
};

// Chunk `c` of 8 elements of line `line`, lines of LINE chunks: placed so that 8 lines that
// ldmatrix reads at one chunk lie in different banks.
template <int LINE>
static __device__ __forceinline__ int chunk(int line, int c) {
    return line * LINE + (LINE >= 8 ? c ^ line % 8 : c ^ line / 2 % 4);
}

// Copies ROWS rows of an operand, a stage of k at a time. Every thread has the same chunk of some
// lines.
template <class T, int ROWS, bool COLUMNS>
struct Loader {
    static constexpr int LINE = (COLUMNS ? ROWS : T::DEPTH) / 8, LINES = COLUMNS ? T::DEPTH : ROWS;
    static constexpr int STEP = T::THREADS / LINE, EACH = LINES / STEP;
    static_assert(LINE >= 4 && T::THREADS % LINE == 0 && LINES % STEP == 0 && (COLUMNS || ROWS / 2 % STEP == 0), "equal shares");

    const bf16* from;
    int64_t ld, apart; // elements between lines, and between the halves
    int depth;
    unsigned rows; // bit i: the row of line i is there

    __device__ __forceinline__ Loader(const Operand& o, int depth) : ld(o.ld), depth(depth), rows(0) {
        const int line = int(threadIdx.x) / LINE, c = int(threadIdx.x) % LINE * 8;
        apart = COLUMNS ? 0 : int64_t(o.apart - ROWS / 2) * o.ld;
        from = o.x + (COLUMNS ? line * ld + o.first + c : (o.first + line) * ld + c);
        for (int i = 0; i < EACH; ++i) {
            const int at = i * STEP, second = at >= ROWS / 2 ? o.apart - ROWS / 2 : 0;
            const int row = COLUMNS ? o.first + c : o.first + line + at + second;
            rows |= unsigned(row < o.count) << i;
        }
    }

    // Copies k0 .. k0 + DEPTH to `to`; zeros where there are no rows or no k.
    __device__ __forceinline__ void copy(bf16* to, int k0) const {
        const int line = int(threadIdx.x) / LINE, c = int(threadIdx.x) % LINE;
        for (int i = 0; i < EACH; ++i) {
            const int at = i * STEP, k = COLUMNS ? k0 + line + at : k0 + c * 8;
            const bf16* p = from + (COLUMNS ? (k0 + at) * ld : at * ld + (at >= ROWS / 2 ? apart : 0) + k0);
            const bool there = k < depth && (rows >> i & 1) != 0;
            ptx::copy_async(to + chunk<LINE>(line + at, c) * 8, there ? p : from, there ? 0 : 16);
        }
    }
};

// Fragments of 16 rows from `row` on and 16 k from `k` on: a[] of ptx::mma_bf16.
template <class T, int ROWS, bool COLUMNS>
static __device__ __forceinline__ void load_rows(uint32_t (&out)[4], const bf16* stage, int row, int k) {
    const int l = ptx::lane();
    if constexpr (COLUMNS) {
        ptx::load_matrix_transposed(out, stage + chunk<ROWS / 8>(k + l / 16 * 8 + l % 8, row / 8 + l / 8 % 2) * 8);
    } else {
        ptx::load_matrix(out, stage + chunk<T::DEPTH / 8>(row + l % 16, k / 8 + l / 16) * 8);
    }
}

// The same of R: out[0..2] is b[] of 8 rows, out[2..4] that of the next 8.
template <class T, int ROWS, bool COLUMNS>
static __device__ __forceinline__ void load_cols(uint32_t (&out)[4], const bf16* stage, int row, int k) {
    const int l = ptx::lane();
    if constexpr (COLUMNS) {
        ptx::load_matrix_transposed(out, stage + chunk<ROWS / 8>(k + l % 16, row / 8 + l / 16) * 8);
    } else {
        ptx::load_matrix(out, stage + chunk<T::DEPTH / 8>(row + l / 16 * 8 + l % 8, k / 8 + l / 8 % 2) * 8);
    }
}

// Adds a stage to the sums; where ONES, `ones` gets the sums of L's rows, as a product with a
// column of ones.
template <class T, bool L_COLUMNS, bool R_COLUMNS, bool ONES>
static __device__ __forceinline__ void multiply(Sums<T>& sums, float (*ones)[4], const bf16* stage) {
    const bf16* right = stage + T::BM * T::DEPTH;
#pragma unroll
    for (int k = 0; k < T::DEPTH; k += 16) {
        uint32_t a[T::WM / 16][4];
        for (int i = 0; i < T::WM / 16; ++i) load_rows<T, T::BM, L_COLUMNS>(a[i], stage, T::row() + 16 * i, k);
        for (int j = 0; j < T::WN / 16; ++j) {
            uint32_t b[4];
            load_cols<T, T::BN, R_COLUMNS>(b, right, T::col() + 16 * j, k);
            const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
            for (int i = 0; i < T::WM / 16; ++i) {
                ptx::mma_bf16(sums.x[i][2 * j], a[i], low);
                ptx::mma_bf16(sums.x[i][2 * j + 1], a[i], high);
            }
        }
        if constexpr (ONES) {
            constexpr uint32_t ONE[2] = {0x3F803F80u, 0x3F803F80u};
            for (int i = 0; i < T::WM / 16; ++i) ptx::mma_bf16(ones[i], a[i], ONE);
        }
    }
}

// Adds all of k, which `left` and `right` bring, to the sums. `room` holds T::SHARED bytes, free
// again then. All threads call it.
template <class T, bool L_COLUMNS, bool R_COLUMNS, bool ONES = false, class Left, class Right>
static __device__ __forceinline__ void product(Sums<T>& sums, float (*ones)[4], const Left& left, const Right& right, int depth, bf16* room) {
    constexpr int STAGE = T::DEPTH * (T::BM + T::BN), LEFT = T::DEPTH * T::BM;
    const int steps = (depth + T::DEPTH - 1) / T::DEPTH;
    auto copy = [&](int step) {
        if (step < steps) {
            bf16* to = room + step % T::STAGES * STAGE;
            left.copy(to, step * T::DEPTH);
            right.copy(to + LEFT, step * T::DEPTH);
        }
        ptx::copy_commit();
    };
    for (int s = 0; s < T::STAGES - 1; ++s) copy(s);
    for (int s = 0; s < steps; ++s) {
        ptx::copy_wait<T::STAGES - 2>();
        // All have the stage, and all are done with the one before it, which is filled again.
        __syncthreads();
        copy(s + T::STAGES - 1);
        multiply<T, L_COLUMNS, R_COLUMNS, ONES>(sums, ones, room + s % T::STAGES * STAGE);
    }
    ptx::copy_wait<0>();
    __syncthreads();
}

// Eight neighbours of a row of sums lie together, the eights so that no bank is asked twice.
template <class T>
static __device__ __forceinline__ float* eight(float* room, int row, int e) {
    return room + row * T::BN + (e ^ row % 4) * 8;
}

// Writes the sums to `room`, in eights.
template <class T>
static __device__ __forceinline__ void spread(const Sums<T>& sums, float* room) {
    const int l = ptx::lane();
    for (int i = 0; i < T::WM / 16; ++i) {
        for (int j = 0; j < T::WN / 8; ++j) {
            for (int half = 0; half < 2; ++half) {
                float* to = eight<T>(room, T::row() + 16 * i + 8 * half + l / 4, T::col() / 8 + j) + l % 4 * 2;
                *reinterpret_cast<float2*>(to) = float2{sums.x[i][j][2 * half], sums.x[i][j][2 * half + 1]};
            }
        }
    }
}

// Gives the sums to f, eight neighbours of a row at a time: f(row, col, x), or, of a PAIR, f(row,
// col, x, y) where y is of the tile's second half. All threads call it; `room` is that of the
// product.
template <class T, bool PAIR, class F>
static __device__ __forceinline__ void give(const Sums<T>& sums, float* room, F f) {
    spread(sums, room);
    __syncthreads();
    constexpr int EIGHTS = T::BN / 8 / (PAIR ? 2 : 1);
    for (int p = threadIdx.x; p < T::BM * EIGHTS; p += T::THREADS) {
        const int row = p / EIGHTS, e = p % EIGHTS;
        auto take = [&](int e) {
            Elements<8> v;
            const float4* from = reinterpret_cast<const float4*>(eight<T>(room, row, e));
            for (int h = 0; h < 2; ++h) {
                const float4 four = from[h];
                v.x[4 * h] = four.x, v.x[4 * h + 1] = four.y, v.x[4 * h + 2] = four.z, v.x[4 * h + 3] = four.w;
            }
            return v;
        };
        if constexpr (PAIR) {
            f(row, 8 * e, take(e), take(e + EIGHTS));
        } else {
            f(row, 8 * e, take(e));
        }
    }
}

// The tile of C that `left` and `right` bring: f(row, col, x), or f(row, col, x, y) of a PAIR, gets
// eight neighbours of one of its rows. Where ONES and `l_sums` is not null, adds the sums of L's
// rows to it, of which `l_rows` are there.
template <class T, bool L_COLUMNS, bool R_COLUMNS, bool PAIR, bool ONES, class Left, class Right, class F>
static __device__ __forceinline__ void each_eight_of(const Left& left, const Right& right, int depth, F f, float* l_sums, int l_rows) {
    Shared shared;
    char* memory = shared.take<char>(T::SHARED, 128);
    bf16* room = reinterpret_cast<bf16*>(memory);
    Sums<T> sums;
    if (ONES && l_sums != nullptr) {
        float ones[T::WM / 16][4] = {};
        product<T, L_COLUMNS, R_COLUMNS, ONES>(sums, ones, left, right, depth, room);
        // Each column of the product with ones is the sum; the first of each row of warps is taken.
        for (int i = 0; i < T::WM / 16 && T::col() == 0 && ptx::lane() % 4 == 0; ++i) {
            const int row = T::row() + 16 * i + ptx::lane() / 4;
            if (row < l_rows) l_sums[row] += ones[i][0];
            if (row + 8 < l_rows) l_sums[row + 8] += ones[i][2];
        }
    } else {
        product<T, L_COLUMNS, R_COLUMNS>(sums, nullptr, left, right, depth, room);
    }
    give<T, PAIR>(sums, reinterpret_cast<float*>(memory), f);
}

// C = L Rᵀ, a tile a block, where callers say of the operands all but `first` and `apart`: f(row,
// col, x) gets eight neighbours of a row of C. Of a PAIR C is two halves, R's second beginning
// `apart` rows after the first, and f(row, col, x, y) gets y from the second. Where ONES and
// `l_sums` is not null, it adds the sums of L's rows to that.
template <class T, bool L_COLUMNS, bool R_COLUMNS, bool PAIR = false, bool ONES = false, class F>
static __device__ __forceinline__ void each_eight(Operand l, Operand r, int depth, F f, float* l_sums = nullptr) {
    constexpr int WIDTH = PAIR ? T::BN / 2 : T::BN;
    const int rows = l.count, cols = PAIR ? r.apart : r.count;
    const RasterTile at = raster(blockIdx.x, (rows + T::BM - 1) / T::BM, (cols + WIDTH - 1) / WIDTH);
    l.first = at.down * T::BM, l.apart = T::BM / 2, r.first = at.across * WIDTH;
    if (!PAIR) r.apart = T::BN / 2;
    float* own = ONES && l_sums != nullptr && at.across == 0 ? l_sums + l.first : nullptr;
    const Loader<T, T::BM, L_COLUMNS> left(l, depth);
    const Loader<T, T::BN, R_COLUMNS> right(r, depth);
    each_eight_of<T, L_COLUMNS, R_COLUMNS, PAIR, ONES>(left, right, depth, [&](int row, int col, auto... x) {
        row += l.first, col += r.first;
        if (row < rows && col < cols) f(row, col, x...);
    }, own, rows - l.first);
}

static __device__ __forceinline__ void add(Elements<8>& x, const Elements<8>& y) {
    for (int i = 0; i < 8; ++i) x.x[i] += y.x[i];
}
// sum += x, at its eight number i.
static __device__ __forceinline__ void add_at(float* sum, int64_t i, const Elements<8>& x) {
    Elements<8> all = take<8>(sum, i);
    add(all, x);
    put<8>(sum, i, all);
}
