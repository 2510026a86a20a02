//! Rotary positions: hand-worked turns, goldens, central differences, bits.

use warpo::{
    device::{Buffer, Device, Element, Float},
    ops::rope::{self, Frequencies, Heads, Rope, Table},
};

use crate::support::{
    OP, assert_bits, assert_close, assert_nan_only, devices, gather,
    golden::Golden,
    gradcheck, host, inner, randn, refusal, shuffled,
    sim::{self, Case, Lab},
};

const PLAIN: Rope = Rope::plain(10_000.0);
const LLAMA3: Rope = Rope {
    theta: 500_000.0,
    frequencies: Frequencies::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original: 8192.0,
    },
    attention_factor: 1.0,
};

/// Turns the first `heads` heads of each row, of `row_len` elements, or back.
fn turn<F: Float>(
    dev: &Device,
    x: &[F],
    (row_len, heads, head_dim): (usize, usize, usize),
    positions: &[u32],
    table: &Table<F>,
    back: bool,
) -> Vec<F> {
    let mut x = x.to_vec();
    let op = if back { rope::backward } else { rope::forward };
    let heads = Heads { row_len, heads, head_dim };
    op(dev, (&mut x).into(), heads, positions.into(), table).unwrap();
    x
}

#[test]
fn hand_worked() {
    let dev = Device::cpu();
    // theta 100, four elements: element 0 turns with 2 by 1 rad a position, 1 with 3 by 0.1 rad
    let table = Table::<f64>::new(host(), &Rope::plain(100.0), 4, 4).unwrap();
    let x = [1.0, 10.0, 2.0, 20.0, 7.0, 8.0, 9.0, 5.0];
    for (p, a) in [(0, 0.0f64), (1, 1.0), (3, 3.0)] {
        let b = 0.1 * a;
        let want = [
            a.cos() - 2.0 * a.sin(),
            10.0 * b.cos() - 20.0 * b.sin(),
            2.0 * a.cos() + a.sin(),
            20.0 * b.cos() + 10.0 * b.sin(),
            7.0, // beyond the heads, as the values of attention
            8.0,
            9.0,
            5.0,
        ];
        let y = turn(&dev, &x, (8, 1, 4), &[p], &table, false);
        assert_close(&format!("position {p}"), &y, &want, 1e-15, 1e-15);
        let back = turn(&dev, &y, (8, 1, 4), &[p], &table, true);
        assert_close(&format!("back from {p}"), &back, &x, 1e-14, 0.0);
    }
    // each row by its own position, each head by the same angle
    let (x, two) =
        ([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0], Table::new(host(), &PLAIN, 2, 3).unwrap());
    let y = turn(&dev, &x, (4, 2, 2), &[2, 1], &two, false);
    let (c, s) = (1f64.cos(), 1f64.sin());
    assert_close("rows", &y, &[2f64.cos(), 2f64.sin(), 0.0, 0.0, -s, c, 0.0, 0.0], 1e-15, 0.0);
    assert!(turn(&dev, &[], (4, 1, 4), &[], &table, false).is_empty());
}

#[test]
fn llama3_stretches_long_wavelengths() {
    let plain = Rope::plain(500_000.0).inv_freq(64);
    for (f, g) in plain.iter().zip(LLAMA3.inv_freq(64)) {
        // turns within the original context: 4 or more are kept, 1 or fewer slowed by 8
        let turns = 8192.0 * f / std::f64::consts::TAU;
        let keep = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
        assert_close(&format!("{turns}"), &[g / f], &[keep + (1.0 - keep) / 8.0], 0.0, 1e-14);
    }
    let ratio = |i: usize| LLAMA3.inv_freq(64)[i] / plain[i];
    assert_eq!((ratio(0), ratio(31)), (1.0, 0.125));
    let between = (0..32).filter(|i| ratio(*i) > 0.125 && ratio(*i) < 1.0).count();
    assert_eq!(between, 3);
}

