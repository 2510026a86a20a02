//! The inputs of losses: per-token columns of a step, packed, without padding.

use std::ops::Range;

use crate::{
    device::{Buffer, Device, Float, Scope, View},
    error::Result,
    ops::sequence_loss::Offsets,
};

/// All sequences of an optimizer step. Per-token columns hold the predicted tokens of all
/// sequences back to back; a column that no loss asked for is empty.
#[derive(Clone, Debug, Default)]
pub struct Columns<F> {
    /// Name of each sequence, for messages.
    pub samples: Vec<u64>,
    /// `[sequences + 1]`: where each sequence's tokens begin.
    pub offsets: Vec<u32>,
    /// Weight of each token in the loss.
    pub weights: Vec<F>,
    /// Log-prob of each token before the step's updates; of a sample, when it was sampled.
    pub old_logp: Vec<F>,
    /// Log-prob under the reference model.
    pub ref_logp: Vec<F>,
    /// Value before each token, when it was sampled.
    pub old_values: Vec<F>,
    /// Reward of each token: KL penalty and score.
    pub rewards: Vec<F>,
    /// Advantage of each token.
    pub advantages: Vec<F>,
    /// Target of the value of each token.
    pub returns: Vec<F>,
    /// Score of each sequence: by the reward model, then the sum of all rewards.
    pub scores: Vec<F>,
    /// Whether each sequence ended by itself.
    pub stopped: Vec<bool>,
    /// Margin of each pair.
    pub margins: Vec<F>,
    /// 1 for each completion that people called good, 0 for a bad one.
    pub labels: Vec<F>,
    /// The mean KL to the reference of prompts with completions of others, in nats a completion.
    pub mismatched_kl: Option<f64>,
}

impl<F: Float> Columns<F> {
    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Predicted tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.offsets.last().map_or(0, |n| *n as usize)
    }

    /// Tokens of some consecutive sequences.
    pub fn span(&self, sequences: &Range<usize>) -> Range<usize> {
        self.offsets[sequences.start] as usize..self.offsets[sequences.end] as usize
    }

    /// The sequence that holds a token.
    pub fn sequence_of(&self, token: usize) -> usize {
        self.offsets.partition_point(|o| *o as usize <= token).saturating_sub(1)
    }

    /// The chosen sequences, in the given order, pairs side by side: a minibatch.
    pub fn subset(&self, order: &[usize]) -> Self {
        let kl = self.mismatched_kl;
        let mut out = Self { offsets: vec![0], mismatched_kl: kl, ..Self::default() };
        for &s in order {
            let t = self.span(&(s..s + 1));
            out.offsets.push(out.offsets.last().unwrap_or(&0) + t.len() as u32);
            for (to, from) in [
                (&mut out.weights, &self.weights),
                (&mut out.old_logp, &self.old_logp),
                (&mut out.ref_logp, &self.ref_logp),
                (&mut out.old_values, &self.old_values),
                (&mut out.rewards, &self.rewards),
                (&mut out.advantages, &self.advantages),
                (&mut out.returns, &self.returns),
            ] {
                if !from.is_empty() {
                    to.extend_from_slice(&from[t.clone()]);
                }
            }
            out.samples.extend(self.samples.get(s));
            out.scores.extend(self.scores.get(s));
            out.stopped.extend(self.stopped.get(s));
            out.labels.extend(self.labels.get(s));
            if s % 2 == 0 {
                out.margins.extend(self.margins.get(s / 2));
            }
        }
        out
    }
}

/// A column that a loss reads on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Column {
    Weights,
    OldLogp,
    RefLogp,
    OldValues,
    Advantages,
    Returns,
    /// One number a pair.
    Margins,
    /// One number a sequence.
    Labels,
}

impl Column {
    const ALL: [Self; 8] = [
        Self::Weights,
        Self::OldLogp,
        Self::RefLogp,
        Self::OldValues,
        Self::Advantages,
        Self::Returns,
        Self::Margins,
        Self::Labels,
    ];
}

