//! Causal attention with grouped queries over packed sequences and a paged KV cache.
//!
//! `out[r, h] = sum_j softmax_j(s[r, j]) v[j, g]`, `s[r, j] = scale q[r, h] . k[j, g]`, or
//! `cap tanh(s / cap)` of that, `g = h / group`; j runs over the positions up to r's own, or over
//! the last `window` of them.
//! (Vaswani et al. 2017, eq. 1; groups: Ainslie et al. 2023; online softmax: Milakov and
//! Gimelshein 2018; window: Beltagy et al. 2020; soft-cap: Gemma Team 2024)
//!
//! Training, prefill and decoding are one code path: new keys and values are written to the cache,
//! then each row visits the pages of its own sequence from absolute position 0. A page's
//! contribution to a row depends on that row alone, and masked entries add exact zeros, so a row
//! has the same bits in a batch of whole sequences, in chunks, or alone. On a CUDA device softmax starts
//! anew each 1024 positions and is merged in ascending order, so that few long sequences keep all of it busy.

mod backward;
mod cuda;
mod hopper;
mod parts;

pub use parts::{Parts, Work};

use std::ops::Range;

use crate::{
    device::{
        Buffer, Device, Element, Float, Scope, View, ViewMut,
        cpu::{
            Cpu, Isa,
            gemm::{self, Lhs, NR, Rhs},
            math,
        },
    },
    error::{Error, Result},
    ops::rope,
    shape, simd,
};

/// Positions of a page on the CPU: the width of a packed panel, so that a page of keys is one.
pub const PAGE: usize = NR;

/// The widest head: a panel of one page must fit the stack.
pub const MAX_HEAD_DIM: usize = 256;

/// Rows of queries that visit a page together.
const TILE: usize = 24;

/// What an attention layer computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Heads of queries.
    pub q_heads: usize,
    /// Heads of keys and values; divides `q_heads`.
    pub kv_heads: usize,
    /// Width of a head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f64,
    /// Bounds the scores: `cap tanh(s / cap)`.
    pub softcap: Option<f64>,
    /// Positions that a row sees, its own included; none is all.
    pub window: Option<u32>,
}

impl Shape {
    /// Columns of a row of queries, keys and values.
    #[must_use]
    pub fn qkv_cols(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Positions of a page on `dev`: those of one step of attention there.
    #[must_use]
    pub fn page(&self, dev: &Device) -> usize {
        match dev {
            Device::Cpu(_) => PAGE,
            Device::Cuda(cuda) => cuda::page(cuda, self),
        }
    }

    fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// Elements of a page of keys: `[kv_heads][head_dim][PAGE]`, each head one packed panel.
    fn k_page(&self) -> usize {
        self.kv_heads * self.head_dim * PAGE
    }

    /// Panels of a head's values.
    fn v_panels(&self) -> usize {
        self.head_dim.div_ceil(NR)
    }

    /// Elements of a page of values: `[kv_heads][panels][PAGE][32]`.
    fn v_page(&self) -> usize {
        self.kv_heads * self.v_panels() * PAGE * NR
    }

    fn check(&self, op: &'static str) -> Result<()> {
        let ok = self.kv_heads > 0
            && self.q_heads.is_multiple_of(self.kv_heads)
            && (1..=MAX_HEAD_DIM).contains(&self.head_dim)
            && self.softcap.is_none_or(|cap| cap > 0.0 && cap.is_finite())
            && self.window != Some(0);
        if ok {
            return Ok(());
        }
        let want = format!(
            "heads in whole groups, head_dim from 1 to {MAX_HEAD_DIM}, a positive softcap and window"
        );
        Err(Error::value(format!("{op}: shape"), want, format!("{self:?}")))
    }

    /// The first position that a row at position `p` sees.
    fn sees_from(&self, p: usize) -> usize {
        self.window.map_or(0, |w| (p + 1).saturating_sub(w as usize))
    }
}

/// Keys and values of one layer.
#[derive(Debug)]
pub struct KvLayer<'s, T> {
    k: Buffer<'s, T>,
    v: Buffer<'s, T>,
    /// Positions of a page.
    page: usize,
}

