//! Value and reward heads: one number a row, `y[r] = h[r] . w`.

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::math,
        cuda::{self, Launch, kernels::scalar_head as kernel},
    },
    error::Result,
    shape, simd,
};

/// Writes `y` `[rows]` from `h` `[rows, d]` and `w` `[d]`; sums in an order that depends on `d`
/// only.
///
/// `2 * rows * d` FLOPs. Reads `rows * d` elements.
///
/// # Errors
/// [`crate::Error::Shape`] if `h` is not `rows * d` long; on a CUDA device [`crate::Error::Device`]
/// if `h` or `w` does not begin at a multiple of 16 bytes.
pub fn forward<T: Element>(
    dev: &Device,
    y: ViewMut<'_, T::Acc>,
    h: View<'_, T>,
    w: View<'_, T>,
) -> Result<()> {
    let (rows, d) = (y.len(), w.len());
    shape::check("scalar_head", "h", &[rows, d], h.len())?;
    let _op = dev.op("scalar_head", || Work::moves::<T>(rows * d).product(rows, 1, d));
    match dev {
        Device::Cpu(cpu) => {
            let (y, h, w) = (y.host(), h.float()?.host(), w.float()?.host());
            cpu.rows(rows, 64, (y, 1), |range, y| {
                for (y, r) in y.iter_mut().zip(range) {
                    *y = dot(cpu.isa(), &h[r * d..][..d], w);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row(rows.div_ceil(kernel::THREADS / 32), 0)?;
            kernel::Forward { y, h, w, rows, d, width: cuda::width::<T>(&[d], &[]) }
                .launch(cuda, launch)
        }
    }
}

/// Writes `dh[r] = dy[r] w` `[rows, d]` and adds `sum_r dy[r] h[r]` to `dw` `[d]`, in an order that
/// depends on `rows` only; on the CPU rows in ascending order.
///
/// `3 * rows * d` FLOPs. Reads and writes `2 * rows * d` elements.
pub fn backward<T: Element>(
    dev: &Device,
    dh: ViewMut<'_, T>,
    dw: ViewMut<'_, T::Acc>,
    dy: View<'_, T::Acc>,
    h: View<'_, T>,
    w: View<'_, T>,
) -> Result<()> {
    const OP: &str = "scalar_head::backward";
    let (rows, d) = (dy.len(), w.len());
    shape::check(OP, "h", &[rows, d], h.len())?;
    shape::check(OP, "dh", &[rows, d], dh.len())?;
    shape::check(OP, "dw", &[d], dw.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * rows * d).flops(3.0 * (rows * d) as f64));
    match dev {
        Device::Cpu(cpu) => {
            let (dh, dw, dy) = (dh.float()?.host(), dw.host(), dy.host());
            let (h, w) = (h.float()?.host(), w.float()?.host());
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
        // Not even the sign of a zero in `dw` changes.
        Device::Cuda(_) if rows == 0 => Ok(()),
        Device::Cuda(cuda) => {
            let launch = Launch::row(d.div_ceil(kernel::COLS), kernel::THREADS * 4)?;
            let width = cuda::width::<T>(&[d], &[]);
            kernel::Backward { dh, dw, dy, h, w, rows, d, width }.launch(cuda, launch)
        }
    }
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
