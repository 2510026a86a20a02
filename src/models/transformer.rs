//! The one transformer: every family, every role, forward and backward; training, prefill and
//! decoding are the same forward pass over different rows.
//!
//! Pre-norm blocks: `m = x + out(attention(norm1(x)))`, `y = m + down(act(up(norm2(m))))`. Rows are
//! packed: sequences lie back to back, nothing is padded. A row's bits depend on its own sequence
//! only, so the log-prob of a token is the same number whenever and with whomever it is computed.

use super::{Mlp, Model, Norm, Params, Slot, Spec, model::need};
use crate::{
    device::{Buffer, Device, Float, Scope, View, ViewMut},
    error::{Error, Result},
    ops::{
        activation,
        attention::{self, KvLayer},
        embedding, layer_norm, matmul, rms_norm, rope,
    },
};

/// What one forward pass computes: new rows of some sequences.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Token of each row.
    pub ids: View<'a, u32>,
    /// Position of each row in its sequence.
    pub positions: View<'a, u32>,
    /// Which rows are which sequence, and where its keys and values are.
    pub attention: attention::Work<'a>,
}

/// Keys and values.
#[derive(Debug)]
pub struct Cache<'s, F> {
    layers: Vec<KvLayer<'s, F>>,
}

impl<'s, F: Float> Cache<'s, F> {
    /// `pages` pages for every block, to decode from.
    ///
    /// # Errors
    /// [`Error::Memory`] if the plan has no room.
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, pages: usize) -> Result<Self> {
        Self::with_layers(scope, spec, pages, spec.layers)
    }

    /// `pages` pages that the blocks use one after the other: enough where rows are complete
    /// sequences, as in training.
    ///
    /// # Errors
    /// [`Error::Memory`] if the plan has no room.
    pub fn transient(scope: &'s Scope<'_>, spec: &Spec, pages: usize) -> Result<Self> {
        Self::with_layers(scope, spec, pages, 1)
    }

    fn with_layers(scope: &'s Scope<'_>, spec: &Spec, pages: usize, layers: usize) -> Result<Self> {
        let shape = spec.attention();
        let layers = (0..layers).map(|_| KvLayer::new(scope, &shape, attention::PAGE, pages));
        Ok(Self { layers: layers.collect::<Result<_>>()? })
    }
}

/// What a normalisation keeps.
#[derive(Debug)]
struct Normed<'s, F> {
    y: Buffer<'s, F>,
    mean: Buffer<'s, F>,
    rstd: Buffer<'s, F>,
}

impl<'s, F: Float> Normed<'s, F> {
    fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize) -> Result<Self> {
        let means = if spec.norm == Norm::Layer { rows } else { 0 };
        Ok(Self {
            y: scope.alloc("normalised rows", rows * spec.hidden)?,
            mean: scope.alloc("row means", means)?,
            rstd: scope.alloc("row deviations", rows)?,
        })
    }
}

/// What a block keeps for its backward pass.
#[derive(Debug)]
struct Block<'s, F> {
    norm1: Normed<'s, F>,
    qkv: Buffer<'s, F>,
    attention: Buffer<'s, F>,
    lse: Buffer<'s, F>,
    mid: Buffer<'s, F>,
    norm2: Normed<'s, F>,
    up: Buffer<'s, F>,
    act: Buffer<'s, F>,
}

/// Buffers of a forward pass.
#[derive(Debug)]
pub struct Activations<'s, F> {
    /// The residual stream before each block, and after the last; one buffer if nothing is kept.
    x: Vec<Buffer<'s, F>>,
    blocks: Vec<Block<'s, F>>,
    scratch: Buffer<'s, F>,
}

