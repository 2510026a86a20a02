//! LayerNorm over the last axis: `y[r,c] = (x[r,c] - mean[r]) * rstd[r] * w[c] + b[c]`,
//! `rstd[r] = 1 / sqrt(var_c x[r,c] + eps)`, variance biased.  (Ba et al. 2016, eq. 4)

use crate::{
    device::{Device, Float, View, ViewMut, cpu::math},
    error::Result,
    shape, simd,
};

/// Writes `y` `[rows, cols]` and keeps `mean` and `rstd` `[rows]` for [`backward`].
///
/// * `x` `[rows, cols]`, `w` and `b` `[cols]`; `rows` is `rstd.len()`
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit `rows` x `cols`.
#[allow(clippy::too_many_arguments)]
pub fn forward<F: Float>(
    dev: &Device,
    y: ViewMut<'_, F>,
    mean: ViewMut<'_, F>,
    rstd: ViewMut<'_, F>,
    x: View<'_, F>,
    w: View<'_, F>,
    b: View<'_, F>,
    eps: F,
) -> Result<()> {
    let cpu = dev.on_cpu("layer_norm")?;
    let (rows, cols) = (rstd.len(), w.len());
    shape::check("layer_norm", "x", &[rows, cols], x.len())?;
    shape::check("layer_norm", "y", &[rows, cols], y.len())?;
    shape::check("layer_norm", "mean", &[rows], mean.len())?;
    shape::check("layer_norm", "b", &[cols], b.len())?;
    let (x, w, b) = (x.host(), w.host(), b.host());
    let out = ((y.host(), cols), (mean.host(), 1), (rstd.host(), 1));
    cpu.rows(rows, 16, out, |range, (y, mean, rstd)| {
        for (i, r) in range.enumerate() {
            let (x, y) = (&x[r * cols..][..cols], &mut y[i * cols..][..cols]);
            (mean[i], rstd[i]) = forward_row(cpu.isa(), y, x, w, b, eps);
        }
    });
    Ok(())
}

/// Writes `dx` `[rows, cols]`, adds to `dw` and `db` `[cols]` in ascending row order.
///
/// With `n = (x - mean) rstd` and `g = dy w`: `dx = rstd (g - mean_c(g) - n mean_c(g n))`,
/// `dw += sum_r dy n`, `db += sum_r dy`.
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit `rows` x `cols`.
#[allow(clippy::too_many_arguments)]
pub fn backward<F: Float>(
    dev: &Device,
    dx: ViewMut<'_, F>,
    dw: ViewMut<'_, F>,
    db: ViewMut<'_, F>,
    dy: View<'_, F>,
    x: View<'_, F>,
    w: View<'_, F>,
    mean: View<'_, F>,
    rstd: View<'_, F>,
) -> Result<()> {
    let cpu = dev.on_cpu("layer_norm::backward")?;
    let (rows, cols) = (rstd.len(), w.len());
    shape::check("layer_norm::backward", "dx", &[rows, cols], dx.len())?;
    shape::check("layer_norm::backward", "dy", &[rows, cols], dy.len())?;
    shape::check("layer_norm::backward", "x", &[rows, cols], x.len())?;
    shape::check("layer_norm::backward", "mean", &[rows], mean.len())?;
    shape::check("layer_norm::backward", "dw", &[cols], dw.len())?;
    shape::check("layer_norm::backward", "db", &[cols], db.len())?;
    let (dy, x, w, mean, rstd) = (dy.host(), x.host(), w.host(), mean.host(), rstd.host());
    cpu.rows(rows, 16, (dx.host(), cols), |range, dx| {
        for (i, r) in range.enumerate() {
            let at = r * cols..(r + 1) * cols;
            let dx = &mut dx[i * cols..][..cols];
            backward_row(cpu.isa(), dx, &dy[at.clone()], &x[at], w, mean[r], rstd[r]);
        }
    });
    // By columns, so that each weight's sum runs over rows in order on one thread.
    cpu.rows(cols, 64, ((dw.host(), 1), (db.host(), 1)), |range, (dw, db)| {
        for r in 0..rows {
            let at = r * cols + range.start..r * cols + range.end;
            add_weight_row(cpu.isa(), dw, db, &dy[at.clone()], &x[at], mean[r], rstd[r]);
        }
    });
    Ok(())
}

simd! {
    fn forward_row[F: Float](y: &mut [F], x: &[F], w: &[F], b: &[F], eps: F) -> (F, F) {
        let n = F::of(x.len() as f64);
        let mean = math::sum_by(x.len(), |i| x[i]) / n;
        let var = math::sum_by(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
        let rstd = F::ONE / (var + eps).sqrt();
        for i in 0..y.len() {
            y[i] = ((x[i] - mean) * rstd).mul_add(w[i], b[i]);
        }
        (mean, rstd)
    }

    fn backward_row[F: Float](dx: &mut [F], dy: &[F], x: &[F], w: &[F], mean: F, rstd: F) {
        let n = F::of(x.len() as f64);
        let g = math::sum_by(x.len(), |i| dy[i] * w[i]) / n;
        let gn = math::sum_by(x.len(), |i| dy[i] * w[i] * ((x[i] - mean) * rstd)) / n;
        for i in 0..dx.len() {
            dx[i] = (dy[i] * w[i] - g - (x[i] - mean) * rstd * gn) * rstd;
        }
    }

    fn add_weight_row[F: Float](dw: &mut [F], db: &mut [F], dy: &[F], x: &[F], mean: F, rstd: F) {
        for i in 0..dw.len() {
            dw[i] = dy[i].mul_add((x[i] - mean) * rstd, dw[i]);
            db[i] += dy[i];
        }
    }
}
