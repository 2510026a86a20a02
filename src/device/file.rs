//! Files of a model folder, which may be anybody's.

#![allow(unsafe_code)]

use std::{fs::File, io::Read, path::Path};

use memmap2::{Mmap, UncheckedAdvice};

use crate::error::{Error, Result};

/// The size of a regular file. Others are refused: opening a FIFO would wait for ever.
fn size(path: &Path) -> Result<u64> {
    let about = std::fs::metadata(path).map_err(Error::io("read", path))?;
    if about.is_file() { Ok(about.len()) } else { Err(Error::file(path, "is no regular file")) }
}

/// Reads a text file of a model folder whole, if it has at most `limit` bytes.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    let bytes = size(path)?;
    if bytes > limit {
        return Err(Error::file(path, format!("{bytes} bytes long, wanted at most {limit}")));
    }
    std::fs::read_to_string(path).map_err(Error::io("read", path))
}

/// Reads a text file of the user's, a pipe too, if it has at most `limit` bytes.
pub fn read_bounded(path: &Path, limit: u64) -> Result<String> {
    let mut text = String::new();
    let file = File::open(path).map_err(Error::io("read", path))?;
    let bytes = file.take(limit + 1).read_to_string(&mut text).map_err(Error::io("read", path))?;
    if bytes as u64 > limit {
        return Err(Error::file(path, format!("is longer than {limit} bytes")));
    }
    Ok(text)
}

/// Maps a file for reading.
///
/// As everywhere, a file that another process truncates while it is mapped kills the reader;
/// Warpo itself never writes over a file, it renames new ones into place.
pub fn map(path: &Path) -> Result<Mmap> {
    size(path)?;
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the mapping is private and read-only; see above for writers.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// Gives the pages of a mapped file back to the system, which reads them again when they are asked
/// for: what was read of a large file once is no memory of this process.
pub fn release(map: &Mmap) {
    // SAFETY: the mapping is of a file and nothing was written to it, so its pages come back the
    // same.
    let done = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
    // They are given back later, then.
    let _ = done;
}
