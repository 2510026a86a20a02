//! The weights of a model as one flat buffer, so that the optimizer, the gradient norm, hashing and
//! checkpoints are each one pass over it.

use std::{ops::Range, sync::Arc};

use super::{AdapterSite, Head, Norm, ParamKind, Spec, axis::Axis};
use crate::{
    device::{Buffer, Device, Element, View, ViewMut},
    error::{Error, Result},
    ops::{adamw, residual},
};

/// Which models have a weight.
#[derive(Clone, Copy, Debug)]
pub enum Occurs {
    Once(fn(&Spec, Head) -> bool),
    /// In each block of which this holds.
    InBlock(fn(&Spec, usize) -> bool),
}

/// The facts of a weight. Names in files are facts of a [`Family`](super::Family).
#[derive(Debug)]
pub struct WeightFacts {
    pub kind: ParamKind,
    pub occurs: Occurs,
    /// Outputs; a vector is one row.
    pub rows: Axis,
    /// Inputs, or the length of a vector.
    pub cols: Axis,
    /// Matrices decay, norms and biases do not (the groups of Hugging Face's Trainer).
    pub decays: bool,
    /// The bias that is added with it.
    pub bias: Option<ParamKind>,
}

const fn matrix(kind: ParamKind, occurs: Occurs, rows: Axis, cols: Axis) -> WeightFacts {
    WeightFacts { kind, occurs, rows, cols, decays: true, bias: None }
}

const fn vector(kind: ParamKind, occurs: Occurs, cols: Axis) -> WeightFacts {
    WeightFacts { kind, occurs, rows: Axis::One, cols, decays: false, bias: None }
}

impl WeightFacts {
    const fn with(self, bias: ParamKind) -> Self {
        Self { bias: Some(bias), ..self }
    }
}

/// All weights in the order of the flat buffer; a bias follows its weight.
pub const WEIGHTS: &[WeightFacts] = {
    use Axis::{
        Attention, Channels, DeltaHeads, DeltaValue, ExpertMlp, Experts, ExpertsOut, ExpertsUp,
        Heads, Hidden, Mixed, MixerIn, Mlp, NormedK, NormedQ, One, Positions, Qkv, Taps, Up, Vocab,
    };
    use Occurs::{InBlock, Once};
    use ParamKind as K;
    const ATTENTION: Occurs = InBlock(|s, l| s.attends(l));
    const OTHER: Occurs = InBlock(|s, l| !s.attends(l));
    const DELTA: Occurs = InBlock(|s, l| !s.attends(l) && s.delta().is_some());
    const NORM_BEFORE: Occurs = InBlock(|s, _| s.norms_before());
    const NORM_AFTER: Occurs = InBlock(|s, _| s.norms_after());
    const LAYER_NORM: Occurs = InBlock(|s, _| s.norms_before() && s.norm == Norm::Layer);
    const QK_NORM: Occurs = InBlock(|s, l| s.qk_norm.is_some() && s.attends(l));
    const MLP: Occurs = InBlock(Spec::has_mlp);
    const MLP_BIAS: Occurs = InBlock(|s, l| s.mlp_bias && s.has_mlp(l));
    const EXPERTS: Occurs = InBlock(|s, l| s.experts_at(l).is_some());
    const ROUTER_BIAS: Occurs = InBlock(|s, l| s.experts_at(l).is_some_and(|e| e.router_bias));
    const EXPERT_BIAS: Occurs = InBlock(|s, l| s.experts_at(l).is_some_and(|e| e.bias));
    const SHARED: Occurs = InBlock(|s, l| s.experts_at(l).is_some_and(|e| e.shared));
    &[
        matrix(K::Embedding, Once(|_, _| true), Vocab, Hidden),
        matrix(K::Positions, Once(|s, _| s.learned_positions), Positions, Hidden),
        vector(K::Norm1, NORM_BEFORE, Hidden).with(K::Norm1Bias),
        vector(K::Norm1Bias, LAYER_NORM, Hidden),
        matrix(K::Qkv, ATTENTION, Qkv, Hidden).with(K::QkvBias),
        vector(K::QkvBias, InBlock(|s, l| s.qkv_bias && s.attends(l)), Qkv),
        vector(K::QNorm, QK_NORM, NormedQ),
        vector(K::KNorm, QK_NORM, NormedK),
        // No bias, and no norm: Hugging Face's Trainer lets it decay.
        WeightFacts {
            decays: true,
            ..vector(K::Sinks, InBlock(|s, l| s.sinks && s.attends(l)), Heads)
        },
        matrix(K::Out, ATTENTION, Hidden, Attention).with(K::OutBias),
        vector(K::OutBias, InBlock(|s, l| s.out_bias && s.attends(l)), Hidden),
        matrix(K::MixerIn, OTHER, MixerIn, Hidden),
        matrix(K::Conv, OTHER, Channels, Taps),
        // As Hugging Face's Trainer has it: what is called a bias does not decay, a logarithm does.
        WeightFacts { decays: true, ..vector(K::DeltaRate, DELTA, DeltaHeads).with(K::DeltaBias) },
        vector(K::DeltaBias, DELTA, DeltaHeads),
        vector(K::DeltaNorm, DELTA, DeltaValue),
        matrix(K::MixerOut, OTHER, Hidden, Mixed),
        vector(K::PostNorm1, NORM_AFTER, Hidden),
        vector(K::Norm2, NORM_BEFORE, Hidden).with(K::Norm2Bias),
        vector(K::Norm2Bias, LAYER_NORM, Hidden),
        matrix(K::Up, MLP, Up, Hidden).with(K::UpBias),
        vector(K::UpBias, MLP_BIAS, Up),
        matrix(K::Down, MLP, Hidden, Mlp).with(K::DownBias),
        vector(K::DownBias, MLP_BIAS, Hidden),
        matrix(K::Router, EXPERTS, Experts, Hidden).with(K::RouterBias),
        vector(K::RouterBias, ROUTER_BIAS, Experts),
        matrix(K::ExpertsUp, EXPERTS, ExpertsUp, Hidden).with(K::ExpertsUpBias),
        vector(K::ExpertsUpBias, EXPERT_BIAS, ExpertsUp),
        matrix(K::ExpertsDown, EXPERTS, ExpertsOut, ExpertMlp).with(K::ExpertsDownBias),
        vector(K::ExpertsDownBias, EXPERT_BIAS, ExpertsOut),
        matrix(K::SharedGate, SHARED, One, Hidden),
        vector(K::PostNorm2, NORM_AFTER, Hidden),
        vector(K::FinalNorm, Once(|_, _| true), Hidden).with(K::FinalNormBias),
        vector(K::FinalNormBias, Once(|s, _| s.norm == Norm::Layer), Hidden),
        matrix(K::LmHead, Once(|s, head| head == Head::Lm && !s.tied), Vocab, Hidden),
        matrix(K::Score, Once(|_, head| head == Head::Scalar), One, Hidden),
    ]
};

