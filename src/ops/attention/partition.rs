//! How the rows of a batch are divided among the blocks of a CUDA device.

use std::{cmp::Reverse, fmt, ops::Range};

use super::{
    ROWS, SPLIT, Segment, Shape,
    backward_plan::{self, BackwardPlan},
    check_pages, check_segments, sm80,
    sm90::{self, ForwardTile},
};
use crate::{
    device::{Arch, Cuda, Device, View},
    error::{Error, Result},
};

/// The segments of a batch, their pages and, on a CUDA device, their partition.
#[derive(Clone, Copy, Debug)]
pub struct SegmentBatch<'a> {
    /// In the order of their rows.
    pub segments: &'a [Segment],
    /// Ids of the pages of all segments.
    pub pages: View<'a, u32>,
    /// The partition of these segments, and its [`Partition::words`] on the device; none on the
    /// CPU.
    pub partition: Option<(&'a Partition, View<'a, u32>)>,
}

impl<'a> SegmentBatch<'a> {
    /// For the CPU, which needs no partition.
    pub fn new(segments: &'a [Segment], pages: impl Into<View<'a, u32>>) -> Self {
        Self { segments, pages: pages.into(), partition: None }
    }
}

/// How the rows of a batch are divided among the blocks of a CUDA device: made once, for all layers
/// of a shape.
///
/// Rows attend in up to four launches. First what the sequences of a group see in common: pages
/// that they list alike are read once for all of them, where each has a single row, as in decoding.
/// Then all single rows, those of a group from where that ended, and the rows of longer segments. A
/// row that would keep one block busy when the others are done is split by positions, and the last
/// launch merges. Softmax starts anew at the same positions in every case, so that no bit depends
/// on the way taken.
#[derive(Clone, Debug, Default)]
pub struct Partition {
    words: Vec<u32>,
    key: Option<PartitionKey>,
    segments: Vec<Segment>,
    /// Work tiles of each launch, in this order, of eight words each; the longest first.
    pub(super) launches: [usize; 4],
    /// On Hopper their kernels, and the most positions of a warpgroup.
    pub(super) tiles: [Option<(ForwardTile, usize)>; 4],
    /// Runs of rows whose keys and values are written, and of prefixes' rows that are copied: five
    /// words each, after the tiles.
    pub(super) runs: [usize; 2],
    /// Its words come last.
    pub(super) backward: BackwardPlan,
    /// The most positions that a row sees.
    pub(super) longest: usize,
    /// Rows that one launch leaves partials of for the next, and the most partials of a row.
    pub(super) partials: [usize; 2],
}

/// What a partition was made for.
#[derive(Clone, Debug, PartialEq)]
struct PartitionKey {
    rows: usize,
    pages: usize,
    page: usize,
    heads: [usize; 3],
    window: Option<u32>,
    arch: Arch,
}

impl PartitionKey {
    fn new(cuda: &Cuda, shape: &Shape, rows: usize, pages: usize) -> Self {
        let page = page(cuda, shape);
        let heads = [shape.q_heads, shape.kv_heads, shape.head_dim];
        Self { rows, pages, page, heads, window: shape.window, arch: cuda.arch() }
    }
}

impl fmt::Display for PartitionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([q, kv, d], family) = (self.heads, self.arch.name());
        write!(f, "{} rows, {q}/{kv} heads of {d}, ", self.rows)?;
        match self.window {
            Some(window) => write!(f, "a window of {window}, ")?,
            None => write!(f, "no window, ")?,
        }
        write!(f, "{} pages of {}, on {family}", self.pages, self.page)
    }
}

/// Positions of a page, and of a step of attention.
pub(super) fn page(cuda: &Cuda, shape: &Shape) -> usize {
    match cuda.arch() {
        Arch::Sm80 => sm80::PAGE,
        Arch::Sm90 => sm90::page(shape.head_dim),
    }
}

/// Rows of a run that a block writes to their pages.
const RUN: u32 = 64;

/// Rows that attend together, as kernels read them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct WorkTile {
    at: u32,
    rows: u32,
    /// Position of the first row.
    first: u32,
    pages: u32,
    /// Pages [begin, end) that are visited.
    begin: u32,
    end: u32,
    /// Number of the first row among the rows that are alone in their segments.
    slot: u32,
    /// Split-KV partials that it merges first.
    first_read: u32,
    reads: u32,
    /// The partial that it leaves.
    writes: Option<u32>,
}

