//! Hopper's instructions: on the simulator every mistake with them is found; where operands lie and
//! what each thread holds, by the tables of the PTX ISA written here once more, is the same on the
//! simulator and on a GPU.

use half::bf16;
use warpo::device::Device;

use super::maps::{aligned_sum, halves, hold_to_the_rule};
use crate::support::{
    raw::{Arg, Boxes, Kernel},
    sim::{self, Arch, Order, Sim, Variant},
};

const FAULTS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/faults_sm90.fatbin"));
const MAPS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/maps_sm90.fatbin"));

/// Whether what `sim` runs on has these instructions.
fn has_hopper(sim: &Sim) -> bool {
    let Device::Cuda(cuda) = sim.hopper().device(Order::default()) else { return false };
    let there = cuda.arch() == Arch::Sm90;
    if !there {
        println!("skipped: this GPU is not of compute capability 9.0");
    }
    there
}

/// Whole numbers from -3 to 3: sums of a few hundred products are exact.
fn numbers(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i + 1) * (i + 7 * seed) % 31 % 7) as f32 - 3.0).collect()
}

fn bits(x: f32) -> u16 {
    bf16::from_f32(x).to_bits()
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| bits(*x).to_le_bytes()).collect()
}

/// Boxes of 64 columns of a matrix without gaps, swizzled as wgmma reads them.
fn boxes(rows: u64, cols: u64, tall: u32) -> Boxes {
    Boxes::matrix([cols, rows], cols, [64, tall], 128)
}

/// A kernel of `faults_sm90.cu`, and what must be said about its mistakes 1, 2 and so on.
struct Subject {
    name: &'static str,
    threads: u32,
    blocks: u32,
    shared: usize,
    inputs: Vec<(Vec<u8>, Option<Boxes>)>,
    /// Of the output, in bf16 then.
    stores: Option<Boxes>,
    want: Vec<f32>,
    says: &'static [&'static str],
}

/// `A B^T` for rows of k numbers; the term of each k has a sign.
fn product(a: &[f32], b: &[f32], k: usize, sign: fn(usize) -> f32) -> Vec<f32> {
    let dot = |i: usize, j: usize| (0..k).map(|l| sign(l) * a[i * k + l] * b[j * k + l]).sum();
    let cols = b.len() / k;
    (0..a.len() / k * cols).map(|i| dot(i / cols, i % cols)).collect()
}

