//! Training runs: the loop, what it is told, what it writes, and how it survives.

pub mod checkpoint;
pub mod events;
pub mod lock;
pub mod metrics;
pub mod pass;
pub mod signals;
pub mod storage;