impl<'s, T: Element> KvLayer<'s, T> {
    /// Room for `pages` pages of `page` positions, which is [`Shape::page`] of the device.
    ///
    /// # Errors
    /// [`Error::Memory`] if the plan has no room.
    pub fn new(scope: &'s Scope<'_>, shape: &Shape, page: usize, pages: usize) -> Result<Self> {
        let plain = shape.kv_heads * shape.head_dim * page;
        let (k, v) = if page == PAGE { (shape.k_page(), shape.v_page()) } else { (plain, plain) };
        Ok(Self {
            k: scope.alloc("KV cache, keys", pages * k)?,
            v: scope.alloc("KV cache, values", pages * v)?,
            page,
        })
    }

    /// Pages.
    fn pages(&self, shape: &Shape) -> usize {
        self.k.len() / (shape.kv_heads * shape.head_dim * self.page)
    }

    fn check(&self, op: &'static str, dev: &Device, shape: &Shape) -> Result<()> {
        let want = shape.page(dev);
        if self.page == want {
            return Ok(());
        }
        Err(Error::value(format!("{op}: positions of a page"), want.to_string(), self.page))
    }
}

/// Consecutive rows of a batch that are consecutive positions of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Position of its first row.
    pub first: u32,
    /// Rows.
    pub rows: u32,
    /// Its first row in the batch.
    pub at: u32,
    /// Its pages, as a range of the list of page ids: they cover positions `0 .. first + rows`.
    pub pages: Range<u32>,
    /// The earlier segment of the batch that holds positions `0 .. first`, for several sequences that
    /// begin with the same tokens. Whole pages of it may be in the list; the page of position `first`
    /// is the segment's own, and [`append`] copies there what comes before, even if it has no rows yet.
    pub prefix: Option<u32>,
}

impl Segment {
    fn batch_rows(&self) -> Range<usize> {
        self.at as usize..(self.at + self.rows) as usize
    }
}

/// Checks that segments cover `rows` rows in order, and that prefixes come before.
fn check_rows(op: &'static str, segments: &[Segment], rows: usize) -> Result<()> {
    let mut next = 0;
    for (i, s) in segments.iter().enumerate() {
        if s.at != next {
            let what = format!("{op}: first row of segment {i}");
            return Err(Error::value(what, next.to_string(), s.at));
        }
        next = s.at.saturating_add(s.rows);
        let Some(p) = s.prefix else { continue };
        let before = segments[..i].get(p as usize);
        if !before.is_some_and(|b| b.first == 0 && b.rows == s.first && b.prefix.is_none()) {
            let want = format!("an earlier one of positions 0 to {}", s.first);
            let got = before.map_or(format!("{p}"), |b| format!("{p}, {} of {}", b.first, b.rows));
            return Err(Error::value(format!("{op}: prefix of segment {i}"), want, got));
        }
    }
    if next as usize == rows {
        return Ok(());
    }
    Err(Error::value(format!("{op}: rows of all segments"), rows.to_string(), next))
}

/// As [`check_rows`], and that each segment lists the pages that it needs, in a list of `listed`.
fn check_segments(
    op: &'static str,
    segments: &[Segment],
    rows: usize,
    listed: usize,
    page: usize,
) -> Result<()> {
    check_rows(op, segments, rows)?;
    for (i, s) in segments.iter().enumerate() {
        let used = (s.first as usize + s.rows as usize).div_ceil(page);
        let range = s.pages.start as usize..s.pages.end as usize;
        if range.end > listed || range.start > range.end || range.len() < used {
            let want = format!("{used} within a list of {listed}");
            let what = format!("{op}: pages of segment {i}");
            return Err(Error::value(what, want, format!("{:?}", s.pages)));
        }
    }
    Ok(())
}

