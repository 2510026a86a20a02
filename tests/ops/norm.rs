//! RMSNorm and LayerNorm: hand-worked values, central differences, rows at a stride, and bits that
//! do not depend on the batch.

use warpo::{
    device::{Buffer, Device, Element, Float, View, ViewMut},
    ops::norm::{
        self,
        Norm::{Layer, Rms},
        NormGrads, NormKept, NormOut, NormRows, NormSpec,
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only, assert_norm, devices, gather,
    gradcheck, host, inner, randn, refusal, shuffled,
    sim::{self, Case, Lab},
    wide,
};

const RMS: NormSpec = NormSpec { norm: Rms, one_plus: false, eps: 1e-5, heads: 1, unpadded: None };
const LAYER: NormSpec = NormSpec { norm: Layer, ..RMS };

/// Every norm that a model may have: with and without a bias, with a weight of `w` and of `1 + w`.
fn all() -> impl Iterator<Item = (NormSpec, bool)> {
    [(RMS, false), (LAYER, true), (LAYER, false)].into_iter().flat_map(|(spec, bias)| {
        [false, true].map(|one_plus| (NormSpec { one_plus, ..spec }, bias))
    })
}

/// What forward writes; `mean` is empty for RMSNorm.
struct Out<F> {
    y: Vec<F>,
    mean: Vec<F>,
    rstd: Vec<F>,
}

/// An empty bias is none.
fn forward<F: Float>(dev: &Device, spec: NormSpec, x: &[F], w: &[F], b: &[F]) -> Out<F> {
    let nan = |n| vec![F::of(f64::NAN); n];
    let rows = x.len() / w.len();
    let means = if spec.norm == Layer { rows } else { 0 };
    let mut out = Out { y: nan(x.len()), mean: nan(means), rstd: nan(rows) };
    let (mean, rstd) = ((&mut out.mean).into(), (&mut out.rstd).into());
    let to = NormOut { y: rows_mut(&mut out.y), mean, rstd };
    let b = (!b.is_empty()).then(|| b.into());
    norm::forward(dev, spec, to, View::from(x), w.into(), b).unwrap();
    out
}

fn rows_mut<F>(x: &mut [F]) -> NormRows<ViewMut<'_, F>> {
    ViewMut::from(x).into()
}

/// Writes dx, adds to `dw` and, unless it is empty, to `db`.
fn backward<F: Float>(
    dev: &Device,
    spec: NormSpec,
    (dw, db): (&mut [F], &mut [F]),
    dy: &[F],
    x: &[F],
    w: &[F],
) -> Vec<F> {
    let mut dx = vec![F::of(f64::NAN); x.len()];
    let Out { mean, rstd, .. } = forward(dev, spec, x, w, &[]);
    let mut scratch = vec![F::ZERO; norm::scratch_len(spec.norm, rstd.len(), w.len())];
    let db = (!db.is_empty()).then(|| db.into());
    let (dx_, scratch) = ((&mut dx).into(), (&mut scratch).into());
    let grads = NormGrads { dx: dx_, add: false, dw: Some(dw.into()), db, scratch };
    let (mean, rstd) = ((&mean).into(), (&rstd).into());
    let kept = NormKept { x: View::from(x).into(), w: w.into(), mean, rstd };
    norm::backward(dev, spec, grads, View::from(dy), kept).unwrap();
    dx
}

