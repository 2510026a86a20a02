//! Losses on pairs of completions: hand-worked values, the values and gradients of TRL, OpenRLHF
//! and open-instruct, central differences, micro-batches, kernels.

use warpo::{
    device::{Buffer, Device, Float},
    ops::{
        preference_loss::{
            self, Divergence, PairCounts, PreferenceKind, PreferenceLoss, PreferenceSums,
        },
        sequence_loss::{Offsets, SequenceColumns},
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_nan_only,
    golden::Golden,
    gradcheck, host, randn, refusal,
    sim::{self, Column, FloatCase, Lab},
};

use PreferenceKind::{
    ApoDown, ApoZero, BcoPair, Discopop, ExoPair, Hinge, Ipo, IpoSum, NcaPair, OddsRatio, Robust,
    Sigmoid, SigmoidNorm, SppoHard,
};

const KINDS: [PreferenceKind; 14] = [
    Sigmoid,
    SigmoidNorm,
    Hinge,
    Ipo,
    IpoSum,
    Robust,
    ExoPair,
    NcaPair,
    BcoPair,
    SppoHard,
    ApoZero,
    ApoDown,
    Discopop,
    OddsRatio,
];

fn one(kind: PreferenceKind) -> PreferenceLoss {
    PreferenceLoss { terms: vec![(kind, 1.0)], ..PreferenceLoss::default() }
}

/// Columns of a micro-batch; what is empty is not there.
#[derive(Clone, Debug)]
struct Completions<F> {
    logp: Vec<F>,
    reference: Vec<F>,
    weights: Vec<F>,
    margins: Vec<F>,
    offsets: Vec<u32>,
}

impl<F: Float> Completions<F> {
    /// Completions of these lengths, chosen and rejected in turn, with log-probs below 0.
    fn random(lens: &[usize]) -> Self {
        let n = lens.iter().sum();
        let logp = |name: &str| -> Vec<F> {
            randn::<f64>(name, n)
                .iter()
                .map(|x| F::of(f64::from((-x.abs() - 0.05) as f32)))
                .collect()
        };
        let of = |name: &str, n| -> Vec<F> {
            randn::<f64>(name, n).iter().map(|x| F::of(f64::from(*x as f32))).collect()
        };
        let mut offsets = vec![0];
        lens.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + *n as u32));
        let weights = of("weights", n);
        let margins = of("margins", lens.len() / 2);
        Self { logp: logp("logp"), reference: logp("reference"), weights, margins, offsets }
    }

    /// Without weights and margins.
    fn plain(self) -> Self {
        Self { weights: vec![], margins: vec![], ..self }
    }

    /// Of pairs `at` alone.
    fn pairs(&self, at: std::ops::Range<usize>) -> Self {
        let offsets = &self.offsets[2 * at.start..=2 * at.end];
        let span = offsets[0] as usize..offsets[offsets.len() - 1] as usize;
        let of = |x: &[F]| if x.is_empty() { vec![] } else { x[span.clone()].to_vec() };
        let margins = if self.margins.is_empty() { vec![] } else { self.margins[at].to_vec() };
        Self {
            logp: of(&self.logp),
            reference: of(&self.reference),
            weights: of(&self.weights),
            margins,
            offsets: offsets.iter().map(|o| o - offsets[0]).collect(),
        }
    }

    fn counts(&self) -> PairCounts {
        let len = |w: &[u32]| f64::from(w[1] - w[0]);
        let chosen_tokens = self.offsets.windows(2).step_by(2).map(len).sum();
        PairCounts { pairs: (self.offsets.len() / 2) as f64, chosen_tokens }
    }

    fn loss(&self, s: &PreferenceLoss) -> (PreferenceSums, Vec<F>) {
        self.loss_on(host(), 0, s, self.counts()).unwrap()
    }

    /// The same of columns that begin `first` elements into their memory.
    fn loss_on(
        &self,
        dev: &Device,
        first: usize,
        s: &PreferenceLoss,
        of: PairCounts,
    ) -> warpo::Result<(PreferenceSums, Vec<F>)> {
        let columns = [&self.logp, &self.reference, &self.weights, &self.margins];
        let [logp, reference, weights, margins] = columns.map(|x| Column::of(dev, first, x));
        let offsets = Buffer::of(dev, "offsets", &self.offsets)?;
        let mut d = Column::room(dev, first, self.logp.len());
        let there = |c: &'_ Column<F>| !c.view().is_empty();
        let columns = SequenceColumns {
            logp: logp.view(),
            ref_logp: there(&reference).then(|| reference.view()),
            weights: there(&weights).then(|| weights.view()),
            offsets: Offsets { host: &self.offsets, view: offsets.view() },
        };
        let margins = there(&margins).then(|| margins.view());
        let sums = preference_loss::forward(dev, d.view_mut(), columns, margins, s, of)?.get()?;
        Ok((sums, d.read()))
    }
}

