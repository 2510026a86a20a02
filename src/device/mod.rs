//! Where numbers live and where work runs. Nothing here knows an op.
//!
//! Ops receive a [`Device`], read [`View`]s and write [`ViewMut`]s; each op file matches on the
//! device itself, so there is no trait that lists every op.

mod arch;
mod arena;
mod buffer;
mod clock;
pub mod cpu;
pub mod cuda;
mod elementary;
pub mod file;
mod float;
mod pending;
pub mod profile;
mod system;
mod view;

pub use arch::Arch;
pub use arena::{Arena, Scope};
pub use buffer::{Buffer, allocated, allocations};
pub use cpu::Cpu;
pub use cuda::Cuda;
pub use float::{Element, Float};
pub use pending::Pending;
pub use profile::{Profile, Work};
pub use system::{free_disk_bytes, free_in_group, kill_group, reserve};
pub use view::{View, ViewMut};

use std::{borrow::Cow, sync::Arc};

use bytemuck::Pod;

use profile::{Kind, Peaks, Span};

use crate::{
    error::{Error, Result},
    shape,
};

/// The most threads that can be asked for.
const MAX_THREADS: usize = 1024;

/// A place that has memory and computes. Cloning shares it.
#[derive(Clone, Debug)]
pub enum Device {
    /// All cores of this machine.
    Cpu(Cpu),
    /// A GPU, or the simulator of one.
    Cuda(Cuda),
}

impl Device {
    /// The CPU with all its cores and its best instruction set.
    pub fn cpu() -> Self {
        Self::Cpu(Cpu::new(0))
    }

