//! The models that a run leaves: each a folder that is complete and on the disk once it has its
//! name, and that says which step of which run it is of.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{checkpoint, settings::SaveDtype};
use crate::{
    device::{Device, Element},
    digest::hex,
    error::{Error, Result},
    models::{self, AdapterStart, Config, Head, LoadOptions, Model, Residency},
    storage::{Disk, Storage, append_all, read_small, remove, write_file},
};

/// Files of a model folder that a trained model takes along.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE,
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
];

/// The template of conversations.
const TEMPLATE: &str = "chat_template.jinja";

/// What files beside a trained model say otherwise than those of the folder that it came from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NewCompanions {
    /// Ids that end a sample; as before, if there are none.
    pub eos: Vec<u32>,
    /// The token that ends a text.
    pub eos_token: Option<String>,
    /// The template that the run was told.
    pub chat_template: Option<String>,
}

/// How a run's models become folders: what its checkpoints say of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportPlan {
    /// The folder that tokenizer and the like come from.
    pub from: PathBuf,
    pub new: NewCompanions,
    /// The id that was appended to every text.
    pub eos: Option<u32>,
    pub roles: Vec<ExportedRole>,
}

/// A model that a run trains.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportedRole {
    pub name: String,
    /// It has a scalar head.
    pub scalar: bool,
    /// What its weights are stored in.
    pub dtype: Dtype,
    /// Its `config.json`.
    pub config: String,
    /// Its `adapter_config.json`, if it is an adapter.
    #[serde(default)]
    pub adapter: Option<String>,
}

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
fn record(storage: &dyn Storage, dir: &Path) -> Option<ExportRecord> {
    serde_json::from_slice(&read_small(storage, &dir.join(RECORD), 1 << 20).ok()?).ok()
}

/// The id that the training of the model in this folder appended to every text, if that is known.
pub fn appended_eos(dir: &Path) -> Option<u32> {
    record(&Disk, dir)?.of.eos
}

/// Whether the folder holds a model of this run, be it damaged.
pub fn is_of(dir: &Path, run: &str) -> bool {
    record(&Disk, dir).is_some_and(|record| record.of.run == run)
}

/// Whether the folder holds a model of this step of this run, with every byte as it was written.
pub fn is_whole(storage: &dyn Storage, dir: &Path, of: &ExportedFrom) -> bool {
    record(storage, dir).is_some_and(|record| {
        let same = |(name, hash): (&String, &String)| {
            let found =
                checkpoint::digest(storage, &dir.join(name), 0, u64::MAX, &mut vec![0; 1 << 18]);
            found.is_ok_and(|found| found.0 == *hash)
        };
        record.of == *of && record.files.iter().all(same)
    })
}

/// Writes a model folder aside and renames it into place. The model takes along the tokenizer of
/// the folder `from`, with what is `new` there. Weights are rounded to `dtype`.
pub fn export<T: Element>(
    storage: &dyn Storage,
    (dev, model, dtype): (&Device, &Model<T>, Dtype),
    (from, dir): (&Path, &Path),
    of: &ExportedFrom,
    new: &NewCompanions,
) -> Result<()> {
    let beside = |end: &str| {
        let mut name = dir.file_name().unwrap_or_default().to_owned();
        name.push(end);
        dir.with_file_name(name)
    };
    let (aside, before) = (beside(".tmp"), beside(".old"));
    for stray in [&aside, &before] {
        remove(storage, stray).map_err(Error::io("remove", stray))?;
    }
    storage.create_dir(&aside).map_err(Error::io("create", &aside))?;
    let mut files = BTreeMap::new();
    let mut put = |name: &str, fill: &mut Fill<'_>| -> Result<()> {
        let path = aside.join(name);
        let (mut hash, mut file) =
            (Sha256::new(), storage.create(&path).map_err(Error::io("create", &path))?);
        fill(&mut |bytes| {
            hash.update(bytes);
            append_all(&mut *file, bytes).map_err(Error::io("write", &path))
        })?;
        file.sync().map_err(Error::io("sync", &path))?;
        files.insert(name.to_owned(), hex(hash.finalize()));
        Ok(())
    };
    let adapter = adapter_text(model)?;
    let name = if adapter.is_some() { models::ADAPTER_FILE } else { models::WEIGHTS_FILE };
    put(name, &mut |out| models::write_weights(dev, model, dtype, out))?;
    let id = match &new.eos[..] {
        [] => None,
        [id] => Some(("eos_token_id", json!(id))),
        ids => Some(("eos_token_id", json!(ids))),
    };
    let token = new.eos_token.as_ref().map(|token| ("eos_token", json!(token)));
    let config = models::config_text(model, dtype).into_bytes();
    match adapter {
        None => put("config.json", &mut |out| out(&with(config.clone(), &id)))?,
        Some(text) => put(models::ADAPTER_CONFIG, &mut |out| out(text.as_bytes()))?,
    }
    if let Some(text) = &new.chat_template {
        put(TEMPLATE, &mut |out| out(text.as_bytes()))?;
    }
    let kept = COMPANIONS.iter().filter(|name| **name != TEMPLATE || new.chat_template.is_none());
    for name in kept {
        let file = from.join(name);
        // A FIFO of that name would wait for ever.
        if !file.is_file() {
            continue;
        }
        let bytes = fs::read(&file).map_err(Error::io("read", &file))?;
        let set = match *name {
            "generation_config.json" => &id,
            "tokenizer_config.json" => &token,
            _ => &None,
        };
        put(name, &mut |out| out(&with(bytes.clone(), set)))?;
    }
    let record = format!("{:#}\n", json!(ExportRecord { of: of.clone(), files }));
    write_file(storage, &aside.join(RECORD), record.as_bytes())?;
    let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let moved = |from: &Path, to: &Path| match storage.rename(from, to) {
        Err(e) if e.kind() == ErrorKind::NotFound && from == dir => Ok(()),
        done => done.map_err(Error::io("rename", from)),
    };
    moved(dir, &before)?;
    moved(&aside, dir)?;
    storage.sync_dir(parent).map_err(Error::io("sync", parent))?;
    remove(storage, &before).map_err(Error::io("remove", &before))
}

