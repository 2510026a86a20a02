//! The one transformer: every family, every role, forward and backward; training, prefill and
//! decoding are the same forward pass over different rows.
//!
//! Pre-norm blocks: `m = x + out(attention(norm1(x)))`, `y = m + down(act(up(norm2(m))))`. Rows are
//! packed: sequences lie back to back, nothing is padded. A row's bits depend on its own sequence
//! only, so the log-prob of a token is the same number whenever and with whomever it is computed.

use super::{Mlp, Model, Norm, ParamKind, Params, Spec, model::need};
use crate::{
    device::{Buffer, Device, Element, Scope, View, ViewMut},
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

/// Sizes of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassShape {
    pub rows: usize,
    /// Sequences that they are of.
    pub sequences: usize,
    /// Rows that a head reads.
    pub selected: usize,
    /// The most positions of a sequence of which a cache holds the beginning; 0 if all are whole.
    pub cached: usize,
}

impl PassShape {
    /// The largest pass over whole sequences of so many rows: a head reads them all.
    pub fn whole(rows: usize, sequences: usize) -> Self {
        Self { rows, sequences, selected: rows, cached: 0 }
    }

    /// Pages of `page` positions that hold all keys and values.
    pub fn pages(&self, page: usize) -> usize {
        match self.cached {
            0 => self.rows / page + self.sequences,
            n => self.sequences * n.div_ceil(page),
        }
    }
}

/// What a forward pass keeps for a backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// The residual stream before each block; the backward pass computes the block again.
    Streams,
    /// All that the backward pass reads.
    All,
}

#[derive(Debug)]
pub struct Cache<'s, T> {
    layers: Vec<KvLayer<'s, T>>,
}

impl<'s, T: Element> Cache<'s, T> {
    /// `pages` pages for every block, to decode from.
    pub fn new(dev: &Device, scope: &'s Scope<'_>, spec: &Spec, pages: usize) -> Result<Self> {
        Self::with_layers(dev, scope, spec, pages, spec.layers)
    }

    /// `pages` pages that the blocks use one after the other: enough where rows are complete
    /// sequences, as in training.
    pub fn transient(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        pages: usize,
    ) -> Result<Self> {
        Self::with_layers(dev, scope, spec, pages, 1)
    }

    fn with_layers(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        pages: usize,
        layers: usize,
    ) -> Result<Self> {
        let shape = spec.attention();
        let layers = (0..layers).map(|_| KvLayer::new(scope, &shape, shape.page(dev), pages));
        Ok(Self { layers: layers.collect::<Result<_>>()? })
    }
}

/// What a normalisation keeps.
#[derive(Debug)]
struct Normed<'s, T: Element> {
    y: Buffer<'s, T>,
    mean: Buffer<'s, T::Acc>,
    rstd: Buffer<'s, T::Acc>,
}

impl<'s, T: Element> Normed<'s, T> {
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
struct Block<'s, T: Element> {
    norm1: Normed<'s, T>,
    qkv: Buffer<'s, T>,
    attention: Buffer<'s, T>,
    lse: Buffer<'s, T::Acc>,
    mid: Buffer<'s, T>,
    norm2: Normed<'s, T>,
    up: Buffer<'s, T>,
    act: Buffer<'s, T>,
}

/// Buffers of a forward pass.
#[derive(Debug)]
pub struct Activations<'s, T: Element> {
    /// The residual stream before each block, and after the last; one buffer if nothing is kept.
    x: Vec<Buffer<'s, T>>,
    /// One for each block, or one that all use in turn.
    blocks: Vec<Block<'s, T>>,
    scratch: Buffer<'s, T::Acc>,
}

