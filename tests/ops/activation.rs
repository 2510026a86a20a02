//! Activations, plain and gated: hand-worked values, goldens, central differences, bits.

use warpo::{
    device::{Buffer, Device, Element, Float, cpu::math},
    ops::activation::{self, Activation},
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only, assert_refuses, devices,
    golden::Golden,
    gradcheck, inner, narrow, randn, refusal,
    sim::{self, Case, Lab},
    zeros,
};

const ALL: [Activation; 5] = [
    Activation::GeluTanh,
    Activation::Gelu,
    Activation::Silu,
    Activation::Relu,
    Activation::QuickGelu,
];

fn forward<F: Float>(dev: &Device, act: Activation, x: &[F]) -> Vec<F> {
    let mut y = vec![F::of(f64::NAN); x.len()];
    activation::forward(dev, act, (&mut y).into(), x.into()).unwrap();
    y
}

fn backward<F: Float>(dev: &Device, act: Activation, dy: &[F], x: &[F]) -> Vec<F> {
    let mut dx = vec![F::of(f64::NAN); x.len()];
    activation::backward(dev, act, (&mut dx).into(), dy.into(), x.into()).unwrap();
    dx
}

fn gated_forward<F: Float>(dev: &Device, act: Activation, x: &[F], cols: usize) -> Vec<F> {
    let mut y = vec![F::of(f64::NAN); x.len() / 2];
    activation::gated_forward(dev, act, (&mut y).into(), x.into(), cols).unwrap();
    y
}

fn gated_backward<F: Float>(
    dev: &Device,
    act: Activation,
    dy: &[F],
    x: &[F],
    cols: usize,
) -> Vec<F> {
    let mut dx = vec![F::of(f64::NAN); x.len()];
    activation::gated_backward(dev, act, (&mut dx).into(), dy.into(), x.into(), cols).unwrap();
    dx
}

#[test]
fn hand_worked() {
    let dev = Device::cpu();
    let ln3 = 3f64.ln(); // sigmoid(ln 3) = 3/4
    for (act, x, y, slope) in [
        (Activation::Relu, 3.0, 3.0, 1.0),
        (Activation::Relu, -2.0, 0.0, 0.0),
        (Activation::Relu, 0.0, 0.0, 0.0), // at the kink: 0, as PyTorch
        (Activation::Silu, 0.0, 0.0, 0.5),
        (Activation::Silu, ln3, 0.75 * ln3, 0.75 * (1.0 + 0.25 * ln3)),
        (Activation::Silu, -ln3, -0.25 * ln3, 0.25 * (1.0 - 0.75 * ln3)),
        (Activation::QuickGelu, ln3 / 1.702, 0.75 * ln3 / 1.702, 0.75 * (1.0 + 0.25 * ln3)),
        (Activation::Gelu, 0.0, 0.0, 0.5),
        // the normal distribution at 1: cumulative and density
        (
            Activation::Gelu,
            1.0,
            0.841_344_746_068_542_9,
            0.841_344_746_068_542_9 + 0.241_970_724_519_143_37,
        ),
        (Activation::GeluTanh, 0.0, 0.0, 0.5),
        (Activation::GeluTanh, 1.0, 0.841_191_990_608_276_8, 1.082_964_083_845_782_8),
    ] {
        assert_close(&format!("{act:?}({x})"), &forward(&dev, act, &[x]), &[y], 0.0, 1e-15);
        let d = backward(&dev, act, &[-2.0], &[x]);
        assert_close(&format!("{act:?}'({x})"), &d, &[-2.0 * slope], 0.0, 1e-15);
    }
    // silu(ln 3) * -2 and relu(-1) * 5, gate and up side by side
    let y = gated_forward(&dev, Activation::Silu, &[ln3, -2.0], 1);
    assert_close("silu gated", &y, &[-1.5 * ln3], 0.0, 1e-15);
    let y = gated_forward(&dev, Activation::Relu, &[-1.0, 2.0, 5.0, 7.0], 2);
    assert_close("relu gated", &y, &[0.0, 14.0], 0.0, 0.0);
    let d = gated_backward(&dev, Activation::Relu, &[10.0, 100.0], &[-1.0, 2.0, 5.0, 7.0], 2);
    assert_close("relu gated", &d, &[0.0, 700.0, 0.0, 200.0], 0.0, 0.0);
}

#[test]
fn names_are_those_of_hugging_face() {
    for (name, act) in [
        ("gelu_new", Some(Activation::GeluTanh)),
        ("gelu_pytorch_tanh", Some(Activation::GeluTanh)),
        ("gelu_fast", Some(Activation::GeluTanh)),
        ("gelu", Some(Activation::Gelu)),
        ("silu", Some(Activation::Silu)),
        ("swish", Some(Activation::Silu)),
        ("relu", Some(Activation::Relu)),
        ("quick_gelu", Some(Activation::QuickGelu)),
        ("GELU", None),
        ("", None),
    ] {
        assert_eq!(Activation::from_hf_name(name), act, "{name}");
    }
}

