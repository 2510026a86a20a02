//! Files of data: which ones a path stands for, and the JSON text of each row.
//!
//! JSON lines, a JSON list of objects, CSV (RFC 4180) or TSV with a header; each also as gzip or
//! zstd, which their first bytes tell.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, stdin},
    path::{Path, PathBuf},
};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use serde_json::{Map, Value, value::RawValue};

use super::{chat::not_json, columns::ReadOptions, unique};
use crate::error::{Error, Result};

/// The longest row that is read, in bytes.
const MAX_LINE: u64 = 64 << 20;

/// The longest JSON list that is read, in bytes: it is held whole.
const MAX_LIST: u64 = 8 << 30;

/// The largest window of a zstd file, which is memory: what every decoder should take (RFC 8878,
/// 3.1.1.1.2) and levels up to 19 need.
const ZSTD_WINDOW: u64 = 8 << 20;

/// Ends of the names of data files, before `.gz` or `.zst`.
const KINDS: [&str; 5] = ["jsonl", "ndjson", "json", "csv", "tsv"];

/// Takes the line that a row begins in, and its JSON text.
type Take<'a> = dyn FnMut(usize, &str) -> Result<()> + 'a;

/// The kind of a file that has data, by its name.
fn kind(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?.to_lowercase();
    let plain = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    let kind = plain.rsplit_once('.')?.1;
    KINDS.into_iter().find(|k| *k == kind && !name.starts_with('.'))
}

/// The files that a path stands for, by name: itself; those of a folder, not of folders in it;
/// those that a pattern with `*` or `?` in its last part matches.
pub(super) fn expand(path: &Path) -> Result<Vec<PathBuf>> {
    let pattern = path.file_name().and_then(|n| n.to_str()).filter(|n| n.contains(['*', '?']));
    let (folder, pattern) = match pattern {
        _ if path.is_dir() => (path, None),
        Some(name) if !path.exists() => (path.parent().unwrap_or(Path::new("")), Some(name)),
        _ => return Ok(vec![path.to_owned()]),
    };
    let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let failed = || Error::io("list", here);
    let mut found = Vec::new();
    for entry in fs::read_dir(here).map_err(failed())? {
        let name = entry.map_err(failed())?.file_name();
        let fits = match (pattern, name.to_str()) {
            (Some(pattern), Some(name)) => matches(pattern.as_bytes(), name.as_bytes()),
            (None, _) => kind(Path::new(&name)).is_some(),
            _ => false,
        };
        let path = folder.join(name);
        // A link to nothing is an error, not a file less.
        if fits && fs::metadata(&path).map_err(Error::io("read", &path))?.is_file() {
            found.push(path);
        }
    }
    found.sort();
    match (found.is_empty(), pattern) {
        (false, _) => Ok(found),
        (true, Some(_)) => Err(Error::file(path, "matches no file")),
        (true, None) => {
            let ends = KINDS.map(|k| format!(".{k}")).join(", ");
            let want = format!("has no data file, wanted {ends}, or these with .gz or .zst behind");
            Err(Error::file(path, want))
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

/// A file, or standard input for `-`, as it was before it was packed.
fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let failed = || Error::io("read", path);
    let mut reader: Box<dyn BufRead> = match path == Path::new("-") {
        true => Box::new(BufReader::new(stdin())),
        false => Box::new(BufReader::new(File::open(path).map_err(Error::io("open", path))?)),
    };
    Ok(match reader.fill_buf().map_err(failed())? {
        [0x1f, 0x8b, ..] => Box::new(BufReader::new(MultiGzDecoder::new(reader))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(BufReader::new(Zstd::Next(reader))),
        _ => reader,
    })
}

/// The frames of a zstd file, one behind the other.
enum Zstd {
    Next(Box<dyn BufRead>),
    Frame(Box<StreamingDecoder<Box<dyn BufRead>, ruzstd::decoding::FrameDecoder>>),
    End,
}

impl Read for Zstd {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            *self = match std::mem::replace(self, Self::End) {
                Self::End => return Ok(0),
                Self::Next(mut reader) => {
                    match reader.fill_buf().map(<[u8]>::is_empty) {
                        Ok(true) => return Ok(0),
                        Ok(false) => {}
                        // It may be asked again.
                        Err(e) => {
                            *self = Self::Next(reader);
                            return Err(e);
                        }
                    }
                    let frame = StreamingDecoder::new_with_max_window_size(reader, ZSTD_WINDOW);
                    Self::Frame(Box::new(frame.map_err(io::Error::other)?))
                }
                Self::Frame(mut frame) => match frame.read(out) {
                    Ok(0) => {
                        let decoder = &frame.decoder;
                        let said = decoder.get_checksum_from_data();
                        if said.is_some() && said != decoder.get_calculated_checksum() {
                            return Err(io::Error::other("its content has another checksum"));
                        }
                        Self::Next(frame.into_inner())
                    }
                    done => {
                        *self = Self::Frame(frame);
                        return done;
                    }
                },
            };
        }
    }
}

/// Gives each row of a file; `name` stands for it in messages.
pub(super) fn rows(
    path: &Path,
    name: &Path,
    options: &ReadOptions,
    take: &mut Take<'_>,
) -> Result<()> {
    let mut lines = Lines { reader: open(path)?, name, line: 0, bytes: Vec::new() };
    match kind(path) {
        Some("csv") => table(lines, b',', options, take),
        Some("tsv") => table(lines, b'\t', options, take),
        _ => {
            while let Some((line, text)) = lines.next()? {
                // A byte order mark is no content.
                let text = text.trim_start_matches('\u{feff}').trim();
                if text.starts_with('[') && line == 1 {
                    return list(lines, take);
                }
                if !text.is_empty() {
                    take(line, text)?;
                }
            }
            Ok(())
        }
    }
}

/// Lines of a file, of bounded length.
struct Lines<'a> {
    reader: Box<dyn BufRead>,
    name: &'a Path,
    /// The number of the last one.
    line: usize,
    bytes: Vec<u8>,
}