#[test]
fn hand_worked() {
    let dev = host();
    // the mean square of (3, 4) is 12.5
    let r = 1.0 / 12.500_01f64.sqrt();
    for (one_plus, w) in [(false, [1.0, -2.0]), (true, [0.0, -3.0])] {
        let out = forward(dev, NormSpec { one_plus, ..RMS }, &[3.0, 4.0], &w, &[]);
        assert_close("rstd", &out.rstd, &[r], 0.0, 1e-15);
        assert_close("y", &out.y, &[3.0 * r, -8.0 * r], 0.0, 1e-15);
    }
    // (1, 3): mean 2, variance 1 (biased); (2, -4): mean -1, variance 9
    let exact = NormSpec { eps: 0.0, ..LAYER };
    let (x, w) = ([1.0, 3.0, 2.0, -4.0], [10.0, 100.0]);
    let out = forward(dev, exact, &x, &w, &[0.5, -7.0]);
    assert_eq!(out.mean, [2.0, -1.0]);
    assert_close("rstd", &out.rstd, &[1.0, 1.0 / 3.0], 0.0, 1e-15);
    assert_close("y", &out.y, &[-9.5, 93.0, 10.5, -107.0], 0.0, 1e-15);
    let out = forward(dev, exact, &x, &w, &[]);
    assert_close("no bias", &out.y, &[-10.0, 100.0, 10.0, -100.0], 0.0, 1e-15);
    // epsilon is inside the root; 1 + 3
    let out = forward(dev, NormSpec { eps: 3.0, ..LAYER }, &[1.0, 3.0], &[1.0, 1.0], &[0.0, 0.0]);
    assert_close("rstd", &out.rstd, &[0.5], 0.0, 1e-15);
    // a row without spread is its bias
    let out = forward(dev, LAYER, &[4.0, 4.0], &[1.0, 2.0], &[0.5, -7.0]);
    assert_close("y", &out.y, &[0.5, -7.0], 0.0, 0.0);
}

#[test]
fn gradients() {
    let dev = host();
    for (rows, cols) in [(1, 1), (3, 7), (5, 33), (17, 3), (2, 67)] {
        let (x, dy): (Vec<f64>, Vec<f64>) = (randn("x", rows * cols), randn("dy", rows * cols));
        let (w, bias): (Vec<f64>, Vec<f64>) = (randn("w", cols), randn("b", cols));
        for (spec, biased) in all() {
            let b = if biased { &bias[..] } else { &[] };
            let (mut dw, mut db) = (vec![0.5; cols], vec![-0.5; b.len()]);
            let dx = backward(dev, spec, (&mut dw, &mut db), &dy, &x, &w);
            dw.iter_mut().for_each(|d| *d -= 0.5);
            db.iter_mut().for_each(|d| *d += 0.5);
            let f = |x: &[f64], w: &[f64], b: &[f64]| inner(&forward(dev, spec, x, w, b).y, &dy);
            let what = |of: &str| format!("{of} {spec:?}");
            gradcheck(&what("dx"), &x, &dx, OP, |x| f(x, &w, b));
            gradcheck(&what("dw"), &w, &dw, OP, |w| f(&x, w, b));
            if biased {
                gradcheck(&what("db"), b, &db, OP, |b| f(&x, &w, b));
            }
        }
    }
}

/// Also where LayerNorm's mean is 1000 times the spread, which a one-pass variance does not
/// survive.
#[test]
fn f32_is_as_exact_as_a_plain_version() {
    let (dev, cols) = (host(), 300);
    let (w, b): (Vec<f32>, Vec<f32>) = (randn("w", cols), randn("b", cols));
    for (spec, shift) in [(RMS, 0.0), (LAYER, 0.0), (LAYER, 1000.0)] {
        let layer = spec.norm == Layer;
        let x: Vec<f32> = randn::<f32>("x", 5 * cols).iter().map(|x| x + shift).collect();
        let b = if layer { &b[..] } else { &[] };
        let mut plain = Vec::new();
        for x in x.chunks(cols) {
            let mean = if layer { x.iter().sum::<f32>() / cols as f32 } else { 0.0 };
            let var = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / cols as f32;
            let y = |(i, x): (usize, &f32)| (x - mean) / (var + 1e-5).sqrt() * w[i];
            let y = x.iter().enumerate().map(y);
            plain.extend(y.enumerate().map(|(i, y)| y + b.get(i).unwrap_or(&0.0)));
        }
        let truth = forward(dev, spec, &wide(&x), &wide(&w), &wide(b)).y;
        assert_earned(&format!("+{shift}"), &forward(dev, spec, &x, &w, b).y, &plain, &truth);
    }
    let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", 5 * cols), randn("dy", 5 * cols));
    for spec in [RMS, LAYER] {
        let biases = if spec.norm == Layer { cols } else { 0 };
        let (mut dw, mut db) = (vec![0.0; cols], vec![0.0; biases]);
        let dx = backward(dev, spec, (&mut dw, &mut db), &dy, &x, &w);
        let (mut tw, mut tb) = (vec![0.0; cols], vec![0.0; biases]);
        let t = backward(dev, spec, (&mut tw, &mut tb), &wide(&dy), &wide(&x), &wide(&w));
        assert_norm("dx", &dx, &t, 1e-5);
        assert_norm("dw", &dw, &tw, 1e-5);
        if biases > 0 {
            assert_norm("db", &db, &tb, 1e-5);
        }
    }
}