fn list(s: &PreferenceSums) -> [f64; 8] {
    let rewards = [s.chosen_reward, s.rejected_reward, s.chosen_logp, s.rejected_logp];
    let [a, b, c, d] = rewards;
    [s.pairs, s.loss, s.right, a, b, c, d, s.weight]
}

/// Two tokens of the chosen, one of the rejected completion, with log-ratios of ln 3 / 2 and
/// -ln 3 / 2.
#[test]
fn hand_worked() {
    let third = 3f64.ln() / 2.0;
    let pair = Completions {
        logp: vec![-1.0, -2.0, -3.0],
        reference: vec![-1.0 - third, -2.0 - third, -3.0 + third],
        weights: vec![],
        margins: vec![],
        offsets: vec![0, 2, 3],
    };
    // D = 3/2 ln 3, z = ln 3 at beta 2/3; S(z) = 3/4
    let s = PreferenceLoss { beta: 2.0 / 3.0, sft_coef: 0.5, ..one(Sigmoid) };
    let (sums, d) = pair.loss(&s);
    assert_close("loss", &[sums.loss], &[(4f64 / 3.0).ln() + 0.5 * 1.5], 0.0, 1e-15);
    // -beta S(-z) for the chosen; the SFT term adds -0.5 / 2
    assert_close("d", &d, &[-1.0 / 6.0 - 0.25, -1.0 / 6.0 - 0.25, 1.0 / 6.0], 1e-15, 0.0);
    let rewards = [sums.chosen_reward, sums.rejected_reward, sums.right];
    assert_close("rewards", &rewards, &[4.0 / 3.0 * third, -2.0 / 3.0 * third, 1.0], 0.0, 1e-15);
    assert_eq!((sums.chosen_logp, sums.rejected_logp, sums.weight), (-3.0, -3.0, 1.0));
    // the margin takes all of z; means over tokens; half the weight on the second token
    let own = Completions { margins: vec![3f64.ln()], ..pair.clone() };
    // z = 0.1 * 3/2 ln 3 - ln 3
    let loss = (1.0 + (0.85 * 3f64.ln()).exp()).ln();
    assert_close("margin", &[own.loss(&one(Sigmoid)).0.loss], &[loss], 0.0, 1e-15);
    let (sums, d) = pair.loss(&PreferenceLoss { beta: 1.0, ..one(SigmoidNorm) });
    assert_close("means", &[sums.loss], &[(4f64 / 3.0).ln()], 0.0, 1e-15);
    assert_close("means", &d, &[-0.125, -0.125, 0.25], 1e-15, 0.0);
    let weighted = Completions { weights: vec![1.0, 0.0, 1.0], ..pair };
    let (sums, d) = weighted.loss(&PreferenceLoss { beta: 1.0, ..one(Sigmoid) });
    assert_close("weights", &[sums.loss], &[(4f64 / 3.0).ln()], 0.0, 1e-15);
    assert_close("weights", &d, &[-0.25, 0.0, 0.25], 1e-15, 0.0);
    let none = Completions::<f64>::random(&[]).loss(&s);
    assert_eq!(none, (PreferenceSums::default(), vec![]));
}

