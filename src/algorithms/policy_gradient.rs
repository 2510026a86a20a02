//! The shared part of algorithms that improve a policy by its own samples: settings that compose,
//! the rewards of tokens, and the loss. An algorithm adds its advantages.

use std::path::PathBuf;

use super::{
    Column, Columns, Inputs, Metrics, MicroBatch, Needs,
    reward_list::{self, RewardEntry},
    surrogate::{PolicyLossSettings, unread},
};
use crate::{
    device::{Device, Float, Pending, View, ViewMut},
    error::{Error, Result},
    ops::{
        kl::KlEstimator,
        policy_loss::{self, KlTerm, KlWeight, PolicyLoss, PolicySums, PolicyTokens},
        sample,
        whiten::Variance,
    },
};

crate::choices! {
    /// Per-token estimator of the KL to the reference.
    pub enum Estimator { K1 = "k1", K2 = "k2", K3 = "k3" }
}

crate::choices! {
    /// Place of the KL penalty.
    pub enum KlIn { Reward = "reward", Loss = "loss" }
}

crate::choices! {
    /// Which variance whitening divides by.
    pub enum WhitenVariance { Unbiased = "unbiased", Biased = "biased" }
}

impl WhitenVariance {
    pub fn variance(self) -> Variance {
        match self {
            Self::Unbiased => Variance::Unbiased,
            Self::Biased => Variance::Biased,
        }
    }
}

crate::settings! {
    /// How prompts are continued.
    pub struct Sampling {
        /// Samples a prompt; `batch_size` counts samples, so prompts a step are
        /// batch_size / samples_per_prompt (TRL, N+: 1).
        pub samples_per_prompt: usize = 1
            => "from 1 to 1000000" if |n| (1..=1_000_000).contains(n),
        /// The most new tokens of a sample (TRL: response_length 53).
        pub max_new_tokens: usize = 53 => "1 or more" if |n| *n > 0,
        /// Divides the logits, in sampling, in training and for the reference (TRL and N+: 0.7).
        pub temperature: f64 = 0.7
            => "0.001 to 100: PPO needs a distribution" if |t| (0.001..=100.0).contains(t),
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
    }
}

impl Sampling {
    /// Temperature and filters.
    pub fn params(&self) -> sample::SamplingParams {
        sample::SamplingParams {
            temperature: self.temperature as f32,
            top_k: self.top_k,
            top_p: self.top_p as f32,
            min_p: self.min_p as f32,
        }
    }
}

crate::settings! {
    /// How a sample is scored, and the score as it enters the reward.
    pub struct RewardShaping {
        /// The reward model's folder: a model with a scalar head, as `warpo train reward` saves it;
        /// short for rewards = [{ kind = "model", path = "..." }].
        pub reward_model: PathBuf = PathBuf::new(),
        /// What scores a sample; the score is the sum, each times its weight. Kinds: model, math,
        /// exact, regex, json_schema, format, length, repetition, code, command, python, http (README,
        /// Rewards).
        pub rewards: Vec<RewardEntry> = Vec::new(),
        /// Multiplies the score (1 everywhere).
        pub reward_scale: f64 = 1.0,
        /// Bounds the score to ± this, after scaling (OpenRLHF: 10; DeepSpeed-Chat: 5; off in TRL).
        pub reward_clip: Option<f64> = None => "above 0" if |c| c.is_none_or(|c| c > 0.0),
        /// Subtracted from the score of a sample that did not end by itself (TRL: off; N+ gives a
        /// fixed -1).
        pub missing_eos_penalty: Option<f64> = None
            => "0 or more" if |p| p.is_none_or(|p| p >= 0.0),
        /// The last share of max_new_tokens, over which a penalty grows from 0 to overlong_coef;
        /// 0 is off (DAPO: 0.2; OpenRLHF, verl: off).
        pub overlong_share: f64 = 0.0 => "from 0 to 1" if |s| (0.0..=1.0).contains(s),
        /// Subtracted from the score of a sample of max_new_tokens (DAPO: 1).
        pub overlong_coef: f64 = 1.0 => "0 or more" if |c| *c >= 0.0 && c.is_finite(),
    }
}

