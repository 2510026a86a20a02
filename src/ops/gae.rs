//! Generalised advantage estimation over packed, ragged sequences.  (Schulman et al. 2016, eq. 16)

use crate::{
    device::{
        Device, Float, View, ViewMut, Work,
        cuda::{Launch, kernels::gae as kernel},
    },
    error::Result,
    shape,
};

/// What advantages are estimated from.
#[derive(Clone, Copy, Debug)]
pub struct RewardColumns<'a, F> {
    /// Reward of each token `[tokens]`.
    pub rewards: View<'a, F>,
    /// Value *before* each token `[tokens]`.
    pub values: View<'a, F>,
    /// Where each sequence begins `[sequences + 1]`.
    pub offsets: View<'a, u32>,
    pub gamma: F,
    pub lambda: F,
}

/// Writes `advantages` and `returns` `[tokens]`, in reward units:
///
/// `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lambda A_{t+1}`,
/// `return_t = A_t + V_t`; V and A after a sequence's last token are 0.
///
/// Reads 2, writes 2 numbers a token. On a CUDA device it waits for the offsets, to check them.
pub fn forward<F: Float>(
    dev: &Device,
    advantages: ViewMut<'_, F>,
    returns: ViewMut<'_, F>,
    of: RewardColumns<'_, F>,
) -> Result<()> {
    let RewardColumns { rewards, values, offsets, gamma, lambda } = of;
    let n = rewards.len();
    shape::check("gae", "values", &[n], values.len())?;
    shape::check("gae", "advantages", &[n], advantages.len())?;
    shape::check("gae", "returns", &[n], returns.len())?;
    let _op = dev.op("gae", || Work::moves::<F>(4 * n));
    match dev {
        Device::Cpu(_) => {
            shape::offsets("gae", offsets.host(), n)?;
            let (advantages, returns) = (advantages.host(), returns.host());
            let (rewards, values) = (rewards.host(), values.host());
            // A few numbers a token: one thread is done before a second would have started.
            for w in offsets.host().windows(2) {
                let (mut next_value, mut next_advantage) = (F::ZERO, F::ZERO);
                for t in (w[0] as usize..w[1] as usize).rev() {
                    let delta = rewards[t] + gamma * next_value - values[t];
                    next_advantage = delta + gamma * lambda * next_advantage;
                    next_value = values[t];
                    advantages[t] = next_advantage;
                    returns[t] = next_advantage + values[t];
                }
            }
            Ok(())
        }
        Device::Cuda(cuda) => {
            // The kernel would follow a wrong offset out of the columns.
            shape::offsets("gae", &dev.read(offsets)?, n)?;
            let sequences = offsets.len().saturating_sub(1);
            let launch = Launch::row(sequences, kernel::THREADS / 32 * 8)?;
            kernel::Forward { advantages, returns, rewards, values, offsets, gamma, lambda }
                .launch(cuda, launch)
        }
    }
}
