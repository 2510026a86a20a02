//! The micro-kernels of x86-64.

#![allow(unsafe_code, clippy::multiple_unsafe_ops_per_block)]

use std::arch::x86_64::*;

use super::{NR, Tile, portable};

/// # Safety
/// As [`super::run`], for R rows; AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn wide<const R: usize, const T: bool>(
    t: Tile<f64>,
    nc: usize,
    c: *mut f64,
    ldc: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { portable::<R, T, f64>(t, nc, c, ldc) }
}

/// 12 x 32 is 24 accumulators, two of B and one of A: 27 of 32 registers.
///
/// # Safety
/// As [`super::run`], for R rows; AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn avx512<const R: usize, const T: bool>(
    t: Tile<f32>,
    nc: usize,
    c: *mut f32,
    ldc: usize,
) {
    let lane = |n: usize| ((1u64 << n) - 1) as u32;
    let mask = lane(nc);
    let (m0, m1) = (mask as u16, (mask >> 16) as u16);
    // SAFETY: masked loads and stores touch `nc` columns of R rows; the panel has 32 columns.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; R];
        if t.add {
            for (r, acc) in acc.iter_mut().enumerate() {
                acc[0] = _mm512_maskz_loadu_ps(m0, c.add(r * ldc));
                acc[1] = _mm512_maskz_loadu_ps(m1, c.wrapping_add(r * ldc + 16));
            }
        }
        for k in 0..t.k {
            let b0 = _mm512_loadu_ps(t.b.add(k * NR));
            let b1 = _mm512_loadu_ps(t.b.add(k * NR + 16));
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = *t.a.add(if T { k * t.lda + r } else { r * t.lda + k });
                let a = _mm512_set1_ps(a);
                acc[0] = _mm512_fmadd_ps(a, b0, acc[0]);
                acc[1] = _mm512_fmadd_ps(a, b1, acc[1]);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            _mm512_mask_storeu_ps(c.add(r * ldc), m0, acc[0]);
            _mm512_mask_storeu_ps(c.wrapping_add(r * ldc + 16), m1, acc[1]);
        }
    }
}

/// 6 x 16 once or twice: 12 accumulators, two of B and one of A: 15 of 16 registers.
///
/// # Safety
/// As [`super::run`], for R rows; AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2<const R: usize, const T: bool>(
    t: Tile<f32>,
    nc: usize,
    c: *mut f32,
    ldc: usize,
) {
    if nc < NR {
        // A whole tile in a room of its own, of which C gets its columns.
        let mut room = [[0.0; NR]; R];
        for (r, row) in room.iter_mut().enumerate() {
            // SAFETY: row `r` of C has `nc` columns.
            unsafe { row.as_mut_ptr().copy_from_nonoverlapping(c.add(r * ldc), nc) };
        }
        let halves = nc.div_ceil(16) * 16;
        // SAFETY: `room` has all columns; A and B are the caller's promise.
        unsafe { avx2_halves::<R, T>(t, halves, room.as_mut_ptr().cast(), NR) };
        for (r, row) in room.iter().enumerate() {
            // SAFETY: as above.
            unsafe { c.add(r * ldc).copy_from_nonoverlapping(row.as_ptr(), nc) };
        }
    } else {
        // SAFETY: the caller's promise.
        unsafe { avx2_halves::<R, T>(t, NR, c, ldc) };
    }
}

/// # Safety
/// As [`avx2`], for 16 or 32 columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_halves<const R: usize, const T: bool>(
    t: Tile<f32>,
    nc: usize,
    c: *mut f32,
    ldc: usize,
) {
    for half in (0..nc).step_by(16) {
        // SAFETY: `nc` columns of R rows are in bounds, as the caller promised.
        unsafe {
            let (b, c) = (t.b.add(half), c.add(half));
            let mut acc = [[_mm256_setzero_ps(); 2]; R];
            if t.add {
                for (r, acc) in acc.iter_mut().enumerate() {
                    acc[0] = _mm256_loadu_ps(c.add(r * ldc));
                    acc[1] = _mm256_loadu_ps(c.add(r * ldc + 8));
                }
            }
            for k in 0..t.k {
                let b0 = _mm256_loadu_ps(b.add(k * NR));
                let b1 = _mm256_loadu_ps(b.add(k * NR + 8));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let a = *t.a.add(if T { k * t.lda + r } else { r * t.lda + k });
                    let a = _mm256_set1_ps(a);
                    acc[0] = _mm256_fmadd_ps(a, b0, acc[0]);
                    acc[1] = _mm256_fmadd_ps(a, b1, acc[1]);
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * ldc), acc[0]);
                _mm256_storeu_ps(c.add(r * ldc + 8), acc[1]);
            }
        }
    }
}
