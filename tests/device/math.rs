//! The elementary functions of f32 against f64, over the whole range.

use half::bf16;
use warpo::device::{Element, cpu::math};

/// Distance in units of the last place of the rounded truth.
fn ulps(got: f32, truth: f64) -> f64 {
    let t = truth as f32;
    if got == t || (got.is_nan() && t.is_nan()) {
        return 0.0;
    }
    let ulp = f64::from(f32::from_bits(t.abs().to_bits() + 1)) - f64::from(t.abs());
    (f64::from(got) - truth).abs() / ulp
}

fn sweep(
    name: &str,
    allowed: f64,
    xs: impl Iterator<Item = f32>,
    f: fn(f32) -> f32,
    t: fn(f64) -> f64,
) {
    let (mut worst, mut at) = (0.0, 0.0);
    for x in xs {
        let e = ulps(f(x), t(f64::from(x)));
        if e > worst || e.is_nan() {
            (worst, at) = (e, x);
        }
    }
    assert!(worst <= allowed, "{name}({at:e}) is {worst:.2} ulp off: {:e}", f(at));
}

fn line(a: f32, b: f32) -> impl Iterator<Item = f32> {
    (0..=400_000).map(move |i| a + (b - a) * (i as f32 / 400_000.0))
}

fn every(stride: usize) -> impl Iterator<Item = f32> {
    (0..=u32::MAX).step_by(stride).map(f32::from_bits).filter(|x| x.is_finite())
}

#[test]
fn elementary_functions_are_within_two_ulp() {
    sweep("exp", 2.0, line(-104.0, 88.7), math::exp, f64::exp);
    sweep("exp", 2.0, every(9_973).filter(|x| *x < 88.7), math::exp, f64::exp);
    sweep("ln", 2.0, every(9_973).filter(|x| *x > 0.0), math::ln, f64::ln);
    sweep("ln", 2.0, line(0.4, 3.0), math::ln, f64::ln);
    sweep("tanh", 2.0, line(-12.0, 12.0), math::tanh, f64::tanh);
    sweep("tanh", 2.0, every(9_973), math::tanh, f64::tanh);
}

#[test]
fn edges() {
    assert_eq!(math::exp(0.0), 1.0);
    assert_eq!(math::exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(math::exp(f32::INFINITY), f32::INFINITY);
    assert!(math::exp(f32::NAN).is_nan());
    assert_eq!(math::ln(1.0), 0.0);
    assert_eq!(math::ln(0.0), f32::NEG_INFINITY);
    assert_eq!(math::ln(f32::INFINITY), f32::INFINITY);
    assert!(math::ln(-1.0).is_nan() && math::ln(f32::NAN).is_nan());
    assert_eq!(math::tanh(f32::INFINITY), 1.0);
    assert_eq!(math::tanh(f32::NEG_INFINITY), -1.0);
    assert!(math::tanh(f32::NAN).is_nan());
    assert!(math::max(&[1.0, f32::NAN, 2.0]).is_nan());
    assert_eq!(math::max::<f32>(&[]), f32::NEG_INFINITY);
}

/// In whole blocks of lanes and in the rest, first and last.
#[test]
fn a_nan_never_leaves_a_maximum() {
    for n in 1..=50 {
        let mut x: Vec<f32> = (0..n).map(|i| (i * 7 % 11) as f32 - 20.0).collect();
        let want = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(math::max(&x), want);
        for i in 0..n {
            let good = std::mem::replace(&mut x[i], f32::NAN);
            assert!(math::max(&x).is_nan(), "{i} of {n}");
            x[i] = good;
        }
    }
}

#[test]
fn erf_agrees_with_tables() {
    // Abramowitz and Stegun, table 7.1, and Wolfram Alpha
    for (x, y) in [
        (0.1, 0.112_462_916_018_284_9),
        (0.5, 0.520_499_877_813_046_5),
        (1.0, 0.842_700_792_949_714_9),
        (2.0, 0.995_322_265_018_952_7),
        (2.6, 0.999_763_965_583_470_7),
        (3.0, 0.999_977_909_503_001_4),
    ] {
        assert!((math::erf(x) - y).abs() < 2e-15, "erf({x}) = {:e}", math::erf(x));
        assert_eq!(math::erf(-x), -math::erf(x));
    }
}

/// f32 to bf16 is one rounding, whichever way it goes, and so is f64: what lies just above a tie is
/// none.
#[test]
fn bf16_is_rounded_once() {
    for bits in (0..=u32::MAX).step_by(65_521).chain((0..1 << 19).map(|i| 0x3F80_0000 + i)) {
        let x = f32::from_bits(bits);
        let (got, want) = (bf16::of(f64::from(x)), bf16::from_f32(x));
        assert!(got.to_bits() == want.to_bits() || x.is_nan() && got.is_nan(), "{bits:#x}");
    }
    let (low, tie, high) = (1.0, 1.0 + 1.0 / 256.0, 1.0 + 1.0 / 128.0);
    for (x, want) in [
        (tie, low),
        (tie + 1e-6, high),
        (tie + 1e-12, high),
        (tie - 1e-12, low),
        (-tie - 1e-12, -high),
        (3.0 * tie, f64::from(bf16::from_f32(3.0 * tie as f32))),
        (1e300, f64::INFINITY),
        (-1e-300, 0.0),
    ] {
        assert_eq!(bf16::of(x).to_f64(), want, "{x}");
    }
}
