//! What a transformer computes, free of its family's name.

use crate::{
    device::Device,
    error::{Error, Result},
    ops::{activation::Activation, attention, matmul, rope::Rope},
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

#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// A learned table added to the embedding.
    Learned,
    /// Rotary embedding of queries and keys.
    Rope(Rope),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// `down(act(up(x)))`
    Plain(Activation),
    /// `down(act(gate(x)) * up(x))`
    Gated(Activation),
}

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
    pub norm: Norm,
    pub norm_eps: f64,
    pub position: Position,
    pub mlp: Mlp,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub out_bias: bool,
    /// Biases inside the MLP.
    pub mlp_bias: bool,
    /// The LM head is the embedding.
    pub tied: bool,
    /// Unpadded widths, if the spec is a CUDA device's: it pads heads and MLP with zeros up to the
    /// widths of its kernels, and their gradients stay 0.
    pub unpadded: Option<Widths>,
}

/// Widths inside a block that a device may pad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    pub head_dim: usize,
    pub mlp_hidden: usize,
}

/// What one block computes. The transformer and the plan read from here all that may differ between
/// the blocks of a model; a family whose blocks differ says so in [`Spec::layer`].
#[derive(Clone, Debug)]
pub struct LayerSpec {
    /// Heads, scale, window and soft-cap of the attention scores.
    pub attention: attention::Shape,
    /// The one of [`Spec::ropes`] that rotates queries and keys, if one does.
    pub rope: Option<usize>,
}

impl Spec {
    /// The model as `dev` computes it: with heads and MLP padded to the widths of its kernels.
    pub fn on(self, dev: &Device) -> Self {
        let widths = self.widths();
        let head_dim = attention::width(dev, widths.head_dim);
        let mlp_hidden = matmul::width(dev, widths.mlp_hidden);
        let unpadded = matches!(dev, Device::Cuda(_)).then_some(widths);
        Self { head_dim, mlp_hidden, unpadded, ..self }
    }

    /// Whether `dev` computes such a model, after [`Spec::on`].
    pub fn check(&self, dev: &Device) -> Result<()> {
        if matmul::width(dev, self.hidden) != self.hidden {
            let what = "hidden size on a CUDA device";
            return Err(Error::value(what, "a multiple of 8", self.hidden));
        }
        self.each_layer().try_for_each(|layer| attention::supported(dev, &layer.attention))
    }

    /// Widths without padding, as files have them.
    pub fn widths(&self) -> Widths {
        let Self { head_dim, mlp_hidden, .. } = *self;
        self.unpadded.unwrap_or(Widths { head_dim, mlp_hidden })
    }

    /// What block `l` computes. The shape that all blocks share is [`Spec::attention`].
    pub fn layer(&self, _l: usize) -> LayerSpec {
        let rope = matches!(self.position, Position::Rope(_)).then_some(0);
        LayerSpec { attention: self.attention(), rope }
    }

    pub fn each_layer(&self) -> impl Iterator<Item = LayerSpec> {
        (0..self.layers).map(|l| self.layer(l))
    }

    /// The rotary embeddings of all blocks, each once.
    pub fn ropes(&self) -> &[Rope] {
        match &self.position {
            Position::Rope(rope) => std::slice::from_ref(rope),
            Position::Learned => &[],
        }
    }

    /// Bytes of the rotary tables in a float of `bytes` bytes.
    pub fn rope_bytes(&self, bytes: usize) -> usize {
        self.ropes().len() * self.max_positions * self.head_dim * bytes
    }

    /// Allocated rows of the embedding and the LM head.
    pub fn vocab_room(&self) -> usize {
        if self.unpadded.is_some() { self.vocab.next_multiple_of(8) } else { self.vocab }
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

    /// Heads and cache pages of the attention op. Scores are divided by sqrt(head_dim) without
    /// padding.
    pub fn attention(&self) -> attention::Shape {
        attention::Shape {
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.widths().head_dim as f64).sqrt(),
            softcap: None,
            window: None,
        }
    }
}
