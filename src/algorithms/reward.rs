//! A reward model from human preferences: Bradley-Terry on pairs, a scalar head at the last token.
//! Departures from TRL: none; an optional margin column, centring off by default as there.

use super::{Algorithm, Column, Entry, Inputs, Metrics, Micro, Needs, Origin, Scalar};
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
pub struct Reward {
    settings: RewardSettings,
    /// Of each micro-batch.
    stats: Vec<Pending<PairSums>>,
}

pub(super) const ENTRY: Entry = Entry {
    name: "reward",
    about: "Reward model on pairs of which people chose one",
    defaults: &[("learning_rate", "1e-4")],
    metrics: &[
        ("loss", "Mean of -log sigmoid(chosen - rejected - margin), with the centring term."),
        ("accuracy", "Pairs of the step whose chosen text scores higher."),
        ("reward_margin", "Mean of chosen - rejected."),
        ("reward_mean", "Mean score of all texts, chosen and rejected."),
    ],
    section: || Box::new(RewardSettings::default()),
    build: |s: &dyn Section| {
        let settings = s.as_any().downcast_ref::<RewardSettings>().cloned().unwrap_or_default();
        settings.validate()?;
        Ok(Box::new(Reward { settings, stats: Vec::new() }))
    },
};

impl Algorithm for Reward {
    fn needs(&self) -> Needs {
        Needs {
            inputs: Inputs::Pairs,
            policy: false,
            scalar: Some(Scalar { from: Origin::Model, learning_rate: None }),
            reference: false,
            entropy: false,
            epochs: 1,
            minibatches: 1,
        }
    }

    fn scalar_loss(
        &mut self,
        dev: &Device,
        micro: &Micro<'_, f32>,
        y: View<'_, f32>,
        dy: ViewMut<'_, f32>,
    ) -> Result<()> {
        let pairs = micro.columns.sequences() / 2;
        let t = Pairs { scores: y, margins: micro.view(Column::Margins), weights: None };
        let centre = self.settings.center_coef;
        self.stats.push(bradley_terry::forward(dev, dy, t, centre, pairs as f64)?);
        Ok(())
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
