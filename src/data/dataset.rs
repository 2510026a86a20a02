//! Records to the token sequences of a data set.

mod builder;
mod labels;
mod maker;

use std::{borrow::Borrow, ops::Range};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{BadLines, DataPlace, Located, Omission, Tokenizer};
use crate::{digest::hex, error::Result};

use builder::MemoryRows;
pub(super) use builder::{Builder, Built, RowExtras, RowSink};
pub(super) use labels::ExampleRow;
pub use maker::ExampleKind;
pub(super) use maker::{Made, Maker};

/// A text, a side of a pair, a prompt, or a prompt and its continuation: one type from a line of
/// data to the rows of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    pub ids: Vec<u32>,
    /// Positions of the tokens that are predicted, ascending; the first token never is.
    pub predicted: Vec<Range<usize>>,
    pub place: DataPlace,
}

impl Sequence {
    /// Tokens that are predicted.
    pub fn tokens(&self) -> usize {
        self.predicted.iter().map(Range::len).sum()
    }

    /// Tokens before the first that is predicted.
    fn prompt(&self) -> usize {
        self.predicted.first().map_or(self.ids.len(), |r| r.start)
    }

    /// These tokens.
    pub fn opening(&self) -> &[u32] {
        &self.ids[..self.prompt()]
    }

    /// Its prompt with the completion of another, cut at `longest` tokens, which is more than the
    /// prompt has.
    pub fn answered_by(&self, other: &Self, longest: usize) -> Self {
        let (at, from) = (self.prompt(), other.prompt());
        let mut ids = [&self.ids[..at], &other.ids[from..]].concat();
        ids.truncate(longest);
        let moved = |r: &Range<usize>| r.start - from + at..(r.end - from + at).min(ids.len());
        let predicted = other.predicted.iter().map(moved).filter(|r| r.start < r.end).collect();
        Self { ids, predicted, place: self.place.clone() }
    }
}

impl AsRef<[u32]> for Sequence {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

/// The examples of a data set: a text or a prompt is one sequence, a pair is two, side by side, the
/// chosen one first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    pub sequences: Vec<Sequence>,
    /// Margin of each pair: how much better the chosen text is, where people said so; empty without
    /// pairs.
    pub margins: Vec<Option<f64>>,
    /// Whether people called each completion good; empty without judgements.
    pub labels: Vec<bool>,
    pub stats: DatasetStats,
    /// What was cut or dropped, a reason each.
    pub omissions: Vec<Omission>,
    /// Lines of which no example could be made.
    pub bad: BadLines,
}

/// Counts of a data set's records and tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetStats {
    pub examples: usize,
    pub tokens: usize,
    /// Examples that were cut to `max_length`.
    pub truncated: usize,
    /// Examples left out: nothing to learn, or two equal texts.
    pub dropped: usize,
}

impl Dataset {
    /// Sequences of an example.
    pub fn unit(&self) -> usize {
        if self.margins.is_empty() { 1 } else { 2 }
    }

    /// Examples.
    pub fn len(&self) -> usize {
        self.sequences.len() / self.unit()
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub fn example(&self, i: usize) -> &[Sequence] {
        &self.sequences[i * self.unit()..(i + 1) * self.unit()]
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0)
    }

    /// [`digest_of`] all that is learned.
    pub fn digest(&self) -> String {
        let label = |i: usize| self.labels.get(i).copied();
        digest_of(
            &self.sequences,
            self.margins.iter().copied(),
            (0..self.len()).map_while(label),
            std::iter::empty(),
        )
    }
}

/// SHA-256 of all that is learned: tokens, which of them are predicted, margins, labels,
/// and the columns that rewards read, as JSON, if one has some.
pub(super) fn digest_of(
    sequences: impl IntoIterator<Item = impl Borrow<Sequence>>,
    margins: impl ExactSizeIterator<Item = Option<f64>>,
    labels: impl Iterator<Item = bool>,
    columns: impl Iterator<Item = String>,
) -> String {
    let mut hash = Sha256::new();
    let mut bytes = Vec::new();
    let mut part = |numbers: &mut dyn Iterator<Item = u64>| {
        bytes.resize(8, 0);
        numbers.for_each(|n| bytes.extend(n.to_le_bytes()));
        let count = (bytes.len() / 8 - 1) as u64;
        bytes[..8].copy_from_slice(&count.to_le_bytes());
        hash.update(&bytes);
        bytes.clear();
    };
    for s in sequences {
        let Sequence { ids, predicted, .. } = s.borrow();
        part(&mut ids.iter().map(|id| u64::from(*id)));
        part(&mut predicted.iter().map(|r| ((r.start as u64) << 32) | r.end as u64));
    }
    // NaN stands for no margin: data has none.
    part(&mut margins.map(|m| m.unwrap_or(f64::NAN).to_bits()));
    let mut labels = labels.map(u64::from).peekable();
    if labels.peek().is_some() {
        part(&mut labels);
    }
    for text in columns {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hex(hash.finalize())
}

/// Bounds of an example.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest sequence. Texts and completions are cut at the end, prompts at the beginning
    /// (as TRL does: the end of a prompt is nearest to its answer).
    pub max_length: usize,
    pub vocab: usize,
    /// Appended to whole texts and completions, if the data is text.
    pub eos: Option<u32>,
    /// Lines that may be left out because no example can be made of them.
    pub skip_bad: usize,
}

/// Examples of this kind, of records that are in memory.
pub fn examples(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    kind: ExampleKind,
) -> Result<Dataset> {
    let maker = Maker { tokenizer, limits, kind };
    let mut builder = Builder::new(limits, kind, MemoryRows::default());
    for at in records {
        builder.add(maker.make(at))?;
    }
    let (rows, built) = builder.finish()?;
    Ok(rows.dataset(built))
}

/// [`ExampleKind::Texts`] of records that are in memory.
pub fn texts(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    completion_only: bool,
) -> Result<Dataset> {
    examples(records, tokenizer, limits, ExampleKind::Texts { completion_only })
}

/// [`ExampleKind::Pairs`] of records that are in memory.
pub fn pairs(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    seed: u64,
) -> Result<Dataset> {
    examples(records, tokenizer, limits, ExampleKind::Pairs { seed, policy: false })
}

/// [`ExampleKind::Judged`] of records that are in memory.
pub fn judged(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
) -> Result<Dataset> {
    examples(records, tokenizer, limits, ExampleKind::Judged)
}

/// [`ExampleKind::Scored`] of records that are in memory.
pub fn scored(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
) -> Result<Dataset> {
    examples(records, tokenizer, limits, ExampleKind::Scored)
}

/// [`ExampleKind::Prompts`] of records that are in memory.
pub fn prompts(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    tokens: Option<usize>,
) -> Result<Dataset> {
    examples(records, tokenizer, limits, ExampleKind::Prompts { tokens })
}
