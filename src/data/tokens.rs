//! Data files to a store of tokens: found in the cache, or made on all threads in memory that does
//! not grow with the data.

use std::{
    collections::BinaryHeap,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};

use super::{
    BadLines, DataInput, DataPlace, ExampleKind, Limits, Located, ReadOptions, Tokenizer, cache,
    chat::chat_texts,
    dataset::{Builder, Made, Maker},
    files::FileState,
    reading::Reading,
    store::{About, StoreWriter, TokenStore},
};
use crate::{
    digest::hex,
    error::{Error, Result},
};

/// Marks of chat templates, for tokenizers that do not have them as special tokens.
const MARKS: [&str; 6] = [
    "<|im_start|>",
    "[INST]",
    "<start_of_turn>",
    "<|start_header_id|>",
    "<|user|>",
    "<|assistant|>",
];

/// Rows that are held out, or those that are left: with a `share` below 1 each row with this
/// probability, with a larger one so many rows. A row's side is a function of its content and the
/// seed alone, so that equal rows are on one side, and other rows, or their order, move none; but
/// as many as are asked for, and at least one, are those of the smallest draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Split {
    pub share: f64,
    pub seed: u64,
    /// The rows that are held out are meant.
    pub held_out: bool,
}

/// What tokens are made of.
#[derive(Clone, Debug)]
pub struct TokenJob<'a> {
    pub inputs: &'a [DataInput],
    pub options: &'a ReadOptions,
    pub tokenizer: Option<&'a Tokenizer>,
    pub limits: Limits,
    pub kind: ExampleKind,
    pub split: Option<Split>,
}

/// Tokens, and what a user should know of where they are.
#[derive(Debug)]
pub struct Tokens {
    pub store: TokenStore,
    pub warning: Option<String>,
    /// They were made before.
    pub cached: bool,
}

/// Where tokens are kept.
struct NewEntry {
    name: PathBuf,
    /// Where they are written first.
    aside: PathBuf,
    /// The files as they were before their content was hashed.
    before: Vec<Option<FileState>>,
}

/// What a thread makes of a record.
struct MadeRow {
    place: DataPlace,
    is_chat: bool,
    /// What its texts spell that should not be in them.
    spelled: Option<String>,
    /// Nothing, if it is on the other side of the split.
    made: Option<Result<Made>>,
}

