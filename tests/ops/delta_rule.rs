//! The gated delta rule: a plain recurrence, central differences, sequences that are continued or
//! packed, bits.

use half::bf16;
use warpo::{
    Result,
    device::{Buffer, Device, Element, Float},
    ops::{
        delta_rule::{self, DeltaGrads, DeltaInputs, DeltaKept, DeltaOut, DeltaShape},
        gate::Strided,
        short_conv::Sequences,
    },
};

use super::short_conv::whole;
use crate::support::{
    OP, assert_bits, assert_close, devices, gradcheck, host, inner, narrow, randn, refusal,
    sim::{self, Case, Lab, Order},
};

const SHAPE: DeltaShape = DeltaShape { key_heads: 2, value_heads: 4, key_dim: 5, value_dim: 3 };
/// Columns of rows of gates, and where they begin.
const WIDE: usize = 11;
const FIRST: usize = 2;
const LENS: [usize; 4] = [6, 1, 0, 9];
const ROWS: usize = 16;

/// Inputs in the memory of a device: queries, keys and values, gates, rates, biases.
struct Inputs<T: 'static>([Buffer<'static, T>; 4]);

impl<T: Element> Inputs<T> {
    fn of(dev: &Device, all: &[Vec<f64>; 4]) -> Self {
        let own = |x: &Vec<f64>| -> Vec<T> { x.iter().map(|x| T::of(*x)).collect() };
        Self(all.each_ref().map(|x| Buffer::of(dev, "test", &own(x)).unwrap()))
    }

    fn view(
        &self,
        rows: std::ops::Range<usize>,
        shape: DeltaShape,
        wide: usize,
    ) -> DeltaInputs<'_, T> {
        let [qkv, gates, rate, bias] = self.0.each_ref().map(Buffer::view);
        let cols = shape.qkv_cols();
        DeltaInputs {
            qkv: qkv.range(rows.start * cols..rows.end * cols),
            gates: Strided {
                data: gates.range(rows.start * wide..rows.end * wide),
                first: FIRST,
                stride: wide,
            },
            rate,
            bias,
        }
    }
}

fn numbers(shape: DeltaShape, rows: usize, wide: usize) -> [Vec<f64>; 4] {
    let heads = shape.value_heads;
    [
        randn("qkv", rows * shape.qkv_cols()),
        randn("gates", rows * wide),
        randn("rate", heads),
        randn("bias", heads),
    ]
}

/// `out` and `errors`.
fn forward<T: Element>(
    dev: &Device,
    shape: DeltaShape,
    x: DeltaInputs<'_, T>,
    spans: &[u32],
    state: &mut Buffer<'static, T::Acc>,
) -> Result<(Buffer<'static, T>, Buffer<'static, T::Acc>)> {
    let rows = x.qkv.len() / shape.qkv_cols();
    let mut out = Buffer::new(dev, "out", rows * shape.values())?;
    let mut errors = Buffer::new(dev, "errors", rows * shape.values())?;
    let mut scratch =
        Buffer::new(dev, "scratch", delta_rule::forward_scratch_len(dev, shape, rows))?;
    let spans = Buffer::of(dev, "spans", spans)?;
    let to =
        DeltaOut { out: out.view_mut(), errors: errors.view_mut(), scratch: scratch.view_mut() };
    let of = Sequences { spans: spans.view(), state: state.view_mut() };
    delta_rule::forward(dev, shape, to, x, of)?;
    Ok((out, errors))
}

fn plain(all: &[Vec<f64>; 4], lens: &[usize]) -> Vec<f64> {
    let inputs = Inputs::<f64>::of(host(), all);
    let rows = lens.iter().sum();
    let x = inputs.view(0..rows, SHAPE, WIDE);
    forward(host(), SHAPE, x, &whole(lens), &mut Buffer::none()).unwrap().0.host().to_vec()
}