/// The rows of the golden file that are a loss of pairs, and the loss here. Ranks and unpaired
/// rows are tested with their algorithms.
fn rows() -> Vec<(&'static str, PreferenceLoss, bool)> {
    let d = |divergence| PreferenceLoss { divergence, ..one(Sigmoid) };
    let smooth = |e, loss| PreferenceLoss { label_smoothing: e, ..loss };
    let sft = |sft_coef, loss| PreferenceLoss { sft_coef, ..loss };
    let simpo = || PreferenceLoss { beta: 2.0, margin: 1.0, ..one(SigmoidNorm) };
    let alphapo = PreferenceLoss { divergence: Divergence::Alpha(0.75), ..simpo() };
    let none = PreferenceLoss { terms: vec![], ..one(Sigmoid) };
    vec![
        ("sigmoid", one(Sigmoid), true),
        ("sigmoid_label_smoothing", smooth(0.1, one(Sigmoid)), true),
        ("sigmoid_norm", one(SigmoidNorm), true),
        ("hinge", one(Hinge), true),
        ("ipo_trl", one(Ipo), true),
        ("ipo_openrlhf", one(IpoSum), true),
        ("robust", smooth(0.1, one(Robust)), true),
        ("exo_pair", one(ExoPair), true),
        ("nca_pair", one(NcaPair), true),
        ("bco_pair", one(BcoPair), true),
        ("sppo_hard", one(SppoHard), true),
        ("apo_zero", one(ApoZero), true),
        ("apo_down", one(ApoDown), true),
        ("discopop", one(Discopop), true),
        ("sft", sft(1.0, none), true),
        ("sigmoid_plus_sft", sft(0.5, one(Sigmoid)), true),
        ("f_forward_kl", d(Divergence::ForwardKl), true),
        ("f_js_divergence", d(Divergence::JensenShannon), true),
        ("f_alpha_divergence_half", d(Divergence::Alpha(0.5)), true),
        ("f_alpha_divergence_2", d(Divergence::Alpha(2.0)), true),
        ("wpo_plain", PreferenceLoss { wpo: true, ..one(Sigmoid) }, true),
        ("reference_free", one(Sigmoid), false),
        ("simpo", simpo(), false),
        ("simpo_label_smoothing", smooth(0.1, simpo()), false),
        ("alphapo", alphapo, false),
        ("cpo", sft(1.0, one(Sigmoid)), false),
        ("cpo_simpo", sft(1.0, simpo()), false),
        ("cpo_hinge", sft(1.0, one(Hinge)), false),
        ("cpo_ipo", sft(1.0, one(Ipo)), false),
        ("orpo", sft(1.0, one(OddsRatio)), false),
        ("slic", PreferenceLoss { beta: 1.0, ..one(Hinge) }, false),
    ]
}

#[test]
fn losses_and_gradients_are_those_of_other_systems() {
    let g = Golden::open("pure/preference.safetensors");
    for seed in ["s0", "s7"] {
        let masks = ["chosen", "rejected"].map(|side| {
            let mask = g.get(&format!("{seed}/pref_in/{side}_mask"));
            mask.iter().map(|m| *m == 1.0).collect::<Vec<bool>>()
        });
        // The rows of both sides without padding, side by side.
        let packed = |chosen: &str, rejected: &str| -> Vec<f64> {
            let sides = [(chosen, &masks[0]), (rejected, &masks[1])];
            let rows = |(key, mask): (&str, &Vec<bool>)| -> Vec<Vec<f64>> {
                let x = g.get(&format!("{seed}/{key}"));
                let kept = |(x, m): (&[f64], &[bool])| {
                    x.iter().zip(m).filter(|x| *x.1).map(|x| *x.0).collect()
                };
                x.chunks(9).zip(mask.chunks(9)).map(kept).collect()
            };
            let [chosen, rejected] = sides.map(rows);
            chosen.iter().zip(&rejected).flat_map(|(c, r)| [&c[..], r].concat()).collect()
        };
        let lens = masks.each_ref().map(|mask| {
            mask.chunks(9).map(|m| m.iter().filter(|m| **m).count() as u32).collect::<Vec<u32>>()
        });
        let lens = lens[0].iter().zip(&lens[1]).flat_map(|(c, r)| [*c, *r]);
        let mut offsets = vec![0];
        lens.for_each(|n| offsets.push(offsets[offsets.len() - 1] + n));
        let reference = packed("pref_in/ref_chosen", "pref_in/ref_rejected");
        for (row, s, with_reference) in rows() {
            let completions = Completions {
                logp: packed("pref_in/chosen", "pref_in/rejected"),
                reference: if with_reference { reference.clone() } else { vec![] },
                weights: vec![],
                margins: vec![],
                offsets: offsets.clone(),
            };
            let (sums, d) = completions.loss(&s);
            let what = format!("{seed} {row}");
            let want = g.scalar(&format!("{seed}/pref/{row}/loss"));
            assert_close(&what, &[sums.loss], &[want], 1e-12, 1e-12);
            let [chosen, rejected] =
                ["d_chosen", "d_rejected"].map(|key| format!("pref/{row}/{key}"));
            assert_close(&what, &d, &packed(&chosen, &rejected), 1e-13, 1e-12);
        }
    }
}