fn subjects() -> [Subject; 7] {
    let (a, b) = (numbers(1, 128 * 256), numbers(2, 64 * 256));
    let (left, right) = (numbers(3, 64 * 64), numbers(4, 64 * 64));
    let x = numbers(5, 60 * 56);
    let tiles = numbers(6, 3 * 64 * 64);
    let row = |r: usize| -> f32 {
        let sum = |k: usize| tiles[(64 * k + r) * 64..][..64].iter().sum::<f32>();
        (0..3).map(sum).sum()
    };
    let sums: Vec<f32> = (0..64).map(row).collect();
    let lines: Vec<f32> = numbers(7, 384);
    let steps = numbers(8, 96);
    let copied = boxes(60, 56, 64);
    let halves = Boxes { swizzle: 0, ..boxes(192, 64, 32) };
    [
        Subject {
            name: "product",
            threads: 384,
            blocks: 1,
            shared: 2 * (128 + 64) * 128 + 32,
            inputs: vec![
                (bytes(&a), Some(boxes(128, 256, 128))),
                (bytes(&b), Some(boxes(64, 256, 64))),
            ],
            stores: None,
            want: product(&a, &b, 256, |k| if k < 128 { -1.0 } else { 1.0 }),
            says: &[
                "an mbarrier gets more bytes than it expects at ",
                "that lacks 0 arrivals and 4096 bytes)",
                "missing fence_barrier_init",
                "y[0] is NaN",
                "y[",
                "missing wgmma_fence",
                "missing wgmma_fence",
                "a TMA load writes what a wgmma still reads at ",
                "accumulators were written while a wgmma was under way",
            ],
        },
        Subject {
            name: "registers",
            threads: 384,
            blocks: 1,
            shared: 0,
            inputs: vec![(bytemuck::cast_slice(&lines).to_vec(), None)],
            stores: None,
            want: lines,
            says: &["wait for a share of the block's registers at "],
        },
        Subject {
            name: "proxy",
            threads: 128,
            blocks: 1,
            shared: 2 * 64 * 128,
            inputs: vec![(bytes(&left), None), (bytes(&right), None)],
            stores: None,
            want: product(&left, &right, 64, |_| 1.0),
            says: &["missing fence.proxy.async"],
        },
        Subject {
            name: "fragments",
            threads: 128,
            blocks: 1,
            shared: 8 * 128,
            inputs: vec![(bytes(&left), None), (bytes(&right[..8 * 64]), None)],
            stores: None,
            want: product(&left, &right[..8 * 64], 64, |_| 1.0),
            says: &["missing wgmma_fence"],
        },
        Subject {
            name: "copy",
            threads: 64,
            blocks: 1,
            shared: 2 * 64 * 128 + 16,
            inputs: vec![(bytes(&x), Some(copied))],
            stores: Some(copied),
            want: x,
            says: &[
                "missing fence.proxy.async",
                "a thread exits while its TMA store reads shared memory",
                "y[0] is 0",
                "y[",
                "that lacks 1 arrivals and 0 bytes)",
                "y[",
                "y[0] is 0",
                "an mbarrier has gone on two phases while a thread waits for one at ",
                "a block exits while a TMA load to its shared memory is under way, at ",
                "a tensor map of 2 dimensions is used with 3 at ",
            ],
        },
        Subject {
            name: "turns",
            threads: 64,
            blocks: 1,
            shared: 128,
            inputs: vec![(bytemuck::cast_slice(&steps).to_vec(), None)],
            stores: None,
            want: (0..32)
                .map(|l| 8.0 * steps[l] + 4.0 * steps[32 + l] + 2.0 * steps[64 + l])
                .collect(),
            says: &["y[", "threads wait for a barrier at "],
        },
        Subject {
            name: "cluster",
            threads: 64,
            // two clusters
            blocks: 4,
            shared: 64 * 128 + 32,
            inputs: vec![(bytes(&tiles), Some(halves))],
            stores: None,
            want: sums.repeat(4),
            says: &[
                "threads wait for a mbarrier at ",
                "a block has exited before its cluster was done with its shared memory",
                "missing cluster_sync before an mbarrier of another block is used at ",
            ],
        },
    ]
}

impl Subject {
    /// Runs it: what is wrong with its output, or why it was stopped.
    fn run(&self, sim: &Sim, order: Order, mistake: usize) -> Option<String> {
        let name = format!("fault90_{}", self.name);
        let &Self { threads, blocks, shared, .. } = self;
        let kernel =
            Kernel { image: FAULTS, name: &name, threads, blocks, shared, order, together: false };
        let inputs = self.inputs.iter().map(|(x, boxes)| match boxes {
            Some(boxes) => Arg::Map(x, *boxes),
            None => Arg::Bytes(x),
        });
        let mut args: Vec<Arg<'_>> = inputs.collect();
        args.extend(self.stores.map(Arg::OfOutput));
        args.push(Arg::Int(mistake as i32));
        let mut y = vec![0u8; self.want.len() * if self.stores.is_some() { 2 } else { 4 }];
        if let Err(stopped) = kernel.run(sim, &mut y, &args) {
            return Some(stopped);
        }
        let y: Vec<f32> = match self.stores {
            Some(_) => {
                bytemuck::pod_collect_to_vec::<u8, bf16>(&y).iter().map(|x| x.to_f32()).collect()
            }
            None => bytemuck::pod_collect_to_vec(&y),
        };
        let bad = (0..y.len()).find(|i| y[*i] != self.want[*i])?;
        Some(format!("y[{bad}] is {}, wanted {}", y[bad], self.want[bad]))
    }
}

