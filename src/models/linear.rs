//! A linear layer, forward and backward: the one place that multiplies by a weight matrix.

use std::collections::BTreeMap;

use super::{Layout, ParamKind, ParamTensor, Params};
use crate::{
    device::{Device, Element, View, ViewMut},
    error::Result,
    ops::matmul::{self, Packed, Weight},
};

/// A layer `y = x Wᵀ + b` of a model.
#[derive(Debug)]
pub struct Linear<'a, T: Element> {
    pub(super) at: &'a ParamTensor,
    /// `[outputs, inputs]`
    pub weight: View<'a, T>,
    /// The weight as the forward product reads it.
    pub packed: Weight<'a, T>,
    pub(super) bias: Option<View<'a, T>>,
}

impl<T: Element> Linear<'_, T> {
    /// `y = x Wᵀ + b`, plus `residual` if given.
    pub fn forward(
        &self,
        dev: &Device,
        y: ViewMut<'_, T>,
        x: View<'_, T>,
        residual: Option<View<'_, T>>,
    ) -> Result<()> {
        matmul::forward(dev, y, x, self.packed, self.bias, residual)
    }

    /// `up = x Wᵀ + b`, and `y` its activation.
    pub fn activated(
        &self,
        dev: &Device,
        epilogue: matmul::Epilogue,
        y: ViewMut<'_, T>,
        up: ViewMut<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        matmul::activated(dev, epilogue, [y, up], x, self.packed, self.bias)
    }

    /// Writes `dx` and adds to the gradients of weight and bias, unless they are frozen.
    pub fn backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        dx: ViewMut<'_, T>,
        dy: View<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        let sides = (self.at.rows, self.at.cols);
        if let Some((dw, db)) = grads.pair_mut(self.at.kind, self.at.layer) {
            matmul::backward_weight(dev, dw, db, dy, x, sides)?;
        }
        matmul::backward_input(dev, dx, dy, self.weight, sides)
    }
}

/// The weights of all linear layers once more, in the order in which the CPU multiplies by them. A
/// CUDA device reads weights as they are.
#[derive(Debug)]
pub(super) struct PackedWeights<T: 'static>(BTreeMap<(ParamKind, Option<usize>), Packed<T>>);

impl<T: Element> PackedWeights<T> {
    pub fn new(dev: &Device, layout: &Layout) -> Result<Self> {
        let mut all = BTreeMap::new();
        if let Device::Cpu(_) = dev {
            for t in layout.linears() {
                all.insert((t.kind, t.layer), Packed::new(dev, t.rows, t.cols)?);
            }
        }
        Ok(Self(all))
    }

    /// Bytes that [`PackedWeights::new`] takes.
    pub fn bytes(dev: &Device, layout: &Layout) -> usize {
        let bytes = |t: &ParamTensor| Packed::<T>::bytes(dev, t.rows, t.cols);
        if let Device::Cpu(_) = dev { layout.linears().map(bytes).sum() } else { 0 }
    }

    /// Copies the weights again after they changed.
    pub fn pack(&mut self, dev: &Device, params: &Params<T>) -> Result<()> {
        for ((kind, layer), packed) in &mut self.0 {
            packed.pack(dev, params.tensor(params.need(*kind, *layer)?))?;
        }
        Ok(())
    }

    /// All of them, each with its layer.
    pub fn all(&self) -> impl Iterator<Item = (&(ParamKind, Option<usize>), &Packed<T>)> {
        self.0.iter()
    }

    pub fn get(&self, t: &ParamTensor) -> Option<&Packed<T>> {
        self.0.get(&(t.kind, t.layer))
    }
}
