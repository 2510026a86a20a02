//! Drawing tokens where their logits are made: no row of logits is held.

use std::ops::Range;

use super::{
    CHUNK, LmHead, PARTIAL, WAVE,
    cpu::{LogitTiles, Online, TILE},
    sm80, sm90, width,
};
use crate::{
    device::{
        Arch, Cpu, Cuda, Device, Element, Float, View, ViewMut, Work,
        cuda::{Launch, kernels::logprob as kernel},
    },
    error::{Error, Result},
    ops::sample::Draws,
    rng::{Philox, Stream, philox4x32},
    shape,
};

/// What [`sample`] writes, `[rows]` each.
#[derive(Debug)]
pub struct Sampled<'a, F> {
    pub tokens: ViewMut<'a, u32>,
    pub logp: ViewMut<'a, F>,
    /// As [`super::forward`] writes it.
    pub lse: ViewMut<'a, F>,
    /// The likeliest tokens, drawn or not.
    pub top: Option<Top<'a, F>>,
}

/// The `k` tokens of each row with the largest `z`, without noise: of larger `z` first, of equals
/// the lower id. A NaN is less than all.
#[derive(Debug)]
pub struct Top<'a, F> {
    /// From 1 to 32, and no more than the vocabulary has.
    pub k: usize,
    /// The tokens, `[rows, k]`.
    pub tokens: ViewMut<'a, u32>,
    /// Their log-probs `z - lse`, `[rows, k]`.
    pub logp: ViewMut<'a, F>,
}

impl<F> Top<'_, F> {
    fn range(&mut self, rows: Range<usize>) -> Top<'_, F> {
        let all = rows.start * self.k..rows.end * self.k;
        Top {
            k: self.k,
            tokens: self.tokens.reborrow().range(all.clone()),
            logp: self.logp.reborrow().range(all),
        }
    }
}

/// The most tokens of a [`Top`]: a warp's lanes.
const MOST: usize = kernel::MOST;

/// Rows that [`sample`] takes at a time; of a top `k`, 0 without, fewer.
fn wave(k: usize) -> usize {
    if k == 0 { WAVE } else { WAVE / 4 }
}

/// Elements of scratch that [`sample`] needs with a [`Top`] of `k`, 0 without: on the CPU a chunk
/// of logits a row, on a CUDA device `8 + 2 k` numbers a row and chunk. At most 176 MB for a
/// vocabulary of 152 k.
pub fn sample_scratch_len(rows: usize, vocab: usize, k: usize) -> usize {
    rows.min(wave(k)) * width(vocab).max(2 * (PARTIAL + k) * vocab.div_ceil(CHUNK))
}

/// Draws a token for each row of hidden states `h` `[rows, d]` from the distribution that
/// [`super::forward`] computes log-probs of, with the log-probs that it gives these tokens, bit for
/// bit. `2 rows vocab d` FLOPs.
///
/// The token is the one with the largest `z_v + g_v`, `g = -log(-log u)`, of equals the lowest id
/// (Gumbel 1954); `u` in (0, 1) is a function of the row's address and the token's id. A row with a
/// NaN has a NaN for a log-prob.
///
/// The [`Top`] is kept as logits come along (Milakov and Gimelshein 2018, algorithm 4), and its
/// log-probs are those of [`super::forward`] too.
pub fn sample<T: Element>(
    dev: &Device,
    mut out: Sampled<'_, T::Acc>,
    h: View<'_, T>,
    head: LmHead<'_, T>,
    draws: Draws<'_>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "logprob::sample";
    let (rows, vocab, d) = (out.tokens.len(), head.w.n(), head.w.k());
    shape::check(OP, "h", &[rows, d], h.len())?;
    shape::check(OP, "logp", &[rows], out.logp.len())?;
    shape::check(OP, "lse", &[rows], out.lse.len())?;
    draws.check(OP, rows)?;
    head.settings.validate(OP)?;
    if let Some(Top { k, tokens, logp }) = &out.top {
        if !(1..=MOST.min(vocab)).contains(k) {
            let wanted = format!("1 to {}", MOST.min(vocab));
            return Err(Error::value(format!("{OP}: top k"), wanted, k));
        }
        shape::check(OP, "top tokens", &[rows, *k], tokens.len())?;
        shape::check(OP, "top logp", &[rows, *k], logp.len())?;
    }
    let _op = dev.op(OP, || Work::moves::<T>((rows + vocab) * d).product(rows, vocab, d));
    let k = out.top.as_ref().map_or(0, |top| top.k);
    let mut scratch = scratch.scratch(OP, sample_scratch_len(rows, vocab, k))?;
    for first in (0..rows).step_by(wave(k)) {
        let wave = first..rows.min(first + wave(k));
        let h = h.range(wave.start * d..wave.end * d);
        let out = Sampled {
            tokens: out.tokens.reborrow().range(wave.clone()),
            logp: out.logp.reborrow().range(wave.clone()),
            lse: out.lse.reborrow().range(wave.clone()),
            top: out.top.as_mut().map(|top| top.range(wave.clone())),
        };
        let (draws, scratch) = (draws.range(wave), scratch.reborrow());
        match dev {
            Device::Cpu(cpu) => on_cpu(cpu, out, h, head, draws, scratch)?,
            Device::Cuda(cuda) => on_cuda(cuda, out, h, head, draws, scratch)?,
        }
    }
    Ok(())
}

