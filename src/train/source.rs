//! The source of a step's sequences: a data set's texts or pairs as they are, or prompts that the
//! policy continues first.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::{data_file::DataFile, mixture::SourceRows, settings::Settings};
use crate::{
    algorithms::{Columns, Inputs, Needs},
    data::{
        self, ColumnsRead, Dataset, DrawOrder, FolderPart, Limits, RowColumns, Sequence, Tokenizer,
    },
    digest::hex,
    error::{Error, Result},
    rollout::{Completion, Prompt, rewards::RewardInput},
};

/// A data set, and how steps draw from it.
#[derive(Clone, Debug)]
pub struct Source {
    pub data: Dataset,
    order: DrawOrder,
    /// Examples of a step.
    draws: usize,
    /// Samples of each prompt; 1 for texts and pairs.
    copies: usize,
    /// It is made of conversations.
    pub is_chat: bool,
    /// Prompts are scored with the completions of others, too.
    mismatches: bool,
    /// Heads read every predicted token, not the last one of a sequence.
    by_token: bool,
    /// What a user should know of the data.
    pub warnings: Vec<String>,
    /// What an epoch draws of each file, if that is not each example once.
    pub weights: Option<String>,
    /// Lines that are left out because they cannot be read or learned.
    pub skipped: usize,
}

/// The sequences of a step, and the columns of their tokens.
#[derive(Clone, Debug, Default)]
pub struct StepData {
    pub sequences: Vec<Sequence>,
    pub columns: Columns<f32>,
    /// Each prompt with the completion before it, where a KL is estimated with these.
    pub mismatched: Vec<Sequence>,
    /// Of each sequence, the columns of its row that rewards read.
    pub rows: Vec<Arc<RowColumns>>,
    /// Scores of each sequence by each of the rewards, by the name of its metric.
    pub parts: Vec<(&'static str, Vec<f64>)>,
}

impl Source {
    /// Loads the examples of data files, without columns for rewards.
    pub fn load(
        files: &[DataFile],
        needs: &Needs,
        tokenizer: Option<&Tokenizer>,
        limits: Limits,
        s: &Settings,
    ) -> Result<Self> {
        let chats = tokenizer.is_some_and(|t| t.template().is_ok());
        let rows = SourceRows::read(files, FolderPart::Training, chats, &ColumnsRead::None, s)?;
        Self::of(&rows, needs, tokenizer, limits, s)
    }

    /// The examples of rows that were read.
    pub fn of(
        from: &SourceRows,
        needs: &Needs,
        tokenizer: Option<&Tokenizer>,
        limits: Limits,
        s: &Settings,
    ) -> Result<Self> {
        let (records, limits) = (&from.rows, Limits { skip_bad: from.skip_bad, ..limits });
        let mut data = match needs.inputs {
            Inputs::Texts { completion_only } => {
                data::texts(records, tokenizer, limits, completion_only)?
            }
            Inputs::Pairs => data::pairs(records, tokenizer, limits, s.seed)?,
            Inputs::Judged => data::judged(records, tokenizer, limits)?,
            Inputs::Prompts(_) => data::prompts(records, tokenizer, limits, s.prompt_tokens)?,
        };
        if needs.inputs == Inputs::Pairs && needs.policy {
            data.keep_predicted();
        }
        if data.is_empty() {
            let why =
                data.omissions.iter().map(ToString::to_string).chain(data.bad.note("learned"));
            let why: Vec<String> = why.collect();
            let got = format!("{} records, all dropped: {}", records.len(), why.join("; "));
            return Err(Error::value(&from.names, "at least one example", got));
        }
        let with_margin = data.margins.iter().position(Option::is_some).filter(|_| !needs.margins);
        if let Some(i) = with_margin {
            let place = &data.example(i)[0].place;
            return Err(place.error("has a `margin`, which this loss does not read: take it out"));
        }
        let copies = needs.sampling().map_or(1, |s| s.samples_per_prompt);
        let mut warnings = from.notes.clone();
        warnings.extend(data.bad.note("learned"));
        warnings.extend(tokenizer.and_then(|t| spelled(t, records)));
        warnings.extend(data.omissions.iter().map(ToString::to_string));
        let draws = s.batch_size / copies;
        // A text twice in a step counts twice; a prompt has other samples each time.
        let order = match from.groups(&data) {
            Some(groups) => DrawOrder::weighted(groups, s.seed, s.shuffle),
            None => DrawOrder::new(data.len(), s.seed, s.shuffle),
        };
        let draws = if needs.sampling().is_none() { draws.min(order.len()) } else { draws };
        if needs.mismatched_kl && draws < 2 {
            let want = "2 or more: the KL is that of a prompt with the completion of another";
            return Err(Error::config("batch_size", want, draws));
        }
        Ok(Self {
            weights: Some(from.weights(order.groups())).filter(|_| !order.groups().is_empty()),
            order,
            draws,
            copies,
            skipped: from.skipped + data.bad.count,
            warnings,
            is_chat: from.has_chats(),
            mismatches: needs.mismatched_kl,
            by_token: needs.policy,
            data,
        })
    }

