//! Evaluation: what a policy writes, how models rate it, how far it went from where it started, and
//! a page that shows it.

mod diversity;
mod report;
mod reward_model;
mod samples;

pub use diversity::distinct;
pub use report::report;
pub use reward_model::{check_reward_model, load_reward_model};
pub use samples::{Evaluation, Evaluator, Sample, rate};
