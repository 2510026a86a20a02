//! What a family is: the block's parts, and the names of its weights.

use super::{Config, ParamKind};
use crate::{
    device::Device,
    error::{Error, Result},
    ops::{activation::Activation, attention, matmul, rope::Rope},
};

/// Normalisation before attention, before the MLP and before the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    Rms,
    /// LayerNorm, a weight and a bias.
    Layer,
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

/// A transformer, free of its family's name.
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
    /// Width of a head.
    pub head_dim: usize,
    /// Width inside the MLP.
    pub mlp_hidden: usize,
    pub max_positions: usize,
    pub norm: Norm,
    pub norm_eps: f64,
    pub position: Position,
    /// Kind of feed-forward part.
    pub mlp: Mlp,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub out_bias: bool,
    /// Biases inside the MLP.
    pub mlp_bias: bool,
    /// The LM head is the embedding.
    pub tied: bool,
    /// Widths in files, where the spec is a CUDA device's, which may take wider ones. What is
    /// beside them is 0, and so are its gradients.
    pub stored: Option<Widths>,
}

/// Widths inside a block that a device may want wider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Width of a head.
    pub head_dim: usize,
    /// Width inside the MLP.
    pub mlp_hidden: usize,
}

impl Spec {
    /// The model as `dev` computes it: heads and MLP as wide as its kernels take them.
    pub fn on(self, dev: &Device) -> Self {
        let stored = self.stored();
        let head_dim = attention::width(dev, stored.head_dim);
        let mlp_hidden = matmul::width(dev, stored.mlp_hidden);
        let stored = matches!(dev, Device::Cuda(_)).then_some(stored);
        Self { head_dim, mlp_hidden, stored, ..self }
    }

    /// Whether `dev` computes such a model, after [`Spec::on`].
    pub fn check(&self, dev: &Device) -> Result<()> {
        if matmul::width(dev, self.hidden) != self.hidden {
            let what = "hidden size on a CUDA device";
            return Err(Error::value(what, "a multiple of 8", self.hidden));
        }
        attention::supported(dev, &self.attention())
    }

    pub fn stored(&self) -> Widths {
        let Self { head_dim, mlp_hidden, .. } = *self;
        self.stored.unwrap_or(Widths { head_dim, mlp_hidden })
    }

    /// Rows that there is room for in the embedding and the LM head.
    pub fn vocab_room(&self) -> usize {
        if self.stored.is_some() { self.vocab.next_multiple_of(8) } else { self.vocab }
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

    /// The attention op's view of it; scores are divided by sqrt(head_dim), as it is in files.
    pub fn attention(&self) -> attention::Shape {
        attention::Shape {
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.stored().head_dim as f64).sqrt(),
            softcap: None,
            window: None,
        }
    }

    /// Multiply-add FLOPs of the blocks for one token forward, attention scores left out: twice
    /// the number of block weights.
    pub fn block_flops(&self) -> f64 {
        let h = self.hidden;
        let weights = h * self.qkv_cols()
            + self.attention_cols() * h
            + h * self.up_cols()
            + self.mlp_hidden * h;
        2.0 * (self.layers * weights) as f64
    }
}

/// How a family is stored by Hugging Face.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// `architectures` of the model with an LM head.
    pub causal_lm: &'static str,
    /// `architectures` of the model with a scalar head.
    pub sequence_classification: &'static str,
    /// Before every weight of the backbone; some files leave it out.
    pub prefix: &'static str,
    /// Names of each weight, `{}` for the layer. Several names are rows of one of ours, in order.
    pub names: &'static [(ParamKind, &'static [&'static str])],
    /// Linear weights are stored `[in, out]`.
    pub transposed: bool,
    /// Endings of stored tensors that are no weights: mask buffers and the like.
    pub ignored: &'static [&'static str],
    pub spec: fn(&Config) -> Result<Spec>,
}
