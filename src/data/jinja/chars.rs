//! Texts that know of each character who wrote it, and the fuel that making them takes.

use std::{cell::Cell, sync::Arc};

use super::lexer::is_space;

/// A character that stood in the conversation; the template wrote the others.
pub const GIVEN: u32 = 1 << 31;
/// A character that a `generation` block wrote.
pub const GENERATED: u32 = 1 << 30;
/// The character itself.
const CODE: u32 = 0x1f_ffff;
/// What is no character: the end of a text that goes on.
pub const END: u32 = CODE | GIVEN;

/// What a rendering may still do, in units of a character that is made or read.
///
/// Everything that takes time or memory is paid for before it is done, so the first fuel bounds
/// both.
#[derive(Debug)]
pub struct Fuel(Cell<u64>);

impl Fuel {
    pub fn new(units: u64) -> Self {
        Self(Cell::new(units))
    }

    /// Takes `units`, or says that there are not so many.
    pub fn spend(&self, units: usize) -> Result<(), String> {
        let left = self.0.get().checked_sub(units as u64);
        self.0.set(left.unwrap_or(0));
        left.map(drop).ok_or_else(|| "the template does or writes too much".into())
    }
}

/// A text.
#[derive(Clone, Debug)]
pub struct Chars {
    chars: Arc<[u32]>,
    /// HTML that is not to be escaped again (`markupsafe.Markup`).
    pub safe: bool,
}

/// Whether it is the same character, whoever wrote it.
fn same(a: u32, b: u32) -> bool {
    (a ^ b) & CODE == 0
}

/// A character; the end of a text is none.
pub fn char_of(c: u32) -> Option<char> {
    char::from_u32(c & CODE)
}

impl Chars {
    /// Characters that the template wrote.
    pub fn written(text: &str) -> Self {
        text.chars().map(u32::from).collect::<Vec<_>>().into()
    }

    /// Characters of the conversation.
    pub fn given(text: &str) -> Self {
        text.chars().map(|c| u32::from(c) | GIVEN).collect::<Vec<_>>().into()
    }

    pub fn as_slice(&self) -> &[u32] {
        &self.chars
    }

    pub fn len(&self) -> usize {
        self.chars.len()
    }

    /// The text without what is known of its characters.
    pub fn plain(&self) -> String {
        self.chars.iter().filter_map(|c| char_of(*c)).collect()
    }

    /// Whether it is this text.
    pub fn is(&self, text: &str) -> bool {
        let mut all = self.chars.iter();
        text.chars().all(|c| all.next().is_some_and(|x| same(*x, c.into()))) && all.next().is_none()
    }

    /// Whether it is the same text; costs its length.
    pub fn equals(&self, other: &Self, fuel: &Fuel) -> Result<bool, String> {
        if self.len() != other.len() {
            return Ok(false);
        }
        fuel.spend(self.len())?;
        Ok(self.chars.iter().zip(&*other.chars).all(|(a, b)| same(*a, *b)))
    }

    /// The first `part` at or behind `from`.
    pub fn find(&self, part: &[u32], from: usize, fuel: &Fuel) -> Result<Option<usize>, String> {
        let last = self.len().checked_sub(part.len()).filter(|last| from <= *last);
        for at in last.map_or(0..0, |last| from..last + 1) {
            let alike = part.iter().zip(&self.chars[at..]).take_while(|(a, b)| same(**a, **b));
            let alike = alike.count();
            fuel.spend(1 + alike)?;
            if alike == part.len() {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    pub fn starts_with(&self, part: &Self) -> bool {
        let begin = self.chars.iter().zip(&*part.chars);
        part.len() <= self.len() && begin.into_iter().all(|(a, b)| same(*a, *b))
    }

    pub fn ends_with(&self, part: &Self) -> bool {
        let end = self.chars.iter().rev().zip(part.chars.iter().rev());
        part.len() <= self.len() && end.into_iter().all(|(a, b)| same(*a, *b))
    }

    /// A part of it; costs its length.
    pub fn slice(&self, range: std::ops::Range<usize>, fuel: &Fuel) -> Result<Self, String> {
        fuel.spend(range.len() + 8)?;
        Ok(Self { chars: self.chars[range].into(), safe: self.safe })
    }

    /// Without the characters at its ends for which `drop` says so.
    pub fn trim(
        &self,
        (start, end): (bool, bool),
        drop: impl Fn(u32) -> bool,
        fuel: &Fuel,
    ) -> Result<Self, String> {
        let mut range = 0..self.len();
        while start && !range.is_empty() && drop(self.chars[range.start]) {
            range.start += 1;
        }
        while end && !range.is_empty() && drop(self.chars[range.end - 1]) {
            range.end -= 1;
        }
        fuel.spend(self.len() - range.len())?;
        self.slice(range, fuel)
    }

    /// Without white space at its ends.
    pub fn stripped(&self, ends: (bool, bool), fuel: &Fuel) -> Result<Self, String> {
        self.trim(ends, |c| char_of(c).is_some_and(is_space), fuel)
    }

    /// One text after another.
    pub fn join(parts: &[&[u32]], fuel: &Fuel) -> Result<Self, String> {
        fuel.spend(parts.iter().map(|p| p.len()).sum::<usize>() + 8)?;
        Ok(parts.concat().into())
    }

    /// Each character replaced by those that `with` gives, which have the same writer.
    pub fn mapped<I: IntoIterator<Item = char>>(
        &self,
        mut with: impl FnMut(char) -> I,
        fuel: &Fuel,
    ) -> Result<Self, String> {
        fuel.spend(self.len() + 8)?;
        let mut out = Vec::with_capacity(self.len());
        for c in &*self.chars {
            match char_of(*c) {
                None => out.push(*c),
                Some(plain) => {
                    let writer = c & !CODE;
                    out.extend(with(plain).into_iter().map(|c| u32::from(c) | writer));
                }
            }
        }
        fuel.spend(out.len().saturating_sub(self.len()))?;
        Ok(Self { chars: out.into(), safe: self.safe })
    }

    pub fn with_safety(self, safe: bool) -> Self {
        Self { safe, ..self }
    }

    /// Escaped for HTML, unless it is safe.
    pub fn escaped(&self, fuel: &Fuel) -> Result<Self, String> {
        if self.safe {
            return Ok(self.clone());
        }
        let out = self.mapped(
            |c| {
                let text = match c {
                    '&' => "&amp;",
                    '<' => "&lt;",
                    '>' => "&gt;",
                    '"' => "&#34;",
                    '\'' => "&#39;",
                    _ => "",
                };
                let same = text.is_empty().then_some(c);
                text.chars().chain(same)
            },
            fuel,
        )?;
        Ok(Self { safe: true, ..out })
    }
}

impl From<Vec<u32>> for Chars {
    fn from(chars: Vec<u32>) -> Self {
        Self { chars: chars.into(), safe: false }
    }
}
