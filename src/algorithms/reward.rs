//! A reward model from human preferences: Bradley-Terry on pairs, a scalar head at the last token.
//! Departures from TRL: none; an optional margin column, centring off by default as there.

use super::{
    Algorithm, AlgorithmEntry, Column, Inputs, Metrics, MicroBatch, Needs, Origin, Scalar, own,
};
use crate::{
    config::Section,
    device::{Device, Pending, View, ViewMut},
    error::Result,
    ops::bradley_terry::{self, PairSums, Pairs},
};

crate::settings! {
    /// Settings of reward modelling.
    pub struct RewardSettings {
        /// Weight of (chosen + rejected)², which keeps scores near 0 (TRL:
        /// center_rewards_coefficient, off by default; its docs suggest 0.01).
        pub center_coef: f64 = 0.0 => "0 or more" if |c| *c >= 0.0 && c.is_finite(),
    }
}

/// The algorithm.
#[derive(Debug)]
struct Reward {
    settings: RewardSettings,
    /// One for each micro-batch.
    stats: Vec<Pending<PairSums>>,
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "reward",
    about: "Reward model on pairs of which people chose one",
    defaults: &[("learning_rate", "1e-4")],
    presets: &[],
    metrics: &[&[
        ("loss", "Mean of -log sigmoid(chosen - rejected - margin), with the centring term."),
        ("accuracy", "Pairs of the step whose chosen text scores higher."),
        ("reward_margin", "Mean of chosen - rejected."),
        ("reward_mean", "Mean score of all texts, chosen and rejected."),
    ]],
    section: || Box::new(RewardSettings::default()),
    build: |s: &dyn Section| Ok(Box::new(Reward { settings: own(s)?, stats: Vec::new() })),
};

impl Algorithm for Reward {
    fn needs(&self) -> Needs {
        let scalar = Scalar { from: Origin::Model, learning_rate: None };
        Needs { scalar: Some(scalar), ..Needs::of(Inputs::Pairs) }
    }

    fn scalar_loss(
        &mut self,
        dev: &Device,
        micro: &MicroBatch<'_, f32>,
        y: View<'_, f32>,
        dy: ViewMut<'_, f32>,
    ) -> Result<()> {
        let pairs = micro.columns.sequences() / 2;
        let t = Pairs { scores: y, margins: micro.view(Column::Margins), weights: None };
        let centre = self.settings.center_coef;
        self.stats.push(bradley_terry::forward(dev, dy, t, centre, pairs as f64)?);
        Ok(())
    }

    fn evaluate(
        &self,
        dev: &Device,
        held_out: &MicroBatch<'_, f32>,
        y: View<'_, f32>,
    ) -> Result<Metrics> {
        let (mut d, pairs) = (vec![0.0; y.len()], (y.len() / 2) as f64);
        let t = Pairs { scores: y, margins: held_out.view(Column::Margins), weights: None };
        let stats = bradley_terry::forward(dev, (&mut d).into(), t, 0.0, pairs)?.get()?;
        Ok(vec![("eval_loss", stats.loss), ("eval_accuracy", stats.right / pairs)])
    }

    fn finish(&mut self, out: &mut Metrics) -> Result<()> {
        let mut s = PairSums::default();
        for part in self.stats.drain(..) {
            s.merge(&part.get()?);
        }
        out.push(("loss", s.loss));
        out.push(("accuracy", s.right / s.pairs));
        out.push(("reward_margin", s.difference / s.pairs));
        out.push(("reward_mean", s.score / (2.0 * s.pairs)));
        Ok(())
    }
}
