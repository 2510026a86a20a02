//! Losses of a policy over the tokens of its own samples: PPO's clipped ratio and its relatives,
//! with KL and entropy terms.
//!
//! With a token's advantage `A` and its ratio `x = e^(logp - old)`, or that of its whole sequence
//! ([`RatioLevel`]), the loss of a token is a [`Surrogate`] of x and A, plus `kl_coef k(logp,
//! ref)`, minus `entropy_coef entropy`. `sg` stops gradients, `S` is the logistic function.
//!
//! A ratio of a sequence gives each of its tokens the derivative that it has in the sum over the
//! sequence, if the advantage is the same for all of them; else GSPO-token's (Zheng et al. 2025,
//! eq. 14).

use std::ops::Range;

use super::{
    kl::KlEstimator,
    sequence_loss::Offsets,
    token_loss::{Sums, sums},
};
use crate::{
    device::{
        Device, Float, Pending, View, ViewMut, Work,
        cuda::{Parts, kernels::policy_loss as kernel},
    },
    error::Result,
    shape,
};

crate::choices! {
    /// Whose ratio the loss of a token reads.
    pub enum RatioLevel {
        /// Its own.
        Token = "token",
        /// `e^` the mean log-ratio of its sequence.  (GSPO: Zheng et al. 2025, eq. 7)
        Sequence = "sequence",
        /// `e^` the sum: the ratio of the sequence's probabilities.  (RLOO as in TRL)
        SequenceSum = "sequence_sum",
    }
}

crate::choices! {
    /// What weighs the estimate of a KL term in the loss.
    pub enum KlWeight {
        /// The token's own ratio, with its gradient: the expected gradient is that of the KL
        /// itself, the score-function part included.  (TRL)
        Ratio = "ratio",
        /// `e^(logp - sg(logp))`: the same gradient as if the ratio were 1.  (NeMo RL)
        Score = "score",
        /// Nothing: k1 has a gradient of mean 0 then, k3 a biased one.  (verl, OpenRLHF)
        One = "one",
    }
}

/// A KL term of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlTerm {
    pub coef: f64,
    pub estimator: KlEstimator,
    pub weight: KlWeight,
}

/// The loss of a token without KL and entropy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Surrogate {
    /// `max(-A x, -A clip(x, 1 - low, 1 + high))`, for A < 0 at most `-dual A`.  (Schulman et al.
    /// 2017, eq. 7; dual clip: Ye et al. 2020, eq. 5)
    Clip { low: f64, high: f64, dual: Option<f64> },
    /// `-A sg(clip(x, 1 - low, 1 + high)) logp`.  (CISPO: MiniMax 2025, eq. 4)
    Cispo { low: f64, high: f64 },
    /// `-A 4/tau S(tau (x - 1))`, tau by the sign of A.  (SAPO: Gao et al. 2025)
    Sapo { positive: f64, negative: f64 },
    /// `-A e^(mean y)` over the sequence, `y = min(log x, high)` of each token for A > 0, else
    /// `max(log x, -low)`.  (GMPO: Zhao et al. 2025)
    Gmpo { low: f64, high: f64 },
    /// `-A sg(e^(lambda + k log w - lambda w)) logp`, `log w` the sum over the sequence of log x,
    /// each within ±20, from log 1e-8 to 20; `[k, lambda]` for A >= 0, and for A < 0.  (VESPO, as
    /// in TRL)
    Vespo { positive: [f64; 2], negative: [f64; 2] },
    /// `-A sg(min(x, cap)) logp`, 0 for a token that moved too far the way that A pushes it: `high`
    /// up, `low` down.  (DPPO, as in verl)
    Dppo { distance: Distance, low: f64, high: f64, cap: f64 },
    /// `-A x`, 0 as in [`Surrogate::Dppo`] by probabilities, plus `square (log x)²` for every
    /// token.  (DPPO, as in prime-rl)
    DppoRatio { low: f64, high: f64, square: f64 },
    /// `-A logp`: no ratio.  (REINFORCE: Williams 1992; GPG, as in verl)
    Likelihood,
}

