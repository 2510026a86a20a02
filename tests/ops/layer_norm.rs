//! LayerNorm: hand-worked values, central differences, bits.

use warpo::{
    device::{Buffer, Device, Element, Float},
    ops::{layer_norm, residual},
};

use half::bf16;

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only, assert_norm, devices, gather,
    gradcheck, host, inner, randn, refusal, shuffled,
    sim::{self, Case, Lab},
    wide,
};

/// What forward writes.
struct Out<F> {
    y: Vec<F>,
    mean: Vec<F>,
    rstd: Vec<F>,
}

fn forward<F: Float>(dev: &Device, x: &[F], w: &[F], b: &[F], eps: f64) -> Out<F> {
    let nan = |n| vec![F::of(f64::NAN); n];
    let rows = x.len() / w.len();
    let mut out = Out { y: nan(x.len()), mean: nan(rows), rstd: nan(rows) };
    let (y, mean) = ((&mut out.y).into(), (&mut out.mean).into());
    let (rstd, eps) = ((&mut out.rstd).into(), F::of(eps));
    layer_norm::forward(dev, y, mean, rstd, x.into(), w.into(), b.into(), eps).unwrap();
    out
}

/// Writes dx, adds to `dw` and `db`.
fn backward<F: Float>(
    dev: &Device,
    (dw, db): (&mut [F], &mut [F]),
    dy: &[F],
    x: &[F],
    w: &[F],
    b: &[F],
) -> Vec<F> {
    let mut dx = vec![F::of(f64::NAN); x.len()];
    let Out { mean, rstd, .. } = forward(dev, x, w, b, 1e-5);
    let mut scratch = vec![F::ZERO; layer_norm::scratch_len(rstd.len(), w.len())];
    layer_norm::backward(
        dev,
        (&mut dx).into(),
        dw.into(),
        db.into(),
        (&mut scratch).into(),
        dy.into(),
        x.into(),
        w.into(),
        (&mean).into(),
        (&rstd).into(),
        false,
    )
    .unwrap();
    dx
}

#[test]
fn hand_worked() {
    // (1, 3): mean 2, variance 1 (biased); (2, -4): mean -1, variance 9
    let out = forward(&Device::cpu(), &[1.0, 3.0, 2.0, -4.0], &[10.0, 100.0], &[0.5, -7.0], 0.0);
    assert_eq!(out.mean, [2.0, -1.0]);
    assert_close("rstd", &out.rstd, &[1.0, 1.0 / 3.0], 0.0, 1e-15);
    assert_close("y", &out.y, &[-9.5, 93.0, 10.5, -107.0], 0.0, 1e-15);
    // epsilon is inside the root; 1 + 3
    let out = forward(&Device::cpu(), &[1.0, 3.0], &[1.0, 1.0], &[0.0, 0.0], 3.0);
    assert_close("rstd", &out.rstd, &[0.5], 0.0, 1e-15);
    // a row without spread is its bias
    let out = forward(&Device::cpu(), &[4.0, 4.0], &[1.0, 2.0], &[0.5, -7.0], 1e-5);
    assert_close("y", &out.y, &[0.5, -7.0], 0.0, 0.0);
}

#[test]
fn gradients() {
    let dev = Device::cpu();
    for (rows, cols) in [(1, 1), (3, 7), (5, 33), (17, 3), (2, 67)] {
        let (x, dy): (Vec<f64>, Vec<f64>) = (randn("x", rows * cols), randn("dy", rows * cols));
        let (w, b): (Vec<f64>, Vec<f64>) = (randn("w", cols), randn("b", cols));
        let (mut dw, mut db) = (vec![0.5; cols], vec![-0.5; cols]);
        let dx = backward(&dev, (&mut dw, &mut db), &dy, &x, &w, &b);
        dw.iter_mut().for_each(|d| *d -= 0.5);
        db.iter_mut().for_each(|d| *d += 0.5);
        let f = |x: &[f64], w: &[f64], b: &[f64]| inner(&forward(&dev, x, w, b, 1e-5).y, &dy);
        gradcheck("dx", &x, &dx, OP, |x| f(x, &w, &b));
        gradcheck("dw", &w, &dw, OP, |w| f(&x, w, &b));
        gradcheck("db", &b, &db, OP, |b| f(&x, &w, b));
    }
}

