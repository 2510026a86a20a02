//! The training loop: one for all algorithms.

use std::{path::PathBuf, time::Instant};

use super::{
    feed::{self, Examples, Sequence},
    pass::{self, Sizes},
    role::Role,
    rollouts::Rollout,
    schedule,
    settings::Settings,
};
use crate::{
    algorithms::{Algorithm, Columns, Inputs, Metrics, Micro, Needs, Origin, Sampling},
    config::Section,
    data::{Limits, Order, Stats, Tokenizer},
    device::{Arena, Device},
    error::{Error, Result},
    eval::load_reward_model,
    models::{Batch, Config, Head, Model},
    ops::grad_norm,
    rng::{Philox, Purpose},
    rollout::{Generator, Scorer},
};

/// Hears how a run goes.
pub trait Observer {
    /// A line for people.
    fn note(&mut self, line: &str);
    /// The run goes on after `step` of `steps`.
    fn begin(&mut self, _step: u64, _steps: u64) {}
    /// `done` of `total` units of a phase of the present step.
    fn phase(&mut self, _name: &str, _done: usize, _total: usize) {}
    /// A finished step.
    fn step(&mut self, _step: u64, _steps: u64, _metrics: &Metrics, _seconds: f64) {}
}

/// Hears nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn note(&mut self, _line: &str) {}
}

/// A run in memory: models, data and the step it is at.
pub struct Trainer {
    pub(super) dev: Device,
    pub(super) settings: Settings,
    pub(super) algorithm: Box<dyn Algorithm>,
    pub(super) needs: Needs,
    pub(super) policy: Option<Role>,
    pub(super) scalar: Option<Role>,
    pub(super) reference: Option<Model<f32>>,
    pub(super) reward_model: Option<Model<f32>>,
    pub(super) tokenizer: Option<Tokenizer>,
    pub(super) examples: Examples,
    pub(super) held_out: Option<Examples>,
    pub(super) stats: Stats,
    pub(super) eos: Vec<u32>,
    /// Steps done. People count from 1: the next step is `step + 1` in messages and files.
    pub(super) step: u64,
    pub(super) steps: u64,
    order: Order,
    pub(super) arena: Arena,
    sizes: Sizes,
    pub(super) batch: Batch,
    /// Samples of the last step, for the records of the run.
    pub(super) rollouts: Vec<Rollout>,
    pub(super) clock: Vec<(&'static str, f64)>,
}

/// What a step did.
#[derive(Debug, Default)]
pub struct Report {
    /// Named numbers, in order.
    pub metrics: Metrics,
    /// Seconds of each phase: `sample` and `score`, where the algorithm rolls out, and `update`.
    pub seconds: Vec<(&'static str, f64)>,
}

impl Trainer {
    /// Loads models and data, and plans all memory.
    ///
    /// # Errors
    /// Those of the parts, naming file and key.
    pub fn new(settings: Settings, algorithm: Box<dyn Algorithm>) -> Result<Self> {
        settings.validate()?;
        let dev = Device::from_name(&settings.device, settings.threads)?;
        let needs = algorithm.needs();
        let dir = PathBuf::from(&settings.model);
        let (_, spec) = Config::read(&dir)?.spec()?;
        let tokenizer = Tokenizer::open_if_there(&dir)?;
        let mut eos: Vec<u32> = settings.eos_id.into_iter().collect();
        if eos.is_empty() {
            eos.extend(tokenizer.iter().flat_map(|t| t.eos().to_vec()));
        }
        let room = match settings.max_length {
            0 => spec.max_positions,
            n => n.min(spec.max_positions),
        };
        let sampling = match &needs.inputs {
            Inputs::Prompts(s) => Some(s),
            _ => None,
        };
        if room < 2 {
            return Err(Error::config("max_length", "2 or more, or 0", settings.max_length));
        }
        let new = sampling.map_or(0, |s| s.max_new_tokens);
        let Some(max_length) = room.checked_sub(new).filter(|n| *n > 0) else {
            let want = format!("less than the {room} positions of a prompt and its sample");
            return Err(Error::config("max_new_tokens", want, new));
        };
        if !settings.eval_data.is_empty() && sampling.is_some() {
            let want = "none for an algorithm that samples; its metrics are of new samples";
            return Err(Error::config("eval_data", want, settings.eval_data.join(", ")));
        }
        let ids = |key: &str, ids: &[u32]| {
            let bad = ids.iter().find(|id| **id as usize >= spec.vocab);
            let want = format!("below the vocabulary of {}", spec.vocab);
            bad.map_or(Ok(()), |id| Err(Error::config(key, want, id)))
        };
        ids("eos_id", &eos)?;
        ids("stop_ids", &settings.stop_ids)?;
        let limits = Limits { max_length, vocab: spec.vocab, eos: eos.first().copied() };
        let load = |files: &[String]| {
            Examples::load(files, &needs.inputs, tokenizer.as_ref(), limits, &settings)
        };
        let (examples, stats) = load(&settings.data)?;
        let held_out = match settings.eval_data.is_empty() {
            false => Some(load(&settings.eval_data)?.0),
            true => None,
        };
        let per_prompt = sampling.map_or(1, |s| s.samples_per_prompt);
        if !settings.batch_size.is_multiple_of(per_prompt.saturating_mul(needs.minibatches)) {
            let parts = needs.minibatches;
            let want =
                format!("a multiple of samples_per_prompt {per_prompt} x minibatches {parts}");
            return Err(Error::config("batch_size", want, settings.batch_size));
        }
        let draws = settings.batch_size / per_prompt;
        let steps = match settings.steps {
            0 => (settings.epochs * examples.len() as f64 / draws as f64).ceil().max(1.0) as u64,
            n => n,
        };
        let mut this = Self {
            policy: None,
            scalar: None,
            reference: None,
            reward_model: None,
            order: feed::order(&examples, &settings),
            arena: Arena::new(&dev, 0)?,
            sizes: Sizes { rows: 0, sequences: 0 },
            batch: Batch::default(),
            rollouts: Vec::new(),
            clock: Vec::new(),
            step: 0,
            dev,
            settings,
            algorithm,
            needs,
            tokenizer,
            examples,
            held_out,
            stats,
            eos,
            steps,
        };
        this.load_models(&dir)?;
        this.plan()?;
        Ok(this)
    }