/// How far the probability `p` of a token is from the `q` that it had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distance {
    /// `|p - q|`, the total variation of being that token or not.
    Tv,
    /// `KL(q || p)` of being that token or not, 1e-8 added to both probabilities of not.
    Kl,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyLoss {
    pub surrogate: Surrogate,
    /// GMPO and VESPO read that of the sequence in a form of their own, and no other.
    pub ratio: RatioLevel,
    /// A token counts as one of its sequence's tokens, which the loss of the sequence is the mean
    /// of; else by itself.
    pub sequence_means: bool,
    /// A KL term in the loss.
    pub kl: Option<KlTerm>,
    /// Weight of the entropy bonus.
    pub entropy_coef: f64,
}

impl Default for PolicyLoss {
    /// PPO's, as in its paper.
    fn default() -> Self {
        Self {
            surrogate: Surrogate::Clip { low: 0.2, high: 0.2, dual: None },
            ratio: RatioLevel::Token,
            sequence_means: false,
            kl: None,
            entropy_coef: 0.0,
        }
    }
}

/// Columns of a micro-batch, `[tokens]` each.
#[derive(Clone, Copy, Debug)]
pub struct PolicyTokens<'a, F> {
    pub logp: View<'a, F>,
    /// Log-prob when it was sampled.
    pub old_logp: View<'a, F>,
    /// Log-prob under the reference; read with a KL term.
    pub ref_logp: Option<View<'a, F>>,
    /// Entropy of the prediction; read with an entropy bonus.
    pub entropy: Option<View<'a, F>>,
    pub advantages: View<'a, F>,
    /// Weight of a token's loss and gradient, 1 without.
    pub weights: Option<View<'a, F>>,
    pub offsets: Offsets<'a>,
}

sums! {
    /// Sums over the tokens of a micro-batch; add them up and divide by `tokens`.
    pub struct PolicySums {
        tokens,
        /// The whole loss, already divided by the denominator.
        loss,
        /// The surrogate.
        policy,
        /// KL estimates of the KL term, without its coefficient.
        kl,
        entropy,
        /// Tokens whose ratio is below the range, where a bound or nothing takes its place.
        clipped_low,
        /// The same above the range.
        clipped_high,
        /// Tokens that dual clip bounds.
        dual_clipped,
        /// `(x - 1) - log x` of the token's own ratio: k3 of old against new.
        approx_kl,
        ;
        /// Of the token's own ratio.
        max_log_ratio,
    }
}

