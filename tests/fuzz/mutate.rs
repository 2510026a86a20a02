//! Mutations of bytes, most of them of JSON, always the same.

/// The longest mutant.
const LONGEST: usize = 16 << 10;

const NUMBERS: &[&str] = &[
    "0",
    "1",
    "-1",
    "2",
    "-0",
    "0.5",
    "255",
    "256",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e309",
    "-1e400",
    "1e-400",
    "NaN",
    "inf",
];

const WORDS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "\\",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\\u0000",
    "\\ud800",
    "\n",
    "\r\n",
    " ",
    "\0",
    "\u{feff}",
    "\u{e9}",
    "\u{1f600}",
    "..",
    "/",
    "../",
    "=",
    "#",
    "'",
    "\"\"\"",
    "[[",
    "[[[[[[[[[[[[[[[[",
    "{\"a\":{\"a\":{\"a\":",
    "</script>",
    "__metadata__",
    "shape",
];

/// A stream of mutants, which its name decides.
pub struct Mutator(u64);

impl Mutator {
    pub fn new(name: &str) -> Self {
        Self(name.bytes().fold(5381, |h, b| h.wrapping_mul(33) ^ u64::from(b)))
    }

    /// SplitMix64 (Steele et al. 2014).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    /// A range of at most `most` bytes of so many.
    fn range(&mut self, len: usize, most: usize) -> std::ops::Range<usize> {
        let from = self.below(len + 1);
        from..from + self.below((len - from).min(most) + 1)
    }

    /// One of `known`, changed in one to nine places; every other time one of the first `seeds`.
    pub fn mutant(&mut self, known: &[Vec<u8>], seeds: usize) -> Vec<u8> {
        let from = if self.below(2) == 0 { seeds } else { known.len() };
        let mut bytes = known[self.below(from)].clone();
        for _ in 0..=self.below(8) {
            self.change(&mut bytes, known);
        }
        bytes.truncate(LONGEST);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, known: &[Vec<u8>]) {
        let at = self.below(bytes.len());
        match self.below(10) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
            1 if !bytes.is_empty() => bytes[at] = self.next() as u8,
            2 => drop(bytes.drain(self.range(bytes.len(), 64))),
            3 => {
                let again = bytes[self.range(bytes.len(), 256)].to_vec();
                let times = 1 + self.below(4);
                bytes.splice(at..at, again.repeat(times));
            }
            4 => {
                let other = &known[self.below(known.len())];
                let part = other[self.range(other.len(), 256)].to_vec();
                let place = self.range(bytes.len(), 64);
                bytes.splice(place, part);
            }
            5 | 6 => {
                // The number after a place becomes another.
                let digit = |b: &u8| b.is_ascii_digit();
                let Some(from) = bytes[at.min(bytes.len())..].iter().position(digit) else {
                    return;
                };
                let from = at + from;
                let end =
                    bytes[from..].iter().position(|b| !digit(b)).unwrap_or(bytes.len() - from);
                let number = self.pick(NUMBERS);
                bytes.splice(from..from + end, number.bytes());
            }
            7 => {
                let word = self.pick(WORDS);
                bytes.splice(at..at, word.bytes());
            }
            8 if bytes.len() >= 8 => {
                // A length of 64 bits, or of 32.
                let (shift, near) = (self.below(65) as u32, self.below(3) as u64);
                let number =
                    1_u64.checked_shl(shift).unwrap_or(0).wrapping_add(near).wrapping_sub(1);
                let width = if self.below(2) == 0 { 4 } else { 8 };
                let at = if self.below(2) == 0 { 0 } else { self.below(bytes.len() - width + 1) };
                bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
            }
            _ => bytes.truncate(bytes.len() - self.below(bytes.len().min(32))),
        }
    }
}