    /// Parses `auto`, `cpu`, `cuda` or `cuda:N`; `auto` is the first GPU if this build has kernels
    /// for it, else the CPU. `sim` and `sim:hopper` are the simulator in the library that
    /// `$WARPO_SIM` names, for tests. `threads` is 0 for all cores.
    pub fn from_name(name: &str, threads: usize) -> Result<Self> {
        if threads > MAX_THREADS {
            return Err(Error::config("threads", format!("0 to {MAX_THREADS}"), threads));
        }
        let cpu = || Self::Cpu(Cpu::new(threads));
        match (name, name.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Cuda::new(0).map_or_else(|_| cpu(), Self::Cuda)),
            ("cpu", _) => Ok(cpu()),
            ("cuda", _) => Cuda::new(0).map(Self::Cuda),
            ("sim", _) => simulated(name, Arch::Sm80),
            ("sim:hopper", _) => simulated(name, Arch::Sm90),
            (_, Some(Ok(ordinal))) => Cuda::new(ordinal).map(Self::Cuda),
            _ => Err(Error::Device {
                wanted: name.into(),
                reason: "known devices are auto, cpu, cuda, cuda:N, sim and sim:hopper".into(),
            }),
        }
    }

    /// The same device, which from now on writes down what it does, and what it wrote.
    pub fn profiled(self) -> (Self, Profile) {
        let name = self.describe();
        match self {
            Self::Cpu(cpu) => {
                let own = cpu.clone().with_profile(None);
                let profile = Profile::new(name, None, move || Some(Peaks::measured(&own)));
                (Self::Cpu(cpu.with_profile(Some(profile.clone()))), profile)
            }
            Self::Cuda(cuda) => {
                // The profile's own has none, else neither would end.
                let own = Arc::new(cuda.with_profile(None));
                let profile = Profile::new(name, Some(own.clone()), move || Peaks::of(own.name()));
                (Self::Cuda(cuda.with_profile(Some(profile.clone()))), profile)
            }
        }
    }

    fn profile(&self) -> Option<&Profile> {
        match self {
            Self::Cpu(cpu) => cpu.profile(),
            Self::Cuda(cuda) => cuda.profile(),
        }
    }

    /// Begins a phase of a run, such as `rollout`, which ends with what is returned.
    pub fn span(&self, phase: &'static str) -> Span {
        Span::begin(self.profile(), Kind::Phase, phase, Work::default)
    }

    /// Begins an op, which ends with what is returned; `work` is asked for if the device is
    /// [`Device::profiled`].
    pub fn op(&self, name: &'static str, work: impl FnOnce() -> Work) -> Span {
        Span::begin(self.profile(), Kind::Op, name, work)
    }

    /// Where host memory is worked on: itself, or the CPU beside a GPU, with `threads` threads.
    pub fn host(&self, threads: usize) -> Self {
        match self {
            Self::Cpu(_) => self.clone(),
            Self::Cuda(_) => Self::Cpu(Cpu::new(threads)),
        }
    }

    /// The CPU, for an op that has no CUDA kernel yet.
    ///
    /// # Errors
    /// [`Error::Device`] naming the op on a CUDA device.
    pub fn on_cpu(&self, op: &str) -> Result<&Cpu> {
        match self {
            Self::Cpu(cpu) => Ok(cpu),
            Self::Cuda(_) => Err(Error::Device {
                wanted: "cuda".into(),
                reason: format!("`{op}` has no CUDA kernel yet"),
            }),
        }
    }

    /// A copy of a buffer, after all work on it.
    pub fn read<T: Pod>(&self, x: View<'_, T>) -> Result<Vec<T>> {
        match self {
            Self::Cpu(_) => Ok(x.host().to_vec()),
            Self::Cuda(cuda) => cuda.read(x),
        }
    }

    /// A copy of a buffer after all work on it so far. A CUDA device need not be done yet: only
    /// [`Pending::get`] waits, and the buffer may be written or end meanwhile.
    pub fn read_later<T: Pod>(&self, x: View<'_, T>) -> Result<Pending<Vec<T>>> {
        match self {
            Self::Cpu(_) => Ok(Pending::now(x.host().to_vec())),
            Self::Cuda(cuda) => cuda.read_later(x),
        }
    }

    /// Ends what one wait covers: [`Pending::get`] of a result issued before this does not wait for
    /// later work, so that a CUDA device works on while the host reads.
    pub fn milestone(&self) -> Result<()> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Cuda(cuda) => cuda.milestone(),
        }
    }

    /// Copies `from` to a buffer. On a CUDA device it does not wait for the copy, though `from` may
    /// change or end when it returns.
    pub fn write<T: Pod>(&self, to: ViewMut<'_, T>, from: &[T]) -> Result<()> {
        shape::check("write", "to", &[from.len()], to.len())?;
        match self {
            Self::Cpu(_) => to.host().copy_from_slice(from),
            Self::Cuda(cuda) => cuda.write(to, from)?,
        }
        Ok(())
    }

    /// Copies `from` to `to`, both of this device.
    pub fn copy<T: Pod>(&self, to: ViewMut<'_, T>, from: View<'_, T>) -> Result<()> {
        shape::check("copy", "to", &[from.len()], to.len())?;
        match self {
            Self::Cpu(_) => to.host().copy_from_slice(from.host()),
            Self::Cuda(cuda) => cuda.copy(to, from)?,
        }
        Ok(())
    }

    /// Sets all bytes of a buffer to 0.
    pub fn zero<T: Pod>(&self, to: ViewMut<'_, T>) -> Result<()> {
        match self {
            Self::Cpu(_) => to.host().fill(T::zeroed()),
            Self::Cuda(cuda) => cuda.zero(to)?,
        }
        Ok(())
    }

    /// The numbers of a buffer in host memory: where they are on the CPU, else a copy.
    pub fn on_host<'a, T: Pod>(&self, x: View<'a, T>) -> Result<Cow<'a, [T]>> {
        match self {
            Self::Cpu(_) => Ok(x.host().into()),
            Self::Cuda(cuda) => Ok(cuda.read(x)?.into()),
        }
    }

    /// Devices of a family give the same bits: `cpu`, `sm_80` or `Hopper`.
    pub fn family(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "cpu",
            Self::Cuda(cuda) => cuda.arch().name(),
        }
    }

    /// Bytes of its memory that are free, if that is known.
    pub fn free_memory(&self) -> Result<Option<usize>> {
        match self {
            Self::Cpu(_) => Ok(system::free_memory_bytes()),
            Self::Cuda(cuda) => cuda.free_memory(),
        }
    }

    /// A line for people: kind, threads, instruction set.
    pub fn describe(&self) -> String {
        match self {
            Self::Cpu(cpu) => format!("cpu, {} threads, {}", cpu.threads(), cpu.isa()),
            Self::Cuda(cuda) => cuda.describe(),
        }
    }
}

/// The simulator, playing this machine.
fn simulated(name: &str, arch: Arch) -> Result<Device> {
    let Some(library) = std::env::var_os("WARPO_SIM") else {
        let reason =
            "WARPO_SIM does not name the library of the simulator, which `cargo test` builds";
        return Err(Error::Device { wanted: name.into(), reason: reason.into() });
    };
    Cuda::simulated(library.as_ref(), cuda::Order::default(), arch).map(Device::Cuda)
}
