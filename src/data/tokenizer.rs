//! `tokenizer.json`: text to ids and back.
//!
//! Text never becomes control: a text that spells a special token is encoded as the characters it
//! is made of.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    device::file,
    digest::hex,
    error::{Error, Result},
};

/// A Hugging Face tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    /// SHA-256 of the file.
    digest: String,
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Vec<u32>,
    adds_bos: bool,
    /// Ids of the anchor that [`Tokenizer::encode_continuation`] strips, for tokenizers that put a
    /// space before every text.
    anchor: Option<Vec<u32>>,
}

/// A line break has a token of its own in every tokenizer that needs an anchor.
const ANCHOR: &str = "\n";

impl Tokenizer {
    /// Opens the tokenizer of a model folder. BOS comes from `tokenizer_config.json`, else from
    /// `generation_config.json` and `config.json`; the first EOS likewise, and more from these.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let text = file::read_text(&path, 256 << 20)?;
        // The library panics on some malformed files.
        let parsed = catch_unwind(|| tokenizers::Tokenizer::from_bytes(text.as_bytes()));
        let mut inner = match parsed {
            Ok(Ok(t)) => t,
            Ok(Err(e)) => return Err(Error::file(path, format!("not a tokenizer: {e}"))),
            Err(_) => return Err(Error::file(path, "not a tokenizer: it cannot be parsed")),
        };
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        // Special tokens spelled in text stay text.
        inner.set_encode_special_tokens(true);
        let json = |name: &str| -> Value {
            let text = file::read_text(&dir.join(name), 16 << 20).unwrap_or_default();
            serde_json::from_str(&text).unwrap_or(Value::Null)
        };
        let settings = json("tokenizer_config.json");
        let (generation, model) = (json("generation_config.json"), json("config.json"));
        let named = |key: &str| {
            let v = &settings[key];
            let text = v.as_str().or_else(|| v["content"].as_str())?;
            inner.token_to_id(text)
        };
        let numbered = |key: &str| -> Vec<u32> {
            let list = |v: &Value| match v {
                Value::Array(all) => all.iter().filter_map(Value::as_u64).collect(),
                v => v.as_u64().into_iter().collect::<Vec<_>>(),
            };
            let ids = [&generation[key], &model[key]].map(list);
            let ids = if ids[0].is_empty() { &ids[1] } else { &ids[0] };
            ids.iter().filter_map(|id| u32::try_from(*id).ok()).collect()
        };
        let bos = named("bos_token").or_else(|| numbered("bos_token_id").first().copied());
        // What ends a text, then all else that ends a sample: Llama 3 has three, Qwen 3 two.
        let mut eos: Vec<u32> = named("eos_token").into_iter().collect();
        eos.extend(numbered("eos_token_id"));
        let mut seen = BTreeSet::new();
        eos.retain(|id| seen.insert(*id));
        let digest = hex(Sha256::digest(&text));
        let mut this = Self { path, digest, inner, bos, eos, adds_bos: false, anchor: None };
        let (with, without) = (this.raw("a", true)?, this.raw("a", false)?);
        this.adds_bos = bos.is_some()
            && (with.first().copied() == bos && with.len() > without.len()
                || settings["add_bos_token"].as_bool() == Some(true));
        let first = without.first().and_then(|id| this.inner.id_to_token(*id));
        if first.is_some_and(|t| t.starts_with('\u{2581}')) {
            this.anchor = Some(this.raw(ANCHOR, false)?);
        }
        Ok(this)
    }

    /// The tokenizer of a model folder that may have none.
    pub fn open_if_there(dir: &Path) -> Result<Option<Self>> {
        dir.join("tokenizer.json").exists().then(|| Self::open(dir)).transpose()
    }

    /// The text of a token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    fn raw(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let run = || self.inner.encode_fast(text, special);
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
            Ok(Err(e)) => Err(Error::file(&self.path, format!("cannot encode a text: {e}"))),
            Err(_) => Err(Error::file(&self.path, "cannot encode a text: the tokenizer failed")),
        }
    }

    /// The ids of a text, without special tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.raw(text, false)
    }

    /// The ids of a whole text as the model expects its beginning: BOS first, once, if the model
    /// uses one.
    pub fn encode_start(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = if self.adds_bos { Vec::from_iter(self.bos) } else { Vec::new() };
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// The ids of a text that continues another: prompt and completion are encoded apart, so that
    /// the boundary is exact and the prompt's ids are a prefix. Tokenizers that put a space before
    /// every text (Llama 2) do not put one here.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        let Some(anchor) = &self.anchor else { return self.encode(text) };
        let ids = self.encode(&format!("{ANCHOR}{text}"))?;
        match ids.strip_prefix(&anchor[..]) {
            Some(rest) => Ok(rest.to_vec()),
            // The anchor merged with the text: rather a space too many than a lost character.
            None => self.encode(text),
        }
    }

    /// Text of ids; special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match catch_unwind(AssertUnwindSafe(|| self.inner.decode(ids, true))) {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(e)) => Err(Error::file(&self.path, format!("cannot decode ids: {e}"))),
            Err(_) => Err(Error::file(&self.path, "cannot decode ids: the tokenizer failed")),
        }
    }

    /// Text of ids that continue others: what they add to the text of both, so that a space at the
    /// seam is kept.
    pub fn decode_continuation(&self, before: &[u32], ids: &[u32]) -> Result<String> {
        let (start, whole) = (self.decode(before)?, self.decode(&[before, ids].concat())?);
        // A character whose bytes lie on both sides belongs to neither text.
        match whole.strip_prefix(&start) {
            Some(rest) => Ok(rest.to_owned()),
            None => self.decode(ids),
        }
    }

    /// Beginning of a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Ids that end a sequence; the first is the one that training appends.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Whether a sequence begins with BOS.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// SHA-256 of `tokenizer.json`.
    pub fn digest(&self) -> String {
        self.digest.clone()
    }

    /// Checks that the tokenizer of another model's folder gives the same ids; that it has none is
    /// no error.
    pub fn agrees(&self, dir: &Path) -> Result<()> {
        if !dir.join("tokenizer.json").exists() {
            return Ok(());
        }
        let other = Self::open(dir)?;
        let (ours, theirs) = (self.inner.get_vocab(true), other.inner.get_vocab(true));
        let differs = ours.iter().filter(|(token, id)| theirs.get(*token) != Some(*id)).min();
        let Some((token, id)) = differs else { return Ok(()) };
        let got = theirs.get(token).map_or("no id".to_owned(), |id| format!("id {id}"));
        let ours = self.path.display();
        Err(Error::file(other.path, format!("has {got} for {token:?}, wanted {id} as in {ours}")))
    }

    /// Number of ids, special ones included.
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}