/// Where a weight of a model lies in the flat buffer.
#[derive(Clone, Debug)]
pub struct ParamTensor {
    pub kind: ParamKind,
    pub facts: &'static WeightFacts,
    /// Its block, if it is in one.
    pub layer: Option<usize>,
    pub rows: usize,
    pub cols: usize,
    /// Matrices that it is made of, one below the other: one for each expert, else 1.
    pub stack: usize,
    /// Those that a row is multiplied by.
    pub used: usize,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Which factor of an adapter on the weight it is, if it is none itself.
    pub factor: Option<Factor>,
}

/// A factor of a low-rank adapter on some rows of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factor {
    pub side: FactorSide,
    /// Which of the stored tensors that the weight is made of.
    pub part: usize,
    /// The weight's first row in it.
    pub first: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FactorSide {
    /// `[rank, inputs]`
    A,
    /// `[outputs, rank]`
    B,
}

impl ParamTensor {
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }

    /// Outputs and inputs of each matrix.
    pub fn sides(&self) -> (usize, usize) {
        (self.rows / self.stack, self.cols)
    }

    /// Norms, biases and the scalar head.
    pub fn is_vector(&self) -> bool {
        self.facts.rows == Axis::One
    }

    /// A matrix of a block, which linear layers multiply by.
    pub fn is_block_linear(&self) -> bool {
        self.layer.is_some() && !self.is_vector() && self.kind != ParamKind::Conv
    }

    /// A name for messages and checkpoints: `Qkv.3`.
    pub fn name(&self) -> String {
        let name =
            self.layer.map_or(format!("{:?}", self.kind), |l| format!("{:?}.{l}", self.kind));
        self.factor.map_or(name.clone(), |f| format!("{name}.{}{:?}", f.part, f.side))
    }
}

/// The order of all weights of a model.
#[derive(Debug)]
pub struct Layout {
    tensors: Vec<ParamTensor>,
    len: usize,
    /// Where the tensors of each block begin, and those behind the last.
    blocks: Vec<usize>,
    /// The LM head, if the model has one.
    lm_head: Option<usize>,
}

