//! Residual connection: hand-worked values, and bits that do not depend on the batch.

use warpo::{
    device::{Device, Float},
    ops::residual,
};

use crate::support::{assert_bits, assert_nan_only, devices, randn, refusal};

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

#[test]
fn wrong_shapes_are_refused() {
    let (mut y, x) = (vec![0.0f32; 6], vec![0.0f32; 5]);
    let e = residual::add(&Device::cpu(), (&mut y).into(), (&x).into());
    assert_eq!(refusal(e), "residual: `y` has shape [6], wanted [5]");
}
