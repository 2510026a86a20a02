//! The global gradient norm, clipping, and the search for bad numbers.

use crate::{
    device::{
        Device, Float, Pending, View, Work,
        cpu::math,
        cuda::{self, Launch, kernels::grad_norm as kernel},
    },
    error::Result,
    simd,
};

/// Elements of a chunk: sums inside are in lanes, chunks are added in order in f64.
const CHUNK: usize = kernel::CHUNK;

/// Chunks of a group, which is added up at once.
const GROUP: usize = kernel::GROUP;

/// `sqrt(sum x²)`, the same bits for any number of threads, and in f32 on every device. NaN if any
/// element is NaN.
///
/// Reads x once.
pub fn norm<F: Float>(dev: &Device, x: View<'_, F>) -> Result<Pending<f64>> {
    let n = x.len();
    let _op = dev.op("grad_norm", || Work::moves::<F>(n));
    // Groups of a part: 1 up to 2^28 elements.
    let groups = n.div_ceil(CHUNK * GROUP).div_ceil(cuda::PARTS).max(1);
    let sum = match dev {
        Device::Cpu(cpu) => {
            let group = |x: &[F]| {
                let (mut sums, chunks) = ([0.0f64; GROUP], x.len().div_ceil(CHUNK));
                cpu.rows(chunks, 4, (&mut sums[..chunks], 1), |range, sums| {
                    for (sum, c) in sums.iter_mut().zip(range) {
                        let chunk = &x[c * CHUNK..((c + 1) * CHUNK).min(x.len())];
                        *sum = squares(cpu.isa(), chunk).f64();
                    }
                });
                sums[..chunks].iter().sum::<f64>()
            };
            let part = |x: &[F]| x.chunks(GROUP * CHUNK).map(group).sum::<f64>();
            // The sum of no f64 is -0.
            Pending::now(0.0 + x.host().chunks(groups * GROUP * CHUNK).map(part).sum::<f64>())
        }
        Device::Cuda(cuda) => {
            let parts = n.div_ceil(groups * GROUP * CHUNK);
            let sums = cuda.reduce(parts, |total, mut partial| {
                let launch = Launch::row(parts, GROUP * 4)?;
                kernel::Squares { partial: partial.reborrow(), x, n: n as u64, groups }
                    .launch(cuda, launch)?;
                kernel::Sum { total, partial: partial.view(), parts }
                    .launch(cuda, Launch::row(1, 0)?)
            })?;
            sums.map(|[sum]| sum)
        }
    };
    Ok(sum.map(f64::sqrt))
}

/// The factor that brings a gradient of this norm down to `max_norm`:
/// `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`; NaN for a norm of NaN,
/// always 1 for a `max_norm` of 0.
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    // `f64::min` would turn NaN into 1.
    let scale = max_norm / (norm + 1e-6);
    if max_norm <= 0.0 || scale > 1.0 { 1.0 } else { scale }
}

/// Index of the first NaN or infinity.
///
/// Reads x once.
pub fn first_bad<F: Float>(dev: &Device, x: View<'_, F>) -> Result<Pending<Option<usize>>> {
    let _op = dev.op("grad_norm::first_bad", || Work::moves::<F>(x.len()));
    match dev {
        Device::Cpu(cpu) => {
            let bad = |(i, chunk): (usize, &[F])| {
                // x * 0 is 0 for every finite x: one sum tells whether the chunk is clean.
                if probe(cpu.isa(), chunk) == F::ZERO {
                    return None;
                }
                chunk.iter().position(|x| !x.is_finite()).map(|at| i * CHUNK + at)
            };
            Ok(Pending::now(x.host().chunks(CHUNK).enumerate().find_map(bad)))
        }
        Device::Cuda(cuda) => {
            let blocks = x.len().div_ceil(CHUNK * kernel::BAD_THREADS / 32);
            let index = cuda.reduce(0, |index, _| {
                kernel::Bad { index, x, n: x.len() as u64 }.launch(cuda, Launch::row(blocks, 0)?)
            })?;
            // All bits are set, as the room begins, if none was found.
            Ok(index.map(|[index]: [u64; 1]| (index != u64::MAX).then_some(index as usize)))
        }
    }
}

simd! {
    fn squares[F: Float](x: &[F]) -> F {
        math::dot(x, x)
    }

    fn probe[F: Float](x: &[F]) -> F {
        math::sum_by(x.len(), |i| x[i] * F::ZERO)
    }
}
