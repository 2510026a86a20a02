//! A result that may still be under way on a device.

use std::fmt;

use crate::error::Result;

/// A result that the device may still be working on, so that the host can go on meanwhile.
///
/// On the CPU it is there from the start. On a CUDA device a copy to the host was issued behind the
/// work that makes it: it is the value of that time, whatever happens to the device's memory later.
/// One wait brings all results that were issued before it, or before the next
/// [`Device::milestone`](super::Device::milestone). To drop one unread costs nothing.
#[must_use = "what is not read may be a check that nobody makes"]
pub struct Pending<R>(When<R>);

enum When<R> {
    Now(R),
    /// Waits if need be.
    OnDevice(Box<dyn FnOnce() -> Result<R> + Send>),
}

impl<R> Pending<R> {
    /// A result that is there.
    pub fn now(result: R) -> Self {
        Self(When::Now(result))
    }

    /// A result that `get` brings.
    pub(super) fn from_device(get: impl FnOnce() -> Result<R> + Send + 'static) -> Self {
        Self(When::OnDevice(Box::new(get)))
    }

    /// What `f` makes of it; called at once if it is there, else by [`Pending::get`].
    pub fn map<S>(self, f: impl FnOnce(R) -> S + Send + 'static) -> Pending<S>
    where
        R: 'static,
    {
        match self.0 {
            When::Now(result) => Pending::now(f(result)),
            When::OnDevice(get) => Pending::from_device(move || get().map(f)),
        }
    }

    /// The result. Waits for the device unless something did since this was issued: up to the first
    /// milestone behind it, or for all work if there is none.
    pub fn get(self) -> Result<R> {
        match self.0 {
            When::Now(result) => Ok(result),
            When::OnDevice(get) => get(),
        }
    }
}

impl<R: fmt::Debug> fmt::Debug for Pending<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            When::Now(result) => f.debug_tuple("Pending").field(result).finish(),
            When::OnDevice(_) => f.write_str("Pending(on a device)"),
        }
    }
}