#[test]
fn without_mistakes_kernels_for_hopper_are_clean() {
    sim::check(|sim| {
        if !has_hopper(sim) {
            return;
        }
        for subject in subjects() {
            for order in sim.orders() {
                let wrong = subject.run(sim, order, 0);
                assert_eq!(wrong, None, "{} {:?} {order:?}", subject.name, sim.variant);
            }
        }
    });
}

#[test]
fn every_mistake_with_hopper_is_found() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    for subject in subjects() {
        for (i, says) in subject.says.iter().enumerate() {
            let run = |order| subject.run(&sim, order, i + 1).unwrap_or_default();
            let texts: Vec<String> = sim::orders().into_iter().map(run).collect();
            let name = subject.name;
            // What stops it, and not its output, names the line.
            let named =
                |t: &&String| t.is_empty() || t.starts_with("y[") || t.contains("_sm90.cu:");
            assert_eq!(texts.iter().find(|t| !named(t)), None);
            assert!(
                texts.iter().any(|t| t.contains(says)),
                "{name} {}, wanted \"{says}\": {texts:#?}",
                i + 1
            );
        }
    }
}

/// Names the subject and the mistake for a sanitizer.
const MISTAKE: &str = "WARPO_MISTAKE";

#[test]
fn what_hopper_brings_late_is_a_race_to_those_who_do_not_wait() {
    let Some(sim) = Sim::build(Variant::Thread) else { return };
    for mistake in ["copy 6", "copy 7"] {
        let (ok, text) = sim.child_with("device::hopper::mistake", &[(MISTAKE, mistake)]);
        assert!(!ok && text.contains("data race"), "{mistake}:\n{text}");
        assert!(text.contains("faults_sm90.cu:"), "{mistake}:\n{text}");
    }
}

#[test]
#[ignore = "run by what_hopper_brings_late_is_a_race_to_those_who_do_not_wait"]
fn mistake() {
    let (Ok(which), Some(sim)) = (std::env::var(MISTAKE), Sim::of_child()) else { return };
    let (name, mistake) = which.split_once(' ').unwrap();
    let subject = subjects().into_iter().find(|s| s.name == name).unwrap();
    println!("{which}: {:?}", subject.run(&sim, Order::default(), mistake.parse().unwrap()));
}

/// Where 16 bytes lie that are packet `at / 16` without a swizzle of lines of `span` bytes.
fn swizzled(at: usize, span: usize) -> usize {
    let (line, packet) = (at / 128, at / 16 % 8);
    128 * line + 16 * (packet ^ (line % (span / 16).max(1))) + at % 16
}

#[test]
fn kernel_tma_brings_boxes() {
    sim::check(|sim| {
        if !has_hopper(sim) {
            return;
        }
        let (rows, cols, stride) = (41i32, 72i32, 80usize);
        let x: Vec<u16> = (0..rows as usize * stride).map(|i| 1 + i as u16).collect();
        for (wide, tall, swizzle) in
            [(64, 32, 128), (32, 24, 64), (16, 40, 32), (64, 8, 0), (128, 8, 0), (8, 16, 0)]
        {
            let dims = [cols as u64, rows as u64];
            let boxes = Boxes::matrix(dims, stride as u64, [wide, tall], swizzle);
            let n = (wide * tall) as usize;
            for (left, top) in [(0, 0), (8, 9), (5, 3), (-3, 0), (16, 30), (0, -2), (70, 40)] {
                let order = Order::default();
                let (shared, name) = (2 * n + 16, "map_tma");
                let kernel = Kernel {
                    image: MAPS,
                    name,
                    threads: 32,
                    blocks: 1,
                    shared,
                    order,
                    together: false,
                };
                let mut out = vec![u16::MAX; n];
                let ints = [2 * n as i32, left, top].map(Arg::Int);
                let map = Arg::Map(bytemuck::cast_slice(&x), boxes);
                let args = [map, ints[0], ints[1], ints[2]];
                kernel.run(sim, bytemuck::cast_slice_mut(&mut out), &args).unwrap();
                for r in 0..tall as i32 {
                    for c in 0..wide as i32 {
                        let inside =
                            (0..rows).contains(&(top + r)) && (0..cols).contains(&(left + c));
                        let from = (top + r) * stride as i32 + left + c;
                        let want = if inside { x[from as usize] } else { 0 };
                        let at = swizzled(2 * (r * wide as i32 + c) as usize, swizzle as usize);
                        assert_eq!(out[at / 2], want, "{boxes:?} at {left}, {top}: {r}, {c}");
                    }
                }
            }
        }
    });
}

