//! Training algorithms: each a composition of ops over per-token [`Columns`]. None of them sees a
//! model: it says what it needs ([`Needs`]), the trainer runs the roles that fill the columns, and
//! feeds back d loss / d log-prob and d loss / d scalar.
//!
//! To add one: write `algorithms/<name>.rs`, and add it to [`ALGORITHMS`] here.

mod advantage;
mod columns;
mod cpo;
mod dpo;
mod grpo;
mod kto;
mod orpo;
mod policy_gradient;
mod ppo;
mod preference;
mod reinforce;
mod reward;
mod reward_list;
mod rloo;
mod sft;
mod simpo;
mod surrogate;

pub use columns::{Column, Columns, MicroBatch};
pub use policy_gradient::Sampling;
pub use reward_list::RewardEntry;

use std::path::PathBuf;

use crate::{
    config::Section,
    device::{Device, View, ViewMut},
    error::{Error, Result},
};

/// Kinds of data that a step is made of.
#[derive(Clone, Debug, PartialEq)]
pub enum Inputs {
    /// Texts to learn.
    Texts {
        /// Not the tokens of the prompt, where the data has one.
        completion_only: bool,
    },
    /// Pairs of texts of which people chose the first; they lie side by side.
    Pairs,
    /// Completions that people called good or bad.
    Judged,
    /// Prompts, which the policy continues.
    Prompts(Sampling),
}

impl Inputs {
    /// Sequences that lie side by side, and stay in one micro-batch.
    pub fn unit(&self) -> usize {
        if *self == Self::Pairs { 2 } else { 1 }
    }
}

/// A scalar model that is trained: the reward model, or the value model beside a policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalar {
    /// Source of its weights.
    pub from: Origin,
    /// Its peak step size, if another than the run's.
    pub learning_rate: Option<f64>,
}

/// The folder that a model comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The model that the run is given.
    Model,
    /// The reward model that the algorithm names.
    RewardModel,
    /// The reference that the algorithm names.
    ReferenceModel,
}

/// An algorithm's requests to the trainer: the data, the models that are trained, and the columns
/// that its losses read.
#[derive(Clone, Debug, PartialEq)]
pub struct Needs {
    /// The data.
    pub inputs: Inputs,
    /// A language model is trained.
    pub policy: bool,
    /// A scalar model is trained: one number a predicted token beside a policy, else one at the
    /// last token of a sequence.
    pub scalar: Option<Scalar>,
    /// Log-probs of the policy before the step's updates. Samples have them always.
    pub old_logp: bool,
    /// Log-probs of a frozen reference.
    pub reference: bool,
    /// Folder of the reference; without one it is a copy of the policy as the run begins.
    pub reference_model: Option<PathBuf>,
    /// The mean KL to the reference of prompts with completions of others.
    pub mismatched_kl: bool,
    /// The margin that a pair of data may have is read.
    pub margins: bool,
    /// Folder of the frozen reward model that scores every sequence.
    pub reward_model: Option<PathBuf>,
    /// What scores every sample, the reward model included; empty if that alone does.
    pub rewards: Vec<RewardEntry>,
    /// The entropy of each prediction.
    pub entropy: bool,
    /// Passes over a step's sequences.
    pub epochs: usize,
    /// Optimizer updates a pass.
    pub minibatches: usize,
}

impl Needs {
    /// One update a step, with no model and no column yet.
    pub fn of(inputs: Inputs) -> Self {
        Self {
            inputs,
            policy: false,
            scalar: None,
            old_logp: false,
            reference: false,
            reference_model: None,
            mismatched_kl: false,
            margins: true,
            reward_model: None,
            rewards: Vec::new(),
            entropy: false,
            epochs: 1,
            minibatches: 1,
        }
    }

    /// How samples are made, if the algorithm samples.
    pub fn sampling(&self) -> Option<&Sampling> {
        match &self.inputs {
            Inputs::Prompts(sampling) => Some(sampling),
            _ => None,
        }
    }

    /// Divides the logits of the policy and of the reference.
    pub fn temperature(&self) -> f32 {
        self.sampling().map_or(1.0, |s| s.temperature as f32)
    }
}

