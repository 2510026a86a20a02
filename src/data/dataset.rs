//! Records to the token sequences of a data set.

mod preferences;

use std::{ops::Range, sync::Arc};

use sha2::{Digest, Sha256};

use super::{
    BadLines, DataPlace, Kept, Located, Omission, Record, RowColumns, Tokenizer,
    chat::{self, Chat, ChatText},
};
use crate::{
    digest::hex,
    error::{Error, Result},
};

pub use preferences::{judged, pairs};

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
    /// Columns of each prompt that rewards read; empty without prompts.
    pub columns: Vec<Arc<RowColumns>>,
    pub stats: DatasetStats,
    /// What was cut or dropped, a reason each.
    pub omissions: Vec<Omission>,
    /// Lines of which no example could be made.
    pub bad: BadLines,
}

/// Counts of a data set's records and tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatasetStats {
    pub examples: usize,
    pub tokens: usize,
    /// Examples that were cut to `max_length`.
    pub truncated: usize,
    /// Examples left out: nothing to learn, or two equal texts.
    pub dropped: usize,
}

impl Dataset {
    /// Nothing yet.
    fn within(limits: Limits) -> Self {
        Self { bad: BadLines::up_to(limits.skip_bad), ..Self::default() }
    }

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

    /// Leaves out pairs of which a side predicts no token: a policy has no log-prob of it.
    pub fn keep_predicted(&mut self) {
        let all = std::mem::take(self);
        (self.stats, self.omissions, self.bad) = (all.stats, all.omissions, all.bad);
        let pairs = all.sequences.chunks_exact(2).zip(all.margins);
        for (pair, margin) in pairs {
            if pair.iter().all(|s| s.tokens() > 0) {
                self.sequences.extend_from_slice(pair);
                self.margins.push(margin);
            } else {
                self.stats.examples -= 1;
                self.stats.tokens -= pair.iter().map(|s| s.ids.len()).sum::<usize>();
                self.stats.dropped += 1;
                self.omit("dropped: a side without a completion".into(), &pair[0].place);
            }
        }
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0)
    }

    /// SHA-256 of all that is learned: tokens, which of them are predicted, margins, labels.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        let mut part = |numbers: &mut dyn ExactSizeIterator<Item = u64>| {
            hash.update((numbers.len() as u64).to_le_bytes());
            numbers.for_each(|n| hash.update(n.to_le_bytes()));
        };
        for s in &self.sequences {
            part(&mut s.ids.iter().map(|id| u64::from(*id)));
            part(&mut s.predicted.iter().map(|r| ((r.start as u64) << 32) | r.end as u64));
        }
        // NaN stands for no margin: data has none.
        part(&mut self.margins.iter().map(|m| m.unwrap_or(f64::NAN).to_bits()));
        if !self.labels.is_empty() {
            part(&mut self.labels.iter().map(|good| u64::from(*good)));
        }
        if self.columns.iter().any(|row| !row.is_empty()) {
            for row in &self.columns {
                let text = serde_json::Value::Object((**row).clone()).to_string();
                hash.update((text.len() as u64).to_le_bytes());
                hash.update(text);
            }
        }
        hex(hash.finalize())
    }

    /// Counts an example that is not as the data has it.
    fn omit(&mut self, reason: String, at: &DataPlace) {
        match self.omissions.iter_mut().find(|o| o.reason == reason) {
            Some(same) => same.count += 1,
            None => self.omissions.push(Omission { reason, count: 1, first: at.clone() }),
        }
    }

    /// Adds an example, cut at the end, unless `useless` says why it then teaches nothing.
    fn push<const N: usize>(
        &mut self,
        mut example: [Sequence; N],
        max_length: usize,
        useless: impl FnOnce(&[Sequence; N]) -> Option<&'static str>,
    ) -> bool {
        let long = example.iter().any(|s| s.ids.len() > max_length);
        self.stats.truncated += usize::from(long);
        for s in &mut example {
            s.ids.truncate(max_length);
            s.predicted.iter_mut().for_each(|r| r.end = r.end.min(s.ids.len()));
            s.predicted.retain(|r| r.start < r.end);
        }
        let (useless, at) = (useless(&example), &example[0].place);
        match (useless, long) {
            (Some(why), false) => self.omit(format!("dropped: {why}"), at),
            (Some(why), true) => self.omit(format!("dropped: {why} within max_length"), at),
            (None, true) => self.omit("cut at the end: longer than max_length".into(), at),
            (None, false) => {}
        }
        if useless.is_some() {
            self.stats.dropped += 1;
            return false;
        }
        self.stats.examples += 1;
        self.stats.tokens += example.iter().map(|s| s.ids.len()).sum::<usize>();
        self.sequences.extend(example);
        true
    }
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