/// Boxes of three dimensions, as of positions by heads by columns: their rows lie one after the
/// other.
#[test]
fn kernel_tma_brings_boxes_of_planes() {
    sim::check(|sim| {
        if !has_hopper(sim) {
            return;
        }
        let (cols, rows, planes, strides) = (72i32, 9i32, 5i32, [80usize, 800]);
        let x: Vec<u16> = (0..planes as usize * strides[1]).map(|i| 1 + i as u16).collect();
        for (wide, tall, deep, swizzle) in
            [(64, 3, 4, 128), (64, 8, 2, 128), (32, 5, 3, 64), (8, 2, 7, 0)]
        {
            let boxes = Boxes {
                rank: 3,
                dims: [cols as u64, rows as u64, planes as u64],
                strides: strides.map(|n| n as u64),
                size: [wide, tall, deep],
                swizzle,
            };
            let n = (wide * tall * deep) as usize;
            for [left, top, front] in [[0, 0, 0], [8, 4, 1], [64, 8, 3], [-3, -1, -2], [0, 0, 5]] {
                let (shared, name, order) = (2 * n + 16, "map_tma_planes", Order::default());
                let kernel = Kernel {
                    image: MAPS,
                    name,
                    threads: 32,
                    blocks: 1,
                    shared,
                    order,
                    together: false,
                };
                let mut out = vec![u16::MAX; n];
                let [bytes, a, b, c] = [2 * n as i32, left, top, front].map(Arg::Int);
                let args = [Arg::Map(bytemuck::cast_slice(&x), boxes), bytes, a, b, c];
                kernel.run(sim, bytemuck::cast_slice_mut(&mut out), &args).unwrap();
                for i in 0..n as i32 {
                    let (c, r, p) =
                        (i % wide as i32, i / wide as i32 % tall as i32, i / (wide * tall) as i32);
                    let (c, r, p) = (left + c, top + r, front + p);
                    let inside = (0..cols).contains(&c)
                        && (0..rows).contains(&r)
                        && (0..planes).contains(&p);
                    let from = p * strides[1] as i32 + r * strides[0] as i32 + c;
                    let want = if inside { x[from as usize] } else { 0 };
                    let at = swizzled(2 * i as usize, swizzle as usize);
                    assert_eq!(out[at / 2], want, "{boxes:?} at {left}, {top}, {front}: {i}");
                }
            }
        }
    });
}

/// Bytes between groups of 8 lines, and between lines of 64 columns.
#[derive(Clone, Copy)]
struct Lines {
    stride: usize,
    leading: usize,
}

/// Writes element (i, k) of an operand where wgmma looks for it: i is the row of A or the column of
/// B.
fn put(image: &mut [u8], lines: Lines, by_columns: bool, (i, k): (usize, usize), x: f32) {
    let (line, at) = if by_columns { (k, i) } else { (i, k) };
    let begin = line / 8 * lines.stride + line % 8 * 128;
    let at = swizzled(begin + at / 64 * lines.leading + 2 * (at % 64), 128);
    image[at..at + 2].copy_from_slice(&bits(x).to_le_bytes());
}

/// Of a warpgroup's product, two wgmma.
const K: usize = 32;

