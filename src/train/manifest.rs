//! The state of a run in its checkpoints, and the part of it that must be the same on resumption.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{Settings, inputs::RunInputs, source::Source};
use crate::{
    config::Section,
    data::Tokenizer,
    digest::hex,
    error::{Error, Result},
};

/// Everything that must be the same when a run is resumed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub algorithm: String,
    /// SHA-256 of the examples, and of those held out.
    pub data: String,
    pub eval_data: Option<String>,
    /// SHA-256 of its file.
    pub tokenizer: Option<String>,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    /// Number type of activations.
    pub precision: String,
    /// SHA-256 of the weights that the run began with, by role.
    pub models: BTreeMap<String, String>,
    /// Settings that change bits of the result.
    pub settings: BTreeMap<String, String>,
}

/// Content of a checkpoint beside its tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunState {
    pub run: Manifest,
    /// Optimizer updates, by role.
    pub updates: BTreeMap<String, u64>,
    /// The algorithm's own state.
    pub algorithm: Value,
    /// Version of Warpo that wrote it.
    pub version: String,
    /// The kernels that computed it.
    pub family: String,
}

impl Manifest {
    pub fn new(
        algorithm: &str,
        precision: &str,
        inputs: &RunInputs,
        section: &dyn Section,
        models: &[(&'static str, String)],
    ) -> Self {
        let keys = Section::keys(&inputs.settings).into_iter().chain(section.keys());
        // Parts of experts are those of a micro-batch.
        let sums = precision != "f32" || inputs.settings.load_balance > 0.0;
        let split = |name: &str| name == "micro_batch_tokens" && sums;
        let keys = keys.filter(|k| !Settings::FREE.contains(&k.name) || split(k.name));
        Self {
            algorithm: algorithm.into(),
            data: inputs.source.digest(),
            eval_data: inputs.held_out.as_ref().map(Source::digest),
            tokenizer: inputs.tokenizer.as_ref().map(Tokenizer::digest),
            eos: inputs.eos.clone(),
            precision: precision.into(),
            models: models.iter().map(|(role, hash)| ((*role).into(), hash.clone())).collect(),
            settings: keys.map(|k| (k.name.into(), k.value)).collect(),
        }
    }

    /// SHA-256 of all that is compared.
    pub fn digest(&self) -> String {
        hex(Sha256::digest(format!("{:?}", self.fields())))
    }

    /// All that is compared, by the key that a user knows, in the order in which a difference is
    /// told.
    fn fields(&self) -> Vec<(&str, String)> {
        let option = |x: &Option<String>| x.clone().unwrap_or_else(|| "none".into());
        let maps = self.models.iter().chain(&self.settings);
        let fields = [
            ("algorithm", self.algorithm.clone()),
            ("data", self.data.clone()),
            ("eval_data", option(&self.eval_data)),
            ("tokenizer", option(&self.tokenizer)),
            ("eos", format!("{:?}", self.eos)),
            ("device", format!("models computed in {}", self.precision)),
        ];
        fields.into_iter().chain(maps.map(|(key, value)| (&key[..], value.clone()))).collect()
    }

    /// Refuses to go on in `out` with the run that `was` there, if it is another.
    pub fn check(&self, was: &Self, out: &Path) -> Result<()> {
        let before: BTreeMap<&str, String> = was.fields().into_iter().collect();
        let differs = |(key, is): &(&str, String)| before.get(key) != Some(is);
        let Some((key, is)) = self.fields().into_iter().find(differs) else { return Ok(()) };
        let nothing = "nothing".to_owned();
        let begun = before.get(key).unwrap_or(&nothing);
        let message = format!("{} holds a run with {begun}, this one has {is}", out.display());
        let hint = match (key, &*was.precision) {
            ("device", "F32") => "go on with --device cpu, or take another --out folder",
            ("device", _) => "go on with --device cuda, or take another --out folder",
            _ => "use the run's config.toml, or another --out folder",
        };
        Err(Error::Config { key: key.into(), message, hint: Some(hint.into()) })
    }
}
