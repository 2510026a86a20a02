//! `repetition`: a penalty on the share of n-grams of words that stand more than once: `max_penalty
//! * (1 - different n-grams / n-grams)`; 0 for a sample of less than n words (Yeo et al. 2025, as
//! TRL's `get_repetition_penalty_reward`).

use std::collections::HashSet;

use super::{Options, RewardFailure, RewardInput, SampleReward, Stop, each};
use crate::error::Result;

struct RepetitionReward {
    n: usize,
    most: f64,
}

/// `ngram` (3): words of an n-gram; `max_penalty` (-1), 0 or below.
pub fn repetition(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let n = options.take("ngram")?.unwrap_or(3);
    if n == 0 {
        return Err(options.error("`ngram` is 0, wanted 1 or more"));
    }
    let most = options.number("max_penalty", -1.0, (f64::MIN, 0.0))?;
    Ok(Box::new(RepetitionReward { n, most }))
}

impl SampleReward for RepetitionReward {
    fn score(
        &mut self,
        samples: &[RewardInput],
        _stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        each(samples, |s| {
            let text = s.completion.to_lowercase();
            let words: Vec<&str> = text.split_whitespace().collect();
            let all = words.windows(self.n);
            let (count, different) = (all.len(), all.collect::<HashSet<_>>().len());
            Ok(match count {
                0 => 0.0,
                count => (1.0 - different as f64 / count as f64) * self.most,
            })
        })
    }
}
