//! The LM head on a CUDA device: chunks of the vocabulary by tiles of rows, then the chunks of each
//! row.

use super::{CHUNK, Forward, LmHead, Outputs, PARTIAL, SLICE, Slopes, slice, sm80, sm90};
use crate::{
    device::{
        Arch, Cuda, Device, Element, View, ViewMut,
        cuda::{Launch, kernels::logprob as kernel},
    },
    error::Result,
};

pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    out: Outputs<'_, T::Acc>,
    h: View<'_, T>,
    head: LmHead<'_, T>,
    targets: View<'_, u32>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (rows, vocab, d) = (targets.len(), head.w.n(), head.w.k());
    let mut partial = scratch.range(0..rows * vocab.div_ceil(CHUNK) * PARTIAL);
    let (to, w) = (partial.reborrow(), head.w.view());
    let (scale, cap) = (head.settings.scale(), head.settings.cap());
    let chunks = kernel::Forward { partial: to, h, w, targets, rows, vocab, d, scale, cap };
    match cuda.arch() {
        Arch::Sm80 => sm80::forward(cuda, chunks)?,
        Arch::Sm90 => sm90::forward(cuda, chunks)?,
    }
    let launch = Launch::row(rows.div_ceil(kernel::WARPS), 0)?;
    let (Outputs { logp, lse, entropy }, partial) = (out, partial.view());
    kernel::Merge { logp, lse, entropy, partial, targets, rows, vocab }.launch(cuda, launch)
}

/// A slice of the vocabulary at a time: the gradient of its logits, then what it adds to that of
/// the hidden states and of the head.
pub(super) fn backward<T: Element>(
    dev: &Device,
    cuda: &Cuda,
    (mut dh, mut dw): (ViewMut<'_, T>, Option<ViewMut<'_, T::Acc>>),
    slopes: Slopes<'_, T::Acc>,
    f: Forward<'_, T>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (rows, vocab, d) = (f.targets.len(), f.head.w.n(), f.head.w.k());
    let (dz, sums) = scratch.split_at(rows * slice(vocab) / 2);
    let (mut dz, mut sums) = (dz.cast::<T>(), sums.range(0..rows * d));
    for first in (0..vocab).step_by(SLICE) {
        let n = SLICE.min(vocab - first);
        let (width, part) = (n.next_multiple_of(8), first * d..(first + n) * d);
        let mut dz = dz.reborrow().range(0..rows * width);
        let w = f.w.range(part.clone());
        let gradient = kernel::Gradient {
            dz: dz.reborrow(),
            h: f.h,
            w,
            targets: f.targets,
            lse: f.lse,
            dlogp: slopes.dlogp,
            entropy: f.entropy,
            dentropy: slopes.dentropy,
            rows,
            n,
            width,
            first,
            d,
            scale: f.head.settings.scale(),
            cap: f.head.settings.cap(),
        };
        match cuda.arch() {
            Arch::Sm80 => sm80::gradient(cuda, gradient)?,
            Arch::Sm90 => sm90::gradient(cuda, gradient)?,
        }
        let hidden = kernel::Hidden {
            dh: dh.reborrow(),
            sums: sums.reborrow(),
            dz: dz.view(),
            w,
            rows,
            n,
            width,
            d,
            first: usize::from(first == 0),
            last: usize::from(first + n == vocab),
        };
        match cuda.arch() {
            Arch::Sm80 => sm80::hidden(cuda, hidden)?,
            Arch::Sm90 => sm90::hidden(cuda, hidden)?,
        }
        let Some(dw) = &mut dw else { continue };
        let (dw, dz) = (dw.reborrow().range(part), dz.view());
        let weight = kernel::Weight { dw, dz, h: f.h, rows, n, width, d };
        match cuda.arch() {
            Arch::Sm80 => sm80::weight(dev, cuda, weight)?,
            Arch::Sm90 => sm90::weight(cuda, weight)?,
        }
    }
    Ok(())
}
