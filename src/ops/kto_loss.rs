//! Kahneman-Tversky optimisation: a loss of single completions that people called good or bad.
//! (Ethayarajh et al. 2024, eq. 7 and 8)
//!
//! With a completion's log-ratio `D`, the KL estimate `z` and the logistic function `S`: a good one
//! loses `w (1 - S(beta (D - z)))`, a bad one `w' (1 - S(beta (z - D)))`, mean over completions.

use super::{
    sequence_loss::{SequenceColumns, SequenceGrads, SequenceLoss, SequenceSums},
    token_loss::sums,
};
use crate::{
    device::{Device, Float, Pending, View, ViewMut, cuda::kernels::kto_loss as kernel},
    error::Result,
};

/// The loss of a completion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KtoLoss {
    pub beta: f64,
    /// Estimate of the KL to the reference, in nats.
    pub kl: f64,
    /// Weight of a good completion.
    pub desirable: f64,
    /// Weight of a bad completion.
    pub undesirable: f64,
}

sums! {
    /// Sums over the completions of a micro-batch.
    pub struct KtoSums {
        completions,
        /// The loss, divided by the denominator.
        loss,
        /// Good completions.
        desirable,
        /// `beta D` of good completions, and of bad ones.
        desirable_reward,
        undesirable_reward,
        /// Log-prob of good completions, and of bad ones.
        desirable_logp,
        undesirable_logp,
    }
}

/// Writes `dlogp` `[tokens]` and returns the sums. `labels` `[completions]` are 1 where people
/// called a completion good, else 0; `denominator` counts those of the whole optimizer step.
///
/// Reads 2 columns of tokens, writes one.
pub fn forward<F: Float>(
    dev: &Device,
    dlogp: ViewMut<'_, F>,
    columns: SequenceColumns<'_, F>,
    labels: View<'_, F>,
    s: &KtoLoss,
    denominator: f64,
) -> Result<Pending<KtoSums>> {
    let loss = SequenceLoss { op: "kto_loss", columns, single: ("labels", Some(labels)), dlogp };
    loss.run(
        dev,
        |[x], label| completion(s, denominator, x, label),
        |to| {
            kernel::Forward {
                dlogp: to.dlogp,
                partial: to.partial,
                logp: columns.logp,
                ref_logp: columns.ref_logp,
                weights: columns.weights,
                offsets: columns.offsets.view,
                labels,
                units: to.units,
                share: to.share,
                beta: s.beta,
                kl: s.kl,
                desirable: s.desirable,
                undesirable: s.undesirable,
                scale: 1.0 / denominator,
            }
            .launch(to.cuda, to.launch)
        },
    )
}

fn completion(
    s: &KtoLoss,
    denominator: f64,
    x: SequenceSums,
    label: f64,
) -> ([SequenceGrads; 1], KtoSums) {
    let (good, sign, weight) =
        if label > 0.0 { (1.0, 1.0, s.desirable) } else { (0.0, -1.0, s.undesirable) };
    let z = sign * s.beta * (x.ratio - s.kl);
    // 1 - S(z), and S(z)
    let e = libm::exp(-z.abs());
    let (lost, won) = if z >= 0.0 { (e, 1.0) } else { (1.0, e) };
    let (lost, won) = (lost / (1.0 + e), won / (1.0 + e));
    let scale = weight / denominator;
    let reward = s.beta * x.ratio;
    let sums = KtoSums {
        completions: 1.0,
        loss: scale * lost,
        desirable: good,
        desirable_reward: good * reward,
        undesirable_reward: (1.0 - good) * reward,
        desirable_logp: good * x.logp,
        undesirable_logp: (1.0 - good) * x.logp,
    };
    let ratio = -sign * s.beta * scale * lost * won;
    ([SequenceGrads { ratio, logp: 0.0 }], sums)
}
