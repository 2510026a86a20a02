//! Files of data: which ones a path stands for, and the JSON text of each row.
//!
//! JSON lines, a JSON list of objects, CSV (RFC 4180) or TSV with a header; each also as gzip or
//! zstd, which their first bytes tell; Parquet, in a build that has it.

mod lines;
mod list;
mod packed;
#[cfg_attr(not(feature = "parquet"), path = "files/no_parquet.rs")]
mod parquet;
mod table;

use std::{
    cell::Cell,
    fs::{self, File},
    io::{BufRead, Read},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::SystemTime,
};

use self::lines::Lines;
use super::options::{FolderPart, ReadOptions};
use crate::{
    digest::sha256,
    error::{Error, Result},
    hub,
};

/// Ends of the names of data files, before `.gz` or `.zst`.
const KINDS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];

/// Takes the line that a row begins in, and its JSON text, or why it has none.
type Take<'a> = dyn FnMut(usize, Result<&str, String>) -> Result<()> + 'a;

/// Files of the Hub that have no rows.
const NO_DATA: [&str; 3] = ["dataset_infos.json", "dataset_info.json", "state.json"];

/// First words of the names of files that are kept apart to test on.
const HELD_OUT: [&str; 7] = ["test", "validation", "valid", "val", "dev", "eval", "heldout"];

/// The files that a path stands for.
#[derive(Debug, Default)]
pub(super) struct DataFiles {
    pub files: Vec<PathBuf>,
    /// Those of a folder that are not read.
    pub left_out: Vec<PathBuf>,
}

/// The kind of a file that has data, by its name.
fn kind(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?.to_lowercase();
    let plain = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    let kind = plain.rsplit_once('.')?.1;
    let is_data = !name.starts_with('.') && !NO_DATA.contains(&&*name);
    KINDS.into_iter().find(|k| *k == kind && is_data)
}

/// Whether a file's name says that it is kept apart to test on.
fn is_held_out(path: &Path) -> bool {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_lowercase();
    HELD_OUT.contains(&name.split(['-', '_', '.']).next().unwrap_or_default())
}

/// Of all names of files of a data set, those that are read where `rest` stands behind its name.
pub fn dataset_files(all: &[String], rest: &Path) -> Vec<String> {
    let rest = rest.to_string_lossy();
    let folder = match rest.rsplit_once('/') {
        Some((folder, last)) if last.contains(['*', '?']) => folder,
        None if rest.contains(['*', '?']) => "",
        _ => rest.trim_end_matches('/'),
    };
    let is_meant = |name: &&String| {
        let inside =
            name.strip_prefix(folder).is_some_and(|n| folder.is_empty() || n.starts_with('/'));
        **name == *rest || (inside && kind(Path::new(name)).is_some())
    };
    all.iter().filter(is_meant).cloned().collect()
}

/// Whether a path is a name of a data set of the Hub, and what stands behind it; a file of data
/// that is not there is none.
pub fn dataset_name(path: &Path) -> Option<(&str, &Path)> {
    let (name, rest) = hub::name_of(path)?;
    (!rest.as_os_str().is_empty() || kind(path).is_none()).then_some((name, rest))
}

/// The files that a path stands for, by name: itself; those of a folder, not of folders in it;
/// those that a pattern with `*` or `?` in its last part matches; a name of the Hub, where these
/// are in its cache.
pub(super) fn expand(path: &Path, part: FolderPart) -> Result<DataFiles> {
    let cached = cached(path)?;
    let path = cached.as_deref().unwrap_or(path);
    let pattern = path.file_name().and_then(|n| n.to_str()).filter(|n| n.contains(['*', '?']));
    let (mut folder, pattern) = match pattern {
        _ if path.is_dir() => (path.to_owned(), None),
        Some(name) if !path.exists() => (path.parent().unwrap_or(path).to_owned(), Some(name)),
        _ => return Ok(DataFiles { files: vec![path.to_owned()], ..DataFiles::default() }),
    };
    if cached.is_some() && pattern.is_none() {
        folder = data_folder(&folder)?;
    }
    let fits = |name: &str| match pattern {
        Some(pattern) => matches(pattern.as_bytes(), name.as_bytes()),
        None => kind(Path::new(name)).is_some(),
    };
    let mut files = files_of(&folder, fits)?;
    match (files.is_empty(), pattern) {
        (false, _) => {}
        (true, Some(_)) => return Err(Error::file(path, "matches no file")),
        (true, None) => {
            let ends = KINDS.map(|k| format!(".{k}")).join(", ");
            let want = format!("has no data file, wanted {ends}, or these with .gz or .zst behind");
            return Err(Error::file(path, want));
        }
    }
    let mut left_out = Vec::new();
    if pattern.is_none() && part != FolderPart::All {
        let is_read = |file: &PathBuf| is_held_out(file) == (part == FolderPart::HeldOut);
        if files.iter().any(is_read) {
            (files, left_out) = files.into_iter().partition(is_read);
        }
    }
    Ok(DataFiles { files, left_out })
}

