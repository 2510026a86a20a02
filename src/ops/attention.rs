//! Causal attention with grouped queries over packed sequences and a paged KV cache.
//!
//! `out[r, h] = sum_{j <= r} softmax_j(scale q[r, h] . k[j, g]) v[j, g]`, `g = h / group`.
//! (Vaswani et al. 2017, eq. 1; groups: Ainslie et al. 2023; online softmax: Milakov and
//! Gimelshein 2018)
//!
//! Training, prefill and decoding are one code path: new keys and values are written to the cache,
//! then each row visits the pages of its own sequence from absolute position 0. A page's
//! contribution to a row depends on that row alone, and masked entries add exact zeros, so a row
//! has the same bits in a batch of whole sequences, in chunks, or alone.

use std::ops::Range;

use crate::{
    device::{
        Buffer, Device, Float, Scope, View, ViewMut,
        cpu::{
            Isa,
            gemm::{self, Lhs, NR, Rhs},
            math,
        },
    },
    error::{Error, Result},
    shape, simd,
};

/// Positions of a page: the width of a packed panel, so that a page of keys is one.
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
}

impl Shape {
    /// Columns of a row of queries, keys and values.
    #[must_use]
    pub fn qkv_cols(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
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
            && (1..=MAX_HEAD_DIM).contains(&self.head_dim);
        if ok {
            return Ok(());
        }
        let want = format!("heads in whole groups, head_dim from 1 to {MAX_HEAD_DIM}");
        Err(Error::value(format!("{op}: shape"), want, format!("{self:?}")))
    }
}

/// Keys and values of one layer.
#[derive(Debug)]
pub struct KvLayer<'s, F> {
    k: Buffer<'s, F>,
    v: Buffer<'s, F>,
}

