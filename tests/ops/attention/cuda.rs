//! The forward kernels: against the CPU, and equal bits in training, prefill and decoding.

use half::bf16;
use warpo::{
    device::{Buffer, Element},
    ops::attention::{self, Shape},
};

use super::{
    Case, Part, assert_same, chunks_have_the_bits_of_the_whole, shape,
    shared::{Group, turns_as_rope},
};
use crate::support::sim::{self, Arch, Lab, Order, Sim, Variant};

/// Forward at one shape, with sequences of these lengths.
struct Attend {
    shape: Shape,
    lens: Vec<usize>,
}

impl sim::Case for Attend {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (dev, s, rows) = (lab.dev(), &self.shape, self.lens.iter().sum::<usize>());
        let all = dev.read(lab.rows::<T>("qkv", rows, s.qkv_cols()).view())?;
        let mut rest = &all[..];
        let of = |n: &usize| {
            let (own, after) = rest.split_at(n * s.qkv_cols());
            rest = after;
            own.to_vec()
        };
        let case = Case::new(dev, s.clone(), self.lens.iter().map(of).collect());
        let (out, lse) = case.forward(dev, &case.whole());
        lab.by_row("out", &Buffer::of(dev, "test", &out)?);
        lab.by_row("lse", &Buffer::of(dev, "test", &lse)?);
        Ok(())
    }
}

/// All widths of heads, groups that do not divide a tile, lengths around a page.
#[test]
fn kernels_attend_as_the_cpu() {
    sim::check(|sim| {
        let all = [
            (shape(7, 1, 64), vec![9, 10, 0, 130]),
            (shape(4, 2, 80), vec![33, 70]),
            (shape(2, 1, 96), vec![66]),
            (shape(6, 2, 128), vec![21, 65]),
            (shape(2, 1, 256), vec![40, 70]),
            (Shape { window: Some(65), softcap: Some(2.0), ..shape(3, 1, 64) }, vec![200]),
            (shape(1, 1, 64), vec![1, 63, 64, 65]),
            (Shape { window: Some(1), ..shape(2, 1, 64) }, vec![70]),
        ];
        for (s, lens) in sim::cases(6, all) {
            sim.hold_bf16(&Attend { shape: s, lens });
        }
    });
}

#[test]
fn kernels_give_chunks_and_decoding_the_bits_of_the_whole() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        let chunks: &[usize] = if sim.variant == Variant::Plain { &[1, 21, 64, 65] } else { &[40] };
        let s = shape(3, 1, 64);
        for s in [s.clone(), Shape { window: Some(70), ..s }] {
            let all = [dev.clone()];
            chunks_have_the_bits_of_the_whole::<bf16>(&dev, &all, &s, [150, 40, 131], chunks);
        }
    });
}

fn decode_long_sequences(sim: &Sim, arch: Arch) {
    let dev = sim.device_as(Order::default(), arch);
    let plain = matches!(sim.variant, Variant::Plain | Variant::Gpu);
    let len = if plain && sim::full() { 2049 } else { 1090 };
    for window in [None, Some(600)] {
        let case = Case::<bf16>::random(&dev, Shape { window, ..shape(2, 1, 64) }, &[len]);
        let mut arena = case.room(&dev);
        let scope = arena.scope();
        let mut kv = case.cache(&dev, &scope);
        let (out, lse) = case.step(&dev, &mut kv, &case.whole());
        // Once more from the beginning, over pages that hold something.
        let edges = [1, 2, 3, 61, 64, 65, 127, 128, 129, 521, 1021, 1024, 1025, 1031, 1089];
        let mut from = 0;
        for n in edges.into_iter().chain([2039, 2048, 2049]).filter(|n| *n <= len) {
            for part in [from..n - 1, n - 1..n].into_iter().filter(|p| !p.is_empty()) {
                let (row, l) = case.step(&dev, &mut kv, &[(0, part.clone())]);
                let what = format!("{part:?}, window {window:?}");
                assert_same(&what, &row, &out[part.start * 128..part.end * 128]);
                assert_same(&what, &l, &lse[part.start * 2..part.end * 2]);
            }
            from = n;
        }
    }
}

/// At every length around a page and a part, and at primes, a row that is decoded alone has the
/// bits of the row in training, and so has a prompt in pieces.
#[test]
fn kernels_decode_long_sequences_with_the_bits_of_training() {
    sim::check(|sim| decode_long_sequences(sim, Arch::Sm80));
}

