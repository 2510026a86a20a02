//! Records to token sequences: texts to learn, pairs to compare, prompts to continue.

use std::ops::Range;

use super::{Located, Place, Record, Tokenizer};
use crate::{
    error::{Error, Result},
    rng::{Philox, Purpose},
};

/// A text to learn.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    pub ids: Vec<u32>,
    /// Positions of the tokens to learn, ascending; the first token is never learned.
    pub learn: Vec<Range<usize>>,
    /// Where it came from.
    pub place: Place,
}

/// Two texts of which people chose the first.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// Prompt and chosen completion.
    pub chosen: Vec<u32>,
    /// Prompt and rejected completion.
    pub rejected: Vec<u32>,
    /// By how much, if people said so.
    pub margin: Option<f64>,
    /// Where chosen and rejected came from.
    pub places: [Place; 2],
}

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// Its text, for people.
    pub text: String,
    /// Where it came from.
    pub place: Place,
}

/// What bounds an example.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest sequence. Texts and completions are cut at the end, prompts at the beginning
    /// (as TRL does: the end of a prompt is nearest to its answer).
    pub max_length: usize,
    pub vocab: usize,
    /// Appended to whole texts and completions, if the data is text.
    pub eos: Option<u32>,
}

/// What became of a data set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub examples: usize,
    pub tokens: usize,
    /// Examples that were cut to `max_length`.
    pub truncated: usize,
    /// Examples left out: nothing to learn, or two equal texts.
    pub dropped: usize,
}

struct Maker<'a> {
    tokenizer: Option<&'a Tokenizer>,
    limits: Limits,
    stats: Stats,
}

impl Maker<'_> {
    fn tokenizer(&self, at: &Located) -> Result<&Tokenizer> {
        self.tokenizer
            .ok_or_else(|| at.error("is text, but the model folder has no tokenizer.json"))
    }

    fn check(&self, at: &Located, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|id| **id as usize >= self.limits.vocab) {
            None => Ok(()),
            Some(id) => {
                Err(at.error(format!("has token id {id}, wanted less than {}", self.limits.vocab)))
            }
        }
    }

    /// Prompt and completion, the second with EOS, cut at the end.
    fn join(&mut self, at: &Located, prompt: &str, completion: &str) -> Result<(Vec<u32>, usize)> {
        let t = self.tokenizer(at)?;
        let mut ids = t.encode_start(prompt)?;
        let start = ids.len();
        ids.extend(t.encode_continuation(completion)?);
        ids.extend(self.limits.eos);
        Ok((ids, start))
    }

    fn whole(&mut self, at: &Located, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer(at)?.encode_start(text)?;
        ids.extend(self.limits.eos);
        Ok(ids)
    }

    /// The sequence of a record that has one, and what is learned of it.
    fn text(&mut self, at: &Located, completion_only: bool) -> Result<Text> {
        let (ids, learn): (Vec<u32>, Vec<Range<usize>>) = match &at.record {
            Record::Text { text } | Record::Labelled { text, .. } => {
                let ids = self.whole(at, text)?;
                let all = 1..ids.len();
                (ids, vec![all])
            }
            Record::Completion { prompt, completion }
            | Record::Preference { prompt, chosen: completion, .. } => {
                let (ids, start) = self.join(at, prompt, completion)?;
                let from = if completion_only { start.max(1) } else { 1 };
                let learn = from..ids.len();
                (ids, vec![learn])
            }
            Record::CompletionIds { prompt, completion } => {
                let ids = [&prompt[..], completion].concat();
                let from = if completion_only { prompt.len().max(1) } else { 1 };
                let learn = from..ids.len();
                (ids, vec![learn])
            }
            Record::LabelledIds { input_ids, learn } => {
                let runs = learn.iter().enumerate().skip(1).filter(|l| *l.1).map(|l| l.0..l.0 + 1);
                (input_ids.clone(), runs.collect())
            }
            Record::Ids { input_ids } => {
                let all = 1..input_ids.len();
                (input_ids.clone(), vec![all])
            }
            _ => return Err(unfit(at, "one text")),
        };
        self.fit(at, ids, learn)
    }

    /// Checks the ids and cuts the end.
    fn fit(&mut self, at: &Located, mut ids: Vec<u32>, learn: Vec<Range<usize>>) -> Result<Text> {
        self.check(at, &ids)?;
        self.stats.truncated += usize::from(self.cut(&mut ids));
        let clip = |r: Range<usize>| r.start..r.end.min(ids.len());
        let learn = learn.into_iter().map(clip).filter(|r| !r.is_empty()).collect();
        Ok(Text { ids, learn, place: at.place.clone() })
    }

    /// Cuts the end, and says whether it did.
    fn cut(&self, ids: &mut Vec<u32>) -> bool {
        let long = ids.len() > self.limits.max_length;
        ids.truncate(self.limits.max_length);
        long
    }
}

