//! Drawing tokens where their logits are made: no row of logits is held.

use super::{CHUNK, Online, PARTIAL, Settings, TILE, WAVE, bend, hopper, width};
use crate::{
    device::{
        Cpu, Cuda, Device, Element, Float, View, ViewMut,
        cpu::gemm::{self, Lhs, Rhs},
        cuda::{Launch, kernels::logprob as kernel},
    },
    error::Result,
    ops::matmul::Packed,
    rng::{Philox, Stream, philox4x32},
    shape,
};

/// What [`sample`] writes, `[rows]` each.
#[derive(Debug)]
pub struct Sampled<'a, F> {
    /// The tokens.
    pub tokens: ViewMut<'a, u32>,
    /// Their log-probs.
    pub logp: ViewMut<'a, F>,
    /// As [`super::forward`] writes it.
    pub lse: ViewMut<'a, F>,
}

/// Where the random numbers are: row r has those of `samples[r]` at `positions[r]`.
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    /// None takes the likeliest token.
    pub stream: Option<Stream>,
    /// `[rows]`
    pub samples: View<'a, u64>,
    /// `[rows]`
    pub positions: View<'a, u32>,
}

impl Draws<'_> {
    /// As kernels take them: seed, step, purpose, and whether there are none.
    pub(super) fn words(&self) -> (u64, u64, u32, usize) {
        self.stream.map_or((0, 0, 0, 1), |s| (s.seed, s.step, s.purpose as u32, 0))
    }
}

/// Elements of scratch that [`sample`] needs.
#[must_use]
pub fn sample_scratch_len(rows: usize, vocab: usize) -> usize {
    rows.min(WAVE) * width(vocab).max(2 * PARTIAL * vocab.div_ceil(CHUNK))
}

