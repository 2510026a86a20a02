//! The clipped value loss: hand-worked branches, central differences, micro-batches. Its goldens
//! are read by `policy_loss`.

use warpo::{
    device::{Device, Float},
    ops::value_loss::{self, ValueLoss, ValueSums, ValueTokens},
};

use crate::support::{
    OP, assert_bits, assert_close, assert_nan_only, gather, gradcheck, host, randn, refusal,
    shuffled,
    sim::{self, Column, FloatCase, Lab, rounded},
};

/// ValueSums and dv; `coef` 0.5.
fn forward<F: Float>(
    v: &[F],
    old: &[F],
    ret: &[F],
    clip: Option<f64>,
    n: f64,
) -> (ValueSums, Vec<F>) {
    forward_on(host(), 0, [v, old, ret], clip, n).unwrap()
}

/// The same of columns that begin `first` elements into their memory.
fn forward_on<F: Float>(
    dev: &Device,
    first: usize,
    columns: [&[F]; 3],
    clip: Option<f64>,
    n: f64,
) -> warpo::Result<(ValueSums, Vec<F>)> {
    let mut dv = Column::room(dev, first, columns[0].len());
    let columns = columns.map(|x| Column::of(dev, first, x));
    let [v, old, ret] = columns.each_ref().map(Column::view);
    let t = ValueTokens { v, old, returns: ret, weights: None };
    let stats =
        value_loss::forward(dev, dv.view_mut(), t, ValueLoss { clip, coef: 0.5 }, n)?.get()?;
    Ok((stats, dv.read()))
}

fn list(s: &ValueSums) -> [f64; 5] {
    [s.tokens, s.loss, s.value, s.clipped, s.squared_error]
}

/// Value, return, loss, slope and clipped tokens, with an old value of 1 and a clip of 0.25: values
/// may move from 0.75 to 1.25.
const BRANCHES: [(f64, f64, f64, f64, f64); 8] = [
    (1.125, 2.0, 0.382_812_5, -0.875, 0.0), // inside: (1.125 - 2)^2 / 2
    (1.5, 0.0, 1.125, 1.5, 0.0),            // outside, the bound 1.25 is nearer: no effect
    (1.5, 2.0, 0.281_25, 0.0, 1.0),         // outside, the bound is farther: (1.25 - 2)^2 / 2
    (0.5, 0.0, 0.281_25, 0.0, 1.0),         // the same below
    (0.5, 2.0, 1.125, -1.5, 0.0),
    (1.25, 0.0, 0.781_25, 1.25, 0.0),       // on the bound: inside
    (1.5, 1.375, 0.007_812_5, 0.0625, 0.0), // a tie outside: half, as torch.max
    (0.5, 0.625, 0.007_812_5, -0.0625, 0.0),
];

#[test]
fn hand_worked() {
    for (v, ret, loss, slope, clipped) in BRANCHES {
        let what = format!("v {v}, return {ret}");
        let (s, dv) = forward(&[v], &[1.0], &[ret], Some(0.25), 1.0);
        assert_close(&what, &[s.loss, dv[0]], &[0.5 * loss, 0.5 * slope], 0.0, 0.0);
        let error: f64 = v - ret;
        let want = ValueSums {
            tokens: 1.0,
            loss: s.loss,
            value: v,
            clipped,
            squared_error: error * error,
        };
        assert_eq!(s, want, "{what}");
        let (s, dv) = forward(&[v], &[1.0], &[ret], None, 4.0);
        assert_eq!((s.loss, s.clipped), (error * error / 16.0, 0.0), "{what}, not clipped");
        assert_eq!(dv, [error / 8.0], "{what}, not clipped");
    }
    assert_eq!(forward::<f64>(&[], &[], &[], Some(0.25), 1.0), (ValueSums::default(), vec![]));
}

#[test]
fn gradients() {
    let (old, ret): (Vec<f64>, Vec<f64>) = (randn("old", 60), randn("ret", 60));
    let moved: Vec<f64> = randn("moved", 60);
    let v: Vec<f64> = old.iter().zip(&moved).map(|(old, m)| old + 0.3 * m).collect();
    for clip in [None, Some(0.2)] {
        let (s, dv) = forward(&v, &old, &ret, clip, 60.0);
        assert_eq!(s.clipped > 5.0, clip.is_some(), "the branches are visited");
        gradcheck("v", &v, &dv, OP, |v| forward(v, &old, &ret, clip, 60.0).0.loss);
    }
}

