//! Direct preference optimisation (Rafailov et al. 2023) and its relatives with a reference: the
//! policy learns from pairs of completions, without a reward model and without sampling.
//!
//! Departures from TRL's DPOTrainer (1.16), each an option or a mend:
//! - `label_smoothing` works in `sigmoid`, too (OpenRLHF, cDPO), and `ipo_sum` is OpenRLHF's IPO;
//! - a mean is over the pairs of the whole step; the ranks of `aot` are those of the whole step,
//!   not of a micro-batch, for which the policy reads the step once more;
//! - `wpo` weighs a pair as the paper's equation 4 does; TRL's alignment by the most likely tokens
//!   is not there;
//! - rewards of losses that compare means over tokens are means, too;
//! - a pair's `margin` is subtracted (ODPO: Amini et al. 2024), where TRL ignores it.

use std::path::PathBuf;

use super::{
    AlgorithmEntry, own,
    preference::{self, Preference, Ranked, Reference},
};
use crate::{
    config::{Field, Section},
    error::{Error, Result},
    ops::preference_loss::{Divergence, PreferenceKind, PreferenceLoss, TERMS},
};

crate::choices! {
    /// A loss of a pair.
    pub enum DpoLoss {
        Sigmoid = "sigmoid",
        SigmoidNorm = "sigmoid_norm",
        Hinge = "hinge",
        Ipo = "ipo",
        IpoSum = "ipo_sum",
        Robust = "robust",
        ExoPair = "exo_pair",
        NcaPair = "nca_pair",
        BcoPair = "bco_pair",
        SppoHard = "sppo_hard",
        ApoZero = "apo_zero",
        ApoDown = "apo_down",
        Discopop = "discopop",
        Aot = "aot",
        AotUnpaired = "aot_unpaired",
    }
}

crate::choices! {
    /// Which divergence to the reference is penalised.
    pub enum FDivergence {
        ReverseKl = "reverse_kl",
        ForwardKl = "forward_kl",
        JsDivergence = "js_divergence",
        AlphaDivergence = "alpha_divergence",
    }
}

crate::settings! {
    /// Settings of DPO.
    pub struct DpoSettings {
        /// The loss, or a list of up to 3 that are added. sigmoid is DPO; sigmoid_norm and ipo
        /// compare means over tokens, ipo_sum is OpenRLHF's IPO, of sums (TRL: sigmoid).
        pub loss_type: Vec<DpoLoss> = vec![DpoLoss::Sigmoid]
            => "1 to 3 losses; aot and aot_unpaired alone" if |l| {
                let ranked = l.iter().any(|l| matches!(l, DpoLoss::Aot | DpoLoss::AotUnpaired));
                (1..=TERMS).contains(&l.len()) && (!ranked || l.len() == 1)
            },
        /// Weight of each loss; an empty list weighs each 1 (TRL).
        pub loss_weights: Vec<f64> = Vec::new()
            => "0 or more each" if |w| w.iter().all(|w| *w >= 0.0),
        /// Strength of the pull to the reference (TRL, OpenRLHF: 0.1).
        pub beta: f64 = 0.1 => "above 0" if |b| *b > 0.0,
        /// Chance that a label is wrong, in sigmoid, sigmoid_norm, robust, exo_pair and aot (TRL:
        /// 0; exo_pair takes 0.001 for 0, as there).
        pub label_smoothing: f64 = 0.0 => "from 0 to below 0.5" if |e| (0.0..0.5).contains(e),
        /// The divergence to the reference (TRL: reverse_kl).
        pub f_divergence: FDivergence = FDivergence::ReverseKl,
        /// Alpha of alpha_divergence; at 1 it is the reverse KL (TRL: 0.5).
        pub f_alpha: f64 = 0.5,
        /// Temperature of discopop (TRL: 0.05).
        pub discopop_tau: f64 = 0.05 => "above 0" if |t| *t > 0.0,
        /// Weight of the tokens of a completion beyond the length of the other one (LD-DPO; TRL:
        /// off, which is 1).
        pub ld_alpha: Option<f64> = None
            => "from 0 to 1" if |a| a.is_none_or(|a| (0.0..=1.0).contains(&a)),
        /// Weighs a pair by the policy's own mean probability of it (WPO; off in TRL).
        pub wpo: bool = false,
        /// Weight of the mean negative log-likelihood of the chosen tokens (RPO; TRL: off).
        pub sft_coef: f64 = 0.0 => "0 or more" if |c| *c >= 0.0,
        /// The reference's folder, if it is another than the model's (TRL, OpenRLHF: the model).
        pub reference_model: Option<PathBuf> = None,
        /// No reference at all: its log-probs count as 0 (open-instruct: off).
        pub reference_free: bool = false,
    }
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "dpo",
    about: "DPO and its relatives on pairs of completions, with a reference",
    defaults: &[("learning_rate", "1e-6")],
    presets: &[],
    metrics: &[preference::METRICS],
    section: || Box::new(DpoSettings::default()),
    build: |s: &dyn Section| Ok(Box::new(built(&own(s)?)?)),
};

