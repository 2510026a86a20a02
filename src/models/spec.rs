//! What a transformer computes, free of its family's name.

use super::ParamKind;
use crate::{
    device::Device,
    error::{Error, Result},
    ops::{
        activation::{Activation, Glu},
        attention,
        delta_rule::{self, DeltaShape},
        matmul,
        rope::Rope,
        routing::Router,
        short_conv::{self, ConvSpec},
    },
};

pub use crate::ops::norm::Norm;

/// What turns the hidden states into outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The next token's distribution: policy and reference.
    Lm,
    /// One number a position: value and reward.
    Scalar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// `down(act(up(x)))`
    Plain(Activation),
    /// `down(act(gate(x)) * up(x))`
    Gated(Activation),
}

/// What some blocks have in the place of an MLP: each row goes to a few of many.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// How many there are, and how a row chooses.
    pub router: Router,
    pub router_bias: bool,
    /// Width inside each.
    pub hidden: usize,
    pub glu: Glu,
    /// Biases inside each.
    pub bias: bool,
    /// The MLP of a block is there, too, as an expert of all rows behind a gate of its own.
    pub shared: bool,
    /// Blocks that have an MLP all the same.
    pub dense: Vec<usize>,
}

/// Where a block normalises, `f` being attention or MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockNorms {
    /// `x + f(norm(x))`
    Before,
    /// `x + norm(f(x))`
    After,
    /// `x + norm(f(norm(x)))`
    Around,
}

/// What queries and keys are normalised over before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head, all with the same weight.
    Heads,
    /// All heads of a token together.
    Rows,
}

/// What a block mixes the rows of a sequence by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mixer {
    #[default]
    Attention,
    /// The one of [`Spec::state_mixer`].
    State,
}

/// What the blocks without attention have in its place: it keeps a state of fixed size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateMixer {
    /// `out(silu(z) norm(delta_rule(silu(conv(q, k, v)), b, a)))`, all of it projected from the
    /// input (Yang et al. 2024); the convolution has so many taps.
    Delta(DeltaShape, usize),
    /// `out(c conv(b u))`, all of it projected from the input (LFM2).
    Conv(usize),
}

/// What may differ between the blocks of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockKind {
    /// Positions that a row sees, its own included; none is all.
    pub window: Option<u32>,
    /// The one of [`Spec::ropes`] that rotates queries and keys, if one does.
    pub rope: Option<usize>,
    pub mixer: Mixer,
}

impl BlockKind {
    pub fn attention(window: Option<u32>, rope: Option<usize>) -> Self {
        Self { window, rope, mixer: Mixer::Attention }
    }
}

/// Blocks of a model differ by so many windows at most.
pub(super) const WINDOWS: usize = 2;

/// The sizes and parts of a transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    pub layers: usize,
    pub q_heads: usize,
    /// Key and value heads; divides `q_heads`.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Width inside the MLP.
    pub mlp_hidden: usize,
    pub max_positions: usize,
    /// A learned table of positions is added to the embedding.
    pub learned_positions: bool,
    /// The rotary embeddings of all blocks, each once.
    pub ropes: Vec<Rope>,
    /// Channels of a head that rotate, the first ones; the others stay.
    pub rotary_dim: usize,
    /// Each block's kind, or one that all share.
    pub blocks: Vec<BlockKind>,
    pub norm: Norm,
    pub norm_eps: f64,
    /// Norms multiply by `1 + w`, not by `w`.
    pub norm_one_plus: bool,
    pub block_norms: BlockNorms,
    pub qk_norm: Option<QkNorm>,
    /// Attention and MLP read the same stream: `x + attention(norm1(x)) + mlp(norm2(x))`.
    pub parallel: bool,
    pub mlp: Mlp,
    pub experts: Option<Experts>,
    /// Of the blocks without attention.
    pub state_mixer: Option<StateMixer>,
    /// What attention gives is gated, by what a further part of its projection says.
    pub attention_gate: bool,
    /// A learned logit of each head joins the softmax over attention scores.
    pub sinks: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub out_bias: bool,
    /// Biases inside the MLP.
    pub mlp_bias: bool,
    /// The LM head is the embedding.
    pub tied: bool,
    pub scales: Scales,
    pub query_scale: Option<QueryScale>,
    /// Unpadded widths, if the spec is a CUDA device's: it pads heads and MLP with zeros up to the
    /// widths of its kernels, and their gradients stay 0.
    pub unpadded: Option<Widths>,
    /// What is trained beside frozen weights, if they are.
    pub adapter: Option<AdapterSpec>,
}

