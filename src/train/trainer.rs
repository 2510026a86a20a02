//! The training loop: one for all algorithms, sources and models.

use std::{ops::Range, time::Instant};

use super::{
    guard::Guard,
    inputs::RunInputs,
    models::Models,
    observer::Observer,
    plan::{self, MemoryPlan},
    settings::Settings,
    signals,
    source::StepData,
};
use crate::{
    algorithms::{Algorithm, Columns, Inputs, Metrics, MicroBatch, Needs},
    device::{Arena, Device, Element, Pending, View},
    error::{Error, Result},
    models::{Batch, Head, Model, Pass},
    ops::grad_norm,
    rng::{Philox, Purpose, Stream},
    rollout::{GenerationConfig, ScoringPass, rewards::RewardQueue},
};

/// A run in memory: models, which compute in `T`, data and the step it is at.
pub struct Trainer<T: Element> {
    pub(super) dev: Device,
    /// Holds the columns of a step.
    host: Device,
    pub(super) inputs: RunInputs,
    pub models: Models<T>,
    /// What the last step left, if the next one is to find it.
    guard: Option<Guard>,
    /// What the frozen models hold, if they are verified.
    frozen: Option<Guard>,
    /// Steps done. People count from 1: the next step is `step + 1` in messages and files.
    pub(super) step: u64,
    arena: Arena,
    memory: MemoryPlan,
    batch: Batch,
    /// The data of the last step, if its sequences were sampled.
    pub sampled: Option<StepData>,
    /// The first bad weight that each of the step's updates left, by trained model.
    updated: Vec<(usize, Pending<Option<usize>>)>,
}

/// The results of a step.
#[derive(Debug, Default)]
pub struct StepReport {
    /// Named numbers, in order.
    pub metrics: Metrics,
    /// Seconds of each phase: `sample` and `score`, where the algorithm samples, `reward`, for
    /// which the step waits when these are done, where it has rewards, and `update`.
    pub seconds: Vec<(&'static str, f64)>,
}

impl<T: Element<Acc = f32>> Trainer<T> {
    /// Reads data, plans all memory, and loads models if there is room for them.
    pub fn new(dev: &Device, settings: Settings, algorithm: Box<dyn Algorithm>) -> Result<Self> {
        let inputs = RunInputs::new(settings, algorithm)?;
        let memory = inputs.plan::<T>(dev)?;
        memory.fits(dev)?;
        Ok(Self {
            dev: dev.clone(),
            host: dev.host(inputs.settings.threads),
            models: Models::load(dev, &inputs.settings, &inputs.models)?,
            guard: None,
            frozen: None,
            step: 0,
            arena: Arena::new(dev, memory.shared())?,
            batch: Batch::with_capacity(inputs.sizes.scorer().rows),
            memory,
            sampled: None,
            updated: Vec::new(),
            inputs,
        })
    }

    /// Memory of the run, all of which is taken.
    pub fn memory(&self) -> &MemoryPlan {
        &self.memory
    }

    /// The language model that is trained.
    pub fn policy(&self) -> Option<&Model<T>> {
        self.models.with_head(Head::Lm)
    }

    /// The reward or value model that is trained.
    pub fn scalar(&self) -> Option<&Model<T>> {
        self.models.with_head(Head::Scalar)
    }

