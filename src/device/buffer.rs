//! Typed device memory: a [`Buffer`] owns or borrows a region.

#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc, alloc_zeroed, dealloc},
    marker::PhantomData,
    ptr::NonNull,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

use bytemuck::Pod;

use super::{
    Cuda, Device, system,
    view::{Place, View, ViewMut},
};
use crate::error::{Error, Result};

/// Alignment of every buffer: a cache line, and one 512-bit vector.
pub(super) const ALIGN: usize = 64;

/// Blocks from this size on are compared with the memory that is free before they are taken: beyond
/// it the system would not refuse, but kill the process once the memory is written.
const LARGE: usize = 64 << 20;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

/// Bytes of device memory that this process has now, as they were asked for.
pub fn allocated() -> usize {
    ALLOCATED.load(Ordering::Relaxed)
}

/// How often device memory was allocated in this process. Nothing is allocated inside a step.
pub fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// A block of bytes from the system or from a CUDA device, aligned to [`ALIGN`].
#[derive(Debug)]
pub(super) struct Block {
    ptr: NonNull<u8>,
    bytes: usize,
    /// As [`allocated`] counts them.
    asked: usize,
    /// The device that owns the memory; none for the host's.
    cuda: Option<Cuda>,
}

/// Fresh memory is NaN, to catch what reads before it writes.
const POISON: bool = cfg!(debug_assertions);

// SAFETY: a `Block` is plain memory with one owner; access goes through views that borrow it.
unsafe impl Send for Block {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    /// Memory that `dev` works on: 0xFF bytes (NaN) where debug assertions are on, else zeroed on
    /// the CPU and arbitrary on a CUDA device.
    pub(super) fn new(dev: &Device, what: &'static str, bytes: usize) -> Result<Self> {
        let free = match dev {
            Device::Cuda(cuda) => cuda.free_memory()?,
            Device::Cpu(_) if bytes < LARGE => None,
            Device::Cpu(_) => system::free_memory_bytes(),
        };
        let error = |have| Error::Memory { what, want: bytes, have };
        if let Some(have) = free.filter(|have| bytes > *have) {
            return Err(error(have));
        }
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        let rounded = bytes.checked_next_multiple_of(ALIGN).map(|b| b.max(ALIGN));
        let layout = rounded.and_then(|b| Layout::from_size_align(b, ALIGN).ok());
        let layout = layout.ok_or_else(|| error(isize::MAX as usize))?;
        let (ptr, cuda) = match dev {
            // Not rounded up: what is written behind it is seen by whoever watches device memory.
            Device::Cuda(cuda) => (Some(cuda.alloc(bytes.max(1))?), Some(cuda.clone())),
            Device::Cpu(_) => {
                // SAFETY: `layout` has a size of at least ALIGN bytes.
                let ptr = unsafe { (if POISON { alloc } else { alloc_zeroed })(layout) };
                (NonNull::new(ptr), None)
            }
        };
        let ptr = ptr.ok_or_else(|| error(free.unwrap_or(0)))?;
        ALLOCATED.fetch_add(bytes, Ordering::Relaxed);
        let asked = bytes;
        let bytes = if cuda.is_some() { bytes } else { layout.size() };
        let block = Self { ptr, bytes, asked, cuda };
        if POISON {
            // SAFETY: nobody else has the block yet.
            unsafe { block.region().poison(0xFF, block.bytes)? };
        }
        Ok(block)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn region(&self) -> Region<'_> {
        Region { at: self.ptr, cuda: self.cuda.as_ref() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        ALLOCATED.fetch_sub(self.asked, Ordering::Relaxed);
        match &self.cuda {
            None => {
                // The layout of `new`, which succeeded there.
                if let Ok(layout) = Layout::from_size_align(self.bytes, ALIGN) {
                    // SAFETY: allocated in `new` with this very layout.
                    unsafe { dealloc(self.ptr.as_ptr(), layout) }
                }
            }
            // SAFETY: allocated in `new` by this device; the block was its only owner.
            Some(cuda) => unsafe { cuda.free(self.ptr) },
        }
    }
}

/// An address inside a [`Block`], and the device that reaches it; for the arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region<'a> {
    at: NonNull<u8>,
    cuda: Option<&'a Cuda>,
}

impl<'a> Region<'a> {
    /// # Safety
    /// `bytes` bytes further is inside the block, or at its end.
    pub(super) unsafe fn add(self, bytes: usize) -> Self {
        // SAFETY: the caller's promise.
        Self { at: unsafe { self.at.add(bytes) }, ..self }
    }

    /// Sets `bytes` bytes to `byte`, which says nothing: poison or a redzone.
    ///
    /// # Safety
    /// They are inside the block, and nobody else uses them.
    pub(super) unsafe fn poison(self, byte: u8, bytes: usize) -> Result<()> {
        match self.cuda {
            // SAFETY: the caller's promise.
            None => unsafe { self.at.as_ptr().write_bytes(byte, bytes) },
            // SAFETY: as above.
            Some(cuda) => unsafe { cuda.poison(self.at, byte, bytes)? },
        }
        Ok(())
    }

