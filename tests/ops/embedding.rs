//! Rows of a table: hand-worked values, central differences, bits.

use warpo::{
    device::{Buffer, Device, Element, Float},
    ops::embedding,
};

use crate::support::{
    OP, assert_bits, assert_nan_only, assert_refuses, devices, gather, gradcheck, inner, randn,
    refusal, shuffled,
    sim::{self, Case, Lab},
    zeros,
};

fn forward<F: Float>(dev: &Device, y: &[F], ids: &[u32], table: &[F], add: bool) -> Vec<F> {
    let mut y = y.to_vec();
    embedding::forward(dev, (&mut y).into(), ids.into(), table.into(), add).unwrap();
    y
}

fn backward<F: Float>(dev: &Device, dtable: &mut [F], ids: &[u32], dy: &[F], cols: usize) {
    let mut order = vec![0; embedding::scratch_len(ids.len())];
    let (dtable, order) = (dtable.into(), (&mut order).into());
    embedding::backward(dev, dtable, order, ids.into(), dy.into(), cols).unwrap();
}

/// Ids that repeat, from all of the table.
fn ids(name: &str, n: usize, entries: usize) -> Vec<u32> {
    randn::<f64>(name, n).iter().map(|x| (x.abs() * 1e6) as u32 % entries as u32).collect()
}