/// Tasks have 16 rows, or 64 columns of the weights' gradients.
#[test]
fn rows_do_not_see_their_batch() {
    let rows = 67;
    for (spec, cols) in [1, 15, 50, 64, 65, 131].into_iter().flat_map(|c| [(RMS, c), (LAYER, c)]) {
        let biases = if spec.norm == Layer { cols } else { 0 };
        let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", rows * cols), randn("dy", rows * cols));
        let (w, b): (Vec<f32>, Vec<f32>) = (randn("w", cols), randn("b", biases));
        let (dw, db): (Vec<f32>, Vec<f32>) = (randn("dw", cols), randn("db", biases));
        let one = &devices()[0];
        let alone = |r: usize| forward(one, spec, &x[r * cols..][..cols], &w, &b);
        let want: Vec<Out<f32>> = (0..rows).map(alone).collect();
        let y: Vec<f32> = want.iter().flat_map(|o| o.y.clone()).collect();
        let (mut want_w, mut want_b) = (dw.clone(), db.clone());
        for (i, (x, dy)) in x.iter().zip(&dy).enumerate() {
            let (r, c) = (i / cols, i % cols);
            let mean = want[r].mean.first().unwrap_or(&0.0);
            want_w[c] = dy.mul_add((x - mean) * want[r].rstd[0], want_w[c]);
            if let Some(b) = want_b.get_mut(c) {
                *b += dy;
            }
        }
        let alone = |r: usize| {
            let (mut dw, mut db) = (vec![0.0; cols], vec![0.0; biases]);
            let at = r * cols..(r + 1) * cols;
            backward(one, spec, (&mut dw, &mut db), &dy[at.clone()], &x[at], &w)
        };
        let dx: Vec<f32> = (0..rows).flat_map(alone).collect();
        let order = shuffled("order", rows);
        for dev in devices() {
            for n in [0, 1, 15, 16, 17, rows] {
                let (at, what) = ((rows - n) * cols, format!("{:?} {cols} {n} {dev:?}", spec.norm));
                assert_bits(&what, &forward(&dev, spec, &x[at..], &w, &b).y, &y[at..]);
                // Two micro-batches add up to the bits of one.
                let (mut sum_w, mut sum_b) = (dw.clone(), db.clone());
                let sums = (&mut sum_w[..], &mut sum_b[..]);
                let low = backward(&dev, spec, sums, &dy[..at], &x[..at], &w);
                let sums = (&mut sum_w[..], &mut sum_b[..]);
                let high = backward(&dev, spec, sums, &dy[at..], &x[at..], &w);
                assert_bits(&what, &[low, high].concat(), &dx);
                assert_bits(&what, &sum_w, &want_w);
                assert_bits(&what, &sum_b, &want_b);
            }
            let got = forward(&dev, spec, &gather(&x, cols, &order), &w, &b).y;
            assert_bits("permuted", &got, &gather(&y, cols, &order));
        }
    }
}

#[test]
fn a_nan_stays_in_its_row() {
    let (dev, w) = (host(), randn::<f32>("w", 20));
    for spec in [RMS, LAYER] {
        let mut x: Vec<f32> = randn("x", 100);
        let mut dy = x.clone();
        let back = |dy: &[f32]| backward(dev, spec, (&mut [0.0; 20], &mut []), dy, &x, &w);
        let dx = back(&dy);
        dy[59] = f32::NAN;
        assert_nan_only("dx", &back(&dy), &dx, 40..60);
        let clean = forward(dev, spec, &x, &w, &[]);
        x[42] = f32::NAN;
        let got = forward(dev, spec, &x, &w, &[]);
        assert_nan_only("y", &got.y, &clean.y, 40..60);
        assert_nan_only("rstd", &got.rstd, &clean.rstd, 2..3);
        if spec.norm == Layer {
            assert_nan_only("mean", &got.mean, &clean.mean, 2..3);
        }
    }
}

