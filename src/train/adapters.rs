//! The adapters of a run's models, and the bases that they share.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::settings::Settings;
use crate::{
    error::{Error, Result},
    models::{self, AdapterConfig, Config, Head, LoraOptions, Spec},
};

impl Settings {
    /// The folder of the run's tokenizer and chat template.
    pub fn text_folder(&self) -> Result<PathBuf> {
        models::text_folder(Path::new(&self.model), self.adapter.as_deref().map(Path::new))
    }

    /// Whether the policy begins with an adapter that was trained.
    pub(super) fn begins_with_adapter(&self) -> bool {
        self.adapter.is_some() || AdapterConfig::is_in(Path::new(&self.model))
    }
}

/// How a run uses a model, of all that its adapter depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct ModelUse {
    pub trained: bool,
    /// The first that is trained, which an adapter that was given is for.
    pub first: bool,
    /// It comes from the run's own model.
    pub own: bool,
}

/// The model with the adapter that the run trains or, for a frozen copy of the run's own model, the
/// one below it.
pub(super) fn with_adapter(s: &Settings, config: Config, of: ModelUse) -> Result<Config> {
    let given = s.adapter.as_ref().map(|dir| AdapterConfig::read(Path::new(dir))).transpose()?;
    if let (Some(dir), true) = (&s.adapter, s.lora_rank > 0) {
        let want = format!("0 beside adapter = {dir:?}, which has a rank of its own");
        return Err(Error::config("lora_rank", want, s.lora_rank));
    }
    let model = Config::read(Path::new(&s.model))?;
    let d = Settings::default();
    for (key, is_set) in [
        ("lora_alpha", s.lora_alpha != d.lora_alpha),
        ("lora_rslora", s.lora_rslora != d.lora_rslora),
        ("lora_targets", s.lora_targets != d.lora_targets),
    ] {
        if is_set && s.lora_rank == 0 {
            return Err(Error::config(key, "none without a lora_rank", "one"));
        }
    }
    let chosen = match (s.lora_rank, &given, model.adapter()) {
        (0, None, None) => None,
        (0, Some(adapter), _) | (0, None, Some(adapter)) => Some(adapter.options().clone()),
        (rank, ..) => Some(LoraOptions {
            rank,
            alpha: s.lora_alpha.unwrap_or(2.0 * rank as f64),
            rslora: s.lora_rslora,
            targets: s.lora_targets.clone(),
        }),
    };
    let Some(options) = chosen else { return Ok(config) };
    if !of.trained {
        return Ok(if of.own { config.base() } else { config });
    }
    if config.adapter().is_some() {
        if of.own && (given.is_some() || s.lora_rank > 0) {
            let want = "a model, as adapter or lora_rank is set: this folder is an adapter's";
            return Err(Error::config("model", want, &s.model));
        }
        return Ok(config);
    }
    let new = || AdapterConfig::new(options, config.dir(), s.seed);
    let adapter = given.filter(|_| of.first).map_or_else(new, Ok)?;
    config.with_adapter(adapter)
}

/// Weights that several models of a run may have below their adapters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseKey {
    dir: PathBuf,
    pub head: Head,
}

impl BaseKey {
    /// Of a model with such a head: where an adapter brings that, the base may have another.
    pub(super) fn of(config: &Config, spec: &Spec, head: Head) -> Self {
        let name = config.json().get("architectures").and_then(|v| v[0].as_str());
        let scalar = name.is_some_and(|name| name.ends_with("Classification"));
        let own = spec.adapter.as_ref().is_some_and(|adapter| adapter.score);
        let head = if own && !scalar { Head::Lm } else { head };
        let dir = config.dir();
        Self { dir: fs::canonicalize(dir).unwrap_or_else(|_| dir.into()), head }
    }
}
