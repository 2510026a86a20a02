//! Proximal policy optimisation of a language model (Schulman et al. 2017; Stiennon et al. 2020):
//! sample, score, estimate advantages with a value model, and improve by the clipped loss.
//!
//! Departures from TRL's PPOTrainer (July 2026), each an option or a mend:
//! - the score lands on the last response token (OpenRLHF), not on the padding after it;
//! - advantages are whitened and losses averaged over the whole step or minibatch, never over a
//!   rank or a micro-batch; every metric is over real tokens only;
//! - the old log-prob is the sampler's own, bit-equal to the training forward, so the first ratio
//!   is exactly 1 (the trainer asserts it) and no second pass computes it;
//! - policy and value model are clipped and updated by optimizers of their own.

use super::{
    Algorithm, AlgorithmEntry, Column, Columns, Metrics, MicroBatch, Needs, Origin, Scalar, own,
    policy_gradient::{self, PolicyGradient, PolicyGradientSettings, WhitenVariance},
};
use crate::{
    config::Section,
    device::{Device, Pending, View, ViewMut},
    error::{Error, Result},
    ops::{
        gae,
        value_loss::{self, ValueLoss, ValueSums, ValueTokens},
        whiten::{self, Moments},
    },
};

crate::choices! {
    /// Initial weights of the value model.
    pub enum ValueInit { Reward = "reward", Policy = "policy" }
}

crate::settings! {
    /// Settings of PPO.
    pub struct PpoSettings {
        parts { pub shared: PolicyGradientSettings }
        /// Passes over a step's samples (TRL, N+: 4).
        pub ppo_epochs: usize = 4 => "1 or more" if |n| *n > 0,
        /// Initial weights of the value model: "reward" copies the reward model (N+ details),
        /// "policy" takes the policy's backbone with a new head.
        pub value_init: ValueInit = ValueInit::Reward,
        /// Clip range of the value (TRL, N+: 0.2; OpenRLHF, verl: 0.5).
        pub value_clip: Option<f64> = Some(0.2) => "above 0" if |c| c.is_none_or(|c| c > 0.0),
        /// Weight of the value loss (TRL, N+: 0.1).
        pub value_coef: f64 = 0.1 => "0 or more" if |c| *c >= 0.0 && c.is_finite(),
        /// Step size of the value model, if another than learning_rate (OpenRLHF: 9x the actor's).
        pub value_learning_rate: Option<f64> = None
            => "0 or more" if |r| r.is_none_or(|r| r >= 0.0),
        /// Discount (1 everywhere).
        pub gamma: f64 = 1.0 => "from 0 to 1" if |g| (0.0..=1.0).contains(g),
        /// GAE's lambda (TRL, N+: 0.95; OpenRLHF, verl: 1).
        pub lambda: f64 = 0.95 => "from 0 to 1" if |l| (0.0..=1.0).contains(l),
        /// Advantages to mean 0 and variance 1 over the step (TRL, N+).
        pub whiten_advantages: bool = true,
        /// Rewards to variance 1 over the step (TRL: off).
        pub whiten_rewards: bool = false,
        /// The variance both divide by (TRL, verl: unbiased; N+, OpenRLHF: biased).
        pub whiten_variance: WhitenVariance = WhitenVariance::Unbiased,
    }
}

/// The algorithm.
#[derive(Debug)]
struct Ppo {
    settings: PpoSettings,
    shared: PolicyGradient,
    /// Value losses, one of each micro-batch.
    values: Vec<Pending<ValueSums>>,
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "ppo",
    about: "PPO against a reward model or other rewards, with a value model and a KL penalty",
    defaults: &[("learning_rate", "3e-6"), ("steps", "100")],
    presets: &[],
    metrics: &[
        policy_gradient::METRICS,
        &[
            ("loss", "Policy and value loss of an update; mean over the step's updates."),
            ("value_loss", "Value loss with its coefficient."),
            ("value_clip_fraction", "Tokens whose clipped value is the loss."),
            ("value", "Mean value of the sampled tokens, before the step."),
            (
                "explained_variance",
                "1 - variance of (return - value) / variance of the returns, before the step.",
            ),
        ],
    ],
    section: || Box::new(PpoSettings::default()),
    build: |s: &dyn Section| {
        let settings: PpoSettings = own(s)?;
        let shared = PolicyGradient::new(settings.shared.clone())?;
        if settings.value_init == ValueInit::Reward && shared.needs().reward_model.is_none() {
            let want = "\"policy\", where no reward is a model";
            return Err(Error::config("value_init", want, "\"reward\""));
        }
        Ok(Box::new(Ppo { settings, shared, values: Vec::new() }))
    },
};

