//! The order in which steps draw the examples of a data set.

use crate::rng::{Philox, Purpose};

/// Examples of which an epoch draws a number of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrawGroup {
    pub examples: Vec<usize>,
    /// Draws of an epoch.
    pub draws: usize,
}

impl DrawGroup {
    /// With `weight` draws of an example in an epoch, in the mean; one draw at least.
    pub fn weighted(examples: Vec<usize>, weight: f64) -> Self {
        let draws = (examples.len() as f64 * weight).round() as usize;
        Self { draws: if examples.is_empty() { 0 } else { draws.max(1) }, examples }
    }

    /// The draws of an epoch. They go on where the epoch before ended, each example once before any
    /// comes again; where passes are cut by epochs, each has an order of its own, if `seed` is one.
    fn of_epoch(&self, epoch: u64, stream: u64, seed: Option<u64>) -> Vec<usize> {
        let (n, k) = (self.examples.len(), self.draws);
        if n == 0 {
            return Vec::new();
        }
        let is_whole = k.is_multiple_of(n);
        let at = |j: usize| epoch as u128 * k as u128 + j as u128;
        let pass = |p: u128| match seed.filter(|_| !is_whole) {
            Some(seed) => Philox::new(seed, p as u64, stream, Purpose::Shuffle).permutation(n),
            None => (0..n).collect(),
        };
        let (mut out, mut last, mut order) = (Vec::with_capacity(k), None, Vec::new());
        for j in 0..k {
            let (p, i) = (at(j) / n as u128, (at(j) % n as u128) as usize);
            if last != Some(p) {
                (last, order) = (Some(p), pass(p));
            }
            out.push(self.examples[order[i]]);
        }
        out
    }
}

/// The order in which examples are drawn: endless epochs over `len` draws, each in an order of its
/// own. A pure function of a counter, so that a resumed run needs no more than that counter.
#[derive(Clone, Debug)]
pub struct DrawOrder {
    len: usize,
    seed: u64,
    shuffle: bool,
    /// Empty if an epoch draws each example once.
    groups: Vec<DrawGroup>,
    epoch: u64,
    permutation: Vec<usize>,
    drawn: Vec<usize>,
}

impl DrawOrder {
    /// Each example once an epoch; in file order without `shuffle`.
    pub fn new(len: usize, seed: u64, shuffle: bool) -> Self {
        let (permutation, drawn) = (Vec::new(), Vec::new());
        Self { len, seed, shuffle, groups: Vec::new(), epoch: u64::MAX, permutation, drawn }
    }

    /// Each group as often as it says, one behind the other without `shuffle`.
    pub fn weighted(groups: Vec<DrawGroup>, seed: u64, shuffle: bool) -> Self {
        let len = groups.iter().map(|g| g.draws).sum();
        Self { groups, ..Self::new(len, seed, shuffle) }
    }

    /// Draws of an epoch.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is drawn more or less often than once an epoch.
    pub fn groups(&self) -> &[DrawGroup] {
        &self.groups
    }

    /// The example of draw `i`, over all epochs, which flow into each other: a step may end one and
    /// begin the next, so that every step has the same size.
    ///
    /// # Panics
    /// If there are no examples.
    pub fn index(&mut self, i: u64) -> usize {
        let (epoch, at) = (i / self.len as u64, (i % self.len as u64) as usize);
        if epoch != self.epoch {
            self.begin(epoch);
        }
        let at = if self.shuffle { self.permutation[at] } else { at };
        if self.groups.is_empty() { at } else { self.drawn[at] }
    }

    fn begin(&mut self, epoch: u64) {
        self.epoch = epoch;
        if self.shuffle {
            self.permutation =
                Philox::new(self.seed, epoch, 0, Purpose::Shuffle).permutation(self.len);
        }
        let seed = Some(self.seed).filter(|_| self.shuffle);
        // Stream 0 is that of epochs.
        let of = |(g, stream): (&DrawGroup, u64)| g.of_epoch(epoch, stream, seed);
        self.drawn = self.groups.iter().zip(1..).flat_map(of).collect();
    }
    /// So many draws, the first of which is draw `from`.
    pub fn take(&mut self, from: u64, draws: usize) -> Vec<usize> {
        (from..).take(draws).map(|i| self.index(i)).collect()
    }
}
