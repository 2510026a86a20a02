//! Fused log-probs: hand-worked values, goldens, central differences, and bits that neither the
//! batch nor the way to the logits can change.

mod cuda;
mod sample;

use warpo::{
    device::{Device, Float},
    ops::{
        logprob::{self, CHUNK, LmHead, LogitSettings, Outputs, Slopes},
        matmul::{self, Packed},
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_earned_to, assert_nan_only, assert_norm,
    assert_refuses, devices, gather, golden::Golden, gradcheck, host, inner, narrow, randn,
    refusal, shuffled, wide, zeros,
};

/// A head `[vocab, d]`, packed.
struct Head<F: 'static> {
    w: Vec<F>,
    packed: Packed<F>,
}

impl<F: Float> Head<F> {
    fn new(dev: &Device, w: &[F], vocab: usize) -> Self {
        let mut packed = Packed::new(host(), vocab, w.len() / vocab).unwrap();
        packed.pack(dev, w.into()).unwrap();
        Self { w: w.to_vec(), packed }
    }

    /// Logits are the rows of h themselves.
    fn identity(vocab: usize) -> Self {
        let w: Vec<F> = (0..vocab * vocab)
            .map(|i| if i % (vocab + 1) == 0 { F::ONE } else { F::ZERO })
            .collect();
        Self::new(&Device::cpu(), &w, vocab)
    }

    fn with(&self, settings: LogitSettings<F>) -> LmHead<'_, F> {
        LmHead { w: (&self.packed).into(), settings }
    }
}

/// What forward writes.
#[derive(Clone)]
struct Out<F> {
    logp: Vec<F>,
    lse: Vec<F>,
    entropy: Vec<F>,
}

impl<F: Float> Out<F> {
    fn nan(rows: usize) -> Self {
        let nan = vec![F::of(f64::NAN); rows];
        Self { logp: nan.clone(), lse: nan.clone(), entropy: nan }
    }

    fn views(&mut self) -> Outputs<'_, F> {
        let entropy = Some((&mut self.entropy).into());
        Outputs { logp: (&mut self.logp).into(), lse: (&mut self.lse).into(), entropy }
    }
}

fn forward<F: Float>(dev: &Device, h: &[F], head: &Head<F>, targets: &[u32], t: f64) -> Out<F> {
    forward_by(dev, h, head, targets, LogitSettings::at(F::of(t)))
}

fn forward_by<F: Float>(
    dev: &Device,
    h: &[F],
    head: &Head<F>,
    targets: &[u32],
    settings: LogitSettings<F>,
) -> Out<F> {
    let mut out = Out::nan(targets.len());
    let need = logprob::scratch_len(targets.len(), head.packed.n());
    let mut scratch = vec![F::of(f64::NAN); need];
    let (h, targets, scratch) = (h.into(), targets.into(), (&mut scratch).into());
    logprob::forward(dev, out.views(), h, head.with(settings), targets, scratch).unwrap();
    out
}

fn from_logits<F: Float>(dev: &Device, logits: &[F], targets: &[u32], t: f64) -> Out<F> {
    let mut out = Out::nan(targets.len());
    let settings = LogitSettings::at(F::of(t));
    logprob::from_logits(dev, out.views(), logits.into(), targets.into(), settings).unwrap();
    out
}

/// Writes dh, adds to `dw`.
fn backward<F: Float>(
    dev: &Device,
    dw: &mut [F],
    (dlogp, dentropy): (&[F], Option<&[F]>),
    h: &[F],
    head: &Head<F>,
    targets: &[u32],
    t: f64,
) -> Vec<F> {
    let out = forward(dev, h, head, targets, t);
    let mut dh = vec![F::of(f64::NAN); h.len()];
    let (vocab, d) = (head.packed.n(), head.packed.k());
    let need = logprob::backward_scratch_len(targets.len(), vocab, d);
    let mut scratch = vec![F::of(f64::NAN); need];
    let f = logprob::Forward {
        h: h.into(),
        head: head.with(LogitSettings::at(F::of(t))),
        w: (&head.w).into(),
        targets: targets.into(),
        lse: (&out.lse).into(),
        entropy: Some((&out.entropy).into()),
    };
    let (dh_, dw) = ((&mut dh).into(), Some(dw.into()));
    let slopes = Slopes { dlogp: dlogp.into(), dentropy: dentropy.map(Into::into) };
    logprob::backward(dev, dh_, dw, slopes, f, (&mut scratch).into()).unwrap();
    dh
}