/// How much of the returns' variance the values knew before the step: `1 - Var(return - value) /
/// Var(return)`, NaN-free: 0 where all returns are equal. (Stable-Baselines3)
fn explained_variance(values: &[f32], returns: &[f32]) -> f64 {
    let variance = |x: &dyn Fn(usize) -> f64| {
        let n = returns.len() as f64;
        let mean = (0..returns.len()).map(x).sum::<f64>() / n;
        (0..returns.len()).map(|i| (x(i) - mean) * (x(i) - mean)).sum::<f64>() / n
    };
    let all = variance(&|i| f64::from(returns[i]));
    let left = variance(&|i| f64::from(returns[i]) - f64::from(values[i]));
    if all > 0.0 { 1.0 - left / all } else { 0.0 }
}

impl Algorithm for Ppo {
    fn needs(&self) -> Needs {
        let s = &self.settings;
        let from = match s.value_init {
            ValueInit::Reward => Origin::RewardModel,
            ValueInit::Policy => Origin::Model,
        };
        let scalar = Some(Scalar { from, learning_rate: s.value_learning_rate });
        Needs { scalar, reference: true, epochs: s.ppo_epochs, ..self.shared.needs() }
    }

    fn prepare(&mut self, dev: &Device, c: &mut Columns<f32>, out: &mut Metrics) -> Result<()> {
        self.shared.rewards(c);
        let s = &self.settings;
        let variance = s.whiten_variance.variance();
        if s.whiten_rewards {
            let moments = Moments::of(dev, View::from(&c.rewards))?;
            whiten::apply(dev, (&mut c.rewards).into(), &moments, false, variance, 1e-8)?;
        }
        c.advantages.resize(c.tokens(), 0.0);
        c.returns.resize(c.tokens(), 0.0);
        let of = gae::RewardColumns {
            rewards: (&c.rewards).into(),
            values: (&c.old_values).into(),
            offsets: (&c.offsets).into(),
            gamma: s.gamma as f32,
            lambda: s.lambda as f32,
        };
        gae::forward(dev, (&mut c.advantages).into(), (&mut c.returns).into(), of)?;
        let explained = explained_variance(&c.old_values, &c.returns);
        if s.whiten_advantages {
            let moments = Moments::of(dev, View::from(&c.advantages))?;
            whiten::apply(dev, (&mut c.advantages).into(), &moments, true, variance, 1e-8)?;
        }
        self.shared.report(c, out);
        let values = c.old_values.iter().map(|v| f64::from(*v)).sum::<f64>();
        out.push(("value", values / c.old_values.len() as f64));
        out.push(("explained_variance", explained));
        Ok(())
    }

    fn policy_loss(
        &mut self,
        dev: &Device,
        micro: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
        entropy: Option<View<'_, f32>>,
        dlogp: ViewMut<'_, f32>,
        dentropy: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        self.shared.loss(dev, micro, logp, entropy, dlogp, dentropy)
    }

    fn scalar_loss(
        &mut self,
        dev: &Device,
        micro: &MicroBatch<'_, f32>,
        y: View<'_, f32>,
        dy: ViewMut<'_, f32>,
    ) -> Result<()> {
        let s = &self.settings;
        let (old, returns) = (micro.view(Column::OldValues), micro.view(Column::Returns));
        let t = ValueTokens { v: y, old, returns, weights: None };
        let loss = ValueLoss { clip: s.value_clip, coef: s.value_coef };
        let total = micro.columns.tokens() as f64;
        self.values.push(value_loss::forward(dev, dy, t, loss, total)?);
        Ok(())
    }

    fn finish(&mut self, out: &mut Metrics) -> Result<()> {
        let mut v = ValueSums::default();
        for part in self.values.drain(..) {
            v.merge(&part.get()?);
        }
        let (policy, updates) = self.shared.finish(out)?;
        out.push(("loss", (policy + v.loss) / updates));
        out.push(("value_loss", v.loss / updates));
        out.push(("value_clip_fraction", v.clipped / v.tokens));
        Ok(())
    }

    fn state(&self) -> serde_json::Value {
        self.shared.state()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<()> {
        self.shared.restore(ENTRY.name, state)
    }
}
