//! The rows that a command writes: to standard output, or to a file that can be gone on with.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, IsTerminal, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use indicatif::ProgressBar;
use serde_json::Value;

use crate::error::{Error, Result};

/// Where rows go.
#[derive(Debug, clap::Args)]
pub(super) struct OutArgs {
    /// Write to FILE, not to standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Go on with a FILE that was cut off; its last row is made again, and must be the same
    #[arg(long, requires = "out")]
    resume: bool,
}

/// Writes one row after another.
pub(super) struct RowFile {
    /// The file, if they go to one.
    file: Option<(PathBuf, File)>,
    /// What a file has that is gone on with, until its last row was made again.
    before: Option<Before>,
    /// Rows that are there and not made again.
    pub done: usize,
}

/// What was in a file.
struct Before {
    /// Bytes of its whole rows.
    whole: u64,
    last: Option<String>,
    /// What follows them, without an end.
    torn: String,
}

impl OutArgs {
    /// Opens the file, which must not be there yet, or be one to go on with.
    pub fn open(&self) -> Result<RowFile> {
        let Some(path) = &self.out else {
            return Ok(RowFile { file: None, before: None, done: 0 });
        };
        if self.resume && path.exists() {
            return RowFile::resumed(path);
        }
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::config("--out", "a new file, or --resume", path.display())
            }
            _ => Error::io("create", path)(e),
        })?;
        Ok(RowFile { file: Some((path.clone(), file)), before: None, done: 0 })
    }

    /// Gives the first `n` rows of the file to `take`.
    pub fn earlier(&self, n: usize, mut take: impl FnMut(&Value)) -> Result<()> {
        let Some(path) = self.out.as_ref().filter(|_| n > 0) else { return Ok(()) };
        let file = File::open(path).map_err(Error::io("open", path))?;
        for line in BufReader::new(file).lines().take(n) {
            let line = line.map_err(Error::io("read", path))?;
            let row = serde_json::from_str(&line);
            take(&row.map_err(|e| Error::file(path, format!("has a row that is no JSON: {e}")))?);
        }
        Ok(())
    }

    /// Whether standard output is free for something else.
    pub fn to_file(&self) -> bool {
        self.out.is_some()
    }
}

impl RowFile {
    fn resumed(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(Error::io("open", path))?;
        let (mut before, mut rows) = (Before { whole: 0, last: None, torn: String::new() }, 0);
        let (mut reader, mut line) = (BufReader::new(&file), Vec::new());
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
            if line.pop_if(|end| *end == b'\n').is_none() {
                before.torn = String::from_utf8_lossy(&line).into_owned();
                break;
            }
            (before.whole, rows) = (before.whole + n as u64, rows + 1);
            before.last = Some(String::from_utf8_lossy(&line).into_owned());
        }
        let done = usize::saturating_sub(rows, 1);
        Ok(Self { file: Some((path.to_owned(), file)), before: Some(before), done })
    }

    /// The example of the data that the last row names, if there is one.
    pub fn last_example(&self) -> Result<Option<u64>> {
        let last = self.before.as_ref().and_then(|before| before.last.as_ref());
        let (Some(last), Some((path, _))) = (last, &self.file) else { return Ok(None) };
        let example = serde_json::from_str::<Value>(last).ok().and_then(|v| v["example"].as_u64());
        let unknown =
            || Error::file(path, "has a last row without `example`, wanted that of --keep");
        example.map(Some).ok_or_else(unknown)
    }

    /// Writes a row.
    pub fn write(&mut self, row: &Value) -> Result<()> {
        let row = row.to_string();
        let Some((path, file)) = &mut self.file else {
            return super::print(&format!("{row}\n"));
        };
        if let Some(before) = self.before.take() {
            // Nothing of a file is touched before it is known to be this command's.
            let same = match &before.last {
                Some(last) => *last == row,
                None => row.starts_with(&before.torn),
            };
            if !same {
                let n = self.done + 1;
                let what = "other data, model, settings or device";
                let message = format!("row {n} is another than this command makes: {what}");
                return Err(Error::file(path.clone(), message));
            }
            file.set_len(before.whole).map_err(Error::io("cut", &*path))?;
            file.seek(SeekFrom::End(0)).map_err(Error::io("seek in", &*path))?;
            if before.last.is_some() {
                return Ok(());
            }
        }
        file.write_all(format!("{row}\n").as_bytes()).map_err(Error::io("write", &*path))
    }

    /// Ends the file.
    pub fn finish(&self) -> Result<()> {
        match (&self.before, &self.file) {
            (Some(before), Some((path, _))) if before.last.is_some() => {
                let n = self.done + 1;
                let message = format!("has {n} rows, more than this command makes: other data");
                Err(Error::file(path.clone(), message))
            }
            _ => Ok(()),
        }
    }
}

/// A bar of rows on a terminal, unless the rows themselves go there.
pub(super) fn bar(total: u64, to_file: bool) -> ProgressBar {
    let hidden = std::io::stdout().is_terminal() && !to_file;
    if hidden { ProgressBar::hidden() } else { ProgressBar::new(total) }
}
