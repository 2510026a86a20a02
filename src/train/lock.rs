//! One trainer per run folder.
//!
//! The file `lock` names its owner (process id and boot id) and is held by `flock`, which the
//! kernel releases when the process ends in whatever way. Where the file system has no `flock`, the
//! names decide: an owner from another boot or without an entry in `/proc` is dead.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    path::Path,
    time::Duration,
};

use crate::error::{Error, Result};

/// The hold on a run folder; ends with the value.
#[derive(Debug)]
pub struct Lock {
    file: File,
    taken_over: Option<u32>,
}

impl Lock {
    /// Takes the folder, which exists.
    ///
    /// # Errors
    /// [`Error::Locked`] with the owner's process id if another trainer lives there;
    /// [`Error::Io`].
    pub fn acquire(dir: &Path) -> Result<Self> {
        let path = dir.join("lock");
        let open =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(Error::io("create", &path))?;
        let locked = |pid| Error::Locked { path: dir.into(), pid };
        let owner = match file.try_lock() {
            Ok(()) => read(&mut file),
            Err(TryLockError::WouldBlock) => return Err(locked(owner_pid(&mut file))),
            Err(TryLockError::Error(e)) if no_flock(&e) => {
                let owner = read(&mut file);
                match &owner {
                    Some(o) if o.pid != std::process::id() && o.lives() => {
                        return Err(locked(o.pid));
                    }
                    _ => owner,
                }
            }
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path)(e)),
        };
        write(&mut file).map_err(Error::io("write", &path))?;
        Ok(Self { file, taken_over: owner.map(|o| o.pid) })
    }

    /// The process that died with the lock in its hands, if one did.
    pub fn taken_over(&self) -> Option<u32> {
        self.taken_over
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Emptied, not removed: a process that waits on the removed file and one that makes a new
        // file of the name would both hold "the" lock.
        let _ = self.file.set_len(0);
        let _ = self.file.unlock();
    }
}

struct Owner {
    pid: u32,
    boot: String,
}

impl Owner {
    fn lives(&self) -> bool {
        self.boot == boot_id() && Path::new(&format!("/proc/{}", self.pid)).exists()
    }
}

/// Identifies this start of the machine; empty where the kernel does not tell.
fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim().to_owned()
}

fn no_flock(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::Unsupported || e.raw_os_error() == Some(libc::ENOLCK)
}

/// The owner as the file tells it: `pid <number>`, `boot <id>`. None if it was released.
fn read(file: &mut File) -> Option<Owner> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(4096).read_to_string(&mut text).ok()?;
    let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    Some(Owner { pid: field("pid ")?.parse().ok()?, boot: field("boot ")?.to_owned() })
}

fn write(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    let text = format!("pid {}\nboot {}\n", std::process::id(), boot_id());
    file.write_all(text.as_bytes())
}

/// The owner of a lock that is held. It may have taken it this instant and not signed yet.
fn owner_pid(file: &mut File) -> u32 {
    for _ in 0..50 {
        if let Some(owner) = read(file) {
            return owner.pid;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    0
}
