//! The rows of a pass, the keys and values that it caches, and the buffers that it fills.

use super::{
    LayerSpec, QkNorm, Spec,
    adapter::AdapterRows,
    mixer::{self, LayerCache, MixerActivations, MixerGradients},
    mixture::{MixtureActivations, MixtureGradients, SharedActivations, pair_rows_len},
    norm::{self, Normed},
    spec::WINDOWS,
};
use crate::{
    device::{Buffer, Device, Element, Scope, View},
    error::Result,
    ops::{
        attention::{self, KvLayer},
        embedding, routing, short_conv,
    },
};

/// What one forward pass computes: new rows of some sequences.
#[derive(Clone, Copy, Debug)]
pub struct BatchRows<'a> {
    /// Token of each row.
    pub ids: View<'a, u32>,
    /// Position of each row in its sequence.
    pub positions: View<'a, u32>,
    /// Which rows are which sequence, and where its keys and values are: for the blocks with each
    /// of [`Spec::windows`].
    pub attention: [attention::SegmentBatch<'a>; WINDOWS],
    /// The rows that a head reads.
    pub selected: View<'a, u32>,
    /// Which rows are which sequence, for blocks without attention; none in a model without such.
    pub spans: View<'a, u32>,
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PassOptions {
    /// The entropy of each prediction.
    pub entropy: bool,
    /// For the backward pass.
    pub keep: Keep,
    /// What the load-balance loss of a row ([`routing::balance`]) counts in the loss, in each block
    /// with experts. An expert's part is that of the rows of the pass.
    pub balance: f64,
}

/// Keys and values of each block. Blocks take turns with one where all sequences are whole: nothing
/// reads it after its block.
#[derive(Debug)]
pub struct Cache<'s, T: Element> {
    pub(super) layers: Vec<LayerCache<'s, T>>,
}

impl<'s, T: Element> Cache<'s, T> {
    pub fn new(dev: &Device, scope: &'s Scope<'_>, spec: &Spec, pass: PassShape) -> Result<Self> {
        let (shape, pages) = (spec.attention(), pass.pages(dev, spec));
        let layers = if pass.cached == 0 { 1 } else { spec.layers };
        let layer = |l: usize| {
            let other = spec.layer(l).state_mixer.filter(|_| pass.cached > 0);
            let pages = if other.is_some() { 0 } else { pages };
            let slots = pass.sequences;
            let conv = other.map_or(0, |m| slots * short_conv::state_len(m.conv(spec.hidden)));
            let state = other.and_then(|m| m.delta()).map_or(0, |s| slots * s.state_len());
            Ok(LayerCache {
                kv: KvLayer::new(scope, &shape, shape.page(dev), pages)?,
                conv: scope.alloc("last rows of convolutions", conv)?,
                state: scope.alloc("states of delta rules", state)?,
            })
        };
        Ok(Self { layers: (0..layers).map(layer).collect::<Result<_>>()? })
    }
}

/// What a block keeps for its backward pass.
#[derive(Debug)]
pub(super) struct BlockActivations<'s, T: Element> {
    pub norm1: Option<Normed<'s, T>>,
    /// Of blocks with attention.
    pub qkv: Buffer<'s, T>,
    pub qk_norm: Option<NormedQk<'s, T>>,
    pub attention: Buffer<'s, T>,
    pub lse: Buffer<'s, T::Acc>,
    /// What attention gives, behind its gate.
    pub gated: Option<Buffer<'s, T>>,
    /// Of blocks without attention.
    pub mixer: Option<MixerActivations<'s, T>>,
    pub post1: Option<PostNormed<'s, T>>,
    pub mid: Buffer<'s, T>,
    pub norm2: Option<Normed<'s, T>>,
    /// Of blocks with an MLP.
    pub up: Buffer<'s, T>,
    pub act: Buffer<'s, T>,
    /// Of those with experts.
    pub mixture: Option<MixtureActivations<'s, T>>,
    pub shared: Option<SharedActivations<'s, T>>,
    pub post2: Option<PostNormed<'s, T>>,
}

/// Queries and keys that are normalised.
#[derive(Debug)]
pub(super) struct NormedQk<'s, T: Element> {
    /// Queries, keys and values before, and gates.
    pub qkv: Buffer<'s, T>,
    pub q: Normed<'s, T>,
    pub k: Normed<'s, T>,
}

/// What attention or MLP adds to the residual stream, normalised on its way.
#[derive(Debug)]
pub(super) struct PostNormed<'s, T: Element> {
    /// Before.
    pub x: Buffer<'s, T>,
    pub norm: Normed<'s, T>,
}

