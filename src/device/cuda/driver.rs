//! A real GPU, through NVIDIA's driver. The library is opened at run time, so the binary starts
//! anywhere.

use std::{
    collections::HashMap,
    ffi::{CString, c_int, c_void},
    ptr::NonNull,
    sync::{Mutex, PoisonError},
};

use cudarc::driver::{
    result::{self, DriverError},
    sys,
};

use super::{
    Arch, Driver, Event, Kernel, Launch, Mark, device_error, kernels,
    map::{Tensor, Words},
};
use crate::error::Result;

/// The oldest driver that has tensor maps: CUDA 12.0.
const OLDEST: c_int = 12_000;

/// Shared memory of a block that needs no permission.
const FREE_SHARED: u32 = 48 << 10;

/// What a device is, without using it.
struct Facts {
    ordinal: usize,
    device: sys::CUdevice,
    name: String,
    capability: (i32, i32),
    memory: usize,
    processors: u32,
}

impl Facts {
    fn of(ordinal: usize) -> Result<Self> {
        let device = result::device::get(ordinal as c_int).map_err(failed("device"))?;
        use sys::CUdevice_attribute as A;
        let capability = (
            attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let processors = attribute(device, A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let name = result::device::get_name(device).map_err(failed("name"))?;
        // SAFETY: `device` is a device of the initialised driver.
        let memory = unsafe { result::device::total_mem(device) }.map_err(failed("memory"))?;
        let processors = processors.unsigned_abs();
        Ok(Self { ordinal, device, name, capability, memory, processors })
    }

    /// Which of build.rs's images the driver takes for it, or why none.
    fn image(&self) -> Result<&'static str, String> {
        match self.capability {
            _ if !kernels::BUILT => {
                Err("this binary was built without CUDA kernels; build it again \
                                         with nvcc: NVCC=/path/to/nvcc cargo build --release"
                    .into())
            }
            (9, 0) => Ok("machine code for sm_90a"),
            (8, _) => Ok("machine code for sm_80"),
            (9.., _) => Ok("PTX, which the driver translates when it is first used"),
            (major, minor) => {
                Err(format!("compute capability {major}.{minor}, wanted 8.0 or newer"))
            }
        }
    }
}

impl std::fmt::Display for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ((major, minor), gib) = (self.capability, self.memory as f64 / (1u64 << 30) as f64);
        write!(
            f,
            "cuda:{}, {}, compute capability {major}.{minor}, {gib:.0} GiB, {} multiprocessors",
            self.ordinal, self.name, self.processors
        )
    }
}

fn attribute(device: sys::CUdevice, what: sys::CUdevice_attribute) -> Result<i32> {
    // SAFETY: `device` is a device of the initialised driver.
    unsafe { result::device::get_attribute(device, what) }.map_err(failed("attribute"))
}

pub(super) struct Gpu {
    facts: Facts,
    context: sys::CUcontext,
    stream: sys::CUstream,
    loaded: Mutex<Loaded>,
    /// Events that no mark is of.
    events: Mutex<Vec<sys::CUevent>>,
}

/// Modules by .cu file and functions by kernel, loaded when first used.
#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: the driver's handles may be used from any thread; maps and events are behind locks.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.facts)
    }
}

fn failed(doing: &str) -> impl FnOnce(DriverError) -> crate::Error {
    let doing = doing.to_owned();
    move |e| {
        let text = e.error_string().map(|s| s.to_string_lossy().into_owned());
        device_error(format!("{doing}: {}", text.unwrap_or_else(|_| format!("{:?}", e.0))))
    }
}

fn dptr(at: NonNull<u8>) -> sys::CUdeviceptr {
    at.as_ptr() as sys::CUdeviceptr
}

/// The driver's version, once the driver is there and new enough, and the number of devices.
fn probe() -> Result<(c_int, c_int), String> {
    // Without the library every other call of the crate would panic.
    // SAFETY: looks for the library and opens it; NVIDIA's has no constructors that matter.
    if !unsafe { sys::is_culib_present() } {
        return Err("libcuda.so.1 was not found: no NVIDIA driver on this machine".into());
    }
    let text = |e: DriverError| failed("the driver")(e).to_string();
    let mut version = 0;
    // SAFETY: `version` is writable; this call needs no initialisation.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(text)?;
    outdated(version, kernels::CUDA).map_or(Ok(()), Err)?;
    let none = "the driver sees no GPU (check CUDA_VISIBLE_DEVICES)";
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(none.into()),
        other => other.map_err(text)?,
    }
    match result::device::get_count().map_err(text)? {
        0 => Err(none.into()),
        n => Ok((version, n)),
    }
}

/// Why a driver for CUDA `version` takes no kernels of the nvcc of CUDA `built`, if so.
pub fn outdated(version: i32, built: i32) -> Option<String> {
    let needed = built.max(OLDEST);
    let way = match version >= OLDEST {
        true => format!(
            ", or build again with nvcc {} or older, from 12.0 on: NVCC=/path/to/nvcc cargo build \
             --release",
            show(version)
        ),
        false => String::new(),
    };
    let (version_is, needs) = (show(version), show(needed));
    (version < needed).then(|| {
        format!(
            "the driver is for CUDA {version_is}, this binary's kernels need one for {needs}: \
             update the driver{way}"
        )
    })
}

