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

use std::path::PathBuf;

use super::{
    Algorithm, Column, Columns, Entry, Inputs, Metrics, Micro, Needs, Origin, Sampling, Scalar,
};
use crate::{
    config::Section,
    device::{Device, Pending, View, ViewMut},
    error::{Error, Result},
    ops::{
        gae,
        kl::KlEstimator,
        ppo_loss::{self, KlTerm, PpoLoss, PpoSums, PpoTokens},
        sample,
        value_loss::{self, ValueLoss, ValueSums, ValueTokens},
        whiten::{self, Moments, Variance},
    },
};

crate::choices! {
    /// Per-token estimator of the KL to the reference.
    pub enum Estimator { K1 = "k1", K2 = "k2", K3 = "k3" }
}

crate::choices! {
    /// Where the KL penalty stands.
    pub enum KlIn { Reward = "reward", Loss = "loss" }
}

crate::choices! {
    /// Where the value model starts.
    pub enum ValueInit { Reward = "reward", Policy = "policy" }
}

crate::choices! {
    /// Which variance whitening divides by.
    pub enum WhitenVariance { Unbiased = "unbiased", Biased = "biased" }
}

crate::settings! {
    /// Settings of PPO.
    pub struct PpoSettings {
        /// The reward model's folder: a model with a scalar head, as `warpo train reward` saves it.
        pub reward_model: PathBuf = PathBuf::new()
            => "a folder with a reward model" if |p| !p.as_os_str().is_empty(),
        /// Where the value model starts: "reward" copies the reward model (N+ details), "policy"
        /// takes the policy's trunk with a new head.
        pub value_init: ValueInit = ValueInit::Reward,
        /// Samples a prompt; `batch_size` counts samples, so prompts a step are
        /// batch_size / samples_per_prompt (TRL, N+: 1).
        pub samples_per_prompt: usize = 1
            => "from 1 to 1000000" if |n| (1..=1_000_000).contains(n),
        /// The most new tokens of a sample (TRL: response_length 53).
        pub max_new_tokens: usize = 53 => "1 or more" if |n| *n > 0,
        /// Divides the logits, in sampling, in training and for the reference (TRL and N+: 0.7).
        pub temperature: f64 = 0.7
            => "above 0, up to 100: PPO needs a distribution" if |t| *t > 0.0 && *t <= 100.0,
        /// Keeps the k most likely tokens; 0 is off (TRL: off). Filters choose samples only:
        /// log-probs and the ratio are those of the whole distribution at this temperature, so the
        /// first ratio is exactly 1 under any filter.
        pub top_k: usize = 0,
        /// Keeps the most likely tokens up to this probability; 1 is off (TRL: off).
        pub top_p: f64 = 1.0 => "above 0, up to 1" if |p| *p > 0.0 && *p <= 1.0,
        /// Keeps tokens at least this fraction as likely as the likeliest; 0 is off (vLLM: off).
        pub min_p: f64 = 0.0 => "from 0 to 1" if |p| (0.0..=1.0).contains(p),
        /// Sequences generated at once; changes no token (our own: 64 rows fill a CPU).
        pub rollout_slots: usize = 64 => "1 or more" if |n| *n > 0,
        /// Weight of the KL to the reference (TRL and N+: 0.05).
        pub kl_coef: f64 = 0.05 => "0 or more" if |c| *c >= 0.0 && c.is_finite(),
        /// Its estimator (TRL: k1).
        pub kl_estimator: Estimator = Estimator::K1,
        /// In the reward of each token (TRL, N+), or in the loss (GRPO's place; with the unbiased
        /// gradient of NeMo RL).
        pub kl_in: KlIn = KlIn::Reward,
        /// Adapts kl_coef to reach this KL of a sequence, in nats (Ziegler et al. 2019; off in
        /// TRL).
        pub kl_target: Option<f64> = None => "above 0" if |k| k.is_none_or(|k| k > 0.0),
        /// Samples over which the adaptation works (lm-human-preferences: 10000).
        pub kl_horizon: f64 = 10_000.0 => "above 0" if |h| *h > 0.0,
        /// Clip range of the ratio (0.2 everywhere).
        pub clip_range: f64 = 0.2 => "between 0 and 1" if |c| *c > 0.0 && *c < 1.0,
        /// Clip range above 1, if another than below (DAPO: 0.28).
        pub clip_range_high: Option<f64> = None => "above 0" if |c| c.is_none_or(|c| c > 0.0),
        /// Bound for negative advantages, as a multiple (verl: 3; off in TRL and OpenRLHF).
        pub dual_clip: Option<f64> = None => "above 1" if |c| c.is_none_or(|c| c > 1.0),
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
        /// Passes over a step's samples (TRL, N+: 4).
        pub ppo_epochs: usize = 4 => "1 or more" if |n| *n > 0,
        /// Updates a pass (TRL: 1).
        pub minibatches: usize = 1 => "1 or more" if |n| *n > 0,
        /// Weight of an entropy bonus (0 everywhere).
        pub entropy_coef: f64 = 0.0 => "0 or more" if |c| *c >= 0.0 && c.is_finite(),
        /// Subtracted from the score of a sample that did not end by itself (TRL: off; N+ gives a
        /// fixed -1).
        pub missing_eos_penalty: Option<f64> = None
            => "0 or more" if |p| p.is_none_or(|p| p >= 0.0),
        /// Multiplies the score (1 everywhere).
        pub reward_scale: f64 = 1.0,
        /// Bounds the score to ± this, after scaling (OpenRLHF: 10; DeepSpeed-Chat: 5; off in TRL).
        pub reward_clip: Option<f64> = None => "above 0" if |c| c.is_none_or(|c| c > 0.0),
    }
}

