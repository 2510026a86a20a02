//! The heads on a model's backbone: hidden states become log-probs, scalars or new tokens, and the
//! gradients of the first two come back.

use super::{Head, Keep, Linear, Model, ParamKind, Params, PassOptions, Spec};
use crate::{
    device::{Buffer, Device, Element, Float, Scope, View, ViewMut},
    error::Result,
    ops::{
        logprob::{self, LmHead, LogitSettings, Sampled, Slopes},
        matmul,
        sample::{self, Draws, Logits},
        scalar_head, scale,
    },
    rng::Stream,
};

/// What a loss reads of a head and writes for its backward pass, one number for each row.
#[derive(Debug)]
pub struct LossColumns<'a, F> {
    /// Log-prob of each target, or the scalar.
    pub y: View<'a, F>,
    /// Entropy of each prediction, if the pass computes it.
    pub entropy: Option<View<'a, F>>,
    /// d loss / d y, to write.
    pub dy: ViewMut<'a, F>,
    /// d loss / d entropy, to write.
    pub dentropy: Option<ViewMut<'a, F>>,
}

/// Outputs of a head and, for a pass that keeps what its backward pass reads, their gradients.
#[derive(Debug)]
pub(super) struct HeadOutputs<'s, T: Element> {
    /// Log-probs or scalars.
    pub y: Buffer<'s, T::Acc>,
    pub entropy: Option<Buffer<'s, T::Acc>>,
    dy: Buffer<'s, T::Acc>,
    dentropy: Option<Buffer<'s, T::Acc>>,
    /// Gradient of the hidden states.
    pub dh: Buffer<'s, T>,
    lse: Buffer<'s, T::Acc>,
    scratch: Buffer<'s, T::Acc>,
}

impl<'s, T: Element> HeadOutputs<'s, T> {
    pub fn new(
        scope: &'s Scope<'_>,
        spec: &Spec,
        head: Head,
        rows: usize,
        options: PassOptions,
    ) -> Result<Self> {
        let back = if options.keep == Keep::Nothing { 0 } else { rows };
        let entropy = |what, rows| options.entropy.then(|| scope.alloc(what, rows)).transpose();
        let (vocab, hidden) = (spec.vocab, spec.hidden);
        let (lse, scratch) = match head {
            Head::Scalar => (0, 0),
            Head::Lm => {
                let backward = logprob::backward_scratch_len(back, vocab, hidden);
                (rows, logprob::scratch_len(rows, vocab).max(backward))
            }
        };
        Ok(Self {
            y: scope.alloc("head outputs", rows)?,
            entropy: entropy("entropy", rows)?,
            dy: scope.alloc("gradient of head outputs", back)?,
            dentropy: entropy("gradient of entropy", back)?,
            dh: scope.alloc("gradient of hidden states", back * hidden)?,
            lse: scope.alloc("log-sum-exp", lse)?,
            scratch: scope.alloc("LM head scratch", scratch)?,
        })
    }

    pub fn columns(&mut self) -> LossColumns<'_, T::Acc> {
        LossColumns {
            y: self.y.view(),
            entropy: self.entropy.as_ref().map(Buffer::view),
            dy: self.dy.view_mut(),
            dentropy: self.dentropy.as_mut().map(Buffer::view_mut),
        }
    }

    /// Reads hidden states `h` `[rows, hidden]`. An LM head also reads the target of each row, and
    /// divides its logits by `temperature`, 1 if absent; a scalar head has none.
    pub fn forward(
        &mut self,
        dev: &Device,
        model: &Model<T>,
        h: View<'_, T>,
        targets: View<'_, u32>,
        temperature: Option<T::Acc>,
    ) -> Result<()> {
        if model.head() == Head::Scalar && temperature.is_none() {
            return scalar_head::forward(dev, self.y.view_mut(), h, model.score_head()?);
        }
        let out = logprob::Outputs {
            logp: self.y.view_mut(),
            lse: self.lse.view_mut(),
            entropy: self.entropy.as_mut().map(Buffer::view_mut),
        };
        let settings = settings(model.spec(), temperature);
        let head = LmHead { w: model.lm_head(dev)?.packed, settings };
        logprob::forward(dev, out, h, head, targets, self.scratch.view_mut())
    }

    /// Adds the gradient of the head's weight to `grads` and writes that of the hidden states,
    /// after a loss has filled the columns.
    pub fn backward(
        &mut self,
        dev: &Device,
        model: &Model<T>,
        grads: &mut Params<T::Acc>,
        h: View<'_, T>,
        targets: View<'_, u32>,
        temperature: Option<T::Acc>,
    ) -> Result<()> {
        let dh = self.dh.view_mut();
        if model.head() == Head::Scalar {
            let Some(dw) = grads.get_mut(ParamKind::Score, None) else { return Ok(()) };
            return scalar_head::backward(dev, dh, dw, self.dy.view(), h, model.score_head()?);
        }
        let Linear { at, weight: w, packed, .. } = model.lm_head(dev)?;
        let head = LmHead { w: packed, settings: settings(model.spec(), temperature) };
        let (lse, entropy) = (self.lse.view(), self.entropy.as_ref().map(Buffer::view));
        let forward = logprob::Forward { h, head, w, targets, lse, entropy };
        let dw = grads.get_mut(at.kind, at.layer);
        let dentropy = self.dentropy.as_ref().map(Buffer::view);
        let slopes = Slopes { dlogp: self.dy.view(), dentropy };
        logprob::backward(dev, dh, dw, slopes, forward, self.scratch.view_mut())
    }
}

