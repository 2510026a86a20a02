//! The elements of a JSON list, one after the other: memory holds one of them.

use std::io::BufRead;

use serde_json::value::RawValue;

use super::{
    Take,
    lines::{Lines, MAX_LINE, text},
};
use crate::{
    data::chat::not_json,
    error::{Error, Result},
};

/// What the next byte may be.
#[derive(Clone, Copy, PartialEq)]
enum Expect {
    /// `[`
    List,
    /// An element, or the end.
    First,
    /// An element.
    Element,
    /// `,` or the end.
    Comma,
    /// White space.
    Nothing,
}

/// Where a byte of an element stands.
#[derive(Default)]
struct Nesting {
    depth: usize,
    in_text: bool,
    escaped: bool,
}

impl Nesting {
    /// Whether the element ends with this byte.
    fn ends_with(&mut self, b: u8) -> bool {
        if self.in_text {
            match b {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_text = false,
                _ => {}
            }
            return !self.in_text && self.depth == 0;
        }
        match b {
            b'"' => self.in_text = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

/// Gives each element of a list, which begins at the next byte.
pub(super) fn list(mut lines: Lines<'_>, take: &mut Take<'_>) -> Result<()> {
    let mut reader = std::mem::replace(&mut lines.reader, Box::new(std::io::empty()));
    let (mut line, mut column, mut start) = (lines.line + 1, 0, 0);
    let (mut expect, mut inside, mut nesting) = (Expect::List, false, Nesting::default());
    loop {
        let buffer = reader.fill_buf().map_err(Error::io("read", lines.name))?;
        if buffer.is_empty() {
            let left = "not JSON: the list does not end".into();
            let ended = !inside && expect == Expect::Nothing;
            return if ended { Ok(()) } else { Err(lines.error(line, left)) };
        }
        let n = buffer.len();
        for &b in buffer {
            column += 1;
            let plain = nesting.depth == 0 && !nesting.in_text;
            // A number or a word ends before this byte.
            if inside && plain && (b.is_ascii_whitespace() || matches!(b, b',' | b']' | b'}')) {
                inside = false;
                give(&mut lines, start, take)?;
            }
            if inside {
                lines.bytes.push(b);
                if lines.bytes.len() as u64 > MAX_LINE {
                    return Err(lines.error(start, format!("longer than {MAX_LINE} bytes")));
                }
                if nesting.ends_with(b) {
                    inside = false;
                    give(&mut lines, start, take)?;
                }
            } else if !b.is_ascii_whitespace() {
                expect = match (expect, b) {
                    (Expect::List, b'[') => Expect::First,
                    (Expect::First | Expect::Comma, b']') => Expect::Nothing,
                    (Expect::Comma, b',') => Expect::Element,
                    (Expect::First | Expect::Element, b) if !matches!(b, b',' | b']' | b'}') => {
                        (inside, start, nesting) = (true, line, Nesting::default());
                        lines.bytes.clear();
                        lines.bytes.push(b);
                        nesting.ends_with(b);
                        Expect::Comma
                    }
                    (expect, _) => {
                        let want = match expect {
                            Expect::Nothing => "trailing characters",
                            Expect::Comma => "expected `,` or `]`",
                            _ => "expected value",
                        };
                        let message = format!("not JSON: {want} at column {column}");
                        return Err(lines.error(line, message));
                    }
                };
            }
            if b == b'\n' {
                (line, column) = (line + 1, 0);
            }
        }
        reader.consume(n);
    }
}

/// Gives an element. One that is not JSON is no bad row: where it ends is not known.
fn give(lines: &mut Lines<'_>, line: usize, take: &mut Take<'_>) -> Result<()> {
    let text = text(&lines.bytes);
    if let Ok(text) = text {
        let element = serde_json::from_str::<&RawValue>(text);
        element.map_err(|e| lines.error(line + e.line() - 1, not_json(&e)))?;
    }
    take(line, text)
}
