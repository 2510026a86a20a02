//! Event files, read back by a decoder that shares nothing with the writer.

use warpo::train::events::Events;

/// CRC-32C bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for b in bytes {
        crc ^= u32::from(*b);
        for _ in 0..8 {
            crc = if crc % 2 == 1 { (crc / 2) ^ 0x82F6_3B78 } else { crc / 2 };
        }
    }
    !crc
}

fn masked(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c(bytes);
    crc.rotate_right(15).wrapping_add(0xA282_EAD8).to_le_bytes()
}

#[derive(Debug, PartialEq)]
pub enum Field {
    Number(u64),
    Double(f64),
    Float(f32),
    Bytes(Vec<u8>),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut v, mut shift) = (0, 0);
    loop {
        let b = bytes[0];
        *bytes = &bytes[1..];
        v |= u64::from(b % 128) << shift;
        shift += 7;
        if b < 128 {
            return v;
        }
    }
}

/// The fields of a protobuf message.
pub fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let mut take = |n: usize| {
            let (head, tail) = bytes.split_at(n);
            bytes = tail;
            head
        };
        let field = match key % 8 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Double(f64::from_le_bytes(take(8).try_into().unwrap())),
            2 => {
                let n = varint(&mut bytes) as usize;
                let (head, tail) = bytes.split_at(n);
                bytes = tail;
                Field::Bytes(head.to_vec())
            }
            5 => Field::Float(f32::from_le_bytes(take(4).try_into().unwrap())),
            w => panic!("wire type {w}"),
        };
        all.push((key / 8, field));
    }
    all
}

/// Payloads of a file, both checksums verified.
pub fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(bytes[8..12], masked(&bytes[..8]));
        assert_eq!(bytes[12 + n..16 + n], masked(&bytes[12..12 + n]));
        all.push(bytes[12..12 + n].to_vec());
        bytes = &bytes[16 + n..];
    }
    all
}

/// (step, tag, value) of all scalars in a file.
pub fn scalars(bytes: &[u8]) -> Vec<(u64, String, f32)> {
    let mut all = Vec::new();
    for record in records(bytes) {
        let event = fields(&record);
        let step = event.iter().find_map(|f| match f {
            (2, Field::Number(n)) => Some(*n),
            _ => None,
        });
        for summary in event.iter().filter(|f| f.0 == 5) {
            let (_, Field::Bytes(summary)) = summary else { panic!() };
            for (number, value) in fields(summary) {
                let Field::Bytes(value) = value else { panic!() };
                assert_eq!(number, 1);
                let [(1, Field::Bytes(tag)), (2, Field::Float(x))] = &fields(&value)[..] else {
                    continue;
                };
                all.push((step.unwrap(), String::from_utf8(tag.clone()).unwrap(), *x));
            }
        }
    }
    all
}

#[test]
fn crc_known_answers() {
    // RFC 3720, B.4
    assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
    assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
    assert_eq!(crc32c(b"123456789"), 0xE306_9283);
}

#[test]
fn what_is_written_is_read_back() {
    let mut file = Vec::new();
    let mut events = Events::new(&mut file, 1.5, None).unwrap();
    events.scalars(2.0, 1, &[("loss", 0.25), ("kl", f64::NAN)]).unwrap();
    events.scalars(3.0, 300, &[("loss", -1e-3)]).unwrap();
    events.scalars(3.0, 301, &[]).unwrap();
    let all = records(&file);
    assert_eq!(all.len(), 4);
    let version = (3, Field::Bytes(b"brain.Event:2".to_vec()));
    assert_eq!(fields(&all[0]), [(1, Field::Double(1.5)), version]);
    let read = scalars(&file);
    assert_eq!(read[0], (1, "loss".into(), 0.25));
    assert!(read[1].1 == "kl" && read[1].2.is_nan());
    assert_eq!(read[2], (300, "loss".into(), -1e-3));
    assert_eq!(read.len(), 3);
}

/// Written out by hand from the specification: `Event{wall_time: 1.0, file_version}`, then
/// `Event{wall_time: 2.0, step: 5, summary{value{tag: "a", simple_value: 0.5}}}`.
#[test]
fn golden_bytes() {
    let mut file = Vec::new();
    Events::new(&mut file, 1.0, None).unwrap().scalars(2.0, 5, &[("a", 0.5)]).unwrap();
    let hex: String = file.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, GOLDEN);
}

const GOLDEN: &str = "\
    1800000000000000a37f4b2209000000000000f03f1a0d627261696e2e4576656e743a3286bf577a\
    1700000000000000e7cef81e09000000000000004010052a0a0a080a0161150000003f3cd523b1";

#[test]
fn a_resumed_file_tells_tensorboard_to_forget_later_steps() {
    let mut file = Vec::new();
    Events::new(&mut file, 1.0, Some(7)).unwrap();
    let session = (7, Field::Bytes(vec![8, 1]));
    let wanted = [(1, Field::Double(1.0)), (2, Field::Number(8)), session];
    assert_eq!(fields(&records(&file)[1]), wanted);
}