/// Value and slope in f32, written plainly.
fn plain(act: Activation, x: f32) -> (f32, f32) {
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    match act {
        Activation::GeluTanh => {
            let c = std::f32::consts::FRAC_2_PI.sqrt();
            let t = (c * (x + 0.044_715 * x * x * x)).tanh();
            let inner = c * (1.0 + 3.0 * 0.044_715 * x * x);
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
        }
        Activation::Gelu => {
            let cdf = 0.5 * (1.0 + math::erf(f64::from(x / 2f32.sqrt())) as f32);
            (x * cdf, cdf + x * (-0.5 * x * x).exp() / std::f32::consts::TAU.sqrt())
        }
        Activation::Silu => (x * sigmoid(x), sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))),
        Activation::Relu => (x.max(0.0), f32::from(x > 0.0)),
        Activation::QuickGelu => {
            let s = sigmoid(1.702 * x);
            (x * s, s * (1.0 + 1.702 * x * (1.0 - s)))
        }
    }
}

#[test]
fn values_and_slopes_are_those_of_hugging_face() {
    let g = Golden::open("pure/activations.safetensors");
    let (dev, x) = (Device::cpu(), g.get("x"));
    let (x32, ones) = (narrow(x), vec![1.0; x.len()]);
    for name in ["gelu_new", "gelu_pytorch_tanh", "gelu", "silu", "relu", "quick_gelu"] {
        let act = Activation::from_hf_name(name).unwrap();
        let (y, slope) = (g.get(name), g.get(&format!("d_{name}")));
        // 1 + tanh and 1 + erf lose what is below 1e-16, times |x| = 40, on both sides
        assert_close(name, &forward(&dev, act, x), y, 1e-14, 1e-14);
        assert_close(name, &backward(&dev, act, &ones, x), slope, 1e-14, 1e-14);

        let (p, dp): (Vec<f32>, Vec<f32>) = x32.iter().map(|x| plain(act, *x)).unzip();
        assert_earned(name, &forward(&dev, act, &x32), &p, y);
        let d = backward(&dev, act, &vec![1.0; x.len()], &x32);
        assert_earned(name, &d, &dp, slope);
    }
    g.all_read(&[]);
}

/// Far to the left nothing is lost: the result is small, its relative error too.
#[test]
fn sigmoid_is_as_exact_left_as_right() {
    let x: Vec<f32> = (1..=80).map(|i| -(i as f32)).collect();
    for act in [Activation::Silu, Activation::QuickGelu] {
        let k = if act == Activation::Silu { 1.0 } else { 1.702 };
        let truth: Vec<f64> =
            x.iter().map(|x| f64::from(*x)).map(|x| x / (1.0 + (-k * x).exp())).collect();
        let y = forward(&Device::cpu(), act, &x);
        // The argument 1.702 x is rounded: 2^-24 of up to 87, and a few roundings more.
        for (y, t) in y.iter().zip(truth).filter(|y| y.1.abs() > 1e-36) {
            assert_close(&format!("{act:?}"), &[*y], &[t], 0.0, 1e-5);
        }
    }
}

/// Random numbers, none near relu's kink.
fn points(name: &str, n: usize) -> Vec<f64> {
    randn::<f64>(name, n).iter().map(|x| 2.0 * x + 0.01f64.copysign(*x)).collect()
}

#[test]
fn gradients() {
    let dev = Device::cpu();
    for act in ALL {
        let (x, dy) = (points("x", 50), randn::<f64>("dy", 50));
        let dx = backward(&dev, act, &dy, &x);
        gradcheck(&format!("{act:?}"), &x, &dx, OP, |x| inner(&forward(&dev, act, x), &dy));
        for cols in [1, 5, 25] {
            let dy = &dy[..25];
            let dx = gated_backward(&dev, act, dy, &x, cols);
            let f = |x: &[f64]| inner(&gated_forward(&dev, act, x, cols), dy);
            gradcheck(&format!("{act:?} gated {cols}"), &x, &dx, OP, f);
        }
    }
}