impl Layout {
    /// The layout of `spec` with this head.
    pub fn new(spec: &Spec, head: Head) -> Self {
        let mut layout = Self { tensors: Vec::new(), len: 0, blocks: Vec::new(), lm_head: None };
        let in_block = |w: &WeightFacts| matches!(w.occurs, Occurs::InBlock(_));
        for run in WEIGHTS.chunk_by(|a, b| in_block(a) == in_block(b)) {
            let once =
                run.iter().filter(|w| matches!(w.occurs, Occurs::Once(is) if is(spec, head)));
            once.for_each(|w| layout.push(spec, w, None));
            if !in_block(&run[0]) {
                continue;
            }
            for l in 0..spec.layers {
                layout.blocks.push(layout.tensors.len());
                let there =
                    |w: &&WeightFacts| matches!(w.occurs, Occurs::InBlock(is) if is(spec, l));
                run.iter().filter(there).for_each(|w| layout.push(spec, w, Some(l)));
            }
            layout.blocks.push(layout.tensors.len());
        }
        let kind = if spec.tied { ParamKind::Embedding } else { ParamKind::LmHead };
        let has = |t: &ParamTensor| head == Head::Lm && t.kind == kind;
        layout.lm_head = layout.tensors.iter().position(has);
        layout
    }

    /// The layout of what updates change: the adapters of a spec that has some, with a scalar head
    /// that is theirs; else all.
    pub fn trained(spec: &Spec, head: Head) -> Self {
        let Some(adapter) = &spec.adapter else { return Self::new(spec, head) };
        let mut layout = Self { tensors: Vec::new(), len: 0, blocks: Vec::new(), lm_head: None };
        for l in 0..spec.layers {
            layout.blocks.push(layout.tensors.len());
            for site in adapter.sites.iter().filter(|site| site.layer == l) {
                layout.push_factors(spec, adapter.room(spec), site);
            }
        }
        layout.blocks.push(layout.tensors.len());
        if head == Head::Scalar && adapter.score {
            WEIGHTS.iter().filter(|w| w.kind == ParamKind::Score).for_each(|w| {
                layout.push(spec, w, None);
            });
        }
        layout
    }

    fn push_factors(&mut self, spec: &Spec, rank: usize, site: &AdapterSite) {
        let facts = WEIGHTS.iter().filter(|w| w.kind == site.kind);
        for facts in facts {
            let rows = factor_rows(spec, site, facts.rows);
            let first = rows.start;
            let sides = [(rank, facts.cols.len(spec)), (rows.len(), rank)];
            for (side, (rows, cols)) in [FactorSide::A, FactorSide::B].into_iter().zip(sides) {
                let factor = Some(Factor { side, part: site.part, first });
                let (kind, layer, offset) = (site.kind, Some(site.layer), self.len);
                let (stack, used) = (1, 1);
                let tensor =
                    ParamTensor { kind, facts, layer, rows, cols, stack, used, offset, factor };
                self.place(tensor, rows);
            }
        }
    }

    fn push(&mut self, spec: &Spec, facts: &'static WeightFacts, layer: Option<usize>) {
        let WeightFacts { kind, rows, cols, .. } = *facts;
        let room = match rows {
            Axis::Vocab => spec.vocab_room(),
            Axis::Experts => spec.router_room(),
            _ => rows.len(spec),
        };
        let of_experts = |axis| matches!(axis, Axis::ExpertsUp | Axis::ExpertsOut);
        let (stack, used) = match &spec.experts {
            Some(e) if of_experts(rows) || of_experts(cols) => (e.router.experts, e.router.top),
            _ => (1, 1),
        };
        let (rows, cols, offset) = (rows.len(spec), cols.len(spec), self.len);
        let factor = None;
        let tensor = ParamTensor { kind, facts, layer, rows, cols, stack, used, offset, factor };
        self.place(tensor, room);
    }

    /// Adds a tensor behind the others, with room for so many rows.
    fn place(&mut self, tensor: ParamTensor, room: usize) {
        // 64 bytes of f32: every tensor starts on a cache line. The gap stays 0 for ever.
        self.len += (room * tensor.cols).next_multiple_of(adamw::LINE);
        self.tensors.push(tensor);
    }

    /// All tensors, in the order of their offsets.
    pub fn tensors(&self) -> &[ParamTensor] {
        &self.tensors
    }