/// The definition, head by head and row by row.
fn naive(all: &[Vec<f64>; 4], lens: &[usize]) -> Vec<f64> {
    let [qkv, gates, rate, bias] = all;
    let DeltaShape { key_heads, value_heads, key_dim: dk, value_dim: d } = SHAPE;
    let keys = key_heads * dk;
    let mut out = vec![0.0; lens.iter().sum::<usize>() * SHAPE.values()];
    for h in 0..value_heads {
        let (g, mut row) = (h * key_heads / value_heads, 0);
        for len in lens {
            let mut s = vec![vec![0.0; d]; dk];
            for _ in 0..*len {
                let x = &qkv[row * SHAPE.qkv_cols()..];
                let unit = |x: &[f64]| -> Vec<f64> {
                    let length = (inner(x, x) + 1e-6).sqrt();
                    x.iter().map(|x| x / length).collect()
                };
                let (q, k) = (unit(&x[g * dk..][..dk]), unit(&x[keys + g * dk..][..dk]));
                let v = &x[2 * keys + h * d..][..d];
                let gates = &gates[row * WIDE + FIRST..];
                let beta = 1.0 / (1.0 + (-gates[h]).exp());
                let softplus = (gates[value_heads + h] + bias[h]).exp().ln_1p();
                let decay = (-rate[h].exp() * softplus).exp();
                for c in 0..d {
                    for s in &mut s {
                        s[c] *= decay;
                    }
                    let e = v[c] - (0..dk).map(|i| s[i][c] * k[i]).sum::<f64>();
                    for i in 0..dk {
                        s[i][c] += k[i] * beta * e;
                    }
                    let y = (0..dk).map(|i| s[i][c] * q[i]).sum::<f64>();
                    out[(row * value_heads + h) * d + c] = y / (dk as f64).sqrt();
                }
                row += 1;
            }
        }
    }
    out
}

#[test]
fn the_recurrence_is_that_of_its_definition() {
    let all = numbers(SHAPE, ROWS, WIDE);
    assert_close("out", &plain(&all, &LENS), &naive(&all, &LENS), 1e-14, 1e-12);
}

