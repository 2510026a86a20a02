//! The gated delta rule on the CPU: a task a value head, its state in a cache.

use super::{DeltaInputs, DeltaShape, EPS, scratch_cols};
use crate::{
    device::{
        Float,
        cpu::{Cpu, Isa, math},
    },
    ops::{gate::Strided, short_conv::SequenceSpan},
    simd,
};

/// A rule at work on some rows.
pub(super) struct Rule<'a, F> {
    shape: DeltaShape,
    x: DeltaInputs<'a, F>,
    spans: &'a [SequenceSpan],
    rows: usize,
}

/// What a value head has of a row: its normalised query and key, and its gates.
struct GatedRow<F> {
    q: Vec<F>,
    k: Vec<F>,
    beta: F,
    decay: F,
}

impl<F: Float> GatedRow<F> {
    fn empty(shape: DeltaShape) -> Self {
        let zeros = || vec![F::ZERO; shape.key_dim];
        Self { q: zeros(), k: zeros(), beta: F::ZERO, decay: F::ZERO }
    }
}

/// `1 / sqrt(sum x² + eps)`
fn length<F: Float>(isa: Isa, x: &[F]) -> F {
    F::ONE / (inner(isa, x, x) + F::of(EPS)).sqrt()
}

/// `ln(1 + x)` from 0 to 1, without losing a small `x` (Kahan).
fn ln_1p<F: Float>(x: F) -> F {
    let y = F::ONE + x;
    if y == F::ONE { x } else { y.ln() * x / (y - F::ONE) }
}

impl<'a, F: Float> Rule<'a, F> {
    pub fn new(
        shape: DeltaShape,
        x: DeltaInputs<'a, F>,
        spans: &'a [SequenceSpan],
        rows: usize,
    ) -> Self {
        Self { shape, x, spans, rows }
    }

