//! Labels of texts, to examples.

use crate::{
    error::{Error, Result},
    rng::{Philox, Purpose},
};

/// The number of a row, in 32 bits: there are as many of these in memory as texts with labels.
pub(in crate::data) type ExampleRow = u32;

/// A text that people labelled.
#[derive(Clone, Copy, Debug)]
pub(super) struct LabelledRow {
    pub label: f64,
    pub row: ExampleRow,
    /// It was cut.
    pub is_cut: bool,
}

/// Why a text with a label is no example of good or of bad.
pub(super) const BETWEEN: &str = "dropped: a label between the lowest and the highest";

/// The lowest and the highest label.
pub(super) fn extremes(labelled: &[LabelledRow]) -> Result<Option<[f64; 2]>> {
    let labels = || labelled.iter().map(|l| l.label);
    match (labels().reduce(f64::min), labels().reduce(f64::max)) {
        (Some(low), Some(high)) if low == high => {
            Err(Error::value("labels of all texts", "two or more", format!("only {low}")))
        }
        (Some(low), Some(high)) => Ok(Some([low, high])),
        _ => Ok(None),
    }
}

/// Pairs of the highest label against the lowest, both shuffled; the shorter list repeats.
pub(super) fn drawn(
    labelled: &[LabelledRow],
    [low, high]: [f64; 2],
    seed: u64,
) -> impl Iterator<Item = [ExampleRow; 2]> {
    let of = |label: f64, stream: u64| {
        let all: Vec<ExampleRow> =
            labelled.iter().filter(|l| l.label == label).map(|l| l.row).collect();
        let order = Philox::new(seed, 0, stream, Purpose::Pairs).permutation(all.len());
        order.into_iter().map(|i| all[i]).collect::<Vec<_>>()
    };
    let (good, bad) = (of(high, 0), of(low, 1));
    (0..good.len().max(bad.len())).map(move |i| [good[i % good.len()], bad[i % bad.len()]])
}