type Pair<T> = [Buffer<'static, T>; 2];

/// The gradients of all inputs: that of gates in rows of its own width.
fn backward<T: Element>(
    dev: &Device,
    shape: DeltaShape,
    x: DeltaInputs<'_, T>,
    dout: &Buffer<'static, T>,
    lens: &[usize],
) -> Result<(Pair<T>, Pair<T::Acc>)> {
    let (rows, heads) = (lens.iter().sum::<usize>(), shape.value_heads);
    let (_, errors) = forward(dev, shape, x, &whole(lens), &mut Buffer::none())?;
    let spans = Buffer::of(dev, "spans", &whole(lens))?;
    let mut dqkv = Buffer::new(dev, "dqkv", rows * shape.qkv_cols())?;
    let mut dgates = Buffer::zeros(dev, "dgates", rows * x.gates.stride)?;
    let [mut drate, mut dbias] = [0.5, -1.0]
        .map(|x| Buffer::of(dev, "sums", &vec![<T::Acc as Element>::of(x); heads]).unwrap());
    let mut scratch = Buffer::new(dev, "scratch", delta_rule::backward_scratch_len(shape, rows))?;
    let to = DeltaGrads {
        dqkv: dqkv.view_mut(),
        dgates: Strided { data: dgates.view_mut(), first: FIRST, stride: x.gates.stride },
        drate: drate.view_mut(),
        dbias: dbias.view_mut(),
        scratch: scratch.view_mut(),
    };
    let kept = DeltaKept { errors: errors.view(), spans: spans.view() };
    delta_rule::backward(dev, shape, to, dout.view(), x, kept)?;
    Ok(([dqkv, dgates], [drate, dbias]))
}

#[test]
fn gradients() {
    let all = numbers(SHAPE, ROWS, WIDE);
    let dy: Vec<f64> = randn("dy", ROWS * SHAPE.values());
    let (inputs, dout) = (Inputs::<f64>::of(host(), &all), Buffer::of(host(), "dy", &dy).unwrap());
    let x = inputs.view(0..ROWS, SHAPE, WIDE);
    let (rows, sums) = backward(host(), SHAPE, x, &dout, &LENS).unwrap();
    let less =
        |x: &Buffer<'static, f64>, by: f64| x.host().iter().map(|x| x - by).collect::<Vec<_>>();
    let grads = [
        rows[0].host().to_vec(),
        rows[1].host().to_vec(),
        less(&sums[0], 0.5),
        less(&sums[1], -1.0),
    ];
    for (i, name) in ["qkv", "gates", "rate", "bias"].into_iter().enumerate() {
        gradcheck(name, &all[i], &grads[i], OP, |x| {
            let mut all = all.clone();
            all[i] = x.to_vec();
            inner(&naive(&all, &LENS), &dy)
        });
    }
}

/// A row whose key is 0, one that forgets all, and one that forgets nothing.
#[test]
fn extremes_are_finite() {
    let mut all = numbers(SHAPE, ROWS, WIDE);
    all[0][SHAPE.qkv_cols()..2 * SHAPE.qkv_cols()].fill(0.0);
    all[1][3 * WIDE..4 * WIDE].fill(200.0);
    all[1][4 * WIDE..5 * WIDE].fill(-200.0);
    assert_close("out", &plain(&all, &LENS), &naive(&all, &LENS), 1e-14, 1e-12);
    for dev in devices() {
        let inputs = Inputs::<f32>::of(&dev, &all);
        let dout = Buffer::of(&dev, "dy", &randn::<f32>("dy", ROWS * SHAPE.values())).unwrap();
        let x = inputs.view(0..ROWS, SHAPE, WIDE);
        let (rows, sums) = backward(&dev, SHAPE, x, &dout, &LENS).unwrap();
        for d in rows.iter().chain(&sums) {
            assert!(d.host().iter().all(|x| Float::is_finite(*x)));
        }
    }
}

/// The gradient of a decay is a sum over all that follows, in which terms cancel: long sequences
/// lose little by it, whether they forget fast or never.
#[test]
fn long_sequences_are_exact() {
    let (rows, shape) = (4096, DeltaShape { key_heads: 1, value_heads: 2, ..SHAPE });
    let wide = 2 * shape.value_heads + FIRST;
    for rate in [-8.0, 0.0] {
        let mut all = numbers(shape, rows, wide);
        all[2].fill(rate);
        let dy: Vec<f64> = randn("dy", rows * shape.values());
        let exact = {
            let inputs = Inputs::<f64>::of(host(), &all);
            let dout = Buffer::of(host(), "dy", &dy).unwrap();
            let x = inputs.view(0..rows, shape, wide);
            let ([qkv, gates], [rate, bias]) = backward(host(), shape, x, &dout, &[rows]).unwrap();
            [qkv, gates, rate, bias].map(|d| d.host().to_vec())
        };
        let inputs = Inputs::<f32>::of(host(), &all);
        let dout = Buffer::of(host(), "dy", &narrow(&dy)).unwrap();
        let x = inputs.view(0..rows, shape, wide);
        let ([qkv, gates], [rates, bias]) = backward(host(), shape, x, &dout, &[rows]).unwrap();
        let names = ["dqkv", "dgates", "drate", "dbias"];
        for ((name, ours), truth) in names.into_iter().zip([qkv, gates, rates, bias]).zip(&exact) {
            let off = |(a, t): (&f32, &f64)| (f64::from(*a) - t).powi(2);
            let error: f64 = ours.host().iter().zip(truth).map(off).sum();
            let error = (error / inner(truth, truth)).sqrt();
            println!("rate {rate}: {name} off by {error:.1e}");
            let most = if ["drate", "dbias"].contains(&name) { 1e-3 } else { 1e-5 };
            assert!(error < most, "rate {rate}: {name} is off by {error:e}");
        }
    }
}

/// Cut anywhere, a sequence that is continued from its state has the bits of a whole one.
fn continues<T: Element>(dev: &Device, shape: DeltaShape, rows: usize) {
    let wide = 2 * shape.value_heads + FIRST;
    let inputs = Inputs::<T>::of(dev, &numbers(shape, rows, wide));
    let read = |x: &Buffer<'static, T>| {
        dev.read(x.view()).unwrap().iter().map(|x| x.f64()).collect::<Vec<_>>()
    };
    let run = |rows: std::ops::Range<usize>, slot: u32, state: &mut _| {
        let span = [0, rows.len() as u32, rows.start as u32, slot];
        read(&forward(dev, shape, inputs.view(rows, shape, wide), &span, state).unwrap().0)
    };
    let all = run(0..rows, 0, &mut Buffer::none());
    for cut in [0, 1, 3, 4, rows - 2] {
        let nan = <T::Acc as Element>::of(f64::NAN);
        let mut state = Buffer::of(dev, "test", &vec![nan; 3 * shape.state_len()]).unwrap();
        let parts = [0..cut, cut..cut + 1, cut + 1..rows];
        let got: Vec<f64> = parts.into_iter().flat_map(|r| run(r, 1, &mut state)).collect();
        assert_bits("out", &got, &all);
        let state = dev.read(state.view()).unwrap();
        let slot = shape.key_dim * shape.value_dim;
        for (i, s) in state.chunks(slot).enumerate() {
            let bad = s.iter().filter(|x| Float::is_nan(**x)).count();
            assert_eq!(bad, if i % 3 == 1 { 0 } else { slot }, "slot {i}");
        }
    }
}

#[test]
fn a_continued_sequence_has_the_bits_of_a_whole_one() {
    for dev in devices() {
        continues::<f32>(&dev, SHAPE, 13);
    }
}

