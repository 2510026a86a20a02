//! `config.json` of a Hugging Face folder, in the older and the newer spelling.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{AdapterConfig, folder};
use crate::{
    device::file,
    error::{Error, Result},
    hub,
    ops::activation::Activation,
};

/// The most blocks of a model.
pub(super) const MOST_LAYERS: usize = 1 << 12;

/// The largest `config.json` that is read.
const LIMIT: u64 = 1 << 20;

/// A parsed `config.json`. Everything is kept, so that a saved model has what the loaded one had.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    json: serde_json::Map<String, Value>,
    /// See [`Config::for_sequences`].
    longest: Option<usize>,
    /// It is the text part of a model that has others.
    nested: bool,
    adapter: Option<AdapterConfig>,
}

impl Config {
    /// Reads `dir/config.json`; in an adapter's folder the adapter, and its base.
    pub fn read(dir: &Path) -> Result<Self> {
        if AdapterConfig::is_in(dir) {
            let adapter = AdapterConfig::read(dir)?;
            let base = adapter.base()?;
            let found = hub::model(&base).and_then(|dir| Self::read_base(&dir));
            return found.map_err(|e| adapter.without_base(&e))?.with_adapter(adapter);
        }
        Self::read_base(dir)
    }

    fn read_base(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = file::read_text(&path, LIMIT);
        Self::parse(&text.map_err(|e| folder::without(dir, "config.json", e))?, path)
    }

    /// Parses the text of a `config.json`; `path` is for messages.
    pub fn parse(text: &str, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        match serde_json::from_str(text) {
            Ok(Value::Object(json)) => {
                let nested = json.get("text_config").is_some_and(Value::is_object);
                let json = if nested { text_part(json) } else { json };
                Ok(Self { path, json, longest: None, nested, adapter: None })
            }
            Ok(other) => Err(Error::file(path, format!("wanted a JSON object, got {other}"))),
            Err(e) => Err(Error::file(path, format!("not JSON: {e}"))),
        }
    }

    /// The same model for sequences of at most `longest` tokens. Some rotary embeddings are chosen
    /// by the longest sequence; transformers looks at each batch, so that a row sees its batch, and
    /// here it is the longest of the whole run.
    pub fn for_sequences(self, longest: usize) -> Self {
        Self { longest: Some(longest), ..self }
    }

    /// The same model with an adapter on it.
    pub fn with_adapter(self, adapter: AdapterConfig) -> Result<Self> {
        match self.adapter {
            None => Ok(Self { adapter: Some(adapter), ..self }),
            Some(own) => Err(own.wrong("base_model_name_or_path", "one adapter on a model")),
        }
    }

    pub fn adapter(&self) -> Option<&AdapterConfig> {
        self.adapter.as_ref()
    }

    /// The model below its adapter.
    pub fn base(&self) -> Self {
        Self { adapter: None, ..self.clone() }
    }

    /// The folder of its `config.json`, and of its weights.
    pub fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// The longest sequence of the run, if it was said.
    pub fn longest(&self) -> Option<usize> {
        self.longest
    }

    /// Whether it is the text part of a model that also sees or hears. What is saved is that part,
    /// a model of its own.
    pub fn is_nested(&self) -> bool {
        self.nested
    }

    /// The JSON, for saving with some keys replaced.
    pub fn json(&self) -> &serde_json::Map<String, Value> {
        &self.json
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    /// The same with whole numbers under keys that it does not have.
    pub(super) fn with_defaults(&self, all: &[(&str, u64)]) -> Self {
        let mut config = self.clone();
        for (key, n) in all {
            if config.get(key).is_none() {
                config.json.insert((*key).into(), (*n).into());
            }
        }
        config
    }

    /// An error about a key.
    pub fn wrong(&self, key: &str, want: &str, got: &dyn std::fmt::Display) -> Error {
        Error::file(&self.path, format!("`{key}` is {got}, wanted {want}"))
    }

    /// A setting that this version does not compute.
    pub fn unsupported(&self, key: &str, want: &str) -> Error {
        let got = self.get(key).cloned().unwrap_or(Value::Null);
        Error::file(&self.path, format!("`{key}` = {got} is not supported, wanted {want}"))
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        Error::file(&self.path, format!("`{key}` is missing"))
    }

    fn read_usize(&self, key: &str, v: &Value) -> Result<usize> {
        let n = v.as_u64().and_then(|n| usize::try_from(n).ok());
        n.ok_or_else(|| self.wrong(key, "a whole number", v))
    }

    /// A required whole number.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.usize_opt(key)?.ok_or_else(|| self.missing(key))
    }

