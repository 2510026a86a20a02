//! A normalisation layer, forward and backward.

use super::{Norm, ParamTensor, Params, QkNorm, Spec};
use crate::{
    device::{Buffer, Device, Element, Scope, View, ViewMut},
    error::Result,
    ops::norm::{self, NormGrads, NormKept, NormOut, NormRows, NormSpec},
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
        let y = scope.alloc("normalised rows", rows * spec.hidden)?;
        Ok(Self { y, ..Self::in_place(scope, spec, rows)? })
    }

    /// Without normalised rows of its own: they are written elsewhere.
    pub fn in_place(scope: &'s Scope<'_>, spec: &Spec, rows: usize) -> Result<Self> {
        let means = if spec.norm == Norm::Layer { rows } else { 0 };
        Ok(Self {
            y: scope.alloc("normalised rows", 0)?,
            mean: scope.alloc("row means", means)?,
            rstd: scope.alloc("row deviations", rows)?,
        })
    }

    /// Queries or keys: `heads` rows a token, which are written elsewhere.
    pub fn heads(scope: &'s Scope<'_>, rows: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            y: scope.alloc("normalised rows", 0)?,
            mean: scope.alloc("row means", 0)?,
            rstd: scope.alloc("row deviations", rows * heads)?,
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

    /// [`NormLayer::forward`] into rows that are not `kept`'s own.
    pub fn forward_to(
        &self,
        dev: &Device,
        y: NormRows<ViewMut<'_, T>>,
        kept: &mut Normed<'_, T>,
        x: NormRows<View<'_, T>>,
    ) -> Result<()> {
        let (mean, rstd) = (kept.mean.view_mut(), kept.rstd.view_mut());
        norm::forward(dev, self.spec, NormOut { y, mean, rstd }, x, self.weight, self.bias)
    }

    /// Adds to the gradients of weight and bias, unless they are frozen, and writes `dx` or, with
    /// `add`, adds to it.
    pub fn backward<'v>(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        out: NormInputGradient<'_, T>,
        dy: impl Into<NormRows<View<'v, T>>>,
        x: impl Into<NormRows<View<'v, T>>>,
        kept: &Normed<'_, T>,
    ) -> Result<()>
    where
        T: 'v,
    {
        let NormInputGradient { dx, add, scratch } = out;
        let (dw, db) = grads.pair_mut(self.at.kind, self.at.layer).unzip();
        let (w, mean, rstd) = (self.weight, kept.mean.view(), kept.rstd.view());
        let grads = NormGrads { dx, add, dw, db: db.flatten(), scratch };
        norm::backward(dev, self.spec, grads, dy, NormKept { x: x.into(), w, mean, rstd })
    }
}

/// Where the gradient of a norm's input goes.
pub(super) struct NormInputGradient<'a, T: Element> {
    pub dx: ViewMut<'a, T>,
    /// Adds to `dx`, the gradient of the residual stream.
    pub add: bool,
    pub scratch: ViewMut<'a, T::Acc>,
}

/// Elements of scratch that a backward pass over `rows` rows needs.
pub(super) fn scratch_len(spec: &Spec, rows: usize) -> usize {
    let hidden = norm::scratch_len(spec.norm, rows, spec.hidden);
    let heads = |(rows, cols)| norm::scratch_len(Norm::Rms, rows, cols);
    let normed = [spec.q_heads, spec.kv_heads].map(|heads| match spec.qk_norm {
        None => (0, 0),
        Some(QkNorm::Heads) => (rows * heads, spec.head_dim),
        Some(QkNorm::Rows) => (rows, heads * spec.head_dim),
    });
    let delta = spec.delta().map_or((0, 0), |s| (rows * s.value_heads, s.value_dim));
    normed.into_iter().chain([delta]).map(heads).fold(hidden, usize::max)
}
