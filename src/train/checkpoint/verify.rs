//! Reading a checkpoint back, and refusing one that is not what was written.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::format::{Dtype, FileEntry, SavedNumber, TensorEntry, elements, is_stem, unseal};
use crate::{
    digest::hex,
    error::{Error, Result},
    storage::{Storage, open_at, read_small},
};

/// The largest manifest that is read.
const LIMIT: u64 = 256 << 20;

/// The largest state that is read: parsed, JSON takes many times its text.
const STATE_LIMIT: u64 = 16 << 20;

/// A checkpoint whose every byte was verified.
#[derive(Debug)]
pub struct LoadedCheckpoint {
    /// The optimizer step after which it was saved.
    pub step: u64,
    pub path: PathBuf,
    /// What [`save`](super::save) was given.
    pub state: Value,
    /// Newer checkpoints that were refused, each with its reason.
    pub skipped: Vec<Error>,
    tensors: Vec<TensorEntry>,
}

/// What is known of a tensor before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Stem of its file.
    pub file: &'a str,
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
}

impl LoadedCheckpoint {
    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|t| TensorInfo {
            file: &t.file,
            name: &t.name,
            dtype: t.dtype,
            shape: &t.shape,
        })
    }

    /// Fills `out` with a tensor, straight from the file, and verifies it once more.
    pub fn read<T: SavedNumber>(
        &self,
        storage: &dyn Storage,
        file: &str,
        name: &str,
        out: &mut [T],
    ) -> Result<()> {
        let path = self.path.join(format!("{file}.safetensors"));
        let entry = self.tensors.iter().find(|t| t.file == file && t.name == name);
        let entry = entry.ok_or_else(|| Error::file(&path, format!("has no tensor `{name}`")))?;
        if entry.dtype != T::DTYPE || elements(&entry.shape) != Some(out.len()) {
            let (dtype, shape) = (entry.dtype, &entry.shape);
            let (want, len) = (T::DTYPE, out.len());
            let message =
                format!("tensor `{name}` is {dtype:?} {shape:?}, wanted {want:?} [{len}]");
            return Err(Error::file(path, message));
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
        let mut source = open_at(storage, &path, entry.offset)?;
        source.read_exact(bytes).map_err(Error::io("read", &path))?;
        let got = hex(Sha256::digest(&*bytes));
        if got != entry.sha256 { Err(corrupt(path, entry, &got)) } else { Ok(()) }
    }
}

fn corrupt(path: PathBuf, t: &TensorEntry, got: &str) -> Error {
    let message = format!("tensor `{}` is corrupt: SHA-256 {got}, wanted {}", t.name, t.sha256);
    Error::file(path, message)
}

/// Verifies the checkpoint in the folder `path`: every byte is read once, in pieces.
pub fn load(storage: &dyn Storage, path: &Path) -> Result<LoadedCheckpoint> {
    let manifest_path = path.join("manifest.json");
    let text = read_small(storage, &manifest_path, LIMIT)?;
    let manifest = unseal(&text).map_err(|m| Error::file(&manifest_path, m))?;
    let wrong = |m: String| Error::file(&manifest_path, m);
    let mut buffer = vec![0; 1 << 18];
    for file in &manifest.files {
        let stem = file.name.strip_suffix(".safetensors").or(file.name.strip_suffix(".json"));
        if !stem.is_some_and(is_stem) {
            return Err(wrong(format!("names a file `{}`", file.name)));
        }
        let tensors: Vec<&TensorEntry> = manifest
            .tensors
            .iter()
            .filter(|t| file.name.strip_suffix(".safetensors") == Some(&t.file))
            .collect();
        for t in &tensors {
            let end = bytes(t).and_then(|n| n.checked_add(t.offset));
            if end.is_none_or(|end| end > file.bytes) {
                return Err(wrong(format!("puts tensor `{}` outside its file", t.name)));
            }
        }
        whole(storage, &path.join(&file.name), file, &tensors, &mut buffer)?;
    }
    let listed = |name: String| manifest.files.iter().any(|f| f.name == name);
    if !listed("state.json".into()) {
        return Err(wrong("lists no state.json".into()));
    }
    if let Some(t) = manifest.tensors.iter().find(|t| !listed(format!("{}.safetensors", t.file))) {
        return Err(wrong(format!("puts tensor `{}` into an unlisted file", t.name)));
    }
    let state_path = path.join("state.json");
    let state = read_small(storage, &state_path, STATE_LIMIT)?;
    let state = serde_json::from_slice(&state)
        .map_err(|e| Error::file(&state_path, format!("is not JSON: {e}")))?;
    let step = manifest.step;
    Ok(LoadedCheckpoint {
        step,
        path: path.into(),
        state,
        skipped: Vec::new(),
        tensors: manifest.tensors,
    })
}

fn bytes(t: &TensorEntry) -> Option<u64> {
    elements(&t.shape)?.checked_mul(t.dtype.bytes())?.try_into().ok()
}

/// Compares a file with its hash; if they differ, looks for the tensor that is to blame.
fn whole(
    storage: &dyn Storage,
    path: &Path,
    file: &FileEntry,
    tensors: &[&TensorEntry],
    buffer: &mut [u8],
) -> Result<()> {
    // One byte more tells that a file goes on; how long is not asked.
    let (got, len) = digest(storage, path, 0, file.bytes.saturating_add(1), buffer)?;
    if len > file.bytes {
        let message = format!("is torn: more than the {} bytes that were written", file.bytes);
        return Err(Error::file(path, message));
    }
    if len == file.bytes && got == file.sha256 {
        return Ok(());
    }
    for t in tensors {
        let want = bytes(t).unwrap_or(u64::MAX);
        let (got, len) = digest(storage, path, t.offset, want, buffer)?;
        if len < want {
            let message = format!("is torn: tensor `{}` has {len} bytes, wanted {want}", t.name);
            return Err(Error::file(path, message));
        }
        if got != t.sha256 {
            return Err(corrupt(path.into(), t, &got));
        }
    }
    if len != file.bytes {
        return Err(Error::file(path, format!("is torn: {len} bytes, wanted {}", file.bytes)));
    }
    let part = if tensors.is_empty() { "" } else { " in its header" };
    let message = format!("is corrupt{part}: SHA-256 {got}, wanted {}", file.sha256);
    Err(Error::file(path, message))
}

/// SHA-256 of up to `limit` bytes from `offset`, and how many there were.
pub fn digest(
    storage: &dyn Storage,
    path: &Path,
    offset: u64,
    limit: u64,
    buffer: &mut [u8],
) -> Result<(String, u64)> {
    let mut source = open_at(storage, path, offset)?.take(limit);
    let (mut hash, mut len) = (Sha256::new(), 0);
    loop {
        match source.read(buffer) {
            Ok(0) => return Ok((hex(hash.finalize()), len)),
            Ok(n) => {
                hash.update(&buffer[..n]);
                len += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", path)(e)),
        }
    }
}
