//! Batched generation with a paged KV cache.
//!
//! Sequences join and leave the batch as slots free up; because no row sees its batch and every
//! draw is addressed by (seed, step, sample, position), neither the order nor the number of slots
//! changes a token or a bit of its log-prob. Samples of one prompt share the pages that it fills: they are
//! computed once, and on a CUDA device read once for all of them.

use std::collections::VecDeque;

use crate::{
    device::{Arena, Buffer, Device, Element, Float, Scope},
    error::{Error, Result},
    models::{Activations, Batch, Cache, Extent, Keep, Model, Selected, Spec, Staged},
    ops::{
        logprob::{self, Draws, Sampled},
        matmul,
        sample::{self, Logits},
    },
    rng::Stream,
};

/// What to continue.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Names the sample in the random stream; two samples of one prompt differ here.
    pub sample: u64,
    /// At least one token.
    pub ids: Vec<u32>,
}

/// How to continue.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Temperature and filters.
    pub sampling: sample::Params,
    /// The most tokens that are added.
    pub max_new_tokens: usize,
    /// A sequence ends with the first of these, which is kept.
    pub stop_ids: Vec<u32>,
    /// Where the random numbers come from.
    pub stream: Stream,
}

/// A finished sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion<F> {
    /// As in its prompt.
    pub sample: u64,
    /// The new tokens, the stop id included.
    pub ids: Vec<u32>,
    /// Log-prob of each new token under the distribution at this temperature, before top-k, top-p
    /// and min-p: the number that the training forward gives, bit for bit.
    pub logprobs: Vec<F>,
    /// Ended by a stop id, not by `max_new_tokens`.
    pub stopped: bool,
}

/// A sequence in the batch.
#[derive(Debug)]
struct Live<F> {
    index: usize,
    ids: Vec<u32>,
    prompt: usize,
    /// Tokens whose keys and values are in the cache.
    cached: usize,
    pages: Vec<u32>,
    logprobs: Vec<F>,
}

/// Sizes of a generation: how many sequences at once, and how long they get.
#[derive(Clone, Copy, Debug)]
pub struct Generator {
    /// Sequences in the batch at once.
    pub slots: usize,
    /// Tokens of the longest sequence, prompt and completion.
    pub max_len: usize,
    /// Rows of one pass; at least `slots`, and at least the longest prompt.
    pub rows: usize,
}

impl Generator {
    /// Sizes that hold `prompts` with at most `rows` rows a pass.
    #[must_use]
    pub fn for_prompts(prompts: &[Prompt], max_new: usize, slots: usize, rows: usize) -> Self {
        let longest = prompts.iter().map(|p| p.ids.len()).max().unwrap_or(1);
        let slots = slots.min(prompts.len()).max(1);
        Self { slots, max_len: longest + max_new, rows: rows.max(slots).max(longest) }
    }

    /// Bytes that [`Generator::run`] needs of an arena to draw so.
    ///
    /// # Errors
    /// [`Error::Memory`] if the sizes overflow.
    pub fn plan<T: Element>(
        &self,
        dev: &Device,
        spec: &Spec,
        sampling: &sample::Params,
    ) -> Result<usize> {
        Arena::plan(|scope| {
            let extent = self.extent(self.rows, self.slots);
            let pages = extent.pages(spec.attention().page(dev));
            let _cache = Cache::<T>::new(dev, scope, spec, pages)?;
            let pass = scope.child();
            Staged::plan(dev, &pass, spec, extent)?;
            Pass::<T>::new(dev, &pass, spec, extent, sampling).map(drop)
        })
    }

    /// Of a pass of `rows` rows for `sequences` sequences.
    fn extent(&self, rows: usize, sequences: usize) -> Extent {
        Extent { rows, sequences, selected: sequences, cached: self.max_len }
    }