impl<'s, F: Float> Activations<'s, F> {
    /// For `rows` rows; `keep` holds every block's intermediates for a backward pass.
    ///
    /// # Errors
    /// [`Error::Memory`] if the plan has no room.
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize, keep: bool) -> Result<Self> {
        let layers = if keep { spec.layers } else { 1 };
        let streams = if keep { layers + 1 } else { 1 };
        let x = (0..streams).map(|_| scope.alloc("residual stream", rows * spec.hidden));
        let block = |_| {
            Ok(Block {
                norm1: Normed::new(scope, spec, rows)?,
                qkv: scope.alloc("queries, keys and values", rows * spec.qkv_cols())?,
                attention: scope.alloc("attention output", rows * spec.attention_cols())?,
                lse: scope.alloc("attention log-sum-exp", rows * spec.q_heads)?,
                mid: scope.alloc("residual stream after attention", rows * spec.hidden)?,
                norm2: Normed::new(scope, spec, rows)?,
                up: scope.alloc("MLP inputs", rows * spec.up_cols())?,
                act: scope.alloc("MLP activations", rows * spec.mlp_hidden)?,
            })
        };
        let scratch =
            if keep { attention::backward_scratch_len(&spec.attention(), rows) } else { 0 };
        Ok(Self {
            x: x.collect::<Result<_>>()?,
            blocks: (0..layers).map(block).collect::<Result<_>>()?,
            scratch: scope.alloc("attention scratch", scratch)?,
        })
    }

    /// The residual stream before block `l` of a pass that kept it, `[rows, hidden]`; `l = layers`
    /// is the last one, before the final norm.
    #[must_use]
    pub fn stream(&self, l: usize) -> Option<View<'_, F>> {
        self.x.get(l).map(Buffer::view)
    }
}

/// The rows that a head reads, after the final norm.
#[derive(Debug)]
pub struct Selected<'s, F> {
    x: Buffer<'s, F>,
    norm: Normed<'s, F>,
}

impl<'s, F: Float> Selected<'s, F> {
    /// Room for `rows` rows.
    ///
    /// # Errors
    /// [`Error::Memory`] if the plan has no room.
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize) -> Result<Self> {
        let x = scope.alloc("selected rows", rows * spec.hidden)?;
        Ok(Self { x, norm: Normed::new(scope, spec, rows)? })
    }

    /// The hidden states `[rows, hidden]`.
    #[must_use]
    pub fn hidden(&self) -> View<'_, F> {
        self.norm.y.view()
    }
}

/// Buffers of a backward pass.
#[derive(Debug)]
pub struct Gradients<'s, F> {
    dx: Buffer<'s, F>,
    dnorm: Buffer<'s, F>,
    dqkv: Buffer<'s, F>,
    dattention: Buffer<'s, F>,
    dup: Buffer<'s, F>,
    dact: Buffer<'s, F>,
    dselected: Buffer<'s, F>,
    scratch: Buffer<'s, F>,
    order: Buffer<'s, u64>,
}

impl<'s, F: Float> Gradients<'s, F> {
    /// For `rows` rows of which a head reads `selected`.
    ///
    /// # Errors
    /// [`Error::Memory`] if the plan has no room.
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize, selected: usize) -> Result<Self> {
        let stream = || scope.alloc("gradient of the residual stream", rows * spec.hidden);
        let scratch = match spec.norm {
            Norm::Rms => rms_norm::scratch_len(rows.max(selected), spec.hidden),
            Norm::Layer => layer_norm::scratch_len(rows.max(selected), spec.hidden),
        };
        Ok(Self {
            dx: stream()?,
            dnorm: stream()?,
            dqkv: scope.alloc("gradient of queries, keys, values", rows * spec.qkv_cols())?,
            dattention: scope.alloc("gradient of attention", rows * spec.attention_cols())?,
            dup: scope.alloc("gradient of MLP inputs", rows * spec.up_cols())?,
            dact: scope.alloc("gradient of MLP activations", rows * spec.mlp_hidden)?,
            dselected: scope.alloc("gradient of selected rows", selected * spec.hidden)?,
            scratch: scope.alloc("norm scratch", scratch)?,
            order: scope.alloc("order of rows", embedding::scratch_len(rows.max(selected)))?,
        })
    }
}

