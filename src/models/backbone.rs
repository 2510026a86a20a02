//! A batch of whole sequences through a model, up to the rows that its head reads, and back.

use super::{
    Activations, Batch, Cache, Gradients, HeadInput, Keep, Model, Params, PassShape, Spec, Staged,
};
use crate::{
    device::{Device, Element, Scope, View},
    error::Result,
};

/// What a forward pass made of a batch: hidden states for a head, and what the backward pass reads.
#[derive(Debug)]
pub struct Backbone<'s, T: Element> {
    staged: Staged<'s>,
    acts: Activations<'s, T>,
    cache: Cache<'s, T>,
    selected: HeadInput<'s, T>,
}

impl<'s, T: Element> Backbone<'s, T> {
    /// Takes of a scope what [`Backbone::forward`] takes for a batch of `rows` rows of at most
    /// `sequences` sequences.
    pub fn plan(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        (rows, sequences): (usize, usize),
        keep: Keep,
    ) -> Result<()> {
        let pass_shape = PassShape { rows, sequences, selected: rows, cached: 0 };
        Staged::plan(dev, scope, spec, pass_shape)?;
        let pages = pass_shape.pages(spec.attention().page(dev));
        Self::room(dev, scope, spec, pass_shape, pages, keep).map(drop)
    }

    fn room(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        pass_shape: PassShape,
        pages: usize,
        keep: Keep,
    ) -> Result<(Activations<'s, T>, Cache<'s, T>, HeadInput<'s, T>)> {
        let acts = Activations::new(dev, scope, spec, pass_shape, keep)?;
        let cache = Cache::transient(dev, scope, spec, pages)?;
        Ok((acts, cache, HeadInput::new(scope, spec, pass_shape.selected)?))
    }

    /// Runs the model's blocks over `batch`.
    pub fn forward(
        dev: &Device,
        scope: &'s Scope<'_>,
        model: &Model<T>,
        batch: &'s Batch,
        keep: Keep,
    ) -> Result<Self> {
        let _phase = dev.span("forward");
        let (spec, selected) = (model.spec(), batch.selected().len());
        let pages = batch.transient_pages(spec.attention().page(dev));
        let staged = batch.stage(dev, scope, spec, pages)?;
        let (rows, sequences) = (batch.len(), batch.sequences());
        let pass_shape = PassShape { rows, sequences, selected, cached: 0 };
        let (mut acts, mut cache, mut selected) =
            Self::room(dev, scope, spec, pass_shape, pages, keep)?;
        model.forward(dev, &staged.rows(), &mut acts, &mut cache)?;
        model.select(dev, &acts, staged.selected(), &mut selected)?;
        Ok(Self { staged, acts, cache, selected })
    }

    /// The hidden states that a head reads, `[selected, hidden]`.
    pub fn hidden(&self) -> View<'_, T> {
        self.selected.hidden()
    }

    /// The token that follows each of them.
    pub fn targets(&self) -> View<'_, u32> {
        self.staged.targets()
    }

    /// Adds to `grads` the gradient of the model's weights but the head's, given `dh`, that of the
    /// hidden states.
    pub fn backward(
        &mut self,
        dev: &Device,
        model: &Model<T>,
        grads: &mut Params<T::Acc>,
        dh: View<'_, T>,
        room: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let Self { staged, acts, cache, selected } = self;
        let rows = staged.rows();
        model.backward(dev, grads, &rows, acts, cache, selected, staged.selected(), dh, room)
    }
}
