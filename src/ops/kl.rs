//! Per-token estimators of KL(policy || reference) from the log-probs of sampled tokens.
//! (Schulman 2020, "Approximating KL divergence")

use crate::device::Float;

/// An estimator, with `d = logp - ref`. The kernels know it by its number.
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

    /// The derivative of the estimate in `logp`, the token held fixed.
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
