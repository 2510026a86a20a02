//! The interface through which a run reports its progress.

use crate::algorithms::Metrics;

/// Hears how a run goes.
pub trait Observer {
    /// A line for people.
    fn note(&mut self, line: &str);
    /// `done` of `total` bytes of data were read and tokenised.
    fn reading(&mut self, _data: &str, _done: u64, _total: u64) {}
    /// The run goes on after `step` of `steps`.
    fn begin(&mut self, _step: u64, _steps: u64) {}
    /// `done` of `total` units of a phase of the present step.
    fn phase(&mut self, _name: &str, _done: usize, _total: usize) {}
    /// `step` of `steps` is done, in `seconds`.
    fn step(&mut self, _step: u64, _steps: u64, _metrics: &Metrics, _seconds: f64) {}
}

/// An observer that hears nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn note(&mut self, _line: &str) {}
}
