//! `warpo tokenize`: what training sees.

use std::{io::IsTerminal, path::PathBuf};

use serde_json::json;

use super::{harmless, train, warn};
use crate::{
    config,
    data::{Sequence, Tokenizer},
    error::Result,
    models::Config,
    train::{DataFile, inputs::RunData},
};

/// Write what training sees of data: a JSON line a sequence, with `text`, `input_ids` and `labels`
/// (-100 is not learned); on a terminal the text, and in green what is learned. The model's folder
/// needs no weights
#[derive(Debug, clap::Args)]
pub(super) struct TokenizeArgs {
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Data files as in training, `-` for standard input; may be given again
    #[arg(long, value_name = "FILE", default_value = "-")]
    data: Vec<String>,
    /// Leave out up to so many lines that cannot be read
    #[arg(long, value_name = "N")]
    skip_bad: Option<usize>,
    #[arg(long, default_value = "sft", help = super::algorithms())]
    algorithm: String,
    /// Settings in TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting of the run, as in the TOML; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub(super) fn run(args: &TokenizeArgs) -> Result<()> {
    let (entry, mut settings, mut section) =
        train::settings_of((&args.algorithm, None), args.config.as_deref(), &args.set)?;
    let model = super::model_folder(args.model.as_ref())?;
    settings.model = model.display().to_string();
    settings.data = args.data.iter().map(DataFile::from).collect();
    settings.skip_bad = args.skip_bad.unwrap_or(settings.skip_bad);
    config::Section::validate(&settings)?;
    // The model that rates reads what the policy writes; here nothing is written.
    let keys = section.keys();
    let lacks = |name: &str, none: &str| keys.iter().any(|k| k.name == name && k.value == none);
    if lacks("reward_model", "\"\"") && lacks("rewards", "[]") {
        let folder = toml::Value::String(settings.model.clone());
        section.set("reward_model", &folder).transpose()?;
    }
    let needs = (entry.build)(&*section)?.needs();
    let (_, spec) = Config::read(&model)?.spec()?;
    let data = RunData::read(&settings, &needs, &spec)?;
    data.source.warnings.iter().for_each(|text| warn(text));
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    for s in &data.source.data.sequences {
        let line = match (&data.tokenizer, colour) {
            (Some(tokenizer), true) => coloured(tokenizer, s)?,
            (tokenizer, _) => {
                let text = tokenizer.as_ref().map(|t| t.decode_all(&s.ids)).transpose()?;
                json!({ "text": text, "input_ids": s.ids, "labels": labels(s) }).to_string()
            }
        };
        super::print(&(line + "\n"))?;
    }
    Ok(())
}

/// The id of each token that is learned, -100 of the others.
fn labels(s: &Sequence) -> Vec<i64> {
    let mut labels = vec![-100; s.ids.len()];
    for i in s.predicted.iter().cloned().flatten() {
        labels[i] = i64::from(s.ids[i]);
    }
    labels
}

/// The text of a sequence for a terminal, what is learned in green.
fn coloured(tokenizer: &Tokenizer, s: &Sequence) -> Result<String> {
    let (mut out, mut at, mut shown) = (String::new(), 0, 0);
    let ends = s.predicted.iter().flat_map(|r| [(r.start, false), (r.end, true)]);
    for (end, learned) in ends.chain([(s.ids.len(), false)]) {
        let text = tokenizer.decode_all(&s.ids[..end])?;
        let part = harmless(text.get(shown..).unwrap_or_default());
        if end > at && learned {
            out += &format!("\x1b[32m{part}\x1b[0m");
        } else {
            out += &part;
        }
        (at, shown) = (end, text.len());
    }
    Ok(out)
}
