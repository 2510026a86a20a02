//! The examples of a data set in one file of 32-bit words, which is mapped: memory holds none of
//! them. The same words in memory serve where there is no file.
//!
//! | words | |
//! |---|---|
//! | 4 | [`MAGIC`] |
//! | of each row | 8 of its head, ids, starts and ends of what is predicted, columns as JSON |
//! | 2 a row | where the row begins, in words |
//! | 1 a sequence | its row, if examples are not the rows as they lie |
//! | 1 an example | whether people called it good, if they said so |
//! | | [`About`] as JSON |
//! | 10 | the counts and sizes of these parts, 64 bits each |
//! | 8 | SHA-256 of all that stands before it |
//!
//! The head of a row has the numbers of its ids, of its predicted ranges, of its file and of the
//! bytes of its columns, its line (64 bits), and a margin (64 bits, NaN for none).

use std::{
    io::Read,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    BadLines, DataPlace, DatasetStats, Omission, RowColumns, Sequence,
    dataset::{Built, ExampleRow, RowExtras, RowSink, digest_of},
};
use crate::{
    device::file,
    digest::sha256,
    error::{Error, Result},
    storage::{Disk, Storage, StorageFile, append_all, uninterrupted},
};

/// The first bytes. The last one counts the versions of this format.
const MAGIC: [u8; 16] = *b"warpo tokens  \n\x01";
const HEAD: usize = 8;
const COUNTS: usize = 5;
/// Bytes of the last two parts.
const FOOTER: usize = COUNTS * 8 + 32;

/// Reads of rows after which pages are given back: in random order each maps 16 of them.
const OFTEN: usize = 512;

/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;

/// What is known of all rows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct About {
    /// Sequences of an example.
    unit: usize,
    pub stats: DatasetStats,
    longest: usize,
    digest: String,
    /// Reason, count, file and line of each.
    omissions: Vec<(String, usize, usize, usize)>,
    /// Lines of which no example could be made.
    pub bad: BadLines,
    /// A margin of the first pair that has one: its file and line.
    first_margin: Option<(usize, usize)>,
    /// Lines that could not be read.
    pub unread: BadLines,
    /// Records that were read, and those of this side of a split.
    pub records: usize,
    pub side: usize,
    /// There are conversations.
    pub is_chat: bool,
    /// What texts spell that should not be in them, and how many do.
    pub spelled: Option<String>,
}

/// Words that are in memory or in a file.
#[derive(Debug)]
enum StoreWords {
    Memory(Vec<u32>),
    File(Mmap),
}

impl StoreWords {
    fn get(&self) -> &[u32] {
        match self {
            Self::Memory(words) => words,
            // A page is aligned, and a file of whole words was asked for.
            Self::File(map) => bytemuck::try_cast_slice(map).unwrap_or(&[]),
        }
    }

    fn release(&self) {
        if let Self::File(map) = self {
            file::release(map);
        }
    }
}

/// A 64-bit number of two words.
fn long(words: &[u32], at: usize) -> Option<u64> {
    Some(u64::from(*words.get(at)?) | u64::from(*words.get(at + 1)?) << 32)
}

/// A row as its words have it.
#[derive(Default)]
struct RowWords<'a> {
    ids: &'a [u32],
    /// Start and end of each.
    predicted: &'a [u32],
    file: usize,
    line: usize,
    margin: f64,
    /// JSON, and spaces to whole words.
    columns: &'a [u32],
    /// Where the next one begins.
    end: usize,
}

impl<'a> RowWords<'a> {
    fn of(words: &'a [u32], at: usize) -> Option<Self> {
        let head = words.get(at..at.checked_add(HEAD)?)?;
        let predicted = at + HEAD + head[0] as usize;
        let columns = predicted + 2 * head[1] as usize;
        let end = columns + (head[3] as usize).div_ceil(4);
        Some(Self {
            ids: words.get(at + HEAD..predicted)?,
            predicted: words.get(predicted..columns)?,
            columns: words.get(columns..end)?,
            file: head[2] as usize,
            line: long(head, 4)? as usize,
            margin: f64::from_bits(long(head, 6)?),
            end,
        })
    }