/// Checks that the pages of all segments are below `pages`.
fn check_pages(op: &str, segments: &[Segment], list: &[u32], pages: usize) -> Result<()> {
    for (i, s) in segments.iter().enumerate() {
        let ids = &list[s.pages.start as usize..s.pages.end as usize];
        if let Some(id) = ids.iter().find(|id| **id as usize >= pages) {
            let what = format!("{op}: page id of segment {i}");
            return Err(Error::value(what, format!("less than {pages}"), id));
        }
    }
    Ok(())
}

/// As [`check_segments`], with the ids of pages: on a CUDA device [`Parts`] has looked at those.
fn check_work(
    op: &'static str,
    work: &Work<'_>,
    rows: usize,
    (page, pages): (usize, usize),
    dev: &Device,
) -> Result<()> {
    check_segments(op, work.segments, rows, work.pages.len(), page)?;
    match dev {
        Device::Cpu(_) => check_pages(op, work.segments, work.pages.host(), pages),
        Device::Cuda(_) => Ok(()),
    }
}

/// Writes keys and values of new rows to their pages. `qkv` `[rows, (q_heads + 2 kv_heads)
/// head_dim]` holds queries, keys and values side by side; with `turn`, the positions of the rows and
/// their angles, queries and keys are turned in place before, with the bits of [`rope::forward`]. A CUDA
/// device takes the positions from the segments, which are the same.
///
/// # Errors
/// [`Error::Shape`] if `qkv` does not fit, [`Error::Value`] if segments or pages do not; as
/// [`rope::forward`] for a position beyond the table, whose heads become NaN on a CUDA device instead.
pub fn append<T: Element>(
    dev: &Device,
    kv: &mut KvLayer<'_, T>,
    mut qkv: ViewMut<'_, T>,
    work: Work<'_>,
    shape: &Shape,
    turn: Option<(View<'_, u32>, &rope::Table<T::Acc>)>,
) -> Result<()> {
    const OP: &str = "attention::append";
    shape.check(OP)?;
    kv.check(OP, dev, shape)?;
    let rows = shape::rows(OP, "qkv", qkv.len(), shape.qkv_cols())?;
    let total = kv.pages(shape);
    check_work(OP, &work, rows, (kv.page, total), dev)?;
    match dev {
        Device::Cpu(cpu) => {
            if let Some((positions, table)) = turn {
                let (cols, heads) = (shape.qkv_cols(), shape.q_heads + shape.kv_heads);
                let (qkv, d) = (qkv.reborrow(), shape.head_dim);
                rope::forward(dev, qkv, cols, heads, d, positions, table)?;
            }
            let (k, v) = (kv.k.view_mut().float()?.host(), kv.v.view_mut().float()?.host());
            append_on_cpu(cpu, k, v, qkv.view().float()?.host(), work, shape);
            Ok(())
        }
        Device::Cuda(cuda) => cuda::append(cuda, kv, qkv, work, shape, turn.map(|(_, t)| t)),
    }
}

fn append_on_cpu<F: Float>(
    cpu: &Cpu,
    k: &mut [F],
    v: &mut [F],
    qkv: &[F],
    work: Work<'_>,
    shape: &Shape,
) {
    let (k_page, v_page, cols) = (shape.k_page(), shape.v_page(), shape.qkv_cols());
    let (total, list) = (k.len() / k_page, work.pages.host());
    // A task owns a range of pages and copies the rows that belong there.
    cpu.rows(total, 1, ((k, k_page), (v, v_page)), |range, (k, v)| {
        for s in parts::written(work.segments, PAGE) {
            let (first, end) = (s.first as usize, (s.first + s.rows) as usize);
            for p in first / PAGE..end.div_ceil(PAGE) {
                let id = list[s.pages as usize + p] as usize;
                if !range.contains(&id) {
                    continue;
                }
                let k = &mut k[(id - range.start) * k_page..][..k_page];
                let v = &mut v[(id - range.start) * v_page..][..v_page];
                for position in first.max(p * PAGE)..end.min((p + 1) * PAGE) {
                    let row = s.at as usize + position - first;
                    let row = &qkv[row * cols..][..cols];
                    write_row(k, v, row, position % PAGE, shape);
                }
            }
        }
    });
}

fn write_row<F: Float>(k: &mut [F], v: &mut [F], row: &[F], slot: usize, shape: &Shape) {
    let (d, panels) = (shape.head_dim, shape.v_panels());
    let (keys, values) = row[shape.q_heads * d..].split_at(shape.kv_heads * d);
    for h in 0..shape.kv_heads {
        let page = &mut k[h * d * PAGE..][..d * PAGE];
        for (i, x) in keys[h * d..][..d].iter().enumerate() {
            page[i * PAGE + slot] = *x;
        }
        let page = &mut v[h * panels * PAGE * NR..][..panels * PAGE * NR];
        for (p, x) in values[h * d..][..d].chunks(NR).enumerate() {
            page[(p * PAGE + slot) * NR..][..x.len()].copy_from_slice(x);
        }
    }
}

/// Elements of scratch that [`forward`] needs on `dev` for batches in which at most `singles` segments have one
/// row, as in decoding, of sequences of at most `positions`.
#[must_use]
pub fn forward_scratch_len(dev: &Device, shape: &Shape, singles: usize, positions: usize) -> usize {
    match dev {
        Device::Cpu(_) => 0,
        Device::Cuda(cuda) => cuda::scratch_len(cuda, shape, singles, positions),
    }
}

/// Writes `out` `[rows, q_heads head_dim]` and keeps `lse` `[rows, q_heads]`, the log-sum-exp of
/// each row's scores, for [`backward`]. Keys and values, the rows' own included, come from
/// `kv`. `4 head_dim` FLOPs for each query head and visible position. `scratch` has
/// [`forward_scratch_len`] elements.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] if segments or pages do not.
#[allow(clippy::too_many_arguments)]
pub fn forward<T: Element>(
    dev: &Device,
    out: ViewMut<'_, T>,
    lse: ViewMut<'_, T::Acc>,
    qkv: View<'_, T>,
    kv: &KvLayer<'_, T>,
    work: Work<'_>,
    shape: &Shape,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "attention";
    shape.check(OP)?;
    kv.check(OP, dev, shape)?;
    let rows = shape::rows(OP, "qkv", qkv.len(), shape.qkv_cols())?;
    shape::check(OP, "out", &[rows, shape.q_heads * shape.head_dim], out.len())?;
    shape::check(OP, "lse", &[rows, shape.q_heads], lse.len())?;
    check_work(OP, &work, rows, (kv.page, kv.pages(shape)), dev)?;
    match dev {
        Device::Cpu(cpu) => {
            let (k, v) = (kv.k.view().float()?.host(), kv.v.view().float()?.host());
            let out = (out.float()?.host(), lse.host());
            forward_on_cpu(cpu, out, qkv.float()?.host(), (k, v), work, shape);
            Ok(())
        }
        Device::Cuda(cuda) => cuda::forward(cuda, out, lse, qkv, kv, work, shape, scratch),
    }
}

fn forward_on_cpu<F: Float>(
    cpu: &Cpu,
    (out, lse): (&mut [F], &mut [F]),
    qkv: &[F],
    (k, v): (&[F], &[F]),
    work: Work<'_>,
    shape: &Shape,
) {
    let (cols, list) = (shape.q_heads * shape.head_dim, work.pages.host());
    let rows = lse.len() / shape.q_heads;
    cpu.rows(rows, 1, ((out, cols), (lse, shape.q_heads)), |range, (out, lse)| {
        for s in work.segments {
            let own = s.batch_rows();
            let (mut r, end) = (own.start.max(range.start), own.end.min(range.end));
            let ids = &list[s.pages.start as usize..s.pages.end as usize];
            while r < end {
                let n = (end - r).min(TILE);
                let tile = Tile {
                    qkv: &qkv[r * shape.qkv_cols()..],
                    rows: n,
                    first: s.first as usize + r - own.start,
                };
                let at = r - range.start;
                let out = &mut out[at * cols..(at + n) * cols];
                let lse = &mut lse[at * shape.q_heads..(at + n) * shape.q_heads];
                tile.run(cpu.isa(), out, lse, k, v, ids, shape);
                r += n;
            }
        }
    });
}

/// Up to [`TILE`] rows of one sequence.
struct Tile<'a, F> {
    qkv: &'a [F],
    rows: usize,
    /// Position of the first row.
    first: usize,
}

