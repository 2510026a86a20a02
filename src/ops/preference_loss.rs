//! Losses on pairs of completions of which people preferred the first, over the log-probs of whole
//! completions: DPO, its relatives, and those without a reference.
//!
//! A completion's log-ratio is `D = sum_t w_t (logp_t - ref_t)`, its mean `D / n` in some kinds; a
//! divergence other than the reverse KL reshapes it to `s(D)`. With `a` of the chosen, `b` of the
//! rejected completion and `z = beta (a - b) - margin`, `e` the label smoothing and `S` the
//! logistic function, a pair's loss is a weighted sum of the kinds in [`PreferenceKind`], plus
//! `sft_coef` times the mean negative log-likelihood of the chosen tokens.

use super::{
    sequence_loss::{SequenceColumns, SequenceGrads, SequenceLoss, SequenceSums},
    token_loss::sums,
};
use crate::{
    device::{Device, Float, Pending, View, ViewMut, cuda::kernels::preference_loss as kernel},
    error::{Error, Result},
};

/// A loss of a pair. Numbers are those of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreferenceKind {
    /// `-(1 - e) log S(z) - e log S(-z)`  (DPO: Rafailov et al. 2023, eq. 7; e: Mitchell 2023)
    Sigmoid = 1,
    /// The same of means over tokens.  (SimPO: Meng et al. 2024, eq. 6)
    SigmoidNorm,
    /// `max(0, 1 - z)`  (SLiC: Zhao et al. 2023)
    Hinge,
    /// `(a - b - 1 / (2 beta))²` of means over tokens.  (Azar et al. 2023, eq. 17; as in TRL)
    Ipo,
    /// The same of sums.  (As in OpenRLHF)
    IpoSum,
    /// `(-(1 - e) log S(z) + e log S(-z)) / (1 - 2 e)`  (Chowdhury et al. 2024)
    Robust,
    /// `KL((S(z), S(-z)) || (1 - e, e))`, e 0.001 if there is none.  (EXO: Ji et al. 2024, eq. 16)
    ExoPair,
    /// `-log S(beta a) - log S(-beta a) / 2 - log S(-beta b) / 2`  (NCA: Chen et al. 2024)
    NcaPair,
    /// `-log S(beta a) - log S(-beta b)`  (BCO without its running mean: Jung et al. 2024)
    BcoPair,
    /// `(a - 1 / (2 beta))² + (b + 1 / (2 beta))²`  (SPPO: Wu et al. 2024)
    SppoHard,
    /// `1 - S(beta a) + S(beta b)`  (APO: D'Oosterlinck et al. 2024)
    ApoZero,
    /// `S(beta a) + 1 - S(beta (a - b))`  (ibid.)
    ApoDown,
    /// `(1 - w) (-log S(z)) + w e^-z, w = S(z / tau)`  (DiscoPOP: Lu et al. 2024)
    Discopop,
    /// `-beta log S(l(a) - l(b))`, l the log odds of `e^` the mean.  (Hong et al. 2024, eq. 7)
    OddsRatio,
}

/// The shape that a divergence gives to log-ratios.  (Wang et al. 2023, table 1)
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Divergence {
    /// `d`
    ReverseKl,
    /// `1 - e^-d`
    ForwardKl,
    /// `log 2 + log S(d)`
    JensenShannon,
    /// `(e^((alpha - 1) d) - 1) / (alpha - 1)`
    Alpha(f64),
}

/// The loss of a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct PreferenceLoss {
    /// Kinds and their weights, at most [`TERMS`].
    pub terms: Vec<(PreferenceKind, f64)>,
    pub beta: f64,
    pub label_smoothing: f64,
    /// Wanted of every `z`, beside a pair's own margin.
    pub margin: f64,
    pub divergence: Divergence,
    /// Temperature of DiscoPOP's mixture.
    pub tau: f64,
    /// Weighs a pair by the policy's own mean probability of it, `min(1, e^(mean logp of the chosen
    /// + mean logp of the rejected))`, without a gradient.  (WPO: Zhou et al. 2024, eq. 4)
    pub wpo: bool,
    /// Weight of the mean negative log-likelihood of the chosen tokens.
    pub sft_coef: f64,
}

impl Default for PreferenceLoss {
    /// DPO as in its paper.
    fn default() -> Self {
        Self {
            terms: vec![(PreferenceKind::Sigmoid, 1.0)],
            beta: 0.1,
            label_smoothing: 0.0,
            margin: 0.0,
            divergence: Divergence::ReverseKl,
            tau: 0.05,
            wpo: false,
            sft_coef: 0.0,
        }
    }
}

/// Kinds that one loss may have.
pub const TERMS: usize = 3;

/// Counts of the whole optimizer step, which means divide by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairCounts {
    pub pairs: f64,
    /// Tokens of all chosen completions.
    pub chosen_tokens: f64,
}

