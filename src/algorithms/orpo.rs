//! Odds ratio preference optimisation: supervised fine-tuning on the chosen completions, and a loss
//! on the odds of chosen to rejected ones; no reference (Hong et al. 2024).
//!
//! Departures from TRL's ORPOTrainer: the likelihood is that of the completion, not of the prompt,
//! too; a mean is over the whole step.

use super::{
    AlgorithmEntry, own,
    preference::{self, Preference, Reference},
};
use crate::{
    config::Section,
    ops::preference_loss::{PreferenceKind, PreferenceLoss},
};

crate::settings! {
    /// Settings of ORPO.
    pub struct OrpoSettings {
        /// Weight of the odds ratio's loss (the paper's lambda; TRL: 0.1).
        pub beta: f64 = 0.1 => "above 0" if |b| *b > 0.0,
        /// Weight of the mean negative log-likelihood of the chosen tokens (TRL: 1).
        pub sft_coef: f64 = 1.0 => "0 or more" if |c| *c >= 0.0,
    }
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "orpo",
    about: "ORPO on pairs of completions: fine-tuning and an odds ratio, no reference",
    defaults: &[("learning_rate", "1e-6")],
    presets: &[],
    metrics: &[preference::METRICS],
    section: || Box::new(OrpoSettings::default()),
    build: |s: &dyn Section| {
        let s: OrpoSettings = own(s)?;
        let loss = PreferenceLoss {
            terms: vec![(PreferenceKind::OddsRatio, 1.0)],
            beta: s.beta,
            sft_coef: s.sft_coef,
            ..PreferenceLoss::default()
        };
        Ok(Box::new(Preference::new(loss, Reference::None)))
    },
};