#[test]
fn micro_batches_add_up() {
    let (v, old, ret): (Vec<f32>, Vec<f32>, Vec<f32>) =
        (randn("v", 41), randn("old", 41), randn("ret", 41));
    let (whole, dv) = forward(&v, &old, &ret, Some(0.2), 41.0);
    for cut in [0, 1, 20, 41] {
        let (mut s, low) = forward(&v[..cut], &old[..cut], &ret[..cut], Some(0.2), 41.0);
        let (rest, high) = forward(&v[cut..], &old[cut..], &ret[cut..], Some(0.2), 41.0);
        s.merge(&rest);
        assert_bits(&format!("cut {cut}"), &[low, high].concat(), &dv);
        assert_close(&format!("cut {cut}"), &list(&s), &list(&whole), 1e-14, 1e-14);
    }
    let order = shuffled("order", 41);
    let [v, old, ret] = [&v, &old, &ret].map(|x| gather(x, 1, &order));
    let got = forward(&v, &old, &ret, Some(0.2), 41.0).1;
    assert_bits("permuted", &got, &gather(&dv, 1, &order));
}

/// A value from before that is NaN used to panic.
#[test]
fn a_nan_stays_in_its_token() {
    let columns: [Vec<f32>; 3] = ["v", "old", "ret"].map(|name| randn(name, 9));
    for clip in [None, Some(0.2)] {
        let clean = forward(&columns[0], &columns[1], &columns[2], clip, 9.0).1;
        for i in 0..3 {
            let mut bad = columns.clone();
            bad[i][4] = f32::NAN;
            let (s, dv) = forward(&bad[0], &bad[1], &bad[2], clip, 9.0);
            if i == 1 && clip.is_none() {
                assert_bits("not read", &dv, &clean);
                continue;
            }
            assert!(s.loss.is_nan(), "column {i}, clip {clip:?}");
            assert_nan_only(&format!("column {i}, clip {clip:?}"), &dv, &clean, 4..5);
        }
    }
}

struct Values {
    first: usize,
    n: usize,
    clip: Option<f64>,
}

impl FloatCase for Values {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let columns: [Vec<F>; 3] = ["v", "old", "ret"].map(|name| rounded(name, self.n));
        let columns = columns.each_ref().map(|x| &x[..]);
        let (s, dv) = forward_on(lab.dev(), self.first, columns, self.clip, 7.0)?;
        lab.sums("stats", &list(&s));
        lab.column("dv", &dv);
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
            sim.hold_f32(&Values { first, n, clip: Some(0.2) });
        }
        sim.hold_f32(&Values { first: 0, n: 9, clip: None });
    });
}

/// Every branch and tie by its bits, NaN in every column, and f64.
#[test]
fn kernels_take_the_branches_of_the_cpu() {
    sim::check(|sim| {
        let dev = sim.device(sim.orders()[1]);
        let [v, ret] = [0, 1].map(|i| BRANCHES.map(|b| [b.0, b.1][i] as f32).to_vec());
        let columns = [v, vec![1.0; 8], ret];
        let mut bad = Vec::new();
        for column in 0..3 {
            for token in [0, 1, 2] {
                let mut columns = columns.clone();
                columns[column][token] = f32::NAN;
                bad.push(columns);
            }
        }
        for columns in bad.iter().chain([&columns]) {
            let columns = columns.each_ref().map(|x| &x[..]);
            for clip in [None, Some(0.25)] {
                let want = forward(columns[0], columns[1], columns[2], clip, 8.0);
                let got = forward_on(&dev, 1, columns, clip, 8.0).unwrap();
                // A GPU's NaN has bits of its own.
                let one = |x: &f32| if x.is_nan() { f32::NAN } else { *x };
                let [got_d, want_d] = [&got.1, &want.1].map(|d| Vec::from_iter(d.iter().map(one)));
                assert_bits("dv", &got_d, &want_d);
                let nan = |s: &ValueSums| list(s).map(|x| if x.is_nan() { 1e9 } else { x });
                assert_close("stats", &nan(&got.0), &nan(&want.0), 1e-15, 1e-15);
            }
        }
        let says = "device `cuda` is not available: `value_loss_forward` has no kernel for F64";
        assert_eq!(refusal(forward_on(&dev, 0, [&[0.0][..]; 3], None, 1.0)), says);
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, x, mut dv) = (Device::cpu(), [0.0f32; 3], [0.0f32; 3]);
    let mut refused = |d: usize, old: usize, ret: usize| {
        let (d, v, old, ret) =
            ((&mut dv[..d]).into(), x[..].into(), x[..old].into(), x[..ret].into());
        let t = ValueTokens { v, old, returns: ret, weights: None };
        refusal(value_loss::forward(&dev, d, t, ValueLoss { clip: None, coef: 1.0 }, 1.0))
    };
    assert_eq!(refused(3, 2, 3), "value_loss: `old` has shape [2], wanted [3]");
    assert_eq!(refused(3, 3, 2), "value_loss: `returns` has shape [2], wanted [3]");
    assert_eq!(refused(2, 3, 3), "value_loss: `dv` has shape [2], wanted [3]");
}
