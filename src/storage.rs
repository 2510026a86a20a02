//! The file operations that a run's folder is made of, so that tests can lose power between any
//! two.
//!
//! What a file system promises is little: a file's bytes are on the disk after
//! [`StorageFile::sync`], names after [`Storage::sync_dir`] of their folder, and a rename is one
//! event. All else may be lost, in any subset and order. Code here relies on nothing more.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use crate::{
    device::free_disk_bytes,
    error::{Error, Result},
};

/// A file system, or a test's model of one. One call is one operation that can fail or be the
/// last before a crash.
pub trait Storage {
    /// Makes a folder; its parent exists, it does not.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes an empty file that does not exist yet, to append to.
    ///
    /// # Errors
    /// The operating system's; `AlreadyExists` rather than truncating what is there.
    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;

    /// Opens a file to append to after its first `len` bytes, which are kept; makes it if it is not
    /// there.
    fn append_after(&self, path: &Path, len: u64) -> io::Result<Box<dyn StorageFile>>;

    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Moves a file or folder in one event; `to` does not exist, or is a file that a file replaces.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file, or a folder with all that is in it.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Names in a folder, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Opens a file to read.
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadSeek>>;

    /// Bytes that can still be written under a folder; `None` if that cannot be told.
    fn free_space(&self, path: &Path) -> Option<u64>;
}

/// A file that is being written.
pub trait StorageFile {
    /// Appends some or all of `bytes`; returns how many.
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Makes what was appended durable.
    ///
    /// # Errors
    /// The operating system's. After an error nothing is known about the file: it must be dropped,
    /// not synced again.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file that is being read.
pub trait ReadSeek: Read + Seek {}
impl<T: Read + Seek> ReadSeek for T {}

/// The operating system's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl Storage for Disk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let file = OpenOptions::new().append(true).create_new(true).open(path)?;
        Ok(Box::new(file))
    }

    fn append_after(&self, path: &Path, len: u64) -> io::Result<Box<dyn StorageFile>> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        if file.metadata()?.len() != len {
            file.set_len(len)?;
        }
        Ok(Box::new(file))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        // never through a symbolic link: `symlink_metadata` looks at the link itself
        if fs::symlink_metadata(path)?.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            // a name that is not UTF-8 is none of ours
            names.extend(entry?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadSeek>> {
        // Opening a FIFO would wait for ever.
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        Ok(Box::new(File::open(path)?))
    }

    fn free_space(&self, path: &Path) -> Option<u64> {
        free_disk_bytes(path).ok()
    }
}

impl StorageFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(self, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Repeats an operation that a signal interrupted.
///
/// # Errors
/// The first error that is not `Interrupted`.
pub fn uninterrupted<T>(mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match operation() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Appends all of `bytes`, whatever the length of each write.
pub fn append_all(file: &mut dyn StorageFile, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = uninterrupted(|| file.append(bytes))?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = bytes.get(n..).unwrap_or_default();
    }
    Ok(())
}

/// Replaces a file in one event: whoever reads it, at any time, after a loss of power too, finds
/// the old content or the new.
pub fn write_file(storage: &dyn Storage, path: &Path, content: &[u8]) -> Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".tmp");
    let aside = Path::new(&aside);
    let written = storage.append_after(aside, 0).and_then(|mut file| {
        append_all(&mut *file, content)?;
        file.sync()?;
        storage.rename(aside, path)?;
        storage.sync_dir(path.parent().unwrap_or(Path::new(".")))
    });
    if written.is_err() {
        // Best effort: the file that has the name is as it was.
        let _ = storage.remove(aside);
    }
    written.map_err(Error::io("write", path))
}

/// Removes what may not be there.
pub fn remove(storage: &dyn Storage, path: &Path) -> io::Result<()> {
    match storage.remove(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Reads a whole small file.
pub fn read_small(storage: &dyn Storage, path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let source = uninterrupted(|| storage.open(path)).map_err(Error::io("open", path))?;
    source.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(path, format!("has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Checks that `want` bytes can be written under `dir`, if the system tells.
///
/// # Errors
/// [`Error::Io`] of kind `StorageFull`.
pub fn check_room(storage: &dyn Storage, what: &str, dir: &Path, want: u64) -> Result<()> {
    match storage.free_space(dir) {
        Some(free) if free < want => {
            let message = format!("{what} needs {want} bytes, the disk has {free} left");
            let source = io::Error::new(io::ErrorKind::StorageFull, message);
            Err(Error::io("write to", dir)(source))
        }
        _ => Ok(()),
    }
}

/// Opens a file at an offset.
pub fn open_at(storage: &dyn Storage, path: &Path, offset: u64) -> Result<Box<dyn ReadSeek>> {
    let mut source = uninterrupted(|| storage.open(path)).map_err(Error::io("open", path))?;
    source.seek(SeekFrom::Start(offset)).map_err(Error::io("read", path))?;
    Ok(source)
}