/// Lines for people: the driver, each device and its kernels, or what is missing.
pub(super) fn survey() -> Vec<String> {
    let (version, count) = match probe() {
        Err(reason) => return vec![format!("not usable: {reason}")],
        Ok(found) => found,
    };
    let mut lines = vec![format!("driver for CUDA {}", show(version))];
    for i in 0..count as usize {
        match Facts::of(i) {
            Err(e) => lines.push(format!("cuda:{i}, not usable: {e}")),
            Ok(facts) => lines.push(match facts.image() {
                Ok(image) => format!("{facts}; kernels: {image}"),
                Err(reason) => format!("{facts}; not usable: {reason}"),
            }),
        }
    }
    lines
}

fn show(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

impl Gpu {
    pub(super) fn new(ordinal: usize) -> Result<Self> {
        let (_, count) = probe().map_err(device_error)?;
        if ordinal >= count as usize {
            return Err(device_error(format!("there is no device {ordinal}, only {count}")));
        }
        let facts = Facts::of(ordinal)?;
        facts.image().map_err(device_error)?;
        // SAFETY: a device of the initialised driver; released when this `Gpu` ends.
        let context =
            unsafe { result::primary_ctx::retain(facts.device) }.map_err(failed("context"))?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed("context"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("stream"))?;
        Ok(Self { facts, context, stream, loaded: Mutex::default(), events: Mutex::default() })
    }

    fn function(&self, kernel: &Kernel) -> Result<sys::CUfunction> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(f) = loaded.functions.get(kernel.name) {
            return Ok(*f);
        }
        let image = kernel.image;
        let module = match loaded.modules.get(image.name) {
            Some(m) => *m,
            None => {
                let at = image.bytes.as_ptr().cast();
                // SAFETY: the image is a whole fatbin, which tells its own length.
                let m = unsafe { result::module::load_data(at) }
                    .map_err(failed(&format!("loading kernels/{}.cu", image.name)))?;
                loaded.modules.insert(image.name, m);
                m
            }
        };
        let name = CString::new(kernel.name).map_err(|e| device_error(e.to_string()))?;
        // SAFETY: the module is loaded, and stays so.
        let f =
            unsafe { result::module::get_function(module, name) }.map_err(failed(kernel.name))?;
        let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let limit = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let bytes = attribute(self.facts.device, limit)?;
        if bytes.unsigned_abs() > FREE_SHARED {
            // SAFETY: the function belongs to a loaded module.
            unsafe { result::function::set_function_attribute(f, most, bytes) }
                .map_err(failed(kernel.name))?;
        }
        if kernel.beside > 1 {
            // All that a multiprocessor has: the driver's own choice may leave room for one block.
            let most =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // SAFETY: as above.
            unsafe { result::function::set_function_attribute(f, most, 100) }
                .map_err(failed(kernel.name))?;
        }
        loaded.functions.insert(kernel.name, f);
        Ok(f)
    }
}

