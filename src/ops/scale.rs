//! Multipliers and soft-caps: `x ← factor x`, or `x ← cap tanh(factor x / cap)`.
//! (soft-cap: Gemma Team 2024; multipliers: Gemma Team 2024, Granite Team 2024)

use crate::{
    device::{
        Device, Element, Float, ViewMut, Work,
        cuda::{Launch, kernels::scale as kernel},
    },
    error::{Error, Result},
    simd,
};

/// Multiplies each element of `x` by `factor`, then bounds it by `cap`, if there is one: `cap
/// tanh(x / cap)`. Without a cap in f32 with the same bits on every device. Reads and writes `x`.
///
/// # Errors
/// [`Error::Value`] for a factor that is not finite or a cap that is not positive,
/// [`Error::Device`] if `x` does not begin at a multiple of 16 bytes on a CUDA device.
pub fn in_place<T: Element>(
    dev: &Device,
    x: ViewMut<'_, T>,
    factor: f64,
    cap: Option<f64>,
) -> Result<()> {
    const OP: &str = "scale";
    if !factor.is_finite() {
        return Err(Error::value(format!("{OP}: factor"), "a finite number", factor));
    }
    if let Some(cap) = cap.filter(|cap| !(*cap > 0.0 && cap.is_finite())) {
        return Err(Error::value(format!("{OP}: cap"), "a positive number", cap));
    }
    let _op = dev.op(OP, || Work::moves::<T>(2 * x.len()));
    let factor = <T::Acc as Element>::of(factor);
    // 0 is none.
    let cap = <T::Acc as Element>::of(cap.unwrap_or(0.0));
    match dev {
        Device::Cpu(cpu) => {
            let x = x.float()?.host();
            let task = |_, x: &mut [T::Acc]| scale_row(cpu.isa(), x, factor, cap);
            cpu.rows(x.len(), 16 * 1024, (x, 1), task);
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::packets::<T>(x.len(), kernel::THREADS)?;
            let count = x.len() as u64;
            kernel::InPlace { x, count, factor, cap }.launch(cuda, launch)
        }
    }
}

simd! {
    fn scale_row[F: Float](x: &mut [F], factor: F, cap: F) {
        for x in x.iter_mut() {
            *x *= factor;
        }
        if cap > F::ZERO {
            let inverse = F::ONE / cap;
            for x in x.iter_mut() {
                *x = (*x * inverse).tanh() * cap;
            }
        }
    }
}
