//! The models that a run leaves: each a folder that is complete and on the disk once it has its
//! name, and that says which step of which run it is of.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    checkpoint,
    storage::{Disk, Storage, write_file},
};
use crate::{
    device::{Device, Element, file},
    error::{Error, Result},
    models::{self, Model},
};

/// Files of a model folder that a trained model takes along.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
];

/// The file that says what the folder is.
const RECORD: &str = "warpo.json";

/// The run that a model is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedFrom {
    pub step: u64,
    /// SHA-256 of all that resumed runs have in common.
    pub run: String,
    /// The id that was appended to every text.
    pub eos: Option<u32>,
}

/// Content of [`RECORD`].
#[derive(Serialize, Deserialize)]
struct ExportRecord {
    of: ExportedFrom,
    /// SHA-256 of each other file.
    files: BTreeMap<String, String>,
}

/// What the folder of a trained model says of itself.
fn record(dir: &Path) -> Option<ExportRecord> {
    serde_json::from_str(&file::read_text(&dir.join(RECORD), 1 << 20).ok()?).ok()
}

/// The id that the training of the model in this folder appended to every text, if that is known.
pub fn appended_eos(dir: &Path) -> Option<u32> {
    record(dir)?.of.eos
}

/// Whether the folder holds a model of this step of this run, with every byte as it was written.
pub fn is_whole(dir: &Path, of: &ExportedFrom) -> bool {
    record(dir).is_some_and(|record| {
        let same = |(name, hash): (&String, &String)| {
            digest(&dir.join(name)).is_ok_and(|found| found == *hash)
        };
        record.of == *of && record.files.iter().all(same)
    })
}

/// Writes a model folder aside and renames it into place. The model takes along the tokenizer of
/// the folder `from`; `eos`, an id and its token, replaces what ends a text there.
pub fn export<T: Element>(
    dev: &Device,
    model: &Model<T>,
    (from, dir): (&Path, &Path),
    of: &ExportedFrom,
    eos: Option<(u32, Option<String>)>,
) -> Result<()> {
    let (aside, before) = (dir.with_extension("tmp"), dir.with_extension("old"));
    for stray in [&aside, &before] {
        if stray.exists() {
            fs::remove_dir_all(stray).map_err(Error::io("remove", stray))?;
        }
    }
    fs::create_dir_all(&aside).map_err(Error::io("create", &aside))?;
    models::save(dev, model, &aside)?;
    for name in COMPANIONS {
        let file = from.join(name);
        if file.exists() {
            // Bytes alone: a model is not read-only where its base was.
            let bytes = fs::read(&file).map_err(Error::io("read", &file))?;
            let to = aside.join(name);
            fs::write(&to, bytes).map_err(Error::io("write", &to))?;
        }
    }
    if let Some((id, token)) = eos {
        for name in ["config.json", "generation_config.json"] {
            set(&aside.join(name), "eos_token_id", json!(id))?;
        }
        token
            .map_or(Ok(()), |t| set(&aside.join("tokenizer_config.json"), "eos_token", t.into()))?;
    }
    let mut files = BTreeMap::new();
    for name in Disk.list(&aside).map_err(Error::io("list", &aside))? {
        let path = aside.join(&name);
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        file.sync_all().map_err(Error::io("sync", &path))?;
        files.insert(name, digest(&path)?);
    }
    let record = format!("{:#}\n", json!(ExportRecord { of: of.clone(), files }));
    write_file(&aside.join(RECORD), record.as_bytes())?;
    let parent = dir.parent().unwrap_or(Path::new("."));
    if dir.exists() {
        fs::rename(dir, &before).map_err(Error::io("rename", dir))?;
    }
    fs::rename(&aside, dir).map_err(Error::io("rename", &aside))?;
    Disk.sync_dir(parent).map_err(Error::io("sync", parent))?;
    if before.exists() {
        fs::remove_dir_all(&before).map_err(Error::io("remove", &before))?;
    }
    Ok(())
}

/// Replaces a key of a JSON file, if the file is there.
fn set(path: &Path, key: &str, value: Value) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let json = serde_json::from_str::<Value>(&file::read_text(path, 16 << 20)?);
    let mut json = json.map_err(|e| Error::file(path, format!("not JSON: {e}")))?;
    json[key] = value;
    fs::write(path, format!("{json:#}\n")).map_err(Error::io("write", path))
}

/// SHA-256 of a file.
fn digest(path: &Path) -> Result<String> {
    Ok(checkpoint::digest(&Disk, path, 0, u64::MAX, &mut vec![0; 1 << 20])?.0)
}