/// A row whose squares overflow is no row of zeros, which would be a good number that says nothing.
#[test]
fn an_overflow_is_a_nan() {
    let w = randn::<f32>("w", 24);
    for (dev, spec) in devices().iter().flat_map(|dev| [(dev, RMS), (dev, LAYER)]) {
        let mut x: Vec<f32> = randn("x", 72);
        let b = if spec.norm == Layer { &w[..] } else { &[] };
        let clean = forward(dev, spec, &x, &w, b);
        x[30] = 1e30;
        let got = forward(dev, spec, &x, &w, b);
        assert_nan_only("y", &got.y, &clean.y, 24..48);
        assert_nan_only("rstd", &got.rstd, &clean.rstd, 1..2);
    }
}

/// A norm of rows `[tokens, heads, cols]`, inside wider ones if they have a stride.
#[derive(Clone, Copy)]
struct Normed {
    spec: NormSpec,
    bias: bool,
    tokens: usize,
    cols: usize,
    /// First element and stride of the rows of x, and those of y.
    at: Option<[(usize, usize); 2]>,
    mean: f64,
}

impl Normed {
    fn new(spec: NormSpec, tokens: usize, cols: usize) -> Self {
        Self { spec, bias: spec.norm == Layer, tokens, cols, at: None, mean: 0.0 }
    }

    /// `x` inside wider rows, whose other elements are NaN.
    fn spaced<T: Element>(&self, dev: &Device, x: &[T], which: usize) -> Buffer<'static, T> {
        let Some(at) = self.at else { return Buffer::of(dev, "test", x).unwrap() };
        let ((first, stride), width) = (at[which], self.spec.heads * self.cols);
        let mut all = vec![T::of(f64::NAN); self.tokens * stride];
        for (all, x) in all.chunks_mut(stride).zip(x.chunks(width)) {
            all[first..first + width].copy_from_slice(x);
        }
        Buffer::of(dev, "test", &all).unwrap()
    }

    /// The rows alone; what is beside them is NaN still.
    fn dense<T: Element>(
        &self,
        dev: &Device,
        x: &Buffer<'_, T>,
        which: usize,
    ) -> Buffer<'static, T> {
        let Some(at) = self.at else {
            return Buffer::of(dev, "test", &dev.read(x.view()).unwrap()).unwrap();
        };
        let ((first, stride), width) = (at[which], self.spec.heads * self.cols);
        let mut out = Vec::new();
        for all in dev.read(x.view()).unwrap().chunks(stride) {
            out.extend(&all[first..first + width]);
            let beside = all[..first].iter().chain(&all[first + width..]);
            assert!(beside.into_iter().all(|x| x.f64().is_nan()), "written beside the rows");
        }
        Buffer::of(dev, "test", &out).unwrap()
    }

    fn rows<V>(&self, data: V, which: usize) -> NormRows<V> {
        let (first, stride) = self.at.map_or((0, None), |at| (at[which].0, Some(at[which].1)));
        NormRows { data, first, stride }
    }
}

