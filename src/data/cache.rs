//! The folder of what is made once: the tokens of data.
//!
//! `WARPO_CACHE` names it (`off`: there is none), else it is `warpo` in `XDG_CACHE_HOME`, else
//! `.cache/warpo` in the user's folder. Nothing in it is trusted, and all of it may be deleted.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use crate::error::{Error, Result};

/// Bytes that all entries may take; those that were used last stay.
const MOST: u64 = 20 << 30;

/// Days after which an entry that nobody used is deleted.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);

/// How long nobody writes to a file aside before its writer is taken for dead.
const DEAD: Duration = Duration::from_secs(3600);

/// End of the names of entries.
const ENTRY: &str = "tokens";

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// From now on this process keeps what it makes in the user's folder, as commands do.
pub fn keep() {
    if let Some(folder) = users() {
        FOLDER.get_or_init(|| folder);
    }
}

/// The folder that this process keeps what it makes in.
pub fn folder() -> Option<&'static Path> {
    FOLDER.get().map(PathBuf::as_path)
}

/// The folder as the user's environment names it.
fn users() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty());
    match set("WARPO_CACHE") {
        Some(v) if v == OsStr::new("off") => None,
        Some(v) => Some(v.into()),
        None => {
            let base = set("XDG_CACHE_HOME").map(PathBuf::from);
            Some(base.or_else(|| Some(Path::new(&set("HOME")?).join(".cache")))?.join("warpo"))
        }
    }
}

/// The entry of a key in a folder, which is made, and a name for what is written first.
pub(super) fn entry(folder: &Path, key: &str) -> Result<[PathBuf; 2]> {
    let dir = folder.join(ENTRY);
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    // Two processes may write the same; so may two threads of one.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let aside = format!("{key}.{}-{}.tmp", std::process::id(), now.as_nanos());
    Ok([dir.join(format!("{key}.{ENTRY}")), dir.join(aside)])
}

/// Notes that an entry was used.
pub(super) fn touch(entry: &Path) {
    // Best effort: the folder may be another user's.
    let _ = fs::File::open(entry).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Deletes entries that nobody used for long, the longest unused ones of too many, and what dead
/// processes left; `used` stays.
pub(super) fn prune(used: &Path) {
    let Some(all) = used.parent().and_then(|dir| fs::read_dir(dir).ok()) else { return };
    let now = SystemTime::now();
    let mut entries = Vec::new();
    for path in all.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path != used) {
        let end = path.extension().and_then(OsStr::to_str);
        let Ok(about) = fs::symlink_metadata(&path) else { continue };
        let age = about.modified().ok().and_then(|at| now.duration_since(at).ok());
        let age = age.unwrap_or_default();
        match end {
            Some(ENTRY) => entries.push((age, about.len(), path)),
            Some("tmp") if age > DEAD => {
                let _ = fs::remove_file(path);
            }
            _ => {}
        }
    }
    entries.sort();
    let mut bytes = fs::metadata(used).map_or(0, |about| about.len());
    for (age, len, path) in entries {
        bytes += len;
        if age > UNUSED || bytes > MOST {
            let _ = fs::remove_file(path);
        }
    }
}
