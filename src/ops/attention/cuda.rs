//! Attention on a CUDA device: which kernel runs, and on how many blocks.

use super::{KvLayer, Parts, Shape, Work, hopper};
use crate::{
    device::{
        Arch, Cuda, Element, View, ViewMut,
        cuda::{Launch, kernels::attention as kernel},
    },
    error::{Error, Result},
    ops::rope::Table,
};

/// Positions of a page, and of a step of attention.
pub(super) fn page(cuda: &Cuda, shape: &Shape) -> usize {
    if cuda.arch() == Arch::Sm90 { hopper::page(shape) } else { kernel::PAGE }
}

/// Rows of a tile: positions and heads of a group.
pub(super) const ROWS: usize = 64;

/// Positions after which a row's softmax starts anew, as in `kernels/include/attention.cuh`.
pub(super) const SPLIT: usize = 1024;

/// Blocks that share a multiprocessor, by their registers.
fn beside(head_dim: usize) -> usize {
    if head_dim <= 128 { 3 } else { 1 }
}

fn blocks(cuda: &Cuda, shape: &Shape) -> usize {
    cuda.processors() as usize * beside(shape.head_dim)
}

/// Elements that blocks need to keep what they merge.
fn stash_len(cuda: &Cuda, shape: &Shape) -> usize {
    let threads = if cuda.arch() == Arch::Sm90 {
        hopper::threads(cuda)
    } else {
        blocks(cuda, shape) * kernel::THREADS
    };
    threads * (shape.head_dim / 2 + 4)
}

/// Elements that `rows` rows need from one launch to the next.
fn states_len(shape: &Shape, rows: usize, states: usize) -> usize {
    rows * shape.q_heads * (shape.head_dim + 8) * states
}

/// Of both, for `singles` rows that are alone in their segments, in sequences of `positions`.
pub(super) fn scratch_len(cuda: &Cuda, shape: &Shape, singles: usize, positions: usize) -> usize {
    let states = if shape.window.is_some() { 0 } else { positions.div_ceil(SPLIT) };
    stash_len(cuda, shape) + states_len(shape, singles, states)
}

/// Widths of heads that there are kernels for.
pub(super) const WIDTHS: [usize; 5] = [64, 80, 96, 128, 256];

pub(super) fn check(op: &str, shape: &Shape) -> Result<()> {
    let group = shape.group();
    if !WIDTHS.contains(&shape.head_dim) {
        let what = format!("{op}: head_dim on a CUDA device");
        return Err(Error::value(what, format!("one of {WIDTHS:?}"), shape.head_dim));
    }
    if group > ROWS {
        let what = format!("{op}: query heads of a KV head on a CUDA device");
        return Err(Error::value(what, format!("at most {ROWS}"), group));
    }
    if shape.scale.is_nan() || shape.scale <= 0.0 {
        let what = format!("{op}: scale on a CUDA device");
        return Err(Error::value(what, "a positive number", shape.scale));
    }
    Ok(())
}

/// The parts of the segments, with a cache of `pages` where there is one, and their words on the
/// device.
pub(super) fn parts<'a>(
    op: &'static str,
    cuda: &Cuda,
    work: Work<'a>,
    shape: &Shape,
    pages: Option<usize>,
) -> Result<(&'a Parts, View<'a, u32>)> {
    let (want, what) = ("those of the segments", format!("{op}: parts on a CUDA device"));
    let (parts, words) = work.parts.ok_or_else(|| Error::value(what, want, "none"))?;
    parts.check(op, cuda, shape, work.segments, pages)?;
    crate::shape::check(op, "parts", &[parts.words().len()], words.len())?;
    Ok((parts, words))
}