/// Draws a token for each row of hidden states `h` `[rows, d]` from the distribution that [`super::forward`]
/// computes log-probs of, with the log-probs that it gives these tokens, bit for bit. `2 rows vocab d` FLOPs.
///
/// The token is the one with the largest `z_v + g_v`, `g = -log(-log u)`, of equals the lowest id (Gumbel 1954); `u` in
/// (0, 1) is a function of the row's address and the token's id. A row with a NaN has a NaN for a log-prob.
///
/// # Errors
/// As [`super::forward`].
pub fn sample<T: Element>(
    dev: &Device,
    mut out: Sampled<'_, T::Acc>,
    h: View<'_, T>,
    w: &Packed<T>,
    settings: Settings<T::Acc>,
    draws: Draws<'_>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "logprob::sample";
    let (rows, vocab, d) = (out.tokens.len(), w.n(), w.k());
    shape::check(OP, "h", &[rows, d], h.len())?;
    shape::check(OP, "logp", &[rows], out.logp.len())?;
    shape::check(OP, "lse", &[rows], out.lse.len())?;
    shape::check(OP, "samples", &[rows], draws.samples.len())?;
    shape::check(OP, "positions", &[rows], draws.positions.len())?;
    settings.validate(OP)?;
    let mut scratch = scratch.scratch(OP, sample_scratch_len(rows, vocab))?;
    for first in (0..rows).step_by(WAVE) {
        let wave = first..rows.min(first + WAVE);
        let h = h.range(wave.start * d..wave.end * d);
        let out = Sampled {
            tokens: out.tokens.reborrow().range(wave.clone()),
            logp: out.logp.reborrow().range(wave.clone()),
            lse: out.lse.reborrow().range(wave.clone()),
        };
        let draws = Draws {
            samples: draws.samples.range(wave.clone()),
            positions: draws.positions.range(wave),
            ..draws
        };
        let scratch = scratch.reborrow();
        match dev {
            Device::Cpu(cpu) => {
                let (h, panels) = (h.float()?.host(), w.view().float()?.host());
                on_cpu(cpu, out, h, panels, (vocab, d), settings, draws, scratch);
            }
            Device::Cuda(cuda) => on_cuda(cuda, out, h, w, settings, draws, scratch)?,
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn on_cpu<F: Float>(
    cpu: &Cpu,
    out: Sampled<'_, F>,
    h: &[F],
    panels: &[F],
    (vocab, d): (usize, usize),
    settings: Settings<F>,
    draws: Draws<'_>,
    scratch: ViewMut<'_, F>,
) {
    let (rows, width, scale) = (out.tokens.len(), width(vocab), settings.scale());
    let (samples, positions) = (draws.samples.host(), draws.positions.host());
    let scratch = &mut scratch.host()[..rows * width];
    let Sampled { tokens, logp, lse } = out;
    let out = ((tokens.host(), 1), (logp.host(), 1), (lse.host(), 1));
    cpu.rows(rows, 12, (out, (scratch, width)), |range, ((tokens, logp, lse), z)| {
        for t0 in (0..range.len()).step_by(TILE) {
            let (m, first) = (TILE.min(range.len() - t0), range.start + t0);
            let mut state = [Online::EMPTY; TILE];
            let mut best = [Choice::<F>::NONE; TILE];
            for v0 in (0..vocab).step_by(CHUNK) {
                let n = CHUNK.min(vocab - v0);
                let z = &mut z[t0 * width..(t0 + m) * width];
                let a = Lhs::rows(&h[first * d..], d);
                let b = Rhs::Packed(&panels[v0 * d..][..gemm::packed_len(d, n)]);
                gemm::serial(cpu.isa(), z, width, (m, n, d), a, b, false);
                for r in 0..m {
                    let z = &mut z[r * width..][..n];
                    bend(cpu.isa(), z, settings);
                    state[r].visit(cpu.isa(), z, scale, None);
                    let at = |s: Stream| s.sample(samples[first + r]);
                    let noise = draws.stream.map(|s| Noise::at(&at(s), positions[first + r]));
                    best[r].visit(z, scale, v0 as u32, noise.as_ref());
                }
            }
            for r in 0..m {
                tokens[t0 + r] = best[r].token;
                lse[t0 + r] = state[r].lse();
                logp[t0 + r] = best[r].z - lse[t0 + r];
            }
        }
    });
}

fn on_cuda<T: Element>(
    cuda: &Cuda,
    out: Sampled<'_, T::Acc>,
    h: View<'_, T>,
    w: &Packed<T>,
    settings: Settings<T::Acc>,
    draws: Draws<'_>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (rows, vocab, d) = (out.tokens.len(), w.n(), w.k());
    let mut partial = scratch.range(0..rows * vocab.div_ceil(CHUNK) * 2 * PARTIAL);
    let (to, weights) = (partial.reborrow(), w.view());
    let (scale, cap) = (settings.scale(), settings.cap());
    if cuda.hopper() {
        let tile = hopper::Tile::of(rows);
        hopper::sample(cuda, tile, to, h, weights, draws, (vocab, d), (scale, cap))?;
    } else {
        ampere(cuda, to, h, weights, draws, (vocab, d), (scale, cap))?;
    }
    let launch = Launch::row(rows.div_ceil(kernel::WARPS), 0)?;
    kernel::pick(cuda, launch, out.tokens, out.logp, out.lse, partial.view(), rows, vocab)
}

/// Writes the partials of all rows and chunks.
fn ampere<T: Element>(
    cuda: &Cuda,
    partial: ViewMut<'_, T::Acc>,
    h: View<'_, T>,
    w: View<'_, T>,
    draws: Draws<'_>,
    (vocab, d): (usize, usize),
    (scale, cap): (T::Acc, T::Acc),
) -> Result<()> {
    let Draws { samples, positions, .. } = draws;
    let (rows, (seed, step, purpose, greedy)) = (samples.len(), draws.words());
    let (tile, shared) = super::tile(rows);
    let run = match tile {
        16 => kernel::sample_16,
        64 => kernel::sample_64,
        _ => kernel::sample_128,
    };
    let launch = Launch::row(rows.div_ceil(tile) * vocab.div_ceil(CHUNK), shared)?;
    run(
        cuda, launch, partial, h, w, samples, positions, rows, vocab, d, scale, cap, seed, step,
        purpose, greedy,
    )
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
        -(-(-f64::from(rest.min(1.0 - f32::EPSILON / 2.0))).ln_1p()).ln()
    }
}