/// Targets in every part of the vocabulary, its first and last token among them.
fn targets(rows: usize, vocab: usize) -> Vec<u32> {
    (0..rows).map(|r| if r == 0 { vocab - 1 } else { (r - 1) * 617 % vocab } as u32).collect()
}

#[test]
fn hand_worked() {
    // 1/2, 1/4, 1/4 at temperature 1; 4/6, 1/6, 1/6 at 1/2
    let z = [2f64.ln(), 0.0, 0.0].map(|z| z + 5.0).repeat(2);
    let entropy = |p: [f64; 3]| -p.iter().map(|p| p * p.ln()).sum::<f64>();
    let dev = Device::cpu();
    for (t, p, lse) in [
        (1.0, [0.5, 0.25, 0.25], 4f64.ln() + 5.0),
        (0.5, [4.0 / 6.0, 1.0 / 6.0, 1.0 / 6.0], 6f64.ln() + 10.0),
    ] {
        let fused = forward(&dev, &z, &Head::identity(3), &[0, 2], t);
        for out in [fused, from_logits(&dev, &z, &[0, 2], t)] {
            assert_close("logp", &out.logp, &[p[0].ln(), p[2].ln()], 1e-14, 0.0);
            assert_close("lse", &out.lse, &[lse, lse], 0.0, 1e-15);
            assert_close("entropy", &out.entropy, &[entropy(p), entropy(p)], 1e-14, 0.0);
        }
        // dz = (target - p) / t
        let mut dw = vec![0.0; 9];
        let d = (&[1.0, -2.0][..], None);
        let dh = backward(&dev, &mut dw, d, &z, &Head::identity(3), &[0, 2], t);
        let want = [1.0 - p[0], -p[1], -p[2], 2.0 * p[0], 2.0 * p[1], 2.0 * (p[2] - 1.0)];
        assert_close("dh", &dh, &want.map(|d| d / t), 1e-14, 0.0);
    }
    let flat = from_logits(&dev, &[3.0; 10], &[7], 2.0);
    assert_close("flat", &flat.logp, &[-(10f64.ln())], 0.0, 1e-15);
    assert_close("flat", &flat.entropy, &[10f64.ln()], 0.0, 1e-15);
    assert!(forward(&dev, &[], &Head::<f64>::identity(3), &[], 1.0).logp.is_empty());
    assert!(from_logits::<f64>(&dev, &[], &[], 1.0).logp.is_empty());
    let mut dw = vec![0.5; 9];
    assert!(
        backward(&dev, &mut dw, (&[], Some(&[])), &[], &Head::identity(3), &[], 1.0).is_empty()
    );
    assert_eq!(dw, [0.5; 9]);
}

/// log softmax and entropy of a row, written plainly.
fn plain<F: Float>(z: &[F], target: usize, t: f64) -> (F, F) {
    let z: Vec<F> = z.iter().map(|z| *z / F::of(t)).collect();
    let top = z.iter().fold(F::NEG_INFINITY, |m, z| m.max_nan(*z));
    let sum = |f: &dyn Fn(F) -> F| z.iter().fold(F::ZERO, |s, z| s + f(*z));
    let lse = top + sum(&|z| (z - top).exp()).ln();
    (z[target] - lse, -sum(&|z| (z - lse).exp() * (z - lse)))
}

/// Their gradients.
fn plain_gradients(z: &[f32], target: usize, t: f64) -> (Vec<f32>, Vec<f32>) {
    let (logp, entropy) = plain(z, target, t);
    let t = t as f32;
    let lse = z[target] / t - logp;
    let x = z.iter().map(|z| z / t - lse).enumerate();
    let indicator = |v| f32::from(u8::from(v == target));
    x.map(|(v, x)| ((indicator(v) - x.exp()) / t, -x.exp() * (x + entropy) / t)).unzip()
}

