//! The loss of supervised fine-tuning: the weighted negative log-likelihood of tokens.

use super::token_loss::{Input, TokenLoss, sums};
use crate::{
    device::{Device, Float, Pending, View, ViewMut, cuda::kernels::nll as kernel},
    error::Result,
};

sums! {
    /// Sums over the tokens of a micro-batch.
    pub struct NllSums {
        tokens,
        /// Not yet divided by the denominator.
        loss,
    }
}

/// Writes `dlogp = -weights / denominator` `[tokens]` and returns
/// `-sum weights logp / denominator`. `denominator` is the weight of the whole optimizer step.
///
/// Reads 2, writes 1 number a token.
pub fn forward<F: Float>(
    dev: &Device,
    dlogp: ViewMut<'_, F>,
    logp: View<'_, F>,
    weights: View<'_, F>,
    denominator: f64,
) -> Result<Pending<f64>> {
    run(Form { op: "nll", dft: false }, dev, dlogp, (logp, weights), denominator)
}

/// The same with each token weighed by its probability, which counts as a constant:
/// `dlogp = -weights e^logp / denominator`, and returns
/// `-sum weights e^logp logp / denominator` (DFT; Wu et al. 2025, eq. 9).
pub fn dft<F: Float>(
    dev: &Device,
    dlogp: ViewMut<'_, F>,
    logp: View<'_, F>,
    weights: View<'_, F>,
    denominator: f64,
) -> Result<Pending<f64>> {
    run(Form { op: "nll::dft", dft: true }, dev, dlogp, (logp, weights), denominator)
}

/// Which of the two it is.
struct Form {
    op: &'static str,
    dft: bool,
}

fn run<F: Float>(
    Form { op, dft }: Form,
    dev: &Device,
    dlogp: ViewMut<'_, F>,
    (logp, weights): (View<'_, F>, View<'_, F>),
    denominator: f64,
) -> Result<Pending<f64>> {
    let tokens = logp.len();
    let loss = TokenLoss {
        op,
        tokens,
        inputs: [Input::new("logp", logp)],
        weights: Some(weights),
        grads: [("dlogp", Some(dlogp))],
    };
    let token = |[logp]: [f64; 1]| {
        let p = if dft { libm::exp(logp) } else { 1.0 };
        ([-p / denominator], NllSums { tokens: 1.0, loss: -p * logp })
    };
    let sums = loss.run(dev, token, |to| {
        let [dlogp] = to.grads;
        kernel::Forward {
            dlogp,
            partial: to.partial,
            logp,
            weights,
            tokens,
            share: to.share,
            scale: 1.0 / denominator,
            dft: usize::from(dft),
        }
        .launch(to.cuda, to.launch)
    })?;
    Ok(sums.map(move |sums| sums.loss / denominator))
}