    /// Whether it may be a row of these numbers of files and ids.
    fn is_sound(&self, files: usize, vocab: usize) -> bool {
        let mut free = 1;
        let ranges = self.predicted.chunks_exact(2).all(|r| {
            let fits = r[0] >= free && r[0] < r[1] && r[1] as usize <= self.ids.len();
            free = r[1];
            fits
        });
        ranges && self.file < files && self.ids.iter().all(|id| (*id as usize) < vocab)
    }

    fn columns(&self) -> Arc<RowColumns> {
        let text: &[u8] = bytemuck::cast_slice(self.columns);
        Arc::new(serde_json::from_slice(text).unwrap_or_default())
    }

    fn sequence(&self, files: &[Arc<Path>]) -> Sequence {
        let ranges = self.predicted.chunks_exact(2);
        let path = files.get(self.file).cloned().unwrap_or_else(|| Path::new("").into());
        Sequence {
            ids: self.ids.to_vec(),
            predicted: ranges.map(|r| r[0] as usize..r[1] as usize).collect(),
            place: DataPlace { path, line: self.line },
        }
    }
}

/// Rows that are being written: to a file aside, or to memory.
pub(super) struct StoreWriter {
    files: Vec<Arc<Path>>,
    out: Output,
    /// Not written yet.
    buffer: Vec<u8>,
    hash: Sha256,
    /// Where rows begin.
    starts: Vec<u64>,
    /// Words so far.
    at: u64,
    /// The rows of the file, once they are settled.
    settled: Option<Mmap>,
    has_columns: bool,
    /// Why they are in memory.
    failed: Option<Error>,
}

enum Output {
    Memory(Vec<u32>),
    File(Aside, Box<dyn StorageFile>),
}

/// A file that is gone with this, unless it got its name.
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        // Best effort: the folder is cleaned of what is left.
        let _ = Disk.remove(&self.0);
    }
}

impl StoreWriter {
    /// Writes to a file that is not there yet, or to memory.
    pub fn new(files: Vec<Arc<Path>>, aside: Option<&Path>) -> Self {
        let (mut out, mut failed) = (Output::Memory(Vec::new()), None);
        if let Some(path) = aside {
            match uninterrupted(|| Disk.create(path)) {
                Ok(file) => out = Output::File(Aside(path.to_owned()), file),
                Err(e) => failed = Some(Error::io("create", path)(e)),
            }
        }
        let (buffer, hash, starts) = (Vec::with_capacity(BUFFER), Sha256::new(), Vec::new());
        let mut new = Self {
            files,
            out,
            buffer,
            hash,
            starts,
            at: 0,
            settled: None,
            has_columns: false,
            failed,
        };
        new.bytes(&MAGIC);
        new
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.at += bytes.len() as u64 / 4;
    }

    fn word(&mut self, word: usize) -> Result<()> {
        let many = |_| Error::value("a number of a row of data", "below 2^32", word);
        let word = u32::try_from(word).map_err(many)?;
        self.bytes(&word.to_le_bytes());
        Ok(())
    }

