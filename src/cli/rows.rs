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
#[derive(Clone, Debug, clap::Args)]
pub(super) struct RowArgs {
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
    /// The last row of a file that is gone on with: the first that is made again.
    last: Option<String>,
    /// RowFile that are there and not made again.
    pub done: usize,
}

impl RowArgs {
    /// Opens the file, which must not be there yet, or be one to go on with.
    pub fn open(&self) -> Result<RowFile> {
        let Some(path) = &self.out else { return Ok(RowFile { file: None, last: None, done: 0 }) };
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
        Ok(RowFile { file: Some((path.clone(), file)), last: None, done: 0 })
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
        let mut file = file.map_err(Error::io("open", path))?;
        let (mut whole, mut rows, mut last) = (0, 0, None);
        let (mut reader, mut line) = (BufReader::new(&file), Vec::new());
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
            // What has no end was cut off.
            if n == 0 || line.pop() != Some(b'\n') {
                break;
            }
            (whole, rows) = (whole + n as u64, rows + 1);
            last = Some(String::from_utf8_lossy(&line).into_owned());
        }
        file.set_len(whole).map_err(Error::io("cut", path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::io("seek in", path))?;
        let done = usize::saturating_sub(rows, 1);
        Ok(Self { file: Some((path.to_owned(), file)), last, done })
    }

    /// Writes a row.
    pub fn write(&mut self, row: &Value) -> Result<()> {
        let row = row.to_string();
        let Some((path, file)) = &mut self.file else {
            return super::print(&format!("{row}\n"));
        };
        match self.last.take() {
            Some(last) if last == row => Ok(()),
            Some(_) => {
                let message = format!(
                    "row {} is another than this command makes: other data, model or settings",
                    self.done + 1
                );
                Err(Error::file(path.clone(), message))
            }
            None => {
                file.write_all(format!("{row}\n").as_bytes()).map_err(Error::io("write", &*path))
            }
        }
    }
}

/// A bar of rows on a terminal, unless the rows themselves go there.
pub(super) fn bar(total: u64, to_file: bool) -> ProgressBar {
    let hidden = std::io::stdout().is_terminal() && !to_file;
    if hidden { ProgressBar::hidden() } else { ProgressBar::new(total) }
}
