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