/// Writes d loss / d logp, and d loss / d entropy if there is a column for it, and returns the
/// sums. Every token's loss is divided by `denominator`, a count of the whole optimizer step: of
/// its tokens, or of its sequences with `sequence_means`.
///
/// At a tie of the two branches outside the clip range the gradient is that of PyTorch's
/// `torch.max`: half of each; inside the range both are the same.
///
/// Reads logp, old_logp, advantages and what else is there, once more where the ratio is of
/// sequences; writes one or two columns.
pub fn forward<F: Float>(
    dev: &Device,
    dlogp: ViewMut<'_, F>,
    dentropy: Option<ViewMut<'_, F>>,
    t: PolicyTokens<'_, F>,
    s: &PolicyLoss,
    denominator: f64,
) -> Result<Pending<PolicySums>> {
    const OP: &str = "policy_loss";
    let (tokens, offsets) = (t.logp.len(), t.offsets.host);
    let ref_logp = t.ref_logp.filter(|_| s.kl.is_some());
    let mut elements = 2 * tokens;
    for (name, view, needed) in [
        ("old_logp", Some(t.old_logp), true),
        ("ref_logp", ref_logp, s.kl.is_some()),
        ("entropy", t.entropy, s.entropy_coef != 0.0),
        ("advantages", Some(t.advantages), true),
        ("weights", t.weights, false),
    ] {
        let len = view.map_or(if needed { 0 } else { tokens }, |view| view.len());
        shape::check(OP, name, &[tokens], len)?;
        elements += view.map_or(0, |view| view.len());
    }
    shape::check(OP, "dlogp", &[tokens], dlogp.len())?;
    shape::check(OP, "dentropy", &[tokens], dentropy.as_ref().map_or(tokens, ViewMut::len))?;
    shape::offsets(OP, offsets, tokens)?;
    shape::check(OP, "offsets", &[offsets.len()], t.offsets.view.len())?;
    let _op = dev.op(OP, || Work::moves::<F>(elements));
    match dev {
        Device::Cpu(_) => {
            let (dlogp, mut dentropy) = (dlogp.host(), dentropy.map(ViewMut::host));
            let mut sums = PolicySums::default();
            for span in offsets.windows(2).map(|w| w[0] as usize..w[1] as usize) {
                let whole = s.sequence(&t, span.clone());
                let scale = if s.sequence_means { span.len() as f64 } else { 1.0 } * denominator;
                for i in span {
                    let weight = at(t.weights, i).unwrap_or(1.0);
                    let (slope, more) = s.token(&Numbers::of(&t, i), &whole, scale);
                    sums.add(weight, &more);
                    dlogp[i] = F::of(weight * slope);
                    if let Some(out) = &mut dentropy {
                        out[i] = F::of(weight * -s.entropy_coef / scale);
                    }
                }
            }
            Ok(Pending::now(sums))
        }
        Device::Cuda(cuda) => {
            let parts = Parts::of_blocks(offsets.len().saturating_sub(1));
            let (kind, [p0, p1, p2, p3]) = s.surrogate.code();
            let sums = cuda.sums(parts, PolicySums::MAXIMA, |row, partial, share| {
                kernel::Forward {
                    dlogp,
                    dentropy,
                    partial,
                    logp: t.logp,
                    old_logp: t.old_logp,
                    ref_logp,
                    entropy: t.entropy,
                    advantages: t.advantages,
                    weights: t.weights,
                    offsets: t.offsets.view,
                    sequences: offsets.len().saturating_sub(1),
                    share,
                    kind,
                    p0,
                    p1,
                    p2,
                    p3,
                    level: s.level() as usize,
                    means: s.sequence_means.into(),
                    estimator: s.kl.map_or(0, |kl| kl.estimator as usize),
                    kl_weight: s.kl.map_or(0, |kl| kl.weight as usize),
                    kl_coef: s.kl.map_or(0.0, |kl| kl.coef),
                    entropy_coef: s.entropy_coef,
                    denominator,
                }
                .launch(cuda, row)
            })?;
            Ok(sums.map(PolicySums::of))
        }
    }
}

/// Number `i` of a column that may be absent.
fn at<F: Float>(column: Option<View<'_, F>>, i: usize) -> Option<f64> {
    column.map(|column| column.host()[i].f64())
}

/// What a token's loss is computed from.
struct Numbers {
    logp: f64,
    old: f64,
    reference: f64,
    entropy: f64,
    advantage: f64,
}

impl Numbers {
    fn of<F: Float>(t: &PolicyTokens<'_, F>, i: usize) -> Self {
        Self {
            logp: t.logp.host()[i].f64(),
            old: t.old_logp.host()[i].f64(),
            reference: at(t.ref_logp, i).unwrap_or(0.0),
            entropy: at(t.entropy, i).unwrap_or(0.0),
            advantage: t.advantages.host()[i].f64(),
        }
    }
}

/// The log-ratio of a sequence, as the loss of its tokens reads it, and the factor on each token's
/// derivative.
struct Whole {
    log_ratio: f64,
    gain: f64,
}

impl PolicyLoss {
    fn level(&self) -> RatioLevel {
        match self.surrogate {
            Surrogate::Gmpo { .. } => RatioLevel::Sequence,
            Surrogate::Vespo { .. } => RatioLevel::SequenceSum,
            _ => self.ratio,
        }
    }

