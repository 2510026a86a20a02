//! A GPU that is not there: plans are made with it, and nothing else.

use std::{ffi::c_void, ptr::NonNull};

use super::{Arch, Driver, Event, Kernel, Launch, Mark, device_error, map};
use crate::error::Result;

/// What a plan needs to know of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// As it is asked for.
    pub key: &'static str,
    /// As NVIDIA sells it.
    pub name: &'static str,
    pub processors: u32,
    pub arch: Arch,
    /// Bytes of memory, as `nvidia-smi` tells them.
    pub memory: usize,
}

const fn machine(
    key: &'static str,
    name: &'static str,
    processors: u32,
    arch: Arch,
    mib: usize,
) -> Machine {
    Machine { key, name, processors, arch, memory: mib << 20 }
}

/// GPUs that plans can be made for.
pub const MACHINES: &[Machine] = &[
    machine("h200", "NVIDIA H200, 141 GB", 132, Arch::Sm90, 143_771),
    machine("h100", "NVIDIA H100 SXM, 80 GB", 132, Arch::Sm90, 81_559),
    machine("a100", "NVIDIA A100, 80 GB", 108, Arch::Sm80, 81_920),
    machine("a100-40", "NVIDIA A100, 40 GB", 108, Arch::Sm80, 40_960),
    machine("l40s", "NVIDIA L40S, 48 GB", 142, Arch::Sm80, 46_068),
    machine("rtx4090", "NVIDIA GeForce RTX 4090, 24 GB", 128, Arch::Sm80, 24_564),
];

#[derive(Debug)]
pub(super) struct Blueprint {
    machine: Machine,
}

impl Blueprint {
    pub(super) fn new(machine: Machine) -> Self {
        Self { machine }
    }

    fn absent<T>(&self) -> Result<T> {
        Err(device_error(format!("{} is a plan: nothing runs on it", self.machine.name)))
    }
}

impl Driver for Blueprint {
    fn describe(&self) -> String {
        self.machine.name.into()
    }

    fn name(&self) -> &str {
        self.machine.name
    }

    fn processors(&self) -> u32 {
        self.machine.processors
    }

    fn arch(&self) -> Arch {
        self.machine.arch
    }

    fn tensor_map(&self, _tensor: &map::Tensor) -> Result<map::Words> {
        self.absent()
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(Some(self.machine.memory))
    }

    /// An address that is never followed: all that would is refused.
    fn alloc(&self, _bytes: usize) -> Result<NonNull<u8>> {
        Ok(NonNull::dangling())
    }

    unsafe fn free(&self, _at: NonNull<u8>) {}

    /// Host memory, which is there: a write goes to it before it is refused. The few bytes are not
    /// given back.
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