impl RewardShaping {
    /// The folder of the reward model, if one scores.
    fn model(&self) -> Result<Option<PathBuf>> {
        match (self.reward_model.as_os_str().is_empty(), self.rewards.is_empty()) {
            (true, true) => {
                let want = "a folder with a reward model, or `rewards`";
                Err(Error::config("reward_model", want, "\"\""))
            }
            (false, true) => Ok(Some(self.reward_model.clone())),
            (true, false) => reward_list::model_of(&self.rewards),
            (false, false) => {
                let want = "none beside `rewards`: { kind = \"model\", path = \"...\" } there";
                Err(Error::config("reward_model", want, self.reward_model.display()))
            }
        }
    }

    /// The score of a sample as it enters the reward; `length` is a share of max_new_tokens.
    fn shaped(&self, score: f32, stopped: bool, length: f64) -> f64 {
        let mut score = f64::from(score) * self.reward_scale;
        if let Some(c) = self.reward_clip {
            score = score.clamp(-c, c);
        }
        if !stopped {
            score -= self.missing_eos_penalty.unwrap_or(0.0);
        }
        if self.overlong_share > 0.0 {
            let over = (length - 1.0) / self.overlong_share + 1.0;
            score -= self.overlong_coef * over.clamp(0.0, 1.0);
        }
        score
    }
}

crate::settings! {
    /// The penalty on the KL to the reference.
    pub struct KlPenalty {
        /// Weight of the KL to the reference (TRL and N+: 0.05).
        pub kl_coef: f64 = 0.05 => "0 or more" if |c| *c >= 0.0 && c.is_finite(),
        /// Its estimator (TRL: k1).
        pub kl_estimator: Estimator = Estimator::K1,
        /// Place of the penalty: in the reward of each token (TRL's PPO, N+), or in the loss
        /// (GRPO).
        pub kl_in: KlIn = KlIn::Reward,
        /// What weighs an estimate in the loss: the token's ratio (TRL 1.16), the same as if it
        /// were 1 (score: NeMo RL), nothing, which biases the gradient (one: verl, OpenRLHF).
        pub kl_weight: KlWeight = KlWeight::Ratio,
        /// Adapts kl_coef to reach this KL of a sequence, in nats (Ziegler et al. 2019; off in
        /// TRL).
        pub kl_target: Option<f64> = None => "above 0" if |k| k.is_none_or(|k| k > 0.0),
        /// Samples over which the adaptation works (lm-human-preferences: 10000). With more samples
        /// a step than that, a step adapts as if it had so many.
        pub kl_horizon: f64 = 10_000.0 => "above 0" if |h| *h > 0.0,
    }
}

impl KlPenalty {
    fn estimator(&self) -> KlEstimator {
        match self.kl_estimator {
            Estimator::K1 => KlEstimator::K1,
            Estimator::K2 => KlEstimator::K2,
            Estimator::K3 => KlEstimator::K3,
        }
    }
}

crate::settings! {
    /// Settings of every policy-gradient algorithm.
    pub struct PolicyGradientSettings {
        parts {
            pub shaping: RewardShaping,
            pub sampling: Sampling,
            pub kl: KlPenalty,
            pub loss: PolicyLossSettings,
        }
        /// Updates a pass (TRL: 1).
        pub minibatches: usize = 1 => "1 or more" if |n| *n > 0,
    }
}

/// The shared part of an algorithm, and what it counts over a step.
#[derive(Debug)]
pub struct PolicyGradient {
    settings: PolicyGradientSettings,
    /// Folder of the reward model, if one scores.
    reward_model: Option<PathBuf>,
    loss: PolicyLoss,
    kl_coef: f64,
    /// Only tokens of samples that ended by themselves are learned.
    pub masks: bool,
    /// One of each micro-batch.
    stats: Vec<Pending<PolicySums>>,
    updates: f64,
    /// KL of all tokens and number of sequences of the step.
    kl: f64,
    sequences: f64,
}

