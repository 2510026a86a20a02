//! Data files to records.

use std::{path::Path, sync::Arc};

use super::{
    columns::{self, ReadOptions},
    files,
    records::{DataPlace, Located},
};
use crate::error::{Error, Result};

/// Reads a data file, or standard input for `-`, a folder of files, or those that a pattern with
/// `*` or `?` matches. Blank lines are skipped, columns that are neither known here nor read by a reward are ignored, and all rows of a file
/// must have the format of its first.
pub fn read(path: &Path) -> Result<Vec<Located>> {
    read_as(path, &ReadOptions::default())
}

/// [`read`] with names of columns and a purpose.
pub fn read_as(path: &Path, options: &ReadOptions) -> Result<Vec<Located>> {
    options.validate()?;
    let mut out = Vec::new();
    for file in files::expand(path)? {
        let name = if file == Path::new("-") { Path::new("<stdin>") } else { &file };
        let (name, first): (Arc<Path>, usize) = (name.into(), out.len());
        files::rows(&file, &name, options, &mut |line, text| {
            let bad = |message| Error::Data { path: name.to_path_buf(), line, message };
            let (record, columns) = columns::read(text, options).map_err(bad)?;
            if let Some(Located { place, record: first, .. }) = out.get(first) {
                let (want, got) = (first.format(), record.format());
                if want != got {
                    let line = place.line;
                    return Err(bad(format!("has columns {got}, wanted {want} as in line {line}")));
                }
            }
            let place = DataPlace { path: name.clone(), line };
            out.push(Located { place, record, columns });
            Ok(())
        })?;
        if out.len() == first {
            return Err(Error::file(&*name, "has no records, wanted JSON objects, one a line"));
        }
    }
    Ok(out)
}
