//! Scalar head: hand-worked values, central differences, bits.

use warpo::{
    device::{Device, Float},
    ops::scalar_head,
};

use crate::support::{
    OP, assert_bits, assert_earned, assert_nan_only, devices, gather, gradcheck, inner, narrow,
    randn, refusal, shuffled,
};

fn forward<F: Float>(dev: &Device, h: &[F], w: &[F]) -> Vec<F> {
    let mut y = vec![F::of(f64::NAN); h.len() / w.len()];
    scalar_head::forward(dev, (&mut y).into(), h.into(), w.into()).unwrap();
    y
}

/// Writes dh, adds to `dw`.
fn backward<F: Float>(dev: &Device, dw: &mut [F], dy: &[F], h: &[F], w: &[F]) -> Vec<F> {
    let mut dh = vec![F::of(f64::NAN); h.len()];
    let (dh_, dw) = ((&mut dh).into(), dw.into());
    scalar_head::backward(dev, dh_, dw, dy.into(), h.into(), w.into()).unwrap();
    dh
}

#[test]
fn hand_worked() {
    let (dev, h, w) = (Device::cpu(), [1.0, 2.0, -3.0, 4.0], [10.0, 0.5]);
    assert_eq!(forward(&dev, &h, &w), [11.0, -28.0]);
    let mut dw = [100.0, 200.0];
    assert_eq!(backward(&dev, &mut dw, &[2.0, -1.0], &h, &w), [20.0, 1.0, -10.0, -0.5]);
    assert_eq!(dw, [105.0, 200.0]);
    assert!(forward(&dev, &[], &w).is_empty());
    assert!(backward(&dev, &mut dw, &[], &[], &w).is_empty());
    assert_eq!(dw, [105.0, 200.0]);
}

#[test]
fn gradients() {
    let dev = Device::cpu();
    for (rows, d) in [(1, 1), (3, 7), (2, 131)] {
        let (h, w): (Vec<f64>, Vec<f64>) = (randn("h", rows * d), randn("w", d));
        let dy: Vec<f64> = randn("dy", rows);
        let mut dw = vec![0.5; d];
        let dh = backward(&dev, &mut dw, &dy, &h, &w);
        dw.iter_mut().for_each(|d| *d -= 0.5);
        gradcheck("dh", &h, &dh, OP, |h| inner(&forward(&dev, h, &w), &dy));
        gradcheck("dw", &w, &dw, OP, |w| inner(&forward(&dev, &h, w), &dy));
    }
}

#[test]
fn f32_is_as_exact_as_a_plain_sum() {
    let (h, w): (Vec<f32>, Vec<f32>) = (randn("h", 9 * 500), randn("w", 500));
    let (wide_h, wide_w) = (crate::support::wide(&h), crate::support::wide(&w));
    let truth: Vec<f64> = wide_h.chunks(500).map(|h| inner(h, &wide_w)).collect();
    let plain = h.chunks(500).map(|h| h.iter().zip(&w).map(|(h, w)| h * w).sum::<f32>());
    assert_earned("y", &forward(&Device::cpu(), &h, &w), &plain.collect::<Vec<_>>(), &truth);
    let got = forward(&Device::cpu(), &wide_h, &wide_w);
    assert_earned("f64", &got, &narrow(&truth), &truth);
}

/// Tasks have 64 rows, or 64 columns of dw.
#[test]
fn rows_do_not_see_their_batch() {
    for d in [1, 63, 64, 65, 131] {
        let rows = 131;
        let (h, w): (Vec<f32>, Vec<f32>) = (randn("h", rows * d), randn("w", d));
        let (dy, start): (Vec<f32>, Vec<f32>) = (randn("dy", rows), randn("dw", d));
        let one = &devices()[0];
        let y: Vec<f32> = h.chunks(d).flat_map(|h| forward(one, h, &w)).collect();
        let dh = backward(one, &mut start.clone(), &dy, &h, &w);
        let chain = |c: usize| (0..rows).fold(start[c], |s, r| dy[r].mul_add(h[r * d + c], s));
        let dw: Vec<f32> = (0..d).map(chain).collect();
        let order = shuffled("order", rows);
        for dev in devices() {
            for n in [1, 63, 64, 65, rows] {
                let (at, what) = (rows - n, format!("{d} {n} {dev:?}"));
                assert_bits(&what, &forward(&dev, &h[at * d..], &w), &y[at..]);
                // Two micro-batches add up to the bits of one.
                let mut sum = start.clone();
                let low = backward(&dev, &mut sum, &dy[..at], &h[..at * d], &w);
                let high = backward(&dev, &mut sum, &dy[at..], &h[at * d..], &w);
                assert_bits(&what, &[low, high].concat(), &dh);
                assert_bits(&what, &sum, &dw);
            }
            let got = forward(&dev, &gather(&h, d, &order), &w);
            assert_bits("permuted", &got, &gather(&y, 1, &order));
        }
    }
}

#[test]
fn a_nan_stays_in_its_row() {
    let dev = Device::cpu();
    let (mut h, w): (Vec<f32>, Vec<f32>) = (randn("h", 50), randn("w", 10));
    let clean = forward(&dev, &h, &w);
    h[27] = f32::NAN;
    assert_nan_only("y", &forward(&dev, &h, &w), &clean, 2..3);
    let mut dw = vec![0.0; 10];
    let dh = backward(&dev, &mut dw, &[1.0, f32::NAN, 1.0, 1.0, 1.0], &h, &w);
    assert_nan_only("dh", &dh, &w.repeat(5), 10..20);
    assert!(dw.iter().all(|d| d.is_nan()), "every weight saw the bad row");
}

#[test]
fn wrong_shapes_are_refused() {
    let dev = Device::cpu();
    let (mut a, mut b, x) = (vec![0.0f32; 6], vec![0.0f32; 3], vec![0.0f32; 6]);
    let e = scalar_head::forward(&dev, (&mut a[..1]).into(), (&x).into(), x[..3].into());
    assert_eq!(refusal(e), "scalar_head: `h` has shape [6], wanted [1, 3]");
    let mut refused = |dh: usize, dw: usize, dy: usize| {
        let (dh, dw) = ((&mut a[..dh]).into(), (&mut b[..dw]).into());
        refusal(scalar_head::backward(&dev, dh, dw, x[..dy].into(), (&x).into(), x[..3].into()))
    };
    assert_eq!(refused(6, 3, 3), "scalar_head::backward: `h` has shape [6], wanted [3, 3]");
    assert_eq!(refused(5, 3, 2), "scalar_head::backward: `dh` has shape [5], wanted [2, 3]");
    assert_eq!(refused(6, 2, 2), "scalar_head::backward: `dw` has shape [2], wanted [3]");
}
