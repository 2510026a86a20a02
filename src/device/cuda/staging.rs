//! The host's side of the stream: pinned memory, which the device copies to and from by itself, so
//! that the host need not wait; which copies a wait has covered; and counts of what was asked for.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Sub,
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{Context, Driver, Event, device_error};
use crate::error::Result;

/// How often a device was asked for something since it was opened.
///
/// What memory does to watch itself in debug builds (poison, redzones) is not counted: a step has
/// the same counts in every build.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Kernels of this crate that were launched.
    pub launches: u64,
    /// Copies from the host.
    pub writes: u64,
    /// Copies to the host, those not awaited included.
    pub reads: u64,
    /// Copies on the device.
    pub copies: u64,
    /// Memory that was set to one byte.
    pub fills: u64,
    /// Times that the host waited for the device: for all work, or up to a
    /// [`Device::milestone`](crate::device::Device::milestone) in a
    /// [`Pending::get`](crate::device::Pending) that no wait had covered. A read, a timing and a
    /// free wait for all. A write waits, if at all, for writes long before it, and is not counted.
    pub waits: u64,
}

impl Sub for Calls {
    type Output = Self;

    /// What was asked for since `earlier`.
    fn sub(self, earlier: Self) -> Self {
        let since = u64::saturating_sub;
        Self {
            launches: since(self.launches, earlier.launches),
            writes: since(self.writes, earlier.writes),
            reads: since(self.reads, earlier.reads),
            copies: since(self.copies, earlier.copies),
            fills: since(self.fills, earlier.fills),
            waits: since(self.waits, earlier.waits),
        }
    }
}

/// The pinned memory that writes go through. A slot is used again when the device has read it, so
/// the host runs ahead of the device by at most the whole ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Slots; with two or more the host fills one while the device reads another.
    pub slots: usize,
    /// Bytes of a slot: small writes share one, large ones go in pieces.
    pub bytes: usize,
}

impl Ring {
    /// A GPU's: 4 MiB are 0.1 ms of a bus of 40 GB/s, beside which an event costs nothing.
    pub(super) const GPU: Self = Self { slots: 4, bytes: 4 << 20 };
    /// The simulator's: small, so that every test that writes goes round.
    pub(super) const SIMULATOR: Self = Self { slots: 2, bytes: 4 << 10 };
}

/// Where in a slot a write may begin: a cache line.
const ALIGN: usize = 64;

/// The smallest block for reads.
const BLOCK: usize = 256;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Pinned {
    driver: Context,
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(driver: &Context, bytes: usize) -> Result<Self> {
        Ok(Self { driver: driver.clone(), at: driver.enter()?.pin(bytes)?, bytes })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Ok(driver) = self.driver.enter() {
            // SAFETY: pinned in `new`; nobody else has the address. The driver waits for copies
            // under way.
            unsafe { driver.unpin(self.at) }
        }
    }
}

/// A part of the ring.
#[derive(Debug)]
struct Slot {
    memory: Pinned,
    /// Behind the last copy from it.
    event: Event,
}

impl Slot {
    fn new(driver: &Context, bytes: usize) -> Result<Self> {
        Ok(Self { memory: Pinned::new(driver, bytes)?, event: driver.enter()?.event()? })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Ok(driver) = self.memory.driver.enter() {
            // SAFETY: made in `new` and used by nobody any more.
            unsafe { driver.end_event(&self.event) };
        }
    }
}

#[derive(Debug)]
struct Slots {
    all: Vec<Slot>,
    /// The one in use.
    current: usize,
    /// Bytes of it that are taken; beyond its end if it is full.
    used: usize,
}

impl Slots {
    fn new(driver: &Context, ring: Ring) -> Result<Self> {
        let Ring { slots, bytes } = ring;
        if slots == 0 || bytes == 0 {
            let got = format!("a ring of {slots} slots of {bytes} bytes");
            return Err(device_error(format!("{got}, wanted at least 1 of 1")));
        }
        let all = (0..slots).map(|_| Slot::new(driver, bytes)).collect::<Result<_>>()?;
        Ok(Self { all, current: 0, used: 0 })
    }

