//! Where the time goes: phases of a run, the ops in them and the kernels in those.
//!
//! `Device::profiled` makes a device that writes down what it does, and the [`Profile`] to read
//! it from. On the CPU an op is timed by the clock. On a CUDA device events stand around every
//! kernel, and nothing waits for them until the profile is read, or 8192 kernels were launched. Of
//! what is inside of each other, only the time that is an op's own counts, so that shares add up.
//! Without a profile an op costs one branch.

mod nvtx;
mod report;
mod trace;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    marker::PhantomData,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::ThreadId,
    time::Instant,
};

use super::clock::{Clock, Mark};
use crate::error::Result;

pub use report::{KernelRow, OpRow, Peaks, PhaseRow, Report};
use trace::{TraceEvent, Track};

/// Kernels whose events are kept before they are read: then the host waits for the device once.
const BATCH: usize = 8192;

/// Events that a trace holds, about 100 MB of memory; later ones are only added up.
const EVENTS: usize = 1 << 20;

/// What an op does, as its doc says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Floating-point operations; a multiply-add is two.
    pub flops: f64,
    /// Bytes read and written, those of each buffer once.
    pub bytes: f64,
}

impl Work {
    /// `count` elements read or written.
    pub fn moves<T>(count: usize) -> Self {
        Self { flops: 0.0, bytes: count as f64 * size_of::<T>() as f64 }
    }

    /// With so many operations more.
    pub fn flops(self, flops: f64) -> Self {
        Self { flops: self.flops + flops, ..self }
    }

    /// With those of a matrix product more: `2 m n k`.
    pub fn product(self, m: usize, n: usize, k: usize) -> Self {
        self.flops(2.0 * m as f64 * n as f64 * k as f64)
    }

    pub fn and(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }

    /// What is left without `inner`.
    fn without(self, inner: Self) -> Self {
        let less = |a: f64, b: f64| (a - b).max(0.0);
        Self { flops: less(self.flops, inner.flops), bytes: less(self.bytes, inner.bytes) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Phase,
    Op,
    Kernel,
}

/// A phase or an op under way, until it is dropped, on the thread that began it.
#[derive(Debug)]
#[must_use = "what it measures ends when it is dropped"]
pub struct Span {
    profile: Option<Profile>,
    _thread: PhantomData<*const ()>,
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(profile) = &self.profile {
            profile.close();
        }
    }
}

/// What a device did since it was made by `Device::profiled`. Cloning shares it.
#[derive(Clone)]
pub struct Profile(Arc<Inner>);

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Profile({})", self.0.device)
    }
}

struct Inner {
    device: String,
    peaks: OnceLock<Option<Peaks>>,
    /// Asked for the peaks once.
    find_peaks: Box<dyn Fn() -> Option<Peaks> + Send + Sync>,
    /// Clock of a device that runs beside the host; none for the CPU.
    clock: Option<Arc<dyn Clock>>,
    /// Whether a tool of NVIDIA's may want the names.
    nvtx: bool,
    start: Instant,
    state: Mutex<Recorded>,
}

