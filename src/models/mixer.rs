//! What some blocks have in the place of attention, forward and backward: a gated delta rule, or a
//! short convolution between two gates.

use super::{
    Linear, Model, ParamKind, Params, StateMixer,
    adapter::AdapterRows,
    norm::{NormInputGradient, Normed},
};
use crate::{
    device::{Buffer, Device, Element, Scope, View, ViewMut},
    error::{Error, Result},
    ops::{
        attention::KvLayer,
        delta_rule::{self, DeltaGrads, DeltaInputs, DeltaKept, DeltaOut, DeltaShape},
        gate::{self, Gate, Strided},
        short_conv::{self, ConvKept, Sequences},
    },
};

/// What the sequences of a cache leave to their next rows in one block: keys and values, or what a
/// mixer keeps in the slot of each.
#[derive(Debug)]
pub(super) struct LayerCache<'s, T: Element> {
    pub kv: KvLayer<'s, T>,
    /// The last inputs of the convolution.
    pub conv: Buffer<'s, T>,
    /// Of the delta rule.
    pub state: Buffer<'s, T::Acc>,
}

/// What a block keeps for its backward pass.
#[derive(Debug)]
pub(super) struct MixerActivations<'s, T: Element> {
    /// All that is projected from the block's input.
    input: Buffer<'s, T>,
    /// What is convolved, if it is no part of `input`.
    gated: Buffer<'s, T>,
    mixed: Buffer<'s, T>,
    delta: Option<DeltaActivations<'s, T>>,
    /// What the last projection reads.
    pub output: Buffer<'s, T>,
}

#[derive(Debug)]
struct DeltaActivations<'s, T: Element> {
    out: Buffer<'s, T>,
    errors: Buffer<'s, T::Acc>,
    norm: Normed<'s, T>,
    normed: Buffer<'s, T>,
}

impl<'s, T: Element> MixerActivations<'s, T> {
    pub fn new(
        scope: &'s Scope<'_>,
        mixer: StateMixer,
        hidden: usize,
        rows: usize,
    ) -> Result<Self> {
        let delta = mixer.delta().map(|shape| {
            let values = |what| scope.alloc(what, rows * shape.values());
            Ok(DeltaActivations {
                out: values("what a delta rule gives")?,
                errors: scope.alloc("errors of a delta rule", rows * shape.values())?,
                norm: Normed::heads(scope, rows, shape.value_heads)?,
                normed: values("what a delta rule gives, normalised")?,
            })
        });
        let gated = if mixer.delta().is_some() { 0 } else { rows * hidden };
        let mixed = rows * mixer.conv(hidden).channels;
        Ok(Self {
            input: scope.alloc("inputs of a mixer", rows * mixer.input_cols(hidden))?,
            gated: scope.alloc("gated inputs of a convolution", gated)?,
            mixed: scope.alloc("what a convolution gives", mixed)?,
            delta: delta.transpose()?,
            output: scope.alloc("outputs of a mixer", rows * mixer.output_cols(hidden))?,
        })
    }
}

/// Buffers that all blocks use in turn.
#[derive(Debug)]
pub(super) struct MixerGradients<'s, T: Element> {
    dinput: Buffer<'s, T>,
    dgated: Buffer<'s, T>,
    dmixed: Buffer<'s, T>,
    /// Of what a delta rule gives, and of the same normalised.
    ddelta: [Buffer<'s, T>; 2],
    pub doutput: Buffer<'s, T>,
}

impl<'s, T: Element> MixerGradients<'s, T> {
    pub fn new(
        scope: &'s Scope<'_>,
        mixer: StateMixer,
        hidden: usize,
        rows: usize,
    ) -> Result<Self> {
        let values = rows * mixer.delta().map_or(0, |shape| shape.values());
        let gated = if mixer.delta().is_some() { 0 } else { rows * hidden };
        let mixed = rows * mixer.conv(hidden).channels;
        let ddelta = || scope.alloc("gradient of what a delta rule gives", values);
        Ok(Self {
            dinput: scope.alloc("gradient of a mixer's inputs", rows * mixer.input_cols(hidden))?,
            dgated: scope.alloc("gradient of a convolution's inputs", gated)?,
            dmixed: scope.alloc("gradient of what a convolution gives", mixed)?,
            ddelta: [ddelta()?, ddelta()?],
            doutput: scope
                .alloc("gradient of a mixer's outputs", rows * mixer.output_cols(hidden))?,
        })
    }
}

/// Elements of scratch that [`BlockMixer::forward`] needs, or both passes.
pub(super) fn scratch_len(
    dev: &Device,
    mixer: StateMixer,
    hidden: usize,
    (rows, sequences): (usize, usize),
    trained: bool,
) -> usize {
    let forward = mixer.delta().map_or(0, |s| delta_rule::forward_scratch_len(dev, s, rows));
    if !trained {
        return forward;
    }
    let conv = short_conv::scratch_len(dev, mixer.conv(hidden), rows, sequences);
    let delta = mixer.delta().map_or(0, |s| delta_rule::backward_scratch_len(s, rows));
    forward.max(conv).max(delta)
}

