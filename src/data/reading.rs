//! Data files to records.

use std::{
    collections::BTreeSet,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    columns, files,
    options::ReadOptions,
    records::{BadLines, DataPlace, Located},
};
use crate::error::{Error, Result};

/// What was read of a path.
#[derive(Debug, Default)]
pub struct Records {
    pub rows: Vec<Located>,
    /// Lines that are left out.
    pub bad: BadLines,
    /// Files of a folder that are not read, as [`ReadOptions::part`] asks.
    pub left_out: Vec<PathBuf>,
}

impl Deref for Records {
    type Target = Vec<Located>;

    fn deref(&self) -> &Vec<Located> {
        &self.rows
    }
}

impl DerefMut for Records {
    fn deref_mut(&mut self) -> &mut Vec<Located> {
        &mut self.rows
    }
}

/// Reads a data file, or standard input for `-`, a folder of files, or those that a pattern with
/// `*` or `?` matches. Blank lines are skipped, columns that neither
/// records nor rewards read are ignored, and all rows of a file must have the format of its first.
pub fn read(path: &Path) -> Result<Vec<Located>> {
    read_as(path, &ReadOptions::default()).map(|all| all.rows)
}

/// [`read`] with names of columns and a purpose.
///
/// A column that is renamed has to be in some row of each file.
pub fn read_as(path: &Path, options: &ReadOptions) -> Result<Records> {
    options.validate()?;
    let files::DataFiles { files, left_out } = files::expand(path, options.part)?;
    let (mut out, mut bad) = (Vec::new(), BadLines::up_to(options.skip_bad));
    for file in files {
        let name = if file == Path::new("-") { Path::new("<stdin>") } else { &file };
        let (name, first): (Arc<Path>, usize) = (name.into(), out.len());
        let mut unseen: BTreeSet<&str> = options.columns.keys().map(String::as_str).collect();
        files::rows(&file, &name, options, &mut |line, text| {
            let place = DataPlace { path: name.clone(), line };
            let read = text.and_then(|text| columns::read(text, options, &mut unseen));
            let fits = read.and_then(|(record, columns)| match out.get(first) {
                Some(Located { place, record: first, .. }) if first.format() != record.format() => {
                    let (want, got, line) = (first.format(), record.format(), place.line);
                    Err(format!("has columns {got}, wanted {want} as in line {line}"))
                }
                _ => Ok((record, columns)),
            });
            match fits {
                Ok((record, columns)) => out.push(Located { place, record, columns }),
                Err(e) => bad.skip(place.error(e))?,
            }
            Ok(())
        })?;
        if let Some(ours) = unseen.first() {
            let theirs = &options.columns[*ours];
            let message = format!("no row has column {theirs:?} (`columns` has it as `{ours}`)");
            return Err(Error::file(&*name, message));
        }
        if out.len() == first {
            return Err(match bad.note("read") {
                Some(note) => Error::file(&*name, format!("has no records: {note}")),
                None => Error::file(&*name, "has no records, wanted JSON objects, one a line"),
            });
        }
    }
    Ok(Records { rows: out, bad, left_out })
}