/// What both passes write.
#[derive(Debug)]
struct Results<T: Element> {
    y: Buffer<'static, T>,
    mean: Buffer<'static, T::Acc>,
    rstd: Buffer<'static, T::Acc>,
    /// Written, and added to a gradient that is there.
    dx: [Buffer<'static, T>; 2],
    dw: Buffer<'static, T::Acc>,
    db: Buffer<'static, T::Acc>,
}

impl Normed {
    /// Of `x`, `dy` and the gradient that is there, of weight and bias, and of their gradients.
    fn run_on<T: Element>(
        &self,
        dev: &Device,
        [x, dy, more]: [&[T]; 3],
        [w, b]: [&Buffer<'_, T>; 2],
        [mut dw, mut db]: [Buffer<'static, T::Acc>; 2],
    ) -> warpo::Result<Results<T>> {
        let (spec, cols) = (self.spec, self.cols);
        let rows = self.tokens * spec.heads;
        let room = |n| Buffer::<T::Acc>::new(dev, "test", n).unwrap();
        let (mut mean, mut rstd) = (room(if spec.norm == Layer { rows } else { 0 }), room(rows));
        let nan = vec![T::of(f64::NAN); rows * cols];
        let (x, dy) = (self.spaced(dev, x, 0), self.spaced(dev, dy, 1));
        let mut y = self.spaced(dev, &nan, 1);
        let to = self.rows(y.view_mut(), 1);
        let out = NormOut { y: to, mean: mean.view_mut(), rstd: rstd.view_mut() };
        let b = self.bias.then(|| b.view());
        norm::forward(dev, spec, out, self.rows(x.view(), 0), w.view(), b)?;
        let mut scratch = room(norm::scratch_len(spec.norm, rows, cols));
        let mut dx = [&nan[..], more].map(|start| self.spaced(dev, start, 0));
        for (add, dx) in [false, true].into_iter().zip(&mut dx) {
            let x = self.rows(x.view(), 0);
            let kept = NormKept { x, w: w.view(), mean: mean.view(), rstd: rstd.view() };
            let db = self.bias.then(|| db.view_mut());
            let (dx, dw, scratch) = (dx.view_mut(), dw.view_mut(), scratch.view_mut());
            let grads = NormGrads { dx, add, dw: Some(dw), db, scratch };
            norm::backward(dev, spec, grads, self.rows(dy.view(), 1), kept)?;
        }
        let dx = dx.each_ref().map(|dx| self.dense(dev, dx, 0));
        Ok(Results { y: self.dense(dev, &y, 1), mean, rstd, dx, dw, db })
    }
}

impl Case for Normed {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (dev, rows, cols) = (lab.dev(), self.tokens * self.spec.heads, self.cols);
        let inputs = [("x", self.mean), ("dy", 0.0), ("more", 0.0)];
        let inputs = inputs.map(|(name, mean)| lab.spread::<T>(name, rows, cols, (mean, 1.0)));
        let inputs = inputs.map(|x| dev.read(x.view()).unwrap());
        let [w, b] = ["w", "b"].map(|name| lab.input::<T>(name, cols));
        let grads = ["dw", "db"].map(|name| lab.input::<T::Acc>(name, cols));
        let out = self.run_on(dev, inputs.each_ref().map(|x| &x[..]), [&w, &b], grads)?;
        lab.by_row("y", &out.y);
        lab.by_row("mean", &out.mean);
        lab.by_row("rstd", &out.rstd);
        lab.by_row("dx", &out.dx[0]);
        lab.by_row("dx, added", &out.dx[1]);
        lab.sum("dw", &out.dw);
        lab.sum("db", &out.db);
        Ok(())
    }
}

/// No rows, one, those around a block's of forward (16) and of backward (32); rows of one packet,
/// of a prime number of packets, of a thread's share and around it, of four warps, of as many as
/// fit; for LayerNorm a mean of 1000 times the spread, which a one-pass variance does not survive.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, cols) in
            [(0, 64), (1, 8), (2, 504), (3, 512), (17, 8), (35, 8 * 13), (2, 1032), (1, 8192)]
        {
            sim.hold(&Normed::new(RMS, rows, cols));
        }
        for (rows, cols) in
            [(0, 64), (1, 8), (16, 512), (17, 520), (33, 8), (67, 8 * 13), (3, 1032)]
        {
            sim.hold(&Normed::new(LAYER, rows, cols));
        }
        sim.hold(&Normed { mean: 1000.0, ..Normed::new(LAYER, 2, 64) });
        for (spec, bias) in
            all().filter(|(spec, bias)| spec.one_plus || spec.norm == Layer && !bias)
        {
            sim.hold(&Normed { bias, ..Normed::new(spec, 3, 24) });
        }
    });
}

#[test]
fn kernel_rows_do_not_see_their_batch() {
    sim::check(|sim| {
        for (spec, rows, cols) in
            [(RMS, 34, 136), (RMS, 34, 1032), (LAYER, 37, 8), (LAYER, 11, 520)]
        {
            sim.hold_rows(rows, |rows| Normed::new(spec, rows, cols));
        }
    });
}

