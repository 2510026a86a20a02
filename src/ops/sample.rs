//! Choosing the next token: temperature, top-k, top-p, min-p, in the order of Hugging Face.
//!
//! One uniform number a row, addressed by (seed, step, sample, position), inverts the cumulative
//! distribution in ascending id order over the kept tokens. Weights are summed as integers,
//! exactly: a sum of 50,000 f32 weights in f32 drifts by the weight of many tokens. The log-prob
//! that is recorded for a sampled token ([`super::logprob::from_logits`]) is that of the full
//! distribution at this temperature, before top-k, top-p and min-p: so the first PPO ratio is
//! exactly 1 under any filter, and the ratio compares full distributions, of which a filter only
//! chose the sample.

use std::ops::Range;

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::math,
        cuda::{Launch, kernels::sample as kernel},
    },
    error::{Error, Result},
    rng::Stream,
    shape, simd,
};

/// How a token is chosen from its distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the largest (the lowest id among equals).
    pub temperature: f32,
    /// Keeps the k most likely tokens, and those that tie with the last; 0 is off.
    pub top_k: usize,
    /// Keeps the smallest set of most likely tokens whose probability reaches p; 1 is off.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 is off.
    pub min_p: f32,
}

impl Default for SamplingParams {
    /// The model's own distribution.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

impl SamplingParams {
    /// Takes the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Refuses a parameter out of its range by name.
    pub fn validate(&self) -> Result<()> {
        for (what, ok, want, got) in [
            (
                "temperature",
                self.temperature == 0.0 || self.temperature >= 1e-6 && self.temperature.is_finite(),
                "0, or 1e-6 or more",
                self.temperature,
            ),
            ("top_p", self.top_p > 0.0 && self.top_p <= 1.0, "in (0, 1]", self.top_p),
            ("min_p", (0.0..=1.0).contains(&self.min_p), "in [0, 1]", self.min_p),
        ] {
            if !ok {
                return Err(Error::value(what, want, got));
            }
        }
        Ok(())
    }

    /// Whether some tokens are kept from being drawn.
    pub fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// Where random numbers are: row r has those of `samples[r]` at `positions[r]`.
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
    /// Refuses addresses that are not those of `rows` rows.
    pub(super) fn check(&self, op: &'static str, rows: usize) -> Result<()> {
        shape::check(op, "samples", &[rows], self.samples.len())?;
        shape::check(op, "positions", &[rows], self.positions.len())
    }

    pub(crate) fn range(self, rows: Range<usize>) -> Self {
        let samples = self.samples.range(rows.clone());
        Self { samples, positions: self.positions.range(rows), ..self }
    }

    /// As kernels take them: seed, step, purpose, and whether there are none.
    pub(super) fn words(&self) -> (u64, u64, u32, usize) {
        self.stream.map_or((0, 0, 0, 1), |s| (s.seed, s.step, s.purpose as u32, 0))
    }
}

/// A weight of 1, the largest, as an integer.
const UNIT: f64 = (1u64 << 44) as f64;

/// The largest vocabulary: so many units still fit 64 bits.
pub const MAX_VOCAB: usize = 1 << 19;

/// Logits `[rows, vocab]`, or the first `vocab` of each row.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a, T> {
    pub z: View<'a, T>,
    /// Logits of a row that count; all where there is no number.
    pub vocab: Option<usize>,
}

impl<'a, T> From<View<'a, T>> for Logits<'a, T> {
    fn from(z: View<'a, T>) -> Self {
        Self { z, vocab: None }
    }
}

/// Elements of scratch that [`next`] needs.
pub fn scratch_len(rows: usize, vocab: usize) -> usize {
    2 * rows * vocab
}