    /// Elements of the flat buffer, gaps included.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most outputs of an adapter of the spec, or inputs too in its backward pass.
    pub(super) fn widest_factor(spec: &Spec, trained: bool) -> usize {
        let sites = spec.adapter.iter().flat_map(|adapter| &adapter.sites);
        let sides = sites.flat_map(|site| {
            let facts = WEIGHTS.iter().filter(|w| w.kind == site.kind);
            facts.map(|w| {
                let cols = if trained { w.cols.len(spec) } else { 0 };
                factor_rows(spec, site, w.rows).len().max(cols)
            })
        });
        sides.max().unwrap_or(0)
    }

    /// A weight, if the model has it.
    pub fn find(&self, kind: ParamKind, layer: Option<usize>) -> Option<&ParamTensor> {
        let is = |t: &&ParamTensor| t.kind == kind && t.layer == layer && t.factor.is_none();
        self.among(layer)?.iter().find(is)
    }

    /// The factors A and B of each adapter on a weight.
    pub fn factors(
        &self,
        kind: ParamKind,
        layer: Option<usize>,
    ) -> impl Iterator<Item = [&ParamTensor; 2]> {
        let among = self.among(layer).unwrap_or_default();
        let all = among.windows(2).map(|pair| [&pair[0], &pair[1]]);
        let is_a = |t: &ParamTensor| t.factor.is_some_and(|f| f.side == FactorSide::A);
        all.filter(move |[a, _]| a.kind == kind && is_a(a))
    }

    /// The tensors of a block, or all.
    fn among(&self, layer: Option<usize>) -> Option<&[ParamTensor]> {
        let Some(l) = layer else { return Some(&self.tensors) };
        self.tensors.get(*self.blocks.get(l)?..*self.blocks.get(l + 1)?)
    }

    /// The weight of the LM head, if the model has one: the embedding, where it is tied.
    pub fn lm_head(&self) -> Option<&ParamTensor> {
        self.lm_head.map(|i| &self.tensors[i])
    }

    /// Elements of the embedding, if it is the LM head too.
    pub fn tied_len(&self) -> usize {
        self.lm_head().filter(|t| t.kind == ParamKind::Embedding).map_or(0, ParamTensor::len)
    }

    /// The weights that linear layers multiply by: those of the blocks and the LM head.
    pub fn linears(&self) -> impl Iterator<Item = &ParamTensor> {
        self.tensors.iter().filter(|t| t.is_block_linear()).chain(self.lm_head())
    }

    /// Multiply-add FLOPs of the blocks' linear layers for one token forward.
    pub fn block_flops(&self) -> f64 {
        2.0 * self
            .tensors
            .iter()
            .filter(|t| t.is_block_linear())
            .map(|t| t.len() as f64 * t.used as f64 / t.stack as f64)
            .sum::<f64>()
    }

    /// The tensor that holds a flat index.
    pub fn at(&self, index: usize) -> Option<&ParamTensor> {
        let i = self.tensors.partition_point(|t| t.offset <= index);
        self.tensors[..i].last().filter(|t| t.range().contains(&index))
    }
}

/// The rows of a weight that an adapter is for, among those of a device, which pads all parts
/// alike.
fn factor_rows(spec: &Spec, site: &AdapterSite, rows: Axis) -> Range<usize> {
    let parts = rows.parts(spec, site.parts);
    let (len, stored) = (rows.len(spec), rows.stored_len(spec).max(1));
    let start: usize = parts.iter().take(site.part).sum();
    let end = start + parts.get(site.part).copied().unwrap_or(0);
    start * len / stored..end * len / stored
}

/// Numbers in a [`Layout`]: weights, gradients or moments.
#[derive(Debug)]
pub struct Params<T: 'static> {
    layout: Arc<Layout>,
    pub(super) data: Buffer<'static, T>,
    /// See [`Params::gradients`].
    tokens: Option<Buffer<'static, T>>,
}

impl<T: Element> Params<T> {
    /// All 0. `what` names them in messages.
    pub fn zeros(dev: &Device, what: &'static str, layout: &Arc<Layout>) -> Result<Self> {
        let data = Buffer::zeros(dev, what, layout.len())?;
        Ok(Self { layout: layout.clone(), data, tokens: None })
    }

    /// No memory for any.
    pub(super) fn none(layout: &Arc<Layout>) -> Self {
        Self { layout: layout.clone(), data: Buffer::none(), tokens: None }
    }