    /// One line that says how prompts, samples, minibatches and micro-batches multiply.
    pub fn equation(&self) -> String {
        let (s, n) = (&self.inputs.settings, &self.inputs.needs);
        let head = match &n.inputs {
            Inputs::Texts { .. } => format!("{} texts a step", s.batch_size),
            Inputs::Pairs => {
                format!("{0} pairs = {1} texts a step", s.batch_size, 2 * s.batch_size)
            }
            Inputs::Judged => format!("{} completions a step", s.batch_size),
            Inputs::Prompts(p) => format!(
                "{} prompts x {} samples = {} sequences a step; x {} passes in {} minibatches of {} \
                 = {} updates a step",
                s.batch_size / p.samples_per_prompt,
                p.samples_per_prompt,
                s.batch_size,
                n.epochs,
                n.minibatches,
                s.batch_size / n.minibatches,
                n.epochs * n.minibatches
            ),
        };
        format!(
            "{head}; micro-batches of up to {} tokens; {} steps",
            self.inputs.sizes.micro_batch.rows, self.inputs.steps
        )
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if a signal came before the first update: no model has changed then.
    /// [`Error::BadNumber`] naming the quantity and its samples. The models may then be in the
    /// middle of the step: resume from a checkpoint.
    pub fn step(&mut self, seen: &mut dyn Observer) -> Result<StepReport> {
        let _phase = self.dev.span("step");
        if self.inputs.settings.verify_every > 0 && self.frozen.is_none() {
            self.frozen = Some(Guard::of_frozen(&self.dev, &self.models)?);
        }
        self.verify()?;
        let mut data = self.inputs.source.draw(self.step);
        let done = self.step_on(&mut data, seen).map_err(|e| data.locate(e))?;
        self.sampled = self.inputs.needs.sampling().map(|_| data);
        check_metrics(&done.metrics, self.step)?;
        let guard = self.verifies().then(|| Guard::of_trained(&self.dev, &self.models, self.step));
        self.guard = guard.transpose()?;
        Ok(done)
    }

    /// Whether what the last step left, and the present step, are verified.
    fn verifies(&self) -> bool {
        let every = self.inputs.settings.verify_every;
        every > 0 && self.step.is_multiple_of(every)
    }

    /// Compares the models with what the last step left, if that is known.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming what changed.
    pub fn verify(&self) -> Result<()> {
        let Some(guard) = &self.guard else { return Ok(()) };
        let (dev, models) = (&self.dev, &self.models);
        guard.check(&Guard::of_trained(dev, models, guard.step)?, guard.step)?;
        let frozen = self.frozen.as_ref();
        frozen.map_or(Ok(()), |f| f.check(&Guard::of_frozen(dev, models)?, guard.step))
    }

    fn step_on(&mut self, data: &mut StepData, seen: &mut dyn Observer) -> Result<StepReport> {
        let (mut metrics, mut seconds) = (Metrics::new(), Vec::new());
        self.updated.clear();
        match self.inputs.needs.sampling() {
            Some(_) => self.sample_and_score(data, seen, &mut seconds)?,
            None => self.fill(data)?,
        }
        stop(self.step)?;
        check_columns(&self.host, &data.columns, self.step + 1)?;
        self.inputs.algorithm.prepare(&self.host, &mut data.columns, &mut metrics)?;
        let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        metrics.extend(data.parts.iter().map(|(name, scores)| (*name, mean(scores))));
        let (start, mut norms) = (Instant::now(), vec![Vec::new(); self.models.trained.len()]);
        let (needs, unit) = (&self.inputs.needs, self.inputs.sizes.unit);
        let (epochs, parts, seed) = (needs.epochs, needs.minibatches, self.inputs.settings.seed);
        for epoch in 0..epochs {
            if epochs * parts == 1 {
                self.update(data, true, &mut norms)?;
                continue;
            }
            let draw = Philox::new(seed, self.step, epoch as u64, Purpose::Minibatch);
            let order = draw.permutation(data.sequences.len() / unit);
            for (part, chosen) in order.chunks(order.len() / parts).enumerate() {
                seen.phase("update", epoch * parts + part, epochs * parts);
                self.update(&data.subset(chosen, unit), epoch + part == 0, &mut norms)?;
            }
        }
        self.inputs.algorithm.finish(&mut metrics)?;
        self.check_updates()?;
        for (state, norms) in self.models.trained.iter().zip(&norms) {
            let mean = norms.iter().sum::<f64>() / norms.len() as f64;
            metrics.extend(state.role.trained.iter().map(|role| (role.norm, mean)));
        }
        let tokens: usize = data.sequences.iter().map(|s| s.ids.len()).sum();
        metrics.push(("learning_rate", self.inputs.settings.learning_rate * self.schedule()));
        metrics.push(("tokens", tokens as f64));
        self.step += 1;
        seconds.push(("update", start.elapsed().as_secs_f64()));
        Ok(StepReport { metrics, seconds })
    }

    /// Samples, and scores each sample that ends while others go on and while the models score.
    fn sample_and_score(
        &mut self,
        data: &mut StepData,
        seen: &mut dyn Observer,
        seconds: &mut Vec<(&'static str, f64)>,
    ) -> Result<()> {
        // The run's own again below: its processes are kept.
        let mut rewards = std::mem::take(&mut self.inputs.rewards);
        let of_step = (self.step + 1, data.sequences.len());
        let scored = rewards.beside(of_step, |queue| {
            let start = Instant::now();
            self.sample(data, queue, seen)?;
            seconds.push(("sample", start.elapsed().as_secs_f64()));
            seen.phase("score", 0, 1);
            let start = Instant::now();
            self.fill(data)?;
            seconds.push(("score", start.elapsed().as_secs_f64()));
            Ok(Instant::now())
        });
        let scored = scored.map(|(waits, parts)| {
            if !parts.is_empty() {
                seconds.push(("reward", waits.elapsed().as_secs_f64()));
            }
            data.parts = rewards.sum(parts, &mut data.columns.scores);
        });
        self.inputs.rewards = rewards;
        scored
    }

    /// Continues the step's prompts with samples of the policy, each of which goes to the rewards
    /// when it ends.
    fn sample(
        &mut self,
        data: &mut StepData,
        queue: &RewardQueue,
        seen: &mut dyn Observer,
    ) -> Result<()> {
        let Self { dev, inputs, models, arena, step, .. } = self;
        let (Some(policy), Some(sampling)) = (models.with_head(Head::Lm), inputs.needs.sampling())
        else {
            return Err(Error::value("an algorithm that samples", "a policy", "none"));
        };
        let _phase = dev.span("sample");
        let config = GenerationConfig {
            sampling: sampling.params(),
            max_new_tokens: sampling.max_new_tokens,
            stop_ids: inputs.eos.iter().chain(&inputs.settings.stop_ids).copied().collect(),
            stream: Stream { seed: inputs.settings.seed, step: *step, purpose: Purpose::Sample },
        };
        let (prompts, mut made) = (data.prompts(), 0);
        let mut ends = vec![Vec::new(); if queue.is_read() { prompts.len() } else { 0 }];
        let total = prompts.len() * config.max_new_tokens;
        let (generator, scope) = (inputs.sizes.generator(), arena.scope());
        let done = generator.run(dev, policy, &scope, &prompts, &config, |new| {
            made += new.len();
            seen.phase("sample", made, total);
            for (at, token) in new.iter().copied().filter(|_| queue.is_read()) {
                ends[at].push(token);
                let stopped = config.stop_ids.contains(&token);
                if stopped || ends[at].len() == config.max_new_tokens {
                    let tokenizer = inputs.tokenizer.as_ref();
                    queue.put(at, data.reward_input(at, &ends[at], stopped, tokenizer)?)?;
                }
            }
            stop(*step)
        })?;
        data.continue_with(done);
        Ok(())
    }

    /// The models, and what they score sequences in.
    fn scoring(&mut self) -> (&mut Models<T>, ScoringPass<'_>, &RunInputs) {
        let Self { dev, inputs, models, arena, batch, .. } = self;
        (models, ScoringPass { dev, scorer: inputs.sizes.scorer(), arena, batch }, inputs)
    }

    /// Fills the columns that the algorithm asks for with what the run's models say.
    fn fill(&mut self, data: &mut StepData) -> Result<()> {
        let (models, mut pass, inputs) = self.scoring();
        models.fill(&mut pass, &inputs.needs, &data.sequences, &mut data.columns)?;
        if inputs.needs.mismatched_kl {
            let needs = Needs { old_logp: true, ..inputs.needs.clone() };
            let mut c = Columns::default();
            models.fill(&mut pass, &needs, &data.mismatched, &mut c)?;
            let ratios = c.old_logp.iter().zip(&c.ref_logp);
            let kl: f64 = ratios.map(|(l, r)| f64::from(*l) - f64::from(*r)).sum();
            data.columns.mismatched_kl = Some(kl / data.mismatched.len() as f64);
        }
        Ok(())
    }

    /// Metrics of the held-out data.
    pub fn evaluate(&mut self) -> Result<Metrics> {
        let Some(held_out) = &self.inputs.held_out else { return Ok(Metrics::new()) };
        let mut data = held_out.all();
        let dev = self.dev.clone();
        let _phase = dev.span("evaluate");
        self.fill(&mut data)?;
        let (models, mut pass, inputs) = self.scoring();
        let (mut y, state) = (Vec::new(), &models.trained[0]);
        let (role, model) = (state.role, (&state.model, inputs.needs.temperature()));
        pass.run(model, &data.sequences, |batch, s| role.push(batch, s), &mut y, None)?;
        let all = MicroBatch::new(&data.columns, 0..data.sequences.len());
        let metrics = self.inputs.algorithm.evaluate(&self.host, &all, (&y).into())?;
        check_metrics(&metrics, self.step)?;
        Ok(metrics)
    }

    /// This step's fraction of the peak learning rate.
    fn schedule(&self) -> f64 {
        self.inputs.course.factor(self.step)
    }

    /// Gradients over all micro-batches of a minibatch, then one update of each trained model.
    fn update(&mut self, data: &StepData, first: bool, norms: &mut [Vec<f64>]) -> Result<()> {
        // All gradients are there and known to be good before a model changes.
        let mut watched = Vec::new();
        for i in 0..self.models.trained.len() {
            self.gradient(i, data, first, &mut watched)?;
        }
        let dev = self.dev.clone();
        let (_phase, step) = (dev.span("update"), self.step + 1);
        // All norms are queued before the host waits, once.
        let trained = self.models.trained.iter();
        let pending = trained.map(|state| state.gradient_norm(&dev)).collect::<Result<Vec<_>>>()?;
        // A weight that the last update spoilt is reported before its consequences.
        self.check_updates()?;
        for w in watched {
            w.check(&data.columns, first, step)?;
        }
        let known = self.models.trained.iter().zip(pending);
        let known = known.map(|(state, norm)| state.known(&dev, norm, step));
        let known = known.collect::<Result<Vec<_>>>()?;
        let (factor, s) = (self.schedule(), &self.inputs.settings);
        for (i, (state, norm)) in self.models.trained.iter_mut().zip(known).enumerate() {
            let own = self.inputs.needs.scalar.filter(|_| state.role.head == Head::Scalar);
            let peak = own.and_then(|s| s.learning_rate).unwrap_or(s.learning_rate);
            self.updated.push((i, state.update(&dev, s, peak * factor, norm)?));
            norms[i].push(norm);
        }
        Ok(())
    }

    /// Whether all updates so far left weights that are numbers.
    fn check_updates(&mut self) -> Result<()> {
        let (dev, step) = (&self.dev, self.step + 1);
        let mut updated = self.updated.drain(..);
        updated.try_for_each(|(i, bad)| self.models.trained[i].healthy(dev, bad, step))
    }

    /// The gradient of a trained model over the micro-batches of a minibatch, the `first` of its
    /// step or a later one.
    fn gradient(
        &mut self,
        i: usize,
        data: &StepData,
        first: bool,
        watched: &mut Vec<Watched>,
    ) -> Result<()> {
        let verifies = first && self.verifies();
        let Self { dev, inputs, models, arena, batch, step, .. } = self;
        let (dev, state, unit) = (&*dev, &mut models.trained[i], inputs.sizes.unit);
        let role = state.role;
        let _phase = role.trained.as_ref().map(|role| dev.span(role.phase));
        state.zero_grads(dev)?;
        let mut options = plan::options(&inputs.settings, &inputs.needs, role.head);
        if role.head == Head::Lm && inputs.settings.load_balance > 0.0 {
            // A mean over all rows and blocks.
            batch.clear();
            data.sequences.iter().for_each(|s| role.push(batch, s));
            let terms = batch.len() * state.model.spec().expert_blocks();
            options.balance = inputs.settings.load_balance / terms.max(1) as f64;
        }
        let lens = data.sequences.chunks(unit).map(|u| u.iter().map(|s| s.ids.len()).sum());
        for group in inputs.sizes.micro_batches(lens) {
            if first {
                stop(*step)?;
            }
            let sequences = group.start * unit..group.end * unit;
            batch.clear();
            data.sequences[sequences.clone()].iter().for_each(|s| role.push(batch, s));
            let (algorithm, scope) = (&mut inputs.algorithm, arena.scope());
            let micro = MicroBatch::stage(dev, &scope, &data.columns, sequences.clone())?;
            let before = watched.len();
            let mut watch = Watch { dev, sequences, watched };
            let pass = Pass::new(dev, &state.model, &scope, batch);
            let lm = role.head == Head::Lm;
            let pass = if lm { pass.at(inputs.needs.temperature()) } else { pass };
            pass.train(&mut state.grads, options, |mut c| {
                watch.on(if lm { LOGP } else { role.name }, c.y)?;
                let dy = c.dy.reborrow();
                if lm {
                    algorithm.policy_loss(dev, &micro, c.y, c.entropy, dy, c.dentropy)?;
                } else {
                    algorithm.scalar_loss(dev, &micro, c.y, dy)?;
                }
                let what = if lm { "d loss / d log-prob" } else { "d loss / d scalar" };
                watch.on(what, c.dy.view())
            })?;
            // The first micro-batch once more: the same bits, or the device is at fault.
            if verifies && group.start == 0 {
                drop(micro);
                drop(scope);
                let (scope, mut again) = (arena.scope(), Vec::new());
                let pass = Pass::new(dev, &state.model, &scope, batch);
                let temperature = lm.then(|| inputs.needs.temperature());
                let pass = temperature.map_or(pass, |t| pass.at(t));
                pass.score(&mut again, None)?;
                let first = &mut watched[before];
                let y = std::mem::replace(&mut first.numbers, Pending::now(Vec::new())).get()?;
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
                if bits(&y) != bits(&again) {
                    let what =
                        format!("the {} of the {} model, computed again,", first.what, role.name);
                    return Err(Error::Corrupt { step: *step, what });
                }
                first.numbers = Pending::now(y);
            }
        }
        state.grads.add_tokens(dev)
    }
}

/// Property 9 for what is reported: a loss beyond f32 is none that can be trained on.
fn check_metrics(metrics: &Metrics, step: u64) -> Result<()> {
    let bad = metrics.iter().find(|(_, x)| !(*x as f32).is_finite());
    bad.map_or(Ok(()), |(name, value)| {
        let (what, value) = (format!("the metric `{name}`"), *value);
        Err(Error::BadNumber { step, what, value, samples: Vec::new(), places: Vec::new() })
    })
}

/// Ends a step that has changed nothing yet, if a signal came.
fn stop(step: u64) -> Result<()> {
    let interrupted = |signal| Err(Error::Interrupted { signal, step });
    signals::requested().map_or(Ok(()), interrupted)
}

/// Property 9 for what a step is made of, before clipping hides a bad number or whitening spreads
/// it over all samples.
fn check_columns(dev: &Device, c: &Columns<f32>, step: u64) -> Result<()> {
    for (what, x) in [
        ("the sampled log-prob", &c.old_logp),
        ("the reference log-prob", &c.ref_logp),
        ("the value", &c.old_values),
        ("the score", &c.scores),
    ] {
        let Some(i) = grad_norm::first_bad(dev, x.into())?.get()? else { continue };
        // Scores are by sequence, all else by token.
        let s = if what == "the score" { i } else { c.sequence_of(i) };
        let samples = c.samples.get(s).copied().into_iter().collect();
        let value = f64::from(x[i]);
        return Err(Error::BadNumber {
            step,
            what: what.into(),
            value,
            samples,
            places: Vec::new(),
        });
    }
    Ok(())
}

const LOGP: &str = "log-prob";

/// Numbers of a micro-batch that are checked before the update.
struct Watched {
    what: &'static str,
    sequences: Range<usize>,
    numbers: Pending<Vec<f32>>,
}

/// Collects the watched numbers of a micro-batch.
struct Watch<'a> {
    dev: &'a Device,
    sequences: Range<usize>,
    watched: &'a mut Vec<Watched>,
}

impl Watch<'_> {
    fn on(&mut self, what: &'static str, x: View<'_, f32>) -> Result<()> {
        let (sequences, numbers) = (self.sequences.clone(), self.dev.read_later(x)?);
        self.watched.push(Watched { what, sequences, numbers });
        Ok(())
    }
}

impl Watched {
    /// Property 9: a bad number stops the step, and names what it is and whose. Property 2: before
    /// the `first` update of a step, the training forward gives the very log-prob that was recorded
    /// when each token was sampled.
    fn check(self, c: &Columns<f32>, first: bool, step: u64) -> Result<()> {
        let x = self.numbers.get()?;
        let span = c.span(&self.sequences);
        let error = |what: &str, i: usize, value: f64| {
            let samples = c.samples.get(c.sequence_of(span.start + i)).copied();
            let samples = vec![samples.unwrap_or(u64::MAX)];
            Err(Error::BadNumber { step, what: what.into(), value, samples, places: Vec::new() })
        };
        if let Some(i) = x.iter().position(|x| !x.is_finite()) {
            return error(self.what, i, f64::from(x[i]));
        }
        if !first || self.what != LOGP || c.old_logp.is_empty() {
            return Ok(());
        }
        let old = &c.old_logp[span.clone()];
        let differs = x.iter().zip(old).position(|(a, b)| a.to_bits() != b.to_bits());
        let what = "the first ratio (training against sampled log-prob, wanted exactly 1)";
        let ratio = |i: usize| libm::exp(f64::from(x[i]) - f64::from(old[i]));
        differs.map_or(Ok(()), |i| error(what, i, ratio(i)))
    }
}
