//! Whitening: hand-worked moments, goldens, what is invariant.

use warpo::{
    device::{Device, Float},
    ops::whiten::{self, Moments, Variance},
};

use crate::support::{
    assert_bits, assert_close, assert_earned, assert_nan_only, gather, golden::Golden, narrow,
    randn, shuffled,
};

fn apply<F: Float>(x: &[F], moments: &Moments, shift: bool, variance: Variance) -> Vec<F> {
    let mut x = x.to_vec();
    whiten::apply(&Device::cpu(), (&mut x).into(), moments, shift, variance, 1e-8).unwrap();
    x
}

fn whitened<F: Float>(x: &[F], shift: bool, variance: Variance) -> Vec<F> {
    apply(x, &Moments::of(x.into()), shift, variance)
}

#[test]
fn hand_worked() {
    let x = [1.0, 2.0, 6.0];
    let m = Moments::of(x[..].into());
    assert_eq!(m, Moments { count: 3.0, mean: 3.0, squares: 14.0 });
    assert_eq!(m.variance(Variance::Unbiased), 7.0);
    assert_eq!(m.variance(Variance::Biased), 14.0 / 3.0);
    for (variance, value) in [(Variance::Unbiased, 7.0), (Variance::Biased, 14.0 / 3.0)] {
        let s = (value + 1e-8f64).sqrt();
        let y = apply(&x, &m, true, variance);
        assert_close("shifted", &y, &[-2.0 / s, -1.0 / s, 3.0 / s], 0.0, 1e-15);
        let y = apply(&x, &m, false, variance);
        assert_close("kept", &y, &[3.0 - 2.0 / s, 3.0 - 1.0 / s, 3.0 + 3.0 / s], 0.0, 1e-15);
    }
    // epsilon is inside the root: 3 / sqrt(7 + 2)
    let mut y = x;
    let (y_, dev) = ((&mut y[..]).into(), Device::cpu());
    whiten::apply(&dev, y_, &m, true, Variance::Unbiased, 2.0).unwrap();
    assert_close("epsilon", &y, &[-2.0 / 3.0, -1.0 / 3.0, 1.0], 0.0, 1e-15);
}

#[test]
fn too_few_numbers_have_no_variance() {
    assert_eq!(Moments::of::<f64>([][..].into()), Moments::default());
    for variance in [Variance::Biased, Variance::Unbiased] {
        assert!(whitened::<f64>(&[], true, variance).is_empty());
        assert_eq!(whitened(&[5.0], true, variance), [0.0]);
        assert_eq!(whitened(&[5.0], false, variance), [5.0]);
        assert_eq!(whitened(&[5.0, 5.0], true, variance), [0.0, 0.0]);
    }
}

#[test]
fn masked_whitening_is_that_of_trl() {
    let g = Golden::open("pure/whiten.safetensors");
    let mask: Vec<bool> = g.ints("mask").iter().map(|m| *m == 1).collect();
    let kept = g.kept("x", &mask);
    let m = Moments::of((&kept).into());
    assert_close("mean", &[m.mean], &[g.scalar("mean")], 0.0, 1e-14);
    let var = m.variance(Variance::Unbiased);
    assert_close("var", &[var], &[g.scalar("var")], 0.0, 1e-14);
    for (key, shift) in [("whitened", true), ("whitened_noshift", false)] {
        // The golden transforms the masked cells as well: so do the moments of the kept ones.
        let got = apply(g.get("x"), &m, shift, Variance::Unbiased);
        assert_close(key, &got, g.get(key), 1e-14, 1e-14);

        let x = narrow(&kept);
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let square = |x: &f32| (x - mean) * (x - mean);
        let var = x.iter().map(square).sum::<f32>() / (x.len() - 1) as f32;
        let back = if shift { 0.0 } else { mean };
        let plain: Vec<f32> = x.iter().map(|x| (x - mean) / (var + 1e-8).sqrt() + back).collect();
        let got = whitened(&x, shift, Variance::Unbiased);
        assert_earned(key, &got, &plain, &g.kept(key, &mask));
    }
    g.all_read(&[]);
}

/// Mean 0 and variance 1 afterwards; shifting and scaling the input changes nothing, permuting it
/// permutes the output.
#[test]
fn is_whitening() {
    let x: Vec<f64> = randn("x", 500);
    let moved: Vec<f64> = x.iter().map(|x| 1e3 + 50.0 * x).collect();
    for variance in [Variance::Biased, Variance::Unbiased] {
        let y = whitened(&x, true, variance);
        let m = Moments::of((&y).into());
        // epsilon takes 1e-8 / 2 of the spread, of 1 here and of 2500 there
        assert_close("mean", &[m.mean], &[0.0], 1e-15, 0.0);
        assert_close("variance", &[m.variance(variance)], &[1.0], 0.0, 2e-8);
        assert_close("moved", &whitened(&moved, true, variance), &y, 1e-11, 1e-8);
        let kept = Moments::of((&whitened(&moved, false, variance)).into());
        assert_close("kept", &[kept.mean], &[Moments::of((&moved).into()).mean], 0.0, 1e-14);
    }
    let (m, order) = (Moments::of((&x).into()), shuffled("order", 500));
    let y = apply(&gather(&x, 1, &order), &m, true, Variance::Unbiased);
    assert_bits("permuted", &y, &gather(&apply(&x, &m, true, Variance::Unbiased), 1, &order));
}

#[test]
fn a_nan_is_not_hidden() {
    let mut x: Vec<f32> = randn("x", 20);
    let m = Moments::of((&x).into());
    let clean = apply(&x, &m, true, Variance::Unbiased);
    x[7] = f32::NAN;
    assert_nan_only("given moments", &apply(&x, &m, true, Variance::Unbiased), &clean, 7..8);
    for variance in [Variance::Biased, Variance::Unbiased] {
        assert!(whitened(&x, true, variance).iter().all(|x| x.is_nan()));
    }
}