    /// Hands on what was written. A disk that takes no more leaves memory.
    fn flush(&mut self) -> Result<()> {
        self.hash.update(&self.buffer);
        if let Output::File(Aside(path), file) = &mut self.out
            && let Err(e) = append_all(&mut **file, &self.buffer)
        {
            let path = path.clone();
            let written = self.at as usize * 4 - self.buffer.len();
            let mut bytes = Vec::new();
            let read =
                Disk.open(&path).and_then(|f| f.take(written as u64).read_to_end(&mut bytes));
            if read.map_err(Error::io("read", &path))? < written {
                return Err(Error::io("write", path)(e));
            }
            self.failed = Some(Error::io("write", path)(e));
            self.out = Output::Memory(bytemuck::pod_collect_to_vec(&bytes));
        }
        if let Output::Memory(words) = &mut self.out {
            words.extend(bytemuck::pod_collect_to_vec::<u8, u32>(&self.buffer));
        }
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is known of the rows, and gives them their name; `digest` is of all of them.
    pub fn finish(
        mut self,
        built: Built,
        mut about: About,
        name: Option<&Path>,
    ) -> Result<(TokenStore, Option<Error>)> {
        let file = |at: &DataPlace| self.files.iter().position(|f| *f == at.path).unwrap_or(0);
        let place = |at: &DataPlace| (file(at), at.line);
        let omission = |o: &Omission| (o.reason.clone(), o.count, file(&o.first), o.first.line);
        about.omissions = built.omissions.iter().map(omission).collect();
        about.first_margin = built.first_margin.as_ref().map(place);
        (about.unit, about.stats, about.longest) = (built.unit, built.stats, built.longest);
        about.bad = built.bad;
        let rows = built.rows.as_deref();
        about.digest = self.digest(about.unit, rows, &built.labels);
        let starts = std::mem::take(&mut self.starts);
        for start in &starts {
            self.bytes(&start.to_le_bytes());
        }
        self.bytes(bytemuck::cast_slice(rows.unwrap_or(&[])));
        for good in &built.labels {
            self.word(usize::from(*good))?;
        }
        let json = |e| Error::value("what is known of data", "JSON", e);
        let mut text = serde_json::to_vec(&about).map_err(json)?;
        text.resize(text.len().next_multiple_of(4), b' ');
        self.bytes(&text);
        // Without an order of their own there are as many as rows.
        let counts = [
            starts.len(),
            rows.map_or(0, <[ExampleRow]>::len),
            built.labels.len(),
            text.len(),
            usize::from(rows.is_some()),
        ];
        for count in counts {
            self.bytes(&(count as u64).to_le_bytes());
        }
        self.flush()?;
        let sum = self.hash.clone().finalize();
        self.bytes(&sum);
        self.flush()?;
        let Self { files, out, mut failed, .. } = self;
        let words = match out {
            Output::Memory(words) => StoreWords::Memory(words),
            Output::File(aside, mut file) => {
                let map = file::map(&aside.0)?;
                let named = name.map_or(Ok(()), |name| {
                    file.sync()?;
                    Disk.rename(&aside.0, name)?;
                    Disk.sync_dir(name.parent().unwrap_or(Path::new(".")))
                });
                // Without its name it serves this process alone.
                failed = named.err().map(Error::io("write", &aside.0));
                StoreWords::File(map)
            }
        };
        let store = TokenStore::of(words, files);
        store.map(|s| (s, failed)).ok_or_else(|| Error::value("rows of data", "a store", "none"))
    }

    fn digest(&self, unit: usize, rows: Option<&[ExampleRow]>, labels: &[bool]) -> String {
        let count = rows.map_or(self.starts.len(), <[ExampleRow]>::len);
        let row = |i: usize| rows.map_or(i, |rows| rows[i] as usize);
        let pairs = if unit == 2 { count / 2 } else { 0 };
        let margin = |i: usize| {
            self.release_often();
            Some(self.words(row(2 * i)).margin).filter(|m| !m.is_nan())
        };
        let sequences = (0..count).map(|i| self.row(row(i)));
        let columns = |i: usize| {
            self.release_often();
            Value::Object((*self.words(row(i)).columns()).clone()).to_string()
        };
        let columns = (0..if self.has_columns { count } else { 0 }).map(columns);
        digest_of(sequences, (0..pairs).map(margin), labels.iter().copied(), columns)
    }

    /// A row that was settled.
    fn words(&self, i: usize) -> RowWords<'_> {
        let all = match (&self.out, &self.settled) {
            (Output::Memory(words), _) => words,
            (_, Some(map)) => bytemuck::try_cast_slice(map).unwrap_or(&[]),
            _ => &[],
        };
        let row = self.starts.get(i).and_then(|at| RowWords::of(all, *at as usize));
        row.unwrap_or_default()
    }

    fn release_often(&self) {
        often(|| self.settled.iter().for_each(file::release));
    }
}

/// Gives pages back from time to time while rows are read, in whatever order.
fn often(release: impl FnOnce()) {
    static READS: AtomicUsize = AtomicUsize::new(0);
    if READS.fetch_add(1, Ordering::Relaxed) % OFTEN == OFTEN - 1 {
        release();
    }
}

