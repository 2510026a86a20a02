//! Training algorithms: each a composition of ops over per-token [`Columns`]. None of them sees a
//! model: it says what it needs ([`Needs`]), the trainer runs the roles that fill the columns, and
//! feeds back d loss / d log-prob and d loss / d scalar.
//!
//! To add one: write `algorithms/<name>.rs`, and add it to [`ALGORITHMS`] here.

mod columns;
mod ppo;
mod reward;
mod sft;

pub use columns::{Column, Columns, Micro};
pub use ppo::{Ppo, PpoSettings};
pub use reward::{Reward, RewardSettings};
pub use sft::{Sft, SftSettings};

use std::path::PathBuf;

use crate::{
    config::Section,
    device::{Device, View, ViewMut},
    error::Result,
    ops::sample,
};

/// What a step's sequences are made of.
#[derive(Clone, Debug, PartialEq)]
pub enum Inputs {
    /// Texts to learn.
    Texts {
        /// Not the tokens of the prompt, where the data has one.
        completion_only: bool,
    },
    /// Pairs of texts of which people chose the first; they lie side by side.
    Pairs,
    /// Prompts, which the policy continues.
    Prompts(Sampling),
}

/// How prompts are continued, and what scores the samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Samples of each prompt.
    pub samples_per_prompt: usize,
    /// The most new tokens of a sample.
    pub max_new_tokens: usize,
    /// Temperature and filters. The temperature divides the logits in training and under the
    /// reference too.
    pub params: sample::Params,
    /// Sequences generated at once.
    pub slots: usize,
    /// Folder of the frozen reward model that scores every sample.
    pub reward_model: Option<PathBuf>,
}

/// A scalar model that is trained: the reward model, or the value model beside a policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalar {
    /// Where its weights come from.
    pub from: Origin,
    /// Its peak step size, if another than the run's.
    pub learning_rate: Option<f64>,
}

/// The model that another one starts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The model that the run is given.
    Model,
    /// The reward model that scores samples.
    RewardModel,
}

/// What an algorithm asks of the trainer.
#[derive(Clone, Debug, PartialEq)]
pub struct Needs {
    /// The data.
    pub inputs: Inputs,
    /// A language model is trained.
    pub policy: bool,
    /// A scalar model is trained.
    pub scalar: Option<Scalar>,
    /// Log-probs of a frozen copy of the policy.
    pub reference: bool,
    /// The entropy of each prediction.
    pub entropy: bool,
    /// Passes over a step's sequences.
    pub epochs: usize,
    /// Optimizer updates a pass.
    pub minibatches: usize,
}

/// Named numbers of a step, in the order they are shown.
pub type Metrics = Vec<(&'static str, f64)>;

/// A training algorithm over f32 columns.
pub trait Algorithm: Send {
    /// What it needs.
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
        _micro: &Micro<'_, f32>,
        _logp: View<'_, f32>,
        _entropy: Option<View<'_, f32>>,
        _dlogp: ViewMut<'_, f32>,
        _dentropy: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        Ok(())
    }

    /// Writes d loss / d scalar of a micro-batch: one scalar a token (value) or a sequence
    /// (reward).
    fn scalar_loss(
        &mut self,
        _dev: &Device,
        _micro: &Micro<'_, f32>,
        _y: View<'_, f32>,
        _dy: ViewMut<'_, f32>,
    ) -> Result<()> {
        Ok(())
    }

    /// After the last update of a step: the means over it.
    fn finish(&mut self, out: &mut Metrics) -> Result<()>;

    /// What must survive a restart, beside the columns.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Takes back what [`Algorithm::state`] gave.
    fn restore(&mut self, _state: &serde_json::Value) -> Result<()> {
        Ok(())
    }
}

/// An algorithm's name, help and constructor.
pub struct Entry {
    /// `warpo train NAME`
    pub name: &'static str,
    /// One line of help.
    pub about: &'static str,
    /// Defaults of shared settings that differ for it.
    pub defaults: &'static [(&'static str, &'static str)],
    /// Its metrics and what each means.
    pub metrics: &'static [(&'static str, &'static str)],
    /// Its configuration with defaults.
    pub section: fn() -> Box<dyn Section>,
    /// Made from its configuration.
    pub build: fn(&dyn Section) -> Result<Box<dyn Algorithm>>,
}

/// Metrics that the trainer adds to every algorithm's own.
pub const SHARED_METRICS: &[(&str, &str)] = &[
    ("grad_norm", "Norm of the whole gradient before clipping; mean over the step's updates."),
    ("value_grad_norm", "The same for the value model."),
    ("learning_rate", "Step size of the policy's or reward model's optimizer."),
    ("tokens", "Tokens of the step's sequences, prompts included."),
    ("eval_loss", "The loss on held-out data."),
    ("eval_perplexity", "e to the held-out loss."),
    ("eval_accuracy", "Held-out pairs whose chosen text scores higher."),
];

/// All algorithms.
pub const ALGORITHMS: &[Entry] = &[sft::ENTRY, reward::ENTRY, ppo::ENTRY];
