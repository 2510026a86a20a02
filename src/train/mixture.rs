//! The rows of a run's data: several files with weights, and what is held out of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{data_file::DataFile, settings::Settings};
use crate::{
    data::{self, ColumnsRead, Dataset, DrawGroup, FolderPart, Located, ReadOptions, Record},
    error::{Error, Result},
};

/// The rows of data files.
#[derive(Debug)]
pub struct SourceRows {
    pub rows: Vec<Located>,
    /// What was read, for messages.
    pub names: String,
    /// What a user should know of it.
    pub notes: Vec<String>,
    /// Lines that may still be left out, and those that are.
    pub skip_bad: usize,
    pub skipped: usize,
    files: Vec<DataFile>,
    /// Which of the files a path belongs to, where one has a weight.
    of: BTreeMap<Arc<Path>, usize>,
}

impl SourceRows {
    /// Reads all files. `chats`: the model has a chat template; `rewards` read these columns.
    pub fn read(
        files: &[DataFile],
        part: FolderPart,
        chats: bool,
        rewards: &ColumnsRead,
        s: &Settings,
    ) -> Result<Self> {
        let names: Vec<&str> = files.iter().map(|file| &file.path[..]).collect();
        let mut out = Self {
            rows: Vec::new(),
            names: names.join(", "),
            notes: Vec::new(),
            skip_bad: s.skip_bad,
            skipped: 0,
            files: files.to_vec(),
            of: BTreeMap::new(),
        };
        for (i, file) in files.iter().enumerate() {
            let (columns, skip_bad) = (s.columns.clone(), out.skip_bad);
            let options = ReadOptions { columns, chats, skip_bad, part, rewards: rewards.clone() };
            let read = data::read_as(Path::new(&file.path), &options)?;
            out.skip_bad = read.bad.left;
            out.skipped += read.bad.count;
            out.notes.extend(read.bad.note("read"));
            if !read.left_out.is_empty() {
                let name = |path: &PathBuf| path.display().to_string();
                let names: Vec<String> = read.left_out.iter().map(name).collect();
                let why = match part {
                    FolderPart::HeldOut => "no file to test on by its name",
                    _ => "to test on, by its name; it is read if it is named itself",
                };
                out.notes.push(format!("not read: {} ({why})", names.join(", ")));
            }
            out.place(i, &read.rows)?;
            out.rows.extend(read.rows);
        }
        Ok(out)
    }

    fn is_weighted(&self) -> bool {
        self.files.iter().any(|file| file.weight != 1.0)
    }

    /// Remembers whose rows these are.
    fn place(&mut self, file: usize, rows: &[Located]) -> Result<()> {
        if !self.is_weighted() {
            return Ok(());
        }
        let paths: BTreeSet<&Arc<Path>> = rows.iter().map(|row| &row.place.path).collect();
        for path in paths {
            if self.of.insert(path.clone(), file).is_some() {
                let want = "each file once, where one has a weight";
                return Err(Error::config("data", want, format!("{} twice", path.display())));
            }
        }
        Ok(())
    }

    /// Takes out the rows to hold out: with a `share` below 1 each row with this probability, with
    /// a larger one so many rows. A row's side is a function of its content and the seed alone, so
    /// that equal rows are on one side, and other rows, or their order, move none; but as many as
    /// are asked for, and at least one, are those of the smallest draws.
    pub fn hold_out(&mut self, share: f64, seed: u64) -> Result<Self> {
        let draws: Vec<u64> = self.rows.iter().map(|row| row.record.draw(seed)).collect();
        let mut sorted = draws.clone();
        sorted.sort_unstable();
        let at_least = if share < 1.0 { 1 } else { share as usize };
        let last = sorted.get(at_least.saturating_sub(1)).copied().unwrap_or(u64::MAX);
        // 2^64 times the share.
        let bound = if share < 1.0 { (share * 18_446_744_073_709_551_616.0) as u64 } else { 0 };
        let is_out = |draw: u64| draw <= last || draw < bound;
        let mut draws_of = draws.iter();
        let all = self.rows.len();
        let rows: Vec<Located> = self
            .rows
            .extract_if(.., |_| draws_of.next().is_some_and(|draw| is_out(*draw)))
            .collect();
        if self.rows.is_empty() {
            let want = format!("less than all of the {all} rows, of which equal ones go together");
            return Err(Error::config("validation_split", want, share));
        }
        let (n, left) = (rows.len(), self.rows.len());
        let note = format!("validation_split holds out {n} of {all} rows, {left} are trained on");
        self.notes.push(note);
        let names = format!("validation_split of {}", self.names);
        Ok(Self {
            rows,
            names,
            notes: Vec::new(),
            skip_bad: self.skip_bad,
            skipped: 0,
            files: Vec::new(),
            of: BTreeMap::new(),
        })
    }

    /// The examples of each file, by their weights; `None` if each is drawn once an epoch. A pair
    /// of texts is of the file that has the better one.
    pub fn groups(&self, data: &Dataset) -> Option<Vec<DrawGroup>> {
        if !self.is_weighted() {
            return None;
        }
        let mut members = vec![Vec::new(); self.files.len()];
        for i in 0..data.len() {
            if let Some(file) = self.of.get(&data.example(i)[0].place.path) {
                members[*file].push(i);
            }
        }
        let weighted =
            |(examples, file): (Vec<usize>, &DataFile)| DrawGroup::weighted(examples, file.weight);
        Some(members.into_iter().zip(&self.files).map(weighted).collect())
    }

    /// Says what an epoch draws of each file.
    pub fn weights(&self, groups: &[DrawGroup]) -> String {
        let one = |(file, group): (&DataFile, &DrawGroup)| {
            format!("{} of {} from {}", group.draws, group.examples.len(), file.path)
        };
        let all: Vec<String> = self.files.iter().zip(groups).map(one).collect();
        format!("an epoch draws {}", all.join(", "))
    }

    /// Whether there are conversations.
    pub fn has_chats(&self) -> bool {
        self.rows.iter().map(|row| &row.record).any(Record::is_chat)
    }
}
