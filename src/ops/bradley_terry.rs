//! The reward model's loss on pairs of which people chose the first.  (Bradley and Terry 1952;
//! margin: Touvron et al. 2023, eq. 2; centring: Eisenstein et al. 2023)
//!
//! `-log sigmoid(chosen - rejected - margin) + centre (chosen + rejected)²`, mean over pairs.

use super::token_loss::{Input, TokenLoss, sums};
use crate::{
    device::{Device, Float, Pending, View, ViewMut, cuda::kernels::bradley_terry as kernel},
    error::Result,
    shape,
};

sums! {
    /// Sums over the pairs of a micro-batch.
    pub struct PairSums {
        pairs,
        /// The loss, divided by the denominator.
        loss,
        /// Pairs whose chosen text scores higher.
        right,
        difference,
        /// All scores, both of each pair.
        score,
    }
}

/// Columns of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Pairs<'a, F> {
    /// Chosen, rejected, chosen, ...: `[2 pairs]`.
    pub scores: View<'a, F>,
    /// `[pairs]`, or empty.
    pub margins: View<'a, F>,
    /// `[pairs]`.
    pub weights: Option<View<'a, F>>,
}

/// Writes `dscores` `[2 pairs]` and returns the sums. `denominator` is the number of pairs of the
/// whole optimizer step.
///
/// Reads scores and margins, writes as many gradients as scores.
pub fn forward<F: Float>(
    dev: &Device,
    dscores: ViewMut<'_, F>,
    Pairs { scores, margins, weights }: Pairs<'_, F>,
    centre: f64,
    denominator: f64,
) -> Result<Pending<PairSums>> {
    let pairs = shape::rows("bradley_terry", "scores", scores.len(), 2)?;
    let margins = Some(margins).filter(|m| !m.is_empty());
    let [chosen, rejected] = [0, 1].map(|first| Input::new("scores", scores).of_many(first, 2));
    let loss = TokenLoss {
        op: "bradley_terry",
        tokens: pairs,
        inputs: [chosen, rejected, Input::optional("margins", margins, false)],
        weights,
        grads: [("dscores", Some(dscores))],
    };
    loss.run(
        dev,
        |x| token(centre, denominator, x),
        |to| {
            let [dscores] = to.grads;
            kernel::Forward {
                dscores,
                partial: to.partial,
                scores,
                margins,
                weights,
                count: scores.len(),
                share: to.share,
                centre,
                scale: 1.0 / denominator,
            }
            .launch(to.cuda, to.launch)
        },
    )
}

fn token(centre: f64, denominator: f64, [c, r, margin]: [f64; 3]) -> ([f64; 2], PairSums) {
    let m = c - r - margin;
    // -log sigmoid(m) = softplus(-m), written so that neither sign overflows
    let e = libm::exp(-m.abs());
    let loss = (-m).max(0.0) + libm::log1p(e);
    let wrong = if m >= 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) };
    let pull = 2.0 * centre * (c + r);
    let sums = PairSums {
        pairs: 1.0,
        loss: (loss + centre * (c + r) * (c + r)) / denominator,
        right: f64::from(u8::from(c > r)),
        difference: c - r,
        score: c + r,
    };
    ([(pull - wrong) / denominator, (pull + wrong) / denominator], sums)
}