sums! {
    /// Sums over the pairs of a micro-batch.
    pub struct PreferenceSums {
        pairs,
        /// The loss, divided by its counts.
        loss,
        /// Pairs whose chosen completion has the larger reward.
        right,
        /// `beta` times the log-ratio of the first kind, before its divergence.
        chosen_reward,
        rejected_reward,
        /// Log-prob of all tokens of the completion.
        chosen_logp,
        rejected_logp,
        /// The pairs' weights of WPO.
        weight,
    }
}

/// Writes `dlogp` `[tokens]` and returns the sums. The sequences are chosen, rejected, chosen, ...;
/// `margins` `[pairs]` are subtracted from `z`.
///
/// Reads up to 4 columns of tokens, writes one.
///
/// # Errors
/// [`Error::Value`] for more than [`TERMS`] kinds.
pub fn forward<F: Float>(
    dev: &Device,
    dlogp: ViewMut<'_, F>,
    columns: SequenceColumns<'_, F>,
    margins: Option<View<'_, F>>,
    s: &PreferenceLoss,
    of: PairCounts,
) -> Result<Pending<PreferenceSums>> {
    const OP: &str = "preference_loss";
    if s.terms.len() > TERMS {
        let want = format!("at most {TERMS}");
        return Err(Error::value(format!("{OP}: kinds"), want, s.terms.len()));
    }
    let loss = SequenceLoss { op: OP, columns, single: ("margins", margins), dlogp };
    loss.run(
        dev,
        |x, margin| pair(s, of, x, margin),
        |to| {
            let term = |i: usize| s.terms.get(i).map_or((0, 0.0), |(kind, w)| (*kind as u32, *w));
            let [(kind0, weight0), (kind1, weight1), (kind2, weight2)] = [0, 1, 2].map(term);
            let (divergence, alpha) = match s.divergence {
                Divergence::ReverseKl => (0, 1.0),
                Divergence::ForwardKl => (1, 1.0),
                Divergence::JensenShannon => (2, 1.0),
                Divergence::Alpha(alpha) => (3, alpha),
            };
            kernel::Forward {
                dlogp: to.dlogp,
                partial: to.partial,
                logp: columns.logp,
                ref_logp: columns.ref_logp,
                weights: columns.weights,
                offsets: columns.offsets.view,
                margins,
                units: to.units,
                share: to.share,
                kinds: kind0 | kind1 << 8 | kind2 << 16,
                weight0,
                weight1,
                weight2,
                divergence,
                alpha,
                wpo: usize::from(s.wpo),
                beta: s.beta,
                smoothing: s.label_smoothing,
                margin: s.margin,
                tau: s.tau,
                scale: 1.0 / of.pairs,
                sft: s.sft_coef / of.chosen_tokens,
            }
            .launch(to.cuda, to.launch)
        },
    )
}

/// `-log S(x)`, written so that neither sign overflows.
fn softplus_minus(x: f64) -> f64 {
    (-x).max_nan(0.0) + libm::log1p(libm::exp(-x.abs()))
}

