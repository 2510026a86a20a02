//! The CPU device: threads, instruction sets, and the micro-kernels that need `unsafe`.

#![allow(unsafe_code)]

pub mod gemm;
pub mod math;
mod peak;
mod pool;
pub mod simd;

use std::{ops::Range, sync::Arc};

use pool::Pool;
pub use simd::Isa;

use super::profile::Profile;

/// A handle to the threads of this machine. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Cpu {
    pool: Arc<Pool>,
    isa: Isa,
    profile: Option<Profile>,
}

impl Cpu {
    /// `threads` threads (0: one per core) and the best instruction set of this machine.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// A device that uses `isa` even where a better one exists. Results do not change.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores() } else { threads };
        Self { pool: Arc::new(Pool::new(threads)), isa, profile: None }
    }

    /// The same, which writes what it does to this profile.
    pub(super) fn with_profile(self, profile: Option<Profile>) -> Self {
        Self { profile, ..self }
    }

    pub(super) fn profile(&self) -> Option<&Profile> {
        self.profile.as_ref()
    }

    /// Threads that work, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `task(0..tasks)` on all threads; which thread runs which is not fixed, so tasks must
    /// not depend on each other and each output element must belong to one task.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        self.pool.run(tasks, &task);
    }

    /// Splits `rows` rows of every output in `out` into `[start, end)` ranges of at least `grain`
    /// rows, and runs `work(range, parts)` on all threads. `out` is a tuple of
    /// `(slice, row_len)`; the parts have the same tuple shape.
    ///
    /// Each output element belongs to one task, so the split cannot change a bit as long as
    /// `work` treats rows independently.
    ///
    /// # Panics
    /// If an output's length is not `rows * row_len`.
    pub fn rows<O: Rows>(
        &self,
        rows: usize,
        grain: usize,
        out: O,
        work: impl Fn(Range<usize>, O::Part) + Sync,
    ) {
        if rows == 0 {
            return;
        }
        let out = out.shared(rows);
        // Four tasks a thread even out ragged work; more would only add hand-over cost.
        let per = rows.div_ceil(self.threads() * 4).max(grain.max(1));
        self.run(rows.div_ceil(per), |task| {
            let range = task * per..((task + 1) * per).min(rows);
            // SAFETY: tasks are distinct and their ranges do not overlap.
            let part = unsafe { O::part(&out, range.clone()) };
            work(range, part);
        });
    }
}

pub use pool::Rows;