/// The mixer of a block at work.
pub(super) struct BlockMixer<'a, T: Element> {
    pub dev: &'a Device,
    pub model: &'a Model<T>,
    pub at: Option<usize>,
    pub spec: StateMixer,
    /// Of the pass's sequences.
    pub spans: View<'a, u32>,
}

impl<'a, T: Element> BlockMixer<'a, T> {
    fn linear(&self, kind: ParamKind) -> Result<Linear<'a, T>> {
        self.model.linear(self.dev, kind, self.at)
    }

    fn weight(&self, kind: ParamKind) -> Result<View<'a, T>> {
        Ok(self.model.params().tensor(self.model.params().need(kind, self.at)?))
    }

    /// Columns of the first projection from `first` on.
    fn columns<V>(&self, data: V, first: usize) -> Strided<V> {
        Strided { data, first, stride: self.spec.input_cols(self.model.spec().hidden) }
    }

    /// Where `b` and `a` of a delta rule begin among those columns, behind its gates.
    fn gates_at(shape: DeltaShape) -> usize {
        shape.qkv_cols() + shape.values()
    }

    fn delta_inputs<'v>(
        &self,
        shape: DeltaShape,
        mixed: View<'v, T>,
        input: View<'v, T>,
    ) -> Result<DeltaInputs<'v, T>>
    where
        'a: 'v,
    {
        Ok(DeltaInputs {
            qkv: mixed,
            gates: self.columns(input, Self::gates_at(shape)),
            rate: self.weight(ParamKind::DeltaRate)?,
            bias: self.weight(ParamKind::DeltaBias)?,
        })
    }

    /// From the block's input `x` to what the last projection reads.
    pub fn forward(
        &self,
        b: &mut MixerActivations<'_, T>,
        x: View<'_, T>,
        cache: &mut LayerCache<'_, T>,
        (scratch, rows): (ViewMut<'_, T::Acc>, &mut AdapterRows<'_, T>),
    ) -> Result<()> {
        let (dev, hidden) = (self.dev, self.model.spec().hidden);
        let (conv, taps) = (self.spec.conv(hidden), self.weight(ParamKind::Conv)?);
        let LayerCache { conv: last, state, .. } = cache;
        let of = Sequences { spans: self.spans, state: last.view_mut() };
        self.linear(ParamKind::MixerIn)?.forward(dev, b.input.view_mut(), x, None, rows)?;
        let (input, mixed) = (b.input.view(), b.mixed.view_mut());
        let (Some(shape), Some(delta)) = (self.spec.delta(), &mut b.delta) else {
            return self.gated_conv(b, taps, of);
        };
        short_conv::forward(dev, conv, mixed, self.columns(input, 0), taps, of)?;
        let of = Sequences { spans: self.spans, state: state.view_mut() };
        let (out, errors) = (delta.out.view_mut(), delta.errors.view_mut());
        let inputs = self.delta_inputs(shape, b.mixed.view(), input)?;
        delta_rule::forward(dev, shape, DeltaOut { out, errors, scratch }, inputs, of)?;
        let norm = self.model.norm(ParamKind::DeltaNorm, self.at)?;
        let (normed, out) = (delta.normed.view_mut().into(), delta.out.view().into());
        norm.forward_to(dev, normed, &mut delta.norm, out)?;
        let (z, cols) = (self.columns(input, shape.qkv_cols()), shape.values());
        let normed = Strided::dense(delta.normed.view(), cols);
        let output = Strided::dense(b.output.view_mut(), cols);
        gate::forward(dev, Gate::Silu, output, normed, z, cols)
    }

    /// From the gradient of what the last projection reads, in `g.doutput`, to that of the block's
    /// input `x`, in `dx`.
    pub fn backward(
        &self,
        (grads, rows): (&mut Params<T::Acc>, &mut AdapterRows<'_, T>),
        b: &MixerActivations<'_, T>,
        g: &mut MixerGradients<'_, T>,
        (dx, x): (ViewMut<'_, T>, View<'_, T>),
        [mut scratch, norm_scratch]: [ViewMut<'_, T::Acc>; 2],
    ) -> Result<()> {
        let (dev, hidden) = (self.dev, self.model.spec().hidden);
        let conv = self.spec.conv(hidden);
        let (w, spans) = (self.weight(ParamKind::Conv)?, self.spans);
        let input = b.input.view();
        let (Some(shape), Some(delta)) = (self.spec.delta(), &b.delta) else {
            self.gated_conv_backward(grads, b, g, scratch)?;
            let dinput = g.dinput.view();
            let input = self.linear(ParamKind::MixerIn)?;
            return input.backward(dev, (grads, rows), dx, dinput, x);
        };
        let MixerGradients { dinput, dmixed, ddelta: [dout, dnormed], doutput, .. } = g;
        let dy = doutput.view();
        let cols = shape.values();
        let (z, normed) = (self.columns(input, shape.qkv_cols()), delta.normed.view());
        let to = self.columns(dinput.view_mut(), shape.qkv_cols());
        gate::backward(dev, Gate::Silu, to, dy, [Strided::dense(normed, cols), z], cols)?;
        let to = Strided::dense(dnormed.view_mut(), cols);
        gate::forward(dev, Gate::Silu, to, Strided::dense(dy, cols), z, cols)?;
        let to = NormInputGradient { dx: dout.view_mut(), add: false, scratch: norm_scratch };
        let norm = self.model.norm(ParamKind::DeltaNorm, self.at)?;
        norm.backward(dev, grads, to, dnormed.view(), delta.out.view(), &delta.norm)?;
        let (drate, dbias) = grads.pair_mut(ParamKind::DeltaRate, self.at).ok_or_else(frozen)?;
        let to = DeltaGrads {
            dqkv: dmixed.view_mut(),
            dgates: self.columns(dinput.view_mut(), Self::gates_at(shape)),
            drate,
            dbias: dbias.ok_or_else(frozen)?,
            scratch: scratch.reborrow(),
        };
        let inputs = self.delta_inputs(shape, b.mixed.view(), input)?;
        let kept = DeltaKept { errors: delta.errors.view(), spans };
        delta_rule::backward(dev, shape, to, dout.view(), inputs, kept)?;
        let dw = grads.get_mut(ParamKind::Conv, self.at).ok_or_else(frozen)?;
        let to = (self.columns(dinput.view_mut(), 0), dw);
        let kept = ConvKept { x: self.columns(input, 0), w, spans };
        short_conv::backward(dev, conv, to, dmixed.view(), kept, scratch)?;
        self.linear(ParamKind::MixerIn)?.backward(dev, (grads, rows), dx, dinput.view(), x)
    }

    /// `c conv(b u)` of the columns `b`, `c` and `u` of the first projection.
    fn gated_conv(
        &self,
        b: &mut MixerActivations<'_, T>,
        taps: View<'_, T>,
        of: Sequences<'_, T>,
    ) -> Result<()> {
        let (dev, hidden) = (self.dev, self.model.spec().hidden);
        let at = |at| self.columns(b.input.view(), at);
        let [gates, outer, u] = [at(0), at(hidden), at(2 * hidden)];
        let gated = Strided::dense(b.gated.view_mut(), hidden);
        gate::forward(dev, Gate::Identity, gated, u, gates, hidden)?;
        let (gated, mixed) = (Strided::dense(b.gated.view(), hidden), b.mixed.view_mut());
        short_conv::forward(dev, self.spec.conv(hidden), mixed, gated, taps, of)?;
        let (mixed, output) = (b.mixed.view(), Strided::dense(b.output.view_mut(), hidden));
        gate::forward(dev, Gate::Identity, output, Strided::dense(mixed, hidden), outer, hidden)
    }

    /// From the gradient of [`BlockMixer::gated_conv`] to that of the first projection.
    fn gated_conv_backward(
        &self,
        grads: &mut Params<T::Acc>,
        b: &MixerActivations<'_, T>,
        g: &mut MixerGradients<'_, T>,
        scratch: ViewMut<'_, T::Acc>,
    ) -> Result<()> {
        let (dev, hidden) = (self.dev, self.model.spec().hidden);
        let at = |at| self.columns(b.input.view(), at);
        let [gates, outer, u] = [at(0), at(hidden), at(2 * hidden)];
        let MixerGradients { dinput, dgated, dmixed, doutput, .. } = g;
        let (dense, dy) = (|x| Strided::dense(x, hidden), doutput.view());
        let to = self.columns(dinput.view_mut(), hidden);
        gate::backward(dev, Gate::Identity, to, dy, [dense(b.mixed.view()), outer], hidden)?;
        let to = Strided::dense(dmixed.view_mut(), hidden);
        gate::forward(dev, Gate::Identity, to, dense(dy), outer, hidden)?;
        let dw = grads.get_mut(ParamKind::Conv, self.at).ok_or_else(frozen)?;
        let to = (Strided::dense(dgated.view_mut(), hidden), dw);
        let w = self.weight(ParamKind::Conv)?;
        let kept = ConvKept { x: dense(b.gated.view()), w, spans: self.spans };
        short_conv::backward(dev, self.spec.conv(hidden), to, dmixed.view(), kept, scratch)?;
        let to = self.columns(dinput.view_mut(), 0);
        gate::backward(dev, Gate::Identity, to, dgated.view(), [u, gates], hidden)?;
        let to = self.columns(dinput.view_mut(), 2 * hidden);
        gate::forward(dev, Gate::Identity, to, dense(dgated.view()), gates, hidden)
    }
}

fn frozen() -> Error {
    Error::value("gradients", "those of all mixers", "none")
}