    fn qkv(&self, r: usize) -> &'a [F] {
        let cols = self.shape.qkv_cols();
        &self.x.qkv.host()[r * cols..][..cols]
    }

    /// Query and key of key head `g`.
    fn keys(&self, r: usize, g: usize) -> [&'a [F]; 2] {
        let (d, keys) = (self.shape.key_dim, self.shape.keys());
        [0, keys].map(|first| &self.qkv(r)[first + g * d..][..d])
    }

    fn value(&self, r: usize, h: usize) -> &'a [F] {
        let d = self.shape.value_dim;
        &self.qkv(r)[2 * self.shape.keys() + h * d..][..d]
    }

    /// `beta` of a row, the logarithm of its decay, and what the softplus is of.
    fn gates(&self, r: usize, h: usize) -> (F, F, F) {
        let heads = self.shape.value_heads;
        let gates = self.x.gates.row(r, 2 * heads);
        let x = gates[heads + h] + self.x.bias.host()[h];
        let softplus = x.max_nan(F::ZERO) + ln_1p((-x.abs()).exp());
        (gates[h].sigmoid(), -self.x.rate.host()[h].exp() * softplus, x)
    }

    fn read(&self, isa: Isa, row: &mut GatedRow<F>, r: usize, h: usize) {
        let [q, k] = self.keys(r, h / self.shape.group());
        let scale = F::of(1.0 / (self.shape.key_dim as f64).sqrt());
        scaled(isa, &mut row.q, q, length(isa, q) * scale);
        scaled(isa, &mut row.k, k, length(isa, k));
        let (beta, log, _) = self.gates(r, h);
        (row.beta, row.decay) = (beta, log.exp());
    }

    pub fn forward(&self, cpu: &Cpu, to: [&mut [F]; 3], state: &mut [F]) {
        let Self { shape, rows, .. } = *self;
        let DeltaShape { value_heads: heads, value_dim: d, .. } = shape;
        let [out, errors, scratch] = to;
        let (slots, size) = (state.len() / shape.state_len(), shape.head_state());
        let of_heads = ((errors, rows * d), (&mut *scratch, rows * d), (state, slots * size));
        cpu.rows(heads, 1, of_heads, |range, (errors, outs, state)| {
            let mut own = vec![F::ZERO; if slots == 0 { size } else { 0 }];
            let (mut row, mut change) = (GatedRow::empty(shape), vec![F::ZERO; d]);
            for (i, h) in range.enumerate() {
                for s in self.spans {
                    let slot = (i * slots + s.slot as usize) * size;
                    let state = if slots == 0 { &mut own[..] } else { &mut state[slot..][..size] };
                    if s.first == 0 {
                        state.fill(F::ZERO);
                    }
                    for r in s.at as usize..(s.at + s.rows) as usize {
                        self.read(cpu.isa(), &mut row, r, h);
                        let at = (i * rows + r) * d;
                        let (e, out) = (&mut errors[at..][..d], &mut outs[at..][..d]);
                        let v = self.value(r, h);
                        recall(cpu.isa(), state, e, &row.k, row.decay);
                        for ((e, change), v) in e.iter_mut().zip(&mut change).zip(v) {
                            *e = *v - *e;
                            *change = row.beta * *e;
                        }
                        write(cpu.isa(), state, out, [&row.k, &row.q, &change]);
                    }
                }
            }
        });
        let (scratch, cols) = (&*scratch, heads * d);
        cpu.rows(rows, 16, (out, cols), |range, out| {
            for (out, r) in out.chunks_exact_mut(cols).zip(range) {
                for (h, out) in out.chunks_exact_mut(d).enumerate() {
                    out.copy_from_slice(&scratch[(h * rows + r) * d..][..d]);
                }
            }
        });
    }

    /// Fills the scratch of all heads.
    pub fn back(&self, cpu: &Cpu, scratch: &mut [F], dout: &[F], errors: &[F]) {
        let Self { shape, rows, .. } = *self;
        let DeltaShape { value_heads: heads, key_dim: dk, value_dim: d, .. } = shape;
        let cols = scratch_cols(shape);
        cpu.rows(heads, 1, (scratch, rows * cols), |range, scratch| {
            let mut state = vec![F::ZERO; shape.head_state()];
            let (mut row, mut key, mut change) =
                (GatedRow::empty(shape), vec![F::ZERO; dk], vec![F::ZERO; d]);
            for (scratch, h) in scratch.chunks_exact_mut(rows * cols).zip(range) {
                let dout = |r: usize| &dout[(r * heads + h) * d..][..d];
                let errors = |r: usize| &errors[(h * rows + r) * d..][..d];
                for s in self.spans {
                    let own = s.at as usize..(s.at + s.rows) as usize;
                    state.fill(F::ZERO);
                    for r in own.clone().rev() {
                        self.read(cpu.isa(), &mut row, r, h);
                        let part = Part::of(&mut scratch[r * cols..][..cols], dk, d);
                        learn(
                            cpu.isa(),
                            &mut state,
                            part.dk,
                            part.dv,
                            [&row.q, &row.k, dout(r), errors(r)],
                        );
                        scale(cpu.isa(), part.dv, row.beta);
                        part.rest[0] = inner(cpu.isa(), &row.k, part.dk);
                        scale(cpu.isa(), part.dk, row.beta);
                        forget(cpu.isa(), &mut state, [&row.k, part.dv], row.decay);
                    }
                    state.fill(F::ZERO);
                    for r in own.clone() {
                        self.read(cpu.isa(), &mut row, r, h);
                        let part = Part::of(&mut scratch[r * cols..][..cols], dk, d);
                        for (change, e) in change.iter_mut().zip(errors(r)) {
                            *change = row.beta * *e;
                        }
                        let inputs = [&row.k[..], &change, part.dv, dout(r)];
                        replay(cpu.isa(), &mut state, [part.dq, &mut key], inputs, row.decay);
                        part.rest[1] = inner(cpu.isa(), &row.q, part.dq)
                            - inner(cpu.isa(), &row.k, &key)
                            - row.beta * part.rest[0];
                        for (dk, key) in part.dk.iter_mut().zip(&key) {
                            *dk -= *key;
                        }
                    }
                    let mut sum = F::ZERO;
                    for r in own.rev() {
                        let log = &mut scratch[(r + 1) * cols - 1];
                        sum += *log;
                        *log = sum;
                    }
                }
            }
        });
    }

    /// From the scratch of all heads to the gradients of rows.
    pub fn rows_back(&self, cpu: &Cpu, dqkv: &mut [F], dgates: Strided<&mut [F]>, scratch: &[F]) {
        let Self { shape, rows, .. } = *self;
        let DeltaShape { value_heads: heads, key_dim: dk, value_dim: d, .. } = shape;
        let (cols, width) = (shape.qkv_cols(), scratch_cols(shape));
        let part = |h: usize, r: usize| &scratch[(h * rows + r) * width..][..width];
        let (first, stride) = (dgates.first, dgates.stride);
        let to = ((dqkv, cols), (dgates.data, stride));
        cpu.rows(rows, 16, to, |range, (dqkv, dgates)| {
            let mut sum = vec![F::ZERO; dk];
            for (i, r) in range.enumerate() {
                let dqkv = &mut dqkv[i * cols..][..cols];
                for g in 0..shape.key_heads {
                    let group = shape.group();
                    for (which, x) in self.keys(r, g).into_iter().enumerate() {
                        sum.fill(F::ZERO);
                        for h in g * group..(g + 1) * group {
                            add(cpu.isa(), &mut sum, &part(h, r)[which * dk..][..dk]);
                        }
                        // 1 / length scales queries, too.
                        let root = F::of((dk as f64).sqrt());
                        let factor = if which == 0 { F::ONE / root } else { F::ONE };
                        let to = &mut dqkv[which * shape.keys() + g * dk..][..dk];
                        direct(cpu.isa(), to, [&sum, x], (length(cpu.isa(), x), factor));
                    }
                }
                let dgates = &mut dgates[i * stride + first..][..2 * heads];
                for h in 0..heads {
                    let part = part(h, r);
                    let to = &mut dqkv[2 * shape.keys() + h * d..][..d];
                    to.copy_from_slice(&part[2 * dk..][..d]);
                    let (beta, ..) = self.gates(r, h);
                    dgates[h] = part[width - 2] * beta * (F::ONE - beta);
                    dgates[heads + h] = self.slope(r, h) * part[width - 1];
                }
            }
        });
    }

    /// d ln(decay) / d a
    fn slope(&self, r: usize, h: usize) -> F {
        let (_, _, x) = self.gates(r, h);
        -self.x.rate.host()[h].exp() * x.sigmoid()
    }

    /// Adds to the gradients of rates and biases.
    pub fn sums_back(&self, cpu: &Cpu, to: [&mut [F]; 2], scratch: &[F]) {
        let (rows, width) = (self.rows, scratch_cols(self.shape));
        let [drate, dbias] = to;
        cpu.rows(drate.len(), 1, ((drate, 1), (dbias, 1)), |range, (drate, dbias)| {
            for (i, h) in range.enumerate() {
                for r in 0..rows {
                    let d = scratch[(h * rows + r + 1) * width - 1];
                    let (_, log, _) = self.gates(r, h);
                    drate[i] = d.mul_add(log, drate[i]);
                    dbias[i] = d.mul_add(self.slope(r, h), dbias[i]);
                }
            }
        });
    }
}

