//! What a run takes of a device's memory, known before it takes any: models and optimizers for the
//! whole run, and one arena that its phases share in time. [`Trainer`](super::Trainer) takes what
//! is written here.

use super::{role, settings::Settings};
use crate::{
    algorithms::{Inputs, Micro, Needs, Origin, Sampling},
    device::{Arena, Device, Element},
    error::{Error, Result},
    models::{self, Head, Keep, Layout, Pass, PassOptions, PassShape, Residency, Spec},
    rollout::{Generator, Scorer},
};

/// Sizes of a run's passes.
#[derive(Clone, Debug)]
pub struct Work {
    /// Sequences that must stay in one micro-batch.
    pub unit: usize,
    /// Tokens of the longest sequence, prompt and sample together.
    pub longest: usize,
    /// The largest micro-batch.
    pub micro_batch: PassShape,
    /// Sequences that are sampled at once.
    slots: usize,
}

impl Work {
    /// Of a run whose longest sequence, without what is sampled, has `longest` tokens.
    pub fn new(s: &Settings, needs: &Needs, longest: usize) -> Self {
        let unit = if needs.inputs == Inputs::Pairs { 2 } else { 1 };
        let sampling = sampling(needs);
        let longest = longest + sampling.map_or(0, |s| s.max_new_tokens);
        let rows = s.micro_batch_tokens.max(unit * longest);
        // A sequence has at least one row.
        let micro_batch = PassShape::whole(rows, (unit * s.batch_size).min(rows));
        let slots = sampling.map_or(0, |p| p.slots.min(s.batch_size));
        Self { unit, longest, micro_batch, slots }
    }

    /// Of a scoring pass: as long as a micro-batch.
    pub fn scorer(&self) -> Scorer {
        Scorer { rows: self.micro_batch.rows, sequences: self.micro_batch.sequences }
    }

    pub fn generator(&self) -> Generator {
        let rows = self.micro_batch.rows.max(self.slots);
        Generator { slots: self.slots, max_len: self.longest, rows }
    }
}

/// How samples are made, if the algorithm samples.
pub fn sampling(needs: &Needs) -> Option<&Sampling> {
    match &needs.inputs {
        Inputs::Prompts(sampling) => Some(sampling),
        _ => None,
    }
}

/// Options of the training passes of a model with this head.
pub fn pass_options(s: &Settings, needs: &Needs, head: Head) -> PassOptions {
    let keep = if s.recompute { Keep::Streams } else { Keep::All };
    PassOptions { entropy: head == Head::Lm && needs.entropy, keep }
}

/// Where the weights of a model that is not trained wait: in host memory if the settings ask for
/// it and the policy's gradients have room for them. Specs are the device's.
pub fn frozen<T: Element>(
    dev: &Device,
    s: &Settings,
    (spec, head): (&Spec, Head),
    policy: &Spec,
) -> Residency {
    let room = Layout::new(policy, Head::Lm).len() * size_of::<T::Acc>();
    let fits = Layout::new(spec, head).len() * size_of::<T>() <= room;
    match dev {
        Device::Cuda(_) if s.offload_frozen && fits => Residency::Offloaded,
        _ => Residency::Frozen,
    }
}

/// Memory for the whole run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Whose: `policy`, `value`, `reward`, `reference` or `reward_model`.
    pub role: &'static str,
    /// `weights`, `gradients` and so on.
    pub what: &'static str,
    pub bytes: usize,
}

/// Memory of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub parts: Vec<Part>,
    /// What each phase needs of the arena.
    pub phases: Vec<(String, usize)>,
}

impl Plan {
    /// Of a run on `dev` with models that compute in `T`: `policy` is the model that it is given,
    /// `judge` the reward model that scores samples.
    pub fn new<T: Element>(
        dev: &Device,
        s: &Settings,
        needs: &Needs,
        work: &Work,
        (policy, judge): (&Spec, Option<&Spec>),
    ) -> Result<Self> {
        let mut plan = Self { parts: Vec::new(), phases: Vec::new() };
        std::iter::once(policy)
            .chain(judge)
            .try_for_each(|spec| spec.clone().on(dev).check(dev))?;
        if !needs.policy {
            plan.trained::<T>(dev, s, needs, work, ("reward", policy, Head::Scalar))?;
            return Ok(plan);
        }
        if needs.reference {
            plan.frozen::<T>(dev, s, work, ("reference", policy, Head::Lm), policy)?;
        }
        let sampling = sampling(needs);
        if let Some(judge) = judge {
            plan.frozen::<T>(dev, s, work, ("reward_model", judge, Head::Scalar), policy)?;
        }
        if let Some(scalar) = needs.scalar {
            let from = judge.filter(|_| scalar.from == Origin::RewardModel).unwrap_or(policy);
            plan.trained::<T>(dev, s, needs, work, ("value", from, Head::Scalar))?;
        }
        plan.trained::<T>(dev, s, needs, work, ("policy", policy, Head::Lm))?;
        if let Some(sampling) = sampling {
            let spec = policy.clone().on(dev);
            let bytes = work.generator().plan::<T>(dev, &spec, &sampling.params)?;
            plan.phases.push(("sample".into(), bytes));
        }
        Ok(plan)
    }

    fn model<T: Element>(
        &mut self,
        dev: &Device,
        role: &'static str,
        (spec, head): (&Spec, Head),
        used: Residency,
    ) {
        let parts = models::bytes::<T>(dev, spec, head, used).into_iter();
        self.parts.extend(parts.map(|(what, bytes)| Part { role, what, bytes }));
    }

    fn frozen<T: Element>(
        &mut self,
        dev: &Device,
        s: &Settings,
        work: &Work,
        (role, spec, head): (&'static str, &Spec, Head),
        policy: &Spec,
    ) -> Result<()> {
        let (spec, policy) = (spec.clone().on(dev), policy.clone().on(dev));
        let used = frozen::<T>(dev, s, (&spec, head), &policy);
        self.model::<T>(dev, role, (&spec, head), used);
        let bytes = work.scorer().plan::<T>(dev, &spec, head)?;
        self.phases.push((format!("score by the {role}"), bytes));
        Ok(())
    }

    fn trained<T: Element>(
        &mut self,
        dev: &Device,
        s: &Settings,
        needs: &Needs,
        work: &Work,
        (role, spec, head): (&'static str, &Spec, Head),
    ) -> Result<()> {
        let spec = spec.clone().on(dev);
        self.model::<T>(dev, role, (&spec, head), Residency::Trained);
        let parts = role::bytes::<T>(&spec, head).into_iter();
        self.parts.extend(parts.map(|(what, bytes)| Part { role, what, bytes }));
        let (shape, options) = (work.micro_batch, pass_options(s, needs, head));
        let bytes = Arena::plan(|scope| {
            Micro::<T::Acc>::plan(dev, scope, shape.rows)?;
            Pass::<T>::plan(dev, scope, (&spec, head), shape, options)
        })?;
        self.phases.push((format!("train the {role}"), bytes));
        Ok(())
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
