//! One allocation, planned before the first step and shared in time.
//!
//! [`Arena::plan`] runs the code that lays out a phase without memory behind it and returns its
//! bytes; [`Arena::new`] takes the largest phase; [`Arena::scope`] starts a phase, whose buffers
//! end with it. So the plan and the run are the same code, and rollout and training share memory.

#![allow(unsafe_code)]

use std::{
    cell::{Cell, RefCell},
    marker::PhantomData,
};

use bytemuck::Pod;

use super::{
    Device,
    buffer::{ALIGN, Block, Buffer, Region},
};
use crate::error::{Error, Result};

/// Bytes after each buffer that nobody may write, checked when a scope ends (debug builds).
const REDZONE: usize = if cfg!(debug_assertions) { ALIGN } else { 0 };
const ZONE_BYTE: u8 = 0xA5;

/// Memory for the phases of a step.
#[derive(Debug)]
pub struct Arena {
    block: Block,
    peak: Cell<usize>,
}

/// One phase: buffers allocated from it live as long as it does.
#[derive(Debug)]
pub struct Scope<'a> {
    /// None for a plan.
    base: Option<Region<'a>>,
    capacity: usize,
    used: Cell<usize>,
    peak: &'a Cell<usize>,
    /// The scope that waits for this one: its `used`, and the value to give back.
    parent: Option<(&'a Cell<usize>, usize)>,
    /// Where the redzones begin.
    zones: RefCell<Vec<usize>>,
    _arena: PhantomData<&'a mut [u8]>,
}

impl Arena {
    /// `bytes` of memory on `dev`, as [`Arena::plan`] returned them.
    pub fn new(dev: &Device, bytes: usize) -> Result<Self> {
        let bytes = bytes.checked_next_multiple_of(ALIGN).unwrap_or(bytes);
        Ok(Self { block: Block::new(dev, "the plan of a step", bytes)?, peak: Cell::new(0) })
    }

    /// The bytes that `layout` needs: it is run on a scope without memory, whose buffers are
    /// empty and must not be used.
    pub fn plan<R>(layout: impl FnOnce(&Scope<'_>) -> Result<R>) -> Result<usize> {
        let peak = Cell::new(0);
        let scope = Scope {
            base: None,
            capacity: usize::MAX / 2,
            used: Cell::new(0),
            peak: &peak,
            parent: None,
            zones: RefCell::default(),
            _arena: PhantomData,
        };
        layout(&scope)?;
        drop(scope);
        Ok(peak.get())
    }

    /// Starts a phase. The borrow makes sure that phases do not overlap.
    pub fn scope(&mut self) -> Scope<'_> {
        Scope {
            base: Some(self.block.region()),
            capacity: self.block.bytes(),
            used: Cell::new(0),
            peak: &self.peak,
            parent: None,
            zones: RefCell::default(),
            _arena: PhantomData,
        }
    }

    pub fn bytes(&self) -> usize {
        self.block.bytes()
    }

    /// The most bytes that were in use at once.
    pub fn peak(&self) -> usize {
        self.peak.get()
    }
}

impl<'a> Scope<'a> {
    /// `len` elements, to be written before they are read (NaN in debug builds).
    pub fn alloc<T: Pod>(&self, what: &'static str, len: usize) -> Result<Buffer<'_, T>> {
        const { assert!(align_of::<T>() <= ALIGN) };
        let overflow = || Error::Memory { what, want: usize::MAX, have: self.capacity };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(overflow)?;
        let bytes = bytes.checked_next_multiple_of(ALIGN).and_then(|b| b.checked_add(REDZONE));
        let bytes = bytes.ok_or_else(overflow)?;
        let start = self.used.get();
        let have = self.capacity - start;
        if bytes > have {
            return Err(Error::Memory { what, want: bytes, have });
        }
        self.used.set(start + bytes);
        self.peak.set(self.peak.get().max(start + bytes));
        let Some(base) = self.base else { return Ok(Buffer::empty()) };
        // SAFETY: `start + bytes` is within the block.
        let at = unsafe { base.add(start) };
        if cfg!(debug_assertions) {
            // An earlier phase or child may have left numbers here.
            // SAFETY: `bytes` bytes from here are within the block and nobody else's.
            unsafe { at.poison(0xFF, bytes)? };
        }
        if REDZONE > 0 {
            // SAFETY: the last REDZONE bytes of this allocation, within the block.
            let zone = unsafe { at.add(bytes - REDZONE) };
            // SAFETY: as above.
            unsafe { zone.poison(ZONE_BYTE, REDZONE)? };
            // SAFETY: as above.
            unsafe { zone.guard(REDZONE, true) };
            self.zones.borrow_mut().push(start + bytes - REDZONE);
        }
        // SAFETY: the block is initialised, ALIGN-aligned, and each region is handed out once.
        Ok(unsafe { at.buffer(len) })
    }

    /// A phase inside this one: what it allocates ends with it. Until then this scope cannot
    /// allocate.
    pub fn child(&self) -> Scope<'_> {
        let used = self.used.replace(self.capacity);
        Scope {
            base: self.base,
            capacity: self.capacity,
            used: Cell::new(used),
            peak: self.peak,
            parent: Some((&self.used, used)),
            zones: RefCell::default(),
            _arena: PhantomData,
        }
    }

    /// Bytes used so far.
    pub fn used(&self) -> usize {
        self.used.get()
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        if let Some((used, before)) = self.parent {
            used.set(before);
        }
        let Some(base) = self.base else { return };
        for zone in self.zones.borrow().iter() {
            // SAFETY: a zone that `alloc` wrote, inside the arena that this scope borrows.
            let zone = unsafe { base.add(*zone) };
            // SAFETY: as above.
            unsafe { zone.guard(REDZONE, false) };
            // SAFETY: as above.
            let bytes = unsafe { zone.inspect(REDZONE) };
            if !std::thread::panicking() {
                let clean = bytes.is_ok_and(|b| b.iter().all(|b| *b == ZONE_BYTE));
                assert!(clean, "a buffer was written past its end");
            }
        }
    }
}
