//! Which lane holds what of a tensor core's operands: the tables of the PTX ISA, written here once
//! more, hold on the simulator and on a GPU, to the bit.

use half::bf16;
use warpo::rng::{Philox, Purpose};

use crate::support::{
    raw::{Arg, Kernel},
    sim::{self, Order, Sim},
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

#[test]
fn kernel_lanes_hold_the_operands_of_mma() {
    sim::check(|sim| {
        for trial in 0..8 {
            // A [16, 16] by rows, B [16, 8] by columns.
            let (a, b) = (numbers(2 * trial, 256), numbers(2 * trial + 1, 128));
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
            let out = run(sim, "map_mma", inputs, 0);
            for l in 0..32 {
                let (row, col) = (l / 4, 2 * (l % 4));
                for (i, (r, c)) in [(0, 0), (0, 1), (8, 0), (8, 1)].into_iter().enumerate() {
                    let (r, c) = (row + r, col + c);
                    let want: f32 = (0..16).map(|k| a[16 * r + k] * b[16 * c + k]).sum();
                    assert_eq!(f32::from_bits(out[l][i]), want, "lane {l}, D[{r}, {c}]");
                }
            }
        }
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
