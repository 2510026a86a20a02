//! The device memory of a run, known before it takes any: models and optimizers for the
//! whole run, and one arena that its phases share in time. [`Trainer`](super::Trainer) takes what
//! is written here.

use std::ops::Range;

use super::{
    models::{self, PlannedModel},
    settings::Settings,
};
use crate::{
    algorithms::{MicroBatch, Needs},
    device::{Arena, Device, Element},
    error::{Error, Result},
    models::{Head, Keep, Pass, PassOptions, PassShape, Residency, adapter_bytes, bytes},
    rollout::{Generator, Scorer},
};

/// Sizes of a run's passes.
#[derive(Clone, Debug)]
pub struct PassSizes {
    /// Sequences that must stay in one micro-batch.
    pub unit: usize,
    /// Tokens of the longest sequence, prompt and sample together.
    pub longest: usize,
    /// The largest micro-batch: a matter of the training data alone.
    pub micro_batch: PassShape,
    /// Tokens of the longest held-out text.
    pub held_out: usize,
    /// Sequences that are sampled at once.
    slots: usize,
}

impl PassSizes {
    /// `longest` counts the tokens of the longest text or prompt, without its sample, `held_out`
    /// those of the longest held-out text.
    pub fn new(s: &Settings, needs: &Needs, longest: usize, held_out: usize) -> Self {
        let (unit, sampling) = (needs.inputs.unit(), needs.sampling());
        let longest = longest + sampling.map_or(0, |s| s.max_new_tokens);
        // A step has no more rows than its longest sequences together.
        let whole = unit.saturating_mul(s.batch_size).saturating_mul(longest);
        let rows = s.micro_batch_tokens.min(whole).max(unit * longest);
        // A sequence has at least one row.
        let micro_batch = PassShape::whole(rows, (unit * s.batch_size).min(rows));
        let slots = sampling.map_or(0, |p| p.rollout_slots.min(s.batch_size));
        Self { unit, longest, micro_batch, held_out, slots }
    }

    /// Scoring passes, whose numbers are the same however sequences are grouped.
    pub fn scorer(&self) -> Scorer {
        let PassShape { rows, sequences, .. } = self.micro_batch;
        Scorer { rows: rows.max(self.held_out), sequences }
    }

    /// Micro-batches of an update, in units of these lengths.
    pub fn micro_batches(&self, lens: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
        let PassShape { rows, sequences, .. } = self.micro_batch;
        Scorer { rows, sequences }.groups(lens)
    }

    pub fn generator(&self) -> Generator {
        let rows = self.micro_batch.rows.max(self.slots);
        Generator { slots: self.slots, max_len: self.longest, rows }
    }
}

/// Options of the training passes of a model with this head.
pub fn options(s: &Settings, needs: &Needs, head: Head) -> PassOptions {
    let keep = if s.recompute { Keep::Streams } else { Keep::All };
    PassOptions { entropy: head == Head::Lm && needs.entropy, keep, balance: 0.0 }
}

/// Memory for the whole run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPart {
    pub role: &'static str,
    /// `weights`, `gradients` and so on.
    pub what: &'static str,
    pub bytes: usize,
}

/// Memory of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    pub parts: Vec<MemoryPart>,
    /// Bytes of the arena that each phase needs.
    pub phases: Vec<(String, usize)>,
}

impl MemoryPlan {
    /// Plans a run on `dev` with these models, which compute in `T`; the first is trained.
    pub fn new<T: Element>(
        dev: &Device,
        s: &Settings,
        needs: &Needs,
        sizes: &PassSizes,
        all: &[PlannedModel],
    ) -> Result<Self> {
        let mut plan = Self { parts: Vec::new(), phases: Vec::new() };
        let mut bases = Vec::new();
        for m in all {
            let (role, head, spec) = (m.role.name, m.role.head, m.spec.clone().on(dev));
            spec.check(dev)?;
            let residency = m.residency::<T>(dev, s, all);
            let mut parts = match m.shared(all) {
                None => bytes::<T>(dev, &spec, head, residency),
                Some(key) => {
                    if !bases.contains(&key) {
                        let base = bytes::<T>(dev, &spec, key.head, Residency::Frozen);
                        plan.push("base", base);
                        bases.push(key);
                    }
                    match spec.adapter {
                        Some(_) => adapter_bytes::<T>(dev, &spec, head, residency),
                        None => Vec::new(),
                    }
                }
            };
            // Held-out texts may be longer than those that are trained on.
            if m.role.trained.is_some() && sizes.held_out > 0 {
                let bytes = sizes.scorer().plan::<T>(dev, &spec, head)?;
                plan.phases.push((format!("evaluate the {role}"), bytes));
            }
            let phase = if m.role.trained.is_some() {
                parts.extend(models::bytes::<T>(&spec, head));
                let (shape, options) = (sizes.micro_batch, options(s, needs, head));
                let bytes = Arena::plan(|scope| {
                    MicroBatch::<T::Acc>::plan(dev, scope, shape.rows, shape.sequences)?;
                    Pass::<T>::plan(dev, scope, (&spec, head), shape, options)
                })?;
                (format!("train the {role}"), bytes)
            } else {
                (format!("score by the {role}"), sizes.scorer().plan::<T>(dev, &spec, head)?)
            };
            plan.push(role, parts);
            plan.phases.push(phase);
        }
        if let (Some(sampling), Some(policy)) = (needs.sampling(), all.first()) {
            let spec = policy.spec.clone().on(dev);
            let bytes = sizes.generator().plan::<T>(dev, &spec, &sampling.params())?;
            plan.phases.push(("sample".into(), bytes));
        }
        Ok(plan)
    }

    fn push(&mut self, role: &'static str, parts: Vec<(&'static str, usize)>) {
        let part = |(what, bytes)| MemoryPart { role, what, bytes };
        self.parts.extend(parts.into_iter().map(part));
    }

    /// Bytes for the whole run.
    pub fn fixed(&self) -> usize {
        self.parts.iter().map(|p| p.bytes).sum()
    }

    /// Bytes of the arena: those of the largest phase.
    pub fn shared(&self) -> usize {
        self.phases.iter().map(|p| p.1).max().unwrap_or(0)
    }

    /// Refuses what the device has no room for.
    pub fn fits(&self, dev: &Device) -> Result<()> {
        let (want, Some(have)) = (self.total(), dev.free_memory()?) else { return Ok(()) };
        if want <= have { Ok(()) } else { Err(Error::Memory { what: "the run", want, have }) }
    }

    pub fn total(&self) -> usize {
        self.fixed().saturating_add(self.shared())
    }
}
