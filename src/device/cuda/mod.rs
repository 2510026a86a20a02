//! The CUDA device: a driver, real or simulated, and the kernels of `kernels/`.
//!
//! All work goes to one stream, in order, so ops need no synchronisation among themselves, and the
//! host runs ahead of it: only what brings numbers to the host waits for the device, and memory
//! that is freed.

#![allow(unsafe_code)]

mod driver;
mod gpu_spec;
mod launch;
mod map;
mod reduce;
mod simulator;
mod staging;

use std::{
    ffi::c_void,
    ptr::NonNull,
    sync::{Arc, Mutex},
};

use bytemuck::Pod;

use super::{
    arch::Arch,
    clock::{Clock, Mark},
    float::{Element, Float},
    pending::Pending,
    profile::Profile,
    view::{View, ViewMut},
};
use crate::error::{Error, Result};

use launch::{Args, Image, Kernel};

pub use driver::outdated;
pub use gpu_spec::{GPUS, GpuSpec};
pub use launch::{Launch, group, width};
pub use map::{Map, Swizzle, Tiles};
pub use reduce::{PARTS, Parts};
pub use simulator::Order;
pub use staging::{Calls, Ring};

/// A handle to a GPU, or to the simulator of one. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Cuda {
    driver: Context,
    staging: Arc<staging::Staging>,
    scratch: Arc<Mutex<reduce::ReduceScratch>>,
    profile: Option<Profile>,
}

/// A point of the stream that can be waited for: the driver's handle.
#[derive(Debug)]
struct Event(*mut c_void);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Event {}

/// A driver, and its context on the GPU: whoever asks for something enters first, on whatever
/// thread.
#[derive(Clone, Debug)]
struct Context(Arc<dyn Driver>);

impl Context {
    /// The driver, its context made that of this thread.
    fn enter(&self) -> Result<&dyn Driver> {
        self.0.enter()?;
        Ok(&*self.0)
    }
}

/// What a GPU is asked for. Copies, fills and launches are done in order and after the call
/// returns. All but what the GPU is needs its context on the calling thread.
trait Driver: std::fmt::Debug + Send + Sync {
    /// Makes the context that of this thread.
    fn enter(&self) -> Result<()>;
    /// A line for people.
    fn describe(&self) -> String;
    /// What its maker calls it.
    fn name(&self) -> &str;
    fn processors(&self) -> u32;
    fn arch(&self) -> Arch;
    /// The tensor map that a kernel takes.
    fn tensor_map(&self, tensor: &map::Tensor) -> Result<map::Words>;
    /// Bytes that are free, if that is known.
    fn free_memory(&self) -> Result<Option<usize>>;
    /// `bytes` bytes of device memory, aligned to 256.
    fn alloc(&self, bytes: usize) -> Result<NonNull<u8>>;
    /// # Safety
    /// `at` came from [`Driver::alloc`], and nothing uses it any more.
    unsafe fn free(&self, at: NonNull<u8>);
    /// `bytes` bytes of pinned host memory, which hold some value.
    fn pin(&self, bytes: usize) -> Result<NonNull<u8>>;
    /// Waits for the copies under way.
    ///
    /// # Safety
    /// `at` came from [`Driver::pin`], and nothing uses it any more.
    unsafe fn unpin(&self, at: NonNull<u8>);
    /// # Safety
    /// `to` has `from.len()` bytes of device memory that nobody else uses; `from` is pinned and
    /// stays as it is until the stream has passed this copy.
    unsafe fn copy_in(&self, to: NonNull<u8>, from: &[u8]) -> Result<()>;
    /// # Safety
    /// `from` has `to.len()` bytes of device memory; nobody looks at `to`, nor frees it, until the
    /// stream has passed this copy.
    unsafe fn copy_out(&self, to: &mut [u8], from: NonNull<u8>) -> Result<()>;
    /// # Safety
    /// `from` and `to` have `bytes` bytes of device memory, those of `to` used by nobody else.
    unsafe fn copy(&self, to: NonNull<u8>, from: NonNull<u8>, bytes: usize) -> Result<()>;
    /// # Safety
    /// `to` has `bytes` bytes of device memory that nobody else uses.
    unsafe fn fill(&self, to: NonNull<u8>, byte: u8, bytes: usize) -> Result<()>;
    /// Reads memory, at once.
    ///
    /// # Safety
    /// `from` has `to.len()` bytes of device memory.
    unsafe fn inspect(&self, to: &mut [u8], from: NonNull<u8>) -> Result<()> {
        // SAFETY: the caller's promise; we wait before `to` is seen.
        unsafe { self.copy_out(to, from)? };
        self.synchronize()
    }
    /// Forbids or allows kernels to touch memory, where that can be enforced.
    ///
    /// # Safety
    /// `at` has `bytes` bytes of device memory.
    unsafe fn guard(&self, _at: NonNull<u8>, _bytes: usize, _on: bool) {}
    /// # Safety
    /// `args` point to values that have the types of the kernel's parameters, and device memory
    /// among them is as large as the kernel expects.
    unsafe fn launch(
        &self,
        kernel: &Kernel,
        launch: Launch,
        args: &mut [*mut c_void],
    ) -> Result<()>;
    /// Blocks of such a launch that a multiprocessor holds at once.
    fn resident(&self, kernel: &Kernel, launch: Launch) -> Result<u32>;
    /// As [`Cuda::stream`].
    fn stream(&self) -> Result<*mut c_void> {
        Err(device_error("NVIDIA's libraries need a GPU"))
    }
    /// Waits for all that was launched.
    fn synchronize(&self) -> Result<()>;
    /// An event that was not recorded yet.
    fn event(&self) -> Result<Event>;
    /// Records an event at the end of the stream as it is now.
    ///
    /// # Safety
    /// The event came from [`Driver::event`] and has not ended.
    unsafe fn record(&self, event: &Event) -> Result<()>;
    /// Waits until the stream has passed the event where it was recorded last; not at all if it
    /// never was.
    ///
    /// # Safety
    /// As [`Driver::record`].
    unsafe fn wait_for(&self, event: &Event) -> Result<()>;
    /// # Safety
    /// As [`Driver::record`], and nothing uses it any more.
    unsafe fn end_event(&self, event: &Event);
    /// As the methods of [`Clock`].
    fn mark(&self) -> Result<Mark>;
    fn between(&self, start: Mark, end: Mark) -> Result<f64>;
    fn forget(&self, marks: &[Mark]);
}

