//! A linear layer, forward and backward: the one place that multiplies by a weight matrix.

use std::collections::BTreeMap;

use super::{
    Layout, ParamTensor, Params,
    adapter::{AdapterRows, LinearAdapter},
};
use crate::{
    device::{Device, Element, View, ViewMut},
    error::Result,
    ops::{
        activation::{self, Glu},
        experts::{self, PairRows, Stack, StackGrads},
        matmul::{self, Packed, Weight},
        routing::Routes,
    },
};

/// A layer `y = x Wᵀ + b` of a model.
#[derive(Debug)]
pub struct Linear<'a, T: Element> {
    pub(super) at: &'a ParamTensor,
    /// `[outputs, inputs]`
    pub weight: View<'a, T>,
    /// With the rows of 0 that a device adds to a router.
    pub(super) wide: View<'a, T>,
    /// The weight as the forward product reads it.
    pub packed: Weight<'a, T>,
    pub(super) bias: Option<View<'a, T>>,
    /// What is added to it, if something.
    pub(super) adapter: Option<LinearAdapter<'a, T>>,
}

impl<T: Element> Linear<'_, T> {
    /// `y = x Wᵀ + b`, plus `residual` if given, plus what its adapters add. `rows` is their
    /// scratch.
    pub fn forward(
        &self,
        dev: &Device,
        mut y: ViewMut<'_, T>,
        x: View<'_, T>,
        residual: Option<View<'_, T>>,
        rows: &mut AdapterRows<'_, T>,
    ) -> Result<()> {
        matmul::forward(dev, y.reborrow(), x, self.packed, self.bias, residual)?;
        self.adapter.as_ref().map_or(Ok(()), |adapter| adapter.forward(dev, y, x, rows))
    }

    /// `up = x Wᵀ + b` with what adapters add, and `y` its activation.
    pub fn activated(
        &self,
        dev: &Device,
        epilogue: matmul::Epilogue,
        [y, mut up]: [ViewMut<'_, T>; 2],
        x: View<'_, T>,
        rows: &mut AdapterRows<'_, T>,
    ) -> Result<()> {
        if self.adapter.is_none() {
            return matmul::activated(dev, epilogue, [y, up], x, self.packed, self.bias);
        }
        self.forward(dev, up.reborrow(), x, None, rows)?;
        match epilogue.gated {
            true => activation::gated_forward(dev, epilogue.act, y, up.view(), self.at.rows / 2),
            false => activation::forward(dev, epilogue.act, y, up.view()),
        }
    }

    /// Writes `dx` and adds to the gradients of weight and bias, unless they are frozen, and to
    /// those of adapters.
    pub fn backward(
        &self,
        dev: &Device,
        (grads, rows): (&mut Params<T::Acc>, &mut AdapterRows<'_, T>),
        mut dx: ViewMut<'_, T>,
        dy: View<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        let sides = (self.at.rows, self.at.cols);
        if let Some((dw, db)) = grads.pair_mut(self.at.kind, self.at.layer) {
            matmul::backward_weight(dev, dw, db, dy, x, sides)?;
        }
        matmul::backward_input(dev, dx.reborrow(), dy, self.weight, sides)?;
        let Some(adapter) = &self.adapter else { return Ok(()) };
        adapter.backward(dev, (grads, rows), dx, dy, x)
    }
}

/// The layers of a mixture of experts: the router, and one for each expert, of which a pair takes
/// that of its own.
impl<'a, T: Element> Linear<'a, T> {
    fn stack(&self) -> Stack<'a, T> {
        Stack { weight: self.packed, bias: self.bias }
    }

    /// The logits of a router.
    pub fn scores(&self, dev: &Device, logits: ViewMut<'_, T::Acc>, x: View<'_, T>) -> Result<()> {
        experts::scores(dev, logits, x, self.stack())
    }

    /// As [`Linear::backward`], of logits whose rows end in zeros, up to `room` of them, in which
    /// the router's weight and bias go on.
    pub fn scores_backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        (dx, room): (ViewMut<'_, T>, usize),
        dlogits: View<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        let sides = (room, self.at.cols);
        if let Some((dw, db)) = grads.wide_pair_mut(self.at.kind, self.at.layer, room) {
            matmul::backward_weight(dev, dw, db, dlogits, x, sides)?;
        }
        matmul::backward_input(dev, dx, dlogits, self.wide, sides)
    }

    /// `up` of each pair, and `act` its gated activation.
    pub fn activated_by(
        &self,
        dev: &Device,
        routes: &Routes<'_, T::Acc>,
        glu: Glu,
        to: [ViewMut<'_, T>; 2],
        x: PairRows<'_, T>,
    ) -> Result<()> {
        experts::activated(dev, routes, glu, to, x, self.stack())
    }

    /// `y` of each pair.
    pub fn forward_by(
        &self,
        dev: &Device,
        routes: &Routes<'_, T::Acc>,
        y: ViewMut<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        experts::forward(dev, routes, y, x, self.stack())
    }

    /// Writes `dx` of each pair.
    pub fn input_backward_by(
        &self,
        dev: &Device,
        routes: &Routes<'_, T::Acc>,
        dx: ViewMut<'_, T>,
        dy: PairRows<'_, T>,
    ) -> Result<()> {
        experts::backward_input(dev, routes, dx, dy, self.weight, self.at.sides())
    }

    /// Adds to the gradients of weights, unless they are frozen, and to those of biases if
    /// `with_bias`.
    pub fn weight_backward_by(
        &self,
        dev: &Device,
        routes: &Routes<'_, T::Acc>,
        (grads, with_bias): (&mut Params<T::Acc>, bool),
        dy: PairRows<'_, T>,
        x: PairRows<'_, T>,
    ) -> Result<()> {
        let Some((dw, db)) = grads.pair_mut(self.at.kind, self.at.layer) else { return Ok(()) };
        let grads = StackGrads { dw, dbias: db.filter(|_| with_bias) };
        experts::backward_weight(dev, routes, grads, dy, x, self.at.sides())
    }

    /// The gradient of the biases of outputs that a pair counts with by its weight, and what it
    /// adds to that of the weights.
    pub fn bias_backward_by(
        &self,
        dev: &Device,
        routes: &Routes<'_, T::Acc>,
        grads: &mut Params<T::Acc>,
        dweights: ViewMut<'_, T::Acc>,
        dy: View<'_, T>,
    ) -> Result<()> {
        let Some(bias) = self.bias else { return Ok(()) };
        let db = grads.pair_mut(self.at.kind, self.at.layer).and_then(|(_, db)| db);
        experts::bias_backward(dev, routes, db, dweights, dy, bias)
    }
}

/// The weights of all linear layers once more, in the order in which the CPU multiplies by them. A
/// CUDA device reads weights as they are.
#[derive(Debug)]
pub(super) struct PackedWeights<T: 'static>(
    /// By the offset of the weight.
    BTreeMap<usize, Packed<T>>,
);

