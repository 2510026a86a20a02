//! RMSNorm: hand-worked values, central differences, and bits that do not depend on the batch.

use warpo::{
    device::{Buffer, Device, Element, Float},
    ops::{residual, rms_norm},
};

use half::bf16;

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only, assert_norm, devices, gather,
    gradcheck, host, inner, randn, refusal, shuffled,
    sim::{self, Case, Lab},
    wide,
};

fn forward<F: Float>(dev: &Device, x: &[F], w: &[F]) -> (Vec<F>, Vec<F>) {
    let nan = |n| vec![F::of(f64::NAN); n];
    let (mut y, mut rstd) = (nan(x.len()), nan(x.len() / w.len()));
    let (y_, rstd_) = ((&mut y).into(), (&mut rstd).into());
    rms_norm::forward(dev, y_, rstd_, x.into(), w.into(), F::of(1e-5)).unwrap();
    (y, rstd)
}

/// Writes dx, adds to `dw`.
fn backward<F: Float>(dev: &Device, dw: &mut [F], dy: &[F], x: &[F], w: &[F]) -> Vec<F> {
    let mut dx = vec![F::of(f64::NAN); x.len()];
    let rstd = forward(dev, x, w).1;
    let mut scratch = vec![F::ZERO; rms_norm::scratch_len(rstd.len(), w.len())];
    let (dx_, dw, scratch) = ((&mut dx).into(), dw.into(), (&mut scratch).into());
    let (dy, x, w) = (dy.into(), x.into(), w.into());
    rms_norm::backward(dev, dx_, dw, scratch, dy, x, w, (&rstd).into(), false).unwrap();
    dx
}

#[test]
fn hand_worked() {
    // mean square of (3, 4) is 12.5
    let (y, rstd) = forward(&Device::cpu(), &[3.0, 4.0], &[1.0, -2.0]);
    let r = 1.0 / 12.500_01f64.sqrt();
    assert_close("rstd", &rstd, &[r], 0.0, 1e-15);
    assert_close("y", &y, &[3.0 * r, -8.0 * r], 0.0, 1e-15);
}

#[test]
fn gradients() {
    let dev = Device::cpu();
    for (rows, cols) in [(1, 1), (3, 7), (5, 33), (17, 3), (2, 67)] {
        let x: Vec<f64> = randn("x", rows * cols);
        let w: Vec<f64> = randn("w", cols);
        let dy: Vec<f64> = randn("dy", rows * cols);
        let mut dw = vec![0.5; cols]; // the gradient is added to what is there
        let dx = backward(&dev, &mut dw, &dy, &x, &w);
        dw.iter_mut().for_each(|d| *d -= 0.5);
        gradcheck("dx", &x, &dx, OP, |x| inner(&forward(&dev, x, &w).0, &dy));
        gradcheck("dw", &w, &dw, OP, |w| inner(&forward(&dev, &x, w).0, &dy));
    }
}

#[test]
fn f32_is_as_exact_as_a_plain_version() {
    let (dev, cols) = (Device::cpu(), 300);
    let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", 5 * cols), randn("dy", 5 * cols));
    let w: Vec<f32> = randn("w", cols);
    let mut plain = Vec::new();
    for x in x.chunks(cols) {
        let square = x.iter().map(|x| x * x).sum::<f32>() / cols as f32;
        plain.extend(x.iter().zip(&w).map(|(x, w)| x / (square + 1e-5).sqrt() * w));
    }
    let truth = forward(&dev, &wide(&x), &wide(&w)).0;
    assert_earned("y", &forward(&dev, &x, &w).0, &plain, &truth);
    let (mut dw, mut truth_w) = (vec![0.0; cols], vec![0.0; cols]);
    let dx = backward(&dev, &mut dw, &dy, &x, &w);
    let truth_x = backward(&dev, &mut truth_w, &wide(&dy), &wide(&x), &wide(&w));
    assert_norm("dx", &dx, &truth_x, 1e-5);
    assert_norm("dw", &dw, &truth_w, 1e-5);
}