    fn sequence<F: Float>(&self, t: &PolicyTokens<'_, F>, span: Range<usize>) -> Whole {
        let (n, level) = (span.len() as f64, self.level());
        if level == RatioLevel::Token {
            return Whole { log_ratio: 0.0, gain: 1.0 };
        }
        let parts = span.map(|i| {
            let x = Numbers::of(t, i);
            self.surrogate.part(x.logp - x.old, x.advantage)
        });
        let sum: f64 = parts.sum();
        match level {
            RatioLevel::Sequence => Whole { log_ratio: sum / n, gain: 1.0 },
            _ => Whole { log_ratio: sum, gain: n },
        }
    }

    /// The derivative in a token's log-prob, and its sums.
    fn token(&self, x: &Numbers, whole: &Whole, scale: f64) -> (f64, PolicySums) {
        let own = x.logp - x.old;
        let own_ratio = libm::exp(own);
        let mut sums = PolicySums {
            tokens: 1.0,
            entropy: x.entropy,
            approx_kl: (own_ratio - 1.0) - own,
            max_log_ratio: own.abs(),
            ..PolicySums::default()
        };
        let (mut loss, mut slope) = match self.level() {
            RatioLevel::Token => self.surrogate.value(x, own, 1.0, &mut sums),
            _ => self.surrogate.value(x, whole.log_ratio, whole.gain, &mut sums),
        };
        sums.policy = loss;
        if let Some(kl) = &self.kl {
            let k = kl.estimator.value(x.logp, x.reference);
            let dk = kl.estimator.slope(x.logp, x.reference);
            sums.kl = k;
            let (k, dk) = match kl.weight {
                // The value of the weighted estimate is x k; its gradient x (dk + k).
                KlWeight::Ratio => (own_ratio * k, own_ratio * (dk + k)),
                KlWeight::Score => (k, dk + k),
                KlWeight::One => (k, dk),
            };
            loss += kl.coef * k;
            slope += kl.coef * dk;
        }
        loss -= self.entropy_coef * x.entropy;
        sums.loss = loss / scale;
        (slope / scale, sums)
    }
}

/// Bounds of a log-ratio in VESPO.
const MOST: f64 = 20.0;
/// The log of the least weight there, 1e-8.
const LEAST: f64 = -18.420680743952367;

impl Surrogate {
    /// Its number in the kernel, and its numbers.
    fn code(&self) -> (usize, [f64; 4]) {
        match *self {
            Self::Clip { low, high, dual } => {
                (0, [1.0 - low, 1.0 + high, dual.unwrap_or(f64::INFINITY), 0.0])
            }
            Self::Cispo { low, high } => (1, [1.0 - low, 1.0 + high, 0.0, 0.0]),
            Self::Sapo { positive, negative } => (2, [positive, negative, 0.0, 0.0]),
            Self::Gmpo { low, high } => (3, [low, high, 0.0, 0.0]),
            Self::Vespo { positive: [a, b], negative: [c, d] } => (4, [a, b, c, d]),
            Self::Dppo { distance: Distance::Tv, low, high, cap } => (5, [low, high, cap, 0.0]),
            Self::Dppo { distance: Distance::Kl, low, high, cap } => (6, [low, high, cap, 0.0]),
            Self::DppoRatio { low, high, square } => (7, [low, high, square, 0.0]),
            Self::Likelihood => (8, [0.0; 4]),
        }
    }

    /// What a token adds to the log-ratio of its sequence.
    fn part(&self, log_ratio: f64, a: f64) -> f64 {
        match *self {
            Self::Gmpo { high, .. } if a > 0.0 && log_ratio > high => high,
            Self::Gmpo { low, .. } if a <= 0.0 && log_ratio < -low => -low,
            Self::Vespo { .. } => log_ratio.clamp(-MOST, MOST),
            _ => log_ratio,
        }
    }