    /// Room for `wanted` bytes, or for fewer where the slot ends.
    fn room(&mut self, driver: &dyn Driver, wanted: usize) -> Result<(NonNull<u8>, usize)> {
        if self.used >= self.all[self.current].memory.bytes {
            let next = (self.current + 1) % self.all.len();
            // SAFETY: an event of this driver.
            unsafe { driver.record(&self.all[self.current].event)? };
            // SAFETY: as above.
            unsafe { driver.wait_for(&self.all[next].event)? };
            // Only now: the slot after a failed wait is still in use.
            (self.current, self.used) = (next, 0);
        }
        let memory = &self.all[self.current].memory;
        let bytes = wanted.min(memory.bytes - self.used);
        // SAFETY: inside the slot.
        let at = unsafe { memory.at.add(self.used) };
        self.used = (self.used + bytes).next_multiple_of(ALIGN);
        Ok((at, bytes))
    }
}

/// Blocks for reads that are free, by size.
#[derive(Debug, Default)]
struct Blocks {
    free: BTreeMap<usize, Vec<Pinned>>,
    /// Bytes of all slots, in use or free.
    bytes: usize,
}

/// Points of the stream, each behind all reads up to a ticket: who waits for one of those need not
/// wait for more.
#[derive(Debug, Default)]
struct Milestones {
    /// Events that no wait has passed, in order.
    ahead: VecDeque<(u64, Event)>,
    free: Vec<Event>,
}

impl Milestones {
    /// Takes back those that are behind the last ticket that a wait has covered.
    fn retire(&mut self, passed: u64) {
        let behind = self.ahead.partition_point(|(ticket, _)| *ticket <= passed);
        self.free.extend(self.ahead.drain(..behind).map(|(_, event)| event));
    }
}

#[derive(Debug)]
pub(super) struct Staging {
    driver: Context,
    calls: Mutex<Calls>,
    /// Reads that were issued; the number of one is its ticket.
    issued: AtomicU64,
    /// The last ticket that a wait has covered.
    passed: AtomicU64,
    milestones: Mutex<Milestones>,
    slots: Mutex<Slots>,
    blocks: Mutex<Blocks>,
}