impl<'s, T: Element> BlockActivations<'s, T> {
    /// For block `l`, or for all in turn.
    fn new(
        dev: &Device,
        scope: &'s Scope<'_>,
        spec: &Spec,
        rows: usize,
        l: Option<usize>,
    ) -> Result<Self> {
        let mut blocks = l.map_or(0..spec.layers, |l| l..l + 1);
        let experts = blocks.clone().find_map(|l| spec.experts_at(l));
        let other = blocks.clone().find_map(|l| spec.layer(l).state_mixer);
        let attends = if blocks.clone().any(|l| spec.attends(l)) { rows } else { 0 };
        let dense = if blocks.any(|l| spec.has_mlp(l)) { rows } else { 0 };
        let mixer = other.map(|m| MixerActivations::new(scope, m, spec.hidden, rows));
        let mixture = experts.map(|e| MixtureActivations::new(dev, scope, e, rows));
        let shared = experts.filter(|e| e.shared);
        let shared = shared.map(|_| SharedActivations::new(scope, spec, rows));
        let stream = |what| scope.alloc(what, rows * spec.hidden);
        let before = || spec.norms_before().then(|| Normed::new(scope, spec, rows)).transpose();
        let after = || {
            let post = || {
                let x = stream("rows before a norm")?;
                Ok(PostNormed { x, norm: Normed::in_place(scope, spec, rows)? })
            };
            spec.norms_after().then(post).transpose()
        };
        let qk_norm = spec.qk_norm.filter(|_| attends > 0).map(|over| {
            let what = "queries, keys and values before norms";
            let heads = |heads| if over == QkNorm::Heads { heads } else { 1 };
            Ok(NormedQk {
                qkv: scope.alloc(what, rows * spec.attention_input_cols())?,
                q: Normed::heads(scope, rows, heads(spec.q_heads))?,
                k: Normed::heads(scope, rows, heads(spec.kv_heads))?,
            })
        });
        let gated = (spec.attention_gate && attends > 0)
            .then(|| scope.alloc("gated attention output", rows * spec.attention_cols()));
        Ok(Self {
            norm1: before()?,
            qkv: scope.alloc("queries, keys and values", attends * spec.qkv_cols())?,
            qk_norm: qk_norm.transpose()?,
            attention: scope.alloc("attention output", attends * spec.attention_cols())?,
            lse: scope.alloc("attention log-sum-exp", attends * spec.q_heads)?,
            gated: gated.transpose()?,
            mixer: mixer.transpose()?,
            post1: after()?,
            mid: stream("residual stream after attention")?,
            norm2: before()?,
            up: scope.alloc("MLP inputs", dense * spec.up_cols())?,
            act: scope.alloc("MLP activations", dense * spec.mlp_hidden)?,
            mixture: mixture.transpose()?,
            shared: shared.transpose()?,
            post2: after()?,
        })
    }
}

/// Scratch that blocks use in turn.
#[derive(Debug)]
pub(super) struct BlockRoom<'s, T: Element> {
    /// Of attention and mixers.
    pub scratch: Buffer<'s, T::Acc>,
    /// Rows of pairs of a row and an expert.
    pub pairs: Buffer<'s, T>,
    pub adapter: AdapterRows<'s, T>,
}

/// The rows that a head reads, before and after the final norm.
#[derive(Debug)]
pub(super) struct HeadInput<'s, T: Element> {
    pub x: Buffer<'s, T>,
    pub norm: Normed<'s, T>,
}

