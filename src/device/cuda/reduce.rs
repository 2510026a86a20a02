//! A little device memory for the results of reductions, which every op borrows in turn: so that an
//! op that returns sums needs no scratch of its own.

use std::{
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::Pod;

use super::{Context, Cuda, Launch, device_error, kernels};
use crate::{
    device::{pending::Pending, view::ViewMut},
    error::Result,
};

/// Parts that kernels divide a reduction into at most; a constant, so that the order of a sum
/// depends on its length and not on the device.
pub const PARTS: usize = 256;

/// Tokens that a block takes at a time: 16 bytes a thread.
const TILE: usize = 4 * kernels::sums::THREADS;

/// How kernels divide a column of tokens (`kernels/include/columns.cuh`), as their number says and
/// nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Parts, a block each, at most [`PARTS`].
    pub count: usize,
    /// Tokens of a part, in whole tiles, or other items; the last one has what is left.
    pub share: usize,
}

impl Parts {
    /// The parts of `tokens` tokens.
    pub fn of(tokens: usize) -> Self {
        let share = tokens.div_ceil(PARTS * TILE).max(1) * TILE;
        Self { count: tokens.div_ceil(share), share }
    }

    /// The parts of `items` items, each of which takes a whole block.
    pub fn of_blocks(items: usize) -> Self {
        let share = items.div_ceil(PARTS).max(1);
        Self { count: items.div_ceil(share), share }
    }
}

/// Holds results of 16 numbers of 8 bytes, and as many for each part.
const BYTES: usize = (PARTS + 1) * 16 * 8;

#[derive(Debug)]
pub(super) struct ReduceScratch {
    driver: Context,
    at: NonNull<u8>,
}

// SAFETY: plain device memory with one owner; used behind a lock.
unsafe impl Send for ReduceScratch {}

impl ReduceScratch {
    pub(super) fn new(driver: &Context) -> Result<Arc<Mutex<Self>>> {
        let at = driver.enter()?.alloc(BYTES)?;
        Ok(Arc::new(Mutex::new(Self { driver: driver.clone(), at })))
    }
}

impl Drop for ReduceScratch {
    fn drop(&mut self) {
        if let Ok(driver) = self.driver.enter() {
            // SAFETY: allocated in `new`; nobody else has the address.
            unsafe { driver.free(self.at) }
        }
    }
}

impl Cuda {
    /// The `N` numbers that `work` leaves in its first argument; the second is scratch for as many
    /// numbers of each of `parts` parts. All bits of both are set at first. The call does not wait:
    /// the next reduction uses the scratch behind this one in the stream. `work` cannot reduce
    /// anything itself, as there is one scratch.
    pub fn reduce<T: Pod, const N: usize>(
        &self,
        parts: usize,
        work: impl FnOnce(ViewMut<'_, T>, ViewMut<'_, T>) -> Result<()>,
    ) -> Result<Pending<[T; N]>> {
        const { assert!(size_of::<T>() <= 8 && N <= 16) };
        if parts > PARTS {
            return Err(device_error(format!(
                "a reduction of {parts} parts, wanted at most {PARTS}"
            )));
        }
        let scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the scratch is ours while it is locked.
        unsafe { self.fill(scratch.at, 0xFF, BYTES)? };
        // SAFETY: inside the scratch, which holds `(parts + 1) * N` numbers, as checked above.
        let behind = unsafe { scratch.at.add(N * size_of::<T>()) };
        // SAFETY: it is aligned to 256 bytes, any bits are a `T`, and it is ours while locked.
        let mut total = unsafe { ViewMut::<T>::on_device(scratch.at, N) };
        // SAFETY: as for the total, behind which it lies.
        let partial = unsafe { ViewMut::<T>::on_device(behind, parts * N) };
        work(total.reborrow(), partial)?;
        Ok(self.read_later(total.view())?.map(|total| {
            let mut out = [T::zeroed(); N];
            out.copy_from_slice(&total);
            out
        }))
    }

    /// `N` sums over tokens or other items in `parts`, of which the last `maxima` are maxima:
    /// `work` launches a kernel that leaves those of each part in a row of its second argument. 0
    /// without parts.
    pub fn sums<const N: usize>(
        &self,
        parts: Parts,
        maxima: usize,
        work: impl FnOnce(Launch, ViewMut<'_, f64>, usize) -> Result<()>,
    ) -> Result<Pending<[f64; N]>> {
        self.reduce(parts.count, |total, mut partial| {
            let launch = Launch::row(parts.count, kernels::sums::THREADS / 32 * N * 8)?;
            work(launch, partial.reborrow(), parts.share)?;
            let (launch, partial) = (Launch::row(1, 0)?, partial.view());
            kernels::sums::Total { total, partial, parts: parts.count, numbers: N, maxima }
                .launch(self, launch)
        })
    }
}