impl<F: Float> Tile<'_, F> {
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        isa: Isa,
        out: &mut [F],
        lse: &mut [F],
        k: &[F],
        v: &[F],
        ids: &[u32],
        shape: &Shape,
    ) {
        let (d, cols, panels) = (shape.head_dim, shape.q_heads * shape.head_dim, shape.v_panels());
        let (end, begin) = (self.first + self.rows, shape.sees_from(self.first) / PAGE);
        let bend = Bend::of(shape);
        for h in 0..shape.q_heads {
            let g = h / shape.group();
            let q = Lhs::rows(&self.qkv[h * d..], shape.qkv_cols());
            let (mut top, mut sum) = ([F::NEG_INFINITY; TILE], [F::ZERO; TILE]);
            for (p, id) in ids[..end.div_ceil(PAGE)].iter().enumerate().skip(begin) {
                let id = *id as usize;
                let seen = (end - p * PAGE).min(PAGE);
                let mut s = [F::ZERO; TILE * PAGE];
                let keys = &k[id * shape.k_page() + g * d * PAGE..][..d * PAGE];
                let sizes = (self.rows, PAGE, d);
                gemm::serial(isa, &mut s, PAGE, sizes, q, Rhs::Packed(keys), false);
                for r in 0..self.rows {
                    let (at, position) = (p * PAGE, self.first + r);
                    let from = shape.sees_from(position).saturating_sub(at);
                    let visible = from..(position + 1).saturating_sub(at).min(PAGE);
                    let row = &mut s[r * PAGE..][..PAGE];
                    let keep = weigh(isa, row, visible, bend, &mut top[r], &mut sum[r]);
                    if p > begin && keep != F::ONE {
                        scale_row(isa, &mut out[r * cols + h * d..][..d], keep);
                    }
                }
                for panel in 0..panels {
                    let nc = (d - panel * NR).min(NR);
                    let at = id * shape.v_page() + (g * panels + panel) * PAGE * NR;
                    let values = Rhs::Packed(&v[at..at + seen * NR]);
                    let c = &mut out[h * d + panel * NR..];
                    let sizes = (self.rows, nc, seen);
                    gemm::serial(isa, c, cols, sizes, Lhs::rows(&s, PAGE), values, p > begin);
                }
            }
            for r in 0..self.rows {
                scale_row(isa, &mut out[r * cols + h * d..][..d], F::ONE / sum[r]);
                lse[r * shape.q_heads + h] = top[r] + sum[r].ln();
            }
        }
    }
}

