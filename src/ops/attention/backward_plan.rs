//! The backward pass on a CUDA device: which tiles of keys meet which tiles of queries, in what
//! order.

use std::{cmp::Reverse, ops::Range};

use super::{ROWS, Segment, Shape, sm80, sm90};
use crate::device::{Arch, Cuda};

/// Positions of a tile of keys, and rows of a tile of queries.
fn tiles(cuda: &Cuda, shape: &Shape) -> [usize; 2] {
    match cuda.arch() {
        Arch::Sm80 => [sm80::backward_tile(shape); 2],
        Arch::Sm90 => sm90::backward_tiles(shape),
    }
}

/// Positions of a tile of keys.
pub(super) fn keys(cuda: &Cuda, shape: &Shape) -> usize {
    tiles(cuda, shape)[0]
}

/// What a kernel does for every KV head, as words of a [`Partition`](super::Partition): eight for
/// each tile of keys, then eight for each visit; none if a segment lacks its beginning.
///
/// The gradient of a tile of queries is summed over the tiles of keys that it sees, in ascending
/// order, by the blocks that have these, in turn. Blocks take tiles of keys in the order of this
/// list: each waits only for tiles before it, and those with the most to do come early.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackwardPlan {
    pub tiles: usize,
    /// Counters, one for each tile of queries, of the tiles of keys whose turn has passed.
    pub turns: usize,
}

/// A tile of keys.
struct KeyTile {
    words: [u32; 4],
    visits: Range<usize>,
    /// The most tiles of queries that it, or one that waits for it, visits.
    most: usize,
}

impl BackwardPlan {
    pub fn new(cuda: &Cuda, shape: &Shape, segments: &[Segment], words: &mut Vec<u32>) -> Self {
        // What no kernel takes is refused by name where it would run.
        let late = segments.iter().any(|s| s.first != 0 && s.prefix.is_none());
        if late || shape.group() > ROWS {
            return Self::default();
        }
        let [size, queries_size] = tiles(cuda, shape);
        let mut plan = Self::default();
        let mut turns = Vec::new();
        let mut followers = vec![Vec::new(); segments.len()];
        for (i, s) in segments.iter().enumerate() {
            turns.push(plan.turns);
            plan.turns += (s.rows as usize * shape.group()).div_ceil(queries_size);
            if let Some(p) = s.prefix {
                followers[p as usize].push(i);
            }
        }
        let (mut tiles, mut visits) = (Vec::new(), Vec::<[u32; 8]>::new());
        for (i, s) in segments.iter().enumerate() {
            let before = (s.first as usize).div_ceil(size);
            for (rank, row) in (0..s.rows as usize).step_by(size).enumerate() {
                let (keys, start) = (size.min(s.rows as usize - row), visits.len());
                let position = s.first as usize + row;
                let mut steps = 0;
                for q in [i].iter().chain(&followers[i]) {
                    let (queries, t) = (&segments[*q], turns[*q]);
                    let run = seen_by(shape, position..position + keys, queries, queries_size);
                    if run.is_empty() {
                        continue;
                    }
                    steps += run.len();
                    let (at, rows, first) = (queries.at, queries.rows, queries.first);
                    let own = (first as usize).div_ceil(size);
                    let [t, begin, end, own] = [t, run.start, run.end, own].map(|x| x as u32);
                    visits.push([at, rows, first, t, begin, end, own, 0]);
                }
                let [row, keys, position, rank] =
                    [s.at as usize + row, keys, position, before + rank].map(|x| x as u32);
                let words = [row, keys, position, rank];
                tiles.push(KeyTile { words, visits: start..visits.len(), most: steps });
            }
        }
        // From the last on, so that those who wait are known.
        let (mut end, mut most) = (tiles.len(), vec![0; segments.len()]);
        for (i, s) in segments.iter().enumerate().rev() {
            let start = end - (s.rows as usize).div_ceil(size);
            let mut so_far = followers[i].iter().map(|f| most[*f]).max().unwrap_or(0);
            for tile in tiles[start..end].iter_mut().rev() {
                so_far = so_far.max(tile.most);
                tile.most = so_far;
            }
            (most[i], end) = (so_far, start);
        }
        // Stable: of equals the one that is waited for stays first.
        tiles.sort_by_key(|t| Reverse(t.most));
        for t in &tiles {
            words.extend(t.words);
            words.extend([t.visits.start as u32, t.visits.end as u32, 0, 0]);
        }
        words.extend(visits.iter().flatten());
        plan.tiles = tiles.len();
        plan
    }
}

/// Tiles of these queries with a row that sees one of these positions.
fn seen_by(shape: &Shape, keys: Range<usize>, queries: &Segment, size: usize) -> Range<usize> {
    let (first, group) = (queries.first as usize, shape.group());
    let begin = keys.start.saturating_sub(first) * group / size;
    let window = shape.window.map_or(usize::MAX, |w| keys.end - 1 + w as usize);
    let rows = window.saturating_sub(first).min(queries.rows as usize);
    begin..(rows * group).div_ceil(size).max(begin)
}
