//! REINFORCE leave-one-out (Ahmadian et al. 2024): GRPO's settings with RLOO's defaults, those of
//! TRL's RLOOTrainer (1.16), whose departures are GRPO's.

use super::{
    AlgorithmEntry, Preset,
    advantage::Advantage,
    grpo::{self, GrpoSettings},
    surrogate::Aggregation,
};
use crate::{config::Section, ops::policy_loss::RatioLevel};

/// The KL is in the reward, the ratio is that of the sequence's probabilities.
fn settings() -> GrpoSettings {
    let mut s = GrpoSettings { advantage: Advantage::LeaveOneOut, ..GrpoSettings::default() };
    s.shared.sampling.samples_per_prompt = 2;
    s.shared.sampling.max_new_tokens = 512;
    s.shared.sampling.temperature = 1.0;
    s.shared.loss.ratio = RatioLevel::SequenceSum;
    s.shared.loss.aggregation = Aggregation::Sequences;
    s
}

pub(super) const ENTRY: AlgorithmEntry = AlgorithmEntry {
    name: "rloo",
    about: "RLOO: each sample against the mean of the others, no value model",
    defaults: grpo::DEFAULTS,
    presets: &[
        Preset {
            name: "trl",
            about: "TRL 1.16's RLOOTrainer",
            values: &[
                ("kl_coef", "0.05"),
                ("ratio", "sequence_sum"),
                ("aggregation", "sequences"),
                ("samples_per_prompt", "2"),
                ("learning_rate", "1e-6"),
            ],
        },
        Preset {
            name: "verl",
            about: "verl's RLOO: a ratio of tokens, dual clip; its clamps of log-ratios are not here",
            values: &[
                ("ratio", "token"),
                ("aggregation", "tokens"),
                ("dual_clip", "3"),
                ("kl_coef", "0"),
                ("samples_per_prompt", "8"),
                ("weight_decay", "0.01"),
            ],
        },
    ],
    metrics: grpo::METRICS,
    section: || Box::new(settings()),
    build: |s: &dyn Section| grpo::build("rloo", s),
};