/// The heads of queries inside rows of queries, keys and values: the bits are those of rows back to
/// back, and what is beside them is not touched.
#[test]
fn kernel_rows_may_lie_inside_wider_ones() {
    let at = Some([(16, 72), (8, 64)]);
    for (spec, bias) in all() {
        let inside = Normed { bias, at, ..Normed::new(NormSpec { heads: 3, ..spec }, 5, 16) };
        let alone = Normed { bias, ..Normed::new(spec, 15, 16) };
        let inputs: [Vec<f32>; 3] = ["x", "dy", "more"].map(|name| randn(name, 240));
        for dev in devices() {
            let [ours, want] = [inside, alone].map(|case| {
                let of = |name| Buffer::of(&dev, "test", &randn::<f32>(name, 16)).unwrap();
                let inputs = inputs.each_ref().map(|x| &x[..]);
                let grads = ["dw", "db"].map(of);
                case.run_on(&dev, inputs, [&of("w"), &of("b")], grads).unwrap()
            });
            assert_bits("y", ours.y.host(), want.y.host());
            assert_bits("dx", ours.dx[0].host(), want.dx[0].host());
            assert_bits("added dx", ours.dx[1].host(), want.dx[1].host());
            assert_bits("dw", ours.dw.host(), want.dw.host());
            assert_bits("db", ours.db.host(), want.db.host());
        }
    }
    sim::check(|sim| {
        for spec in [RMS, LAYER] {
            let spec = NormSpec { heads: 3, ..spec };
            sim.hold(&Normed { at, ..Normed::new(spec, 12, 16) });
        }
    });
}

/// A row that a device pads with zeros is normalised as without them, forward and backward, and
/// what is beside it stays 0.
#[test]
fn padding_does_not_count() {
    let (dev, rows, cols, wide) = (host(), 5, 12, 16);
    let [x, dy]: [Vec<f64>; 2] = ["x", "dy"].map(|name| randn(name, rows * cols));
    let w: Vec<f64> = randn("w", cols);
    let pad = |x: &[f64]| -> Vec<f64> {
        x.chunks(cols).flat_map(|row| [row, &[0.0; 4]].concat()).collect()
    };
    let cut = |x: &[f64]| -> Vec<f64> {
        assert!(x.chunks(wide).all(|row| row[cols..].iter().all(|x| *x == 0.0)), "{x:?}");
        x.chunks(wide).flat_map(|row| row[..cols].to_vec()).collect()
    };
    for one_plus in [false, true] {
        let plain = NormSpec { one_plus, ..RMS };
        let padded = NormSpec { unpadded: Some(cols), ..plain };
        let (want, got) =
            (forward(dev, plain, &x, &w, &[]), forward(dev, padded, &pad(&x), &pad(&w), &[]));
        assert_close("rstd", &got.rstd, &want.rstd, 0.0, 1e-14);
        assert_close("y", &cut(&got.y), &want.y, 0.0, 1e-13);
        let (mut dw, mut wide_dw) = (vec![0.5; cols], pad(&[0.5; 12]));
        let dx = backward(dev, plain, (&mut dw, &mut []), &dy, &x, &w);
        let got = backward(dev, padded, (&mut wide_dw, &mut []), &pad(&dy), &pad(&x), &pad(&w));
        assert_close("dx", &cut(&got), &dx, 1e-15, 1e-13);
        assert_close("dw", &cut(&wide_dw), &dw, 1e-15, 1e-13);
    }
    for (spec, says) in [
        (NormSpec { unpadded: Some(0), ..RMS }, "got 0, wanted 1 to 12"),
        (NormSpec { unpadded: Some(13), ..RMS }, "got 13, wanted 1 to 12"),
        (NormSpec { unpadded: Some(11), ..LAYER }, "got 11, wanted 12 to 12"),
    ] {
        let (mut y, mut mean, mut rstd) = (x.clone(), vec![0.0; rows], vec![0.0; rows]);
        let out =
            NormOut { y: rows_mut(&mut y), mean: (&mut mean).into(), rstd: (&mut rstd).into() };
        let e = refusal(norm::forward(dev, spec, out, View::from(&x[..]), w[..].into(), None));
        assert_eq!(e, format!("norm: unpadded elements of a row: {says}"));
    }
}

#[test]
fn kernel_rows_do_not_count_their_padding() {
    sim::check(|sim| {
        let spec = NormSpec { heads: 3, unpadded: Some(12), ..RMS };
        sim.hold(&Normed { at: Some([(16, 72), (8, 64)]), ..Normed::new(spec, 12, 16) });
        sim.hold(&Normed::new(NormSpec { unpadded: Some(1000), ..RMS }, 7, 1032));
    });
}

