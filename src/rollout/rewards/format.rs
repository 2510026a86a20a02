//! `format`: whether a sample thinks between tags, once and at its beginning, and then answers.

use super::{Options, RewardFailure, RewardInput, SampleReward, Stop, each};
use crate::error::Result;

struct FormatReward {
    think: String,
    answer: Option<String>,
}

/// `think` (think): the tag of the thought; `answer`: the tag that has to be around all of the
/// answer, if one has to.
pub fn format(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let think = options.take("think")?.unwrap_or_else(|| "think".to_owned());
    let answer: Option<String> = options.take("answer")?;
    for tag in [Some(&think), answer.as_ref()].into_iter().flatten() {
        if tag.is_empty() || tag.contains(['<', '>']) {
            return Err(options.error(format!("{tag:?} is no tag, wanted a name without < and >")));
        }
    }
    Ok(Box::new(FormatReward { think, answer }))
}

/// What stands between the tags that begin a text, and what follows them; both tags stand once.
fn tagged<'a>(text: &'a str, tag: &str) -> Option<(&'a str, &'a str)> {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let (inside, rest) = text.trim_start().strip_prefix(&open)?.split_once(&close)?;
    let again = [inside, rest].iter().any(|part| part.contains(&open) || part.contains(&close));
    (!again).then_some((inside, rest))
}

impl FormatReward {
    fn is_kept(&self, text: &str) -> bool {
        let Some((_, answer)) = tagged(text, &self.think) else { return false };
        let answer = match &self.answer {
            None => Some(answer),
            Some(tag) => tagged(answer, tag).filter(|t| t.1.trim().is_empty()).map(|t| t.0),
        };
        answer.is_some_and(|answer| !answer.trim().is_empty())
    }
}

impl SampleReward for FormatReward {
    fn score(
        &mut self,
        samples: &[RewardInput],
        _stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        let open = format!("<{}>", self.think);
        each(samples, |s| {
            // A chat template may have begun the thought.
            let begun = s.prompt.trim_end().ends_with(&open).then_some(&*open);
            let text = begun.unwrap_or_default().to_owned() + &s.completion;
            Ok(f64::from(u8::from(self.is_kept(&text))))
        })
    }
}
