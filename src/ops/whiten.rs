//! Whitening: to mean 0 and variance 1 over all tokens of a step. Columns are packed, so there is
//! no mask to forget.

use crate::{
    device::{Device, Float, View, ViewMut},
    error::Result,
};

/// Which variance.
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
    /// Numbers seen.
    pub count: f64,
    /// Their mean.
    pub mean: f64,
    /// Sum of their squared deviations from it.
    pub squares: f64,
}

impl Moments {
    /// The moments of a column, in two passes in f64.
    #[must_use]
    pub fn of<F: Float>(x: View<'_, F>) -> Self {
        let x = x.host();
        if x.is_empty() {
            return Self::default();
        }
        let count = x.len() as f64;
        let mean = x.iter().map(|x| x.f64()).sum::<f64>() / count;
        let squares = x.iter().map(|x| (x.f64() - mean) * (x.f64() - mean)).sum();
        Self { count, mean, squares }
    }

    /// The variance; 0 where it is not defined.
    #[must_use]
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
/// # Errors
/// None; the signature is that of an op.
pub fn apply<F: Float>(
    dev: &Device,
    x: ViewMut<'_, F>,
    moments: &Moments,
    shift_mean: bool,
    variance: Variance,
    eps: f64,
) -> Result<()> {
    dev.on_cpu("whiten")?;
    let rstd = 1.0 / (moments.variance(variance) + eps).sqrt();
    let back = if shift_mean { 0.0 } else { moments.mean };
    for x in x.host() {
        *x = F::of((x.f64() - moments.mean) * rstd + back);
    }
    Ok(())
}