/// Low-rank adapters (LoRA, Hu et al. 2021) beside frozen weights.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSpec {
    pub rank: usize,
    /// On what they add: `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scale: f64,
    /// What they adapt, block by block.
    pub sites: Vec<AdapterSite>,
    /// A scalar head is theirs.
    pub score: bool,
}

/// A stored tensor that has an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterSite {
    pub kind: ParamKind,
    pub layer: usize,
    /// Which of the `parts` stored tensors that the weight is made of.
    pub part: usize,
    pub parts: usize,
}

impl AdapterSpec {
    /// The rank as a device computes it: factors go on in zeros, whose gradients stay 0.
    pub fn room(&self, spec: &Spec) -> usize {
        if spec.unpadded.is_some() { self.rank.next_multiple_of(8) } else { self.rank }
    }
}

/// Factors and bounds at fixed places of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// On embedded tokens.
    pub embedding: f64,
    /// On what attention and MLP add to the residual stream.
    pub residual: f64,
    /// On attention scores; `1 / sqrt(head_dim)` if there is none.
    pub scores: Option<f64>,
    /// Bounds attention scores: `cap tanh(s / cap)`.
    pub score_cap: Option<f64>,
    /// Divides logits.
    pub logits: f64,
    /// Bounds logits, as that of scores does.
    pub logit_cap: Option<f64>,
}

impl Scales {
    /// All 1, nothing bounded.
    pub const NONE: Self = Self {
        embedding: 1.0,
        residual: 1.0,
        scores: None,
        score_cap: None,
        logits: 1.0,
        logit_cap: None,
    };
}

/// Rotated queries at position p are multiplied by `1 + beta ln(1 + floor(p / original))`
/// (Llama 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScale {
    pub beta: f64,
    /// Positions before they grow.
    pub original: f64,
}

impl QueryScale {
    /// The factor at a position.
    pub fn at(&self, position: usize) -> f64 {
        1.0 + self.beta * libm::log(1.0 + (position as f64 / self.original).floor())
    }
}

/// Widths inside a block that a device may pad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    pub head_dim: usize,
    pub mlp_hidden: usize,
    /// 0 without experts.
    pub expert_hidden: usize,
    /// 0 without a delta rule.
    pub value_dim: usize,
}

/// What one block computes. The transformer and the plan read from here all that may differ between
/// the blocks of a model; a family whose blocks differ says so in [`Spec::blocks`].
#[derive(Clone, Debug)]
pub struct LayerSpec {
    /// Heads, scale, window and soft-cap of the attention scores.
    pub attention: attention::Shape,
    /// Which of [`Spec::windows`] that shape has.
    pub window: usize,
    /// The one of [`Spec::ropes`] that rotates queries and keys, if one does.
    pub rope: Option<usize>,
    /// What it has in the place of attention, if something.
    pub state_mixer: Option<StateMixer>,
}

impl StateMixer {
    /// Its convolution in a model of this hidden size.
    pub fn conv(self, hidden: usize) -> ConvSpec {
        match self {
            Self::Delta(shape, taps) => ConvSpec { channels: shape.qkv_cols(), taps, silu: true },
            Self::Conv(taps) => ConvSpec { channels: hidden, taps, silu: false },
        }
    }

