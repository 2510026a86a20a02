//! Training runs: what they are told, what they write, and how they survive.

pub mod checkpoint;
pub mod storage;