    /// A copy of `bytes` bytes, to see whether somebody wrote where nobody may.
    ///
    /// # Safety
    /// They are inside the block.
    pub(super) unsafe fn inspect(self, bytes: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; bytes];
        match self.cuda {
            // SAFETY: the caller's promise; `out` is as long.
            None => unsafe { self.at.as_ptr().copy_to_nonoverlapping(out.as_mut_ptr(), bytes) },
            // SAFETY: the caller's promise.
            Some(cuda) => unsafe { cuda.inspect(&mut out, self.at)? },
        }
        Ok(out)
    }

    /// Forbids or allows kernels to touch `bytes` bytes, where that can be enforced.
    ///
    /// # Safety
    /// They are inside the block.
    pub(super) unsafe fn guard(self, bytes: usize, on: bool) {
        if let Some(cuda) = self.cuda {
            // SAFETY: the caller's promise.
            unsafe { cuda.guard(self.at, bytes, on) };
        }
    }

    /// The `len` elements here.
    ///
    /// # Safety
    /// They are inside the block, initialised, aligned, and reachable through nothing else for
    /// `'a`.
    pub(super) unsafe fn buffer<T>(self, len: usize) -> Buffer<'a, T> {
        Buffer { ptr: self.at.cast(), len, place: self.place(), _own: None, _arena: PhantomData }
    }

    fn place(self) -> Place {
        if self.cuda.is_some() { Place::Device } else { Place::Host }
    }
}

/// A region of device memory: its own allocation (`Buffer<'static, T>`), or a part of an
/// [`Arena`](super::Arena) scope.
#[derive(Debug)]
pub struct Buffer<'a, T> {
    ptr: NonNull<T>,
    len: usize,
    place: Place,
    _own: Option<Block>,
    _arena: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Buffer` is an exclusive handle to its region, like `&mut [T]`.
unsafe impl<T: Send> Send for Buffer<'_, T> {}
// SAFETY: as above; `&Buffer` only reads.
unsafe impl<T: Sync> Sync for Buffer<'_, T> {}

impl<T: Pod> Buffer<'static, T> {
    /// `len` elements on `dev` that must be written before they are read; NaN in debug builds.
    /// `what` names them in messages.
    pub fn new(dev: &Device, what: &'static str, len: usize) -> Result<Self> {
        const { assert!(align_of::<T>() <= ALIGN) };
        // What overflows is refused by `Block::new`.
        let block = Block::new(dev, what, len.saturating_mul(size_of::<T>()))?;
        let place = block.region().place();
        Ok(Self { ptr: block.ptr.cast(), len, place, _own: Some(block), _arena: PhantomData })
    }

    /// `len` elements of 0.
    pub fn zeros(dev: &Device, what: &'static str, len: usize) -> Result<Self> {
        let mut buffer = Self::new(dev, what, len)?;
        // A host block that is not poisoned is zeroed already, and its pages are not there yet.
        if POISON || buffer.place == Place::Device {
            dev.zero(buffer.view_mut())?;
        }
        Ok(buffer)
    }

    /// No elements, in no memory: what stands where a buffer was taken from.
    pub fn none() -> Self {
        Self::empty()
    }

    /// The same memory for `len` numbers of another type. They are to be written before they are
    /// read.
    ///
    /// # Errors
    /// [`Error::Memory`] if they do not fit; the buffer is gone then.
    pub fn reuse<U: Pod>(self, what: &'static str, len: usize) -> Result<Buffer<'static, U>> {
        const { assert!(align_of::<U>() <= ALIGN) };
        let have = self._own.as_ref().map_or(0, |block| block.asked);
        let want = len.saturating_mul(size_of::<U>());
        if want > have {
            return Err(Error::Memory { what, want, have });
        }
        let Self { ptr, place, _own, .. } = self;
        Ok(Buffer { ptr: ptr.cast(), len, place, _own, _arena: PhantomData })
    }

    /// A copy of host memory.
    pub fn of(dev: &Device, what: &'static str, x: &[T]) -> Result<Self> {
        let mut buffer = Self::new(dev, what, x.len())?;
        dev.write(buffer.view_mut(), x)?;
        Ok(buffer)
    }
}

impl<'a, T: Pod> Buffer<'a, T> {
    /// No elements, in no memory.
    pub(super) fn empty() -> Self {
        let ptr = NonNull::dangling();
        Self { ptr, len: 0, place: Place::Host, _own: None, _arena: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn view(&self) -> View<'_, T> {
        View { ptr: self.ptr, len: self.len, place: self.place, _memory: PhantomData }
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { ptr: self.ptr, len: self.len, place: self.place, _memory: PhantomData }
    }

    /// The elements in host memory.
    ///
    /// # Panics
    /// If they are on a device.
    pub fn host(&self) -> &[T] {
        self.view().host()
    }

    /// The elements in host memory, to write.
    ///
    /// # Panics
    /// If they are on a device.
    pub fn host_mut(&mut self) -> &mut [T] {
        self.view_mut().host()
    }
}
