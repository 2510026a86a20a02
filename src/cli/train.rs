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
    /// Settings of another system, over which all others win; `warpo config ALGORITHM` names them
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Settings in TOML; `warpo config ALGORITHM` prints all of them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The model's folder, or its name on the Hub, from which it is downloaded
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
    /// One setting, as in the TOML; may be given again. Each is a flag, too: --learning-rate 1e-5
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

/// An algorithm, and its settings: the defaults, then the preset, then the file, then what the
/// command line says.
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
    let chosen = (&*args.algorithm, args.preset.as_deref());
    let (entry, mut settings, mut section) = settings_of(chosen, args.config.as_deref(), &all)?;
    find_models(&mut settings, &mut *section, super::hub_folder)?;
    fetch_data(&settings)?;
    Ok((entry, settings, section))
}

/// Downloads data of the Hub that is not here.
pub(super) fn fetch_data(settings: &Settings) -> Result<()> {
    let eval = settings.eval_data.iter();
    let all = settings.data.iter().map(|file| &file.path).chain(eval);
    all.map(Path::new).try_for_each(super::fetch::fetch_data)
}

/// Puts folders in place of the names of models: of the Hub's, or of checkpoints, too.
fn find_models(
    settings: &mut Settings,
    section: &mut dyn Section,
    folder: impl Fn(&Path) -> Result<PathBuf>,
) -> Result<()> {
    if !settings.model.is_empty() {
        settings.model = folder(settings.model.as_ref())?.display().to_string();
    }
    if let Some(adapter) = &mut settings.adapter {
        *adapter = folder(adapter.as_ref())?.display().to_string();
    }
    for key in section.keys().iter().filter(|k| k.name.ends_with("_model")) {
        let table = format!("x = {}", key.value).parse::<toml::Table>().unwrap_or_default();
        let given = table.get("x").and_then(|x| x.as_str()).unwrap_or_default();
        if !given.is_empty() {
            let found = folder(given.as_ref())?.display().to_string();
            section.set(key.name, &found.into()).transpose()?;
        }
    }
    Ok(())
}

/// The settings of an algorithm and its preset after those of a file and these pairs of key and
/// value.
pub(super) fn settings_of(
    (name, preset): (&str, Option<&str>),
    config: Option<&Path>,
    pairs: &[String],
) -> Result<(&'static AlgorithmEntry, Settings, Box<dyn Section>)> {
    let entry = algorithm(name)?;
    let (mut settings, mut section) = Settings::of_preset(entry, preset)?;
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
    let (entry, mut settings, mut section) = settings(&args.run)?;
    find_models(&mut settings, &mut *section, super::model_folder)?;
    let dev = Device::from_name(&settings.device, settings.threads)?;
    let dir = args.profiling.on(dev, |dev| {
        settings.validate()?;
        let data: Vec<&str> = settings.data.iter().map(|file| &*file.path).collect();
        super::note(&format!("{}: reads {} for {}", entry.name, data.join(", "), settings.model));
        let mut progress = Progress::new(entry.name);
        let done = train::run_on(dev, entry, &settings, &*section, &mut progress);
        progress.finish();
        done
    })?;
    super::print(&format!("{}\n", dir.display()))
}
