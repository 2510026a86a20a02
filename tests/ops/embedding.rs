//! Rows of a table: hand-worked values, central differences, bits.

use warpo::{
    device::{Device, Float},
    ops::embedding,
};

use crate::support::{
    OP, assert_bits, assert_nan_only, devices, gather, gradcheck, inner, randn, refusal, shuffled,
};

fn forward<F: Float>(dev: &Device, y: &[F], ids: &[u32], table: &[F], add: bool) -> Vec<F> {
    let mut y = y.to_vec();
    embedding::forward(dev, (&mut y).into(), ids.into(), table.into(), add).unwrap();
    y
}

fn backward<F: Float>(dev: &Device, dtable: &mut [F], ids: &[u32], dy: &[F], cols: usize) {
    embedding::backward(dev, dtable.into(), ids.into(), dy.into(), cols).unwrap();
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

#[test]
fn ids_beyond_the_table_and_wrong_shapes_are_refused() {
    let dev = Device::cpu();
    let forward = |y: usize, ids: &[u32], table: usize| {
        let (mut y, table) = (vec![0.0f32; y], vec![0.0; table]);
        refusal(embedding::forward(&dev, (&mut y).into(), ids.into(), (&table).into(), false))
    };
    assert_eq!(forward(4, &[1, 3], 6), "embedding: id of row 1: got 3, wanted less than 3");
    assert_eq!(forward(4, &[0, 0], 5), "embedding: `table` has shape [5], wanted [2, 2]");
    assert_eq!(forward(5, &[0, 0], 6), "embedding: `y` has shape [5], wanted [2, 2]");
    assert_eq!(forward(1, &[], 6), "embedding: `y` has shape [1], wanted [0]");
    let backward = |dtable: usize, ids: &[u32], dy: usize, cols: usize| {
        let (mut dtable, dy) = (vec![0.0f32; dtable], vec![0.0; dy]);
        refusal(embedding::backward(&dev, (&mut dtable).into(), ids.into(), (&dy).into(), cols))
    };
    let what = "embedding::backward";
    assert_eq!(backward(6, &[3], 2, 2), format!("{what}: id of row 0: got 3, wanted less than 3"));
    assert_eq!(backward(5, &[0], 2, 2), format!("{what}: `dtable` has shape [5], wanted [2, 2]"));
    assert_eq!(backward(6, &[0], 3, 2), format!("{what}: `dy` has shape [3], wanted [1, 2]"));
    assert_eq!(backward(6, &[0], 0, 0), format!("{what}: `dtable` has shape [6], wanted [6, 0]"));
}
