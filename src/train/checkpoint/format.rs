//! The bytes of a checkpoint.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::run;
use crate::{
    digest::hex,
    error::{Error, Result},
    shape,
    storage::{Storage, StorageFile, append_all},
};

#[cfg(target_endian = "big")]
compile_error!("checkpoints hold little-endian numbers, and are written and read in place");

/// SavedNumber type of a tensor, in safetensors spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Dtype {
    /// `f32`
    F32,
    /// `f64`
    F64,
    /// `u32`
    U32,
    /// `u64`
    U64,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F64 | Self::U64 => 8,
        }
    }
}

/// A number that checkpoints can hold.
pub trait SavedNumber: bytemuck::Pod {
    const DTYPE: Dtype;
}
impl SavedNumber for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl SavedNumber for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
impl SavedNumber for u32 {
    const DTYPE: Dtype = Dtype::U32;
}
impl SavedNumber for u64 {
    const DTYPE: Dtype = Dtype::U64;
}

/// A tensor to save, in the caller's memory or brought there when it is written.
pub struct SavedTensor<'a> {
    /// Stem of the file it goes to: `model` is `model.safetensors`.
    pub file: &'a str,
    /// Its name in that file.
    pub name: Cow<'a, str>,
    /// Its shape; empty for a single number.
    pub shape: Vec<usize>,
    pub(super) dtype: Dtype,
    pub(super) len: usize,
    /// Hands its bytes to a visitor.
    visit: Box<Visit<'a>>,
}

type Visit<'a> = dyn Fn(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> + 'a;

impl std::fmt::Debug for SavedTensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SavedTensor({} of {}, {:?} {:?})", self.name, self.file, self.dtype, self.shape)
    }
}

impl<'a> SavedTensor<'a> {
    /// A tensor of `shape` in row-major order.
    pub fn new<T: SavedNumber>(
        file: &'a str,
        name: impl Into<Cow<'a, str>>,
        shape: &[usize],
        data: &'a [T],
    ) -> Self {
        Self::read(file, name, shape, data.len(), move || Ok(data.into()))
    }

    /// A tensor of `shape`, `len` numbers that are read when it is written, so that of many that
    /// are on a device one at a time is in host memory.
    pub fn read<T: SavedNumber>(
        file: &'a str,
        name: impl Into<Cow<'a, str>>,
        shape: &[usize],
        len: usize,
        read: impl Fn() -> Result<Cow<'a, [T]>> + 'a,
    ) -> Self {
        let len = len * size_of::<T>();
        let visit = Box::new(move |seen: &mut dyn FnMut(&[u8]) -> Result<()>| {
            seen(bytemuck::cast_slice(&read()?))
        });
        Self { file, name: name.into(), shape: shape.into(), dtype: T::DTYPE, len, visit }
    }

    pub(super) fn with_bytes(&self, mut seen: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        (self.visit)(&mut |bytes| {
            shape::check("checkpoint::save", "bytes of a tensor", &[self.len], bytes.len())?;
            seen(bytes)
        })
    }

    pub(super) fn check(&self) -> Result<()> {
        let len = self.len / self.dtype.bytes();
        if elements(&self.shape) != Some(len) {
            return Err(Error::Shape {
                op: "checkpoint::save",
                arg: "tensor",
                want: self.shape.clone(),
                got: vec![len],
            });
        }
        if !is_stem(self.file) {
            let want = "letters, digits, `_` and `-`";
            return Err(Error::value("name of a checkpoint file", want, self.file));
        }
        // safetensors' own key
        if self.name == "__metadata__" {
            return Err(Error::value("name of a tensor", "another name", &self.name));
        }
        Ok(())
    }
}

/// Product of the sizes.
pub(super) fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))
}

/// A file stem that stays in its folder on any system.
pub(super) fn is_stem(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    !name.is_empty() && name.chars().all(plain)
}

/// What `manifest.json` says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileManifest {
    /// Version of this format.
    pub format: u32,
    pub step: u64,
    pub files: Vec<FileEntry>,
    pub tensors: Vec<TensorEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    pub name: String,
    pub bytes: u64,
    pub sha256: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TensorEntry {
    /// Stem of its file.
    pub file: String,
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset: u64,
    pub sha256: String,
}

/// The version that this code writes and reads.
pub(super) const FORMAT: u32 = 1;

const OPEN: &str = "{\"sha256\":\"";
const MIDDLE: &str = "\",\"manifest\":";
const CLOSE: &str = "}\n";

/// Frames the manifest with its own hash. Every byte of the frame is fixed or hashed.
fn seal(manifest: &FileManifest) -> Result<String, serde_json::Error> {
    let body = serde_json::to_string(manifest)?;
    Ok(format!("{OPEN}{}{MIDDLE}{body}{CLOSE}", hex(Sha256::digest(&body))))
}

