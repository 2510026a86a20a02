//! The one transformer: every family, every role, forward and backward; training, prefill and
//! decoding are the same forward pass over different rows.
//!
//! Pre-norm blocks: `m = x + out(attention(norm1(x)))`, `y = m + down(act(up(norm2(m))))`. Rows are
//! packed: sequences lie back to back, nothing is padded. A row's bits depend on its own sequence
//! only, so the log-prob of a token is the same number whenever and with whomever it is computed.

use super::{
    LayerSpec, Linear, Mlp, Model, ParamKind, Params, Spec,
    norm::{self, Normed},
};
use crate::{
    device::{Buffer, Device, Element, Scope, View, ViewMut},
    error::{Error, Result},
    ops::{
        activation,
        attention::{self, KvLayer},
        embedding, matmul, rope,
    },
};

/// What one forward pass computes: new rows of some sequences.
#[derive(Clone, Copy, Debug)]
pub struct BatchRows<'a> {
    /// Token of each row.
    pub ids: View<'a, u32>,
    /// Position of each row in its sequence.
    pub positions: View<'a, u32>,
    /// Which rows are which sequence, and where its keys and values are.
    pub attention: attention::SegmentBatch<'a>,
    /// The rows that a head reads.
    pub selected: View<'a, u32>,
}

/// Sizes of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassShape {
    pub rows: usize,
    /// Sequences that the rows belong to.
    pub sequences: usize,
    /// Rows that a head reads.
    pub selected: usize,
    /// Positions of the longest sequence that a cache holds; 0 if all sequences are whole.
    pub cached: usize,
}

impl PassShape {
    /// The largest pass over whole sequences of so many rows: a head reads them all.
    pub fn whole(rows: usize, sequences: usize) -> Self {
        Self { rows, sequences, selected: rows, cached: 0 }
    }

    /// Pages that hold all keys and values.
    pub fn pages(&self, dev: &Device, spec: &Spec) -> usize {
        let page = spec.attention().page(dev);
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

/// What a pass computes and keeps beside the outputs of its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassOptions {
    /// The entropy of each prediction.
    pub entropy: bool,
    /// For the backward pass.
    pub keep: Keep,
}

/// Keys and values of each block. Blocks take turns with one where all sequences are whole: nothing
/// reads it after its block.
#[derive(Debug)]
pub struct Cache<'s, T> {
    layers: Vec<KvLayer<'s, T>>,
}

impl<'s, T: Element> Cache<'s, T> {
    pub fn new(dev: &Device, scope: &'s Scope<'_>, spec: &Spec, pass: PassShape) -> Result<Self> {
        let (shape, pages) = (spec.attention(), pass.pages(dev, spec));
        let layers = if pass.cached == 0 { 1 } else { spec.layers };
        let layers = (0..layers).map(|_| KvLayer::new(scope, &shape, shape.page(dev), pages));
        Ok(Self { layers: layers.collect::<Result<_>>()? })
    }
}

/// What a block keeps for its backward pass.
#[derive(Debug)]
struct BlockActivations<'s, T: Element> {
    norm1: Normed<'s, T>,
    qkv: Buffer<'s, T>,
    attention: Buffer<'s, T>,
    lse: Buffer<'s, T::Acc>,
    mid: Buffer<'s, T>,
    norm2: Normed<'s, T>,
    up: Buffer<'s, T>,
    act: Buffer<'s, T>,
}

/// The rows that a head reads, before and after the final norm.
#[derive(Debug)]
struct HeadInput<'s, T: Element> {
    x: Buffer<'s, T>,
    norm: Normed<'s, T>,
}

/// Buffers of a forward pass and, where it keeps something for one, of the backward pass.
#[derive(Debug)]
pub struct Activations<'s, T: Element> {
    /// The residual stream before each block, and after the last; one buffer if nothing is kept.
    x: Vec<Buffer<'s, T>>,
    /// One for each block, or one that all use in turn.
    blocks: Vec<BlockActivations<'s, T>>,
    scratch: Buffer<'s, T::Acc>,
    input: HeadInput<'s, T>,
    gradients: Option<Gradients<'s, T>>,
}