#[test]
fn sequences_do_not_see_each_other() {
    let mut all = numbers(SHAPE, ROWS, WIDE);
    let run = |dev: &Device, all: &[Vec<f64>; 4], rows: std::ops::Range<usize>, lens: &[usize]| {
        let inputs = Inputs::<f32>::of(dev, all);
        let x = inputs.view(rows, SHAPE, WIDE);
        forward(dev, SHAPE, x, &whole(lens), &mut Buffer::none()).unwrap().0.host().to_vec()
    };
    let packed = run(&devices()[0], &all, 0..ROWS, &LENS);
    for dev in devices() {
        let (mut parts, mut at) = (Vec::new(), 0);
        for len in LENS {
            parts.extend(run(&dev, &all, at..at + len, &[len]));
            at += len;
        }
        assert_bits("out", &parts, &packed);
    }
    // A value of one head in row 4, the last but one of the first sequence.
    all[0][4 * SHAPE.qkv_cols() + 20 + 3] = f64::NAN;
    let got = run(host(), &all, 0..ROWS, &LENS);
    let bad: Vec<usize> = (0..got.len()).filter(|i| got[*i].is_nan()).collect();
    assert_eq!(bad, [4 * 12 + 3, 5 * 12 + 3]);
    let others = |x: &[f32]| {
        let at = |i: &usize| !bad.contains(i);
        (0..x.len()).filter(at).map(|i| x[i]).collect::<Vec<_>>()
    };
    assert_bits("out", &others(&got), &others(&packed));
}

#[test]
fn wrong_shapes_are_refused() {
    let all = numbers(SHAPE, ROWS, WIDE);
    let inputs = Inputs::<f32>::of(host(), &all);
    let x = inputs.view(0..ROWS, SHAPE, WIDE);
    let run = |x: DeltaInputs<'_, f32>, shape, state: usize| {
        let mut state = Buffer::zeros(host(), "state", state).unwrap();
        refusal(forward(host(), shape, x, &whole(&[ROWS]), &mut state))
    };
    let e = run(DeltaInputs { rate: x.rate.range(0..3), ..x }, SHAPE, 0);
    assert_eq!(e, "delta_rule: `rate` has shape [3], wanted [4]");
    let e = run(x, SHAPE, 61);
    assert_eq!(e, "delta_rule: `state` has shape [61], wanted [1, 60]");
    let e = run(x, DeltaShape { key_heads: 3, ..SHAPE }, 0);
    assert!(e.contains("a whole number of value heads for each key head"), "{e}");
}

struct Rule {
    shape: DeltaShape,
    lens: &'static [usize],
}

impl Case for Rule {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let (dev, Self { shape, lens }) = (lab.dev(), self);
        let rows: usize = lens.iter().sum();
        let (heads, wide) = (shape.value_heads, 2 * shape.value_heads + FIRST);
        let inputs = Inputs([
            lab.rows::<T>("qkv", rows, shape.qkv_cols()),
            lab.rows("gates", rows, wide),
            lab.input("rate", heads),
            lab.input("bias", heads),
        ]);
        let x = inputs.view(0..rows, *shape, wide);
        let mut state = lab.room(lens.len() * shape.state_len());
        let (out, errors) = forward(dev, *shape, x, &whole(lens), &mut state)?;
        lab.by_row("out", &out);
        lab.by_row("errors", &errors);
        lab.by_row("state", &state);
        let dout = lab.rows::<T>("dout", rows, shape.values());
        let ([dqkv, dgates], [drate, dbias]) = backward(dev, *shape, x, &dout, lens)?;
        lab.by_row("dqkv", &dqkv);
        lab.by_row("dgates", &dgates);
        lab.sum_of_sums("drate", &drate, rows);
        lab.sum_of_sums("dbias", &dbias, rows);
        Ok(())
    }
}

#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (key_heads, value_heads, key_dim, value_dim, lens) in [
            (2, 4, 8, 12, &[5, 1, 9][..]),
            (1, 1, 128, 128, &[2]),
            (1, 2, 5, 3, &[1, 9]),
            (1, 1, 33, 70, &[35]),
        ] {
            sim.hold(&Rule {
                shape: DeltaShape { key_heads, value_heads, key_dim, value_dim },
                lens,
            });
        }
    });
}

#[test]
fn kernels_continue_with_the_bits_of_whole_sequences() {
    sim::check(|sim| {
        let dev = sim.device(Order::default());
        continues::<f32>(&dev, SHAPE, 9);
        continues::<bf16>(&dev, DeltaShape { key_dim: 8, value_dim: 12, ..SHAPE }, 9);
    });
}

#[test]
fn kernels_refuse_heads_that_they_cannot_hold() {
    sim::on_devices(|dev| {
        let e = refusal(delta_rule::supported(dev, DeltaShape { value_dim: 129, ..SHAPE }));
        assert_eq!(e, "head size of a delta rule: got 129, wanted at most 128 on a CUDA device");
    });
}
