//! Checkpoints that survive a crash at any instant, and are refused if one bit of them changed.
//!
//! A checkpoint is the folder `step-N` with one safetensors file per group of tensors, `state.json`
//! and `manifest.json`, which names the SHA-256 of every file and every tensor and of itself.
//! [`save`] writes all of it into `step-N.tmp-*`, syncs each file and the folder, renames the
//! folder and syncs its parent, so a folder called `step-N` is complete. There is no pointer to the
//! newest one that could be stale: [`load_newest`] takes the newest whose manifest verifies. An
//! older one is deleted only after the new one was read back, and at least two good ones stay.

mod format;
mod verify;

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use serde_json::Value;

use crate::{
    error::{Error, Result},
    storage::{Storage, check_room, uninterrupted},
};
pub use format::{Dtype, SavedNumber, SavedTensor};
pub use verify::{LoadedCheckpoint, TensorInfo, digest, load};

/// What [`save`] did.
#[derive(Debug)]
pub struct Saved {
    /// The folder of the checkpoint.
    pub path: PathBuf,
    pub bytes: u64,
    /// What went wrong after the checkpoint was safe: an older one that could not be deleted.
    pub problems: Vec<Error>,
}

/// A committed checkpoint folder; not verified yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointDir {
    pub step: u64,
    pub path: PathBuf,
    /// It was replaced by a later save of the same step and waits for deletion.
    pub replaced: bool,
}

/// Runs one storage operation, again if a signal interrupts it.
fn run<T>(doing: &'static str, path: &Path, op: impl FnMut() -> io::Result<T>) -> Result<T> {
    uninterrupted(op).map_err(Error::io(doing, path))
}

fn names(storage: &dyn Storage, dir: &Path) -> Result<Vec<String>> {
    match uninterrupted(|| storage.list(dir)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(Error::io("list", dir)),
    }
}

/// The committed checkpoints under `dir`, newest first. A folder that does not exist has none.
pub fn list(storage: &dyn Storage, dir: &Path) -> Result<Vec<CheckpointDir>> {
    let entry = |name: String| {
        let (step, replaced) = match name.strip_prefix("step-")?.split_once('.') {
            None => (name.strip_prefix("step-")?, false),
            Some((step, rest)) if rest.starts_with("old-") => (step, true),
            Some(_) => return None,
        };
        // `step-007` and `step-+7` are not ours
        let step: u64 = step.parse().ok().filter(|n: &u64| n.to_string() == step)?;
        Some(CheckpointDir { step, path: dir.join(name), replaced })
    };
    let mut all: Vec<CheckpointDir> = names(storage, dir)?.into_iter().filter_map(entry).collect();
    all.sort_by_key(|e| (std::cmp::Reverse(e.step), e.replaced));
    Ok(all)
}

/// Removes what a crash left half-written. Call it at the start of a run, with the run's lock held:
/// another trainer's unfinished checkpoint looks the same.
///
/// Returns the folders removed.
pub fn clean(storage: &dyn Storage, dir: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for name in names(storage, dir)? {
        let stray = name.strip_prefix("step-").and_then(|n| n.split_once('.'));
        if stray.is_some_and(|(_, rest)| rest.starts_with("tmp-")) {
            let path = dir.join(name);
            run("remove", &path, || storage.remove(&path))?;
            removed.push(path);
        }
    }
    Ok(removed)
}

/// The newest checkpoint under `dir` that verifies, or `None` if none was ever committed.
/// [`LoadedCheckpoint::skipped`] says what is wrong with newer ones.
///
/// Reads every byte of the checkpoint once, in pieces; [`LoadedCheckpoint::read`] then fills the
/// caller's buffers.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] naming file and tensor if there are checkpoints and none
/// verifies: to start again from step 0 is then not for us to decide.
pub fn load_newest(storage: &dyn Storage, dir: &Path) -> Result<Option<LoadedCheckpoint>> {
    let mut skipped = Vec::new();
    for entry in list(storage, dir)? {
        match load(storage, &entry.path) {
            Ok(mut loaded) if loaded.step == entry.step => {
                loaded.skipped = skipped;
                return Ok(Some(loaded));
            }
            Ok(loaded) => {
                let message = format!("holds step {}, wanted {}", loaded.step, entry.step);
                skipped.push(Error::file(entry.path.join("manifest.json"), message));
            }
            Err(error) => skipped.push(error),
        }
    }
    if skipped.is_empty() { Ok(None) } else { Err(skipped.swap_remove(0)) }
}

