//! Whitening: to mean 0 and variance 1 over all tokens of a step. Columns are packed, so there is
//! no mask to forget.

use crate::{
    device::{
        Device, Float, View, ViewMut, Work,
        cuda::{Launch, Parts, kernels::whiten as kernel},
    },
    error::Result,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variance {
    /// Divided by n (N+ details, OpenRLHF).
    Biased,
    /// Divided by n - 1 (TRL, verl).
    Unbiased,
}

/// Count, mean and sum of squared deviations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    pub count: f64,
    pub mean: f64,
    /// Sum of their squared deviations from it.
    pub squares: f64,
}

impl Moments {
    /// The moments of a column in f64, as exact as in two passes; on the CPU in two.
    ///
    /// Reads x once.
    pub fn of<F: Float>(dev: &Device, x: View<'_, F>) -> Result<Self> {
        let n = x.len();
        if n == 0 {
            return Ok(Self::default());
        }
        let _op = dev.op("whiten::moments", || Work::moves::<F>(n));
        match dev {
            Device::Cpu(_) => {
                let (x, count) = (x.host(), n as f64);
                let mean = x.iter().map(|x| x.f64()).sum::<f64>() / count;
                let squares = x.iter().map(|x| (x.f64() - mean) * (x.f64() - mean)).sum();
                Ok(Self { count, mean, squares })
            }
            Device::Cuda(cuda) => {
                let (parts, room) = (Parts::of(n), kernel::THREADS / 32 * 8);
                let sums = cuda.reduce(parts.count, |moments, mut partial| {
                    let (launch, to) = (Launch::row(parts.count, room)?, partial.reborrow());
                    kernel::Partial { partial: to, x, tokens: n, share: parts.share }
                        .launch(cuda, launch)?;
                    let (launch, partial) = (Launch::row(1, room)?, partial.view());
                    kernel::Moments { moments, partial, parts: parts.count }.launch(cuda, launch)
                })?;
                let [count, mean, squares] = sums.get()?;
                Ok(Self { count, mean, squares })
            }
        }
    }

    /// The variance; 0 where it is not defined.
    pub fn variance(&self, kind: Variance) -> f64 {
        let n = match kind {
            Variance::Biased => self.count,
            Variance::Unbiased => self.count - 1.0,
        };
        if n > 0.0 { self.squares / n } else { 0.0 }
    }
}

/// `x = (x - mean) / sqrt(variance + eps)`, plus the mean again unless `shift_mean`.
/// (`eps` = 1e-8 in TRL, verl and OpenRLHF.)
///
/// Reads and writes x.
pub fn apply<F: Float>(
    dev: &Device,
    x: ViewMut<'_, F>,
    moments: &Moments,
    shift_mean: bool,
    variance: Variance,
    eps: f64,
) -> Result<()> {
    let rstd = 1.0 / (moments.variance(variance) + eps).sqrt();
    let back = if shift_mean { 0.0 } else { moments.mean };
    let _op = dev.op("whiten", || Work::moves::<F>(2 * x.len()));
    match dev {
        Device::Cpu(_) => {
            for x in x.host() {
                *x = F::of((x.f64() - moments.mean) * rstd + back);
            }
            Ok(())
        }
        Device::Cuda(cuda) => {
            let (n, parts) = (x.len(), Parts::of(x.len()));
            let launch = Launch::row(parts.count, 0)?;
            kernel::Apply { x, tokens: n, share: parts.share, mean: moments.mean, rstd, back }
                .launch(cuda, launch)
        }
    }
}