/// Also where each chunk has a new maximum, and where only the first has.
#[test]
fn is_the_definition() {
    for vocab in [1, 5, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2500, 3 * CHUNK + 7] {
        let mut z: Vec<f64> = randn("z", vocab);
        for order in [0, 1, 2] {
            let targets = targets(4, vocab);
            let out = from_logits(&Device::cpu(), &z.repeat(4), &targets, 0.3);
            for (r, target) in targets.iter().enumerate() {
                let (logp, entropy) = plain(&z, *target as usize, 0.3);
                let what = format!("{vocab}, order {order}");
                assert_close(&what, &out.logp[r..=r], &[logp], 1e-13, 1e-13);
                assert_close(&what, &out.entropy[r..=r], &[entropy], 1e-13, 1e-13);
            }
            z.sort_by(|a, b| if order == 0 { a.total_cmp(b) } else { b.total_cmp(a) });
        }
    }
}

#[test]
fn values_and_gradients_are_those_of_pytorch() {
    let g = Golden::open("pure/logprob_entropy.safetensors");
    let (dev, logits) = (Device::cpu(), g.get("logits"));
    let targets: Vec<u32> = g.ints("targets").iter().map(|t| *t as u32).collect();
    let (rows, vocab) = (targets.len(), g.shape("logits")[1]);
    let (head, head32) = (Head::<f64>::identity(vocab), Head::<f32>::identity(vocab));
    let (ones, zeros) = (vec![1.0; rows], vec![0.0; rows]);
    let (ones32, zeros32) = (narrow(&ones), narrow(&zeros));
    let z32 = narrow(logits);
    for t in ["1.0", "0.7", "1.3"] {
        let get = |key: &str| g.get(&format!("t{t}/{key}"));
        let (what, t): (String, f64) = (format!("t{t}"), t.parse().unwrap());
        // Row 0 is shifted by 1e4: its logits are known to 1e-12, as is all that follows.
        let (abs, rel) = (1e-11, 1e-13);
        let fused = forward(&dev, logits, &head, &targets, t);
        for out in [&fused, &from_logits(&dev, logits, &targets, t)] {
            assert_close(&what, &out.logp, get("logp"), abs, rel);
            assert_close(&what, &out.entropy, get("entropy"), abs, rel);
        }
        let grad = |d| backward(&dev, &mut vec![0.0; vocab * vocab], d, logits, &head, &targets, t);
        assert_close(&what, &grad((&ones, None)), get("d_logp"), abs, rel);
        assert_close(&what, &grad((&zeros, Some(&ones))), get("d_entropy"), abs, rel);

        // f32, row by row: the first is rounded by 5e-4, the others must not hide behind it.
        let out = forward(&dev, &z32, &head32, &targets, t);
        let grad = |d| backward(&dev, &mut vec![0.0; vocab * vocab], d, &z32, &head32, &targets, t);
        let (dlogp, dentropy) = (grad((&ones32, None)), grad((&zeros32, Some(&ones32))));
        for r in 0..rows {
            let (at, what) = (r * vocab..(r + 1) * vocab, format!("{what} row {r}"));
            let (z, target) = (&z32[at.clone()], targets[r] as usize);
            let (logp, entropy) = plain(z, target, t);
            let (dl, de) = plain_gradients(z, target, t);
            // One rounding of z, up to 1e4 / 0.7 in the first row and 430 in the second, is
            // what logp, entropy and the slopes are known to.
            let step = z.iter().fold(0.0f64, |m, z| m.max(f64::from(z.abs()))) / t;
            let ulp = step * f64::from(f32::EPSILON);
            let close = |key: &str, ours: &[f32], plain: &[f32], truth: &[f64]| {
                assert_earned_to(ulp, &format!("{what} {key}"), ours, plain, truth);
            };
            close("logp", &out.logp[r..=r], &[logp], &get("logp")[r..=r]);
            close("entropy", &out.entropy[r..=r], &[entropy], &get("entropy")[r..=r]);
            close("d_logp", &dlogp[at.clone()], &dl, &get("d_logp")[at.clone()]);
            close("d_entropy", &dentropy[at.clone()], &de, &get("d_entropy")[at]);
        }
    }
    g.all_read(&[]);
}

