//! Ids that a pass before drew: hand-worked values, and the kernel beside the CPU.

use warpo::{
    device::{Buffer, Device},
    ops::next_ids,
};

use crate::support::{
    assert_refuses, host, refusal,
    sim::{self, Order},
};

/// What became of `ids`.
fn run(dev: &Device, ids: &[u32], rows: &[u32], from: &[u32], tokens: &[u32]) -> Vec<u32> {
    let mut ids = Buffer::of(dev, "ids", ids).unwrap();
    let [rows, from, tokens] = [rows, from, tokens].map(|x| Buffer::of(dev, "x", x).unwrap());
    let (rows, from) = (rows.view(), from.view());
    next_ids::forward(dev, ids.view_mut(), rows, from, tokens.view()).unwrap();
    dev.read(ids.view()).unwrap()
}

#[test]
fn hand_worked() {
    assert_eq!(run(host(), &[1, 2, 3, 4], &[3, 1], &[0, 2], &[7, 8, 9]), [1, 9, 3, 7]);
    assert_eq!(run(host(), &[1, 2], &[0, 1], &[1, 1], &[7, 8]), [8, 8]);
    assert_eq!(run(host(), &[1, 2], &[], &[], &[]), [1, 2]);
}

/// None, one, around a warp and around a block of threads.
#[test]
fn kernels_copy_what_the_cpu_copies() {
    sim::check(|sim| {
        for order in sim.orders() {
            let dev = sim.device(order);
            for n in [0, 1, 31, 32, 33, 255, 256, 257, 701] {
                let (rows, from): (Vec<u32>, Vec<u32>) =
                    (0..n).map(|i| ((7 * i + 3) % (3 * n), (i * i + 1) % (n + 5))).unzip();
                let ids: Vec<u32> = (0..3 * n).map(|i| 1000 + i).collect();
                let tokens: Vec<u32> = (0..n + 5).map(|i| 100_000 + i).collect();
                let (ours, cpu) = (
                    run(&dev, &ids, &rows, &from, &tokens),
                    run(host(), &ids, &rows, &from, &tokens),
                );
                assert!(ours == cpu, "{n} tokens in {order:?}");
            }
        }
    });
}

#[test]
fn kernels_mark_a_token_that_was_not_drawn_and_leave_out_a_row_that_is_not_there() {
    sim::check(|sim| {
        let dev = sim.device(Order::default());
        for beyond in [3, u32::MAX] {
            let ids = run(&dev, &[1, 2, 3], &[2, 0, beyond], &[beyond, 1, 0], &[7, 8, 9]);
            assert_eq!(ids, [8, 2, u32::MAX]);
        }
    });
}

#[test]
fn what_is_not_there_and_wrong_shapes_are_refused() {
    let forward = |rows: &[u32], from: &[u32]| {
        let (mut ids, tokens) = ([0; 4], [7, 8]);
        let (ids, tokens) = (ids[..].as_mut().into(), tokens[..].into());
        next_ids::forward(host(), ids, rows.into(), from.into(), tokens)
    };
    assert_refuses("next_ids", "from [2]", |[n]| forward(&[0, 3], &[1; 3][..n]));
    let refused = |rows: &[u32], from: &[u32]| refusal(forward(rows, from));
    assert_eq!(refused(&[0, 4], &[0, 1]), "next_ids: row 1: got 4, wanted less than 4");
    assert_eq!(refused(&[0, 3], &[2, 1]), "next_ids: source 0: got 2, wanted less than 2");
}
