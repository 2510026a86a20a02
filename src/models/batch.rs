//! Sequences packed back to back for one forward pass, and the rows that a head reads.

use std::ops::Range;

use super::Rows;
use crate::ops::attention::{PAGE, Segment, Work};

/// A micro-batch under construction. `clear` and `push` reuse its memory.
#[derive(Debug, Default)]
pub struct Batch {
    ids: Vec<u32>,
    positions: Vec<u32>,
    segments: Vec<Segment>,
    pages: Vec<u32>,
    next_page: u32,
    selected: Vec<u32>,
    targets: Vec<u32>,
    offsets: Vec<u32>,
}

impl Batch {
    /// An empty batch with room for `rows` rows, so that filling it allocates nothing.
    #[must_use]
    pub fn with_capacity(rows: usize) -> Self {
        let v = || Vec::with_capacity(rows + 1);
        Self {
            ids: v(),
            positions: v(),
            segments: Vec::with_capacity(rows),
            pages: v(),
            next_page: 0,
            selected: v(),
            targets: v(),
            offsets: v(),
        }
    }

    /// Forgets all sequences.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.segments.clear();
        self.pages.clear();
        self.next_page = 0;
        self.selected.clear();
        self.targets.clear();
        self.offsets.clear();
    }

    /// A whole sequence whose tokens `from..` are predicted: rows `from - 1 .. len - 1` are
    /// selected, with the next token as target.
    pub fn push_predicted(&mut self, ids: &[u32], from: usize) {
        let all = from.max(1)..ids.len();
        self.push_masked(ids, &[all]);
    }

    /// A whole sequence of which the tokens in `predicted` (ascending positions) are predicted. Rows
    /// from the last predicted token on are not computed: nothing reads them.
    pub fn push_masked(&mut self, ids: &[u32], predicted: &[Range<usize>]) {
        let at = self.ids.len();
        let end = predicted.iter().map(|r| r.end).max().unwrap_or(0).min(ids.len());
        self.push_rows(&ids[..end.saturating_sub(1)]);
        for t in predicted.iter().cloned().flatten().filter(|t| *t > 0 && *t < ids.len()) {
            self.selected.push((at + t - 1) as u32);
            self.targets.push(ids[t]);
        }
        self.close();
    }

    /// A whole sequence whose last row is selected: the place of a reward.
    pub fn push_last(&mut self, ids: &[u32]) {
        self.push_rows(ids);
        if let Some(last) = self.ids.len().checked_sub(1).filter(|_| !ids.is_empty()) {
            self.selected.push(last as u32);
            self.targets.push(0);
        }
        self.close();
    }

    /// New rows of a sequence from position `first` whose keys and values are in `pages`; the last
    /// one is selected. For decoding.
    pub fn push_cached(&mut self, ids: &[u32], first: usize, pages: &[u32]) {
        let at = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.positions.extend((first..first + ids.len()).map(|p| p as u32));
        let start = self.pages.len() as u32;
        let used = (first + ids.len()).div_ceil(PAGE);
        self.pages.extend_from_slice(&pages[..used]);
        self.segments.push(Segment {
            first: first as u32,
            rows: ids.len() as u32,
            at,
            pages: start..start + used as u32,
            prefix: None,
        });
        self.selected.push(at + ids.len() as u32 - 1);
        self.targets.push(0);
        self.close();
    }

    fn push_rows(&mut self, ids: &[u32]) {
        let at = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        let start = self.pages.len() as u32;
        let used = ids.len().div_ceil(PAGE) as u32;
        self.pages.extend(self.next_page..self.next_page + used);
        self.next_page += used;
        let pages = start..start + used;
        let rows = ids.len() as u32;
        self.segments.push(Segment { first: 0, rows, at, pages, prefix: None });
    }

    fn close(&mut self) {
        if self.offsets.is_empty() {
            self.offsets.push(0);
        }
        self.offsets.push(self.selected.len() as u32);
    }

    /// What the forward pass reads.
    #[must_use]
    pub fn rows(&self) -> Rows<'_> {
        Rows {
            ids: (&self.ids).into(),
            positions: (&self.positions).into(),
            attention: Work::new(&self.segments, &self.pages),
        }
    }

    /// Rows of the pass.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// No rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Sequences.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.segments.len()
    }

    /// Pages that a transient cache must have.
    #[must_use]
    pub fn transient_pages(&self) -> usize {
        self.next_page as usize
    }

    /// Rows that a head reads.
    #[must_use]
    pub fn selected(&self) -> &[u32] {
        &self.selected
    }

    /// The token that follows each selected row.
    #[must_use]
    pub fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// `[sequences + 1]`: where each sequence's selected rows begin.
    #[must_use]
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }
}
