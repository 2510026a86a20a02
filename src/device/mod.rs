//! Where numbers live and where work runs. Nothing here knows an op.
//!
//! Ops receive a [`Device`], read [`View`]s and write [`ViewMut`]s; each op file matches on the
//! device itself, so there is no trait that lists every op.

mod arena;
mod buffer;
pub mod cpu;
pub mod file;
mod float;
mod system;

pub use arena::{Arena, Scope};
pub use buffer::{Buffer, View, ViewMut, allocations};
pub use cpu::Cpu;
pub use float::Float;
pub use system::free_disk_bytes;

use crate::error::{Error, Result};

/// The most threads that can be asked for.
const MAX_THREADS: usize = 1024;

/// A compute device.
#[derive(Clone, Debug)]
pub enum Device {
    /// All cores of this machine.
    Cpu(Cpu),
}

impl Device {
    /// The CPU with all its cores and its best instruction set.
    #[must_use]
    pub fn cpu() -> Self {
        Self::Cpu(Cpu::new(0))
    }

    /// Parses `auto`, `cpu`, `cuda` or `cuda:N`; `threads` is 0 for all cores.
    ///
    /// # Errors
    /// [`Error::Device`] if the name is unknown or the device is not there, [`Error::Config`] if
    /// `threads` is no number of threads.
    pub fn from_name(name: &str, threads: usize) -> Result<Self> {
        if threads > MAX_THREADS {
            return Err(Error::config("threads", format!("0 to {MAX_THREADS}"), threads));
        }
        match name {
            "auto" | "cpu" => Ok(Self::Cpu(Cpu::new(threads))),
            _ if name == "cuda" || name.starts_with("cuda:") => Err(Error::Device {
                wanted: name.into(),
                reason: "this version has no CUDA kernels yet; the CPU is `cpu`".into(),
            }),
            _ => Err(Error::Device {
                wanted: name.into(),
                reason: "known devices are auto, cpu, cuda and cuda:N".into(),
            }),
        }
    }

    /// A line for people: kind, threads, instruction set.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Cpu(cpu) => format!("cpu, {} threads, {}", cpu.threads(), cpu.isa()),
        }
    }
}
