//! `warpo train`: one command for all algorithms.

use std::path::PathBuf;

use super::progress::Progress;
use crate::{
    algorithms::{ALGORITHMS, Entry},
    config::{self, Section},
    error::{Error, Result},
    train::{self, Settings},
};

/// Train a model; the same command again goes on with an interrupted run
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// sft, reward or ppo
    algorithm: String,
    /// Settings in TOML; `warpo config ALGORITHM` prints all of them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// A data file (JSONL), `-` for standard input; may be given again
    #[arg(long, value_name = "FILE")]
    data: Vec<String>,
    /// Folder of the run
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    /// One setting, as in the TOML; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Finds an algorithm by name.
pub(super) fn algorithm(name: &str) -> Result<&'static Entry> {
    ALGORITHMS.iter().find(|e| e.name == name).ok_or_else(|| {
        let known: Vec<_> =
            ALGORITHMS.iter().map(|e| format!("{} ({})", e.name, e.about)).collect();
        Error::Config {
            key: "algorithm".into(),
            message: format!("there is no `{name}`"),
            hint: Some(format!("known are: {}", known.join("; "))),
        }
    })
}

/// Settings of an algorithm before the user's.
pub(super) fn defaults(entry: &Entry) -> Result<(Settings, Box<dyn Section>)> {
    let mut settings = Settings::default();
    for (key, value) in entry.defaults {
        config::set_pair(&mut [&mut settings], &format!("{key}={value}"))?;
    }
    Ok((settings, (entry.section)()))
}

pub(super) fn run(args: &Args) -> Result<()> {
    let entry = algorithm(&args.algorithm)?;
    let (mut settings, mut section) = defaults(entry)?;
    if let Some(path) = &args.config {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let name = path.display().to_string();
        config::set_all(&mut [&mut settings, &mut *section], &text, &name)?;
    }
    if let Some(model) = &args.model {
        settings.model.clone_from(model);
    }
    if !args.data.is_empty() {
        settings.data.clone_from(&args.data);
    }
    if let Some(out) = &args.out {
        settings.out.clone_from(out);
    }
    for pair in &args.set {
        config::set_pair(&mut [&mut settings, &mut *section], pair)?;
    }
    let mut progress = Progress::new(entry.name);
    let done = train::run(entry, &settings, &*section, &mut progress);
    progress.finish();
    let dir = done?;
    super::print(&format!("{}\n", dir.display()))
}