/// How a model makes logits, divided by a temperature where there is one. No model has both a
/// divisor of its own and a cap.
fn settings<F: Float>(spec: &Spec, temperature: Option<F>) -> LogitSettings<F> {
    let temperature = temperature.unwrap_or(F::ONE) * F::of(spec.scales.logits);
    LogitSettings { temperature, softcap: spec.scales.logit_cap.map(F::of) }
}

/// Draws the next token of each row that an LM head reads.
#[derive(Debug)]
pub struct Sampler<'s, T: Element> {
    sampling: sample::SamplingParams,
    samples: Buffer<'s, u64>,
    positions: Buffer<'s, u32>,
    /// Log-probs of the drawn tokens.
    pub logp: Buffer<'s, T::Acc>,
    lse: Buffer<'s, T::Acc>,
    /// None where tokens are drawn as their logits are made.
    logits: Option<Buffer<'s, T>>,
    scratch: Buffer<'s, T::Acc>,
}

/// Rows whose logits are held at once.
const WAVE: usize = 64;

/// Whether tokens are drawn as their logits are made. The CPU draws from whole rows of logits: this
/// needs one random number a row, not one a token.
fn fused(dev: &Device, sampling: &sample::SamplingParams) -> bool {
    matches!(dev, Device::Cuda(_)) && (sampling.temperature == 0.0 || !sampling.filters())
}

impl<'s, T: Element> Sampler<'s, T> {
    pub fn new(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        rows: usize,
        sampling: sample::SamplingParams,
    ) -> Result<Self> {
        let (vocab, wave) = (spec.vocab, rows.min(WAVE));
        let (logits, scratch) = if fused(dev, &sampling) {
            (None, logprob::sample_scratch_len(rows, vocab, 0))
        } else {
            let scratch = sample::scratch_len(wave, vocab).max(logprob::scratch_len(wave, vocab));
            (Some(wave * spec.vocab_room()), scratch)
        };
        Ok(Self {
            sampling,
            samples: scope.alloc("samples", rows)?,
            positions: scope.alloc("positions of draws", rows)?,
            logp: scope.alloc("log-probs of drawn tokens", rows)?,
            lse: scope.alloc("log-sum-exp", rows)?,
            logits: logits.map(|len| scope.alloc("logits of the next token", len)).transpose()?,
            scratch: scope.alloc("sampling scratch", scratch)?,
        })
    }

    /// Says which random numbers the rows draw by: those of their samples at their positions.
    pub fn address(&mut self, dev: &Device, samples: &[u64], positions: &[u32]) -> Result<()> {
        dev.write(self.samples.view_mut(), samples)?;
        dev.write(self.positions.view_mut(), positions)
    }

    /// Writes the next token after each hidden state. Log-probs have the bits of
    /// [`logprob::forward`].
    pub fn draw(
        &mut self,
        dev: &Device,
        model: &Model<T>,
        h: View<'_, T>,
        mut tokens: ViewMut<'_, u32>,
        stream: Stream,
    ) -> Result<()> {
        let scales = model.spec().scales;
        let temperature = self.sampling.temperature * scales.logits as f32;
        let params = &sample::SamplingParams { temperature, ..self.sampling };
        let greedy = params.temperature == 0.0;
        // Greedy decoding reports log-probs at temperature 1.
        let t = if greedy { 1.0 } else { f64::from(self.sampling.temperature) };
        let settings = settings(model.spec(), Some(<T::Acc as Element>::of(t)));
        let head = LmHead { w: model.lm_head(dev)?.packed, settings };
        let (samples, positions) = (self.samples.view(), self.positions.view());
        let draws = Draws { stream: (!greedy).then_some(stream), samples, positions };
        let (mut logp, mut lse) = (self.logp.view_mut(), self.lse.view_mut());
        let mut scratch = self.scratch.view_mut();
        let Some(logits) = &mut self.logits else {
            let out = Sampled { tokens, logp, lse, top: None };
            return logprob::sample(dev, out, h, head, draws, scratch);
        };
        let (n, all) = (tokens.len(), model.logit_head(dev)?);
        let (vocab, stride, d) = (head.w.n(), all.n(), all.k());
        for first in (0..n).step_by(WAVE) {
            let rows = first..n.min(first + WAVE);
            let h = h.range(rows.start * d..rows.end * d);
            let out = logprob::Outputs {
                logp: logp.reborrow().range(rows.clone()),
                lse: lse.reborrow().range(rows.clone()),
                entropy: None,
            };
            let mut tokens = tokens.reborrow().range(rows.clone());
            let mut logits = logits.view_mut().range(0..rows.len() * stride);
            matmul::forward(dev, logits.reborrow(), h, all, None, None)?;
            if let Some(cap) = scales.logit_cap {
                scale::in_place(dev, logits.reborrow(), 1.0, Some(cap))?;
            }
            let z = Logits { z: logits.view(), vocab: Some(vocab) };
            let (draws, room) = (draws.range(rows), scratch.reborrow());
            sample::next(dev, tokens.reborrow(), z, params, draws, room)?;
            let tokens = tokens.view();
            match dev {
                Device::Cpu(_) => {
                    // They are bounded already.
                    let settings = LogitSettings { softcap: None, ..settings };
                    logprob::from_logits(dev, out, logits.view(), tokens, settings)?;
                }
                // Stored logits are rounded, those of the fused head are not.
                Device::Cuda(_) => {
                    logprob::forward(dev, out, h, head, tokens, scratch.reborrow())?;
                }
            }
        }
        Ok(())
    }
}