#[test]
fn kernels_on_hopper_decode_long_sequences_with_the_bits_of_training() {
    sim::check(|sim| decode_long_sequences(sim, Arch::Sm90));
}

#[test]
fn kernels_give_a_shared_prompt_the_bits_of_its_own() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        for (prompt, rest) in [(1, [1, 2, 3]), (64, [1, 70, 33]), (75, [5, 0, 60])] {
            let group = Group { shape: shape(4, 2, 64), prompt, rest };
            group.has_the_bits_of_whole_sequences::<bf16>(&dev);
        }
    });
}

fn decode_groups(sim: &Sim, arch: Arch) {
    let dev = sim.device_as(Order::default(), arch);
    let plain = matches!(sim.variant, Variant::Plain | Variant::Gpu);
    let page = shape(1, 1, 64).page(&dev);
    let run = |s: &Shape, prompt: usize, rest: [usize; 3]| {
        Group { shape: s.clone(), prompt, rest }.decodes::<bf16>(&dev);
    };
    // A block takes all of the group, a third of it, or the multiprocessors are busy.
    run(&shape(3, 1, 64), 3, [1, page - 1, page - 2]);
    run(&shape(24, 1, 64), page + 1, [1, page, 2]);
    run(&shape(2, 2, 64), page, [1, page - 1, 2]);
    for d in [80, 96, 128] {
        run(&Shape { softcap: Some(2.0), ..shape(2, 1, d) }, page + 1, [1, 3, 2]);
    }
    let wide = shape(2, 1, 256);
    run(&wide, wide.page(&dev) + 1, [1, 3, 2]);
    if plain {
        for prompt in sim::cases(2, [1024, 1100, 1024 - page, 1024 + page]) {
            run(&shape(2, 1, 64), prompt, [1, page - 1, page + 5]);
        }
    }
}

/// The next row of each of three sequences that share a prompt has the bits of training: where the
/// prompt is a part of a page, whole pages, and as long as a part of the softmax or longer; where a
/// block takes all of the group, or some.
#[test]
fn kernels_decode_a_group_with_the_bits_of_training() {
    sim::check(|sim| decode_groups(sim, Arch::Sm80));
}

#[test]
fn kernels_on_hopper_decode_a_group_with_the_bits_of_training() {
    sim::check(|sim| decode_groups(sim, Arch::Sm90));
}

#[test]
fn kernels_turn_while_they_append() {
    sim::check(|sim| turns_as_rope::<bf16>(&sim.device(Default::default())));
}

/// Both kernels for Hopper, all widths of heads, groups that do not divide a tile, lengths around a
/// page and a tile.
#[test]
fn kernels_on_hopper_attend_as_the_cpu() {
    sim::check(|sim| {
        let sim = sim.hopper();
        let all = [
            // Two warpgroups: parts of one and of both, and more than a page.
            (shape(7, 1, 64), vec![9, 10, 0, 130, 28]),
            (shape(4, 2, 80), vec![33, 132]),
            (shape(2, 1, 96), vec![130]),
            (shape(6, 2, 128), vec![21, 140]),
            (shape(2, 1, 256), vec![40, 133]),
            (Shape { window: Some(65), softcap: Some(2.0), ..shape(3, 1, 64) }, vec![300]),
            // One, alone and with others after it.
            (shape(7, 1, 64), vec![9, 1, 0, 5]),
            (shape(2, 1, 256), vec![32, 7]),
            (shape(1, 1, 64), vec![1, 63, 64]),
            (shape(6, 2, 128), vec![21, 3]),
            (shape(1, 1, 64), vec![1, 127, 65, 130]),
            (Shape { window: Some(1), ..shape(2, 1, 64) }, vec![140]),
            (Shape { window: Some(70), softcap: Some(2.0), ..shape(1, 1, 256) }, vec![200]),
        ];
        for (s, lens) in sim::cases(8, all) {
            sim.hold_bf16(&Attend { shape: s, lens });
        }
    });
}

/// Where the softmax starts anew: a sequence of more than two parts, and a window that begins in
/// one.
#[test]
fn kernels_on_hopper_merge_parts() {
    sim::check(|sim| {
        let sim = sim.hopper();
        for (s, lens) in [
            (shape(1, 1, 64), vec![2100]),
            (shape(1, 1, 256), vec![1040]),
            (Shape { window: Some(1000), ..shape(1, 1, 80) }, vec![1300]),
        ] {
            // A sanitizer looks at fewer rows.
            let lens = if sanitized(&sim) { vec![1030] } else { lens };
            sim.hold_bf16(&Attend { shape: s, lens });
        }
    });
}