impl TokenJob<'_> {
    /// Finds the tokens in a cache, or makes them; `seen` hears how many bytes of how many were
    /// read.
    pub fn run(&self, cache: Option<&Path>, seen: &mut dyn FnMut(u64, u64)) -> Result<Tokens> {
        let Some(folder) = cache else {
            let (store, _) = self.build(None, seen)?;
            return Ok(Tokens { store, warning: None, cached: false });
        };
        let before = self.states();
        let entry = cache::entry(folder, &self.key()?);
        let files = || self.inputs.iter().map(|input| input.path.clone()).collect();
        if let Ok([name, _]) = &entry
            && let Some(store) = TokenStore::open(name, files(), self.limits.vocab)
        {
            cache::touch(name);
            return Ok(Tokens { store, warning: None, cached: true });
        }
        let (kept, failed) = match entry {
            Ok([name, aside]) => (Some(NewEntry { name, aside, before }), None),
            Err(e) => (None, Some(e)),
        };
        let (store, lost) = self.build(kept.as_ref(), seen)?;
        if let Some(NewEntry { name, .. }) = kept {
            cache::prune(&name);
        }
        let warning = failed.or(lost).map(|e| {
            format!("tokens are not kept for the next start: {e}; WARPO_CACHE names another folder")
        });
        Ok(Tokens { store, warning, cached: false })
    }

    /// Times and sizes of the files.
    fn states(&self) -> Vec<Option<FileState>> {
        self.inputs.iter().map(DataInput::state).collect()
    }

    /// The name of these tokens: SHA-256 of all that they are made of, and of who makes them.
    fn key(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        // Another build may make others.
        let program = std::env::current_exe().and_then(|path| path.metadata()).ok();
        let program = program.map(|about| (about.len(), about.modified().ok()));
        let Self { options, limits, kind, split, .. } = self;
        let version = env!("CARGO_PKG_VERSION");
        part(format!("{version} {program:?} {options:?} {limits:?} {kind:?} {split:?}").as_bytes());
        part(self.tokenizer.map(Tokenizer::identity).unwrap_or_default().as_bytes());
        for input in self.inputs {
            part(input.path.as_os_str().as_bytes());
            part(&input.digest()?);
        }
        Ok(hex(hash.finalize()))
    }

    /// Makes the tokens: in a file that gets its name if the data is as it was, or in memory.
    fn build(
        &self,
        entry: Option<&NewEntry>,
        seen: &mut dyn FnMut(u64, u64),
    ) -> Result<(TokenStore, Option<Error>)> {
        let files: Vec<Arc<Path>> = self.inputs.iter().map(|input| input.path.clone()).collect();
        let total: u64 = self.inputs.iter().map(|input| input.len).sum();
        let bounds = self.split.map(|split| self.bounds(split)).transpose()?;
        let Self { tokenizer, limits, kind, options, .. } = *self;
        let maker = Maker { tokenizer, limits, kind };
        let aside = entry.map(|entry| &*entry.aside);
        let mut builder = Builder::new(limits, kind, StoreWriter::new(files, aside));
        let (mut about, mut spelled) = (About::default(), None);
        let (mut count, mut unread) = (0, BadLines::up_to(limits.skip_bad));
        let mut seen = |done| seen(done, total);
        let mut reading = Reading { options, bad: &mut unread, seen: &mut seen };
        let work = |at: Located| MadeRow {
            is_chat: at.record.is_chat(),
            spelled: tokenizer.and_then(|t| spelled_in(t, &at)),
            made: bounds.is_none_or(|b| b.takes(at.record.draw(b.seed))).then(|| maker.make(&at)),
            place: at.place,
        };
        reading.each(self.inputs, work, |bad, row| {
            about.records += 1;
            let Some(made) = row.made else { return Ok(()) };
            about.side += 1;
            about.is_chat |= row.is_chat;
            if let Some(token) = row.spelled {
                count += 1;
                spelled.get_or_insert((token, row.place, row.is_chat));
            }
            // Lines that cannot be read and lines that cannot be learned share a number.
            builder.built.bad.left = bad.left;
            builder.add(made)?;
            bad.left = builder.built.bad.left;
            Ok(())
        })?;
        if let Some(split) = self.split.filter(|split| !split.held_out && about.side == 0) {
            let all = about.records;
            let want = format!("less than all of the {all} rows, of which equal ones go together");
            return Err(Error::config("validation_split", want, split.share));
        }
        about.spelled = spelled.map(|(token, place, is_chat)| {
            let instead = if is_chat { "" } else { "; give conversations as `messages`" };
            format!(
                "{count} texts spell special tokens or marks of chat templates ({place}: {token}), \
                 which are read as characters{instead}"
            )
        });
        if self.split.is_none_or(|split| !split.held_out) {
            about.unread = unread;
        }
        let (rows, built) = builder.finish()?;
        if let Some(NewEntry { before, .. }) = entry {
            let changed = self.states().iter().zip(before).position(|(now, then)| now != then);
            if let Some(i) = changed {
                return Err(Error::file(&*self.inputs[i].path, "changed while it was read"));
            }
        }
        rows.finish(built, about, entry.map(|entry| &*entry.name))
    }

    /// Reads all rows to know the smallest draws.
    fn bounds(&self, split: Split) -> Result<SplitBounds> {
        let at_least = if split.share < 1.0 { 1 } else { split.share as usize };
        let mut smallest = BinaryHeap::new();
        let mut unread = BadLines::up_to(self.limits.skip_bad);
        let mut reading = Reading { options: self.options, bad: &mut unread, seen: &mut |_| {} };
        reading.each(
            self.inputs,
            |at| at.record.draw(split.seed),
            |_, draw| {
                smallest.push(draw);
                if smallest.len() > at_least {
                    smallest.pop();
                }
                Ok(())
            },
        )?;
        let whole = smallest.len() == at_least;
        let last = smallest.peek().copied().filter(|_| whole).unwrap_or(u64::MAX);
        // 2^64 times the share.
        let below =
            if split.share < 1.0 { (split.share * 18_446_744_073_709_551_616.0) as u64 } else { 0 };
        Ok(SplitBounds { last, below, seed: split.seed, held_out: split.held_out })
    }
}

/// Draws up to `last` and below `below` are held out.
#[derive(Clone, Copy)]
struct SplitBounds {
    last: u64,
    below: u64,
    seed: u64,
    held_out: bool,
}

impl SplitBounds {
    /// Whether a row of this draw is on the side that is meant.
    fn takes(&self, draw: u64) -> bool {
        (draw <= self.last || draw < self.below) == self.held_out
    }
}

/// A special token or a mark that a text spells, as texts to which a template was applied do.
fn spelled_in(tokenizer: &Tokenizer, at: &Located) -> Option<String> {
    let in_text = |text: &str, is_chat: bool| {
        let mark = || MARKS.iter().find(|mark| !is_chat && text.contains(**mark)).copied();
        tokenizer.special_in(text, is_chat).or_else(mark).map(str::to_owned)
    };
    match at.record.is_chat() {
        false => at.record.texts().find_map(|text| in_text(text, false)),
        true => at
            .record
            .texts()
            .find_map(|json| chat_texts(json).iter().find_map(|text| in_text(text, true))),
    }
}