    /// Examples of a step.
    pub fn draws(&self) -> usize {
        self.draws
    }

    /// Draws of an epoch.
    pub fn epoch(&self) -> usize {
        self.order.len()
    }

    /// SHA-256 of all that is learned, and of how often.
    pub fn digest(&self) -> String {
        let data = self.data.digest();
        if self.order.groups().is_empty() {
            return data;
        }
        let mut hash = Sha256::new();
        hash.update(data);
        for group in self.order.groups() {
            let all = [group.draws, group.examples.len()].into_iter().chain(group.examples.clone());
            all.for_each(|n| hash.update((n as u64).to_le_bytes()));
        }
        hex(hash.finalize())
    }

    /// The sequences of a step, counted from 0. Those of prompts are to be continued.
    pub fn draw(&mut self, step: u64) -> StepData {
        let chosen = self.order.batch(step, self.draws);
        let mut data = self.examples(&chosen);
        let base = step * data.sequences.len() as u64;
        data.columns.samples = (base..).take(data.sequences.len()).collect();
        data
    }

    /// All examples.
    pub fn all(&self) -> StepData {
        self.examples(&(0..self.data.len()).collect::<Vec<_>>())
    }

    fn examples(&self, chosen: &[usize]) -> StepData {
        let copies = chosen.iter().flat_map(|i| std::iter::repeat_n(*i, self.copies));
        let sequences: Vec<_> = copies.flat_map(|i| self.data.example(i)).cloned().collect();
        let mut columns = Columns::default();
        let margin = |i: &usize| self.data.margins.get(*i).copied().flatten();
        // A pair without a margin has margin 0 beside one that has it.
        if chosen.iter().any(|i| margin(i).is_some()) {
            columns.margins = chosen.iter().map(|i| margin(i).unwrap_or(0.0) as f32).collect();
        }
        if !self.data.labels.is_empty() {
            let label = |i: &usize| f32::from(u8::from(self.data.labels[*i]));
            columns.labels = chosen.iter().map(label).collect();
        }
        let longest = if self.mismatches { self.data.longest() } else { 0 };
        // The completion before it that is of another prompt; the one before it if all are of one.
        let mismatch = |i: usize| {
            let own = &sequences[i];
            let mut before = sequences[..i].iter().rev().chain(sequences[i + 1..].iter().rev());
            let last = before.clone().next();
            let other = before.find(|other| other.opening() != own.opening()).or(last);
            other.map(|other| own.answered_by(other, longest))
        };
        let all = if self.mismatches { 0..sequences.len() } else { 0..0 };
        let mismatched = all.filter_map(mismatch).collect();
        let of = |i: &usize| self.data.columns.get(*i).cloned();
        let rows = chosen.iter().filter_map(of);
        let rows = rows.flat_map(|row| std::iter::repeat_n(row, self.copies)).collect();
        let mut data = StepData { sequences, columns, mismatched, rows, parts: Vec::new() };
        data.lay_out(self.by_token);
        data
    }
}

/// Marks of chat templates, for tokenizers that do not have them as special tokens.
const MARKS: [&str; 6] = [
    "<|im_start|>",
    "[INST]",
    "<start_of_turn>",
    "<|start_header_id|>",
    "<|user|>",
    "<|assistant|>",
];

/// Says how many texts spell a special token, as texts to which a template was applied do.
fn spelled(tokenizer: &Tokenizer, records: &[data::Located]) -> Option<String> {
    let in_text = |text: &str, is_chat: bool| {
        let mark = || MARKS.iter().find(|mark| !is_chat && text.contains(**mark)).copied();
        tokenizer.special_in(text, is_chat).or_else(mark).map(str::to_owned)
    };
    let token = |at: &data::Located| -> Option<String> {
        match at.record.is_chat() {
            false => at.record.texts().find_map(|text| in_text(text, false)),
            true => at.record.texts().find_map(|json| {
                data::chat_texts(json).iter().find_map(|text| in_text(text, true))
            }),
        }
    };
    let mut all = records.iter().filter_map(|at| Some((token(at)?, at)));
    let (token, at) = all.next()?;
    let (n, place) = (1 + all.count(), &at.place);
    let instead = if at.record.is_chat() { "" } else { "; give conversations as `messages`" };
    Some(format!(
        "{n} texts spell special tokens or marks of chat templates ({place}: {token}), which are \
         read as characters{instead}"
    ))
}

impl StepData {
    /// Says where each sequence's numbers stand in a column: one for each predicted token, or one
    /// for the sequence. Every token weighs the same.
    fn lay_out(&mut self, by_token: bool) {
        let c = &mut self.columns;
        c.offsets = vec![0];
        let mut end = 0;
        for s in &self.sequences {
            end += if by_token { s.tokens() } else { 1 };
            c.offsets.push(end as u32);
        }
        c.weights = vec![1.0; if by_token { end } else { 0 }];
    }

