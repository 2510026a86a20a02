//! The loss of fine-tuning: hand-worked values, central differences, micro-batches.

use warpo::{
    device::{Device, Float},
    ops::nll,
};

use crate::support::{
    OP, assert_bits, assert_close, assert_nan_only, gradcheck, host, randn, refusal,
    sim::{self, Column, FloatCase, Lab, Variant, rounded},
};

/// The loss and dlogp, of likelihoods or weighed by them.
fn forward<F: Float>(logp: &[F], weights: &[F], denominator: f64) -> (f64, Vec<F>) {
    forward_on(host(), 0, logp, weights, denominator).unwrap()
}

/// The same of columns that begin `first` elements into their memory.
fn forward_on<F: Float>(
    dev: &Device,
    first: usize,
    logp: &[F],
    weights: &[F],
    denominator: f64,
) -> warpo::Result<(f64, Vec<F>)> {
    let mut d = Column::room(dev, first, logp.len());
    let [logp, weights] = [logp, weights].map(|x| Column::of(dev, first, x));
    let loss = nll::forward(dev, d.view_mut(), logp.view(), weights.view(), denominator)?.get()?;
    Ok((loss, d.read()))
}

#[test]
fn hand_worked() {
    let (loss, d) = forward(&[-1.0, -2.0, -7.0], &[1.0, 0.5, 0.0], 4.0);
    assert_eq!(loss, 0.5);
    assert_eq!(d, [-0.25, -0.125, 0.0]);
    assert_eq!(forward::<f64>(&[], &[], 4.0), (0.0, vec![]));
}

/// Probabilities 1/2 and 1/4: half and a quarter of the gradient, and of a loss of ln 2 and 2 ln 2.
#[test]
fn hand_worked_dft() {
    let (ln2, mut d) = (2f64.ln(), [9.0; 3]);
    let (logp, weights) = ([-ln2, -2.0 * ln2, 0.0], [1.0, 0.5, 2.0]);
    let loss = nll::dft(host(), d[..].as_mut().into(), logp[..].into(), weights[..].into(), 4.0);
    assert_close("loss", &[loss.unwrap().get().unwrap()], &[0.75 * ln2 / 4.0], 0.0, 1e-15);
    assert_close("dlogp", &d, &[-0.125, -0.03125, -0.5], 0.0, 1e-15);
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

struct Tokens {
    first: usize,
    n: usize,
}

impl FloatCase for Tokens {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (logp, weights) = (rounded::<F>("logp", self.n), rounded("w", self.n));
        let (loss, d) = forward_on(lab.dev(), self.first, &logp, &weights, 7.0)?;
        lab.sums("loss", &[loss]);
        lab.column("dlogp", &d);
        let dev = lab.dev();
        let mut d = Column::room(dev, self.first, self.n);
        let [logp, weights] = [logp, weights].map(|x| Column::of(dev, self.first, &x));
        let loss = nll::dft(dev, d.view_mut(), logp.view(), weights.view(), 7.0)?.get()?;
        lab.sums("loss of DFT", &[loss]);
        lab.column("dlogp of DFT", &d.read());
        Ok(())
    }
}

/// No tokens, one, those around a thread's and around a block's, three blocks; columns that begin
/// at a packet and beside one.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (first, n) in
            [(0, 0), (0, 1), (1, 3), (0, 4), (0, 5), (1, 1023), (0, 1024), (2, 1025), (0, 2051)]
        {
            sim.hold_f32(&Tokens { first, n });
        }
        let none = refusal(forward_on(&sim.device(sim.orders()[0]), 0, &[0.0], &[0.0], 1.0));
        let says = "device `cuda` is not available: `nll_forward` has no kernel for F64";
        assert_eq!(none, says);
    });
}

/// More tokens than blocks take at once: they have two tiles each, the last block the rest of one.
#[test]
fn kernel_blocks_take_as_many_tiles_as_they_must() {
    sim::check(|sim| {
        if matches!(sim.variant, Variant::Address | Variant::Thread) {
            return;
        }
        let n = 256 * 1024 + 5;
        let (logp, weights): (Vec<f32>, Vec<f32>) = (randn("logp", n), randn("w", n));
        let want = forward(&logp, &weights, 8.0);
        let orders = sim.orders();
        let both = [0, 1].map(|i| {
            let (loss, d) = forward_on(&sim.device(orders[i]), 0, &logp, &weights, 8.0).unwrap();
            assert_close("loss", &[loss], &[want.0], 1e-12, 1e-12);
            // a power of two divides exactly
            assert_bits("dlogp", &d, &want.1);
            loss
        });
        assert_bits("loss", &both[..1], &both[1..]);
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, x, mut d) = (Device::cpu(), [0.0f32; 3], [0.0f32; 3]);
    let e = nll::forward(&dev, (&mut d[..]).into(), x[..].into(), x[..2].into(), 1.0);
    assert_eq!(refusal(e), "nll: `weights` has shape [2], wanted [3]");
    let e = nll::forward(&dev, (&mut d[..2]).into(), x[..].into(), x[..].into(), 1.0);
    assert_eq!(refusal(e), "nll: `dlogp` has shape [2], wanted [3]");
}
