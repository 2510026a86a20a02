//! Log-probs, values and rewards of given sequences.

use std::ops::Range;

use crate::{
    device::{Arena, Buffer, Device, Element, Scope},
    error::Result,
    models::{Activations, Batch, Cache, Extent, Head, Keep, Model, Selected, Spec, Staged},
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
    #[must_use]
    pub fn for_lengths(lens: impl Iterator<Item = usize>) -> Self {
        Self { rows: lens.max().unwrap_or(1).max(2048), sequences: 256 }
    }

    /// Bytes that a pass needs of an arena.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if the sizes overflow.
    pub fn plan<T: Element>(&self, dev: &Device, spec: &Spec, head: Head) -> Result<usize> {
        let Self { rows, sequences } = *self;
        Arena::plan(|scope| {
            let extent = Extent { rows, sequences, selected: rows, cached: 0 };
            Staged::plan(dev, scope, spec, extent)?;
            let pages = extent.pages(spec.attention().page(dev));
            Pass::<T>::new(dev, scope, spec, head, extent, pages).map(drop)
        })
    }

    /// Groups of consecutive sequences that fit one pass each.
    #[must_use]
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
    ///
    /// # Errors
    /// [`crate::Error::Value`] for ids out of range, [`crate::Error::Memory`] if the plan has no
    /// room.
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
        let (mut pass, staged) = Pass::run(dev, scope, model, batch)?;
        let _phase = dev.span("head");
        let (_, head) = model.lm_head(dev)?;
        logprob::forward(
            dev,
            pass.y.view_mut(),
            pass.lse.view_mut(),
            entropy.is_some().then(|| pass.entropy.view_mut()),
            pass.selected.hidden(),
            head,
            staged.targets(),
            Settings::at(temperature),
            pass.scratch.view_mut(),
        )?;
        let logp = dev.read_later(pass.y.view())?;
        if let Some(entropy) = entropy {
            entropy.extend(dev.read_later(pass.entropy.view())?.get()?);
        }
        out.extend(logp.get()?);
        Ok(())
    }

    /// The scalar head at each selected row: values, or rewards if the last rows are selected.
    ///
    /// # Errors
    /// As [`Scorer::logprobs`].
    pub fn scalars<T: Element>(
        &self,
        dev: &Device,
        model: &Model<T>,
        scope: &Scope<'_>,
        batch: &Batch,
        out: &mut Vec<T::Acc>,
    ) -> Result<()> {
        let (mut pass, _staged) = Pass::run(dev, scope, model, batch)?;
        let _phase = dev.span("head");
        let w = model.score_head()?;
        scalar_head::forward(dev, pass.y.view_mut(), pass.selected.hidden(), w)?;
        out.extend(dev.read(pass.y.view())?);
        Ok(())
    }
}

/// The score of each sequence at its last token.
///
/// # Errors
/// As [`Scorer::logprobs`].
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

struct Pass<'s, T: Element> {
    acts: Activations<'s, T>,
    cache: Cache<'s, T>,
    selected: Selected<'s, T>,
    /// Log-probs or scalars.
    y: Buffer<'s, T::Acc>,
    lse: Buffer<'s, T::Acc>,
    entropy: Buffer<'s, T::Acc>,
    scratch: Buffer<'s, T::Acc>,
}

impl<'s, T: Element> Pass<'s, T> {
    fn new(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        head: Head,
        extent: Extent,
        pages: usize,
    ) -> Result<Self> {
        let n = extent.selected;
        let (lm, scratch) = match head {
            Head::Lm => (n, logprob::scratch_len(n, spec.vocab)),
            Head::Scalar => (0, 0),
        };
        Ok(Self {
            acts: Activations::new(dev, scope, spec, extent, Keep::Nothing)?,
            cache: Cache::transient(dev, scope, spec, pages)?,
            selected: Selected::new(scope, spec, n)?,
            y: scope.alloc("head outputs", n)?,
            lse: scope.alloc("log-sum-exp", lm)?,
            entropy: scope.alloc("entropy", lm)?,
            scratch: scope.alloc("LM head scratch", scratch)?,
        })
    }

    /// The forward pass over a batch, up to the head.
    fn run(
        dev: &Device,
        scope: &'s Scope<'_>,
        model: &Model<T>,
        batch: &'s Batch,
    ) -> Result<(Self, Staged<'s>)> {
        let _phase = dev.span("forward");
        let (spec, selected) = (model.spec(), batch.selected().len());
        let pages = batch.transient_pages(spec.attention().page(dev));
        let staged = batch.stage(dev, scope, spec, pages)?;
        let (rows, sequences) = (batch.len(), batch.sequences());
        let extent = Extent { rows, sequences, selected, cached: 0 };
        let mut pass = Self::new(dev, scope, spec, model.head(), extent, pages)?;
        model.forward(dev, &staged.rows(), &mut pass.acts, &mut pass.cache)?;
        model.select(dev, &pass.acts, staged.selected(), &mut pass.selected)?;
        Ok((pass, staged))
    }
}
