//! Records to sequences, each on its own: any thread may make any.

use std::{ops::Range, sync::Arc};

use super::{Limits, Sequence};
use crate::{
    data::{
        Kept, Located, Record, RowColumns, Tokenizer,
        chat::{self, Chat, ChatText},
    },
    error::{Error, Result},
};

/// What examples are made of records.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExampleKind {
    /// Texts to learn: `text` (all of it), `prompt, completion` and the chosen side of preferences
    /// (the completion; all of it unless `completion_only`), labelled texts (as text), or ids.
    Texts { completion_only: bool },
    /// Preferences, or labelled texts, of which every text with the highest label is paired with
    /// one of the lowest, drawn with `seed`; each text is used once where the counts allow. Texts
    /// with labels between count as dropped. Of a `policy` both sides predict a token: it has no
    /// log-prob of none.
    Pairs { seed: u64, policy: bool },
    /// Completions that people judged: with labels, of which the highest is good, the lowest bad,
    /// and those between count as dropped; texts with labels; both sides of preferences.
    Judged,
    /// `prompt` of any record that has one, as it is; ids before the first that is learned; other
    /// ids or texts, of which the first `tokens` tokens are the prompt (all: `usize::MAX`).
    Prompts { tokens: Option<usize> },
    /// Texts to score: one for each record, its prompt not scored; two, chosen and rejected, for
    /// each preference.
    Scored,
}

/// What a record gives.
#[derive(Debug)]
pub(in crate::data) enum Made {
    /// Examples of one sequence each.
    Each(Vec<Sequence>),
    /// Chosen and rejected text, and the margin of their difference.
    Pair([Sequence; 2], Option<f64>),
    /// What people said of a text: labels mean something beside others.
    Labelled(Sequence, f64),
    /// A prompt, whether it lost its beginning, and what rewards read of its row.
    Prompt { prompt: Sequence, is_cut: bool, columns: Arc<RowColumns> },
}

/// Makes sequences of records.
#[derive(Clone, Copy)]
pub(in crate::data) struct Maker<'a> {
    pub tokenizer: Option<&'a Tokenizer>,
    pub limits: Limits,
    pub kind: ExampleKind,
}

impl Maker<'_> {
    /// What a record gives.
    pub fn make(&self, at: &Located) -> Result<Made> {
        match (self.kind, &at.record) {
            (ExampleKind::Texts { .. }, Record::Judged { .. }) => {
                Err(at.error("has `label` beside a completion: what is bad would be learned"))
            }
            (ExampleKind::Texts { completion_only }, _) => {
                Ok(Made::Each(vec![self.text(at, completion_only)?]))
            }
            (ExampleKind::Prompts { tokens }, _) => self.prompt(at, tokens),
            (ExampleKind::Scored, _) => Ok(Made::Each(self.scored(at)?)),
            (kind, record) => match (self.pair(at)?, record) {
                (Some((pair, margin)), _) => Ok(Made::Pair(pair, margin)),
                (None, Record::Labelled { text, label }) => {
                    Ok(Made::Labelled(self.whole(at, text)?, *label))
                }
                (None, Record::Judged { label, .. }) if kind == ExampleKind::Judged => {
                    Ok(Made::Labelled(self.text(at, true)?, *label))
                }
                _ if kind == ExampleKind::Judged => {
                    Err(unfit(at, "completions or texts with labels, or preferences"))
                }
                _ => Err(unfit(at, "preferences, or texts with labels")),
            },
        }
    }

    /// A prompt, of which the end is kept. A model that expects BOS has it at the beginning of a
    /// prompt that was cut, too.
    fn prompt(&self, at: &Located, tokens: Option<usize>) -> Result<Made> {
        let mut prompt = self.asked(at, tokens)?;
        let (ids, room) = (&mut prompt.ids, self.limits.max_length);
        let surplus = ids.len().saturating_sub(room);
        let bos = self.tokenizer.and_then(|t| t.bos().filter(|_| t.adds_bos()));
        let begins = usize::from(bos.is_some() && ids.first().copied() == bos).min(room);
        ids.drain(begins..begins + surplus);
        Ok(Made::Prompt { prompt, is_cut: surplus > 0, columns: at.columns.clone() })
    }

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

fn cut(mut ids: Vec<u32>, tokens: Option<usize>) -> Vec<u32> {
    ids.truncate(tokens.unwrap_or(usize::MAX));
    ids
}
