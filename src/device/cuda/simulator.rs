//! The simulator of `kernels/sim` as a driver: a shared library in which every kernel is a host function
//! whose threads are fibres. It shows races, bad addresses, missing barriers and order dependence; it
//! shows neither speed nor faults of nvcc.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::Path,
    ptr::NonNull,
    sync::Mutex,
    time::Instant,
};

use libloading::{Library, Symbol};

use super::{
    Driver, Kernel, Launch, device_error,
    map::{Tensor, Words},
};
use crate::error::Result;

/// Seeds of the order in which threads and blocks run; 0 is the natural one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// Of the threads of a block.
    pub threads: u64,
    /// Of the blocks of a grid.
    pub blocks: u64,
}

/// Which GPU the simulator plays, and so which kernels ops choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Machine {
    /// Compute capability 8.0.
    #[default]
    Ampere,
    /// Compute capability 9.0.
    Hopper,
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

/// The library has one list of allocations, whoever opened it. Launches are apart: each thread has its own.
static ALLOCATIONS: Mutex<()> = Mutex::new(());

pub(super) struct Simulator {
    library: Library,
    order: Order,
    machine: Machine,
}

impl std::fmt::Debug for Simulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Simulator({:?}, {:?})", self.machine, self.order)
    }
}

impl Simulator {
    pub(super) fn open(path: &Path, order: Order, machine: Machine) -> Result<Self> {
        // SAFETY: the library is our own; its constructors register kernels and do nothing else.
        let library = unsafe { Library::new(path) };
        let library = library.map_err(|e| device_error(format!("{}: {e}", path.display())))?;
        Ok(Self { library, order, machine })
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
    fn describe(&self) -> String {
        "simulated cuda device".into()
    }

    fn processors(&self) -> u32 {
        // Odd and small, so that grids that count on more are found.
        3
    }

    fn hopper(&self) -> bool {
        self.machine == Machine::Hopper
    }

    fn tensor_map(&self, tensor: &Tensor) -> Result<Words> {
        Ok(tensor.words())
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn alloc(&self, bytes: usize) -> Result<NonNull<u8>> {
        // SAFETY: the signature of sim.cpp.
        let alloc = unsafe { self.symbol::<unsafe extern "C" fn(usize) -> *mut u8>("sim_alloc")? };
        let _turn = ALLOCATIONS.lock();
        // SAFETY: any size is allowed.
        let at = unsafe { alloc(bytes) };
        NonNull::new(at).ok_or_else(|| device_error(format!("allocating {bytes} bytes failed")))
    }

    unsafe fn free(&self, at: NonNull<u8>) {
        // SAFETY: the signature of sim.cpp.
        let free = unsafe { self.symbol::<unsafe extern "C" fn(*mut u8) -> c_int>("sim_free") };
        let Ok(free) = free else { return };
        let turn = ALLOCATIONS.lock();
        // SAFETY: the caller's promise.
        let touched = unsafe { free(at.as_ptr()) };
        drop(turn);
        if !std::thread::panicking() {
            assert_eq!(touched, 0, "device memory was written outside its bounds");
        }
    }

    unsafe fn copy_in(&self, to: NonNull<u8>, from: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise; the simulator's device memory is host memory.
        unsafe { to.as_ptr().copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    unsafe fn copy_out(&self, to: &mut [u8], from: NonNull<u8>) -> Result<()> {
        // SAFETY: as above.
        unsafe { from.as_ptr().copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: NonNull<u8>, from: NonNull<u8>, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { to.as_ptr().copy_from_nonoverlapping(from.as_ptr(), bytes) };
        Ok(())
    }

    unsafe fn fill(&self, to: NonNull<u8>, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { to.as_ptr().write_bytes(byte, bytes) };
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

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64())
    }
}
