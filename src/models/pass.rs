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
        buffers::<T>(dev, scope, (spec, head), shape, options).map(drop)
    }

    /// Appends the head's output for each row that it reads, in the order of the batch, and to
    /// `entropy` the entropy of each prediction.
    pub fn score(self, out: &mut Vec<T::Acc>, entropy: Option<&mut Vec<T::Acc>>) -> Result<()> {
        let options = PassOptions { entropy: entropy.is_some(), keep: Keep::Nothing, balance: 0.0 };
        let (_, (.., head)) = self.forward(options)?;
        // Both copies are queued before the first is waited for.
        let y = self.dev.read_later(head.y.view())?;
        if let (Some(out), Some(entropy)) = (entropy, &head.entropy) {
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
        let (staged, (mut acts, mut cache, mut head)) = self.forward(options)?;
        let phase = dev.span("loss");
        loss(head.columns())?;
        drop(phase);
        let _phase = dev.span("backward");
        head.backward(dev, model, grads, acts.hidden(), staged.targets(), temperature)?;
        model.backward(dev, grads, &staged.rows(), &mut acts, &mut cache, head.dh.view())
    }

    fn forward(self, options: PassOptions) -> Result<(Staged<'s>, Buffers<'s, T>)> {
        let Self { dev, model, scope, batch, temperature } = self;
        let phase = dev.span("forward");
        let (spec, shape) = (model.spec(), batch.shape());
        let staged = batch.stage(dev, scope, spec, shape.pages(dev, spec))?;
        let (mut acts, mut cache, mut head) =
            buffers(dev, scope, (spec, model.head()), shape, options)?;
        model.forward(dev, &staged.rows(), &mut acts, &mut cache)?;
        drop(phase);
        let _phase = dev.span("head");
        head.forward(dev, model, acts.hidden(), staged.targets(), temperature)?;
        Ok((staged, (acts, cache, head)))
    }
}

/// Buffers of a pass beside those of its batch.
type Buffers<'s, T> = (Activations<'s, T>, Cache<'s, T>, HeadOutputs<'s, T>);

fn buffers<'s, T: Element>(
    dev: &Device,
    scope: &'s Scope<'_>,
    (spec, head): (&Spec, Head),
    shape: PassShape,
    options: PassOptions,
) -> Result<Buffers<'s, T>> {
    let mut acts = Activations::new(dev, scope, spec, shape, options.keep)?;
    acts.balance(options.balance);
    let cache = Cache::new(dev, scope, spec, shape)?;
    Ok((acts, cache, HeadOutputs::new(scope, spec, head, shape.selected, options)?))
}