/// Metrics of samples and of the policy's loss. Those of tokens are over the tokens that count.
pub const METRICS: &[(&str, &str)] = &[
    ("score", "Mean score of the samples: of the reward model, or the sum of all rewards."),
    ("reward", "Mean reward of a sample: shaped score, less the KL penalty where it stands there."),
    ("kl", "KL to the reference in nats a sample, by the chosen estimator (with a reference)."),
    ("kl_per_token", "The same a token."),
    ("kl_coef", "Weight of the KL penalty in this step."),
    ("sampled_nll", "Mean -log-prob of the sampled tokens: an estimate of the entropy."),
    ("response_tokens", "Mean length of a sample."),
    ("stopped", "Samples that ended by themselves."),
    ("policy_loss", "The policy's term without KL and entropy; mean over tokens."),
    ("clip_fraction", "Tokens whose ratio is clipped, or that DPPO drops."),
    ("clip_fraction_low", "Those below the range."),
    ("clip_fraction_high", "Those above the range."),
    ("approx_kl", "Estimate of KL(old || new) a token: how far the updates of a step go."),
    ("max_log_ratio", "Largest |log ratio| of new to old policy."),
    ("entropy", "Entropy of the predictions, in nats a token (with an entropy bonus)."),
];

impl PolicyGradient {
    /// # Errors
    /// [`Error::Config`] for a setting that the others leave without a reader, or if nothing
    /// scores.
    pub fn new(settings: PolicyGradientSettings) -> Result<Self> {
        let PolicyGradientSettings { kl, shaping, loss, .. } = &settings;
        if kl.kl_in == KlIn::Reward {
            unread(kl, "kl_weight", "kl_in \"reward\"")?;
        }
        if kl.kl_coef == 0.0 {
            unread(kl, "kl_target", "kl_coef 0")?;
        }
        if shaping.overlong_share == 0.0 {
            unread(shaping, "overlong_coef", "overlong_share 0")?;
        }
        let (loss, kl_coef) = (loss.loss()?, kl.kl_coef);
        let (reward_model, masks, stats) = (shaping.model()?, false, Vec::new());
        let (updates, kl, sequences) = (0.0, 0.0, 0.0);
        Ok(Self { settings, reward_model, loss, kl_coef, masks, stats, updates, kl, sequences })
    }

    /// A policy that is trained on its own samples, which rewards score.
    pub fn needs(&self) -> Needs {
        let s = &self.settings;
        Needs {
            policy: true,
            old_logp: true,
            reward_model: self.reward_model.clone(),
            rewards: s.shaping.rewards.clone(),
            entropy: s.loss.entropy_coef != 0.0,
            minibatches: s.minibatches,
            ..Needs::of(Inputs::Prompts(s.sampling.clone()))
        }
    }

    /// Fills the rewards: the shaped score at each sequence's last token, less the KL penalty of
    /// every token where it stands there.
    pub fn rewards(&mut self, c: &mut Columns<f32>) {
        let PolicyGradientSettings { kl, shaping, sampling, .. } = &self.settings;
        let (estimator, in_reward) = (kl.estimator(), kl.kl_in == KlIn::Reward);
        (self.kl, self.sequences) = (0.0, c.sequences() as f64);
        c.rewards.clear();
        for s in 0..c.sequences() {
            let span = c.span(&(s..s + 1));
            let (end, length) = (span.end, span.len() as f64 / sampling.max_new_tokens as f64);
            for t in span {
                let kl = |r: &f32| estimator.value(f64::from(c.old_logp[t]), f64::from(*r));
                let kl = c.ref_logp.get(t).map_or(0.0, kl);
                self.kl += kl;
                let mut r = if in_reward { -self.kl_coef * kl } else { 0.0 };
                if t + 1 == end {
                    r += shaping.shaped(c.scores[s], c.stopped[s], length);
                }
                c.rewards.push(r as f32);
            }
        }
    }