/// Settings that change the formula, every kind among them.
fn all_settings() -> Vec<PreferenceLoss> {
    let mut all: Vec<PreferenceLoss> = KINDS.map(one).to_vec();
    let smooth = [Sigmoid, SigmoidNorm, Robust, ExoPair];
    all.extend(smooth.map(|k| PreferenceLoss { label_smoothing: 0.2, margin: 0.3, ..one(k) }));
    let divergences = [Divergence::ForwardKl, Divergence::JensenShannon, Divergence::Alpha(0.3)];
    all.extend(divergences.map(|divergence| PreferenceLoss { divergence, ..one(SigmoidNorm) }));
    let terms = vec![(Sigmoid, 0.8), (BcoPair, 0.2), (Ipo, 0.5)];
    all.push(PreferenceLoss { terms, sft_coef: 0.7, beta: 0.3, ..PreferenceLoss::default() });
    all
}

#[test]
fn gradients() {
    for s in all_settings() {
        let full = Completions::<f64>::random(&[3, 1, 1, 4, 5, 2]);
        for c in [full.clone(), full.plain()] {
            let c = if s.terms[0].0 == OddsRatio { without_reference(&c) } else { c };
            let d = c.loss(&s).1;
            let f = |logp: &[f64]| Completions { logp: logp.to_vec(), ..c.clone() }.loss(&s).0.loss;
            gradcheck(&format!("{s:?}"), &c.logp, &d, OP, f);
        }
    }
}

/// The weight of WPO has no gradient, and leaves the SFT term as it is.
#[test]
fn weights_of_pairs_are_constants() {
    let c = Completions::<f64>::random(&[3, 1]).plain();
    let s = PreferenceLoss { wpo: true, sft_coef: 0.5, ..one(Sigmoid) };
    let (sums, d) = c.loss(&s);
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let weight = (mean(&c.logp[..3]) + mean(&c.logp[3..])).exp();
    assert!(weight < 0.9);
    assert_close("weight", &[sums.weight], &[weight], 0.0, 1e-14);
    let (plain, full) = c.loss(&one(Sigmoid));
    let sft = -0.5 * mean(&c.logp[..3]);
    assert_close("loss", &[sums.loss], &[weight * plain.loss + sft], 0.0, 1e-14);
    let want: Vec<f64> = full
        .iter()
        .enumerate()
        .map(|(t, d)| weight * d - if t < 3 { 0.5 / 3.0 } else { 0.0 })
        .collect();
    assert_close("d", &d, &want, 1e-15, 1e-13);
}

/// z from -1000 to 1000: no loss overflows that has no end of its own.
#[test]
fn neither_sign_overflows() {
    for (chosen, rejected) in [(-1e4, 0.0), (0.0, -1e4)] {
        for kind in KINDS.into_iter().filter(|k| *k != OddsRatio) {
            let c = Completions {
                logp: vec![chosen, rejected],
                reference: vec![0.0, 0.0],
                weights: vec![],
                margins: vec![],
                offsets: vec![0, 1, 2],
            };
            let (sums, d) = c.loss(&one(kind));
            assert!(
                sums.loss.is_finite() && d.iter().all(|d: &f64| d.is_finite()),
                "{kind:?} {sums:?} {d:?}"
            );
        }
    }
}