/// The algorithm.
#[derive(Debug)]
pub struct Ppo {
    settings: PpoSettings,
    kl_coef: f64,
    /// Of each micro-batch.
    policy: Vec<Pending<PpoSums>>,
    value: Vec<Pending<ValueSums>>,
    updates: f64,
    /// KL of a sequence and number of sequences of the step, for the adaptation of `kl_coef`.
    kl: f64,
    sequences: f64,
}

pub(super) const ENTRY: Entry = Entry {
    name: "ppo",
    about: "PPO against a reward model, with a value model and a KL penalty",
    defaults: &[("learning_rate", "3e-6"), ("steps", "100")],
    metrics: &[
        ("score", "Mean score of the samples by the reward model, as it came."),
        (
            "reward",
            "Mean reward of a sample: shaped score, less the KL penalty where it stands there.",
        ),
        ("kl", "KL to the reference in nats a sample, by the chosen estimator."),
        ("kl_per_token", "The same a token."),
        ("kl_coef", "Weight of the KL penalty in this step."),
        ("sampled_nll", "Mean -log-prob of the sampled tokens: an estimate of the entropy."),
        ("response_tokens", "Mean length of a sample."),
        ("stopped", "Samples that ended by themselves."),
        ("loss", "Policy and value loss of an update; mean over the step's updates."),
        ("policy_loss", "Clipped policy term; mean over tokens."),
        ("value_loss", "Value loss with its coefficient."),
        ("clip_fraction", "Tokens whose ratio is clipped."),
        ("clip_fraction_low", "Those below the range."),
        ("clip_fraction_high", "Those above the range."),
        ("value_clip_fraction", "Tokens whose clipped value is the loss."),
        ("approx_kl", "Estimate of KL(old || new) a token: how far the updates of a step go."),
        ("max_log_ratio", "Largest |log ratio| of new to old policy."),
        ("value", "Mean value of the sampled tokens, before the step."),
        (
            "explained_variance",
            "1 - variance of (return - value) / variance of the returns, before the step.",
        ),
        ("entropy", "Entropy of the predictions, in nats a token (with an entropy bonus)."),
    ],
    section: || Box::new(PpoSettings::default()),
    build: |s: &dyn Section| {
        let settings = s.as_any().downcast_ref::<PpoSettings>().cloned().unwrap_or_default();
        Ok(Box::new(Ppo::new(settings)?))
    },
};

