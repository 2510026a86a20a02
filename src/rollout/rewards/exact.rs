//! `exact`: whether a sample is the text of its row's column, white space apart: every run of it is
//! one space, at the ends none.

use super::{AnswerColumn, Options, RewardFailure, RewardInput, SampleReward, Stop, each};
use crate::{
    data::{ColumnsRead, RowColumns},
    error::Result,
};

struct ExactReward {
    column: AnswerColumn,
    /// Upper and lower case differ.
    case: bool,
}

/// `column` (answer or ground_truth); `case = false` reads all letters as small ones.
pub fn exact(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let case = options.take("case")?.unwrap_or(true);
    Ok(Box::new(ExactReward { column: AnswerColumn::of(options)?, case }))
}

impl ExactReward {
    fn normal(&self, text: &str) -> String {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if self.case { text } else { text.to_lowercase() }
    }
}

impl SampleReward for ExactReward {
    fn columns(&self) -> ColumnsRead {
        self.column.columns()
    }

    fn admit(&self, row: &RowColumns) -> Result<(), String> {
        self.column.text(row).map(drop)
    }

    fn score(
        &mut self,
        samples: &[RewardInput],
        _stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        each(samples, |s| {
            let same = self.normal(&s.completion) == self.normal(&self.column.text(&s.columns)?);
            Ok(f64::from(u8::from(same)))
        })
    }
}
