//! The state of a run in its checkpoints, and the part of it that must be the same on resumption.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{Settings, export::ExportPlan, inputs::RunInputs, source::Source};
use crate::{
    algorithms::algorithm,
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
    /// How its models become folders.
    #[serde(default)]
    pub export: Option<ExportPlan>,
    /// Steps that are done.
    #[serde(default)]
    pub step: u64,
    /// Examples that were drawn for them; as many each step, if it is not there.
    #[serde(default)]
    pub drawn: Option<u64>,
    /// Steps that the run was to have.
    #[serde(default)]
    pub steps: u64,
    /// Where it was given more than that.
    #[serde(default)]
    pub extended: Vec<Extension>,
}

/// A run that goes on beyond the steps that it had, with a course of the learning rate of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extension {
    /// The steps done by then.
    pub at: u64,
    /// Settings that changed: what was, what is.
    pub settings: BTreeMap<String, [String; 2]>,
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

    /// Refuses to go on in `out` with the run that `was` there, if it is another; says what changed
    /// in a run that is `longer` than it was to be.
    pub fn check(
        &self,
        was: &Self,
        out: &Path,
        longer: bool,
    ) -> Result<BTreeMap<String, [String; 2]>> {
        // A setting that was not known then had its default.
        let defaults = Settings::defaults(algorithm(&self.algorithm)?)?;
        let defaults = Section::keys(&defaults.0).into_iter().chain(defaults.1.keys());
        let mut before: BTreeMap<&str, String> = defaults.map(|k| (k.name, k.value)).collect();
        before.extend(was.fields());
        let all = self.fields();
        let differs = |(key, is): &&(&str, String)| before.get(key) != Some(is);
        let may = |key: &str| longer && Settings::OF_LENGTH.contains(&key);
        let wrong = all.iter().filter(|at| differs(at) && !may(at.0));
        // The cause first: other settings may make other data, or another model.
        let is_setting = |key: &str| self.settings.contains_key(key);
        let Some(&(key, ref is)) = wrong.min_by_key(|at| !is_setting(at.0)) else {
            let changed = all.iter().filter(differs);
            let pair = |(key, is): &(&str, String)| {
                ((*key).to_owned(), [before.get(key).cloned().unwrap_or_default(), is.clone()])
            };
            return Ok(changed.map(pair).collect());
        };
        let nothing = "nothing".to_owned();
        let begun = before.get(key).unwrap_or(&nothing);
        let message = format!("{} holds a run with {begun}, this one has {is}", out.display());
        let hint = match (key, &*was.precision) {
            ("device", "F32") => "go on with --device cpu, or take another --out folder",
            ("device", _) => "go on with --device cuda, or take another --out folder",
            _ if Settings::OF_LENGTH.contains(&key) => {
                "use the run's config.toml, another --out folder, or more steps than it was to have"
            }
            _ => "use the run's config.toml, or another --out folder",
        };
        Err(Error::Config { key: key.into(), message, hint: Some(hint.into()) })
    }
}
