//! Training runs: what they are told, what they write, and how they survive.

pub mod checkpoint;
pub mod events;
pub mod lock;
pub mod metrics;
pub mod signals;
pub mod storage;
