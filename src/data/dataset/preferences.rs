//! What people preferred, to pairs and to judgements.

use super::{Dataset, Limits, Maker, Sequence, unfit};
use crate::{
    data::{Located, Record, Tokenizer},
    error::{Error, Result},
    rng::{Philox, Purpose},
};

/// Pairs: preferences, or labelled texts, of which every text with the highest label is paired with
/// one of the lowest, drawn with `seed`; each text is used once where the counts allow. Texts with
/// labels between count as dropped.
pub fn pairs(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
    seed: u64,
) -> Result<Dataset> {
    let (maker, mut out) = (Maker { tokenizer, limits }, Dataset::within(limits));
    let (mut all, mut labelled) = (Vec::new(), Vec::new());
    for at in records {
        let made = match (&at.record, out.bad.kept(maker.pair(at))?) {
            (_, None) => continue,
            (_, Some(Some(pair))) => {
                all.push(pair);
                continue;
            }
            (Record::Labelled { text, label }, _) => maker.whole(at, text).map(|s| (*label, s)),
            _ => Err(unfit(at, "preferences, or texts with labels")),
        };
        labelled.extend(out.bad.kept(made)?);
    }
    if let Some([low, high]) = extremes(&labelled)? {
        for (_, s) in labelled.iter().filter(|l| l.0 != low && l.0 != high) {
            out.stats.dropped += 1;
            out.omit(BETWEEN.into(), &s.place);
        }
        all.extend(drawn(&labelled, (low, high), seed).map(|pair| (pair, None)));
    }
    for (pair, margin) in all {
        let useless = |[chosen, rejected]: &[Sequence; 2]| {
            let equal = chosen.ids == rejected.ids;
            let empty = chosen.ids.is_empty() || rejected.ids.is_empty();
            empty.then_some("no tokens").or(equal.then_some("chosen and rejected are equal"))
        };
        if out.push(pair, limits.max_length, useless) {
            out.margins.push(margin);
        }
    }
    Ok(out)
}

/// Why a text with a label is no example of good or of bad.
const BETWEEN: &str = "dropped: a label between the lowest and the highest";

/// The lowest and the highest label.
fn extremes(labelled: &[(f64, Sequence)]) -> Result<Option<[f64; 2]>> {
    let labels = || labelled.iter().map(|l| l.0);
    match (labels().reduce(f64::min), labels().reduce(f64::max)) {
        (Some(low), Some(high)) if low == high => {
            Err(Error::value("labels of all texts", "two or more", format!("only {low}")))
        }
        (Some(low), Some(high)) => Ok(Some([low, high])),
        _ => Ok(None),
    }
}

/// Completions that people judged: with labels, of which the highest is good, the lowest bad, and
/// those between count as dropped; texts with labels; both sides of preferences.
pub fn judged(
    records: &[Located],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
) -> Result<Dataset> {
    let (maker, mut out) = (Maker { tokenizer, limits }, Dataset::within(limits));
    let (mut all, mut labelled) = (Vec::new(), Vec::new());
    for at in records {
        let made = match (&at.record, out.bad.kept(maker.pair(at))?) {
            (_, None) => continue,
            (_, Some(Some(([chosen, rejected], _)))) => {
                all.extend([(chosen, true), (rejected, false)]);
                continue;
            }
            (Record::Judged { label, .. } | Record::Labelled { label, .. }, _) => {
                maker.text(at, true).map(|s| (*label, s))
            }
            _ => Err(unfit(at, "completions or texts with labels, or preferences")),
        };
        labelled.extend(out.bad.kept(made)?);
    }
    if let Some([low, high]) = extremes(&labelled)? {
        for (label, text) in labelled {
            if label == low || label == high {
                all.push((text, label == high));
                continue;
            }
            out.stats.dropped += 1;
            out.omit(BETWEEN.into(), &text.place);
        }
    }
    for (text, good) in all {
        let useless = |[s]: &[Sequence; 1]| s.predicted.is_empty().then_some("nothing to learn");
        if out.push([text], limits.max_length, useless) {
            out.labels.push(good);
        }
    }
    Ok(out)
}

/// Pairs of the highest label against the lowest, both shuffled; the shorter list repeats.
fn drawn(
    labelled: &[(f64, Sequence)],
    (low, high): (f64, f64),
    seed: u64,
) -> impl Iterator<Item = [Sequence; 2]> {
    let of = |label: f64, stream: u64| {
        let all: Vec<&Sequence> =
            labelled.iter().filter(|l| l.0 == label).map(|(_, s)| s).collect();
        let order = Philox::new(seed, 0, stream, Purpose::Pairs).permutation(all.len());
        order.into_iter().map(|i| all[i]).collect::<Vec<_>>()
    };
    let (good, bad) = (of(high, 0), of(low, 1));
    let pair = move |i: usize| [good[i % good.len()].clone(), bad[i % bad.len()].clone()];
    let count = |label: f64| labelled.iter().filter(|l| l.0 == label).count();
    (0..count(high).max(count(low))).map(pair)
}
