//! `adapter_config.json` of a PEFT folder: a key of it is computed, says nothing about results, or
//! is refused by its name.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::Head;
use crate::{
    device::file,
    error::{Error, Result},
};

/// The file that makes a folder an adapter's.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// All linear layers of the blocks, as PEFT calls them.
pub(super) const ALL_LINEAR: &str = "all-linear";

/// The largest `adapter_config.json` that is read.
const LIMIT: u64 = 1 << 20;

/// A new adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptions {
    pub rank: usize,
    /// What adapters add is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// By `alpha / sqrt(rank)` (Kalajdzievski 2023).
    pub rslora: bool,
    /// Names of modules, or `all-linear`.
    pub targets: Vec<String>,
}

/// What an adapter begins as.
#[derive(Clone, Debug, PartialEq)]
pub enum AdapterStart {
    /// The weights of a PEFT folder.
    Folder(PathBuf),
    /// As PEFT's: A drawn with this seed, B 0.
    Seed(u64),
}

/// The adapter of a model. Everything that was read is kept, so that what is saved has it.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    path: PathBuf,
    json: Map<String, Value>,
    options: LoraOptions,
    /// Modules that are saved whole.
    saves: Vec<String>,
    pub start: AdapterStart,
}

impl AdapterConfig {
    /// Whether a folder is an adapter's, whatever lies beside it, as in transformers.
    pub fn is_in(dir: &Path) -> bool {
        dir.join(ADAPTER_CONFIG).is_file()
    }

