//! `length`: a penalty, from 0 down to -1, for samples of another length than wanted, in tokens.

use super::{Options, RewardFailure, RewardInput, SampleReward, Stop, each};
use crate::error::Result;

enum LengthReward {
    /// -|n - target| / target.
    Target(f64),
    /// 0 up to `max` - `buffer`, then linear to -1 at `max` (DAPO's soft overlong punishment).
    Most { max: f64, buffer: f64 },
}

/// `target`, or `max` and perhaps `buffer` (0: all of the penalty beyond `max`).
pub fn length(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let (target, max) = (options.take::<u32>("target")?, options.take::<u32>("max")?);
    let buffer: Option<u32> = options.take("buffer")?;
    Ok(Box::new(match (target, max, buffer) {
        (Some(n), None, None) if n > 0 => LengthReward::Target(f64::from(n)),
        (None, Some(max), buffer) if max > 0 && buffer.unwrap_or(0) <= max => {
            LengthReward::Most { max: f64::from(max), buffer: f64::from(buffer.unwrap_or(0)) }
        }
        _ => {
            let want = "wanted `target`, 1 or more, or `max`, 1 or more, with a `buffer` up to it";
            return Err(options.error(want));
        }
    }))
}

impl SampleReward for LengthReward {
    fn score(
        &mut self,
        samples: &[RewardInput],
        _stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        each(samples, |s| {
            let n = s.tokens as f64;
            let above = match *self {
                Self::Target(target) => (n - target).abs() / target,
                Self::Most { max, .. } if n > max => 1.0,
                Self::Most { max, buffer } if n > max - buffer => (n - (max - buffer)) / buffer,
                Self::Most { .. } => 0.0,
            };
            Ok(0.0 - above.min(1.0))
        })
    }
}