/// The logistic function.
fn logistic(x: f64) -> f64 {
    let e = libm::exp(-x.abs());
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

impl Divergence {
    /// `s(d)` and its derivative.
    fn shape(self, d: f64) -> (f64, f64) {
        match self {
            Self::ReverseKl => (d, 1.0),
            Self::ForwardKl => (-libm::expm1(-d), libm::exp(-d)),
            Self::JensenShannon => (std::f64::consts::LN_2 - softplus_minus(d), logistic(-d)),
            Self::Alpha(1.0) => (d, 1.0),
            Self::Alpha(alpha) => {
                let c = alpha - 1.0;
                (libm::expm1(c * d) / c, libm::exp(c * d))
            }
        }
    }
}

impl PreferenceKind {
    /// It compares means over tokens.
    fn normalises(self) -> bool {
        matches!(self, Self::SigmoidNorm | Self::Ipo | Self::OddsRatio)
    }

    /// Whether a pair's margin has a meaning in it: it is a function of `z`.
    pub fn has_margin(self) -> bool {
        use PreferenceKind::{Discopop, ExoPair, Hinge, Robust, Sigmoid, SigmoidNorm};
        matches!(self, Sigmoid | SigmoidNorm | Hinge | Robust | ExoPair | Discopop)
    }

    /// The loss, and its derivatives in `a` and `b`.
    fn value(self, s: &PreferenceLoss, a: f64, b: f64, margin: f64) -> (f64, f64, f64) {
        let (beta, e) = (s.beta, s.label_smoothing);
        let z = beta * (a - b) - margin;
        let of_z = |(loss, dz): (f64, f64)| (loss, beta * dz, -beta * dz);
        let (right, wrong) = (logistic(z), logistic(-z));
        match self {
            Self::Sigmoid | Self::SigmoidNorm => of_z((
                (1.0 - e) * softplus_minus(z) + e * softplus_minus(-z),
                e * right - (1.0 - e) * wrong,
            )),
            // A NaN is not at least 1.
            Self::Hinge => of_z(if z >= 1.0 { (0.0, 0.0) } else { (1.0 - z, -1.0) }),
            Self::Ipo | Self::IpoSum => {
                let off = a - b - 0.5 / beta;
                (off * off, 2.0 * off, -2.0 * off)
            }
            Self::Robust => of_z((
                ((1.0 - e) * softplus_minus(z) - e * softplus_minus(-z)) / (1.0 - 2.0 * e),
                (-e * right - (1.0 - e) * wrong) / (1.0 - 2.0 * e),
            )),
            Self::ExoPair => {
                let e = if e > 0.0 { e } else { 1e-3 };
                let (no, yes) = (libm::log(e), libm::log1p(-e));
                let loss = right * (-softplus_minus(z) - yes) + wrong * (-softplus_minus(-z) - no);
                of_z((loss, right * wrong * (z - yes + no)))
            }
            Self::NcaPair => {
                let (up, down) = (logistic(beta * a), logistic(-beta * a));
                let half = 0.5 * (softplus_minus(-beta * a) + softplus_minus(-beta * b));
                let loss = softplus_minus(beta * a) + half;
                (loss, beta * (0.5 * up - down), 0.5 * beta * logistic(beta * b))
            }
            Self::BcoPair => {
                let loss = softplus_minus(beta * a) + softplus_minus(-beta * b);
                (loss, -beta * logistic(-beta * a), beta * logistic(beta * b))
            }
            Self::SppoHard => {
                let (c, r) = (a - 0.5 / beta, b + 0.5 / beta);
                (c * c + r * r, 2.0 * c, 2.0 * r)
            }
            Self::ApoZero => {
                let [(c, no_c), (r, no_r)] =
                    [a, b].map(|x| (logistic(beta * x), logistic(-beta * x)));
                (no_c + r, -beta * c * no_c, beta * r * no_r)
            }
            Self::ApoDown => {
                let (c, no_c) = (logistic(beta * a), logistic(-beta * a));
                let d = beta * right * wrong;
                (c + wrong, beta * c * no_c - d, d)
            }
            Self::Discopop => {
                let (w, log, slope) = (logistic(z / s.tau), softplus_minus(z), wrong);
                // w e^-z, where e^-z alone may overflow
                let tail = libm::exp(-softplus_minus(z / s.tau) - z);
                let dw = w * logistic(-z / s.tau) / s.tau;
                let d_tail = tail * (logistic(-z / s.tau) / s.tau - 1.0);
                of_z(((1.0 - w) * log + tail, -dw * log - (1.0 - w) * slope + d_tail))
            }
            Self::OddsRatio => {
                // 1 - p of p = e^x
                let [c, r] = [a, b].map(|x| -libm::expm1(x));
                let odds = (a - b) - (libm::log(c) - libm::log(r));
                // Not by way of the odds, which are 0 / 0 where the chosen one is certain.
                let d = beta / (c + libm::exp(a - b) * r);
                (beta * softplus_minus(odds), -d, d * c / r)
            }
        }
    }
}

/// The derivatives and sums of a pair of sequences, the chosen one first, and of its own margin.
pub fn pair(
    s: &PreferenceLoss,
    of: PairCounts,
    [c, r]: [SequenceSums; 2],
    margin: f64,
) -> ([SequenceGrads; 2], PreferenceSums) {
    let (mut loss, mut dc, mut dr) = (0.0, 0.0, 0.0);
    let lens = |kind: PreferenceKind| match kind.normalises() {
        true => [c.tokens, r.tokens],
        false => [1.0; 2],
    };
    for &(kind, weight) in &s.terms {
        let [nc, nr] = lens(kind);
        let (a, slope_a) = s.divergence.shape(c.ratio / nc);
        let (b, slope_b) = s.divergence.shape(r.ratio / nr);
        let (value, da, db) = kind.value(s, a, b, margin + s.margin);
        loss += weight * value;
        dc += weight * da * slope_a / nc;
        dr += weight * db * slope_b / nr;
    }
    let weight = match s.wpo {
        // NaN stays, as in `f64::min` it would not.
        true => libm::exp(-(-(c.logp / c.tokens + r.logp / r.tokens)).max_nan(0.0)),
        false => 1.0,
    };
    let scale = weight / of.pairs;
    let sft = s.sft_coef / of.chosen_tokens;
    let [nc, nr] = s.terms.first().map_or([1.0; 2], |(kind, _)| lens(*kind));
    let (chosen_reward, rejected_reward) = (s.beta * c.ratio / nc, s.beta * r.ratio / nr);
    let sums = PreferenceSums {
        pairs: 1.0,
        loss: scale * loss - sft * c.logp,
        right: f64::from(u8::from(chosen_reward > rejected_reward)),
        chosen_reward,
        rejected_reward,
        chosen_logp: c.logp,
        rejected_logp: r.logp,
        weight,
    };
    let chosen = SequenceGrads { ratio: scale * dc, logp: -sft };
    ([chosen, SequenceGrads { ratio: scale * dr, logp: 0.0 }], sums)
}
