//! Group relative policy optimisation (Shao et al. 2024) and its relatives: the samples of a prompt
//! are compared with each other, so that no value model is needed; settings and presets make the
//! algorithm of each paper and system.
//!
//! Departures from TRL's GRPOTrainer (1.16), each an option or a mend:
//! - the old log-prob is the sampler's own, bit-equal to the training forward: the first ratio is
//!   exactly 1, nobody computes it twice, and no weight corrects for another engine;
//! - counts, means and variances are those of the whole step or minibatch, every metric is over
//!   real tokens only;
//! - a group of equal rewards has advantages of exactly 0, a group of one is refused;
//! - with a ratio of sequences, the KL of a token has the weight of the token's own ratio;
//! - log-ratios and KL estimates are not clamped (verl, OpenRLHF and NeMo RL: ±20, ±10): a number
//!   that is none stops the step.

use super::{
    Algorithm, AlgorithmEntry, Columns, Metrics, MicroBatch, Needs, Preset, Resampling,
    advantage::{self, Advantage},
    own,
    policy_gradient::{self, PolicyGradient, PolicyGradientSettings, WhitenVariance},
};
use crate::{
    config::Section,
    device::{Device, View, ViewMut},
    error::{Error, Result},
    ops::whiten::{self, Moments},
};

crate::settings! {
    /// Settings of algorithms that compare the samples of a prompt.
    pub struct GrpoSettings {
        parts { pub shared: PolicyGradientSettings }
        /// Passes over a step's samples (TRL: num_iterations 1).
        pub grpo_epochs: usize = 1 => "1 or more" if |n| *n > 0,
        /// The advantage of a sample from its reward R, that of all its tokens. group: (R - mean) /
        /// (std + advantage_epsilon) of its prompt's samples; mean: R - mean (Dr. GRPO); batch: the
        /// std of the whole step; leave_one_out: R - mean of the others (RLOO); leave_one_out_std:
        /// over the std of the others, too (NeMo RL); opo: R - mean by tokens; max_rl: (R - mean) /
        /// mean, 0 where the mean is not above 0 (prime-rl); gpg: R - mean, over the share of
        /// samples of the step with R other than 0; return: of each token the rewards from it on
        /// (REINFORCE++); remax: that less the score of the prompt's greedy sample, which is made
        /// beside; token: score and the token's own KL penalty (NeMo RL).
        pub advantage: Advantage = Advantage::Group,
        /// Added to a standard deviation (TRL: 1e-4; verl, NeMo RL: 1e-6; OpenRLHF: 1e-9).
        pub advantage_epsilon: f64 = 1e-4 => "0 or more" if |e| *e >= 0.0 && e.is_finite(),
        /// Advantages of samples to mean 0 and std 1 over the step, over that std +
        /// advantage_epsilon (TRL's RLOO: normalize_advantages, off).
        pub normalize_advantages: bool = false,
        /// Advantages of tokens to mean 0 and variance 1 over the step, at last (REINFORCE++).
        pub whiten_advantages: bool = false,
        /// The variance that this divides by (verl: unbiased; OpenRLHF, NeMo RL: biased).
        pub whiten_variance: WhitenVariance = WhitenVariance::Unbiased,
        /// A sample that did not end by itself is compared, but not learned; aggregation sequences
        /// counts it (TRL: mask_truncated_completions, off; DAPO: overlong filtering).
        pub mask_truncated: bool = false,
        /// Draws of prompts a step, at most: prompts whose samples have equal scores give way to
        /// others (DAPO: dynamic sampling; verl: filter_groups, max_num_gen_batches 10). After the
        /// last draw they fill what is missing; 0 is off.
        pub dynamic_sampling: usize = 0 => "0, or 2 or more" if |n| *n != 1,
        /// The reward of the list whose scores have to differ; "none" is their sum.
        pub dynamic_reward: Option<String> = None,
    }
}

/// The algorithm.
#[derive(Debug)]
struct Grpo {
    name: &'static str,
    settings: GrpoSettings,
    shared: PolicyGradient,
}

/// Defaults of TRL's GRPOTrainer.
fn settings() -> GrpoSettings {
    let mut s = GrpoSettings::default();
    s.shared.sampling.samples_per_prompt = 8;
    s.shared.sampling.max_new_tokens = 512;
    s.shared.sampling.temperature = 1.0;
    s.shared.kl.kl_coef = 0.0;
    s.shared.kl.kl_in = policy_gradient::KlIn::Loss;
    s.shared.kl.kl_estimator = policy_gradient::Estimator::K3;
    s
}

pub(super) const METRICS: &[&[(&str, &str)]] = &[
    policy_gradient::METRICS,
    &[
        ("loss", "The whole loss of an update; mean over the step's updates."),
        ("reward_std", "Standard deviation of the rewards of a prompt's samples; mean of prompts."),
        ("zero_std_groups", "Prompts whose samples have equal rewards, which teach nothing."),
        ("draws", "Draws of prompts in the step (with dynamic sampling)."),
        ("dropped_groups", "Prompts that gave way to others (with dynamic sampling)."),
        ("masked", "Samples that are not learned because they did not end by themselves."),
    ],
];