/// Tasks have 16 rows, or 64 columns of the weight's gradient.
#[test]
fn rows_do_not_see_their_batch() {
    let rows = 67;
    for cols in [1, 15, 50, 64, 65, 131] {
        let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", rows * cols), randn("dy", rows * cols));
        let (w, start): (Vec<f32>, Vec<f32>) = (randn("w", cols), randn("dw", cols));
        let one = &devices()[0];
        let (y, rstd) = forward(one, &x, &w);
        let mut dw = start.clone();
        for (i, (x, dy)) in x.iter().zip(&dy).enumerate() {
            dw[i % cols] = dy.mul_add(x * rstd[i / cols], dw[i % cols]);
        }
        let alone = |r: usize| {
            let at = r * cols..(r + 1) * cols;
            backward(one, &mut start.clone(), &dy[at.clone()], &x[at], &w)
        };
        let dx: Vec<f32> = (0..rows).flat_map(alone).collect();
        let order = shuffled("order", rows);
        for dev in devices() {
            for n in [0, 1, 15, 16, 17, rows] {
                let (at, what) = ((rows - n) * cols, format!("{cols} {n} {dev:?}"));
                assert_bits(&what, &forward(&dev, &x[at..], &w).0, &y[at..]);
                // Two micro-batches add up to the bits of one.
                let mut sum = start.clone();
                let low = backward(&dev, &mut sum, &dy[..at], &x[..at], &w);
                let high = backward(&dev, &mut sum, &dy[at..], &x[at..], &w);
                assert_bits(&what, &[low, high].concat(), &dx);
                assert_bits(&what, &sum, &dw);
            }
            let got = forward(&dev, &gather(&x, cols, &order), &w).0;
            assert_bits("permuted", &got, &gather(&y, cols, &order));
        }
    }
}

#[test]
fn a_nan_stays_in_its_row() {
    let dev = Device::cpu();
    let (mut x, w): (Vec<f32>, Vec<f32>) = (randn("x", 100), randn("w", 20));
    let mut dy = x.clone();
    let dx = backward(&dev, &mut [0.0; 20], &dy, &x, &w);
    dy[59] = f32::NAN;
    assert_nan_only("dx", &backward(&dev, &mut [0.0; 20], &dy, &x, &w), &dx, 40..60);
    let clean = forward(&dev, &x, &w);
    x[42] = f32::NAN;
    let got = forward(&dev, &x, &w);
    assert_nan_only("y", &got.0, &clean.0, 40..60);
    assert_nan_only("rstd", &got.1, &clean.1, 2..3);
}

struct Norm {
    rows: usize,
    cols: usize,
}

impl Case for Norm {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (dev, rows, cols) = (lab.dev(), self.rows, self.cols);
        let (x, w) = (lab.rows::<T>("x", rows, cols), lab.input::<T>("w", cols));
        let (mut y, mut rstd) = (lab.room::<T>(rows * cols), lab.room::<T::Acc>(rows));
        let (y_, rstd_) = (y.view_mut(), rstd.view_mut());
        rms_norm::forward(dev, y_, rstd_, x.view(), w.view(), Element::of(1e-5))?;
        let (dy, mut dx) = (lab.rows::<T>("dy", rows, cols), lab.room::<T>(rows * cols));
        let mut dw = lab.input::<T::Acc>("dw", cols);
        let mut scratch = lab.room::<T::Acc>(rms_norm::scratch_len(rows, cols));
        let (dx_, dw_, room) = (dx.view_mut(), dw.view_mut(), scratch.view_mut());
        let (dy, x, w, rstd_) = (dy.view(), x.view(), w.view(), rstd.view());
        rms_norm::backward(dev, dx_, dw_, room, dy, x, w, rstd_, false)?;
        // Once more, now added to a gradient that is there.
        let mut more = lab.rows::<T>("more", rows, cols);
        let (more_, dw_, scratch) = (more.view_mut(), dw.view_mut(), scratch.view_mut());
        rms_norm::backward(dev, more_, dw_, scratch, dy, x, w, rstd_, true)?;
        lab.by_row("dx, added", &more);
        lab.by_row("y", &y);
        lab.by_row("rstd", &rstd);
        lab.by_row("dx", &dx);
        lab.sum("dw", &dw);
        Ok(())
    }
}

