//! Contrastive preference optimisation: DPO's loss without a reference, plus the likelihood of the
//! chosen completions (Xu et al. 2024); with `hinge` it is SLiC-HF (Zhao et al. 2023).
//!
//! Departures from TRL's CPOTrainer: a mean is over the whole step; its loss `simpo` is an
//! algorithm of its own here.

use super::{
    AlgorithmEntry, own,
    preference::{self, Preference, Reference},
};
use crate::{
    config::Section,
    error::Error,
    ops::preference_loss::{PreferenceKind, PreferenceLoss},
};

crate::choices! {
    /// A loss of a pair without a reference.
    pub enum CpoLoss { Sigmoid = "sigmoid", Hinge = "hinge", Ipo = "ipo" }
}

crate::settings! {
    /// Settings of CPO.
    pub struct CpoSettings {
        /// The loss of a pair; ipo compares means over tokens (TRL: sigmoid).
        pub loss_type: CpoLoss = CpoLoss::Sigmoid,
        /// Scale of the log-probs (TRL: 0.1).
        pub beta: f64 = 0.1 => "above 0" if |b| *b > 0.0,
        /// Chance that a label is wrong, in sigmoid (TRL: 0).
        pub label_smoothing: f64 = 0.0 => "from 0 to below 0.5" if |e| (0.0..0.5).contains(e),
        /// Weight of the mean negative log-likelihood of the chosen tokens (TRL: 1).
        pub sft_coef: f64 = 1.0 => "0 or more" if |c| *c >= 0.0,
    }
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "cpo",
    about: "CPO or SLiC on pairs of completions: no reference, likelihood of the chosen",
    defaults: &[("learning_rate", "1e-6")],
    presets: &[],
    metrics: &[preference::METRICS],
    section: || Box::new(CpoSettings::default()),
    build: |s: &dyn Section| {
        let s: CpoSettings = own(s)?;
        if s.label_smoothing > 0.0 && !matches!(s.loss_type, CpoLoss::Sigmoid) {
            let want = "0: nothing here reads it";
            return Err(Error::config("label_smoothing", want, s.label_smoothing));
        }
        let kind = match s.loss_type {
            CpoLoss::Sigmoid => PreferenceKind::Sigmoid,
            CpoLoss::Hinge => PreferenceKind::Hinge,
            CpoLoss::Ipo => PreferenceKind::Ipo,
        };
        let loss = PreferenceLoss {
            terms: vec![(kind, 1.0)],
            beta: s.beta,
            label_smoothing: s.label_smoothing,
            sft_coef: s.sft_coef,
            ..PreferenceLoss::default()
        };
        Ok(Box::new(Preference::new(loss, Reference::None)))
    },
};