/// Makes sequences of records.
#[derive(Clone, Copy)]
struct Maker<'a> {
    tokenizer: Option<&'a Tokenizer>,
    limits: Limits,
}

impl Maker<'_> {
    /// The ids of a text as a model expects its beginning, and not many more than are kept.
    fn start(&self, at: &Located, text: &str, kept: Kept) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer;
        tokenizer
            .ok_or_else(|| at.error("is text, but the model folder has no tokenizer.json"))?
            .encode_start_within(text, self.limits.max_length, kept)
    }

    /// A sequence of these ids, checked.
    fn sequence(
        &self,
        at: &Located,
        ids: Vec<u32>,
        predicted: Vec<Range<usize>>,
    ) -> Result<Sequence> {
        let vocab = self.limits.vocab;
        match ids.iter().find(|id| **id as usize >= vocab) {
            None => Ok(Sequence { ids, predicted, place: at.place.clone() }),
            Some(id) => Err(at.error(format!("has token id {id}, wanted less than {vocab}"))),
        }
    }

    /// A text with EOS, all of it predicted.
    fn whole(&self, at: &Located, text: &str) -> Result<Sequence> {
        let mut ids = self.start(at, text, Kept::First)?;
        ids.extend(self.limits.eos);
        let all = 1..ids.len();
        self.sequence(at, ids, vec![all])
    }

    /// A prompt and its completion with EOS, which is predicted.
    fn completed(&self, at: &Located, prompt: &str, completion: &str) -> Result<Sequence> {
        let mut ids = self.start(at, prompt, Kept::First)?;
        let from = ids.len();
        let room = self.limits.max_length.saturating_sub(from);
        let rest = |t: &Tokenizer| t.encode_continuation_within(completion, room);
        ids.extend(self.tokenizer.map_or(Ok(Vec::new()), rest)?);
        ids.extend(self.limits.eos);
        let end = from.max(1)..ids.len();
        self.sequence(at, ids, vec![end])
    }

    fn completed_ids(&self, at: &Located, prompt: &[u32], completion: &[u32]) -> Result<Sequence> {
        let ids = [prompt, completion].concat();
        let end = prompt.len().max(1)..ids.len();
        self.sequence(at, ids, vec![end])
    }

    /// The tokenizer, which renders conversations.
    fn chats(&self, at: &Located) -> Result<&Tokenizer> {
        self.tokenizer.ok_or_else(|| {
            at.error("is a conversation, but the model folder has no tokenizer.json")
        })
    }

    /// A conversation whose answers from message `from` on are learned. With `ends` it ends where a
    /// sample would.
    fn conversation(&self, at: &Located, chat: &Chat, from: usize, ends: bool) -> Result<Sequence> {
        let made = chat.learned(self.chats(at)?, from, ends).map_err(|e| at.error(e))?;
        self.sequence(at, made.ids, made.learned)
    }

    /// The messages of a record, and how many of them are no answer that is learned.
    fn chat(&self, at: &Located) -> Result<Option<(Chat, usize)>> {
        let read = |text: &ChatText| Chat::read(text).map_err(|e| at.error(e));
        Ok(match at.record.content() {
            Record::Messages(chat) => Some((read(chat)?, 0)),
            Record::ChatCompletion { prompt, completion } => {
                let mut chat = read(prompt)?;
                let from = chat.count();
                chat.extend(chat::messages(completion).map_err(|e| at.error(e))?);
                Some((chat, from))
            }
            Record::ChatPreference { .. } => {
                self.chat_pair(at)?.map(|([chosen, _], n)| (chosen, n))
            }
            _ => None,
        })
    }

    /// Chosen and rejected conversation of a preference, and how many messages they share.
    fn chat_pair(&self, at: &Located) -> Result<Option<([Chat; 2], usize)>> {
        let Record::ChatPreference { prompt, chosen, rejected, .. } = &at.record else {
            return Ok(None);
        };
        let read = |text: &ChatText| Chat::read(text).map_err(|e| at.error(e));
        let sides = [&chosen.messages, rejected];
        if let Some(prompt) = prompt {
            let before = read(prompt)?;
            let side = |text: &String| {
                let own = chat::messages(text).map_err(|e| at.error(e))?;
                Ok(before.followed_by(own))
            };
            let [chosen, rejected] = sides.map(side);
            return Ok(Some(([chosen?, rejected?], before.count())));
        }
        let [chosen, rejected] = sides.map(|text| read(&chosen.with(text)));
        let (chosen, rejected) = (chosen?, rejected?);
        let shared = chosen.shared(&rejected);
        Ok(Some(([chosen, rejected], shared)))
    }

    /// Chosen and rejected text of a preference, and its margin.
    fn pair(&self, at: &Located) -> Result<Option<([Sequence; 2], Option<f64>)>> {
        let (pair, margin) = match &at.record {
            Record::Preference { prompt, chosen, rejected, margin } => {
                let side = |text: &str| self.completed(at, prompt, text);
                ([side(chosen)?, side(rejected)?], margin)
            }
            Record::PreferenceIds { prompt, chosen, rejected, margin } => {
                let side = |ids: &[u32]| self.completed_ids(at, prompt, ids);
                ([side(chosen)?, side(rejected)?], margin)
            }
            Record::ChatPreference { margin, .. } => {
                let Some((sides, from)) = self.chat_pair(at)? else { return Ok(None) };
                let [chosen, rejected] = sides.map(|s| self.conversation(at, &s, from, true));
                ([chosen?, rejected?], margin)
            }
            _ => return Ok(None),
        };
        Ok(Some((pair, *margin)))
    }

    /// The ids before the answer to the last message that a record has for a prompt.
    fn chat_prompt(&self, at: &Located) -> Result<Option<Vec<u32>>> {
        let read = |text: &ChatText| Chat::read(text).map_err(|e| at.error(e));
        let chat = match at.record.content() {
            Record::ChatPrompt(prompt) | Record::ChatCompletion { prompt, .. } => read(prompt)?,
            Record::Messages(chat) => read(chat)?.without_answer(),
            Record::ChatPreference { prompt: Some(prompt), .. } => read(prompt)?,
            Record::ChatPreference { .. } => match self.chat_pair(at)? {
                Some(([chosen, _], shared)) => chosen.first(shared),
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        chat.prompt(self.chats(at)?).map(Some).map_err(|e| at.error(e))
    }

    /// The sequence of a record that has one; the chosen one of a preference. Without
    /// `completion_only` prompts are predicted, too.
    fn text(&self, at: &Located, completion_only: bool) -> Result<Sequence> {
        if let Some((chat, from)) = self.chat(at)? {
            let mut s = self.conversation(at, &chat, from, false)?;
            if !completion_only {
                let all = 1..s.ids.len();
                s.predicted = vec![all];
            }
            return Ok(s);
        }
        let mut s = match at.record.content() {
            Record::Text { text } | Record::Labelled { text, .. } => self.whole(at, text)?,
            Record::Completion { prompt, completion }
            | Record::Preference { prompt, chosen: completion, .. } => {
                self.completed(at, prompt, completion)?
            }
            Record::CompletionIds { prompt, completion } => {
                self.completed_ids(at, prompt, completion)?
            }
            Record::LabelledIds { input_ids, learn } => {
                let runs = learn.iter().enumerate().skip(1).filter(|l| *l.1).map(|l| l.0..l.0 + 1);
                return self.sequence(at, input_ids.clone(), runs.collect());
            }
            Record::Ids { input_ids } => self.completed_ids(at, &[], input_ids)?,
            _ => return Err(unfit(at, "texts to learn")),
        };
        if !completion_only {
            s.predicted.iter_mut().for_each(|r| r.start = 1);
        }
        Ok(s)
    }

    /// The texts of a record that are scored.
    fn scored(&self, at: &Located) -> Result<Vec<Sequence>> {
        let texts = match (&at.record, self.pair(at)?) {
            (_, Some((pair, _))) => pair.to_vec(),
            (Record::Prompt { prompt }, _) => {
                let ids = self.start(at, prompt, Kept::First)?;
                vec![self.completed_ids(at, &[], &ids)?]
            }
            (Record::ChatPrompt(_), _) => {
                let ids = self.chat_prompt(at)?.unwrap_or_default();
                vec![self.completed_ids(at, &[], &ids)?]
            }
            _ if at.record.is_chat() => {
                let chat = self.chat(at)?;
                let one = chat.map(|(chat, from)| self.conversation(at, &chat, from, true));
                one.transpose()?.into_iter().collect()
            }
            _ => vec![self.text(at, true)?],
        };
        match texts.iter().any(|s| s.ids.is_empty()) {
            true => Err(at.error("has no tokens, wanted at least one")),
            false => Ok(texts),
        }
    }

    /// The prompt of a record, whole; of ids and texts the first `tokens` tokens.
    fn asked(&self, at: &Located, tokens: Option<usize>) -> Result<Sequence> {
        let limits = self.limits;
        let ids = match at.record.content() {
            _ if at.record.is_chat() => self.chat_prompt(at)?.unwrap_or_default(),
            Record::Prompt { prompt }
            | Record::Completion { prompt, .. }
            | Record::Preference { prompt, .. } => self.start(at, prompt, Kept::Last)?,
            Record::PreferenceIds { prompt, .. } | Record::CompletionIds { prompt, .. } => {
                prompt.clone()
            }
            Record::Ids { input_ids } => cut(input_ids.clone(), tokens),
            // The prompt ends where learning begins.
            Record::LabelledIds { input_ids, learn }
                if tokens.is_some() || learn.first() == Some(&false) =>
            {
                let learned = learn.iter().position(|l| *l).filter(|n| *n > 0);
                cut(input_ids.clone(), learned.or(tokens))
            }
            Record::Text { text } | Record::Labelled { text, .. } if tokens.is_some() => {
                let first = tokens.filter(|n| *n < usize::MAX);
                let kept = if first.is_some() { Kept::First } else { Kept::Last };
                let limits = Limits { max_length: first.unwrap_or(limits.max_length), ..limits };
                cut(Maker { limits, ..*self }.start(at, text, kept)?, tokens)
            }
            _ => return Err(unfit(at, "prompts (or `prompt_tokens` to cut them from texts)")),
        };
        self.sequence(at, ids, Vec::new())
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
) -> Result<Dataset> {
    let (maker, mut out) = (Maker { tokenizer, limits }, Dataset::within(limits));
    for at in records {
        let made = match at.record {
            Record::Judged { .. } => {
                Err(at.error("has `label` beside a completion: what is bad would be learned"))
            }
            _ => maker.text(at, completion_only),
        };
        let Some(text) = out.bad.kept(made)? else { continue };
        let useless = |[s]: &[Sequence; 1]| s.predicted.is_empty().then_some("nothing to learn");
        out.push([text], limits.max_length, useless);
    }
    Ok(out)
}

/// Texts to score: one for each record, its prompt not scored; two, chosen and rejected, for each
/// preference.
pub fn scored(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
) -> Result<Dataset> {
    let (maker, mut out) = (Maker { tokenizer, limits }, Dataset::within(limits));
    for at in records {
        for text in out.bad.kept(maker.scored(at))?.unwrap_or_default() {
            out.push([text], limits.max_length, |_| None);
        }
    }
    Ok(out)
}

/// Prompts: `prompt` of any record that has one, as it is; ids before the first that is learned;
/// other ids or texts, of which the first `tokens` tokens are the prompt (all: `usize::MAX`).
pub fn prompts(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    tokens: Option<usize>,
) -> Result<Dataset> {
    let (maker, mut out) = (Maker { tokenizer, limits }, Dataset::within(limits));
    for at in records {
        let Some(mut prompt) = out.bad.kept(maker.asked(at, tokens))? else { continue };
        let surplus = prompt.ids.len().saturating_sub(limits.max_length);
        if surplus > 0 {
            out.stats.truncated += 1;
            out.omit("cut at the beginning: longer than max_length".into(), &prompt.place);
        }
        // A model that expects BOS has it at the beginning of a prompt that was cut, too.
        let bos = tokenizer.and_then(|t| t.bos().filter(|_| t.adds_bos()));
        let begins = bos.is_some() && prompt.ids.first().copied() == bos;
        let begins = usize::from(begins).min(limits.max_length);
        prompt.ids.drain(begins..begins + surplus);
        if out.push([prompt], limits.max_length, |[s]| s.ids.is_empty().then_some("no tokens")) {
            out.columns.push(at.columns.clone());
        }
    }
    Ok(out)
}

fn cut(mut ids: Vec<u32>, tokens: Option<usize>) -> Vec<u32> {
    ids.truncate(tokens.unwrap_or(usize::MAX));
    ids
}
