//! Records: the rows of data files, each in one of a few formats.

use std::{path::Path, sync::Arc};

use sha2::{Digest, Sha256};

use super::{chat::ChatText, reward_columns::RowColumns, unique};
use crate::error::{Error, Result};

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

    /// A number that is the same for records of the same texts, messages or ids, whatever people
    /// said of them and whatever white space their JSON has; another with each seed.
    pub fn draw(&self, seed: u64) -> u64 {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        part(&seed.to_le_bytes());
        for text in self.texts() {
            let json = if self.is_chat() { unique::parse(text).ok() } else { None };
            part(json.map_or(text.into(), |json| json.to_string()).as_bytes());
        }
        let ids: [&[u32]; 3] = match self.content() {
            Self::LabelledIds { input_ids, .. } | Self::Ids { input_ids } => [input_ids, &[], &[]],
            Self::CompletionIds { prompt, completion } => [prompt, completion, &[]],
            Self::PreferenceIds { prompt, chosen, rejected, .. } => [prompt, chosen, rejected],
            _ => [&[]; 3],
        };
        ids.iter().for_each(|ids| part(bytemuck::cast_slice(ids)));
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finalize()[..8]);
        u64::from_le_bytes(first)
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

/// Lines that are left out because of what is wrong with them, up to a number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BadLines {
    /// Lines that may still be left out.
    pub left: usize,
    pub count: usize,
    /// What is wrong with the first one.
    first: Option<String>,
}

impl BadLines {
    /// None yet, of at most `most`.
    pub fn up_to(most: usize) -> Self {
        Self { left: most, ..Self::default() }
    }

    /// Leaves a line out, or gives back the error about it: there were as many before, or it is not
    /// about a line.
    pub fn skip(&mut self, error: Error) -> Result<()> {
        if self.left == 0 || !matches!(error, Error::Data { .. }) {
            return Err(error);
        }
        (self.left, self.count) = (self.left - 1, self.count + 1);
        self.first.get_or_insert_with(|| error.to_string());
        Ok(())
    }

    /// What a line gives, or nothing if it is left out.
    pub fn kept<T>(&mut self, made: Result<T>) -> Result<Option<T>> {
        made.map(Some).or_else(|e| self.skip(e).map(|()| None))
    }

    /// Says how many, if there are some, and the first; `done` is what could not be done with them.
    pub fn note(&self, done: &str) -> Option<String> {
        let lines = if self.count == 1 { "1 line".into() } else { format!("{} lines", self.count) };
        let first = self.first.as_ref()?;
        Some(format!("{lines} left out that cannot be {done}; the first: {first}"))
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
