//! Rotary positions as `config.json` has them: `rope_parameters` of transformers 5, or `rope_theta`
//! and `rope_scaling` of version 4 and before.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::Config;
use crate::{
    error::Result,
    ops::rope::{Frequencies, Rope},
};

/// Keys of every kind.
const ALWAYS: [&str; 3] = ["rope_theta", "rope_type", "type"];
/// Keys of each kind beside those.
const KINDS: [(&str, &[&str]); 6] = [
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor", ORIGINAL]),
    (
        "yarn",
        &[
            "factor",
            ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",
        ],
    ),
    ("longrope", &["factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"]),
];
const ORIGINAL: &str = "original_max_position_embeddings";

/// What the rotary positions of a family are where its config does not say.
#[derive(Clone, Copy, Debug)]
pub(super) struct RopeDefaults {
    pub theta: f64,
    /// Keys beside those of the kind that the family computes.
    pub also: &'static [&'static str],
}

impl Default for RopeDefaults {
    fn default() -> Self {
        Self { theta: 10_000.0, also: &[] }
    }
}

impl Config {
    /// The rotary embedding that all layers share.
    pub(super) fn rope(&self, defaults: RopeDefaults) -> Result<Rope> {
        let (key, map) = self.rope_map()?;
        self.rope_in(key, &map, false, defaults)
    }

    /// The rotary embedding of the layers of one of `layer_types`, if the config has one for each.
    pub(super) fn rope_of(&self, kind: &str, defaults: RopeDefaults) -> Result<Option<Rope>> {
        let (key, map) = self.rope_map()?;
        match map.get(kind) {
            Some(Value::Object(own)) => {
                let known = |k: &&String| !["full_attention", "sliding_attention"].contains(&&***k);
                if let Some(other) = map.keys().find(known) {
                    let want = "rotary positions of full_attention and sliding_attention";
                    return Err(self.wrong(&format!("{key}.{other}"), want, &map[other]));
                }
                self.rope_in(&format!("{key}.{kind}"), own, true, defaults).map(Some)
            }
            Some(other) => Err(self.wrong(&format!("{key}.{kind}"), "an object", other)),
            None => Ok(None),
        }
    }

    /// Channels of a head of `head_dim` that rotate: the first ones.
    pub(super) fn rotary_dim(&self, head_dim: usize, key: &str, default: f64) -> Result<usize> {
        let (of, map) = self.rope_map()?;
        let factor = match map.get("partial_rotary_factor").filter(|v| !v.is_null()) {
            Some(v) => {
                let want = || self.wrong(&format!("{of}.partial_rotary_factor"), "a number", v);
                v.as_f64().ok_or_else(want)?
            }
            None => self.f64_or(key, default)?,
        };
        let channels = (head_dim as f64 * factor) as usize;
        if !(0.0..=1.0).contains(&factor) || channels < 2 || !channels.is_multiple_of(2) {
            let want = format!("a part of {head_dim} channels that is even");
            return Err(self.wrong(key, &want, &factor));
        }
        Ok(channels)
    }

    /// A coefficient among the rotary parameters, if it is there, and the positions of pretraining.
    pub(super) fn rope_scaling_beta(&self, name: &str) -> Result<Option<(f64, f64)>> {
        let (key, map) = self.rope_map()?;
        let at = RopeMap { config: self, key, map: &map };
        if at.get(name).is_none() {
            return Ok(None);
        }
        Ok(Some((at.number(name)?, at.number(ORIGINAL)?)))
    }

    fn rope_map(&self) -> Result<(&'static str, Cow<'_, Map<String, Value>>)> {
        let [new, old] = ["rope_parameters", "rope_scaling"].map(|key| self.get(key));
        if let (Some(new), Some(old)) = (new, old)
            && new != old
        {
            return Err(self.wrong("rope_scaling", "none beside `rope_parameters`", old));
        }
        let key = if new.is_some() { "rope_parameters" } else { "rope_scaling" };
        match self.get(key) {
            None => Ok((key, Cow::Owned(Map::new()))),
            Some(Value::Object(map)) => Ok((key, Cow::Borrowed(map))),
            Some(other) => Err(self.wrong(key, "an object", other)),
        }
    }

