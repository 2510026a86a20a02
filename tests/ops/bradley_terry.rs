//! The reward model's loss: hand-worked values, goldens, central differences, micro-batches.

use warpo::{
    device::{Device, Float},
    ops::bradley_terry::{self, PairSums, Pairs},
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only,
    golden::Golden,
    gradcheck, host, narrow, randn, refusal,
    sim::{self, Column, FloatCase, Lab, rounded},
    wide,
};

fn forward<F: Float>(scores: &[F], margins: &[F], centre: f64, n: f64) -> (PairSums, Vec<F>) {
    forward_on(host(), 0, scores, margins, centre, n).unwrap()
}

/// The same of columns that begin `first` elements into their memory.
fn forward_on<F: Float>(
    dev: &Device,
    first: usize,
    scores: &[F],
    margins: &[F],
    centre: f64,
    n: f64,
) -> warpo::Result<(PairSums, Vec<F>)> {
    let mut d = Column::room(dev, first, scores.len());
    let [scores, margins] = [scores, margins].map(|x| Column::of(dev, first, x));
    let t = Pairs { scores: scores.view(), margins: margins.view(), weights: None };
    let stats = bradley_terry::forward(dev, d.view_mut(), t, centre, n)?.get()?;
    Ok((stats, d.read()))
}

fn list(s: &PairSums) -> [f64; 5] {
    [s.pairs, s.loss, s.right, s.difference, s.score]
}

#[test]
fn hand_worked() {
    let ln3 = 3f64.ln(); // sigmoid(ln 3) = 3/4
    let scores = [ln3 + 1.0, 1.0, 0.5, 0.5, -ln3, 0.0];
    let (s, d) = forward(&scores, &[], 0.0, 2.0);
    assert_eq!((s.pairs, s.right), (3.0, 1.0), "a tie is not right");
    let loss = (4f64 / 3.0).ln() + 2f64.ln() + 4f64.ln();
    assert_close("loss", &[s.loss], &[loss / 2.0], 0.0, 1e-15);
    assert_close("difference", &[s.difference, s.score], &[0.0, 3.0], 1e-15, 1e-15);
    assert_close("d", &d, &[-0.125, 0.125, -0.25, 0.25, -0.375, 0.375], 1e-15, 0.0);
    // a margin of ln 3 leaves nothing of the first difference
    let (s, d) = forward(&scores[..2], &[ln3], 0.0, 1.0);
    assert_close("loss", &[s.loss], &[2f64.ln()], 0.0, 1e-15);
    assert_close("d", &d, &[-0.5, 0.5], 1e-15, 0.0);
    // 0.5 * (0.5 + 0.5)^2, of slope 2 * 0.5 * 1 on both
    let (s, d) = forward(&scores[2..4], &[], 0.5, 1.0);
    assert_close("loss", &[s.loss], &[2f64.ln() + 0.5], 0.0, 1e-15);
    assert_close("d", &d, &[0.5, 1.5], 1e-15, 0.0);
    assert_eq!(forward::<f64>(&[], &[], 0.5, 1.0), (PairSums::default(), vec![]));
}

#[test]
fn neither_sign_overflows() {
    let (s, d) = forward(&[1000.0, 0.0], &[], 0.0, 1.0);
    assert_eq!((s.loss, &d[..]), (0.0, &[0.0, 0.0][..]));
    let (s, d) = forward(&[0.0, 1000.0], &[], 0.0, 1.0);
    assert_eq!((s.loss, &d[..]), (1000.0, &[-1.0, 1.0][..]));
    // far right the loss is e^-m, not 0
    let (s, _) = forward(&[50.0, 0.0], &[], 0.0, 1.0);
    assert_close("loss", &[s.loss], &[(-50f64).exp()], 0.0, 1e-15);
}

#[test]
fn gradients() {
    for (pairs, centre) in [(1, 0.0), (7, 0.3), (12, 0.0)] {
        let scores: Vec<f64> = randn("scores", 2 * pairs);
        for margins in [vec![], randn("margins", pairs)] {
            let d = forward(&scores, &margins, centre, 3.0).1;
            let f = |s: &[f64]| forward(s, &margins, centre, 3.0).0.loss;
            gradcheck(&format!("centre {centre}"), &scores, &d, OP, f);
        }
    }
}

/// The losses of TRL on the scores of Hugging Face's models.
#[test]
fn losses_are_those_of_trl() {
    for name in ["gpt2", "llama", "llama_tied"] {
        let g = Golden::open(&format!("{name}/rm.safetensors"));
        let (scores, margins) = (g.get("scores"), g.get("margins"));
        // Golden rows: all chosen, then all rejected.
        let n = margins.len();
        let pairs: Vec<f64> = (0..n).flat_map(|i| [scores[i], scores[n + i]]).collect();
        for (key, margins, centre) in
            [("loss", &[][..], 0.0), ("loss_margin", margins, 0.0), ("loss_center", &[], 0.01)]
        {
            let got = forward(&pairs, margins, centre, n as f64).0.loss;
            assert_close(&format!("{name} {key}"), &[got], &[g.scalar(key)], 0.0, 1e-14);

            let (pairs, margins) = (narrow(&pairs), narrow(margins));
            let got = forward(&pairs, &margins, centre, n as f64).0.loss;
            let plain = |(i, p): (usize, &[f32])| {
                let m = p[0] - p[1] - margins.get(i).unwrap_or(&0.0);
                (1.0 + (-m).exp()).ln() + centre as f32 * (p[0] + p[1]) * (p[0] + p[1])
            };
            let plain = pairs.chunks(2).enumerate().map(plain).sum::<f32>() / n as f32;
            assert_earned(&format!("{name} {key}"), &[got], &[plain], &[g.scalar(key)]);
        }
        // The models' own tests read the ids and gradients.
        g.all_read(&["input_ids", "attention_mask", "grad/"]);
    }
}