impl Ppo {
    /// Checks the settings.
    pub fn new(settings: PpoSettings) -> Result<Self> {
        settings.validate()?;
        Ok(Self {
            kl_coef: settings.kl_coef,
            settings,
            policy: Vec::new(),
            value: Vec::new(),
            updates: 0.0,
            kl: 0.0,
            sequences: 0.0,
        })
    }

    fn estimator(&self) -> KlEstimator {
        match self.settings.kl_estimator {
            Estimator::K1 => KlEstimator::K1,
            Estimator::K2 => KlEstimator::K2,
            Estimator::K3 => KlEstimator::K3,
        }
    }

    /// The score of a sequence as it enters the reward.
    fn shaped(&self, score: f32, stopped: bool) -> f64 {
        let s = &self.settings;
        let mut score = f64::from(score) * s.reward_scale;
        if let Some(c) = s.reward_clip {
            score = score.clamp(-c, c);
        }
        if !stopped {
            score -= s.missing_eos_penalty.unwrap_or(0.0);
        }
        score
    }

    /// Rewards of all tokens, and the sum of the KL over them.
    fn rewards(&self, c: &mut Columns<f32>) -> f64 {
        let in_reward = self.settings.kl_in == KlIn::Reward;
        let (estimator, mut total) = (self.estimator(), 0.0);
        c.rewards.clear();
        for s in 0..c.sequences() {
            let span = c.span(&(s..s + 1));
            let end = span.end;
            for t in span {
                let kl = estimator.value(f64::from(c.old_logp[t]), f64::from(c.ref_logp[t]));
                total += kl;
                let mut r = if in_reward { -self.kl_coef * kl } else { 0.0 };
                if t + 1 == end {
                    r += self.shaped(c.scores[s], c.stopped[s]);
                }
                c.rewards.push(r as f32);
            }
        }
        total
    }
}

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
        Needs {
            inputs: Inputs::Prompts(Sampling {
                samples_per_prompt: s.samples_per_prompt,
                max_new_tokens: s.max_new_tokens,
                params: sample::Params {
                    temperature: s.temperature as f32,
                    top_k: s.top_k,
                    top_p: s.top_p as f32,
                    min_p: s.min_p as f32,
                },
                slots: s.rollout_slots,
                reward_model: Some(s.reward_model.clone()),
            }),
            policy: true,
            scalar: Some(Scalar { from, learning_rate: s.value_learning_rate }),
            reference: true,
            entropy: s.entropy_coef != 0.0,
            epochs: s.ppo_epochs,
            minibatches: s.minibatches,
        }
    }

    fn prepare(&mut self, dev: &Device, c: &mut Columns<f32>, out: &mut Metrics) -> Result<()> {
        let kl = self.rewards(c);
        let s = &self.settings;
        let variance = match s.whiten_variance {
            WhitenVariance::Unbiased => Variance::Unbiased,
            WhitenVariance::Biased => Variance::Biased,
        };
        if s.whiten_rewards {
            let moments = Moments::of(dev, View::from(&c.rewards))?;
            whiten::apply(dev, (&mut c.rewards).into(), &moments, false, variance, 1e-8)?;
        }
        let (n, sequences) = (c.tokens(), c.sequences() as f64);
        c.advantages.resize(n, 0.0);
        c.returns.resize(n, 0.0);
        gae::forward(
            dev,
            (&mut c.advantages).into(),
            (&mut c.returns).into(),
            (&c.rewards).into(),
            (&c.old_values).into(),
            (&c.offsets).into(),
            s.gamma as f32,
            s.lambda as f32,
        )?;
        let explained = explained_variance(&c.old_values, &c.returns);
        if s.whiten_advantages {
            let moments = Moments::of(dev, View::from(&c.advantages))?;
            whiten::apply(dev, (&mut c.advantages).into(), &moments, true, variance, 1e-8)?;
        }
        let mean = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>() / x.len() as f64;
        let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>();
        out.push(("score", mean(&c.scores)));
        out.push(("reward", sum(&c.rewards) / sequences));
        out.push(("kl", kl / sequences));
        out.push(("kl_per_token", kl / n as f64));
        out.push(("kl_coef", self.kl_coef));
        out.push(("sampled_nll", -mean(&c.old_logp)));
        out.push(("response_tokens", n as f64 / sequences));
        let stopped = c.stopped.iter().filter(|s| **s).count() as f64;
        out.push(("stopped", stopped / sequences));
        out.push(("value", mean(&c.old_values)));
        out.push(("explained_variance", explained));
        self.kl = kl / sequences;
        self.sequences = sequences;
        Ok(())
    }

    fn policy_loss(
        &mut self,
        dev: &Device,
        micro: &Micro<'_, f32>,
        logp: View<'_, f32>,
        entropy: Option<View<'_, f32>>,
        dlogp: ViewMut<'_, f32>,
        dentropy: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        let (c, s) = (micro.columns, &self.settings);
        let kl = (s.kl_in == KlIn::Loss).then(|| KlTerm {
            coef: self.kl_coef,
            estimator: self.estimator(),
            unbiased: true,
        });
        let settings = PpoLoss {
            clip_low: s.clip_range,
            clip_high: s.clip_range_high.unwrap_or(s.clip_range),
            dual_clip: s.dual_clip,
            kl,
            entropy_coef: s.entropy_coef,
        };
        let tokens = PpoTokens {
            logp,
            old_logp: micro.view(Column::OldLogp),
            ref_logp: Some(micro.view(Column::RefLogp)),
            entropy,
            advantages: micro.view(Column::Advantages),
            weights: None,
        };
        let total = c.tokens() as f64;
        self.policy.push(ppo_loss::policy(dev, dlogp, dentropy, tokens, &settings, total)?);
        if micro.sequences.end == c.sequences() {
            self.updates += 1.0;
        }
        Ok(())
    }

    fn scalar_loss(
        &mut self,
        dev: &Device,
        micro: &Micro<'_, f32>,
        y: View<'_, f32>,
        dy: ViewMut<'_, f32>,
    ) -> Result<()> {
        let s = &self.settings;
        let (old, returns) = (micro.view(Column::OldValues), micro.view(Column::Returns));
        let t = ValueTokens { v: y, old, returns, weights: None };
        let loss = ValueLoss { clip: s.value_clip, coef: s.value_coef };
        let total = micro.columns.tokens() as f64;
        self.value.push(value_loss::forward(dev, dy, t, loss, total)?);
        Ok(())
    }

    fn finish(&mut self, out: &mut Metrics) -> Result<()> {
        let (mut p, mut v) = (PpoSums::default(), ValueSums::default());
        for part in self.policy.drain(..) {
            p.merge(&part.get()?);
        }
        for part in self.value.drain(..) {
            v.merge(&part.get()?);
        }
        let updates = self.updates.max(1.0);
        out.push(("loss", (p.loss + v.loss) / updates));
        out.push(("policy_loss", p.policy / p.tokens));
        out.push(("value_loss", v.loss / updates));
        out.push(("clip_fraction", (p.clipped_low + p.clipped_high) / p.tokens));
        out.push(("clip_fraction_low", p.clipped_low / p.tokens));
        out.push(("clip_fraction_high", p.clipped_high / p.tokens));
        out.push(("value_clip_fraction", v.clipped / v.tokens));
        out.push(("approx_kl", p.approx_kl / p.tokens));
        out.push(("max_log_ratio", p.max_log_ratio));
        if self.settings.entropy_coef != 0.0 {
            out.push(("entropy", p.entropy / p.tokens));
        }
        self.updates = 0.0;
        // After the last update: all of a step's updates see one coefficient.
        if let Some(target) = self.settings.kl_target {
            let error = (self.kl / target - 1.0).clamp(-0.2, 0.2);
            self.kl_coef *= 1.0 + error * self.sequences / self.settings.kl_horizon;
        }
        Ok(())
    }

    fn state(&self) -> serde_json::Value {
        serde_json::json!({ "kl_coef": self.kl_coef })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<()> {
        let coef = state.get("kl_coef").and_then(serde_json::Value::as_f64);
        self.kl_coef =
            coef.ok_or_else(|| Error::value("state of ppo", "a number `kl_coef`", state))?;
        Ok(())
    }
}
