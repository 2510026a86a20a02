//! Attention on Hopper: blocks and shared memory of its kernels, and the tensor maps of queries,
//! keys and values.

use super::Shape;
use crate::{
    device::{
        Cuda, Element, View,
        cuda::{
            Launch, Map, Swizzle, Tiles,
            kernels::{
                attention, attention_backward, attention_backward_sm90 as gradient,
                attention_sm90 as kernel,
            },
        },
    },
    error::{Error, Result},
};

/// Rows of a warpgroup, and columns of a box.
const WIDE: usize = 64;

/// Positions of a page: fewer where a head is wide, as its sums take the registers.
pub(super) fn page(head_dim: usize) -> usize {
    if head_dim > 128 { kernel::PAGE_256 } else { kernel::PAGE }
}

/// Threads of all blocks that merge split-KV partials: as many in both kernels.
pub(super) fn threads(cuda: &Cuda) -> usize {
    cuda.processors() as usize * 256
}

/// Rows of a block of `kernels/attention_sm90.cu`. Both give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForwardTile {
    /// Two warpgroups of 64 rows share keys and values.
    Prefill,
    /// One warpgroup, and two blocks a multiprocessor where they fit.
    Decode,
}

impl ForwardTile {
    /// For segments of up to `longest` rows, where `most` positions fill a warpgroup.
    pub(super) fn of(longest: usize, most: usize) -> Self {
        if longest <= most { Self::Decode } else { Self::Prefill }
    }

    pub(super) fn warpgroups(self) -> usize {
        match self {
            Self::Prefill => 2,
            Self::Decode => 1,
        }
    }

    /// Stages of pages, buffers of queries, blocks a multiprocessor, as in the .cu file.
    fn plan(self, head_dim: usize) -> [usize; 3] {
        match (self, head_dim) {
            (Self::Prefill, ..=64) => [8, 2, 1],
            (Self::Prefill, 65..=128) => [5, 2, 1],
            (Self::Prefill, _) => [5, 1, 1],
            (Self::Decode, ..=64) => [6, 2, 2],
            (Self::Decode, 65..=128) => [3, 1, 2],
            (Self::Decode, _) => [5, 2, 1],
        }
    }

    fn launch(self, cuda: &Cuda, head_dim: usize, items: usize) -> Result<Launch> {
        let [stages, buffers, beside] = self.plan(head_dim);
        let line = 2 * head_dim.next_multiple_of(WIDE);
        let (stage, buffer) = (line * page(head_dim), line * WIDE * self.warpgroups());
        // Two barriers each, and the task of a buffer; each array begins at 16 bytes.
        let rest = 2 * (8 * stages).next_multiple_of(16) + 2 * 16 + 48 * buffers;
        let shared = stages * stage + buffers * buffer + rest;
        Launch::row(items.min(cuda.processors() as usize * beside), shared)
    }
}

/// For each head size the blocks that a multiprocessor holds at once in decoding, and how many of
/// them it is meant to.
pub(super) fn resident(cuda: &Cuda) -> Result<Vec<[usize; 3]>> {
    let of = |d: &usize| {
        let [_, _, meant] = ForwardTile::Decode.plan(*d);
        let launch = ForwardTile::Decode.launch(cuda, *d, 1)?;
        let blocks = kernel::Forward::<half::bf16>::resident(cuda, [WIDE, *d], launch)?;
        Ok([*d, blocks as usize, meant])
    };
    attention::FORWARD_SIZES.iter().map(of).collect()
}

/// Boxes of 64 columns of a tensor whose innermost dimension is a head.
fn boxes<'a, T: Element>(
    cuda: &Cuda,
    x: View<'a, T>,
    dims: [usize; 3],
    strides: [usize; 3],
    [inner, outer]: [usize; 2],
) -> Result<Map<'a>> {
    if T::NAME != half::bf16::NAME {
        let reason = format!("`attention` has no kernel for {}", T::NAME);
        return Err(Error::Device { wanted: "cuda".into(), reason });
    }
    let tile = [WIDE, inner, outer];
    cuda.map(x, Tiles { dims, strides, tile, swizzle: Swizzle::Bytes128 })
}