/// The scratch of a row.
struct Part<'a, F> {
    dq: &'a mut [F],
    dk: &'a mut [F],
    dv: &'a mut [F],
    /// Of beta, and of the logarithm of the decay.
    rest: &'a mut [F],
}

impl<'a, F> Part<'a, F> {
    fn of(all: &'a mut [F], key_dim: usize, value_dim: usize) -> Self {
        let (dq, all) = all.split_at_mut(key_dim);
        let (dk, all) = all.split_at_mut(key_dim);
        let (dv, rest) = all.split_at_mut(value_dim);
        Self { dq, dk, dv, rest }
    }
}

simd! {
    fn inner[F: Float](x: &[F], y: &[F]) -> F {
        math::dot(x, y)
    }

    /// `y = a x`
    fn scaled[F: Float](y: &mut [F], x: &[F], a: F) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = *x * a;
        }
    }

    fn scale[F: Float](x: &mut [F], a: F) {
        x.iter_mut().for_each(|x| *x *= a);
    }

    fn add[F: Float](y: &mut [F], x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += *x;
        }
    }

    /// `S = decay S`, `out = Sᵀ k`
    fn recall[F: Float](state: &mut [F], out: &mut [F], k: &[F], decay: F) {
        out.fill(F::ZERO);
        for (s, k) in state.chunks_exact_mut(out.len()).zip(k) {
            for (s, out) in s.iter_mut().zip(out.iter_mut()) {
                *s *= decay;
                *out = k.mul_add(*s, *out);
            }
        }
    }

    /// `S += k changeᵀ`, `out = Sᵀ q`
    fn write[F: Float](state: &mut [F], out: &mut [F], inputs: [&[F]; 3]) {
        let [k, q, change] = inputs;
        out.fill(F::ZERO);
        for ((s, k), q) in state.chunks_exact_mut(out.len()).zip(k).zip(q) {
            for ((s, out), change) in s.iter_mut().zip(out.iter_mut()).zip(change) {
                *s = k.mul_add(*change, *s);
                *out = q.mul_add(*s, *out);
            }
        }
    }

    /// `G += q doutᵀ`, `dkey = G e`, `dvalue = Gᵀ k`
    fn learn[F: Float](state: &mut [F], dkey: &mut [F], dvalue: &mut [F], inputs: [&[F]; 4]) {
        let [q, k, dout, e] = inputs;
        dvalue.fill(F::ZERO);
        let rows = state.chunks_exact_mut(dvalue.len()).zip(dkey.iter_mut()).zip(q.iter().zip(k));
        for ((g, dkey), (q, k)) in rows {
            for ((g, dvalue), dout) in g.iter_mut().zip(dvalue.iter_mut()).zip(dout) {
                *g = q.mul_add(*dout, *g);
                *dvalue = k.mul_add(*g, *dvalue);
            }
            *dkey = math::dot(g, e);
        }
    }

    /// `G = decay (G - k deᵀ)`
    fn forget[F: Float](state: &mut [F], inputs: [&[F]; 2], decay: F) {
        let [k, de] = inputs;
        for (g, k) in state.chunks_exact_mut(de.len()).zip(k) {
            for (g, de) in g.iter_mut().zip(de) {
                *g = decay * (-*k).mul_add(*de, *g);
            }
        }
    }

    /// `S = decay S`, `key = S de`, `S += k changeᵀ`, `dq = S dout`
    fn replay[F: Float](state: &mut [F], to: [&mut [F]; 2], inputs: [&[F]; 4], decay: F) {
        let ([dq, key], [k, change, de, dout]) = (to, inputs);
        let rows = state.chunks_exact_mut(de.len()).zip(k).zip(dq.iter_mut().zip(key.iter_mut()));
        for ((s, k), (dq, key)) in rows {
            s.iter_mut().for_each(|s| *s *= decay);
            *key = math::dot(s, de);
            for (s, change) in s.iter_mut().zip(change) {
                *s = k.mul_add(*change, *s);
            }
            *dq = math::dot(s, dout);
        }
    }

    /// The gradient of `x` from that of `factor x / |x|`, `unit` being `1 / |x|`:
    /// `factor unit (d - n (n . d))`, `n = x / |x|`.
    fn direct[F: Float](dx: &mut [F], inputs: [&[F]; 2], factors: (F, F)) {
        let ([d, x], (unit, factor)) = (inputs, factors);
        let along = math::dot(d, x) * unit * unit;
        for ((dx, d), x) in dx.iter_mut().zip(d).zip(x) {
            *dx = factor * unit * (-along).mul_add(*x, *d);
        }
    }
}
