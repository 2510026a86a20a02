//! Batched generation with a paged KV cache.
//!
//! Sequences join and leave the batch as slots free up; because no row sees its batch and every
//! draw is addressed by (seed, step, sample, position), neither the order nor the number of slots
//! changes a token or a bit of its log-prob. Samples of one prompt share the pages that it fills:
//! they are computed once, and on a CUDA device read once for all of them.
//!
//! A pass takes its tokens from where the one before drew them. So on a CUDA device it is queued
//! before the host has read those, and the device need not wait for the host. A sequence that drew
//! a stop id then has a row in one more pass, whose token is discarded, and frees its slot one pass
//! later.

use std::collections::VecDeque;

use crate::{
    device::{Arena, Buffer, Device, Element, Pending, Scope},
    error::{Error, Result},
    models::{Activations, Batch, Cache, Keep, Model, PassShape, Sampler, Spec, Staged},
    ops::sample,
    rng::Stream,
};

/// Tokens to continue.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Names the sample in the random stream; two samples of one prompt differ here.
    pub sample: u64,
    /// At least one token.
    pub ids: Vec<u32>,
}

/// How prompts are continued, and when a sample ends.
#[derive(Clone, Debug)]
pub struct GenerationConfig {
    /// Temperature and filters.
    pub sampling: sample::SamplingParams,
    /// The most tokens that are added.
    pub max_new_tokens: usize,
    /// The first of these ids ends a sequence, and stays in it.
    pub stop_ids: Vec<u32>,
    /// Address of the random numbers.
    pub stream: Stream,
}

/// A sample: the continuation of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion<F> {
    /// The sample of its prompt.
    pub sample: u64,
    /// The new tokens, the stop id included.
    pub ids: Vec<u32>,
    /// Log-prob of each new token under the distribution at this temperature, before top-k, top-p
    /// and min-p: the number that the training forward gives, bit for bit.
    pub logprobs: Vec<F>,
    /// Ended by a stop id, not by `max_new_tokens`.
    pub stopped: bool,
}

/// A sequence that has a row in the next pass.
#[derive(Debug)]
struct Live {
    /// Index of its prompt.
    index: usize,
    sample: u64,
    /// Tokens of its prompt.
    prompt: usize,
    /// All tokens, those that were drawn and not read included.
    len: usize,
    /// The last of them is token `drawn` of the last pass, unless the prompt is all.
    drawn: u32,
    pages: Vec<u32>,
    /// Where the state of blocks without attention is.
    slot: u32,
}

/// A pass that was queued, and not read.
struct Queued<F> {
    /// Indices of the prompts whose tokens it draws.
    of: Vec<usize>,
    tokens: Pending<Vec<u32>>,
    logp: Pending<Vec<F>>,
}