    /// An optional whole number; null counts as absent.
    pub fn usize_opt(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|v| self.read_usize(key, v)).transpose()
    }

    /// A whole number with a default.
    pub fn usize_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.usize_opt(key)?.unwrap_or(default))
    }

    /// An optional number; null counts as absent.
    pub fn f64_opt(&self, key: &str) -> Result<Option<f64>> {
        let number = |v: &Value| v.as_f64().ok_or_else(|| self.wrong(key, "a number", v));
        self.get(key).map(number).transpose()
    }

    /// A number with a default.
    pub fn f64_or(&self, key: &str, default: f64) -> Result<f64> {
        let Some(v) = self.get(key) else { return Ok(default) };
        v.as_f64().ok_or_else(|| self.wrong(key, "a number", v))
    }

    /// A flag with a default.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        let Some(v) = self.get(key) else { return Ok(default) };
        v.as_bool().ok_or_else(|| self.wrong(key, "true or false", v))
    }

    /// A flag that may be absent, else must have this value.
    pub fn must_be(&self, key: &str, want: bool) -> Result<()> {
        if self.bool_or(key, want)? == want {
            return Ok(());
        }
        Err(self.unsupported(key, if want { "true" } else { "false" }))
    }

    pub fn text(&self, key: &str) -> Result<String> {
        let v = self.get(key).ok_or_else(|| self.missing(key))?;
        v.as_str().map(str::to_owned).ok_or_else(|| self.wrong(key, "a string", v))
    }

    /// `a / b`, which must be whole.
    pub fn divide(&self, a_key: &str, a: usize, b_key: &str, b: usize) -> Result<usize> {
        if b == 0 || !a.is_multiple_of(b) {
            return Err(self.wrong(a_key, &format!("a multiple of `{b_key}` = {b}"), &a));
        }
        Ok(a / b)
    }

    /// An activation by its Hugging Face name.
    pub fn activation(&self, key: &str, default: &str) -> Result<Activation> {
        let name = match self.get(key) {
            None => default.to_owned(),
            Some(_) => self.text(key)?,
        };
        Activation::from_hf_name(&name)
            .ok_or_else(|| self.unsupported(key, "gelu_new, gelu, silu, relu or quick_gelu"))
    }

    /// Whole numbers in a list; none where the key is absent or null.
    pub fn indices(&self, key: &str) -> Result<Vec<usize>> {
        let Some(v) = self.get(key) else { return Ok(Vec::new()) };
        let all = v.as_array().ok_or_else(|| self.wrong(key, "a list of whole numbers", v))?;
        all.iter().map(|v| self.read_usize(key, v)).collect()
    }

    /// `sliding_window`, which is `default` where the key is absent, and none where it is null.
    pub fn window(&self, default: Option<u32>) -> Result<Option<u32>> {
        const KEY: &str = "sliding_window";
        match self.json.get(KEY) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(v) => {
                let n = v.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
                n.map(Some).ok_or_else(|| self.wrong(KEY, "a positive whole number or null", v))
            }
        }
    }

    /// Which of `layers` blocks see a window only: `layer_types`, or as `default` says of a block.
    pub fn sliding(&self, layers: usize, default: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        self.kinds(layers, ["full_attention", "sliding_attention"], default)
    }

    /// Before something is made for each block.
    pub fn check_layers(&self, layers: usize) -> Result<()> {
        if layers <= MOST_LAYERS {
            return Ok(());
        }
        let want = format!("a number from 1 to {MOST_LAYERS}");
        Err(self.wrong("number of layers", &want, &layers))
    }

    /// Which of `layers` blocks are of the second of two kinds: `layer_types`, or as `default` says
    /// of a block.
    pub fn kinds(
        &self,
        layers: usize,
        [first, second]: [&str; 2],
        default: impl Fn(usize) -> bool,
    ) -> Result<Vec<bool>> {
        const KEY: &str = "layer_types";
        self.check_layers(layers)?;
        let Some(v) = self.get(KEY) else { return Ok((0..layers).map(default).collect()) };
        let kind = |v: &Value| match v.as_str() {
            Some(kind) if kind == second => Ok(true),
            Some(kind) if kind == first => Ok(false),
            _ => Err(self.wrong(KEY, &format!("{second} or {first}"), v)),
        };
        let all: Vec<bool> = v.as_array().into_iter().flatten().map(kind).collect::<Result<_>>()?;
        if all.len() != layers {
            let want = format!("one for each of {layers} layers");
            return Err(self.wrong(KEY, &want, &format!("{} long", all.len())));
        }
        Ok(all)
    }

    /// Refuses keys of other models that change what is computed, unless they have the value that
    /// changes nothing or are among the `own` ones, which the family computes: a key is computed or
    /// named.
    pub fn check_computed(&self, own: &[&str]) -> Result<()> {
        let all = |v: &Value, good: &dyn Fn(&Value) -> bool| {
            v.as_array().is_some_and(|all| all.iter().all(good))
        };
        let others = self.json.iter().filter(|(key, v)| !v.is_null() && !own.contains(&&***key));
        for (key, v) in others {
            let (want, fine) = match &**key {
                "partial_rotary_factor"
                | "rotary_pct"
                | "logits_scaling"
                | "logit_scale"
                | "residual_multiplier"
                | "embedding_multiplier" => ("1", v.as_f64() == Some(1.0)),
                "no_rope_layers" => ("1 for each layer", all(v, &|x| x.as_f64() == Some(1.0))),
                "layer_types" => {
                    ("full_attention for each layer", all(v, &|x| x == "full_attention"))
                }
                "alibi"
                | "qk_norm"
                | "use_qk_norm"
                | "use_sliding_window"
                | "use_bidirectional_attention"
                | "use_mrope" => ("false", v == false),
                // Without its use it says nothing.
                "sliding_window" => ("null", self.get("use_sliding_window").is_some()),
                "num_experts" | "num_local_experts" => ("0", v.as_u64() == Some(0)),
                "final_logit_softcapping"
                | "attn_logit_softcapping"
                | "attention_multiplier"
                | "query_pre_attn_scalar"
                | "clip_qkv"
                | "rope_local_base_freq"
                | "llama_4_scaling"
                | "quantization_config" => ("null", false),
                _ => continue,
            };
            if !fine {
                return Err(self.unsupported(key, want));
            }
        }
        Ok(())
    }
}

/// The text part of the config of a model that has others, with what stands beside it.
fn text_part(mut json: serde_json::Map<String, Value>) -> serde_json::Map<String, Value> {
    let Some(Value::Object(mut text)) = json.remove("text_config") else { return json };
    for key in [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "quantization_config",
    ] {
        if let (false, Some(v)) = (text.contains_key(key), json.remove(key)) {
            text.insert(key.into(), v);
        }
    }
    text
}
