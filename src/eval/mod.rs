//! Evaluation: what a policy writes, how models rate it, how far it went from where it started.

mod diversity;
mod samples;

pub use diversity::distinct;
pub use samples::{Evaluation, Evaluator, Sample};
