//! The command line: one file a command.

mod best_of;
mod chat;
mod config;
mod doctor;
mod export;
mod fetch;
mod flags;
mod generate;
mod plan;
mod profile;
mod progress;
mod quickstart;
mod report;
mod rows;
mod score;
mod tokenize;
mod train;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{CommandFactory, Parser, Subcommand};

use crate::{
    algorithms::ALGORITHMS,
    data::{ReadOptions, cache},
    device::Device,
    error::{Error, Result},
    hub,
    models::{self, AdapterConfig, Config},
    train as runs,
};

/// Train language models from human feedback: SFT, reward models and PPO in one process.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 no such device, 4 a bad number \
stopped the step, 5 the run's folder is in use, 130 SIGINT and 143 SIGTERM (a run that has begun is saved).

Examples:
  warpo quickstart
  warpo config ppo > ppo.toml
  warpo train sft --model DIR --data texts.jsonl --out run --learning-rate 1e-5
  echo '{\"prompt\": \"Once upon\"}' | warpo generate --model DIR --data -";

#[derive(Debug, Subcommand)]
enum Command {
    Train(train::TrainArgs),
    Plan(plan::PlanArgs),
    Generate(generate::GenerateArgs),
    Score(score::ScoreArgs),
    Tokenize(tokenize::TokenizeArgs),
    Chat(chat::ChatArgs),
    Export(export::ExportArgs),
    Config(config::ConfigArgs),
    Report(report::ReportArgs),
    Quickstart(quickstart::QuickstartArgs),
    Doctor(doctor::DoctorArgs),
}

/// Runs the command of this process.
pub fn run() -> ExitCode {
    cache::keep();
    let args = flags::as_settings(&Cli::command(), std::env::args_os());
    let done = match Cli::parse_from(args).command {
        Command::Train(args) => train::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Quickstart(args) => quickstart::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Prints an error and what to do about it. A reader that went away (`| head`) is no error.
fn fail(error: &Error) -> ExitCode {
    if let Error::Io { source, .. } = error
        && source.kind() == std::io::ErrorKind::BrokenPipe
    {
        return ExitCode::SUCCESS;
    }
    note(&format!("error: {error}"));
    if let Some(hint) = error.hint() {
        note(&format!("hint: {hint}"));
    }
    ExitCode::from(error.exit_code())
}

/// The device to compute on.
#[derive(Debug, clap::Args)]
struct DeviceArgs {
    /// auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads of the CPU device; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    profiling: profile::Profiling,
}

/// How rows of data are read.
#[derive(Debug, clap::Args)]
struct RowArgs {
    /// What a column is called in the data, as prompt=question; may be given again
    #[arg(long, value_name = "OURS=THEIRS")]
    column: Vec<String>,
    /// Leave out up to so many lines that cannot be read
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip_bad: usize,
}

impl RowArgs {
    fn options(&self, chats: bool) -> Result<ReadOptions> {
        let options = ReadOptions::of_pairs(&self.column, chats)?;
        Ok(ReadOptions { skip_bad: self.skip_bad, ..options })
    }
}

impl DeviceArgs {
    /// Runs `work` there.
    fn run<R>(&self, work: impl FnOnce(&Device) -> Result<R>) -> Result<R> {
        self.profiling.on(Device::from_name(&self.device, self.threads)?, work)
    }
}

/// The names of all algorithms, for help.
fn algorithms() -> String {
    let names: Vec<&str> = ALGORITHMS.iter().map(|e| e.name).collect();
    names.join(", ")
}

/// The folder of a model that a user means: as it is given, a name of the Hub's, which is
/// downloaded if it is not here, or a checkpoint, of which one is made.
fn model_folder(given: &Path) -> Result<PathBuf> {
    runs::model_folder(&hub_folder(given)?, note)
}

/// The config of a model in such a folder, with the adapter that a user means.
fn model_config(dir: &Path, adapter: Option<&PathBuf>) -> Result<Config> {
    let config = Config::read(dir)?;
    match adapter {
        Some(given) => config.with_adapter(AdapterConfig::read(&model_folder(given)?)?),
        None => Ok(config),
    }
}

/// The folder of the tokenizer of a model, perhaps with an adapter on it.
fn text_folder(dir: &Path, adapter: Option<&PathBuf>) -> Result<PathBuf> {
    let adapter = adapter.map(|given| model_folder(given)).transpose()?;
    models::text_folder(dir, adapter.as_deref())
}

/// The same without a checkpoint.
fn hub_folder(given: &Path) -> Result<PathBuf> {
    if runs::is_of_checkpoint(given) {
        return Ok(given.to_owned());
    }
    fetch::fetch_model(given)?;
    let found = hub::model(given)?;
    if AdapterConfig::is_in(&found) {
        fetch::fetch_model(&AdapterConfig::read(&found)?.base()?)?;
    }
    if found != given {
        note(&format!("{} is {}", given.display(), found.display()));
    }
    Ok(found)
}

/// A line on standard error.
fn warn(message: &str) {
    note(&format!("warning: {message}"));
}

/// A line on standard error, which may hold anything.
fn note(line: &str) {
    say(&format!("{}\n", plain(line)));
}

/// Writes our own text to standard error.
fn say(text: &str) {
    // If stderr is gone, there is nobody to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// A text as a terminal may have it: control characters but line breaks become escapes.
fn harmless(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => c.into(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.into(),
    };
    text.chars().map(shown).collect()
}

/// A message as a terminal may have it, whatever a file put into it: control characters become
/// escapes, and a long one loses its middle.
fn plain(text: &str) -> String {
    let count = text.chars().count();
    let shown = |(i, c): (usize, char)| match c {
        _ if count > 1500 && i == 1000 => " [...] ".into(),
        _ if count > 1500 && (1000..count - 400).contains(&i) => String::new(),
        '\n' => c.into(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.into(),
    };
    text.chars().enumerate().map(shown).collect()
}

/// Writes to standard output.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Error::io("write to", "<stdout>"))
}

/// Refuses numbers of a model's that are none; `what` says which the i-th is.
fn finite(numbers: &[f32], what: impl Fn(usize) -> String) -> Result<()> {
    match numbers.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::NotFinite { what: what(i), value: numbers[i].into() }),
    }
}
