//! Memory-mapped files.

#![allow(unsafe_code)]

use std::{fs::File, path::Path};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a file for reading.
///
/// As everywhere, a file that another process truncates while it is mapped kills the reader;
/// Warpo itself never writes over a file, it renames new ones into place.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened or mapped.
pub fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the mapping is private and read-only; see above for writers.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}
