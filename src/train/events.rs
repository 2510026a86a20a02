//! TensorBoard's event files: scalars.
//!
//! A file is a chain of TFRecords: length (u64), masked CRC-32C of the length, payload, masked
//! CRC-32C of the payload, all little-endian. The payload is the protobuf message `Event` of
//! `tensorflow/core/util/event.proto`; field numbers below are from there and from
//! `summary.proto`.

use std::io::{self, Write};

/// Writes one event file.
#[derive(Debug)]
pub struct Events<W: Write> {
    out: W,
}

impl<W: Write> Events<W> {
    /// Begins a file. `time` is in seconds since 1970, here and below. With `resume_after`,
    /// TensorBoard forgets what earlier files of the folder say about later steps.
    pub fn new(out: W, time: f64, resume_after: Option<u64>) -> io::Result<Self> {
        let mut events = Self { out };
        events.record(&Message::default().double(1, time).bytes(3, b"brain.Event:2"))?;
        if let Some(step) = resume_after {
            // SessionLog { status: START } purges events of this step and later ones
            let start = Message::default().varint(1, 1);
            let event = Message::default().double(1, time).varint(2, step + 1);
            events.record(&event.message(7, &start))?;
        }
        Ok(events)
    }

    /// Writes the scalars of a step as one event.
    pub fn scalars(&mut self, time: f64, step: u64, values: &[(&str, f64)]) -> io::Result<()> {
        let value = |summary: Message, (tag, x): &(&str, f64)| {
            let value = Message::default().bytes(1, tag.as_bytes()).float(2, *x as f32);
            summary.message(1, &value)
        };
        let summary = values.iter().fold(Message::default(), value);
        self.record(&Message::default().double(1, time).varint(2, step).message(5, &summary))
    }

    /// Whole records reach the file or, at a crash, a torn last one, which readers skip.
    fn record(&mut self, payload: &Message) -> io::Result<()> {
        let payload = &payload.0;
        let length = (payload.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(payload.len() + 16);
        record.extend(length);
        record.extend(masked(crc32c(&length)).to_le_bytes());
        record.extend(payload);
        record.extend(masked(crc32c(payload)).to_le_bytes());
        self.out.write_all(&record)?;
        self.out.flush()
    }
}

/// A protobuf message being written, field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn base128(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.0.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.0.push(v as u8);
    }

    /// The key of a field: its number and how it is encoded.
    fn key(&mut self, field: u64, wire: u64) {
        self.base128(field << 3 | wire);
    }

    fn varint(mut self, field: u64, v: u64) -> Self {
        self.key(field, 0);
        self.base128(v);
        self
    }

    fn double(mut self, field: u64, v: f64) -> Self {
        self.key(field, 1);
        self.0.extend(v.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, v: &[u8]) -> Self {
        self.key(field, 2);
        self.base128(v.len() as u64);
        self.0.extend(v);
        self
    }

    fn message(self, field: u64, v: &Self) -> Self {
        self.bytes(field, &v.0)
    }

    fn float(mut self, field: u64, v: f32) -> Self {
        self.key(field, 5);
        self.0.extend(v.to_le_bytes());
        self
    }
}

/// CRC-32C (Castagnoli), reflected, polynomial 0x82F63B78.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut c = i as u32;
            let mut bit = 0;
            while bit < 8 {
                c = if c & 1 == 1 { c >> 1 ^ 0x82F6_3B78 } else { c >> 1 };
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |c: u32, b| TABLE[((c ^ u32::from(*b)) & 0xFF) as usize] ^ c >> 8)
}

/// TFRecord's mask: a CRC of data that contains CRCs would be weak.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}