#[derive(Default)]
struct Recorded {
    threads: HashMap<ThreadId, Thread>,
    spans: BTreeMap<(Kind, &'static str), Total>,
    /// By op and kernel.
    kernels: BTreeMap<(&'static str, &'static str), Total>,
    /// When the device was idle and passed the first mark of the batch.
    base: Option<(Mark, f64)>,
    batch: Vec<Launched>,
    /// Spans that ended since the batch began, for the device's track.
    closed: Vec<Open>,
    launched: usize,
    trace: Vec<TraceEvent>,
    dropped: u64,
}

#[derive(Default)]
struct Thread {
    number: usize,
    open: Vec<Open>,
}

/// Times are seconds since the profile began.
#[derive(Clone, Copy)]
struct Open {
    kind: Kind,
    name: &'static str,
    work: Work,
    began: f64,
    /// Time and work of the spans of its kind inside.
    inner: f64,
    inner_work: Work,
    /// The kernels from here, up to there once it is closed, are its own.
    first: usize,
    last: usize,
    /// When the device began the first of them and ended the last, of earlier batches.
    on_device: Option<(f64, f64)>,
}

/// A kernel and the marks around it.
struct Launched {
    name: &'static str,
    op: &'static str,
    phase: &'static str,
    start: Mark,
    end: Mark,
}

#[derive(Clone, Copy, Default)]
struct Total {
    calls: u64,
    /// By the clock, what is inside of it included.
    whole: f64,
    /// Its own, by the clock.
    seconds: f64,
    /// In which it, or the device, works.
    busy: f64,
    work: Work,
}

impl Span {
    /// Opens a span in `profile`, if there is one; only then `work` is called.
    pub(super) fn begin(
        profile: Option<&Profile>,
        kind: Kind,
        name: &'static str,
        work: impl FnOnce() -> Work,
    ) -> Self {
        if let Some(profile) = profile {
            profile.open(kind, name, work());
        }
        Self { profile: profile.cloned(), _thread: PhantomData }
    }
}

impl Profile {
    /// A profile of the device with this description.
    pub(super) fn new(
        device: String,
        clock: Option<Arc<dyn Clock>>,
        find_peaks: impl Fn() -> Option<Peaks> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Inner {
            device,
            peaks: OnceLock::new(),
            find_peaks: Box::new(find_peaks),
            clock,
            nvtx: nvtx::is_there(),
            start: Instant::now(),
            state: Mutex::default(),
        }))
    }

    /// Seconds since it began.
    fn now(&self) -> f64 {
        self.0.start.elapsed().as_secs_f64()
    }

    fn state(&self) -> MutexGuard<'_, Recorded> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, kind: Kind, name: &'static str, work: Work) {
        if self.0.nvtx {
            nvtx::push(name);
        }
        let mut state = self.state();
        let first = state.launched;
        let open = Open {
            kind,
            name,
            work,
            began: self.now(),
            inner: 0.0,
            inner_work: Work::default(),
            first,
            last: usize::MAX,
            on_device: None,
        };
        state.thread().open.push(open);
    }

    fn close(&self) {
        let (now, on_device) = (self.now(), self.0.clock.is_some());
        let mut state = self.state();
        let last = state.launched;
        let thread = state.thread();
        let Some(open) = thread.open.pop() else { return };
        let number = thread.number;
        let seconds = now - open.began;
        let mut phase = None;
        // The nearest span of its kind has it inside, and the phase works as long as an op does.
        for outer in thread.open.iter_mut().rev() {
            if outer.kind == open.kind {
                outer.inner += seconds;
                outer.inner_work = outer.inner_work.and(open.work);
                break;
            }
            if outer.kind == Kind::Phase {
                phase = Some(outer.name);
                break;
            }
        }
        let own = seconds - open.inner;
        let total = state.spans.entry((open.kind, open.name)).or_default();
        total.calls += 1;
        total.whole += seconds;
        total.seconds += own;
        total.work = total.work.and(open.work.without(open.inner_work));
        if !on_device && open.kind == Kind::Op {
            total.busy += own;
        }
        if let Some(phase) = phase.filter(|_| !on_device) {
            state.spans.entry((Kind::Phase, phase)).or_default().busy += seconds;
        }
        let Open { kind, name, work, began, .. } = open;
        state.keep(TraceEvent::new(kind, name, Track::Host(number), (began, now), work));
        if last > open.first {
            state.closed.push(Open { last, ..open });
        }
        drop(state);
        if self.0.nvtx {
            nvtx::pop();
        }
    }

    /// Runs `work`, which launches `name`, between two marks.
    pub(super) fn launch<R>(
        &self,
        name: &'static str,
        work: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        let Some(clock) = &self.0.clock else { return work() };
        let mut state = self.state();
        if state.batch.len() >= BATCH {
            state.resolve(&**clock)?;
        }
        if state.base.is_none() {
            // An idle device passes a mark when it is set: from here its time is the clock's.
            clock.wait()?;
            state.base = Some((clock.mark()?, self.now()));
        }
        // Locked until the mark at the end is in the batch, lest another thread begins a new one.
        let start = clock.mark()?;
        let done = work().and_then(|done| Ok((done, clock.mark()?)));
        let (done, end) = match done {
            Ok(done) => done,
            Err(e) => {
                clock.forget(&[start]);
                return Err(e);
            }
        };
        let open = &state.thread().open;
        let nearest = |kind| open.iter().rev().find(|o| o.kind == kind).map_or("", |o| o.name);
        let (op, phase) = (nearest(Kind::Op), nearest(Kind::Phase));
        state.batch.push(Launched { name, op, phase, start, end });
        state.launched += 1;
        Ok(done)
    }

    /// What took how long so far. Waits for the device; on the CPU its peaks are measured, which
    /// takes some tenths of a second.
    pub fn report(&self) -> Result<Report> {
        let (state, seconds) = (self.resolved()?, self.now());
        let Inner { device, peaks, find_peaks, clock, .. } = &*self.0;
        let peaks = peaks.get_or_init(find_peaks);
        Ok(report::report(device, *peaks, seconds, clock.is_some(), &state))
    }

    /// Writes a trace in the JSON format of Chrome, which <https://ui.perfetto.dev> shows: a track
    /// for each thread of the host that began phases or ops, and one for the device. Waits for the
    /// device.
    pub fn write_chrome(&self, path: &Path) -> Result<()> {
        let mut state = self.resolved()?;
        let dropped = state.dropped;
        trace::write(path, &self.0.device, &mut state.trace, dropped)
    }

    /// With the times of all kernels.
    fn resolved(&self) -> Result<MutexGuard<'_, Recorded>> {
        let mut state = self.state();
        if let Some(clock) = &self.0.clock {
            state.resolve(&**clock)?;
        }
        Ok(state)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(clock) = &self.clock {
            state.forget(&**clock);
        }
    }
}

