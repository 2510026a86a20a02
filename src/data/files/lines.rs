//! Lines of a file, of bounded length.

use std::{
    io::{BufRead, Read},
    path::Path,
};

use crate::error::{Error, Result};

/// The longest row that is read, in bytes.
pub(super) const MAX_LINE: u64 = 64 << 20;

/// Lines of a file.
pub(super) struct Lines<'a> {
    pub reader: Box<dyn BufRead>,
    pub name: &'a Path,
    /// The number of the last one.
    pub line: usize,
    pub bytes: Vec<u8>,
}

impl<'a> Lines<'a> {
    pub fn new(reader: Box<dyn BufRead>, name: &'a Path) -> Self {
        Self { reader, name, line: 0, bytes: Vec::new() }
    }

    pub fn error(&self, line: usize, message: String) -> Error {
        Error::Data { path: self.name.to_owned(), line, message }
    }

    /// The first byte that is neither white space nor a byte order mark, which is no content.
    pub fn first(&mut self) -> Result<Option<u8>> {
        loop {
            let failed = Error::io("read", self.name);
            let Some(b) = self.reader.fill_buf().map_err(failed)?.first().copied() else {
                return Ok(None);
            };
            let marks = "\u{feff}".as_bytes();
            if !b.is_ascii_whitespace() && !marks.contains(&b) {
                return Ok(Some(b));
            }
            self.line += usize::from(b == b'\n');
            self.reader.consume(1);
        }
    }

    /// Reads one more line behind what `bytes` has; false at the end.
    pub fn more(&mut self) -> Result<bool> {
        let left = (MAX_LINE + 1).saturating_sub(self.bytes.len() as u64);
        let n = (&mut self.reader).take(left).read_until(b'\n', &mut self.bytes);
        if n.map_err(Error::io("read", self.name))? == 0 {
            return Ok(false);
        }
        self.line += 1;
        match self.bytes.len() as u64 > MAX_LINE {
            true => Err(self.error(self.line, format!("longer than {MAX_LINE} bytes"))),
            false => Ok(true),
        }
    }

    /// What was read, or why it is no text.
    pub fn text(&self) -> Result<&str, String> {
        text(&self.bytes)
    }
}

/// A text, or why it is none.
pub(super) fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8 at byte {}", e.valid_up_to() + 1))
}
