//! The gated delta rule (Yang et al. 2024, "Gated Delta Networks", eq. 10): attention with a state
//! of fixed size, a matrix `S` `[key_dim, value_dim]` for each value head.
//!
//! For each row, with `S = 0` before a sequence:
//!
//! ```text
//! q = norm(q) / sqrt(key_dim), k = norm(k), norm(x) = x / sqrt(sum x² + 1e-6)
//! decay = exp(-exp(rate) softplus(a + bias)), beta = sigmoid(b)
//! S = decay S;  e = v - Sᵀ k;  S = S + k (beta e)ᵀ;  out = Sᵀ q
//! ```
//!
//! A key head serves `value_heads / key_heads` value heads that follow each other. Rows are taken
//! one by one, in training as in decoding: a sequence that is continued from its state has the bits
//! of a whole one.
//!
//! The gradient needs no state of the forward pass but `e`. With `G` the gradient of `S`, from the
//! last row to the first:
//!
//! ```text
//! G = G + q doutᵀ;  de = beta Gᵀ k;  dbeta = k . (G e);  dk = beta G e;  dv = de
//! G = decay (G - k deᵀ)
//! ```
//!
//! and from the first to the last, `S` as above: `dq = S dout`, `dk -= (decay S) de`. The state
//! after row t is that of rows s ≤ t times the decays between them, so a decay's gradient is a
//! sum over what follows: `dln(decay_t) = sum_{s >= t} (q dq + k dk' - beta dbeta)_s`, `dk'` being
//! the second part of `dk`.

mod cpu;

use crate::{
    device::{
        Device, Element, View, ViewMut, Work,
        cuda::{Launch, kernels::delta_rule as kernel},
    },
    error::{Error, Result},
    shape,
};

use super::{
    gate::{Strided, check_rows, floats, rows_of},
    short_conv::{SPAN_WORDS, Sequences, spans},
};

/// Added to the squares of queries and keys.
const EPS: f64 = 1e-6;

/// Heads of a [delta rule](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    /// Divides `value_heads`.
    pub key_heads: usize,
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
}

impl DeltaShape {
    pub fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }

    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Columns of queries of all heads, keys and values.
    pub fn qkv_cols(&self) -> usize {
        2 * self.keys() + self.values()
    }

    /// Elements of the state of a sequence.
    pub fn state_len(&self) -> usize {
        self.value_heads * self.head_state()
    }

    fn head_state(&self) -> usize {
        self.key_dim * self.value_dim
    }

    /// Value heads of a key head.
    fn group(&self) -> usize {
        self.value_heads / self.key_heads
    }

    /// Multiply-add FLOPs of a row forward.
    fn flops(&self) -> f64 {
        // Three products with the state of each head: what it recalls, what is added, the output.
        6.0 * self.state_len() as f64
    }
}

/// Whether `dev` computes such heads.
pub fn supported(dev: &Device, shape: DeltaShape) -> Result<()> {
    let most = kernel::DIM;
    let largest = shape.key_dim.max(shape.value_dim);
    if matches!(dev, Device::Cuda(_)) && largest > most {
        let want = format!("at most {most} on a CUDA device");
        return Err(Error::value("head size of a delta rule", want, largest));
    }
    Ok(())
}

/// What the rule reads.
#[derive(Clone, Copy)]
pub struct DeltaInputs<'a, T> {
    /// `[rows, qkv_cols]`: queries of all heads, keys, values.
    pub qkv: View<'a, T>,
    /// `[rows, 2 value_heads]`: `b` of all heads, then `a`.
    pub gates: Strided<View<'a, T>>,
    /// `[value_heads]`
    pub rate: View<'a, T>,
    /// `[value_heads]`
    pub bias: View<'a, T>,
}

impl<'a, T: Element> DeltaInputs<'a, T> {
    fn check(&self, op: &'static str, shape: DeltaShape) -> Result<usize> {
        let DeltaShape { key_heads, value_heads, .. } = shape;
        if key_heads == 0 || !value_heads.is_multiple_of(key_heads) || shape.head_state() == 0 {
            let what = format!("{op}: heads");
            let want = "a whole number of value heads for each key head, and none of size 0";
            return Err(Error::value(what, want, format!("{shape:?}")));
        }
        let rows = rows_of((op, "gates"), self.gates, 2 * value_heads)?;
        shape::check(op, "qkv", &[rows, shape.qkv_cols()], self.qkv.len())?;
        shape::check(op, "rate", &[value_heads], self.rate.len())?;
        shape::check(op, "bias", &[value_heads], self.bias.len())?;
        Ok(rows)
    }