/// Also where the mean is 1000 times the spread, which a one-pass variance does not survive.
#[test]
fn f32_is_as_exact_as_a_plain_version() {
    let (dev, cols) = (Device::cpu(), 300);
    let (w, b): (Vec<f32>, Vec<f32>) = (randn("w", cols), randn("b", cols));
    for shift in [0.0, 1000.0] {
        let x: Vec<f32> = randn::<f32>("x", 5 * cols).iter().map(|x| x + shift).collect();
        let truth = forward(&dev, &wide(&x), &wide(&w), &wide(&b), 1e-5).y;
        let mut plain = Vec::new();
        for x in x.chunks(cols) {
            let mean = x.iter().sum::<f32>() / cols as f32;
            let var = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / cols as f32;
            let row = x.iter().zip(&w).zip(&b);
            plain.extend(row.map(|((x, w), b)| (x - mean) / (var + 1e-5).sqrt() * w + b));
        }
        assert_earned(&format!("+{shift}"), &forward(&dev, &x, &w, &b, 1e-5).y, &plain, &truth);
    }
    let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", 5 * cols), randn("dy", 5 * cols));
    let (mut dw, mut db) = (vec![0.0; cols], vec![0.0; cols]);
    let dx = backward(&dev, (&mut dw, &mut db), &dy, &x, &w, &b);
    let (mut tw, mut tb) = (vec![0.0; cols], vec![0.0; cols]);
    let t = backward(&dev, (&mut tw, &mut tb), &wide(&dy), &wide(&x), &wide(&w), &wide(&b));
    for (what, ours, truth) in [("dx", dx, t), ("dw", dw, tw), ("db", db, tb)] {
        assert_norm(what, &ours, &truth, 1e-5);
    }
}

/// Tasks have 16 rows, or 64 columns of the weights' gradients.
#[test]
fn rows_do_not_see_their_batch() {
    let rows = 67;
    for cols in [1, 15, 50, 64, 65, 131] {
        let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", rows * cols), randn("dy", rows * cols));
        let (w, b): (Vec<f32>, Vec<f32>) = (randn("w", cols), randn("b", cols));
        let (dw, db): (Vec<f32>, Vec<f32>) = (randn("dw", cols), randn("db", cols));
        let one = &devices()[0];
        let alone = |r: usize| forward(one, &x[r * cols..][..cols], &w, &b, 1e-5);
        let want: Vec<Out<f32>> = (0..rows).map(alone).collect();
        let y: Vec<f32> = want.iter().flat_map(|o| o.y.clone()).collect();
        let (mut want_w, mut want_b) = (dw.clone(), db.clone());
        for (i, (x, dy)) in x.iter().zip(&dy).enumerate() {
            let (r, c) = (i / cols, i % cols);
            want_w[c] = dy.mul_add((x - want[r].mean[0]) * want[r].rstd[0], want_w[c]);
            want_b[c] += dy;
        }
        let zeros = || (vec![0.0; cols], vec![0.0; cols]);
        let alone = |r: usize| {
            let (at, (mut dw, mut db)) = (r * cols..(r + 1) * cols, zeros());
            backward(one, (&mut dw, &mut db), &dy[at.clone()], &x[at], &w, &b)
        };
        let dx: Vec<f32> = (0..rows).flat_map(alone).collect();
        let order = shuffled("order", rows);
        for dev in devices() {
            for n in [0, 1, 15, 16, 17, rows] {
                let (at, what) = ((rows - n) * cols, format!("{cols} {n} {dev:?}"));
                assert_bits(&what, &forward(&dev, &x[at..], &w, &b, 1e-5).y, &y[at..]);
                // Two micro-batches add up to the bits of one.
                let (mut sum_w, mut sum_b) = (dw.clone(), db.clone());
                let sums = (&mut sum_w[..], &mut sum_b[..]);
                let low = backward(&dev, sums, &dy[..at], &x[..at], &w, &b);
                let sums = (&mut sum_w[..], &mut sum_b[..]);
                let high = backward(&dev, sums, &dy[at..], &x[at..], &w, &b);
                assert_bits(&what, &[low, high].concat(), &dx);
                assert_bits(&what, &sum_w, &want_w);
                assert_bits(&what, &sum_b, &want_b);
            }
            let got = forward(&dev, &gather(&x, cols, &order), &w, &b, 1e-5).y;
            assert_bits("permuted", &got, &gather(&y, cols, &order));
        }
    }
}

