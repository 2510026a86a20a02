//! The clipped policy loss of PPO, with KL and entropy terms.  (Schulman et al. 2017, eq. 7;
//! dual clip: Ye et al. 2020, eq. 5)
//!
//! Per token, with `rho = e^(logp - old)`: `max(-A rho, -A clip(rho, 1 - low, 1 + high))`, for
//! A < 0 at most `-c A` under dual clip; plus `kl_coef * k(logp, ref)`, minus
//! `entropy_coef * entropy`.

use super::kl::KlEstimator;
use crate::{
    device::{Cuda, Device, Float, Later, View, ViewMut, Work, cuda::kernels::ppo_loss as kernel},
    error::Result,
    shape,
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
pub struct Settings {
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
pub struct Tokens<'a, F> {
    pub logp: View<'a, F>,
    /// Log-prob when it was sampled.
    pub old_logp: View<'a, F>,
    /// Log-prob under the reference; read with a KL term.
    pub ref_logp: Option<View<'a, F>>,
    /// Entropy of the prediction; read with an entropy bonus.
    pub entropy: Option<View<'a, F>>,
    pub advantages: View<'a, F>,
}

/// Sums over the tokens of a micro-batch; add them up and divide by `tokens`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    pub tokens: f64,
    /// The whole loss, already divided by the denominator.
    pub loss: f64,
    pub policy: f64,
    /// KL estimates of the KL term, without its coefficient.
    pub kl: f64,
    pub entropy: f64,
    /// Tokens whose ratio is below the range and whose clipped branch is the loss.
    pub clipped_low: f64,
    /// Tokens whose ratio is above the range and whose clipped branch is the loss.
    pub clipped_high: f64,
    /// Tokens that dual clip bounds.
    pub dual_clipped: f64,
    /// `(rho - 1) - log rho`: k3 of old against new.
    pub approx_kl: f64,
    pub max_log_ratio: f64,
}