/// In chunks and one by one, alone and among others, wide or narrow, rows have the bits of whole
/// sequences.
#[test]
fn kernels_on_hopper_have_the_bits_of_whole_sequences() {
    sim::check(|sim| {
        let dev = sim.hopper().device(Order::default());
        let all = [
            (Shape { window: Some(100), ..shape(4, 2, 128) }, [150, 20, 140], &[1, 33, 150][..]),
            // In a warp's rows some see all of a page, and the last one not its first position.
            (Shape { window: Some(143), ..shape(1, 1, 64) }, [150, 9, 1], &[33]),
            (shape(2, 1, 256), [70, 33, 66], &[1, 32, 65]),
            (shape(7, 1, 64), [150, 70, 131], &[1, 9, 10, 50, 129]),
            // The softmax starts anew at the same positions, wherever a window begins.
            (Shape { window: Some(1060), ..shape(1, 1, 80) }, [1300, 1, 1], &[200, 1030]),
        ];
        for (s, lens, chunks) in sim::cases(3, all) {
            let (lens, chunks) = match sanitized(sim) {
                false => (lens, chunks),
                true => (lens.map(|n| n / 7 + 1), &chunks[..1]),
            };
            let all = [dev.clone()];
            chunks_have_the_bits_of_the_whole::<bf16>(&dev, &all, &s, lens, chunks);
        }
        for (prompt, rest) in [(128, [1, 70, 3]), (130, [5, 1, 60])] {
            for s in [shape(3, 1, 64), Shape { window: Some(50), ..shape(2, 1, 256) }] {
                let shape = if sanitized(sim) { shape(1, 1, 64) } else { s };
                Group { shape, prompt, rest }.has_the_bits_of_whole_sequences::<bf16>(&dev);
            }
        }
    });
}

fn sanitized(sim: &Sim) -> bool {
    matches!(sim.variant, Variant::Address | Variant::Thread)
}

/// More sequences than blocks, so that a block takes one after the other: each row has the bits
/// that it has alone.
fn blocks_are_used_again(sim: &Sim, arch: Arch) {
    let dev = sim.device_as(Order::default(), arch);
    let count = if sim.variant == Variant::Gpu { 600 } else { 7 };
    let s = shape(8, 4, 64);
    let lens: Vec<usize> =
        (0..count).map(|i| 1 + i * 89 % if count > 7 { 700 } else { 150 }).collect();
    let case = Case::<bf16>::random(&dev, s.clone(), &lens);
    let width = s.q_heads * s.head_dim;
    let mut arena = case.room(&dev);
    let scope = arena.scope();
    let mut kv = case.cache(&dev, &scope);
    let (all, _) = case.step(&dev, &mut kv, &case.whole());
    let last: Vec<Part> = lens.iter().enumerate().map(|(i, n)| (i, n - 1..*n)).collect();
    let (rows, _) = case.step(&dev, &mut kv, &last);
    let mut end = 0;
    for (i, n) in lens.iter().enumerate() {
        end += n;
        let got = &rows[i * width..(i + 1) * width];
        assert_same(&format!("{i}, decoded"), got, &all[(end - 1) * width..end * width]);
        if i % 3 == 0 {
            let (alone, _) = case.forward(&dev, &[(i, 0..*n)]);
            assert_same(&format!("{i}, alone"), &all[(end - n) * width..end * width], &alone);
        }
    }
}

#[test]
fn kernels_use_blocks_again() {
    sim::check(|sim| blocks_are_used_again(sim, Arch::Sm80));
}

#[test]
fn kernels_on_hopper_use_blocks_again() {
    sim::check(|sim| blocks_are_used_again(sim, Arch::Sm90));
}

/// As many blocks of decoding are on a multiprocessor as grids count on.
#[test]
fn kernels_of_decoding_share_a_multiprocessor() {
    sim::check(|sim| {
        let all = attention::resident(&sim.device_as(Order::default(), Arch::Sm90)).unwrap();
        assert_eq!(all.len(), if sim.variant == Variant::Gpu { all.len() } else { 5 });
        for [head, blocks, meant] in all {
            assert!(blocks >= meant, "heads of {head}: {blocks} blocks, meant for {meant}");
        }
    });
}