impl<'s, T: Element> Activations<'s, T> {
    /// For a pass of this shape.
    pub fn new(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        pass: PassShape,
        keep: Keep,
    ) -> Result<Self> {
        let PassShape { rows, selected, .. } = pass;
        let layers = if keep == Keep::All { spec.layers } else { 1 };
        let streams = if keep == Keep::Nothing { 1 } else { spec.layers + 1 };
        let x = (0..streams).map(|_| scope.alloc("residual stream", rows * spec.hidden));
        let block = |_| {
            Ok(BlockActivations {
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
        // A single row of a sequence sees more than itself only through a cache.
        let alone = if pass.cached > 0 { pass.sequences } else { 0 };
        let scratch = |layer: LayerSpec| {
            let forward = attention::forward_scratch_len(dev, &layer.attention, alone, pass.cached);
            match keep {
                Keep::Nothing => forward,
                _ => forward.max(attention::backward_scratch_len(&layer.attention, rows)),
            }
        };
        let scratch = spec.each_layer().map(scratch).max().unwrap_or(0);
        let trained = keep != Keep::Nothing;
        Ok(Self {
            x: x.collect::<Result<_>>()?,
            blocks: (0..layers).map(block).collect::<Result<_>>()?,
            scratch: scope.alloc("attention scratch", scratch)?,
            input: HeadInput {
                x: scope.alloc("selected rows", selected * spec.hidden)?,
                norm: Normed::new(scope, spec, selected)?,
            },
            gradients: trained.then(|| Gradients::new(scope, spec, pass)).transpose()?,
        })
    }

    /// The residual stream before block `l` of a pass that kept it, `[rows, hidden]`; `l = layers`
    /// is the last one, before the final norm.
    pub fn stream(&self, l: usize) -> Option<View<'_, T>> {
        self.x.get(l).map(Buffer::view)
    }

    /// The hidden states that a head reads, `[selected, hidden]`.
    pub fn hidden(&self) -> View<'_, T> {
        self.input.norm.y.view()
    }
}

/// Buffers of a backward pass.
#[derive(Debug)]
struct Gradients<'s, T: Element> {
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
    fn new(scope: &'s Scope<'_>, spec: &Spec, pass: PassShape) -> Result<Self> {
        let PassShape { rows, selected, .. } = pass;
        let most = rows.max(selected);
        let stream = || scope.alloc("gradient of the residual stream", rows * spec.hidden);
        Ok(Self {
            dx: stream()?,
            dnorm: stream()?,
            dqkv: scope.alloc("gradient of queries, keys, values", rows * spec.qkv_cols())?,
            dattention: scope.alloc("gradient of attention", rows * spec.attention_cols())?,
            dup: scope.alloc("gradient of MLP inputs", rows * spec.up_cols())?,
            dact: scope.alloc("gradient of MLP activations", rows * spec.mlp_hidden)?,
            dselected: scope.alloc("gradient of selected rows", selected * spec.hidden)?,
            scratch: scope.alloc("norm scratch", norm::scratch_len(spec, most))?,
            order: scope.alloc("order of rows", embedding::scratch_len(most))?,
        })
    }
}

impl<T: Element> Model<T> {
    /// Runs the blocks over `rows`, then the final norm over those that a head reads, as a norm
    /// works row by row. Results stay in `acts`, new keys and values go to `cache`.
    pub fn forward(
        &self,
        dev: &Device,
        rows: &BatchRows<'_>,
        acts: &mut Activations<'_, T>,
        cache: &mut Cache<'_, T>,
    ) -> Result<()> {
        self.embed(dev, rows, acts.x[0].view_mut())?;
        let (streams, kept) = (acts.x.len(), acts.blocks.len());
        for l in 0..self.spec().layers {
            let (from, to) = if streams == 1 { (0, 0) } else { (l, l + 1) };
            let (block, b) = (self.block(dev, rows, l), &mut acts.blocks[l.min(kept - 1)]);
            let last = cache.layers.len() - 1;
            let kv = &mut cache.layers[l.min(last)];
            block.attention(b, acts.x[from].view(), kv, acts.scratch.view_mut())?;
            block.expand(b)?;
            let down = self.linear(dev, ParamKind::Down, Some(l))?;
            down.forward(dev, acts.x[to].view_mut(), b.act.view(), Some(b.mid.view()))?;
        }
        let Activations { x, input, .. } = acts;
        let Some(x) = x.last() else {
            return Err(Error::value("activations", "at least one stream", 0));
        };
        embedding::forward(dev, input.x.view_mut(), rows.selected, x.view(), false)?;
        self.norm(ParamKind::FinalNorm, None)?.forward(dev, &mut input.norm, input.x.view())
    }

