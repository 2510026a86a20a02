//! Multipliers and soft-caps: hand-worked values, and bits that do not depend on the batch.

use warpo::{
    device::{Device, Element, Float},
    ops::scale,
};

use crate::support::{
    assert_bits, assert_close, devices, randn, refusal,
    sim::{self, Case, Lab},
};

fn scaled<F: Float>(dev: &Device, x: &[F], factor: f64, cap: Option<f64>) -> Vec<F> {
    let mut x = x.to_vec();
    scale::in_place(dev, (&mut x).into(), factor, cap).unwrap();
    x
}

#[test]
fn hand_worked() {
    let dev = Device::cpu();
    assert_eq!(scaled(&dev, &[1.0, -2.0, 0.5], 3.0, None), [3.0, -6.0, 1.5]);
    let capped = scaled(&dev, &[1.0, -2.0, 1e6], 3.0, Some(4.0));
    let want = [4.0 * (0.75f64).tanh(), -4.0 * (1.5f64).tanh(), 4.0];
    assert_close("capped", &capped, &want, 1e-15, 1e-14);
    assert!(scaled::<f32>(&dev, &[], 2.0, None).is_empty());
}

#[test]
fn rows_do_not_see_their_batch() {
    let x: Vec<f32> = randn("x", 16_411);
    for cap in [None, Some(0.7)] {
        let want = scaled(&Device::cpu(), &x, 1.3, cap);
        for dev in devices() {
            for n in [1, 16_383, 16_384, 16_385, 16_411] {
                let at = x.len() - n;
                let got = scaled(&dev, &x[at..], 1.3, cap);
                assert_bits(&format!("{n} {dev:?}"), &got, &want[at..]);
            }
        }
    }
}

struct Scaled {
    n: usize,
    cap: Option<f64>,
}

impl Case for Scaled {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let mut x = lab.rows::<T>("x", self.n, 1);
        scale::in_place(lab.dev(), x.view_mut(), 1.75, self.cap)?;
        lab.by_row("x", &x);
        Ok(())
    }
}

/// No elements, one, those around a packet of bf16, around a block of packets in f32 and in bf16, a
/// prime.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for n in [0, 1, 7, 8, 9, 1023, 1024, 1025, 2047, 2048, 2049, 4099] {
            sim.hold(&Scaled { n, cap: None });
            sim.hold_bits(&Scaled { n, cap: None });
            sim.hold(&Scaled { n, cap: Some(2.5) });
        }
        sim.hold_rows(37, |n| Scaled { n, cap: Some(2.5) });
    });
}

#[test]
fn wrong_values_are_refused() {
    for (factor, cap, says) in [
        (f64::NAN, None, "scale: factor: got NaN, wanted a finite number"),
        (1.0, Some(0.0), "scale: cap: got 0, wanted a positive number"),
        (1.0, Some(f64::INFINITY), "scale: cap: got inf, wanted a positive number"),
    ] {
        let mut x = vec![1.0f32; 3];
        let e = refusal(scale::in_place(&Device::cpu(), (&mut x).into(), factor, cap));
        assert_eq!(e, says);
    }
}