/// Where the chosen completion is certain its odds have no end, and the gradient of ORPO has: at
/// p = 1 for the chosen one and b = ln 1/2 it is -beta / (2 . 1/2), and 0 for the other.
#[test]
fn a_certain_completion_has_a_gradient() {
    let c = Completions {
        logp: vec![0.0, -f64::ln(2.0)],
        reference: vec![],
        weights: vec![],
        margins: vec![],
        offsets: vec![0, 1, 2],
    };
    let (sums, d) = c.loss(&PreferenceLoss { beta: 0.3, ..one(OddsRatio) });
    assert_close("loss", &[sums.loss], &[0.0], 0.0, 0.0);
    assert_close("d", &d, &[-0.3, 0.0], 0.0, 1e-15);
}

#[test]
fn micro_batches_add_up() {
    let c = Completions::<f32>::random(&[3, 1, 1, 4, 5, 2, 7, 7, 2, 2]);
    for s in all_settings().into_iter().filter(|s| s.terms[0].0 != OddsRatio) {
        let (whole, d) = c.loss(&s);
        for cut in [0, 1, 3, 5] {
            let part = |at| c.pairs(at).loss_on(host(), 0, &s, c.counts()).unwrap();
            let ((mut sums, low), (rest, high)) = (part(0..cut), part(cut..5));
            sums.merge(&rest);
            assert_bits(&format!("{cut} {s:?}"), &[low, high].concat(), &d);
            assert_close(&format!("{cut} {s:?}"), &list(&sums), &list(&whole), 1e-13, 1e-13);
        }
    }
}

#[test]
fn a_nan_stays_in_its_pair() {
    let all = Completions::<f32>::random(&[3, 1, 2, 4, 5, 2]);
    for s in all_settings() {
        let odds = s.terms[0].0 == OddsRatio;
        let clean = if odds { without_reference(&all) } else { all.clone() };
        let want = clean.loss(&s).1;
        let spoil: [fn(&mut Completions<f32>); 3] =
            [|c| c.logp[5] = f32::NAN, |c| c.logp[6] = f32::NAN, |c| c.reference[7] = f32::NAN];
        for spoil in spoil.into_iter().take(if odds { 2 } else { 3 }) {
            let mut c = clean.clone();
            spoil(&mut c);
            let (sums, d) = c.loss(&s);
            assert!(sums.loss.is_nan(), "{s:?}");
            // The slope of a hinge is a constant.
            let hinge = s.terms[0].0 == Hinge;
            assert!(hinge || d[4..10].iter().any(|d| d.is_nan()), "{s:?} {d:?}");
            assert_bits(&format!("{s:?}"), &d[..4], &want[..4]);
            assert_bits(&format!("{s:?}"), &d[10..], &want[10..]);
        }
    }
    let (s, mut c) = (one(Sigmoid), all);
    let want = c.loss(&s).1;
    c.margins[1] = f32::NAN;
    assert_nan_only("margins", &c.loss(&s).1, &want, 4..10);
}

/// Odds are of probabilities: their log has to stay below 0.
fn without_reference<F: Float>(c: &Completions<F>) -> Completions<F> {
    Completions { reference: vec![], ..c.clone().plain() }
}

struct Compared<'a> {
    columns: &'a Completions<f32>,
    first: usize,
    settings: &'a PreferenceLoss,
}

impl FloatCase for Compared<'_> {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let of = |x: &[f32]| x.iter().map(|x| F::of(f64::from(*x))).collect();
        let c = self.columns;
        let columns = Completions {
            logp: of(&c.logp),
            reference: of(&c.reference),
            weights: of(&c.weights),
            margins: of(&c.margins),
            offsets: c.offsets.clone(),
        };
        let (sums, d) = columns.loss_on(lab.dev(), self.first, self.settings, c.counts())?;
        lab.sums("sums", &list(&sums));
        lab.column("dlogp", &d);
        Ok(())
    }
}

