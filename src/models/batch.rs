//! Sequences packed back to back for one forward pass, and the rows that a head reads.

use std::{borrow::Cow, ops::Range};

use super::{BatchRows, PassShape, Spec, spec::WINDOWS};
use crate::{
    device::{Buffer, Device, Scope, View},
    error::Result,
    ops::{
        attention::{self, Partition, Segment, SegmentBatch},
        next_ids,
        short_conv::SPAN_WORDS,
    },
};

/// A micro-batch under construction. `clear` and `push` reuse its memory.
#[derive(Debug, Default)]
pub struct Batch {
    ids: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<NewRows>,
    pages: Vec<u32>,
    selected: Vec<u32>,
    targets: Vec<u32>,
    offsets: Vec<u32>,
    /// Rows whose ids the last pass drew, and which of its tokens they are.
    drawn: [Vec<u32>; 2],
}

/// Stands for an id that only the device knows; no embedding has such a row.
const UNREAD: u32 = u32::MAX;

/// New rows of a sequence.
#[derive(Clone, Debug)]
struct NewRows {
    first: u32,
    rows: u32,
    at: u32,
    /// Where its keys and values are; none for a whole sequence, which takes the next free pages.
    pages: Option<Range<u32>>,
    /// Where the state of mixers without keys and values is.
    slot: u32,
}

impl Batch {
    /// An empty batch with room for `rows` rows, so that filling it allocates nothing.
    pub fn with_capacity(rows: usize) -> Self {
        let mut batch = Self { sequences: Vec::with_capacity(rows), ..Self::default() };
        batch.columns_mut().into_iter().for_each(|column| column.reserve(rows + 1));
        batch
    }

    pub fn clear(&mut self) {
        self.sequences.clear();
        self.columns_mut().into_iter().for_each(Vec::clear);
    }

    fn columns_mut(&mut self) -> [&mut Vec<u32>; 8] {
        let Self { ids, positions, pages, selected, targets, offsets, drawn: [rows, from], .. } =
            self;
        [ids, positions, pages, selected, targets, offsets, rows, from]
    }

    /// A whole sequence whose tokens `from..` are predicted: rows `from - 1 .. len - 1` are
    /// selected, with the next token as target.
    pub fn push_predicted(&mut self, ids: &[u32], from: usize) {
        let all = from.max(1)..ids.len();
        self.push_masked(ids, &[all]);
    }

    /// A whole sequence whose tokens in `predicted` (ascending positions) are predicted. Rows from
    /// the last predicted token on are not computed: nothing reads them.
    pub fn push_masked(&mut self, ids: &[u32], predicted: &[Range<usize>]) {
        let at = self.ids.len();
        let end = predicted.iter().map(|r| r.end).max().unwrap_or(0).min(ids.len());
        self.push_rows(&ids[..end.saturating_sub(1)], 0, None, 0);
        for t in predicted.iter().cloned().flatten().filter(|t| *t > 0 && *t < ids.len()) {
            self.selected.push((at + t - 1) as u32);
            self.targets.push(ids[t]);
        }
        self.close();
    }

    /// A whole sequence whose last row is selected, where a reward model puts its score.
    pub fn push_last(&mut self, ids: &[u32]) {
        self.push_rows(ids, 0, None, 0);
        if let Some(last) = self.ids.len().checked_sub(1).filter(|_| !ids.is_empty()) {
            self.selected.push(last as u32);
            self.targets.push(0);
        }
        self.close();
    }

    /// Rows of a sequence from position `first` on, for decoding; the last is selected. `pages`
    /// hold the keys and values of the whole sequence, these rows included; `slot` has what mixers
    /// with a state keep of it, from pass to pass.
    pub fn push_cached(&mut self, ids: &[u32], first: usize, pages: &[u32], slot: u32) {
        let start = self.pages.len() as u32;
        self.pages.extend_from_slice(pages);
        self.push_rows(ids, first, Some(start..self.pages.len() as u32), slot);
        self.selected.push(self.ids.len() as u32 - 1);
        self.targets.push(0);
        self.close();
    }

