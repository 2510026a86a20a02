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
//! has the same bits in a batch of whole sequences, in chunks, or alone. On a CUDA device softmax
//! starts anew each 1024 positions and is merged in ascending order, so that few long sequences
//! keep all of it busy.

mod backward_plan;
mod cost;
mod cpu;
mod cuda;
mod partition;
mod sm80;
mod sm90;

pub use partition::{Partition, SegmentBatch, most_words};

use std::ops::Range;

use crate::{
    device::{self, Arch, Buffer, Device, Element, Scope, View, ViewMut, cpu::gemm::NR},
    error::{Error, Result},
    ops::rope,
    shape,
};

/// Positions of a page on the CPU: the width of a packed panel, so that a page of keys is one.
pub const PAGE: usize = NR;

/// The widest head: a panel of one page must fit the stack.
pub const MAX_HEAD_DIM: usize = 256;

/// Rows of a tile on a CUDA device: positions and heads of a group.
const ROWS: usize = 64;

/// Positions after which a row's softmax starts anew on a CUDA device.
const SPLIT: usize = device::cuda::kernels::attention::SPLIT;

/// `d`, or the next width of a head that kernels take on `dev`.
pub fn width(dev: &Device, d: usize) -> usize {
    let wider = |widths: &[usize]| widths.iter().copied().find(|w| *w >= d).unwrap_or(d);
    match dev {
        Device::Cpu(_) => d,
        Device::Cuda(_) => wider(cuda::HEAD_SIZES),
    }
}

/// For each head size the blocks of the decoding kernel that a multiprocessor of `dev` holds at
/// once, and how many it is meant to; empty where nobody counts on several.
pub fn resident(dev: &Device) -> Result<Vec<[usize; 3]>> {
    match dev {
        Device::Cuda(cuda) if cuda.arch() == Arch::Sm90 => sm90::resident(cuda),
        _ => Ok(Vec::new()),
    }
}

/// Whether `dev` has kernels for such a layer.
pub fn supported(dev: &Device, shape: &Shape) -> Result<()> {
    const OP: &str = "attention";
    shape.check(OP)?;
    match dev {
        Device::Cpu(_) => Ok(()),
        Device::Cuda(_) => cuda::check(OP, shape),
    }
}