/// How scores are made of products.
#[derive(Clone, Copy)]
struct Bend<F> {
    scale: F,
    /// 0 is none.
    cap: F,
}

impl<F: Float> Bend<F> {
    fn of(shape: &Shape) -> Self {
        Self { scale: F::of(shape.scale), cap: F::of(shape.softcap.unwrap_or(0.0)) }
    }
}

/// From products to scores.
#[inline(always)]
fn score<F: Float>(row: &mut [F], bend: Bend<F>) {
    for x in row.iter_mut() {
        *x *= bend.scale;
    }
    if bend.cap > F::ZERO {
        for x in row.iter_mut() {
            *x = bend.cap * (*x / bend.cap).tanh();
        }
    }
}

simd! {
    /// Turns a page's products into weights relative to the new maximum, updates maximum and sum,
    /// and returns the factor on what was accumulated before. With nothing visible, weights are 0
    /// and the factor is 1: an exact no-op.
    fn weigh[F: Float](
        row: &mut [F], visible: Range<usize>, bend: Bend<F>, top: &mut F, sum: &mut F,
    ) -> F {
        if visible.is_empty() {
            row.fill(F::ZERO);
            return F::ONE;
        }
        score(&mut row[visible.clone()], bend);
        let mut new = *top;
        for x in row[visible.clone()].iter() {
            new = new.max_nan(*x);
        }
        let mut lanes = [F::ZERO; math::LANES];
        for (j, x) in row.iter_mut().enumerate() {
            // Slots beyond the row may hold anything, NaN too: selected away, not multiplied.
            let seen = j >= visible.start && j < visible.end;
            *x = if seen { *x - new } else { F::NEG_INFINITY };
        }
        for x in row.iter_mut() {
            *x = x.exp();
        }
        for x in row.chunks_exact(math::LANES) {
            for l in 0..math::LANES {
                lanes[l] += x[l];
            }
        }
        let keep = if *top == F::NEG_INFINITY { F::ZERO } else { (*top - new).exp() };
        *sum = sum.mul_add(keep, math::tree(lanes));
        *top = new;
        keep
    }

    fn scale_row[F: Float](row: &mut [F], by: F) {
        for x in row.iter_mut() {
            *x *= by;
        }
    }
}