#[test]
fn a_nan_stays_in_its_row() {
    let dev = Device::cpu();
    let (mut x, w): (Vec<f32>, Vec<f32>) = (randn("x", 100), randn("w", 20));
    let (b, zeros) = (randn::<f32>("b", 20), vec![0.0; 20]);
    let clean = forward(&dev, &x, &w, &b, 1e-5);
    let dx = backward(&dev, (&mut zeros.clone(), &mut zeros.clone()), &x, &x, &w, &b);
    let mut dy = x.clone();
    dy[59] = f32::NAN;
    let got = backward(&dev, (&mut zeros.clone(), &mut zeros.clone()), &dy, &x, &w, &b);
    assert_nan_only("dx", &got, &dx, 40..60);
    x[42] = f32::NAN;
    let got = forward(&dev, &x, &w, &b, 1e-5);
    assert_nan_only("y", &got.y, &clean.y, 40..60);
    assert_nan_only("mean", &got.mean, &clean.mean, 2..3);
    assert_nan_only("rstd", &got.rstd, &clean.rstd, 2..3);
}

struct Norm {
    rows: usize,
    cols: usize,
    mean: f64,
}

impl Case for Norm {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (dev, rows, cols) = (lab.dev(), self.rows, self.cols);
        let x = lab.spread::<T>("x", rows, cols, (self.mean, 1.0));
        let (w, b) = (lab.input::<T>("w", cols), lab.input::<T>("b", cols));
        let (mut mean, mut rstd) = (lab.room::<T::Acc>(rows), lab.room::<T::Acc>(rows));
        let mut y = lab.room::<T>(rows * cols);
        let (y_, mean_, rstd_) = (y.view_mut(), mean.view_mut(), rstd.view_mut());
        let (x_, w_, eps) = (x.view(), w.view(), Element::of(1e-5));
        layer_norm::forward(dev, y_, mean_, rstd_, x_, w_, b.view(), eps)?;
        let (dy, mut dx) = (lab.rows::<T>("dy", rows, cols), lab.room::<T>(rows * cols));
        let (mut dw, mut db) = (lab.input::<T::Acc>("dw", cols), lab.input::<T::Acc>("db", cols));
        let mut scratch = lab.room::<T::Acc>(layer_norm::scratch_len(rows, cols));
        let (dx_, dw_, db_) = (dx.view_mut(), dw.view_mut(), db.view_mut());
        let (room, mean_, rstd_, dy) = (scratch.view_mut(), mean.view(), rstd.view(), dy.view());
        layer_norm::backward(dev, dx_, dw_, db_, room, dy, x_, w_, mean_, rstd_, false)?;
        // Once more, now added to a gradient that is there.
        let mut more = lab.rows::<T>("more", rows, cols);
        let (dx_, dw_, db_) = (more.view_mut(), dw.view_mut(), db.view_mut());
        let room = scratch.view_mut();
        layer_norm::backward(dev, dx_, dw_, db_, room, dy, x_, w_, mean_, rstd_, true)?;
        lab.by_row("dx, added", &more);
        lab.by_row("y", &y);
        lab.by_row("mean", &mean);
        lab.by_row("rstd", &rstd);
        lab.by_row("dx", &dx);
        lab.sum("dw", &dw);
        lab.sum("db", &db);
        Ok(())
    }
}