    fn rope_in(
        &self,
        key: &str,
        map: &Map<String, Value>,
        nested: bool,
        defaults: RopeDefaults,
    ) -> Result<Rope> {
        let at = RopeMap { config: self, key, map };
        let theta = match (map.get("rope_theta"), self.get("rope_theta")) {
            (Some(_), _) => at.number("rope_theta")?,
            (None, Some(v)) => self.positive("rope_theta", v)?,
            (None, None) => defaults.theta,
        };
        // "type" is the oldest spelling, "su" an old name.
        let kind = map.get("rope_type").or_else(|| map.get("type")).filter(|v| !v.is_null());
        let kind = kind.map_or(Some("default"), Value::as_str).unwrap_or("no string");
        let kind = if kind == "su" { "longrope" } else { kind };
        let Some((_, keys)) = KINDS.iter().find(|(name, _)| *name == kind) else {
            let known: Vec<_> = KINDS.iter().map(|(name, _)| *name).collect();
            let want = format!("one of {}", known.join(", "));
            return Err(self.wrong(&format!("{key}.rope_type"), &want, &kind));
        };
        for (name, v) in map.iter().filter(|(_, v)| !v.is_null()) {
            let name = &**name;
            let whole = name == "partial_rotary_factor" && v.as_f64() == Some(1.0);
            let known = [&ALWAYS[..], keys, defaults.also].iter().any(|all| all.contains(&name));
            if !known && !whole {
                let want = format!("no such key for rope_type {kind}");
                return Err(self.wrong(&format!("{key}.{name}"), &want, v));
            }
        }
        let length = self.usize_or("max_position_embeddings", 2048)? as f64;
        // Phi's configs have it outside, which counts.
        let original = match self.get(ORIGINAL) {
            Some(v) => self.positive(ORIGINAL, v)?,
            None => at.number_or(ORIGINAL, length)?,
        };
        let longest = self.longest().map_or(length, |n| n as f64);
        let (frequencies, attention_factor) = match kind {
            "linear" => (Frequencies::Linear { factor: at.number("factor")? }, 1.0),
            "dynamic" => {
                let factor = at.number("factor")?;
                (Frequencies::Dynamic { factor, max_position: length, longest }, 1.0)
            }
            "llama3" => {
                let low_freq_factor = at.number("low_freq_factor")?;
                let high_freq_factor = at.number("high_freq_factor")?;
                if low_freq_factor >= high_freq_factor {
                    let want = format!("above low_freq_factor = {low_freq_factor}");
                    let key = format!("{key}.high_freq_factor");
                    return Err(self.wrong(&key, &want, &high_freq_factor));
                }
                let factor = at.number("factor")?;
                if self.get(ORIGINAL).is_none() {
                    at.number(ORIGINAL)?;
                }
                let bands =
                    Frequencies::Llama3 { factor, low_freq_factor, high_freq_factor, original };
                (bands, 1.0)
            }
            "yarn" => {
                let factor = at.number_or("factor", length / original)?;
                let yarn = Frequencies::Yarn {
                    factor,
                    original,
                    beta_fast: at.truthy_or("beta_fast", 32.0)?,
                    beta_slow: at.truthy_or("beta_slow", 1.0)?,
                    // transformers reads it outside of nested parameters only.
                    truncate: nested || map.get("truncate").is_none_or(|v| *v != false),
                };
                let growth = |scale: f64| {
                    if factor <= 1.0 { 1.0 } else { 0.1 * scale * libm::log(factor) + 1.0 }
                };
                let [one, all] = ["mscale", "mscale_all_dim"].map(|name| at.truthy_or(name, 0.0));
                let (one, all) = (one?, all?);
                let both = one != 0.0 && all != 0.0;
                let made = if both { growth(one) / growth(all) } else { growth(1.0) };
                (yarn, at.number_or("attention_factor", made)?)
            }
            "longrope" => {
                let list = if longest > original { "long_factor" } else { "short_factor" };
                let s = at.number_or("factor", length / original)?;
                let made =
                    if s <= 1.0 { 1.0 } else { (1.0 + libm::log(s) / libm::log(original)).sqrt() };
                let factors = at.numbers(list)?;
                (Frequencies::Listed { factors }, at.number_or("attention_factor", made)?)
            }
            _ => (Frequencies::Plain, 1.0),
        };
        Ok(Rope { theta, frequencies, attention_factor })
    }

    /// Outside, frequencies or their reciprocals leave f32.
    fn positive(&self, name: &str, v: &Value) -> Result<f64> {
        let x = v.as_f64().filter(|x| (1e-3..=1e15).contains(x));
        x.ok_or_else(|| self.wrong(name, "a number from 0.001 to 1e15", v))
    }
}

/// One object of rotary parameters.
struct RopeMap<'a> {
    config: &'a Config,
    key: &'a str,
    map: &'a Map<String, Value>,
}

impl RopeMap<'_> {
    fn full(&self, name: &str) -> String {
        format!("{}.{name}", self.key)
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn number(&self, name: &str) -> Result<f64> {
        let v = self.get(name).ok_or_else(|| self.config.missing(&self.full(name)))?;
        self.config.positive(&self.full(name), v)
    }

    fn number_or(&self, name: &str, default: f64) -> Result<f64> {
        if self.get(name).is_none() { Ok(default) } else { self.number(name) }
    }

    /// 0 and false count as absent, as in Python.
    fn truthy_or(&self, name: &str, default: f64) -> Result<f64> {
        let falsy = |v: &Value| v.as_f64() == Some(0.0) || *v == false;
        if self.get(name).is_none_or(falsy) { Ok(default) } else { self.number(name) }
    }

    fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        let full = self.full(name);
        let v = self.get(name).ok_or_else(|| self.config.missing(&full))?;
        let all = v.as_array().ok_or_else(|| self.config.wrong(&full, "a list of numbers", v))?;
        all.iter().map(|v| self.config.positive(&full, v)).collect()
    }
}
