//! Typed device memory: [`Buffer`] owns or borrows a region, [`View`] reads it, [`ViewMut`]
//! writes it.
//!
//! A view of host memory is made from a slice (`View::from(&x[..])`), so tests and embedders call
//! ops on their own arrays.

#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc, alloc_zeroed, dealloc},
    marker::PhantomData,
    ops::Range,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use bytemuck::Pod;

use super::{Device, system};
use crate::error::{Error, Result};

/// Alignment of every buffer: a cache line, and one 512-bit vector.
pub(super) const ALIGN: usize = 64;

/// Blocks from this size on are compared with the memory that is free before they are taken: beyond
/// it the system would not refuse, but kill the process once the memory is written.
const LARGE: usize = 64 << 20;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// How often device memory was allocated in this process. Nothing is allocated inside a step.
#[must_use]
pub fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// A block of bytes from the system, aligned to [`ALIGN`].
#[derive(Debug)]
pub(super) struct Block {
    ptr: NonNull<u8>,
    layout: Layout,
}

/// Fresh memory is NaN, to catch what reads before it writes.
const POISON: bool = cfg!(debug_assertions);

// SAFETY: a `Block` is plain memory with one owner; access goes through views that borrow it.
unsafe impl Send for Block {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    /// Memory that `dev` works on: zeroed, or 0xFF bytes (NaN) where debug assertions are on.
    pub(super) fn new(dev: &Device, what: &'static str, bytes: usize) -> Result<Self> {
        let Device::Cpu(_) = dev;
        let free = if bytes < LARGE { None } else { system::free_memory_bytes() };
        let error = |have| Error::Memory { what, want: bytes, have };
        if let Some(have) = free.filter(|have| bytes > *have) {
            return Err(error(have));
        }
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        let rounded = bytes.checked_next_multiple_of(ALIGN).map(|b| b.max(ALIGN));
        let layout = rounded.and_then(|b| Layout::from_size_align(b, ALIGN).ok());
        let layout = layout.ok_or_else(|| error(isize::MAX as usize))?;
        // SAFETY: `layout` has a size of at least ALIGN bytes.
        let ptr = unsafe { (if POISON { alloc } else { alloc_zeroed })(layout) };
        let ptr = NonNull::new(ptr).ok_or_else(|| error(free.unwrap_or(0)))?;
        if POISON {
            // SAFETY: `ptr` owns that many bytes, just allocated.
            unsafe { ptr.as_ptr().write_bytes(0xFF, layout.size()) };
        }
        Ok(Self { ptr, layout })
    }

    pub(super) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    pub(super) fn bytes(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

/// A region of device memory: its own allocation (`Buffer<'static, T>`), or a part of an
/// [`Arena`](super::Arena) scope.
#[derive(Debug)]
pub struct Buffer<'a, T> {
    ptr: NonNull<T>,
    len: usize,
    _own: Option<Block>,
    _arena: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Buffer` is an exclusive handle to its region, like `&mut [T]`.
unsafe impl<T: Send> Send for Buffer<'_, T> {}
// SAFETY: as above; `&Buffer` only reads.
unsafe impl<T: Sync> Sync for Buffer<'_, T> {}

impl<T: Pod> Buffer<'static, T> {
    /// `len` elements on `dev` that must be written before they are read; NaN in debug builds. `what`
    /// names them in messages.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no room.
    pub fn new(dev: &Device, what: &'static str, len: usize) -> Result<Self> {
        const { assert!(align_of::<T>() <= ALIGN) };
        // What overflows is refused by `Block::new`.
        let block = Block::new(dev, what, len.saturating_mul(size_of::<T>()))?;
        Ok(Self { ptr: block.ptr().cast(), len, _own: Some(block), _arena: PhantomData })
    }

    /// `len` elements of 0.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub fn zeros(dev: &Device, what: &'static str, len: usize) -> Result<Self> {
        let mut buffer = Self::new(dev, what, len)?;
        // A block that is not poisoned is zeroed already, and its pages are not there yet.
        if POISON {
            buffer.host_mut().fill(T::zeroed());
        }
        Ok(buffer)
    }

    /// A copy of host memory.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub fn of(dev: &Device, what: &'static str, x: &[T]) -> Result<Self> {
        let mut buffer = Self::new(dev, what, x.len())?;
        buffer.host_mut().copy_from_slice(x);
        Ok(buffer)
    }
}

impl<'a, T: Pod> Buffer<'a, T> {
    /// # Safety
    /// `ptr..ptr+len` must be initialised, aligned, and reachable through nothing else for `'a`.
    pub(super) unsafe fn from_raw(ptr: NonNull<T>, len: usize) -> Self {
        Self { ptr, len, _own: None, _arena: PhantomData }
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// To read.
    #[must_use]
    pub fn view(&self) -> View<'_, T> {
        View { ptr: self.ptr, len: self.len, _memory: PhantomData }
    }

    /// To write.
    #[must_use]
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { ptr: self.ptr, len: self.len, _memory: PhantomData }
    }

