//! Sequences to the examples of a data set, one after another.

use std::sync::Arc;

use super::{
    Dataset, DatasetStats, ExampleKind, Limits, Sequence,
    labels::{BETWEEN, ExampleRow, LabelledRow, drawn, extremes},
    maker::Made,
};
use crate::{
    data::{BadLines, DataPlace, Omission, RowColumns},
    error::{Error, Result},
};

/// What a row has beside its sequence.
#[derive(Clone, Debug, Default)]
pub(in crate::data) struct RowExtras {
    /// Of a pair, with its first row.
    pub margin: Option<f64>,
    /// What rewards read, of a prompt.
    pub columns: Arc<RowColumns>,
}

/// Where the rows of a data set are kept: each is one sequence.
pub(in crate::data) trait RowSink {
    /// Adds a row.
    fn push(&mut self, sequence: &Sequence, more: &RowExtras) -> Result<()>;

    /// From now on rows can be read, and none is added.
    fn settle(&mut self) -> Result<()>;

    /// Row `i`, once they are settled.
    fn row(&self, i: usize) -> Sequence;
}

/// Rows in memory.
#[derive(Default)]
pub(super) struct MemoryRows {
    sequences: Vec<Sequence>,
    margins: Vec<Option<f64>>,
}

impl RowSink for MemoryRows {
    fn push(&mut self, sequence: &Sequence, more: &RowExtras) -> Result<()> {
        self.sequences.push(sequence.clone());
        self.margins.push(more.margin);
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    fn row(&self, i: usize) -> Sequence {
        self.sequences[i].clone()
    }
}

impl MemoryRows {
    /// The data set of what was built.
    pub fn dataset(self, built: Built) -> Dataset {
        let Built { unit, rows, labels, stats, omissions, bad, .. } = built;
        let (sequences, margins) = match rows {
            None => (self.sequences, self.margins),
            Some(rows) => {
                let at = |row: &ExampleRow| *row as usize;
                let all = |row| (self.sequences[at(row)].clone(), self.margins[at(row)]);
                rows.iter().map(all).unzip()
            }
        };
        let margins = if unit == 2 { margins.into_iter().step_by(2).collect() } else { Vec::new() };
        Dataset { sequences, margins, labels, stats, omissions, bad }
    }
}

/// What was built, beside the rows.
#[derive(Debug, Default)]
pub(in crate::data) struct Built {
    /// Sequences of an example.
    pub unit: usize,
    /// The rows of the examples, one example after the other; `None`: all, as they lie.
    pub rows: Option<Vec<ExampleRow>>,
    /// Whether people called each example good; empty without judgements.
    pub labels: Vec<bool>,
    pub stats: DatasetStats,
    /// Tokens of the longest sequence.
    pub longest: usize,
    pub omissions: Vec<Omission>,
    pub bad: BadLines,
    /// A margin of the first pair that has one.
    pub first_margin: Option<DataPlace>,
}

impl Built {
    /// Counts an example that is not as the data has it.
    fn omit(&mut self, reason: String, at: &DataPlace) {
        match self.omissions.iter_mut().find(|o| o.reason == reason) {
            Some(same) => same.count += 1,
            None => self.omissions.push(Omission { reason, count: 1, first: at.clone() }),
        }
    }

    /// Counts an example, of which some was cut or not; whether it is one that teaches.
    fn count(&mut self, kind: ExampleKind, example: &[Sequence], is_cut: bool) -> bool {
        self.stats.truncated += usize::from(is_cut);
        let (useless, at) = (useless(kind, example), &example[0].place);
        match (useless, is_cut) {
            (Some(why), false) => self.omit(format!("dropped: {why}"), at),
            (Some(why), true) => self.omit(format!("dropped: {why} within max_length"), at),
            (None, true) => self.omit("cut at the end: longer than max_length".into(), at),
            (None, false) => {}
        }
        let of_policy = matches!(kind, ExampleKind::Pairs { policy: true, .. });
        let unanswered = of_policy && example.iter().any(|s| s.tokens() == 0);
        if unanswered && useless.is_none() {
            self.omit("dropped: a side without a completion".into(), at);
        }
        if unanswered || useless.is_some() {
            self.stats.dropped += 1;
            return false;
        }
        self.stats.examples += 1;
        for s in example {
            self.stats.tokens += s.ids.len();
            self.longest = self.longest.max(s.ids.len());
        }
        true
    }
}

/// Why nothing is learned of an example.
fn useless(kind: ExampleKind, example: &[Sequence]) -> Option<&'static str> {
    match (kind, example) {
        (ExampleKind::Prompts { .. }, [s]) => s.ids.is_empty().then_some("no tokens"),
        (ExampleKind::Texts { .. } | ExampleKind::Judged, [s]) => {
            s.predicted.is_empty().then_some("nothing to learn")
        }
        (ExampleKind::Pairs { .. }, [chosen, rejected]) => {
            let equal = chosen.ids == rejected.ids;
            let empty = chosen.ids.is_empty() || rejected.ids.is_empty();
            empty.then_some("no tokens").or(equal.then_some("chosen and rejected are equal"))
        }
        _ => None,
    }
}