    fn load_models(&mut self, dir: &std::path::Path) -> Result<()> {
        let (dev, seed) = (&self.dev, self.settings.seed);
        if !self.needs.policy {
            let model = Model::load(dev, dir, Head::Scalar, Some(seed))?;
            self.scalar = Some(Role::new(dev, "reward", model)?);
            return Ok(());
        }
        let policy = Model::load(dev, dir, Head::Lm, None)?;
        if self.needs.reference {
            self.reference = Some(policy.copy_as(dev, Head::Lm, seed)?);
        }
        if let Some(folder) = self.sampling().and_then(|s| s.reward_model.as_ref()) {
            let (spec, tokenizer) = (policy.spec(), self.tokenizer.as_ref());
            let model = load_reward_model(dev, folder, spec, tokenizer, self.longest())?;
            self.reward_model = Some(model);
        }
        if let Some(scalar) = self.needs.scalar {
            let from = match (scalar.from, &self.reward_model) {
                (Origin::RewardModel, Some(model)) => model,
                _ => &policy,
            };
            self.scalar = Some(Role::new(dev, "value", from.copy_as(dev, Head::Scalar, seed)?)?);
        }
        self.policy = Some(Role::new(dev, "policy", policy)?);
        Ok(())
    }

    /// How samples are made, if the algorithm samples.
    pub(super) fn sampling(&self) -> Option<&Sampling> {
        match &self.needs.inputs {
            Inputs::Prompts(sampling) => Some(sampling),
            _ => None,
        }
    }

    /// Divides the logits of the policy and of the reference.
    pub(super) fn temperature(&self) -> f32 {
        self.sampling().map_or(1.0, |s| s.params.temperature)
    }

    /// Sequences that must stay in one micro-batch.
    fn unit(&self) -> usize {
        if self.needs.inputs == Inputs::Pairs { 2 } else { 1 }
    }

    /// The longest sequence of a step.
    fn longest(&self) -> usize {
        let held_out = self.held_out.as_ref().map_or(0, Examples::longest);
        let new = self.sampling().map_or(0, |s| s.max_new_tokens);
        self.examples.longest().max(held_out) + new
    }