#[test]
fn angles_are_those_of_hugging_face() {
    let g = Golden::open("pure/rope.safetensors");
    let dev = Device::cpu();
    let positions: Vec<u32> = g.ints("positions").iter().map(|p| *p as u32).collect();
    let entries = *positions.iter().max().unwrap() as usize + 1;
    for (name, rope) in [("default", PLAIN), ("llama3", LLAMA3)] {
        let freq = g.get(&format!("{name}/inv_freq"));
        assert_close(name, &rope.inv_freq(64), freq, 0.0, 1e-14);
        assert_eq!(g.scalar(&format!("{name}/attention_scaling")), 1.0);
        // (1, 0) turned is (cos, sin)
        let x: Vec<f64> = (0..7 * 64).map(|i| f64::from(u8::from(i % 64 < 32))).collect();
        let y = turn(
            &dev,
            &x,
            (64, 1, 64),
            &positions,
            &Table::new(host(), &rope, 64, entries).unwrap(),
            false,
        );
        let x: Vec<f32> = x.iter().map(|x| *x as f32).collect();
        let table = Table::new(host(), &rope, 64, entries).unwrap();
        let y32 = turn(&dev, &x, (64, 1, 64), &positions, &table, false);
        for (at, key) in [(0, "cos"), (32, "sin")] {
            // Golden rows hold the 32 frequencies twice.
            let want = g.get(&format!("{name}/{key}"));
            for (r, want) in want.chunks(64).enumerate() {
                let (got, what) = (r * 64 + at..r * 64 + at + 32, format!("{name} {key} {r}"));
                assert_eq!(want[..32], want[32..], "{what}");
                // An angle of 12345 rad is known to 2e-12; in f32 one rounding comes on top.
                assert_close(&what, &y[got.clone()], &want[..32], 4e-12, 0.0);
                assert_close(&what, &y32[got], &want[..32], 4e-12 + 2f64.powi(-25), 0.0);
            }
        }
    }
    // Linear scaling and YaRN are not implemented.
    g.all_read(&["linear/", "yarn/"]);
}

/// Scores of a query and a key depend on the distance of their positions only.
#[test]
fn scores_depend_on_the_distance() {
    let (q, k): (Vec<f64>, Vec<f64>) = (randn("q", 16), randn("k", 16));
    let table = Table::new(host(), &PLAIN, 16, 200).unwrap();
    let at = |x: &[f64], p: u32| turn(&Device::cpu(), x, (16, 1, 16), &[p], &table, false);
    let score = |m: u32, n: u32| inner(&at(&q, m), &at(&k, n));
    for (m, n) in [(5, 0), (105, 100), (199, 194)] {
        assert_close(&format!("{m} {n}"), &[score(m, n)], &[score(7, 2)], 1e-13, 0.0);
    }
    assert!((score(7, 2) - score(2, 7)).abs() > 0.1);
}

#[test]
fn gradients() {
    let (dev, row_len) = (Device::cpu(), 15);
    let positions = [3, 0, 11, 7];
    let table = Table::new(host(), &LLAMA3, 6, 12).unwrap();
    let (x, dy): (Vec<f64>, Vec<f64>) = (randn("x", 4 * row_len), randn("dy", 4 * row_len));
    let dx = turn(&dev, &dy, (15, 2, 6), &positions, &table, true);
    gradcheck("x", &x, &dx, OP, |x| {
        inner(&turn(&dev, x, (15, 2, 6), &positions, &table, false), &dy)
    });
}

/// Tasks have 16 rows.
#[test]
fn rows_do_not_see_their_batch() {
    let (rows, row_len) = (37, 3 * 34);
    let heads = (row_len, 2, 34);
    let x: Vec<f32> = randn("x", rows * row_len);
    let positions: Vec<u32> = (0..rows as u32).map(|r| r * 29 % 101).collect();
    let table = Table::new(host(), &PLAIN, 34, 101).unwrap();
    let one = &devices()[0];
    let order = shuffled("order", rows);
    for back in [false, true] {
        let alone = |r: usize| {
            turn(one, &x[r * row_len..][..row_len], heads, &positions[r..=r], &table, back)
        };
        let want: Vec<f32> = (0..rows).flat_map(alone).collect();
        for dev in devices() {
            for n in [0, 1, 15, 16, 17, rows] {
                let at = rows - n;
                let got = turn(&dev, &x[at * row_len..], heads, &positions[at..], &table, back);
                assert_bits(&format!("{n} {dev:?}"), &got, &want[at * row_len..]);
            }
            let (x, positions) = (gather(&x, row_len, &order), gather(&positions, 1, &order));
            let got = turn(&dev, &x, heads, &positions, &table, back);
            assert_bits("permuted", &got, &gather(&want, row_len, &order));
        }
    }
}

#[test]
fn a_nan_stays_in_its_pair() {
    let (dev, table) = (Device::cpu(), Table::new(host(), &PLAIN, 2, 40).unwrap());
    let (mut x, positions): (Vec<f32>, Vec<u32>) = (randn("x", 80), (0..40).collect());
    let clean = turn(&dev, &x, (2, 1, 2), &positions, &table, false);
    x[35] = f32::NAN;
    let got = turn(&dev, &x, (2, 1, 2), &positions, &table, false);
    assert_nan_only("x", &got, &clean, 34..36);
}

struct Turn {
    rows: usize,
    row_len: usize,
    heads: usize,
    head_dim: usize,
}

