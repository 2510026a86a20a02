//! `json_schema`: whether a sample is JSON that a schema allows, all of it or, where it has code
//! blocks, the last of these. References lead nowhere outside of the schema.

use std::{fs, path::PathBuf};

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

use super::{Options, RewardFailure, RewardInput, SampleReward, Stop, each, last_block};
use crate::error::Result;

struct SchemaReward(Validator);

/// `file`, a JSON Schema; its `$schema` says which draft (2020-12). Patterns have neither
/// look-arounds nor back-references, so that time is linear in a sample.
pub fn json_schema(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let file: PathBuf = options.need("file")?;
    let wrong = |e: String| options.error(format!("{}: {e}", file.display()));
    let text = fs::read_to_string(&file).map_err(|e| wrong(e.to_string()))?;
    let schema: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let with = jsonschema::options().with_pattern_options(PatternOptions::regex());
    let validator = with.build(&schema).map_err(|e| wrong(format!("no schema: {e}")))?;
    Ok(Box::new(SchemaReward(validator)))
}

impl SampleReward for SchemaReward {
    fn score(
        &mut self,
        samples: &[RewardInput],
        _stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        each(samples, |s| {
            let text = last_block(&s.completion).unwrap_or_else(|| s.completion.clone());
            let value = serde_json::from_str(text.trim());
            Ok(f64::from(u8::from(value.is_ok_and(|value| self.0.is_valid(&value)))))
        })
    }
}
