//! Shape checks that every op shares.

use crate::error::{Error, Result};

/// Checks that a buffer of `len` elements holds `want`.
pub fn check(op: &'static str, arg: &'static str, want: &[usize], len: usize) -> Result<()> {
    let total = want.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    if total == Some(len) { Ok(()) } else { Err(Error::shape(op, arg, want, &[len])) }
}

/// Splits a flat length into rows of `cols`.
pub fn rows(op: &'static str, arg: &'static str, len: usize, cols: usize) -> Result<usize> {
    if cols == 0 || !len.is_multiple_of(cols) {
        return Err(Error::shape(op, arg, &[len / cols.max(1), cols], &[len]));
    }
    Ok(len / cols)
}

/// Checks that `offsets` `[sequences + 1]` ascends from 0 to `len`.
pub fn offsets(op: &str, offsets: &[u32], len: usize) -> Result<()> {
    let bad = offsets.windows(2).position(|w| w[0] > w[1]);
    if let Some(i) = bad {
        let got = format!("{} after {}", offsets[i + 1], offsets[i]);
        return Err(Error::value(format!("{op}: offsets"), "ascending numbers", got));
    }
    if offsets.first().is_none_or(|o| *o == 0) && offsets.last().map_or(0, |o| *o as usize) == len {
        return Ok(());
    }
    let got = format!("{:?} to {:?}", offsets.first(), offsets.last());
    Err(Error::value(format!("{op}: offsets"), format!("0 to {len}"), got))
}