/// Builds a data set of what records give, in their order.
pub(in crate::data) struct Builder<S> {
    limits: Limits,
    kind: ExampleKind,
    sink: S,
    count: usize,
    labelled: Vec<LabelledRow>,
    /// Labels of examples, where these are known at once.
    labels: Vec<bool>,
    pub built: Built,
}

impl<S: RowSink> Builder<S> {
    pub fn new(limits: Limits, kind: ExampleKind, sink: S) -> Self {
        let unit = if matches!(kind, ExampleKind::Pairs { .. }) { 2 } else { 1 };
        let built = Built { unit, bad: BadLines::up_to(limits.skip_bad), ..Built::default() };
        Self { limits, kind, sink, count: 0, labelled: Vec::new(), labels: Vec::new(), built }
    }

    /// Adds what a record gives.
    pub fn add(&mut self, made: Result<Made>) -> Result<()> {
        let Some(made) = self.built.bad.kept(made)? else { return Ok(()) };
        let none = RowExtras::default();
        match made {
            Made::Each(all) => all.into_iter().try_for_each(|s| self.push(&mut [s], &none)),
            Made::Prompt { prompt, is_cut, columns } => {
                if is_cut {
                    self.built.stats.truncated += 1;
                    let why = "cut at the beginning: longer than max_length";
                    self.built.omit(why.into(), &prompt.place);
                }
                self.push(&mut [prompt], &RowExtras { columns, margin: None })
            }
            Made::Pair([chosen, rejected], _) if self.kind == ExampleKind::Judged => {
                for (side, good) in [(chosen, true), (rejected, false)] {
                    let before = self.count;
                    self.push(&mut [side], &none)?;
                    self.labels.extend((self.count > before).then_some(good));
                }
                Ok(())
            }
            Made::Pair(mut pair, margin) => {
                if margin.is_some() && self.built.first_margin.is_none() {
                    self.built.first_margin = Some(pair[0].place.clone());
                }
                self.push(&mut pair, &RowExtras { margin, ..none })
            }
            Made::Labelled(mut text, label) => {
                let is_cut = self.cut(&mut text);
                let row = self.keep(&text, &none)?;
                self.labelled.push(LabelledRow { label, row, is_cut });
                Ok(())
            }
        }
    }

    /// Cuts a sequence at its end; whether it was too long.
    fn cut(&self, s: &mut Sequence) -> bool {
        let is_long = s.ids.len() > self.limits.max_length;
        s.ids.truncate(self.limits.max_length);
        s.predicted.iter_mut().for_each(|r| r.end = r.end.min(s.ids.len()));
        s.predicted.retain(|r| r.start < r.end);
        is_long
    }

    /// Keeps a row.
    fn keep(&mut self, s: &Sequence, more: &RowExtras) -> Result<ExampleRow> {
        let many = || Error::value("rows of data", format!("at most {}", ExampleRow::MAX), "more");
        let row = ExampleRow::try_from(self.count).map_err(|_| many())?;
        self.sink.push(s, more)?;
        self.count += 1;
        Ok(row)
    }

    /// Adds an example, cut at the end, unless it then teaches nothing.
    fn push(&mut self, example: &mut [Sequence], more: &RowExtras) -> Result<()> {
        let mut is_cut = false;
        for s in &mut *example {
            is_cut |= self.cut(s);
        }
        if self.built.count(self.kind, example, is_cut) {
            let none = RowExtras::default();
            for (i, s) in example.iter().enumerate() {
                self.keep(s, if i == 0 { more } else { &none })?;
            }
        }
        Ok(())
    }

    /// Makes examples of labels, which all are known now.
    pub fn finish(mut self) -> Result<(S, Built)> {
        self.sink.settle()?;
        let (sink, mut built, labelled) = (self.sink, self.built, self.labelled);
        built.labels = self.labels;
        let Some(ends @ [low, high]) = extremes(&labelled)? else { return Ok((sink, built)) };
        let of = |row: ExampleRow| sink.row(row as usize);
        let mut left = labelled.iter().map(|l| l.row).peekable();
        let is_other = |row: &ExampleRow| left.next_if_eq(row).is_none();
        let mut rows: Vec<ExampleRow> = (0..self.count as ExampleRow).filter(is_other).collect();
        for l in labelled.iter().filter(|l| l.label != low && l.label != high) {
            built.stats.dropped += 1;
            built.omit(BETWEEN.into(), &of(l.row).place);
        }
        if let ExampleKind::Pairs { seed, .. } = self.kind {
            let is_cut = |row: &ExampleRow| {
                let at = labelled.binary_search_by_key(row, |l| l.row);
                at.is_ok_and(|at| labelled[at].is_cut)
            };
            for pair in drawn(&labelled, ends, seed) {
                if built.count(self.kind, &pair.map(of), pair.iter().any(is_cut)) {
                    rows.extend(pair);
                }
            }
        } else {
            for l in labelled.iter().filter(|l| l.label == low || l.label == high) {
                if built.count(self.kind, &[of(l.row)], l.is_cut) {
                    rows.push(l.row);
                    built.labels.push(l.label == high);
                }
            }
        }
        built.rows = Some(rows);
        Ok((sink, built))
    }
}
