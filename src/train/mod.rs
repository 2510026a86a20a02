//! Training: the loop, its configuration, optimizer, checkpoints and metrics.

pub mod pass;