fn unfit(at: &Located, want: &str) -> Error {
    at.error(format!("has columns {}, wanted {want}", at.record.format()))
}

/// Texts to learn: `text` (all of it), `prompt, completion` and the chosen side of preferences
/// (the completion; all of it unless `completion_only`), labelled texts (as text), or ids.
pub fn texts(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    completion_only: bool,
) -> Result<(Vec<Text>, Stats)> {
    let mut m = Maker { tokenizer, limits, stats: Stats::default() };
    let mut out = Vec::with_capacity(records.len());
    for at in records {
        let text = match &at.record {
            Record::Prompt { .. } | Record::PreferenceIds { .. } => {
                return Err(unfit(at, "texts to learn"));
            }
            _ => m.text(at, completion_only)?,
        };
        if text.learn.is_empty() {
            m.stats.dropped += 1;
            continue;
        }
        m.stats.tokens += text.ids.len();
        out.push(text);
    }
    m.stats.examples = out.len();
    Ok((out, m.stats))
}

/// Texts to score: one for each record, its prompt not scored; two, chosen and rejected, for each
/// preference.
pub fn scored(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
) -> Result<(Vec<Text>, Stats)> {
    let mut m = Maker { tokenizer, limits, stats: Stats::default() };
    let mut out = Vec::with_capacity(records.len());
    for at in records {
        let first = out.len();
        match &at.record {
            Record::Prompt { prompt } => {
                let ids = m.tokenizer(at)?.encode_start(prompt)?;
                let all = 1..ids.len();
                out.push(m.fit(at, ids, vec![all])?);
            }
            Record::Preference { prompt, chosen, rejected, .. } => {
                for side in [chosen, rejected] {
                    let (ids, start) = m.join(at, prompt, side)?;
                    let end = start.max(1)..ids.len();
                    out.push(m.fit(at, ids, vec![end])?);
                }
            }
            Record::PreferenceIds { prompt, chosen, rejected, .. } => {
                for side in [chosen, rejected] {
                    let ids = [&prompt[..], side].concat();
                    let end = prompt.len().max(1)..ids.len();
                    out.push(m.fit(at, ids, vec![end])?);
                }
            }
            _ => out.push(m.text(at, true)?),
        }
        if out[first..].iter().any(|t| t.ids.is_empty()) {
            return Err(at.error("has no tokens, wanted at least one"));
        }
    }
    m.stats.tokens = out.iter().map(|t| t.ids.len()).sum();
    m.stats.examples = out.len();
    Ok((out, m.stats))
}

