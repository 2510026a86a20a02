//! Scalar head: hand-worked values, central differences, bits.

use half::bf16;
use warpo::{
    device::{Buffer, Device, Element, Float},
    ops::scalar_head,
};

use crate::support::{
    OP, assert_bits, assert_earned, assert_nan_only, assert_refuses, devices, gather, gradcheck,
    inner, narrow, randn, refusal, shuffled,
    sim::{self, Case, Lab},
    zeros,
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

struct Head {
    rows: usize,
    d: usize,
}

impl Case for Head {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (dev, rows, d) = (lab.dev(), self.rows, self.d);
        let (h, w) = (lab.rows::<T>("h", rows, d), lab.input::<T>("w", d));
        let (dy, mut y) = (lab.rows::<T::Acc>("dy", rows, 1), lab.room::<T::Acc>(rows));
        scalar_head::forward(dev, y.view_mut(), h.view(), w.view())?;
        let (mut dh, mut dw) = (lab.room::<T>(rows * d), lab.input::<T::Acc>("dw", d));
        let (dh_, dw_) = (dh.view_mut(), dw.view_mut());
        scalar_head::backward(dev, dh_, dw_, dy.view(), h.view(), w.view())?;
        lab.by_row("y", &y);
        lab.by_row("dh", &dh);
        lab.sum("dw", &dw);
        Ok(())
    }
}

/// Rows of a large model; backward, columns of 32 do not see how many there are.
struct Wide(usize);

impl Case for Wide {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (h, w) = (lab.rows::<T>("h", 3, self.0), lab.input::<T>("w", self.0));
        let mut y = lab.room::<T::Acc>(3);
        scalar_head::forward(lab.dev(), y.view_mut(), h.view(), w.view())?;
        lab.by_row("y", &y);
        Ok(())
    }
}

/// No rows, one, those around a block's in both directions; rows of one element, of no whole
/// packets, of a packet, of those of a block and around them, of more than one round of a warp.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, d) in [
            (0, 8),
            (1, 1),
            (15, 7),
            (16, 8),
            (17, 33),
            (63, 24),
            (129, 40),
            (513, 8 * 13),
            (2, 1032),
        ] {
            sim.hold(&Head { rows, d });
        }
        [8192, 12296].into_iter().for_each(|d| sim.hold(&Wide(d)));
    });
}

#[test]
fn kernel_rows_do_not_see_their_batch() {
    sim::check(|sim| {
        for d in [9, 264] {
            sim.hold_rows(34, |rows| Head { rows, d });
        }
    });
}

#[test]
fn a_nan_stays_in_its_row_of_the_kernel() {
    fn run<T: Element>(dev: &Device, bad: Option<usize>) -> [Vec<f32>; 3] {
        let of =
            |name: &str, n: usize| randn::<f64>(name, n).into_iter().map(T::of).collect::<Vec<T>>();
        let (mut h, mut dy) = (of("h", 20 * 24), randn::<f32>("dy", 20));
        if let Some(row) = bad {
            h[row * 24 + 5] = T::of(f64::NAN);
            dy[row] = f32::NAN;
        }
        let h = Buffer::of(dev, "h", &h).unwrap();
        let (w, dy) = (of("w", 24), dy.into_iter().map(|x| Element::of(x.into())));
        let w = Buffer::of(dev, "w", &w).unwrap();
        let dy = Buffer::of(dev, "dy", &dy.collect::<Vec<T::Acc>>()).unwrap();
        let mut y = Buffer::new(dev, "y", 20).unwrap();
        let mut dh = Buffer::<T>::new(dev, "dh", 20 * 24).unwrap();
        let mut dw = Buffer::zeros(dev, "dw", 24).unwrap();
        scalar_head::forward(dev, y.view_mut(), h.view(), w.view()).unwrap();
        let (dh_, dw_) = (dh.view_mut(), dw.view_mut());
        scalar_head::backward(dev, dh_, dw_, dy.view(), h.view(), w.view()).unwrap();
        let (y, dh) = (dev.read(y.view()).unwrap(), dev.read(dh.view()).unwrap());
        let dw: Vec<T::Acc> = dev.read(dw.view()).unwrap();
        let f32s = |x: &[T::Acc]| x.iter().map(|x| x.f64() as f32).collect();
        [f32s(&y), dh.iter().map(|x| x.f64() as f32).collect(), f32s(&dw)]
    }
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        for run in [run::<bf16>, run::<f32>] {
            let ([y, dh, _], [bad_y, bad_dh, bad_dw]) = (run(&dev, None), run(&dev, Some(17)));
            assert_nan_only("y", &bad_y, &y, 17..18);
            assert_nan_only("dh", &bad_dh, &dh, 17 * 24..18 * 24);
            assert!(bad_dw.iter().all(|d| d.is_nan()), "every weight saw the bad row");
        }
    });
}

/// A width has one order of sums wherever its rows begin: what would have another one is refused.
#[test]
fn kernels_refuse_what_does_not_begin_at_a_packet() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        let h = Buffer::<bf16>::zeros(&dev, "h", 40).unwrap();
        let mut y = Buffer::zeros(&dev, "y", 2).unwrap();
        let part = h.view().range(4..36);
        let e = refusal(scalar_head::forward(&dev, y.view_mut(), part, h.view().range(0..16)));
        assert!(e.contains("scalar_head_forward_bf16: `h` begins at"), "{e}");
        assert!(e.ends_with("wanted a multiple of 16"), "{e}");
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, w) = (Device::cpu(), [0.0f32; 3]);
    assert_refuses("scalar_head", "h [2, 3]", |n| {
        let ([mut y], [h]) = (zeros([2]), zeros(n));
        scalar_head::forward(&dev, (&mut y).into(), (&h).into(), w[..].into())
    });
    assert_refuses("scalar_head::backward", "dh [2, 3] dw [3] h [2, 3]", |n| {
        let ([mut dh, mut dw, h], [dy]) = (zeros(n), zeros([2]));
        let (dh, dw) = ((&mut dh).into(), (&mut dw).into());
        scalar_head::backward(&dev, dh, dw, (&dy).into(), (&h).into(), w[..].into())
    });
}
