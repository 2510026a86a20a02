//! Whitening: hand-worked moments, goldens, what is invariant.

use warpo::{
    device::Float,
    ops::whiten::{self, Moments, Variance},
};

use crate::support::{
    assert_bits, assert_close, assert_earned, assert_nan_only, gather,
    golden::Golden,
    host, narrow, randn, refusal, shuffled,
    sim::{self, Column, FloatCase, Lab, rounded},
};

fn moments<F: Float>(x: &[F]) -> Moments {
    Moments::of(host(), x.into()).unwrap()
}

fn apply<F: Float>(x: &[F], moments: &Moments, shift: bool, variance: Variance) -> Vec<F> {
    let mut x = x.to_vec();
    whiten::apply(host(), (&mut x).into(), moments, shift, variance, 1e-8).unwrap();
    x
}

fn whitened<F: Float>(x: &[F], shift: bool, variance: Variance) -> Vec<F> {
    apply(x, &moments(x), shift, variance)
}

#[test]
fn hand_worked() {
    let x = [1.0, 2.0, 6.0];
    let m = moments(&x);
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
    let y_ = (&mut y[..]).into();
    whiten::apply(host(), y_, &m, true, Variance::Unbiased, 2.0).unwrap();
    assert_close("epsilon", &y, &[-2.0 / 3.0, -1.0 / 3.0, 1.0], 0.0, 1e-15);
}

#[test]
fn too_few_numbers_have_no_variance() {
    assert_eq!(moments::<f64>(&[]), Moments::default());
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
    let m = moments(&kept);
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
        let m = moments(&y);
        // epsilon takes 1e-8 / 2 of the spread, of 1 here and of 2500 there
        assert_close("mean", &[m.mean], &[0.0], 1e-15, 0.0);
        assert_close("variance", &[m.variance(variance)], &[1.0], 0.0, 2e-8);
        assert_close("moved", &whitened(&moved, true, variance), &y, 1e-11, 1e-8);
        let kept = moments(&whitened(&moved, false, variance));
        assert_close("kept", &[kept.mean], &[moments(&moved).mean], 0.0, 1e-14);
    }
    let (m, order) = (moments(&x), shuffled("order", 500));
    let y = apply(&gather(&x, 1, &order), &m, true, Variance::Unbiased);
    assert_bits("permuted", &y, &gather(&apply(&x, &m, true, Variance::Unbiased), 1, &order));
}

#[test]
fn a_nan_is_not_hidden() {
    let mut x: Vec<f32> = randn("x", 20);
    let m = moments(&x);
    let clean = apply(&x, &m, true, Variance::Unbiased);
    x[7] = f32::NAN;
    assert_nan_only("given moments", &apply(&x, &m, true, Variance::Unbiased), &clean, 7..8);
    for variance in [Variance::Biased, Variance::Unbiased] {
        assert!(whitened(&x, true, variance).iter().all(|x| x.is_nan()));
    }
}

/// A column of mean 1000 and standard deviation 50.
struct Step {
    first: usize,
    n: usize,
}

impl FloatCase for Step {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let x: Vec<f32> = randn::<f32>("x", self.n).iter().map(|x| 1e3 + 50.0 * x).collect();
        let x: Vec<F> = x.iter().map(|x| F::of(f64::from(*x))).collect();
        let mut x = Column::of(lab.dev(), self.first, &x);
        let m = Moments::of(lab.dev(), x.view())?;
        lab.sums("moments", &[m.count, m.mean, m.squares]);
        whiten::apply(lab.dev(), x.view_mut(), &m, true, Variance::Biased, 1e-8)?;
        lab.column("x", &x.read());
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
            sim.hold_f32(&Step { first, n });
        }
        let dev = sim.device(sim.orders()[0]);
        let says = "device `cuda` is not available: `whiten_partial` has no kernel for F64";
        assert_eq!(refusal(Moments::of(&dev, Column::of(&dev, 0, &[0.0]).view())), says);
    });
}

/// Equal numbers have no variance, a NaN is seen, and given moments are applied as on the CPU.
#[test]
fn kernels_whiten_as_the_cpu_does() {
    sim::check(|sim| {
        let dev = sim.device(sim.orders()[1]);
        for n in [1, 1030] {
            let equal = Column::of(&dev, 0, &vec![0.3f32; n]);
            let want = Moments { count: n as f64, mean: f64::from(0.3f32), squares: 0.0 };
            assert_eq!(Moments::of(&dev, equal.view()).unwrap(), want);
        }
        let mut x: Vec<f32> = rounded("x", 1030);
        let m = moments(&x);
        for (shift, variance) in
            [(true, Variance::Biased), (false, Variance::Biased), (true, Variance::Unbiased)]
        {
            let mut y = Column::of(&dev, 1, &x);
            whiten::apply(&dev, y.view_mut(), &m, shift, variance, 1e-8).unwrap();
            assert_bits("applied", &y.read(), &apply(&x, &m, shift, variance));
        }
        for i in [0, 517, 1029] {
            let good = std::mem::replace(&mut x[i], f32::NAN);
            let m = Moments::of(&dev, Column::of(&dev, 0, &x).view()).unwrap();
            assert!(m.mean.is_nan() && m.squares.is_nan(), "token {i}");
            x[i] = good;
        }
    });
}