/// Pairs: preferences, or labelled texts, of which every text with the highest label is paired with
/// one of the lowest, drawn with `seed`; each text is used once where the counts allow. Texts with
/// labels between count as dropped.
pub fn pairs(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    seed: u64,
) -> Result<(Vec<Pair>, Stats)> {
    let mut m = Maker { tokenizer, limits, stats: Stats::default() };
    let mut raw = Vec::new();
    let mut labelled: Vec<Labelled> = Vec::new();
    for at in records {
        let (chosen, rejected, margin) = match &at.record {
            Record::Preference { prompt, chosen, rejected, margin } => {
                (m.join(at, prompt, chosen)?.0, m.join(at, prompt, rejected)?.0, *margin)
            }
            Record::PreferenceIds { prompt, chosen, rejected, margin } => {
                let join = |end: &[u32]| [prompt, end].concat();
                (join(chosen), join(rejected), *margin)
            }
            Record::Labelled { text, label } => {
                let ids = m.whole(at, text)?;
                m.check(at, &ids)?;
                labelled.push(Labelled { label: *label, ids, place: at.place.clone() });
                continue;
            }
            _ => return Err(unfit(at, "preferences, or texts with labels")),
        };
        m.check(at, &chosen)?;
        m.check(at, &rejected)?;
        let places = [at.place.clone(), at.place.clone()];
        raw.push(Pair { chosen, rejected, margin, places });
    }
    if !labelled.is_empty() {
        let (low, high) = labelled
            .iter()
            .fold((i64::MAX, i64::MIN), |(low, high), l| (low.min(l.label), high.max(l.label)));
        if low == high {
            return Err(Error::value("labels of all texts", "two or more", format!("only {low}")));
        }
        m.stats.dropped += labelled.iter().filter(|l| l.label != low && l.label != high).count();
        raw.extend(drawn(&labelled, (low, high), seed));
    }
    let mut out = Vec::with_capacity(raw.len());
    for mut pair in raw {
        let long = m.cut(&mut pair.chosen) | m.cut(&mut pair.rejected);
        m.stats.truncated += usize::from(long);
        if pair.chosen == pair.rejected || pair.chosen.is_empty() || pair.rejected.is_empty() {
            m.stats.dropped += 1;
            continue;
        }
        m.stats.tokens += pair.chosen.len() + pair.rejected.len();
        out.push(pair);
    }
    m.stats.examples = out.len();
    Ok((out, m.stats))
}

/// A text that people judged.
struct Labelled {
    label: i64,
    ids: Vec<u32>,
    place: Place,
}

/// Pairs of the highest label against the lowest, both shuffled; the shorter list repeats.
fn drawn(labelled: &[Labelled], (low, high): (i64, i64), seed: u64) -> Vec<Pair> {
    let of = |label: i64, stream: u64| {
        let all: Vec<&Labelled> = labelled.iter().filter(|l| l.label == label).collect();
        let order = Philox::new(seed, 0, stream, Purpose::Pairs).permutation(all.len());
        order.into_iter().map(|i| all[i]).collect::<Vec<_>>()
    };
    let (good, bad) = (of(high, 0), of(low, 1));
    let pair = |i: usize| {
        let (good, bad) = (good[i % good.len()], bad[i % bad.len()]);
        Pair {
            chosen: good.ids.clone(),
            rejected: bad.ids.clone(),
            margin: None,
            places: [good.place.clone(), bad.place.clone()],
        }
    };
    (0..good.len().max(bad.len())).map(pair).collect()
}

/// Prompts: `prompt` of any record that has one, as it is; ids or texts, of which the first
/// `tokens` tokens are the prompt.
pub fn prompts(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    tokens: Option<usize>,
) -> Result<(Vec<Prompt>, Stats)> {
    let mut m = Maker { tokenizer, limits, stats: Stats::default() };
    let mut out = Vec::with_capacity(records.len());
    for at in records {
        let first = tokens.unwrap_or(usize::MAX);
        let mut ids = match &at.record {
            Record::Prompt { prompt }
            | Record::Completion { prompt, .. }
            | Record::Preference { prompt, .. } => m.tokenizer(at)?.encode_start(prompt)?,
            Record::PreferenceIds { prompt, .. } | Record::CompletionIds { prompt, .. } => {
                prompt.clone()
            }
            Record::Ids { input_ids } => input_ids[..first.min(input_ids.len())].to_vec(),
            Record::Text { text } | Record::Labelled { text, .. } if tokens.is_some() => {
                let mut ids = m.tokenizer(at)?.encode_start(text)?;
                ids.truncate(first);
                ids
            }
            _ => return Err(unfit(at, "prompts (or `prompt_tokens` to cut them from texts)")),
        };
        m.check(at, &ids)?;
        if ids.len() > limits.max_length {
            ids.drain(..ids.len() - limits.max_length);
            m.stats.truncated += 1;
        }
        if ids.is_empty() {
            m.stats.dropped += 1;
            continue;
        }
        m.stats.tokens += ids.len();
        let text = m.tokenizer.map_or(Ok(String::new()), |t| t.decode(&ids))?;
        out.push(Prompt { ids, text, place: at.place.clone() });
    }
    m.stats.examples = out.len();
    Ok((out, m.stats))
}
