//! A GPU known only by its data sheet, for `warpo plan`.

use std::{ffi::c_void, ptr::NonNull};

use super::{Arch, Driver, Event, Kernel, Launch, Mark, device_error, map};
use crate::error::Result;

/// A GPU's data sheet, as far as a plan needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuSpec {
    /// As it is asked for.
    pub key: &'static str,
    /// As NVIDIA sells it.
    pub name: &'static str,
    pub processors: u32,
    pub arch: Arch,
    /// Bytes of memory, as `nvidia-smi` tells them.
    pub memory: usize,
}

const fn gpu(
    key: &'static str,
    name: &'static str,
    processors: u32,
    arch: Arch,
    mib: usize,
) -> GpuSpec {
    GpuSpec { key, name, processors, arch, memory: mib << 20 }
}

/// GPUs that plans can be made for.
pub const GPUS: &[GpuSpec] = &[
    gpu("h200", "NVIDIA H200, 141 GB", 132, Arch::Sm90, 143_771),
    gpu("h100", "NVIDIA H100 SXM, 80 GB", 132, Arch::Sm90, 81_559),
    gpu("a100", "NVIDIA A100, 80 GB", 108, Arch::Sm80, 81_920),
    gpu("a100-40", "NVIDIA A100, 40 GB", 108, Arch::Sm80, 40_960),
    gpu("l40s", "NVIDIA L40S, 48 GB", 142, Arch::Sm80, 46_068),
    gpu("rtx4090", "NVIDIA GeForce RTX 4090, 24 GB", 128, Arch::Sm80, 24_564),
];

impl GpuSpec {
    fn absent<T>(&self) -> Result<T> {
        Err(device_error(format!("{} is a plan: nothing runs on it", self.name)))
    }
}

impl Driver for GpuSpec {
    fn enter(&self) -> Result<()> {
        Ok(())
    }

    fn describe(&self) -> String {
        self.name.into()
    }

    fn name(&self) -> &str {
        self.name
    }

    fn processors(&self) -> u32 {
        self.processors
    }

    fn arch(&self) -> Arch {
        self.arch
    }

    fn tensor_map(&self, _tensor: &map::Tensor) -> Result<map::Words> {
        self.absent()
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(Some(self.memory))
    }

    /// An address that nothing dereferences: every call that would is refused.
    fn alloc(&self, _bytes: usize) -> Result<NonNull<u8>> {
        Ok(NonNull::dangling())
    }

    unsafe fn free(&self, _at: NonNull<u8>) {}

    /// Host memory, as a write copies to it before it is refused. The few bytes leak.
    fn pin(&self, bytes: usize) -> Result<NonNull<u8>> {
        Ok(NonNull::from(Box::leak(vec![0; bytes].into_boxed_slice())).cast())
    }

    unsafe fn unpin(&self, _at: NonNull<u8>) {}

    unsafe fn copy_in(&self, _to: NonNull<u8>, _from: &[u8]) -> Result<()> {
        self.absent()
    }

    unsafe fn copy_out(&self, _to: &mut [u8], _from: NonNull<u8>) -> Result<()> {
        self.absent()
    }

    unsafe fn copy(&self, _to: NonNull<u8>, _from: NonNull<u8>, _bytes: usize) -> Result<()> {
        self.absent()
    }

    unsafe fn fill(&self, _to: NonNull<u8>, _byte: u8, _bytes: usize) -> Result<()> {
        self.absent()
    }

    unsafe fn launch(&self, _: &Kernel, _: Launch, _: &mut [*mut c_void]) -> Result<()> {
        self.absent()
    }

    fn resident(&self, _kernel: &Kernel, _launch: Launch) -> Result<u32> {
        self.absent()
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn event(&self) -> Result<Event> {
        Ok(Event(std::ptr::null_mut()))
    }

    unsafe fn record(&self, _event: &Event) -> Result<()> {
        Ok(())
    }

    unsafe fn wait_for(&self, _event: &Event) -> Result<()> {
        Ok(())
    }

    unsafe fn end_event(&self, _event: &Event) {}

    fn mark(&self) -> Result<Mark> {
        self.absent()
    }

    fn between(&self, _start: Mark, _end: Mark) -> Result<f64> {
        self.absent()
    }

    fn forget(&self, _marks: &[Mark]) {}
}