    /// Gradients, all 0. A tied embedding has two: that of the LM head, and that of the tokens that
    /// it embeds, which comes to memory of its own until [`Params::add_tokens`]. Were both added to
    /// one buffer, in turn by micro-batch, the order of the sum would be the split's.
    pub fn gradients(dev: &Device, layout: &Arc<Layout>) -> Result<Self> {
        let tokens = (layout.tied_len() > 0)
            .then(|| Buffer::zeros(dev, "gradients of tokens", layout.tied_len()))
            .transpose()?;
        Ok(Self { tokens, ..Self::zeros(dev, "gradients", layout)? })
    }

    /// Sets all to 0.
    pub fn zero(&mut self, dev: &Device) -> Result<()> {
        self.tokens.as_mut().map_or(Ok(()), |tokens| dev.zero(tokens.view_mut()))?;
        dev.zero(self.data.view_mut())
    }

    /// The gradient of the embedding as a table of tokens, to add to.
    pub(super) fn tokens_mut(&mut self) -> Option<ViewMut<'_, T>> {
        if self.tokens.is_none() {
            return self.get_mut(ParamKind::Embedding, None);
        }
        self.tokens.as_mut().map(Buffer::view_mut)
    }

    /// Adds the gradient of tokens to that of the LM head, after the last micro-batch of an update.
    pub fn add_tokens(&mut self, dev: &Device) -> Result<()> {
        let Some(tokens) = self.tokens.take() else { return Ok(()) };
        let head = self.get_mut(ParamKind::Embedding, None);
        head.map_or(Ok(()), |head| residual::add(dev, head, tokens.view()))?;
        self.tokens = Some(tokens);
        Ok(())
    }

    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    pub fn flat(&self) -> View<'_, T> {
        self.data.view()
    }

    pub fn flat_mut(&mut self) -> ViewMut<'_, T> {
        self.data.view_mut()
    }

    pub fn tensor(&self, t: &ParamTensor) -> View<'_, T> {
        self.data.view().range(t.range())
    }

    pub fn tensor_mut(&mut self, t: &ParamTensor) -> ViewMut<'_, T> {
        self.data.view_mut().range(t.range())
    }

    /// A weight, if the model has it.
    pub fn get(&self, kind: ParamKind, layer: Option<usize>) -> Option<View<'_, T>> {
        self.layout.find(kind, layer).map(|t| self.tensor(t))
    }

    /// A weight to write, if the model has it.
    pub fn get_mut(&mut self, kind: ParamKind, layer: Option<usize>) -> Option<ViewMut<'_, T>> {
        let layout = self.layout.clone();
        layout.find(kind, layer).map(|t| self.tensor_mut(t))
    }

    /// A weight that the layout promises.
    pub(super) fn need(&self, kind: ParamKind, layer: Option<usize>) -> Result<&ParamTensor> {
        let missing = || Error::value("weights", format!("{kind:?} of block {layer:?}"), "none");
        self.layout.find(kind, layer).ok_or_else(missing)
    }

    /// The bias that is added with a weight, if there is one.
    pub(super) fn bias(&self, t: &ParamTensor) -> Option<View<'_, T>> {
        t.facts.bias.and_then(|bias| self.get(bias, t.layer))
    }

    /// A weight and its bias to write; none if the weight is not here, as it is frozen.
    pub(super) fn pair_mut(
        &mut self,
        kind: ParamKind,
        layer: Option<usize>,
    ) -> Option<(ViewMut<'_, T>, Option<ViewMut<'_, T>>)> {
        let layout = self.layout.clone();
        let t = layout.find(kind, layer)?;
        let Some(bias) = t.facts.bias.and_then(|bias| layout.find(bias, layer)) else {
            return Some((self.tensor_mut(t), None));
        };
        // A bias follows its weight.
        let (low, high) = self.data.view_mut().split_at(bias.offset);
        Some((low.range(t.range()), Some(high.range(0..bias.len()))))
    }

    /// The same with `rows` outputs, of which the last ones are in the gap behind the weight's own
    /// and the bias's own.
    pub(super) fn wide_pair_mut(
        &mut self,
        kind: ParamKind,
        layer: Option<usize>,
        rows: usize,
    ) -> Option<(ViewMut<'_, T>, Option<ViewMut<'_, T>>)> {
        let layout = self.layout.clone();
        let t = layout.find(kind, layer)?;
        let range = t.offset..t.offset + rows * t.cols;
        let Some(bias) = t.facts.bias.and_then(|bias| layout.find(bias, layer)) else {
            return Some((self.data.view_mut().range(range), None));
        };
        let (low, high) = self.data.view_mut().split_at(bias.offset);
        Some((low.range(range), Some(high.range(0..rows))))
    }
}
