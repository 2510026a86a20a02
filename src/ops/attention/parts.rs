//! What a batch of segments gives a device to do.

use std::{cmp::Reverse, fmt, ops::Range};

use super::{Segment, Shape, backward::Plan, check_pages, check_segments, cuda, hopper::Tile};
use crate::{
    device::{Arch, Cuda, Device, View},
    error::{Error, Result},
};

/// A batch's segments, and what a device needs to know of them.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// In the order of their rows.
    pub segments: &'a [Segment],
    /// Ids of the pages of all segments.
    pub pages: View<'a, u32>,
    /// On a CUDA device the parts of these segments, and their [`Parts::words`] there.
    pub parts: Option<(&'a Parts, View<'a, u32>)>,
}

impl<'a> Work<'a> {
    /// For the CPU, which needs no parts.
    pub fn new(segments: &'a [Segment], pages: impl Into<View<'a, u32>>) -> Self {
        Self { segments, pages: pages.into(), parts: None }
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
pub struct Parts {
    words: Vec<u32>,
    of: Option<Of>,
    segments: Vec<Segment>,
    /// Parts of each launch, in this order, of eight words each; the longest first.
    pub(super) launches: [usize; 4],
    /// On Hopper their kernels, and the most positions that one of a kernel's warpgroups has.
    pub(super) tiles: [Option<(Tile, usize)>; 4],
    /// Then five words for each run of rows whose keys and values are written, and for each of
    /// prefixes' rows that are copied.
    pub(super) runs: [usize; 2],
    /// Then what the backward pass does.
    pub(super) backward: Plan,
    /// The most positions that a row sees.
    pub(super) longest: usize,
    /// Rows that go from one launch to the next, and the states of each.
    pub(super) kept: [usize; 2],
}

/// What parts were made for, and fit.
#[derive(Clone, Debug, PartialEq)]
struct Of {
    rows: usize,
    pages: usize,
    page: usize,
    heads: [usize; 3],
    window: Option<u32>,
    arch: Arch,
}

impl Of {
    fn new(cuda: &Cuda, shape: &Shape, rows: usize, pages: usize) -> Self {
        let page = cuda::page(cuda, shape);
        let heads = [shape.q_heads, shape.kv_heads, shape.head_dim];
        Self { rows, pages, page, heads, window: shape.window, arch: cuda.arch() }
    }
}

impl fmt::Display for Of {
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

/// Rows of a run that a block writes to their pages.
const RUN: u32 = 64;

/// A part as kernels read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Part {
    at: u32,
    rows: u32,
    /// Position of the first row.
    first: u32,
    pages: u32,
    /// Pages that are visited.
    begin: u32,
    end: u32,
    /// Of the first row among all rows that are alone.
    slot: u32,
    /// States that it goes on from.
    taken: u32,
    takes: u32,
    /// The state that it leaves.
    gives: Option<u32>,
}

impl Part {
    fn words(&self) -> [u32; 8] {
        let states = self.taken | self.takes << 8 | self.gives.map_or(0, |g| g + 1) << 16;
        let Self { at, rows, first, pages, begin, end, slot, .. } = *self;
        [at, rows, first, pages, begin, end, slot, states]
    }
}

impl Parts {
    /// Of these segments with this list of page ids, of a cache of `pages` pages, on this device:
    /// on the CPU nothing.
    pub fn new(
        dev: &Device,
        shape: &Shape,
        segments: &[Segment],
        list: &[u32],
        pages: usize,
    ) -> Result<Self> {
        let mut parts = Self::default();
        parts.set(dev, shape, segments, list, pages)?;
        Ok(parts)
    }

    /// The same in the memory of earlier ones.
    pub fn set(
        &mut self,
        dev: &Device,
        shape: &Shape,
        segments: &[Segment],
        list: &[u32],
        pages: usize,
    ) -> Result<()> {
        const OP: &str = "attention::Parts";
        let (words, own) = (std::mem::take(&mut self.words), std::mem::take(&mut self.segments));
        *self = Self { words, segments: own, ..Self::default() };
        self.words.clear();
        self.segments.clear();
        let Device::Cuda(cuda) = dev else { return Ok(()) };
        shape.check(OP)?;
        let rows = segments.iter().map(|s| s.rows as usize).sum();
        let page = cuda::page(cuda, shape);
        check_segments(OP, segments, rows, list.len(), page)?;
        check_pages(OP, segments, list, pages)?;
        self.of = Some(Of::new(cuda, shape, rows, pages));
        self.segments.extend_from_slice(segments);
        let launches = self.divide(cuda, shape, segments, list);
        for (mut parts, count) in launches.into_iter().zip(&mut self.launches) {
            // What is left at the end is short.
            parts.sort_by_key(|p| Reverse(p.end - p.begin));
            self.words.extend(parts.iter().flat_map(Part::words));
            *count = parts.len();
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
        self.backward = Plan::new(cuda, shape, segments, &mut self.words);
        Ok(())
    }

    /// The parts of each launch.
    fn divide(
        &mut self,
        cuda: &Cuda,
        shape: &Shape,
        segments: &[Segment],
        list: &[u32],
    ) -> [Vec<Part>; 4] {
        let (page, most) = (cuda::page(cuda, shape), (cuda::ROWS / shape.group()).max(1));
        let mut tiling = Tiling {
            page: page as u32,
            split: (cuda::SPLIT / page) as u32,
            rows: most as u32,
            windowed: shape.window.is_some(),
            fair: 0,
        };
        let common = tiling.common(segments, list);
        let mut long = most;
        if cuda.arch() == Arch::Sm90 {
            let group = common.iter().map(|c| c.of.min(tiling.rows)).max().unwrap_or(0);
            let rows = segments.iter().map(|s| s.rows).max().unwrap_or(0);
            let (own, tile) = (group.max(1) as usize, Tile::of(rows as usize, most));
            // What has few rows brings no more of them.
            let wide = if tile == Tile::Narrow { (rows as usize).max(1) } else { most };
            let narrow = Some((Tile::Narrow, own));
            self.tiles = [narrow, narrow, Some((tile, wide)), narrow];
            (tiling.rows, long) = (own as u32, tile.warpgroups() * wide);
        }
        let pages = |s: &Segment| (s.first + s.rows).div_ceil(tiling.page) as usize;
        let all: usize = segments.iter().filter(|s| s.rows == 1).map(pages).sum();
        tiling.fair = (all * shape.kv_heads).div_ceil(cuda.processors() as usize) as u32;
        let mut launches: [Vec<Part>; 4] = Default::default();
        for (s, common) in segments.iter().zip(&common) {
            self.longest = self.longest.max((s.first + s.rows) as usize);
            if s.rows == 1 {
                let all = tiling.rows_of(shape, s, 0..1);
                let slot = self.kept[0] as u32;
                let states = tiling.single(&mut launches, Part { slot, ..all }, *common);
                self.kept[0] += usize::from(states > 0);
                self.kept[1] = self.kept[1].max(states as usize);
                continue;
            }
            let rows = (0..s.rows).step_by(long);
            let end = |row: u32| s.rows.min(row + long as u32);
            launches[2].extend(rows.map(|row| tiling.rows_of(shape, s, row..end(row))));
        }
        launches
    }

    /// Whether they are for this, the pages too where those are given.
    pub(super) fn check(
        &self,
        op: &str,
        cuda: &Cuda,
        shape: &Shape,
        segments: &[Segment],
        pages: Option<usize>,
    ) -> Result<()> {
        let own = self.of.as_ref().map_or(0, |of| of.pages);
        let rows = segments.iter().map(|s| s.rows as usize).sum();
        let want = Of::new(cuda, shape, rows, pages.map_or(own, |have| have.min(own)));
        if self.of.as_ref() != Some(&want) {
            let got = self.of.as_ref().map_or("none".into(), |of| format!("those of {of}"));
            return Err(Error::value(format!("{op}: parts"), format!("those of {want}"), got));
        }
        // Others of as many rows would be divided otherwise.
        let segment =
            |of: &[Segment], i: usize| of.get(i).map_or("none".into(), |s| format!("{s:?}"));
        let both = self.segments.len().max(segments.len());
        match (0..both).find(|i| self.segments.get(*i) != segments.get(*i)) {
            None => Ok(()),
            Some(i) => {
                let what = format!("{op}: segment {i} of the parts");
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

/// The most words of [`Parts`] of up to `rows` rows in up to `segments` segments of up to
/// `positions` positions, without prefixes.
pub fn most_words(
    dev: &Device,
    shape: &Shape,
    rows: usize,
    segments: usize,
    positions: usize,
) -> usize {
    let Device::Cuda(cuda) = dev else { return 0 };
    let most = (cuda::ROWS / shape.group()).max(1);
    // What a row sees is split, and so is what its group has in common.
    let splits = positions.div_ceil(cuda::SPLIT) + 1;
    let forward = rows.div_ceil(most) + segments * (2 * splits + 3);
    let runs = rows.div_ceil(RUN as usize) + segments;
    // A tile of keys and its visit.
    let backward = 2 * (rows.div_ceil(super::backward::keys(cuda, shape)) + segments);
    8 * (forward + backward) + 5 * runs
}

/// What parts are made by.
struct Tiling {
    /// Positions of a page.
    page: u32,
    /// Pages after which a row's softmax starts anew.
    split: u32,
    /// Rows of a part.
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
    fn rows_of(&self, shape: &Shape, s: &Segment, rows: Range<u32>) -> Part {
        let (first, at, rows) = (s.first + rows.start, s.at + rows.start, rows.len() as u32);
        Part {
            at,
            rows,
            first,
            pages: s.pages.start,
            begin: shape.sees_from(first as usize) as u32 / self.page,
            end: (first + rows).div_ceil(self.page),
            ..Part::default()
        }
    }

    /// Splits of these pages, of which the last may be in part; none if kernels can't count them.
    fn splits(&self, pages: u32) -> Option<u32> {
        Some(pages.div_ceil(self.split)).filter(|n| *n < 256)
    }

    /// Of each segment what it has in common with its neighbours: whole pages that they list alike,
    /// all before the row's position.
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

    /// The parts of a row that is alone in its segment, and how many states it leaves.
    fn single(&self, launches: &mut [Vec<Part>; 4], all: Part, common: Common) -> u32 {
        let c = common.pages;
        if c > 0 && common.place.is_multiple_of(self.rows) {
            // The group's first row, or the next that no longer fits its part: they see all of
            // these pages.
            let rows = self.rows.min(common.of - common.place);
            for i in 0..c.div_ceil(self.split) {
                let (begin, end) = (i * self.split, c.min((i + 1) * self.split));
                let first = c * self.page;
                launches[0].push(Part { rows, first, begin, end, gives: Some(i), ..all });
            }
        }
        let states = self.splits(all.end).filter(|n| *n > 1 && !self.windowed);
        let Some(states) = states.filter(|_| all.end > self.fair || c > self.split) else {
            let takes = u32::from(c > 0);
            launches[1].push(Part { begin: all.begin.max(c), takes, ..all });
            return takes;
        };
        for i in c / self.split..states {
            let (begin, end) = (c.max(i * self.split), all.end.min((i + 1) * self.split));
            // The last one of what is in common may go on.
            let takes = u32::from(c > i * self.split);
            if end > begin {
                launches[1].push(Part { begin, end, taken: i, takes, gives: Some(i), ..all });
            }
        }
        launches[3].push(Part { begin: 0, end: 0, takes: states, ..all });
        states
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