/// The `adapter_config.json` of a model with an adapter, in which the base is named by the whole
/// path of its folder.
pub fn adapter_text<T: Element>(model: &Model<T>) -> Result<Option<String>> {
    let (config, dir) = (model.config(), model.config().dir());
    let Some(adapter) = config.adapter() else { return Ok(None) };
    let known = dir.join("config.json").is_file();
    let there = known.then(|| fs::canonicalize(dir).ok()).flatten();
    let base = there.map_or_else(|| adapter.base(), Ok)?;
    models::adapter_config_text(model, &base).map(Some)
}

/// Writes the model of a folder, of whatever head, into the folder `to` in another dtype; with an
/// adapter the adapter, or the model that has it merged into its weights.
pub fn export_again<T: Element>(
    dev: &Device,
    (from, config): (&Path, Config),
    dtype: SaveDtype,
    merge: bool,
    to: &Path,
) -> Result<()> {
    let name = config.json().get("architectures").and_then(|v| v[0].as_str());
    let scalar = name.is_some_and(|name| name.ends_with("Classification"));
    let scalar = config.adapter().and_then(|adapter| adapter.scalar()).unwrap_or(scalar);
    let head = if scalar { Head::Scalar } else { Head::Lm };
    // In f32 whatever the device computes in.
    let residency = match config.adapter() {
        Some(_) => Residency::Frozen,
        None => Residency::Trained,
    };
    let options = LoadOptions { residency, ..LoadOptions::frozen(head) };
    let of_adapter = match config.adapter().map(|adapter| &adapter.start) {
        Some(AdapterStart::Folder(dir)) => Some(dir.clone()),
        _ => None,
    };
    let texts = models::text_folder(from, of_adapter.as_deref())?;
    let mut model: Model<T> = models::load_as(dev, config, options)?;
    if merge {
        model.merge(dev)?;
    }
    let own = if model.adapter().is_some() { Dtype::F32 } else { model.stored_dtype() };
    let none = ExportedFrom { step: 0, run: String::new(), eos: None };
    let from = of_adapter.as_deref().unwrap_or(from);
    let of = record(&Disk, from).map_or(none, |record| record.of);
    let dtype = dtype.of(own);
    export(&Disk, (dev, &model, dtype), (&texts, to), &of, &NewCompanions::default())
}

/// Writes a file's bytes piece by piece.
type Fill<'a> = dyn FnMut(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> + 'a;

/// A JSON file with a key replaced, if there is one to replace.
fn with(text: Vec<u8>, key: &Option<(&str, Value)>) -> Vec<u8> {
    let Some((key, value)) = key else { return text };
    match serde_json::from_slice(&text) {
        Ok(Value::Object(mut json)) => {
            json.insert((*key).to_owned(), value.clone());
            format!("{:#}\n", Value::Object(json)).into_bytes()
        }
        // What is no object says nothing to those who read it.
        _ => text,
    }
}
