//! Attention on a CUDA device: what kernels are given. Which one runs, and on how many blocks, is
//! the architecture's.

use super::{
    BackwardArgs, ForwardOutputs, KvLayer, Partition, ROWS, SPLIT, SegmentBatch, Shape, sm80, sm90,
};
use crate::{
    device::{
        Arch, Cuda, Element, View, ViewMut,
        cuda::{
            Launch,
            kernels::{attention as kernel, attention_backward as gradient},
        },
    },
    error::{Error, Result},
    ops::rope::Table,
};

/// Elements that blocks merge split-KV partials in.
fn block_partials_len(cuda: &Cuda, shape: &Shape) -> usize {
    let threads = match cuda.arch() {
        Arch::Sm80 => sm80::threads(cuda, shape),
        Arch::Sm90 => sm90::threads(cuda),
    };
    threads * (shape.head_dim / 2 + 4)
}

/// Elements of the partials that `rows` rows leave for the next launch, so many each.
fn partials_len(shape: &Shape, rows: usize, partials: usize) -> usize {
    rows * shape.q_heads * (shape.head_dim + 8) * partials
}

/// Elements of scratch for block and split-KV partials, for `singles` rows that are alone in their
/// segments, in sequences of `positions`.
pub(super) fn scratch_len(cuda: &Cuda, shape: &Shape, singles: usize, positions: usize) -> usize {
    let partials = if shape.window.is_some() { 0 } else { positions.div_ceil(SPLIT) };
    block_partials_len(cuda, shape) + partials_len(shape, singles, partials)
}

/// Head sizes that there are kernels for.
pub(super) const HEAD_SIZES: &[usize] = kernel::FORWARD_SIZES;

