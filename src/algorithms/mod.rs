//! Training algorithms: each a composition of ops over per-token [`Columns`]. None of them sees a
//! model: it says what it needs ([`Needs`]), the trainer runs the roles that fill the columns, and
//! feeds back d loss / d log-prob and d loss / d scalar.
//!
//! To add one: write `algorithms/<name>.rs`, and add it to [`ALGORITHMS`] here.

mod columns;
mod ppo;
mod reward;
mod sft;

pub use columns::{Columns, Micro};
pub use ppo::{Ppo, PpoSettings};
pub use reward::{Reward, RewardSettings};
pub use sft::{Sft, SftSettings};

use crate::{
    config::Section,
    device::{Device, View, ViewMut},
    error::Result,
};

/// What a step's sequences are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    /// Texts with the tokens to learn.
    Texts,
    /// Pairs of texts of which people chose the first; they lie side by side.
    Pairs,
    /// Prompts, which the policy continues.
    Prompts,
}

/// What an algorithm asks of the trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The data.
    pub inputs: Inputs,
    /// A language model is trained.
    pub policy: bool,
    /// A scalar model is trained: the reward model, or the value model beside a policy.
    pub scalar: bool,
    /// Log-probs of a frozen copy of the policy.
    pub reference: bool,
    /// Scores of a frozen reward model.
    pub scores: bool,
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

    /// Once a step, before the first update: fills advantages and the like.
    ///
    /// # Errors
    /// If the columns do not fit.
    fn prepare(
        &mut self,
        _dev: &Device,
        _step: &mut Columns<f32>,
        _out: &mut Metrics,
    ) -> Result<()> {
        Ok(())
    }

    /// Writes d loss / d log-prob of a micro-batch, divided by counts of the whole minibatch.
    ///
    /// # Errors
    /// If the columns do not fit.
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

    /// Writes d loss / d scalar of a micro-batch: one scalar a token (value) or a sequence (reward).
    ///
    /// # Errors
    /// If the columns do not fit.
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
    fn finish(&mut self, out: &mut Metrics);

    /// What must survive a restart, beside the columns.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Takes back what [`Algorithm::state`] gave.
    ///
    /// # Errors
    /// If it is not that.
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
