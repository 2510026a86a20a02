//! Value and reward heads: one number a row, `y[r] = h[r] . w`.

use crate::{
    device::{Device, Float, View, ViewMut, cpu::math},
    error::Result,
    shape, simd,
};

/// Writes `y` `[rows]` from `h` `[rows, d]` and `w` `[d]`.
///
/// # Errors
/// [`crate::Error::Shape`] if `h` is not `rows * d` long.
pub fn forward<F: Float>(
    dev: &Device,
    y: ViewMut<'_, F>,
    h: View<'_, F>,
    w: View<'_, F>,
) -> Result<()> {
    let cpu = dev.on_cpu("scalar_head")?;
    let d = w.len();
    shape::check("scalar_head", "h", &[y.len(), d], h.len())?;
    let (y, h, w) = (y.host(), h.host(), w.host());
    cpu.rows(y.len(), 64, (y, 1), |range, y| {
        for (y, r) in y.iter_mut().zip(range) {
            *y = dot(cpu.isa(), &h[r * d..][..d], w);
        }
    });
    Ok(())
}

/// Writes `dh[r] = dy[r] w` and adds `sum_r dy[r] h[r]` to `dw`, rows in ascending order.
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit.
pub fn backward<F: Float>(
    dev: &Device,
    dh: ViewMut<'_, F>,
    dw: ViewMut<'_, F>,
    dy: View<'_, F>,
    h: View<'_, F>,
    w: View<'_, F>,
) -> Result<()> {
    let cpu = dev.on_cpu("scalar_head::backward")?;
    let (rows, d) = (dy.len(), w.len());
    shape::check("scalar_head::backward", "h", &[rows, d], h.len())?;
    shape::check("scalar_head::backward", "dh", &[rows, d], dh.len())?;
    shape::check("scalar_head::backward", "dw", &[d], dw.len())?;
    let (dh, dw, dy, h, w) = (dh.host(), dw.host(), dy.host(), h.host(), w.host());
    cpu.rows(rows, 64, (dh, d), |range, dh| {
        for (dh, r) in dh.chunks_exact_mut(d.max(1)).zip(range) {
            scaled(cpu.isa(), dh, dy[r], w);
        }
    });
    cpu.rows(d, 64, (dw, 1), |range, dw| {
        for r in 0..rows {
            axpy(cpu.isa(), dw, dy[r], &h[r * d..][range.clone()]);
        }
    });
    Ok(())
}

simd! {
    fn dot[F: Float](a: &[F], b: &[F]) -> F {
        math::dot(a, b)
    }

    fn scaled[F: Float](y: &mut [F], a: F, x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = a * *x;
        }
    }

    fn axpy[F: Float](y: &mut [F], a: F, x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = a.mul_add(*x, *y);
        }
    }
}