/// What a name of the Hub stands for in its cache; `None` for what is no such name, as a file that
/// is not there.
fn cached(path: &Path) -> Result<Option<PathBuf>> {
    match dataset_name(path) {
        Some((name, rest)) => {
            let snapshot = hub::dataset(name)?;
            Ok(Some(if rest.as_os_str().is_empty() { snapshot } else { snapshot.join(rest) }))
        }
        None => Ok(None),
    }
}

/// The files of a folder whose names fit.
fn files_of(folder: &Path, fits: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let mut found = Vec::new();
    for entry in fs::read_dir(here).map_err(Error::io("list", here))? {
        let name = entry.map_err(Error::io("list", here))?.file_name();
        let path = folder.join(&name);
        // A link to nothing is an error, not a file less.
        if name.to_str().is_some_and(&fits)
            && fs::metadata(&path).map_err(Error::io("read", &path))?.is_file()
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The folder of a data set of the Hub that has its files: itself, or the only one in it.
fn data_folder(folder: &Path) -> Result<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(folder) = left.pop() {
        if !files_of(&folder, |name| kind(Path::new(name)).is_some())?.is_empty() {
            found.push(folder);
            continue;
        }
        for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let path = entry.map_err(Error::io("list", &folder))?.path();
            left.extend(path.is_dir().then_some(path));
        }
    }
    found.sort();
    match &found[..] {
        [] => Ok(folder.to_owned()),
        [one] => Ok(one.clone()),
        many => {
            let name =
                |path: &PathBuf| path.strip_prefix(folder).unwrap_or(path).display().to_string();
            let names: Vec<String> = many.iter().map(name).collect();
            let message = format!(
                "has data in {}: say which one, behind the name of the data set and a slash",
                names.join(", ")
            );
            Err(Error::file(folder, message))
        }
    }
}

/// Whether a pattern of `*` (any bytes) and `?` (one) matches a name.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    // Where the last star stands, and from where on the rest is tried.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    (p, n) = (after, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// When a file was last written, and its size: one that was changed has others.
pub(super) type FileState = (SystemTime, u64);

/// A file that is read.
#[derive(Clone, Debug)]
pub struct DataInput {
    /// The file, or `<stdin>`.
    pub path: Arc<Path>,
    /// What it has, if that can be read but once.
    content: Option<Arc<[u8]>>,
    /// Its size in bytes.
    pub len: u64,
}

impl DataInput {
    /// A file that is there, or standard input for `-`.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let once = |name: &Path, mut from: Box<dyn Read>| {
            let mut content = Vec::new();
            from.read_to_end(&mut content).map_err(Error::io("read", name))?;
            let len = content.len() as u64;
            Ok(Self { path: name.into(), content: Some(content.into()), len })
        };
        if path == Path::new("-") {
            return once(Path::new("<stdin>"), Box::new(std::io::stdin()));
        }
        let about = fs::metadata(path).map_err(Error::io("open", path))?;
        if !about.is_file() && !about.is_dir() {
            let file = File::open(path).map_err(Error::io("open", path))?;
            return once(path, Box::new(file));
        }
        Ok(Self { path: path.into(), content: None, len: about.len() })
    }

    /// SHA-256 of what it has.
    pub(super) fn digest(&self) -> Result<[u8; 32]> {
        let path = &*self.path;
        let hash = match &self.content {
            Some(content) => sha256(&**content),
            None => sha256(File::open(path).map_err(Error::io("open", path))?),
        };
        hash.map(|(hash, _)| hash).map_err(Error::io("read", path))
    }

    /// Its time and size, if it is a file that may be read again.
    pub(super) fn state(&self) -> Option<FileState> {
        let about = fs::metadata(&self.path).ok().filter(|_| self.content.is_none())?;
        Some((about.modified().ok()?, about.len()))
    }
}

/// Gives each row of a file; `at` is told how much of the file was read.
pub(super) fn rows(
    input: &DataInput,
    at: &Rc<Cell<u64>>,
    options: &ReadOptions,
    take: &mut Take<'_>,
) -> Result<()> {
    let (path, name) = (&*input.path, &*input.path);
    let mut reader = packed::open(input, at)?;
    let begins = |reader: &mut Box<dyn BufRead>, with: &[u8]| {
        reader.fill_buf().map(|b| b.starts_with(with)).map_err(Error::io("read", name))
    };
    if begins(&mut reader, b"PAR1")? {
        return parquet::rows(path, options, take);
    }
    if begins(&mut reader, b"version https://git-lfs")? {
        let message = "is a pointer of Git LFS, not the file: `git lfs pull` gets it";
        return Err(Error::file(name, message));
    }
    let mut lines = Lines::new(reader, name);
    match kind(path) {
        Some("parquet") => {
            Err(Error::file(name, "is no Parquet file, wanted PAR1 at its beginning"))
        }
        Some("csv") => table::table(lines, b',', options, take),
        Some("tsv") => table::table(lines, b'\t', options, take),
        _ if lines.first()? == Some(b'[') => list::list(lines, take),
        _ => loop {
            lines.bytes.clear();
            if !lines.more()? {
                return Ok(());
            }
            let text = lines.text().map(str::trim);
            if text != Ok("") {
                take(lines.line, text)?;
            }
        },
    }
}