    fn embed(&self, dev: &Device, rows: &BatchRows<'_>, mut x: ViewMut<'_, T>) -> Result<()> {
        let table = self.params().tensor(self.params().need(ParamKind::Embedding, None)?);
        embedding::forward(dev, x.reborrow(), rows.ids, table, false)?;
        if let Some(table) = self.params().get(ParamKind::Positions, None) {
            embedding::forward(dev, x, rows.positions, table, true)?;
        }
        Ok(())
    }

    fn block<'a>(&'a self, dev: &'a Device, rows: &'a BatchRows<'a>, l: usize) -> BlockPass<'a, T> {
        BlockPass { dev, model: self, rows, at: Some(l), spec: self.spec().layer(l) }
    }

    /// Adds to `grads` the gradient of all weights but the head's, given `dh` `[selected, hidden]`,
    /// the gradient of the hidden states that [`Model::forward`] left in `acts`. Every segment must
    /// be a whole sequence, from position 0. After [`Keep::Streams`] blocks are computed again, to
    /// the same bits, and `cache` is written.
    pub fn backward(
        &self,
        dev: &Device,
        grads: &mut Params<T::Acc>,
        rows: &BatchRows<'_>,
        acts: &mut Activations<'_, T>,
        cache: &mut Cache<'_, T>,
        dh: View<'_, T>,
    ) -> Result<()> {
        let hidden = self.spec().hidden;
        let Activations { x, blocks, scratch, input, gradients } = acts;
        let Some(g) = gradients else {
            return Err(Error::value("backward pass", "activations that were kept", "none"));
        };
        let out = (g.dselected.view_mut(), g.scratch.view_mut());
        let norm = self.norm(ParamKind::FinalNorm, None)?;
        norm.backward(dev, grads, out, dh, input.x.view(), &input.norm)?;
        dev.zero(g.dx.view_mut())?;
        let (dx, d, order) = (g.dx.view_mut(), g.dselected.view(), g.order.view_mut());
        embedding::scatter(dev, dx, order, rows.selected, d, hidden)?;
        for l in (0..self.spec().layers).rev() {
            let kept = blocks.len() == self.spec().layers;
            let (block, b) = (self.block(dev, rows, l), &mut blocks[if kept { l } else { 0 }]);
            let x = x[l].view();
            if !kept {
                block.attention(b, x, &mut cache.layers[0], scratch.view_mut())?;
                block.expand(b)?;
            }
            block.mlp_backward(grads, b, g)?;
            block.attention_backward(grads, b, x, g, scratch.view_mut())?;
        }
        let (dx, order) = (g.dx.view(), &mut g.order);
        if let Some(d) = grads.tokens_mut() {
            embedding::backward(dev, d, order.view_mut(), rows.ids, dx, hidden)?;
        }
        if let Some(d) = grads.get_mut(ParamKind::Positions, None) {
            embedding::backward(dev, d, order.view_mut(), rows.positions, dx, hidden)?;
        }
        Ok(())
    }
}

/// One block at work on some rows.
struct BlockPass<'a, T: Element> {
    dev: &'a Device,
    model: &'a Model<T>,
    rows: &'a BatchRows<'a>,
    at: Option<usize>,
    spec: LayerSpec,
}