#[test]
fn kernels_refuse_rows_that_they_cannot_hold() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        for cols in [7, 8196] {
            let case = Normed::new(RMS, 1, cols);
            let x = vec![0.0f32; cols];
            let of = || Buffer::of(&dev, "test", &x).unwrap();
            let e = refusal(case.run_on(&dev, [&x; 3], [&of(), &of()], [of(), of()]));
            let want = format!("got {cols}, wanted a multiple of 4, at most 8192");
            assert_eq!(e, format!("norm: columns on a CUDA device: {want}"));
        }
        let case = Normed { at: Some([(4, 17), (0, 16)]), ..Normed::new(RMS, 1, 8) };
        let (x, of) = ([0.0f32; 8], || Buffer::of(&dev, "test", &[0.0f32; 8]).unwrap());
        let e = refusal(case.run_on(&dev, [&x; 3], [&of(), &of()], [of(), of()]));
        assert_eq!(e, "norm: stride of `x`: got 17, wanted 12 or more, a multiple of 4");
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, x) = (host(), vec![0.0f32; 9]);
    let (mut y, mut mean) = (vec![0.0f32; 9], vec![0.0; 3]);
    let mut refused = |spec: NormSpec, [y_, mean_, rstd, x_, b]: [usize; 5]| {
        let mut rstd = vec![0.0; rstd];
        let (y, mean) = (rows_mut(&mut y[..y_]), (&mut mean[..mean_]).into());
        let out = NormOut { y, mean, rstd: (&mut rstd).into() };
        let b = (b > 0).then(|| x[..b].into());
        refusal(norm::forward(dev, spec, out, View::from(&x[..x_]), x[..3].into(), b))
    };
    let heads = NormSpec { heads: 2, ..RMS };
    for (spec, n, says) in [
        (RMS, [6, 0, 2, 5, 0], "`x` has shape [5], wanted [2, 3]"),
        (RMS, [5, 0, 2, 6, 0], "`y` has shape [5], wanted [2, 3]"),
        (RMS, [6, 0, 2, 6, 3], "`b` has shape [3], wanted [0]"),
        (LAYER, [6, 3, 2, 6, 3], "`mean` has shape [3], wanted [2]"),
        (LAYER, [6, 2, 2, 6, 2], "`b` has shape [2], wanted [3]"),
        (heads, [9, 0, 3, 9, 0], "`rstd` has shape [3], wanted [1, 2]"),
    ] {
        assert_eq!(refused(spec, n), format!("norm: {says}"));
    }
    let (mut dx, mut dw, mut db) = (vec![0.0f32; 6], vec![0.0; 3], vec![0.0; 3]);
    let mut scratch = [0.0; 6];
    // lengths of dx, dw, db, dy, x, mean, scratch
    let mut refused = |n: [usize; 7]| {
        let (dx, dw) = ((&mut dx[..n[0]]).into(), (&mut dw[..n[1]]).into());
        let (db, scratch) = (Some((&mut db[..n[2]]).into()), (&mut scratch[..n[6]]).into());
        let (x_, mean) = (View::from(&x[..n[4]]).into(), x[..n[5]].into());
        let kept = NormKept { x: x_, w: x[..3].into(), mean, rstd: x[..2].into() };
        let grads = NormGrads { dx, add: false, dw: Some(dw), db, scratch };
        refusal(norm::backward(dev, LAYER, grads, View::from(&x[..n[3]]), kept))
    };
    for (n, says) in [
        ([5, 3, 3, 6, 6, 2, 6], "`dx` has shape [5], wanted [2, 3]"),
        ([6, 2, 3, 6, 6, 2, 6], "`dw` has shape [2], wanted [3]"),
        ([6, 3, 2, 6, 6, 2, 6], "`db` has shape [2], wanted [3]"),
        ([6, 3, 3, 5, 6, 2, 6], "`dy` has shape [5], wanted [2, 3]"),
        ([6, 3, 3, 6, 5, 2, 6], "`x` has shape [5], wanted [2, 3]"),
        ([6, 3, 3, 6, 6, 3, 6], "`mean` has shape [3], wanted [2]"),
        ([6, 3, 3, 6, 6, 2, 5], "`scratch` has shape [5], wanted [6]"),
    ] {
        assert_eq!(refused(n), format!("norm::backward: {says}"));
    }
}