    /// Columns of its first projection: what is convolved, gates, and those of a delta rule.
    pub fn input_cols(self, hidden: usize) -> usize {
        match self {
            Self::Delta(shape, _) => shape.qkv_cols() + shape.values() + 2 * shape.value_heads,
            Self::Conv(_) => 3 * hidden,
        }
    }

    /// Columns of what its last projection reads.
    pub fn output_cols(self, hidden: usize) -> usize {
        match self {
            Self::Delta(shape, _) => shape.values(),
            Self::Conv(_) => hidden,
        }
    }

    /// Its delta rule, if it has one.
    pub fn delta(self) -> Option<DeltaShape> {
        match self {
            Self::Delta(shape, _) => Some(shape),
            Self::Conv(_) => None,
        }
    }
}

impl Spec {
    /// The model as `dev` computes it: with heads and MLP padded to the widths of its kernels.
    pub fn on(self, dev: &Device) -> Self {
        let widths = self.widths();
        let head_dim = attention::width(dev, widths.head_dim);
        let mlp_hidden = matmul::width(dev, widths.mlp_hidden);
        let wide = |e: &Experts| Experts { hidden: matmul::width(dev, e.hidden), ..e.clone() };
        let experts = self.experts.as_ref().map(wide);
        let unpadded = matches!(dev, Device::Cuda(_)).then_some(widths);
        let state_mixer = self.state_mixer.map(|m| match m {
            StateMixer::Delta(shape, taps) => {
                let value_dim = matmul::width(dev, shape.value_dim);
                StateMixer::Delta(DeltaShape { value_dim, ..shape }, taps)
            }
            conv => conv,
        });
        Self { head_dim, mlp_hidden, experts, state_mixer, unpadded, ..self }
    }

    /// Whether `dev` computes such a model, after [`Spec::on`].
    pub fn check(&self, dev: &Device) -> Result<()> {
        if matmul::width(dev, self.hidden) != self.hidden {
            let what = "hidden size on a CUDA device";
            return Err(Error::value(what, "a multiple of 8", self.hidden));
        }
        if let Some(other) = self.state_mixer {
            let cols = other.input_cols(self.hidden);
            if matmul::width(dev, cols) != cols {
                let what = "columns of the input of a block without attention on a CUDA device";
                return Err(Error::value(what, "a multiple of 8", cols));
            }
            short_conv::supported(dev, other.conv(self.hidden))?;
            other.delta().map_or(Ok(()), |shape| delta_rule::supported(dev, shape))?;
        }
        self.each_layer().try_for_each(|layer| attention::supported(dev, &layer.attention))
    }

    /// Widths without padding, as files have them.
    pub fn widths(&self) -> Widths {
        let Self { head_dim, mlp_hidden, .. } = *self;
        let expert_hidden = self.experts.as_ref().map_or(0, |e| e.hidden);
        let value_dim = self.delta().map_or(0, |shape| shape.value_dim);
        self.unpadded.unwrap_or(Widths { head_dim, mlp_hidden, expert_hidden, value_dim })
    }

    fn kind(&self, l: usize) -> BlockKind {
        self.blocks.get(l).or(self.blocks.first()).copied().unwrap_or_default()
    }

    /// What block `l` computes.
    pub fn layer(&self, l: usize) -> LayerSpec {
        let kind = self.kind(l);
        // Of the one or two windows, in ascending order.
        let windows = self.windows();
        let window = usize::from(windows.len() > 1 && windows[0] != kind.window);
        let attention = attention::Shape { window: kind.window, ..self.attention() };
        let state_mixer = self.state_mixer.filter(|_| kind.mixer == Mixer::State);
        LayerSpec { attention, window, rope: kind.rope, state_mixer }
    }

    /// Whether block `l` has attention.
    pub fn attends(&self, l: usize) -> bool {
        self.kind(l).mixer == Mixer::Attention
    }

    /// The delta rule of blocks without attention, if it is one.
    pub fn delta(&self) -> Option<DeltaShape> {
        self.state_mixer.and_then(StateMixer::delta)
    }

