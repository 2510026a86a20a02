//! The loss of fine-tuning: hand-worked values, central differences, micro-batches.

use warpo::{
    device::{Device, Float},
    ops::nll,
};

use crate::support::{OP, assert_bits, assert_close, assert_nan_only, gradcheck, randn, refusal};

/// The loss and dlogp.
fn forward<F: Float>(logp: &[F], weights: &[F], denominator: f64) -> (f64, Vec<F>) {
    let mut d = vec![F::of(f64::NAN); logp.len()];
    let (d_, dev) = ((&mut d).into(), Device::cpu());
    let loss = nll::forward(&dev, d_, logp.into(), weights.into(), denominator).unwrap();
    (loss, d)
}

#[test]
fn hand_worked() {
    let (loss, d) = forward(&[-1.0, -2.0, -7.0], &[1.0, 0.5, 0.0], 4.0);
    assert_eq!(loss, 0.5);
    assert_eq!(d, [-0.25, -0.125, 0.0]);
    assert_eq!(forward::<f64>(&[], &[], 4.0), (0.0, vec![]));
}

#[test]
fn gradients() {
    for n in [1, 7, 33] {
        let (logp, weights): (Vec<f64>, Vec<f64>) = (randn("logp", n), randn("w", n));
        let d = forward(&logp, &weights, 5.5).1;
        gradcheck("logp", &logp, &d, OP, |logp| forward(logp, &weights, 5.5).0);
    }
}

#[test]
fn micro_batches_add_up() {
    let (logp, weights): (Vec<f32>, Vec<f32>) = (randn("logp", 41), randn("w", 41));
    let (loss, d) = forward(&logp, &weights, 41.0);
    for cut in [0, 1, 20, 41] {
        let (low, dlow) = forward(&logp[..cut], &weights[..cut], 41.0);
        let (high, dhigh) = forward(&logp[cut..], &weights[cut..], 41.0);
        assert_bits(&format!("cut {cut}"), &[dlow, dhigh].concat(), &d);
        assert_close(&format!("cut {cut}"), &[low + high], &[loss], 1e-15, 1e-15);
    }
}

#[test]
fn a_nan_is_not_hidden() {
    let (mut logp, mut weights) = (vec![-1.0f32; 5], vec![1.0; 5]);
    let clean = forward(&logp, &weights, 5.0).1;
    weights[3] = f32::NAN;
    let (loss, d) = forward(&logp, &weights, 5.0);
    assert!(loss.is_nan());
    assert_nan_only("weight", &d, &clean, 3..4);
    (weights[3], logp[3]) = (0.0, f32::NAN);
    assert!(forward(&logp, &weights, 5.0).0.is_nan(), "nor by a weight of 0");
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, x, mut d) = (Device::cpu(), [0.0f32; 3], [0.0f32; 3]);
    let e = nll::forward(&dev, (&mut d[..]).into(), x[..].into(), x[..2].into(), 1.0);
    assert_eq!(refusal(e), "nll: `weights` has shape [2], wanted [3]");
    let e = nll::forward(&dev, (&mut d[..2]).into(), x[..].into(), x[..].into(), 1.0);
    assert_eq!(refusal(e), "nll: `dlogp` has shape [2], wanted [3]");
}
