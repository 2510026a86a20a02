//! Log-probs, values and rewards of given sequences.

use std::ops::Range;

use crate::{
    device::{Arena, Device, Element, Float},
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
        let options = PassOptions { entropy: head == Head::Lm, keep: Keep::Nothing, balance: 0.0 };
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

/// A device, and the memory of forward passes on it.
pub struct ScoringPass<'a> {
    pub dev: &'a Device,
    pub scorer: Scorer,
    pub arena: &'a mut Arena,
    pub batch: &'a mut Batch,
}

impl ScoringPass<'_> {
    /// Appends the outputs of the model's head on the sequences, each of which `push` adds to a
    /// batch, and to `entropy` the entropy of each prediction. An LM head divides its logits by
    /// `temperature`.
    pub fn run<T: Element, S: AsRef<[u32]>>(
        &mut self,
        (model, temperature): (&Model<T>, T::Acc),
        sequences: &[S],
        push: impl Fn(&mut Batch, &S),
        out: &mut Vec<T::Acc>,
        mut entropy: Option<&mut Vec<T::Acc>>,
    ) -> Result<()> {
        for group in self.scorer.groups(sequences.iter().map(|s| s.as_ref().len())) {
            self.batch.clear();
            sequences[group].iter().for_each(|s| push(self.batch, s));
            let scope = self.arena.scope();
            let pass = Pass::new(self.dev, model, &scope, self.batch);
            let pass = if model.head() == Head::Lm { pass.at(temperature) } else { pass };
            pass.score(out, entropy.as_deref_mut())?;
        }
        Ok(())
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
    let (mut out, batch) = (Vec::with_capacity(sequences.len()), &mut Batch::default());
    let mut pass = ScoringPass { dev, scorer, arena, batch };
    let scalar = (model, Float::ONE);
    pass.run(scalar, sequences, |batch, ids| batch.push_last(ids), &mut out, None)?;
    Ok(out)
}