#[test]
fn gradients() {
    let dev = Device::cpu();
    // The second crosses a chunk of the vocabulary.
    for (rows, vocab, d) in [(1, 1, 2), (3, 37, 5), (2, CHUNK + 6, 2)] {
        let (h, w): (Vec<f64>, Vec<f64>) = (randn("h", rows * d), randn("w", vocab * d));
        let (a, b): (Vec<f64>, Vec<f64>) = (randn("dlogp", rows), randn("dentropy", rows));
        let targets = targets(rows, vocab);
        for dentropy in [None, Some(&b[..])] {
            let what = format!("{rows}x{vocab}x{d}, entropy {}", dentropy.is_some());
            let mut dw = vec![0.5; vocab * d];
            let head = Head::new(&dev, &w, vocab);
            let dh = backward(&dev, &mut dw, (&a, dentropy), &h, &head, &targets, 0.7);
            dw.iter_mut().for_each(|d| *d -= 0.5);
            let f = |h: &[f64], w: &[f64]| {
                let out = forward(&dev, h, &Head::new(&dev, w, vocab), &targets, 0.7);
                inner(&out.logp, &a) + dentropy.map_or(0.0, |b| inner(&out.entropy, b))
            };
            gradcheck(&what, &h, &dh, OP, |h| f(h, &w));
            gradcheck(&what, &w, &dw, OP, |w| f(&h, w));
        }
    }
}

#[test]
fn f32_is_as_exact_as_a_plain_version() {
    let (dev, rows, vocab, d) = (Device::cpu(), 7, 2500, 24);
    let (h, w): (Vec<f32>, Vec<f32>) = (randn("h", rows * d), randn("w", vocab * d));
    let (head, targets) = (Head::new(&dev, &w, vocab), targets(rows, vocab));
    let truth_head = Head::new(&dev, &wide(&w), vocab);
    let truth = forward(&dev, &wide(&h), &truth_head, &targets, 0.9);
    let ours = forward(&dev, &h, &head, &targets, 0.9);
    let rows_of = |r: usize| {
        let dot = |w: &[f32]| w.iter().zip(&h[r * d..]).map(|(w, h)| w * h).sum::<f32>();
        plain(&w.chunks(d).map(dot).collect::<Vec<_>>(), targets[r] as usize, 0.9)
    };
    let (logp, entropy): (Vec<f32>, Vec<f32>) = (0..rows).map(rows_of).unzip();
    assert_earned("logp", &ours.logp, &logp, &truth.logp);
    assert_earned("entropy", &ours.entropy, &entropy, &truth.entropy);
    let (a, b): (Vec<f32>, Vec<f32>) = (randn("dlogp", rows), randn("dentropy", rows));
    let (mut dw, mut truth_w) = (vec![0.0; w.len()], vec![0.0; w.len()]);
    let dh = backward(&dev, &mut dw, (&a, Some(&b)), &h, &head, &targets, 0.9);
    let (a, b, h) = (wide(&a), wide(&b), wide(&h));
    let truth = backward(&dev, &mut truth_w, (&a, Some(&b)), &h, &truth_head, &targets, 0.9);
    assert_norm("dh", &dh, &truth, 1e-5);
    assert_norm("dw", &dw, &truth_w, 1e-5);
}