/// No rows, one, those around a block's of forward (16) and of backward (32); rows of one packet,
/// of a prime number of packets, of all that 32 threads hold and one packet more, of four warps;
/// and a mean of 1000 times the spread, which a one-pass variance does not survive.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, cols, mean) in [
            (0, 64, 0.0),
            (1, 8, 0.0),
            (16, 512, 0.0),
            (17, 520, 0.0),
            (33, 8, 0.0),
            (67, 8 * 13, 0.0),
            (3, 1032, 0.0),
            (2, 64, 1000.0),
        ] {
            sim.hold(&Norm { rows, cols, mean });
        }
    });
}

#[test]
fn kernel_rows_do_not_see_their_batch() {
    sim::check(|sim| {
        for (rows, cols) in [(37, 8), (11, 520)] {
            sim.hold_rows(rows, |rows| Norm { rows, cols, mean: 0.0 });
        }
    });
}

/// Added and normed in one pass, rows have the bits of two.
#[test]
fn the_kernel_that_adds_has_the_bits_of_two() {
    fn bits<T: Element>(x: &[T]) -> Vec<u8> {
        bytemuck::cast_slice(x).to_vec()
    }
    fn run<T: Element>(dev: &Device, rows: usize, cols: usize) {
        let of = |name: &str, n: usize| {
            let x: Vec<T> = randn::<f64>(name, n).into_iter().map(T::of).collect();
            Buffer::of(dev, "test", &x).unwrap()
        };
        let (r, w) = (of("r", rows * cols), of("w", cols));
        let mut both = Vec::new();
        for at_once in [false, true] {
            let (mut x, mut y) = (of("x", rows * cols), of("y", rows * cols));
            let mut kept = [(); 2].map(|()| Buffer::<T::Acc>::new(dev, "kept", rows).unwrap());
            let [mean, rstd] = &mut kept;
            let (mean, rstd, eps) = (mean.view_mut(), rstd.view_mut(), Element::of(1e-5));
            let (y_, w, b) = (y.view_mut(), w.view(), w.view());
            if at_once {
                let x = x.view_mut();
                layer_norm::add_forward(dev, y_, mean, rstd, x, r.view(), w, b, eps).unwrap();
            } else {
                residual::add(dev, x.view_mut(), r.view()).unwrap();
                layer_norm::forward(dev, y_, mean, rstd, x.view(), w, b, eps).unwrap();
            }
            both.push((bits(&dev.read(x.view()).unwrap()), bits(&dev.read(y.view()).unwrap())));
        }
        assert!(both[0] == both[1], "{} {rows} {cols}", T::NAME);
    }
    run::<f32>(host(), 3, 40);
    sim::check(|sim| {
        for (order, (rows, cols)) in sim.orders().into_iter().zip([(0, 8), (17, 40), (2, 520)]) {
            run::<bf16>(&sim.device(order), rows, cols);
            run::<f32>(&sim.device(order), rows, cols);
        }
    });
    let (mut x, r, w) = ([0.0f32; 6], [0.0; 5], [1.0; 3]);
    let (mut y, mut mean, mut rstd) = ([0.0; 6], [0.0; 2], [0.0; 2]);
    let (y, mean, rstd) = ((&mut y[..]).into(), (&mut mean[..]).into(), (&mut rstd[..]).into());
    let (x, r, w) = ((&mut x[..]).into(), r[..].into(), w[..].into());
    let e = layer_norm::add_forward(host(), y, mean, rstd, x, r, w, w, 1e-5);
    assert_eq!(refusal(e), "layer_norm::add_forward: `r` has shape [5], wanted [2, 3]");
}