impl WorkTile {
    fn words(&self) -> [u32; 8] {
        let partials = self.first_read | self.reads << 8 | self.writes.map_or(0, |g| g + 1) << 16;
        let Self { at, rows, first, pages, begin, end, slot, .. } = *self;
        [at, rows, first, pages, begin, end, slot, partials]
    }
}

impl Partition {
    /// The partition of these segments with this list of page ids, of a cache of `pages` pages, on
    /// this device; empty on the CPU.
    pub fn new(
        dev: &Device,
        shape: &Shape,
        segments: &[Segment],
        list: &[u32],
        pages: usize,
    ) -> Result<Self> {
        let mut partition = Self::default();
        partition.set(dev, shape, segments, list, pages)?;
        Ok(partition)
    }

    /// The same in the memory of an earlier one.
    pub fn set(
        &mut self,
        dev: &Device,
        shape: &Shape,
        segments: &[Segment],
        list: &[u32],
        pages: usize,
    ) -> Result<()> {
        const OP: &str = "attention::Partition";
        let (words, own) = (std::mem::take(&mut self.words), std::mem::take(&mut self.segments));
        *self = Self { words, segments: own, ..Self::default() };
        self.words.clear();
        self.segments.clear();
        let Device::Cuda(cuda) = dev else { return Ok(()) };
        shape.check(OP)?;
        let rows = segments.iter().map(|s| s.rows as usize).sum();
        let page = page(cuda, shape);
        check_segments(OP, segments, rows, list.len(), page)?;
        check_pages(OP, segments, list, pages)?;
        self.key = Some(PartitionKey::new(cuda, shape, rows, pages));
        self.segments.extend_from_slice(segments);
        let launches = self.divide(cuda, shape, segments, list);
        for (mut tiles, count) in launches.into_iter().zip(&mut self.launches) {
            // The longest first: the last ones to end are short.
            tiles.sort_by_key(|p| Reverse(p.end - p.begin));
            self.words.extend(tiles.iter().flat_map(WorkTile::words));
            *count = tiles.len();
        }
        for (copied, runs) in [false, true].into_iter().zip(&mut self.runs) {
            for w in written(segments, page).filter(|w| w.copied == copied) {
                for row in (0..w.rows).step_by(RUN as usize) {
                    let rows = RUN.min(w.rows - row);
                    let zeros = if row + rows == w.rows { w.zeros } else { 0 };
                    self.words.extend([w.at + row, rows, w.first + row, w.pages, zeros]);
                    *runs += 1;
                }
            }
        }
        self.backward = BackwardPlan::new(cuda, shape, segments, &mut self.words);
        Ok(())
    }

    /// The work tiles of each launch.
    fn divide(
        &mut self,
        cuda: &Cuda,
        shape: &Shape,
        segments: &[Segment],
        list: &[u32],
    ) -> [Vec<WorkTile>; 4] {
        let (page, most) = (page(cuda, shape), (ROWS / shape.group()).max(1));
        let mut tiling = Tiling {
            page: page as u32,
            split: (SPLIT / page) as u32,
            rows: most as u32,
            windowed: shape.window.is_some(),
            fair: 0,
        };
        let common = tiling.common(segments, list);
        let mut long = most;
        if cuda.arch() == Arch::Sm90 {
            let group = common.iter().map(|c| c.of.min(tiling.rows)).max().unwrap_or(0);
            let rows = segments.iter().map(|s| s.rows).max().unwrap_or(0);
            let (own, tile) = (group.max(1) as usize, ForwardTile::of(rows as usize, most));
            // Where rows are few, no more are loaded.
            let high = if tile == ForwardTile::Decode { (rows as usize).max(1) } else { most };
            let decode = Some((ForwardTile::Decode, own));
            self.tiles = [decode, decode, Some((tile, high)), decode];
            (tiling.rows, long) = (own as u32, tile.warpgroups() * high);
        }
        let pages = |s: &Segment| (s.first + s.rows).div_ceil(tiling.page) as usize;
        let all: usize = segments.iter().filter(|s| s.rows == 1).map(pages).sum();
        tiling.fair = (all * shape.kv_heads).div_ceil(cuda.processors() as usize) as u32;
        let mut launches: [Vec<WorkTile>; 4] = Default::default();
        for (s, common) in segments.iter().zip(&common) {
            self.longest = self.longest.max((s.first + s.rows) as usize);
            if s.rows == 1 {
                let all = tiling.rows_of(shape, s, 0..1);
                let slot = self.partials[0] as u32;
                let partials = tiling.single(&mut launches, WorkTile { slot, ..all }, *common);
                self.partials[0] += usize::from(partials > 0);
                self.partials[1] = self.partials[1].max(partials as usize);
                continue;
            }
            let rows = (0..s.rows).step_by(long);
            let end = |row: u32| s.rows.min(row + long as u32);
            launches[2].extend(rows.map(|row| tiling.rows_of(shape, s, row..end(row))));
        }
        launches
    }