fn on_cpu<T: Element>(
    cpu: &Cpu,
    out: Sampled<'_, T::Acc>,
    h: View<'_, T>,
    head: LmHead<'_, T>,
    draws: Draws<'_>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (h, samples, positions) = (h.float()?.host(), draws.samples.host(), draws.positions.host());
    let (tiles, d, scale) = (LogitTiles::new(cpu, head)?, head.w.k(), head.settings.scale());
    let (rows, width) = (out.tokens.len(), width(head.w.n()));
    let scratch = &mut scratch.host()[..rows * width];
    let Sampled { tokens, logp, lse, top } = out;
    let k = top.as_ref().map_or(0, |top| top.k);
    let top = top.map(|top| ((top.tokens.host(), k), (top.logp.host(), k)));
    let out = ((tokens.host(), 1), (logp.host(), 1), (lse.host(), 1));
    cpu.rows(rows, 12, (out, top, (scratch, width)), |range, (out, mut top, z)| {
        let (tokens, logp, lse) = out;
        for t0 in (0..range.len()).step_by(TILE) {
            let (m, first) = (TILE.min(range.len() - t0), range.start + t0);
            let mut state = [Online::EMPTY; TILE];
            let mut best = [Choice::NONE; TILE];
            tiles.visit(&h[first * d..], m, &mut z[t0 * width..], |r, v0, z| {
                state[r].visit(cpu.isa(), z, scale, None);
                let at = |s: Stream| s.sample(samples[first + r]);
                let noise = draws.stream.map(|s| Noise::at(&at(s), positions[first + r]));
                best[r].visit(z, scale, v0 as u32, noise.as_ref());
                if let Some((tokens, best)) = &mut top {
                    let own = (t0 + r) * k..(t0 + r + 1) * k;
                    insert(&mut tokens[own.clone()], &mut best[own], z, scale, v0 as u32);
                }
            });
            for r in 0..m {
                tokens[t0 + r] = best[r].token;
                lse[t0 + r] = state[r].lse();
                logp[t0 + r] = best[r].z - lse[t0 + r];
                if let Some((_, z)) = &mut top {
                    z[(t0 + r) * k..][..k].iter_mut().for_each(|z| *z -= lse[t0 + r]);
                }
            }
        }
    });
    Ok(())
}

