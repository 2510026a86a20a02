//! The training loop: one for all algorithms.

use std::{path::PathBuf, time::Instant};

use super::{
    feed::{self, Examples, Sequence},
    pass::{self, Sizes},
    role::Role,
    rollouts::Rollout,
    schedule,
    settings::Settings,
    signals,
};
use crate::{
    algorithms::{Algorithm, Columns, Inputs, Metrics, Micro, Needs, PpoSettings},
    data::{Limits, Order, Stats, Tokenizer},
    device::{Arena, Device},
    error::{Error, Result},
    models::{Batch, Config, Head, Model},
    ops::{grad_norm, sample},
    rng::{Philox, Purpose},
    rollout::{Completion, Generator, Prompt, Scorer, Settings as Generation},
};

/// Hears how a run goes.
pub trait Observer {
    /// A line for people.
    fn note(&mut self, line: &str);
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
    pub(super) ppo: PpoSettings,
    pub(super) algorithm: Box<dyn Algorithm>,
    pub(super) needs: Needs,
    pub(super) policy: Option<Role>,
    pub(super) scalar: Option<Role>,
    pub(super) reference: Option<Model<f32>>,
    pub(super) judge: Option<Model<f32>>,
    pub(super) tokenizer: Option<Tokenizer>,
    pub(super) examples: Examples,
    pub(super) held_out: Option<Examples>,
    pub(super) stats: Stats,
    pub(super) eos: Vec<u32>,
    /// Steps done. People count from 1: the next step is `step + 1` in messages and files.
    pub(super) step: u64,
    pub(super) steps: u64,
    order: Order,
    arena: Arena,
    sizes: Sizes,
    batch: Batch,
    /// Samples of the last step, for the records of the run.
    pub(super) rollouts: Vec<Rollout>,
    clock: Vec<(&'static str, f64)>,
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
    pub fn new(
        settings: Settings,
        ppo: PpoSettings,
        algorithm: Box<dyn Algorithm>,
        completion_only: bool,
    ) -> Result<Self> {
        settings.validate()?;
        let dev = Device::from_name(&settings.device, settings.threads)?;
        let needs = algorithm.needs();
        let dir = PathBuf::from(&settings.model);
        let (_, spec) = Config::read(&dir)?.spec()?;
        let tokenizer = match dir.join("tokenizer.json").exists() {
            true => Some(Tokenizer::open(&dir)?),
            false => None,
        };
        let mut eos: Vec<u32> = settings.eos_id.into_iter().collect();
        if eos.is_empty() {
            eos.extend(tokenizer.iter().flat_map(|t| t.eos().to_vec()));
        }
        let room = match settings.max_length {
            0 => spec.max_positions,
            n => n.min(spec.max_positions),
        };
        let prompts = needs.inputs == Inputs::Prompts;
        let new = if prompts { ppo.max_new_tokens } else { 0 };
        let Some(max_length) = room.checked_sub(new).filter(|n| *n > 1) else {
            let message = format!("{new} leave no room for a prompt in {room} positions");
            return Err(Error::Config { key: "max_new_tokens".into(), message, hint: None });
        };
        let limits = Limits { max_length, vocab: spec.vocab, eos: eos.first().copied() };
        let load = |files: &[String]| {
            let t = tokenizer.as_ref();
            Examples::load(files, needs.inputs, t, limits, &settings, completion_only)
        };
        let (examples, stats) = load(&settings.data)?;
        let held_out = match (settings.eval_data.is_empty(), prompts) {
            (false, false) => Some(load(&settings.eval_data)?.0),
            _ => None,
        };
        let per_prompt = if prompts { ppo.samples_per_prompt } else { 1 };
        if !settings.batch_size.is_multiple_of(per_prompt * needs.minibatches.max(1)) {
            let message = format!(
                "{} is no multiple of samples_per_prompt {per_prompt} x minibatches {}",
                settings.batch_size, needs.minibatches
            );
            return Err(Error::Config { key: "batch_size".into(), message, hint: None });
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
            judge: None,
            order: feed::order(&examples, &settings),
            arena: Arena::new(0),
            sizes: Sizes { rows: 0, sequences: 0 },
            batch: Batch::default(),
            rollouts: Vec::new(),
            clock: Vec::new(),
            step: 0,
            dev,
            settings,
            ppo,
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
            let model = Model::load(dev, dir, Head::Scalar, seed)?;
            self.scalar = Some(Role::new("reward", model));
            return Ok(());
        }
        let policy = Model::load(dev, dir, Head::Lm, seed)?;
        if self.needs.reference {
            self.reference = Some(policy.copy_as(dev, Head::Lm, seed)?);
        }
        if self.needs.scores {
            let folder = PathBuf::from(&self.ppo.reward_model);
            let judge = Model::load(dev, &folder, Head::Scalar, seed)?;
            let (want, got) = (policy.spec().vocab, judge.spec().vocab);
            if want != got {
                let message = format!("has a vocabulary of {got}, the policy one of {want}");
                return Err(Error::file(folder, message));
            }
            let from = if self.ppo.value_init == "reward" { &judge } else { &policy };
            let value = from.copy_as(dev, Head::Scalar, seed)?;
            self.scalar = Some(Role::new("value", value));
            self.judge = Some(judge);
        }
        self.policy = Some(Role::new("policy", policy));
        Ok(())
    }

    /// The longest sequence of a step.
    fn longest(&self) -> usize {
        let held_out = self.held_out.as_ref().map_or(0, Examples::longest);
        let new = if self.needs.inputs == Inputs::Prompts { self.ppo.max_new_tokens } else { 0 };
        self.examples.longest().max(held_out) + new
    }

    /// Takes the memory that the largest phase needs.
    fn plan(&mut self) -> Result<()> {
        let unit = if self.needs.inputs == Inputs::Pairs { 2 } else { 1 };
        let rows = self.settings.micro_batch_tokens.max(unit * self.longest());
        self.sizes = Sizes { rows, sequences: unit * self.settings.batch_size };
        let mut bytes = 0;
        for role in self.policy.iter().chain(&self.scalar) {
            let (spec, head) = (role.model.spec(), role.model.head());
            let entropy = head == Head::Lm && self.needs.entropy;
            bytes = bytes.max(self.sizes.plan::<f32>(spec, head, entropy)?);
        }
        let scorer = self.scorer();
        for model in self.reference.iter().chain(&self.judge) {
            bytes = bytes.max(scorer.plan::<f32>(model.spec())?);
        }
        if let (Inputs::Prompts, Some(policy)) = (self.needs.inputs, &self.policy) {
            bytes = bytes.max(self.generator().plan::<f32>(policy.model.spec())?);
        }
        self.arena = Arena::new(bytes);
        self.batch = Batch::with_capacity(rows);
        Ok(())
    }

    fn scorer(&self) -> Scorer {
        Scorer { rows: self.sizes.rows, sequences: self.sizes.sequences }
    }

    fn generator(&self) -> Generator {
        let slots = self.ppo.rollout_slots.min(self.settings.batch_size);
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
        let head = match n.inputs {
            Inputs::Texts => format!("{} texts a step", s.batch_size),
            Inputs::Pairs => {
                format!("{0} pairs = {1} texts a step", s.batch_size, 2 * s.batch_size)
            }
            Inputs::Prompts => format!(
                "{} prompts x {} samples = {} sequences a step; x {} passes in {} minibatches of {} \
                 = {} updates a step",
                s.batch_size / self.ppo.samples_per_prompt,
                self.ppo.samples_per_prompt,
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
    /// [`Error::BadNumber`] before an update that would have spoilt the weights.
    pub fn step(&mut self, seen: &mut dyn Observer) -> Result<Option<Report>> {
        let mut metrics = Metrics::new();
        self.rollouts.clear();
        self.clock.clear();
        let draws = match self.needs.inputs {
            Inputs::Prompts => self.settings.batch_size / self.ppo.samples_per_prompt,
            _ => self.settings.batch_size,
        };
        let chosen = self.order.batch(self.step, draws);
        let per = if self.needs.inputs == Inputs::Pairs { 2 } else { 1 };
        let base = self.step * (self.settings.batch_size * per) as u64;
        let (sequences, mut columns) = match self.examples.sequences(&chosen, base) {
            Some(ready) => ready,
            None => match self.roll_out(&chosen, base, seen)? {
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
        let unit = if self.needs.inputs == Inputs::Pairs { 2 } else { 1 };
        let lens = sequences.chunks(unit).map(|u| u.iter().map(|s| s.ids.len()).sum());
        let groups = self.scorer().groups(lens);
        let dev = self.dev.clone();
        if let Some(mut role) = self.policy.take() {
            let done = self.policy_gradient(&dev, &mut role, sequences, columns, &groups, first);
            let done = done.and_then(|()| role.update(&dev, &self.settings, lr, self.step + 1));
            self.policy = Some(role);
            norms.policy.push(done?);
        }
        if let Some(mut role) = self.scalar.take() {
            let lr = match self.ppo.value_learning_rate.filter(|_| self.needs.policy) {
                Some(peak) => peak * self.schedule(),
                None => lr,
            };
            let done = self.scalar_gradient(&dev, &mut role, sequences, columns, &groups, unit);
            let done = done.and_then(|()| role.update(&dev, &self.settings, lr, self.step + 1));
            self.scalar = Some(role);
            norms.scalar.push(done?);
        }
        Ok(())
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
        let temperature =
            if self.needs.inputs == Inputs::Prompts { self.ppo.temperature } else { 1.0 };
        let (step, entropy) = (self.step + 1, self.needs.entropy);
        for group in groups {
            self.batch.clear();
            for s in &sequences[group.clone()] {
                self.batch.push_masked(&s.ids, s.predicted.iter().cloned());
            }
            let micro = Micro { columns, sequences: group.clone() };
            let (algorithm, scope) = (&mut self.algorithm, self.arena.scope());
            let (model, grads, batch) = (&role.model, &mut role.grads, &self.batch);
            pass::policy(
                dev,
                model,
                grads,
                &scope,
                batch,
                temperature as f32,
                entropy,
                |mut c| {
                    check(dev, &micro, c.logp.host(), step, "log-prob")?;
                    if first {
                        exact(&micro, c.logp.host(), step)?;
                    }
                    let (dlogp, dentropy) = (c.dlogp.reborrow(), c.dentropy);
                    algorithm.policy_loss(dev, &micro, c.logp, c.entropy, dlogp, dentropy)?;
                    check(dev, &micro, c.dlogp.view().host(), step, "d loss / d log-prob")
                },
            )?;
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
                    self.batch.push_masked(&s.ids, s.predicted.iter().cloned());
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

    /// Continues prompts, and fills the columns that need a model.
    fn roll_out(
        &mut self,
        chosen: &[usize],
        base: u64,
        seen: &mut dyn Observer,
    ) -> Result<Option<(Vec<Sequence>, Columns<f32>)>> {
        let Examples::Prompts(all) = &self.examples else { return Ok(None) };
        let per = self.ppo.samples_per_prompt;
        let prompts: Vec<Prompt> = chosen
            .iter()
            .flat_map(|i| std::iter::repeat_n(&all[*i], per))
            .zip(base..)
            .map(|(p, sample)| Prompt { sample, ids: p.ids.clone() })
            .collect();
        let start = Instant::now();
        let Some(completions) = self.generate(&prompts, seen)? else { return Ok(None) };
        self.clock.push(("sample", start.elapsed().as_secs_f64()));
        let start = Instant::now();
        let mut columns = Columns { offsets: vec![0], ..Columns::default() };
        let mut sequences = Vec::with_capacity(prompts.len());
        for (p, c) in prompts.iter().zip(&completions) {
            let ids = [&p.ids[..], &c.ids].concat();
            let learn = p.ids.len()..ids.len();
            sequences.push(Sequence { predicted: vec![learn], ids });
            columns.old_logp.extend_from_slice(&c.logprobs);
            columns.offsets.push(columns.old_logp.len() as u32);
            columns.samples.push(p.sample);
            columns.stopped.push(c.stopped);
            self.rollouts.push(Rollout::new(self.step + 1, p, c));
        }
        seen.phase("score", 0, 1);
        self.score(&sequences, &mut columns)?;
        check_columns(&self.dev, &columns, self.step + 1)?;
        self.clock.push(("score", start.elapsed().as_secs_f64()));
        Ok(Some((sequences, columns)))
    }

    fn generate(
        &mut self,
        prompts: &[Prompt],
        seen: &mut dyn Observer,
    ) -> Result<Option<Vec<Completion<f32>>>> {
        let generator = self.generator();
        let Some(policy) = &self.policy else { return Ok(None) };
        let settings = Generation {
            sampling: sample::Params {
                temperature: self.ppo.temperature as f32,
                top_k: self.ppo.top_k,
                top_p: self.ppo.top_p as f32,
                min_p: self.ppo.min_p as f32,
            },
            max_new_tokens: self.ppo.max_new_tokens,
            stop_ids: self.eos.iter().chain(&self.settings.stop_ids).copied().collect(),
            seed: self.settings.seed,
            step: self.step,
        };
        let total = prompts.len() * settings.max_new_tokens;
        let mut made = 0;
        let scope = self.arena.scope();
        generator.run(&self.dev, &policy.model, &scope, prompts, &settings, |n| {
            made += n;
            seen.phase("sample", made, total);
            signals::requested().is_none()
        })
    }

    /// Reference log-probs, values and scores of the sampled sequences.
    fn score(&mut self, sequences: &[Sequence], c: &mut Columns<f32>) -> Result<()> {
        let (scorer, dev) = (self.scorer(), &self.dev);
        let t = self.ppo.temperature as f32;
        for group in scorer.groups(sequences.iter().map(|s| s.ids.len())) {
            self.batch.clear();
            for s in &sequences[group.clone()] {
                self.batch.push_masked(&s.ids, s.predicted.iter().cloned());
            }
            if let Some(model) = &self.reference {
                let scope = self.arena.scope();
                scorer.logprobs(dev, model, &scope, &self.batch, t, &mut c.ref_logp, None)?;
            }
            if let Some(role) = &self.scalar {
                let scope = self.arena.scope();
                scorer.scalars(dev, &role.model, &scope, &self.batch, &mut c.old_values)?;
            }
            if let Some(model) = &self.judge {
                self.batch.clear();
                sequences[group].iter().for_each(|s| self.batch.push_last(&s.ids));
                scorer.scalars(dev, model, &self.arena.scope(), &self.batch, &mut c.scores)?;
            }
        }
        Ok(())
    }

    /// Writes scores, values and advantages into the records of the step.
    fn finish_rollouts(&mut self, c: &Columns<f32>) {
        for (s, r) in self.rollouts.iter_mut().enumerate() {
            r.fill(c, s, self.tokenizer.as_ref());
        }
    }

    /// Loss, and accuracy of a reward model, on the held-out data.
    ///
    /// # Errors
    /// Those of the passes.
    pub fn evaluate(&mut self) -> Result<Metrics> {
        let Some(held_out) = &self.held_out else { return Ok(Metrics::new()) };
        let all: Vec<usize> = (0..held_out.len()).collect();
        let Some((sequences, columns)) = held_out.sequences(&all, 0) else {
            return Ok(Metrics::new());
        };
        let (scorer, dev) = (self.scorer(), &self.dev);
        let mut out = Vec::new();
        for group in scorer.groups(sequences.iter().map(|s| s.ids.len())) {
            self.batch.clear();
            for s in &sequences[group] {
                match &self.policy {
                    Some(_) => self.batch.push_masked(&s.ids, s.predicted.iter().cloned()),
                    None => self.batch.push_last(&s.ids),
                }
            }
            let scope = self.arena.scope();
            match (&self.policy, &self.scalar) {
                (Some(role), _) => {
                    scorer.logprobs(dev, &role.model, &scope, &self.batch, 1.0, &mut out, None)?;
                }
                (None, Some(role)) => {
                    scorer.scalars(dev, &role.model, &scope, &self.batch, &mut out)?;
                }
                (None, None) => {}
            }
        }
        if self.policy.is_some() {
            let nll = -out.iter().map(|x| f64::from(*x)).sum::<f64>() / out.len() as f64;
            return Ok(vec![("eval_loss", nll), ("eval_perplexity", nll.exp())]);
        }
        let pairs = (out.len() / 2) as f64;
        let right = out.chunks_exact(2).filter(|p| p[0] > p[1]).count() as f64;
        let mut d = vec![0.0; out.len()];
        let (d, y, m) = ((&mut d).into(), (&out).into(), (&columns.margins).into());
        let stats = crate::ops::bradley_terry::forward(dev, d, y, m, 0.0, pairs)?;
        Ok(vec![("eval_loss", stats.loss), ("eval_accuracy", right / pairs)])
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
    let Some(i) = grad_norm::first_bad(dev, x.into()) else { return Ok(()) };
    let sample = sample_of(micro, i);
    let value = f64::from(x[i]);
    Err(Error::BadNumber { step, what: what.into(), value, samples: vec![sample] })
}

/// Property 9 for what a step is made of, before clipping hides a bad number or whitening spreads it
/// over all samples.
fn check_columns(dev: &Device, c: &Columns<f32>, step: u64) -> Result<()> {
    for (what, x) in [
        ("the sampled log-prob", &c.old_logp),
        ("the reference log-prob", &c.ref_logp),
        ("the value", &c.old_values),
        ("the score", &c.scores),
    ] {
        let Some(i) = grad_norm::first_bad(dev, x.into()) else { continue };
        // scores are by sequence, all else by token
        let s = if what == "the score" { i } else { c.sequence_of(i) };
        let samples = c.samples.get(s).copied().into_iter().collect();
        return Err(Error::BadNumber { step, what: what.into(), value: f64::from(x[i]), samples });
    }
    Ok(())
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
    Err(Error::BadNumber { step, what, value, samples: vec![sample_of(micro, i)] })
}

/// The sample that holds number `i` of a micro-batch.
fn sample_of(micro: &Micro<'_, f32>, i: usize) -> u64 {
    let c = micro.columns;
    let s = c.sequence_of(micro.tokens().start + i);
    c.samples.get(s).copied().unwrap_or(u64::MAX)
}