/// A micro-batch: consecutive sequences of a step's or minibatch's [`Columns`], and where a device
/// reads its part of them.
#[derive(Debug)]
pub struct MicroBatch<'a, F> {
    /// The columns of the whole minibatch.
    pub columns: &'a Columns<F>,
    /// Sequences of this micro-batch.
    pub sequences: Range<usize>,
    /// Where its sequences begin, from 0.
    offsets: Vec<u32>,
    /// On a CUDA device its part of all columns, one after another, and its offsets.
    staged: Option<(Buffer<'a, F>, Buffer<'a, u32>)>,
}

const STAGED: &str = "columns of a loss";
const STAGED_OFFSETS: &str = "offsets of a loss";

/// Elements at a multiple of which a column begins: a cache line.
const LINE: usize = 16;

impl<'a, F: Float> MicroBatch<'a, F> {
    /// Reads columns in host memory.
    pub fn new(columns: &'a Columns<F>, sequences: Range<usize>) -> Self {
        let all = &columns.offsets[sequences.start..=sequences.end];
        let offsets = all.iter().map(|o| o - all[0]).collect();
        Self { columns, sequences, offsets, staged: None }
    }

    /// Copies the columns to where `dev` reads them.
    pub fn stage(
        dev: &Device,
        scope: &'a Scope<'_>,
        columns: &'a Columns<F>,
        sequences: Range<usize>,
    ) -> Result<Self> {
        let mut micro = Self::new(columns, sequences);
        if let Device::Cuda(_) = dev {
            let mut all = Vec::new();
            for column in Column::ALL {
                all.extend_from_slice(micro.own(column));
                all.resize(all.len().next_multiple_of(LINE), F::ZERO);
            }
            let mut staged = scope.alloc(STAGED, all.len())?;
            dev.write(staged.view_mut(), &all)?;
            let mut offsets = scope.alloc(STAGED_OFFSETS, micro.offsets.len())?;
            dev.write(offsets.view_mut(), &micro.offsets)?;
            micro.staged = Some((staged, offsets));
        }
        Ok(micro)
    }

    /// Allocates what a micro-batch of up to `tokens` tokens of `sequences` sequences does.
    pub fn plan(dev: &Device, scope: &'a Scope<'_>, tokens: usize, sequences: usize) -> Result<()> {
        let Device::Cuda(_) = dev else { return Ok(()) };
        let len = Column::ALL.len() * tokens.next_multiple_of(LINE);
        let _columns = scope.alloc::<F>(STAGED, len)?;
        scope.alloc::<u32>(STAGED_OFFSETS, sequences + 1).map(drop)
    }

    /// Its tokens, as a range of the columns.
    pub fn tokens(&self) -> Range<usize> {
        self.columns.span(&self.sequences)
    }

    /// Its part of a column, in host memory; nothing of an empty column.
    pub fn own(&self, column: Column) -> &[F] {
        let c = self.columns;
        let pairs = self.sequences.start / 2..self.sequences.end / 2;
        let all = match column {
            Column::Weights => &c.weights,
            Column::OldLogp => &c.old_logp,
            Column::RefLogp => &c.ref_logp,
            Column::OldValues => &c.old_values,
            Column::Advantages => &c.advantages,
            Column::Returns => &c.returns,
            Column::Margins => &c.margins,
            Column::Labels => &c.labels,
        };
        let own = match column {
            Column::Margins => pairs,
            Column::Labels => self.sequences.clone(),
            _ => self.tokens(),
        };
        if all.is_empty() { &[] } else { &all[own] }
    }

    /// Its part of a column, where the device reads it.
    pub fn view(&self, column: Column) -> View<'_, F> {
        let Some((staged, _)) = &self.staged else { return self.own(column).into() };
        let before = Column::ALL.into_iter().take_while(|c| *c != column);
        let at = before.map(|c| self.own(c).len().next_multiple_of(LINE)).sum();
        staged.view().range(at..at + self.own(column).len())
    }

    /// Where its sequences begin, from 0.
    pub fn offsets(&self) -> Offsets<'_> {
        let host = &self.offsets[..];
        let view = self.staged.as_ref().map_or(host.into(), |(_, offsets)| offsets.view());
        Offsets { host, view }
    }
}
