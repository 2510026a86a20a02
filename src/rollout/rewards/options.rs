//! The keys of one reward in the config, and the column that holds an answer.

use serde_json::Value;

use crate::{
    algorithms::RewardEntry,
    config::Field,
    data::{ColumnsRead, RowColumns},
    error::Result,
};

/// The keys of a reward, each of which is taken once.
pub struct Options<'a> {
    entry: &'a RewardEntry,
    known: Vec<&'static str>,
}

impl<'a> Options<'a> {
    pub fn new(entry: &'a RewardEntry) -> Self {
        Self { entry, known: Vec::new() }
    }

    /// The value of a key, if it is there.
    pub fn take<T: Field>(&mut self, key: &'static str) -> Result<Option<T>> {
        self.known.push(key);
        let Some(value) = self.entry.options.get(key) else { return Ok(None) };
        let wrong = || self.error(format!("`{key}` is {value}, wanted {}", T::kind()));
        T::parse(value).map(Some).ok_or_else(wrong)
    }

    /// The value of a key that has to be there.
    pub fn need<T: Field>(&mut self, key: &'static str) -> Result<T> {
        let lacks = || self.entry.error(format!("wanted `{key}`, {}", T::kind()));
        self.take(key)?.ok_or_else(lacks)
    }

    /// A number in a range, `default` if it is not given.
    pub fn number(
        &mut self,
        key: &'static str,
        default: f64,
        (from, to): (f64, f64),
    ) -> Result<f64> {
        let x = self.take(key)?.unwrap_or(default);
        let wrong = || self.error(format!("`{key}` is {x}, wanted {from} to {to}"));
        if (from..=to).contains(&x) { Ok(x) } else { Err(wrong()) }
    }

    /// An error about this reward.
    pub fn error(&self, message: impl std::fmt::Display) -> crate::Error {
        self.entry.error(message)
    }

    /// Refuses keys that nothing took.
    pub fn done(self) -> Result<()> {
        match self.entry.options.keys().find(|key| !self.known.contains(&&***key)) {
            None => Ok(()),
            Some(key) => {
                let known = [&["kind", "name", "weight"], &self.known[..]].concat();
                Err(self.error(format!("there is no key `{key}`; known are {}", known.join(", "))))
            }
        }
    }
}

/// The column that holds the right answer.
pub struct AnswerColumn {
    names: Vec<String>,
}

impl AnswerColumn {
    /// `column`; without it `answer` or `ground_truth`, whichever a row has.
    pub fn of(options: &mut Options<'_>) -> Result<Self> {
        let names = match options.take::<String>("column")? {
            Some(name) => vec![name],
            None => vec!["answer".into(), "ground_truth".into()],
        };
        Ok(Self { names })
    }

    /// The column of this name.
    pub fn named(name: String) -> Self {
        Self { names: vec![name] }
    }

    pub fn columns(&self) -> ColumnsRead {
        ColumnsRead::Named(self.names.iter().cloned().collect())
    }

    /// The column of a row, with its name.
    pub fn of_row<'r>(&self, row: &'r RowColumns) -> Result<(&str, &'r Value), String> {
        let mut there = self.names.iter().filter_map(|name| Some((&**name, row.get(name)?)));
        match (there.next(), there.next()) {
            (Some(one), None) => Ok(one),
            (Some((a, _)), Some((b, _))) => {
                Err(format!("has `{a}` and `{b}`: say which by `column`"))
            }
            (None, _) => Err(format!("has no column `{}`", self.names.join("` or `"))),
        }
    }

    /// The same as a text; a number is as it stands in JSON.
    pub fn text(&self, row: &RowColumns) -> Result<String, String> {
        match self.of_row(row)? {
            (_, Value::String(text)) => Ok(text.clone()),
            (_, Value::Number(n)) => Ok(n.to_string()),
            (name, other) => Err(format!("has {other} as `{name}`, wanted a text or a number")),
        }
    }
}
