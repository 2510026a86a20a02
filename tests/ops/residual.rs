//! Residual connection: hand-worked values, and bits that do not depend on the batch.

use warpo::{
    device::{Buffer, Device, Element, Float},
    ops::residual,
};

use crate::support::{
    assert_bits, assert_nan_only, assert_refuses, devices, randn, refusal,
    sim::{self, Case, Lab},
    zeros,
};

fn add<F: Float>(dev: &Device, y: &[F], x: &[F]) -> Vec<F> {
    let mut y = y.to_vec();
    residual::add(dev, (&mut y).into(), x.into()).unwrap();
    y
}

#[test]
fn hand_worked() {
    assert_eq!(add(&Device::cpu(), &[1.0, -2.0, 0.5], &[10.0, 20.0, 0.25]), [11.0, 18.0, 0.75]);
    assert!(add::<f32>(&Device::cpu(), &[], &[]).is_empty());
}

/// Tasks have 16384 elements.
#[test]
fn rows_do_not_see_their_batch() {
    let (y, x): (Vec<f32>, Vec<f32>) = (randn("y", 16_411), randn("x", 16_411));
    let want: Vec<f32> = y.iter().zip(&x).map(|(y, x)| y + x).collect();
    for dev in devices() {
        for n in [1, 16_383, 16_384, 16_385, 16_411] {
            let at = y.len() - n;
            assert_bits(&format!("{n} {dev:?}"), &add(&dev, &y[at..], &x[at..]), &want[at..]);
        }
    }
}

#[test]
fn a_nan_stays_where_it_is() {
    let (y, mut x): (Vec<f32>, Vec<f32>) = (randn("y", 40), randn("x", 40));
    let clean = add(&Device::cpu(), &y, &x);
    x[17] = f32::NAN;
    assert_nan_only("x", &add(&Device::cpu(), &y, &x), &clean, 17..18);
    assert_nan_only("y", &add(&Device::cpu(), &x, &y), &clean, 17..18);
}

struct Sum {
    n: usize,
}

impl Case for Sum {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (mut y, x) = (lab.rows::<T>("y", self.n, 1), lab.rows::<T>("x", self.n, 1));
        residual::add(lab.dev(), y.view_mut(), x.view())?;
        lab.by_row("y", &y);
        Ok(())
    }
}

/// No elements, one, those around a packet of bf16, around a block of packets in f32 and in bf16, a
/// prime.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for n in [0, 1, 7, 8, 9, 1023, 1024, 1025, 2047, 2048, 2049, 4099] {
            sim.hold(&Sum { n });
            sim.hold_bits(&Sum { n });
        }
        sim.hold_rows(37, |n| Sum { n });
    });
}

#[test]
fn kernels_refuse_what_does_not_begin_at_a_packet() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        let mut y = Buffer::<f32>::zeros(&dev, "y", 9).unwrap();
        let x = Buffer::<f32>::zeros(&dev, "x", 9).unwrap();
        let e = refusal(residual::add(&dev, y.view_mut().range(0..8), x.view().range(1..9)));
        assert!(e.contains("residual_add_f32: `x` begins at 0x"), "{e}");
        assert!(e.ends_with("4, wanted a multiple of 16"), "{e}");
    });
}

#[test]
fn wrong_shapes_are_refused() {
    assert_refuses("residual", "y [5]", |n| {
        let ([mut y], x) = (zeros(n), [0.0f32; 5]);
        residual::add(&Device::cpu(), (&mut y).into(), x[..].into())
    });
}
