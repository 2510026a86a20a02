//! What this machine could do at most, measured: the ceilings that benches and profiles relate
//! times to.

use std::{hint::black_box, time::Instant};

use super::Cpu;
use crate::device::profile::Peaks;

/// Multiply-adds of each chain.
const ROUNDS: usize = 400_000;

/// Numbers that are copied: more than caches hold.
const COPIED: usize = 32 << 20;

impl Peaks {
    /// The peaks of this machine: multiply-adds of f32 on registers, and a copy of 128 MiB, on all
    /// threads. Takes the best of several tries, some tenths of a second: a peak is a ceiling, not
    /// a mean.
    pub fn measured(cpu: &Cpu) -> Self {
        let run = |width: usize, f: &(dyn Fn(usize) + Sync)| {
            let seconds = best(5, || cpu.run(cpu.threads(), f));
            2.0 * (cpu.threads() * ROUNDS * width) as f64 / seconds
        };
        let six = run(6 * 16, &|t| {
            let mut acc = [[t as f32; 16]; 6];
            chains_6(cpu.isa(), &mut acc, ROUNDS);
            black_box(acc);
        });
        let twelve = run(12 * 16, &|t| {
            let mut acc = [[t as f32; 16]; 12];
            chains_12(cpu.isa(), &mut acc, ROUNDS);
            black_box(acc);
        });
        let (from, mut to) = (vec![1.0f32; COPIED], vec![0.0f32; COPIED]);
        let seconds = best(5, || {
            let out = (&mut to[..], 1);
            cpu.rows(COPIED, 1 << 16, out, |range, to| to.copy_from_slice(&from[range]));
        });
        Self { flops: six.max(twelve), bytes: 8.0 * COPIED as f64 / seconds }
    }
}

fn best(tries: usize, mut f: impl FnMut()) -> f64 {
    let one = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..tries).map(|_| one(&mut f)).fold(f64::INFINITY, f64::min)
}

crate::simd! {
    /// `n` rounds over independent vectors of 16 numbers.
    fn chains_6(acc: &mut [[f32; 16]; 6], n: usize) {
        rounds(acc, n);
    }

    fn chains_12(acc: &mut [[f32; 16]; 12], n: usize) {
        rounds(acc, n);
    }
}

#[inline(always)]
fn rounds<const N: usize>(acc: &mut [[f32; 16]; N], n: usize) {
    let mut local = *acc;
    for _ in 0..n {
        for v in &mut local {
            for x in v {
                *x = x.mul_add(0.999, 0.001);
            }
        }
    }
    *acc = local;
}
