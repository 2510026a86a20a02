//! Attention on Hopper: the two kernels of the forward pass and that of the backward pass, and the
//! tensor maps of queries, keys and values.

use super::{
    Shape,
    backward::Given,
    cuda::{Input, Kept, scoring},
};
use crate::{
    device::{
        Cuda, Element, View, ViewMut,
        cuda::{
            Launch, Map, Swizzle, Tiles,
            kernels::{attention_backward_sm90 as gradient, attention_sm90 as kernel},
        },
    },
    error::{Error, Result},
};

/// Rows of a warpgroup, and columns of a box.
const WIDE: usize = 64;

/// Positions of a page: fewer where a head is wide, as its sums take the registers.
pub(super) fn page(shape: &Shape) -> usize {
    if shape.head_dim > 128 { kernel::WIDE_HEAD_PAGE } else { kernel::PAGE }
}

/// Threads that keep what they merge, of all blocks: as many in both kernels.
pub(super) fn threads(cuda: &Cuda) -> usize {
    cuda.processors() as usize * 256
}

/// A kernel of `kernels/attention_sm90.cu`. Both give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tile {
    /// Two warpgroups of 64 rows share keys and values.
    Wide,
    /// One warpgroup, and two blocks a multiprocessor where they fit.
    Narrow,
}

impl Tile {
    /// For segments of up to `longest` rows, where `most` positions fill a warpgroup.
    pub(super) fn of(longest: usize, most: usize) -> Self {
        if longest <= most { Self::Narrow } else { Self::Wide }
    }

    pub(super) fn warpgroups(self) -> usize {
        match self {
            Self::Wide => 2,
            Self::Narrow => 1,
        }
    }

    /// Slots of pages, rooms for queries, blocks a multiprocessor, as at the end of the .cu file.
    fn plan(self, head_dim: usize) -> [usize; 3] {
        match (self, head_dim) {
            (Self::Wide, 64) => [8, 2, 1],
            (Self::Wide, 256) => [5, 1, 1],
            (Self::Wide, _) => [5, 2, 1],
            (Self::Narrow, 64) => [6, 2, 2],
            (Self::Narrow, 256) => [5, 2, 1],
            (Self::Narrow, _) => [3, 1, 2],
        }
    }

    fn launch(self, cuda: &Cuda, shape: &Shape, items: usize) -> Result<Launch> {
        let [slots, rooms, beside] = self.plan(shape.head_dim);
        let line = 2 * shape.head_dim.next_multiple_of(WIDE);
        let (slot, room) = (line * page(shape), line * WIDE * self.warpgroups());
        // Two barriers each, and what is asked for in a room; each array begins at 16 bytes.
        let rest = 2 * (8 * slots).next_multiple_of(16) + 2 * 16 + 48 * rooms;
        let shared = slots * slot + rooms * room + rest;
        Launch::row(items.min(cuda.processors() as usize * beside), shared)
    }
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
    (tile, most): (Tile, usize),
    out: ViewMut<'_, T>,
    lse: ViewMut<'_, T::Acc>,
    input: Input<'_, T>,
    shape: &Shape,
    kept: Kept<'_, T::Acc>,
) -> Result<()> {
    let count = input.parts();
    if count == 0 {
        return Ok(());
    }
    let run = match (tile, shape.head_dim) {
        (Tile::Wide, 64) => kernel::forward_128x64,
        (Tile::Wide, 80) => kernel::forward_128x80,
        (Tile::Wide, 96) => kernel::forward_128x96,
        (Tile::Wide, 128) => kernel::forward_128x128,
        (Tile::Wide, _) => kernel::forward_128x256,
        (Tile::Narrow, 64) => kernel::forward_64x64,
        (Tile::Narrow, 80) => kernel::forward_64x80,
        (Tile::Narrow, 96) => kernel::forward_64x96,
        (Tile::Narrow, 128) => kernel::forward_64x128,
        (Tile::Narrow, _) => kernel::forward_64x256,
    };
    let (d, cols, page) = (shape.head_dim, shape.qkv_cols(), page(shape));
    let dims = [d, shape.q_heads, input.qkv.len() / cols];
    let q = boxes(cuda, input.qkv, dims, [1, d, cols], [shape.group(), most])?;
    let dims = [d, page, input.kv.k.len() / (page * d)];
    let map = |x| boxes(cuda, x, dims, [1, d, page * d], [page, 1]);
    let (scale, cap, window) = scoring::<T>(shape);
    run(
        cuda,
        tile.launch(cuda, shape, count * shape.kv_heads)?,
        out,
        lse,
        q,
        map(input.kv.k.view())?,
        map(input.kv.v.view())?,
        input.tiles,
        input.pages,
        kept.stash,
        kept.states,
        count,
        input.slots,
        shape.q_heads,
        shape.kv_heads,
        most,
        scale,
        cap,
        window,
    )
}

