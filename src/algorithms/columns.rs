//! What losses see: per-token columns of a step, packed, without padding.

use std::ops::Range;

use crate::device::Float;

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
    /// Log-prob when the token was sampled.
    pub old_logp: Vec<F>,
    /// Log-prob under the reference model.
    pub ref_logp: Vec<F>,
    /// Value before each token, when it was sampled.
    pub old_values: Vec<F>,
    /// Reward of each token: KL penalty and score.
    pub rewards: Vec<F>,
    /// Advantage of each token.
    pub advantages: Vec<F>,
    /// What the value model should have said.
    pub returns: Vec<F>,
    /// Score of each sequence by the reward model.
    pub scores: Vec<F>,
    /// Whether each sequence ended by itself.
    pub stopped: Vec<bool>,
    /// Margin of each pair.
    pub margins: Vec<F>,
}

impl<F: Float> Columns<F> {
    /// Sequences.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Predicted tokens of all sequences.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.offsets.last().map_or(0, |n| *n as usize)
    }

    /// Tokens of some consecutive sequences.
    #[must_use]
    pub fn span(&self, sequences: &Range<usize>) -> Range<usize> {
        self.offsets[sequences.start] as usize..self.offsets[sequences.end] as usize
    }

    /// The sequence that holds a token.
    #[must_use]
    pub fn sequence_of(&self, token: usize) -> usize {
        self.offsets.partition_point(|o| *o as usize <= token).saturating_sub(1)
    }

    /// The chosen sequences, in the given order: a minibatch.
    #[must_use]
    pub fn subset(&self, order: &[usize]) -> Self {
        let mut out = Self { offsets: vec![0], ..Self::default() };
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
        }
        out
    }
}

/// A micro-batch: consecutive sequences of a step's or minibatch's [`Columns`].
#[derive(Clone, Debug)]
pub struct Micro<'a, F> {
    /// The columns of the whole minibatch.
    pub columns: &'a Columns<F>,
    /// Sequences of this micro-batch.
    pub sequences: Range<usize>,
}

impl<F: Float> Micro<'_, F> {
    /// Its tokens, as a range of the columns.
    #[must_use]
    pub fn tokens(&self) -> Range<usize> {
        self.columns.span(&self.sequences)
    }

    /// Offsets of its sequences, from 0.
    #[must_use]
    pub fn offsets(&self) -> Vec<u32> {
        let all = &self.columns.offsets[self.sequences.start..=self.sequences.end];
        all.iter().map(|o| o - all[0]).collect()
    }
}
