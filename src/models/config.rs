//! `config.json` of a Hugging Face folder, in the older and the newer spelling.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    device::file,
    error::{Error, Result},
    ops::{activation::Activation, rope::Rope},
};

/// The largest `config.json` that is read.
const LIMIT: u64 = 1 << 20;

/// A parsed `config.json`. Everything is kept, so that a saved model has what the loaded one had.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    json: serde_json::Map<String, Value>,
}

impl Config {
    /// Reads `dir/config.json`.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        Self::parse(&file::read_text(&path, LIMIT)?, path)
    }

    /// Parses the text of a `config.json`; `path` is for messages.
    pub fn parse(text: &str, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        match serde_json::from_str(text) {
            Ok(Value::Object(json)) => Ok(Self { path, json }),
            Ok(other) => Err(Error::file(path, format!("wanted a JSON object, got {other}"))),
            Err(e) => Err(Error::file(path, format!("not JSON: {e}"))),
        }
    }

    /// The JSON, for saving with some keys replaced.
    pub fn json(&self) -> &serde_json::Map<String, Value> {
        &self.json
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
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

    fn missing(&self, key: &str) -> Error {
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

    /// Refuses keys of other models that change what is computed, unless they have the value that
    /// changes nothing: a key is computed or named.
    pub fn check_computed(&self) -> Result<()> {
        let all = |v: &Value, good: &dyn Fn(&Value) -> bool| {
            v.as_array().is_some_and(|all| all.iter().all(good))
        };
        for (key, v) in self.json.iter().filter(|(_, v)| !v.is_null()) {
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
                "alibi" | "qk_norm" | "use_qk_norm" | "use_sliding_window" => ("false", v == false),
                // Without its use it says nothing.
                "sliding_window" => ("null", self.get("use_sliding_window").is_some()),
                "num_experts" | "num_local_experts" => ("0", v.as_u64() == Some(0)),
                "final_logit_softcapping"
                | "attn_logit_softcapping"
                | "attention_multiplier"
                | "query_pre_attn_scalar"
                | "clip_qkv"
                | "rope_local_base_freq"
                | "quantization_config" => ("null", false),
                _ => continue,
            };
            if !fine {
                return Err(self.unsupported(key, want));
            }
        }
        Ok(())
    }

    /// Rotary positions: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling`
    /// of version 4 and before.
    pub fn rope(&self) -> Result<Rope> {
        let key =
            if self.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let empty = serde_json::Map::new();
        let scaling = match self.get(key) {
            None => &empty,
            Some(Value::Object(map)) => map,
            Some(other) => return Err(self.wrong(key, "an object", other)),
        };
        // Outside, frequencies or their reciprocals leave f32.
        let positive = |name: &str, v: &Value| {
            let x = v.as_f64().filter(|x| (1e-3..=1e15).contains(x));
            x.ok_or_else(|| self.wrong(name, "a number from 0.001 to 1e15", v))
        };
        let number = |name: &str| {
            let full = format!("{key}.{name}");
            positive(&full, scaling.get(name).ok_or_else(|| self.missing(&full))?)
        };
        let theta = match (scaling.get("rope_theta"), self.get("rope_theta")) {
            (Some(_), _) => number("rope_theta")?,
            (None, Some(v)) => positive("rope_theta", v)?,
            (None, None) => 10_000.0,
        };
        // "type" is the oldest spelling
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
        let kind = kind.filter(|v| !v.is_null()).map_or(Some("default"), Value::as_str);
        let kind = kind.unwrap_or("no string");
        for (name, v) in scaling.iter().filter(|(_, v)| !v.is_null()) {
            let known = match &**name {
                "rope_theta" | "rope_type" | "type" => true,
                "partial_rotary_factor" => v.as_f64() == Some(1.0),
                "factor"
                | "low_freq_factor"
                | "high_freq_factor"
                | "original_max_position_embeddings" => kind == "llama3",
                _ => false,
            };
            if !known && ["default", "llama3"].contains(&kind) {
                let want = format!("no such key for rope_type {kind}");
                return Err(self.wrong(&format!("{key}.{name}"), &want, v));
            }
        }
        match kind {
            "default" => Ok(Rope::Plain { theta }),
            "llama3" => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    let want = format!("above low_freq_factor = {low}");
                    return Err(self.wrong(&format!("{key}.high_freq_factor"), &want, &high));
                }
                Ok(Rope::Llama3 {
                    theta,
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position: number("original_max_position_embeddings")?,
                })
            }
            other => Err(self.wrong(&format!("{key}.rope_type"), "default or llama3", &other)),
        }
    }
}