/// Tasks have 2048 elements.
#[test]
fn rows_do_not_see_their_batch() {
    let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", 4099), randn("dy", 4099));
    let one = Device::cpu();
    for act in ALL {
        let y: Vec<f32> = x.iter().flat_map(|x| forward(&one, act, &[*x])).collect();
        let d: Vec<f32> =
            x.iter().zip(&dy).flat_map(|(x, dy)| backward(&one, act, &[*dy], &[*x])).collect();
        for dev in devices() {
            for n in [0, 1, 2047, 2048, 2049, 4099] {
                let part = 4099 - n..4099;
                let what = format!("{act:?} {n} {dev:?}");
                assert_bits(&what, &forward(&dev, act, &x[part.clone()]), &y[part.clone()]);
                let got = backward(&dev, act, &dy[part.clone()], &x[part.clone()]);
                assert_bits(&what, &got, &d[part]);
            }
        }
    }
}

/// Tasks have 2048 / cols rows.
#[test]
fn gated_rows_do_not_see_their_batch() {
    let (rows, cols) = (130, 33);
    let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", rows * 2 * cols), randn("dy", rows * cols));
    let one = Device::cpu();
    for act in ALL {
        let alone = |r: usize| gated_forward(&one, act, &x[r * 2 * cols..][..2 * cols], cols);
        let y: Vec<f32> = (0..rows).flat_map(alone).collect();
        let alone = |r: usize| {
            gated_backward(&one, act, &dy[r * cols..][..cols], &x[r * 2 * cols..][..2 * cols], cols)
        };
        let d: Vec<f32> = (0..rows).flat_map(alone).collect();
        for dev in devices() {
            for n in [0, 1, 62, 63, 64, 130] {
                let (at, what) = ((rows - n) * cols, format!("{act:?} {n} {dev:?}"));
                assert_bits(&what, &gated_forward(&dev, act, &x[2 * at..], cols), &y[at..]);
                let got = gated_backward(&dev, act, &dy[at..], &x[2 * at..], cols);
                assert_bits(&what, &got, &d[2 * at..]);
            }
        }
    }
}

#[test]
fn a_nan_stays_where_it_is() {
    let dev = Device::cpu();
    let clean: Vec<f32> = randn("x", 40);
    for act in ALL {
        for i in [0, 7, 39] {
            let mut x = clean.clone();
            x[i] = f32::NAN;
            let what = format!("{act:?} {i}");
            let want = forward(&dev, act, &clean);
            assert_nan_only(&what, &forward(&dev, act, &x), &want, i..i + 1);
            // 4 rows of 5 gates and 5 ups
            let y = i / 10 * 5 + i % 5;
            let want = gated_forward(&dev, act, &clean, 5);
            assert_nan_only(&what, &gated_forward(&dev, act, &x, 5), &want, y..y + 1);
        }
    }
}

/// `n` numbers around a centre, `scale` times as wide as N(0, 1).
struct Plain {
    act: Activation,
    n: usize,
    around: (f64, f64),
}

impl Case for Plain {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (dev, n) = (lab.dev(), self.n);
        let x = lab.spread::<T>("x", n, 1, self.around);
        let (dy, mut y, mut dx) = (lab.rows::<T>("dy", n, 1), lab.room::<T>(n), lab.room::<T>(n));
        activation::forward(dev, self.act, y.view_mut(), x.view())?;
        activation::backward(dev, self.act, dx.view_mut(), dy.view(), x.view())?;
        lab.by_row("y", &y);
        lab.by_row("dx", &dx);
        Ok(())
    }
}

struct Gated {
    act: Activation,
    rows: usize,
    cols: usize,
}

impl Case for Gated {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (dev, act, rows, cols) = (lab.dev(), self.act, self.rows, self.cols);
        let (x, dy) = (lab.rows::<T>("x", rows, 2 * cols), lab.rows::<T>("dy", rows, cols));
        let (mut y, mut dx) = (lab.room::<T>(rows * cols), lab.room::<T>(2 * rows * cols));
        activation::gated_forward(dev, act, y.view_mut(), x.view(), cols)?;
        activation::gated_backward(dev, act, dx.view_mut(), dy.view(), x.view(), cols)?;
        lab.by_row("gated y", &y);
        lab.by_row("gated dx", &dx);
        Ok(())
    }
}

/// All activations near 0, around it, far to both sides, and in the left tail only, where what they
/// give is small. Plain ones of no elements, one, those around a packet of bf16 and a block of
/// packets, a prime; gated ones of no rows, rows that are no packets, packets of f32 only, and
/// those around a block.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for act in ALL {
            for around in [(0.0, 0.1), (0.0, 1.0), (0.0, 8.0), (-3.0, 0.5)] {
                sim.hold(&Plain { act, n: 131, around });
            }
            sim.hold(&Gated { act, rows: 3, cols: 24 });
        }
        let act = Activation::Silu;
        for n in [0, 1, 7, 8, 9, 1025, 2047, 2048, 2049] {
            sim.hold(&Plain { act, n, around: (0.0, 1.0) });
        }
        for (rows, cols) in [(0, 8), (1, 1), (37, 7), (5, 12), (16, 128), (17, 128)] {
            sim.hold(&Gated { act, rows, cols });
        }
        sim.hold_rows(37, |n| Plain { act, n, around: (0.0, 1.0) });
        for cols in [8, 12, 13] {
            sim.hold_rows(37, |rows| Gated { act, rows, cols });
        }
    });
}