    /// The same without padding, as files have it.
    pub(super) fn stored_delta(&self) -> Option<DeltaShape> {
        self.delta().map(|shape| DeltaShape { value_dim: self.widths().value_dim, ..shape })
    }

    /// Whether some blocks keep a state, not keys and values.
    pub fn keeps_state(&self) -> bool {
        self.blocks.iter().any(|kind| kind.mixer == Mixer::State)
    }

    /// Columns of the projection that attention reads: gates behind queries, keys and values.
    pub fn attention_input_cols(&self) -> usize {
        self.qkv_cols() + if self.attention_gate { self.attention_cols() } else { 0 }
    }

    pub fn each_layer(&self) -> impl Iterator<Item = LayerSpec> {
        (0..self.layers).map(|l| self.layer(l))
    }

    /// The windows of all blocks, each once: one or two.
    pub fn windows(&self) -> Vec<Option<u32>> {
        let attending = self.blocks.iter().filter(|kind| kind.mixer == Mixer::Attention);
        let mut all: Vec<_> = attending.map(|kind| kind.window).collect();
        all.sort_unstable();
        all.dedup();
        if all.is_empty() { vec![None] } else { all }
    }

    /// The attention of the blocks with each of [`Spec::windows`].
    pub fn attentions(&self) -> Vec<attention::Shape> {
        let shape = |window| attention::Shape { window, ..self.attention() };
        self.windows().into_iter().map(shape).collect()
    }

    /// Bytes of the rotary tables in a float of `bytes` bytes.
    pub fn rope_bytes(&self, bytes: usize) -> usize {
        let tables = self.ropes.len() + usize::from(self.query_scale.is_some());
        tables * self.max_positions * self.head_dim * bytes
    }

    /// Allocated rows of the embedding and the LM head.
    pub fn vocab_room(&self) -> usize {
        if self.unpadded.is_some() { self.vocab.next_multiple_of(8) } else { self.vocab }
    }

    /// The experts of block `l`, if it has some.
    pub fn experts_at(&self, l: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|e| !e.dense.contains(&l))
    }

    /// Whether block `l` has an MLP, be it an expert of all rows.
    pub fn has_mlp(&self, l: usize) -> bool {
        self.experts_at(l).is_none_or(|e| e.shared)
    }

    /// Blocks with experts.
    pub fn expert_blocks(&self) -> usize {
        (0..self.layers).filter(|l| self.experts_at(*l).is_some()).count()
    }

    /// Experts that there are.
    pub fn expert_count(&self) -> usize {
        self.experts.as_ref().map_or(0, |e| e.router.experts)
    }

    /// Allocated rows of the router.
    pub fn router_room(&self) -> usize {
        let experts = self.expert_count();
        if self.unpadded.is_some() { experts.next_multiple_of(8) } else { experts }
    }

    /// Columns of the fused query, key and value projection.
    pub fn qkv_cols(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the attention's output.
    pub fn attention_cols(&self) -> usize {
        self.q_heads * self.head_dim
    }

    /// Columns of the MLP's first projection: gate and up side by side where it is gated.
    pub fn up_cols(&self) -> usize {
        match self.mlp {
            Mlp::Plain(_) => self.mlp_hidden,
            Mlp::Gated(_) => 2 * self.mlp_hidden,
        }
    }

    /// Heads and cache pages of the attention op, which all blocks share; windows are a block's
    /// own. Scores are divided by sqrt(head_dim) without padding, unless the family has a factor.
    pub fn attention(&self) -> attention::Shape {
        let scale = 1.0 / (self.widths().head_dim as f64).sqrt();
        attention::Shape {
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.scales.scores.unwrap_or(scale),
            softcap: self.scales.score_cap,
            window: None,
        }
    }

    pub fn norms_before(&self) -> bool {
        self.block_norms != BlockNorms::After
    }

    pub fn norms_after(&self) -> bool {
        self.block_norms != BlockNorms::Before
    }
}