impl RowSink for StoreWriter {
    fn push(&mut self, s: &Sequence, more: &RowExtras) -> Result<()> {
        self.starts.push(self.at);
        let file = self.files.iter().rposition(|f| Arc::ptr_eq(f, &s.place.path)).unwrap_or(0);
        let mut columns = match more.columns.is_empty() {
            true => String::new(),
            false => Value::Object((*more.columns).clone()).to_string(),
        };
        for n in [s.ids.len(), s.predicted.len(), file, columns.len()] {
            self.word(n)?;
        }
        self.bytes(&(s.place.line as u64).to_le_bytes());
        self.bytes(&more.margin.unwrap_or(f64::NAN).to_le_bytes());
        self.bytes(bytemuck::cast_slice(&s.ids));
        for r in &s.predicted {
            self.word(r.start)?;
            self.word(r.end)?;
        }
        self.has_columns |= !columns.is_empty();
        while !columns.len().is_multiple_of(4) {
            columns.push(' ');
        }
        self.bytes(columns.as_bytes());
        if self.buffer.len() >= BUFFER { self.flush() } else { Ok(()) }
    }

    fn settle(&mut self) -> Result<()> {
        self.flush()?;
        if let Output::File(aside, _) = &self.out {
            self.settled = Some(file::map(&aside.0)?);
        }
        Ok(())
    }

    fn row(&self, i: usize) -> Sequence {
        let row = self.words(i).sequence(&self.files);
        self.release_often();
        row
    }
}

/// The examples of a data set: a text or a prompt is one sequence, a pair is two, side by side, the
/// chosen one first.
#[derive(Clone, Debug)]
pub struct TokenStore {
    words: Arc<StoreWords>,
    files: Arc<[Arc<Path>]>,
    /// Where the rows begin, those of examples, and labels, in words.
    starts: usize,
    rows: Option<Range<usize>>,
    labels: Range<usize>,
    /// Sequences.
    count: usize,
    pub about: Arc<About>,
}

impl TokenStore {
    /// What a file has, if every bit of it is as it was written and the rows may be of these files
    /// and ids.
    pub(super) fn open(path: &Path, files: Vec<Arc<Path>>, vocab: usize) -> Option<Self> {
        // Read, not mapped: pages of a map would be memory of this process.
        let len = Disk.open(path).ok()?.seek(std::io::SeekFrom::End(0)).ok()?;
        let mut from = Disk.open(path).ok()?;
        let said = len.checked_sub(32).filter(|_| len.is_multiple_of(4))?;
        let (sum, _) = sha256((&mut from).take(said)).ok()?;
        let mut last = [0; 32];
        from.read_exact(&mut last).ok()?;
        if sum != last {
            return None;
        }
        let store = Self::of(StoreWords::File(file::map(path).ok()?), files)?;
        store.is_sound(vocab).then_some(store)
    }

    fn of(words: StoreWords, files: Vec<Arc<Path>>) -> Option<Self> {
        let all = words.get();
        let end = all.len().checked_sub(FOOTER / 4)?;
        if bytemuck::cast_slice::<u32, u8>(all).get(..16)? != MAGIC {
            return None;
        }
        let count = |i: usize| usize::try_from(long(all, end + 2 * i)?).ok();
        let (rows, order, labels, text) = (count(0)?, count(1)?, count(2)?, count(3)?);
        let about = end.checked_sub(text / 4)?;
        let labels = about.checked_sub(labels)?..about;
        let order = labels.start.checked_sub(order)?..labels.start;
        let starts = order.start.checked_sub(rows.checked_mul(2)?)?;
        let text: &[u8] = bytemuck::cast_slice(all.get(about..end)?);
        let about: About = serde_json::from_slice(text).ok()?;
        let has_order = count(4)? == 1;
        let count = if has_order { order.len() } else { rows };
        let is_whole = matches!(about.unit, 1 | 2) && count % about.unit == 0;
        let labelled = labels.is_empty() || labels.len() == count;
        (is_whole && labelled && starts >= 4).then(|| Self {
            rows: has_order.then_some(order),
            files: files.into(),
            about: Arc::new(about),
            words: Arc::new(words),
            starts,
            labels,
            count,
        })
    }