/// Named numbers of a step, in the order they are shown.
pub type Metrics = Vec<(&'static str, f64)>;

/// A training algorithm over f32 columns.
pub trait Algorithm: Send {
    /// Its requests to the trainer.
    fn needs(&self) -> Needs;

    /// Once a step, before the first update: fills advantages and the like, on the CPU: columns are
    /// in host memory, a few numbers a token.
    fn prepare(
        &mut self,
        _dev: &Device,
        _step: &mut Columns<f32>,
        _out: &mut Metrics,
    ) -> Result<()> {
        Ok(())
    }

    /// Writes d loss / d log-prob of a micro-batch, divided by counts of the whole minibatch.
    fn policy_loss(
        &mut self,
        _dev: &Device,
        _micro: &MicroBatch<'_, f32>,
        _logp: View<'_, f32>,
        _entropy: Option<View<'_, f32>>,
        _dlogp: ViewMut<'_, f32>,
        _dentropy: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        Err(Error::value("an algorithm that trains a policy", "a policy_loss of its own", "none"))
    }

    /// Writes d loss / d scalar of a micro-batch: one scalar a token (value) or a sequence
    /// (reward).
    fn scalar_loss(
        &mut self,
        _dev: &Device,
        _micro: &MicroBatch<'_, f32>,
        _y: View<'_, f32>,
        _dy: ViewMut<'_, f32>,
    ) -> Result<()> {
        Err(Error::value("an algorithm that trains a scalar", "a scalar_loss of its own", "none"))
    }

    /// The metrics of held-out data, all of it in one micro-batch, of which `y` is what the trained
    /// model says: log-probs, or scalars.
    fn evaluate(
        &self,
        _dev: &Device,
        _held_out: &MicroBatch<'_, f32>,
        _y: View<'_, f32>,
    ) -> Result<Metrics> {
        Ok(Metrics::new())
    }

    /// Appends the step's means, after its last update.
    fn finish(&mut self, out: &mut Metrics) -> Result<()>;

    /// State that must survive a restart.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Takes back what [`Algorithm::state`] gave.
    fn restore(&mut self, _state: &serde_json::Value) -> Result<()> {
        Ok(())
    }
}

/// An algorithm's name, help and constructor.
pub struct AlgorithmEntry {
    /// `warpo train NAME`
    pub name: &'static str,
    /// One line of help.
    pub about: &'static str,
    /// Defaults of shared settings that differ for it, in its own parts too.
    pub defaults: &'static [(&'static str, &'static str)],
    /// The settings of other systems, by name.
    pub presets: &'static [Preset],
    /// Its metrics and what each means.
    pub metrics: &'static [&'static [(&'static str, &'static str)]],
    /// Its configuration with defaults.
    pub section: fn() -> Box<dyn Section>,
    /// Made from its configuration.
    pub build: fn(&dyn Section) -> Result<Box<dyn Algorithm>>,
}

/// Settings under which an algorithm computes what another system or a paper does.
pub struct Preset {
    /// `--preset NAME`
    pub name: &'static str,
    /// Whose they are, and what that system does beside them and this one does not.
    pub about: &'static str,
    /// Keys and values, shared ones too. What a user sets wins over them.
    pub values: &'static [(&'static str, &'static str)],
}

/// An algorithm's own settings, checked.
fn own<S: Section + Clone>(section: &dyn Section) -> Result<S> {
    section.validate()?;
    let own = section.as_any().downcast_ref::<S>().cloned();
    own.ok_or_else(|| Error::value("settings", "the algorithm's own", format!("{section:?}")))
}

/// Metrics that the trainer adds to every algorithm's own.
pub const SHARED_METRICS: &[(&str, &str)] = &[
    ("grad_norm", "Norm of the whole gradient before clipping; mean over the step's updates."),
    ("value_grad_norm", "The same for the value model."),
    ("learning_rate", "Step size of the policy's or reward model's optimizer."),
    ("tokens", "Tokens of the step's sequences, prompts included."),
    ("eval_loss", "The loss on held-out data."),
    ("eval_perplexity", "e to the held-out loss."),
    ("eval_accuracy", "Held-out pairs whose chosen text scores higher, or has the larger reward."),
];

/// All algorithms.
pub const ALGORITHMS: &[AlgorithmEntry] = &[
    sft::ENTRY,
    reward::ENTRY,
    dpo::ENTRY,
    simpo::ENTRY,
    cpo::ENTRY,
    orpo::ENTRY,
    kto::ENTRY,
    ppo::ENTRY,
    grpo::ENTRY,
    rloo::ENTRY,
    reinforce::ENTRY,
];

/// Finds an algorithm by the name that `warpo train` takes.
pub fn algorithm(name: &str) -> Result<&'static AlgorithmEntry> {
    ALGORITHMS.iter().find(|e| e.name == name).ok_or_else(|| {
        let known: Vec<_> =
            ALGORITHMS.iter().map(|e| format!("{} ({})", e.name, e.about)).collect();
        Error::Config {
            key: "algorithm".into(),
            message: format!("there is no `{name}`"),
            hint: Some(format!("known are: {}", known.join("; "))),
        }
    })
}