#[test]
fn kernels_refuse_rows_that_they_cannot_hold() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        for cols in [7, 8196] {
            let x = Buffer::<f32>::zeros(&dev, "x", cols).unwrap();
            let mut y = Buffer::zeros(&dev, "y", cols).unwrap();
            let mut mean = Buffer::zeros(&dev, "mean", 1).unwrap();
            let mut rstd = Buffer::zeros(&dev, "rstd", 1).unwrap();
            let (y, mean, rstd) = (y.view_mut(), mean.view_mut(), rstd.view_mut());
            let (x, w, b) = (x.view(), x.view(), x.view());
            let e = refusal(layer_norm::forward(&dev, y, mean, rstd, x, w, b, 1e-5));
            let want = format!("got {cols}, wanted a multiple of 4, at most 8192");
            assert_eq!(e, format!("layer_norm: columns on a CUDA device: {want}"));
        }
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, x) = (Device::cpu(), vec![0.0f32; 6]);
    let (mut y, mut mean, mut rstd) = (vec![0.0f32; 6], vec![0.0; 3], vec![0.0; 2]);
    let mut refused = |y_: usize, mean_: usize, x_: usize, b: usize| {
        let (y, mean) = ((&mut y[..y_]).into(), (&mut mean[..mean_]).into());
        let (x, w, b) = (x[..x_].into(), x[..3].into(), x[..b].into());
        refusal(layer_norm::forward(&dev, y, mean, (&mut rstd).into(), x, w, b, 1e-5))
    };
    assert_eq!(refused(6, 2, 5, 3), "layer_norm: `x` has shape [5], wanted [2, 3]");
    assert_eq!(refused(5, 2, 6, 3), "layer_norm: `y` has shape [5], wanted [2, 3]");
    assert_eq!(refused(6, 3, 6, 3), "layer_norm: `mean` has shape [3], wanted [2]");
    assert_eq!(refused(6, 2, 6, 2), "layer_norm: `b` has shape [2], wanted [3]");
    let (mut dx, mut dw, mut db) = (vec![0.0f32; 6], vec![0.0; 3], vec![0.0; 3]);
    let mut scratch = [0.0; 6];
    // lengths of dx, dw, db, dy, x, mean, scratch
    let mut refused = |n: [usize; 7]| {
        let (dx, dw) = ((&mut dx[..n[0]]).into(), (&mut dw[..n[1]]).into());
        let (db, dy, mean) = ((&mut db[..n[2]]).into(), x[..n[3]].into(), x[..n[5]].into());
        let (x, w, rstd) = (x[..n[4]].into(), x[..3].into(), x[..2].into());
        let scratch = (&mut scratch[..n[6]]).into();
        refusal(layer_norm::backward(&dev, dx, dw, db, scratch, dy, x, w, mean, rstd, false))
    };
    for (n, says) in [
        ([5, 3, 3, 6, 6, 2, 6], "`dx` has shape [5], wanted [2, 3]"),
        ([6, 2, 3, 6, 6, 2, 6], "`dw` has shape [2], wanted [3]"),
        ([6, 3, 2, 6, 6, 2, 6], "`db` has shape [2], wanted [3]"),
        ([6, 3, 3, 5, 6, 2, 6], "`dy` has shape [5], wanted [2, 3]"),
        ([6, 3, 3, 6, 5, 2, 6], "`x` has shape [5], wanted [2, 3]"),
        ([6, 3, 3, 6, 6, 3, 6], "`mean` has shape [3], wanted [2]"),
        ([6, 3, 3, 6, 6, 2, 5], "`scratch` has shape [5], wanted [6]"),
    ] {
        assert_eq!(refused(n), format!("layer_norm::backward: {says}"));
    }
}
