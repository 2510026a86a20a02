//! LayerNorm over the last axis: `y[r,c] = (x[r,c] - mean[r]) * rstd[r] * w[c] + b[c]`,
//! `rstd[r] = 1 / sqrt(var_c x[r,c] + eps)`, variance biased.  (Ba et al. 2016, eq. 4)

use super::residual;
use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::math,
        cuda::{self, Launch, kernels::layer_norm as kernel},
    },
    error::Result,
    shape, simd,
};

/// Writes `y` `[rows, cols]` and keeps `mean` and `rstd` `[rows]` for [`backward`].
///
/// * `x` `[rows, cols]`, `w` and `b` `[cols]`; `rows` is `rstd.len()`
///
/// Reads x, writes y: `2 * rows * cols` elements.
#[allow(clippy::too_many_arguments)]
pub fn forward<T: Element>(
    dev: &Device,
    y: ViewMut<'_, T>,
    mean: ViewMut<'_, T::Acc>,
    rstd: ViewMut<'_, T::Acc>,
    x: View<'_, T>,
    w: View<'_, T>,
    b: View<'_, T>,
    eps: T::Acc,
) -> Result<()> {
    const OP: &str = "layer_norm";
    let (rows, cols) = (rstd.len(), w.len());
    shape::check(OP, "x", &[rows, cols], x.len())?;
    shape::check(OP, "y", &[rows, cols], y.len())?;
    shape::check(OP, "mean", &[rows], mean.len())?;
    shape::check(OP, "b", &[cols], b.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * rows * cols));
    match dev {
        Device::Cpu(cpu) => {
            let (x, w, b) = (x.float()?.host(), w.float()?.host(), b.float()?.host());
            let out = ((y.float()?.host(), cols), (mean.host(), 1), (rstd.host(), 1));
            cpu.rows(rows, 16, out, |range, (y, mean, rstd)| {
                for (i, r) in range.enumerate() {
                    let (x, y) = (&x[r * cols..][..cols], &mut y[i * cols..][..cols]);
                    (mean[i], rstd[i]) = forward_row(cpu.isa(), y, x, w, b, eps);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let group = cuda::group::<T>(OP, cols, kernel::ELEMENTS, kernel::THREADS)?;
            let blocks = rows.div_ceil(kernel::THREADS / group);
            let launch = Launch::row(blocks, kernel::THREADS / 32 * 4)?;
            kernel::Forward { y, mean, rstd, x, w, b, rows, cols, eps, group }.launch(cuda, launch)
        }
    }
}

/// `x += r`, then [`forward`] of the sum, in one pass: the end of a residual branch and the norm
/// that begins the next. The bits are those of the two ops in turn.
///
/// * `x`, `r` `[rows, cols]`
///
/// Reads x and r, writes x and y: `4 * rows * cols` elements.
#[allow(clippy::too_many_arguments)]
pub fn add_forward<T: Element>(
    dev: &Device,
    y: ViewMut<'_, T>,
    mean: ViewMut<'_, T::Acc>,
    rstd: ViewMut<'_, T::Acc>,
    mut x: ViewMut<'_, T>,
    r: View<'_, T>,
    w: View<'_, T>,
    b: View<'_, T>,
    eps: T::Acc,
) -> Result<()> {
    const OP: &str = "layer_norm::add_forward";
    let (rows, cols) = (rstd.len(), w.len());
    shape::check(OP, "x", &[rows, cols], x.len())?;
    shape::check(OP, "r", &[rows, cols], r.len())?;
    shape::check(OP, "y", &[rows, cols], y.len())?;
    shape::check(OP, "mean", &[rows], mean.len())?;
    shape::check(OP, "b", &[cols], b.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(4 * rows * cols));
    match dev {
        Device::Cpu(_) => {
            residual::add(dev, x.reborrow(), r)?;
            forward(dev, y, mean, rstd, x.view(), w, b, eps)
        }
        Device::Cuda(cuda) => {
            let group = cuda::group::<T>(OP, cols, kernel::ELEMENTS, kernel::THREADS)?;
            let blocks = rows.div_ceil(kernel::THREADS / group);
            let launch = Launch::row(blocks, kernel::THREADS / 32 * 4)?;
            kernel::AddForward { y, mean, rstd, x, r, w, b, rows, cols, eps, group }
                .launch(cuda, launch)
        }
    }
}

/// Elements of scratch that [`backward`] needs: sums of `dw` and of `db` over parts of the rows.
pub fn scratch_len(rows: usize, cols: usize) -> usize {
    2 * rows.div_ceil(kernel::SHARE) * cols
}

/// Writes `dx` `[rows, cols]`, or adds to it where `add` says so, as to the gradient of a residual
/// stream; adds to `dw` and `db` `[cols]`, in an order that depends on `rows` only; on the CPU in
/// ascending row order.
///
/// With `n = (x - mean) rstd` and `g = dy w`: `dx = rstd (g - mean_c(g) - n mean_c(g n))`,
/// `dw += sum_r dy n`, `db += sum_r dy`.
///
/// Reads dy and x, writes dx: `3 * rows * cols` elements, with `add` reads dx, too.
#[allow(clippy::too_many_arguments)]
pub fn backward<T: Element>(
    dev: &Device,
    dx: ViewMut<'_, T>,
    dw: ViewMut<'_, T::Acc>,
    db: ViewMut<'_, T::Acc>,
    scratch: ViewMut<'_, T::Acc>,
    dy: View<'_, T>,
    x: View<'_, T>,
    w: View<'_, T>,
    mean: View<'_, T::Acc>,
    rstd: View<'_, T::Acc>,
    add: bool,
) -> Result<()> {
    const OP: &str = "layer_norm::backward";
    let (rows, cols) = (rstd.len(), w.len());
    shape::check(OP, "dx", &[rows, cols], dx.len())?;
    shape::check(OP, "dy", &[rows, cols], dy.len())?;
    shape::check(OP, "x", &[rows, cols], x.len())?;
    shape::check(OP, "mean", &[rows], mean.len())?;
    shape::check(OP, "dw", &[cols], dw.len())?;
    shape::check(OP, "db", &[cols], db.len())?;
    let mut partial = scratch.scratch(OP, scratch_len(rows, cols))?;
    let _op = dev.op(OP, || Work::moves::<T>(rows * cols * if add { 4 } else { 3 }));
    match dev {
        Device::Cpu(cpu) => {
            let (dx, dw, db) = (dx.float()?.host(), dw.host(), db.host());
            let (dy, x, w) = (dy.float()?.host(), x.float()?.host(), w.float()?.host());
            let (mean, rstd) = (mean.host(), rstd.host());
            cpu.rows(rows, 16, (dx, cols), |range, dx| {
                for (i, r) in range.enumerate() {
                    let at = r * cols..(r + 1) * cols;
                    let (dx, dy) = (&mut dx[i * cols..][..cols], &dy[at.clone()]);
                    backward_row(cpu.isa(), dx, dy, &x[at], w, (mean[r], rstd[r]), add);
                }
            });
            // By columns, so that each weight's sum runs over rows in order on one thread.
            cpu.rows(cols, 64, ((dw, 1), (db, 1)), |range, (dw, db)| {
                for r in 0..rows {
                    let at = r * cols + range.start..r * cols + range.end;
                    add_weight_row(cpu.isa(), dw, db, &dy[at.clone()], &x[at], mean[r], rstd[r]);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let group = cuda::group::<T>(OP, cols, kernel::ELEMENTS, kernel::THREADS)?;
            let (parts, sums) = (rows.div_ceil(kernel::SHARE), kernel::THREADS / group * cols);
            let launch = Launch::row(parts, (2 * kernel::THREADS / 32 + sums) * 4)?;
            let to = partial.reborrow();
            let add = add.into();
            kernel::Backward { dx, partial: to, dy, x, w, mean, rstd, rows, cols, group, add }
                .launch(cuda, launch)?;
            let mut launch = Launch::row(cols.div_ceil(32), kernel::THREADS * 4)?;
            // A row of blocks for dw, one for db.
            launch.blocks[1] = 2;
            kernel::AddPartials { dw, db, partial: partial.view(), count: parts, cols }
                .launch(cuda, launch)
        }
    }
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

    fn backward_row[F: Float](
        dx: &mut [F], dy: &[F], x: &[F], w: &[F], kept: (F, F), add: bool
    ) {
        let (mean, rstd) = kept;
        let n = F::of(x.len() as f64);
        let g = math::sum_by(x.len(), |i| dy[i] * w[i]) / n;
        let gn = math::sum_by(x.len(), |i| dy[i] * w[i] * ((x[i] - mean) * rstd)) / n;
        for i in 0..dx.len() {
            let d = (dy[i] * w[i] - g - (x[i] - mean) * rstd * gn) * rstd;
            dx[i] = if add { dx[i] + d } else { d };
        }
    }

    fn add_weight_row[F: Float](dw: &mut [F], db: &mut [F], dy: &[F], x: &[F], mean: F, rstd: F) {
        for i in 0..dw.len() {
            dw[i] = dy[i].mul_add((x[i] - mean) * rstd, dw[i]);
            db[i] += dy[i];
        }
    }
}
