//! The learning rate of each step, as Hugging Face's schedulers compute it.

use super::settings::Schedule;

/// Factor on the peak learning rate at `step`, counted from 0, of `steps`.
///
/// Warm-up: `step / warmup`. Then constant 1; linear `(steps - step) / (steps - warmup)`; cosine
/// `(1 + cos(pi progress)) / 2` with `progress = (step - warmup) / (steps - warmup)`. With a floor
/// `min_ratio` the last two run from 1 to it.
pub fn factor(schedule: Schedule, step: u64, steps: u64, warmup: u64, min_ratio: f64) -> f64 {
    if step < warmup {
        return step as f64 / warmup.max(1) as f64;
    }
    let span = steps.saturating_sub(warmup).max(1) as f64;
    let progress = ((step - warmup) as f64 / span).min(1.0);
    let course = match schedule {
        Schedule::Constant => return 1.0,
        Schedule::Linear => 1.0 - progress,
        Schedule::Cosine => 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress)),
    };
    course * (1.0 - min_ratio) + min_ratio
}
