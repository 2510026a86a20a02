//! RMSNorm over the last axis: `y[r,c] = x[r,c] * rstd[r] * w[c]`,
//! `rstd[r] = 1 / sqrt(mean_c x[r,c]² + eps)`.  (Zhang and Sennrich 2019, eq. 4)

use crate::{
    device::{Device, Float, View, ViewMut, cpu::math},
    error::Result,
    shape, simd,
};

/// Writes `y` `[rows, cols]` and keeps `rstd` `[rows]` for [`backward`].
///
/// * `x` `[rows, cols]`, `w` `[cols]`; `rows` is `rstd.len()`
///
/// Reads x, writes y: `2 * rows * cols` elements.
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit `rows` x `cols`.
pub fn forward<F: Float>(
    dev: &Device,
    y: ViewMut<'_, F>,
    rstd: ViewMut<'_, F>,
    x: View<'_, F>,
    w: View<'_, F>,
    eps: F,
) -> Result<()> {
    let (rows, cols) = (rstd.len(), w.len());
    shape::check("rms_norm", "x", &[rows, cols], x.len())?;
    shape::check("rms_norm", "y", &[rows, cols], y.len())?;
    let (y, rstd, x, w) = (y.host(), rstd.host(), x.host(), w.host());
    let Device::Cpu(cpu) = dev;
    cpu.rows(rows, 16, ((y, cols), (rstd, 1)), |range, (y, rstd)| {
        for (i, r) in range.enumerate() {
            let (x, y) = (&x[r * cols..][..cols], &mut y[i * cols..][..cols]);
            rstd[i] = forward_row(cpu.isa(), y, x, w, eps);
        }
    });
    Ok(())
}

/// Writes `dx` `[rows, cols]` and adds to `dw` `[cols]`, in ascending row order.
///
/// `dx = rstd * (dy*w - x * rstd² * mean_c(dy*w*x))`, `dw += sum_r dy * x * rstd`
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit `rows` x `cols`.
pub fn backward<F: Float>(
    dev: &Device,
    dx: ViewMut<'_, F>,
    dw: ViewMut<'_, F>,
    dy: View<'_, F>,
    x: View<'_, F>,
    w: View<'_, F>,
    rstd: View<'_, F>,
) -> Result<()> {
    let (rows, cols) = (rstd.len(), w.len());
    shape::check("rms_norm::backward", "dx", &[rows, cols], dx.len())?;
    shape::check("rms_norm::backward", "dy", &[rows, cols], dy.len())?;
    shape::check("rms_norm::backward", "x", &[rows, cols], x.len())?;
    shape::check("rms_norm::backward", "dw", &[cols], dw.len())?;
    let (dx, dw, dy, x) = (dx.host(), dw.host(), dy.host(), x.host());
    let (w, rstd) = (w.host(), rstd.host());
    let Device::Cpu(cpu) = dev;
    cpu.rows(rows, 16, (dx, cols), |range, dx| {
        for (i, r) in range.enumerate() {
            let at = r * cols..(r + 1) * cols;
            let dx = &mut dx[i * cols..][..cols];
            backward_row(cpu.isa(), dx, &dy[at.clone()], &x[at], w, rstd[r]);
        }
    });
    // By columns, so that each weight's sum runs over rows in order on one thread.
    cpu.rows(cols, 64, (dw, 1), |range, dw| {
        for r in 0..rows {
            let at = r * cols + range.start..r * cols + range.end;
            add_weight_row(cpu.isa(), dw, &dy[at.clone()], &x[at], rstd[r]);
        }
    });
    Ok(())
}

simd! {
    fn forward_row[F: Float](y: &mut [F], x: &[F], w: &[F], eps: F) -> F {
        let rstd = F::ONE / (math::dot(x, x) / F::of(x.len() as f64) + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = *x * rstd * *w;
        }
        rstd
    }

    fn backward_row[F: Float](dx: &mut [F], dy: &[F], x: &[F], w: &[F], rstd: F) {
        let mean = math::sum_by(x.len(), |i| dy[i] * w[i] * x[i]) / F::of(x.len() as f64);
        let pull = mean * rstd * rstd;
        for i in 0..dx.len() {
            dx[i] = (dy[i] * w[i] - x[i] * pull) * rstd;
        }
    }

    fn add_weight_row[F: Float](dw: &mut [F], dy: &[F], x: &[F], rstd: F) {
        for i in 0..dw.len() {
            dw[i] = dy[i].mul_add(x[i] * rstd, dw[i]);
        }
    }
}
