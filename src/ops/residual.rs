//! Residual connection: `y += x`.

use crate::{
    device::{Device, Float, View, ViewMut},
    error::Result,
    shape, simd,
};

/// `y += x`, elementwise. Reads both, writes `y`.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ.
pub fn add<F: Float>(dev: &Device, y: ViewMut<'_, F>, x: View<'_, F>) -> Result<()> {
    let cpu = dev.on_cpu("residual")?;
    shape::check("residual", "y", &[x.len()], y.len())?;
    let (y, x) = (y.host(), x.host());
    cpu.rows(y.len(), 16 * 1024, (y, 1), |range, y| add_row(cpu.isa(), y, &x[range]));
    Ok(())
}

simd! {
    fn add_row[F: Float](y: &mut [F], x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += *x;
        }
    }
}
