//! Per-token estimators of KL(policy || reference) from the log-probs of sampled tokens.
//! (Schulman 2020, "Approximating KL divergence")

use crate::{
    device::{Device, Float, Later, View, ViewMut, Work, cuda::kernels::kl as kernel},
    error::Result,
    shape,
};

/// With `d = logp - ref`; the kernels know them by number:
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KlEstimator {
    /// `d`: unbiased, may be negative.
    K1 = 1,
    /// `d²/2`: biased, low variance.
    K2 = 2,
    /// `e^-d - 1 + d`: unbiased, never negative.
    K3 = 3,
}

impl KlEstimator {
    /// The estimate of one token, in nats.
    #[inline(always)]
    pub fn value<F: Float>(self, logp: F, reference: F) -> F {
        let d = logp - reference;
        match self {
            Self::K1 => d,
            Self::K2 => F::of(0.5) * d * d,
            Self::K3 => (-d).exp() - F::ONE + d,
        }
    }

    /// Its derivative in `logp`, the token held fixed.
    #[inline(always)]
    pub fn slope<F: Float>(self, logp: F, reference: F) -> F {
        let d = logp - reference;
        match self {
            Self::K1 => F::ONE,
            Self::K2 => d,
            Self::K3 => F::ONE - (-d).exp(),
        }
    }
}

/// Writes `out = scale * k(logp, reference)` `[tokens]`, such as the penalty in the rewards, and
/// returns the sum of the estimates `k` themselves, in nats.
///
/// Reads 2, writes 1 number a token.
pub fn forward<F: Float>(
    dev: &Device,
    out: ViewMut<'_, F>,
    logp: View<'_, F>,
    reference: View<'_, F>,
    estimator: KlEstimator,
    scale: f64,
) -> Result<Later<f64>> {
    let n = logp.len();
    shape::check("kl", "reference", &[n], reference.len())?;
    shape::check("kl", "out", &[n], out.len())?;
    let _op = dev.op("kl", || Work::moves::<F>(3 * n));
    match dev {
        Device::Cpu(_) => {
            let mut sum = 0.0;
            for ((out, l), r) in out.host().iter_mut().zip(logp.host()).zip(reference.host()) {
                let k = estimator.value(l.f64(), r.f64());
                sum += k;
                *out = F::of(scale * k);
            }
            Ok(Later::now(sum))
        }
        Device::Cuda(cuda) => {
            let sums = cuda.sums(n, 0, |launch, partial, share| {
                let (r, k) = (reference, estimator as usize);
                kernel::Forward {
                    out,
                    partial,
                    logp,
                    reference: r,
                    tokens: n,
                    share,
                    estimator: k,
                    scale,
                }
                .launch(cuda, launch)
            })?;
            Ok(sums.map(|[sum]| sum))
        }
    }
}
