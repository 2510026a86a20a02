//! The simulator of `kernels/sim` as a driver: a shared library in which every kernel is a host
//! function whose threads are fibres. It shows races, bad addresses, missing barriers and order
//! dependence; it shows neither speed nor faults of nvcc.

use std::{
    cell::Cell,
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::Path,
    ptr::NonNull,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use libloading::{Library, Symbol};

use super::{
    Arch, Driver, Event, Kernel, Launch, Mark, device_error,
    map::{Tensor, Words},
};
use crate::error::Result;

/// Seeds of the order in which threads and blocks run; 0 is the natural one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// Seed of the order of a block's threads.
    pub threads: u64,
    /// Seed of the order of a grid's blocks.
    pub blocks: u64,
}

type Run = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    usize,
    *mut *mut c_void,
    u64,
    u64,
    c_int,
) -> c_int;

/// The library has one list of allocations, whoever opened it. Launches are apart: each thread has
/// its own.
static ALLOCATIONS: Mutex<()> = Mutex::new(());

thread_local! {
    /// The number of the simulator that this thread has entered, 0 for none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

/// Copies under way. All other work is done when it is asked for; what the host must wait for is
/// made to be missed: a copy to the device takes its bytes as late as a GPU may, and one to the
/// host brings them as late.
#[derive(Default)]
struct SimulatedStream {
    /// Copies to the device since anything else was asked for: where to, where from, how many
    /// bytes.
    to_device: Vec<(NonNull<u8>, NonNull<u8>, usize)>,
    /// Copies to the device that are done.
    done: usize,
    /// Bytes for the host.
    to_host: Vec<(NonNull<u8>, Vec<u8>)>,
    /// Copies to the host that have arrived.
    arrived: usize,
    /// For each event, how many copies to the device and to the host come before it.
    events: Vec<[usize; 2]>,
}

// SAFETY: who asks for a copy promises that its memory stays until the copy is done, on whatever
// thread.
unsafe impl Send for SimulatedStream {}

impl SimulatedStream {
    /// Does all but what the host waits for.
    fn advance(&mut self) {
        self.advance_by(self.to_device.len());
    }

    fn advance_by(&mut self, copies: usize) {
        self.done += copies;
        for (to, from, bytes) in self.to_device.drain(..copies) {
            // SAFETY: the promise of the caller of `copy_in`; device memory is host memory here.
            unsafe { to.as_ptr().copy_from_nonoverlapping(from.as_ptr(), bytes) };
        }
    }

    fn finish(&mut self) {
        self.advance();
        self.arrive(self.to_host.len());
    }

    fn arrive(&mut self, copies: usize) {
        self.arrived += copies;
        for (to, bytes) in self.to_host.drain(..copies) {
            // SAFETY: the promise of the caller of `copy_out`.
            unsafe { to.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }
}

pub(super) struct Simulator {
    library: Library,
    /// Of all that were opened, from 1 on: its context.
    number: u64,
    order: Order,
    arch: Arch,
    stream: Mutex<SimulatedStream>,
    /// Marks are nanoseconds since then.
    opened: Instant,
}

impl std::fmt::Debug for Simulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Simulator({:?}, {:?})", self.arch, self.order)
    }
}

impl Simulator {
    pub(super) fn open(path: &Path, order: Order, arch: Arch) -> Result<Self> {
        // SAFETY: the library is our own; its constructors register kernels and do nothing else.
        let library = unsafe { Library::new(path) };
        let library = library.map_err(|e| device_error(format!("{}: {e}", path.display())))?;
        static OPENED: AtomicU64 = AtomicU64::new(0);
        let number = 1 + OPENED.fetch_add(1, Ordering::Relaxed);
        let (stream, opened) = (Mutex::default(), Instant::now());
        Ok(Self { library, number, order, arch, stream, opened })
    }

    /// Refuses a call on a thread that did not enter, as a GPU's driver does.
    fn entered(&self) -> Result<()> {
        match CURRENT.get() {
            current if current == self.number => Ok(()),
            _ => Err(device_error("this thread has not entered the device's context")),
        }
    }

    /// The same for calls that cannot refuse.
    fn must_be_entered(&self) {
        if !std::thread::panicking() {
            self.entered().unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// The stream, for a thread that has entered.
    fn under_way(&self) -> Result<MutexGuard<'_, SimulatedStream>> {
        self.entered()?;
        Ok(self.stream.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// # Safety
    /// `T` is the type of the symbol.
    unsafe fn symbol<T>(&self, name: &str) -> Result<Symbol<'_, T>> {
        // SAFETY: the caller's promise.
        let found = unsafe { self.library.get(name.as_bytes()) };
        found.map_err(|e| device_error(format!("the simulator lacks {name}: {e}")))
    }
}

impl Driver for Simulator {
    fn enter(&self) -> Result<()> {
        CURRENT.set(self.number);
        Ok(())
    }

    fn describe(&self) -> String {
        self.name().into()
    }

    fn name(&self) -> &str {
        "simulated cuda device"
    }

    fn processors(&self) -> u32 {
        // Odd and small, so that grids that count on more are found.
        3
    }

    fn arch(&self) -> Arch {
        self.arch
    }

    fn tensor_map(&self, tensor: &Tensor) -> Result<Words> {
        self.entered().map(|()| tensor.words())
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.entered().map(|()| None)
    }

    fn alloc(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.entered()?;
        // SAFETY: the signature of sim.cpp.
        let alloc = unsafe { self.symbol::<unsafe extern "C" fn(usize) -> *mut u8>("sim_alloc")? };
        let _turn = ALLOCATIONS.lock();
        // SAFETY: any size is allowed.
        let at = unsafe { alloc(bytes) };
        NonNull::new(at).ok_or_else(|| device_error(format!("allocating {bytes} bytes failed")))
    }

    unsafe fn free(&self, at: NonNull<u8>) {
        self.must_be_entered();
        // SAFETY: the signature of sim.cpp.
        let free = unsafe { self.symbol::<unsafe extern "C" fn(*mut u8) -> c_int>("sim_free") };
        let Ok(free) = free else { return };
        if let Ok(mut stream) = self.under_way() {
            stream.finish();
        }
        let turn = ALLOCATIONS.lock();
        // SAFETY: the caller's promise.
        let touched = unsafe { free(at.as_ptr()) };
        drop(turn);
        if !std::thread::panicking() {
            assert_eq!(touched, 0, "device memory was written outside its bounds");
        }
    }

    /// The redzones of device memory watch this one too.
    fn pin(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.alloc(bytes)
    }

    unsafe fn unpin(&self, at: NonNull<u8>) {
        // SAFETY: the caller's promise; `pin` took it from `alloc`.
        unsafe { self.free(at) };
    }

    unsafe fn copy_in(&self, to: NonNull<u8>, from: &[u8]) -> Result<()> {
        let at = NonNull::from(from).cast();
        self.under_way()?.to_device.push((to, at, from.len()));
        Ok(())
    }

    unsafe fn copy_out(&self, to: &mut [u8], from: NonNull<u8>) -> Result<()> {
        let mut stream = self.under_way()?;
        stream.advance();
        let mut bytes = vec![0; to.len()];
        // SAFETY: the caller's promise; the simulator's device memory is host memory.
        unsafe { from.as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        // What the host sees if it does not wait.
        to.fill(0xFF);
        stream.to_host.push((NonNull::from(to).cast(), bytes));
        Ok(())
    }

    unsafe fn copy(&self, to: NonNull<u8>, from: NonNull<u8>, bytes: usize) -> Result<()> {
        self.under_way()?.advance();
        // SAFETY: as above.
        unsafe { to.as_ptr().copy_from_nonoverlapping(from.as_ptr(), bytes) };
        Ok(())
    }

    unsafe fn fill(&self, to: NonNull<u8>, byte: u8, bytes: usize) -> Result<()> {
        self.under_way()?.advance();
        // SAFETY: as above.
        unsafe { to.as_ptr().write_bytes(byte, bytes) };
        Ok(())
    }

    /// Brings nothing else to the host: a wait that is missing must show.
    unsafe fn inspect(&self, to: &mut [u8], from: NonNull<u8>) -> Result<()> {
        self.under_way()?.advance();
        // SAFETY: as above.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from.as_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn guard(&self, at: NonNull<u8>, bytes: usize, on: bool) {
        let name = if on { "sim_poison" } else { "sim_unpoison" };
        // SAFETY: the signature of sim.cpp.
        let guard = unsafe { self.symbol::<unsafe extern "C" fn(*mut u8, usize)>(name) };
        if let Ok(guard) = guard {
            // SAFETY: the caller's promise.
            unsafe { guard(at.as_ptr(), bytes) };
        }
    }

    unsafe fn launch(&self, k: &Kernel, launch: Launch, args: &mut [*mut c_void]) -> Result<()> {
        self.under_way()?.advance();
        let name = CString::new(k.name).map_err(|e| device_error(e.to_string()))?;
        // SAFETY: the signature of sim.cpp.
        let run = unsafe { self.symbol::<Run>("sim_launch")? };
        // SAFETY: as above.
        let error = unsafe { self.symbol::<unsafe extern "C" fn() -> *const c_char>("sim_error")? };
        let size = [k.threads, 1, 1];
        // SAFETY: the caller's promise for the arguments; grid and size hold three numbers.
        let bad = unsafe {
            run(
                name.as_ptr(),
                launch.blocks.as_ptr(),
                size.as_ptr(),
                launch.shared as usize,
                args.as_mut_ptr(),
                self.order.threads,
                self.order.blocks,
                launch.together.into(),
            )
        };
        if bad == 0 {
            return Ok(());
        }
        // SAFETY: valid until the next launch of this thread.
        let text = unsafe { error() };
        // SAFETY: a C string of the library's.
        let text = unsafe { CStr::from_ptr(text) };
        Err(device_error(text.to_string_lossy()))
    }

    /// By shared memory and threads; the simulator knows no registers.
    fn resident(&self, k: &Kernel, launch: Launch) -> Result<u32> {
        self.entered()?;
        let (room, own) = match self.arch {
            Arch::Sm80 => (164 << 10, 1 << 10),
            Arch::Sm90 => (228 << 10, 1 << 10),
        };
        Ok((room / (launch.shared + own)).min(2048 / k.threads).min(32))
    }

    fn synchronize(&self) -> Result<()> {
        self.under_way()?.finish();
        Ok(())
    }

    fn event(&self) -> Result<Event> {
        let mut stream = self.under_way()?;
        stream.events.push([0; 2]);
        Ok(Event(std::ptr::without_provenance_mut(stream.events.len() - 1)))
    }

    unsafe fn record(&self, event: &Event) -> Result<()> {
        let mut stream = self.under_way()?;
        let before = [stream.done + stream.to_device.len(), stream.arrived + stream.to_host.len()];
        stream.events[event.0.addr()] = before;
        Ok(())
    }

    unsafe fn wait_for(&self, event: &Event) -> Result<()> {
        let mut stream = self.under_way()?;
        let [to_device, to_host] = stream.events[event.0.addr()];
        let (done, arrived) = (stream.done, stream.arrived);
        stream.advance_by(to_device.saturating_sub(done));
        stream.arrive(to_host.saturating_sub(arrived));
        Ok(())
    }

    unsafe fn end_event(&self, _event: &Event) {
        self.must_be_entered();
    }

    fn mark(&self) -> Result<Mark> {
        self.entered()?;
        Ok(Mark(self.opened.elapsed().as_nanos() as u64))
    }

    fn between(&self, start: Mark, end: Mark) -> Result<f64> {
        self.entered().map(|()| end.0.saturating_sub(start.0) as f64 / 1e9)
    }

    fn forget(&self, _marks: &[Mark]) {}
}
