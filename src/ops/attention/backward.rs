//! The backward pass on a CUDA device: which tiles of keys meet which tiles of queries, in what
//! order, and the launch.

use std::{cmp::Reverse, ops::Range};

use super::{Segment, Shape, Work, cuda, hopper};
use crate::{
    device::{
        Arch, Cuda, Element, View, ViewMut,
        cuda::{Launch, kernels::attention_backward as kernel},
    },
    error::Result,
};

/// Positions of a tile of keys, and rows of a tile of queries.
fn tiles(cuda: &Cuda, shape: &Shape) -> [usize; 2] {
    if cuda.arch() == Arch::Sm90 {
        return hopper::backward_tiles(shape);
    }
    [if shape.head_dim <= 128 { kernel::TILE } else { kernel::WIDE_TILE }; 2]
}

/// Positions of a tile of keys.
pub(super) fn keys(cuda: &Cuda, shape: &Shape) -> usize {
    tiles(cuda, shape)[0]
}

/// Of [`Parts`](super::Parts): what a kernel does for every KV head, eight words a tile of keys and
/// then eight for each visit; none if a segment lacks its beginning.
///
/// The gradient of a tile of queries is summed over the tiles of keys that it sees, in ascending
/// order, by the blocks that have these, in turn. Blocks take tiles of keys in the order of this
/// list: each waits only for tiles before it, and those with the most to do come early.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Plan {
    tiles: usize,
    /// Runs of tiles of queries that see a tile of keys.
    visits: usize,
    turns: usize,
}

/// A tile of keys.
struct Tile {
    words: [u32; 4],
    visits: Range<usize>,
    /// The most tiles of queries that it, or one that waits for it, visits.
    most: usize,
}

impl Plan {
    pub fn new(cuda: &Cuda, shape: &Shape, segments: &[Segment], words: &mut Vec<u32>) -> Self {
        // What no kernel takes is refused by name where it would run.
        let late = segments.iter().any(|s| s.first != 0 && s.prefix.is_none());
        if late || shape.group() > cuda::ROWS {
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
                tiles.push(Tile { words, visits: start..visits.len(), most: steps });
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
        (plan.tiles, plan.visits) = (tiles.len(), visits.len());
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

/// What the gradient is made from.
pub(super) struct Input<'a, T: Element> {
    pub dout: View<'a, T>,
    pub out: View<'a, T>,
    pub qkv: View<'a, T>,
    pub lse: View<'a, T::Acc>,
}

/// `scratch` has [`backward_scratch_len`](super::backward_scratch_len) elements, two heads of keys
/// and values a group more than the queries': room for one number a row and head and two turns a
/// row and group, since a group is at most 64 heads and a head at least as wide.
pub(super) fn run<T: Element>(
    cuda: &Cuda,
    dqkv: ViewMut<'_, T>,
    input: Input<'_, T>,
    work: Work<'_>,
    shape: &Shape,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "attention::backward";
    cuda::check(OP, shape)?;
    let (parts, words) = cuda::parts(OP, cuda, work, shape, None)?;
    let (plan, d) = (parts.backward, shape.head_dim);
    let heads = input.lse.len();
    let (sums, rest) = scratch.split_at(heads * d);
    let (mut delta, rest) = rest.split_at(heads);
    let each = if cuda.arch() == Arch::Sm90 { hopper::backward_turns(shape) } else { 1 };
    let (turns, mut waits) = (plan.turns * shape.kv_heads * each, rest.cast::<u32>());
    let launch = Launch::threads((8 * heads).max(turns), kernel::THREADS)?;
    let (to, none) = (delta.reborrow(), waits.reborrow());
    kernel::Delta {
        delta: to,
        turns: none,
        dout: input.dout,
        out: input.out,
        heads,
        d,
        count: turns,
    }
    .launch(cuda, launch)?;
    let [_, from] = parts.begins();
    let middle = from + 8 * plan.tiles;
    let (tiles, visits) = (words.range(from..middle), words.range(middle..words.len()));
    let given = Given { input, delta: delta.view(), tiles, visits, count: plan.tiles };
    if cuda.arch() == Arch::Sm90 {
        hopper::backward(cuda, dqkv, sums, waits, given, shape)
    } else {
        ampere(cuda, dqkv, sums, waits, given, shape)
    }
}

/// What a launch is given.
pub(super) struct Given<'a, T: Element> {
    pub input: Input<'a, T>,
    pub delta: View<'a, T::Acc>,
    pub tiles: View<'a, u32>,
    pub visits: View<'a, u32>,
    pub count: usize,
}

fn ampere<T: Element>(
    cuda: &Cuda,
    dqkv: ViewMut<'_, T>,
    sums: ViewMut<'_, T::Acc>,
    turns: ViewMut<'_, u32>,
    given: Given<'_, T>,
    shape: &Shape,
) -> Result<()> {
    let d = shape.head_dim;
    let run = match d {
        64 => kernel::dqkv_64,
        80 => kernel::dqkv_80,
        96 => kernel::dqkv_96,
        128 => kernel::dqkv_128,
        _ => kernel::dqkv_256,
    };
    let ([size, _], wide) = (tiles(cuda, shape), d.next_multiple_of(64));
    // Keys, values, queries twice and dout; then weights and their gradients.
    let shared = (5 * size * wide + 2 * size * 64) * 2;
    let blocks = (given.count * shape.kv_heads).min(cuda.processors() as usize);
    let (scale, cap, window) = cuda::scoring::<T>(shape);
    run(
        cuda,
        Launch::row(blocks, shared)?.together(),
        dqkv,
        sums,
        turns,
        given.input.dout,
        given.input.qkv,
        given.input.lse,
        given.delta,
        given.tiles,
        given.visits,
        given.count,
        shape.q_heads,
        shape.kv_heads,
        scale,
        cap,
        window,
    )
}
