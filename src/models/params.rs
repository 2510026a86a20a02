//! The weights of a model as one flat buffer: so that the optimizer, the gradient norm, hashing and
//! checkpoints are each one pass.

use std::sync::Arc;

use super::{Head, Norm, Position, Spec};
use crate::{
    device::{Buffer, Device, Element, View, ViewMut},
    error::Result,
    ops::adamw,
};

/// A weight's place in the block, the same for every family. Linear weights are `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum ParamKind {
    /// `[vocab, hidden]`; the LM head too, where it is tied
    Embedding,
    /// `[max_positions, hidden]`
    Positions,
    Norm1,
    Norm1Bias,
    /// `[(q_heads + 2 kv_heads) head_dim, hidden]`
    Qkv,
    QkvBias,
    /// `[hidden, q_heads head_dim]`
    Out,
    OutBias,
    Norm2,
    Norm2Bias,
    /// `[mlp_hidden, hidden]`, or gate above up: `[2 mlp_hidden, hidden]`
    Up,
    UpBias,
    /// `[hidden, mlp_hidden]`
    Down,
    DownBias,
    FinalNorm,
    FinalNormBias,
    /// `[vocab, hidden]`, where it is not tied
    LmHead,
    /// `[1, hidden]`: value or reward
    Score,
}

impl ParamKind {
    /// Matrices decay, norms and biases do not (Hugging Face Trainer's groups).
    pub fn is_matrix(self) -> bool {
        use ParamKind::{Down, Embedding, LmHead, Out, Positions, Qkv, Score, Up};
        matches!(self, Embedding | Positions | Qkv | Out | Up | Down | LmHead | Score)
    }

    /// Stored flat: norms, biases and the scalar head.
    pub fn is_vector(self) -> bool {
        !self.is_matrix() || self == ParamKind::Score
    }

    /// Linear layers inside the block, which some families store transposed.
    pub fn is_block_linear(self) -> bool {
        matches!(self, ParamKind::Qkv | ParamKind::Out | ParamKind::Up | ParamKind::Down)
    }
}

/// Where a weight lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub kind: ParamKind,
    /// Its block, if it is in one.
    pub layer: Option<usize>,
    /// Outputs, or 1 for a vector.
    pub rows: usize,
    /// Inputs, or the vector's length.
    pub cols: usize,
    /// First element in the flat buffer.
    pub offset: usize,
}

impl Tensor {
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A name for messages and checkpoints: `Qkv.3`.
    pub fn name(&self) -> String {
        self.layer.map_or(format!("{:?}", self.kind), |l| format!("{:?}.{l}", self.kind))
    }
}

/// The order of all weights of a model.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<Tensor>,
    len: usize,
    per_layer: usize,
    before: usize,
    /// Rows that there is room for in embedding and LM head.
    vocab: usize,
}

impl Layout {
    /// The layout of `spec` with this head.
    pub fn new(spec: &Spec, head: Head) -> Self {
        let h = spec.hidden;
        let layer_norm = spec.norm == Norm::Layer;
        let vocab = spec.vocab_room();
        let mut layout = Self { tensors: Vec::new(), len: 0, per_layer: 0, before: 0, vocab };
        layout.push(ParamKind::Embedding, None, spec.vocab, h);
        if spec.position == Position::Learned {
            layout.push(ParamKind::Positions, None, spec.max_positions, h);
        }
        layout.before = layout.tensors.len();
        for l in 0..spec.layers {
            for (kind, there, rows, cols) in [
                (ParamKind::Norm1, true, 1, h),
                (ParamKind::Norm1Bias, layer_norm, 1, h),
                (ParamKind::Qkv, true, spec.qkv_cols(), h),
                (ParamKind::QkvBias, spec.qkv_bias, 1, spec.qkv_cols()),
                (ParamKind::Out, true, h, spec.attention_cols()),
                (ParamKind::OutBias, spec.out_bias, 1, h),
                (ParamKind::Norm2, true, 1, h),
                (ParamKind::Norm2Bias, layer_norm, 1, h),
                (ParamKind::Up, true, spec.up_cols(), h),
                (ParamKind::UpBias, spec.mlp_bias, 1, spec.up_cols()),
                (ParamKind::Down, true, h, spec.mlp_hidden),
                (ParamKind::DownBias, spec.mlp_bias, 1, h),
            ] {
                if there {
                    layout.push(kind, Some(l), rows, cols);
                }
            }
            if l == 0 {
                layout.per_layer = layout.tensors.len() - layout.before;
            }
        }
        layout.push(ParamKind::FinalNorm, None, 1, h);
        if layer_norm {
            layout.push(ParamKind::FinalNormBias, None, 1, h);
        }
        match head {
            Head::Lm if !spec.tied => layout.push(ParamKind::LmHead, None, spec.vocab, h),
            Head::Lm => {}
            Head::Scalar => layout.push(ParamKind::Score, None, 1, h),
        }
        layout
    }

