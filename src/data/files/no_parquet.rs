//! Parquet in a build without it.

use std::path::Path;

use super::Take;
use crate::{
    data::options::ReadOptions,
    error::{Error, Result},
};

/// Says how to get a build that reads them.
pub(super) fn rows(path: &Path, _: &ReadOptions, _: &mut Take<'_>) -> Result<()> {
    let message = "is Parquet, which this build does not read: \
                   `cargo install --path . --features parquet` makes one that does";
    Err(Error::file(path, message))
}