fn on_cuda<T: Element>(
    cuda: &Cuda,
    out: Sampled<'_, T::Acc>,
    h: View<'_, T>,
    head: LmHead<'_, T>,
    draws: Draws<'_>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let Sampled { tokens, logp, mut lse, top } = out;
    let (rows, vocab, d) = (tokens.len(), head.w.n(), head.w.k());
    let parts = rows * vocab.div_ceil(CHUNK);
    let (mut partial, lists) = scratch.split_at(parts * 2 * PARTIAL);
    let mut lists = lists.range(0..parts * 2 * top.as_ref().map_or(0, |top| top.k)).cast::<u64>();
    let (scale, cap) = (head.settings.scale(), head.settings.cap());
    let (to, w) = (partial.reborrow(), head.w.view());
    let Draws { samples, positions, .. } = draws;
    let (seed, step, purpose, greedy) = draws.words();
    match &top {
        None => {
            let args = kernel::Sample {
                partial: to,
                h,
                w,
                samples,
                positions,
                rows,
                vocab,
                d,
                scale,
                cap,
                seed,
                step,
                purpose,
                greedy,
            };
            match cuda.arch() {
                Arch::Sm80 => sm80::sample(cuda, args)?,
                Arch::Sm90 => sm90::sample(cuda, args)?,
            }
        }
        Some(top) => {
            let args = kernel::SampleTop {
                partial: to,
                lists: lists.reborrow(),
                h,
                w,
                samples,
                positions,
                rows,
                vocab,
                d,
                scale,
                cap,
                seed,
                step,
                purpose,
                greedy,
                k: top.k,
            };
            match cuda.arch() {
                Arch::Sm80 => sm80::sample_top(cuda, args)?,
                Arch::Sm90 => sm90::sample_top(cuda, args)?,
            }
        }
    }
    let launch = Launch::row(rows.div_ceil(kernel::WARPS), 0)?;
    kernel::Pick { tokens, logp, lse: lse.reborrow(), partial: partial.view(), rows, vocab }
        .launch(cuda, launch)?;
    let Some(Top { k, tokens, logp }) = top else { return Ok(()) };
    let launch = Launch::row(rows, kernel::WARPS * MOST * size_of::<u64>())?;
    kernel::Top { tokens, logp, lse: lse.view(), lists: lists.view(), vocab, k }
        .launch(cuda, launch)
}

/// Adds a chunk of raw logits of the tokens from `first` on to the best of all before them, sorted:
/// `tokens` and `best` `[k]`, as many of them as there were tokens.
fn insert<F: Float>(tokens: &mut [u32], best: &mut [F], raw: &[F], scale: F, first: u32) {
    let k = tokens.len();
    let above = |a: F, b: F| a > b || (b.is_nan() && !a.is_nan());
    for (token, x) in (first..).zip(raw) {
        let (z, have) = (*x * scale, k.min(token as usize));
        // Ids ascend: after its equals.
        if have < k || above(z, best[k - 1]) {
            let at = best[..have].partition_point(|b| !above(z, *b));
            let end = have.min(k - 1);
            best.copy_within(at..end, at + 1);
            tokens.copy_within(at..end, at + 1);
            (best[at], tokens[at]) = (z, token);
        }
    }
}

/// The best token of a row so far.
#[derive(Clone, Copy)]
struct Choice<F> {
    score: F,
    z: F,
    token: u32,
}

impl<F: Float> Choice<F> {
    const NONE: Self = Self { score: F::NEG_INFINITY, z: F::ZERO, token: 0 };

    /// Adds a chunk of raw logits of the tokens from `first` on.
    fn visit(&mut self, raw: &[F], scale: F, first: u32, noise: Option<&Noise>) {
        for (token, x) in (first..).zip(raw) {
            let z = *x * scale;
            let score = noise.map_or(z, |noise| z + F::of(noise.gumbel(token)));
            if score > self.score {
                *self = Self { score, z, token };
            }
        }
    }
}

/// The random numbers of a row's tokens.
struct Noise([u32; 4]);

impl Noise {
    fn at(sample: &Philox, position: u32) -> Self {
        Self(sample.block(position))
    }

    /// `-log(-log u)`, from `1 - u`, which is exact where `u` is near 1 and the token may win.
    fn gumbel(&self, token: u32) -> f64 {
        let [a, b, c, d] = self.0;
        // Tokens that a lane of a kernel has together, bits 0 and 3, share a block.
        let block = philox4x32([token / 16 * 4 + token / 2 % 4, a, b, 0], [c, d]);
        let word = block[(token % 2 + token / 8 % 2 * 2) as usize];
        let rest = (word as f32 + 0.5) * (1.0 / 4_294_967_296.0);
        -libm::log(-libm::log1p(-f64::from(rest.min(1.0 - f32::EPSILON / 2.0))))
    }
}