impl<F: Float> Model<F> {
    /// Runs the blocks over `rows`; the residual stream stays in `acts`, new keys and values go to
    /// `cache`.
    ///
    /// # Errors
    /// [`Error::Value`] for an id or a position out of range, [`Error::Shape`] if `acts` is for
    /// another number of rows.
    pub fn forward(
        &self,
        dev: &Device,
        rows: &Rows<'_>,
        acts: &mut Activations<'_, F>,
        cache: &mut Cache<'_, F>,
    ) -> Result<()> {
        self.embed(dev, rows, acts.x[0].view_mut())?;
        let (streams, kept) = (acts.x.len(), acts.blocks.len());
        for l in 0..self.spec.layers {
            let (from, to) = if streams == 1 { (0, 0) } else { (l, l + 1) };
            let block = &mut acts.blocks[l.min(kept - 1)];
            let last = cache.layers.len() - 1;
            let kv = &mut cache.layers[l.min(last)];
            let (x, scratch) = (acts.x[from].view(), acts.scratch.view_mut());
            self.attend(dev, l, rows, x, block, kv, scratch)?;
            self.feed_forward(dev, l, acts.x[to].view_mut(), block)?;
        }
        Ok(())
    }

    fn embed(&self, dev: &Device, rows: &Rows<'_>, mut x: ViewMut<'_, F>) -> Result<()> {
        let table = need(&self.params, Slot::Embedding, None)?;
        embedding::forward(dev, x.reborrow(), rows.ids, table, false)?;
        if let Some(table) = self.params.get(Slot::Positions, None) {
            embedding::forward(dev, x, rows.positions, table, true)?;
        }
        Ok(())
    }

