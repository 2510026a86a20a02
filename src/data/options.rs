//! How rows are read: what their columns are called, and which of them are meant.

use std::collections::BTreeMap;

use super::reward_columns::ColumnsRead;
use crate::error::{Error, Result};

/// How rows are read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReadOptions {
    /// Names of columns in the data, by our own names for them.
    pub columns: BTreeMap<String, String>,
    /// Instructions, and texts with a `system` column, become conversations: the model has a chat
    /// template.
    pub chats: bool,
    /// Lines that may be left out because they cannot be read.
    pub skip_bad: usize,
    /// The files of a folder that are meant.
    pub part: FolderPart,
    /// Columns that are kept as they are, for rewards.
    pub rewards: ColumnsRead,
}

impl ReadOptions {
    /// Reads pairs as `prompt=question`.
    pub fn of_pairs(pairs: &[String], chats: bool) -> Result<Self> {
        let pair = |pair: &String| {
            let (ours, theirs) = pair.split_once('=').ok_or_else(|| {
                Error::config("--column", "a name of ours, =, and that in the data", pair)
            })?;
            Ok((ours.trim().to_owned(), theirs.trim().to_owned()))
        };
        let columns = pairs.iter().map(pair).collect::<Result<_>>()?;
        Ok(Self { columns, chats, ..Self::default() })
    }

    /// Checks that our names are names of ours.
    pub fn validate(&self) -> Result<()> {
        match self.columns.keys().find(|ours| !COLUMNS.contains(&&***ours)) {
            Some(other) => Err(Error::config("columns", format!("one of {COLUMNS:?}"), other)),
            None => Ok(()),
        }
    }

    /// Which of our columns a column of the data is, if it is one.
    pub(super) fn column(&self, name: &str) -> Option<&'static str> {
        let ours = self.ours(name);
        let is_free = ours != name || !self.columns.contains_key(name);
        COLUMNS.into_iter().find(|c| is_free && *c == ours)
    }

    /// Whether records are made of a column of the data.
    pub fn reads(&self, name: &str) -> bool {
        self.column(name).is_some()
    }

    /// Our name of a column of the data.
    pub fn ours<'a>(&'a self, name: &'a str) -> &'a str {
        self.columns.iter().find(|(_, theirs)| *theirs == name).map_or(name, |(ours, _)| ours)
    }
}

/// Which files of a folder are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FolderPart {
    /// All of them.
    #[default]
    All,
    /// All but those whose names begin with test, validation, valid, val, dev, eval or heldout.
    Training,
    /// These alone, if there are some.
    HeldOut,
}

/// What records are made of.
const COLUMNS: [&str; 26] = [
    "text",
    "label",
    "prompt",
    "question",
    "instruction",
    "input",
    "context",
    "output",
    "system",
    "history",
    "completion",
    "response",
    "answer",
    "chosen",
    "rejected",
    "margin",
    "input_ids",
    "output_ids",
    "labels",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "messages",
    "conversations",
    "tools",
    "chat_template_kwargs",
];