/// Passes that are queued when the host reads one: on a CUDA device one, so that the device does
/// not wait for the host. On the CPU none: it would only compute discarded rows.
fn ahead(dev: &Device) -> usize {
    match dev {
        Device::Cpu(_) => 0,
        Device::Cuda(_) => 1,
    }
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
    pub fn for_prompts(prompts: &[Prompt], max_new: usize, slots: usize, rows: usize) -> Self {
        let longest = prompts.iter().map(|p| p.ids.len()).max().unwrap_or(1);
        let slots = slots.min(prompts.len()).max(1);
        Self { slots, max_len: longest + max_new, rows: rows.max(slots).max(longest) }
    }

    /// Bytes that [`Generator::run`] needs of an arena to draw so.
    pub fn plan<T: Element>(
        &self,
        dev: &Device,
        spec: &Spec,
        sampling: &sample::SamplingParams,
    ) -> Result<usize> {
        if spec.vocab > sample::MAX_VOCAB {
            let want = format!("at most {}", sample::MAX_VOCAB);
            return Err(Error::value("vocabulary of a model that samples", want, spec.vocab));
        }
        Arena::plan(|scope| {
            let shape = self.pass_shape(self.rows, self.slots);
            let _cache = Cache::<T>::new(dev, scope, spec, shape)?;
            let _tokens = self.tokens(scope)?;
            let pass = scope.child();
            Staged::plan(dev, &pass, spec, shape)?;
            let _acts = Activations::<T>::new(dev, &pass, spec, shape, Keep::Nothing)?;
            Sampler::<T>::new(dev, &pass, spec, shape.selected, *sampling).map(drop)
        })
    }

    /// Shape of a pass of `rows` rows for `sequences` sequences.
    fn pass_shape(&self, rows: usize, sequences: usize) -> PassShape {
        PassShape { rows, sequences, selected: sequences, cached: self.max_len }
    }

    /// The last pass's tokens: the next pass begins with them, and ends with its own.
    fn tokens<'s>(&self, scope: &'s Scope<'_>) -> Result<Buffer<'s, u32>> {
        scope.alloc("drawn tokens", self.slots)
    }

    /// [`Generator::run`] with memory of its own, up to 64 sequences at once.
    pub fn generate<T: Element>(
        dev: &Device,
        model: &Model<T>,
        prompts: &[Prompt],
        config: &GenerationConfig,
    ) -> Result<Vec<Completion<T::Acc>>> {
        let sizes = Self::for_prompts(prompts, config.max_new_tokens, 64, 512);
        let mut arena = Arena::new(dev, sizes.plan::<T>(dev, model.spec(), &config.sampling)?)?;
        sizes.run(dev, model, &arena.scope(), prompts, config, |_| Ok(()))
    }

    /// Continues every prompt; completions come in the order of the prompts. `progress` hears the
    /// new tokens of each pass that has any, each behind the index of its prompt; its error ends
    /// the generation.
    pub fn run<T: Element>(
        &self,
        dev: &Device,
        model: &Model<T>,
        scope: &Scope<'_>,
        prompts: &[Prompt],
        config: &GenerationConfig,
        mut progress: impl FnMut(&[(usize, u32)]) -> Result<()>,
    ) -> Result<Vec<Completion<T::Acc>>> {
        self.check(model.spec(), prompts, config)?;
        let (ahead, most) = (ahead(dev), config.max_new_tokens);
        let page = model.spec().attention().page(dev);
        let mut slots = LiveSlots::new(prompts.len(), self, model.spec(), page);
        let cache = Cache::new(dev, scope, model.spec(), self.pass_shape(0, self.slots))?;
        let tokens = self.tokens(scope)?;
        let mut decoder = Decoder { dev, model, sizes: self, config, cache, tokens };
        let mut batch = Batch::with_capacity(self.rows);
        let mut queued: VecDeque<Queued<T::Acc>> = VecDeque::new();
        let mut done: Vec<Completion<T::Acc>> = prompts.iter().map(Completion::none).collect();
        let mut open = if most == 0 { 0 } else { done.len() };
        // Passes still queued when none is open only decode finished sequences: they are dropped.
        while open > 0 {
            if !slots.are_idle() {
                slots.fill(self, &mut batch, prompts);
                queued.push_back(decoder.queue(&scope.child(), &batch, &slots.live)?);
                slots.drew(most);
                if queued.len() <= ahead {
                    continue;
                }
            }
            let Some(pass) = queued.pop_front() else {
                return Err(Error::value("generation", "a pass for each open sample", "none"));
            };
            let mut made = Vec::new();
            for (index, token, logp) in pass.read(dev)? {
                let c = &mut done[index];
                // It stopped when this row was queued already.
                if c.stopped {
                    continue;
                }
                made.push((index, token));
                c.ids.push(token);
                c.logprobs.push(logp);
                c.stopped = config.stop_ids.contains(&token);
                open -= usize::from(c.stopped || c.ids.len() == most);
            }
            slots.leave(|s| done[s.index].stopped);
            if !made.is_empty() {
                progress(&made)?;
            }
        }
        Ok(done)
    }

    fn check(&self, spec: &Spec, prompts: &[Prompt], config: &GenerationConfig) -> Result<()> {
        config.sampling.validate()?;
        if self.slots == 0 {
            return Err(Error::value("slots of a generation", "at least one", 0));
        }
        for p in prompts {
            let len = p.ids.len() + config.max_new_tokens;
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
}

/// State that the passes of a generation share.
struct Decoder<'a, 's, T: Element> {
    dev: &'a Device,
    model: &'a Model<T>,
    sizes: &'a Generator,
    config: &'a GenerationConfig,
    cache: Cache<'s, T>,
    tokens: Buffer<'s, u32>,
}

impl<T: Element> Decoder<'_, '_, T> {
    /// Queues a forward pass that draws one new token for each live sequence. To a profile it is a
    /// prefill if a prompt is in it.
    fn queue(&mut self, scope: &Scope<'_>, batch: &Batch, live: &[Live]) -> Result<Queued<T::Acc>> {
        let Self { dev, model, sizes, config, cache, tokens } = self;
        let decodes = live.iter().all(|s| s.len > s.prompt);
        let _phase = dev.span(if decodes { "decode" } else { "prefill" });
        let (spec, shape) = (model.spec(), sizes.pass_shape(batch.len(), live.len()));
        let pages = sizes.pass_shape(0, sizes.slots).pages(dev, spec);
        let mut staged = batch.stage(dev, scope, spec, pages)?;
        let mut acts = Activations::new(dev, scope, spec, shape, Keep::Nothing)?;
        let mut sampler = Sampler::new(dev, scope, spec, shape.selected, config.sampling)?;
        let samples: Vec<u64> = live.iter().map(|s| s.sample).collect();
        let positions: Vec<u32> = live.iter().map(|s| s.len as u32).collect();
        sampler.address(dev, &samples, &positions)?;
        staged.put_drawn(dev, tokens.view())?;
        model.forward(dev, &staged.rows(), &mut acts, cache)?;
        let mut tokens = tokens.view_mut().range(0..live.len());
        sampler.draw(dev, model, acts.hidden(), tokens.reborrow(), config.stream)?;
        let (tokens, logp) = (dev.read_later(tokens.view())?, dev.read_later(sampler.logp.view())?);
        // One wait brings both, and does not wait for the next pass.
        dev.milestone()?;
        Ok(Queued { of: live.iter().map(|s| s.index).collect(), tokens, logp })
    }
}

impl<F> Queued<F> {
    /// Index of the prompt, token and log-prob of each row.
    fn read(self, dev: &Device) -> Result<impl Iterator<Item = (usize, u32, F)>> {
        let _phase = matches!(dev, Device::Cuda(_)).then(|| dev.span("wait for tokens"));
        let (tokens, logp) = (self.tokens.get()?, self.logp.get()?);
        Ok(self.of.into_iter().zip(tokens).zip(logp).map(|((index, token), p)| (index, token, p)))
    }
}

impl<F> Completion<F> {
    /// With no token yet.
    fn none(prompt: &Prompt) -> Self {
        let (ids, logprobs) = (Vec::new(), Vec::new());
        Self { sample: prompt.sample, ids, logprobs, stopped: false }
    }
}

/// The sequences that have a row in the next pass, and the prompts that wait for a slot.
struct LiveSlots {
    live: Vec<Live>,
    waiting: VecDeque<usize>,
    pages: Pages,
    /// Slots that no live sequence has.
    free: Vec<u32>,
    /// Samples of one prompt share pages.
    share: bool,
}

impl LiveSlots {
    fn new(prompts: usize, sizes: &Generator, spec: &Spec, page: usize) -> Self {
        let live = Vec::with_capacity(sizes.slots);
        let pages = Pages::new(page, sizes.slots * sizes.max_len.div_ceil(page));
        let free = (0..sizes.slots as u32).rev().collect();
        // A state is of all tokens before it: pages of some of them are no beginning.
        let share = !spec.keeps_state();
        Self { live, waiting: (0..prompts).collect(), pages, free, share }
    }

    fn are_idle(&self) -> bool {
        self.live.is_empty() && self.waiting.is_empty()
    }

    /// One row for each live sequence, and whole prompts while rows are left.
    fn fill(&mut self, sizes: &Generator, batch: &mut Batch, prompts: &[Prompt]) {
        let Self { live, waiting, pages, free, share } = self;
        batch.clear();
        for s in &mut *live {
            pages.grow(s);
            batch.push_drawn(s.drawn, s.len - 1, &s.pages, s.slot);
        }
        while let Some(&index) = waiting.front().filter(|_| live.len() < sizes.slots) {
            let Prompt { sample, ids } = &prompts[index];
            let (sample, prompt, len) = (*sample, ids.len(), ids.len());
            let Some(&slot) = free.last() else { break };
            let mut s = Live { index, sample, prompt, len, drawn: 0, pages: Vec::new(), slot };
            // Its keys and values are there, or will be when this pass reads them.
            let same = live.iter().find(|s| *share && prompts[s.index].ids == *ids);
            let shared = same.map_or(0, |same| pages.share(same, &mut s));
            if batch.len() + ids.len() - shared > sizes.rows {
                pages.release(&s);
                break;
            }
            waiting.pop_front();
            free.pop();
            pages.grow(&mut s);
            batch.push_cached(&ids[shared..], shared, &s.pages, slot);
            live.push(s);
        }
    }

    /// Counts the token that a queued pass draws for each; a sequence with `most` of them leaves.
    fn drew(&mut self, most: usize) {
        for (s, row) in self.live.iter_mut().zip(0..) {
            (s.len, s.drawn) = (s.len + 1, row);
        }
        self.leave(|s| s.len - s.prompt == most);
    }

    /// Frees slots and pages. A queued pass may still read and write them: their next owner has
    /// rows in later passes only, and the device runs passes one after the other.
    fn leave(&mut self, gone: impl Fn(&Live) -> bool) {
        let left = self.live.extract_if(.., |s| gone(s));
        left.for_each(|s| {
            self.pages.release(&s);
            self.free.push(s.slot);
        });
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
    /// `count` pages are enough for sequences that share nothing: they never run out.
    fn new(page: usize, count: usize) -> Self {
        Self { page, held: vec![0; count], free: (0..count as u32).rev().collect() }
    }

    /// Adds the pages that a sequence's tokens need.
    fn grow(&mut self, s: &mut Live) {
        while s.pages.len() < s.len.div_ceil(self.page) {
            let page = self.free.pop();
            debug_assert!(page.is_some(), "there are pages for sequences that share nothing");
            let Some(page) = page else { return };
            self.held[page as usize] = 1;
            s.pages.push(page);
        }
    }

    /// Gives `to`, of the same prompt as `from`, the pages that it fills, and says how many tokens
    /// they hold; one at least is left to be computed. `from` may write beyond them, even in a row
    /// that is discarded.
    fn share(&mut self, from: &Live, to: &mut Live) -> usize {
        let whole = (to.prompt - 1) / self.page;
        to.pages.extend_from_slice(&from.pages[..whole]);
        to.pages.iter().for_each(|page| self.held[*page as usize] += 1);
        whole * self.page
    }

    /// Takes back what nobody else has.
    fn release(&mut self, s: &Live) {
        for page in &s.pages {
            self.held[*page as usize] -= 1;
            if self.held[*page as usize] == 0 {
                self.free.push(*page);
            }
        }
    }
}
