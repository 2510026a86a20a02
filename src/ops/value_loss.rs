//! The clipped value loss of PPO: `½ max((v - ret)², (clip(v, old ± c) - ret)²)`.
//! (Schulman et al. 2017, OpenAI baselines; as TRL, OpenRLHF and verl compute it)

use crate::{
    device::{Device, Float, Later, View, ViewMut, Work, cuda::kernels::value_loss as kernel},
    error::Result,
    shape,
};

/// Sums over the tokens of a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    pub tokens: f64,
    /// The loss, with coefficient and denominator.
    pub loss: f64,
    pub value: f64,
    /// Tokens whose clipped branch is the loss.
    pub clipped: f64,
    /// Squared errors `(v - ret)²`.
    pub squared_error: f64,
}

impl Stats {
    /// Adds the next micro-batch.
    pub fn merge(&mut self, o: &Self) {
        self.tokens += o.tokens;
        self.loss += o.loss;
        self.value += o.value;
        self.clipped += o.clipped;
        self.squared_error += o.squared_error;
    }
}

/// Writes `dv` `[tokens]` and returns the sums; each token's loss is multiplied by `coef` and
/// divided by `denominator`, the token count of the whole optimizer step. `clip` off keeps the
/// first term.
///
/// Reads 3, writes 1 number a token.
#[allow(clippy::too_many_arguments)]
pub fn forward<F: Float>(
    dev: &Device,
    dv: ViewMut<'_, F>,
    v: View<'_, F>,
    old: View<'_, F>,
    returns: View<'_, F>,
    clip: Option<f64>,
    coef: f64,
    denominator: f64,
) -> Result<Later<Stats>> {
    let n = v.len();
    shape::check("value_loss", "old", &[n], old.len())?;
    shape::check("value_loss", "returns", &[n], returns.len())?;
    shape::check("value_loss", "dv", &[n], dv.len())?;
    let _op = dev.op("value_loss", || Work::moves::<F>(4 * n));
    let scale = coef / denominator;
    match dev {
        Device::Cpu(_) => {
            let (v, old, returns) = (v.host(), old.host(), returns.host());
            Ok(Later::now(on_cpu(dv.host(), v, old, returns, clip, scale)))
        }
        Device::Cuda(cuda) => {
            let (old, clip) = (clip.map(|_| old), clip.unwrap_or(0.0));
            let sums = cuda.sums(n, 0, |launch, partial, share| {
                let ret = returns;
                kernel::Forward { dv, partial, v, old, returns: ret, tokens: n, share, clip, scale }
                    .launch(cuda, launch)
            })?;
            let tokens = n as f64;
            Ok(sums.map(move |[loss, value, clipped, squared_error]| Stats {
                tokens,
                loss,
                value,
                clipped,
                squared_error,
            }))
        }
    }
}

fn on_cpu<F: Float>(
    dv: &mut [F],
    v: &[F],
    old: &[F],
    returns: &[F],
    clip: Option<f64>,
    scale: f64,
) -> Stats {
    let mut stats = Stats { tokens: v.len() as f64, ..Stats::default() };
    for i in 0..v.len() {
        let (v, old, ret) = (v[i].f64(), old[i].f64(), returns[i].f64());
        let error = v - ret;
        let (mut loss, mut slope) = (0.5 * error * error, error);
        if let Some(c) = clip {
            // Not `f64::clamp`, which panics where `old` is NaN.
            if !(old - c..=old + c).contains(&v) {
                let bound = if v < old { old - c } else { old + c };
                let bounded = 0.5 * (bound - ret) * (bound - ret);
                if bounded > loss {
                    stats.clipped += 1.0;
                    (loss, slope) = (bounded, 0.0);
                } else if bounded == loss {
                    slope *= 0.5; // torch.max at a tie
                } else if bounded.is_nan() {
                    (loss, slope) = (bounded, bounded);
                }
            }
        }
        stats.loss += loss * scale;
        stats.value += v;
        stats.squared_error += error * error;
        dv[i] = F::of(slope * scale);
    }
    stats
}
