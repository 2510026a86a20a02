//! SIGINT and SIGTERM ask the trainer to finish its step, save and stop; a second one ends the
//! process at once, with 130 or 143.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

use crate::error::{Error, Result};

static FIRST: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// Starts to listen. Calls after the first do nothing.
pub fn install() -> Result<()> {
    let mut fresh = None;
    FIRST.get_or_init(|| fresh.insert(Arc::new(AtomicUsize::new(0))).clone());
    let Some(first) = fresh else { return Ok(()) };
    let any = Arc::new(AtomicBool::new(false));
    for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
        // Handlers run in the order of registration: the exit sees the flag of an earlier signal.
        flag::register_conditional_shutdown(signal, code, any.clone())
            .and_then(|_| flag::register(signal, any.clone()))
            .and_then(|_| flag::register_usize(signal, first.clone(), signal as usize))
            .map_err(Error::io("listen for signals as", "this process"))?;
    }
    Ok(())
}

/// The signal that came since [`install`], by name.
pub fn requested() -> Option<&'static str> {
    let signal = FIRST.get()?.load(Ordering::Relaxed) as i32;
    [(SIGINT, "SIGINT"), (SIGTERM, "SIGTERM")].iter().find(|s| s.0 == signal).map(|s| s.1)
}