impl<'s, T: Element> Activations<'s, T> {
    /// For a pass of this pass_shape.
    pub fn new(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        pass_shape: PassShape,
        keep: Keep,
    ) -> Result<Self> {
        let rows = pass_shape.rows;
        let layers = if keep == Keep::All { spec.layers } else { 1 };
        let streams = if keep == Keep::Nothing { 1 } else { spec.layers + 1 };
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
        // A row that is alone in its segment sees more than itself only if a cache has what comes
        // before.
        let (shape, alone) =
            (spec.attention(), if pass_shape.cached > 0 { pass_shape.sequences } else { 0 });
        let scratch = attention::forward_scratch_len(dev, &shape, alone, pass_shape.cached);
        let scratch = match keep {
            Keep::Nothing => scratch,
            _ => scratch.max(attention::backward_scratch_len(&shape, rows)),
        };
        Ok(Self {
            x: x.collect::<Result<_>>()?,
            blocks: (0..layers).map(block).collect::<Result<_>>()?,
            scratch: scope.alloc("attention scratch", scratch)?,
        })
    }

    /// The residual stream before block `l` of a pass that kept it, `[rows, hidden]`; `l = layers`
    /// is the last one, before the final norm.
    pub fn stream(&self, l: usize) -> Option<View<'_, T>> {
        self.x.get(l).map(Buffer::view)
    }
}

/// The rows that a head reads, after the final norm.
#[derive(Debug)]
pub struct HeadInput<'s, T: Element> {
    x: Buffer<'s, T>,
    norm: Normed<'s, T>,
}

impl<'s, T: Element> HeadInput<'s, T> {
    /// Room for `rows` rows.
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, rows: usize) -> Result<Self> {
        let x = scope.alloc("selected rows", rows * spec.hidden)?;
        Ok(Self { x, norm: Normed::new(scope, spec, rows)? })
    }

    /// The hidden states `[rows, hidden]`.
    pub fn hidden(&self) -> View<'_, T> {
        self.norm.y.view()
    }
}

/// Buffers of a backward pass.
#[derive(Debug)]
pub struct Gradients<'s, T: Element> {
    dx: Buffer<'s, T>,
    dnorm: Buffer<'s, T>,
    dqkv: Buffer<'s, T>,
    dattention: Buffer<'s, T>,
    dup: Buffer<'s, T>,
    dact: Buffer<'s, T>,
    dselected: Buffer<'s, T>,
    scratch: Buffer<'s, T::Acc>,
    order: Buffer<'s, u64>,
}