    /// Refuses other segments, another shape or device, and other pages where those are given.
    pub(super) fn check(
        &self,
        op: &str,
        cuda: &Cuda,
        shape: &Shape,
        segments: &[Segment],
        pages: Option<usize>,
    ) -> Result<()> {
        let own = self.key.as_ref().map_or(0, |of| of.pages);
        let rows = segments.iter().map(|s| s.rows as usize).sum();
        let want = PartitionKey::new(cuda, shape, rows, pages.map_or(own, |have| have.min(own)));
        if self.key.as_ref() != Some(&want) {
            let got = self.key.as_ref().map_or("none".into(), |of| format!("that of {of}"));
            return Err(Error::value(format!("{op}: partition"), format!("that of {want}"), got));
        }
        // Others of as many rows would be divided otherwise.
        let segment =
            |of: &[Segment], i: usize| of.get(i).map_or("none".into(), |s| format!("{s:?}"));
        let both = self.segments.len().max(segments.len());
        match (0..both).find(|i| self.segments.get(*i) != segments.get(*i)) {
            None => Ok(()),
            Some(i) => {
                let what = format!("{op}: segment {i} of the partition");
                Err(Error::value(what, segment(segments, i), segment(&self.segments, i)))
            }
        }
    }

    /// Where the words of runs begin, and those of the backward pass.
    pub(super) fn begins(&self) -> [usize; 2] {
        let runs = 8 * self.launches.iter().sum::<usize>();
        [runs, runs + 5 * self.runs.iter().sum::<usize>()]
    }

    /// What the device is given.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

/// The most words of [`Partition`] of up to `rows` rows in up to `segments` segments of up to
/// `positions` positions, without prefixes.
pub fn most_words(
    dev: &Device,
    shape: &Shape,
    rows: usize,
    segments: usize,
    positions: usize,
) -> usize {
    let Device::Cuda(cuda) = dev else { return 0 };
    let most = (ROWS / shape.group()).max(1);
    // What a row sees is split, and so is what its group has in common.
    let splits = positions.div_ceil(SPLIT) + 1;
    let forward = rows.div_ceil(most) + segments * (2 * splits + 3);
    let runs = rows.div_ceil(RUN as usize) + segments;
    // A tile of keys and its visit.
    let backward = 2 * (rows.div_ceil(backward_plan::keys(cuda, shape)) + segments);
    8 * (forward + backward) + 5 * runs
}

/// The sizes of work tiles.
struct Tiling {
    /// Positions of a page.
    page: u32,
    /// Pages after which a row's softmax starts anew.
    split: u32,
    /// Rows of a tile.
    rows: u32,
    windowed: bool,
    /// Pages of single rows for each multiprocessor.
    fair: u32,
}

/// The pages that a segment's group has in common, and its place in the group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Common {
    pages: u32,
    place: u32,
    of: u32,
}

impl Tiling {
    fn rows_of(&self, shape: &Shape, s: &Segment, rows: Range<u32>) -> WorkTile {
        let (first, at, rows) = (s.first + rows.start, s.at + rows.start, rows.len() as u32);
        WorkTile {
            at,
            rows,
            first,
            pages: s.pages.start,
            begin: shape.sees_from(first as usize) as u32 / self.page,
            end: (first + rows).div_ceil(self.page),
            ..WorkTile::default()
        }
    }

    /// Splits of these pages, of which the last may be in part; none if kernels can't count them.
    fn splits(&self, pages: u32) -> Option<u32> {
        Some(pages.div_ceil(self.split)).filter(|n| *n < 256)
    }