    /// The elements in host memory.
    #[must_use]
    pub fn host(&self) -> &[T] {
        self.view().host()
    }

    /// The elements in host memory, to write.
    #[must_use]
    pub fn host_mut(&mut self) -> &mut [T] {
        self.view_mut().host()
    }
}

/// Shared access to a region. `Copy`, like `&[T]`.
#[derive(Debug)]
pub struct View<'a, T> {
    ptr: NonNull<T>,
    len: usize,
    _memory: PhantomData<&'a [T]>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for View<'_, T> {}

// SAFETY: a `View` is a `&[T]` whose memory may be a device's.
unsafe impl<T: Sync> Send for View<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for View<'_, T> {}

impl<'a, T> View<'a, T> {
    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in host memory.
    #[must_use]
    pub fn host(self) -> &'a [T] {
        // SAFETY: every constructor takes memory that is initialised and shared for `'a`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range leaves the view, like slicing.
    #[must_use]
    pub fn range(self, range: Range<usize>) -> Self {
        self.host()[range].into()
    }
}

impl<'a, T> From<&'a [T]> for View<'a, T> {
    fn from(x: &'a [T]) -> Self {
        Self { ptr: NonNull::from(x).cast(), len: x.len(), _memory: PhantomData }
    }
}

impl<'a, T> From<&'a Vec<T>> for View<'a, T> {
    fn from(x: &'a Vec<T>) -> Self {
        x.as_slice().into()
    }
}

/// Exclusive access to a region, like `&mut [T]`.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    ptr: NonNull<T>,
    len: usize,
    _memory: PhantomData<&'a mut [T]>,
}

// SAFETY: a `ViewMut` is a `&mut [T]` whose memory may be a device's.
unsafe impl<T: Send> Send for ViewMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for ViewMut<'_, T> {}

impl<'a, T> ViewMut<'a, T> {
    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in host memory.
    #[must_use]
    pub fn host(self) -> &'a mut [T] {
        // SAFETY: every constructor takes memory that is initialised and exclusive for `'a`, and
        // `self` is consumed.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// A shorter borrow, to pass on and keep.
    #[must_use]
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { ptr: self.ptr, len: self.len, _memory: PhantomData }
    }

    /// To read.
    #[must_use]
    pub fn view(&self) -> View<'_, T> {
        View { ptr: self.ptr, len: self.len, _memory: PhantomData }
    }

    /// Two parts, before and from `mid`.
    ///
    /// # Panics
    /// If `mid` is beyond the end, like a slice's.
    #[must_use]
    pub fn split_at(self, mid: usize) -> (Self, Self) {
        let (low, high) = self.host().split_at_mut(mid);
        (low.into(), high.into())
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range leaves the view, like slicing.
    #[must_use]
    pub fn range(self, range: Range<usize>) -> Self {
        (&mut self.host()[range]).into()
    }
}

impl<'a, T> From<&'a mut [T]> for ViewMut<'a, T> {
    fn from(x: &'a mut [T]) -> Self {
        Self { len: x.len(), ptr: NonNull::from(x).cast(), _memory: PhantomData }
    }
}

impl<'a, T> From<&'a mut Vec<T>> for ViewMut<'a, T> {
    fn from(x: &'a mut Vec<T>) -> Self {
        x.as_mut_slice().into()
    }
}