impl Driver for Gpu {
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("context"))
    }

    fn describe(&self) -> String {
        self.facts.to_string()
    }

    fn name(&self) -> &str {
        &self.facts.name
    }

    fn processors(&self) -> u32 {
        self.facts.processors
    }

    fn arch(&self) -> Arch {
        if self.facts.capability == (9, 0) { Arch::Sm90 } else { Arch::Sm80 }
    }

    fn tensor_map(&self, tensor: &Tensor) -> Result<Words> {
        use sys::{
            CUtensorMapDataType_enum as Type, CUtensorMapFloatOOBfill_enum as Fill,
            CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
            CUtensorMapSwizzle_enum as Swizzle,
        };
        let kind = match tensor.element_bytes {
            2 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match tensor.swizzle {
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays hold `rank` numbers and more, but for the strides, which the driver
        // wants of all dimensions but the innermost; it reads no tensor.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                kind,
                tensor.rank,
                tensor.base as *mut c_void,
                tensor.dims.as_ptr(),
                tensor.strides[1..].as_ptr(),
                tensor.tile.as_ptr(),
                [1; 4].as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed(&format!("a tensor map of {tensor:?}")))?;
        Ok(Words(map.opaque))
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        result::mem_get_info().map(|(free, _)| Some(free)).map_err(failed("memory"))
    }

    fn alloc(&self, bytes: usize) -> Result<NonNull<u8>> {
        // SAFETY: the context is current.
        let at = unsafe { result::malloc_sync(bytes) }
            .map_err(failed(&format!("allocating {bytes} bytes")))?;
        NonNull::new(at as *mut u8).ok_or_else(|| device_error("allocated at address 0"))
    }

    unsafe fn free(&self, at: NonNull<u8>) {
        // Kernels that use it may be under way.
        if self.synchronize().is_ok() {
            // A failure here says that the device is lost; there is nothing left to free then.
            // SAFETY: the caller's promise.
            let _ = unsafe { result::free_sync(dptr(at)) };
        }
    }

    fn pin(&self, bytes: usize) -> Result<NonNull<u8>> {
        // SAFETY: the context is current; the memory is written below.
        let at = unsafe { result::malloc_host(bytes, 0) }
            .map_err(failed(&format!("pinning {bytes} bytes of host memory")))?;
        let at = NonNull::new(at.cast::<u8>());
        let at = at.ok_or_else(|| device_error("pinned host memory at address 0"))?;
        // SAFETY: just allocated with as many bytes.
        unsafe { at.as_ptr().write_bytes(0, bytes) };
        Ok(at)
    }

    unsafe fn unpin(&self, at: NonNull<u8>) {
        // Copies may be under way. Where that cannot be known, the memory stays.
        if self.synchronize().is_ok() {
            // SAFETY: the caller's promise.
            let _ = unsafe { result::free_host(at.as_ptr().cast()) };
        }
    }

    unsafe fn copy_in(&self, to: NonNull<u8>, from: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_htod_async(dptr(to), from, self.stream) }
            .map_err(failed("copying to the device"))
    }

    unsafe fn copy_out(&self, to: &mut [u8], from: NonNull<u8>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(to, dptr(from), self.stream) }
            .map_err(failed("copying from the device"))
    }

    unsafe fn copy(&self, to: NonNull<u8>, from: NonNull<u8>, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(dptr(to), dptr(from), bytes, self.stream) }
            .map_err(failed("copying on the device"))
    }

    unsafe fn fill(&self, to: NonNull<u8>, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(dptr(to), byte, bytes, self.stream) }
            .map_err(failed("filling device memory"))
    }

    unsafe fn launch(&self, k: &Kernel, launch: Launch, args: &mut [*mut c_void]) -> Result<()> {
        let f = self.function(k)?;
        let [x, y, z] = launch.blocks;
        let size = (k.threads, 1, 1);
        // Where blocks wait for each other, the driver refuses a grid that does not fit the device
        // at once.
        let start =
            if launch.together { result::launch_cooperative_kernel } else { result::launch_kernel };
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        unsafe { start(f, (x, y, z), size, launch.shared, self.stream, args) }
            .map_err(failed(k.name))
    }

    fn resident(&self, k: &Kernel, launch: Launch) -> Result<u32> {
        let (f, shared) = (self.function(k)?, launch.shared as usize);
        // SAFETY: the function belongs to a loaded module.
        let blocks = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(f, k.threads as c_int, shared)
        };
        blocks.map(i32::unsigned_abs).map_err(failed(k.name))
    }

    fn stream(&self) -> Result<*mut c_void> {
        Ok(self.stream.cast())
    }

    fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("the device"))
    }

    fn event(&self) -> Result<Event> {
        // Recording and waiting are cheapest without a time stamp.
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(failed("event"))?;
        Ok(Event(event.cast()))
    }

    unsafe fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: the caller's promise; the stream lives as long as `self`.
        unsafe { result::event::record(event.0.cast(), self.stream) }.map_err(failed("event"))
    }

    unsafe fn wait_for(&self, event: &Event) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::event::synchronize(event.0.cast()) }.map_err(failed("the device"))
    }

    unsafe fn end_event(&self, event: &Event) {
        // A failure here says that the device is lost.
        // SAFETY: the caller's promise.
        let _ = unsafe { result::event::destroy(event.0.cast()) };
    }

    fn mark(&self) -> Result<Mark> {
        let free = self.events.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = free.map_or_else(|| result::event::create(flags), Ok);
        let event = event.map_err(failed("event"))?;
        let mark = Mark(event as u64);
        // SAFETY: event and stream are alive.
        let done = unsafe { result::event::record(event, self.stream) };
        done.map_err(failed("event")).map(|()| mark).inspect_err(|_| self.forget(&[mark]))
    }

    fn between(&self, start: Mark, end: Mark) -> Result<f64> {
        let [start, end] = [start, end].map(|mark| mark.0 as sys::CUevent);
        // SAFETY: marks are events that were recorded, and live until the device ends.
        let ms = unsafe { result::event::elapsed(start, end) }.map_err(failed("event"))?;
        Ok(f64::from(ms) / 1e3)
    }

    fn forget(&self, marks: &[Mark]) {
        let events = marks.iter().map(|mark| mark.0 as sys::CUevent);
        self.events.lock().unwrap_or_else(PoisonError::into_inner).extend(events);
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What fails here says that the device is lost.
        let _ = self.enter();
        for event in self.events.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: created by `mark`, and given back.
            let _ = unsafe { result::event::destroy(event) };
        }
        // SAFETY: nothing can use the stream any more; modules go with the context.
        let _ = unsafe { result::stream::destroy(self.stream) };
        // SAFETY: retained in `new`.
        let _ = unsafe { result::primary_ctx::release(self.facts.device) };
    }
}