    /// Continues every prompt; completions come in the order of the prompts. `progress` hears the
    /// number of new tokens of each pass, and may stop the generation by returning false.
    ///
    /// # Errors
    /// [`Error::Value`] for an empty or too long prompt or an id out of range,
    /// [`Error::Interrupted`]-free: a stop by `progress` returns what is finished so far as `None`.
    pub fn run<T: Element>(
        &self,
        dev: &Device,
        model: &Model<T>,
        scope: &Scope<'_>,
        prompts: &[Prompt],
        settings: &Settings,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<Option<Vec<Completion<T::Acc>>>> {
        self.check(model.spec(), prompts, settings)?;
        let page = model.spec().attention().page(dev);
        let mut pages = Pages::new(page, self.slots * self.max_len.div_ceil(page));
        let mut cache = Cache::new(dev, scope, model.spec(), pages.held.len())?;
        let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
        let mut live: Vec<Live<T::Acc>> = Vec::with_capacity(self.slots);
        let mut done: Vec<Option<Completion<T::Acc>>> = vec![None; prompts.len()];
        let mut batch = Batch::with_capacity(self.rows);
        if settings.max_new_tokens == 0 {
            waiting.clear();
            for (done, p) in done.iter_mut().zip(prompts) {
                let (ids, logprobs) = (Vec::new(), Vec::new());
                *done = Some(Completion { sample: p.sample, ids, logprobs, stopped: false });
            }
        }
        while !waiting.is_empty() || !live.is_empty() {
            // One row for each live sequence, and whole prompts while rows are left.
            batch.clear();
            for s in &mut live {
                pages.grow(s);
                batch.push_cached(&s.ids[s.cached..], s.cached, &s.pages);
            }
            while let Some(&next) = waiting.front().filter(|_| live.len() < self.slots) {
                let ids = &prompts[next].ids;
                let mut s = Live::start(next, ids, settings.max_new_tokens);
                // Its keys and values are there, or will be when this pass reads them.
                if let Some(same) = live.iter().find(|s| prompts[s.index].ids == *ids) {
                    pages.share(same, &mut s);
                }
                if batch.len() + ids.len() - s.cached > self.rows {
                    pages.release(&s);
                    break;
                }
                waiting.pop_front();
                pages.grow(&mut s);
                batch.push_cached(&s.ids[s.cached..], s.cached, &s.pages);
                live.push(s);
            }
            let pass = scope.child();
            self.step(dev, model, &pass, &batch, &mut cache, &mut live, prompts, settings)?;
            drop(pass);
            let made = live.len();
            live.retain_mut(|s| {
                let last = s.ids[s.ids.len() - 1];
                let stopped = settings.stop_ids.contains(&last);
                let ended = stopped || s.ids.len() - s.prompt == settings.max_new_tokens;
                if ended {
                    pages.release(s);
                    done[s.index] = Some(s.finish(prompts[s.index].sample, stopped));
                }
                !ended
            });
            if !progress(made) {
                return Ok(None);
            }
        }
        Ok(done.into_iter().collect())
    }

    fn check(&self, spec: &Spec, prompts: &[Prompt], settings: &Settings) -> Result<()> {
        settings.sampling.validate()?;
        for p in prompts {
            let len = p.ids.len() + settings.max_new_tokens;
            let what = || format!("prompt of sample {}", p.sample);
            if p.ids.is_empty() {
                return Err(Error::value(what(), "at least one token", "none"));
            }
            let most = self.max_len.min(spec.max_positions);
            if len > most {
                let want = format!("at most {most} tokens with its completion");
                return Err(Error::value(what(), want, len));
            }
            if p.ids.len() > self.rows {
                let want = format!("at most {} tokens (rows of a pass)", self.rows);
                return Err(Error::value(what(), want, p.ids.len()));
            }
        }
        Ok(())
    }

    /// One forward pass, one new token for each live sequence. To a profile it is a prefill if a prompt is in it.
    #[allow(clippy::too_many_arguments)]
    fn step<T: Element>(
        &self,
        dev: &Device,
        model: &Model<T>,
        scope: &Scope<'_>,
        batch: &Batch,
        cache: &mut Cache<'_, T>,
        live: &mut [Live<T::Acc>],
        prompts: &[Prompt],
        settings: &Settings,
    ) -> Result<()> {
        let decodes = live.iter().all(|s| s.ids.len() > s.prompt);
        let _phase = dev.span(if decodes { "decode" } else { "prefill" });
        let (spec, extent) = (model.spec(), self.extent(batch.len(), live.len()));
        let pages = self.extent(0, self.slots).pages(spec.attention().page(dev));
        let staged = batch.stage(dev, scope, spec, pages)?;
        let mut pass = Pass::<T>::new(dev, scope, spec, extent, &settings.sampling)?;
        let samples: Vec<u64> = live.iter().map(|s| prompts[s.index].sample).collect();
        let positions: Vec<u32> = live.iter().map(|s| s.ids.len() as u32).collect();
        dev.write(pass.samples.view_mut(), &samples)?;
        dev.write(pass.positions.view_mut(), &positions)?;
        model.forward(dev, &staged.rows(), &mut pass.acts, cache)?;
        model.select(dev, &pass.acts, staged.selected(), &mut pass.selected)?;
        pass.draw(dev, model, settings)?;
        // Both with one wait.
        let (tokens, logp) =
            (dev.read_later(pass.tokens.view())?, dev.read_later(pass.logp.view())?);
        let (tokens, logp) = (tokens.get()?, logp.get()?);
        for (s, (token, logp)) in live.iter_mut().zip(tokens.iter().zip(&logp)) {
            s.cached = s.ids.len();
            s.ids.push(*token);
            s.logprobs.push(*logp);
        }
        Ok(())
    }
}

impl<F: Float> Live<F> {
    fn start(index: usize, ids: &[u32], max_new: usize) -> Self {
        let mut all = Vec::with_capacity(ids.len() + max_new);
        all.extend_from_slice(ids);
        let logprobs = Vec::with_capacity(max_new);
        Self { index, ids: all, prompt: ids.len(), cached: 0, pages: Vec::new(), logprobs }
    }