/// Elements of scratch that [`backward`] needs for `rows` rows on any device: on the CPU a gradient of
/// queries, keys and values by heads; on a CUDA device sums of the queries' gradient, `dout . out` of each
/// head, and turns, which are fewer.
#[must_use]
pub fn backward_scratch_len(shape: &Shape, rows: usize) -> usize {
    rows * shape.qkv_cols()
}

/// Writes `dqkv` `[rows, (q_heads + 2 kv_heads) head_dim]` from `dout`, with `out` and `lse` as
/// [`forward`] left them. Every segment must be a whole sequence, or have its prefix in the batch.
/// `10 head_dim` FLOPs for each query head and visible position: five products, scores recomputed.
///
/// Sums run in a fixed order: over keys ascending for a query; for a key over queries ascending and then
/// heads of the group, on a CUDA device over tiles of queries descending. They do not depend on what else
/// is in the batch.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] if a segment starts late or segments
/// do not cover the rows in order.
#[allow(clippy::too_many_arguments)]
pub fn backward<T: Element>(
    dev: &Device,
    dqkv: ViewMut<'_, T>,
    dout: View<'_, T>,
    out: View<'_, T>,
    qkv: View<'_, T>,
    lse: View<'_, T::Acc>,
    work: Work<'_>,
    shape: &Shape,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "attention::backward";
    shape.check(OP)?;
    let (d, cols, segments) = (shape.head_dim, shape.qkv_cols(), work.segments);
    let rows = shape::rows(OP, "qkv", qkv.len(), cols)?;
    let out_cols = shape.q_heads * d;
    shape::check(OP, "dqkv", &[rows, cols], dqkv.len())?;
    shape::check(OP, "dout", &[rows, out_cols], dout.len())?;
    shape::check(OP, "out", &[rows, out_cols], out.len())?;
    shape::check(OP, "lse", &[rows, shape.q_heads], lse.len())?;
    let scratch = scratch.scratch(OP, backward_scratch_len(shape, rows))?;
    if let Some(i) = segments.iter().position(|s| s.first != 0 && s.prefix.is_none()) {
        let what = format!("{OP}: first position of segment {i}");
        return Err(Error::value(what, "0", segments[i].first));
    }
    check_rows(OP, segments, rows)?;
    let cpu = match dev {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            let input = backward::Input { dout, out, qkv, lse };
            return backward::run(cuda, dqkv, input, work, shape, scratch);
        }
    };
    let input = Input {
        dout: dout.float()?.host(),
        out: out.float()?.host(),
        qkv: qkv.float()?.host(),
        lse: lse.host(),
        shape,
    };
    backward_on_cpu(cpu, dqkv.float()?.host(), &input, segments, scratch.host());
    Ok(())
}

