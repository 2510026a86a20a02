//! The files of a run's data, with weights, and what is held out of them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use super::{data_file::DataFile, settings::Settings};
use crate::{
    data::{self, ColumnsRead, DataInput, DrawGroup, FolderPart, ReadOptions, Split, TokenStore},
    error::{Error, Result},
};

/// Data files that are there.
#[derive(Clone, Debug)]
pub struct SourceFiles {
    pub inputs: Vec<DataInput>,
    pub options: ReadOptions,
    /// The rows of them that are meant, if not all.
    pub split: Option<Split>,
    /// What is read, for messages.
    pub names: String,
    /// What a user should know of it.
    pub notes: Vec<String>,
    files: Vec<DataFile>,
    /// Which of these each input is of.
    of: Vec<usize>,
}

impl SourceFiles {
    /// Looks for all files. `chats`: the model has a chat template; `rewards` read these columns.
    pub fn find(
        files: &[DataFile],
        part: FolderPart,
        chats: bool,
        rewards: ColumnsRead,
        s: &Settings,
    ) -> Result<Self> {
        let names: Vec<&str> = files.iter().map(|file| &file.path[..]).collect();
        let (columns, skip_bad) = (s.columns.clone(), s.skip_bad);
        let options = ReadOptions { columns, chats, skip_bad, part, rewards };
        let mut out = Self {
            inputs: Vec::new(),
            options,
            split: None,
            names: names.join(", "),
            notes: Vec::new(),
            files: files.to_vec(),
            of: Vec::new(),
        };
        for (i, file) in files.iter().enumerate() {
            let found = data::find(Path::new(&file.path), &out.options)?;
            if !found.left_out.is_empty() {
                let name = |path: &PathBuf| path.display().to_string();
                let names: Vec<String> = found.left_out.iter().map(name).collect();
                let why = match part {
                    FolderPart::HeldOut => "no file to test on by its name",
                    _ => "to test on, by its name; it is read if it is named itself",
                };
                out.notes.push(format!("not read: {} ({why})", names.join(", ")));
            }
            out.of.extend(found.inputs.iter().map(|_| i));
            out.inputs.extend(found.inputs);
        }
        let mut once = BTreeSet::new();
        if let Some(twice) = out.inputs.iter().find(|input| !once.insert(&input.path))
            && out.is_weighted()
        {
            let want = "each file once, where one has a weight";
            let got = format!("{} twice", twice.path.display());
            return Err(Error::config("data", want, got));
        }
        Ok(out)
    }

    fn is_weighted(&self) -> bool {
        self.files.iter().any(|file| file.weight != 1.0)
    }

    /// Takes out the rows to hold out, as [`Split`] says.
    pub fn hold_out(&mut self, share: f64, seed: u64) -> Self {
        let split = |held_out| Some(Split { share, seed, held_out });
        self.split = split(false);
        Self {
            split: split(true),
            names: format!("validation_split of {}", self.names),
            notes: Vec::new(),
            files: Vec::new(),
            ..self.clone()
        }
    }

    /// The examples of each file, by their weights; `None` if each is drawn once an epoch. A pair
    /// of texts is of the file that has the better one.
    pub fn groups(&self, data: &TokenStore) -> Option<Vec<DrawGroup>> {
        if !self.is_weighted() {
            return None;
        }
        let mut members = vec![Vec::new(); self.files.len()];
        for i in 0..data.len() {
            if let Some(file) = self.of.get(data.file(i)) {
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
}
