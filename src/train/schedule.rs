//! The learning rate of each step, as Hugging Face's schedulers compute it, with two departures:
//! a polynomial ends at 0 or its floor, not at 1e-7, and every warm-up begins at 0, that of
//! warmup_stable_decay too.

use super::settings::{Schedule, Settings};
use crate::error::{Error, Result};

/// Course of the learning rate over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Course {
    pub schedule: Schedule,
    /// Steps of the run.
    pub steps: u64,
    /// Those in which the rate rises.
    pub warmup: u64,
    /// Those in which it falls at the end, after it stayed.
    pub decay: u64,
    pub power: f64,
    /// The fraction of the peak that it falls to.
    pub floor: f64,
}

impl Course {
    /// That of a run with these settings.
    ///
    /// # Errors
    /// [`Error::Config`] if a setting is given that the schedule does not read.
    pub fn new(s: &Settings, steps: u64) -> Result<Self> {
        use Schedule::{Constant, InverseSqrt, Polynomial, WarmupStableDecay};
        let of = |schedule: Schedule| s.schedule == schedule;
        let floor = s.min_learning_rate_ratio;
        for (key, given, read, want) in [
            ("schedule_power", s.schedule_power, of(Polynomial), "schedule = \"polynomial\""),
            (
                "decay_steps",
                s.decay_steps.map(|n| n as f64),
                of(WarmupStableDecay),
                "schedule = \"warmup_stable_decay\"",
            ),
            (
                "min_learning_rate_ratio",
                Some(floor).filter(|r| *r > 0.0),
                !of(Constant) && !of(InverseSqrt),
                "a schedule that falls to it",
            ),
            (
                "warmup_ratio",
                Some(s.warmup_ratio).filter(|r| *r > 0.0),
                s.warmup_steps == 0,
                "none beside warmup_steps",
            ),
        ] {
            if let (Some(given), false) = (given, read) {
                return Err(Error::config(key, want, given));
            }
        }
        let warmup = match s.warmup_ratio {
            0.0 => s.warmup_steps,
            ratio => (ratio * steps as f64).ceil() as u64,
        };
        let decay = s.decay_steps.unwrap_or((steps / 10).max(1));
        if s.decay_steps.is_some() && warmup.saturating_add(decay) > steps {
            let want = format!("at most {}, the steps after warm-up", steps.saturating_sub(warmup));
            return Err(Error::config("decay_steps", want, decay));
        }
        let power = s.schedule_power.unwrap_or(1.0);
        Ok(Self { schedule: s.schedule, steps, warmup, decay, power, floor })
    }

    /// Factor on the peak learning rate at `step`, counted from 0.
    ///
    /// Warm-up: `step / warmup`. Then, with `progress = (step - warmup) / (steps - warmup)`:
    /// constant 1; linear `1 - progress`; polynomial `(1 - progress)^power`; cosine
    /// `(1 + cos(pi progress)) / 2`; inverse_sqrt `sqrt(warmup / step)`, without a warm-up
    /// `sqrt(10000 / (step + 10000))`; warmup_stable_decay 1, and over the last `decay` steps as
    /// cosine. With a floor they run from 1 to it.
    pub fn factor(&self, step: u64) -> f64 {
        let Self { steps, warmup, decay, power, floor, .. } = *self;
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let span = steps.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / span).min(1.0);
        let course = match self.schedule {
            Schedule::Constant => return 1.0,
            Schedule::InverseSqrt => {
                let scale = if warmup > 0 { warmup } else { 10_000 };
                return (scale as f64 / (step - warmup + scale) as f64).sqrt();
            }
            Schedule::Linear => 1.0 - progress,
            Schedule::Polynomial => libm::pow(1.0 - progress, power),
            Schedule::Cosine => 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress)),
            Schedule::WarmupStableDecay => {
                let left = (steps.saturating_sub(step) as f64 / decay.max(1) as f64).min(1.0);
                0.5 * (1.0 - libm::cos(std::f64::consts::PI * left))
            }
        };
        course * (1.0 - floor) + floor
    }
}