fn built(s: &DpoSettings) -> Result<Preference> {
    if !s.loss_weights.is_empty() && s.loss_weights.len() != s.loss_type.len() {
        let want = format!("none, or one for each of {} losses", s.loss_type.len());
        return Err(Error::config("loss_weights", want, format!("{:?}", s.loss_weights)));
    }
    let weights = s.loss_weights.iter().copied().chain(std::iter::repeat(1.0));
    let terms = s.loss_type.iter().map(|l| l.kind()).zip(weights).collect();
    let reads = |those: &[DpoLoss]| s.loss_type.iter().any(|l| those.contains(l));
    let smoothed = [
        DpoLoss::Sigmoid,
        DpoLoss::SigmoidNorm,
        DpoLoss::Robust,
        DpoLoss::ExoPair,
        DpoLoss::Aot,
        DpoLoss::AotUnpaired,
    ];
    for (key, set, read, default) in [
        ("label_smoothing", s.label_smoothing, reads(&smoothed), 0.0),
        ("discopop_tau", s.discopop_tau, reads(&[DpoLoss::Discopop]), 0.05),
        ("f_alpha", s.f_alpha, s.f_divergence == FDivergence::AlphaDivergence, 0.5),
    ] {
        if set != default && !read {
            let want = format!("{default}: nothing here reads it");
            return Err(Error::config(key, want, set));
        }
    }
    // TRL shapes what the others compare in ways of their own.
    let shaped =
        [DpoLoss::Sigmoid, DpoLoss::Hinge, DpoLoss::Robust, DpoLoss::ExoPair, DpoLoss::Discopop];
    let other = s.loss_type.iter().find(|l| !shaped.contains(l));
    if let Some(other) = other.filter(|_| s.f_divergence != FDivergence::ReverseKl) {
        let want = format!("\"reverse_kl\" beside the loss {}", other.show());
        return Err(Error::config("f_divergence", want, s.f_divergence.show()));
    }
    let divergence = match s.f_divergence {
        FDivergence::ReverseKl => Divergence::ReverseKl,
        FDivergence::ForwardKl => Divergence::ForwardKl,
        FDivergence::JsDivergence => Divergence::JensenShannon,
        FDivergence::AlphaDivergence => Divergence::Alpha(s.f_alpha),
    };
    let reference = match (&s.reference_model, s.reference_free) {
        (Some(_), true) => {
            return Err(Error::config("reference_model", "none with reference_free", "a folder"));
        }
        (Some(dir), false) => Reference::Folder(dir.clone()),
        (None, false) => Reference::Copy,
        (None, true) => Reference::None,
    };
    let loss = PreferenceLoss {
        terms,
        beta: s.beta,
        label_smoothing: s.label_smoothing,
        divergence,
        tau: s.discopop_tau,
        wpo: s.wpo,
        sft_coef: s.sft_coef,
        ..PreferenceLoss::default()
    };
    let mut algorithm = Preference::new(loss, reference);
    algorithm.tail = s.ld_alpha;
    algorithm.ranked = s.loss_type[0].ranked();
    let beside = [
        ("f_divergence", divergence != Divergence::ReverseKl),
        ("ld_alpha", s.ld_alpha.is_some()),
        ("wpo", s.wpo),
        ("sft_coef", s.sft_coef > 0.0),
        ("reference_free", s.reference_free),
    ];
    match beside.iter().find(|(_, set)| *set && algorithm.ranked.is_some()) {
        Some((key, _)) => Err(Error::config(*key, "its default with aot", "another value")),
        None => Ok(algorithm),
    }
}

impl DpoLoss {
    fn kind(self) -> PreferenceKind {
        match self {
            Self::Sigmoid | Self::Aot | Self::AotUnpaired => PreferenceKind::Sigmoid,
            Self::SigmoidNorm => PreferenceKind::SigmoidNorm,
            Self::Hinge => PreferenceKind::Hinge,
            Self::Ipo => PreferenceKind::Ipo,
            Self::IpoSum => PreferenceKind::IpoSum,
            Self::Robust => PreferenceKind::Robust,
            Self::ExoPair => PreferenceKind::ExoPair,
            Self::NcaPair => PreferenceKind::NcaPair,
            Self::BcoPair => PreferenceKind::BcoPair,
            Self::SppoHard => PreferenceKind::SppoHard,
            Self::ApoZero => PreferenceKind::ApoZero,
            Self::ApoDown => PreferenceKind::ApoDown,
            Self::Discopop => PreferenceKind::Discopop,
        }
    }

    fn ranked(self) -> Option<Ranked> {
        match self {
            Self::Aot => Some(Ranked::Paired),
            Self::AotUnpaired => Some(Ranked::Unpaired),
            _ => None,
        }
    }
}