    fn finish(&mut self, sample: u64, stopped: bool) -> Completion<F> {
        let ids = self.ids.split_off(self.prompt);
        Completion { sample, ids, logprobs: std::mem::take(&mut self.logprobs), stopped }
    }
}

/// The pages of the cache: samples of one prompt share those that the prompt fills.
struct Pages {
    /// Positions of a page.
    page: usize,
    /// Sequences that have each page.
    held: Vec<u32>,
    free: Vec<u32>,
}

impl Pages {
    /// As many as sequences need that share nothing: they never run out.
    fn new(page: usize, count: usize) -> Self {
        Self { page, held: vec![0; count], free: (0..count as u32).rev().collect() }
    }

    /// Gives a sequence the pages that its tokens need.
    fn grow<F>(&mut self, s: &mut Live<F>) {
        while s.pages.len() < s.ids.len().div_ceil(self.page) {
            let page = self.free.pop();
            debug_assert!(page.is_some(), "there are pages for sequences that share nothing");
            let Some(page) = page else { return };
            self.held[page as usize] = 1;
            s.pages.push(page);
        }
    }

    /// Gives `to`, of the same prompt as `from`, the pages that it fills; one token at least is left to be
    /// computed.
    fn share<F>(&mut self, from: &Live<F>, to: &mut Live<F>) {
        let whole = (to.prompt - 1) / self.page;
        to.pages.extend_from_slice(&from.pages[..whole]);
        to.pages.iter().for_each(|page| self.held[*page as usize] += 1);
        to.cached = whole * self.page;
    }

    /// Takes back what nobody else has.
    fn release<F>(&mut self, s: &Live<F>) {
        for page in &s.pages {
            self.held[*page as usize] -= 1;
            if self.held[*page as usize] == 0 {
                self.free.push(*page);
            }
        }
    }
}

/// Buffers of one pass.
struct Pass<'s, T: Element> {
    acts: Activations<'s, T>,
    selected: Selected<'s, T>,
    samples: Buffer<'s, u64>,
    positions: Buffer<'s, u32>,
    tokens: Buffer<'s, u32>,
    logp: Buffer<'s, T::Acc>,
    lse: Buffer<'s, T::Acc>,
    /// None where tokens are drawn as their logits are made.
    logits: Option<Buffer<'s, T>>,
    scratch: Buffer<'s, T::Acc>,
}