impl<'a, T: Element> BlockPass<'a, T> {
    fn linear(&self, kind: ParamKind) -> Result<Linear<'a, T>> {
        self.model.linear(self.dev, kind, self.at)
    }

    fn rope(&self) -> Option<&'a rope::Table<T::Acc>> {
        self.spec.rope.map(|i| self.model.rope(i))
    }

    /// `mid = x + out(attention(norm1(x)))`
    fn attention(
        &self,
        b: &mut BlockActivations<'_, T>,
        x: View<'_, T>,
        kv: &mut KvLayer<'_, T>,
        scratch: ViewMut<'_, T::Acc>,
    ) -> Result<()> {
        let (dev, shape, work) = (self.dev, &self.spec.attention, self.rows.attention);
        self.model.norm(ParamKind::Norm1, self.at)?.forward(dev, &mut b.norm1, x)?;
        self.linear(ParamKind::Qkv)?.forward(dev, b.qkv.view_mut(), b.norm1.y.view(), None)?;
        let rotation = self.rope().map(|table| (self.rows.positions, table));
        attention::append(dev, kv, b.qkv.view_mut(), work, shape, rotation)?;
        let (out, lse) = (b.attention.view_mut(), b.lse.view_mut());
        let to = attention::ForwardOutputs { out, lse, scratch };
        attention::forward(dev, to, b.qkv.view(), kv, work, shape)?;
        let out = self.linear(ParamKind::Out)?;
        out.forward(dev, b.mid.view_mut(), b.attention.view(), Some(x))
    }

    /// `act = act(up(norm2(mid)))`
    fn expand(&self, b: &mut BlockActivations<'_, T>) -> Result<()> {
        let dev = self.dev;
        self.model.norm(ParamKind::Norm2, self.at)?.forward(dev, &mut b.norm2, b.mid.view())?;
        let epilogue = match self.model.spec().mlp {
            Mlp::Plain(act) => matmul::Epilogue { act, gated: false },
            Mlp::Gated(act) => matmul::Epilogue { act, gated: true },
        };
        let (act, up) = (b.act.view_mut(), b.up.view_mut());
        self.linear(ParamKind::Up)?.activated(dev, epilogue, act, up, b.norm2.y.view())
    }

    /// Turns `g.dx` from the gradient of the block's output into that of `mid`.
    fn mlp_backward(
        &self,
        grads: &mut Params<T::Acc>,
        b: &BlockActivations<'_, T>,
        g: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let (dev, spec) = (self.dev, self.model.spec());
        let down = self.linear(ParamKind::Down)?;
        down.backward(dev, grads, g.dact.view_mut(), g.dx.view(), b.act.view())?;
        let (dup, dact, up) = (g.dup.view_mut(), g.dact.view(), b.up.view());
        match spec.mlp {
            Mlp::Plain(act) => activation::backward(dev, act, dup, dact, up)?,
            Mlp::Gated(act) => {
                activation::gated_backward(dev, act, dup, dact, up, spec.mlp_hidden)?;
            }
        }
        let up = self.linear(ParamKind::Up)?;
        up.backward(dev, grads, g.dnorm.view_mut(), g.dup.view(), b.norm2.y.view())?;
        self.norm_backward(grads, ParamKind::Norm2, b.mid.view(), &b.norm2, g)
    }

    /// Turns `g.dx` from the gradient of `mid` into that of the block's input `x`.
    fn attention_backward(
        &self,
        grads: &mut Params<T::Acc>,
        b: &BlockActivations<'_, T>,
        x: View<'_, T>,
        g: &mut Gradients<'_, T>,
        scratch: ViewMut<'_, T::Acc>,
    ) -> Result<()> {
        let (dev, shape) = (self.dev, &self.spec.attention);
        let out = self.linear(ParamKind::Out)?;
        out.backward(dev, grads, g.dattention.view_mut(), g.dx.view(), b.attention.view())?;
        let args = attention::BackwardArgs {
            dqkv: g.dqkv.view_mut(),
            dout: g.dattention.view(),
            out: b.attention.view(),
            qkv: b.qkv.view(),
            lse: b.lse.view(),
            scratch,
        };
        attention::backward(dev, args, self.rows.attention, shape)?;
        if let Some(table) = self.rope() {
            let (heads, cols) = (shape.q_heads + shape.kv_heads, self.model.spec().qkv_cols());
            let (d, positions) = (shape.head_dim, self.rows.positions);
            let heads = rope::Heads { row_len: cols, heads, head_dim: d };
            rope::backward(dev, g.dqkv.view_mut(), heads, positions, table)?;
        }
        let qkv = self.linear(ParamKind::Qkv)?;
        qkv.backward(dev, grads, g.dnorm.view_mut(), g.dqkv.view(), b.norm1.y.view())?;
        self.norm_backward(grads, ParamKind::Norm1, x, &b.norm1, g)
    }

    /// Adds the gradient through a norm, which is in `g.dnorm`, to that of the residual stream.
    fn norm_backward(
        &self,
        grads: &mut Params<T::Acc>,
        kind: ParamKind,
        x: View<'_, T>,
        kept: &Normed<'_, T>,
        g: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let Gradients { dx, dnorm, scratch, .. } = g;
        let out = (dx.view_mut(), scratch.view_mut());
        self.model.norm(kind, self.at)?.backward(self.dev, grads, out, dnorm.view(), x, kept)
    }
}