impl Staging {
    pub(super) fn new(driver: &Context, ring: Ring) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            driver: driver.clone(),
            calls: Mutex::default(),
            issued: AtomicU64::new(0),
            passed: AtomicU64::new(0),
            milestones: Mutex::default(),
            slots: Mutex::new(Slots::new(driver, ring)?),
            blocks: Mutex::default(),
        }))
    }

    pub(super) fn calls(&self) -> Calls {
        *lock(&self.calls)
    }

    pub(super) fn count(&self, what: impl FnOnce(&mut Calls)) {
        what(&mut lock(&self.calls));
    }

    /// Bytes of host memory that are pinned.
    pub(super) fn pinned(&self) -> usize {
        let ring = lock(&self.slots).all.iter().map(|s| s.memory.bytes).sum::<usize>();
        ring + lock(&self.blocks).bytes
    }

    /// Waits for all that was issued.
    pub(super) fn wait(&self) -> Result<()> {
        self.count(|c| c.waits += 1);
        // Before the wait: what another thread issues meanwhile it may not cover.
        let issued = self.issued.load(Ordering::Acquire);
        self.driver.enter()?.synchronize()?;
        self.pass(issued, &mut lock(&self.milestones));
        Ok(())
    }

    /// A wait has covered all reads up to a ticket.
    fn pass(&self, ticket: u64, milestones: &mut Milestones) {
        let before = self.passed.fetch_max(ticket, Ordering::AcqRel);
        milestones.retire(before.max(ticket));
    }

    /// Sets a milestone behind all that was issued.
    pub(super) fn milestone(&self) -> Result<()> {
        let driver = self.driver.enter()?;
        let mut milestones = lock(&self.milestones);
        // Before it is recorded: what another thread issues meanwhile it may not cover.
        let issued = self.issued.load(Ordering::Acquire);
        let event = match milestones.free.pop() {
            Some(event) => event,
            None => driver.event()?,
        };
        // SAFETY: an event of this driver, which ends with `self`.
        let recorded = unsafe { driver.record(&event) };
        match recorded {
            Ok(()) => milestones.ahead.push_back((issued, event)),
            Err(_) => milestones.free.push(event),
        }
        recorded
    }

    /// Waits for a read, unless a wait has covered it: up to the first milestone behind it, or for
    /// all that was issued if there is none.
    fn wait_for(&self, ticket: u64) -> Result<()> {
        let covered = || self.passed.load(Ordering::Acquire) >= ticket;
        if covered() {
            return Ok(());
        }
        let mut milestones = lock(&self.milestones);
        if covered() {
            return Ok(());
        }
        let first = milestones.ahead.partition_point(|(covers, _)| *covers < ticket);
        let Some((covers, event)) = milestones.ahead.get(first) else {
            drop(milestones);
            return self.wait();
        };
        self.count(|c| c.waits += 1);
        // SAFETY: an event of this driver, which ends with `self`; nobody records it anew while the
        // milestones are locked.
        unsafe { self.driver.enter()?.wait_for(event)? };
        let covers = *covers;
        self.pass(covers, &mut milestones);
        Ok(())
    }

    /// Copies `from`, which may end when this returns, to the device.
    ///
    /// # Safety
    /// `to` has `from.len()` bytes of device memory that nobody else uses.
    pub(super) unsafe fn write(&self, to: NonNull<u8>, from: &[u8]) -> Result<()> {
        self.count(|c| c.writes += 1);
        let driver = self.driver.enter()?;
        let mut slots = lock(&self.slots);
        let mut done = 0;
        while done < from.len() {
            let (room, bytes) = slots.room(driver, from.len() - done)?;
            let piece = &from[done..done + bytes];
            // SAFETY: the room is in a slot that the device has read, and ours while the slots are
            // locked.
            unsafe { room.as_ptr().copy_from_nonoverlapping(piece.as_ptr(), bytes) };
            // SAFETY: written just now, and by nobody else until the slot's event.
            let piece = unsafe { std::slice::from_raw_parts(room.as_ptr(), bytes) };
            // SAFETY: inside `to`.
            let to = unsafe { to.add(done) };
            // SAFETY: the caller's promise for `to`; the piece stays until the device has read it.
            unsafe { driver.copy_in(to, piece)? };
            done += bytes;
        }
        Ok(())
    }

    /// Begins a copy of `bytes` bytes to the host.
    ///
    /// # Safety
    /// `from` has `bytes` bytes of device memory.
    pub(super) unsafe fn read(
        self: &Arc<Self>,
        from: NonNull<u8>,
        bytes: usize,
    ) -> Result<Landing> {
        self.count(|c| c.reads += 1);
        let block = self.block(bytes)?;
        let at = block.at;
        let mut landing = Landing { staging: self.clone(), block: Some(block), bytes, ticket: 0 };
        // SAFETY: the block has `bytes` bytes and nobody else looks at them.
        let to = unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), bytes) };
        // SAFETY: the caller's promise for `from`; the block outlives the copy.
        unsafe { self.driver.enter()?.copy_out(to, from)? };
        // After the copy was issued: a wait that sees this ticket covers it.
        landing.ticket = self.issued.fetch_add(1, Ordering::AcqRel) + 1;
        Ok(landing)
    }

    /// A block of at least `bytes` bytes. Sizes are powers of two, so that steps of nearly the same
    /// shape use the same blocks.
    fn block(&self, bytes: usize) -> Result<Pinned> {
        let bytes = bytes.next_power_of_two().max(BLOCK);
        let mut blocks = lock(&self.blocks);
        if let Some(block) = blocks.free.get_mut(&bytes).and_then(Vec::pop) {
            return Ok(block);
        }
        let block = Pinned::new(&self.driver, bytes)?;
        blocks.bytes += bytes;
        Ok(block)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let milestones = self.milestones.get_mut().unwrap_or_else(PoisonError::into_inner);
        milestones.retire(u64::MAX);
        for event in milestones.free.drain(..) {
            if let Ok(driver) = self.driver.enter() {
                // SAFETY: made in `milestone` and used by nobody any more.
                unsafe { driver.end_event(&event) };
            }
        }
    }
}

/// Where a copy to the host arrives.
#[derive(Debug)]
pub(super) struct Landing {
    staging: Arc<Staging>,
    /// There until this is dropped.
    block: Option<Pinned>,
    bytes: usize,
    ticket: u64,
}

impl Landing {
    /// Copies what arrived to `out`, of as many bytes; waits for it unless a wait has covered it.
    pub(super) fn get(self, out: &mut [u8]) -> Result<()> {
        self.staging.wait_for(self.ticket)?;
        if let Some(block) = &self.block {
            // SAFETY: the copy filled these bytes, and the wait has covered it.
            let arrived = unsafe { std::slice::from_raw_parts(block.at.as_ptr(), self.bytes) };
            out.copy_from_slice(arrived);
        }
        Ok(())
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // The copy may be under way still. What comes into the block next is another copy of the
        // same stream, which is read only after a wait that covers both.
        if let Some(block) = self.block.take() {
            lock(&self.staging.blocks).free.entry(block.bytes).or_default().push(block);
        }
    }
}
