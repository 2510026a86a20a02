//! The list of what scores a sample, as a config has it: `rewards = [{ kind = "math" }, ...]`.

use std::{collections::BTreeSet, path::PathBuf};

use toml::{Table, Value};

use crate::{
    config::Field,
    error::{Error, Result},
};

/// An entry of the list: what scores a sample, and its part of the whole score.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardEntry {
    /// What scores: `model`, `math` and others.
    pub kind: String,
    /// Its name in metrics, rollouts and messages: the kind, unless the config gives another.
    pub name: String,
    /// Multiplies its score in the sum.
    pub weight: f64,
    /// All other keys, which its kind reads.
    pub options: Table,
}

impl RewardEntry {
    /// An error about this entry.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        let (key, hint) = ("rewards".into(), None);
        Error::Config { key, message: format!("`{}`: {message}", self.name), hint }
    }
}

impl Field for RewardEntry {
    fn kind() -> String {
        "a reward: { kind = \"math\", name = \"math\", weight = 1.0, and the kind's own keys }"
            .into()
    }

    fn parse(value: &Value) -> Option<Self> {
        let mut options = value.as_table()?.clone();
        let kind = String::parse(&options.remove("kind")?)?;
        let name = options.remove("name").map_or(Some(kind.clone()), |v| String::parse(&v))?;
        let weight = options.remove("weight").map_or(Some(1.0), |v| f64::parse(&v))?;
        Some(Self { kind, name, weight, options })
    }

    fn show(&self) -> String {
        let mut all = Table::new();
        all.insert("kind".into(), Value::String(self.kind.clone()));
        if self.name != self.kind {
            all.insert("name".into(), Value::String(self.name.clone()));
        }
        all.insert("weight".into(), Value::Float(self.weight));
        all.extend(self.options.clone());
        Value::Table(all).to_string()
    }
}

/// Checks the names of a list, and returns the folder of its reward model, if it has one.
pub fn model_of(list: &[RewardEntry]) -> Result<Option<PathBuf>> {
    let (mut names, mut model) = (BTreeSet::new(), None);
    for entry in list {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
        if entry.name.is_empty() || !entry.name.chars().all(plain) {
            return Err(entry.error("a name is made of letters, digits, _ and -"));
        }
        if entry.name == "std" {
            return Err(
                entry.error("another metric is called `reward_std`: give it another `name`")
            );
        }
        if !names.insert(&entry.name) {
            return Err(entry.error("two rewards have this name: give one another `name`"));
        }
        if entry.kind != "model" {
            continue;
        }
        if model.is_some() {
            return Err(entry.error("a second reward model, wanted one at most"));
        }
        if let Some(key) = entry.options.keys().find(|key| *key != "path") {
            return Err(entry.error(format!("there is no key `{key}`; known is `path`")));
        }
        let path = entry.options.get("path").and_then(PathBuf::parse);
        let path = path.filter(|p| !p.as_os_str().is_empty());
        model = Some(path.ok_or_else(|| entry.error("wanted `path`, a reward model's folder"))?);
    }
    Ok(model)
}