    /// Whether all rows may be what this writes.
    fn is_sound(&self, vocab: usize) -> bool {
        let (words, mut at) = (self.words.get(), MAGIC.len() / 4);
        let ends = self.rows.as_ref().map_or(self.labels.start, |rows| rows.start);
        let count = (ends - self.starts) / 2;
        for i in 0..count {
            often(|| self.words.release());
            let row = RowWords::of(words, at).filter(|row| row.is_sound(self.files.len(), vocab));
            match row {
                Some(row) if long(words, self.starts + 2 * i) == Some(at as u64) => at = row.end,
                _ => return false,
            }
        }
        let rows = self.rows.clone().unwrap_or(0..0);
        let listed = words[rows].iter().all(|row| (*row as usize) < count);
        let places = self.about.omissions.iter().map(|o| o.2);
        let places = places.chain(self.about.first_margin.map(|at| at.0));
        self.words.release();
        let mut files = places;
        at == self.starts && listed && files.all(|file| file < self.files.len())
    }

    /// Sequences of an example.
    pub fn unit(&self) -> usize {
        self.about.unit
    }

    /// Examples.
    pub fn len(&self) -> usize {
        self.count / self.unit()
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn row(&self, i: usize) -> Option<RowWords<'_>> {
        let words = self.words.get();
        let row = match &self.rows {
            Some(rows) => *words.get(rows.start + i)? as usize,
            None => i,
        };
        RowWords::of(words, usize::try_from(long(words, self.starts + 2 * row)?).ok()?)
    }

    /// All sequences. What was read is given back to the system on the way.
    pub fn sequences(&self) -> impl Iterator<Item = Sequence> + '_ {
        (0..self.count).filter_map(|i| {
            often(|| self.words.release());
            self.row(i).map(|row| row.sequence(&self.files))
        })
    }

    /// The sequences of an example.
    pub fn example(&self, i: usize) -> impl Iterator<Item = Sequence> + '_ {
        let all = i * self.unit()..(i + 1) * self.unit();
        all.filter_map(|i| self.row(i).map(|row| row.sequence(&self.files)))
    }

    /// Where an example stands.
    pub fn place_of(&self, i: usize) -> DataPlace {
        let row = self.row(i * self.unit());
        self.place(row.map_or((0, 0), |row| (row.file, row.line)))
    }

    /// The file that an example is of, by its number.
    pub fn file(&self, i: usize) -> usize {
        often(|| self.words.release());
        self.row(i * self.unit()).map_or(0, |row| row.file)
    }

    /// How much better the chosen text of a pair is, where people said so.
    pub fn margin(&self, i: usize) -> Option<f64> {
        let is_pair = self.unit() == 2;
        let row = if is_pair { self.row(2 * i) } else { None };
        row.map(|row| row.margin).filter(|m| !m.is_nan())
    }

    /// What rewards read of the row of a prompt.
    pub fn columns(&self, i: usize) -> Arc<RowColumns> {
        often(|| self.words.release());
        self.row(i).map(|row| row.columns()).unwrap_or_default()
    }

    /// Whether people called an example good, where they judged all.
    pub fn label(&self, i: usize) -> Option<bool> {
        let labels = &self.words.get()[self.labels.clone()];
        labels.get(i).map(|good| *good != 0)
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.about.longest
    }

    /// SHA-256 of all that is learned: tokens, which of them are predicted, margins, labels.
    pub fn digest(&self) -> String {
        self.about.digest.clone()
    }

    /// What was cut or dropped, a reason each.
    pub fn omissions(&self) -> impl Iterator<Item = Omission> + '_ {
        self.about.omissions.iter().map(|(reason, count, file, line)| Omission {
            reason: reason.clone(),
            count: *count,
            first: self.place((*file, *line)),
        })
    }

    /// Where the first margin stands.
    pub fn first_margin(&self) -> Option<DataPlace> {
        self.about.first_margin.map(|at| self.place(at))
    }

    fn place(&self, (file, line): (usize, usize)) -> DataPlace {
        let path = self.files.get(file).cloned().unwrap_or_else(|| Path::new("").into());
        DataPlace { path, line }
    }

    /// Gives what was read of a file back to the system.
    pub fn release(&self) {
        self.words.release();
    }
}
