//! RMSNorm over the last axis: `y[r,c] = x[r,c] * rstd[r] * w[c]`,
//! `rstd[r] = 1 / sqrt(mean_c x[r,c]² + eps)`.  (Zhang and Sennrich 2019, eq. 4)

use super::residual;
use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::math,
        cuda::{self, Launch, kernels::rms_norm as kernel},
    },
    error::Result,
    shape, simd,
};

/// Writes `y` `[rows, cols]` and keeps `rstd` `[rows]` for [`backward`].
///
/// * `x` `[rows, cols]`, `w` `[cols]`; `rows` is `rstd.len()`
///
/// Reads x, writes y: `2 * rows * cols` elements.
pub fn forward<T: Element>(
    dev: &Device,
    y: ViewMut<'_, T>,
    rstd: ViewMut<'_, T::Acc>,
    x: View<'_, T>,
    w: View<'_, T>,
    eps: T::Acc,
) -> Result<()> {
    const OP: &str = "rms_norm";
    let (rows, cols) = (rstd.len(), w.len());
    shape::check(OP, "x", &[rows, cols], x.len())?;
    shape::check(OP, "y", &[rows, cols], y.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * rows * cols));
    match dev {
        Device::Cpu(cpu) => {
            let (y, rstd) = (y.float()?.host(), rstd.host());
            let (x, w) = (x.float()?.host(), w.float()?.host());
            cpu.rows(rows, 16, ((y, cols), (rstd, 1)), |range, (y, rstd)| {
                for (i, r) in range.enumerate() {
                    let (x, y) = (&x[r * cols..][..cols], &mut y[i * cols..][..cols]);
                    rstd[i] = forward_row(cpu.isa(), y, x, w, eps);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let group = cuda::group::<T>(OP, cols, kernel::ELEMENTS, kernel::THREADS)?;
            let blocks = rows.div_ceil(kernel::THREADS / group);
            let launch = Launch::row(blocks, kernel::THREADS / 32 * 4)?;
            kernel::Forward { y, rstd, x, w, rows, cols, eps, group }.launch(cuda, launch)
        }
    }
}

/// `x += r`, then [`forward`] of the sum, in one pass: the end of a residual branch and the norm
/// that begins the next. The bits are those of the two ops in turn.
///
/// * `x`, `r` `[rows, cols]`
///
/// Reads x and r, writes x and y: `4 * rows * cols` elements.
pub fn add_forward<T: Element>(
    dev: &Device,
    y: ViewMut<'_, T>,
    rstd: ViewMut<'_, T::Acc>,
    mut x: ViewMut<'_, T>,
    r: View<'_, T>,
    w: View<'_, T>,
    eps: T::Acc,
) -> Result<()> {
    const OP: &str = "rms_norm::add_forward";
    let (rows, cols) = (rstd.len(), w.len());
    shape::check(OP, "x", &[rows, cols], x.len())?;
    shape::check(OP, "r", &[rows, cols], r.len())?;
    shape::check(OP, "y", &[rows, cols], y.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(4 * rows * cols));
    match dev {
        Device::Cpu(_) => {
            residual::add(dev, x.reborrow(), r)?;
            forward(dev, y, rstd, x.view(), w, eps)
        }
        Device::Cuda(cuda) => {
            let group = cuda::group::<T>(OP, cols, kernel::ELEMENTS, kernel::THREADS)?;
            let blocks = rows.div_ceil(kernel::THREADS / group);
            let launch = Launch::row(blocks, kernel::THREADS / 32 * 4)?;
            kernel::AddForward { y, rstd, x, r, w, rows, cols, eps, group }.launch(cuda, launch)
        }
    }
}

/// Elements of scratch that [`backward`] needs: sums of `dw` over parts of the rows.
pub fn scratch_len(rows: usize, cols: usize) -> usize {
    rows.div_ceil(kernel::SHARE) * cols
}

/// Writes `dx` `[rows, cols]`, or adds to it where `add` says so, as to the gradient of a residual
/// stream; adds to `dw` `[cols]`, in an order that depends on `rows` only; on the CPU in ascending
/// row order.
///
/// `dx = rstd * (dy*w - x * rstd² * mean_c(dy*w*x))`, `dw += sum_r dy * x * rstd`
///
/// Reads dy and x, writes dx: `3 * rows * cols` elements, with `add` reads dx, too.
#[allow(clippy::too_many_arguments)]
pub fn backward<T: Element>(
    dev: &Device,
    dx: ViewMut<'_, T>,
    dw: ViewMut<'_, T::Acc>,
    scratch: ViewMut<'_, T::Acc>,
    dy: View<'_, T>,
    x: View<'_, T>,
    w: View<'_, T>,
    rstd: View<'_, T::Acc>,
    add: bool,
) -> Result<()> {
    const OP: &str = "rms_norm::backward";
    let (rows, cols) = (rstd.len(), w.len());
    shape::check(OP, "dx", &[rows, cols], dx.len())?;
    shape::check(OP, "dy", &[rows, cols], dy.len())?;
    shape::check(OP, "x", &[rows, cols], x.len())?;
    shape::check(OP, "dw", &[cols], dw.len())?;
    let mut partial = scratch.scratch(OP, scratch_len(rows, cols))?;
    let _op = dev.op(OP, || Work::moves::<T>(rows * cols * if add { 4 } else { 3 }));
    match dev {
        Device::Cpu(cpu) => {
            let (dx, dw, rstd) = (dx.float()?.host(), dw.host(), rstd.host());
            let (dy, x, w) = (dy.float()?.host(), x.float()?.host(), w.float()?.host());
            cpu.rows(rows, 16, (dx, cols), |range, dx| {
                for (i, r) in range.enumerate() {
                    let at = r * cols..(r + 1) * cols;
                    let dx = &mut dx[i * cols..][..cols];
                    backward_row(cpu.isa(), dx, &dy[at.clone()], &x[at], w, rstd[r], add);
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
        Device::Cuda(cuda) => {
            let group = cuda::group::<T>(OP, cols, kernel::ELEMENTS, kernel::THREADS)?;
            let (parts, sums) = (rows.div_ceil(kernel::SHARE), kernel::THREADS / group * cols);
            let launch = Launch::row(parts, (kernel::THREADS / 32 + sums) * 4)?;
            let to = partial.reborrow();
            kernel::Backward {
                dx,
                partial: to,
                dy,
                x,
                w,
                rstd,
                rows,
                cols,
                group,
                add: add.into(),
            }
            .launch(cuda, launch)?;
            let launch = Launch::row(cols.div_ceil(32), kernel::THREADS * 4)?;
            kernel::AddPartials { dw, partial: partial.view(), count: parts, cols }
                .launch(cuda, launch)
        }
    }
}

simd! {
    fn forward_row[F: Float](y: &mut [F], x: &[F], w: &[F], eps: F) -> F {
        let rstd = F::ONE / (math::dot(x, x) / F::of(x.len() as f64) + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = *x * rstd * *w;
        }
        rstd
    }

    fn backward_row[F: Float](dx: &mut [F], dy: &[F], x: &[F], w: &[F], rstd: F, add: bool) {
        let mean = math::sum_by(x.len(), |i| dy[i] * w[i] * x[i]) / F::of(x.len() as f64);
        let pull = mean * rstd * rstd;
        for i in 0..dx.len() {
            let d = (dy[i] * w[i] - x[i] * pull) * rstd;
            dx[i] = if add { dx[i] + d } else { d };
        }
    }

    fn add_weight_row[F: Float](dw: &mut [F], dy: &[F], x: &[F], rstd: F) {
        for i in 0..dw.len() {
            dw[i] = dy[i].mul_add(x[i] * rstd, dw[i]);
        }
    }
}