impl Recorded {
    /// What this thread has begun.
    fn thread(&mut self) -> &mut Thread {
        let number = self.threads.len() + 1;
        let thread = self.threads.entry(std::thread::current().id()).or_default();
        if thread.number == 0 {
            thread.number = number;
        }
        thread
    }

    fn keep(&mut self, event: TraceEvent) {
        if self.trace.len() < EVENTS {
            self.trace.push(event);
        } else {
            self.dropped += 1;
        }
    }

    /// Reads the marks of the batch and begins a new one.
    fn resolve(&mut self, clock: &dyn Clock) -> Result<()> {
        let mut times: Vec<(f64, f64)> = Vec::with_capacity(self.batch.len());
        if let Some((mark, base)) = self.base {
            clock.wait()?;
            for k in &self.batch {
                // Far from the first mark a time has few digits left, a difference of neighbours
                // has all. Kernels follow each other, whatever is rounded.
                let (at, seconds) = (clock.between(mark, k.start)?, clock.between(k.start, k.end)?);
                let start = times.last().map_or(base + at, |before| before.1.max(base + at));
                times.push((start, start + seconds));
            }
        }
        let from = self.launched - self.batch.len();
        // The span's part of the batch, after what it had of earlier ones.
        let on_device = |open: &Open| {
            let (first, last) = (open.first.max(from), open.last.min(from + times.len()));
            let of = times.get(first - from..last.saturating_sub(from).max(first - from));
            let of = of.and_then(|of| Some((of.first()?.0, of.last()?.1)));
            match (open.on_device, of) {
                (Some((start, _)), Some((_, end))) => Some((start, end)),
                (before, now) => now.or(before),
            }
        };
        for open in self.threads.values_mut().flat_map(|t| &mut t.open) {
            open.on_device = on_device(open);
        }
        let closed = std::mem::take(&mut self.closed);
        let spans: Vec<TraceEvent> = closed
            .iter()
            .filter_map(|o| {
                Some(TraceEvent::new(o.kind, o.name, Track::Device, on_device(o)?, o.work))
            })
            .collect();
        spans.into_iter().for_each(|event| self.keep(event));
        let batch = std::mem::take(&mut self.batch);
        for (k, time) in batch.iter().zip(times) {
            let seconds = time.1 - time.0;
            let total = self.kernels.entry((k.op, k.name)).or_default();
            total.calls += 1;
            total.busy += seconds;
            for (kind, name) in [(Kind::Op, k.op), (Kind::Phase, k.phase)] {
                if !name.is_empty() {
                    self.spans.entry((kind, name)).or_default().busy += seconds;
                }
            }
            self.keep(TraceEvent::new(Kind::Kernel, k.name, Track::Device, time, Work::default()));
        }
        self.batch = batch;
        self.forget(clock);
        Ok(())
    }

    /// Gives the marks of the batch back, whether they were read or not.
    fn forget(&mut self, clock: &dyn Clock) {
        let of_kernels = self.batch.drain(..).flat_map(|k| [k.start, k.end]);
        let all: Vec<Mark> = of_kernels.chain(self.base.take().map(|(mark, _)| mark)).collect();
        clock.forget(&all);
    }
}