impl<'s, F: Float> KvLayer<'s, F> {
    /// Room for `pages` pages.
    ///
    /// # Errors
    /// [`Error::Memory`] if the plan has no room.
    pub fn new(scope: &'s Scope<'_>, shape: &Shape, pages: usize) -> Result<Self> {
        Ok(Self {
            k: scope.alloc("KV cache, keys", pages * shape.k_page())?,
            v: scope.alloc("KV cache, values", pages * shape.v_page())?,
        })
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
}

impl Segment {
    fn batch_rows(&self) -> Range<usize> {
        self.at as usize..(self.at + self.rows) as usize
    }
}

/// Checks that segments cover `rows` rows in order.
fn check_rows(op: &'static str, segments: &[Segment], rows: usize) -> Result<()> {
    let mut next = 0;
    for (i, s) in segments.iter().enumerate() {
        if s.at != next {
            let what = format!("{op}: first row of segment {i}");
            return Err(Error::value(what, next.to_string(), s.at));
        }
        next = s.at.saturating_add(s.rows);
    }
    if next as usize == rows {
        return Ok(());
    }
    Err(Error::value(format!("{op}: rows of all segments"), rows.to_string(), next))
}

/// As [`check_rows`], and that the pages of each segment exist.
fn check_segments(
    op: &'static str,
    segments: &[Segment],
    rows: usize,
    list: &[u32],
    pages: usize,
) -> Result<()> {
    check_rows(op, segments, rows)?;
    for (i, s) in segments.iter().enumerate() {
        let what = |part| format!("{op}: {part} of segment {i}");
        let used = (s.first as usize + s.rows as usize).div_ceil(PAGE);
        let ids = list.get(s.pages.start as usize..s.pages.end as usize);
        let Some(ids) = ids.filter(|ids| ids.len() >= used) else {
            let want = format!("{used} within a list of {}", list.len());
            return Err(Error::value(what("pages"), want, format!("{:?}", s.pages)));
        };
        if let Some(id) = ids.iter().find(|id| **id as usize >= pages) {
            return Err(Error::value(what("page id"), format!("less than {pages}"), id));
        }
    }
    Ok(())
}

/// Writes keys and values of new rows to their pages. `qkv` `[rows, (q_heads + 2 kv_heads)
/// head_dim]` holds queries, keys and values side by side, positions already applied.
///
/// # Errors
/// [`Error::Shape`] if `qkv` does not fit, [`Error::Value`] if segments or pages do not.
pub fn append<F: Float>(
    dev: &Device,
    kv: &mut KvLayer<'_, F>,
    qkv: View<'_, F>,
    segments: &[Segment],
    pages: View<'_, u32>,
    shape: &Shape,
) -> Result<()> {
    const OP: &str = "attention::append";
    let cpu = dev.on_cpu(OP)?;
    shape.check(OP)?;
    let (qkv, list, cols) = (qkv.host(), pages.host(), shape.qkv_cols());
    let rows = shape::rows(OP, "qkv", qkv.len(), cols)?;
    let (k_page, v_page) = (shape.k_page(), shape.v_page());
    let total = kv.k.len() / k_page;
    check_segments(OP, segments, rows, list, total)?;
    // A task owns a range of pages and copies the rows that belong there.
    let out = ((kv.k.host_mut(), k_page), (kv.v.host_mut(), v_page));
    cpu.rows(total, 1, out, |range, (k, v)| {
        for s in segments {
            let (first, end) = (s.first as usize, (s.first + s.rows) as usize);
            for p in first / PAGE..end.div_ceil(PAGE) {
                let id = list[s.pages.start as usize + p] as usize;
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
    Ok(())
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

/// Writes `out` `[rows, q_heads head_dim]` and keeps `lse` `[rows, q_heads]`, the log-sum-exp of
/// each row's scaled scores, for [`backward`]. Keys and values, the rows' own included, come from
/// `kv`. `4 head_dim` FLOPs for each query head and visible position.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] if segments or pages do not.
#[allow(clippy::too_many_arguments)]
pub fn forward<F: Float>(
    dev: &Device,
    out: ViewMut<'_, F>,
    lse: ViewMut<'_, F>,
    qkv: View<'_, F>,
    kv: &KvLayer<'_, F>,
    segments: &[Segment],
    pages: View<'_, u32>,
    shape: &Shape,
) -> Result<()> {
    const OP: &str = "attention";
    let cpu = dev.on_cpu(OP)?;
    shape.check(OP)?;
    let (qkv, list) = (qkv.host(), pages.host());
    let rows = shape::rows(OP, "qkv", qkv.len(), shape.qkv_cols())?;
    let cols = shape.q_heads * shape.head_dim;
    shape::check(OP, "out", &[rows, cols], out.len())?;
    shape::check(OP, "lse", &[rows, shape.q_heads], lse.len())?;
    check_segments(OP, segments, rows, list, kv.k.len() / shape.k_page())?;
    let (k, v) = (kv.k.host(), kv.v.host());
    let outputs = ((out.host(), cols), (lse.host(), shape.q_heads));
    cpu.rows(rows, 1, outputs, |range, (out, lse)| {
        for s in segments {
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
    Ok(())
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
        let end = self.first + self.rows;
        for h in 0..shape.q_heads {
            let g = h / shape.group();
            let q = Lhs::rows(&self.qkv[h * d..], shape.qkv_cols());
            let (mut top, mut sum) = ([F::NEG_INFINITY; TILE], [F::ZERO; TILE]);
            for (p, id) in ids[..end.div_ceil(PAGE)].iter().enumerate() {
                let id = *id as usize;
                let seen = (end - p * PAGE).min(PAGE);
                let mut s = [F::ZERO; TILE * PAGE];
                let keys = &k[id * shape.k_page() + g * d * PAGE..][..d * PAGE];
                let sizes = (self.rows, PAGE, d);
                gemm::serial(isa, &mut s, PAGE, sizes, q, Rhs::Packed(keys), false);
                for r in 0..self.rows {
                    let visible = (self.first + r + 1).saturating_sub(p * PAGE).min(PAGE);
                    let row = &mut s[r * PAGE..][..PAGE];
                    let keep =
                        weigh(isa, row, visible, F::of(shape.scale), &mut top[r], &mut sum[r]);
                    if p > 0 && keep != F::ONE {
                        scale_row(isa, &mut out[r * cols + h * d..][..d], keep);
                    }
                }
                for panel in 0..panels {
                    let nc = (d - panel * NR).min(NR);
                    let at = id * shape.v_page() + (g * panels + panel) * PAGE * NR;
                    let values = Rhs::Packed(&v[at..at + seen * NR]);
                    let c = &mut out[h * d + panel * NR..];
                    let sizes = (self.rows, nc, seen);
                    gemm::serial(isa, c, cols, sizes, Lhs::rows(&s, PAGE), values, p > 0);
                }
            }
            for r in 0..self.rows {
                scale_row(isa, &mut out[r * cols + h * d..][..d], F::ONE / sum[r]);
                lse[r * shape.q_heads + h] = top[r] + sum[r].ln();
            }
        }
    }
}

simd! {
    /// Turns a page's scores into weights relative to the new maximum, updates maximum and sum,
    /// and returns the factor on what was accumulated before. With nothing visible, weights are 0
    /// and the factor is 1: an exact no-op.
    fn weigh[F: Float](row: &mut [F], visible: usize, scale: F, top: &mut F, sum: &mut F) -> F {
        if visible == 0 {
            row.fill(F::ZERO);
            return F::ONE;
        }
        let mut new = *top;
        for x in row[..visible].iter_mut() {
            *x *= scale;
            new = new.max_nan(*x);
        }
        let mut lanes = [F::ZERO; math::LANES];
        for (j, x) in row.iter_mut().enumerate() {
            // Slots beyond the row may hold anything, NaN too: selected away, not multiplied.
            *x = if j < visible { *x - new } else { F::NEG_INFINITY };
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

/// Elements of scratch that [`backward`] needs for `rows` rows: a gradient of queries, keys and
/// values by heads.
#[must_use]
pub fn scratch_len(shape: &Shape, rows: usize) -> usize {
    rows * shape.qkv_cols()
}

/// Writes `dqkv` `[rows, (q_heads + 2 kv_heads) head_dim]` from `dout`, with `out` and `lse` as
/// [`forward`] left them. Every segment must be a whole sequence. `10 head_dim` FLOPs for each
/// query head and visible position: five products, scores recomputed.
///
/// Sums run in a fixed order: over keys ascending for a query, over queries ascending and then
/// heads of the group for a key.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] if a segment starts late or segments
/// do not cover the rows in order.
#[allow(clippy::too_many_arguments)]
pub fn backward<F: Float>(
    dev: &Device,
    dqkv: ViewMut<'_, F>,
    dout: View<'_, F>,
    out: View<'_, F>,
    qkv: View<'_, F>,
    lse: View<'_, F>,
    segments: &[Segment],
    shape: &Shape,
    scratch: ViewMut<'_, F>,
) -> Result<()> {
    const OP: &str = "attention::backward";
    let cpu = dev.on_cpu(OP)?;
    shape.check(OP)?;
    let (d, cols) = (shape.head_dim, shape.qkv_cols());
    let rows = shape::rows(OP, "qkv", qkv.len(), cols)?;
    let out_cols = shape.q_heads * d;
    shape::check(OP, "dqkv", &[rows, cols], dqkv.len())?;
    shape::check(OP, "dout", &[rows, out_cols], dout.len())?;
    shape::check(OP, "out", &[rows, out_cols], out.len())?;
    shape::check(OP, "lse", &[rows, shape.q_heads], lse.len())?;
    let need = scratch_len(shape, rows);
    if scratch.len() < need {
        return Err(Error::shape(OP, "scratch", &[need], &[scratch.len()]));
    }
    if let Some(i) = segments.iter().position(|s| s.first != 0) {
        let what = format!("{OP}: first position of segment {i}");
        return Err(Error::value(what, "0", segments[i].first));
    }
    check_rows(OP, segments, rows)?;

    let isa = cpu.isa();
    let input =
        Input { dout: dout.host(), out: out.host(), qkv: qkv.host(), lse: lse.host(), shape };
    // By KV head: [kv_heads][rows][(group + 2) head_dim], so that a task writes its own memory.
    let width = (shape.group() + 2) * d;
    let scratch = &mut scratch.host()[..need];
    cpu.rows(shape.kv_heads, 1, (&mut *scratch, rows * width), |range, part| {
        for (g, part) in range.zip(part.chunks_exact_mut((rows * width).max(1))) {
            part.fill(F::ZERO);
            for s in segments {
                let own = s.batch_rows();
                input.head(isa, &mut part[own.start * width..own.end * width], own, g);
            }
        }
    });
    cpu.rows(rows, 16, (dqkv.host(), cols), |range, dqkv| {
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
    Ok(())
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
    /// One sequence, one KV head: `part` `[rows, (group + 2) d]` holds dq of the group, dk, dv.
    fn head(&self, isa: Isa, part: &mut [F], rows: Range<usize>, g: usize) {
        let shape = self.shape;
        let (d, group) = (shape.head_dim, shape.group());
        let (cols, width, out_cols) = (shape.qkv_cols(), (group + 2) * d, shape.q_heads * d);
        let n = rows.len();
        let base = &self.qkv[rows.start * cols..];
        let (k_at, v_at) = (out_cols + g * d, out_cols + (shape.kv_heads + g) * d);
        let mut k_panel = [F::ZERO; MAX_HEAD_DIM * NR];
        let mut v_panel = [F::ZERO; MAX_HEAD_DIM * NR];
        for j0 in (0..n).step_by(NR) {
            let keys = NR.min(n - j0);
            gemm::pack_panel(&mut k_panel[..d * NR], &base[j0 * cols + k_at..], cols, d, keys);
            gemm::pack_panel(&mut v_panel[..d * NR], &base[j0 * cols + v_at..], cols, d, keys);
            for h in 0..group {
                let head = g * group + h;
                for i0 in (j0..n).step_by(BACK) {
                    let m = BACK.min(n - i0);
                    let at = rows.start + i0;
                    let q = &base[i0 * cols + head * d..];
                    let dout = &self.dout[at * out_cols + head * d..];
                    let out = &self.out[at * out_cols + head * d..];
                    let (mut p, mut ds) = ([F::ZERO; BACK * NR], [F::ZERO; BACK * NR]);
                    let panel = Rhs::Packed(&k_panel[..d * NR]);
                    gemm::serial(isa, &mut p, NR, (m, NR, d), Lhs::rows(q, cols), panel, false);
                    let panel = Rhs::Packed(&v_panel[..d * NR]);
                    let lhs = Lhs::rows(dout, out_cols);
                    gemm::serial(isa, &mut ds, NR, (m, NR, d), lhs, panel, false);
                    for r in 0..m {
                        let lse = self.lse[(at + r) * shape.q_heads + head];
                        let visible = (i0 + r + 1).saturating_sub(j0).min(keys);
                        let o = r * out_cols..r * out_cols + d;
                        let delta = dot_row(isa, &dout[o.clone()], &out[o]);
                        let (p, ds) = (&mut p[r * NR..][..NR], &mut ds[r * NR..][..NR]);
                        unweigh(isa, p, ds, visible, F::of(shape.scale), lse, delta);
                    }
                    // dv += pᵀ dout, dk += dsᵀ q, dq += ds k
                    let at_key = &mut part[j0 * width..];
                    let (sizes, p, ds) = ((keys, d, m), &p[..], &ds[..]);
                    let rhs = Rhs::Rows { data: dout, ld: out_cols };
                    let dv = &mut at_key[(group + 1) * d..];
                    gemm::serial(isa, dv, width, sizes, Lhs::columns(p, NR), rhs, true);
                    let rhs = Rhs::Rows { data: q, ld: cols };
                    let dk = &mut at_key[group * d..];
                    gemm::serial(isa, dk, width, sizes, Lhs::columns(ds, NR), rhs, true);
                    let rhs = Rhs::Rows { data: &base[j0 * cols + k_at..], ld: cols };
                    let dq = &mut part[i0 * width + h * d..];
                    gemm::serial(isa, dq, width, (m, d, keys), Lhs::rows(ds, NR), rhs, true);
                }
            }
        }
    }
}

simd! {
    /// From scores and `dout . v` to weights `p` and `ds = p (dout . v - delta) scale`.
    fn unweigh[F: Float](
        p: &mut [F], ds: &mut [F], visible: usize, scale: F, lse: F, delta: F,
    ) {
        for j in 0..p.len() {
            p[j] = if j < visible { p[j] * scale - lse } else { F::NEG_INFINITY };
        }
        for j in 0..p.len() {
            p[j] = p[j].exp();
            ds[j] = p[j] * (ds[j] - delta) * scale;
        }
    }

    fn dot_row[F: Float](a: &[F], b: &[F]) -> F {
        math::dot(a, b)
    }
}