/// The inverse of [`seal`]; the error says what is wrong with the text.
pub(super) fn unseal(bytes: &[u8]) -> Result<FileManifest, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| format!("is not UTF-8: {e}"))?;
    let frame = || {
        let rest = text.strip_prefix(OPEN)?.strip_suffix(CLOSE)?;
        let (hash, rest) = rest.split_at_checked(64)?;
        Some((hash, rest.strip_prefix(MIDDLE)?))
    };
    let (hash, body) = frame().ok_or("is torn: its frame is not that of a manifest")?;
    let got = hex(Sha256::digest(body));
    if got != hash {
        return Err(format!("is corrupt: its SHA-256 is {got}, wanted {hash}"));
    }
    let manifest: FileManifest = serde_json::from_str(body).map_err(|e| e.to_string())?;
    if manifest.format != FORMAT {
        return Err(format!("has format {}, wanted {FORMAT}", manifest.format));
    }
    Ok(manifest)
}

/// A file being written and hashed.
struct Writer {
    file: Box<dyn StorageFile>,
    hash: Sha256,
    bytes: u64,
}

impl Writer {
    fn append(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        append_all(&mut *self.file, bytes).map_err(Error::io("write", path))?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Creates, fills and syncs one file of the folder.
fn file(
    storage: &dyn Storage,
    tmp: &Path,
    name: &str,
    fill: impl FnOnce(&mut Writer, &Path) -> Result<()>,
) -> Result<FileEntry> {
    let path = &tmp.join(name);
    let file = run("create", path, || storage.create(path))?;
    let mut writer = Writer { file, hash: Sha256::new(), bytes: 0 };
    fill(&mut writer, path)?;
    run("sync", path, || writer.file.sync())?;
    let sha256 = hex(writer.hash.finalize());
    Ok(FileEntry { name: name.into(), bytes: writer.bytes, sha256 })
}

/// Writes all files of a checkpoint into the new folder `tmp` and syncs them and it; returns
/// their bytes.
pub(super) fn write(
    storage: &dyn Storage,
    tmp: &Path,
    step: u64,
    tensors: &[SavedTensor<'_>],
    state: &Value,
) -> Result<u64> {
    run("create", tmp, || storage.create_dir(tmp))?;
    let mut groups: BTreeMap<&str, Vec<&SavedTensor<'_>>> = BTreeMap::new();
    for t in tensors {
        groups.entry(t.file).or_default().push(t);
    }
    let mut manifest =
        FileManifest { format: FORMAT, step, files: Vec::new(), tensors: Vec::new() };
    for (stem, mut group) in groups {
        // wide elements first: each tensor is then aligned to its element
        group.sort_by_key(|t| std::cmp::Reverse(t.dtype.bytes()));
        let name = format!("{stem}.safetensors");
        let entry = file(storage, tmp, &name, |out, path| {
            safetensors(out, path, &group, &mut manifest.tensors)
        })?;
        manifest.files.push(entry);
    }
    let text = |e: serde_json::Error| Error::file(tmp, format!("state is not JSON: {e}"));
    let state = serde_json::to_vec_pretty(state).map_err(text)?;
    let entry = file(storage, tmp, "state.json", |out, path| out.append(path, &state))?;
    manifest.files.push(entry);
    let sealed = seal(&manifest).map_err(text)?;
    let entry =
        file(storage, tmp, "manifest.json", |out, path| out.append(path, sealed.as_bytes()))?;
    run("sync", tmp, || storage.sync_dir(tmp))?;
    Ok(manifest.files.iter().map(|f| f.bytes).sum::<u64>() + entry.bytes)
}

/// One safetensors file: header length, header, and the tensors without holes.
fn safetensors(
    out: &mut Writer,
    path: &Path,
    group: &[&SavedTensor<'_>],
    entries: &mut Vec<TensorEntry>,
) -> Result<()> {
    let mut header = Map::new();
    let mut end = 0;
    for t in group {
        let start = end;
        end += t.len;
        let value = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [start, end]});
        header.insert(t.name.to_string(), value);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    out.append(path, &(header.len() as u64).to_le_bytes())?;
    out.append(path, &header)?;
    for t in group {
        let offset = out.bytes;
        let mut hash = Sha256::new();
        // in pieces, so that both hashes and the write find the bytes in the cache
        t.with_bytes(|bytes| {
            bytes.chunks(1 << 20).try_for_each(|piece| {
                hash.update(piece);
                out.append(path, piece)
            })
        })?;
        entries.push(TensorEntry {
            file: t.file.into(),
            name: t.name.to_string(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            offset,
            sha256: hex(hash.finalize()),
        });
    }
    Ok(())
}
