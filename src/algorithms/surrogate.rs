//! Settings of a policy's loss, and the loss that they are.

use crate::{
    config::{Field, Section},
    error::{Error, Result},
    ops::policy_loss::{Distance, PolicyLoss, RatioLevel, Surrogate},
};

crate::choices! {
    /// The loss of a token.
    pub enum PolicyObjective {
        Clip = "clip",
        Cispo = "cispo",
        Sapo = "sapo",
        Gmpo = "gmpo",
        Vespo = "vespo",
        DppoTv = "dppo_tv",
        DppoKl = "dppo_kl",
        Dppo = "dppo",
        Likelihood = "likelihood",
    }
}

crate::choices! {
    /// What the losses of tokens are summed to.
    pub enum Aggregation {
        Tokens = "tokens",
        Sequences = "sequences",
        Constant = "constant",
    }
}

crate::settings! {
    /// The loss of the policy.
    pub struct PolicyLossSettings {
        /// The loss of a token: clip (PPO); cispo weighs its log-prob with the clipped ratio; sapo
        /// has soft borders; gmpo takes the geometric mean of a sequence's ratios, vespo weighs
        /// with their product; dppo_tv and dppo_kl (verl) and dppo (prime-rl) drop tokens whose
        /// probability moved too far; likelihood has no ratio (REINFORCE, GPG) (TRL, verl,
        /// OpenRLHF: clip).
        pub policy_loss: PolicyObjective = PolicyObjective::Clip,
        /// Whose ratio clip, cispo and sapo read: the token's, that of the mean log-ratio of its
        /// sequence (GSPO), or of the sum (RLOO in TRL) (TRL, verl, OpenRLHF: token).
        pub ratio: RatioLevel = RatioLevel::Token,
        /// The loss is the mean over the tokens of the whole step (TRL's dapo), the mean of
        /// sequences' means (TRL's grpo), or the sum over tokens divided by sequences times
        /// aggregation_tokens (Dr. GRPO) (TRL, verl, OpenRLHF: tokens).
        pub aggregation: Aggregation = Aggregation::Tokens,
        /// Tokens that a sequence counts as, in aggregation constant; "none" is max_new_tokens (as
        /// in TRL).
        pub aggregation_tokens: Option<usize> = None => "1 or more" if |n| *n != Some(0),
        /// How far below 1 a ratio counts, below 0 a log-ratio in gmpo, and how far down a
        /// probability may go in dppo; from 1 on nothing is too low in clip and cispo (0.2
        /// everywhere; DeepSeek-R1: 10).
        pub clip_range: f64 = 0.2 => "above 0" if |c| *c > 0.0,
        /// The same above 1, above 0, and up, if another than below (DAPO: 0.28; TRL's bound of
        /// cispo is this plus 1).
        pub clip_range_high: Option<f64> = None => "above 0" if |c| c.is_none_or(|c| c > 0.0),
        /// Bound of clip for negative advantages, as a multiple (verl: 3; TRL, as delta, and
        /// OpenRLHF: off).
        pub dual_clip: Option<f64> = None => "above 1" if |c| c.is_none_or(|c| c > 1.0),
        /// The largest weight in dppo_tv and dppo_kl (verl: 3 by its shared clip_ratio_c, 20 in its
        /// code and in the paper).
        pub ratio_cap: f64 = 20.0 => "above 0" if |c| *c > 0.0,
        /// Weight of the squared log-ratio in dppo (prime-rl: 0.001).
        pub square_coef: f64 = 1e-3 => "0 or more" if |c| *c >= 0.0,
        /// Temperature of sapo where the advantage is positive (TRL, verl: 1).
        pub sapo_tau_pos: f64 = 1.0 => "above 0" if |t| *t > 0.0,
        /// The same where it is not (TRL, verl: 1.05).
        pub sapo_tau_neg: f64 = 1.05 => "above 0" if |t| *t > 0.0,
        /// Power of vespo's weight where the advantage is 0 or positive (TRL: 2).
        pub vespo_k_pos: f64 = 2.0 => "0 or more" if |k| *k >= 0.0,
        /// Decay of vespo's weight there (TRL: 3).
        pub vespo_lambda_pos: f64 = 3.0 => "0 or more" if |l| *l >= 0.0,
        /// Power of vespo's weight where the advantage is negative (TRL: 3).
        pub vespo_k_neg: f64 = 3.0 => "0 or more" if |k| *k >= 0.0,
        /// Decay of vespo's weight there (TRL: 2).
        pub vespo_lambda_neg: f64 = 2.0 => "0 or more" if |l| *l >= 0.0,
        /// Weight of an entropy bonus, aggregated as the loss (0 everywhere).
        pub entropy_coef: f64 = 0.0 => "0 or more" if |c| *c >= 0.0 && c.is_finite(),
    }
}

