//! `python`: a function in a file, in an interpreter of its own: `reward(prompt, completion,
//! **columns)` returns a number; with `batch = true` `reward(prompts, completions, **columns)`
//! takes lists of all samples of a step and returns one of numbers. Its traceback reaches the
//! error.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{
    Options, RewardFailure, RewardInput, SampleReward, Stop,
    command::CommandReward,
    process::{self, LineProcess},
};
use crate::{
    data::{ColumnsRead, RowColumns},
    error::Result,
};

/// Asks a process about all samples of a step.
struct BatchReward(LineProcess);

/// The program that calls the function.
const HOST: &str = include_str!("host.py");

/// `file`; `function` (reward); `batch` (false); `python` (python3), the interpreter; `timeout_s`
/// (60) of a call, that of the first one with all imports; `retries` (2).
pub fn python(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let file: PathBuf = options.need("file")?;
    if !file.is_file() {
        return Err(options.error(format!("there is no file {}", file.display())));
    }
    let function = options.take("function")?.unwrap_or_else(|| "reward".to_owned());
    let python = options.take("python")?.unwrap_or_else(|| "python3".to_owned());
    let batch = options.take("batch")?.unwrap_or(false);
    let form = if batch { "batch" } else { "one" };
    let file = file.to_string_lossy().into_owned();
    let command = [python, "-c".into(), HOST.into(), file, function, form.into()];
    let process = LineProcess::of(command.to_vec(), options)?;
    Ok(if batch { Box::new(BatchReward(process)) } else { Box::new(CommandReward(process)) })
}

impl SampleReward for BatchReward {
    fn columns(&self) -> ColumnsRead {
        ColumnsRead::All
    }

    fn admit(&self, row: &RowColumns) -> Result<(), String> {
        process::admit(row)
    }

    fn takes_all(&self) -> bool {
        true
    }

    fn score(
        &mut self,
        samples: &[RewardInput],
        stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        let [prompts, completions, columns] = process::lists(samples);
        let question =
            json!({ "prompts": prompts, "completions": completions, "columns": columns });
        let read = |answer: &Value| process::scores(answer.get("scores")?, samples.len());
        self.0.ask(&question, read, stop).map_err(|cause| RewardFailure { at: 0, cause })
    }
}