    fn push(&mut self, kind: ParamKind, layer: Option<usize>, rows: usize, cols: usize) {
        self.tensors.push(Tensor { kind, layer, rows, cols, offset: self.len });
        // 64 bytes of f32: every tensor starts on a cache line. The gap stays 0 for ever.
        let room = if matches!(kind, ParamKind::Embedding | ParamKind::LmHead) {
            self.vocab
        } else {
            rows
        };
        self.len += (room * cols).next_multiple_of(adamw::LINE);
    }

    /// All tensors, in the order of their offsets.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Elements of the flat buffer, gaps included.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Weights, gaps left out.
    pub fn weights(&self) -> usize {
        self.tensors.iter().map(Tensor::len).sum()
    }

    /// The tensor of a kind, if the model has it.
    pub fn find(&self, kind: ParamKind, layer: Option<usize>) -> Option<&Tensor> {
        let part = match layer {
            None => &self.tensors[..],
            Some(l) => &self.tensors[self.before + l * self.per_layer..][..self.per_layer],
        };
        part.iter().find(|t| t.kind == kind && t.layer == layer)
    }

    /// The tensor that holds a flat index.
    pub fn at(&self, index: usize) -> Option<&Tensor> {
        let i = self.tensors.partition_point(|t| t.offset <= index);
        self.tensors[..i].last().filter(|t| index < t.offset + t.len())
    }
}

/// Numbers in a [`Layout`]: weights, gradients or moments.
#[derive(Debug)]
pub struct Params<T: 'static> {
    layout: Arc<Layout>,
    pub(super) data: Buffer<'static, T>,
}

impl<T: Element> Params<T> {
    /// All 0. `what` names them in messages.
    pub fn zeros(dev: &Device, what: &'static str, layout: &Arc<Layout>) -> Result<Self> {
        Ok(Self { layout: layout.clone(), data: Buffer::zeros(dev, what, layout.len())? })
    }

    /// Sets all to 0.
    pub fn zero(&mut self, dev: &Device) -> Result<()> {
        dev.zero(self.data.view_mut())
    }

    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    pub fn flat(&self) -> View<'_, T> {
        self.data.view()
    }

    /// Everything, flat, to write.
    pub fn flat_mut(&mut self) -> ViewMut<'_, T> {
        self.data.view_mut()
    }

    pub fn tensor(&self, t: &Tensor) -> View<'_, T> {
        self.data.view().range(t.offset..t.offset + t.len())
    }

    /// One tensor, to write.
    pub fn tensor_mut(&mut self, t: &Tensor) -> ViewMut<'_, T> {
        self.data.view_mut().range(t.offset..t.offset + t.len())
    }

    /// The weight of a kind, if the model has it.
    pub fn get(&self, kind: ParamKind, layer: Option<usize>) -> Option<View<'_, T>> {
        self.layout.find(kind, layer).map(|t| self.tensor(t))
    }

    /// The weight of a kind, to write, if the model has it.
    pub fn get_mut(&mut self, kind: ParamKind, layer: Option<usize>) -> Option<ViewMut<'_, T>> {
        let layout = self.layout.clone();
        layout.find(kind, layer).map(|t| self.tensor_mut(t))
    }

    /// A weight and the bias that follows it, both to write. An empty view if the model lacks the
    /// weight.
    pub fn linear_mut(
        &mut self,
        weight: ParamKind,
        bias: ParamKind,
        layer: Option<usize>,
    ) -> (ViewMut<'_, T>, Option<ViewMut<'_, T>>) {
        let layout = self.layout.clone();
        let flat = self.data.view_mut();
        let Some(w) = layout.find(weight, layer) else { return (flat.range(0..0), None) };
        let Some(b) = layout.find(bias, layer) else {
            return (flat.range(w.offset..w.offset + w.len()), None);
        };
        // The layout puts a bias behind its weight.
        let (low, high) = flat.split_at(b.offset);
        (low.range(w.offset..w.offset + w.len()), Some(high.range(0..b.len())))
    }
}
