//! The LM head on Hopper: its tiles and the tensor maps of its operands.

use super::{CHUNK, lists_bytes};
use crate::{
    device::{
        Arch, Cuda, Element, View,
        cuda::{
            Launch, Map,
            kernels::{logprob, logprob_sm90 as kernel, matmul_sm90},
        },
    },
    error::Result,
    ops::matmul::{
        TileShape,
        sm90::{DEPTH, operand, result},
    },
};

/// The tile of `kernels/logprob_sm90.cu` that wastes the fewest rows; all give the same bits.
fn tile(rows: usize) -> [usize; 2] {
    match rows {
        0..=64 => [64, 128],
        65..=128 => [128, 128],
        _ => [128, 256],
    }
}

/// Blocks for all rows and chunks by `tile`, with lists of a sampler's top if `top`.
fn chunks(
    cuda: &Cuda,
    [high, wide]: [usize; 2],
    rows: usize,
    vocab: usize,
    top: bool,
) -> Result<Launch> {
    let (stages, cluster) = match [high, wide] {
        [_, 256] => (4, 2),
        [128, _] => (if top { 5 } else { 6 }, 1),
        _ => (8, 1),
    };
    let groups = rows.div_ceil(high * cluster).saturating_mul(vocab.div_ceil(CHUNK));
    let most = (cuda.processors() as usize / cluster).max(1);
    // Stages with two barriers each, which begin on multiples of 16 bytes; lists of 16 rows a
    // warp.
    let barriers = usize::next_multiple_of(stages, 2) * 16;
    let lists = if top { high / 16 * lists_bytes(16) } else { 0 };
    let shared = stages * (high + wide) * DEPTH * 2 + barriers + lists;
    Launch::row(groups.min(most) * cluster, shared)
}

/// A matrix `[rows, cols]` whose rows begin `stride` elements apart, in boxes of `high` rows.
fn rows<'a, T: Element>(
    cuda: &Cuda,
    x: View<'a, T>,
    dims: [usize; 2],
    stride: usize,
    high: usize,
) -> Result<Map<'a>> {
    operand("logprob", cuda, x, dims, stride, high)
}

pub(super) fn forward<T: Element>(cuda: &Cuda, args: logprob::Forward<'_, T>) -> Result<()> {
    let logprob::Forward { partial, h, w, targets, rows: m, vocab, d, scale, cap } = args;
    let tile = tile(m);
    let launch = chunks(cuda, tile, m, vocab, false)?;
    let h = rows(cuda, h, [m, d], d, tile[0])?;
    let w = rows(cuda, w, [vocab, d], d, tile[1] / 2)?;
    kernel::Forward::<T> { partial, h, w, targets, rows: m, vocab, d, scale, cap }
        .launch(cuda, tile, launch)
}

pub(super) fn sample<T: Element>(cuda: &Cuda, args: logprob::Sample<'_, T>) -> Result<()> {
    let (tile, d) = (tile(args.rows), args.d);
    let launch = chunks(cuda, tile, args.rows, args.vocab, false)?;
    kernel::Sample::<T> {
        partial: args.partial,
        h: rows(cuda, args.h, [args.rows, d], d, tile[0])?,
        w: rows(cuda, args.w, [args.vocab, d], d, tile[1] / 2)?,
        samples: args.samples,
        positions: args.positions,
        rows: args.rows,
        vocab: args.vocab,
        d,
        scale: args.scale,
        cap: args.cap,
        seed: args.seed,
        step: args.step,
        purpose: args.purpose,
        greedy: args.greedy,
    }
    .launch(cuda, tile, launch)
}

pub(super) fn sample_top<T: Element>(cuda: &Cuda, args: logprob::SampleTop<'_, T>) -> Result<()> {
    // The largest tile leaves no shared memory for lists.
    let (tile, d) = (tile(args.rows.min(128)), args.d);
    let launch = chunks(cuda, tile, args.rows, args.vocab, true)?;
    kernel::SampleTop::<T> {
        partial: args.partial,
        lists: args.lists,
        h: rows(cuda, args.h, [args.rows, d], d, tile[0])?,
        w: rows(cuda, args.w, [args.vocab, d], d, tile[1] / 2)?,
        samples: args.samples,
        positions: args.positions,
        rows: args.rows,
        vocab: args.vocab,
        d,
        scale: args.scale,
        cap: args.cap,
        seed: args.seed,
        step: args.step,
        purpose: args.purpose,
        greedy: args.greedy,
        k: args.k,
    }
    .launch(cuda, tile, launch)
}

pub(super) fn gradient<T: Element>(cuda: &Cuda, args: logprob::Gradient<'_, T>) -> Result<()> {
    let logprob::Gradient { rows: m, n, width, d, .. } = args;
    let [tile, ..] = TileShape::all(Arch::Sm90);
    let launch = tile.launch(cuda, m, width, false)?;
    kernel::Gradient::<T> {
        dz: result(cuda, args.dz, [m, width])?,
        h: rows(cuda, args.h, [m, d], d, 128)?,
        w: rows(cuda, args.w, [n, d], d, 128)?,
        targets: args.targets,
        lse: args.lse,
        dlogp: args.dlogp,
        entropy: args.entropy,
        dentropy: args.dentropy,
        rows: m,
        n,
        width,
        first: args.first,
        d,
        scale: args.scale,
        cap: args.cap,
    }
    .launch(cuda, launch)
}

pub(super) fn hidden<T: Element>(cuda: &Cuda, args: logprob::Hidden<'_, T>) -> Result<()> {
    let logprob::Hidden { dh, sums, dz, w, rows: m, n, width, d, first, last } = args;
    let tile = TileShape::of_backward(cuda, m, d);
    let launch = tile.launch(cuda, m, d, false)?;
    let dz = rows(cuda, dz, [m, width], width, 128)?;
    let (w, dh) = (rows(cuda, w, [n, d], d, DEPTH)?, result(cuda, dh, [m, d])?);
    kernel::Hidden::<T> { dh, sums, dz, w, rows: m, n, d, first, last }
        .launch(cuda, tile.size, launch)
}

pub(super) fn weight<T: Element>(cuda: &Cuda, args: logprob::Weight<'_, T>) -> Result<()> {
    let logprob::Weight { dw, dz, h, rows: m, n, width, d } = args;
    let tile = TileShape::of_backward(cuda, n, d);
    let launch = tile.launch(cuda, n, d, false)?;
    let (dy, x) = (rows(cuda, dz, [m, n], width, DEPTH)?, rows(cuda, h, [m, d], d, DEPTH)?);
    matmul_sm90::BackwardWeight::<T> { dw, dbias: None, dy, x, m, n, k: d }
        .launch(cuda, tile.size, launch)
}