impl Lines<'_> {
    fn error(&self, line: usize, message: String) -> Error {
        Error::Data { path: self.name.to_owned(), line, message }
    }

    /// Reads one more line behind what `bytes` has; false at the end.
    fn more(&mut self) -> Result<bool> {
        let left = (MAX_LINE + 1).saturating_sub(self.bytes.len() as u64);
        let n = (&mut self.reader).take(left).read_until(b'\n', &mut self.bytes);
        if n.map_err(Error::io("read", self.name))? == 0 {
            return Ok(false);
        }
        self.line += 1;
        match self.bytes.len() as u64 > MAX_LINE {
            true => Err(self.error(self.line, format!("longer than {MAX_LINE} bytes"))),
            false => Ok(true),
        }
    }

    fn text(&self, line: usize) -> Result<&str> {
        let wrong = |e: std::str::Utf8Error| format!("not UTF-8 at byte {}", e.valid_up_to() + 1);
        std::str::from_utf8(&self.bytes).map_err(|e| self.error(line, wrong(e)))
    }

    fn next(&mut self) -> Result<Option<(usize, &str)>> {
        self.bytes.clear();
        if !self.more()? {
            return Ok(None);
        }
        Ok(Some((self.line, self.text(self.line)?)))
    }
}

/// The objects of a JSON list, of which the first line was read.
fn list(mut lines: Lines<'_>, take: &mut Take<'_>) -> Result<()> {
    let n = (&mut lines.reader).take(MAX_LIST).read_to_end(&mut lines.bytes);
    if n.map_err(Error::io("read", lines.name))? as u64 == MAX_LIST {
        return Err(lines.error(1, format!("a list longer than {MAX_LIST} bytes")));
    }
    let text = lines.text(1)?.trim_start_matches('\u{feff}');
    let wrong = |e: serde_json::Error| lines.error(e.line(), not_json(&e));
    let all: Vec<&RawValue> = serde_json::from_str(text).map_err(wrong)?;
    let (mut line, mut at) = (1, 0);
    for row in all {
        let start = row.get().as_ptr() as usize - text.as_ptr() as usize;
        line += text.as_bytes()[at..start].iter().filter(|b| **b == b'\n').count();
        at = start;
        take(line, row.get())?;
    }
    Ok(())
}

/// Whether a row of a table goes on in the next line: a text in quotes does. Quotes are those of a
/// cell that begins with one; there a quote stands twice.
#[derive(Default)]
struct Quotes {
    inside: bool,
    /// A byte of the cell was read that did not begin it, or ended its quotes.
    behind: bool,
}

