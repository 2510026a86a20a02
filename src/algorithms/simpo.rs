//! SimPO: preference optimisation without a reference, on mean log-probs with a target margin (Meng
//! et al. 2024), and AlphaPO's shape of it (Gupta et al. 2025).
//!
//! Departures from TRL, where it is a loss of the CPO trainer: no negative log-likelihood is added
//! unless asked for, and beta and the margin are
//! those of the paper's Llama 3 Base.

use super::{
    AlgorithmEntry, own,
    preference::{self, Preference, Reference},
};
use crate::{
    config::Section,
    ops::preference_loss::{Divergence, PreferenceKind, PreferenceLoss},
};

crate::settings! {
    /// Settings of SimPO.
    pub struct SimpoSettings {
        /// Scale of the mean log-probs (SimPO: 2 to 10; TRL: 0.1).
        pub beta: f64 = 2.0 => "above 0" if |b| *b > 0.0,
        /// Margin by which the scaled chosen one should win (SimPO: 1, half of beta; TRL: 0.5).
        pub gamma_margin: f64 = 1.0,
        /// Chance that a label is wrong (SimPO, TRL: 0).
        pub label_smoothing: f64 = 0.0 => "from 0 to below 0.5" if |e| (0.0..0.5).contains(e),
        /// AlphaPO: the reward is (1 - p^-alpha) / alpha of the mean probability p; 0 is its log
        /// (TRL: 0).
        pub alpha: f64 = 0.0,
        /// Weight of the mean negative log-likelihood of the chosen tokens (CPO-SimPO; TRL: 1).
        pub sft_coef: f64 = 0.0 => "0 or more" if |c| *c >= 0.0,
    }
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "simpo",
    about: "SimPO on pairs of completions: mean log-probs and a margin, no reference",
    defaults: &[("learning_rate", "1e-6")],
    presets: &[],
    metrics: &[preference::METRICS],
    section: || Box::new(SimpoSettings::default()),
    build: |s: &dyn Section| {
        let s: SimpoSettings = own(s)?;
        let loss = PreferenceLoss {
            terms: vec![(PreferenceKind::SigmoidNorm, 1.0)],
            beta: s.beta,
            margin: s.gamma_margin,
            label_smoothing: s.label_smoothing,
            divergence: Divergence::Alpha(1.0 - s.alpha),
            sft_coef: s.sft_coef,
            ..PreferenceLoss::default()
        };
        Ok(Box::new(Preference::new(loss, Reference::None)))
    },
};
