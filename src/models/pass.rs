//! One batch of whole sequences through one model and its head, and back.

use super::{
    Activations, Batch, Cache, Head, Keep, Model, Params, PassOptions, PassShape, Spec, Staged,
    heads::{HeadOutputs, LossColumns},
};
use crate::{
    device::{Device, Element, Scope},
    error::Result,
};

/// A batch, and the model that it goes through.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'s, T: Element> {
    dev: &'s Device,
    model: &'s Model<T>,
    scope: &'s Scope<'s>,
    batch: &'s Batch,
    temperature: Option<T::Acc>,
}

impl<'s, T: Element> Pass<'s, T> {
    /// All that the pass allocates comes from `scope`, as [`Pass::plan`] says.
    pub fn new(
        dev: &'s Device,
        model: &'s Model<T>,
        scope: &'s Scope<'s>,
        batch: &'s Batch,
    ) -> Self {
        Self { dev, model, scope, batch, temperature: None }
    }

    /// Asks for log-probs with logits divided by `temperature`: a scalar head is refused.
    pub fn at(self, temperature: T::Acc) -> Self {
        Self { temperature: Some(temperature), ..self }
    }

    /// Allocates what a pass of this shape does.
    pub fn plan(
        dev: &Device,
        scope: &'s Scope<'_>,
        (spec, head): (&Spec, Head),
        shape: PassShape,
        options: PassOptions,
    ) -> Result<()> {
        Staged::plan(dev, scope, spec, shape)?;
        PassBuffers::<T>::new(dev, scope, (spec, head), shape, options).map(drop)
    }

    /// Appends the head's output for each row that it reads, in the order of the batch, and to
    /// `entropy` the entropy of each prediction.
    pub fn score(self, out: &mut Vec<T::Acc>, entropy: Option<&mut Vec<T::Acc>>) -> Result<()> {
        let options = PassOptions { entropy: entropy.is_some(), keep: Keep::Nothing };
        let (_, buffers) = self.forward(options)?;
        // Both copies are queued before the first is waited for.
        let y = self.dev.read_later(buffers.head.y.view())?;
        if let (Some(out), Some(entropy)) = (entropy, &buffers.head.entropy) {
            out.extend(self.dev.read_later(entropy.view())?.get()?);
        }
        out.extend(y.get()?);
        Ok(())
    }

    /// Runs the model, then `loss`, and adds the gradient of all weights to `grads`.
    pub fn train(
        self,
        grads: &mut Params<T::Acc>,
        options: PassOptions,
        loss: impl FnOnce(LossColumns<'_, T::Acc>) -> Result<()>,
    ) -> Result<()> {
        let Self { dev, model, temperature, .. } = self;
        let (staged, mut b) = self.forward(options)?;
        let phase = dev.span("loss");
        loss(b.head.columns())?;
        drop(phase);
        let _phase = dev.span("backward");
        let (h, targets) = (b.acts.hidden(), staged.targets());
        b.head.backward(dev, model, grads, h, targets, temperature)?;
        model.backward(dev, grads, &staged.rows(), &mut b.acts, &mut b.cache, b.head.dh.view())
    }

    fn forward(self, options: PassOptions) -> Result<(Staged<'s>, PassBuffers<'s, T>)> {
        let Self { dev, model, scope, batch, temperature } = self;
        let phase = dev.span("forward");
        let (spec, shape) = (model.spec(), batch.shape());
        let staged = batch.stage(dev, scope, spec, shape.pages(dev, spec))?;
        let mut b = PassBuffers::new(dev, scope, (spec, model.head()), shape, options)?;
        model.forward(dev, &staged.rows(), &mut b.acts, &mut b.cache)?;
        drop(phase);
        let _phase = dev.span("head");
        b.head.forward(dev, model, b.acts.hidden(), staged.targets(), temperature)?;
        Ok((staged, b))
    }
}

/// Buffers of a pass, but for those of its batch.
struct PassBuffers<'s, T: Element> {
    acts: Activations<'s, T>,
    cache: Cache<'s, T>,
    head: HeadOutputs<'s, T>,
}

impl<'s, T: Element> PassBuffers<'s, T> {
    fn new(
        dev: &Device,
        scope: &'s Scope<'_>,
        (spec, head): (&Spec, Head),
        shape: PassShape,
        options: PassOptions,
    ) -> Result<Self> {
        Ok(Self {
            acts: Activations::new(dev, scope, spec, shape, options.keep)?,
            cache: Cache::new(dev, scope, spec, shape)?,
            head: HeadOutputs::new(scope, spec, head, shape.selected, options)?,
        })
    }
}