impl Quotes {
    /// Reads on, a byte once.
    fn goes_on(&mut self, bytes: &[u8], by: u8) -> bool {
        for b in bytes {
            match b {
                b'"' if self.inside => (self.inside, self.behind) = (false, false),
                _ if self.inside => {}
                b'"' if !self.behind => self.inside = true,
                b => self.behind = *b != by,
            }
        }
        self.inside
    }
}

/// The rows of a table whose first one names its columns.
fn table(mut lines: Lines<'_>, by: u8, options: &ReadOptions, take: &mut Take<'_>) -> Result<()> {
    let mut header: Option<Vec<String>> = None;
    loop {
        lines.bytes.clear();
        let first = lines.line + 1;
        let (mut quotes, mut read) = (Quotes::default(), 0);
        while lines.more()? {
            let opens = lines.line == 1 && lines.bytes.starts_with("\u{feff}".as_bytes());
            read = read.max(if opens { "\u{feff}".len() } else { 0 });
            if !quotes.goes_on(&lines.bytes[read..], by) {
                break;
            }
            read = lines.bytes.len();
        }
        if lines.bytes.is_empty() {
            let none = || Error::file(lines.name, "is empty, wanted a line that names the columns");
            return header.map(drop).ok_or_else(none);
        }
        let text = lines.text(first)?.trim_start_matches('\u{feff}');
        let row = cells(text.trim_end_matches(['\n', '\r']), by);
        let row = row.map_err(|e| lines.error(first, e))?;
        if text.trim().is_empty() {
            continue;
        }
        let Some(header) = &header else {
            if let Some(i) = (1..row.len()).find(|i| row[..*i].contains(&row[*i])) {
                return Err(lines.error(first, format!("has column {:?} twice", row[i])));
            }
            header = Some(row);
            continue;
        };
        if row.len() != header.len() {
            let want = format!("has {} cells, wanted {} as the header", row.len(), header.len());
            return Err(lines.error(first, want));
        }
        let named = header.iter().cloned().zip(row);
        let read = |(name, cell): (String, String)| {
            let value = value(options.ours(&name), cell)?;
            Ok((name, value))
        };
        let object = named.map(read).collect::<Result<Map<_, _>, String>>();
        let object = object.map_err(|e| lines.error(first, e))?;
        take(first, &Value::Object(object).to_string())?;
    }
}

/// The cells of a row.
fn cells(row: &str, by: u8) -> Result<Vec<String>, String> {
    let (mut all, mut rest) = (Vec::new(), row);
    loop {
        let mut cell = String::new();
        if let Some(mut quoted) = rest.strip_prefix('"') {
            loop {
                let end = quoted.find('"').ok_or("has a quote that does not end")?;
                cell += &quoted[..end];
                quoted = &quoted[end + 1..];
                match quoted.strip_prefix('"') {
                    Some(more) => (cell, quoted) = (cell + "\"", more),
                    None => break,
                }
            }
            rest = quoted;
        } else {
            let end = rest.bytes().position(|b| b == by).unwrap_or(rest.len());
            cell += &rest[..end];
            rest = &rest[end..];
        }
        all.push(cell);
        match rest.as_bytes().first() {
            None => return Ok(all),
            Some(b) if *b == by => rest = &rest[1..],
            Some(_) => return Err(format!("has text behind the quotes of cell {}", all.len())),
        }
    }
}

/// A cell of one of our columns: text, but for those that are lists or numbers, and for messages.
fn value(column: &str, cell: String) -> Result<Value, String> {
    let is_list =
        |v: &Value| v.as_array().is_some_and(|all| all.iter().all(|m| m["role"].is_string()));
    Ok(match column {
        "prompt" | "completion" | "chosen" | "rejected" if cell.trim_start().starts_with("[{") => {
            let python = |key: &str| cell.trim_start().starts_with(&format!("[{{'{key}'"));
            match unique::parse(cell.trim()) {
                Ok(list) if is_list(&list) => list,
                _ if python("role") || python("content") => {
                    return Err(format!(
                        "`{column}` has messages as Python prints them, wanted JSON"
                    ));
                }
                _ => Value::String(cell),
            }
        }
        "messages"
        | "conversations"
        | "tools"
        | "chat_template_kwargs"
        | "history"
        | "margin"
        | "label"
        | "labels"
        | "input_ids"
        | "output_ids"
        | "prompt_ids"
        | "chosen_ids"
        | "rejected_ids" => match cell.trim() {
            "" => Value::Null,
            text => unique::parse(text).unwrap_or(Value::String(cell)),
        },
        _ => Value::String(cell),
    })
}
