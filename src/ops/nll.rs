//! The loss of supervised fine-tuning: the weighted negative log-likelihood of tokens.

use crate::{
    device::{Device, Float, Later, View, ViewMut, Work, cuda::kernels::nll as kernel},
    error::Result,
    shape,
};

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
) -> Result<Later<f64>> {
    let n = logp.len();
    shape::check("nll", "weights", &[n], weights.len())?;
    shape::check("nll", "dlogp", &[n], dlogp.len())?;
    let _op = dev.op("nll", || Work::moves::<F>(3 * n));
    match dev {
        Device::Cpu(_) => {
            let (d, logp, weights) = (dlogp.host(), logp.host(), weights.host());
            let mut sum = 0.0;
            for i in 0..n {
                sum -= weights[i].f64() * logp[i].f64();
                d[i] = F::of(-weights[i].f64() / denominator);
            }
            Ok(Later::now(sum / denominator))
        }
        Device::Cuda(cuda) => {
            let scale = 1.0 / denominator;
            let sums = cuda.sums(n, 0, |launch, partial, share| {
                kernel::Forward { dlogp, partial, logp, weights, tokens: n, share, scale }
                    .launch(cuda, launch)
            })?;
            Ok(sums.map(|[loss]| loss))
        }
    }
}