/// The entropy of logits near 1000 used to be rounded like 1000.
#[test]
fn entropy_does_not_see_a_shift() {
    let z: Vec<f32> = randn::<f32>("z", 2500).iter().map(|z| (z * 64.0).round() / 64.0).collect();
    let shifted: Vec<f32> = z.iter().map(|z| z + 1024.0).collect(); // exact
    let [a, b] = [z, shifted].map(|z| from_logits(&Device::cpu(), &z, &[7], 1.0));
    assert_bits("entropy", &a.entropy, &b.entropy);
    assert_close("lse", &[b.lse[0] - 1024.0], &wide(&a.lse), 1e-4, 0.0);
}

/// Vocabularies around panels of 32, lanes of 16 and chunks of 1024; tiles have 48 rows.
#[test]
fn rows_do_not_see_their_batch() {
    let (rows, d) = (50, 7);
    for vocab in [1, 5, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2500] {
        let (h, w): (Vec<f32>, Vec<f32>) = (randn("h", rows * d), randn("w", vocab * d));
        let targets = targets(rows, vocab);
        let one = &devices()[0];
        let head = Head::new(one, &w, vocab);
        let alone = |r: usize| {
            let out = forward(one, &h[r * d..][..d], &head, &targets[r..=r], 0.8);
            (out.logp[0], (out.lse[0], out.entropy[0]))
        };
        let (logp, (lse, entropy)): (Vec<f32>, (Vec<f32>, Vec<f32>)) = (0..rows).map(alone).unzip();
        let order = shuffled("order", rows);
        for dev in devices() {
            let same = |what: &str, out: Out<f32>, rows: &[usize]| {
                let what = format!("{vocab} {what} {} {dev:?}", rows.len());
                assert_bits(&what, &out.logp, &gather(&logp, 1, rows));
                assert_bits(&what, &out.lse, &gather(&lse, 1, rows));
                assert_bits(&what, &out.entropy, &gather(&entropy, 1, rows));
            };
            let head = Head::new(&dev, &w, vocab);
            for chosen in [&order[..1], &order[..12], &order[..47], &order[..49], &order] {
                let (h, targets) = (gather(&h, d, chosen), gather(&targets, 1, chosen));
                same("fused", forward(&dev, &h, &head, &targets, 0.8), chosen);
                // What the sampler records: the very same bits.
                let mut logits = vec![f32::NAN; chosen.len() * vocab];
                let (y, x) = ((&mut logits).into(), (&h).into());
                matmul::forward(&dev, y, x, &head.packed, None, None).unwrap();
                same("from logits", from_logits(&dev, &logits, &targets, 0.8), chosen);
            }
        }
    }
}

#[test]
fn gradients_do_not_see_micro_batches() {
    let (rows, d) = (50, 7);
    for vocab in [33, CHUNK + 1] {
        let (h, w): (Vec<f32>, Vec<f32>) = (randn("h", rows * d), randn("w", vocab * d));
        let (a, b): (Vec<f32>, Vec<f32>) = (randn("dlogp", rows), randn("dentropy", rows));
        let (targets, start) = (targets(rows, vocab), randn::<f32>("dw", vocab * d));
        let mut want: Option<(Vec<f32>, Vec<f32>)> = None;
        for dev in devices() {
            let head = Head::new(&dev, &w, vocab);
            for cuts in [vec![0, 50], vec![0, 1, 50], vec![0, 0, 12, 13, 49, 50]] {
                let (mut dh, mut dw) = (Vec::new(), start.clone());
                for p in cuts.windows(2).map(|p| p[0]..p[1]) {
                    let cotangents = (&a[p.clone()], Some(&b[p.clone()]));
                    let (h, targets) = (&h[p.start * d..p.end * d], &targets[p]);
                    dh.extend(backward(&dev, &mut dw, cotangents, h, &head, targets, 0.8));
                }
                let want = want.get_or_insert_with(|| (dh.clone(), dw.clone()));
                assert_bits(&format!("dh {vocab} {cuts:?} {dev:?}"), &dh, &want.0);
                assert_bits(&format!("dw {vocab} {cuts:?} {dev:?}"), &dw, &want.1);
            }
        }
    }
}