impl Stats {
    /// Adds the next micro-batch.
    pub fn merge(&mut self, o: &Self) {
        self.tokens += o.tokens;
        self.loss += o.loss;
        self.policy += o.policy;
        self.kl += o.kl;
        self.entropy += o.entropy;
        self.clipped_low += o.clipped_low;
        self.clipped_high += o.clipped_high;
        self.dual_clipped += o.dual_clipped;
        self.approx_kl += o.approx_kl;
        // `f64::max` would drop a NaN.
        self.max_log_ratio = self.max_log_ratio.max_nan(o.max_log_ratio);
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
    t: Tokens<'_, F>,
    s: &Settings,
    denominator: f64,
) -> Result<Later<Stats>> {
    const OP: &str = "ppo_loss";
    let n = t.logp.len();
    shape::check(OP, "old_logp", &[n], t.old_logp.len())?;
    shape::check(OP, "advantages", &[n], t.advantages.len())?;
    shape::check(OP, "dlogp", &[n], dlogp.len())?;
    let need = |there: Option<View<'_, F>>| there.map_or(0, |c| c.len());
    if s.kl.is_some() {
        shape::check(OP, "ref_logp", &[n], need(t.ref_logp))?;
    }
    if s.entropy_coef != 0.0 || t.entropy.is_some() {
        shape::check(OP, "entropy", &[n], need(t.entropy))?;
    }
    if let Some(d) = &dentropy {
        shape::check(OP, "dentropy", &[n], d.len())?;
    }
    let _op = dev.op(OP, || {
        let more = [s.kl.is_some(), t.entropy.is_some(), dentropy.is_some()];
        Work::moves::<F>(n * (4 + more.into_iter().filter(|there| *there).count()))
    });
    match dev {
        Device::Cpu(_) => {
            if let Some(d) = dentropy {
                d.host().fill(F::of(-s.entropy_coef / denominator));
            }
            Ok(Later::now(on_cpu(dlogp.host(), &t, s, denominator)))
        }
        Device::Cuda(cuda) => on_cuda(cuda, dlogp, dentropy, &t, s, denominator),
    }
}

fn on_cuda<F: Float>(
    cuda: &Cuda,
    dlogp: ViewMut<'_, F>,
    dentropy: Option<ViewMut<'_, F>>,
    t: &Tokens<'_, F>,
    s: &Settings,
    denominator: f64,
) -> Result<Later<Stats>> {
    let n = t.logp.len();
    let (low, high) = (1.0 - s.clip_low, 1.0 + s.clip_high);
    let dual = s.dual_clip.unwrap_or(f64::INFINITY);
    let reference = t.ref_logp.filter(|_| s.kl.is_some());
    let term = s.kl.map_or((0, 0, 0.0), |k| (k.estimator as usize, k.unbiased.into(), k.coef));
    let (estimator, unbiased, coef) = term;
    let sums = cuda.sums(n, 1, |launch, partial, share| {
        let (logp, old, entropy, adv) = (t.logp, t.old_logp, t.entropy, t.advantages);
        kernel::Forward {
            dlogp,
            dentropy,
            partial,
            logp,
            old_logp: old,
            ref_logp: reference,
            entropy,
            advantages: adv,
            tokens: n,
            share,
            low,
            high,
            dual,
            estimator,
            unbiased,
            kl_coef: coef,
            entropy_coef: s.entropy_coef,
            scale: 1.0 / denominator,
        }
        .launch(cuda, launch)
    })?;
    let tokens = n as f64;
    Ok(sums.map(move |sums| {
        let [loss, policy, kl, entropy, low, high, dual_clipped, approx_kl, max_log_ratio] = sums;
        Stats {
            tokens,
            loss,
            policy,
            kl,
            entropy,
            clipped_low: low,
            clipped_high: high,
            dual_clipped,
            approx_kl,
            max_log_ratio,
        }
    }))
}

fn on_cpu<F: Float>(dlogp: &mut [F], t: &Tokens<'_, F>, s: &Settings, denominator: f64) -> Stats {
    let (logp, old, adv) = (t.logp.host(), t.old_logp.host(), t.advantages.host());
    let (reference, entropy) = (t.ref_logp.map(View::host), t.entropy.map(View::host));
    let n = logp.len();
    let mut stats = Stats { tokens: n as f64, ..Stats::default() };
    // A few numbers a token, against thousands in the model: plain f64 keeps it exact.
    for i in 0..n {
        let log_ratio = logp[i].f64() - old[i].f64();
        let ratio = libm::exp(log_ratio);
        let a = adv[i].f64();
        let (mut loss, mut slope) = clipped(a, ratio, s, &mut stats);
        if let Some(c) = s.dual_clip.filter(|_| a < 0.0) {
            let bound = -a * c;
            if loss > bound {
                (loss, slope) = (bound, 0.0);
                stats.dual_clipped += 1.0;
            }
        }
        stats.policy += loss;
        if let (Some(kl), Some(reference)) = (&s.kl, reference) {
            let (l, r) = (logp[i].f64(), reference[i].f64());
            let (k, dk) = (kl.estimator.value(l, r), kl.estimator.slope(l, r));
            stats.kl += k;
            // The value of the weighted estimate is rho k; its gradient rho (dk + k).
            let (k, dk) = if kl.unbiased { (ratio * k, ratio * (dk + k)) } else { (k, dk) };
            loss += kl.coef * k;
            slope += kl.coef * dk;
        }
        if let Some(entropy) = entropy {
            stats.entropy += entropy[i].f64();
            loss -= s.entropy_coef * entropy[i].f64();
        }
        stats.loss += loss / denominator;
        stats.approx_kl += (ratio - 1.0) - log_ratio;
        let size = log_ratio.abs();
        if size > stats.max_log_ratio || size.is_nan() {
            stats.max_log_ratio = size;
        }
        dlogp[i] = F::of(slope / denominator);
    }
    stats
}

/// The clipped surrogate and its derivative in `logp` (`d rho / d logp = rho`).
fn clipped(a: f64, ratio: f64, s: &Settings, stats: &mut Stats) -> (f64, f64) {
    let (low, high) = (1.0 - s.clip_low, 1.0 + s.clip_high);
    let free = -a * ratio;
    if (low..=high).contains(&ratio) {
        return (free, free);
    }
    let bound = -a * ratio.clamp(low, high);
    if bound > free {
        let count = if ratio < low { &mut stats.clipped_low } else { &mut stats.clipped_high };
        *count += 1.0;
        (bound, 0.0)
    } else if bound < free || ratio.is_nan() {
        (free, free)
    } else {
        (free, 0.5 * free)
    }
}