/// A B of a warpgroup, A [64, K] and B [n, K] by rows of k: `[64, n]`. The form says how operands
/// lie: 1: A by columns; 2: B by columns; 4: A in registers.
fn warpgroup_product(sim: &Sim, n: usize, form: usize, a: &[f32], b: &[f32]) -> Vec<f32> {
    const RIGHT: usize = 65536;
    // What nobody reads is NaN.
    let mut operands = vec![0xFF; RIGHT + 8192];
    let (right, left) = operands.split_at_mut(RIGHT);
    for k in 0..K {
        let (of_left, of_right) =
            (Lines { stride: 1024, leading: 0 }, Lines { stride: 2048, leading: 8192 });
        for m in 0..64 {
            put(left, of_left, form & 1 != 0, (m, k), a[m * K + k]);
        }
        for i in 0..n {
            put(right, of_right, form & 2 != 0, (i, k), b[i * K + k]);
        }
    }
    // A of two products in registers: [thread, product, register].
    let mut regs = vec![[[0u32; 4]; 2]; 128];
    for (t, mine) in regs.iter_mut().enumerate() {
        let (row, col) = (16 * (t / 32) + t % 32 / 4, 2 * (t % 4));
        for (step, four) in mine.iter_mut().enumerate() {
            for (i, (r, c)) in [(0, 0), (8, 0), (0, 8), (8, 8)].into_iter().enumerate() {
                let at = (row + r) * K + 16 * step + col + c;
                four[i] = u32::from(bits(a[at])) | u32::from(bits(a[at + 1])) << 16;
            }
        }
    }
    let name = format!("map_wgmma_{n}");
    let (shared, order) = (RIGHT + 8192, Order::default());
    let kernel = Kernel {
        image: MAPS,
        name: &name,
        threads: 128,
        blocks: 1,
        shared,
        order,
        together: false,
    };
    let mut out = vec![f32::NAN; 64 * n];
    let regs = Arg::Bytes(bytemuck::cast_slice(&regs));
    let args = [regs, Arg::Bytes(&operands), Arg::Int(form as i32)];
    kernel.run(sim, bytemuck::cast_slice_mut(&mut out), &args).unwrap();
    let mut product = vec![f32::NAN; 64 * n];
    for (at, got) in out.iter().enumerate() {
        let (t, i) = (at / (n / 2), at % (n / 2));
        let row = 16 * (t / 32) + t % 32 / 4 + i / 2 % 2 * 8;
        let col = i / 4 * 8 + 2 * (t % 4) + i % 2;
        product[row * n + col] = *got;
    }
    product
}

/// Widths of 80 and 96 by columns of B take a part of its last lines of 64: products of heads leave
/// that alone until this ran on a GPU.
#[test]
fn kernel_warpgroups_multiply_what_descriptors_say() {
    sim::check(|sim| {
        if !has_hopper(sim) {
            return;
        }
        for n in [8usize, 16, 32, 64, 80, 96, 128, 256] {
            for form in [0, 1, 2, 3, 4, 6] {
                let (a, b) = (numbers(n + form, 64 * K), numbers(n + form + 1, n * K));
                for (at, got) in warpgroup_product(sim, n, form, &a, &b).iter().enumerate() {
                    let (row, col) = (at / n, at % n);
                    let want: f32 = (0..K).map(|k| a[row * K + k] * b[col * K + k]).sum();
                    assert_eq!(*got, want, "{n} columns, form {form}: row {row}, column {col}");
                }
            }
        }
    });
}

#[test]
fn kernel_sums_of_wgmma_are_cut_off_and_rounded_toward_zero() {
    sim::check(|sim| {
        if !has_hopper(sim) {
            return;
        }
        let mut sums = Vec::new();
        for n in [8, 64] {
            let (a, b) = (halves("left", 64 * K), halves("right", n * K));
            for (at, got) in warpgroup_product(sim, n, 0, &a, &b).into_iter().enumerate() {
                let (a, b) = (&a[at / n * K..][..K], &b[at % n * K..][..K]);
                let of = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
                let terms: Vec<f64> = a.iter().zip(b).map(of).collect();
                let first = aligned_sum(&terms[..16], 2);
                sums.push((got, [&terms[16..], &[f64::from(first)]].concat()));
            }
        }
        hold_to_the_rule(sim, &sums);
    });
}
