//! One error type for the whole library. Every variant says what was wanted and what came.

use std::path::PathBuf;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, with the names and numbers a reader needs to mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An op was given a buffer of the wrong size.
    #[error("{op}: `{arg}` has shape {got:?}, wanted {want:?}")]
    Shape {
        op: &'static str,
        arg: &'static str,
        /// The shape that the other arguments imply.
        want: Vec<usize>,
        /// The shape that came.
        got: Vec<usize>,
    },
    /// A value outside its domain: a token id beyond the vocabulary, a negative temperature.
    #[error("{what}: got {got}, wanted {want}")]
    Value {
        /// What the value is, with the place it came from.
        what: String,
        /// What would have been right.
        want: String,
        got: String,
    },
    /// A configuration key that does not exist or does not parse.
    #[error("config key `{key}`: {message}")]
    Config {
        /// The key as the user wrote it.
        key: String,
        /// What was wanted and what came.
        message: String,
        /// The nearest known key, or another way out.
        hint: Option<String>,
    },
    /// The operating system refused a file operation.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// A verb: "read", "create", "rename".
        doing: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// A line of a data set.
    #[error("{}:{line}: {message}", path.display())]
    Data {
        /// The data file, or `<stdin>`.
        path: PathBuf,
        /// Its line, counted from 1.
        line: usize,
        /// What was wanted and what came.
        message: String,
    },
    /// A model, tokenizer or checkpoint file whose content is wrong.
    #[error("{}: {message}", path.display())]
    File {
        path: PathBuf,
        /// What was wanted and what came.
        message: String,
    },
    /// Neither the memory plan nor the machine has so much.
    #[error("{what} needs {want} bytes, {have} are free")]
    Memory {
        what: &'static str,
        want: usize,
        /// Bytes left of the plan, or of the device.
        have: usize,
    },
    /// NaN, infinity, or a first ratio that is not 1: nothing of the step was kept.
    #[error("step {step} was abandoned: {what} is {value}{}", of(samples, places))]
    BadNumber {
        step: u64,
        /// The tensor or quantity.
        what: String,
        /// The value that was seen.
        value: f64,
        /// Ids of the samples in the step that are affected; empty if all are.
        samples: Vec<u64>,
        /// Data lines that they come from.
        places: Vec<String>,
    },
    /// NaN or infinity where no step is: a model's output.
    #[error("{what} is {value}")]
    NotFinite { what: String, value: f64 },
    /// What scores samples failed, after its retries: nothing of the step was kept.
    #[error("the reward `{reward}` failed at sample {sample}{}: {message}", from(place))]
    Reward {
        /// Its name in the config.
        reward: String,
        /// The first of the samples that it was given.
        sample: u64,
        /// The data line that it comes from.
        place: Option<String>,
        message: String,
    },
    /// A number changed while no step was running, or a repeated computation gave other bits.
    #[error("after step {step} {what} changed by itself: memory or the device is at fault")]
    Corrupt {
        /// The last step whose results were good.
        step: u64,
        what: String,
    },
    /// Another process holds the run's folder.
    #[error("{} is in use by process {pid}", path.display())]
    Locked { path: PathBuf, pid: u32 },
    /// SIGINT or SIGTERM; the state was committed at `step`.
    #[error("interrupted by {signal}; the run is saved at step {step} and resumes from there")]
    Interrupted {
        signal: &'static str,
        /// The last step that is in the checkpoint.
        step: u64,
    },
    /// The device that was asked for is not there.
    #[error("device `{wanted}` is not available: {reason}")]
    Device {
        /// As the user wrote it.
        wanted: String,
        reason: String,
    },
}

/// Names the samples and their lines of data, where they are known.
fn of(samples: &[u64], places: &[String]) -> String {
    match (samples, places) {
        ([], _) => String::new(),
        (_, []) => format!(" (samples {samples:?})"),
        _ => format!(" (samples {samples:?}, from {})", places.join(", ")),
    }
}

/// Names a line of data, where it is known.
fn from(place: &Option<String>) -> String {
    place.as_ref().map_or_else(String::new, |place| format!(" (from {place})"))
}

impl Error {
    /// An argument of `op` that has another shape than it needs.
    pub fn shape(op: &'static str, arg: &'static str, want: &[usize], got: &[usize]) -> Self {
        Self::Shape { op, arg, want: want.to_vec(), got: got.to_vec() }
    }

    /// A value that was not what was wanted.
    pub fn value(
        what: impl Into<String>,
        want: impl Into<String>,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Value { what: what.into(), want: want.into(), got: got.to_string() }
    }

    /// A setting out of range.
    pub fn config(
        key: impl Into<String>,
        want: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        let message = format!("got {got}, wanted {want}");
        Self::Config { key: key.into(), message, hint: None }
    }

    /// A file whose content is wrong.
    pub fn file(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::File { path: path.into(), message: message.into() }
    }

    /// For `map_err`: wraps an I/O error with what was being done to which file.
    pub fn io(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// What to try next, printed under the error as `hint: ...`.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Config { hint, .. } => hint.clone(),
            Self::Locked { .. } => {
                Some("wait for it, stop it, or choose another --out folder".into())
            }
            Self::Memory { .. } => Some(
                "lower `micro_batch_tokens` or the sequence length; of a training run `warpo plan` shows what takes it"
                    .into(),
            ),
            Self::BadNumber { samples, .. } => {
                let look = if samples.is_empty() { "" } else { ", or look at the named samples" };
                Some(format!("the last checkpoint is untouched; lower `learning_rate`{look}"))
            }
            Self::NotFinite { .. } => {
                Some("the weights are finite: what the model computes of them is not".into())
            }
            Self::Corrupt { .. } => Some(
                "the checkpoint before it is verified when it is read: run the same command again, on another machine if it comes back"
                    .into(),
            ),
            Self::Interrupted { .. } => Some("run the same command again to go on".into()),
            _ => None,
        }
    }

    /// The process exit code: 2 bad usage or configuration, 3 no device, 4 a bad number, 5 the
    /// folder is locked, 130 SIGINT, 143 SIGTERM, 1 all else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config { .. } => 2,
            Self::Device { .. } => 3,
            Self::BadNumber { .. } | Self::NotFinite { .. } | Self::Corrupt { .. } => 4,
            Self::Locked { .. } => 5,
            Self::Interrupted { signal: "SIGTERM", .. } => 143,
            Self::Interrupted { .. } => 130,
            _ => 1,
        }
    }
}