/// Buffers of a forward pass and, where it keeps something for one, of the backward pass.
#[derive(Debug)]
pub struct Activations<'s, T: Element> {
    /// The residual stream before each block, and after the last; one buffer if nothing is kept.
    pub(super) x: Vec<Buffer<'s, T>>,
    /// One for each block, or one that all use in turn.
    pub(super) blocks: Vec<BlockActivations<'s, T>>,
    pub(super) room: BlockRoom<'s, T>,
    pub(super) input: HeadInput<'s, T>,
    pub(super) gradients: Option<Gradients<'s, T>>,
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
        let PassShape { rows, selected, sequences, .. } = pass;
        let one = |l| BlockActivations::new(dev, scope, spec, rows, l);
        let streams = if keep == Keep::Nothing { 1 } else { spec.layers + 1 };
        let x = (0..streams).map(|_| scope.alloc("residual stream", rows * spec.hidden));
        // A single row of a sequence sees more than itself only through a cache.
        let alone = if pass.cached > 0 { pass.sequences } else { 0 };
        let trained = keep != Keep::Nothing;
        let scratch = |layer: LayerSpec| {
            if let Some(m) = layer.state_mixer {
                return mixer::scratch_len(dev, m, spec.hidden, (rows, sequences), trained);
            }
            let forward = attention::forward_scratch_len(dev, &layer.attention, alone, pass.cached);
            match keep {
                Keep::Nothing => forward,
                _ => forward.max(attention::backward_scratch_len(&layer.attention, rows)),
            }
        };
        let scratch = spec.each_layer().map(scratch).max().unwrap_or(0);
        Ok(Self {
            x: x.collect::<Result<_>>()?,
            blocks: match keep {
                Keep::All => (0..spec.layers).map(|l| one(Some(l))).collect::<Result<_>>()?,
                Keep::Nothing | Keep::Streams => vec![one(None)?],
            },
            room: BlockRoom {
                scratch: scope.alloc("scratch of attention and mixers", scratch)?,
                pairs: scope.alloc("rows of experts", pair_rows_len(spec, rows))?,
                adapter: AdapterRows::new(scope, spec, rows, trained)?,
            },
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

    /// Where the rows went in block `l` of a pass that kept its blocks, if it has experts.
    pub fn routes(&self, l: usize) -> Option<&routing::Routes<'s, T::Acc>> {
        let kept = self.blocks.get(l).filter(|_| self.blocks.len() + 1 == self.x.len());
        kept.and_then(|b| b.mixture.as_ref()).map(|m| &m.routes)
    }

    /// For the next backward pass, see [`PassOptions::balance`].
    pub(super) fn balance(&mut self, weight: f64) {
        if let Some(m) = self.gradients.as_mut().and_then(|g| g.mixture.as_mut()) {
            m.balance = weight;
        }
    }

    /// The hidden states that a head reads, `[selected, hidden]`.
    pub fn hidden(&self) -> View<'_, T> {
        self.input.norm.y.view()
    }
}

/// Buffers of a backward pass.
#[derive(Debug)]
pub(super) struct Gradients<'s, T: Element> {
    pub dx: Buffer<'s, T>,
    pub dnorm: Buffer<'s, T>,
    pub dqkv: Buffer<'s, T>,
    /// Before norms of queries and keys.
    pub draw: Option<Buffer<'s, T>>,
    pub dattention: Buffer<'s, T>,
    /// Behind the gate of attention.
    pub dgated: Option<Buffer<'s, T>>,
    pub mixer: Option<MixerGradients<'s, T>>,
    pub dup: Buffer<'s, T>,
    pub dact: Buffer<'s, T>,
    pub mixture: Option<MixtureGradients<'s, T>>,
    pub dselected: Buffer<'s, T>,
    pub scratch: Buffer<'s, T::Acc>,
    pub order: Buffer<'s, u64>,
}

impl<'s, T: Element> Gradients<'s, T> {
    pub fn new(scope: &'s Scope<'_>, spec: &Spec, pass: PassShape) -> Result<Self> {
        let PassShape { rows, selected, .. } = pass;
        let most = rows.max(selected);
        let mixture = spec.experts.as_ref().map(|e| MixtureGradients::new(scope, spec, e, rows));
        let dense = if (0..spec.layers).any(|l| spec.has_mlp(l)) { rows } else { 0 };
        let stream = || scope.alloc("gradient of the residual stream", rows * spec.hidden);
        let mixer = spec.state_mixer.map(|m| MixerGradients::new(scope, m, spec.hidden, rows));
        let qkv = |cols| scope.alloc("gradient of queries, keys, values", rows * cols);
        let attention = |what| scope.alloc(what, rows * spec.attention_cols());
        let dgated = spec.attention_gate.then(|| attention("gradient of gated attention"));
        Ok(Self {
            dx: stream()?,
            dnorm: stream()?,
            dqkv: qkv(spec.qkv_cols())?,
            draw: spec.qk_norm.map(|_| qkv(spec.attention_input_cols())).transpose()?,
            dattention: attention("gradient of attention")?,
            dgated: dgated.transpose()?,
            mixer: mixer.transpose()?,
            dup: scope.alloc("gradient of MLP inputs", dense * spec.up_cols())?,
            dact: scope.alloc("gradient of MLP activations", dense * spec.mlp_hidden)?,
            mixture: mixture.transpose()?,
            dselected: scope.alloc("gradient of selected rows", selected * spec.hidden)?,
            scratch: scope.alloc("norm scratch", norm::scratch_len(spec, most))?,
            order: scope.alloc("order of rows", embedding::scratch_len(most))?,
        })
    }
}
