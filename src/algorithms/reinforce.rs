//! REINFORCE++ (Hu et al. 2025): GRPO's settings with its defaults: the rewards from a token on,
//! whitened over the step, in PPO's clipped loss. With `advantage = "mean"` it is
//! REINFORCE++-baseline.
//!
//! Departures: those of GRPO.

use super::{
    AlgorithmEntry, Preset,
    advantage::Advantage,
    grpo::{self, GrpoSettings},
};
use crate::config::Section;

/// The KL is in the reward of each token.
fn settings() -> GrpoSettings {
    let mut s = GrpoSettings {
        advantage: Advantage::Return,
        whiten_advantages: true,
        ..GrpoSettings::default()
    };
    s.shared.sampling.max_new_tokens = 512;
    s.shared.sampling.temperature = 1.0;
    s.shared.kl.kl_coef = 0.001;
    s
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "reinforce++",
    about: "REINFORCE++: rewards to go, whitened over the step, no value model",
    defaults: grpo::DEFAULTS,
    presets: &[
        Preset {
            name: "verl",
            about: "verl's REINFORCE++ with its KL in the reward; its clamps of log-ratios are not \
                    here",
            values: &[("kl_coef", "0.001"), ("dual_clip", "3"), ("weight_decay", "0.01")],
        },
        Preset {
            name: "openrlhf",
            about: "OpenRLHF's reinforce: scores within 10, biased variance; its clamps of log-ratios \
                    and KL are not here",
            values: &[
                ("kl_coef", "0.01"),
                ("reward_clip", "10"),
                ("whiten_variance", "biased"),
                ("beta2", "0.95"),
                ("schedule", "cosine"),
                ("min_learning_rate_ratio", "0.1"),
            ],
        },
        Preset {
            name: "nemo",
            about: "NeMo RL's REINFORCE++: no sum over later rewards, k3 of the token in its reward, \
                    biased variance; its clamps of the KL are not here",
            values: &[
                ("advantage", "token"),
                ("kl_coef", "0.01"),
                ("kl_estimator", "k3"),
                ("whiten_variance", "biased"),
            ],
        },
    ],
    metrics: grpo::METRICS,
    section: || Box::new(settings()),
    build: |s: &dyn Section| grpo::build("reinforce++", s),
};