    /// `mid = x + out(attention(norm1(x)))`
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        dev: &Device,
        l: usize,
        rows: &Rows<'_>,
        x: View<'_, F>,
        b: &mut Block<'_, F>,
        kv: &mut KvLayer<'_, F>,
        scratch: ViewMut<'_, F>,
    ) -> Result<()> {
        let (shape, w, at) = (self.spec.attention(), &self.blocks[l], Some(l));
        self.norm(dev, &mut b.norm1, x, Slot::Norm1, Slot::Norm1Bias, at)?;
        let bias = self.params.get(Slot::QkvBias, at);
        matmul::forward(dev, b.qkv.view_mut(), b.norm1.y.view(), &w.qkv, bias, None)?;
        let turn = self.rope.as_ref().map(|table| (rows.positions, table));
        attention::append(dev, kv, b.qkv.view_mut(), rows.attention, &shape, turn)?;
        attention::forward(
            dev,
            b.attention.view_mut(),
            b.lse.view_mut(),
            b.qkv.view(),
            kv,
            rows.attention,
            &shape,
            scratch,
        )?;
        let bias = self.params.get(Slot::OutBias, at);
        matmul::forward(dev, b.mid.view_mut(), b.attention.view(), &w.out, bias, Some(x))
    }

    /// `y = mid + down(act(up(norm2(mid))))`
    fn feed_forward(
        &self,
        dev: &Device,
        l: usize,
        y: ViewMut<'_, F>,
        b: &mut Block<'_, F>,
    ) -> Result<()> {
        let (w, at) = (&self.blocks[l], Some(l));
        self.norm(dev, &mut b.norm2, b.mid.view(), Slot::Norm2, Slot::Norm2Bias, at)?;
        let bias = self.params.get(Slot::UpBias, at);
        let after = match self.spec.mlp {
            Mlp::Plain(act) => matmul::After { act, gated: false },
            Mlp::Gated(act) => matmul::After { act, gated: true },
        };
        let (act, up) = (b.act.view_mut(), b.up.view_mut());
        matmul::activated(dev, after, act, up, b.norm2.y.view(), &w.up, bias)?;
        let bias = self.params.get(Slot::DownBias, at);
        matmul::forward(dev, y, b.act.view(), &w.down, bias, Some(b.mid.view()))
    }

    fn norm(
        &self,
        dev: &Device,
        out: &mut Normed<'_, F>,
        x: View<'_, F>,
        weight: Slot,
        bias: Slot,
        layer: Option<usize>,
    ) -> Result<()> {
        let (w, eps) = (need(&self.params, weight, layer)?, F::of(self.spec.norm_eps));
        let (y, rstd) = (out.y.view_mut(), out.rstd.view_mut());
        match self.spec.norm {
            Norm::Rms => rms_norm::forward(dev, y, rstd, x, w, eps),
            Norm::Layer => {
                let b = need(&self.params, bias, layer)?;
                layer_norm::forward(dev, y, out.mean.view_mut(), rstd, x, w, b, eps)
            }
        }
    }

    /// Takes the rows that a head reads, and normalises them. The norm works row by row, so the
    /// rows that no head reads are never normalised.
    ///
    /// # Errors
    /// [`Error::Value`] if a row is out of range.
    pub fn select(
        &self,
        dev: &Device,
        acts: &Activations<'_, F>,
        rows: View<'_, u32>,
        out: &mut Selected<'_, F>,
    ) -> Result<()> {
        let Some(x) = acts.x.last() else {
            return Err(Error::value("activations", "at least one stream", 0));
        };
        embedding::forward(dev, out.x.view_mut(), rows, x.view(), false)?;
        let x = out.x.view();
        self.norm(dev, &mut out.norm, x, Slot::FinalNorm, Slot::FinalNormBias, None)
    }

    /// Adds to `grads` the gradient of all trunk weights, given `dh` `[selected, hidden]`, the
    /// gradient of the hidden states that [`Model::select`] made from `selected_rows`. The head's
    /// own weight is the caller's. Every segment must be a whole sequence, from position 0.
    ///
    /// # Errors
    /// [`Error::Shape`] if the buffers do not belong to one pass.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        dev: &Device,
        grads: &mut Params<F>,
        rows: &Rows<'_>,
        acts: &mut Activations<'_, F>,
        selected: &Selected<'_, F>,
        selected_rows: View<'_, u32>,
        dh: View<'_, F>,
        g: &mut Gradients<'_, F>,
    ) -> Result<()> {
        let hidden = self.spec.hidden;
        let d = (g.dselected.view_mut(), g.scratch.view_mut());
        let x = selected.x.view();
        self.norm_backward(dev, grads, d, dh, x, &selected.norm, Slot::FinalNorm, None)?;
        g.dx.host_mut().fill(F::ZERO);
        let (dx, d, order) = (g.dx.view_mut(), g.dselected.view(), g.order.view_mut());
        embedding::scatter(dev, dx, order, selected_rows, d, hidden)?;
        for l in (0..self.spec.layers).rev() {
            let b = &acts.blocks[l];
            self.feed_forward_backward(dev, grads, l, b, g)?;
            let (x, scratch) = (acts.x[l].view(), acts.scratch.view_mut());
            self.attend_backward(dev, grads, l, rows, x, b, g, scratch)?;
        }
        if let Some(d) = grads.get_mut(Slot::Embedding, None) {
            embedding::backward(dev, d, g.order.view_mut(), rows.ids, g.dx.view(), hidden)?;
        }
        if let Some(d) = grads.get_mut(Slot::Positions, None) {
            embedding::backward(dev, d, g.order.view_mut(), rows.positions, g.dx.view(), hidden)?;
        }
        Ok(())
    }

    /// Turns `g.dx` from the gradient of the block's output into that of `mid`.
    fn feed_forward_backward(
        &self,
        dev: &Device,
        grads: &mut Params<F>,
        l: usize,
        b: &Block<'_, F>,
        g: &mut Gradients<'_, F>,
    ) -> Result<()> {
        let (h, up, mlp) = (self.spec.hidden, self.spec.up_cols(), self.spec.mlp_hidden);
        let at = Some(l);
        let (dw, db) = grads.linear_mut(Slot::Down, Slot::DownBias, at);
        matmul::backward_weight(dev, dw, db, g.dx.view(), b.act.view(), (h, mlp))?;
        let w = need(&self.params, Slot::Down, at)?;
        matmul::backward_input(dev, g.dact.view_mut(), g.dx.view(), w, (h, mlp))?;
        let (dup, dact) = (g.dup.view_mut(), g.dact.view());
        match self.spec.mlp {
            Mlp::Plain(act) => activation::backward(dev, act, dup, dact, b.up.view())?,
            Mlp::Gated(act) => {
                activation::gated_backward(dev, act, dup, dact, b.up.view(), mlp)?;
            }
        }
        let (dw, db) = grads.linear_mut(Slot::Up, Slot::UpBias, at);
        matmul::backward_weight(dev, dw, db, g.dup.view(), b.norm2.y.view(), (up, h))?;
        let w = need(&self.params, Slot::Up, at)?;
        matmul::backward_input(dev, g.dnorm.view_mut(), g.dup.view(), w, (up, h))?;
        let (d, dy) = ((g.dx.view_mut(), g.scratch.view_mut()), g.dnorm.view());
        self.norm_backward(dev, grads, d, dy, b.mid.view(), &b.norm2, Slot::Norm2, at)
    }

    /// Turns `g.dx` from the gradient of `mid` into that of the block's input `x`.
    #[allow(clippy::too_many_arguments)]
    fn attend_backward(
        &self,
        dev: &Device,
        grads: &mut Params<F>,
        l: usize,
        rows: &Rows<'_>,
        x: View<'_, F>,
        b: &Block<'_, F>,
        g: &mut Gradients<'_, F>,
        scratch: ViewMut<'_, F>,
    ) -> Result<()> {
        let (h, att, qkv) = (self.spec.hidden, self.spec.attention_cols(), self.spec.qkv_cols());
        let (shape, at) = (self.spec.attention(), Some(l));
        let (dw, db) = grads.linear_mut(Slot::Out, Slot::OutBias, at);
        matmul::backward_weight(dev, dw, db, g.dx.view(), b.attention.view(), (h, att))?;
        let w = need(&self.params, Slot::Out, at)?;
        matmul::backward_input(dev, g.dattention.view_mut(), g.dx.view(), w, (h, att))?;
        attention::backward(
            dev,
            g.dqkv.view_mut(),
            g.dattention.view(),
            b.attention.view(),
            b.qkv.view(),
            b.lse.view(),
            rows.attention,
            &shape,
            scratch,
        )?;
        if let Some(table) = &self.rope {
            let heads = shape.q_heads + shape.kv_heads;
            let d = shape.head_dim;
            rope::backward(dev, g.dqkv.view_mut(), qkv, heads, d, rows.positions, table)?;
        }
        let (dw, db) = grads.linear_mut(Slot::Qkv, Slot::QkvBias, at);
        matmul::backward_weight(dev, dw, db, g.dqkv.view(), b.norm1.y.view(), (qkv, h))?;
        let w = need(&self.params, Slot::Qkv, at)?;
        matmul::backward_input(dev, g.dnorm.view_mut(), g.dqkv.view(), w, (qkv, h))?;
        let (d, dy) = ((g.dx.view_mut(), g.scratch.view_mut()), g.dnorm.view());
        self.norm_backward(dev, grads, d, dy, x, &b.norm1, Slot::Norm1, at)
    }

    /// Inside a block adds to `dx`, the gradient of the residual stream.
    #[allow(clippy::too_many_arguments)]
    fn norm_backward(
        &self,
        dev: &Device,
        grads: &mut Params<F>,
        (dx, scratch): (ViewMut<'_, F>, ViewMut<'_, F>),
        dy: View<'_, F>,
        x: View<'_, F>,
        kept: &Normed<'_, F>,
        slot: Slot,
        layer: Option<usize>,
    ) -> Result<()> {
        let w = need(&self.params, slot, layer)?;
        let bias = match slot {
            Slot::Norm1 => Slot::Norm1Bias,
            Slot::Norm2 => Slot::Norm2Bias,
            _ => Slot::FinalNormBias,
        };
        let ((dw, db), add) = (grads.linear_mut(slot, bias, layer), layer.is_some());
        match db {
            None => rms_norm::backward(dev, dx, dw, scratch, dy, x, w, kept.rstd.view(), add),
            Some(db) => {
                let (mean, rstd) = (kept.mean.view(), kept.rstd.view());
                layer_norm::backward(dev, dx, dw, db, scratch, dy, x, w, mean, rstd, add)
            }
        }
    }
}