pub(super) fn check(op: &str, shape: &Shape) -> Result<()> {
    let group = shape.group();
    if !HEAD_SIZES.contains(&shape.head_dim) {
        let what = format!("{op}: head_dim on a CUDA device");
        return Err(Error::value(what, format!("one of {HEAD_SIZES:?}"), shape.head_dim));
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

/// The partition of the segments, with a cache of `pages` where there is one, and its words on the
/// device.
fn partition<'a>(
    op: &'static str,
    cuda: &Cuda,
    batch: SegmentBatch<'a>,
    shape: &Shape,
    pages: Option<usize>,
) -> Result<(&'a Partition, View<'a, u32>)> {
    let (want, what) = ("that of the segments", format!("{op}: partition on a CUDA device"));
    let (partition, words) = batch.partition.ok_or_else(|| Error::value(what, want, "none"))?;
    partition.check(op, cuda, shape, batch.segments, pages)?;
    crate::shape::check(op, "partition", &[partition.words().len()], words.len())?;
    Ok((partition, words))
}

pub(super) fn append<T: Element>(
    cuda: &Cuda,
    kv: &mut KvLayer<'_, T>,
    mut qkv: ViewMut<'_, T>,
    batch: SegmentBatch<'_>,
    shape: &Shape,
    table: Option<&Table<T::Acc>>,
) -> Result<()> {
    const OP: &str = "attention::append";
    check(OP, shape)?;
    if let Some(table) = table.filter(|t| t.head_dim() != shape.head_dim) {
        return Err(Error::shape(OP, "table", &[shape.head_dim], &[table.head_dim()]));
    }
    let (partition, words) = partition(OP, cuda, batch, shape, Some(kv.pages(shape)))?;
    let ([mut begin, _], page) = (partition.begins(), kv.page);
    // What is copied from prefixes goes after those are rotated.
    for (runs, table) in partition.runs.into_iter().zip([table, None]) {
        let list = words.range(begin..begin + 5 * runs);
        begin += 5 * runs;
        let (angles, entries) = table.map(Table::angles).unzip();
        kernel::Append {
            k: kv.k.view_mut(),
            v: kv.v.view_mut(),
            qkv: qkv.reborrow(),
            table: angles,
            runs: list,
            pages: batch.pages,
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

/// Scale, cap and window as kernels take them.
fn scoring<T: Element>(shape: &Shape) -> (T::Acc, T::Acc, usize) {
    let number = |x: f64| <T::Acc as Element>::of(x);
    let window = shape.window.unwrap_or(0) as usize;
    (number(shape.scale), number(shape.softcap.unwrap_or(0.0)), window)
}

pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    mut to: ForwardOutputs<'_, T>,
    qkv: View<'_, T>,
    kv: &KvLayer<'_, T>,
    batch: SegmentBatch<'_>,
    shape: &Shape,
) -> Result<()> {
    const OP: &str = "attention";
    check(OP, shape)?;
    let (partition, words) = partition(OP, cuda, batch, shape, Some(kv.pages(shape)))?;
    let ([slots, each], own) = (partition.partials, block_partials_len(cuda, shape));
    let scratch = to.scratch.scratch(OP, own + partials_len(shape, slots, each))?;
    let (mut block_partials, mut partials) = scratch.split_at(own);
    let (scale, cap, window) = scoring::<T>(shape);
    let mut done = 0;
    for (count, tile) in partition.launches.into_iter().zip(partition.tiles) {
        let args = kernel::Forward {
            out: to.out.reborrow(),
            lse: to.lse.reborrow(),
            qkv,
            k: kv.k.view(),
            v: kv.v.view(),
            tiles: words.range(8 * done..8 * (done + count)),
            pages: batch.pages,
            block_partials: (partition.longest > SPLIT).then(|| block_partials.reborrow()),
            partials: Some(partials.reborrow()),
            count,
            slots,
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            scale,
            cap,
            window,
        };
        done += count;
        match tile {
            Some(tile) => sm90::forward(cuda, shape, tile, args)?,
            None => sm80::forward(cuda, shape, args)?,
        }
    }
    Ok(())
}

/// `scratch` has [`backward_scratch_len`](super::backward_scratch_len) elements, two heads of keys
/// and values a group more than the queries': enough for one number a row and head and two turns a
/// row and group, since a group is at most 64 heads and a head at least as wide.
pub(super) fn backward<T: Element>(
    cuda: &Cuda,
    args: BackwardArgs<'_, T>,
    batch: SegmentBatch<'_>,
    shape: &Shape,
) -> Result<()> {
    const OP: &str = "attention::backward";
    check(OP, shape)?;
    let (partition, words) = partition(OP, cuda, batch, shape, None)?;
    let BackwardArgs { dqkv, dout, out, qkv, lse, scratch } = args;
    let (plan, d, heads) = (partition.backward, shape.head_dim, lse.len());
    let (sums, rest) = scratch.split_at(heads * d);
    let (mut delta, rest) = rest.split_at(heads);
    let each = match cuda.arch() {
        Arch::Sm80 => 1,
        Arch::Sm90 => sm90::backward_turns(shape),
    };
    let (count, mut turns) = (plan.turns * shape.kv_heads * each, rest.cast::<u32>());
    let launch = Launch::threads((8 * heads).max(count), gradient::THREADS)?;
    let (to, none) = (delta.reborrow(), turns.reborrow());
    gradient::Delta { delta: to, turns: none, dout, out, heads, d, count }.launch(cuda, launch)?;
    let [_, from] = partition.begins();
    let middle = from + 8 * plan.tiles;
    let (scale, cap, window) = scoring::<T>(shape);
    let args = gradient::Dqkv {
        dqkv,
        sums,
        turns,
        dout,
        qkv,
        lse,
        delta: delta.view(),
        tiles: words.range(from..middle),
        visits: words.range(middle..words.len()),
        count: plan.tiles,
        q_heads: shape.q_heads,
        kv_heads: shape.kv_heads,
        scale,
        cap,
        window,
    };
    match cuda.arch() {
        Arch::Sm80 => sm80::backward(cuda, shape, args),
        Arch::Sm90 => sm90::backward(cuda, shape, args),
    }
}
