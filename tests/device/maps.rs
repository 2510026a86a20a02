//! Which lane holds what of a tensor core's operands: the tables of the PTX ISA, written here once
//! more, hold on the simulator and on a GPU, to the bit.

use half::bf16;
use warpo::rng::{Philox, Purpose};

use crate::support::{
    randn,
    raw::{Arg, Kernel},
    sim::{self, Order, Sim, Variant},
};

const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/maps.fatbin"));

fn run(sim: &Sim, name: &'static str, inputs: [&[u8]; 2], last: i32) -> [[u32; 4]; 32] {
    let order = Order::default();
    let kernel =
        Kernel { image: IMAGE, name, threads: 32, blocks: 1, shared: 512, order, together: false };
    let mut out = [[u32::MAX; 4]; 32];
    let args = [Arg::Bytes(inputs[0]), Arg::Bytes(inputs[1]), Arg::Int(last)];
    kernel.run(sim, bytemuck::cast_slice_mut(&mut out), &args).unwrap();
    out
}

/// Two neighbours of 16 bits, the first in the low half.
fn two(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// Whole numbers from -4 to 4: their products and sums are exact in any order.
fn numbers(stream: u64, n: usize) -> Vec<f32> {
    let draw = Philox::new(5, stream, 0, Purpose::Init);
    (0..n).map(|i| draw.below(i as u32, 9) as f32 - 4.0).collect()
}

/// D [16, 8] of A [16, 16], by rows, and B [16, 8], by columns, in bf16, on top of a number.
fn product(sim: &Sim, a: &[f32], b: &[f32], first: i32) -> Vec<f32> {
    let half = |x: f32| bf16::from_f32(x).to_bits();
    let of_a = |r: usize, c: usize| two(half(a[16 * r + c]), half(a[16 * r + c + 1]));
    let of_b = |r: usize, c: usize| two(half(b[16 * c + r]), half(b[16 * c + r + 1]));
    let (mut fa, mut fb) = ([[0u32; 4]; 32], [[0u32; 2]; 32]);
    for l in 0..32 {
        let (row, col) = (l / 4, 2 * (l % 4));
        fa[l] = [(0, 0), (8, 0), (0, 8), (8, 8)].map(|(r, c)| of_a(row + r, col + c));
        fb[l] = [0, 8].map(|r| of_b(col + r, row));
    }
    let inputs = [bytemuck::cast_slice(&fa), bytemuck::cast_slice(&fb)];
    let out = run(sim, "map_mma", inputs, first);
    let mut d = vec![f32::NAN; 128];
    for l in 0..32 {
        let (row, col) = (l / 4, 2 * (l % 4));
        for (i, (r, c)) in [(0, 0), (0, 1), (8, 0), (8, 1)].into_iter().enumerate() {
            d[8 * (row + r) + col + c] = f32::from_bits(out[l][i]);
        }
    }
    d
}

#[test]
fn kernel_lanes_hold_the_operands_of_mma() {
    sim::check(|sim| {
        for trial in 0..8 {
            let (a, b) = (numbers(2 * trial, 256), numbers(2 * trial + 1, 128));
            for (i, got) in product(sim, &a, &b, 0).into_iter().enumerate() {
                let (r, c) = (i / 8, i % 8);
                let want: f32 = (0..16).map(|k| a[16 * r + k] * b[16 * c + k]).sum();
                assert_eq!(got, want, "D[{r}, {c}]");
            }
        }
    });
}

/// The sum of a tensor core, as measured on Hopper: all terms, the accumulator among them, are cut
/// off `extra` bits below the last one that an f32 of the largest term's size has; their sum is
/// exact, and rounded toward zero. (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores";
/// Li et al. 2024, "FTTN")
pub(super) fn aligned_sum(terms: &[f64], extra: i32) -> f32 {
    let most = terms.iter().fold(0.0f64, |m, t| m.max(t.abs()));
    if most == 0.0 {
        return 0.0;
    }
    let last = 2.0f64.powi(exponent(most) - 23 - extra);
    let sum: f64 = terms.iter().map(|t| (t / last).trunc() * last).sum();
    let near = sum as f32;
    if f64::from(near).abs() > sum.abs() { f32::from_bits(near.to_bits() - 1) } else { near }
}

/// 2 to this power is at most `x`, a normal number.
fn exponent(x: f64) -> i32 {
    (x.to_bits() >> 52 & 0x7FF) as i32 - 1023
}

/// Numbers in bf16, of many sizes.
pub(super) fn halves(name: &str, n: usize) -> Vec<f32> {
    let (x, sizes): (Vec<f64>, Vec<f64>) = (randn(name, n), randn(&format!("{name} size"), n));
    let of = |(x, size): (&f64, &f64)| bf16::from_f64(x * 2.0f64.powi((3.0 * size) as i32));
    x.iter().zip(&sizes).map(of).map(bf16::to_f32).collect()
}

/// Holds sums of a tensor core, each with its terms, to the rule: to the bit on the simulator. What
/// a GPU does is nowhere promised: its sums lose at most what they do with one bit less, and how
/// many are those of the rule is printed.
pub(super) fn hold_to_the_rule(sim: &Sim, sums: &[(f32, Vec<f64>)]) {
    if sim.variant != Variant::Gpu {
        for (got, terms) in sums {
            assert_eq!(got.to_bits(), aligned_sum(terms, 2).to_bits(), "{terms:?}");
        }
        return;
    }
    for extra in 0..4 {
        let same = sums.iter().filter(|(got, terms)| *got == aligned_sum(terms, extra)).count();
        println!("{same} of {} sums are those with {extra} extra bits", sums.len());
    }
    for (got, terms) in sums {
        let most = terms.iter().fold(0.0f64, |m, t| m.max(t.abs()));
        // Each of 17 terms loses less than half of the largest one's last bit; their sum, below 64
        // times its leading bit, less than 32 times the last; the sum before, among the terms, may
        // be another by as much.
        let (exact, bit) = (terms.iter().sum::<f64>(), 2.0f64.powi(exponent(most) - 23));
        let error = (f64::from(*got) - exact).abs();
        assert!(error <= 2.0 * (17.0 / 2.0 + 32.0) * bit, "{got:e}, wanted {exact:e}: {terms:?}");
    }
}

#[test]
fn kernel_sums_of_mma_are_cut_off_and_rounded_toward_zero() {
    sim::check(|sim| {
        // 2^24 and 16 products, worked by hand: multiples of 1/2 are kept.
        let of = |x: f32| product(sim, &[x; 256], &[1.0; 128], 1 << 24)[0];
        if sim.variant != Variant::Gpu {
            let got = [0.375, 0.75, -0.75, 0.5, 1.0].map(of);
            let want = [16_777_216.0, 16_777_224.0, 16_777_208.0, 16_777_224.0, 16_777_232.0];
            assert_eq!(got, want);
            let one = [&[1.5f32][..], &[0.0; 255]].concat();
            assert_eq!(product(sim, &one, &[1.0; 128], 1 << 24)[0], 16_777_216.0, "toward zero");
            assert_eq!(product(sim, &one, &[1.0; 128], -(1 << 24))[0], -16_777_214.0);
        }
        let mut sums = Vec::new();
        for (trial, first) in [0, 1, -3, 100, 12_345_677, -16_777_215].into_iter().enumerate() {
            let (a, b) = (halves(&format!("a{trial}"), 256), halves(&format!("b{trial}"), 128));
            for (i, got) in product(sim, &a, &b, first).into_iter().enumerate() {
                let (a, b) = (&a[i / 8 * 16..][..16], &b[i % 8 * 16..][..16]);
                let terms = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
                sums.push((got, terms.chain([f64::from(first)]).collect()));
            }
        }
        hold_to_the_rule(sim, &sums);
    });
}

#[test]
fn kernel_lanes_hold_the_rows_of_ldmatrix() {
    let x: Vec<u16> = (0..256).map(|i| i * 251).collect();
    let at = |matrix: usize, r: usize, c: usize| x[64 * matrix + 8 * r + c];
    sim::check(|sim| {
        for transposed in [false, true] {
            let inputs = [bytemuck::cast_slice(&x), &[0; 128]];
            let out = run(sim, "map_matrix", inputs, i32::from(transposed));
            for l in 0..32 {
                let (a, b) = (l / 4, 2 * (l % 4));
                let want = [0, 1, 2, 3].map(|m| match transposed {
                    false => two(at(m, a, b), at(m, a, b + 1)),
                    true => two(at(m, b, a), at(m, b + 1, a)),
                });
                assert_eq!(out[l], want, "lane {l}");
            }
        }
    });
}