/// What an activation is far to the left, without the difference of 1 and almost 1.
fn left_tail(act: Activation, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match act {
        Activation::GeluTanh => {
            x * sigmoid((8.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x))
        }
        Activation::Gelu => {
            // The continued fraction of erfc (Abramowitz and Stegun 7.1.14).
            let z = -x * std::f64::consts::FRAC_1_SQRT_2;
            let below = (1..200).rev().fold(z, |f, k| z + f64::from(k) / 2.0 / f);
            x / 2.0 * (-z * z).exp() / std::f64::consts::PI.sqrt() / below
        }
        Activation::Silu => x * sigmoid(x),
        Activation::Relu => 0.0,
        Activation::QuickGelu => x * sigmoid(1.702 * x),
    }
}

/// The kernels lose nothing in the left tail, of no activation.
#[test]
fn kernels_are_as_exact_left_as_right() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        let x: Vec<f32> = (8..100).map(|i| -(i as f32) / 8.0).collect();
        let on_device = Buffer::of(&dev, "x", &x).unwrap();
        for act in ALL {
            let mut y = Buffer::<f32>::zeros(&dev, "y", x.len()).unwrap();
            activation::forward(&dev, act, y.view_mut(), on_device.view()).unwrap();
            for (y, x) in dev.read(y.view()).unwrap().iter().zip(&x) {
                let truth = left_tail(act, f64::from(*x));
                // The argument of the exponential, up to 83, is rounded some times.
                if truth.abs() > 1e-36 {
                    assert_close(&format!("{act:?}({x})"), &[*y], &[truth], 0.0, 3e-5);
                }
            }
        }
    });
}

/// Gated rows that do not begin at a packet have the bits of those that do.
#[test]
fn kernels_take_rows_from_anywhere() {
    sim::check(|sim| {
        let (dev, act, cols) = (sim.device(Default::default()), Activation::GeluTanh, 8);
        let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", 6 * cols), randn("dy", 3 * cols));
        let run = |at: usize| {
            let lie = |x: &[f32]| {
                let all: Vec<f32> = (0..at).map(|_| f32::NAN).chain(x.iter().copied()).collect();
                Buffer::of(&dev, "x", &all).unwrap()
            };
            let (x, dy, mut y, mut dx) = (lie(&x), lie(&dy), lie(&dy), lie(&x));
            let (x, dy) = (x.view().range(at..x.len()), dy.view().range(at..dy.len()));
            let to = y.view_mut().range(at..at + dy.len());
            activation::gated_forward(&dev, act, to, x, cols).unwrap();
            let to = dx.view_mut().range(at..at + x.len());
            activation::gated_backward(&dev, act, to, dy, x, cols).unwrap();
            let read = |x: &Buffer<'_, f32>| dev.read(x.view()).unwrap()[at..].to_vec();
            [read(&y), read(&dx)].concat()
        };
        assert_bits("from 1", &run(1), &run(0));
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, act) = (Device::cpu(), Activation::Silu);
    assert_refuses("activation", "y [5]", |n| {
        let ([mut y], [x]) = (zeros(n), zeros([5]));
        activation::forward(&dev, act, (&mut y).into(), (&x).into())
    });
    assert_refuses("activation::backward", "dx [5] dy [5]", |n| {
        let ([mut dx, dy], [x]) = (zeros(n), zeros([5]));
        activation::backward(&dev, act, (&mut dx).into(), (&dy).into(), (&x).into())
    });
    let gated = |[y, gate_up]: [usize; 2], cols: usize| {
        let [mut y, gate_up] = zeros([y, gate_up]);
        activation::gated_forward(&dev, act, (&mut y).into(), (&gate_up).into(), cols)
    };
    assert_refuses("gated activation", "gate_up [2, 6]", |[n]| gated([6, n], 3));
    for cols in [0, 4] {
        let e = refusal(gated([6, 12], cols));
        assert!(e.starts_with("gated activation: `y` has shape [6]"), "{cols}");
    }
    assert_refuses("gated activation::backward", "dgate_up [1, 10] gate_up [1, 10]", |n| {
        let ([mut d, gate_up], [dy]) = (zeros(n), zeros([5]));
        activation::gated_backward(&dev, act, (&mut d).into(), (&dy).into(), (&gate_up).into(), 5)
    });
}