/// Runs `tile`, whose warpgroups have up to `most` positions.
pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    shape: &Shape,
    (tile, most): (ForwardTile, usize),
    args: attention::Forward<'_, T>,
) -> Result<()> {
    if args.count == 0 {
        return Ok(());
    }
    let attention::Forward { qkv, k, v, count, q_heads, kv_heads, .. } = args;
    let (d, cols, page) = (shape.head_dim, shape.qkv_cols(), page(shape.head_dim));
    let q = boxes(cuda, qkv, [d, q_heads, qkv.len() / cols], [1, d, cols], [shape.group(), most])?;
    let dims = [d, page, k.len() / (page * d)];
    let pages = |x| boxes(cuda, x, dims, [1, d, page * d], [page, 1]);
    kernel::Forward {
        out: args.out,
        lse: args.lse,
        q,
        k: pages(k)?,
        v: pages(v)?,
        tiles: args.tiles,
        pages: args.pages,
        block_partials: args.block_partials,
        partials: args.partials,
        count,
        slots: args.slots,
        q_heads,
        kv_heads,
        most,
        scale: args.scale,
        cap: args.cap,
        window: args.window,
    }
    .launch(cuda, [tile.warpgroups() * WIDE, d], tile.launch(cuda, d, count * kv_heads)?)
}

/// Positions of a tile of keys, and rows of a tile of queries, whole positions.
pub(super) fn backward_tiles(shape: &Shape) -> [usize; 2] {
    let keys = if shape.head_dim <= 128 { gradient::KEYS } else { gradient::KEYS_256 };
    [keys, gradient::ROWS / shape.group() * shape.group()]
}

/// Turns of a tile of queries: where a warpgroup has half of the columns, it has its own.
pub(super) fn backward_turns(shape: &Shape) -> usize {
    if shape.head_dim <= 128 { 1 } else { 2 }
}

/// Bytes of shared memory of the backward pass.
fn backward_shared(shape: &Shape) -> usize {
    // As in the .cu file.
    let stages = match shape.head_dim {
        ..=64 => 4,
        65..=128 => 3,
        _ => 2,
    };
    let ([keys, _], line) = (backward_tiles(shape), 2 * shape.head_dim.next_multiple_of(WIDE));
    // Keys and values, stages of queries and dout, two of ds, and of weights where they go through
    // memory.
    let tiles = 2 * keys * line + 2 * stages * WIDE * line;
    let weights = 2 * backward_turns(shape) * keys * 2 * WIDE;
    // Two numbers a row and ten words for each stage; two barriers each, and two of keys; each
    // array begins at 16 bytes.
    let facts = (stages * (8 * WIDE + 40)).next_multiple_of(16);
    tiles + weights + facts + 2 * (8 * stages).next_multiple_of(16) + 2 * 16
}

pub(super) fn backward<T: Element>(
    cuda: &Cuda,
    shape: &Shape,
    args: attention_backward::Dqkv<'_, T>,
) -> Result<()> {
    if args.count == 0 {
        return Ok(());
    }
    let attention_backward::Dqkv { dout, qkv, count, q_heads, kv_heads, .. } = args;
    let (d, cols, q_cols) = (shape.head_dim, shape.qkv_cols(), q_heads * shape.head_dim);
    let ([keys, queries], rows) = (backward_tiles(shape), qkv.len() / cols);
    let most = queries / shape.group();
    let (dims, tile) = ([d, q_heads, rows], [shape.group(), most]);
    // What follows a row's queries: keys, then values.
    let (kv, kv_dims) = (qkv.range(q_cols..qkv.len()), [d, 2 * kv_heads, rows]);
    let blocks = (count * kv_heads).min(cuda.processors() as usize);
    gradient::Dqkv {
        dqkv: args.dqkv,
        sums: args.sums,
        turns: args.turns,
        q: boxes(cuda, qkv, dims, [1, d, cols], tile)?,
        dout: boxes(cuda, dout, dims, [1, d, q_cols], tile)?,
        kv: boxes(cuda, kv, kv_dims, [1, d, cols], [1, keys])?,
        lse: args.lse,
        delta: args.delta,
        tiles: args.tiles,
        visits: args.visits,
        count,
        q_heads,
        kv_heads,
        most,
        scale: args.scale,
        cap: args.cap,
        window: args.window,
    }
    .launch(cuda, d, Launch::row(blocks, backward_shared(shape))?.together())
}
