//! `math`: whether the answer of a sample is that of its row.
//!
//! The answer is what stands in the last `\boxed{...}`; without a box, behind the last `####` on
//! its line. It is right if it is exactly the number, the expression or the text of the column:
//! 1/2, 0.5 and 50% are the same, 0.333 and 1/3 are not. A name (`x = 5`) or a unit (`5 cm`, `$5`,
//! `50%`) that only one of both has is not compared, two of them are. Items of a list stand in the
//! same order; those of a set in any, and a list without brackets may be one. What is not
//! understood has to have the same tokens.

mod answer;
mod lexer;
mod number;
mod units;

use answer::Answer;

use super::{AnswerColumn, Options, RewardFailure, RewardInput, SampleReward, Stop, each};
use crate::{
    data::{ColumnsRead, RowColumns},
    error::Result,
};

crate::choices! {
    /// What a sample without an answer is.
    pub enum Missing { Zero = "zero", Error = "error" }
}

struct MathReward {
    column: AnswerColumn,
    missing: Missing,
}

/// `column` (answer or ground_truth), and what a sample without an answer is: `missing = "zero"` or
/// `"error"`.
pub fn math(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let missing = options.take("missing")?.unwrap_or(Missing::Zero);
    Ok(Box::new(MathReward { column: AnswerColumn::of(options)?, missing }))
}

impl MathReward {
    fn truth(&self, row: &RowColumns) -> Result<Answer, String> {
        let text = self.column.text(row)?;
        let marked = text.contains("\\boxed") || text.contains("####");
        let answer = if marked { final_answer(&text) } else { Some(&*text) };
        let answer = answer.and_then(Answer::read);
        answer.ok_or_else(|| format!("has {text:?} as its answer, which says nothing"))
    }
}

impl SampleReward for MathReward {
    fn columns(&self) -> ColumnsRead {
        self.column.columns()
    }

    fn admit(&self, row: &RowColumns) -> Result<(), String> {
        self.truth(row).map(drop)
    }

    fn score(
        &mut self,
        samples: &[RewardInput],
        _stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        each(samples, |sample| {
            let truth = self.truth(&sample.columns)?;
            match (final_answer(&sample.completion).and_then(Answer::read), self.missing) {
                (Some(answer), _) => Ok(f64::from(u8::from(answer.equals(&truth)))),
                (None, Missing::Zero) => Ok(0.0),
                (None, Missing::Error) => {
                    Err("it has no answer in \\boxed{} or behind ####".into())
                }
            }
        })
    }
}

/// What a text gives as its answer.
pub fn final_answer(text: &str) -> Option<&str> {
    // A heading of Markdown may follow a box.
    let answer = match text.rfind("\\boxed") {
        Some(boxed) => lexer::group(text[boxed + "\\boxed".len()..].trim_start())?.0,
        None => text[text.rfind("####")? + "####".len()..].lines().next()?,
    };
    Some(answer.trim()).filter(|answer| !answer.is_empty())
}

/// Whether two texts are the same answer.
pub fn same_answer(a: &str, b: &str) -> bool {
    let (a, b) = (Answer::read(a), Answer::read(b));
    a.zip(b).is_some_and(|(a, b)| a.equals(&b))
}