    /// The prompts of the samples of a step.
    pub fn prompts(&self) -> Vec<Prompt> {
        let all = self.sequences.iter().zip(&self.columns.samples);
        all.map(|(s, sample)| Prompt { sample: *sample, ids: s.ids.clone() }).collect()
    }

    /// A finished sample as rewards see it. A token that ended it is no text.
    pub fn reward_input(
        &self,
        at: usize,
        ids: &[u32],
        stopped: bool,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<RewardInput> {
        let prompt = &self.sequences[at].ids;
        let text = &ids[..ids.len() - usize::from(stopped)];
        let text = tokenizer.map(|t| Ok((t.decode(prompt)?, t.decode_continuation(prompt, text)?)));
        let (prompt, completion) = text.unwrap_or_else(|| Ok(Default::default()))?;
        let (id, columns) = (self.columns.samples[at], self.rows[at].clone());
        Ok(RewardInput { id, prompt, completion, tokens: ids.len(), columns })
    }

    /// Continues the prompts with what the policy sampled.
    pub fn continue_with(&mut self, completions: Vec<Completion<f32>>) {
        for (s, c) in self.sequences.iter_mut().zip(completions) {
            let from = s.ids.len();
            s.ids.extend(c.ids);
            let new = from..s.ids.len();
            s.predicted = vec![new];
            self.columns.old_logp.extend(c.logprobs);
            self.columns.stopped.push(c.stopped);
        }
        self.lay_out(true);
    }

    /// The chosen examples of `unit` sequences each, in the given order.
    pub fn subset(&self, chosen: &[usize], unit: usize) -> Self {
        let chosen: Vec<usize> = chosen.iter().flat_map(|i| i * unit..(i + 1) * unit).collect();
        let sequences = chosen.iter().map(|i| self.sequences[*i].clone()).collect();
        Self { sequences, columns: self.columns.subset(&chosen), ..Self::default() }
    }

    /// Adds the lines of data that the samples of a bad number come from.
    pub fn locate(&self, mut e: Error) -> Error {
        if let Error::Reward { sample, place, .. } = &mut e {
            let at = self.columns.samples.iter().position(|s| s == sample);
            *place = at.map(|i| self.sequences[i].place.to_string());
        }
        if let Error::BadNumber { samples, places, .. } = &mut e {
            let at = |id: &u64| self.columns.samples.iter().position(|s| s == id);
            let place = |id| at(id).map(|i| self.sequences[i].place.to_string());
            *places = samples.iter().filter_map(place).collect();
        }
        e
    }
}