#[test]
fn entropy_and_the_weight_gradient_are_optional() {
    let (dev, rows, vocab, d) = (Device::cpu(), 5, 33, 4);
    let (h, w): (Vec<f32>, Vec<f32>) = (randn("h", rows * d), randn("w", vocab * d));
    let (head, targets) = (Head::new(&dev, &w, vocab), targets(rows, vocab));
    let want = forward(&dev, &h, &head, &targets, 0.8);
    let mut out = Out::nan(rows);
    let mut scratch = vec![f32::NAN; logprob::scratch_len(rows, vocab)];
    let (x, t, of) = ((&h).into(), (&targets).into(), head.with(LogitSettings::at(0.8)));
    let some = Outputs { entropy: None, ..out.views() };
    logprob::forward(&dev, some, x, of, t, (&mut scratch).into()).unwrap();
    assert_bits("logp", &out.logp, &want.logp);
    assert_bits("lse", &out.lse, &want.lse);
    let (w, logp, lse) = ((&head.w).into(), &out.logp, (&out.lse).into());
    let f = logprob::Forward { h: x, head: of, w, targets: t, lse, entropy: None };
    let mut dh = vec![f32::NAN; h.len()];
    let slopes = Slopes { dlogp: logp.into(), dentropy: None };
    let room = (&mut scratch).into();
    logprob::backward(&dev, (&mut dh).into(), None, slopes, f, room).unwrap();
    let mut dw = vec![0.0; vocab * d];
    let want = backward(&dev, &mut dw, (logp, None), &h, &head, &targets, 0.8);
    assert_bits("dh", &dh, &want);
}

#[test]
fn a_nan_is_never_lost() {
    let (dev, rows, vocab) = (Device::cpu(), 5, CHUNK + 21);
    let z: Vec<f32> = randn("z", rows * vocab);
    let targets = targets(rows, vocab);
    let clean = from_logits(&dev, &z, &targets, 0.8);
    // Lanes, remainders, first and last chunk; the target's place is none of them.
    for v in [0, 3, 17, CHUNK - 1, CHUNK, CHUNK + 16, CHUNK + 19, CHUNK + 20] {
        let mut bad = z.clone();
        bad[2 * vocab + v] = f32::NAN;
        for dev in devices() {
            let out = from_logits(&dev, &bad, &targets, 0.8);
            assert_nan_only(&format!("logp {v}"), &out.logp, &clean.logp, 2..3);
            assert_nan_only(&format!("lse {v}"), &out.lse, &clean.lse, 2..3);
            assert_nan_only(&format!("entropy {v}"), &out.entropy, &clean.entropy, 2..3);
        }
    }
    let (mut h, w): (Vec<f32>, Vec<f32>) = (randn("h", 20), randn("w", 33 * 4));
    let (head, targets) = (Head::new(&dev, &w, 33), self::targets(5, 33));
    let (clean, ones) = (forward(&dev, &h, &head, &targets, 1.0), [1.0; 5]);
    let clean_dh = backward(&dev, &mut vec![0.0; 132], (&ones, None), &h, &head, &targets, 1.0);
    h[9] = f32::NAN;
    let out = forward(&dev, &h, &head, &targets, 1.0);
    assert_nan_only("logp", &out.logp, &clean.logp, 2..3);
    let dh = backward(&dev, &mut vec![0.0; 132], (&ones, None), &h, &head, &targets, 1.0);
    assert_nan_only("dh", &dh, &clean_dh, 8..12);
}

/// Forward over three rows, head `[5, 2]`, with these lengths of logp, lse, entropy, h, scratch.
fn forward_of(n: [usize; 5], targets: &[u32], t: f32) -> warpo::Result<()> {
    let dev = Device::cpu();
    let head = Head::new(&dev, &[0.0f32; 10], 5);
    let [mut logp, mut lse, mut entropy, h, mut scratch] = zeros(n);
    let entropy = Some((&mut entropy).into());
    let out = Outputs { logp: (&mut logp).into(), lse: (&mut lse).into(), entropy };
    let (head, scratch) = (head.with(LogitSettings::at(t)), (&mut scratch).into());
    logprob::forward(&dev, out, (&h).into(), head, targets.into(), scratch)
}