/// Rows whose logits are held.
const WAVE: usize = 64;

/// Whether tokens are drawn as their logits are made. On the CPU drawing from whole rows of logits is faster: it needs one
/// random number a row, not one a token.
fn fused(dev: &Device, sampling: &sample::Params) -> bool {
    matches!(dev, Device::Cuda(_)) && (sampling.temperature == 0.0 || !sampling.filters())
}

impl<'s, T: Element> Pass<'s, T> {
    fn new(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        extent: Extent,
        sampling: &sample::Params,
    ) -> Result<Self> {
        let (n, vocab) = (extent.selected, spec.vocab);
        let wave = n.min(WAVE);
        let (logits, scratch) = if fused(dev, sampling) {
            (None, logprob::sample_scratch_len(n, vocab, 0))
        } else {
            let room = sample::scratch_len(wave, vocab).max(logprob::scratch_len(wave, vocab));
            (Some(wave * spec.vocab_room()), room)
        };
        Ok(Self {
            acts: Activations::new(dev, scope, spec, extent, Keep::Nothing)?,
            selected: Selected::new(scope, spec, n)?,
            samples: scope.alloc("samples", n)?,
            positions: scope.alloc("positions of draws", n)?,
            tokens: scope.alloc("drawn tokens", n)?,
            logp: scope.alloc("their log-probs", n)?,
            lse: scope.alloc("log-sum-exp", n)?,
            logits: logits.map(|len| scope.alloc("logits of the next token", len)).transpose()?,
            scratch: scope.alloc("sampling scratch", scratch)?,
        })
    }

    /// The next tokens, and their log-probs with the bits of [`logprob::forward`].
    fn draw(&mut self, dev: &Device, model: &Model<T>, settings: &Settings) -> Result<()> {
        let (_, head) = model.lm_head(dev)?;
        let (h, params) = (self.selected.hidden(), &settings.sampling);
        let greedy = params.temperature == 0.0;
        // Greedy decoding reports log-probs at temperature 1.
        let t = if greedy { 1.0 } else { f64::from(params.temperature) };
        let at = logprob::Settings::at(<T::Acc as Element>::of(t));
        let (samples, positions) = (self.samples.view(), self.positions.view());
        let (logp, lse) = (self.logp.view_mut(), self.lse.view_mut());
        let mut scratch = self.scratch.view_mut();
        let Some(logits) = &mut self.logits else {
            let tokens = self.tokens.view_mut();
            let stream = (!greedy).then_some(settings.stream);
            let draws = Draws { stream, samples, positions };
            let out = Sampled { tokens, logp, lse, top: None };
            return logprob::sample(dev, out, h, head, at, draws, scratch);
        };
        let (n, all) = (self.tokens.len(), model.logit_head(dev)?);
        let (vocab, stride, d) = (head.n(), all.n(), head.k());
        let (mut tokens, mut logp, mut lse) = (self.tokens.view_mut(), logp, lse);
        for first in (0..n).step_by(WAVE) {
            let rows = first..n.min(first + WAVE);
            let h = h.range(rows.start * d..rows.end * d);
            let (logp, lse) =
                (logp.reborrow().range(rows.clone()), lse.reborrow().range(rows.clone()));
            let mut tokens = tokens.reborrow().range(rows.clone());
            let mut logits = logits.view_mut().range(0..rows.len() * stride);
            matmul::forward(dev, logits.reborrow(), h, all, None, None)?;
            let (to, logits, room) = (tokens.reborrow(), logits.view(), scratch.reborrow());
            let (samples, positions) = (samples.range(rows.clone()), positions.range(rows));
            let z = Logits { z: logits, vocab: Some(vocab) };
            sample::next(dev, to, z, params, settings.stream, samples, positions, room)?;
            let (tokens, room) = (tokens.view(), scratch.reborrow());
            match dev {
                Device::Cpu(_) => logprob::from_logits(dev, logp, lse, None, logits, tokens, at)?,
                // Logits that are stored are rounded.
                Device::Cuda(_) => {
                    logprob::forward(dev, logp, lse, None, h, head, tokens, at, room)?;
                }
            }
        }
        Ok(())
    }
}
