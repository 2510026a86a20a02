//! Experts in the place of a block's MLP, forward and backward:
//! `y = mid + sum_j w_j down_j(glu(up_j(x)))` over the experts that a row chose; and the MLP beside
//! them, where it is an expert of all rows: `y += down(sigmoid(g . x) glu(up(x)))`.

use super::{Experts, Model, ParamKind, Params, Spec};
use crate::{
    device::{Buffer, Device, Element, Scope, View, ViewMut},
    error::{Error, Result},
    ops::{
        experts::{self, GluGrads, PairRows},
        gate, matmul,
        routing::{self, Routes},
        scalar_head,
    },
};

/// What a block keeps for its backward pass.
#[derive(Debug)]
pub(super) struct MixtureActivations<'s, T: Element> {
    pub routes: Routes<'s, T::Acc>,
    up: Buffer<'s, T>,
    act: Buffer<'s, T>,
}

impl<'s, T: Element> MixtureActivations<'s, T> {
    pub fn new(dev: &Device, scope: &'s Scope<'_>, e: &Experts, rows: usize) -> Result<Self> {
        let pairs = rows * e.router.top;
        Ok(Self {
            routes: Routes::new(dev, scope, e.router, rows)?,
            up: scope.alloc("inputs of experts", pairs * 2 * e.hidden)?,
            act: scope.alloc("activations of experts", pairs * e.hidden)?,
        })
    }
}

/// What a block keeps of the expert that all rows have.
#[derive(Debug)]
pub(super) struct SharedActivations<'s, T: Element> {
    /// Before a sigmoid: how much it counts for each row.
    pub gate_logit: Buffer<'s, T::Acc>,
    /// Its activations, times that.
    pub act: Buffer<'s, T>,
}

impl<'s, T: Element> SharedActivations<'s, T> {
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize) -> Result<Self> {
        Ok(Self {
            gate_logit: scope.alloc("gates of a shared expert", rows)?,
            act: scope.alloc("gated activations of a shared expert", rows * spec.mlp_hidden)?,
        })
    }
}

/// Buffers that all blocks use in turn.
#[derive(Debug)]
pub(super) struct MixtureGradients<'s, T: Element> {
    dup: Buffer<'s, T>,
    dact: Buffer<'s, T>,
    dweights: Buffer<'s, T::Acc>,
    dlogits: Buffer<'s, T>,
    /// Of the gates of a shared expert.
    dgate: Buffer<'s, T::Acc>,
    /// See [`PassOptions::balance`](super::PassOptions::balance).
    pub balance: f64,
}

impl<'s, T: Element> MixtureGradients<'s, T> {
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, e: &Experts, rows: usize) -> Result<Self> {
        let pairs = rows * e.router.top;
        let shared = if e.shared { rows } else { 0 };
        Ok(Self {
            dup: scope.alloc("gradient of experts' inputs", pairs * 2 * e.hidden)?,
            dact: scope.alloc("gradient of experts' activations", pairs * e.hidden)?,
            dweights: scope.alloc("gradient of experts' weights", pairs)?,
            dlogits: scope.alloc("gradient of router logits", rows * spec.router_room())?,
            dgate: scope.alloc("gradient of gates of a shared expert", shared)?,
            balance: 0.0,
        })
    }
}

/// Elements of a buffer with a row of the residual stream for each pair of a row and an expert.
pub(super) fn pair_rows_len(spec: &Spec, rows: usize) -> usize {
    spec.experts.as_ref().map_or(0, |e| rows * e.router.top * spec.hidden)
}

/// The experts of a block at work.
pub(super) struct Mixture<'a, T: Element> {
    pub dev: &'a Device,
    pub model: &'a Model<T>,
    pub at: Option<usize>,
    pub spec: &'a Experts,
}