/// Writes `tokens` `[rows]`, drawn from `logits` `[rows, vocab]`. In f32 the tokens are the same on
/// every device.
///
/// Reads logits; `scratch` stays in the cache. Unless greedy, the CPU leaves the weights of a row,
/// filters applied, in the first `vocab` numbers of its `2 vocab`.
pub fn next<'a, T: Element>(
    dev: &Device,
    tokens: ViewMut<'_, u32>,
    logits: impl Into<Logits<'a, T>>,
    params: &SamplingParams,
    draws: Draws<'_>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "sample";
    params.validate()?;
    let rows = tokens.len();
    if rows == 0 {
        return Ok(());
    }
    let Logits { z: logits, vocab } = logits.into();
    let stride = shape::rows(OP, "logits", logits.len(), rows)?;
    let vocab = vocab.unwrap_or(stride);
    if vocab > stride {
        return Err(Error::shape(OP, "logits", &[rows, vocab], &[rows, stride]));
    }
    draws.check(OP, rows)?;
    if !(1..=MAX_VOCAB).contains(&vocab) {
        return Err(Error::value("sample: vocabulary", format!("1 to {MAX_VOCAB}"), vocab));
    }
    let scratch = scratch.scratch(OP, scratch_len(rows, vocab))?;
    let _op = dev.op(OP, || Work::moves::<T>(rows * vocab));
    let stream = draws.stream.filter(|_| params.temperature > 0.0);
    let Draws { samples, positions, .. } = draws;
    let scale = <T::Acc as Element>::of(1.0 / f64::from(params.temperature));
    match dev {
        Device::Cpu(cpu) => {
            let (logits, scratch) = (logits.float()?.host(), scratch.host());
            let (samples, positions) = (samples.host(), positions.host());
            let out = ((tokens.host(), 1), (scratch, 2 * vocab));
            cpu.rows(rows, 1, out, |range, (tokens, scratch)| {
                for (i, r) in range.enumerate() {
                    let z = &logits[r * stride..][..vocab];
                    let (p, order) = scratch[i * 2 * vocab..][..2 * vocab].split_at_mut(vocab);
                    let Some(stream) = stream else {
                        tokens[i] = argmax(z);
                        continue;
                    };
                    weights(cpu.isa(), p, z, scale);
                    if params.filters() {
                        filter(p, order, params);
                    }
                    tokens[i] = pick(p, stream.sample(samples[r]).uniform(positions[r]));
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let Some(Stream { seed, step, purpose }) = stream else {
                let launch = Launch::row(rows, kernel::WARPS * 8)?;
                return kernel::Greedy { tokens, z: logits, vocab, stride }.launch(cuda, launch);
            };
            let shared = kernel::WARPS * 4 + (kernel::WARPS + 1) * kernel::WAYS * 8;
            let number = |x: f32| <T::Acc as Element>::of(f64::from(x));
            let (top_p, min_p) = (number(params.top_p), number(params.min_p));
            kernel::Next {
                tokens,
                z: logits,
                samples,
                positions,
                scratch,
                vocab,
                stride,
                scale,
                top_k: params.top_k.min(vocab),
                top_p,
                min_p,
                seed,
                step,
                purpose: purpose as u32,
            }
            .launch(cuda, Launch::row(rows, shared)?)
        }
    }
}

/// The first of the largest.
fn argmax<F: Float>(z: &[F]) -> u32 {
    let mut best = 0;
    for (i, x) in z.iter().enumerate() {
        if *x > z[best] {
            best = i;
        }
    }
    best as u32
}

/// Sets weights that a filter drops to 0.
fn filter<F: Float>(p: &mut [F], sorted: &mut [F], params: &SamplingParams) {
    let descending = |a: &F, b: &F| b.partial_cmp(a).unwrap_or(std::cmp::Ordering::Equal);
    if params.top_k > 0 && params.top_k < p.len() {
        sorted.copy_from_slice(p);
        let (_, kth, _) = sorted.select_nth_unstable_by(params.top_k - 1, descending);
        let kth = *kth;
        keep(p, |x| x >= kth);
    }
    if params.top_p < 1.0 {
        // Hugging Face drops, from the least likely up, while the dropped mass is at most 1 - p.
        sorted.copy_from_slice(p);
        sorted.sort_unstable_by(descending);
        let total: u64 = p.iter().map(units).sum();
        let allowed = ((1.0 - f64::from(params.top_p)) * total as f64) as u64;
        let (mut dropped, mut cut) = (0, sorted.len());
        while cut > 1 && dropped + units(&sorted[cut - 1]) <= allowed {
            cut -= 1;
            dropped += units(&sorted[cut]);
        }
        let least = sorted[cut - 1];
        // Tokens that tie with the last kept one stay in the order of their ids, as many as the
        // count allows.
        let above = sorted.partition_point(|x| *x > least);
        let mut ties = cut - above;
        keep(p, |x| {
            let tie = x == least;
            let stay = x > least || (tie && ties > 0);
            ties -= usize::from(tie && stay);
            stay
        });
    }
    if params.min_p > 0.0 {
        let least = math::max(p) * F::of(f64::from(params.min_p));
        keep(p, |x| x >= least);
    }
}

fn keep<F: Float>(p: &mut [F], mut stay: impl FnMut(F) -> bool) {
    for x in p.iter_mut().filter(|x| !stay(**x)) {
        *x = F::ZERO;
    }
}

fn units<F: Float>(x: &F) -> u64 {
    (x.f64() * UNIT) as u64
}

/// The first id at which the cumulative weight exceeds the share `u` of the whole; 0 for a row of
/// NaN.
fn pick<F: Float>(p: &[F], u: f32) -> u32 {
    let total: u64 = p.iter().map(units).sum();
    // Below the total, as `u` is below 1 by more than an f64 rounds.
    let goal = (f64::from(u) * total as f64) as u64;
    let mut sum = 0;
    let exceeds = |x: &F| {
        sum += units(x);
        sum > goal
    };
    p.iter().position(exceeds).unwrap_or(0) as u32
}

simd! {
    /// `p = e^(scale z - max)`
    fn weights[F: Float](p: &mut [F], z: &[F], scale: F) {
        let top = math::max(z) * scale;
        for (p, z) in p.iter_mut().zip(z) {
            *p = (*z * scale - top).exp();
        }
    }
}