impl<'s, T: Element> Gradients<'s, T> {
    /// For `rows` rows of which a head reads `selected`.
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

impl<T: Element> Model<T> {
    /// Runs the blocks over `rows`; the residual stream stays in `acts`, new keys and values go to
    /// `cache`.
    pub fn forward(
        &self,
        dev: &Device,
        rows: &Rows<'_>,
        acts: &mut Activations<'_, T>,
        cache: &mut Cache<'_, T>,
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

    fn embed(&self, dev: &Device, rows: &Rows<'_>, mut x: ViewMut<'_, T>) -> Result<()> {
        let table = need(&self.params, ParamKind::Embedding, None)?;
        embedding::forward(dev, x.reborrow(), rows.ids, table, false)?;
        if let Some(table) = self.params.get(ParamKind::Positions, None) {
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
        x: View<'_, T>,
        b: &mut Block<'_, T>,
        kv: &mut KvLayer<'_, T>,
        scratch: ViewMut<'_, T::Acc>,
    ) -> Result<()> {
        let (shape, at) = (self.spec.attention(), Some(l));
        self.norm(dev, &mut b.norm1, x, ParamKind::Norm1, ParamKind::Norm1Bias, at)?;
        let (w, bias) =
            (self.linear(dev, ParamKind::Qkv, l)?, self.params.get(ParamKind::QkvBias, at));
        matmul::forward(dev, b.qkv.view_mut(), b.norm1.y.view(), w, bias, None)?;
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
        let (w, bias) =
            (self.linear(dev, ParamKind::Out, l)?, self.params.get(ParamKind::OutBias, at));
        matmul::forward(dev, b.mid.view_mut(), b.attention.view(), w, bias, Some(x))
    }

    /// `y = mid + down(act)`, after [`Model::expand`].
    fn feed_forward(
        &self,
        dev: &Device,
        l: usize,
        y: ViewMut<'_, T>,
        b: &mut Block<'_, T>,
    ) -> Result<()> {
        self.expand(dev, l, b)?;
        let (w, bias) =
            (self.linear(dev, ParamKind::Down, l)?, self.params.get(ParamKind::DownBias, Some(l)));
        matmul::forward(dev, y, b.act.view(), w, bias, Some(b.mid.view()))
    }

    /// `act = act(up(norm2(mid)))`
    fn expand(&self, dev: &Device, l: usize, b: &mut Block<'_, T>) -> Result<()> {
        let at = Some(l);
        self.norm(dev, &mut b.norm2, b.mid.view(), ParamKind::Norm2, ParamKind::Norm2Bias, at)?;
        let (w, bias) =
            (self.linear(dev, ParamKind::Up, l)?, self.params.get(ParamKind::UpBias, at));
        let after = match self.spec.mlp {
            Mlp::Plain(act) => matmul::After { act, gated: false },
            Mlp::Gated(act) => matmul::After { act, gated: true },
        };
        let (act, up) = (b.act.view_mut(), b.up.view_mut());
        matmul::activated(dev, after, act, up, b.norm2.y.view(), w, bias)
    }

    fn norm(
        &self,
        dev: &Device,
        out: &mut Normed<'_, T>,
        x: View<'_, T>,
        weight: ParamKind,
        bias: ParamKind,
        layer: Option<usize>,
    ) -> Result<()> {
        let (w, eps) =
            (need(&self.params, weight, layer)?, <T::Acc as Element>::of(self.spec.norm_eps));
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
    pub fn select(
        &self,
        dev: &Device,
        acts: &Activations<'_, T>,
        rows: View<'_, u32>,
        out: &mut HeadInput<'_, T>,
    ) -> Result<()> {
        let Some(x) = acts.x.last() else {
            return Err(Error::value("activations", "at least one stream", 0));
        };
        embedding::forward(dev, out.x.view_mut(), rows, x.view(), false)?;
        let x = out.x.view();
        self.norm(dev, &mut out.norm, x, ParamKind::FinalNorm, ParamKind::FinalNormBias, None)
    }

    /// Adds to `grads` the gradient of all backbone weights, given `dh` `[selected, hidden]`, the
    /// gradient of the hidden states that [`Model::select`] made from `selected_rows`. The head's
    /// own weight is the caller's. Every segment must be a whole sequence, from position 0. Where
    /// the forward pass kept the residual stream alone, blocks are computed again, with its very
    /// bits, and `cache` is written.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        rows: &Rows<'_>,
        acts: &mut Activations<'_, T>,
        cache: &mut Cache<'_, T>,
        selected: &HeadInput<'_, T>,
        selected_rows: View<'_, u32>,
        dh: View<'_, T>,
        g: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let hidden = self.spec.hidden;
        let d = (g.dselected.view_mut(), g.scratch.view_mut());
        let x = selected.x.view();
        self.norm_backward(dev, grads, d, dh, x, &selected.norm, ParamKind::FinalNorm, None)?;
        dev.zero(g.dx.view_mut())?;
        let (dx, d, order) = (g.dx.view_mut(), g.dselected.view(), g.order.view_mut());
        embedding::scatter(dev, dx, order, selected_rows, d, hidden)?;
        for l in (0..self.spec.layers).rev() {
            let kept = acts.blocks.len() == self.spec.layers;
            let b = &mut acts.blocks[if kept { l } else { 0 }];
            let (x, mut scratch) = (acts.x[l].view(), acts.scratch.view_mut());
            if !kept {
                self.attend(dev, l, rows, x, b, &mut cache.layers[0], scratch.reborrow())?;
                self.expand(dev, l, b)?;
            }
            self.feed_forward_backward(dev, grads, l, b, g)?;
            self.attend_backward(dev, grads, l, rows, x, b, g, scratch)?;
        }
        if let Some(d) = grads.get_mut(ParamKind::Embedding, None) {
            embedding::backward(dev, d, g.order.view_mut(), rows.ids, g.dx.view(), hidden)?;
        }
        if let Some(d) = grads.get_mut(ParamKind::Positions, None) {
            embedding::backward(dev, d, g.order.view_mut(), rows.positions, g.dx.view(), hidden)?;
        }
        Ok(())
    }

    /// Turns `g.dx` from the gradient of the block's output into that of `mid`.
    fn feed_forward_backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        l: usize,
        b: &Block<'_, T>,
        g: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let (h, up, mlp) = (self.spec.hidden, self.spec.up_cols(), self.spec.mlp_hidden);
        let at = Some(l);
        let (dw, db) = grads.linear_mut(ParamKind::Down, ParamKind::DownBias, at);
        matmul::backward_weight(dev, dw, db, g.dx.view(), b.act.view(), (h, mlp))?;
        let w = need(&self.params, ParamKind::Down, at)?;
        matmul::backward_input(dev, g.dact.view_mut(), g.dx.view(), w, (h, mlp))?;
        let (dup, dact) = (g.dup.view_mut(), g.dact.view());
        match self.spec.mlp {
            Mlp::Plain(act) => activation::backward(dev, act, dup, dact, b.up.view())?,
            Mlp::Gated(act) => {
                activation::gated_backward(dev, act, dup, dact, b.up.view(), mlp)?;
            }
        }
        let (dw, db) = grads.linear_mut(ParamKind::Up, ParamKind::UpBias, at);
        matmul::backward_weight(dev, dw, db, g.dup.view(), b.norm2.y.view(), (up, h))?;
        let w = need(&self.params, ParamKind::Up, at)?;
        matmul::backward_input(dev, g.dnorm.view_mut(), g.dup.view(), w, (up, h))?;
        let (d, dy) = ((g.dx.view_mut(), g.scratch.view_mut()), g.dnorm.view());
        self.norm_backward(dev, grads, d, dy, b.mid.view(), &b.norm2, ParamKind::Norm2, at)
    }

    /// Turns `g.dx` from the gradient of `mid` into that of the block's input `x`.
    #[allow(clippy::too_many_arguments)]
    fn attend_backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        l: usize,
        rows: &Rows<'_>,
        x: View<'_, T>,
        b: &Block<'_, T>,
        g: &mut Gradients<'_, T>,
        scratch: ViewMut<'_, T::Acc>,
    ) -> Result<()> {
        let (h, att, qkv) = (self.spec.hidden, self.spec.attention_cols(), self.spec.qkv_cols());
        let (shape, at) = (self.spec.attention(), Some(l));
        let (dw, db) = grads.linear_mut(ParamKind::Out, ParamKind::OutBias, at);
        matmul::backward_weight(dev, dw, db, g.dx.view(), b.attention.view(), (h, att))?;
        let w = need(&self.params, ParamKind::Out, at)?;
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
        let (dw, db) = grads.linear_mut(ParamKind::Qkv, ParamKind::QkvBias, at);
        matmul::backward_weight(dev, dw, db, g.dqkv.view(), b.norm1.y.view(), (qkv, h))?;
        let w = need(&self.params, ParamKind::Qkv, at)?;
        matmul::backward_input(dev, g.dnorm.view_mut(), g.dqkv.view(), w, (qkv, h))?;
        let (d, dy) = ((g.dx.view_mut(), g.scratch.view_mut()), g.dnorm.view());
        self.norm_backward(dev, grads, d, dy, x, &b.norm1, ParamKind::Norm1, at)
    }

    /// Inside a block adds to `dx`, the gradient of the residual stream.
    #[allow(clippy::too_many_arguments)]
    fn norm_backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        (dx, scratch): (ViewMut<'_, T>, ViewMut<'_, T::Acc>),
        dy: View<'_, T>,
        x: View<'_, T>,
        kept: &Normed<'_, T>,
        kind: ParamKind,
        layer: Option<usize>,
    ) -> Result<()> {
        let w = need(&self.params, kind, layer)?;
        let bias = match kind {
            ParamKind::Norm1 => ParamKind::Norm1Bias,
            ParamKind::Norm2 => ParamKind::Norm2Bias,
            _ => ParamKind::FinalNormBias,
        };
        let ((dw, db), add) = (grads.linear_mut(kind, bias, layer), layer.is_some());
        match db {
            None => rms_norm::backward(dev, dx, dw, scratch, dy, x, w, kept.rstd.view(), add),
            Some(db) => {
                let (mean, rstd) = (kept.mean.view(), kept.rstd.view());
                layer_norm::backward(dev, dx, dw, db, scratch, dy, x, w, mean, rstd, add)
            }
        }
    }
}
