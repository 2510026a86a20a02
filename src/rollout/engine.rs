//! Batched generation with a paged KV cache.
//!
//! Sequences join and leave the batch as slots free up; because no row sees its batch and every
//! draw is addressed by (seed, step, sample, position), neither the order nor the number of slots
//! changes a token or a bit of its log-prob.

use std::collections::VecDeque;

use crate::{
    device::{Arena, Device, Float, Scope},
    error::{Error, Result},
    models::{Activations, Batch, Cache, Model, Selected, Spec},
    ops::{attention::PAGE, logprob, matmul, sample},
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

    /// Bytes that [`Generator::run`] needs of an arena.
    ///
    /// # Errors
    /// [`Error::Memory`] if the sizes overflow.
    pub fn plan<F: Float>(&self, spec: &Spec) -> Result<usize> {
        Arena::plan(|scope| {
            let _cache = Cache::<F>::new(scope, spec, self.slots * self.max_len.div_ceil(PAGE))?;
            let pass = scope.child();
            Pass::<F>::new(&pass, spec, self.rows, self.slots).map(drop)
        })
    }

    /// Continues every prompt; completions come in the order of the prompts. `progress` hears the
    /// number of new tokens of each pass, and may stop the generation by returning false.
    ///
    /// # Errors
    /// [`Error::Value`] for an empty or too long prompt or an id out of range,
    /// [`Error::Interrupted`]-free: a stop by `progress` returns what is finished so far as `None`.
    pub fn run<F: Float>(
        &self,
        dev: &Device,
        model: &Model<F>,
        scope: &Scope<'_>,
        prompts: &[Prompt],
        settings: &Settings,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<Option<Vec<Completion<F>>>> {
        self.check(model.spec(), prompts, settings)?;
        let per_slot = self.max_len.div_ceil(PAGE);
        let mut cache = Cache::new(scope, model.spec(), self.slots * per_slot)?;
        let mut free: Vec<u32> = (0..self.slots as u32).rev().collect();
        let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
        let mut live: Vec<Live<F>> = Vec::with_capacity(self.slots);
        let mut done: Vec<Option<Completion<F>>> = vec![None; prompts.len()];
        let mut batch = Batch::with_capacity(self.rows);
        let mut draws = Draws::default();
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
            for s in &live {
                batch.push_cached(&s.ids[s.cached..], s.cached, &s.pages);
            }
            while let (Some(&next), Some(&slot)) = (waiting.front(), free.last()) {
                let ids = &prompts[next].ids;
                if batch.len() + ids.len() > self.rows {
                    break;
                }
                waiting.pop_front();
                free.pop();
                let pages = slot * per_slot as u32..(slot + 1) * per_slot as u32;
                let s = Live::start(next, ids, pages.collect(), settings.max_new_tokens);
                batch.push_cached(&s.ids, 0, &s.pages);
                live.push(s);
            }
            let pass = scope.child();
            self.step(
                dev, model, &pass, &batch, &mut cache, &mut live, prompts, settings, &mut draws,
            )?;
            drop(pass);
            let made = live.len();
            live.retain_mut(|s| {
                let last = s.ids[s.ids.len() - 1];
                let stopped = settings.stop_ids.contains(&last);
                let ended = stopped || s.ids.len() - s.prompt == settings.max_new_tokens;
                if ended {
                    free.push(s.pages[0] / per_slot as u32);
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

    /// One forward pass, one new token for each live sequence.
    #[allow(clippy::too_many_arguments)]
    fn step<F: Float>(
        &self,
        dev: &Device,
        model: &Model<F>,
        scope: &Scope<'_>,
        batch: &Batch,
        cache: &mut Cache<'_, F>,
        live: &mut [Live<F>],
        prompts: &[Prompt],
        settings: &Settings,
        draws: &mut Draws<F>,
    ) -> Result<()> {
        let (spec, n) = (model.spec(), live.len());
        let mut pass = Pass::<F>::new(scope, spec, batch.len(), n)?;
        model.forward(dev, &batch.rows(), &mut pass.acts, cache)?;
        model.select(dev, &pass.acts, batch.selected().into(), &mut pass.selected)?;
        let (_, packed) = model.lm_head()?;
        matmul::forward(dev, pass.logits.view_mut(), pass.selected.hidden(), packed, None, None)?;
        draws.reset(live, prompts);
        let scratch = pass.scratch.view_mut();
        let (samples, positions) = ((&draws.samples).into(), (&draws.positions).into());
        sample::next(
            dev,
            (&mut draws.tokens).into(),
            pass.logits.view(),
            &settings.sampling,
            settings.stream,
            samples,
            positions,
            scratch,
        )?;
        let (logp, lse) = ((&mut draws.logp).into(), (&mut draws.lse).into());
        // Greedy decoding reports log-probs at temperature 1.
        let t = settings.sampling.temperature;
        let t = F::of(if t == 0.0 { 1.0 } else { f64::from(t) });
        let tokens = (&draws.tokens).into();
        let settings = logprob::Settings::at(t);
        logprob::from_logits(dev, logp, lse, None, pass.logits.view(), tokens, settings)?;
        for (s, (token, logp)) in live.iter_mut().zip(draws.tokens.iter().zip(&draws.logp)) {
            s.cached = s.ids.len();
            s.ids.push(*token);
            s.logprobs.push(*logp);
        }
        Ok(())
    }
}

impl<F> Live<F> {
    fn start(index: usize, ids: &[u32], pages: Vec<u32>, max_new: usize) -> Self {
        let mut all = Vec::with_capacity(ids.len() + max_new);
        all.extend_from_slice(ids);
        let logprobs = Vec::with_capacity(max_new);
        Self { index, ids: all, prompt: ids.len(), cached: 0, pages, logprobs }
    }

    fn finish(&mut self, sample: u64, stopped: bool) -> Completion<F> {
        let ids = self.ids.split_off(self.prompt);
        Completion { sample, ids, logprobs: std::mem::take(&mut self.logprobs), stopped }
    }
}

/// Buffers of one pass.
struct Pass<'s, F> {
    acts: Activations<'s, F>,
    selected: Selected<'s, F>,
    logits: crate::device::Buffer<'s, F>,
    scratch: crate::device::Buffer<'s, F>,
}

impl<'s, F: Float> Pass<'s, F> {
    fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize, n: usize) -> Result<Self> {
        Ok(Self {
            acts: Activations::new(scope, spec, rows, false)?,
            selected: Selected::new(scope, spec, n)?,
            logits: scope.alloc("logits of the next token", n * spec.vocab)?,
            scratch: scope.alloc("sampling scratch", sample::scratch_len(n, spec.vocab))?,
        })
    }
}

/// The addresses and results of a pass's draws.
#[derive(Default)]
struct Draws<F> {
    samples: Vec<u64>,
    positions: Vec<u32>,
    tokens: Vec<u32>,
    logp: Vec<F>,
    lse: Vec<F>,
}

impl<F: Float> Draws<F> {
    fn reset(&mut self, live: &[Live<F>], prompts: &[Prompt]) {
        self.samples.clear();
        self.positions.clear();
        self.samples.extend(live.iter().map(|s| prompts[s.index].sample));
        self.positions.extend(live.iter().map(|s| s.ids.len() as u32));
        self.tokens.resize(live.len(), 0);
        self.logp.resize(live.len(), F::ZERO);
        self.lse.resize(live.len(), F::ZERO);
    }
}
