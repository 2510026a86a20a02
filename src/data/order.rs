//! The order in which steps draw the examples of a data set.

use crate::rng::{Philox, Purpose};

/// The order in which examples are drawn: endless epochs over `len` examples, each in an order of
/// its own. A pure function of a counter, so that a resumed run needs no more than that counter.
#[derive(Clone, Debug)]
pub struct DrawOrder {
    len: usize,
    seed: u64,
    shuffle: bool,
    epoch: u64,
    permutation: Vec<usize>,
}

impl DrawOrder {
    /// File order without `shuffle`.
    pub fn new(len: usize, seed: u64, shuffle: bool) -> Self {
        Self { len, seed, shuffle, epoch: u64::MAX, permutation: Vec::new() }
    }

    /// The example of draw `i`, over all epochs.
    ///
    /// # Panics
    /// If there are no examples.
    pub fn index(&mut self, i: u64) -> usize {
        let (epoch, at) = (i / self.len as u64, (i % self.len as u64) as usize);
        if !self.shuffle {
            return at;
        }
        if epoch != self.epoch {
            self.permutation =
                Philox::new(self.seed, epoch, 0, Purpose::Shuffle).permutation(self.len);
            self.epoch = epoch;
        }
        self.permutation[at]
    }

    /// The examples of step `step` of `batch` draws each. Epochs flow into each other: a step may
    /// end one and begin the next, so that every step has the same size.
    pub fn batch(&mut self, step: u64, batch: usize) -> Vec<usize> {
        (0..batch as u64).map(|k| self.index(step * batch as u64 + k)).collect()
    }
}