impl<T: Element> Mixture<'_, T> {
    fn linear(&self, kind: ParamKind) -> Result<super::Linear<'_, T>> {
        self.model.linear(self.dev, kind, self.at)
    }

    /// Chooses experts, and computes up to their activations. `pairs` has [`pair_rows_len`].
    pub fn expand(
        &self,
        b: &mut MixtureActivations<'_, T>,
        pairs: ViewMut<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        let (dev, MixtureActivations { routes, up, act }) = (self.dev, b);
        self.linear(ParamKind::Router)?.scores(dev, routes.logits.view_mut(), x)?;
        routing::forward(dev, routes)?;
        let x = PairRows::Gathered { x, room: pairs };
        let to = [act.view_mut(), up.view_mut()];
        self.linear(ParamKind::ExpertsUp)?.activated_by(dev, routes, self.spec.glu, to, x)
    }

    /// `y = mid +` what the experts give; without `mid` it is added to `y`.
    pub fn contract(
        &self,
        b: &MixtureActivations<'_, T>,
        mut pairs: ViewMut<'_, T>,
        y: ViewMut<'_, T>,
        mid: Option<View<'_, T>>,
    ) -> Result<()> {
        let (dev, MixtureActivations { routes, act, .. }) = (self.dev, b);
        let down = self.linear(ParamKind::ExpertsDown)?;
        down.forward_by(dev, routes, pairs.reborrow(), act.view())?;
        routing::combine(dev, routes, y, pairs.view(), mid, true)
    }

    /// Writes `dx`, the gradient of the input `x`, given `dy`, that of the output.
    pub fn backward(
        &self,
        grads: &mut Params<T::Acc>,
        b: &MixtureActivations<'_, T>,
        (g, mut pairs): (&mut MixtureGradients<'_, T>, ViewMut<'_, T>),
        (mut dx, dy): (ViewMut<'_, T>, View<'_, T>),
        x: View<'_, T>,
    ) -> Result<()> {
        let (dev, MixtureActivations { routes, up, act }) = (self.dev, b);
        let MixtureGradients { dup, dact, dweights, dlogits, balance, .. } = g;
        let down = self.linear(ParamKind::ExpertsDown)?;
        let of_rows = PairRows::Gathered { x: dy, room: pairs.reborrow() };
        down.input_backward_by(dev, routes, dact.view_mut(), of_rows)?;
        let to =
            GluGrads { dact: dact.view_mut(), dup: dup.view_mut(), dweights: dweights.view_mut() };
        experts::glu_backward(dev, routes, self.spec.glu, to, [act.view(), up.view()])?;
        down.bias_backward_by(dev, routes, grads, dweights.view_mut(), dy)?;
        let of_rows = PairRows::Gathered { x: dy, room: pairs.reborrow() };
        let weighted = PairRows::Sorted(dact.view());
        down.weight_backward_by(dev, routes, (grads, false), of_rows, weighted)?;
        let up = self.linear(ParamKind::ExpertsUp)?;
        let of_rows = PairRows::Gathered { x, room: pairs.reborrow() };
        let d = PairRows::Sorted(dup.view());
        up.weight_backward_by(dev, routes, (grads, true), d, of_rows)?;
        let d = PairRows::Sorted(dup.view());
        up.input_backward_by(dev, routes, pairs.reborrow(), d)?;
        routing::backward(dev, routes, dlogits.view_mut(), dweights.view(), *balance)?;
        let (router, room) =
            (self.linear(ParamKind::Router)?, matmul::width(dev, self.spec.router.experts));
        let to = (dx.reborrow(), room);
        router.scores_backward(dev, grads, to, dlogits.view(), x)?;
        routing::combine(dev, routes, dx, pairs.view(), None, false)
    }

    /// The expert of all rows behind its gate: `s.act = sigmoid(g . x) act`.
    pub fn share(
        &self,
        s: &mut SharedActivations<'_, T>,
        act: View<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        scalar_head::forward(self.dev, s.gate_logit.view_mut(), x, self.shared_gate()?)?;
        gate::rows(self.dev, s.act.view_mut(), act, s.gate_logit.view())
    }

    /// Turns `dact` from the gradient of `s.act` into that of `act`.
    pub fn share_backward(
        &self,
        s: &SharedActivations<'_, T>,
        g: &mut MixtureGradients<'_, T>,
        dact: ViewMut<'_, T>,
        act: View<'_, T>,
    ) -> Result<()> {
        gate::rows_backward(self.dev, dact, g.dgate.view_mut(), act, s.gate_logit.view())
    }

    /// Writes `dx`, the gradient of `x` through the gate, after [`Mixture::share_backward`].
    pub fn gate_backward(
        &self,
        grads: &mut Params<T::Acc>,
        g: &MixtureGradients<'_, T>,
        dx: ViewMut<'_, T>,
        x: View<'_, T>,
    ) -> Result<()> {
        let (w, to) = (self.shared_gate()?, grads.get_mut(ParamKind::SharedGate, self.at));
        let Some(dw) = to else {
            return Err(Error::value("gradients", "that of a shared expert's gate", "none"));
        };
        scalar_head::backward(self.dev, dx, dw, g.dgate.view(), x, w)
    }

    fn shared_gate(&self) -> Result<View<'_, T>> {
        let params = self.model.params();
        Ok(params.tensor(params.need(ParamKind::SharedGate, self.at)?))
    }
}
