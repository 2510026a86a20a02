//! Generation and scoring: the same forward pass as training, without its backward.
//!
//! The engine knows token ids, not text.

mod engine;
pub mod rewards;
mod score;

pub use engine::{Completion, GenerationConfig, Generator, Prompt};
pub use score::{Scorer, ScoringPass, last_scores};