/// Commits a checkpoint of `step` and deletes those that it makes superfluous.
///
/// * `dir`: the folder of all checkpoints of the run; made if it is missing
/// * `keep`: good checkpoints to keep, this one included; fewer than 2 counts as 2
/// * `tensors`: those in host memory are written in place; others are brought one at a time, when
///   they are written
/// * `state`: all else that a resumed run needs
///
/// After `Ok` the checkpoint survives a loss of power. After an error the one before it does, and
/// at most an unfinished `step-N.tmp-*` is left, which [`clean`] removes.
///
/// # Errors
/// [`Error::Io`] (`StorageFull` before the first byte if the disk has too little room),
/// [`Error::Shape`] or [`Error::Value`] for a tensor that is not what it says,
/// [`Error::File`] if the checkpoint does not read back as it was written.
pub fn save<'a>(
    storage: &dyn Storage,
    dir: &Path,
    step: u64,
    keep: usize,
    tensors: impl IntoIterator<Item = SavedTensor<'a>>,
    state: &Value,
) -> Result<Saved> {
    let tensors: Vec<SavedTensor<'a>> = tensors.into_iter().collect();
    check(&tensors)?;
    make_dir(storage, dir)?;
    pre_flight(storage, dir, &tensors)?;
    let nonce = nonce();
    let tmp = dir.join(format!("step-{step}.tmp-{nonce}"));
    let path = dir.join(format!("step-{step}"));
    let written = format::write(storage, &tmp, step, &tensors, state)
        .and_then(|bytes| commit(storage, dir, &tmp, &path, &nonce).map(|()| bytes));
    let bytes = match written {
        Ok(bytes) => bytes,
        Err(error) => {
            // best effort: what stays is removed by `clean`
            let _ = uninterrupted(|| storage.remove(&tmp));
            return Err(error);
        }
    };
    load(storage, &path)?;
    let problems = match prune(storage, dir, step, keep) {
        Ok(()) => Vec::new(),
        Err(error) => vec![error],
    };
    Ok(Saved { path, bytes, problems })
}

/// Distinct within a process, and between processes that live at the same time.
fn nonce() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{:x}-{:x}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn check(tensors: &[SavedTensor<'_>]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for t in tensors {
        t.check()?;
        if !seen.insert((t.file, &t.name)) {
            let what = format!("checkpoint tensor `{}` of `{}`", t.name, t.file);
            return Err(Error::value(what, "one", "two"));
        }
    }
    Ok(())
}

fn make_dir(storage: &dyn Storage, dir: &Path) -> Result<()> {
    match uninterrupted(|| storage.list(dir)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            run("create", dir, || storage.create_dir(dir))?;
            let parent = dir.parent().filter(|p| !p.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            run("sync", parent, || storage.sync_dir(parent))
        }
        other => other.map(drop).map_err(Error::io("list", dir)),
    }
}

fn pre_flight(storage: &dyn Storage, dir: &Path, tensors: &[SavedTensor<'_>]) -> Result<()> {
    // per tensor: its lines in the header and the manifest; once: the state
    let want = tensors.iter().map(|t| t.len as u64 + 1024).sum::<u64>() + (1 << 20);
    check_room(storage, "the checkpoint", dir, want)
}

/// Gives the finished folder its name. A folder that has the name already is moved aside first,
/// under a name by which it can still be loaded.
fn commit(storage: &dyn Storage, dir: &Path, tmp: &Path, path: &Path, nonce: &str) -> Result<()> {
    let exists = list(storage, dir)?.iter().any(|e| e.path == path);
    if exists {
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".old-{nonce}"));
        run("rename", path, || storage.rename(path, Path::new(&aside)))?;
        run("sync", dir, || storage.sync_dir(dir))?;
    }
    run("rename", tmp, || storage.rename(tmp, path))?;
    run("sync", dir, || storage.sync_dir(dir))
}

/// Deletes what is older than the newest `keep` good checkpoints, at least 2. That of `step` is
/// known to be good; the others are read, since one that rotted must not count.
pub fn prune(storage: &dyn Storage, dir: &Path, step: u64, keep: usize) -> Result<()> {
    let (mut good, keep, nonce) = (1, keep.max(2), nonce());
    let mut older = list(storage, dir)?;
    older.retain(|e| e.step < step || e.step == step && e.replaced);
    if older.len() < keep && older.iter().all(|e| e.step < step) {
        return Ok(());
    }
    for entry in &older {
        if entry.step < step && good < keep {
            good += usize::from(load(storage, &entry.path).is_ok());
            continue;
        }
        // renamed first, so that a half-deleted folder never looks like a checkpoint
        let dead = dir.join(format!("step-{}.tmp-{nonce}-dead", entry.step));
        run("rename", &entry.path, || storage.rename(&entry.path, &dead))?;
        run("sync", dir, || storage.sync_dir(dir))?;
        run("remove", &dead, || storage.remove(&dead))?;
    }
    Ok(())
}