    /// The same as the CPU computes with it.
    fn float(&self) -> Result<DeltaInputs<'a, T::Acc>> {
        Ok(DeltaInputs {
            qkv: self.qkv.float()?,
            gates: floats(self.gates)?,
            rate: self.rate.float()?,
            bias: self.bias.float()?,
        })
    }
}

/// What [`forward`] writes.
pub struct DeltaOut<'a, T: Element> {
    /// `[rows, value_heads, value_dim]`
    pub out: ViewMut<'a, T>,
    /// `[value_heads, rows, value_dim]`: `e`, for [`backward`].
    pub errors: ViewMut<'a, T::Acc>,
    /// [`forward_scratch_len`] elements.
    pub scratch: ViewMut<'a, T::Acc>,
}

/// Elements of scratch that [`forward`] needs.
pub fn forward_scratch_len(dev: &Device, shape: DeltaShape, rows: usize) -> usize {
    match dev {
        Device::Cpu(_) => rows * shape.values(),
        Device::Cuda(_) => 0,
    }
}

/// Writes `out` and `errors`, and what each sequence leaves to its state, `[value_heads, slots,
/// key_dim, value_dim]`.
///
/// Reads qkv, writes out and errors: the state of a head stays in registers or in a cache.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Value`] if a buffer does not fit.
pub fn forward<T: Element>(
    dev: &Device,
    shape: DeltaShape,
    to: DeltaOut<'_, T>,
    x: DeltaInputs<'_, T>,
    of: Sequences<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "delta_rule";
    let rows = x.check(OP, shape)?;
    let DeltaOut { out, errors, scratch } = to;
    shape::check(OP, "out", &[rows, shape.values()], out.len())?;
    shape::check(OP, "errors", &[shape.value_heads, rows, shape.value_dim], errors.len())?;
    let scratch = scratch.scratch(OP, forward_scratch_len(dev, shape, rows))?;
    let slots = of.state.len() / shape.state_len();
    shape::check(OP, "state", &[slots, shape.state_len()], of.state.len())?;
    supported(dev, shape)?;
    let errors_len = errors.len();
    // What is read of a slot, and written.
    let states = if slots > 0 { 2 * of.count() * shape.state_len() } else { 0 };
    let _op = dev.op(OP, || Work {
        flops: rows as f64 * shape.flops(),
        bytes: Work::moves::<T>(rows * (shape.qkv_cols() + shape.values())).bytes
            + Work::moves::<T::Acc>(errors_len + states).bytes,
    });
    match dev {
        _ if rows == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let spans = spans(OP, of.spans, rows)?;
            let rule = cpu::Rule::new(shape, x.float()?, spans, rows);
            let (out, scratch) = (out.float()?.host(), scratch.host());
            rule.forward(cpu, [out, errors.host(), scratch], of.state.host());
            Ok(())
        }
        Device::Cuda(cuda) => {
            let DeltaShape { key_heads, value_heads, key_dim, value_dim } = shape;
            let launch = Launch::row(of.count() * value_heads, kernel::SHARED)?;
            let Strided { data: gates, first: g_first, stride: g_stride } = x.gates;
            kernel::Forward {
                out,
                errors,
                state: (slots > 0).then_some(of.state),
                qkv: x.qkv,
                gates,
                rate: x.rate,
                bias: x.bias,
                spans: of.spans,
                rows,
                slots,
                key_heads,
                value_heads,
                key_dim,
                value_dim,
                g_first,
                g_stride,
            }
            .launch(cuda, launch)
        }
    }
}

/// What [`backward`] writes.
pub struct DeltaGrads<'a, T: Element> {
    /// `[rows, qkv_cols]`
    pub dqkv: ViewMut<'a, T>,
    /// `[rows, 2 value_heads]`
    pub dgates: Strided<ViewMut<'a, T>>,
    /// `[value_heads]`, added to.
    pub drate: ViewMut<'a, T::Acc>,
    /// `[value_heads]`, added to.
    pub dbias: ViewMut<'a, T::Acc>,
    /// [`backward_scratch_len`] elements.
    pub scratch: ViewMut<'a, T::Acc>,
}

/// Elements of scratch that [`backward`] needs: of each value head and row the gradients of its
/// normalised query and key, of its value, of beta and of the logarithm of its decay.
pub fn backward_scratch_len(shape: DeltaShape, rows: usize) -> usize {
    shape.value_heads * rows * scratch_cols(shape)
}

