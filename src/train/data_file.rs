//! A data file of the settings.

use toml::{Table, Value};

use crate::config::Field;

/// The largest weight of a file.
const MAX_WEIGHT: f64 = 100.0;

/// A data file, folder or pattern, and how often an epoch draws its examples.
#[derive(Clone, Debug, PartialEq)]
pub struct DataFile {
    pub path: String,
    /// Draws of an example in an epoch, in the mean.
    pub weight: f64,
}

impl<T: Into<String>> From<T> for DataFile {
    fn from(path: T) -> Self {
        Self { path: path.into(), weight: 1.0 }
    }
}

impl Field for DataFile {
    fn kind() -> String {
        format!(
            "a path, or {{ path = \"FILE\", weight = 2.0 }} with a weight above 0, at most {MAX_WEIGHT}"
        )
    }

    fn parse(value: &Value) -> Option<Self> {
        let Some(table) = value.as_table() else {
            return value.as_str().map(Self::from);
        };
        if table.keys().any(|key| key != "path" && key != "weight") {
            return None;
        }
        let weight = table.get("weight").map_or(Some(1.0), f64::parse)?;
        let path = table.get("path")?.as_str()?.to_owned();
        (weight > 0.0 && weight <= MAX_WEIGHT).then_some(Self { path, weight })
    }

    fn show(&self) -> String {
        if self.weight == 1.0 {
            return Value::String(self.path.clone()).to_string();
        }
        let (path, weight) = (self.path.clone().into(), self.weight.into());
        Value::Table(Table::from_iter([("path".into(), path), ("weight".into(), weight)]))
            .to_string()
    }
}
