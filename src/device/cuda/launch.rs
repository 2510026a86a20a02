//! How a kernel is launched: its grid, its arguments, and which kernels there are of a name.

use std::ptr::NonNull;

use bytemuck::{Pod, Zeroable};

use super::{
    PACKET, device_error,
    map::{self, Map},
};
use crate::{
    device::{Arch, Element, View, ViewMut},
    error::{Error, Result},
};

/// How a kernel is launched; the threads of a block are the kernel's own.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub blocks: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// All blocks run at the same time, so that one may wait for another: at most one a
    /// multiprocessor.
    pub together: bool,
}

impl Launch {
    /// `blocks` blocks in a row, with `shared` bytes of shared memory.
    pub fn row(blocks: usize, shared: usize) -> Result<Self> {
        let fits = |n: usize| {
            let want = format!("at most {}", i32::MAX);
            i32::try_from(n).map(i32::unsigned_abs).map_err(|_| Error::value("launch", want, n))
        };
        Ok(Self { blocks: [fits(blocks)?, 1, 1], shared: fits(shared)?, together: false })
    }

    /// The same with blocks that may wait for each other.
    pub fn together(self) -> Self {
        Self { together: true, ..self }
    }

    /// At least `threads` threads in blocks of `per_block`; kernels count them in 32 bits.
    pub fn threads(threads: usize, per_block: usize) -> Result<Self> {
        if threads > i32::MAX as usize {
            return Err(Error::value("launch: threads", format!("at most {}", i32::MAX), threads));
        }
        Self::row(threads.div_ceil(per_block), 0)
    }

    /// A thread for each packet of `count` elements in a row, and for each that is left over.
    pub fn packets<T>(count: usize, per_block: usize) -> Result<Self> {
        let width = PACKET / size_of::<T>();
        Self::threads(count / width + count % width, per_block)
    }
}

/// Threads that share a row of `cols` elements: a power of two from 32 to `threads`, as few as hold
/// at most `each` elements.
pub fn group<T>(op: &str, cols: usize, each: usize, threads: usize) -> Result<usize> {
    let (width, most) = (PACKET / size_of::<T>(), each * threads);
    if !cols.is_multiple_of(width) || cols > most {
        let want = format!("a multiple of {width}, at most {most}");
        return Err(Error::value(format!("{op}: columns on a CUDA device"), want, cols));
    }
    Ok(cols.div_ceil(each).next_power_of_two().max(32))
}

/// Elements that a thread takes at once of rows that are made of parts of `lens` elements, in
/// buffers at `begins`: a packet of 16 bytes where all parts begin at one, else 1.
pub fn width<T>(lens: &[usize], begins: &[usize]) -> usize {
    let width = PACKET / size_of::<T>();
    let whole = lens.iter().all(|n| n.is_multiple_of(width));
    if whole && begins.iter().all(|at| at.is_multiple_of(PACKET)) { width } else { 1 }
}

/// A compiled .cu file.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) name: &'static str,
    pub(super) arch: Arch,
    pub(super) bytes: &'static [u8],
}

/// An entry point of an [`Image`].
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) image: &'static Image,
    pub(super) name: &'static str,
    /// What it stores, as [`Element::NAME`].
    pub(super) dtype: &'static str,
    /// Tile or head size that it is compiled for; empty if there is one kernel only.
    pub(super) size: &'static [usize],
    pub(super) threads: u32,
    /// Blocks of a cluster.
    pub(super) cluster: u32,
    /// Blocks that it leaves registers for on a multiprocessor, 0 or 1 if it does not care.
    pub(super) beside: u32,
}

impl Kernel {
    /// The kernel of a `family` for `T` and this size.
    pub(super) fn find<T: Element>(
        all: &'static [Self],
        family: &str,
        size: &[usize],
    ) -> Result<&'static Self> {
        let of = all.iter().filter(|k| k.dtype == T::NAME);
        of.clone().find(|k| k.size == size).ok_or_else(|| match of.count() {
            0 => device_error(format!("`{family}` has no kernel for {}", T::NAME)),
            _ => device_error(format!("`{family}` has no kernel of size {size:?}")),
        })
    }
}

/// Arguments of a launch, each with room for a tensor map.
#[derive(Default)]
pub(super) struct Args {
    pub(super) values: Vec<map::Words>,
    /// The first that cannot be passed, and why.
    pub(super) wrong: Option<(&'static str, String)>,
}

impl Args {
    fn refuse(&mut self, name: &'static str, reason: impl Into<String>) {
        self.wrong.get_or_insert_with(|| (name, reason.into()));
    }

    /// Address 0 stands for no memory. What is read in packets begins at one.
    fn pointer(&mut self, name: &'static str, at: Option<Result<NonNull<u8>>>, packed: bool) {
        let at = match at {
            None => 0,
            Some(Ok(at)) => at.as_ptr() as u64,
            Some(Err(_)) => return self.refuse(name, "is in host memory, wanted device memory"),
        };
        if packed && !at.is_multiple_of(PACKET as u64) {
            self.refuse(name, format!("begins at {at:#x}, wanted a multiple of {PACKET}"));
        }
        self.value(name, at);
    }

    pub(super) fn read<T>(&mut self, name: &'static str, view: Option<View<'_, T>>, packed: bool) {
        self.pointer(name, view.map(View::device_ptr), packed);
    }

    pub(super) fn write<T>(
        &mut self,
        name: &'static str,
        view: Option<ViewMut<'_, T>>,
        packed: bool,
    ) {
        self.pointer(name, view.map(ViewMut::device_ptr), packed);
    }

    pub(super) fn count(&mut self, name: &'static str, count: usize) {
        match i32::try_from(count) {
            Ok(count) => self.value(name, count),
            Err(_) => self.refuse(name, format!("is {count}, wanted at most {}", i32::MAX)),
        }
    }

    pub(super) fn value<T: Pod>(&mut self, _name: &'static str, value: T) {
        let mut words = map::Words::zeroed();
        bytemuck::bytes_of_mut(&mut words)[..size_of::<T>()]
            .copy_from_slice(bytemuck::bytes_of(&value));
        self.values.push(words);
    }

    pub(super) fn map(&mut self, map: Map<'_>) {
        self.values.push(map.words);
    }
}
