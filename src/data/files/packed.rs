//! What gzip and zstd packed, as it was before.

use std::{
    cell::Cell,
    fs::File,
    io::{self, BufRead, BufReader, Cursor, Read},
    rc::Rc,
};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

use super::DataInput;
use crate::error::{Error, Result};

/// Bytes that are read at once.
const BUFFER: usize = 64 << 10;

/// The largest window of a zstd file, which is memory: what every decoder should take (RFC 8878,
/// 3.1.1.1.2) and levels up to 19 need.
const ZSTD_WINDOW: u64 = 8 << 20;

/// A packed file may hold so many bytes, and this many times its own: text packs 3 to 10 times.
/// What it holds is kept in memory, which a small file is not to fill.
const UNPACKED: u64 = 64 << 20;
const UNPACKED_TIMES: u64 = 100;

/// What a file has, as it was before it was packed; `at` is told how much of the file was read.
pub(super) fn open(input: &DataInput, at: &Rc<Cell<u64>>) -> Result<Box<dyn BufRead>> {
    let path = &*input.path;
    let inner: Box<dyn Read> = match &input.content {
        Some(content) => Box::new(Cursor::new(content.clone())),
        None => Box::new(File::open(path).map_err(Error::io("open", path))?),
    };
    let reader: Box<dyn BufRead> = Box::new(BufReader::with_capacity(BUFFER, inner));
    let mut reader: Box<dyn BufRead> = Box::new(Counted { inner: reader, read: at.clone() });
    let read = Rc::new(Cell::new(0));
    let counted = |inner| Counted { inner, read: read.clone() };
    let unpacker: Box<dyn Read> = match reader.fill_buf().map_err(Error::io("read", path))? {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(counted(reader))),
        // A frame of content, or one that is skipped.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = FrameDecoder::new();
            decoder.set_max_window_size(ZSTD_WINDOW);
            Box::new(Zstd { reader: counted(reader), decoder, inside: false })
        }
        _ => return Ok(reader),
    };
    Ok(Box::new(BufReader::new(Bounded { unpacker, packed: read, unpacked: 0 })))
}

/// Counts the bytes that are taken.
struct Counted {
    inner: Box<dyn BufRead>,
    read: Rc<Cell<u64>>,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(out)?;
        self.read.set(self.read.get() + n as u64);
        Ok(n)
    }
}

impl BufRead for Counted {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        self.inner.consume(n);
        self.read.set(self.read.get() + n as u64);
    }
}

/// Refuses what grows far more than text does.
struct Bounded {
    unpacker: Box<dyn Read>,
    packed: Rc<Cell<u64>>,
    unpacked: u64,
}

impl Read for Bounded {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.unpacker.read(out)?;
        self.unpacked += n as u64;
        match self.unpacked > UNPACKED + UNPACKED_TIMES * self.packed.get() {
            true => Err(io::Error::other(format!(
                "it unpacks to more than {} MiB and {UNPACKED_TIMES} times its size: unpack it \
                 first, if it is meant to",
                UNPACKED >> 20
            ))),
            false => Ok(n),
        }
    }
}

/// The frames of a zstd file, one behind the other.
struct Zstd {
    reader: Counted,
    decoder: FrameDecoder,
    /// A frame was begun.
    inside: bool,
}

impl Zstd {
    /// Begins the next frame of content; false at the end.
    fn begin(&mut self) -> io::Result<bool> {
        while !self.reader.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.reader) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    let skipped = io::copy(&mut (&mut self.reader).take(length), &mut io::sink())?;
                    if skipped < length {
                        return Err(io::Error::other("it ends within a skippable frame"));
                    }
                }
                Err(e) => return Err(io::Error::other(e)),
            }
        }
        Ok(false)
    }
}

impl Read for Zstd {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        while self.inside || self.begin()? {
            self.inside = true;
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let some = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.reader, some).map_err(io::Error::other)?;
            }
            let n = self.decoder.read(out)?;
            if n > 0 {
                return Ok(n);
            }
            let said = self.decoder.get_checksum_from_data();
            if said.is_some() && said != self.decoder.get_calculated_checksum() {
                return Err(io::Error::other("its content has another checksum"));
            }
            self.inside = false;
        }
        Ok(0)
    }
}
