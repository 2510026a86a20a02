//! Records: the rows of data files, each in one of a few formats.

use std::{path::Path, sync::Arc};

use super::{chat::ChatText, reward_columns::RowColumns};
use crate::error::Error;

/// One line of a data file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Record {
    /// `text`
    Text { text: String },
    /// `text`, `label`: people's judgement of it, the higher the better
    Labelled { text: String, label: f64 },
    /// `prompt` (or `question`), `completion` (or `response`, `answer`)
    Completion { prompt: String, completion: String },
    /// `prompt`, `chosen`, `rejected`, and `margin` if there is one
    Preference { prompt: String, chosen: String, rejected: String, margin: Option<f64> },
    /// `prompt`
    Prompt { prompt: String },
    /// A completion, and `label`: people's judgement of it, the higher the better
    Judged { completion: Box<Record>, label: f64 },
    /// `input_ids`, `labels`: -100 is not learned
    LabelledIds { input_ids: Vec<u32>, learn: Vec<bool> },
    /// `input_ids`
    Ids { input_ids: Vec<u32> },
    /// `input_ids`, `output_ids`: a prompt and its continuation, as `warpo generate` writes them
    CompletionIds { prompt: Vec<u32>, completion: Vec<u32> },
    /// `prompt_ids`, `chosen_ids`, `rejected_ids`
    PreferenceIds { prompt: Vec<u32>, chosen: Vec<u32>, rejected: Vec<u32>, margin: Option<f64> },
    /// `messages`
    Messages(ChatText),
    /// `prompt` as messages
    ChatPrompt(ChatText),
    /// `prompt` and `completion` as messages; of the completion those alone
    ChatCompletion { prompt: ChatText, completion: String },
    /// `chosen` and `rejected` as messages, behind those of `prompt` if that is there
    ChatPreference {
        prompt: Option<ChatText>,
        chosen: ChatText,
        rejected: String,
        margin: Option<f64>,
    },
}

impl Record {
    /// What was judged, or the record itself.
    pub fn content(&self) -> &Self {
        match self {
            Self::Judged { completion, .. } => completion,
            other => other,
        }
    }

    /// Its texts; those of messages are the JSON texts of their lists.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let texts: [&str; 3] = match self.content() {
            Self::Text { text } | Self::Labelled { text, .. } => [text, "", ""],
            Self::Completion { prompt, completion } => [prompt, completion, ""],
            Self::Preference { prompt, chosen, rejected, .. } => [prompt, chosen, rejected],
            Self::Prompt { prompt } => [prompt, "", ""],
            Self::Messages(chat) | Self::ChatPrompt(chat) => [&chat.messages, "", ""],
            Self::ChatCompletion { prompt, completion } => [&prompt.messages, completion, ""],
            Self::ChatPreference { prompt, chosen, rejected, .. } => {
                [prompt.as_ref().map_or("", |p| &p.messages), &chosen.messages, rejected]
            }
            _ => [""; 3],
        };
        texts.into_iter().filter(|text| !text.is_empty())
    }

    /// Whether it is made of messages, which need a chat template.
    pub fn is_chat(&self) -> bool {
        matches!(
            self.content(),
            Self::Messages(_)
                | Self::ChatPrompt(_)
                | Self::ChatCompletion { .. }
                | Self::ChatPreference { .. }
        )
    }

    /// Its format, for messages.
    pub fn format(&self) -> &'static str {
        match self {
            Self::Text { .. } => "text",
            Self::Labelled { .. } => "text, label",
            Self::Completion { .. } => "prompt, completion",
            Self::Preference { .. } => "prompt, chosen, rejected",
            Self::Prompt { .. } => "prompt",
            Self::Judged { completion, .. } => match &**completion {
                Self::CompletionIds { .. } => "input_ids, output_ids, label",
                Self::ChatCompletion { .. } => "prompt, completion, label (messages)",
                Self::Messages(_) => "messages, label",
                _ => "prompt, completion, label",
            },
            Self::LabelledIds { .. } => "input_ids, labels",
            Self::Ids { .. } => "input_ids",
            Self::CompletionIds { .. } => "input_ids, output_ids",
            Self::PreferenceIds { .. } => "prompt_ids, chosen_ids, rejected_ids",
            Self::Messages(_) => "messages",
            Self::ChatPrompt(_) => "prompt (messages)",
            Self::ChatCompletion { .. } => "prompt, completion (messages)",
            Self::ChatPreference { .. } => "chosen, rejected (messages)",
        }
    }
}

/// A line of a data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataPlace {
    /// The file, or `<stdin>`.
    pub path: Arc<Path>,
    /// Its line, from 1.
    pub line: usize,
}

impl DataPlace {
    /// An error about what stands there.
    pub fn error(&self, message: impl Into<String>) -> Error {
        let Self { path, line } = self;
        Error::Data { path: path.to_path_buf(), line: *line, message: message.into() }
    }
}

impl std::fmt::Display for DataPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

/// A record and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    pub place: DataPlace,
    pub record: Record,
    /// Empty unless rewards read some.
    pub columns: Arc<RowColumns>,
}

impl Located {
    /// An error about this record.
    pub fn error(&self, message: impl Into<String>) -> Error {
        self.place.error(message)
    }
}

/// Examples that were cut or dropped for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Omission {
    /// "cut ..." or "dropped: ...".
    pub reason: String,
    pub count: usize,
    pub first: DataPlace,
}

impl std::fmt::Display for Omission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { reason, count, first } = self;
        match count {
            1 => write!(f, "1 example is {reason} ({first})"),
            n => write!(f, "{n} examples are {reason} (the first: {first})"),
        }
    }
}
