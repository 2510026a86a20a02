//! Work on all threads, whose results come in the order of what they are made of.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Mutex, PoisonError, mpsc},
    thread,
};

use crate::error::Result;

/// Items that wait or are worked on, for each thread.
const AHEAD: usize = 4;

/// Gives `take` what `work` makes of each item that `feed` gives, in order. `feed` and `take` run
/// on this thread, `work` on others; only so many items are in memory as keep these busy.
pub(super) fn in_order<T: Send, U: Send>(
    feed: impl FnOnce(&mut dyn FnMut(T) -> Result<()>) -> Result<()>,
    work: impl Fn(T) -> U + Sync,
    mut take: impl FnMut(U) -> Result<()>,
) -> Result<()> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let (give, given) = mpsc::channel::<(usize, T)>();
    let (done, finished) = mpsc::channel();
    let given = Mutex::new(given);
    thread::scope(|scope| {
        // Workers end when nobody gives any more, after an error, too.
        let give = give;
        for _ in 0..threads {
            let (done, work, given) = (done.clone(), &work, &given);
            scope.spawn(move || {
                loop {
                    let next = given.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((i, item)) = next else { return };
                    // A panic is that of the thread which waits for the result.
                    let made = catch_unwind(AssertUnwindSafe(|| work(item)));
                    if done.send((i, made)).is_err() {
                        return;
                    }
                }
            });
        }
        let (mut sent, mut taken, mut early) = (0, 0, BTreeMap::new());
        let mut settle = |sent: usize, most: usize| {
            while sent - taken > most {
                let Ok((i, made)) = finished.recv() else { return Ok(()) };
                early.insert(i, made.unwrap_or_else(|panic| resume_unwind(panic)));
                while let Some(made) = early.remove(&taken) {
                    taken += 1;
                    take(made)?;
                }
            }
            Ok(())
        };
        let mut failed = false;
        let fed = feed(&mut |item| {
            // There is a worker as long as there is somebody who gives.
            let _ = give.send((sent, item));
            sent += 1;
            settle(sent, AHEAD * threads).inspect_err(|_| failed = true)
        });
        // What came before an error of `feed` may have one of its own.
        if !failed {
            settle(sent, 0)?;
        }
        fed
    })
}
