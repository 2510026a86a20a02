//! Reductions with a fixed order of lanes, and the elementary functions.

pub use crate::device::elementary::{erf, exp, ln, tanh};

use super::super::Float;

/// Lanes of a reduction: one 512-bit vector of f32. The order of a sum is part of its definition.
pub const LANES: usize = 16;

/// Adds up lanes as a balanced tree: `(((l0+l8)+(l4+l12)) + ...)`.
#[inline(always)]
pub fn tree<F: Float>(mut lanes: [F; LANES]) -> F {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Sum of `f(i)` over `0..n`: element `i` goes to lane `i % 16`, lanes are added by [`tree`].
#[inline(always)]
pub fn sum_by<F: Float>(n: usize, mut f: impl FnMut(usize) -> F) -> F {
    let mut lanes = [F::ZERO; LANES];
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += LANES;
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(whole + l);
    }
    tree(lanes)
}

/// Dot product: element `i` is multiply-added into lane `i % 16`, lanes are added by [`tree`].
#[inline(always)]
pub fn dot<F: Float>(a: &[F], b: &[F]) -> F {
    let mut lanes = [F::ZERO; LANES];
    let mut a = a.chunks_exact(LANES);
    let mut b = b.chunks_exact(LANES);
    for (a, b) in (&mut a).zip(&mut b) {
        for l in 0..LANES {
            lanes[l] = a[l].mul_add(b[l], lanes[l]);
        }
    }
    for (l, (a, b)) in a.remainder().iter().zip(b.remainder()).enumerate() {
        lanes[l] = a.mul_add(*b, lanes[l]);
    }
    tree(lanes)
}

/// Largest element; negative infinity if empty, NaN if any is NaN.
#[inline(always)]
pub fn max<F: Float>(x: &[F]) -> F {
    let mut lanes = [F::NEG_INFINITY; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for c in &mut chunks {
        for l in 0..LANES {
            lanes[l] = lanes[l].max_nan(c[l]);
        }
    }
    for (l, x) in chunks.remainder().iter().enumerate() {
        lanes[l] = lanes[l].max_nan(*x);
    }
    lanes.iter().fold(F::NEG_INFINITY, |m, x| m.max_nan(*x))
}