pub(super) fn append<T: Element>(
    cuda: &Cuda,
    kv: &mut KvLayer<'_, T>,
    mut qkv: ViewMut<'_, T>,
    work: Work<'_>,
    shape: &Shape,
    table: Option<&Table<T::Acc>>,
) -> Result<()> {
    const OP: &str = "attention::append";
    check(OP, shape)?;
    if let Some(table) = table.filter(|t| t.head_dim() != shape.head_dim) {
        return Err(Error::shape(OP, "table", &[shape.head_dim], &[table.head_dim()]));
    }
    let (parts, words) = parts(OP, cuda, work, shape, Some(kv.pages(shape)))?;
    let ([mut begin, _], page) = (parts.begins(), kv.page);
    // What is copied from prefixes goes after those are turned.
    for (runs, table) in parts.runs.into_iter().zip([table, None]) {
        let list = words.range(begin..begin + 5 * runs);
        begin += 5 * runs;
        let (angles, entries) = table.map(Table::angles).unzip();
        kernel::Append {
            k: kv.k.view_mut(),
            v: kv.v.view_mut(),
            qkv: qkv.reborrow(),
            table: angles,
            runs: list,
            pages: work.pages,
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            d: shape.head_dim,
            page,
            entries: entries.unwrap_or(0),
        }
        .launch(cuda, Launch::row(runs * shape.kv_heads, 0)?)?;
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    mut out: ViewMut<'_, T>,
    mut lse: ViewMut<'_, T::Acc>,
    qkv: View<'_, T>,
    kv: &KvLayer<'_, T>,
    work: Work<'_>,
    shape: &Shape,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "attention";
    check(OP, shape)?;
    let (parts, words) = parts(OP, cuda, work, shape, Some(kv.pages(shape)))?;
    let [slots, states] = parts.kept;
    let scratch = scratch.scratch(OP, stash_len(cuda, shape) + states_len(shape, slots, states))?;
    let (mut stash, mut states) = scratch.split_at(stash_len(cuda, shape));
    let mut done = 0;
    for (count, tile) in parts.launches.into_iter().zip(parts.tiles) {
        let input = Input {
            qkv,
            kv,
            tiles: words.range(8 * done..8 * (done + count)),
            pages: work.pages,
            slots,
        };
        done += count;
        let kept = Kept {
            stash: (parts.longest > SPLIT).then(|| stash.reborrow()),
            states: Some(states.reborrow()),
        };
        let (out, lse) = (out.reborrow(), lse.reborrow());
        match tile {
            Some(tile) => hopper::forward(cuda, tile, out, lse, input, shape, kept)?,
            None => ampere(cuda, out, lse, input, shape, kept)?,
        }
    }
    Ok(())
}

/// What a launch reads.
pub(super) struct Input<'a, T: Element> {
    pub qkv: View<'a, T>,
    pub kv: &'a KvLayer<'a, T>,
    pub tiles: View<'a, u32>,
    pub pages: View<'a, u32>,
    /// Rows that have states.
    pub slots: usize,
}

impl<T: Element> Input<'_, T> {
    pub(super) fn parts(&self) -> usize {
        self.tiles.len() / 8
    }
}

/// What is kept within a launch, and from one to the next.
pub(super) struct Kept<'a, F> {
    pub stash: Option<ViewMut<'a, F>>,
    pub states: Option<ViewMut<'a, F>>,
}

/// Scale, cap, window, as kernels take them.
pub(super) fn scoring<T: Element>(shape: &Shape) -> (T::Acc, T::Acc, usize) {
    let number = |x: f64| <T::Acc as Element>::of(x);
    let window = shape.window.unwrap_or(0) as usize;
    (number(shape.scale), number(shape.softcap.unwrap_or(0.0)), window)
}

fn ampere<T: Element>(
    cuda: &Cuda,
    out: ViewMut<'_, T>,
    lse: ViewMut<'_, T::Acc>,
    input: Input<'_, T>,
    shape: &Shape,
    kept: Kept<'_, T::Acc>,
) -> Result<()> {
    let run = match shape.head_dim {
        64 => kernel::forward_64,
        80 => kernel::forward_80,
        96 => kernel::forward_96,
        128 => kernel::forward_128,
        _ => kernel::forward_256,
    };
    // Queries, keys and values.
    let shared = 3 * 64 * shape.head_dim.next_multiple_of(64) * 2;
    let count = input.parts();
    let (scale, cap, window) = scoring::<T>(shape);
    run(
        cuda,
        Launch::row((count * shape.kv_heads).min(blocks(cuda, shape)), shared)?,
        out,
        lse,
        input.qkv,
        input.kv.k.view(),
        input.kv.v.view(),
        input.tiles,
        input.pages,
        kept.stash,
        kept.states,
        count,
        input.slots,
        shape.q_heads,
        shape.kv_heads,
        scale,
        cap,
        window,
    )
}
