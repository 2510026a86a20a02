//! The training loop: one for all algorithms.

use std::{ops::Range, path::Path, time::Instant};

use super::{
    feed::{self, Sequence},
    job::Job,
    plan::{self, Plan},
    role::Role,
    rollouts::Rollout,
    schedule,
    settings::Settings,
};
use crate::{
    algorithms::{Algorithm, Columns, Inputs, Metrics, Micro, Origin, Sampling},
    data::Order,
    device::{Arena, Device, Element, Pending, View},
    error::{Error, Result},
    models::{Batch, Head, Model, Pass, PassOptions, Residency},
    rng::{Philox, Purpose},
};

/// Hears how a run goes.
pub trait Observer {
    /// A line for people.
    fn note(&mut self, line: &str);
    /// The run goes on after `step` of `steps`.
    fn begin(&mut self, _step: u64, _steps: u64) {}
    /// `done` of `total` units of a phase of the present step.
    fn phase(&mut self, _name: &str, _done: usize, _total: usize) {}
    fn step(&mut self, _step: u64, _steps: u64, _metrics: &Metrics, _seconds: f64) {}
}

#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn note(&mut self, _line: &str) {}
}

/// A run in memory: models, which compute in `T`, data and the step it is at.
pub struct Trainer<T: Element> {
    pub(super) dev: Device,
    /// Where columns are, and what is made of them once a step.
    pub(super) host: Device,
    pub(super) job: Job,
    pub(super) policy: Option<Role<T>>,
    pub(super) scalar: Option<Role<T>>,
    pub(super) reference: Option<Model<T>>,
    pub(super) reward_model: Option<Model<T>>,
    /// Steps done. People count from 1: the next step is `step + 1` in messages and files.
    pub(super) step: u64,
    order: Order,
    pub(super) arena: Arena,
    memory: Plan,
    pub(super) batch: Batch,
    /// Samples of the last step, for the records of the run.
    pub(super) rollouts: Vec<Rollout>,
    pub(super) clock: Vec<(&'static str, f64)>,
    /// What the step's updates made of the weights, by role.
    changed: Changed,
}

/// What a step did.
#[derive(Debug, Default)]
pub struct Report {
    /// Named numbers, in order.
    pub metrics: Metrics,
    /// Seconds of each phase: `sample` and `score`, where the algorithm rolls out, and `update`.
    pub seconds: Vec<(&'static str, f64)>,
}

impl<T: Element<Acc = f32>> Trainer<T> {
    /// Reads data, plans all memory, and loads models if there is room for them.
    pub fn new(dev: &Device, settings: Settings, algorithm: Box<dyn Algorithm>) -> Result<Self> {
        let job = Job::new(settings, algorithm)?;
        let memory = job.plan::<T>(dev)?;
        memory.fits(dev)?;
        let mut this = Self {
            dev: dev.clone(),
            host: dev.host(job.settings.threads),
            policy: None,
            scalar: None,
            reference: None,
            reward_model: None,
            step: 0,
            order: feed::order(&job.examples, &job.settings),
            arena: Arena::new(dev, 0)?,
            batch: Batch::with_capacity(job.work.micro_batch.rows),
            memory,
            rollouts: Vec::new(),
            clock: Vec::new(),
            changed: Vec::new(),
            job,
        };
        this.load_models()?;
        this.arena = Arena::new(dev, this.memory.shared())?;
        Ok(this)
    }

    fn load_models(&mut self) -> Result<()> {
        let (dev, job) = (&self.dev, &self.job);
        let (dir, seed) = (Path::new(&job.settings.model), job.settings.seed);
        if !job.needs.policy {
            let model = Model::load_trained(dev, dir, Head::Scalar, Some(seed))?;
            self.scalar = Some(Role::new(dev, "reward", model)?);
            return Ok(());
        }
        let policy = Model::load_trained(dev, dir, Head::Lm, None)?;
        let offload = |mut model: Model<T>| {
            let kind = (model.spec(), model.head());
            if plan::frozen::<T>(dev, &job.settings, kind, policy.spec()) == Residency::Offloaded {
                model.offload(dev)?;
            }
            Ok(Some(model))
        };
        if job.needs.reference {
            self.reference = offload(policy.copy_as(dev, Head::Lm, seed, Residency::Frozen)?)?;
        }
        let judge = plan::sampling(&job.needs).and_then(|s| s.reward_model.as_ref());
        if let Some(judge) = judge {
            self.reward_model = offload(Model::load(dev, judge, Head::Scalar, None)?)?;
        }
        if let Some(scalar) = job.needs.scalar {
            // Loaded again, not copied: the judge may be rounded.
            let value = match judge.filter(|_| scalar.from == Origin::RewardModel) {
                Some(judge) => Model::load_trained(dev, judge, Head::Scalar, None)?,
                None => policy.copy_as(dev, Head::Scalar, seed, Residency::Trained)?,
            };
            self.scalar = Some(Role::new(dev, "value", value)?);
        }
        self.policy = Some(Role::new(dev, "policy", policy)?);
        Ok(())
    }