/// No rows, one, those around a block's; rows of one packet, of a thread's share and around it, of
/// a prime number of packets, of as many as fit.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, cols) in
            [(0, 64), (1, 8), (2, 504), (3, 512), (17, 8), (35, 8 * 13), (2, 1032), (1, 8192)]
        {
            sim.hold(&Norm { rows, cols });
        }
    });
}

#[test]
fn kernel_rows_do_not_see_their_batch() {
    sim::check(|sim| {
        for cols in [136, 1032] {
            sim.hold_rows(34, |rows| Norm { rows, cols });
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
            let mut rstd = Buffer::<T::Acc>::new(dev, "rstd", rows).unwrap();
            let (y_, rstd, eps) = (y.view_mut(), rstd.view_mut(), Element::of(1e-5));
            if at_once {
                let x = x.view_mut();
                rms_norm::add_forward(dev, y_, rstd, x, r.view(), w.view(), eps).unwrap();
            } else {
                residual::add(dev, x.view_mut(), r.view()).unwrap();
                rms_norm::forward(dev, y_, rstd, x.view(), w.view(), eps).unwrap();
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
    let (mut y, mut rstd) = ([0.0; 6], [0.0; 2]);
    let (y, rstd, x) = ((&mut y[..]).into(), (&mut rstd[..]).into(), (&mut x[..]).into());
    let e = rms_norm::add_forward(host(), y, rstd, x, r[..].into(), w[..].into(), 1e-5);
    assert_eq!(refusal(e), "rms_norm::add_forward: `r` has shape [5], wanted [2, 3]");
}

#[test]
fn kernels_refuse_rows_that_they_cannot_hold() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        for (cols, want) in [(7, 4), (8196, 4)] {
            let x = Buffer::<f32>::zeros(&dev, "x", cols).unwrap();
            let mut y = Buffer::zeros(&dev, "y", cols).unwrap();
            let mut rstd = Buffer::zeros(&dev, "rstd", 1).unwrap();
            let (y, rstd) = (y.view_mut(), rstd.view_mut());
            let e = refusal(rms_norm::forward(&dev, y, rstd, x.view(), x.view(), 1e-5));
            let want = format!("got {cols}, wanted a multiple of {want}, at most 8192");
            assert_eq!(e, format!("rms_norm: columns on a CUDA device: {want}"));
        }
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, x, mut y, mut rstd) = (Device::cpu(), vec![0.0f32; 6], vec![0.0; 6], vec![0.0; 2]);
    let mut refused = |y_: usize, x_: usize| {
        let (y, rstd) = ((&mut y[..y_]).into(), (&mut rstd).into());
        refusal(rms_norm::forward(&dev, y, rstd, x[..x_].into(), x[..3].into(), 1e-5))
    };
    assert_eq!(refused(6, 5), "rms_norm: `x` has shape [5], wanted [2, 3]");
    assert_eq!(refused(5, 6), "rms_norm: `y` has shape [5], wanted [2, 3]");
    let (mut dx, mut dw, mut scratch) = (vec![0.0f32; 6], vec![0.0; 3], vec![0.0; 3]);
    // lengths of dx, dw, scratch, dy, x
    let mut refused = |n: [usize; 5]| {
        let (dx, dw) = ((&mut dx[..n[0]]).into(), (&mut dw[..n[1]]).into());
        let scratch = (&mut scratch[..n[2]]).into();
        let (dy, w, rstd) = (x[..n[3]].into(), x[..3].into(), x[..2].into());
        refusal(rms_norm::backward(&dev, dx, dw, scratch, dy, x[..n[4]].into(), w, rstd, false))
    };
    for (n, says) in [
        ([5, 3, 3, 6, 6], "`dx` has shape [5], wanted [2, 3]"),
        ([6, 2, 3, 6, 6], "`dw` has shape [2], wanted [3]"),
        ([6, 3, 2, 6, 6], "`scratch` has shape [2], wanted [3]"),
        ([6, 3, 3, 5, 6], "`dy` has shape [5], wanted [2, 3]"),
        ([6, 3, 3, 6, 5], "`x` has shape [5], wanted [2, 3]"),
    ] {
        assert_eq!(refused(n), format!("rms_norm::backward: {says}"));
    }
}
