//! Columns of the data that rewards read.

use std::collections::BTreeSet;

/// The columns of a row that rewards read, by name.
pub type RowColumns = serde_json::Map<String, serde_json::Value>;

/// Columns that rewards read, beside what a prompt is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ColumnsRead {
    /// Rewards read none.
    #[default]
    None,
    /// Those of these names that a row has.
    Named(BTreeSet<String>),
    /// All.
    All,
}

impl ColumnsRead {
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::None => false,
            Self::Named(names) => names.contains(name),
            // That is what the sample continues.
            Self::All => name != "prompt",
        }
    }

    /// Those that one of both reads.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::All, _) | (_, Self::All) => Self::All,
            (Self::None, other) | (other, Self::None) => other,
            (Self::Named(mut a), Self::Named(b)) => {
                a.extend(b);
                Self::Named(a)
            }
        }
    }
}