fn scratch_cols(shape: DeltaShape) -> usize {
    2 * shape.key_dim + shape.value_dim + 2
}

/// What [`backward`] reads of the forward pass, beside its inputs.
#[derive(Clone, Copy)]
pub struct DeltaKept<'a, T: Element> {
    /// As in [`DeltaOut`].
    pub errors: View<'a, T::Acc>,
    /// Whole sequences.
    pub spans: View<'a, u32>,
}

/// Writes `dqkv` and `dgates` and adds to `drate` and `dbias`, in ascending order of rows on the
/// CPU, for the gradient `dout` `[rows, value_heads, value_dim]` of [`forward`]'s output.
///
/// Reads qkv, errors and dout, and writes dqkv, by way of scratch.
pub fn backward<T: Element>(
    dev: &Device,
    shape: DeltaShape,
    to: DeltaGrads<'_, T>,
    dout: View<'_, T>,
    x: DeltaInputs<'_, T>,
    kept: DeltaKept<'_, T>,
) -> Result<()> {
    const OP: &str = "delta_rule::backward";
    let rows = x.check(OP, shape)?;
    let DeltaGrads { dqkv, dgates, drate, dbias, scratch } = to;
    let DeltaShape { key_heads, value_heads, key_dim, value_dim } = shape;
    shape::check(OP, "dout", &[rows, shape.values()], dout.len())?;
    shape::check(OP, "dqkv", &[rows, shape.qkv_cols()], dqkv.len())?;
    shape::check(OP, "errors", &[value_heads, rows, value_dim], kept.errors.len())?;
    shape::check(OP, "drate", &[value_heads], drate.len())?;
    shape::check(OP, "dbias", &[value_heads], dbias.len())?;
    check_rows((OP, "dgates"), dgates.view(), 2 * value_heads, rows)?;
    let scratch_len = backward_scratch_len(shape, rows);
    let mut scratch = scratch.scratch(OP, scratch_len)?;
    supported(dev, shape)?;
    let _op = dev.op(OP, || Work {
        flops: 2.5 * rows as f64 * shape.flops(),
        bytes: Work::moves::<T>(rows * (2 * shape.qkv_cols() + shape.values())).bytes
            + Work::moves::<T::Acc>(rows * shape.values() + 3 * scratch_len).bytes,
    });
    match dev {
        _ if rows == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let spans = spans(OP, kept.spans, rows)?;
            let rule = cpu::Rule::new(shape, x.float()?, spans, rows);
            let scratch = scratch.host();
            rule.back(cpu, scratch, dout.float()?.host(), kept.errors.host());
            let dgates = Strided {
                data: dgates.data.float()?.host(),
                first: dgates.first,
                stride: dgates.stride,
            };
            rule.rows_back(cpu, dqkv.float()?.host(), dgates, scratch);
            rule.sums_back(cpu, [drate.host(), dbias.host()], scratch);
            Ok(())
        }
        Device::Cuda(cuda) => {
            let count = kept.spans.len() / SPAN_WORDS;
            let launch = Launch::row(count * value_heads, kernel::SHARED_BACKWARD)?;
            let Strided { data: gates, first: g_first, stride: g_stride } = x.gates;
            kernel::Backward {
                scratch: scratch.reborrow(),
                dout,
                qkv: x.qkv,
                errors: kept.errors,
                gates,
                rate: x.rate,
                bias: x.bias,
                spans: kept.spans,
                rows,
                key_heads,
                value_heads,
                key_dim,
                value_dim,
                g_first,
                g_stride,
            }
            .launch(cuda, launch)?;
            let (d_first, d_stride) = (dgates.first, dgates.stride);
            kernel::Rows {
                dqkv,
                dgates: dgates.data,
                scratch: scratch.view(),
                qkv: x.qkv,
                gates,
                rate: x.rate,
                bias: x.bias,
                rows,
                key_heads,
                value_heads,
                key_dim,
                value_dim,
                g_first,
                g_stride,
                d_first,
                d_stride,
            }
            .launch(cuda, Launch::row(rows, 0)?)?;
            let launch = Launch::row(value_heads, kernel::THREADS / 32 * 4)?;
            kernel::Sums {
                drate,
                dbias,
                scratch: scratch.view(),
                gates,
                rate: x.rate,
                bias: x.bias,
                rows,
                value_heads,
                cols: scratch_cols(shape),
                g_first,
                g_stride,
            }
            .launch(cuda, launch)
        }
    }
}