    /// Like [`Batch::push_cached`] with one row, whose id is token `from` of the last pass.
    /// The host need not know it: [`Staged::put_drawn`] copies it on the device.
    pub fn push_drawn(&mut self, from: u32, at: usize, pages: &[u32], slot: u32) {
        let [rows, sources] = &mut self.drawn;
        rows.push(self.ids.len() as u32);
        sources.push(from);
        self.push_cached(&[UNREAD], at, pages, slot);
    }

    fn push_rows(&mut self, ids: &[u32], first: usize, pages: Option<Range<u32>>, slot: u32) {
        let at = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.positions.extend((first..first + ids.len()).map(|p| p as u32));
        let (first, rows) = (first as u32, ids.len() as u32);
        self.sequences.push(NewRows { first, rows, at, pages, slot });
    }

    fn close(&mut self) {
        if self.offsets.is_empty() {
            self.offsets.push(0);
        }
        self.offsets.push(self.selected.len() as u32);
    }

    /// Rows of the pass.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// The shape of a pass over it, if all sequences are whole.
    pub fn shape(&self) -> PassShape {
        let (rows, sequences, selected) = (self.len(), self.sequences(), self.selected.len());
        PassShape { rows, sequences, selected, cached: 0 }
    }

    /// Rows that a head reads.
    pub fn selected(&self) -> &[u32] {
        &self.selected
    }

    /// The token that follows each selected row.
    pub fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// `[sequences + 1]`: where each sequence's selected rows begin.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// Copies the batch to `dev`, for a model of this spec and a cache of `pages` pages.
    pub fn stage<'a>(
        &'a self,
        dev: &Device,
        scope: &'a Scope<'_>,
        spec: &Spec,
        pages: usize,
    ) -> Result<Staged<'a>> {
        let (segments, list) = self.segments(spec.attention().page(dev));
        let mut partitions = <[Partition; WINDOWS]>::default();
        for (partition, shape) in partitions.iter_mut().zip(spec.attentions()) {
            partition.set(dev, &shape, &segments, &list, pages)?;
        }
        let ids = Cow::Borrowed(&self.ids[..]);
        let spans = if spec.keeps_state() { self.spans() } else { Vec::new() };
        let mut staged =
            Staged { batch: self, ids, segments, list, partitions, spans, words: None };
        if let Device::Cuda(_) = dev {
            let mut all = Vec::new();
            for column in staged.columns() {
                all.extend_from_slice(column);
                all.resize(all.len().next_multiple_of(LINE), 0);
            }
            let mut words = scope.alloc(WORDS, all.len())?;
            dev.write(words.view_mut(), &all)?;
            staged.words = Some(words);
        }
        Ok(staged)
    }

    fn spans(&self) -> Vec<u32> {
        let words = |s: &NewRows| [s.at, s.rows, s.first, s.slot];
        self.sequences.iter().flat_map(words).collect()
    }

    fn segments(&self, page: usize) -> (Vec<Segment>, Vec<u32>) {
        let (mut list, mut next) = (self.pages.clone(), 0);
        let segments = self.sequences.iter().map(|s| {
            let pages = s.pages.clone().unwrap_or_else(|| {
                let (start, used) = (list.len() as u32, s.rows.div_ceil(page as u32));
                list.extend(next..next + used);
                next += used;
                start..start + used
            });
            Segment { first: s.first, rows: s.rows, at: s.at, pages, prefix: None }
        });
        (segments.collect(), list)
    }
}

const WORDS: &str = "ids, positions and partitions of a batch";

/// Columns begin at multiples of this many words: a cache line.
const LINE: usize = 16;

