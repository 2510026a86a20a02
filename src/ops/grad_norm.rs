//! The global gradient norm, clipping, and the search for bad numbers.

use crate::{
    device::{Device, Float, View, cpu::math},
    error::Result,
    simd,
};

/// Elements of a block: sums inside are in lanes, blocks are added in order in f64.
const BLOCK: usize = 4096;

/// Blocks of a task; the partial sums of a task group stay on the stack.
const GROUP: usize = 256;

/// `sqrt(sum x²)`, the same bits for any number of threads. NaN if any element is NaN.
///
/// # Errors
/// [`crate::Error::Device`] if the device fails.
pub fn norm<F: Float>(dev: &Device, x: View<'_, F>) -> Result<f64> {
    let cpu = dev.on_cpu("grad_norm")?;
    let x = x.host();
    let mut sum = 0.0;
    for part in x.chunks(BLOCK * GROUP) {
        let mut sums = [0.0f64; GROUP];
        let blocks = part.len().div_ceil(BLOCK);
        cpu.rows(blocks, 4, (&mut sums[..blocks], 1), |range, sums| {
            for (sum, b) in sums.iter_mut().zip(range) {
                let block = &part[b * BLOCK..((b + 1) * BLOCK).min(part.len())];
                *sum = squares(cpu.isa(), block).f64();
            }
        });
        sum += sums[..blocks].iter().sum::<f64>();
    }
    Ok(sum.sqrt())
}

/// The factor that brings a gradient of this norm down to `max_norm`:
/// `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`; NaN for a norm of NaN,
/// always 1 for a `max_norm` of 0.
#[must_use]
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    // `f64::min` would turn NaN into 1.
    let scale = max_norm / (norm + 1e-6);
    if max_norm <= 0.0 || scale > 1.0 { 1.0 } else { scale }
}

/// Index of the first NaN or infinity.
///
/// # Errors
/// As [`norm`].
pub fn first_bad<F: Float>(dev: &Device, x: View<'_, F>) -> Result<Option<usize>> {
    let cpu = dev.on_cpu("grad_norm::first_bad")?;
    let x = x.host();
    let bad = |(i, block): (usize, &[F])| {
        // x * 0 is 0 for every finite x: one sum tells whether the block is clean.
        if probe(cpu.isa(), block) == F::ZERO {
            return None;
        }
        block.iter().position(|x| !x.is_finite()).map(|at| i * BLOCK + at)
    };
    Ok(x.chunks(BLOCK).enumerate().find_map(bad))
}

simd! {
    fn squares[F: Float](x: &[F]) -> F {
        math::dot(x, x)
    }

    fn probe[F: Float](x: &[F]) -> F {
        math::sum_by(x.len(), |i| x[i] * F::ZERO)
    }
}