use PolicyObjective::{Cispo, Clip, Dppo, DppoKl, DppoTv, Gmpo, Likelihood, Sapo, Vespo};

/// Settings that only some losses read.
const READ_BY: &[(&str, &[PolicyObjective])] = &[
    ("ratio", &[Clip, Cispo, Sapo]),
    ("clip_range", &[Clip, Cispo, Gmpo, DppoTv, DppoKl, Dppo]),
    ("clip_range_high", &[Clip, Cispo, Gmpo, DppoTv, DppoKl, Dppo]),
    ("dual_clip", &[Clip]),
    ("ratio_cap", &[DppoTv, DppoKl]),
    ("square_coef", &[Dppo]),
    ("sapo_tau_pos", &[Sapo]),
    ("sapo_tau_neg", &[Sapo]),
    ("vespo_k_pos", &[Vespo]),
    ("vespo_lambda_pos", &[Vespo]),
    ("vespo_k_neg", &[Vespo]),
    ("vespo_lambda_neg", &[Vespo]),
];

/// Refuses a setting that is not its default, where nothing reads it.
pub fn unread<S: Section + Default>(section: &S, key: &str, reader: &str) -> Result<()> {
    let value = |s: &S| s.keys().into_iter().find(|k| k.name == key).map(|k| k.value);
    let (default, set) = (value(&S::default()), value(section));
    match (default, set) {
        (Some(default), Some(set)) if set != default => {
            Err(Error::config(key, format!("{default}: {reader} does not read it"), set))
        }
        _ => Ok(()),
    }
}

impl PolicyLossSettings {
    /// The loss of a token.
    pub fn loss(&self) -> Result<PolicyLoss> {
        for (key, readers) in READ_BY {
            if !readers.contains(&self.policy_loss) {
                unread(self, key, &format!("the loss {}", self.policy_loss.show()))?;
            }
        }
        if self.aggregation != Aggregation::Constant {
            unread(
                self,
                "aggregation_tokens",
                &format!("aggregation {}", self.aggregation.show()),
            )?;
        }
        let (low, high) = (self.clip_range, self.clip_range_high.unwrap_or(self.clip_range));
        let dppo = |distance| Surrogate::Dppo { distance, low, high, cap: self.ratio_cap };
        let surrogate = match self.policy_loss {
            Clip => Surrogate::Clip { low, high, dual: self.dual_clip },
            Cispo => Surrogate::Cispo { low, high },
            Sapo => Surrogate::Sapo { positive: self.sapo_tau_pos, negative: self.sapo_tau_neg },
            Gmpo => Surrogate::Gmpo { low, high },
            Vespo => Surrogate::Vespo {
                positive: [self.vespo_k_pos, self.vespo_lambda_pos],
                negative: [self.vespo_k_neg, self.vespo_lambda_neg],
            },
            DppoTv => dppo(Distance::Tv),
            DppoKl => dppo(Distance::Kl),
            Dppo => Surrogate::DppoRatio { low, high, square: self.square_coef },
            Likelihood => Surrogate::Likelihood,
        };
        Ok(PolicyLoss {
            surrogate,
            ratio: self.ratio,
            sequence_means: self.aggregation == Aggregation::Sequences,
            kl: None,
            entropy_coef: self.entropy_coef,
        })
    }

    /// What the sum over a step is divided by, of so many tokens that count and sequences.
    pub fn denominator(&self, tokens: usize, sequences: usize, max_new_tokens: usize) -> f64 {
        let count = match self.aggregation {
            Aggregation::Tokens => tokens,
            Aggregation::Sequences => sequences,
            Aggregation::Constant => sequences * self.aggregation_tokens.unwrap_or(max_new_tokens),
        };
        // A step of which nothing counts has a loss of 0.
        count.max(1) as f64
    }
}
