//! `command`: a process that scores. It is kept running and reads one line of JSON for each sample,
//! `{"prompt": .., "completion": .., column: ..}` with all columns of the row; it writes one line
//! for each, a number, `{"score": number}` or `{"error": "why"}`, which ends the run.

use serde_json::Value;

use super::{
    Options, RewardFailure, RewardInput, SampleReward, Stop,
    process::{self, LineProcess},
};
use crate::{
    data::{ColumnsRead, RowColumns},
    error::Result,
};

/// Asks a process about one sample at a time.
pub struct CommandReward(pub LineProcess);

/// `command`, a list of program and arguments; `timeout_s` (60) of an answer; `retries` (2).
pub fn command(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let command: Vec<String> = options.need("command")?;
    if command.first().is_none_or(String::is_empty) {
        return Err(options.error("`command` is empty, wanted a program and its arguments"));
    }
    Ok(Box::new(CommandReward(LineProcess::of(command, options)?)))
}

impl SampleReward for CommandReward {
    fn columns(&self) -> ColumnsRead {
        ColumnsRead::All
    }

    fn admit(&self, row: &RowColumns) -> Result<(), String> {
        process::admit(row)
    }

    fn score(
        &mut self,
        samples: &[RewardInput],
        stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        let read = |answer: &Value| process::score(answer.get("score").unwrap_or(answer));
        let mut ask = |(at, s): (usize, &RewardInput)| {
            let mut question = RowColumns::new();
            question.insert("prompt".into(), s.prompt.clone().into());
            question.insert("completion".into(), s.completion.clone().into());
            question.extend((*s.columns).clone());
            let answer = self.0.ask(&question.into(), read, stop);
            answer.map_err(|cause| RewardFailure { at, cause })
        };
        samples.iter().enumerate().map(&mut ask).collect()
    }
}
