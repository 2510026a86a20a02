// What the backward passes of attention share: tiles of keys, their tiles of queries, the order.
//
// The sums of dq go from block to block: for every tile of queries a turn counts the tiles of keys
// that were added. Items stand so that one waits for earlier ones only, and a block takes its own
// in that order: so the first that is unfinished does not wait. Queries are visited from the last
// on: all tiles of keys of a sequence begin at the same tile, each a step behind the one before it,
// and stay so; so a block that runs beside m of its neighbours waits m steps, once. From the first
// on, each would begin at its own diagonal and wait there until all before it had come so far:
// twice as long.
#pragma once

#include "attention.cuh"

// A tile of keys of one sequence: `count` positions from `position` on, in the batch from row `at`
// on; `rank` tiles of what its queries see come before it. Eight words, as those of a visit.
struct Keys {
    int at, count, position, rank, begin, end;
    __device__ __forceinline__ Keys(const uint32_t* words, int t) {
        const uint32_t* w = words + 8 * int64_t(t);
        at = w[0], count = w[1], position = w[2], rank = w[3], begin = w[4], end = w[5];
    }
};

// Tiles [begin, end) of the queries of a sequence's `rows` positions from `first` on, in the batch
// from row `at` on: row i of tile t is row `size` t + i of all, position by position and for each
// the heads of the group. Their turns are listed from `turns` on; `before` tiles of keys come
// before its own.
struct Visit {
    int at, rows, first, turns, begin, end, before;
    __device__ __forceinline__ Visit(const uint32_t* words, int v) {
        const uint32_t* w = words + 8 * int64_t(v);
        at = w[0], rows = w[1], first = w[2], turns = w[3], begin = w[4], end = w[5], before = w[6];
    }
};

// How rows of queries are made of positions and heads.
struct Groups {
    int size, inverse;
    __device__ __forceinline__ explicit Groups(int size) : size(size), inverse((65535 + size) / size) {}
    // i / size, for i < 128.
    __device__ __forceinline__ int whole(int i) const { return i * inverse >> 16; }
};

// The rows of a tile of up to SIZE: batch row and position of row 0, whose head is `skip` of the
// group, and how many there are. Where tiles are of whole positions, `size` of SIZE rows are used.
template <int SIZE>
struct Rows {
    int at, first, skip, count;
    Groups group;
    // Rows of whole positions; the caller sets first and count.
    __device__ __forceinline__ explicit Rows(const Groups& group) : at(0), first(0), skip(0), count(0), group(group) {}
    __device__ __forceinline__ Rows(const Visit& v, int t, const Groups& group, int size = SIZE) : group(group) {
        const int begin = t * size, p = begin / group.size, left = v.rows * group.size - begin;
        at = v.at + p, first = v.first + p, skip = begin - p * group.size;
        count = left < size ? left : size;
    }
    // Positions of row i after that of row 0.
    __device__ __forceinline__ int after(int i) const { return group.whole(skip + i); }
    // Where row i begins, after what belongs to batch row `at` and the group: rows of the batch are
    // `cols` apart, heads `each`.
    __device__ __forceinline__ int offset(int i, int cols, int each) const {
        const int p = after(i);
        return p * cols + (skip + i - p * group.size) * each;
    }
};

// The tiles of queries that see a tile of keys in turn, those of a visit from the last on.
template <int SIZE>
struct Steps {
    const uint32_t* words;
    int size, next, end, t;
    Rows<SIZE> rows;
    __device__ __forceinline__ Steps(const uint32_t* words, const Keys& keys, const Groups& group, int size = SIZE)
        : words(words), size(size), next(keys.begin), end(keys.end), rows(visit(), t = visit().end - 1, group, size) {}
    __device__ __forceinline__ bool there() const { return next < end; }
    // Read again at each step: registers.
    __device__ __forceinline__ Visit visit() const { return Visit(words, next); }
    __device__ __forceinline__ void advance() {
        if (--t < visit().begin) {
            if (++next == end) return;
            t = visit().end - 1;
        }
        rows = Rows<SIZE>(visit(), t, rows.group, size);
    }
};

// Place of this tile of keys among those that the rows see, `size` positions each: how many come
// before it, and whether it is the last. The first begins the sums of dq, the last ends them.
struct Among {
    int before;
    bool last;
    template <int SIZE>
    __device__ __forceinline__ Among(const Keys& keys, const Visit& visit, const Rows<SIZE>& rows, const Scoring& by, int size) {
        const int seen = by.from(rows.first), end = rows.first + rows.after(rows.count - 1);
        before = keys.rank - (seen < visit.first ? seen / size : visit.before + (seen - visit.first) / size);
        last = keys.rank == visit.before + (end - visit.first) / size;
    }
};