    /// Metrics of the step's samples.
    pub fn report(&self, c: &Columns<f32>, out: &mut Metrics) {
        let (n, sequences) = (c.tokens() as f64, self.sequences);
        let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>();
        out.push(("score", sum(&c.scores) / c.scores.len() as f64));
        out.push(("reward", sum(&c.rewards) / sequences));
        if !c.ref_logp.is_empty() {
            out.push(("kl", self.kl / sequences));
            out.push(("kl_per_token", self.kl / n));
            out.push(("kl_coef", self.kl_coef));
        }
        out.push(("sampled_nll", -(sum(&c.old_logp) / c.old_logp.len() as f64)));
        out.push(("response_tokens", n / sequences));
        out.push(("stopped", c.stopped.iter().filter(|s| **s).count() as f64 / sequences));
    }

    /// [`Algorithm::policy_loss`](super::Algorithm::policy_loss) of the chosen loss.
    pub fn loss(
        &mut self,
        dev: &Device,
        micro: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
        entropy: Option<View<'_, f32>>,
        dlogp: ViewMut<'_, f32>,
        dentropy: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        let PolicyGradientSettings { loss, kl, sampling, .. } = &self.settings;
        let c = micro.columns;
        let term = KlTerm { coef: self.kl_coef, estimator: kl.estimator(), weight: kl.kl_weight };
        let kl = (kl.kl_in == KlIn::Loss && !c.ref_logp.is_empty()).then_some(term);
        let tokens = PolicyTokens {
            logp,
            old_logp: micro.view(Column::OldLogp),
            ref_logp: kl.map(|_| micro.view(Column::RefLogp)),
            entropy,
            advantages: micro.view(Column::Advantages),
            weights: self.masks.then(|| micro.view(Column::Weights)),
            offsets: micro.offsets(),
        };
        let learned = |s: &usize| !self.masks || c.stopped[*s];
        let count = (0..c.sequences()).filter(learned).map(|s| c.span(&(s..s + 1)).len()).sum();
        let total = loss.denominator(count, c.sequences(), sampling.max_new_tokens);
        let settings = PolicyLoss { kl, ..self.loss };
        self.stats.push(policy_loss::forward(dev, dlogp, dentropy, tokens, &settings, total)?);
        if micro.sequences.end == micro.columns.sequences() {
            self.updates += 1.0;
        }
        Ok(())
    }

    /// Metrics of the loss; returns the sum of the losses of the step's updates, and how many there
    /// were. Adapts the KL coefficient: all updates of a step see the same one.
    pub fn finish(&mut self, out: &mut Metrics) -> Result<(f64, f64)> {
        let mut p = PolicySums::default();
        for part in self.stats.drain(..) {
            p.merge(&part.get()?);
        }
        let updates = std::mem::take(&mut self.updates).max(1.0);
        // No token counts where all samples are masked.
        let n = p.tokens.max_nan(1.0);
        out.push(("policy_loss", p.policy / n));
        out.push(("clip_fraction", (p.clipped_low + p.clipped_high) / n));
        out.push(("clip_fraction_low", p.clipped_low / n));
        out.push(("clip_fraction_high", p.clipped_high / n));
        out.push(("approx_kl", p.approx_kl / n));
        out.push(("max_log_ratio", p.max_log_ratio));
        if self.loss.entropy_coef != 0.0 {
            out.push(("entropy", p.entropy / n));
        }
        if let Some(target) = self.settings.kl.kl_target {
            let error = (self.kl / self.sequences / target - 1.0).clamp(-0.2, 0.2);
            // Above 1 the coefficient could become negative: a reward for drifting.
            let share = (self.sequences / self.settings.kl.kl_horizon).min(1.0);
            self.kl_coef *= 1.0 + error * share;
        }
        Ok((p.loss, updates))
    }

    /// The coefficient that was adapted.
    pub fn state(&self) -> serde_json::Value {
        serde_json::json!({ "kl_coef": self.kl_coef })
    }

    pub fn restore(&mut self, name: &str, state: &serde_json::Value) -> Result<()> {
        let coef = state.get("kl_coef").and_then(serde_json::Value::as_f64);
        let wrong = || Error::value(format!("state of {name}"), "a number `kl_coef`", state);
        self.kl_coef = coef.ok_or_else(wrong)?;
        Ok(())
    }
}
