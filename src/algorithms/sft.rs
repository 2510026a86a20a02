//! Supervised fine-tuning: the mean negative log-likelihood of the tokens to learn, over all tokens
//! of the step, never of a micro-batch. A departure from the Hugging Face Trainer: dropout that a
//! config names (0.1 in GPT-2's) is not applied, so that a text has one log-prob. Held-out data has
//! the plain likelihood with DFT, too.

use super::{Algorithm, AlgorithmEntry, Column, Inputs, Metrics, MicroBatch, Needs, own};
use crate::{
    config::Section,
    device::{Device, Pending, View, ViewMut},
    error::Result,
    ops::nll,
};

crate::settings! {
    /// Settings of supervised fine-tuning.
    pub struct SftSettings {
        /// Learn the tokens of the completion only, where the data has prompts (TRL:
        /// completion_only_loss for prompt-completion data).
        pub completion_only: bool = true,
        /// Weigh each token by its probability, as a constant: what is unlikely then teaches less
        /// (DFT, Wu et al. 2025; TRL: loss_type dft, off).
        pub dft: bool = false,
    }
}

/// The algorithm.
#[derive(Debug)]
struct Sft {
    settings: SftSettings,
    /// One for each micro-batch.
    losses: Vec<Pending<f64>>,
    tokens: f64,
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "sft",
    about: "Supervised fine-tuning on texts, prompt-completion pairs or chosen answers",
    defaults: &[],
    presets: &[],
    metrics: &[&[
        (
            "loss",
            "Mean negative log-likelihood of the learned tokens, in nats a token; with dft each \
             times its probability.",
        ),
        ("perplexity", "e to the loss; none with dft."),
        ("learned_tokens", "Tokens that the loss is a mean over."),
    ]],
    section: || Box::new(SftSettings::default()),
    build: |s: &dyn Section| {
        Ok(Box::new(Sft { settings: own(s)?, losses: Vec::new(), tokens: 0.0 }))
    },
};

impl Algorithm for Sft {
    fn needs(&self) -> Needs {
        let completion_only = self.settings.completion_only;
        Needs { policy: true, ..Needs::of(Inputs::Texts { completion_only }) }
    }

    fn policy_loss(
        &mut self,
        dev: &Device,
        micro: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
        _entropy: Option<View<'_, f32>>,
        dlogp: ViewMut<'_, f32>,
        _dentropy: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        let all = &micro.columns.weights;
        let denominator: f64 = all.iter().map(|w| f64::from(*w)).sum();
        let weights = micro.view(Column::Weights);
        self.tokens += weights.len() as f64;
        let loss = if self.settings.dft { nll::dft } else { nll::forward };
        self.losses.push(loss(dev, dlogp, logp, weights, denominator)?);
        Ok(())
    }

    fn evaluate(
        &self,
        dev: &Device,
        held_out: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
    ) -> Result<Metrics> {
        let (mut d, tokens) = (vec![0.0; logp.len()], logp.len() as f64);
        let weights = held_out.view(Column::Weights);
        let nll = nll::forward(dev, (&mut d).into(), logp, weights, tokens)?.get()?;
        Ok(vec![("eval_loss", nll), ("eval_perplexity", libm::exp(nll))])
    }

    fn finish(&mut self, out: &mut Metrics) -> Result<()> {
        let mut loss = 0.0;
        for part in self.losses.drain(..) {
            loss += part.get()?;
        }
        out.push(("loss", loss));
        if !self.settings.dft {
            out.push(("perplexity", libm::exp(loss)));
        }
        out.push(("learned_tokens", self.tokens));
        self.tokens = 0.0;
        Ok(())
    }
}
