//! Attention sinks (gpt-oss): a learned logit of each head that joins the softmax over a row's
//! scores, and whose probability goes nowhere.
//!
//! What [`attention`](super::attention) computes without them is turned into what it computes with
//! them: `out * p` and `lse + ln(1 + exp(sink - lse))`, where `p = sigmoid(lse - sink)` is left for
//! the positions. The gradients of queries, keys and values are then attention's own, of these
//! `out` and `lse`: its probabilities are `exp(score - lse)`, and `sum_j p_j dp_j = dout . out`.

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::math,
        cuda::{Launch, kernels::sinks as kernel, width},
    },
    error::Result,
    shape, simd,
};

/// Rows, heads and the width of a head.
fn sizes(op: &'static str, out: usize, lse: usize, heads: usize) -> Result<(usize, usize, usize)> {
    let rows = shape::rows(op, "lse", lse, heads)?;
    let d = out / lse.max(1);
    shape::check(op, "out", &[rows, heads, d], out).map(|()| (rows, heads, d))
}

/// Adds the sinks `[heads]` to what attention gave: `out` `[rows, heads * d]`, `lse` `[rows,
/// heads]`.
///
/// Reads and writes out.
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit.
pub fn forward<T: Element>(
    dev: &Device,
    out: ViewMut<'_, T>,
    lse: ViewMut<'_, T::Acc>,
    sinks: View<'_, T>,
) -> Result<()> {
    const OP: &str = "sinks";
    let (rows, heads, d) = sizes(OP, out.len(), lse.len(), sinks.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * out.len()));
    match dev {
        _ if rows * d == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let (out, sinks) = ((out.float()?.host(), heads * d), sinks.float()?.host());
            cpu.rows(rows, 16, (out, (lse.host(), heads)), |_, (out, lse)| {
                for (i, (out, lse)) in out.chunks_exact_mut(d).zip(lse).enumerate() {
                    let (apart, one) = (*lse - sinks[i % heads], <T::Acc as Float>::ONE);
                    scale(cpu.isa(), out, apart.sigmoid());
                    *lse = lse.max_nan(sinks[i % heads]) + (one + (-apart.abs()).exp()).ln();
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row((rows * heads).div_ceil(kernel::THREADS / 32), 0)?;
            let width = width::<T>(&[d], &[out.address()]);
            kernel::Forward { out, lse, sinks, rows, heads, d, width }.launch(cuda, launch)
        }
    }
}

/// `dsinks -= sum_r exp(sink - lse) (dout . out)`, rows in an order of their number alone, in
/// ascending order on the CPU: `dout`, `out` and `lse` those of attention with sinks.
///
/// Reads dout and out.
pub fn backward<T: Element>(
    dev: &Device,
    dsinks: ViewMut<'_, T::Acc>,
    dout: View<'_, T>,
    out: View<'_, T>,
    lse: View<'_, T::Acc>,
    sinks: View<'_, T>,
) -> Result<()> {
    const OP: &str = "sinks::backward";
    let (rows, heads, d) = sizes(OP, out.len(), lse.len(), sinks.len())?;
    shape::check(OP, "dout", &[rows, heads, d], dout.len())?;
    shape::check(OP, "dsinks", &[heads], dsinks.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * out.len()));
    match dev {
        _ if rows * d == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let (dout, out) = (dout.float()?.host(), out.float()?.host());
            let (lse, sinks) = (lse.host(), sinks.float()?.host());
            cpu.rows(heads, 1, (dsinks.host(), 1), |own, dsinks| {
                for (sum, h) in dsinks.iter_mut().zip(own) {
                    for i in (0..rows).map(|r| r * heads + h) {
                        let p = (sinks[h] - lse[i]).exp();
                        *sum -= p * dot(cpu.isa(), &dout[i * d..][..d], &out[i * d..][..d]);
                    }
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let width = width::<T>(&[d], &[out.address(), dout.address()]);
            let launch = Launch::row(heads, kernel::THREADS / 32 * 4)?;
            kernel::Backward { dsinks, dout, out, lse, sinks, rows, heads, d, width }
                .launch(cuda, launch)
        }
    }
}

simd! {
    fn scale[F: Float](y: &mut [F], a: F) {
        y.iter_mut().for_each(|y| *y *= a);
    }

    fn dot[F: Float](a: &[F], b: &[F]) -> F {
        math::dot(a, b)
    }
}