/// A batch in the memory of a device.
#[derive(Debug)]
pub struct Staged<'a> {
    batch: &'a Batch,
    /// In host memory, without the ids that only a CUDA device knows.
    ids: Cow<'a, [u32]>,
    segments: Vec<Segment>,
    list: Vec<u32>,
    /// One for each of [`Spec::windows`].
    partitions: [Partition; WINDOWS],
    /// [`SequenceSpan`](crate::ops::short_conv::SequenceSpan)s, where blocks read them.
    spans: Vec<u32>,
    /// All columns, one after another, on a CUDA device.
    words: Option<Buffer<'a, u32>>,
}

impl<'a> Staged<'a> {
    /// Allocates what [`Batch::stage`] does for the largest batch of this shape.
    pub fn plan(
        dev: &Device,
        scope: &'a Scope<'_>,
        spec: &Spec,
        pass_shape: PassShape,
    ) -> Result<()> {
        let Device::Cuda(_) = dev else { return Ok(()) };
        let PassShape { rows, sequences, selected, cached } = pass_shape;
        let mut partitions = [0; WINDOWS];
        for (words, shape) in partitions.iter_mut().zip(spec.attentions()) {
            *words = attention::most_words(dev, &shape, rows, sequences, cached.max(1));
        }
        let [first, second] = partitions;
        let pages = pass_shape.pages(dev, spec);
        // A pass over whole sequences reads no drawn tokens.
        let drawn = if cached > 0 { sequences } else { 0 };
        let spans = if spec.keeps_state() { SPAN_WORDS * sequences } else { 0 };
        let words = [rows, rows, selected, selected, pages, first, second, drawn, drawn, spans];
        let words: usize = words.iter().map(|n| n.next_multiple_of(LINE)).sum();
        scope.alloc::<u32>(WORDS, words).map(drop)
    }

    fn columns(&self) -> [&[u32]; 10] {
        let (b, [rows, from]) = (self.batch, &self.batch.drawn);
        let [first, second] = self.partitions.each_ref().map(Partition::words);
        let (ids, spans) = (&self.ids, &self.spans);
        [ids, &b.positions, &b.selected, &b.targets, &self.list, first, second, rows, from, spans]
    }

    /// Where a column is among the words.
    fn place(&self, i: usize) -> Range<usize> {
        let columns = self.columns();
        let at = columns[..i].iter().map(|c| c.len().next_multiple_of(LINE)).sum();
        at..at + columns[i].len()
    }

    fn column(&self, i: usize) -> View<'_, u32> {
        match &self.words {
            None => self.columns()[i].into(),
            Some(words) => words.view().range(self.place(i)),
        }
    }

    /// Fills in the ids of the rows of [`Batch::push_drawn`] from the tokens of the last pass.
    pub fn put_drawn(&mut self, dev: &Device, tokens: View<'_, u32>) -> Result<()> {
        let [rows, from] = &self.batch.drawn;
        if rows.is_empty() {
            return Ok(());
        }
        let [ids, rows_at, from_at] = [0, 7, 8].map(|i| self.place(i));
        match &mut self.words {
            None => {
                let ids = self.ids.to_mut().into();
                next_ids::forward(dev, ids, rows.into(), from.into(), tokens)
            }
            Some(words) => {
                let (to, behind) = words.view_mut().split_at(ids.end);
                let part = |at: Range<usize>| at.start - ids.end..at.end - ids.end;
                let behind = behind.view();
                let (rows, from) = (behind.range(part(rows_at)), behind.range(part(from_at)));
                next_ids::forward(dev, to, rows, from, tokens)
            }
        }
    }

    /// What the forward pass reads.
    pub fn rows(&self) -> BatchRows<'_> {
        let attention = [0, 1].map(|i| {
            let words = self.words.as_ref();
            let partition = words.map(|_| (&self.partitions[i], self.column(5 + i)));
            SegmentBatch { segments: &self.segments, pages: self.column(4), partition }
        });
        let [ids, positions, selected] = [0, 1, 2].map(|i| self.column(i));
        BatchRows { ids, positions, attention, selected, spans: self.column(9) }
    }

    /// The token that follows each selected row.
    pub fn targets(&self) -> View<'_, u32> {
        self.column(3)
    }
}
