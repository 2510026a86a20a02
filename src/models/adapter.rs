//! Low-rank adapters of linear layers (LoRA, Hu et al. 2021): `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` with `A`
//! `[rank, inputs]` and `B` `[outputs, rank]`, beside a `W` that stays as it is.
//!
//! A weight that is made of several stored tensors has adapters for each: what one adds goes to the
//! columns of `y` that are its own. The products are those of [`matmul`], so a row of `y` has the
//! same bits with whomever it is computed. `x Aᵀ` is computed again in the backward pass.

use super::{Layout, ParamTensor, Params, Spec};
use crate::{
    device::{Buffer, Device, Element, Scope, View, ViewMut},
    error::{Error, Result},
    ops::{
        gate::{self, Strided},
        matmul::{self, Weight},
        residual, scale,
    },
};

/// Rows that adapters compute in, which all layers of a pass use in turn.
#[derive(Debug)]
pub struct AdapterRows<'s, T: Element> {
    /// `s x Aᵀ`, and its gradient.
    low: [Buffer<'s, T>; 2],
    /// Rows as wide as those of a layer.
    wide: [Buffer<'s, T>; 2],
}

impl<'s, T: Element> AdapterRows<'s, T> {
    /// For passes over `rows` rows of a model of this spec; empty, if it has no adapters.
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize, trained: bool) -> Result<Self> {
        let (rank, wide) = match &spec.adapter {
            Some(adapter) => (adapter.room(spec), Layout::widest_factor(spec, trained)),
            None => (0, 0),
        };
        let low =
            |there: bool| scope.alloc("rows inside adapters", rows * rank * usize::from(there));
        let wide = || scope.alloc("rows of adapters", rows * wide);
        Ok(Self { low: [low(true)?, low(trained)?], wide: [wide()?, wide()?] })
    }
}

/// A factor of an adapter, to multiply by.
#[derive(Debug)]
pub(super) struct FactorWeight<'a, T: Element> {
    pub at: &'a ParamTensor,
    pub weight: View<'a, T>,
    /// The same as the forward product reads it.
    pub packed: Weight<'a, T>,
}

/// The adapters of a linear layer.
#[derive(Debug)]
pub(super) struct LinearAdapter<'a, T: Element> {
    /// `A` and `B` of each.
    pub parts: Vec<[FactorWeight<'a, T>; 2]>,
    pub scale: f64,
    /// Outputs of the layer.
    pub outputs: usize,
}

impl<T: Element> LinearAdapter<'_, T> {
    /// `low = s x Aᵀ`
    fn project(
        &self,
        dev: &Device,
        a: &FactorWeight<'_, T>,
        mut low: ViewMut<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        matmul::forward(dev, low.reborrow(), x, a.packed, None, None)?;
        self.scaled(dev, low)
    }

    fn scaled(&self, dev: &Device, low: ViewMut<'_, T>) -> Result<()> {
        if self.scale == 1.0 { Ok(()) } else { scale::in_place(dev, low, self.scale, None) }
    }

    /// The columns of `y` that a factor `B` adds to.
    fn columns<V>(&self, b: &ParamTensor, data: V) -> Strided<V> {
        let first = b.factor.map_or(0, |f| f.first);
        Strided { data, first, stride: self.outputs }
    }

    /// Adds `s (x Aᵀ) Bᵀ` to `y`.
    pub fn forward(
        &self,
        dev: &Device,
        mut y: ViewMut<'_, T>,
        x: View<'_, T>,
        rows: &mut AdapterRows<'_, T>,
    ) -> Result<()> {
        let AdapterRows { low: [low, _], wide: [before, after] } = rows;
        for [a, b] in &self.parts {
            let (count, n) = (x.len() / a.at.cols, b.at.rows);
            let mut low = low.view_mut().range(0..count * b.at.cols);
            self.project(dev, a, low.reborrow(), x)?;
            let mut before = before.view_mut().range(0..count * n);
            if n == self.outputs {
                dev.copy(before.reborrow(), y.view())?;
                let sum = Some(before.view());
                matmul::forward(dev, y.reborrow(), low.view(), b.packed, None, sum)?;
                continue;
            }
            let own = self.columns(b.at, y.view());
            gate::copy(dev, Strided::dense(before.reborrow(), n), own, n)?;
            let mut after = after.view_mut().range(0..count * n);
            let sum = Some(before.view());
            matmul::forward(dev, after.reborrow(), low.view(), b.packed, None, sum)?;
            let own = self.columns(b.at, y.reborrow());
            gate::copy(dev, own, Strided::dense(after.view(), n), n)?;
        }
        Ok(())
    }

    /// With `h = s x Aᵀ`: `dB += dyᵀ h`, `dh = s dy B`, `dA += dhᵀ x`, `dx += dh A`.
    pub fn backward(
        &self,
        dev: &Device,
        (grads, rows): (&mut Params<T::Acc>, &mut AdapterRows<'_, T>),
        mut dx: ViewMut<'_, T>,
        dy: View<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        let AdapterRows { low: [low, dlow], wide: [own, back] } = rows;
        for [a, b] in &self.parts {
            let (k, n, rank) = (a.at.cols, b.at.rows, b.at.cols);
            let count = x.len() / k;
            if grads.layout().at(b.at.offset).and_then(|t| t.factor) != b.at.factor {
                return Err(Error::value("gradients", "those of adapters", "others"));
            }
            let mut low = low.view_mut().range(0..count * rank);
            self.project(dev, a, low.reborrow(), x)?;
            let mut own = own.view_mut().range(0..count * n);
            let dy = if n == self.outputs {
                dy
            } else {
                let (to, from) = (Strided::dense(own.reborrow(), n), self.columns(b.at, dy));
                gate::copy(dev, to, from, n)?;
                own.view()
            };
            let db = grads.tensor_mut(b.at);
            matmul::backward_weight(dev, db, None, dy, low.view(), (n, rank))?;
            let mut dlow = dlow.view_mut().range(0..count * rank);
            matmul::backward_input(dev, dlow.reborrow(), dy, b.weight, (n, rank))?;
            self.scaled(dev, dlow.reborrow())?;
            let da = grads.tensor_mut(a.at);
            matmul::backward_weight(dev, da, None, dlow.view(), x, (rank, k))?;
            let mut back = back.view_mut().range(0..count * k);
            matmul::backward_input(dev, back.reborrow(), dlow.view(), a.weight, (rank, k))?;
            residual::add(dev, dx.reborrow(), back.view())?;
        }
        Ok(())
    }
}
