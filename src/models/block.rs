//! One block of the transformer, forward and backward.

use super::{
    BatchRows, LayerSpec, Linear, Mlp, Model, ParamKind, Params,
    activations::{BlockActivations, BlockRoom, Gradients, NormedQk, PostNormed},
    mixer::{BlockMixer, LayerCache},
    mixture::Mixture,
    norm::{NormInputGradient, Normed},
};
use crate::{
    device::{Device, Element, View, ViewMut},
    error::Result,
    ops::{
        activation, attention,
        gate::{self, Gate, Strided},
        matmul,
        norm::NormRows,
        residual, rope, scale, sinks,
    },
};

/// One block at work on some rows.
pub(super) struct BlockPass<'a, T: Element> {
    pub dev: &'a Device,
    pub model: &'a Model<T>,
    pub rows: &'a BatchRows<'a>,
    pub at: Option<usize>,
    pub spec: LayerSpec,
}

impl<'a, T: Element> BlockPass<'a, T> {
    fn linear(&self, kind: ParamKind) -> Result<Linear<'a, T>> {
        self.model.linear(self.dev, kind, self.at)
    }

    /// Its experts, if it has some.
    fn experts(&self) -> Option<Mixture<'a, T>> {
        let Self { dev, model, at, .. } = *self;
        let spec = at.and_then(|l| model.spec().experts_at(l))?;
        Some(Mixture { dev, model, at, spec })
    }

    /// What it has in the place of attention, if something.
    fn mixer(&self) -> Option<BlockMixer<'a, T>> {
        let Self { dev, model, rows, at, .. } = *self;
        self.spec.state_mixer.map(|spec| BlockMixer { dev, model, at, spec, spans: rows.spans })
    }

    fn rope(&self) -> Option<&'a rope::Table<T::Acc>> {
        self.spec.rope.map(|i| self.model.rope(i))
    }

    /// `norm(x)` before attention or MLP; `x` in a family without it.
    fn before<'v>(
        &self,
        kind: ParamKind,
        normed: &'v mut Option<Normed<'_, T>>,
        x: View<'v, T>,
    ) -> Result<View<'v, T>> {
        let Some(normed) = normed else { return Ok(x) };
        self.model.norm(kind, self.at)?.forward(self.dev, normed, x)?;
        Ok(normed.y.view())
    }

    /// `y = x + r post(linear(input))`
    fn join(
        &self,
        [linear, post]: [ParamKind; 2],
        normed: &mut Option<PostNormed<'_, T>>,
        mut y: ViewMut<'_, T>,
        (input, x): (View<'_, T>, View<'_, T>),
        room: &mut BlockRoom<'_, T>,
    ) -> Result<()> {
        let rows = &mut room.adapter;
        let (dev, factor) = (self.dev, self.model.spec().scales.residual);
        let linear = self.linear(linear)?;
        match normed {
            None if factor == 1.0 => return linear.forward(dev, y, input, Some(x), rows),
            None => linear.forward(dev, y.reborrow(), input, None, rows)?,
            Some(PostNormed { x, norm }) => {
                linear.forward(dev, x.view_mut(), input, None, rows)?;
                let post = self.model.norm(post, self.at)?;
                post.forward_to(dev, y.reborrow().into(), norm, x.view().into())?;
            }
        }
        if factor != 1.0 {
            scale::in_place(dev, y.reborrow(), factor, None)?;
        }
        residual::add(dev, y, x)
    }

    /// `mid = x + r post1(out(attention(norm1(x))))`, or what the block has in its place.
    pub fn attention(
        &self,
        b: &mut BlockActivations<'_, T>,
        x: View<'_, T>,
        cache: &mut LayerCache<'_, T>,
        room: &mut BlockRoom<'_, T>,
    ) -> Result<()> {
        let (dev, shape, work) = (self.dev, &self.spec.attention, self.segments());
        let input = self.before(ParamKind::Norm1, &mut b.norm1, x)?;
        if let (Some(mixer), Some(own)) = (self.mixer(), &mut b.mixer) {
            let (scratch, rows) = (room.scratch.view_mut(), &mut room.adapter);
            mixer.forward(own, input, cache, (scratch, rows))?;
            let kinds = [ParamKind::MixerOut, ParamKind::PostNorm1];
            let input = (own.output.view(), x);
            return self.join(kinds, &mut b.post1, b.mid.view_mut(), input, room);
        }
        let (qkv, kv) = (self.linear(ParamKind::Qkv)?, &mut cache.kv);
        let rows = &mut room.adapter;
        match &mut b.qk_norm {
            None => qkv.forward(dev, b.qkv.view_mut(), input, None, rows)?,
            Some(normed) => {
                qkv.forward(dev, normed.qkv.view_mut(), input, None, rows)?;
                self.move_values(b.qkv.view_mut(), normed.qkv.view())?;
                let NormedQk { qkv: raw, q, k } = normed;
                for (kind, kept) in [(ParamKind::QNorm, q), (ParamKind::KNorm, k)] {
                    let (x, y) = (self.rows_of(kind, raw.view()), b.qkv.view_mut());
                    let y = NormRows { stride: Some(shape.qkv_cols()), ..self.rows_of(kind, y) };
                    self.model.norm(kind, self.at)?.forward_to(dev, y, kept, x)?;
                }
            }
        }
        if let Some(table) = self.model.query_scale() {
            // A factor and a rotation may change places.
            let (x, positions) = (b.qkv.view_mut(), self.rows.positions);
            rope::forward(dev, x, self.heads(shape.q_heads), positions, table)?;
        }
        let rotation = self.rope().map(|table| (self.rows.positions, table));
        attention::append(dev, kv, b.qkv.view_mut(), work, shape, rotation)?;
        let (out, lse) = (b.attention.view_mut(), b.lse.view_mut());
        let to = attention::ForwardOutputs { out, lse, scratch: room.scratch.view_mut() };
        attention::forward(dev, to, b.qkv.view(), kv, work, shape)?;
        if let Some(sinks) = self.model.params().get(ParamKind::Sinks, self.at) {
            sinks::forward(dev, b.attention.view_mut(), b.lse.view_mut(), sinks)?;
        }
        let mut out = b.attention.view();
        if let (Some(gated), Some(normed)) = (&mut b.gated, &b.qk_norm) {
            let cols = self.model.spec().attention_cols();
            let y = Strided::dense(gated.view_mut(), cols);
            let x = Strided::dense(out, cols);
            gate::forward(dev, Gate::Sigmoid, y, x, self.gates(normed.qkv.view()), cols)?;
            out = gated.view();
        }
        let kinds = [ParamKind::Out, ParamKind::PostNorm1];
        self.join(kinds, &mut b.post1, b.mid.view_mut(), (out, x), room)
    }

    /// The gates of attention, behind queries, keys and values of a projection.
    fn gates<V>(&self, data: V) -> Strided<V> {
        let spec = self.model.spec();
        Strided { data, first: spec.qkv_cols(), stride: spec.attention_input_cols() }
    }

    /// Copies the values between rows of queries, keys and values and those of a projection.
    fn move_values(&self, to: ViewMut<'_, T>, from: View<'_, T>) -> Result<()> {
        let spec = self.model.spec();
        if to.len() == from.len() {
            return self.dev.copy(to, from);
        }
        let (qkv, cols) = (spec.qkv_cols(), spec.kv_heads * spec.head_dim);
        let (first, wide) = (qkv - cols, spec.attention_input_cols());
        let [to_stride, stride] = if to.len() < from.len() { [qkv, wide] } else { [wide, qkv] };
        let (y, x) = (to, Strided { data: from, first, stride });
        gate::copy(self.dev, Strided { data: y, first, stride: to_stride }, x, cols)
    }

    fn segments(&self) -> attention::SegmentBatch<'a> {
        self.rows.attention[self.spec.window]
    }

    /// The first heads of rows of queries, keys and values.
    fn heads(&self, heads: usize) -> rope::Heads {
        let shape = &self.spec.attention;
        rope::Heads { row_len: shape.qkv_cols(), heads, head_dim: shape.head_dim }
    }

    /// The queries or keys among those of rows of a projection.
    fn rows_of<V>(&self, kind: ParamKind, data: V) -> NormRows<V> {
        let attention::Shape { q_heads, head_dim, .. } = self.spec.attention;
        let first = if kind == ParamKind::KNorm { q_heads * head_dim } else { 0 };
        NormRows { data, first, stride: Some(self.model.spec().attention_input_cols()) }
    }

    /// `act = act(up(norm2(mid)))`, or of `norm2(x)` in a parallel block.
    pub fn expand(
        &self,
        b: &mut BlockActivations<'_, T>,
        x: View<'_, T>,
        room: &mut BlockRoom<'_, T>,
    ) -> Result<()> {
        let dev = self.dev;
        let x = if self.model.spec().parallel { x } else { b.mid.view() };
        let epilogue = match self.model.spec().mlp {
            Mlp::Plain(act) => matmul::Epilogue { act, gated: false },
            Mlp::Gated(act) => matmul::Epilogue { act, gated: true },
        };
        let input = self.before(ParamKind::Norm2, &mut b.norm2, x)?;
        let experts = self.experts();
        if let (Some(experts), Some(b)) = (&experts, &mut b.mixture) {
            experts.expand(b, room.pairs.view_mut(), input)?;
            if !experts.spec.shared {
                return Ok(());
            }
        }
        let (to, up) = ([b.act.view_mut(), b.up.view_mut()], self.linear(ParamKind::Up)?);
        up.activated(dev, epilogue, to, input, &mut room.adapter)?;
        if let (Some(experts), Some(shared)) = (&experts, &mut b.shared) {
            experts.share(shared, b.act.view(), input)?;
        }
        Ok(())
    }

    /// `y = mid + r post2(down(act))`
    pub fn contract(
        &self,
        b: &mut BlockActivations<'_, T>,
        mut y: ViewMut<'_, T>,
        room: &mut BlockRoom<'_, T>,
    ) -> Result<()> {
        let kinds = [ParamKind::Down, ParamKind::PostNorm2];
        let (Some(experts), Some(mixture)) = (self.experts(), &b.mixture) else {
            return self.join(kinds, &mut b.post2, y, (b.act.view(), b.mid.view()), room);
        };
        let Some(shared) = &b.shared else {
            return experts.contract(mixture, room.pairs.view_mut(), y, Some(b.mid.view()));
        };
        let input = (shared.act.view(), b.mid.view());
        self.join(kinds, &mut b.post2, y.reborrow(), input, room)?;
        experts.contract(mixture, room.pairs.view_mut(), y, None)
    }

    /// Turns `g.dx` from the gradient of the block's output into that of its input `x`.
    pub fn backward(
        &self,
        grads: &mut Params<T::Acc>,
        b: &BlockActivations<'_, T>,
        x: View<'_, T>,
        g: &mut Gradients<'_, T>,
        room: &mut BlockRoom<'_, T>,
    ) -> Result<()> {
        let parallel = self.model.spec().parallel;
        self.mlp_backward(grads, b, x, g, room)?;
        // In a parallel block both read the gradient of the output, so neither adds to it before.
        if parallel {
            self.out_backward(grads, b, g, room)?;
        }
        let input = if parallel { x } else { b.mid.view() };
        self.before_backward(grads, ParamKind::Norm2, input, &b.norm2, g)?;
        if !parallel {
            self.out_backward(grads, b, g, room)?;
        }
        self.attention_backward(grads, b, x, g, room)
    }

    /// Whether a linear layer has another gradient than `g.dx`, that of the stream to which it
    /// adds: then it is in `g.dnorm`.
    fn join_backward(
        &self,
        grads: &mut Params<T::Acc>,
        post: ParamKind,
        normed: &Option<PostNormed<'_, T>>,
        g: &mut Gradients<'_, T>,
    ) -> Result<bool> {
        let (dev, factor) = (self.dev, self.model.spec().scales.residual);
        let Gradients { dx, dnorm, scratch, .. } = g;
        match normed {
            None if factor == 1.0 => return Ok(false),
            None => dev.copy(dnorm.view_mut(), dx.view())?,
            Some(PostNormed { x, norm }) => {
                let (to, scratch) = (dnorm.view_mut(), scratch.view_mut());
                let out = NormInputGradient { dx: to, add: false, scratch };
                let post = self.model.norm(post, self.at)?;
                post.backward(dev, grads, out, dx.view(), x.view(), norm)?;
            }
        }
        if factor != 1.0 {
            scale::in_place(dev, dnorm.view_mut(), factor, None)?;
        }
        Ok(true)
    }

    /// From the gradient of the block's output to that of the MLP's input, in `g.dnorm`.
    fn mlp_backward(
        &self,
        grads: &mut Params<T::Acc>,
        b: &BlockActivations<'_, T>,
        x: View<'_, T>,
        g: &mut Gradients<'_, T>,
        room: &mut BlockRoom<'_, T>,
    ) -> Result<()> {
        let (dev, spec) = (self.dev, self.model.spec());
        let BlockRoom { pairs, adapter: rows, .. } = room;
        let input = if spec.parallel { x } else { b.mid.view() };
        let input = b.norm2.as_ref().map_or(input, |normed| normed.y.view());
        let experts = self.experts();
        if let (Some(experts), Some(own), Some(to)) = (&experts, &b.mixture, &mut g.mixture) {
            let d = (g.dnorm.view_mut(), g.dx.view());
            experts.backward(grads, own, (to, pairs.view_mut()), d, input)?;
            let Some(shared) = &b.shared else { return Ok(()) };
            // Rows of pairs are done with.
            let mut dinput = pairs.view_mut().range(0..input.len());
            let down = self.linear(ParamKind::Down)?;
            let (dact, act) = (g.dact.view_mut(), shared.act.view());
            down.backward(dev, (grads, rows), dact, g.dx.view(), act)?;
            experts.share_backward(shared, to, g.dact.view_mut(), b.act.view())?;
            experts.gate_backward(grads, to, dinput.reborrow(), input)?;
            residual::add(dev, g.dnorm.view_mut(), dinput.view())?;
            self.activation_backward(b, g)?;
            let up = self.linear(ParamKind::Up)?;
            up.backward(dev, (grads, rows), dinput.reborrow(), g.dup.view(), input)?;
            return residual::add(dev, g.dnorm.view_mut(), dinput.view());
        }
        let down = self.linear(ParamKind::Down)?;
        let moved = self.join_backward(grads, ParamKind::PostNorm2, &b.post2, g)?;
        let dy = if moved { g.dnorm.view() } else { g.dx.view() };
        down.backward(dev, (grads, rows), g.dact.view_mut(), dy, b.act.view())?;
        self.activation_backward(b, g)?;
        let up = self.linear(ParamKind::Up)?;
        up.backward(dev, (grads, rows), g.dnorm.view_mut(), g.dup.view(), input)
    }

    /// From `g.dact` to `g.dup`.
    fn activation_backward(
        &self,
        b: &BlockActivations<'_, T>,
        g: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let (dev, spec) = (self.dev, self.model.spec());
        let (dup, dact, up) = (g.dup.view_mut(), g.dact.view(), b.up.view());
        match spec.mlp {
            Mlp::Plain(act) => activation::backward(dev, act, dup, dact, up),
            Mlp::Gated(act) => activation::gated_backward(dev, act, dup, dact, up, spec.mlp_hidden),
        }
    }

    /// From the gradient of `mid` to that of what the last projection before it reads: attention's
    /// output, be it gated, or a mixer's.
    fn out_backward(
        &self,
        grads: &mut Params<T::Acc>,
        b: &BlockActivations<'_, T>,
        g: &mut Gradients<'_, T>,
        room: &mut BlockRoom<'_, T>,
    ) -> Result<()> {
        let rows = &mut room.adapter;
        let moved = self.join_backward(grads, ParamKind::PostNorm1, &b.post1, g)?;
        let Gradients { dx, dnorm, dattention, dgated, mixer, .. } = g;
        let dy = if moved { dnorm.view() } else { dx.view() };
        if let (Some(_), Some(own), Some(to)) = (self.spec.state_mixer, &b.mixer, mixer) {
            let (out, d) = (self.linear(ParamKind::MixerOut)?, to.doutput.view_mut());
            return out.backward(self.dev, (grads, rows), d, dy, own.output.view());
        }
        let (out, d) = (self.linear(ParamKind::Out)?, dgated.as_mut().unwrap_or(dattention));
        let input = b.gated.as_ref().unwrap_or(&b.attention);
        out.backward(self.dev, (grads, rows), d.view_mut(), dy, input.view())
    }

    /// From the gradient of attention's output, and in `g.dx` that of `mid`, to that of `x`.
    fn attention_backward(
        &self,
        grads: &mut Params<T::Acc>,
        b: &BlockActivations<'_, T>,
        x: View<'_, T>,
        g: &mut Gradients<'_, T>,
        room: &mut BlockRoom<'_, T>,
    ) -> Result<()> {
        let (dev, shape) = (self.dev, &self.spec.attention);
        if let (Some(mixer), Some(own), Some(to)) = (self.mixer(), &b.mixer, &mut g.mixer) {
            let input = b.norm1.as_ref().map_or(x, |normed| normed.y.view());
            let d = (g.dnorm.view_mut(), input);
            let scratch = [room.scratch.view_mut(), g.scratch.view_mut()];
            mixer.backward((grads, &mut room.adapter), own, to, d, scratch)?;
            return self.before_backward(grads, ParamKind::Norm1, x, &b.norm1, g);
        }
        if let (Some(d), Some(draw), Some(normed)) = (&g.dgated, &mut g.draw, &b.qk_norm) {
            let (cols, gates) = (self.model.spec().attention_cols(), self.gates(normed.qkv.view()));
            let x = Strided::dense(b.attention.view(), cols);
            let dg = self.gates(draw.view_mut());
            gate::backward(dev, Gate::Sigmoid, dg, d.view(), [x, gates], cols)?;
            let (y, d) = (Strided::dense(g.dattention.view_mut(), cols), d.view());
            gate::forward(dev, Gate::Sigmoid, y, Strided::dense(d, cols), gates, cols)?;
        }
        if let (Some(sinks), Some(d)) = (
            self.model.params().get(ParamKind::Sinks, self.at),
            grads.get_mut(ParamKind::Sinks, self.at),
        ) {
            let (dout, out) = (g.dattention.view(), b.attention.view());
            sinks::backward(dev, d, dout, out, b.lse.view(), sinks)?;
        }
        let args = attention::BackwardArgs {
            dqkv: g.dqkv.view_mut(),
            dout: g.dattention.view(),
            out: b.attention.view(),
            qkv: b.qkv.view(),
            lse: b.lse.view(),
            scratch: room.scratch.view_mut(),
        };
        attention::backward(dev, args, self.segments(), shape)?;
        let (q, both) = (self.heads(shape.q_heads), self.heads(shape.q_heads + shape.kv_heads));
        for (table, heads) in [(self.rope(), both), (self.model.query_scale(), q)] {
            let Some(table) = table else { continue };
            rope::backward(dev, g.dqkv.view_mut(), heads, self.rows.positions, table)?;
        }
        if let (Some(normed), Some(draw)) = (&b.qk_norm, &mut g.draw) {
            self.move_values(draw.view_mut(), g.dqkv.view())?;
            for (kind, kept) in [(ParamKind::QNorm, &normed.q), (ParamKind::KNorm, &normed.k)] {
                let (dx, scratch) = (draw.view_mut(), g.scratch.view_mut());
                let out = NormInputGradient { dx, add: false, scratch };
                let (dy, x) = (g.dqkv.view(), normed.qkv.view());
                let dy = NormRows { stride: Some(shape.qkv_cols()), ..self.rows_of(kind, dy) };
                let norm = self.model.norm(kind, self.at)?;
                norm.backward(dev, grads, out, dy, self.rows_of(kind, x), kept)?;
            }
        }
        let input = b.norm1.as_ref().map_or(x, |normed| normed.y.view());
        let (qkv, dqkv) = (self.linear(ParamKind::Qkv)?, g.draw.as_ref().unwrap_or(&g.dqkv));
        let rows = &mut room.adapter;
        qkv.backward(dev, (grads, rows), g.dnorm.view_mut(), dqkv.view(), input)?;
        self.before_backward(grads, ParamKind::Norm1, x, &b.norm1, g)
    }

    /// Adds the gradient through a norm, which is in `g.dnorm`, to that of the residual stream.
    fn before_backward(
        &self,
        grads: &mut Params<T::Acc>,
        kind: ParamKind,
        x: View<'_, T>,
        normed: &Option<Normed<'_, T>>,
        g: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let Gradients { dx, dnorm, scratch, .. } = g;
        let Some(kept) = normed else {
            return residual::add(self.dev, dx.view_mut(), dnorm.view());
        };
        let (dx, scratch) = (dx.view_mut(), scratch.view_mut());
        let out = NormInputGradient { dx, add: true, scratch };
        self.model.norm(kind, self.at)?.backward(self.dev, grads, out, dnorm.view(), x, kept)
    }
}
