//! Attention on the CPU: tiles of rows visit packed pages.

use std::ops::Range;

use super::{MAX_HEAD_DIM, PAGE, Segment, SegmentBatch, Shape, partition};
use crate::{
    device::{
        Float,
        cpu::{
            Cpu, Isa,
            gemm::{self, Lhs, NR, Product, Rhs},
            math,
        },
    },
    simd,
};

/// Rows of queries that visit a page together.
const TILE: usize = 24;

pub(super) fn append<F: Float>(
    cpu: &Cpu,
    k: &mut [F],
    v: &mut [F],
    qkv: &[F],
    batch: SegmentBatch<'_>,
    shape: &Shape,
) {
    let (k_page, v_page, cols) = (shape.k_page(), shape.v_page(), shape.qkv_cols());
    let (total, list) = (k.len() / k_page, batch.pages.host());
    // A task owns a range of pages and copies the rows that belong there.
    cpu.rows(total, 1, ((k, k_page), (v, v_page)), |range, (k, v)| {
        for s in partition::written(batch.segments, PAGE) {
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

pub(super) fn forward<F: Float>(
    cpu: &Cpu,
    (out, lse): (&mut [F], &mut [F]),
    qkv: &[F],
    (k, v): (&[F], &[F]),
    batch: SegmentBatch<'_>,
    shape: &Shape,
) {
    let (cols, list) = (shape.q_heads * shape.head_dim, batch.pages.host());
    let rows = lse.len() / shape.q_heads;
    cpu.rows(rows, 1, ((out, cols), (lse, shape.q_heads)), |range, (out, lse)| {
        for s in batch.segments {
            let own = s.batch_rows();
            let (mut r, end) = (own.start.max(range.start), own.end.min(range.end));
            let ids = &list[s.pages.start as usize..s.pages.end as usize];
            while r < end {
                let n = (end - r).min(TILE);
                let tile = RowTile {
                    qkv: &qkv[r * shape.qkv_cols()..],
                    rows: n,
                    first: s.first as usize + r - own.start,
                    shape,
                };
                let at = r - range.start;
                let out = &mut out[at * cols..(at + n) * cols];
                let lse = &mut lse[at * shape.q_heads..(at + n) * shape.q_heads];
                tile.run(cpu.isa(), out, lse, k, v, ids);
                r += n;
            }
        }
    });
}

/// Up to [`TILE`] rows of one sequence.
struct RowTile<'a, F> {
    qkv: &'a [F],
    rows: usize,
    /// Position of the first row.
    first: usize,
    shape: &'a Shape,
}

impl<F: Float> RowTile<'_, F> {
    fn run(&self, isa: Isa, out: &mut [F], lse: &mut [F], k: &[F], v: &[F], ids: &[u32]) {
        let shape = self.shape;
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
                gemm::serial(isa, &mut s, PAGE, Product::new(sizes, q, Rhs::Packed(keys)));
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
                    gemm::serial(
                        isa,
                        c,
                        cols,
                        Product::new(sizes, Lhs::rows(&s, PAGE), values).continuing(p > begin),
                    );
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

pub(super) fn backward<F: Float>(
    cpu: &Cpu,
    dqkv: &mut [F],
    input: &BackwardSlices<'_, F>,
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

/// What the gradient is made from.
pub(super) struct BackwardSlices<'a, F> {
    pub dout: &'a [F],
    pub out: &'a [F],
    pub qkv: &'a [F],
    pub lse: &'a [F],
    pub shape: &'a Shape,
}

/// Query rows of a backward tile.
const BACK: usize = 48;

impl<F: Float> BackwardSlices<'_, F> {
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
                    gemm::serial(
                        isa,
                        &mut p,
                        NR,
                        Product::new((m, NR, d), Lhs::rows(q, cols), panel),
                    );
                    let panel = Rhs::Packed(&v_panel[..d * NR]);
                    let lhs = Lhs::rows(dout, out_cols);
                    gemm::serial(isa, &mut ds, NR, Product::new((m, NR, d), lhs, panel));
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
                    gemm::serial(
                        isa,
                        dv,
                        width,
                        Product::new(sizes, Lhs::columns(p, NR), rhs).continuing(true),
                    );
                    let rhs = Rhs::Rows { data: q, ld: cols };
                    let dk = &mut at_key[group * d..];
                    gemm::serial(
                        isa,
                        dk,
                        width,
                        Product::new(sizes, Lhs::columns(ds, NR), rhs).continuing(true),
                    );
                    let rhs = Rhs::Rows { data: &base[k_at..], ld: cols };
                    let dq = &mut part[row * width + h * d..];
                    gemm::serial(
                        isa,
                        dq,
                        width,
                        Product::new((m, d, n), Lhs::rows(ds, NR), rhs).continuing(true),
                    );
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