/// Bytes that kernels load at once.
const PACKET: usize = 16;

/// What a profile calls copies to the host.
const COPY_OUT: &str = "copy from the device";

fn device_error(reason: impl Into<String>) -> Error {
    Error::Device { wanted: "cuda".into(), reason: reason.into() }
}

impl Cuda {
    /// GPU number `ordinal`.
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::over(driver::Gpu::new(ordinal)?, Ring::GPU)
    }

    /// The simulator in the shared library `library`, which simulates `arch` and runs threads and
    /// blocks in `order`. For tests.
    pub fn simulated(library: &std::path::Path, order: Order, arch: Arch) -> Result<Self> {
        Self::over(simulator::Simulator::open(library, order, arch)?, Ring::SIMULATOR)
    }

    /// A GPU known only by its data sheet, to plan for: every call that would run on it is refused.
    pub fn planned(gpu: GpuSpec) -> Result<Self> {
        let ring = Ring { slots: 1, bytes: 64 };
        Self::over(gpu, ring)
    }

    fn over(driver: impl Driver + 'static, ring: Ring) -> Result<Self> {
        let driver = Context(Arc::new(driver));
        let (scratch, staging) =
            (reduce::ReduceScratch::new(&driver)?, staging::Staging::new(&driver, ring)?);
        Ok(Self { driver, staging, scratch, profile: None })
    }

    /// The same device, whose writes go through another ring, and whose [`Cuda::calls`] begin at 0.
    /// For tests.
    pub fn with_ring(self, ring: Ring) -> Result<Self> {
        Ok(Self { staging: staging::Staging::new(&self.driver, ring)?, ..self })
    }

    /// What the driver and the devices are, or why there are none; for `warpo doctor`.
    pub fn survey() -> Vec<String> {
        driver::survey()
    }

    /// A line for people.
    pub fn describe(&self) -> String {
        self.driver.0.describe()
    }

    /// What its maker calls it.
    pub fn name(&self) -> &str {
        self.driver.0.name()
    }

    pub fn processors(&self) -> u32 {
        self.driver.0.processors()
    }

    pub fn arch(&self) -> Arch {
        self.driver.0.arch()
    }

    /// The stream of all work, for a library of NVIDIA's; its context becomes this thread's.
    pub fn stream(&self) -> Result<*mut c_void> {
        self.driver.enter()?.stream()
    }

    /// Waits for all that was launched.
    pub fn synchronize(&self) -> Result<()> {
        self.staging.wait()
    }

    pub(super) fn milestone(&self) -> Result<()> {
        self.staging.milestone()
    }

    /// How often the device was asked for something since it was opened, by all clones of this.
    pub fn calls(&self) -> Calls {
        self.staging.calls()
    }

    /// Bytes of host memory that are pinned for copies. They do not grow in a steady state.
    pub fn pinned_bytes(&self) -> usize {
        self.staging.pinned()
    }

    /// Seconds on the device that `work` takes, by events.
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let mut marks = vec![self.mark()?];
        let seconds = work().and_then(|()| {
            marks.push(self.mark()?);
            self.synchronize()?;
            self.between(marks[0], marks[1])
        });
        self.forget(&marks);
        seconds
    }

    /// The same, which writes what it does to this profile.
    pub(super) fn with_profile(&self, profile: Option<Profile>) -> Self {
        Self { profile, ..self.clone() }
    }

    pub(super) fn profile(&self) -> Option<&Profile> {
        self.profile.as_ref()
    }

    /// Runs `work`, which launches `name` and no kernel by [`Cuda`]: a profile sees it as one.
    pub fn launches<R>(&self, name: &'static str, work: impl FnOnce() -> Result<R>) -> Result<R> {
        match &self.profile {
            None => work(),
            Some(profile) => profile.launch(name, work),
        }
    }

    /// A copy of device memory, after all that was launched.
    pub(super) fn read<T: Pod>(&self, x: View<'_, T>) -> Result<Vec<T>> {
        let mut out = vec![T::zeroed(); x.len()];
        let at = x.device_ptr()?;
        if out.is_empty() {
            return Ok(out);
        }
        self.staging.count(|c| c.reads += 1);
        let to = bytemuck::cast_slice_mut(&mut out);
        let driver = self.driver.enter()?;
        // SAFETY: a view of device memory holds `len` elements; we wait before `out` is seen.
        self.launches(COPY_OUT, || unsafe { driver.copy_out(to, at) })?;
        self.staging.wait()?;
        Ok(out)
    }

    /// A copy of device memory as it is after all that was launched, without waiting for it.
    pub(super) fn read_later<T: Pod>(&self, x: View<'_, T>) -> Result<Pending<Vec<T>>> {
        let (at, len) = (x.device_ptr()?, x.len());
        if len == 0 {
            return Ok(Pending::now(Vec::new()));
        }
        let bytes = len * size_of::<T>();
        // SAFETY: a view of device memory holds `len` elements.
        let landing = self.launches(COPY_OUT, || unsafe { self.staging.read(at, bytes) })?;
        Ok(Pending::from_device(move || {
            let mut out = vec![T::zeroed(); len];
            landing.get(bytemuck::cast_slice_mut(&mut out))?;
            Ok(out)
        }))
    }

    /// Copies host memory, which may end then, to the device; the lengths are equal.
    pub(super) fn write<T: Pod>(&self, to: ViewMut<'_, T>, from: &[T]) -> Result<()> {
        assert_eq!(to.len(), from.len());
        let at = to.device_ptr()?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: an exclusive view of device memory holds `len` elements.
        let copy = || unsafe { self.staging.write(at, bytemuck::cast_slice(from)) };
        self.launches("copy to the device", copy)
    }

    /// Sets all bytes to 0.
    pub(super) fn zero<T: Pod>(&self, to: ViewMut<'_, T>) -> Result<()> {
        let bytes = to.len() * size_of::<T>();
        let at = to.device_ptr()?;
        // SAFETY: an exclusive view of device memory holds its elements.
        unsafe { self.fill(at, 0, bytes) }
    }

    /// Copies device memory; the lengths are equal.
    pub(super) fn copy<T: Pod>(&self, to: ViewMut<'_, T>, from: View<'_, T>) -> Result<()> {
        assert_eq!(to.len(), from.len());
        let bytes = from.len() * size_of::<T>();
        let (to, from) = (to.device_ptr()?, from.device_ptr()?);
        if bytes == 0 {
            return Ok(());
        }
        self.staging.count(|c| c.copies += 1);
        let driver = self.driver.enter()?;
        // SAFETY: views of device memory hold their elements, and one that writes is exclusive.
        self.launches("copy on the device", || unsafe { driver.copy(to, from, bytes) })
    }

    /// Sets `bytes` bytes to `byte`.
    ///
    /// # Safety
    /// As [`Driver::fill`].
    unsafe fn fill(&self, to: NonNull<u8>, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.staging.count(|c| c.fills += 1);
        let driver = self.driver.enter()?;
        // SAFETY: the caller's promise.
        self.launches("fill", || unsafe { driver.fill(to, byte, bytes) })
    }

    /// A read that waits, of memory that watches itself: not counted.
    ///
    /// # Safety
    /// `from` has `to.len()` bytes of device memory.
    pub(super) unsafe fn inspect(&self, to: &mut [u8], from: NonNull<u8>) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.driver.enter()?.inspect(to, from) }
    }

    /// A fill of memory that watches itself: not counted.
    ///
    /// # Safety
    /// As [`Driver::fill`].
    pub(super) unsafe fn poison(&self, to: NonNull<u8>, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.driver.enter()?.fill(to, byte, bytes) }
    }

    pub(super) fn free_memory(&self) -> Result<Option<usize>> {
        self.driver.enter()?.free_memory()
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.driver.enter()?.alloc(bytes)
    }

    /// # Safety
    /// As [`Driver::free`].
    pub(super) unsafe fn free(&self, at: NonNull<u8>) {
        self.staging.count(|c| c.waits += 1);
        if let Ok(driver) = self.driver.enter() {
            // SAFETY: the caller's promise.
            unsafe { driver.free(at) };
        }
    }

    /// # Safety
    /// As [`Driver::guard`].
    pub(super) unsafe fn guard(&self, at: NonNull<u8>, bytes: usize, on: bool) {
        // SAFETY: the caller's promise.
        unsafe { self.driver.0.guard(at, bytes, on) };
    }

    /// Blocks of such a launch that a multiprocessor holds at once.
    fn resident(&self, kernel: &'static Kernel, launch: Launch) -> Result<u32> {
        self.driver.enter()?.resident(kernel, launch)
    }

    /// Runs a kernel. An empty grid runs nothing.
    fn launch(&self, kernel: &'static Kernel, launch: Launch, mut args: Args) -> Result<()> {
        if let Some((arg, reason)) = args.wrong {
            return Err(device_error(format!("{}: `{arg}` {reason}", kernel.name)));
        }
        if kernel.image.arch == Arch::Sm90 && self.arch() != Arch::Sm90 {
            let reason = "needs a Hopper GPU, compute capability 9.0";
            return Err(device_error(format!("{}: {reason}", kernel.name)));
        }
        let ([blocks, ..], cluster) = (launch.blocks, kernel.cluster);
        if !blocks.is_multiple_of(cluster) {
            let reason = format!("a grid of {blocks} blocks, wanted a multiple of {cluster}");
            return Err(device_error(format!("{}: {reason}", kernel.name)));
        }
        let (most, all) = (self.processors(), launch.blocks.iter().product::<u32>());
        if launch.together && all > most {
            let reason = format!("{all} blocks that run together, wanted at most {most}");
            return Err(device_error(format!("{}: {reason}", kernel.name)));
        }
        if launch.blocks.contains(&0) {
            return Ok(());
        }
        self.staging.count(|c| c.launches += 1);
        let at = |v| std::ptr::from_mut::<map::Words>(v).cast();
        let driver = self.driver.enter()?;
        let mut pointers: Vec<*mut c_void> = args.values.iter_mut().map(at).collect();
        // SAFETY: the generated functions push the values of the kernel's parameters in its order;
        // that memory is as large as the kernel expects is checked by the op that calls them.
        let run = || unsafe { driver.launch(kernel, launch, &mut pointers) };
        self.launches(kernel.name, run)
    }
}

impl Clock for Cuda {
    fn mark(&self) -> Result<Mark> {
        self.driver.enter()?.mark()
    }

    fn between(&self, start: Mark, end: Mark) -> Result<f64> {
        self.driver.enter()?.between(start, end)
    }

    fn forget(&self, marks: &[Mark]) {
        self.driver.0.forget(marks);
    }

    fn wait(&self) -> Result<()> {
        self.synchronize()
    }
}

/// One module a .cu file, one function a kernel, written by build.rs. For ops and tests: a kernel
/// trusts the sizes that it is given, and the ops are what checks them.
#[doc(hidden)]
#[allow(missing_docs)]
pub mod kernels {
    use super::{
        Arch, Args, Cuda, Element, Float, Image, Kernel, Launch, Map, Result, View, ViewMut,
    };
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}
