//! Training runs: the loop, what it is told, what it writes, and how it survives.

pub mod checkpoint;
mod evaluate;
pub mod events;
mod experience;
pub mod feed;
pub mod job;
pub mod lock;
pub mod metrics;
pub mod plan;
pub mod role;
pub mod rollouts;
mod run;
pub mod schedule;
pub mod settings;
pub mod signals;
pub mod storage;
mod trainer;

pub use run::{run, run_on};
pub use settings::Settings;
pub use trainer::{Observer, Report, Silent, Trainer};