#[test]
fn hand_worked() {
    let dev = Device::cpu();
    let table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    assert_eq!(forward(&dev, &[9.0; 6], &[2, 0, 2], &table, false), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
    assert_eq!(forward(&dev, &[0.5; 4], &[1, 1], &table, true), [3.5, 4.5, 3.5, 4.5]);
    assert!(forward(&dev, &[], &[], &table, true).is_empty());
    let mut dtable = [100.0; 6];
    backward(&dev, &mut dtable, &[2, 0, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2);
    assert_eq!(dtable, [103.0, 104.0, 100.0, 100.0, 106.0, 108.0]);
    backward(&dev, &mut dtable, &[], &[], 2);
    assert_eq!(dtable, [103.0, 104.0, 100.0, 100.0, 106.0, 108.0]);
}

#[test]
fn gradients() {
    for (rows, entries, cols) in [(1, 1, 1), (7, 5, 3), (40, 33, 2)] {
        let ids = ids("ids", rows, entries);
        let table: Vec<f64> = randn("table", entries * cols);
        let dy: Vec<f64> = randn("dy", rows * cols);
        let mut dtable = vec![0.5; table.len()];
        backward(&Device::cpu(), &mut dtable, &ids, &dy, cols);
        dtable.iter_mut().for_each(|d| *d -= 0.5);
        let (start, dev) = (randn::<f64>("y", rows * cols), Device::cpu());
        for add in [false, true] {
            let f = |t: &[f64]| inner(&forward(&dev, &start, &ids, t, add), &dy);
            gradcheck(&format!("add={add}"), &table, &dtable, OP, f);
        }
    }
}

/// Forward tasks have 64 rows, backward tasks 32 entries.
#[test]
fn rows_do_not_see_their_batch() {
    let (rows, cols) = (131, 5);
    for entries in [1, 31, 32, 33, 97] {
        let ids = ids("ids", rows, entries);
        let table: Vec<f32> = randn("table", entries * cols);
        let y: Vec<f32> = randn("y", rows * cols);
        let dy: Vec<f32> = randn("dy", rows * cols);
        let start: Vec<f32> = randn("dtable", entries * cols);
        let mut want = start.clone();
        for (id, dy) in ids.iter().zip(dy.chunks(cols)) {
            for (d, x) in want[*id as usize * cols..][..cols].iter_mut().zip(dy) {
                *d += x;
            }
        }
        for dev in devices() {
            let copied = gather(&table, cols, &ids.iter().map(|i| *i as usize).collect::<Vec<_>>());
            let added: Vec<f32> = y.iter().zip(&copied).map(|(y, x)| y + x).collect();
            for n in [1, 63, 64, 65, rows] {
                let (at, what) = (rows - n, format!("{entries} {n} {dev:?}"));
                for (add, want) in [(false, &copied), (true, &added)] {
                    let got = forward(&dev, &y[at * cols..], &ids[at..], &table, add);
                    assert_bits(&what, &got, &want[at * cols..]);
                }
                // Two micro-batches add up to the bits of one.
                let (mut d, cut) = (start.clone(), n * cols);
                backward(&dev, &mut d, &ids[..n], &dy[..cut], cols);
                backward(&dev, &mut d, &ids[n..], &dy[cut..], cols);
                assert_bits(&what, &d, &want);
            }
            let order = shuffled("order", rows);
            let (y, ids) = (gather(&y, cols, &order), gather(&ids, 1, &order));
            let got = forward(&dev, &y, &ids, &table, true);
            assert_bits("permuted", &got, &gather(&added, cols, &order));
        }
    }
}

#[test]
fn a_nan_stays_in_its_row() {
    let (dev, ids) = (Device::cpu(), [3, 1, 0, 1]);
    let mut table: Vec<f32> = randn("table", 8);
    let dy: Vec<f32> = randn("dy", 8);
    let clean = forward(&dev, &dy, &ids, &table, true);
    table[6..8].fill(f32::NAN);
    assert_nan_only("forward", &forward(&dev, &dy, &ids, &table, true), &clean, 0..2);
    let (mut clean, mut bad) = (vec![0.0; 8], dy.clone());
    backward(&dev, &mut clean, &ids, &dy, 2);
    bad[6..8].fill(f32::NAN);
    let mut got = vec![0.0; 8];
    backward(&dev, &mut got, &ids, &bad, 2);
    assert_nan_only("backward", &got, &clean, 2..4);
}

struct Table {
    rows: usize,
    entries: usize,
    cols: usize,
}

impl Case for Table {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let Self { rows, entries, cols } = *self;
        let (dev, ids) = (lab.dev(), lab.ids("ids", rows, entries));
        let (ids, table) = (ids.view(), lab.input::<T>("table", entries * cols));
        let (mut y, mut sum) = (lab.room::<T>(rows * cols), lab.rows::<T>("sum", rows, cols));
        embedding::forward(dev, y.view_mut(), ids, table.view(), false)?;
        embedding::forward(dev, sum.view_mut(), ids, table.view(), true)?;
        let (dy, mut order) =
            (lab.rows::<T>("dy", rows, cols), lab.room(embedding::scratch_len(rows)));
        let mut dtable = lab.input::<T::Acc>("dtable", entries * cols);
        let (to, order_) = (dtable.view_mut(), order.view_mut());
        embedding::backward(dev, to, order_, ids, dy.view(), cols)?;
        let mut dx = lab.input::<T>("dx", entries * cols);
        embedding::scatter(dev, dx.view_mut(), order.view_mut(), ids, dy.view(), cols)?;
        lab.by_row("y", &y);
        lab.by_row("sum", &sum);
        lab.sum("dtable", &dtable);
        lab.sum("dx", &dx);
        Ok(())
    }
}

/// No rows, one, those around a warp's of the sort and around a block of packets; rows of one
/// packet, of none, and of f32 only; ids that repeat less often than rows are loaded ahead (4), as
/// often, and more.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, entries, cols) in [
            (0, 3, 8),
            (1, 1, 1),
            (3, 1, 8),
            (4, 1, 8),
            (5, 1, 12),
            (31, 5, 7),
            (32, 97, 16),
            (33, 13, 8),
            (64, 7, 32),
            (65, 7, 32),
        ] {
            let case = Table { rows, entries, cols };
            sim.hold(&case);
            sim.hold_bits(&case);
        }
        for cols in [8, 12, 13] {
            sim.hold_rows(37, |rows| Table { rows, entries: 5, cols });
        }
    });
}