fn backward_on_cpu<F: Float>(
    cpu: &Cpu,
    dqkv: &mut [F],
    input: &Input<'_, F>,
    segments: &[Segment],
    scratch: &mut [F],
) {
    let shape = input.shape;
    let (d, cols, out_cols) = (shape.head_dim, shape.qkv_cols(), shape.q_heads * shape.head_dim);
    let (rows, isa) = (dqkv.len() / cols, cpu.isa());
    // By KV head: [kv_heads][rows][(group + 2) head_dim], so that a task writes its own memory.
    let width = (shape.group() + 2) * d;
    cpu.rows(shape.kv_heads, 1, (&mut *scratch, rows * width), |range, part| {
        for (g, part) in range.zip(part.chunks_exact_mut((rows * width).max(1))) {
            part.fill(F::ZERO);
            for (i, keys) in segments.iter().enumerate() {
                input.head(isa, part, keys, keys, g);
                let after = segments[i..].iter().filter(|s| s.prefix == Some(i as u32));
                after.for_each(|queries| input.head(isa, part, keys, queries, g));
            }
        }
    });
    cpu.rows(rows, 16, (dqkv, cols), |range, dqkv| {
        for (row, r) in dqkv.chunks_exact_mut(cols).zip(range) {
            let (q, kv) = row.split_at_mut(out_cols);
            let (k, v) = kv.split_at_mut(shape.kv_heads * d);
            for g in 0..shape.kv_heads {
                let from = &scratch[(g * rows + r) * width..][..width];
                let (dq, dkv) = from.split_at(shape.group() * d);
                q[g * shape.group() * d..][..dq.len()].copy_from_slice(dq);
                k[g * d..][..d].copy_from_slice(&dkv[..d]);
                v[g * d..][..d].copy_from_slice(&dkv[d..]);
            }
        }
    });
}

struct Input<'a, F> {
    dout: &'a [F],
    out: &'a [F],
    qkv: &'a [F],
    lse: &'a [F],
    shape: &'a Shape,
}

/// Query rows of a backward tile.
const BACK: usize = 48;