/// Positions of a tile of keys, and rows of a tile of queries, whole positions.
pub(super) fn backward_tiles(shape: &Shape) -> [usize; 2] {
    let keys = if shape.head_dim <= 128 { gradient::KEYS } else { gradient::WIDE_KEYS };
    [keys, gradient::ROWS / shape.group() * shape.group()]
}

/// Turns of a tile of queries: where a warpgroup has half of the columns, it has its own.
pub(super) fn backward_turns(shape: &Shape) -> usize {
    if shape.head_dim <= 128 { 1 } else { 2 }
}

/// Bytes of shared memory of the backward pass.
fn backward_shared(shape: &Shape) -> usize {
    // As at the end of the .cu file.
    let slots = match shape.head_dim {
        64 => 4,
        256 => 2,
        _ => 3,
    };
    let ([keys, _], line) = (backward_tiles(shape), 2 * shape.head_dim.next_multiple_of(WIDE));
    // Keys and values, slots of queries and dout, two of ds, and of weights where they go through
    // memory.
    let tiles = 2 * keys * line + 2 * slots * WIDE * line;
    let weights = 2 * backward_turns(shape) * keys * 2 * WIDE;
    // Of each slot two numbers a row and ten words; two barriers each, and two of keys; each array
    // begins at 16 bytes.
    let facts = (slots * (8 * WIDE + 40)).next_multiple_of(16);
    tiles + weights + facts + 2 * (8 * slots).next_multiple_of(16) + 2 * 16
}

pub(super) fn backward<T: Element>(
    cuda: &Cuda,
    dqkv: ViewMut<'_, T>,
    sums: ViewMut<'_, T::Acc>,
    turns: ViewMut<'_, u32>,
    given: Given<'_, T>,
    shape: &Shape,
) -> Result<()> {
    if given.count == 0 {
        return Ok(());
    }
    let run = match shape.head_dim {
        64 => gradient::dqkv_64,
        80 => gradient::dqkv_80,
        96 => gradient::dqkv_96,
        128 => gradient::dqkv_128,
        _ => gradient::dqkv_256,
    };
    let (d, cols, q_cols) = (shape.head_dim, shape.qkv_cols(), shape.q_heads * shape.head_dim);
    let ([keys, queries], qkv) = (backward_tiles(shape), given.input.qkv);
    let (rows, most) = (qkv.len() / cols, queries / shape.group());
    let (dims, tile) = ([d, shape.q_heads, rows], [shape.group(), most]);
    // Of a row what follows its queries: keys, then values.
    let (kv, kv_dims) = (qkv.range(q_cols..qkv.len()), [d, 2 * shape.kv_heads, rows]);
    let blocks = (given.count * shape.kv_heads).min(cuda.processors() as usize);
    let (scale, cap, window) = scoring::<T>(shape);
    run(
        cuda,
        Launch::row(blocks, backward_shared(shape))?.together(),
        dqkv,
        sums,
        turns,
        boxes(cuda, qkv, dims, [1, d, cols], tile)?,
        boxes(cuda, given.input.dout, dims, [1, d, q_cols], tile)?,
        boxes(cuda, kv, kv_dims, [1, d, cols], [1, keys])?,
        given.input.lse,
        given.delta,
        given.tiles,
        given.visits,
        given.count,
        shape.q_heads,
        shape.kv_heads,
        most,
        scale,
        cap,
        window,
    )
}
