//! Log-probs, values and rewards of given sequences.

use std::ops::Range;

use crate::{
    device::{Arena, Device, Element},
    error::Result,
    models::{Batch, Head, Keep, Model, Pass, PassOptions, PassShape, Spec},
};

/// Sizes of a scoring pass.
#[derive(Clone, Copy, Debug)]
pub struct Scorer {
    /// Rows of one pass; at least the longest sequence.
    pub rows: usize,
    /// Sequences of one pass.
    pub sequences: usize,
}

impl Scorer {
    /// Sizes for sequences of these lengths: enough rows to keep a CPU busy, little memory.
    pub fn for_lengths(lens: impl Iterator<Item = usize>) -> Self {
        Self { rows: lens.max().unwrap_or(1).max(2048), sequences: 256 }
    }

    /// Bytes that a pass needs of an arena.
    pub fn plan<T: Element>(&self, dev: &Device, spec: &Spec, head: Head) -> Result<usize> {
        let shape = PassShape::whole(self.rows, self.sequences);
        let options = PassOptions { entropy: head == Head::Lm, keep: Keep::Nothing };
        Arena::plan(|scope| Pass::<T>::plan(dev, scope, (spec, head), shape, options))
    }

    /// Groups of consecutive sequences that fit one pass each.
    pub fn groups(&self, lens: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
        let mut groups: Vec<Range<usize>> = Vec::new();
        let mut used = 0;
        for (i, len) in lens.enumerate() {
            match groups.last_mut() {
                Some(g) if used + len <= self.rows && g.len() < self.sequences => {
                    g.end = i + 1;
                    used += len;
                }
                _ => {
                    groups.push(i..i + 1);
                    used = len;
                }
            }
        }
        groups
    }
}

/// The score of each sequence at its last token.
pub fn last_scores<T: Element>(
    dev: &Device,
    model: &Model<T>,
    arena: &mut Arena,
    scorer: Scorer,
    sequences: &[&[u32]],
) -> Result<Vec<T::Acc>> {
    let mut batch = Batch::default();
    let mut out = Vec::with_capacity(sequences.len());
    for group in scorer.groups(sequences.iter().map(|s| s.len())) {
        batch.clear();
        sequences[group].iter().for_each(|s| batch.push_last(s));
        Pass::new(dev, model, &arena.scope(), &batch).score(&mut out, None)?;
    }
    Ok(out)
}
