//! SIGINT and SIGTERM: heard at once, in every phase.
//!
//! While a run holds the process, the first signal asks it to save and stop, and a line says so at
//! once. In all other phases nothing could be lost: files are written aside and renamed, so the
//! process ends. A second signal ends it anyway. The exit code is 130 or 143.

use std::{
    io::Write,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering},
    },
    thread,
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
    iterator::Signals,
    low_level,
};

use crate::error::{Error, Result};

/// The first signal, 0 without one.
static FIRST: AtomicI32 = AtomicI32::new(0);
/// Runs whose progress would be lost.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// Starts to listen, for the whole process. Calls after the first do nothing.
pub fn install() -> Result<()> {
    static LISTENS: OnceLock<()> = OnceLock::new();
    if LISTENS.get().is_some() {
        return Ok(());
    }
    let failed = || Error::io("listen for signals as", "a process");
    let any = Arc::new(AtomicBool::new(false));
    for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
        // In the order of registration: the exit sees the flag of an earlier signal. It waits for
        // nobody, not even for a terminal that does not take the line below.
        flag::register_conditional_shutdown(signal, code, any.clone())
            .and_then(|_| flag::register(signal, any.clone()))
            .map_err(failed())?;
    }
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed())?;
    if LISTENS.set(()).is_ok() {
        thread::spawn(move || signals.forever().for_each(hear));
    }
    Ok(())
}

fn hear(signal: i32) {
    let (name, code) = if signal == SIGTERM { ("SIGTERM", 143) } else { ("SIGINT", 130) };
    let first = FIRST.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    let held = HELD.load(Ordering::SeqCst) > 0;
    let text = match first && held {
        true => format!(
            "{name}: the run saves and stops, or ends if it is at its end; a second signal ends it at once\n"
        ),
        false => format!("error: ended by {name}; the same command starts or resumes the run\n"),
    };
    // If stderr is gone, there is nobody to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
    if !(first && held) {
        low_level::exit(code);
    }
}

/// A part of a run that saves before it stops, until it is dropped.
#[derive(Debug)]
pub struct Hold(());

impl Hold {
    /// From now on the first signal is [`requested`].
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        HELD.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The signal that came since [`install`], by name.
pub fn requested() -> Option<&'static str> {
    let signal = FIRST.load(Ordering::SeqCst);
    [(SIGINT, "SIGINT"), (SIGTERM, "SIGTERM")].iter().find(|s| s.0 == signal).map(|s| s.1)
}