    /// Reads the config of a PEFT folder, whose weights it begins with.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(ADAPTER_CONFIG);
        let text = file::read_text(&path, LIMIT)?;
        Self::parse(&text, path, AdapterStart::Folder(dir.to_owned()))
    }

    /// Parses the text of an `adapter_config.json`; `path` is for messages.
    pub fn parse(text: &str, path: impl Into<PathBuf>, start: AdapterStart) -> Result<Self> {
        let path = path.into();
        let json = match serde_json::from_str(text) {
            Ok(Value::Object(json)) => json,
            Ok(other) => {
                return Err(Error::file(path, format!("wanted a JSON object, got {other}")));
            }
            Err(e) => return Err(Error::file(path, format!("not JSON: {e}"))),
        };
        let none = LoraOptions { rank: 0, alpha: 0.0, rslora: false, targets: Vec::new() };
        let mut config = Self { path, json, options: none, saves: Vec::new(), start };
        config.check()?;
        let rank = config.get("r").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let Some(rank) = rank.filter(|n| (1..=1 << 14).contains(n)) else {
            return Err(config.wrong("r", "a whole number from 1 to 16384"));
        };
        let alpha = config.get("lora_alpha").map_or(Some(8.0), Value::as_f64);
        let Some(alpha) = alpha.filter(|a| a.abs() <= 1e6) else {
            return Err(config.wrong("lora_alpha", "a number of at most 1e6"));
        };
        let rslora = config.get("use_rslora").map_or(Some(false), Value::as_bool);
        let Some(rslora) = rslora else {
            return Err(config.wrong("use_rslora", "true or false"));
        };
        let targets = match config.get("target_modules") {
            Some(Value::String(all)) if all == ALL_LINEAR => Some(vec![ALL_LINEAR.to_owned()]),
            other => names(other),
        };
        let Some(targets) = targets.filter(|all| !all.is_empty()) else {
            return Err(config.wrong("target_modules", "a list of names, or \"all-linear\""));
        };
        config.saves = match config.get("modules_to_save") {
            None => Vec::new(),
            some => names(some)
                .ok_or_else(|| config.wrong("modules_to_save", "a list of names, or null"))?,
        };
        config.options = LoraOptions { rank, alpha, rslora, targets };
        Ok(config)
    }

    /// A new adapter of the model in `base`.
    pub fn new(options: LoraOptions, base: &Path, seed: u64) -> Result<Self> {
        let LoraOptions { rank, alpha, rslora, targets } = &options;
        let all = targets.iter().any(|name| name == ALL_LINEAR);
        if all && targets.len() > 1 {
            let want = "names, or all-linear alone";
            return Err(Error::config("lora_targets", want, targets.join(", ")));
        }
        let targets = if all { json!(ALL_LINEAR) } else { json!(targets) };
        let text = json!({
            "alpha_pattern": {},
            "base_model_name_or_path": base.to_string_lossy(),
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_to_transform": null,
            "lora_alpha": if alpha.fract() == 0.0 { json!(*alpha as i64) } else { json!(alpha) },
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": {},
            "revision": null,
            "target_modules": targets,
            "task_type": null,
            "use_dora": false,
            "use_rslora": rslora,
        });
        Self::parse(&text.to_string(), ADAPTER_CONFIG, AdapterStart::Seed(seed))
    }

    /// Refuses what is not computed.
    fn check(&self) -> Result<()> {
        for (key, value) in self.json.iter().filter(|(_, v)| !v.is_null()) {
            let (want, fine) = match &**key {
                "peft_type" => ("\"LORA\"", value == "LORA"),
                "bias" => ("\"none\"", value == "none"),
                "task_type" => {
                    ("\"CAUSAL_LM\" or \"SEQ_CLS\"", value == "CAUSAL_LM" || value == "SEQ_CLS")
                }
                // Others move a part of the base's weights into the adapter.
                "init_lora_weights" => {
                    ("true, false or \"gaussian\"", value.is_boolean() || value == "gaussian")
                }
                // Read above, or where it matters.
                "r" | "lora_alpha" | "use_rslora" | "target_modules" | "modules_to_save"
                | "lora_dropout" => ("", true),
                // PEFT takes what the module wants, whatever it says.
                "fan_in_fan_out" => ("true or false", value.is_boolean()),
                // They say nothing about results.
                "base_model_name_or_path"
                | "revision"
                | "inference_mode"
                | "peft_version"
                | "auto_mapping"
                | "megatron_core"
                | "qalora_group_size" => ("", true),
                // Whatever else there is, off.
                _ => {
                    let empty = value.as_array().is_some_and(Vec::is_empty)
                        || value.as_object().is_some_and(Map::is_empty);
                    ("null, false or nothing in it", value == false || empty)
                }
            };
            if !fine {
                return Err(self.wrong(key, want));
            }
        }
        match self.get("peft_type") {
            Some(_) => Ok(()),
            None => Err(self.wrong("peft_type", "\"LORA\"")),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    /// An error about a key.
    pub(super) fn wrong(&self, key: &str, want: &str) -> Error {
        let got = self.json.get(key).unwrap_or(&Value::Null);
        Error::file(&self.path, format!("`{key}` = {got} is not supported, wanted {want}"))
    }

    pub fn options(&self) -> &LoraOptions {
        &self.options
    }

    /// Modules beside the adapted ones that it has whole.
    pub(super) fn saves(&self) -> &[String] {
        &self.saves
    }

    /// The head that it is for, if it says so: true for a scalar one.
    pub fn scalar(&self) -> Option<bool> {
        self.get("task_type").map(|task| task == "SEQ_CLS")
    }

    /// Refuses a model of another head than it is for.
    pub fn check_head(&self, head: Head) -> Result<()> {
        match (self.scalar(), head) {
            (Some(true), Head::Lm) => {
                Err(self.wrong("task_type", "\"CAUSAL_LM\": it is of a reward model"))
            }
            (Some(false), Head::Scalar) => {
                let want = "\"SEQ_CLS\"; `warpo export --merge` makes a model of it that may be \
                            trained with another head";
                Err(self.wrong("task_type", want))
            }
            _ => Ok(()),
        }
    }

    /// Refuses to train what would not be trained as it says.
    pub(super) fn check_trained(&self) -> Result<()> {
        match self.get("lora_dropout").map_or(Some(0.0), Value::as_f64) {
            Some(0.0) => Ok(()),
            _ => Err(self.wrong("lora_dropout", "0 to train it")),
        }
    }

    /// The model that it is of, as it names it.
    pub fn base(&self) -> Result<PathBuf> {
        let base = self.get("base_model_name_or_path").and_then(Value::as_str);
        let base = base.filter(|name| !name.is_empty()).map(PathBuf::from);
        base.ok_or_else(|| self.wrong("base_model_name_or_path", "the base model's folder"))
    }

    /// An error of the model that it names.
    pub(super) fn without_base(&self, e: &Error) -> Error {
        let base = self.base().unwrap_or_default();
        let message = format!(
            "`base_model_name_or_path` is {}: {e}; `--model BASE --adapter DIR` takes another",
            base.display()
        );
        Error::file(&self.path, message)
    }

    /// The text of its file for a model with such a head, which it has itself or not, over what
    /// `base` names.
    pub(super) fn text(&self, (scalar, has_score): (bool, bool), base: &Path) -> String {
        let mut json = self.json.clone();
        let task = if scalar { "SEQ_CLS" } else { "CAUSAL_LM" };
        json.insert("task_type".into(), json!(task));
        json.insert("base_model_name_or_path".into(), json!(base.to_string_lossy()));
        if has_score {
            json.insert("modules_to_save".into(), json!(["score"]));
        }
        json.insert("inference_mode".into(), json!(true));
        format!("{:#}\n", Value::Object(json))
    }
}

fn names(list: Option<&Value>) -> Option<Vec<String>> {
    list?.as_array()?.iter().map(|v| Some(v.as_str()?.to_owned())).collect()
}