/// No pairs, one, more than there are blocks; completions of a token, of those around a block's
/// threads, of three blocks; columns that begin anywhere; every setting that changes the formula.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        let s = PreferenceLoss { sft_coef: 0.5, wpo: true, ..one(Sigmoid) };
        let many: Vec<usize> = (0..2 * 515).map(|i| 1 + i % 3).collect();
        for (first, lens) in
            [(0, &[][..]), (1, &[1, 1]), (3, &[255, 256, 257, 1]), (2, &[1, 770]), (0, &many)]
        {
            sim.hold_f32(&Compared { columns: &Completions::random(lens), first, settings: &s });
        }
        for s in &all_settings() {
            let columns = Completions::random(&[3, 1, 2, 40, 5, 2]);
            let odds = s.terms[0].0 == OddsRatio;
            let columns = if odds { without_reference(&columns) } else { columns };
            sim.hold_f32(&Compared { columns: &columns, first: 1, settings: s });
        }
    });
}

/// Far on both sides, ties, and a NaN: the branches of the CPU; and f64 has no kernel.
#[test]
fn kernels_take_the_branches_of_the_cpu() {
    sim::check(|sim| {
        let dev = sim.device(sim.orders()[1]);
        let mut c = Completions::<f32>::random(&[1, 1, 1, 1, 1, 1, 2, 1]).plain();
        c.logp = vec![-2e3, -1.0, -1.0, -2e3, -1.0, -1.0, -1.0, -1.0, -1.0];
        c.reference = vec![0.0; 9];
        for kind in KINDS.into_iter().filter(|k| *k != OddsRatio) {
            let (want, d) = c.loss(&one(kind));
            let (got, ours) = c.loss_on(&dev, 0, &one(kind), c.counts()).unwrap();
            assert_close(&format!("{kind:?}"), &list(&got), &list(&want), 0.0, 1e-14);
            let d: Vec<f64> = d.iter().map(|d| f64::from(*d)).collect();
            assert_close(&format!("{kind:?}"), &ours, &d, 0.0, 2e-7);
            assert_eq!(got.right, 1.0, "{kind:?}: a tie is not right");
            let mut bad = c.clone();
            bad.logp[2] = f32::NAN;
            let (sums, _) = bad.loss_on(&dev, 0, &one(kind), c.counts()).unwrap();
            assert!(sums.loss.is_nan(), "{kind:?}");
        }
        let wide = Completions::<f64>::random(&[1, 1]);
        let says =
            "device `cuda` is not available: `preference_loss_forward` has no kernel for F64";
        assert_eq!(refusal(wide.loss_on(&dev, 0, &one(Sigmoid), wide.counts())), says);
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let good = Completions::<f32>::random(&[2, 1, 1, 3]);
    let says = |c: &Completions<f32>, s| refusal(c.loss_on(host(), 0, s, good.counts()));
    let s = one(Sigmoid);
    let shape = |c: Completions<f32>| says(&c, &s);
    assert_eq!(
        shape(Completions { reference: vec![0.0; 6], ..good.clone() }),
        "preference_loss: `ref_logp` has shape [6], wanted [7]"
    );
    assert_eq!(
        shape(Completions { weights: vec![0.0; 8], ..good.clone() }),
        "preference_loss: `weights` has shape [8], wanted [7]"
    );
    assert_eq!(
        shape(Completions { margins: vec![0.0], ..good.clone() }),
        "preference_loss: `margins` has shape [1], wanted [2]"
    );
    assert_eq!(
        shape(Completions { offsets: vec![0, 2, 3, 7], ..good.clone() }),
        "preference_loss: `sequences` has shape [3], wanted [1, 2]"
    );
    assert_eq!(
        shape(Completions { offsets: vec![0, 2, 1, 4, 7], ..good.clone() }),
        "preference_loss: offsets: got 1 after 2, wanted ascending numbers"
    );
    assert_eq!(
        shape(Completions { offsets: vec![0, 2, 3, 4, 6], ..good.clone() }),
        "preference_loss: offsets: got Some(0) to Some(6), wanted 0 to 7"
    );
    let four = PreferenceLoss { terms: vec![(Sigmoid, 1.0); 4], ..s.clone() };
    assert_eq!(says(&good, &four), "preference_loss: kinds: got 4, wanted at most 3");
}
