//! Data files to records.

use std::{
    cell::Cell,
    collections::BTreeSet,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

use super::{
    columns,
    files::{self, DataInput},
    options::ReadOptions,
    parallel::in_order,
    records::{BadLines, DataPlace, Located, Record},
    reward_columns::RowColumns,
};
use crate::error::{Error, Result};

/// Rows and bytes of them that a thread reads at once.
const BATCH: (usize, usize) = (256, 1 << 18);

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
    let found = find(path, options)?;
    let (mut rows, mut bad) = (Vec::new(), BadLines::up_to(options.skip_bad));
    let mut reading = Reading { options, bad: &mut bad, seen: &mut |_| {} };
    reading.each(
        &found.inputs,
        |at| at,
        |_, at| {
            rows.push(at);
            Ok(())
        },
    )?;
    Ok(Records { rows, bad, left_out: found.left_out })
}

/// The files of a path.
#[derive(Clone, Debug, Default)]
pub struct FoundFiles {
    pub inputs: Vec<DataInput>,
    /// Files of a folder that are not read, as [`ReadOptions::part`] asks.
    pub left_out: Vec<PathBuf>,
}

/// Looks for the files of a path, of which standard input and pipes are read.
pub fn find(path: &Path, options: &ReadOptions) -> Result<FoundFiles> {
    options.validate()?;
    let files::DataFiles { files, left_out } = files::expand(path, options.part)?;
    let inputs = files.iter().map(|file| DataInput::new(file)).collect::<Result<_>>()?;
    Ok(FoundFiles { inputs, left_out })
}

/// How rows are read.
pub(super) struct Reading<'a> {
    pub options: &'a ReadOptions,
    /// Lines that are left out.
    pub bad: &'a mut BadLines,
    /// Hears how many bytes of the files were read.
    pub seen: &'a mut dyn FnMut(u64),
}

/// Rows of a file that a thread reads.
struct RawBatch {
    first: DataPlace,
    rows: Vec<(usize, Result<String, String>)>,
}

/// Format of a record, and what was made of it; or why the row is none.
type ReadRow<U> = Result<(&'static str, U), String>;

/// What a thread made of them.
struct ReadBatch<'a, U> {
    rows: Vec<(usize, ReadRow<U>)>,
    /// Renamed columns that no row has.
    unseen: BTreeSet<&'a str>,
}

impl Reading<'_> {
    /// Gives `take` what `work` makes of each record, in their order; `work` runs on all threads.
    pub fn each<U: Send>(
        &mut self,
        inputs: &[DataInput],
        work: impl Fn(Located) -> U + Sync,
        mut take: impl FnMut(&mut BadLines, U) -> Result<()>,
    ) -> Result<()> {
        let mut before = 0;
        for input in inputs {
            self.file(input, before, &work, &mut take)?;
            before += input.len;
        }
        Ok(())
    }

    fn file<U: Send>(
        &mut self,
        input: &DataInput,
        before: u64,
        work: &(impl Fn(Located) -> U + Sync),
        take: &mut impl FnMut(&mut BadLines, U) -> Result<()>,
    ) -> Result<()> {
        let Self { options, bad, seen } = self;
        let (name, options) = (&input.path, *options);
        let all = || options.columns.keys().map(String::as_str).collect::<BTreeSet<&str>>();
        let (at, mut unseen) = (Rc::new(Cell::new(0)), all());
        let mut first: Option<(usize, &'static str)> = None;
        let place = |line| DataPlace { path: name.clone(), line };
        let feed = |give: &mut dyn FnMut(RawBatch) -> Result<()>| {
            let (mut rows, mut bytes) = (Vec::new(), 0);
            let batch = |rows| RawBatch { first: place(0), rows };
            let read = files::rows(input, &at, options, &mut |line, text| {
                bytes += text.as_ref().map_or(0, |text| text.len());
                rows.push((line, text.map(str::to_owned)));
                if rows.len() >= BATCH.0 || bytes >= BATCH.1 {
                    bytes = 0;
                    give(batch(std::mem::take(&mut rows)))?;
                }
                Ok(())
            });
            give(batch(rows))?;
            read
        };
        let read = |batch: RawBatch| {
            let mut unseen = all();
            let path = batch.first.path;
            let one = |(line, text): (usize, Result<String, String>)| {
                let row = text.and_then(|text| columns::read(&text, options, &mut unseen));
                let place = DataPlace { path: path.clone(), line };
                let made = |(record, columns): (Record, Arc<RowColumns>)| {
                    (record.format(), work(Located { place, record, columns }))
                };
                (line, row.map(made))
            };
            let rows = batch.rows.into_iter().map(one).collect();
            ReadBatch { rows, unseen }
        };
        in_order(feed, read, |batch: ReadBatch<'_, U>| {
            unseen.retain(|name| batch.unseen.contains(name));
            for (line, row) in batch.rows {
                let fits = row.and_then(|(format, made)| match first {
                    Some((at, want)) if want != format => {
                        Err(format!("has columns {format}, wanted {want} as in line {at}"))
                    }
                    _ => {
                        first.get_or_insert((line, format));
                        Ok(made)
                    }
                });
                match fits {
                    Ok(made) => take(bad, made)?,
                    Err(e) => bad.skip(place(line).error(e))?,
                }
            }
            seen(before + at.get());
            Ok(())
        })?;
        if let Some(ours) = unseen.first() {
            let theirs = &options.columns[*ours];
            let message = format!("no row has column {theirs:?} (`columns` has it as `{ours}`)");
            return Err(Error::file(&**name, message));
        }
        if first.is_none() {
            return Err(match bad.note("read") {
                Some(note) => Error::file(&**name, format!("has no records: {note}")),
                None => Error::file(&**name, "has no records, wanted JSON objects, one a line"),
            });
        }
        Ok(())
    }
}
