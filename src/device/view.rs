//! Access to device memory: a [`View`] reads it, a [`ViewMut`] writes it.
//!
//! A view of host memory is made from a slice (`View::from(&x[..])`), so tests and embedders call
//! ops on their own arrays. Memory of a CUDA device has no host slice: `Device::read` copies it.

#![allow(unsafe_code)]

use std::{any::TypeId, marker::PhantomData, ops::Range, ptr::NonNull};

use bytemuck::Pod;

use super::float::Element;
use crate::error::{Error, Result};

/// Which processor can reach a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Host,
    Device,
}

fn on_device(place: Place) -> Result<()> {
    match place {
        Place::Device => Ok(()),
        Place::Host => Err(Error::Device {
            wanted: "cuda".into(),
            reason: "a buffer is in host memory".into(),
        }),
    }
}

/// Whether `T` and `T::Acc` are one type.
fn computed_on_cpu<T: Element>() -> Result<()> {
    if TypeId::of::<T>() == TypeId::of::<T::Acc>() {
        return Ok(());
    }
    Err(Error::Device {
        wanted: "cpu".into(),
        reason: format!("it does not compute in {}", T::NAME),
    })
}

/// Shared access to a region. `Copy`, like `&[T]`.
#[derive(Debug)]
pub struct View<'a, T> {
    pub(super) ptr: NonNull<T>,
    pub(super) len: usize,
    pub(super) place: Place,
    pub(super) _memory: PhantomData<&'a [T]>,
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
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in host memory.
    ///
    /// # Panics
    /// If they are on a device: an op took the CPU's path with a device's buffers.
    pub fn host(self) -> &'a [T] {
        assert_eq!(self.place, Place::Host, "device memory has no host slice");
        // SAFETY: every constructor takes memory that is initialised and shared for `'a`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    pub fn address(&self) -> usize {
        self.ptr.addr().get()
    }

    /// Its address on the device.
    pub(super) fn device_ptr(self) -> Result<NonNull<u8>> {
        on_device(self.place).map(|()| self.ptr.cast())
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range leaves the view, like slicing.
    pub fn range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: inside the view, as just checked.
        let ptr = unsafe { self.ptr.add(range.start) };
        Self { ptr, len: range.len(), ..self }
    }
}

impl<'a, T: Element> View<'a, T> {
    /// The same elements as what the CPU computes in.
    pub fn float(self) -> Result<View<'a, T::Acc>> {
        computed_on_cpu::<T>()?;
        Ok(View { ptr: self.ptr.cast(), len: self.len, place: self.place, _memory: PhantomData })
    }
}

impl<'a, T> From<&'a [T]> for View<'a, T> {
    fn from(x: &'a [T]) -> Self {
        Self {
            ptr: NonNull::from(x).cast(),
            len: x.len(),
            place: Place::Host,
            _memory: PhantomData,
        }
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
    pub(super) ptr: NonNull<T>,
    pub(super) len: usize,
    pub(super) place: Place,
    pub(super) _memory: PhantomData<&'a mut [T]>,
}

// SAFETY: a `ViewMut` is a `&mut [T]` whose memory may be a device's.
unsafe impl<T: Send> Send for ViewMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for ViewMut<'_, T> {}

impl<'a, T> ViewMut<'a, T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in host memory.
    ///
    /// # Panics
    /// If they are on a device: an op took the CPU's path with a device's buffers.
    pub fn host(self) -> &'a mut [T] {
        assert_eq!(self.place, Place::Host, "device memory has no host slice");
        // SAFETY: every constructor takes memory that is initialised and exclusive for `'a`, and
        // `self` is consumed.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// `len` elements of device memory at `at`.
    ///
    /// # Safety
    /// They are there, aligned, of any bits, and reachable through nothing else for `'a`.
    pub(super) unsafe fn on_device(at: NonNull<u8>, len: usize) -> Self {
        Self { ptr: at.cast(), len, place: Place::Device, _memory: PhantomData }
    }

    /// A shorter borrow, to pass on and keep.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { ptr: self.ptr, len: self.len, place: self.place, _memory: PhantomData }
    }

    pub fn view(&self) -> View<'_, T> {
        View { ptr: self.ptr, len: self.len, place: self.place, _memory: PhantomData }
    }

    pub fn address(&self) -> usize {
        self.ptr.addr().get()
    }

    /// Its address on the device.
    pub(super) fn device_ptr(self) -> Result<NonNull<u8>> {
        on_device(self.place).map(|()| self.ptr.cast())
    }

    /// The first `len` elements, where there may be more.
    pub fn scratch(self, op: &'static str, len: usize) -> Result<Self> {
        if self.len < len {
            return Err(Error::shape(op, "scratch", &[len], &[self.len]));
        }
        Ok(self.range(0..len))
    }

    /// The same bytes as whole numbers of another type.
    ///
    /// # Panics
    /// If they do not begin where such numbers may.
    pub fn cast<U: Pod>(self) -> ViewMut<'a, U>
    where
        T: Pod,
    {
        assert!(self.address().is_multiple_of(align_of::<U>()), "alignment");
        let len = self.len * size_of::<T>() / size_of::<U>();
        ViewMut { ptr: self.ptr.cast(), len, place: self.place, _memory: PhantomData }
    }

    /// Two parts, before and from `mid`.
    ///
    /// # Panics
    /// If `mid` is beyond the end, like a slice's.
    pub fn split_at(self, mid: usize) -> (Self, Self) {
        assert!(mid <= self.len, "split at {mid} of {}", self.len);
        // SAFETY: inside the view, or at its end.
        let high = unsafe { self.ptr.add(mid) };
        let part = |ptr, len| Self { ptr, len, place: self.place, _memory: PhantomData };
        (part(self.ptr, mid), part(high, self.len - mid))
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range leaves the view, like slicing.
    pub fn range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: inside the view, as just checked.
        let ptr = unsafe { self.ptr.add(range.start) };
        Self { ptr, len: range.len(), ..self }
    }
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// The same elements as what the CPU computes in.
    pub fn float(self) -> Result<ViewMut<'a, T::Acc>> {
        computed_on_cpu::<T>()?;
        Ok(ViewMut { ptr: self.ptr.cast(), len: self.len, place: self.place, _memory: PhantomData })
    }
}

impl<'a, T> From<&'a mut [T]> for ViewMut<'a, T> {
    fn from(x: &'a mut [T]) -> Self {
        Self {
            len: x.len(),
            ptr: NonNull::from(x).cast(),
            place: Place::Host,
            _memory: PhantomData,
        }
    }
}

impl<'a, T> From<&'a mut Vec<T>> for ViewMut<'a, T> {
    fn from(x: &'a mut Vec<T>) -> Self {
        x.as_mut_slice().into()
    }
}
