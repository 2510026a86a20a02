//! One micro-batch through one model: forward, loss, backward.

use crate::{
    device::{Arena, Buffer, Device, Float, Scope, View, ViewMut},
    error::Result,
    models::{Activations, Batch, Cache, Gradients, Head, Model, Params, Selected, Slot, Spec},
    ops::{
        attention::PAGE,
        logprob::{self, Settings},
        scalar_head,
    },
};

/// The largest micro-batch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rows, the token budget.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
}

impl Sizes {
    /// Bytes that a training pass of this size needs of an arena.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if the sizes overflow.
    pub fn plan<F: Float>(&self, spec: &Spec, head: Head, entropy: bool) -> Result<usize> {
        Arena::plan(|scope| {
            let pages = self.rows / PAGE + self.sequences;
            Buffers::<F>::new(scope, spec, head, entropy, (self.rows, self.rows), pages).map(drop)
        })
    }
}

/// Buffers of a pass.
struct Buffers<'s, F> {
    acts: Activations<'s, F>,
    cache: Cache<'s, F>,
    selected: Selected<'s, F>,
    gradients: Gradients<'s, F>,
    /// Log-probs or scalars, and their gradient.
    y: Buffer<'s, F>,
    dy: Buffer<'s, F>,
    lse: Buffer<'s, F>,
    entropy: Buffer<'s, F>,
    dentropy: Buffer<'s, F>,
    dh: Buffer<'s, F>,
    scratch: Buffer<'s, F>,
}

impl<'s, F: Float> Buffers<'s, F> {
    fn new(
        scope: &'s Scope<'_>,
        spec: &Spec,
        head: Head,
        entropy: bool,
        (rows, n): (usize, usize),
        pages: usize,
    ) -> Result<Self> {
        let lm = if head == Head::Lm { n } else { 0 };
        let with = if entropy { n } else { 0 };
        let scratch = match lm {
            0 => 0,
            _ => logprob::scratch_len(n, spec.vocab).max(logprob::backward_scratch_len(
                n,
                spec.vocab,
                spec.hidden,
            )),
        };
        Ok(Self {
            acts: Activations::new(scope, spec, rows, true)?,
            cache: Cache::transient(scope, spec, pages)?,
            selected: Selected::new(scope, spec, n)?,
            gradients: Gradients::new(scope, spec, rows, n)?,
            y: scope.alloc("head outputs", n)?,
            dy: scope.alloc("gradient of head outputs", n)?,
            lse: scope.alloc("log-sum-exp", lm)?,
            entropy: scope.alloc("entropy", with)?,
            dentropy: scope.alloc("gradient of entropy", with)?,
            dh: scope.alloc("gradient of hidden states", n * spec.hidden)?,
            scratch: scope.alloc("LM head scratch", scratch)?,
        })
    }

    fn of(scope: &'s Scope<'_>, m: &Model<F>, batch: &Batch, entropy: bool) -> Result<Self> {
        let sizes = (batch.len(), batch.selected().len());
        Self::new(scope, m.spec(), m.head(), entropy, sizes, batch.transient_pages())
    }

    fn forward(&mut self, dev: &Device, model: &Model<F>, batch: &Batch) -> Result<()> {
        model.forward(dev, &batch.rows(), &mut self.acts, &mut self.cache)?;
        model.select(dev, &self.acts, batch.selected().into(), &mut self.selected)
    }

    fn backward(
        &mut self,
        dev: &Device,
        model: &Model<F>,
        grads: &mut Params<F>,
        batch: &Batch,
    ) -> Result<()> {
        model.backward(
            dev,
            grads,
            &batch.rows(),
            &mut self.acts,
            &self.selected,
            batch.selected().into(),
            self.dh.view(),
            &mut self.gradients,
        )
    }
}

/// What a policy's loss reads and writes, one number for each predicted token.
#[derive(Debug)]
pub struct PolicyColumns<'a, F> {
    /// Log-prob of each target.
    pub logp: View<'a, F>,
    /// Entropy of each prediction, if asked for.
    pub entropy: Option<View<'a, F>>,
    /// d loss / d log-prob, to write.
    pub dlogp: ViewMut<'a, F>,
    /// d loss / d entropy, to write.
    pub dentropy: Option<ViewMut<'a, F>>,
}

/// A language model: log-probs of the batch's targets at `temperature`, `loss`, and the gradient
/// of all weights added to `grads`.
///
/// # Errors
/// Those of the ops and of `loss`.
#[allow(clippy::too_many_arguments)]
pub fn policy<F: Float>(
    dev: &Device,
    model: &Model<F>,
    grads: &mut Params<F>,
    scope: &Scope<'_>,
    batch: &Batch,
    temperature: F,
    entropy: bool,
    loss: impl FnOnce(PolicyColumns<'_, F>) -> Result<()>,
) -> Result<()> {
    let mut b = Buffers::of(scope, model, batch, entropy)?;
    b.forward(dev, model, batch)?;
    let (w, packed) = model.lm_head()?;
    let (targets, settings) = (View::from(batch.targets()), Settings::at(temperature));
    logprob::forward(
        dev,
        b.y.view_mut(),
        b.lse.view_mut(),
        entropy.then(|| b.entropy.view_mut()),
        b.selected.hidden(),
        packed,
        targets,
        settings,
        b.scratch.view_mut(),
    )?;
    loss(PolicyColumns {
        logp: b.y.view(),
        entropy: entropy.then(|| b.entropy.view()),
        dlogp: b.dy.view_mut(),
        dentropy: entropy.then(|| b.dentropy.view_mut()),
    })?;
    let forward = logprob::Forward {
        h: b.selected.hidden(),
        packed,
        w,
        targets,
        lse: b.lse.view(),
        entropy: entropy.then(|| b.entropy.view()),
        settings,
    };
    let dw = grads.get_mut(model.lm_slot(), None);
    let dentropy = entropy.then(|| b.dentropy.view());
    let (dh, scratch) = (b.dh.view_mut(), b.scratch.view_mut());
    logprob::backward(dev, dh, dw, b.dy.view(), dentropy, forward, scratch)?;
    b.backward(dev, model, grads, batch)
}

/// A scalar model: its head at each selected row, `loss(y, dy)`, and the gradient of all weights
/// added to `grads`.
///
/// # Errors
/// Those of the ops and of `loss`.
pub fn scalar<F: Float>(
    dev: &Device,
    model: &Model<F>,
    grads: &mut Params<F>,
    scope: &Scope<'_>,
    batch: &Batch,
    loss: impl FnOnce(View<'_, F>, ViewMut<'_, F>) -> Result<()>,
) -> Result<()> {
    let mut b = Buffers::of(scope, model, batch, false)?;
    b.forward(dev, model, batch)?;
    let w = model.score_head()?;
    scalar_head::forward(dev, b.y.view_mut(), b.selected.hidden(), w)?;
    loss(b.y.view(), b.dy.view_mut())?;
    if let Some(dw) = grads.get_mut(Slot::Score, None) {
        let h = b.selected.hidden();
        scalar_head::backward(dev, b.dh.view_mut(), dw, b.dy.view(), h, w)?;
    }
    b.backward(dev, model, grads, batch)
}