    /// Takes the memory that the largest phase needs.
    fn plan(&mut self) -> Result<()> {
        let unit = self.unit();
        let rows = self.settings.micro_batch_tokens.max(unit * self.longest());
        // A sequence has at least one row.
        self.sizes = Sizes { rows, sequences: (unit * self.settings.batch_size).min(rows) };
        let mut bytes = 0;
        for role in self.policy.iter().chain(&self.scalar) {
            let (spec, head) = (role.model.spec(), role.model.head());
            let entropy = head == Head::Lm && self.needs.entropy;
            bytes = bytes.max(self.sizes.plan::<f32>(spec, head, entropy)?);
        }
        let scorer = self.scorer();
        for model in self.reference.iter().chain(&self.reward_model) {
            bytes = bytes.max(scorer.plan::<f32>(model.spec())?);
        }
        if let (Some(sampling), Some(policy)) = (self.sampling(), &self.policy) {
            let generator = self.generator(sampling);
            bytes = bytes.max(generator.plan::<f32>(policy.model.spec())?);
        }
        self.arena = Arena::new(&self.dev, bytes)?;
        self.batch = Batch::with_capacity(rows);
        Ok(())
    }

    pub(super) fn scorer(&self) -> Scorer {
        Scorer { rows: self.sizes.rows, sequences: self.sizes.sequences }
    }

    pub(super) fn generator(&self, sampling: &Sampling) -> Generator {
        let slots = sampling.slots.min(self.settings.batch_size);
        Generator { slots, max_len: self.longest(), rows: self.sizes.rows.max(slots) }
    }

    /// The language model that is trained.
    #[must_use]
    pub fn policy(&self) -> Option<&Model<f32>> {
        self.policy.as_ref().map(|role| &role.model)
    }

    /// The reward or value model that is trained.
    #[must_use]
    pub fn scalar(&self) -> Option<&Model<f32>> {
        self.scalar.as_ref().map(|role| &role.model)
    }

