//! A normalisation layer, forward and backward.

use super::{Norm, ParamTensor, Params, Spec};
use crate::{
    device::{Buffer, Device, Element, Scope, View, ViewMut},
    error::{Error, Result},
    ops::norm::{self, NormGrads, NormKept, NormOut, NormSpec},
};

/// Normalised rows, and what the backward pass reads of them.
#[derive(Debug)]
pub(super) struct Normed<'s, T: Element> {
    pub y: Buffer<'s, T>,
    mean: Buffer<'s, T::Acc>,
    rstd: Buffer<'s, T::Acc>,
}

impl<'s, T: Element> Normed<'s, T> {
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize) -> Result<Self> {
        let means = if spec.norm == Norm::Layer { rows } else { 0 };
        Ok(Self {
            y: scope.alloc("normalised rows", rows * spec.hidden)?,
            mean: scope.alloc("row means", means)?,
            rstd: scope.alloc("row deviations", rows)?,
        })
    }
}

pub(super) struct NormLayer<'a, T: Element> {
    pub at: &'a ParamTensor,
    pub weight: View<'a, T>,
    pub bias: Option<View<'a, T>>,
    pub spec: NormSpec,
}

impl<T: Element> NormLayer<'_, T> {
    pub fn forward(&self, dev: &Device, out: &mut Normed<'_, T>, x: View<'_, T>) -> Result<()> {
        let (y, mean, rstd) = (out.y.view_mut().into(), out.mean.view_mut(), out.rstd.view_mut());
        norm::forward(dev, self.spec, NormOut { y, mean, rstd }, x, self.weight, self.bias)
    }

    /// Adds to the gradients of weight and bias, and inside a block to `dx`, the gradient of the
    /// residual stream; the gradient of the rows that a head reads is written.
    pub fn backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        (dx, scratch): (ViewMut<'_, T>, ViewMut<'_, T::Acc>),
        dy: View<'_, T>,
        x: View<'_, T>,
        kept: &Normed<'_, T>,
    ) -> Result<()> {
        let add = self.at.layer.is_some();
        let Some((dw, db)) = grads.pair_mut(self.at.kind, self.at.layer) else {
            return Err(Error::value("gradients", "those of all norms", "none"));
        };
        let (w, mean, rstd) = (self.weight, kept.mean.view(), kept.rstd.view());
        let grads = NormGrads { dx, add, dw, db, scratch };
        norm::backward(dev, self.spec, grads, dy, NormKept { x: x.into(), w, mean, rstd })
    }
}

/// Elements of scratch that a backward pass over `rows` rows needs.
pub(super) fn scratch_len(spec: &Spec, rows: usize) -> usize {
    norm::scratch_len(spec.norm, rows, spec.hidden)
}
