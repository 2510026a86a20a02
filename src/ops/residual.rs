//! Residual connection: `y += x`.

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cuda::{Launch, kernels::residual as kernel},
    },
    error::Result,
    shape, simd,
};

/// `y += x`, elementwise, in f32 with the same bits on every device. Reads both, writes `y`.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ, [`crate::Error::Device`] if a buffer does not
/// begin at a multiple of 16 bytes on a CUDA device.
pub fn add<T: Element>(dev: &Device, y: ViewMut<'_, T>, x: View<'_, T>) -> Result<()> {
    shape::check("residual", "y", &[x.len()], y.len())?;
    let _op = dev.op("residual", || Work::moves::<T>(3 * x.len()));
    match dev {
        Device::Cpu(cpu) => {
            let (y, x) = (y.float()?.host(), x.float()?.host());
            cpu.rows(y.len(), 16 * 1024, (y, 1), |range, y| add_row(cpu.isa(), y, &x[range]));
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::packets::<T>(x.len(), kernel::THREADS)?;
            kernel::Add { y, x, count: x.len() as u64 }.launch(cuda, launch)
        }
    }
}

simd! {
    fn add_row[F: Float](y: &mut [F], x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += *x;
        }
    }
}
