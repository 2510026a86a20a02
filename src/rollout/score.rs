//! Log-probs, values and rewards of given sequences.

use std::ops::Range;

use crate::{
    device::{Arena, Buffer, Device, Element, Scope},
    error::Result,
    models::{Backbone, Batch, Head, Keep, Model, Spec},
    ops::{
        logprob::{self, Settings},
        scalar_head,
    },
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
        let Self { rows, sequences } = *self;
        Arena::plan(|scope| {
            Backbone::<T>::plan(dev, scope, spec, (rows, sequences), Keep::Nothing)?;
            Outputs::<T::Acc>::new(scope, spec, head, rows).map(drop)
        })
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

    /// Log-prob of each selected row's target at `temperature`, in the order of the batch, and the
    /// entropy of the distribution it was drawn from if asked for; both are appended.
    pub fn logprobs<T: Element>(
        &self,
        dev: &Device,
        model: &Model<T>,
        scope: &Scope<'_>,
        batch: &Batch,
        temperature: T::Acc,
        out: &mut Vec<T::Acc>,
        entropy: Option<&mut Vec<T::Acc>>,
    ) -> Result<()> {
        let backbone = Backbone::forward(dev, scope, model, batch, Keep::Nothing)?;
        let _phase = dev.span("head");
        let mut made = Outputs::new(scope, model.spec(), Head::Lm, batch.selected().len())?;
        let (_, head) = model.lm_head(dev)?;
        logprob::forward(
            dev,
            made.y.view_mut(),
            made.lse.view_mut(),
            entropy.is_some().then(|| made.entropy.view_mut()),
            backbone.hidden(),
            head,
            backbone.targets(),
            Settings::at(temperature),
            made.scratch.view_mut(),
        )?;
        let logp = dev.read_later(made.y.view())?;
        if let Some(entropy) = entropy {
            entropy.extend(dev.read_later(made.entropy.view())?.get()?);
        }
        out.extend(logp.get()?);
        Ok(())
    }

    /// The scalar head at each selected row: values, or rewards if the last rows are selected.
    pub fn scalars<T: Element>(
        &self,
        dev: &Device,
        model: &Model<T>,
        scope: &Scope<'_>,
        batch: &Batch,
        out: &mut Vec<T::Acc>,
    ) -> Result<()> {
        let backbone = Backbone::forward(dev, scope, model, batch, Keep::Nothing)?;
        let _phase = dev.span("head");
        let mut made = Outputs::new(scope, model.spec(), Head::Scalar, batch.selected().len())?;
        let w = model.score_head()?;
        scalar_head::forward(dev, made.y.view_mut(), backbone.hidden(), w)?;
        out.extend(dev.read(made.y.view())?);
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
    let mut batch = Batch::default();
    let mut out = Vec::with_capacity(sequences.len());
    for group in scorer.groups(sequences.iter().map(|s| s.len())) {
        batch.clear();
        sequences[group].iter().for_each(|s| batch.push_last(s));
        scorer.scalars(dev, model, &arena.scope(), &batch, &mut out)?;
    }
    Ok(out)
}

/// What a head makes of a batch.
struct Outputs<'s, F: Element> {
    y: Buffer<'s, F>,
    lse: Buffer<'s, F>,
    entropy: Buffer<'s, F>,
    scratch: Buffer<'s, F>,
}

impl<'s, F: Element> Outputs<'s, F> {
    /// For `n` rows.
    fn new(scope: &'s Scope<'_>, spec: &Spec, head: Head, n: usize) -> Result<Self> {
        let (lm, scratch) = match head {
            Head::Lm => (n, logprob::scratch_len(n, spec.vocab)),
            Head::Scalar => (0, 0),
        };
        Ok(Self {
            y: scope.alloc("head outputs", n)?,
            lse: scope.alloc("log-sum-exp", lm)?,
            entropy: scope.alloc("entropy", lm)?,
            scratch: scope.alloc("LM head scratch", scratch)?,
        })
    }
}