pub(super) const DEFAULTS: &[(&str, &str)] = &[("learning_rate", "1e-6"), ("steps", "100")];

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "grpo",
    about: "GRPO and its relatives: samples of a prompt against each other, no value model",
    defaults: DEFAULTS,
    presets: PRESETS,
    metrics: METRICS,
    section: || Box::new(settings()),
    build: |s: &dyn Section| build("grpo", s),
};

const PRESETS: &[Preset] = &[
    Preset {
        name: "trl",
        about: "TRL 1.16's GRPOTrainer; its weights against another sampling engine are 1 here",
        values: &[
            ("advantage", "group"),
            ("advantage_epsilon", "1e-4"),
            ("aggregation", "tokens"),
            ("clip_range", "0.2"),
            ("kl_coef", "0"),
            ("samples_per_prompt", "8"),
            ("temperature", "1"),
            ("learning_rate", "1e-6"),
        ],
    },
    Preset {
        name: "deepseek-r1",
        about: "DeepSeek-R1 (Nature 2025, from memory): clip 10, KL 0.001 in the loss; it renews its \
                reference every 400 steps, which stays here",
        values: &[
            ("advantage_epsilon", "1e-6"),
            ("aggregation", "sequences"),
            ("clip_range", "10"),
            ("kl_coef", "0.001"),
            ("kl_weight", "one"),
            ("samples_per_prompt", "16"),
            ("learning_rate", "3e-6"),
        ],
    },
    Preset {
        name: "dr-grpo",
        about: "Dr. GRPO (arXiv 2503.20783): no std, sums over tokens divided by a constant",
        values: &[("advantage", "mean"), ("aggregation", "constant")],
    },
    Preset {
        name: "dapo",
        about: "DAPO (arXiv 2503.14476): clip-higher, token mean, soft overlong penalty in the last \
                fifth, dynamic sampling",
        values: &[
            ("dynamic_sampling", "10"),
            ("clip_range", "0.2"),
            ("clip_range_high", "0.28"),
            ("overlong_share", "0.2"),
            ("samples_per_prompt", "16"),
            ("learning_rate", "1e-6"),
        ],
    },
    Preset {
        name: "gspo",
        about: "GSPO (arXiv 2507.18071): ratio and clip of whole sequences",
        values: &[
            ("ratio", "sequence"),
            ("aggregation", "sequences"),
            ("clip_range", "3e-4"),
            ("clip_range_high", "4e-4"),
        ],
    },
    Preset {
        name: "cispo",
        about: "CISPO (arXiv 2506.13585) as in TRL: weights up to 5, no lower bound; verl's is \
                clip_range = 0.2 and clip_range_high = 0.2",
        values: &[("policy_loss", "cispo"), ("clip_range", "1"), ("clip_range_high", "4")],
    },
    Preset {
        name: "sapo",
        about: "SAPO as in TRL and verl",
        values: &[("policy_loss", "sapo"), ("aggregation", "sequences")],
    },
    Preset {
        name: "dppo",
        about: "DPPO as prime-rl's default loss; verl's are policy_loss dppo_tv and dppo_kl",
        values: &[("policy_loss", "dppo"), ("advantage", "mean")],
    },
    Preset {
        name: "vespo",
        about: "VESPO as in TRL; its correction for another sampling engine is 1 here",
        values: &[("policy_loss", "vespo")],
    },
    Preset {
        name: "max-rl",
        about: "MaxRL (arXiv 2602.02710) in prime-rl's loss; rewards should be 0 or 1",
        values: &[("policy_loss", "dppo"), ("advantage", "max_rl")],
    },
    Preset {
        name: "verl",
        about: "verl's GRPO: dual clip; its clamps of log-ratios are not here",
        values: &[
            ("advantage_epsilon", "1e-6"),
            ("dual_clip", "3"),
            ("learning_rate", "1e-6"),
            ("weight_decay", "0.01"),
        ],
    },
    Preset {
        name: "openrlhf",
        about: "OpenRLHF's group_norm: k1 of weight 0.01 in the reward, scores within 10; its clamps \
                of log-ratios and KL are not here",
        values: &[
            ("advantage_epsilon", "1e-9"),
            ("reward_clip", "10"),
            ("kl_coef", "0.01"),
            ("kl_in", "reward"),
            ("kl_estimator", "k1"),
            ("learning_rate", "1e-6"),
            ("beta2", "0.95"),
            ("schedule", "cosine"),
            ("min_learning_rate_ratio", "0.1"),
        ],
    },
    Preset {
        name: "nemo",
        about: "NeMo RL's GRPO: mean and std of the other samples, k3 of weight 0.01; its clamps of \
                the KL are not here",
        values: &[
            ("advantage", "leave_one_out_std"),
            ("advantage_epsilon", "1e-6"),
            ("kl_coef", "0.01"),
            ("kl_weight", "score"),
        ],
    },
];