#[test]
fn micro_batches_add_up() {
    let (scores, margins): (Vec<f32>, Vec<f32>) = (randn("scores", 26), randn("margins", 13));
    let (whole, d) = forward(&scores, &margins, 0.1, 13.0);
    for cut in [0, 1, 6, 13] {
        let (mut s, dlow) = forward(&scores[..2 * cut], &margins[..cut], 0.1, 13.0);
        let (high, dhigh) = forward(&scores[2 * cut..], &margins[cut..], 0.1, 13.0);
        s.merge(&high);
        assert_bits(&format!("cut {cut}"), &[dlow, dhigh].concat(), &d);
        assert_close(&format!("cut {cut}"), &list(&s), &list(&whole), 1e-14, 1e-14);
    }
}

#[test]
fn a_nan_stays_in_its_pair() {
    let mut scores: Vec<f32> = randn("scores", 10);
    let clean = forward(&scores, &[], 0.1, 5.0).1;
    for i in [4, 5] {
        let good = std::mem::replace(&mut scores[i], f32::NAN);
        let (s, d) = forward(&scores, &[], 0.1, 5.0);
        assert!(s.loss.is_nan());
        assert_nan_only("d", &d, &clean, 4..6);
        scores[i] = good;
    }
}

struct Compared {
    first: usize,
    n: usize,
    margins: bool,
}

impl FloatCase for Compared {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let scores: Vec<F> = rounded("scores", 2 * self.n);
        let margins: Vec<F> = rounded("margins", if self.margins { self.n } else { 0 });
        let (s, d) = forward_on(lab.dev(), self.first, &scores, &margins, 0.1, 7.0)?;
        lab.sums("stats", &list(&s));
        lab.column("dscores", &d);
        Ok(())
    }
}

/// No pairs, one, those around a thread's and around a block's, three blocks; columns that begin at
/// a packet and beside one.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (first, n) in [(0, 0), (0, 1), (1, 2), (0, 3), (1, 511), (0, 512), (3, 513), (0, 1025)]
        {
            sim.hold_f32(&Compared { first, n, margins: true });
        }
        sim.hold_f32(&Compared { first: 0, n: 5, margins: false });
    });
}

/// Ties, differences without end on both sides, NaN; and f64.
#[test]
fn kernels_overflow_on_neither_side() {
    sim::check(|sim| {
        let dev = sim.device(sim.orders()[1]);
        let scores = [1000.0, 0.0, 0.0, 1000.0, 0.5, 0.5, 50.0, 0.0f32];
        let (want, d) = forward(&scores, &[], 0.0, 1.0);
        let (got, ours) = forward_on(&dev, 0, &scores, &[], 0.0, 1.0).unwrap();
        assert_eq!(got.right, 2.0, "a tie is not right");
        assert_close("stats", &list(&got), &list(&want), 0.0, 1e-14);
        assert_close("dscores", &ours, &wide(&d), 0.0, 1e-7);
        let (alone, _) = forward_on(&dev, 0, &scores[6..], &[], 0.0, 1.0).unwrap();
        assert_close("far right", &[alone.loss], &[(-50f64).exp()], 0.0, 1e-14);
        for i in [2, 3] {
            let mut bad = scores;
            bad[i] = f32::NAN;
            let (s, d) = forward_on(&dev, 0, &bad, &[], 0.0, 1.0).unwrap();
            assert!(s.loss.is_nan() && s.difference.is_nan());
            assert_nan_only("dscores", &d, &ours, 2..4);
        }
        let says = "device `cuda` is not available: `bradley_terry_forward` has no kernel for F64";
        assert_eq!(refusal(forward_on(&dev, 0, &[0.0; 2], &[], 0.0, 1.0)), says);
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, x, mut d) = (Device::cpu(), [0.0f32; 6], [0.0f32; 6]);
    let mut refused = |d_: usize, scores: usize, margins: usize| {
        let (d, scores) = ((&mut d[..d_]).into(), x[..scores].into());
        let t = Pairs { scores, margins: x[..margins].into(), weights: None };
        refusal(bradley_terry::forward(&dev, d, t, 0.0, 1.0))
    };
    assert_eq!(refused(5, 5, 0), "bradley_terry: `scores` has shape [5], wanted [2, 2]");
    assert_eq!(refused(5, 6, 0), "bradley_terry: `dscores` has shape [5], wanted [3, 2]");
    assert_eq!(refused(6, 6, 2), "bradley_terry: `margins` has shape [2], wanted [3]");
}