impl<T: Element> PackedWeights<T> {
    pub fn new(dev: &Device, layout: &Layout) -> Result<Self> {
        let mut all = BTreeMap::new();
        if let Device::Cpu(_) = dev {
            for t in layout.linears() {
                let (n, k) = t.sides();
                all.insert(t.offset, Packed::stack(dev, t.stack, n, k)?);
            }
        }
        Ok(Self(all))
    }

    pub fn none() -> Self {
        Self(BTreeMap::new())
    }

    /// Bytes that [`PackedWeights::new`] takes.
    pub fn bytes(dev: &Device, layout: &Layout) -> usize {
        let bytes = |t: &ParamTensor| {
            let (n, k) = t.sides();
            t.stack * Packed::<T>::bytes(dev, n, k)
        };
        if let Device::Cpu(_) = dev { layout.linears().map(bytes).sum() } else { 0 }
    }

    /// Copies the weights again after they changed.
    pub fn pack(&mut self, dev: &Device, params: &Params<T>) -> Result<()> {
        for t in params.layout().tensors() {
            let Some(packed) = self.0.get_mut(&t.offset) else { continue };
            packed.pack(dev, params.tensor(t))?;
        }
        Ok(())
    }

    /// All of them, each with the offset of its weight.
    pub fn all(&self) -> impl Iterator<Item = (&usize, &Packed<T>)> {
        self.0.iter()
    }

    pub fn get(&self, t: &ParamTensor) -> Option<&Packed<T>> {
        self.0.get(&t.offset)
    }
}