/// The algorithm of this name with these settings.
pub(super) fn build(name: &'static str, section: &dyn Section) -> Result<Box<dyn Algorithm>> {
    let settings: GrpoSettings = own(section)?;
    let (least, got) =
        (settings.advantage.least_group(), settings.shared.sampling.samples_per_prompt);
    if got < least {
        let want = format!("{least} or more: the advantage is against the samples of the prompt");
        return Err(Error::config("samples_per_prompt", want, got));
    }
    let mut shared = PolicyGradient::new(settings.shared.clone())?;
    if settings.normalize_advantages && settings.advantage.is_of_tokens() {
        let want = "false: the advantage is one of tokens; whiten_advantages is for these";
        return Err(Error::config("normalize_advantages", want, true));
    }
    if settings.dynamic_sampling > 0 && got < 2 {
        let want = "2 or more: dynamic_sampling compares the samples of a prompt";
        return Err(Error::config("samples_per_prompt", want, got));
    }
    if let Some(name) = &settings.dynamic_reward {
        let names: Vec<&str> = shared.reward_names().collect();
        if settings.dynamic_sampling == 0 {
            return Err(Error::config("dynamic_reward", "\"none\": dynamic_sampling is 0", name));
        }
        if !names.contains(&&**name) {
            let want = format!("the name of one of the rewards ({})", names.join(", "));
            return Err(Error::config("dynamic_reward", want, name));
        }
    }
    shared.masks = settings.mask_truncated;
    Ok(Box::new(Grpo { name, settings, shared }))
}

impl Grpo {
    /// Fills the advantages from the rewards of tokens.
    fn advantages(&self, dev: &Device, c: &mut Columns<f32>, out: &mut Metrics) -> Result<()> {
        let s = &self.settings;
        let group = s.shared.sampling.samples_per_prompt;
        let spans: Vec<_> = (0..c.sequences()).map(|i| c.span(&(i..i + 1))).collect();
        let wide = |x: &f32| f64::from(*x);
        let rewards: Vec<f64> =
            spans.iter().map(|t| c.rewards[t.clone()].iter().map(wide).sum()).collect();
        if group > 1 {
            let (flat, std) = advantage::spread(&rewards, group);
            out.extend([("reward_std", std), ("zero_std_groups", flat)]);
        }
        c.advantages.clear();
        if s.advantage.is_of_tokens() {
            for (i, span) in spans.into_iter().enumerate() {
                let score = self.shared.shaped(c.scores[i], c.stopped[i], span.len());
                let greedy = c.greedy.get(i);
                let greedy = greedy.map(|g| self.shared.shaped(g.score, g.stopped, g.tokens));
                let of = s.advantage.of_tokens(&c.rewards[span], score, greedy.unwrap_or(0.0));
                c.advantages.extend(of);
            }
        } else {
            let lens: Vec<usize> = spans.iter().map(ExactSizeIterator::len).collect();
            let mut each = s.advantage.of(&rewards, &lens, group, s.advantage_epsilon);
            if s.normalize_advantages {
                advantage::normalize(&mut each, s.advantage_epsilon);
            }
            for (a, n) in each.iter().zip(&lens) {
                c.advantages.extend(std::iter::repeat_n(*a as f32, *n));
            }
        }
        if s.whiten_advantages {
            let moments = Moments::of(dev, View::from(&c.advantages))?;
            let a = (&mut c.advantages).into();
            whiten::apply(dev, a, &moments, true, s.whiten_variance.variance(), 1e-8)?;
        }
        Ok(())
    }
}

impl Algorithm for Grpo {
    fn needs(&self) -> Needs {
        let s = &self.settings;
        let reference = s.shared.kl.kl_coef != 0.0;
        let (draws, reward) = (s.dynamic_sampling, s.dynamic_reward.clone());
        let resampling = (draws > 0).then_some(Resampling { draws, reward });
        let greedy = s.advantage == Advantage::Remax;
        Needs { reference, epochs: s.grpo_epochs, resampling, greedy, ..self.shared.needs() }
    }

    fn prepare(&mut self, dev: &Device, c: &mut Columns<f32>, out: &mut Metrics) -> Result<()> {
        self.shared.rewards(c);
        self.shared.report(c, out);
        self.advantages(dev, c, out)?;
        if self.settings.mask_truncated {
            let cut = c.stopped.iter().enumerate().filter(|(_, stopped)| !**stopped);
            let spans: Vec<_> = cut.map(|(i, _)| c.span(&(i..i + 1))).collect();
            out.push(("masked", spans.len() as f64));
            c.weights.resize(c.tokens(), 1.0);
            spans.into_iter().for_each(|span| c.weights[span].fill(0.0));
        }
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

    fn finish(&mut self, out: &mut Metrics) -> Result<()> {
        let (policy, updates) = self.shared.finish(out)?;
        out.push(("loss", policy / updates));
        Ok(())
    }

    fn state(&self) -> serde_json::Value {
        self.shared.state()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<()> {
        self.shared.restore(self.name, state)
    }
}
