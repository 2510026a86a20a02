//! The clipped policy loss of PPO, with KL and entropy terms.  (Schulman et al. 2017, eq. 7;
//! dual clip: Ye et al. 2020, eq. 5)
//!
//! Per token, with `rho = e^(logp - old)`: `max(-A rho, -A clip(rho, 1 - low, 1 + high))`, for
//! A < 0 at most `-c A` under dual clip; plus `kl_coef * k(logp, ref)`, minus
//! `entropy_coef * entropy`.

use super::{
    kl::KlEstimator,
    token_loss::{Input, TokenLoss, sums},
};
use crate::{
    device::{Device, Float, Pending, View, ViewMut, cuda::kernels::ppo_loss as kernel},
    error::Result,
};

/// The loss of a KL term.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlTerm {
    pub coef: f64,
    pub estimator: KlEstimator,
    /// Weights each estimate by `rho` (importance sampling), so that the expected gradient is that
    /// of the KL itself, the score-function part included. Without it, k1 has a gradient of mean 0
    /// and k3 a biased one.
    pub unbiased: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PpoLoss {
    /// Clip below `1 - clip_low` (0.2 in TRL, OpenRLHF, verl).
    pub clip_low: f64,
    /// Clip above `1 + clip_high`.
    pub clip_high: f64,
    /// Bound of the loss for negative advantages, as a multiple of -A (3 in verl; off elsewhere).
    pub dual_clip: Option<f64>,
    /// A KL term in the loss.
    pub kl: Option<KlTerm>,
    /// Weight of the entropy bonus.
    pub entropy_coef: f64,
}

/// Columns of a micro-batch, `[tokens]` each.
#[derive(Clone, Copy, Debug)]
pub struct PpoTokens<'a, F> {
    pub logp: View<'a, F>,
    /// Log-prob when it was sampled.
    pub old_logp: View<'a, F>,
    /// Log-prob under the reference; read with a KL term.
    pub ref_logp: Option<View<'a, F>>,
    /// Entropy of the prediction; read with an entropy bonus.
    pub entropy: Option<View<'a, F>>,
    pub advantages: View<'a, F>,
    pub weights: Option<View<'a, F>>,
}

sums! {
    /// Sums over the tokens of a micro-batch; add them up and divide by `tokens`.
    pub struct PpoSums {
        tokens,
        /// The whole loss, already divided by the denominator.
        loss,
        policy,
        /// KL estimates of the KL term, without its coefficient.
        kl,
        entropy,
        /// Tokens whose ratio is below the range and whose clipped branch is the loss.
        clipped_low,
        /// Tokens whose ratio is above the range and whose clipped branch is the loss.
        clipped_high,
        /// Tokens that dual clip bounds.
        dual_clipped,
        /// `(rho - 1) - log rho`: k3 of old against new.
        approx_kl,
        ;
        max_log_ratio,
    }
}

/// Writes d loss / d logp, and d loss / d entropy if there is a column for it, and returns the
/// sums. Every token's loss is divided by `denominator`, the token count of the whole optimizer
/// step.
///
/// At a tie of the two branches outside the clip range the gradient is that of PyTorch's
/// `torch.max`: half of each; inside the range both are the same.
///
/// Reads logp, old_logp, advantages and what else is there, writes one or two columns.
pub fn policy<F: Float>(
    dev: &Device,
    dlogp: ViewMut<'_, F>,
    dentropy: Option<ViewMut<'_, F>>,
    t: PpoTokens<'_, F>,
    s: &PpoLoss,
    denominator: f64,
) -> Result<Pending<PpoSums>> {
    let tokens = t.logp.len();
    let ref_logp = t.ref_logp.filter(|_| s.kl.is_some());
    let loss = TokenLoss {
        op: "ppo_loss",
        tokens,
        inputs: [
            Input::new("logp", t.logp),
            Input::new("old_logp", t.old_logp),
            Input::optional("ref_logp", ref_logp, s.kl.is_some()),
            Input::optional("entropy", t.entropy, s.entropy_coef != 0.0),
            Input::new("advantages", t.advantages),
        ],
        weights: t.weights,
        grads: [("dlogp", Some(dlogp)), ("dentropy", dentropy)],
    };
    loss.run(
        dev,
        |x| token(s, denominator, x),
        |to| {
            let [dlogp, dentropy] = to.grads;
            kernel::Forward {
                dlogp,
                dentropy,
                partial: to.partial,
                logp: t.logp,
                old_logp: t.old_logp,
                ref_logp,
                entropy: t.entropy,
                advantages: t.advantages,
                weights: t.weights,
                tokens,
                share: to.share,
                low: 1.0 - s.clip_low,
                high: 1.0 + s.clip_high,
                dual: s.dual_clip.unwrap_or(f64::INFINITY),
                estimator: s.kl.map_or(0, |kl| kl.estimator as usize),
                unbiased: s.kl.is_some_and(|kl| kl.unbiased).into(),
                kl_coef: s.kl.map_or(0.0, |kl| kl.coef),
                entropy_coef: s.entropy_coef,
                scale: 1.0 / denominator,
            }
            .launch(to.cuda, to.launch)
        },
    )
}

fn token(s: &PpoLoss, denominator: f64, x: [f64; 5]) -> ([f64; 2], PpoSums) {
    let [logp, old, reference, entropy, a] = x;
    let log_ratio = logp - old;
    let ratio = libm::exp(log_ratio);
    let mut sums = PpoSums {
        tokens: 1.0,
        entropy,
        approx_kl: (ratio - 1.0) - log_ratio,
        max_log_ratio: log_ratio.abs(),
        ..PpoSums::default()
    };
    let (mut loss, mut slope) = clipped(a, ratio, s, &mut sums);
    if let Some(bound) = s.dual_clip.filter(|_| a < 0.0).map(|c| -a * c).filter(|b| loss > *b) {
        (loss, slope, sums.dual_clipped) = (bound, 0.0, 1.0);
    }
    sums.policy = loss;
    if let Some(kl) = &s.kl {
        let (k, dk) = (kl.estimator.value(logp, reference), kl.estimator.slope(logp, reference));
        sums.kl = k;
        // The value of the weighted estimate is rho k; its gradient rho (dk + k).
        let (k, dk) = if kl.unbiased { (ratio * k, ratio * (dk + k)) } else { (k, dk) };
        loss += kl.coef * k;
        slope += kl.coef * dk;
    }
    loss -= s.entropy_coef * entropy;
    sums.loss = loss / denominator;
    ([slope / denominator, -s.entropy_coef / denominator], sums)
}

/// The clipped surrogate and its derivative in `logp` (`d rho / d logp = rho`).
fn clipped(a: f64, ratio: f64, s: &PpoLoss, sums: &mut PpoSums) -> (f64, f64) {
    let (low, high) = (1.0 - s.clip_low, 1.0 + s.clip_high);
    let free = -a * ratio;
    if (low..=high).contains(&ratio) {
        return (free, free);
    }
    let bound = -a * ratio.clamp(low, high);
    if bound > free {
        *(if ratio < low { &mut sums.clipped_low } else { &mut sums.clipped_high }) = 1.0;
        (bound, 0.0)
    } else if bound < free || ratio.is_nan() {
        (free, free)
    } else {
        (free, 0.5 * free)
    }
}
