//! What a run is told and what it works on, checked, before any model is loaded.

use std::path::Path;

use super::{
    feed::Examples,
    plan::{self, Plan, Work},
    settings::Settings,
};
use crate::{
    algorithms::{Algorithm, Needs},
    config::Section,
    data::{Limits, Stats, Tokenizer},
    device::{Device, Element},
    error::{Error, Result},
    eval,
    models::{Config, Spec},
};

/// A run without its models.
pub struct Job {
    /// What it is told.
    pub settings: Settings,
    pub algorithm: Box<dyn Algorithm>,
    pub needs: Needs,
    /// The model that it is given.
    pub spec: Spec,
    /// The reward model that scores samples, if there is one.
    pub judge: Option<Spec>,
    /// The tokenizer beside it.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    /// What it learns from.
    pub examples: Examples,
    /// What it is evaluated on.
    pub held_out: Option<Examples>,
    pub stats: Stats,
    pub steps: u64,
    /// Sizes of its passes.
    pub work: Work,
}

/// Tokens that a text or a prompt of this run may have.
pub fn max_length(s: &Settings, needs: &Needs, spec: &Spec) -> Result<usize> {
    let room = match s.max_length {
        0 => spec.max_positions,
        n => n.min(spec.max_positions),
    };
    if room < 2 {
        return Err(Error::config("max_length", "2 or more, or 0", s.max_length));
    }
    let new = plan::sampling(needs).map_or(0, |s| s.max_new_tokens);
    room.checked_sub(new).filter(|n| *n > 0).ok_or_else(|| {
        let want = format!("less than the {room} positions of a prompt and its sample");
        Error::config("max_new_tokens", want, new)
    })
}

/// Of the model that a run is given, and of its reward model.
pub fn specs(s: &Settings, needs: &Needs) -> Result<(Spec, Option<Spec>)> {
    let spec = |dir: &Path| Config::read(dir)?.spec().map(|(_, spec)| spec);
    let judge = plan::sampling(needs).and_then(|s| s.reward_model.as_ref());
    Ok((spec(Path::new(&s.model))?, judge.map(|dir| spec(dir)).transpose()?))
}

impl Job {
    /// Reads config, tokenizer and data.
    pub fn new(settings: Settings, algorithm: Box<dyn Algorithm>) -> Result<Self> {
        settings.validate()?;
        let needs = algorithm.needs();
        let dir = Path::new(&settings.model);
        let (spec, judge) = specs(&settings, &needs)?;
        let tokenizer = Tokenizer::open_if_there(dir)?;
        let mut eos: Vec<u32> = settings.eos_id.into_iter().collect();
        if eos.is_empty() {
            eos.extend(tokenizer.iter().flat_map(|t| t.eos().to_vec()));
        }
        let max_length = max_length(&settings, &needs, &spec)?;
        let sampling = plan::sampling(&needs);
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
        let longest = held_out.as_ref().map_or(0, Examples::longest).max(examples.longest());
        let work = Work::new(&settings, &needs, longest);
        if let (Some(dir), Some(judge)) = (sampling.and_then(|s| s.reward_model.as_ref()), &judge) {
            eval::check_reward_model(dir, judge, &spec, tokenizer.as_ref(), work.longest)?;
        }
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
        Ok(Self {
            settings,
            algorithm,
            needs,
            spec,
            judge,
            tokenizer,
            eos,
            examples,
            held_out,
            stats,
            steps,
            work,
        })
    }

    /// Its memory on `dev`, with models that compute in `T`.
    pub fn plan<T: Element>(&self, dev: &Device) -> Result<Plan> {
        let specs = (&self.spec, self.judge.as_ref());
        Plan::new::<T>(dev, &self.settings, &self.needs, &self.work, specs)
    }
}
