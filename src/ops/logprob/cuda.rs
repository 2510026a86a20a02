//! The LM head on a CUDA device: chunks of the vocabulary by tiles of rows, then the chunks of each
//! row.

use super::{CHUNK, Forward, Outputs, PARTIAL, SLICE, Settings, Slopes, hopper, slice};
use crate::{
    device::{
        Arch, Cuda, Device, Element, View, ViewMut,
        cuda::{Launch, kernels::logprob as kernel},
    },
    error::Result,
    ops::matmul::{self, Weight},
};

/// Rows of a tile; bytes of its stages, and of its sums where warps share columns.
pub(super) fn tile(rows: usize) -> (usize, usize) {
    match rows {
        0..=16 => (16, 4 * 64 * (16 + 128) * 2 + 16 * 128 * 4),
        17..=64 => (64, 3 * 64 * (64 + 128) * 2),
        _ => (128, 4 * 32 * (128 + 128) * 2),
    }
}

/// Chunks by tiles of rows, then the chunks of each row.
pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    out: Outputs<'_, T::Acc>,
    h: View<'_, T>,
    w: Weight<'_, T>,
    targets: View<'_, u32>,
    settings: Settings<T::Acc>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (rows, vocab, d) = (targets.len(), w.n(), w.k());
    let mut partial = scratch.range(0..rows * vocab.div_ceil(CHUNK) * PARTIAL);
    let (to, weights) = (partial.reborrow(), w.view());
    let (scale, cap) = (settings.scale(), settings.cap());
    if cuda.arch() == Arch::Sm90 {
        let tile = hopper::Tile::of(rows);
        hopper::forward(cuda, tile, to, h, weights, targets, (vocab, d), (scale, cap))?;
    } else {
        ampere(cuda, to, h, weights, targets, (vocab, d), (scale, cap))?;
    }
    let launch = Launch::row(rows.div_ceil(kernel::WARPS), 0)?;
    let Outputs { logp, lse, entropy } = out;
    kernel::Merge { logp, lse, entropy, partial: partial.view(), targets, rows, vocab }
        .launch(cuda, launch)
}

/// Writes the partials of all rows and chunks.
fn ampere<T: Element>(
    cuda: &Cuda,
    partial: ViewMut<'_, T::Acc>,
    h: View<'_, T>,
    w: View<'_, T>,
    targets: View<'_, u32>,
    (vocab, d): (usize, usize),
    (scale, cap): (T::Acc, T::Acc),
) -> Result<()> {
    let rows = targets.len();
    let (tile, shared) = tile(rows);
    let run: Forwards<T> = match tile {
        16 => kernel::forward_16,
        64 => kernel::forward_64,
        _ => kernel::forward_128,
    };
    let launch = Launch::row(rows.div_ceil(tile) * vocab.div_ceil(CHUNK), shared)?;
    run(cuda, launch, partial, h, w, targets, rows, vocab, d, scale, cap)
}

/// Partials, hidden states, the head, targets; rows, vocabulary, d; scale and cap.
type Forwards<T> = fn(
    &Cuda,
    Launch,
    ViewMut<'_, <T as Element>::Acc>,
    View<'_, T>,
    View<'_, T>,
    View<'_, u32>,
    usize,
    usize,
    usize,
    <T as Element>::Acc,
    <T as Element>::Acc,
) -> Result<()>;

/// A slice of the vocabulary at a time: the gradient of its logits, then what it adds to that of
/// the hidden states and of the head.
pub(super) fn backward<T: Element>(
    dev: &Device,
    cuda: &Cuda,
    mut dh: ViewMut<'_, T>,
    mut dw: Option<ViewMut<'_, T::Acc>>,
    slopes: Slopes<'_, T::Acc>,
    f: Forward<'_, T>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    /// Bytes of the stages of a tile of 128 x 128, or of its sums.
    const WIDE: usize = 4 * 32 * (128 + 128) * 2;
    let (rows, vocab, d) = (f.targets.len(), f.packed.n(), f.packed.k());
    let (scale, cap) = (f.settings.scale(), f.settings.cap());
    let (dz, sums) = scratch.split_at(rows * slice(vocab) / 2);
    let (mut dz, mut sums) = (dz.cast::<T>(), sums.range(0..rows * d));
    let tiles = |m: usize, n: usize, side: usize| m.div_ceil(side) * n.div_ceil(side);
    for v0 in (0..vocab).step_by(SLICE) {
        let n = SLICE.min(vocab - v0);
        let (width, part) = (n.next_multiple_of(8), v0 * d..(v0 + n) * d);
        let mut dz = dz.reborrow().range(0..rows * width);
        let w = f.w.range(part.clone());
        if cuda.arch() == Arch::Sm90 {
            let dw = dw.as_mut().map(|dw| dw.reborrow().range(part));
            let part = Part { first: v0, n, width, last: v0 + n == vocab };
            let (f, dh, sums) = (Forward { w, ..f }, dh.reborrow(), sums.reborrow());
            hopper::backward(cuda, dh, dw, &slopes, f, part, dz, sums)?;
            continue;
        }
        let launch = Launch::row(tiles(rows, width, 128), WIDE)?;
        let (dlogp, dentropy) = (slopes.dlogp, slopes.dentropy);
        kernel::Gradient {
            dz: dz.reborrow(),
            h: f.h,
            w,
            targets: f.targets,
            lse: f.lse,
            dlogp,
            entropy: f.entropy,
            dentropy,
            rows,
            n,
            width,
            first: v0,
            d,
            scale,
            cap,
        }
        .launch(cuda, launch)?;
        let many = tiles(rows, d, 128) >= cuda.processors() as usize;
        let (run, side, shared): (Hidden<T>, _, _) = match many {
            true => (kernel::hidden_128x128, 128, WIDE),
            false => (kernel::hidden_64x64, 64, WIDE / 2),
        };
        let launch = Launch::row(tiles(rows, d, side), shared)?;
        let (first, last) = (usize::from(v0 == 0), usize::from(v0 + n == vocab));
        let (dh, sums) = (dh.reborrow(), sums.reborrow());
        run(cuda, launch, dh, sums, dz.view(), w, rows, n, width, d, first, last)?;
        let Some(dw) = &mut dw else { continue };
        let dw = dw.reborrow().range(part);
        if width == n {
            matmul::backward_weight(dev, dw, None, dz.view(), f.h, (n, d))?;
        } else {
            let launch = Launch::row(tiles(n, d, 128), WIDE)?;
            kernel::Weight { dw, dz: dz.view(), h: f.h, rows, n, width, d }.launch(cuda, launch)?;
        }
    }
    Ok(())
}

/// A slice of the vocabulary.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) first: usize,
    pub(super) n: usize,
    /// Columns of their gradient: a multiple of 8.
    pub(super) width: usize,
    /// Whether no other comes after it.
    pub(super) last: bool,
}

/// Gradient of the hidden states, sums so far, that of the logits, the head; rows, columns, their
/// width, d; whether it is the first slice, and the last.
type Hidden<T> = fn(
    &Cuda,
    Launch,
    ViewMut<'_, T>,
    ViewMut<'_, <T as Element>::Acc>,
    View<'_, T>,
    View<'_, T>,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
) -> Result<()>;
