//! The time on a device whose work the host does not wait for, as a profile takes it.

use std::fmt;

use crate::error::Result;

/// A point of a device's stream whose time is taken: an event, or a time of the simulator.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark(pub(super) u64);

pub(super) trait Clock: fmt::Debug + Send + Sync {
    /// Sets a mark behind all work so far; does not wait.
    fn mark(&self) -> Result<Mark>;
    /// Seconds on the device between two marks that it has passed.
    fn between(&self, start: Mark, end: Mark) -> Result<f64>;
    /// Gives marks back, to be set anew.
    fn forget(&self, marks: &[Mark]);
    /// Waits until the device has passed all marks.
    fn wait(&self) -> Result<()>;
}