impl<F: Float> Input<'_, F> {
    /// What the queries of one segment and the keys of one give each other, of one KV head: `part`
    /// `[rows, (group + 2) d]` holds dq of the group, dk, dv.
    fn head(&self, isa: Isa, part: &mut [F], keys: &Segment, queries: &Segment, g: usize) {
        let shape = self.shape;
        let (d, group) = (shape.head_dim, shape.group());
        let (cols, width, out_cols) = (shape.qkv_cols(), (group + 2) * d, shape.q_heads * d);
        let (k_at, v_at) = (out_cols + g * d, out_cols + (shape.kv_heads + g) * d);
        let (first, end, bend) = (queries.first as usize, queries.rows as usize, Bend::of(shape));
        let mut k_panel = [F::ZERO; MAX_HEAD_DIM * NR];
        let mut v_panel = [F::ZERO; MAX_HEAD_DIM * NR];
        for j0 in (0..keys.rows as usize).step_by(NR) {
            let (n, key) = (NR.min(keys.rows as usize - j0), keys.at as usize + j0);
            let base = &self.qkv[key * cols..];
            gemm::pack_panel(&mut k_panel[..d * NR], &base[k_at..], cols, d, n);
            gemm::pack_panel(&mut v_panel[..d * NR], &base[v_at..], cols, d, n);
            // Positions from `at` on, which the queries from there on see, up to the window's end.
            let at = keys.first as usize + j0;
            let begin = at.saturating_sub(first);
            let last =
                shape.window.map_or(end, |w| (at + n - 1 + w as usize).saturating_sub(first));
            for h in 0..group {
                let head = g * group + h;
                for i0 in (begin..end.min(last)).step_by(BACK) {
                    let m = BACK.min(end - i0);
                    let row = queries.at as usize + i0;
                    let q = &self.qkv[row * cols + head * d..];
                    let dout = &self.dout[row * out_cols + head * d..];
                    let out = &self.out[row * out_cols + head * d..];
                    let (mut p, mut ds) = ([F::ZERO; BACK * NR], [F::ZERO; BACK * NR]);
                    let panel = Rhs::Packed(&k_panel[..d * NR]);
                    gemm::serial(isa, &mut p, NR, (m, NR, d), Lhs::rows(q, cols), panel, false);
                    let panel = Rhs::Packed(&v_panel[..d * NR]);
                    let lhs = Lhs::rows(dout, out_cols);
                    gemm::serial(isa, &mut ds, NR, (m, NR, d), lhs, panel, false);
                    for r in 0..m {
                        let lse = self.lse[(row + r) * shape.q_heads + head];
                        let position = first + i0 + r;
                        let from = shape.sees_from(position).saturating_sub(at).min(n);
                        let visible = from..(position + 1).saturating_sub(at).min(n);
                        let o = r * out_cols..r * out_cols + d;
                        let delta = dot_row(isa, &dout[o.clone()], &out[o]);
                        let (p, ds) = (&mut p[r * NR..][..NR], &mut ds[r * NR..][..NR]);
                        unweigh(isa, p, ds, visible, bend, lse, delta);
                    }
                    // dv += pᵀ dout, dk += dsᵀ q, dq += ds k
                    let at_key = &mut part[key * width..];
                    let (sizes, p, ds) = ((n, d, m), &p[..], &ds[..]);
                    let rhs = Rhs::Rows { data: dout, ld: out_cols };
                    let dv = &mut at_key[(group + 1) * d..];
                    gemm::serial(isa, dv, width, sizes, Lhs::columns(p, NR), rhs, true);
                    let rhs = Rhs::Rows { data: q, ld: cols };
                    let dk = &mut at_key[group * d..];
                    gemm::serial(isa, dk, width, sizes, Lhs::columns(ds, NR), rhs, true);
                    let rhs = Rhs::Rows { data: &base[k_at..], ld: cols };
                    let dq = &mut part[row * width + h * d..];
                    gemm::serial(isa, dq, width, (m, d, n), Lhs::rows(ds, NR), rhs, true);
                }
            }
        }
    }
}

simd! {
    /// From products to weights `p`, and from `dout . v` to the gradient of the products,
    /// `ds = p (dout . v - delta) scale (1 - (s / cap)²)`.
    fn unweigh[F: Float](
        p: &mut [F], ds: &mut [F], visible: Range<usize>, bend: Bend<F>, lse: F, delta: F,
    ) {
        score(&mut p[visible.clone()], bend);
        for j in 0..p.len() {
            let seen = j >= visible.start && j < visible.end;
            let s = if seen { p[j] } else { F::NEG_INFINITY };
            let slope = if seen && bend.cap > F::ZERO {
                let t = s / bend.cap;
                bend.scale * (F::ONE - t) * (F::ONE + t)
            } else {
                bend.scale
            };
            p[j] = s - lse;
            // Beyond the row there may be anything.
            ds[j] = if seen { (ds[j] - delta) * slope } else { F::ZERO };
        }
        for j in 0..p.len() {
            p[j] = p[j].exp();
            ds[j] *= p[j];
        }
    }

    fn dot_row[F: Float](a: &[F], b: &[F]) -> F {
        math::dot(a, b)
    }
}
