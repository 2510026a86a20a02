//! `warpo train`: one command for all algorithms.

use std::path::{Path, PathBuf};

use super::{profile::Profiling, progress::Progress};
use crate::{
    algorithms::{ALGORITHMS, AlgorithmEntry, algorithm},
    config::{self, Section},
    device::{Device, file},
    error::{Error, Result},
    train::{self, Settings, signals},
};

/// Train a model; the same command again goes on with an interrupted run
#[derive(Debug, clap::Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    profiling: Profiling,
}

/// The inputs of a run.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    #[arg(help = super::algorithms())]
    algorithm: String,
    /// Settings in TOML; `warpo config ALGORITHM` prints all of them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The model's folder, or its name on the Hub where it is in the local cache
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// A data file, folder, pattern or name of the Hub, `-` for standard input; may be given again
    #[arg(long, value_name = "FILE")]
    data: Vec<String>,
    /// Leave out up to so many lines that cannot be read
    #[arg(long, value_name = "N")]
    skip_bad: Option<u32>,
    /// Folder of the run
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    /// auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N
    #[arg(long)]
    device: Option<String>,
    /// One setting, as in the TOML; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Says of an unknown key whose it is, if another algorithm has it.
fn other_algorithm(entry: &AlgorithmEntry, error: Error) -> Error {
    let Error::Config { key, message, hint } = error else { return error };
    let has = |e: &&AlgorithmEntry| {
        e.name != entry.name && (e.section)().keys().iter().any(|k| k.name == key)
    };
    let owner = ALGORITHMS.iter().find(has).filter(|_| message.starts_with("there is no such key"));
    let hint = owner
        .map(|e| format!("`{key}` is a setting of {}, not of {}", e.name, entry.name))
        .or(hint);
    Error::Config { key, message, hint }
}

/// An algorithm, and its settings: the defaults, then the file, then what the command line says.
pub(super) fn settings(
    args: &RunArgs,
) -> Result<(&'static AlgorithmEntry, Settings, Box<dyn Section>)> {
    let (mut all, name) = (Vec::new(), |key: &str, value: &str| {
        format!("{key}={}", toml::Value::String(value.to_owned()))
    });
    all.extend(args.model.iter().map(|model| name("model", model)));
    if !args.data.is_empty() {
        let list: Vec<toml::Value> = args.data.iter().map(|d| d.clone().into()).collect();
        all.push(format!("data={}", toml::Value::Array(list)));
    }
    all.extend(args.skip_bad.iter().map(|n| format!("skip_bad={n}")));
    all.extend(args.out.iter().map(|out| name("out", out)));
    all.extend(args.device.iter().map(|device| name("device", device)));
    all.extend(args.set.iter().cloned());
    let (entry, mut settings, mut section) =
        settings_of(&args.algorithm, args.config.as_deref(), &all)?;
    find_models(&mut settings, &mut *section)?;
    Ok((entry, settings, section))
}

/// Puts folders in place of names of the Hub.
fn find_models(settings: &mut Settings, section: &mut dyn Section) -> Result<()> {
    let folder = |given: &str| Ok(super::model_folder(Path::new(given))?.display().to_string());
    settings.model = folder(&settings.model)?;
    for key in section.keys() {
        if !matches!(key.name, "reward_model" | "reference_model") {
            continue;
        }
        let value = format!("x = {}", key.value).parse::<toml::Table>().ok();
        let given = value.as_ref().and_then(|t| t["x"].as_str()).unwrap_or_default();
        let found = folder(given)?;
        if found != given {
            section.set(key.name, &toml::Value::String(found)).transpose()?;
        }
    }
    Ok(())
}

/// The settings of an algorithm after those of a file and these pairs of key and value.
pub(super) fn settings_of(
    algorithm_name: &str,
    config: Option<&Path>,
    pairs: &[String],
) -> Result<(&'static AlgorithmEntry, Settings, Box<dyn Section>)> {
    let entry = algorithm(algorithm_name)?;
    let (mut settings, mut section) = Settings::defaults(entry)?;
    if let Some(path) = config {
        let text = file::read_bounded(path, 1 << 20).map_err(|e| Error::Config {
            key: "--config".into(),
            message: e.to_string(),
            hint: Some(format!("warpo config {} prints one", entry.name)),
        })?;
        let name = path.display().to_string();
        let done = config::set_all(&mut [&mut settings, &mut *section], &text, &name);
        done.map_err(|e| other_algorithm(entry, e))?;
    }
    for pair in pairs {
        let done = config::set_pair(&mut [&mut settings, &mut *section], pair);
        done.map_err(|e| other_algorithm(entry, e))?;
    }
    Ok((entry, settings, section))
}

pub(super) fn run(args: &TrainArgs) -> Result<()> {
    signals::install()?;
    let (entry, settings, section) = settings(&args.run)?;
    let dev = Device::from_name(&settings.device, settings.threads)?;
    let dir = args.profiling.on(dev, |dev| {
        let mut progress = Progress::new(entry.name);
        let done = train::run_on(dev, entry, &settings, &*section, &mut progress);
        progress.finish();
        done
    })?;
    super::print(&format!("{}\n", dir.display()))
}