    /// How samples are made, if the algorithm samples.
    pub(super) fn sampling(&self) -> Option<&Sampling> {
        plan::sampling(&self.job.needs)
    }

    /// Divides the logits of the policy and of the reference.
    pub(super) fn temperature(&self) -> f32 {
        self.sampling().map_or(1.0, |s| s.params.temperature)
    }

    /// Memory of the run, all of which is taken.
    pub fn memory(&self) -> &Plan {
        &self.memory
    }

    fn pass_options(&self, head: Head) -> PassOptions {
        plan::pass_options(&self.job.settings, &self.job.needs, head)
    }

    /// The language model that is trained.
    pub fn policy(&self) -> Option<&Model<T>> {
        self.policy.as_ref().map(|role| &role.model)
    }

    /// The reward or value model that is trained.
    pub fn scalar(&self) -> Option<&Model<T>> {
        self.scalar.as_ref().map(|role| &role.model)
    }

    /// How prompts, samples, minibatches and micro-batches multiply, in one line.
    pub fn equation(&self) -> String {
        let (s, n) = (&self.job.settings, &self.job.needs);
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
        format!(
            "{head}; micro-batches of up to {} tokens; {} steps",
            self.job.work.micro_batch.rows, self.job.steps
        )
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if a signal came while it was sampling: nothing has changed then.
    /// [`Error::BadNumber`] naming what is no number any more, and whose. The models may then be
    /// in the middle of the step: go on from a checkpoint.
    pub fn step(&mut self, seen: &mut dyn Observer) -> Result<Report> {
        let _phase = self.dev.span("step");
        let per_prompt = self.sampling().map_or(1, |s| s.samples_per_prompt);
        let chosen = self.order.batch(self.step, self.job.settings.batch_size / per_prompt);
        let base = self.step * (self.job.settings.batch_size * self.job.work.unit) as u64;
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
        let each = self.sampling().map_or(self.job.work.unit, |s| s.samples_per_prompt);
        let places = self.job.examples.places(*chosen.get(i / each)?);
        places.get(i % each).or(places.first()).map(ToString::to_string)
    }

    fn step_on(&mut self, chosen: &[usize], base: u64, seen: &mut dyn Observer) -> Result<Report> {
        let mut metrics = Metrics::new();
        self.rollouts.clear();
        self.clock.clear();
        self.changed.clear();
        let (sequences, mut columns) = match self.job.examples.sequences(chosen, base) {
            Some(ready) => ready,
            None => self.roll_out(chosen, base, seen)?,
        };
        self.job.algorithm.prepare(&self.host, &mut columns, &mut metrics)?;
        self.finish_rollouts(&columns);
        let start = Instant::now();
        let lr = self.job.settings.learning_rate * self.schedule();
        let (epochs, parts) = (self.job.needs.epochs, self.job.needs.minibatches);
        let tokens: usize = sequences.iter().map(|s| s.ids.len()).sum();
        let mut norms = Norms::default();
        for epoch in 0..epochs {
            if epochs * parts == 1 {
                self.update(&sequences, &columns, true, lr, &mut norms)?;
                continue;
            }
            let draw =
                Philox::new(self.job.settings.seed, self.step, epoch as u64, Purpose::Minibatch);
            let order = draw.permutation(sequences.len());
            for (part, chosen) in order.chunks(sequences.len() / parts).enumerate() {
                seen.phase("update", epoch * parts + part, epochs * parts);
                let mini: Vec<Sequence> = chosen.iter().map(|i| sequences[*i].clone()).collect();
                let first = epoch + part == 0;
                self.update(&mini, &columns.subset(chosen), first, lr, &mut norms)?;
            }
        }
        self.job.algorithm.finish(&mut metrics)?;
        let roles = [&self.policy, &self.scalar];
        healthy(&self.dev, &mut self.changed, roles, self.step + 1)?;
        norms.report(&mut metrics);
        metrics.push(("learning_rate", lr));
        metrics.push(("tokens", tokens as f64));
        self.step += 1;
        self.clock.push(("update", start.elapsed().as_secs_f64()));
        Ok(Report { metrics, seconds: self.clock.clone() })
    }

    fn schedule(&self) -> f64 {
        let s = &self.job.settings;
        let floor = s.min_learning_rate_ratio;
        schedule::factor(s.schedule, self.step, self.job.steps, s.warmup_steps, floor)
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
        let unit = self.job.work.unit;
        let lens = sequences.chunks(unit).map(|u| u.iter().map(|s| s.ids.len()).sum());
        let groups = self.job.work.scorer().groups(lens);
        let dev = self.dev.clone();
        let (mut policy, mut scalar) = (self.policy.take(), self.scalar.take());
        let mut run = || {
            // Both gradients are there and known to be good before either model changes.
            let mut watched = Vec::new();
            if let Some(role) = &mut policy {
                self.policy_gradient(&dev, role, sequences, columns, &groups, &mut watched)?;
            }
            if let Some(role) = &mut scalar {
                self.scalar_gradient(&dev, role, sequences, columns, &groups, &mut watched)?;
            }
            let _phase = dev.span("update");
            let step = self.step + 1;
            // The device has it all at once: the host waits for it once.
            let norm = |role: &Role<T>| role.gradient_norm(&dev);
            let policy_norm = policy.as_ref().map(norm).transpose()?;
            let scalar_norm = scalar.as_ref().map(norm).transpose()?;
            // Weights that the last update spoilt are told before what became of them.
            healthy(&dev, &mut self.changed, [&policy, &scalar], step)?;
            for w in watched {
                w.check(columns, first, step)?;
            }
            let known = |role: &Option<Role<T>>, norm: Option<Pending<f64>>| {
                role.as_ref().zip(norm).map(|(role, norm)| role.known(&dev, norm, step)).transpose()
            };
            let (policy_norm, scalar_norm) =
                (known(&policy, policy_norm)?, known(&scalar, scalar_norm)?);
            let own = self.job.needs.scalar.and_then(|s| s.learning_rate);
            let scalar_lr = own.map_or(lr, |peak| peak * self.schedule());
            for (role, norm, lr) in
                [(&mut policy, policy_norm, lr), (&mut scalar, scalar_norm, scalar_lr)]
            {
                let (Some(role), Some(norm)) = (role, norm) else { continue };
                self.changed.push((role.name, role.update(&dev, &self.job.settings, lr, norm)?));
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
        role: &mut Role<T>,
        sequences: &[Sequence],
        columns: &Columns<f32>,
        groups: &[Range<usize>],
        watched: &mut Vec<Watched>,
    ) -> Result<()> {
        let _phase = dev.span("policy gradient");
        role.zero_grads(dev)?;
        let (temperature, options) = (self.temperature(), self.pass_options(Head::Lm));
        for group in groups {
            self.batch.clear();
            for s in &sequences[group.clone()] {
                self.batch.push_masked(&s.ids, &s.predicted);
            }
            let (algorithm, scope) = (&mut self.job.algorithm, self.arena.scope());
            let micro = Micro::stage(dev, &scope, columns, group.clone())?;
            let (model, grads, batch) = (&role.model, &mut role.grads, &self.batch);
            Pass::new(dev, model, &scope, batch).at(temperature).train(
                grads,
                options,
                |mut c| {
                    let mut watch = Watch { dev, sequences: group, watched };
                    watch.on(LOGP, c.y)?;
                    let (dlogp, dentropy) = (c.dy.reborrow(), c.dentropy);
                    algorithm.policy_loss(dev, &micro, c.y, c.entropy, dlogp, dentropy)?;
                    watch.on("d loss / d log-prob", c.dy.view())
                },
            )?;
        }
        Ok(())
    }

    fn scalar_gradient(
        &mut self,
        dev: &Device,
        role: &mut Role<T>,
        sequences: &[Sequence],
        columns: &Columns<f32>,
        groups: &[Range<usize>],
        watched: &mut Vec<Watched>,
    ) -> Result<()> {
        let _phase =
            dev.span(if self.job.needs.policy { "value gradient" } else { "reward gradient" });
        role.zero_grads(dev)?;
        let (name, options, unit) =
            (role.name, self.pass_options(Head::Scalar), self.job.work.unit);
        for group in groups {
            let group = group.start * unit..group.end * unit;
            self.batch.clear();
            for s in &sequences[group.clone()] {
                if self.job.needs.policy {
                    self.batch.push_masked(&s.ids, &s.predicted);
                } else {
                    self.batch.push_last(&s.ids);
                }
            }
            let (algorithm, scope) = (&mut self.job.algorithm, self.arena.scope());
            let micro = Micro::stage(dev, &scope, columns, group.clone())?;
            let (model, grads, batch) = (&role.model, &mut role.grads, &self.batch);
            Pass::new(dev, model, &scope, batch).train(grads, options, |mut c| {
                let mut watch = Watch { dev, sequences: &group, watched };
                watch.on(name, c.y)?;
                algorithm.scalar_loss(dev, &micro, c.y, c.dy.reborrow())?;
                watch.on("d loss / d scalar", c.dy.view())
            })?;
        }
        Ok(())
    }
}

/// What updates made of the weights, by role.
type Changed = Vec<(&'static str, Pending<Option<usize>>)>;

/// Whether all updates so far left weights that are numbers.
fn healthy<T: Element>(
    dev: &Device,
    changed: &mut Changed,
    roles: [&Option<Role<T>>; 2],
    step: u64,
) -> Result<()> {
    for (name, bad) in changed.drain(..) {
        let role = roles.into_iter().flatten().find(|role| role.name == name);
        role.map_or(Ok(()), |role| role.healthy(dev, bad, step))?;
    }
    Ok(())
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

const LOGP: &str = "log-prob";

/// Numbers of a micro-batch that are looked at before the update.
struct Watched {
    what: &'static str,
    sequences: Range<usize>,
    numbers: Pending<Vec<f32>>,
}

/// Where a micro-batch leaves them.
struct Watch<'a> {
    dev: &'a Device,
    sequences: &'a Range<usize>,
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