    /// The loss and its derivative in the log-prob, with the log-ratio that the level gives.
    fn value(&self, x: &Numbers, log_ratio: f64, gain: f64, sums: &mut PolicySums) -> (f64, f64) {
        let (a, ratio) = (x.advantage, libm::exp(log_ratio));
        let free = -a * ratio;
        match *self {
            Self::Clip { low, high, dual } => {
                let (loss, slope) = clipped(a, ratio, [1.0 - low, 1.0 + high], sums);
                match dual.filter(|_| a < 0.0).map(|c| -a * c).filter(|b| loss > *b) {
                    Some(bound) => {
                        sums.dual_clipped = 1.0;
                        (bound, 0.0)
                    }
                    None => (loss, gain * slope),
                }
            }
            Self::Cispo { low, high } => {
                let (low, high) = (1.0 - low, 1.0 + high);
                sums.clipped_low = f64::from(u8::from(ratio < low));
                sums.clipped_high = f64::from(u8::from(ratio > high));
                let slope = -a * ratio.clamp(low, high);
                (slope * x.logp, slope)
            }
            Self::Sapo { positive, negative } => {
                let tau = if a > 0.0 { positive } else { negative };
                let e = libm::exp(-tau * (ratio - 1.0));
                let (s, rest) = (1.0 / (1.0 + e), e / (1.0 + e));
                (-a * (4.0 / tau) * s, gain * (-a * 4.0 * s * rest * ratio))
            }
            Self::Gmpo { low, high } => {
                let own = x.logp - x.old;
                let (above, below) = (a > 0.0 && own > high, a <= 0.0 && own < -low);
                sums.clipped_low = f64::from(u8::from(below));
                sums.clipped_high = f64::from(u8::from(above));
                (free, if above || below { 0.0 } else { free })
            }
            Self::Vespo { positive, negative } => {
                let [k, lambda] = if a >= 0.0 { positive } else { negative };
                let log_w = log_ratio.clamp(LEAST, MOST);
                let slope = -a * libm::exp(lambda + k * log_w - lambda * libm::exp(log_w));
                (slope * x.logp, slope)
            }
            Self::Dppo { distance, low, high, cap } => {
                if masked(x, distance, [low, high], sums) {
                    return (0.0, 0.0);
                }
                let slope = -a * if ratio > cap { cap } else { ratio };
                (slope * x.logp, slope)
            }
            Self::Likelihood => (-a * x.logp, -a),
            Self::DppoRatio { low, high, square } => {
                let masked = masked(x, Distance::Tv, [low, high], sums);
                let kept = if masked { 0.0 } else { free };
                let squares = square * log_ratio * log_ratio;
                (kept + squares, gain * (kept + 2.0 * square * log_ratio))
            }
        }
    }
}

/// The clipped surrogate and its derivative in `logp` (`d x / d logp = x`).
fn clipped(a: f64, ratio: f64, [low, high]: [f64; 2], sums: &mut PolicySums) -> (f64, f64) {
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

/// Whether DPPO drops a token, counted. One that is no number is kept, and so seen.
fn masked(x: &Numbers, distance: Distance, [low, high]: [f64; 2], sums: &mut PolicySums) -> bool {
    let (p, q) = (libm::exp(x.logp), libm::exp(x.old));
    // How far up, and how far down.
    let [up, down] = match distance {
        Distance::Tv => [p - q, q - p],
        Distance::Kl => {
            let rest = libm::log((1.0 - q + 1e-8) / (1.0 - p + 1e-8));
            let kl = q * (x.old - x.logp) + (1.0 - q) * rest;
            [if p > q { kl } else { 0.0 }, if p < q { kl } else { 0.0 }]
        }
    };
    let (above, below) = (x.advantage > 0.0 && up > high, x.advantage <= 0.0 && down > low);
    sums.clipped_high = f64::from(u8::from(above));
    sums.clipped_low = f64::from(u8::from(below));
    above || below
}