/// Rows that do not begin at a packet have the bits of those that do; an id beyond the table gives
/// NaN in its row, and no gradient.
#[test]
fn kernels_take_rows_from_anywhere_and_mark_ids_beyond_the_table() {
    sim::check(|sim| {
        let (dev, cols) = (sim.device(Default::default()), 8);
        let (table, dy): (Vec<f32>, Vec<f32>) = (randn("table", 3 * cols), randn("dy", 4 * cols));
        let run = |at: usize, ids: &[u32]| {
            let lie = |x: &[f32]| {
                let all: Vec<f32> = (0..at).map(|_| 0.0).chain(x.iter().copied()).collect();
                Buffer::of(&dev, "x", &all).unwrap()
            };
            let (mut y, mut dtable) = (lie(&dy), lie(&table));
            let (table, dy, ids) = (lie(&table), lie(&dy), Buffer::of(&dev, "ids", ids).unwrap());
            let mut order = Buffer::new(&dev, "order", 4).unwrap();
            let (table, dy) = (table.view().range(at..table.len()), dy.view().range(at..dy.len()));
            let to = y.view_mut().range(at..at + dy.len());
            embedding::forward(&dev, to, ids.view(), table, true).unwrap();
            let to = dtable.view_mut().range(at..at + table.len());
            embedding::backward(&dev, to, order.view_mut(), ids.view(), dy, cols).unwrap();
            let read = |x: &Buffer<'_, f32>| dev.read(x.view()).unwrap()[at..].to_vec();
            (read(&y), read(&dtable))
        };
        let clean = run(0, &[2, 0, 2, 1]);
        let moved = run(1, &[2, 0, 2, 1]);
        assert_bits("y from 1", &moved.0, &clean.0);
        assert_bits("dtable from 1", &moved.1, &clean.1);
        for beyond in [3, u32::MAX] {
            let (y, dtable) = run(0, &[2, 0, 2, beyond]);
            assert_nan_only("y", &y, &clean.0, 3 * cols..4 * cols);
            assert_bits("of the others", &dtable[..cols], &clean.1[..cols]);
            assert_bits("of the one", &dtable[cols..2 * cols], &table[cols..2 * cols]);
            assert_bits("of the others", &dtable[2 * cols..], &clean.1[2 * cols..]);
        }
    });
}

#[test]
fn ids_beyond_the_table_and_wrong_shapes_are_refused() {
    let dev = Device::cpu();
    let forward = |[y, table]: [usize; 2], ids: &[u32]| {
        let [mut y, table] = zeros([y, table]);
        embedding::forward(&dev, (&mut y).into(), ids.into(), (&table).into(), false)
    };
    assert_refuses("embedding", "table [3, 2]", |[n]| forward([4, n], &[0, 0]));
    let e = refusal(forward([4, 6], &[1, 3]));
    assert_eq!(e, "embedding: id of row 1: got 3, wanted less than 3");
    assert_eq!(refusal(forward([5, 6], &[0, 0])), "embedding: `y` has shape [5], wanted [2, 2]");
    assert_eq!(refusal(forward([1, 6], &[])), "embedding: `y` has shape [1], wanted [0]");
    let backward = |[dtable, dy, order]: [usize; 3], ids: &[u32], cols: usize| {
        let ([mut dtable, dy], mut order) = (zeros([dtable, dy]), vec![0; order]);
        let (dtable, order) = ((&mut dtable).into(), (&mut order).into());
        embedding::backward(&dev, dtable, order, ids.into(), (&dy).into(), cols)
    };
    let what = "embedding::backward";
    assert_refuses(what, "dtable [3, 2] dy [2, 2] scratch [2]", |n| backward(n, &[0, 1], 2));
    let e = refusal(backward([6, 2, 1], &[3], 2));
    assert_eq!(e, format!("{what}: id of row 0: got 3, wanted less than 3"));
    let e = refusal(backward([6, 0, 1], &[0], 0));
    assert_eq!(e, format!("{what}: `dtable` has shape [6], wanted [6, 0]"));
    let ([mut dx, dy], mut order) = (zeros([6, 2]), vec![0; 1]);
    let (dx, order) = ((&mut dx).into(), (&mut order).into());
    let e = refusal(embedding::scatter(&dev, dx, order, [3][..].into(), (&dy).into(), 2));
    assert_eq!(e, "embedding::scatter: id of row 0: got 3, wanted less than 3");
}
