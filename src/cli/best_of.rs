//! The best of a prompt's samples, as data to learn from: rejection sampling.

use clap::ValueEnum;
use serde_json::{Value, json};

/// Which of a prompt's samples are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum KeptSamples {
    All,
    /// The one with the highest reward, for fine-tuning.
    Best,
    /// Those with the highest and the lowest reward, for DPO; none if all have the same.
    Pair,
}

impl KeptSamples {
    /// The rows of the samples of prompt `i` of the data, each with its `reward`. Of equals the
    /// first counts.
    pub(super) fn rows(self, i: u64, mut samples: Vec<Value>) -> Vec<Value> {
        if self == Self::All {
            return samples;
        }
        let rewards: Vec<f64> = samples.iter().filter_map(|s| s["reward"].as_f64()).collect();
        let first = |better: &dyn Fn(f64, f64) -> bool| {
            (1..rewards.len()).fold(0, |at, i| if better(rewards[i], rewards[at]) { i } else { at })
        };
        let (best, worst) = (first(&|x, y| x > y), first(&|x, y| x < y));
        if self == Self::Best {
            let mut row = samples.swap_remove(best);
            (row["example"], row["rewards"]) = (json!(i), json!(rewards));
            return vec![row];
        }
        if rewards.is_empty() || rewards[best] == rewards[worst] {
            return Vec::new();
        }
        let (chosen, rejected) = (&samples[best], &samples[worst]);
        vec![json!({
            "prompt_ids": chosen["input_ids"],
            "chosen_ids": chosen["output_ids"],
            "rejected_ids": rejected["output_ids"],
            "chosen_text": chosen["text"],
            "rejected_text": rejected["text"],
            "chosen_reward": rewards[best],
            "rejected_reward": rewards[worst],
            "example": i,
            "rewards": rewards,
        })]
    }
}
