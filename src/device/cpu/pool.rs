//! A small thread pool: workers spin briefly for the next job, then sleep. A job is a closure and
//! a counter; nothing is allocated to run one.
//!
//! Nobody waits for a worker that has not begun: it joins a job by entering its name while the job
//! is open, and the caller, which works too, closes the job when no task is left. So a worker whose
//! core is taken by another process costs its share of the work, not its turn on the core.

#![allow(unsafe_code)]

use std::{
    marker::PhantomData,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Spins before sleeping: some tens of microseconds, about one small op. Spinning longer starves
/// whoever shares the core.
const SPINS: usize = 4_000;

/// A job: the erased closure and how many tasks it has.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: the closure is `Sync`, and `Pool::run` does not return before all workers left it and no
// other can enter.
unsafe impl Send for Job {}

struct Shared {
    /// Counts jobs; workers wait for it to change.
    epoch: AtomicU64,
    next: AtomicUsize,
    /// Workers in the current job. They enter under the lock of `job`, while it is open.
    inside: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// The job, while it is open.
    job: Mutex<Option<Job>>,
    wake: Condvar,
}

/// See [`super::Cpu::run`].
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time, whoever asks.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

thread_local! {
    /// Set while this thread runs tasks: a nested `run` then works alone instead of waiting for
    /// itself.
    static INSIDE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl Pool {
    pub(super) fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            job: Mutex::new(None),
            wake: Condvar::new(),
        });
        // Fewer where the system gives no more: that changes no result.
        let workers = (1..threads.max(1)).map_while(|_| {
            let shared = shared.clone();
            std::thread::Builder::new().spawn(move || worker(&shared)).ok()
        });
        let workers = workers.collect();
        Self { shared, workers, turn: Mutex::new(()) }
    }

    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    pub(super) fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            (0..tasks).for_each(task);
            return;
        }
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: the lifetime is erased only until this function returns, and before that it
        // closes the job and waits for every worker inside to leave.
        let task: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let job = Job { task, tasks };
        shared.next.store(0, Ordering::Relaxed);
        {
            let mut slot = lock(&shared.job);
            *slot = Some(job);
            shared.epoch.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        let mine = catch_unwind(AssertUnwindSafe(|| work(shared, job)));
        // Closed: from here on nobody enters.
        *lock(&shared.job) = None;
        let mut spins = 0usize;
        while shared.inside.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        // Taken in any case, or the next job would be blamed.
        let theirs = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(!theirs, "a worker thread panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        {
            let _slot = lock(&self.shared.job);
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker only ends by returning; its panics are caught and reported by `run`.
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic elsewhere leaves nothing half-written behind these locks.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn work(shared: &Shared, job: Job) {
    INSIDE.set(true);
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            INSIDE.set(false);
        }
    }
    let _leave = Leave;
    loop {
        let i = shared.next.fetch_add(1, Ordering::Relaxed);
        if i >= job.tasks {
            return;
        }
        // SAFETY: `Pool::run` keeps the closure alive until nobody is inside, which is after this.
        let task = unsafe { &*job.task };
        task(i);
    }
}

fn worker(shared: &Shared) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen && spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        }
        let job = {
            let mut slot = lock(&shared.job);
            while shared.epoch.load(Ordering::Acquire) == seen {
                slot = shared.wake.wait(slot).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            seen = shared.epoch.load(Ordering::Acquire);
            if slot.is_some() {
                shared.inside.fetch_add(1, Ordering::Relaxed);
            }
            *slot
        };
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        if let Some(job) = job {
            if catch_unwind(AssertUnwindSafe(|| work(shared, job))).is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
            shared.inside.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Outputs that can be split by rows and handed to threads. Implemented for `(slice, row_len)`
/// and for tuples of those.
pub trait Rows {
    /// What one task gets.
    type Part;
    /// What all tasks share.
    type Shared: Sync;
    /// Checks the lengths against `rows` and gives up the unique borrow.
    fn shared(self, rows: usize) -> Self::Shared;
    /// The part of `range`.
    ///
    /// # Safety
    /// The ranges that are taken from one `shared` must not overlap.
    unsafe fn part(shared: &Self::Shared, range: Range<usize>) -> Self::Part;
}

/// A slice whose disjoint row ranges are borrowed by different threads.
pub struct SharedRows<'a, T> {
    ptr: *mut T,
    row: usize,
    rows: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: parts of distinct ranges do not overlap, so threads never share an element.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}

impl<'a, T: Send> Rows for (&'a mut [T], usize) {
    type Part = &'a mut [T];
    type Shared = SharedRows<'a, T>;

    fn shared(self, rows: usize) -> Self::Shared {
        let (slice, row) = self;
        assert_eq!(Some(slice.len()), rows.checked_mul(row), "an output of {rows} rows of {row}");
        SharedRows { ptr: slice.as_mut_ptr(), row, rows, _slice: PhantomData }
    }

    unsafe fn part(s: &Self::Shared, range: Range<usize>) -> Self::Part {
        assert!(range.start <= range.end && range.end <= s.rows);
        // SAFETY: `range` is within the rows that `shared` checked.
        let start = unsafe { s.ptr.add(range.start * s.row) };
        // SAFETY: the caller takes no row twice.
        unsafe { std::slice::from_raw_parts_mut(start, range.len() * s.row) }
    }
}

impl<R: Rows> Rows for Option<R> {
    type Part = Option<R::Part>;
    type Shared = Option<R::Shared>;

    fn shared(self, rows: usize) -> Self::Shared {
        self.map(|r| r.shared(rows))
    }

    unsafe fn part(s: &Self::Shared, range: Range<usize>) -> Self::Part {
        // SAFETY: the caller's promise.
        s.as_ref().map(|s| unsafe { R::part(s, range) })
    }
}

macro_rules! tuple_rows {
    ($($name:ident $i:tt),*) => {
        impl<$($name: Rows),*> Rows for ($($name,)*) {
            type Part = ($($name::Part,)*);
            type Shared = ($($name::Shared,)*);
            fn shared(self, rows: usize) -> Self::Shared {
                ($(self.$i.shared(rows),)*)
            }
            unsafe fn part(s: &Self::Shared, range: Range<usize>) -> Self::Part {
                // SAFETY: the caller's promise holds for each output.
                ($(unsafe { $name::part(&s.$i, range.clone()) },)*)
            }
        }
    };
}
tuple_rows!(A 0);
tuple_rows!(A 0, B 1);
tuple_rows!(A 0, B 1, C 2);
tuple_rows!(A 0, B 1, C 2, D 3);
tuple_rows!(A 0, B 1, C 2, D 3, E 4);
