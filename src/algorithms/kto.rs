//! Kahneman-Tversky optimisation (Ethayarajh et al. 2024): the policy learns from single
//! completions that people called good or bad, against a KL to the reference that mismatched
//! prompts estimate.
//!
//! Departures from TRL's KTOTrainer (1.16):
//! - the KL is estimated over the whole step, not over a micro-batch: each prompt with the
//!   completion before it that is of another prompt, or of the same where there is no other;
//! - a mean is over the whole step, too;
//! - a mismatched completion is cut where the run's longest sequence ends.

use std::path::PathBuf;

use super::{Algorithm, AlgorithmEntry, Column, Inputs, Metrics, MicroBatch, Needs, own};
use crate::{
    config::Section,
    device::{Device, Float, Pending, View, ViewMut},
    error::{Error, Result},
    ops::{
        kto_loss::{self, KtoLoss, KtoSums},
        sequence_loss::SequenceColumns,
    },
};

crate::choices! {
    /// What a completion's log-ratio is compared with.
    pub enum KtoBaseline { Kl = "kl", Zero = "zero" }
}

crate::settings! {
    /// Settings of KTO.
    pub struct KtoSettings {
        /// Strength of the pull to the reference (TRL: 0.1).
        pub beta: f64 = 0.1 => "above 0" if |b| *b > 0.0,
        /// Compares log-ratios with the KL to the reference, or with 0, which is TRL's
        /// apo_zero_unpaired (TRL: kl).
        pub baseline: KtoBaseline = KtoBaseline::Kl,
        /// Weight of good completions; with n good and m bad ones the paper wants this times n to
        /// be 1 to 4/3 of the other times m (TRL: 1).
        pub desirable_weight: f64 = 1.0 => "0 or more" if |w| *w >= 0.0,
        /// Weight of bad completions (TRL: 1).
        pub undesirable_weight: f64 = 1.0 => "0 or more" if |w| *w >= 0.0,
        /// The reference's folder, if it is another than the model's (TRL: the model).
        pub reference_model: Option<PathBuf> = None,
    }
}

/// The algorithm.
#[derive(Debug)]
struct Kto {
    settings: KtoSettings,
    /// One for each micro-batch.
    stats: Vec<Pending<KtoSums>>,
    /// The step's estimate of the KL.
    kl: f64,
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "kto",
    about: "KTO on single completions that people called good or bad, with a reference",
    defaults: &[("learning_rate", "1e-6")],
    presets: &[],
    metrics: &[&[
        ("loss", "Mean loss of the step's completions."),
        ("kl", "KL to the reference in nats a completion, estimated with mismatched prompts."),
        ("desirable", "Completions of the step that people called good."),
        ("reward_margin", "Mean reward of good completions less that of bad ones."),
        ("desirable_reward", "Mean of beta times the log-ratio of good completions."),
        ("undesirable_reward", "The same of bad completions."),
        ("desirable_logp", "Mean log-prob of a whole good completion, in nats."),
        ("undesirable_logp", "The same of bad completions."),
    ]],
    section: || Box::new(KtoSettings::default()),
    build: |s: &dyn Section| Ok(Box::new(Kto { settings: own(s)?, stats: Vec::new(), kl: 0.0 })),
};

impl Kto {
    fn forward(
        &self,
        dev: &Device,
        dlogp: ViewMut<'_, f32>,
        micro: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
    ) -> Result<Pending<KtoSums>> {
        let (s, c) = (&self.settings, micro.columns);
        let kl = match (s.baseline, c.mismatched_kl) {
            (KtoBaseline::Zero, _) => 0.0,
            (KtoBaseline::Kl, Some(kl)) => kl.max_nan(0.0),
            (KtoBaseline::Kl, None) => {
                return Err(Error::value("KTO", "a KL estimate", "none"));
            }
        };
        let loss = KtoLoss {
            beta: s.beta,
            kl,
            desirable: s.desirable_weight,
            undesirable: s.undesirable_weight,
        };
        let columns = SequenceColumns {
            logp,
            ref_logp: Some(micro.view(Column::RefLogp)),
            weights: None,
            offsets: micro.offsets(),
        };
        let labels = micro.view(Column::Labels);
        kto_loss::forward(dev, dlogp, columns, labels, &loss, c.sequences() as f64)
    }
}

impl Algorithm for Kto {
    fn needs(&self) -> Needs {
        Needs {
            policy: true,
            reference: true,
            reference_model: self.settings.reference_model.clone(),
            mismatched_kl: self.settings.baseline == KtoBaseline::Kl,
            ..Needs::of(Inputs::Judged)
        }
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
        self.kl = micro.columns.mismatched_kl.unwrap_or(0.0);
        self.stats.push(self.forward(dev, dlogp, micro, logp)?);
        Ok(())
    }

    fn evaluate(
        &self,
        dev: &Device,
        held_out: &MicroBatch<'_, f32>,
        y: View<'_, f32>,
    ) -> Result<Metrics> {
        let sums = self.forward(dev, (&mut vec![0.0; y.len()]).into(), held_out, y)?.get()?;
        Ok(vec![("eval_loss", sums.loss)])
    }

    fn finish(&mut self, out: &mut Metrics) -> Result<()> {
        let mut s = KtoSums::default();
        for part in self.stats.drain(..) {
            s.merge(&part.get()?);
        }
        // A step without completions of a kind has a mean of 0.
        let (good, bad) = (s.desirable.max(1.0), (s.completions - s.desirable).max(1.0));
        let (up, down) = (s.desirable_reward / good, s.undesirable_reward / bad);
        out.push(("loss", s.loss));
        if self.settings.baseline == KtoBaseline::Kl {
            out.push(("kl", self.kl));
        }
        out.push(("desirable", s.desirable));
        out.push(("reward_margin", up - down));
        out.push(("desirable_reward", up));
        out.push(("undesirable_reward", down));
        out.push(("desirable_logp", s.desirable_logp / good));
        out.push(("undesirable_logp", s.undesirable_logp / bad));
        Ok(())
    }
}
