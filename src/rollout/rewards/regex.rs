//! `regex`: whether a pattern matches somewhere in a sample. Time is linear in its length: there
//! are no look-arounds and no back-references.

use super::{Options, RewardFailure, RewardInput, SampleReward, Stop, each};
use crate::error::Result;

struct RegexReward(regex::Regex);

/// `pattern`.
pub fn regex(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let pattern: String = options.need("pattern")?;
    let wrong = |e| options.error(format!("`pattern` is no regular expression: {e}"));
    Ok(Box::new(RegexReward(regex::Regex::new(&pattern).map_err(wrong)?)))
}

impl SampleReward for RegexReward {
    fn score(
        &mut self,
        samples: &[RewardInput],
        _stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        each(samples, |s| Ok(f64::from(u8::from(self.0.is_match(&s.completion)))))
    }
}
