//! One micro-batch through one model: forward, loss, backward.

use crate::{
    algorithms::Micro,
    device::{Arena, Buffer, Device, Element, Scope, View, ViewMut},
    error::Result,
    models::{
        Activations, Batch, Cache, Extent, Gradients, Head, Keep, Model, Params, Selected, Slot,
        Spec, Staged,
    },
    ops::{
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
    /// Bytes that a training pass of this size needs of an arena, with the columns of its loss.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if the sizes overflow.
    pub fn plan<T: Element>(
        &self,
        dev: &Device,
        spec: &Spec,
        head: Head,
        how: How,
    ) -> Result<usize> {
        let Self { rows, sequences } = *self;
        Arena::plan(|scope| {
            Micro::<T::Acc>::plan(dev, scope, rows)?;
            let extent = Extent { rows, sequences, selected: rows, cached: 0 };
            Staged::plan(dev, scope, spec, extent)?;
            let pages = extent.pages(spec.attention().page(dev));
            Buffers::<T>::new(dev, scope, spec, head, how, extent, pages).map(drop)
        })
    }
}

/// How a pass is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// With the entropy of each prediction.
    pub entropy: bool,
    /// Blocks are computed again in the backward pass instead of kept.
    pub recompute: bool,
}

/// Buffers of a pass.
struct Buffers<'s, T: Element> {
    acts: Activations<'s, T>,
    cache: Cache<'s, T>,
    selected: Selected<'s, T>,
    gradients: Gradients<'s, T>,
    /// Log-probs or scalars, and their gradient.
    y: Buffer<'s, T::Acc>,
    dy: Buffer<'s, T::Acc>,
    lse: Buffer<'s, T::Acc>,
    entropy: Buffer<'s, T::Acc>,
    dentropy: Buffer<'s, T::Acc>,
    dh: Buffer<'s, T>,
    scratch: Buffer<'s, T::Acc>,
}

impl<'s, T: Element> Buffers<'s, T> {
    fn new(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        head: Head,
        how: How,
        extent: Extent,
        pages: usize,
    ) -> Result<Self> {
        let (rows, n) = (extent.rows, extent.selected);
        let lm = if head == Head::Lm { n } else { 0 };
        let with = if how.entropy { n } else { 0 };
        let (vocab, hidden) = (spec.vocab, spec.hidden);
        let scratch = match head {
            Head::Scalar => 0,
            Head::Lm => {
                logprob::scratch_len(n, vocab).max(logprob::backward_scratch_len(n, vocab, hidden))
            }
        };
        let keep = if how.recompute { Keep::Streams } else { Keep::All };
        Ok(Self {
            acts: Activations::new(dev, scope, spec, extent, keep)?,
            cache: Cache::transient(dev, scope, spec, pages)?,
            selected: Selected::new(scope, spec, n)?,
            gradients: Gradients::new(scope, spec, rows, n)?,
            y: scope.alloc("head outputs", n)?,
            dy: scope.alloc("gradient of head outputs", n)?,
            lse: scope.alloc("log-sum-exp", lm)?,
            entropy: scope.alloc("entropy", with)?,
            dentropy: scope.alloc("gradient of entropy", with)?,
            dh: scope.alloc("gradient of hidden states", n * hidden)?,
            scratch: scope.alloc("LM head scratch", scratch)?,
        })
    }

    /// The forward pass over a batch, up to the head.
    fn forward(
        dev: &Device,
        scope: &'s Scope<'_>,
        model: &Model<T>,
        batch: &'s Batch,
        how: How,
    ) -> Result<(Self, Staged<'s>)> {
        let _phase = dev.span("forward");
        let (spec, selected) = (model.spec(), batch.selected().len());
        let pages = batch.transient_pages(spec.attention().page(dev));
        let staged = batch.stage(dev, scope, spec, pages)?;
        let (rows, sequences) = (batch.len(), batch.sequences());
        let extent = Extent { rows, sequences, selected, cached: 0 };
        let mut b = Self::new(dev, scope, spec, model.head(), how, extent, pages)?;
        model.forward(dev, &staged.rows(), &mut b.acts, &mut b.cache)?;
        model.select(dev, &b.acts, staged.selected(), &mut b.selected)?;
        Ok((b, staged))
    }

    fn backward(
        &mut self,
        dev: &Device,
        model: &Model<T>,
        grads: &mut Params<T::Acc>,
        staged: &Staged<'_>,
    ) -> Result<()> {
        model.backward(
            dev,
            grads,
            &staged.rows(),
            &mut self.acts,
            &mut self.cache,
            &self.selected,
            staged.selected(),
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
pub fn policy<T: Element>(
    dev: &Device,
    model: &Model<T>,
    grads: &mut Params<T::Acc>,
    scope: &Scope<'_>,
    batch: &Batch,
    temperature: T::Acc,
    how: How,
    loss: impl FnOnce(PolicyColumns<'_, T::Acc>) -> Result<()>,
) -> Result<()> {
    let (mut b, staged) = Buffers::forward(dev, scope, model, batch, how)?;
    let phase = dev.span("head");
    let (w, packed) = model.lm_head(dev)?;
    let (targets, settings, entropy) = (staged.targets(), Settings::at(temperature), how.entropy);
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
    drop(phase);
    let phase = dev.span("loss");
    loss(PolicyColumns {
        logp: b.y.view(),
        entropy: entropy.then(|| b.entropy.view()),
        dlogp: b.dy.view_mut(),
        dentropy: entropy.then(|| b.dentropy.view_mut()),
    })?;
    drop(phase);
    let _phase = dev.span("backward");
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
    b.backward(dev, model, grads, &staged)
}

/// A scalar model: its head at each selected row, `loss(y, dy)`, and the gradient of all weights
/// added to `grads`.
///
/// # Errors
/// Those of the ops and of `loss`.
pub fn scalar<T: Element>(
    dev: &Device,
    model: &Model<T>,
    grads: &mut Params<T::Acc>,
    scope: &Scope<'_>,
    batch: &Batch,
    how: How,
    loss: impl FnOnce(View<'_, T::Acc>, ViewMut<'_, T::Acc>) -> Result<()>,
) -> Result<()> {
    let (mut b, staged) = Buffers::forward(dev, scope, model, batch, how)?;
    let phase = dev.span("head");
    let w = model.score_head()?;
    scalar_head::forward(dev, b.y.view_mut(), b.selected.hidden(), w)?;
    drop(phase);
    let phase = dev.span("loss");
    loss(b.y.view(), b.dy.view_mut())?;
    drop(phase);
    let _phase = dev.span("backward");
    if let Some(dw) = grads.get_mut(Slot::Score, None) {
        let h = b.selected.hidden();
        scalar_head::backward(dev, b.dh.view_mut(), dw, b.dy.view(), h, w)?;
    }
    b.backward(dev, model, grads, &staged)
}
