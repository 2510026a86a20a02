//! Log-probs, values and rewards of given sequences.

use std::ops::Range;

use crate::{
    device::{Arena, Buffer, Device, Float, Scope, ViewMut},
    error::Result,
    models::{Activations, Batch, Cache, Head, Model, Selected, Spec},
    ops::{
        attention::PAGE,
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
    pub fn plan<F: Float>(&self, spec: &Spec) -> Result<usize> {
        Arena::plan(|scope| {
            let pages = self.rows / PAGE + self.sequences;
            Pass::<F>::new(scope, spec, (self.rows, self.rows, self.rows), pages).map(drop)
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
    pub fn logprobs<F: Float>(
        &self,
        dev: &Device,
        model: &Model<F>,
        scope: &Scope<'_>,
        batch: &Batch,
        temperature: F,
        out: &mut Vec<F>,
        entropy: Option<&mut Vec<F>>,
    ) -> Result<()> {
        let n = batch.selected().len();
        let mut pass = Pass::<F>::of(scope, model, batch)?;
        pass.run(dev, model, batch)?;
        let at = out.len();
        out.resize(at + n, F::ZERO);
        let entropy = entropy.map(|e| {
            let at = e.len();
            e.resize(at + n, F::ZERO);
            ViewMut::from(&mut e[at..])
        });
        let (_, packed) = model.lm_head()?;
        logprob::forward(
            dev,
            (&mut out[at..]).into(),
            pass.lse.view_mut(),
            entropy,
            pass.selected.hidden(),
            packed,
            batch.targets().into(),
            Settings::at(temperature),
            pass.scratch.view_mut(),
        )
    }

    /// The scalar head at each selected row: values, or rewards if the last rows are selected.
    ///
    /// # Errors
    /// As [`Scorer::logprobs`].
    pub fn scalars<F: Float>(
        &self,
        dev: &Device,
        model: &Model<F>,
        scope: &Scope<'_>,
        batch: &Batch,
        out: &mut Vec<F>,
    ) -> Result<()> {
        let n = batch.selected().len();
        let mut pass = Pass::<F>::of(scope, model, batch)?;
        pass.run(dev, model, batch)?;
        let at = out.len();
        out.resize(at + n, F::ZERO);
        let w = model.score_head()?;
        scalar_head::forward(dev, (&mut out[at..]).into(), pass.selected.hidden(), w)
    }
}

/// The score of each sequence at its last token.
///
/// # Errors
/// As [`Scorer::logprobs`].
pub fn last_scores<F: Float>(
    dev: &Device,
    model: &Model<F>,
    arena: &mut Arena,
    scorer: Scorer,
    sequences: &[&[u32]],
) -> Result<Vec<F>> {
    let mut batch = Batch::default();
    let mut out = Vec::with_capacity(sequences.len());
    for group in scorer.groups(sequences.iter().map(|s| s.len())) {
        batch.clear();
        sequences[group].iter().for_each(|s| batch.push_last(s));
        scorer.scalars(dev, model, &arena.scope(), &batch, &mut out)?;
    }
    Ok(out)
}

struct Pass<'s, F> {
    acts: Activations<'s, F>,
    cache: Cache<'s, F>,
    selected: Selected<'s, F>,
    lse: Buffer<'s, F>,
    scratch: Buffer<'s, F>,
}

impl<'s, F: Float> Pass<'s, F> {
    fn of(scope: &'s Scope<'_>, model: &Model<F>, batch: &Batch) -> Result<Self> {
        let (rows, n) = (batch.len(), batch.selected().len());
        let lm = if model.head() == Head::Lm { n } else { 0 };
        Self::new(scope, model.spec(), (rows, n, lm), batch.transient_pages())
    }

    /// For `rows` rows, `n` of them selected, `lm` of those read by an LM head.
    fn new(
        scope: &'s Scope<'_>,
        spec: &Spec,
        (rows, n, lm): (usize, usize, usize),
        pages: usize,
    ) -> Result<Self> {
        let scratch = logprob::scratch_len(lm, spec.vocab);
        Ok(Self {
            acts: Activations::new(scope, spec, rows, false)?,
            cache: Cache::transient(scope, spec, pages)?,
            selected: Selected::new(scope, spec, n)?,
            lse: scope.alloc("log-sum-exp", lm)?,
            scratch: scope.alloc("LM head scratch", if lm == 0 { 0 } else { scratch })?,
        })
    }

    fn run(&mut self, dev: &Device, model: &Model<F>, batch: &Batch) -> Result<()> {
        model.forward(dev, &batch.rows(), &mut self.acts, &mut self.cache)?;
        model.select(dev, &self.acts, batch.selected().into(), &mut self.selected)
    }
}
