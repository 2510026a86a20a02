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
    let tokens = logp.len();
    let loss = TokenLoss {
        op: "nll",
        tokens,
        inputs: [Input::new("logp", logp)],
        weights: Some(weights),
        grads: [("dlogp", Some(dlogp))],
    };
    let token = |[logp]: [f64; 1]| ([-1.0 / denominator], NllSums { tokens: 1.0, loss: -logp });
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
        }
        .launch(to.cuda, to.launch)
    })?;
    Ok(sums.map(move |sums| sums.loss / denominator))
}