    /// How prompts, samples, minibatches and micro-batches multiply, in one line.
    #[must_use]
    pub fn equation(&self) -> String {
        let (s, n) = (&self.settings, &self.needs);
        let head = match &n.inputs {
            Inputs::Texts { .. } => format!("{} texts a step", s.batch_size),
            Inputs::Pairs => {
                format!("{0} pairs = {1} texts a step", s.batch_size, 2 * s.batch_size)
            }
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
        format!("{head}; micro-batches of up to {} tokens; {} steps", self.sizes.rows, self.steps)
    }

    /// Bytes of memory that phases share.
    #[must_use]
    pub fn planned_bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// One optimizer step. `None` if a signal came while it was sampling: nothing has changed then.
    ///
    /// # Errors
    /// [`Error::BadNumber`] naming what is no number any more, and whose. The models may then be
    /// in the middle of the step: go on from a checkpoint.
    pub fn step(&mut self, seen: &mut dyn Observer) -> Result<Option<Report>> {
        let per_prompt = self.sampling().map_or(1, |s| s.samples_per_prompt);
        let chosen = self.order.batch(self.step, self.settings.batch_size / per_prompt);
        let base = self.step * (self.settings.batch_size * self.unit()) as u64;
        self.step_on(&chosen, base, seen).map_err(|mut e| {
            if let Error::BadNumber { samples, places, .. } = &mut e {
                *places = samples.iter().filter_map(|s| self.place(&chosen, base, *s)).collect();
            }
            e
        })
    }

    /// The line of data that a sample of this step comes from.
    fn place(&self, chosen: &[usize], base: u64, sample: u64) -> Option<String> {
        let i = sample.checked_sub(base)? as usize;
        let each = self.sampling().map_or(self.unit(), |s| s.samples_per_prompt);
        let places = self.examples.places(*chosen.get(i / each)?);
        places.get(i % each).or(places.first()).map(ToString::to_string)
    }

    fn step_on(
        &mut self,
        chosen: &[usize],
        base: u64,
        seen: &mut dyn Observer,
    ) -> Result<Option<Report>> {
        let mut metrics = Metrics::new();
        self.rollouts.clear();
        self.clock.clear();
        let (sequences, mut columns) = match self.examples.sequences(chosen, base) {
            Some(ready) => ready,
            None => match self.roll_out(chosen, base, seen)? {
                Some(sampled) => sampled,
                None => return Ok(None),
            },
        };
        self.algorithm.prepare(&self.dev, &mut columns, &mut metrics)?;
        self.finish_rollouts(&columns);
        let start = Instant::now();
        let lr = self.settings.learning_rate * self.schedule();
        let (epochs, parts) = (self.needs.epochs, self.needs.minibatches);
        let tokens: usize = sequences.iter().map(|s| s.ids.len()).sum();
        let mut norms = Norms::default();
        for epoch in 0..epochs {
            if epochs * parts == 1 {
                self.update(&sequences, &columns, true, lr, &mut norms)?;
                continue;
            }
            let draw = Philox::new(self.settings.seed, self.step, epoch as u64, Purpose::Minibatch);
            let order = draw.permutation(sequences.len());
            for (part, chosen) in order.chunks(sequences.len() / parts).enumerate() {
                seen.phase("update", epoch * parts + part, epochs * parts);
                let mini: Vec<Sequence> = chosen.iter().map(|i| sequences[*i].clone()).collect();
                let first = epoch + part == 0;
                self.update(&mini, &columns.subset(chosen), first, lr, &mut norms)?;
            }
        }
        self.algorithm.finish(&mut metrics);
        norms.report(&mut metrics);
        metrics.push(("learning_rate", lr));
        metrics.push(("tokens", tokens as f64));
        self.step += 1;
        self.clock.push(("update", start.elapsed().as_secs_f64()));
        Ok(Some(Report { metrics, seconds: self.clock.clone() }))
    }

    fn schedule(&self) -> f64 {
        let s = &self.settings;
        let floor = s.min_learning_rate_ratio;
        schedule::factor(s.schedule, self.step, self.steps, s.warmup_steps, floor)
    }

    /// Gradients over all micro-batches of a minibatch, then one update of each trained model.
    fn update(
        &mut self,
        sequences: &[Sequence],
        columns: &Columns<f32>,
        first: bool,
        lr: f64,
        norms: &mut Norms,
    ) -> Result<()> {
        let unit = self.unit();
        let lens = sequences.chunks(unit).map(|u| u.iter().map(|s| s.ids.len()).sum());
        let groups = self.scorer().groups(lens);
        let dev = self.dev.clone();
        let (mut policy, mut scalar) = (self.policy.take(), self.scalar.take());
        let mut run = || {
            // Both gradients are there and known to be good before either model changes.
            if let Some(role) = &mut policy {
                self.policy_gradient(&dev, role, sequences, columns, &groups, first)?;
            }
            if let Some(role) = &mut scalar {
                self.scalar_gradient(&dev, role, sequences, columns, &groups, unit)?;
            }
            let step = self.step + 1;
            let norm = |role: &Role| role.gradient_norm(&dev, step);
            let policy_norm = policy.as_ref().map(norm).transpose()?;
            let scalar_norm = scalar.as_ref().map(norm).transpose()?;
            if let (Some(role), Some(norm)) = (&mut policy, policy_norm) {
                role.update(&dev, &self.settings, lr, norm, step)?;
            }
            if let (Some(role), Some(norm)) = (&mut scalar, scalar_norm) {
                let own = self.needs.scalar.and_then(|s| s.learning_rate);
                let lr = own.map_or(lr, |peak| peak * self.schedule());
                role.update(&dev, &self.settings, lr, norm, step)?;
            }
            norms.policy.extend(policy_norm);
            norms.scalar.extend(scalar_norm);
            Ok(())
        };
        let done = run();
        (self.policy, self.scalar) = (policy, scalar);
        done
    }

    fn policy_gradient(
        &mut self,
        dev: &Device,
        role: &mut Role,
        sequences: &[Sequence],
        columns: &Columns<f32>,
        groups: &[std::ops::Range<usize>],
        first: bool,
    ) -> Result<()> {
        role.zero_grads();
        let temperature = self.temperature();
        let (step, entropy) = (self.step + 1, self.needs.entropy);
        for group in groups {
            self.batch.clear();
            for s in &sequences[group.clone()] {
                self.batch.push_masked(&s.ids, &s.predicted);
            }
            let micro = Micro { columns, sequences: group.clone() };
            let (algorithm, scope) = (&mut self.algorithm, self.arena.scope());
            let (model, grads, batch) = (&role.model, &mut role.grads, &self.batch);
            pass::policy(dev, model, grads, &scope, batch, temperature, entropy, |mut c| {
                check(dev, &micro, c.logp.host(), step, "log-prob")?;
                if first {
                    exact(&micro, c.logp.host(), step)?;
                }
                let (dlogp, dentropy) = (c.dlogp.reborrow(), c.dentropy);
                algorithm.policy_loss(dev, &micro, c.logp, c.entropy, dlogp, dentropy)?;
                check(dev, &micro, c.dlogp.view().host(), step, "d loss / d log-prob")
            })?;
        }
        Ok(())
    }

    fn scalar_gradient(
        &mut self,
        dev: &Device,
        role: &mut Role,
        sequences: &[Sequence],
        columns: &Columns<f32>,
        groups: &[std::ops::Range<usize>],
        unit: usize,
    ) -> Result<()> {
        role.zero_grads();
        let (step, name) = (self.step + 1, role.name);
        for group in groups {
            let group = group.start * unit..group.end * unit;
            self.batch.clear();
            for s in &sequences[group.clone()] {
                if self.needs.policy {
                    self.batch.push_masked(&s.ids, &s.predicted);
                } else {
                    self.batch.push_last(&s.ids);
                }
            }
            let micro = Micro { columns, sequences: group };
            let (algorithm, scope) = (&mut self.algorithm, self.arena.scope());
            let (model, grads, batch) = (&role.model, &mut role.grads, &self.batch);
            pass::scalar(dev, model, grads, &scope, batch, |y, mut dy| {
                check(dev, &micro, y.host(), step, name)?;
                algorithm.scalar_loss(dev, &micro, y, dy.reborrow())?;
                check(dev, &micro, dy.view().host(), step, "d loss / d scalar")
            })?;
        }
        Ok(())
    }
}

/// Gradient norms of a step's updates, before clipping.
#[derive(Default)]
struct Norms {
    policy: Vec<f64>,
    scalar: Vec<f64>,
}

impl Norms {
    fn report(&self, out: &mut Metrics) {
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        match (self.policy.is_empty(), self.scalar.is_empty()) {
            (false, true) => out.push(("grad_norm", mean(&self.policy))),
            (true, false) => out.push(("grad_norm", mean(&self.scalar))),
            (false, false) => {
                out.push(("grad_norm", mean(&self.policy)));
                out.push(("value_grad_norm", mean(&self.scalar)));
            }
            (true, true) => {}
        }
    }
}

/// Property 9: a bad number stops the step, and names what it is and whose.
fn check(dev: &Device, micro: &Micro<'_, f32>, x: &[f32], step: u64, what: &str) -> Result<()> {
    let Some(i) = grad_norm::first_bad(dev, x.into())?.get()? else { return Ok(()) };
    let sample = sample_of(micro, i);
    let value = f64::from(x[i]);
    let (what, samples) = (what.into(), vec![sample]);
    Err(Error::BadNumber { step, what, value, samples, places: Vec::new() })
}

/// Property 2: before the first update of a step, the training forward gives the very log-prob
/// that was recorded when each token was sampled.
fn exact(micro: &Micro<'_, f32>, logp: &[f32], step: u64) -> Result<()> {
    if micro.columns.old_logp.is_empty() {
        return Ok(());
    }
    let old = &micro.columns.old_logp[micro.tokens()];
    let Some(i) = logp.iter().zip(old).position(|(a, b)| a.to_bits() != b.to_bits()) else {
        return Ok(());
    };
    let value = (f64::from(logp[i]) - f64::from(old[i])).exp();
    let what = "the first ratio (training against sampled log-prob, wanted exactly 1)".into();
    let samples = vec![sample_of(micro, i)];
    Err(Error::BadNumber { step, what, value, samples, places: Vec::new() })
}

/// The sample that holds number `i` of a micro-batch.
fn sample_of(micro: &Micro<'_, f32>, i: usize) -> u64 {
    let c = micro.columns;
    let s = c.sequence_of(micro.tokens().start + i);
    c.samples.get(s).copied().unwrap_or(u64::MAX)
}
