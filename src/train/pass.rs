//! One micro-batch through one model: forward, loss, backward.

use crate::{
    algorithms::Micro,
    device::{Arena, Buffer, Device, Element, Scope, View, ViewMut},
    error::Result,
    models::{Backbone, Batch, Gradients, Head, Keep, Model, ParamKind, Params, Spec},
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
    pub sequences: usize,
}

impl Sizes {
    /// Bytes that a training pass of this size needs of an arena, with the columns of its loss.
    pub fn plan<T: Element>(
        &self,
        dev: &Device,
        spec: &Spec,
        head: Head,
        how: PassOptions,
    ) -> Result<usize> {
        let Self { rows, sequences } = *self;
        Arena::plan(|scope| {
            Micro::<T::Acc>::plan(dev, scope, rows)?;
            Backbone::<T>::plan(dev, scope, spec, (rows, sequences), how.keep())?;
            Outputs::<T>::new(scope, spec, head, how, (rows, rows)).map(drop)
        })
    }
}

/// How a pass is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassOptions {
    /// With the entropy of each prediction.
    pub entropy: bool,
    /// Blocks are computed again in the backward pass instead of kept.
    pub recompute: bool,
}

impl PassOptions {
    fn keep(self) -> Keep {
        if self.recompute { Keep::Streams } else { Keep::All }
    }
}

/// What a head makes of a batch, and the gradients down from there.
struct Outputs<'s, T: Element> {
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

impl<'s, T: Element> Outputs<'s, T> {
    /// For `rows` rows of which the head reads `n`.
    fn new(
        scope: &'s Scope<'_>,
        spec: &Spec,
        head: Head,
        how: PassOptions,
        (rows, n): (usize, usize),
    ) -> Result<Self> {
        let lm = if head == Head::Lm { n } else { 0 };
        let with = if how.entropy { n } else { 0 };
        let (vocab, hidden) = (spec.vocab, spec.hidden);
        let scratch = match head {
            Head::Scalar => 0,
            Head::Lm => {
                logprob::scratch_len(n, vocab).max(logprob::backward_scratch_len(n, vocab, hidden))
            }
        };
        Ok(Self {
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
}

/// The forward pass over a batch up to the head, and room for what follows.
fn forward<'s, T: Element>(
    dev: &Device,
    scope: &'s Scope<'_>,
    model: &Model<T>,
    batch: &'s Batch,
    how: PassOptions,
) -> Result<(Backbone<'s, T>, Outputs<'s, T>)> {
    let backbone = Backbone::forward(dev, scope, model, batch, how.keep())?;
    let sizes = (batch.len(), batch.selected().len());
    Ok((backbone, Outputs::new(scope, model.spec(), model.head(), how, sizes)?))
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
#[allow(clippy::too_many_arguments)]
pub fn policy<T: Element>(
    dev: &Device,
    model: &Model<T>,
    grads: &mut Params<T::Acc>,
    scope: &Scope<'_>,
    batch: &Batch,
    temperature: T::Acc,
    how: PassOptions,
    loss: impl FnOnce(PolicyColumns<'_, T::Acc>) -> Result<()>,
) -> Result<()> {
    let (mut backbone, mut b) = forward(dev, scope, model, batch, how)?;
    let phase = dev.span("head");
    let (w, packed) = model.lm_head(dev)?;
    let (targets, settings, entropy) = (backbone.targets(), Settings::at(temperature), how.entropy);
    logprob::forward(
        dev,
        b.y.view_mut(),
        b.lse.view_mut(),
        entropy.then(|| b.entropy.view_mut()),
        backbone.hidden(),
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
        h: backbone.hidden(),
        packed,
        w,
        targets,
        lse: b.lse.view(),
        entropy: entropy.then(|| b.entropy.view()),
        settings,
    };
    let dw = grads.get_mut(model.lm_kind(), None);
    let dentropy = entropy.then(|| b.dentropy.view());
    let (dh, scratch) = (b.dh.view_mut(), b.scratch.view_mut());
    logprob::backward(dev, dh, dw, b.dy.view(), dentropy, forward, scratch)?;
    backbone.backward(dev, model, grads, b.dh.view(), &mut b.gradients)
}

/// A scalar model: its head at each selected row, `loss(y, dy)`, and the gradient of all weights
/// added to `grads`.
pub fn scalar<T: Element>(
    dev: &Device,
    model: &Model<T>,
    grads: &mut Params<T::Acc>,
    scope: &Scope<'_>,
    batch: &Batch,
    how: PassOptions,
    loss: impl FnOnce(View<'_, T::Acc>, ViewMut<'_, T::Acc>) -> Result<()>,
) -> Result<()> {
    let (mut backbone, mut b) = forward(dev, scope, model, batch, how)?;
    let phase = dev.span("head");
    let w = model.score_head()?;
    scalar_head::forward(dev, b.y.view_mut(), backbone.hidden(), w)?;
    drop(phase);
    let phase = dev.span("loss");
    loss(b.y.view(), b.dy.view_mut())?;
    drop(phase);
    let _phase = dev.span("backward");
    if let Some(dw) = grads.get_mut(ParamKind::Score, None) {
        let h = backbone.hidden();
        scalar_head::backward(dev, b.dh.view_mut(), dw, b.dy.view(), h, w)?;
    }
    backbone.backward(dev, model, grads, b.dh.view(), &mut b.gradients)
}
