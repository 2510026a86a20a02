//! What attention does, for a profile.

use super::{Segment, Shape};
use crate::device::Work;

/// Pairs of a query and a position that it sees.
fn pairs(shape: &Shape, segments: &[Segment]) -> f64 {
    // Positions that the queries before `end` see, in sum.
    let before = |end: f64| {
        let window = shape.window.map_or(end, |w| end.min(f64::from(w)));
        window * (window + 1.0) / 2.0 + (end - window) * window
    };
    let of = |s: &Segment| before(f64::from(s.first) + f64::from(s.rows)) - before(s.first.into());
    segments.iter().map(of).sum()
}

/// Positions that the rows of a segment see.
fn seen(shape: &Shape, s: &Segment) -> usize {
    if s.rows == 0 {
        return 0;
    }
    let window = shape.window.unwrap_or(u32::MAX) as usize;
    let (first, rows) = (s.first as usize, s.rows as usize);
    first + rows - (first + 1).saturating_sub(window)
}

pub(super) fn append<T>(shape: &Shape, rows: usize, rotated: bool) -> Work {
    let Shape { q_heads, kv_heads, head_dim, .. } = *shape;
    let heads = 4 * kv_heads + if rotated { 2 * q_heads + kv_heads } else { 0 };
    Work::moves::<T>(rows * heads * head_dim)
}

pub(super) fn forward<T>(shape: &Shape, rows: usize, segments: &[Segment]) -> Work {
    let Shape { q_heads, kv_heads, head_dim, .. } = *shape;
    let seen: usize = segments.iter().map(|s| seen(shape, s)).sum();
    Work::moves::<T>(2 * (rows * q_heads + seen * kv_heads) * head_dim)
        .flops(4.0 * (head_dim * q_heads) as f64 * pairs(shape, segments))
}

pub(super) fn backward<T>(shape: &Shape, rows: usize, segments: &[Segment]) -> Work {
    let Shape { q_heads, head_dim, .. } = *shape;
    Work::moves::<T>(2 * rows * (q_heads * head_dim + shape.qkv_cols()))
        .flops(10.0 * (head_dim * q_heads) as f64 * pairs(shape, segments))
}