impl Case for Turn {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let Self { rows, row_len, heads, head_dim } = *self;
        let (dev, positions) = (lab.dev(), lab.ids("positions", rows, 50));
        let table = Table::<T::Acc>::new(dev, &PLAIN, head_dim, 50)?;
        let (mut x, mut dx) =
            (lab.rows::<T>("x", rows, row_len), lab.rows::<T>("dx", rows, row_len));
        let positions = positions.view();
        let heads = Heads { row_len, heads, head_dim };
        rope::forward(dev, x.view_mut(), heads, positions, &table)?;
        rope::backward(dev, dx.view_mut(), heads, positions, &table)?;
        lab.by_row("x", &x);
        lab.by_row("dx", &dx);
        Ok(())
    }
}

/// No rows, one, those around a block of packets in f32 and in bf16; halves of one packet and of
/// more; halves or rows that are no packets, or packets of f32 only; with elements behind the heads
/// and without.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, row_len, heads, head_dim) in [
            (0, 16, 1, 16),
            (1, 2, 1, 2),
            (64, 48, 2, 16),
            (65, 48, 2, 16),
            (64, 64, 2, 32),
            (5, 102, 2, 34),
            (19, 24, 3, 8),
            (19, 17, 1, 16),
            (19, 20, 1, 16),
        ] {
            let case = Turn { rows, row_len, heads, head_dim };
            sim.hold(&case);
            sim.hold_bits(&case);
        }
        sim.hold_rows(37, |rows| Turn { rows, row_len: 48, heads: 2, head_dim: 16 });
        sim.hold_rows(37, |rows| Turn { rows, row_len: 17, heads: 2, head_dim: 6 });
    });
}

/// Rows that do not begin at a packet have the bits of those that do; a position beyond the table
/// gives NaN in its row's heads, and nothing else.
#[test]
fn kernels_take_rows_from_anywhere_and_mark_positions_beyond_the_table() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        let table = Table::<f32>::new(&dev, &PLAIN, 8, 10).unwrap();
        let x: Vec<f32> = randn("x", 3 * 24);
        let run = |at: usize, positions: &[u32]| {
            let all: Vec<f32> = (0..at).map(|_| 0.0).chain(x.iter().copied()).collect();
            let mut all = Buffer::of(&dev, "x", &all).unwrap();
            let positions = Buffer::of(&dev, "positions", positions).unwrap();
            let x = all.view_mut().range(at..at + x.len());
            let heads = Heads { row_len: 24, heads: 2, head_dim: 8 };
            rope::forward(&dev, x, heads, positions.view(), &table).unwrap();
            dev.read(all.view()).unwrap()[at..].to_vec()
        };
        let clean = run(0, &[3, 9, 4]);
        assert_bits("from 1", &run(1, &[3, 9, 4]), &clean);
        for at in [0, 1] {
            for beyond in [10, u32::MAX] {
                assert_nan_only("beyond", &run(at, &[3, beyond, 4]), &clean, 24..40);
            }
        }
    });
}

#[test]
fn positions_beyond_the_table_and_wrong_shapes_are_refused() {
    let (dev, table) = (Device::cpu(), Table::<f32>::new(host(), &PLAIN, 4, 10).unwrap());
    let refused = |len: usize, row_len: usize, heads: usize, head_dim: usize, positions: &[u32]| {
        let mut x = vec![1.0f32; len];
        let heads = Heads { row_len, heads, head_dim };
        let e = rope::forward(&dev, (&mut x).into(), heads, positions.into(), &table);
        assert!(x.iter().all(|x| *x == 1.0), "nothing was written");
        refusal(e)
    };
    assert_eq!(refused(9, 4, 1, 4, &[0, 1]), "rope: `x` has shape [9], wanted [2, 4]");
    assert_eq!(refused(8, 8, 3, 4, &[0]), "rope: `heads` has shape [3, 4], wanted [8, 4]");
    assert_eq!(refused(8, 8, 1, 6, &[0]), "rope: `heads` has shape [1, 6], wanted [8, 4]");
    let says = "rope: position of row 1: got 10, wanted less than 10";
    assert_eq!(refused(8, 4, 1, 4, &[9, 10]), says);
    // An odd head has an element without a partner; none at all used to panic.
    assert_eq!(refused(8, 8, 1, 5, &[0]), "rope: `heads` has shape [1, 5], wanted [8, 4]");
    let none = Table::<f32>::new(host(), &PLAIN, 0, 10).unwrap();
    let mut x = vec![1.0f32; 8];
    let heads = Heads { row_len: 8, heads: 1, head_dim: 0 };
    let e = rope::forward(&dev, (&mut x).into(), heads, [0][..].into(), &none);
    assert_eq!(refusal(e), "rope: `heads` has shape [1, 0], wanted [8, 0]");
}