#[test]
fn bad_targets_temperatures_and_shapes_are_refused() {
    let good = [3, 3, 3, 6, 96];
    assert_refuses("logprob", "logp [3] lse [3] entropy [3] h [3, 2] scratch [96]", |n| {
        forward_of(n, &[0, 1, 2], 1.0)
    });
    let refused = |targets: &[u32], t: f32| refusal(forward_of(good, targets, t));
    let says = "logprob: target of row 1: got 5, wanted less than 5";
    assert_eq!(refused(&[4, 5, 9], 1.0), says);
    for (t, got) in [(0.0, "0"), (-1.0, "-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let says = format!("temperature: got {got}, wanted a positive number");
        assert_eq!(refused(&[0, 1, 2], t), format!("logprob: {says}"));
        let (mut out, z, settings) = (Out::nan(1), [0.0f32; 3], LogitSettings::at(t));
        let z = z[..].into();
        let e = logprob::from_logits(&Device::cpu(), out.views(), z, [0][..].into(), settings);
        assert_eq!(refusal(e), format!("logprob::from_logits: {says}"));
    }
    let refused = |logits: usize, targets: &[u32]| {
        let (mut out, z, settings) = (Out::nan(2), vec![0.0f32; logits], LogitSettings::default());
        let (out, z) = (out.views(), (&z).into());
        refusal(logprob::from_logits(&Device::cpu(), out, z, targets.into(), settings))
    };
    let op = "logprob::from_logits";
    assert_eq!(refused(7, &[0, 0]), format!("{op}: `logits` has shape [7], wanted [2, 3]"));
    assert_eq!(refused(6, &[0, 3]), format!("{op}: target of row 1: got 3, wanted less than 3"));
    assert_eq!(refused(9, &[0; 3]), format!("{op}: `logp` has shape [2], wanted [3]"));
}

#[test]
fn bad_input_of_backward_is_refused() {
    let (dev, x, targets) = (Device::cpu(), [0.0f32; 4], [0u32, 4, 1]);
    let head = Head::new(&dev, &[0.0f32; 10], 5);
    let backward = |n: [usize; 8], entropy: Option<usize>, t: f32| {
        let [mut dh, mut dw, dlogp, dentropy, mut scratch, h, w, lse] = zeros(n);
        let f = logprob::Forward {
            h: (&h).into(),
            head: head.with(LogitSettings::at(t)),
            w: (&w).into(),
            targets: targets[..].into(),
            lse: (&lse).into(),
            entropy: entropy.map(|n| x[..n].into()),
        };
        let (dh, dw, scratch) = ((&mut dh).into(), Some((&mut dw).into()), (&mut scratch).into());
        let slopes = Slopes { dlogp: (&dlogp).into(), dentropy: Some((&dentropy).into()) };
        logprob::backward(&dev, dh, dw, slopes, f, scratch)
    };
    let op = "logprob::backward";
    assert_refuses(
        op,
        "dh [3, 2] dw [5, 2] dlogp [3] dentropy [3] scratch [96] h [3, 2] w [5, 2] lse [3]",
        |n| backward(n, Some(3), 1.0),
    );
    assert_refuses(op, "entropy [3]", |[n]| backward([6, 10, 3, 3, 96, 6, 10, 3], Some(n), 1.0));
    for (entropy, t, says) in [
        (None, 1.0, "got none, wanted entropy with dentropy"),
        (Some(3), 0.0, "temperature: got 0, wanted a positive number"),
    ] {
        let e = refusal(backward([6, 10, 3, 3, 96, 6, 10, 3], entropy, t));
        assert_eq!(e, format!("{op}: {says}"));
    }
}

/// Forward and gradients with a soft-cap, from logits `[rows, vocab]` and ones.
#[test]
fn a_cap_bends_logits() {
    let (dev, rows, vocab, d) = (Device::cpu(), 3, CHUNK + 6, 3);
    let settings = LogitSettings { temperature: 0.7, softcap: Some(2.0) };
    let (h, w): (Vec<f64>, Vec<f64>) = (randn("h", rows * d), randn("w", vocab * d));
    let (a, b): (Vec<f64>, Vec<f64>) = (randn("dlogp", rows), randn("dentropy", rows));
    let targets = targets(rows, vocab);
    let run = |h: &[f64], w: &[f64]| {
        let (head, mut out) = (Head::new(&dev, w, vocab), Out::nan(rows));
        let mut scratch = vec![f64::NAN; logprob::scratch_len(rows, vocab)];
        let (of, t, room) = (head.with(settings), (&targets).into(), (&mut scratch).into());
        logprob::forward(&dev, out.views(), h.into(), of, t, room).unwrap();
        out
    };
    let head = Head::new(&dev, &w, vocab);
    let mut logits = vec![f64::NAN; rows * vocab];
    matmul::forward(&dev, (&mut logits).into(), (&h).into(), &head.packed, None, None).unwrap();
    let out = run(&h, &w);
    for (r, logits) in logits.chunks(vocab).enumerate() {
        let bent: Vec<f64> = logits.iter().map(|x| 2.0 * (x / 2.0).tanh()).collect();
        let (logp, entropy) = plain(&bent, targets[r] as usize, 0.7);
        assert_close("logp", &out.logp[r..=r], &[logp], 1e-12, 1e-12);
        assert_close("entropy", &out.entropy[r..=r], &[entropy], 1e-12, 1e-12);
    }
    let mut same = Out::nan(rows);
    let (z, t) = ((&logits).into(), (&targets).into());
    logprob::from_logits(&dev, same.views(), z, t, settings).unwrap();
    assert_bits("logp", &same.logp, &out.logp);
    assert_bits("entropy", &same.entropy, &out.entropy);

    let (mut dh, mut dw) = (vec![f64::NAN; rows * d], vec![0.0; vocab * d]);
    let mut scratch = vec![f64::NAN; logprob::backward_scratch_len(rows, vocab, d)];
    let f = logprob::Forward {
        h: (&h).into(),
        head: head.with(settings),
        w: (&w).into(),
        targets: (&targets).into(),
        lse: (&out.lse).into(),
        entropy: Some((&out.entropy).into()),
    };
    let (dh_, dw_, room) = ((&mut dh).into(), Some((&mut dw).into()), (&mut scratch).into());
    let slopes = Slopes { dlogp: (&a).into(), dentropy: Some((&b).into()) };
    logprob::backward(&dev, dh_, dw_, slopes, f, room).unwrap();
    let value = |h: &[f64], w: &[f64]| {
        let out = run(h, w);
        inner(&out.logp, &a) + inner(&out.entropy, &b)
    };
    gradcheck("dh", &h, &dh, OP, |h| value(h, &w));
    gradcheck("dw", &w, &dw, OP, |w| value(&h, w));
}

/// Rows of the CPU's second wave, whose weight gradients continue those of the first.
#[test]
fn waves_do_not_show() {
    let (dev, rows, vocab, first) = (&devices()[1], 16_390, 3, 16_380);
    let (h, w): (Vec<f32>, Vec<f32>) = (randn("h", rows), randn("w", vocab));
    let (head, targets) = (Head::new(dev, &w, vocab), targets(rows, vocab));
    let all = forward(dev, &h, &head, &targets, 0.9);
    let last = forward(dev, &h[first..], &head, &targets[first..], 0.9);
    assert_bits("logp", &all.logp[first..], &last.logp);
    let ones = vec![1.0; rows];
    let (mut dw, mut parts) = (vec![0.0; vocab], vec![0.0; vocab]);
    let dh = backward(dev, &mut dw, (&ones, None), &h, &head, &targets, 0.9);
    for part in [0..first, first..rows] {
        let (h, t) = (&h[part.clone()], &targets[part.clone()]);
        let got = backward(dev, &mut parts, (&ones[part.clone()], None), h, &head, t, 0.9);
        assert_bits("dh", &got, &dh[part]);
    }
    assert_bits("dw", &parts, &dw);
}