/// What an attention layer computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
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
    pub fn qkv_cols(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Positions of a page on `dev`: those of one step of attention there.
    pub fn page(&self, dev: &Device) -> usize {
        match dev {
            Device::Cpu(_) => PAGE,
            Device::Cuda(cuda) => partition::page(cuda, self),
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
            && self.q_heads > 0
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
    pub fn new(scope: &'s Scope<'_>, shape: &Shape, page: usize, pages: usize) -> Result<Self> {
        let plain = shape.kv_heads * shape.head_dim * page;
        let (k, v) = if page == PAGE { (shape.k_page(), shape.v_page()) } else { (plain, plain) };
        Ok(Self {
            k: scope.alloc("KV cache, keys", pages * k)?,
            v: scope.alloc("KV cache, values", pages * v)?,
            page,
        })
    }

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
    pub rows: u32,
    /// Its first row in the batch.
    pub at: u32,
    /// Its pages, as a range of the list of page ids: they cover positions `0 .. first + rows`.
    pub pages: Range<u32>,
    /// The earlier segment of the batch that holds positions `0 .. first`, for several sequences
    /// that begin with the same tokens. Whole pages of it may be in the list; the page of position
    /// `first` is the segment's own, and [`append`] copies there what comes before, even if it has
    /// no rows yet.
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

/// As [`check_segments`], with the ids of pages: a CUDA device's [`Partition`] has looked at those.
fn check_batch(
    op: &'static str,
    batch: &SegmentBatch<'_>,
    rows: usize,
    (page, pages): (usize, usize),
    dev: &Device,
) -> Result<()> {
    check_segments(op, batch.segments, rows, batch.pages.len(), page)?;
    match dev {
        Device::Cpu(_) => check_pages(op, batch.segments, batch.pages.host(), pages),
        Device::Cuda(_) => Ok(()),
    }
}

/// Writes keys and values of new rows to their pages. `qkv` `[rows, (q_heads + 2 kv_heads)
/// head_dim]` holds queries, keys and values side by side; with `rotation`, the positions of the
/// rows and their angles, queries and keys are rotated in place before, with the bits of
/// [`rope::forward`]. A CUDA device takes the positions from the segments, which are the same.
/// Reads keys and values and writes them to pages; with `rotation` reads and writes queries, too,
/// and writes keys once more.
///
/// # Errors
/// [`Error::Shape`] if `qkv` does not fit, [`Error::Value`] if segments or pages do not; as
/// [`rope::forward`] for a position beyond the table, whose heads become NaN on a CUDA device
/// instead.
pub fn append<T: Element>(
    dev: &Device,
    kv: &mut KvLayer<'_, T>,
    mut qkv: ViewMut<'_, T>,
    batch: SegmentBatch<'_>,
    shape: &Shape,
    rotation: Option<(View<'_, u32>, &rope::Table<T::Acc>)>,
) -> Result<()> {
    const OP: &str = "attention::append";
    shape.check(OP)?;
    kv.check(OP, dev, shape)?;
    let rows = shape::rows(OP, "qkv", qkv.len(), shape.qkv_cols())?;
    let total = kv.pages(shape);
    check_batch(OP, &batch, rows, (kv.page, total), dev)?;
    let _op = dev.op(OP, || cost::append::<T>(shape, rows, rotation.is_some()));
    match dev {
        Device::Cpu(cpu) => {
            if let Some((positions, table)) = rotation {
                let (cols, heads) = (shape.qkv_cols(), shape.q_heads + shape.kv_heads);
                let (qkv, d) = (qkv.reborrow(), shape.head_dim);
                let heads = rope::Heads { row_len: cols, heads, head_dim: d };
                rope::forward(dev, qkv, heads, positions, table)?;
            }
            let (k, v) = (kv.k.view_mut().float()?.host(), kv.v.view_mut().float()?.host());
            cpu::append(cpu, k, v, qkv.view().float()?.host(), batch, shape);
            Ok(())
        }
        Device::Cuda(cuda) => cuda::append(cuda, kv, qkv, batch, shape, rotation.map(|(_, t)| t)),
    }
}

/// Elements of scratch that [`forward`] needs on `dev` for batches in which at most `singles`
/// segments have one row, as in decoding, of sequences of at most `positions`.
pub fn forward_scratch_len(dev: &Device, shape: &Shape, singles: usize, positions: usize) -> usize {
    match dev {
        Device::Cpu(_) => 0,
        Device::Cuda(cuda) => cuda::scratch_len(cuda, shape, singles, positions),
    }
}

/// What [`forward`] writes.
#[derive(Debug)]
pub struct ForwardOutputs<'a, T: Element> {
    /// `[rows, q_heads head_dim]`
    pub out: ViewMut<'a, T>,
    /// Log-sum-exp of each row's scores `[rows, q_heads]`, kept for [`backward`].
    pub lse: ViewMut<'a, T::Acc>,
    /// [`forward_scratch_len`] elements.
    pub scratch: ViewMut<'a, T::Acc>,
}

/// Attends from the queries of `qkv` `[rows, (q_heads + 2 kv_heads) head_dim]` to keys and values
/// of `kv`, the rows' own included. `4 head_dim` FLOPs for each query head and visible position.
/// Reads queries, and for each segment the keys and values that it sees, writes `out`.
pub fn forward<T: Element>(
    dev: &Device,
    to: ForwardOutputs<'_, T>,
    qkv: View<'_, T>,
    kv: &KvLayer<'_, T>,
    batch: SegmentBatch<'_>,
    shape: &Shape,
) -> Result<()> {
    const OP: &str = "attention";
    shape.check(OP)?;
    kv.check(OP, dev, shape)?;
    let rows = shape::rows(OP, "qkv", qkv.len(), shape.qkv_cols())?;
    shape::check(OP, "out", &[rows, shape.q_heads * shape.head_dim], to.out.len())?;
    shape::check(OP, "lse", &[rows, shape.q_heads], to.lse.len())?;
    check_batch(OP, &batch, rows, (kv.page, kv.pages(shape)), dev)?;
    let _op = dev.op(OP, || cost::forward::<T>(shape, rows, batch.segments));
    match dev {
        Device::Cpu(cpu) => {
            let (k, v) = (kv.k.view().float()?.host(), kv.v.view().float()?.host());
            let out = (to.out.float()?.host(), to.lse.host());
            cpu::forward(cpu, out, qkv.float()?.host(), (k, v), batch, shape);
            Ok(())
        }
        Device::Cuda(cuda) => cuda::forward(cuda, to, qkv, kv, batch, shape),
    }
}

/// Elements of scratch that `backward` needs for `rows` rows on any device: on the CPU a gradient
/// of queries, keys and values by heads; on a CUDA device sums of the queries' gradient, `dout .
/// out` of each head, and turns, which are fewer.
pub fn backward_scratch_len(shape: &Shape, rows: usize) -> usize {
    rows * shape.qkv_cols()
}

/// What [`backward`] writes and reads.
#[derive(Debug)]
pub struct BackwardArgs<'a, T: Element> {
    /// `[rows, (q_heads + 2 kv_heads) head_dim]`, written.
    pub dqkv: ViewMut<'a, T>,
    /// `[rows, q_heads head_dim]`
    pub dout: View<'a, T>,
    /// As [`forward`] wrote it.
    pub out: View<'a, T>,
    /// As [`forward`] read it.
    pub qkv: View<'a, T>,
    /// As [`forward`] wrote it.
    pub lse: View<'a, T::Acc>,
    /// [`backward_scratch_len`] elements.
    pub scratch: ViewMut<'a, T::Acc>,
}

/// Writes the gradient of queries, keys and values. Every segment must be a whole sequence, or have
/// its prefix in the batch. `10 head_dim` FLOPs for each query head and visible position: five
/// products, scores recomputed. Reads `dout`, `out` and `qkv`, writes `dqkv`.
///
/// Sums run in a fixed order: over keys ascending for a query; for a key over queries ascending and
/// then heads of the group, on a CUDA device over tiles of queries descending. They do not depend
/// on what else is in the batch.
pub fn backward<T: Element>(
    dev: &Device,
    args: BackwardArgs<'_, T>,
    batch: SegmentBatch<'_>,
    shape: &Shape,
) -> Result<()> {
    const OP: &str = "attention::backward";
    shape.check(OP)?;
    let (d, cols, segments) = (shape.head_dim, shape.qkv_cols(), batch.segments);
    let BackwardArgs { dqkv, dout, out, qkv, lse, scratch } = args;
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
    let _op = dev.op(OP, || cost::backward::<T>(shape, rows, segments));
    match dev {
        Device::Cpu(cpu) => {
            let input = cpu::BackwardSlices {
                dout: dout.float()?.host(),
                out: out.float()?.host(),
                qkv: qkv.float()?.host(),
                lse: lse.host(),
                shape,
            };
            cpu::backward(cpu, dqkv.float()?.host(), &input, segments, scratch.host());
            Ok(())
        }
        Device::Cuda(cuda) => {
            let args = BackwardArgs { dqkv, dout, out, qkv, lse, scratch };
            cuda::backward(cuda, args, batch, shape)
        }
    }
}