    /// What each segment has in common with its neighbours: whole pages that they list alike, all
    /// before the row's position.
    fn common(&self, segments: &[Segment], list: &[u32]) -> Vec<Common> {
        let mut all = vec![Common::default(); segments.len()];
        let pages = |s: &Segment| {
            let whole = (s.first + 1) / self.page;
            let single = s.rows == 1 && !self.windowed && self.splits(whole + 1).is_some();
            let start = s.pages.start as usize;
            let ids = list.get(start..start + whole as usize).filter(|_| single);
            ids.unwrap_or(&[])
        };
        let mut i = 0;
        while i < segments.len() {
            let first = pages(&segments[i]);
            let (mut n, mut shared) = (1, first.len());
            while let Some(next) = segments.get(i + n) {
                let alike = first.iter().zip(pages(next)).take_while(|(a, b)| a == b).count();
                // Others that have less in common, as a system prompt, would cost the group what it
                // has.
                if alike == 0 || n > 1 && (n + 1) * shared.min(alike) < n * shared {
                    break;
                }
                (n, shared) = (n + 1, shared.min(alike));
            }
            if n > 1 && shared > 0 {
                for (place, c) in all[i..i + n].iter_mut().enumerate() {
                    *c = Common { pages: shared as u32, place: place as u32, of: n as u32 };
                }
            }
            i += n;
        }
        all
    }

    /// The tiles of a row that is alone in its segment, and how many partials it leaves.
    fn single(&self, launches: &mut [Vec<WorkTile>; 4], all: WorkTile, common: Common) -> u32 {
        let c = common.pages;
        if c > 0 && common.place.is_multiple_of(self.rows) {
            // The group's first row, or the next that no longer fits its tile: they see all of
            // these pages.
            let rows = self.rows.min(common.of - common.place);
            for i in 0..c.div_ceil(self.split) {
                let (begin, end) = (i * self.split, c.min((i + 1) * self.split));
                let first = c * self.page;
                launches[0].push(WorkTile { rows, first, begin, end, writes: Some(i), ..all });
            }
        }
        let partials = self.splits(all.end).filter(|n| *n > 1 && !self.windowed);
        let Some(partials) = partials.filter(|_| all.end > self.fair || c > self.split) else {
            let reads = u32::from(c > 0);
            launches[1].push(WorkTile { begin: all.begin.max(c), reads, ..all });
            return reads;
        };
        for i in c / self.split..partials {
            let (begin, end) = (c.max(i * self.split), all.end.min((i + 1) * self.split));
            // The last one of what is in common may go on.
            let reads = u32::from(c > i * self.split);
            if end > begin {
                launches[1].push(WorkTile {
                    begin,
                    end,
                    first_read: i,
                    reads,
                    writes: Some(i),
                    ..all
                });
            }
        }
        launches[3].push(WorkTile { begin: 0, end: 0, reads: partials, ..all });
        partials
    }
}

/// Rows of the batch that go to pages: positions `first ..`, pages of the list from `pages` on.
/// After them `zeros` positions up to the end of a page that is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub at: u32,
    pub rows: u32,
    pub first: u32,
    pub pages: u32,
    pub zeros: u32,
    pub copied: bool,
}

/// All rows that are written: those of each segment, and before them what its prefix has on the
/// page that it begins on.
pub(super) fn written(segments: &[Segment], page: usize) -> impl Iterator<Item = Written> + '_ {
    let page = page as u32;
    segments.iter().flat_map(move |s| {
        let end = s.first + s.rows;
        let begun = s.prefix.map_or(s.first.div_ceil(page), |_| s.first / page);
        let rest = end.next_multiple_of(page) - end;
        let zeros = if end > begun * page { rest } else { 0 };
        let Segment { at, rows, first, .. } = *s;
        let own = Written { at, rows, first, pages: s.pages.start, zeros, copied: false };
        let copied = s.prefix.map(|p| &segments[p as usize]).and_then(|before| {
            let rows = s.first % page;
            let at = before.at + before.rows - rows;
            // Zeros are written once, after the last row.
            let zeros = if s.rows > 0 { 0 } else { zeros };
            let first = s.first - rows;
            (rows > 0).then_some(Written { at, rows, first, zeros, copied: true, ..own })
        });
        [copied, (s.rows > 0).then_some(own)].into_iter().flatten()
    })
}
