//! The clipped value loss of PPO: `½ max((v - ret)², (clip(v, old ± c) - ret)²)`.
//! (Schulman et al. 2017, OpenAI baselines; as TRL, OpenRLHF and verl compute it)

use super::token_loss::{Input, TokenLoss, sums};
use crate::{
    device::{Device, Float, Pending, View, ViewMut, cuda::kernels::value_loss as kernel},
    error::Result,
};

sums! {
    /// Sums over the tokens of a micro-batch.
    pub struct ValueSums {
        tokens,
        /// The loss, with coefficient and denominator.
        loss,
        value,
        /// Tokens whose clipped branch is the loss.
        clipped,
        /// Squared errors `(v - ret)²`.
        squared_error,
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ValueLoss {
    /// Keeps the value within this distance of the old one; without it the first term is the loss.
    pub clip: Option<f64>,
    pub coef: f64,
}

/// Columns of a micro-batch, `[tokens]` each.
#[derive(Clone, Copy, Debug)]
pub struct ValueTokens<'a, F> {
    pub v: View<'a, F>,
    /// Value before the step; read with a clip.
    pub old: View<'a, F>,
    pub returns: View<'a, F>,
    pub weights: Option<View<'a, F>>,
}

/// Writes `dv` `[tokens]` and returns the sums; each token's loss is multiplied by the coefficient
/// and divided by `denominator`, the token count of the whole optimizer step.
///
/// Reads 3, writes 1 number a token.
pub fn forward<F: Float>(
    dev: &Device,
    dv: ViewMut<'_, F>,
    t: ValueTokens<'_, F>,
    s: ValueLoss,
    denominator: f64,
) -> Result<Pending<ValueSums>> {
    let ValueTokens { v, old, returns, weights } = t;
    let (tokens, scale) = (v.len(), s.coef / denominator);
    let inputs = [("v", v), ("old", old), ("returns", returns)].map(|(n, x)| Input::new(n, x));
    TokenLoss { op: "value_loss", tokens, inputs, weights, grads: [("dv", Some(dv))] }.run(
        dev,
        |x| token(s.clip, scale, x),
        |to| {
            let [dv] = to.grads;
            kernel::Forward {
                dv,
                partial: to.partial,
                v,
                old: s.clip.map(|_| old),
                returns,
                weights,
                tokens,
                share: to.share,
                clip: s.clip.unwrap_or(f64::INFINITY),
                scale,
            }
            .launch(to.cuda, to.launch)
        },
    )
}

fn token(clip: Option<f64>, scale: f64, [v, old, ret]: [f64; 3]) -> ([f64; 1], ValueSums) {
    let error = v - ret;
    let (mut loss, mut slope, mut clipped) = (0.5 * error * error, error, 0.0);
    // Not `f64::clamp`, which panics where `old` is NaN.
    if let Some(c) = clip.filter(|c| !(old - c..=old + c).contains(&v)) {
        let bound = if v < old { old - c } else { old + c };
        let bounded = 0.5 * (bound - ret) * (bound - ret);
        if bounded > loss {
            (loss, slope, clipped) = (bounded, 0.0, 1.0);
        } else if bounded == loss {
            slope *= 0.5; // torch.max at a tie
        } else if bounded.is_nan() {
            (loss, slope) = (bounded, bounded);
        }
    }
    let squared_error = error * error;
    let sums = ValueSums { tokens: 1.0, loss: loss * scale, value: v, clipped, squared_error };
    ([slope * scale], sums)
}
