//! The policy loss of PPO: hand-worked branches, central differences, micro-batches, and TRL's
//! whole chain from log-probs to gradients; its relatives are in `policy_loss/surrogates.rs`.

mod surrogates;

use warpo::{
    device::{Buffer, Device, Float},
    ops::{
        gae,
        kl::KlEstimator::{self, K1, K2, K3},
        policy_loss::{
            self, KlTerm, KlWeight, PolicyLoss, PolicySums, PolicyTokens, RatioLevel, Surrogate,
        },
        sequence_loss::Offsets,
        value_loss::{self, ValueLoss, ValueTokens},
        whiten::{self, Moments, Variance},
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only, gather,
    golden::Golden,
    gradcheck, host, narrow, randn, refusal, shuffled,
    sim::{self, Column, FloatCase, Lab},
    wide,
};

const PLAIN: PolicyLoss = clip(0.2, 0.3, None);

const fn clip(low: f64, high: f64, dual: Option<f64>) -> PolicyLoss {
    let (surrogate, ratio) = (Surrogate::Clip { low, high, dual }, RatioLevel::Token);
    PolicyLoss { surrogate, ratio, sequence_means: false, kl: None, entropy_coef: 0.0 }
}

fn kl(coef: f64, estimator: KlEstimator, weight: KlWeight) -> Option<KlTerm> {
    Some(KlTerm { coef, estimator, weight })
}

/// Columns of a micro-batch.
#[derive(Clone)]
struct Columns<F> {
    logp: Vec<F>,
    old: Vec<F>,
    reference: Vec<F>,
    entropy: Vec<F>,
    advantages: Vec<F>,
    offsets: Vec<u32>,
}

impl<F: Float> Columns<F> {
    /// Two sequences.
    fn random(n: usize) -> Self {
        let (old, moved): (Vec<F>, Vec<F>) = (randn("old", n), randn("moved", n));
        let logp = old.iter().zip(&moved).map(|(o, m)| *o + F::of(0.4) * *m).collect();
        let [reference, entropy, advantages] = ["ref", "entropy", "adv"].map(|s| randn(s, n));
        let offsets = vec![0, n as u32 / 3, n as u32];
        Self { logp, old, reference, entropy, advantages, offsets }
    }

    fn map<G>(&self, f: impl Fn(&[F]) -> Vec<G>) -> Columns<G> {
        Columns {
            logp: f(&self.logp),
            old: f(&self.old),
            reference: f(&self.reference),
            entropy: f(&self.entropy),
            advantages: f(&self.advantages),
            offsets: self.offsets.clone(),
        }
    }

    /// The same in one sequence, of which `f` may keep some tokens.
    fn cut<G>(&self, f: impl Fn(&[F]) -> Vec<G>) -> Columns<G> {
        let c = self.map(f);
        Columns { offsets: vec![0, c.logp.len() as u32], ..c }
    }

    /// PolicySums, dlogp and dentropy.
    fn policy(&self, s: &PolicyLoss, n: f64) -> (PolicySums, Vec<F>, Vec<F>) {
        self.policy_on(host(), 0, s, n).unwrap()
    }

    /// The same of columns that begin `first` elements into their memory; what is empty is not
    /// there.
    fn policy_on(
        &self,
        dev: &Device,
        first: usize,
        s: &PolicyLoss,
        n: f64,
    ) -> warpo::Result<(PolicySums, Vec<F>, Vec<F>)> {
        let column = |x: &Vec<F>| Column::of(dev, first, x);
        let [logp, old, adv] = [&self.logp, &self.old, &self.advantages].map(column);
        let [reference, entropy] = [&self.reference, &self.entropy].map(column);
        let offsets = Buffer::of(dev, "offsets", &self.offsets)?;
        let there = |c: &'_ Column<F>| !c.view().is_empty();
        let mut dlogp = Column::room(dev, first, self.logp.len());
        let mut dentropy = Column::room(dev, first, self.entropy.len());
        let tokens = PolicyTokens {
            logp: logp.view(),
            old_logp: old.view(),
            ref_logp: there(&reference).then(|| reference.view()),
            entropy: there(&entropy).then(|| entropy.view()),
            advantages: adv.view(),
            weights: None,
            offsets: Offsets { host: &self.offsets, view: offsets.view() },
        };
        let (d, dent) = (dlogp.view_mut(), there(&entropy).then(|| dentropy.view_mut()));
        let stats = policy_loss::forward(dev, d, dent, tokens, s, n)?.get()?;
        Ok((stats, dlogp.read(), dentropy.read()))
    }
}

/// One token of ratio `ratio` whose probability is a fifth of the reference's.
fn token(ratio: f64, advantage: f64) -> Columns<f64> {
    Columns {
        logp: vec![ratio.ln()],
        old: vec![0.0],
        reference: vec![ratio.ln() + 5f64.ln()],
        entropy: vec![7.0],
        advantages: vec![advantage],
        offsets: vec![0, 1],
    }
}

#[test]
fn hand_worked() {
    let dual = clip(0.2, 0.3, Some(3.0));
    for (s, advantage, ratio, loss, slope, [low, high, bounded]) in [
        (&PLAIN, 2.0, 1.25, -2.5, -2.5, [0.0, 0.0, 0.0]),
        (&PLAIN, 2.0, 1.5, -2.6, 0.0, [0.0, 1.0, 0.0]), // no more than 1.3 is earned
        (&PLAIN, 2.0, 0.5, -1.0, -1.0, [0.0, 0.0, 0.0]), // the way back is free
        (&PLAIN, -2.0, 1.5, 3.0, 3.0, [0.0, 0.0, 0.0]),
        (&PLAIN, -2.0, 0.5, 1.6, 0.0, [1.0, 0.0, 0.0]), // no less than 0.8
        (&PLAIN, -2.0, 4.0, 8.0, 8.0, [0.0, 0.0, 0.0]),
        (&PLAIN, 0.0, 1.5, 0.0, 0.0, [0.0, 0.0, 0.0]), // a tie outside the range
        (&dual, -2.0, 4.0, 6.0, 0.0, [0.0, 0.0, 1.0]), // at most 3 * 2
        (&dual, -2.0, 2.5, 5.0, 5.0, [0.0, 0.0, 0.0]),
        (&dual, -2.0, 0.5, 1.6, 0.0, [1.0, 0.0, 0.0]),
        (&dual, 2.0, 4.0, -2.6, 0.0, [0.0, 1.0, 0.0]), // only where the advantage is negative
    ] {
        let what = format!("A {advantage}, ratio {ratio}, {:?}", s.surrogate);
        let (stats, d, dentropy) = token(ratio, advantage).policy(s, 4.0);
        assert_close(&what, &[stats.policy, 4.0 * stats.loss], &[loss, loss], 0.0, 1e-15);
        assert_close(&what, &d, &[slope / 4.0], 0.0, 1e-15);
        let counts = [stats.clipped_low, stats.clipped_high, stats.dual_clipped];
        assert_eq!(counts, [low, high, bounded], "{what}");
        assert_close(&what, &[stats.approx_kl], &[ratio - 1.0 - ratio.ln()], 1e-15, 1e-15);
        assert_eq!(stats.max_log_ratio, ratio.ln().abs(), "{what}");
        assert_eq!(
            (stats.tokens, stats.kl, stats.entropy, &dentropy[..]),
            (1.0, 0.0, 7.0, &[0.0][..])
        );
    }
    // On the border of the range the gradient is whole: 1 + (e^0.5 - 1) is e^0.5 exactly.
    let edge = clip(0.2, 0.5f64.exp() - 1.0, None);
    let (stats, d, _) = Columns { logp: vec![0.5], ..token(1.0, 2.0) }.policy(&edge, 1.0);
    assert_eq!((stats.clipped_high, d[0]), (0.0, -2.0 * 0.5f64.exp()));
    let nothing = token(1.0, 1.0).cut(|_| Vec::<f64>::new());
    assert_eq!(nothing.policy(&PLAIN, 1.0).0, PolicySums::default());
}

#[test]
fn kl_and_entropy_terms_are_added() {
    let (ln5, ratio) = (5f64.ln(), 1.25);
    for (estimator, k, dk) in [(K1, -ln5, 1.0), (K2, ln5 * ln5 / 2.0, -ln5), (K3, 4.0 - ln5, -4.0)]
    {
        for (weight, term, slope) in [
            (KlWeight::One, k, dk),
            (KlWeight::Score, k, dk + k),
            (KlWeight::Ratio, ratio * k, ratio * (dk + k)),
        ] {
            let what = format!("{estimator:?} {weight:?}");
            let kl = kl(0.1, estimator, weight);
            let s = PolicyLoss { kl, entropy_coef: 0.01, ..PLAIN };
            let (stats, d, dentropy) = token(ratio, 2.0).policy(&s, 4.0);
            let loss = -2.5 + 0.1 * term - 0.01 * 7.0;
            assert_close(&what, &[4.0 * stats.loss], &[loss], 0.0, 1e-14);
            assert_close(&what, &d, &[(-2.5 + 0.1 * slope) / 4.0], 0.0, 1e-14);
            assert_close(&what, &[stats.policy, stats.kl], &[-2.5, k], 1e-14, 0.0);
            assert_close(&what, &dentropy, &[-0.0025], 0.0, 1e-15);
        }
    }
    // A clipped token still feels the KL.
    let kl = kl(0.1, K1, KlWeight::One);
    let d = token(1.5, 2.0).policy(&PolicyLoss { kl, ..PLAIN }, 1.0).1;
    assert_close("clipped", &d, &[0.1], 0.0, 1e-15);
}

#[test]
fn the_first_pass_has_ratio_1() {
    let mut c = Columns::<f32>::random(50);
    c.old = c.logp.clone();
    let (stats, d, _) = c.policy(&PLAIN, 50.0);
    assert_eq!((stats.approx_kl, stats.max_log_ratio), (0.0, 0.0));
    assert_eq!((stats.clipped_low, stats.clipped_high), (0.0, 0.0));
    let want: Vec<f32> = c.advantages.iter().map(|a| (-f64::from(*a) / 50.0) as f32).collect();
    assert_bits("the gradient is that of REINFORCE", &d, &want);
}

/// All settings that change the formula.
fn all_settings() -> Vec<PolicyLoss> {
    let mut all = Vec::new();
    for dual in [None, Some(1.5)] {
        let plain = clip(0.2, 0.3, dual);
        all.push(plain);
        for estimator in [K1, K2, K3] {
            for weight in [KlWeight::One, KlWeight::Ratio, KlWeight::Score] {
                let kl = kl(0.3, estimator, weight);
                all.push(PolicyLoss { kl, entropy_coef: 0.05, ..plain });
            }
        }
    }
    all
}

/// Its gradient is that of the value, of which a score has no derivative.
fn has_a_derivative(s: &PolicyLoss) -> bool {
    s.kl.is_none_or(|kl| kl.weight != KlWeight::Score)
}

#[test]
fn gradients() {
    let c = Columns::<f64>::random(60);
    for s in all_settings().into_iter().filter(has_a_derivative) {
        let what = format!("{s:?}");
        let (stats, d, dentropy) = c.policy(&s, 60.0);
        assert!(stats.clipped_low > 3.0 && stats.clipped_high > 3.0, "both sides are visited");
        let dual = matches!(s.surrogate, Surrogate::Clip { dual: Some(_), .. });
        assert_eq!(stats.dual_clipped > 0.0, dual);
        let loss = |logp: &[f64], entropy: &[f64]| {
            let c = Columns { logp: logp.to_vec(), entropy: entropy.to_vec(), ..c.clone() };
            c.policy(&s, 60.0).0.loss
        };
        gradcheck(&what, &c.logp, &d, OP, |logp| loss(logp, &c.entropy));
        gradcheck(&what, &c.entropy, &dentropy, OP, |entropy| loss(&c.logp, entropy));
    }
}

fn list(s: &PolicySums) -> [f64; 10] {
    let counts = [s.clipped_low, s.clipped_high, s.dual_clipped, s.approx_kl, s.max_log_ratio];
    let [a, b, c, d, e] = counts;
    [s.tokens, s.loss, s.policy, s.kl, s.entropy, a, b, c, d, e]
}

#[test]
fn micro_batches_add_up() {
    let c = Columns::<f32>::random(60);
    let order = shuffled("order", 60);
    for s in all_settings() {
        let (whole, d, _) = c.policy(&s, 60.0);
        for cut in [0, 1, 29, 60] {
            let (mut sum, low, _) = c.cut(|x| x[..cut].to_vec()).policy(&s, 60.0);
            let (rest, high, _) = c.cut(|x| x[cut..].to_vec()).policy(&s, 60.0);
            sum.merge(&rest);
            assert_bits(&format!("{cut} {s:?}"), &[low, high].concat(), &d);
            assert_close(&format!("{cut} {s:?}"), &list(&sum), &list(&whole), 1e-13, 1e-13);
        }
        let got = c.cut(|x| gather(x, 1, &order)).policy(&s, 60.0).1;
        assert_bits("permuted", &got, &gather(&d, 1, &order));
    }
}

#[test]
fn sums_are_made_in_f64() {
    let c = Columns::<f32>::random(60);
    let same = c.map(wide);
    for s in all_settings() {
        assert_eq!(c.policy(&s, 60.0).0, same.policy(&s, 60.0).0, "{s:?}");
    }
}

#[test]
fn a_nan_stays_in_its_token() {
    let kl = kl(0.3, K3, KlWeight::Ratio);
    let s = PolicyLoss { kl, entropy_coef: 0.1, ..clip(0.2, 0.3, Some(3.0)) };
    let clean = Columns::<f32>::random(9);
    let want = clean.policy(&s, 9.0).1;
    let spoil: [fn(&mut Columns<f32>); 4] = [
        |c| c.logp[4] = f32::NAN,
        |c| c.old[4] = f32::NAN,
        |c| c.reference[4] = f32::NAN,
        |c| c.advantages[4] = f32::NAN,
    ];
    for (i, spoil) in spoil.iter().enumerate() {
        let mut c = clean.clone();
        spoil(&mut c);
        let (stats, d, _) = c.policy(&s, 9.0);
        assert!(stats.loss.is_nan(), "column {i}");
        assert_nan_only(&format!("column {i}"), &d, &want, 4..5);
    }
    let mut c = clean.clone();
    c.entropy[4] = f32::NAN;
    assert!(c.policy(&s, 9.0).0.loss.is_nan(), "entropy");
}

/// The largest log-ratio used to forget a NaN when the next micro-batch was merged.
#[test]
fn a_nan_does_not_disappear_from_the_maximum() {
    let mut c = Columns::<f32>::random(9);
    let good = c.policy(&PLAIN, 9.0).0;
    for i in [0, 4, 8] {
        let old = std::mem::replace(&mut c.logp[i], f32::NAN);
        let bad = c.policy(&PLAIN, 9.0).0;
        c.logp[i] = old;
        assert!(bad.max_log_ratio.is_nan(), "token {i}");
        for (mut first, second) in [(bad, good), (good, bad)] {
            first.merge(&second);
            assert!(first.max_log_ratio.is_nan(), "token {i}, merged");
        }
    }
    let mut sum = PolicySums { max_log_ratio: 0.5, ..good };
    sum.merge(&PolicySums { max_log_ratio: 0.25, ..good });
    assert_eq!(sum.max_log_ratio, 0.5);
}

struct Policy<'a> {
    columns: &'a Columns<f32>,
    first: usize,
    settings: &'a PolicyLoss,
}

impl FloatCase for Policy<'_> {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let columns = self.columns.map(|x| x.iter().map(|x| F::of(f64::from(*x))).collect());
        let (stats, dlogp, dentropy) =
            columns.policy_on(lab.dev(), self.first, self.settings, 60.0)?;
        lab.sums("stats", &list(&stats));
        lab.column("dlogp", &dlogp);
        lab.column("dentropy", &dentropy);
        Ok(())
    }
}

/// No tokens, one, those around a thread's and around a block's, three blocks; columns that begin
/// at a packet and beside one; every setting that changes the formula, and a plain loss of three
/// columns.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        let shapes =
            [(0, 0), (0, 1), (1, 3), (0, 4), (0, 5), (1, 1023), (0, 1024), (2, 1025), (0, 2051)];
        let shapes = shapes.into_iter().chain(std::iter::repeat((1, 60)));
        for ((first, n), settings) in shapes.zip(&all_settings()) {
            sim.hold_f32(&Policy { columns: &Columns::random(n), first, settings });
        }
        let three = Columns { reference: vec![], entropy: vec![], ..Columns::random(60) };
        sim.hold_f32(&Policy { columns: &three, first: 0, settings: &PLAIN });
    });
}

/// On the bounds of the range and of dual clip, outside the range with an advantage of 0, with a
/// ratio of 1 that all machines compute alike: the bits of the CPU.
#[test]
fn kernels_take_the_branches_of_the_cpu() {
    sim::check(|sim| {
        let dev = sim.device(sim.orders()[1]);
        let mut c = Columns::<f32>::random(12);
        c.old = c.logp.clone();
        c.advantages = [-2.0, -1.0, 0.0, 0.5].repeat(3);
        let kl = kl(0.5, K2, KlWeight::Ratio);
        for (low, high, dual, kl) in [
            (0.0, 0.5, None, kl),
            (0.5, 0.0, None, kl),
            (0.5, -0.5, None, None),
            (0.0, 0.0, Some(1.0), kl),
        ] {
            let s = PolicyLoss { kl, entropy_coef: 0.25, ..clip(low, high, dual) };
            let (want, dlogp, dentropy) = c.policy(&s, 8.0);
            let (got, ours, ours_entropy) = c.policy_on(&dev, 1, &s, 8.0).unwrap();
            assert_bits("dlogp", &ours, &dlogp);
            assert_bits("dentropy", &ours_entropy, &dentropy);
            assert_close("stats", &list(&got), &list(&want), 1e-15, 1e-15);
            assert_eq!((got.approx_kl, got.max_log_ratio), (0.0, 0.0));
        }
        let says = "device `cuda` is not available: `policy_loss_forward` has no kernel for F64";
        assert_eq!(refusal(token(1.0, 1.0).policy_on(&dev, 0, &PLAIN, 1.0)), says);
    });
}

#[test]
fn kernels_keep_a_nan_in_the_maximum() {
    sim::check(|sim| {
        let dev = sim.device(sim.orders()[1]);
        let mut c = Columns::<f32>::random(1030);
        let clean = c.policy_on(&dev, 0, &PLAIN, 8.0).unwrap().1;
        for i in [0, 517, 1029] {
            let good = std::mem::replace(&mut c.logp[i], f32::NAN);
            let (stats, d, _) = c.policy_on(&dev, 0, &PLAIN, 8.0).unwrap();
            assert!(stats.max_log_ratio.is_nan() && stats.loss.is_nan(), "token {i}");
            assert_nan_only("dlogp", &d, &clean, i..i + 1);
            c.logp[i] = good;
        }
    });
}

#[test]
fn missing_and_wrong_columns_are_refused() {
    let (dev, x) = (Device::cpu(), [0.0f32; 3]);
    let kl = kl(0.1, K1, KlWeight::One);
    let all = PolicyLoss { kl, entropy_coef: 0.1, ..PLAIN };
    // lengths of old_logp, advantages, dlogp, dentropy; ref_logp, entropy
    let refused = |n: [usize; 4], optional: [Option<usize>; 2]| {
        let (mut d, mut dent) = ([0.0f32; 3], [0.0f32; 3]);
        let [reference, entropy] = optional.map(|n| n.map(|n| x[..n].into()));
        let tokens = PolicyTokens {
            logp: x[..].into(),
            old_logp: x[..n[0]].into(),
            ref_logp: reference,
            entropy,
            advantages: x[..n[1]].into(),
            weights: None,
            offsets: Offsets { host: &[0, 3], view: [0, 3][..].into() },
        };
        let (d, dent) = ((&mut d[..n[2]]).into(), Some((&mut dent[..n[3]]).into()));
        refusal(policy_loss::forward(&dev, d, dent, tokens, &all, 1.0))
    };
    let there = [Some(3), Some(3)];
    for (n, optional, says) in [
        ([2, 3, 3, 3], there, "`old_logp` has shape [2], wanted [3]"),
        ([3, 2, 3, 3], there, "`advantages` has shape [2], wanted [3]"),
        ([3, 3, 2, 3], there, "`dlogp` has shape [2], wanted [3]"),
        ([3, 3, 3, 2], there, "`dentropy` has shape [2], wanted [3]"),
        ([3; 4], [None, Some(3)], "`ref_logp` has shape [0], wanted [3]"),
        ([3; 4], [Some(2), Some(3)], "`ref_logp` has shape [2], wanted [3]"),
        ([3; 4], [Some(3), None], "`entropy` has shape [0], wanted [3]"),
        ([3; 4], [Some(3), Some(2)], "`entropy` has shape [2], wanted [3]"),
    ] {
        assert_eq!(refused(n, optional), format!("policy_loss: {says}"));
    }
    // Entropies are summed without a bonus, too.
    let mut c = Columns::<f32>::random(3);
    c.entropy.truncate(2);
    let e = refusal(c.policy_on(&dev, 0, &PLAIN, 1.0));
    assert_eq!(e, "policy_loss: `entropy` has shape [2], wanted [3]");
}

/// One variant of TRL's PPO, from log-probs and scores to gradients. TRL keeps the value after the
/// last token where there is room, and puts the score there: its sequences of values are `longer`
/// than the responses by one.
fn chain(g: &Golden, tag: &str, estimator: KlEstimator, whitened: bool, gamma: f64) {
    let dev = Device::cpu();
    let get = |key: &str| g.get(&format!("{tag}/{key}"));
    let (last, cols) = (g.ints("seq_last"), g.shape("old_logp")[1]);
    let mask = |extra: i64| -> Vec<bool> {
        last.iter().flat_map(|l| (0..cols as i64).map(move |t| t <= l + extra)).collect()
    };
    let (valid, longer) = (mask(0), mask(1));
    let bools = |x: &[f64]| x.iter().map(|x| *x == 1.0).collect::<Vec<bool>>();
    assert_eq!((bools(get("valid")), bools(get("valid_p1"))), (valid.clone(), longer.clone()));
    let slots: Vec<f64> = last.iter().map(|l| (l + 1).min(cols as i64 - 1) as f64).collect();
    assert_eq!(get("reward_slot"), slots);
    let close = |key: &str, got: &[f64], mask: &[bool]| {
        let what = format!("{tag}/{key}");
        assert_close(&what, got, &g.kept(&what, mask), 1e-13, 1e-13);
        let rest: Vec<bool> = mask.iter().map(|m| !m).collect();
        let outside = if key == "ratio" { 1.0 } else { 0.0 };
        assert!(g.kept(&what, &rest).iter().all(|x| *x == outside), "{what}: padding");
    };

    let [old, reference, new] = ["old_logp", "ref_logp", "new_logp"].map(|key| g.kept(key, &valid));
    let kl: Vec<f64> = old.iter().zip(&reference).map(|(a, b)| estimator.value(*a, *b)).collect();
    close("kl", &kl, &valid);

    let (mut rewards, mut offsets, mut t) = (Vec::new(), vec![0], 0);
    for (row, l) in last.iter().enumerate() {
        let n = *l as usize + 1;
        rewards.extend(kl[t..t + n].iter().map(|k| -0.05 * k));
        rewards.extend((n < cols).then_some(0.0));
        *rewards.last_mut().unwrap() += g.get("scores")[row];
        offsets.push(rewards.len() as u32);
        t += n;
    }
    if whitened {
        let m = Moments::of(&dev, (&rewards).into()).unwrap();
        let rewards = (&mut rewards).into();
        whiten::apply(&dev, rewards, &m, false, Variance::Unbiased, 1e-8).unwrap();
    }
    close("rewards", &rewards, &longer);
    let old_values = g.kept("old_values", &longer);
    close("values", &old_values, &longer);
    let nan = vec![f64::NAN; rewards.len()];
    let (mut raw, mut returns) = (nan.clone(), nan);
    let (a, r, v) = ((&mut raw).into(), (&mut returns).into(), (&old_values).into());
    let of = gae::RewardColumns {
        rewards: (&rewards).into(),
        values: v,
        offsets: (&offsets).into(),
        gamma,
        lambda: 0.95,
    };
    gae::forward(&dev, a, r, of).unwrap();
    close("raw_advantages", &raw, &longer);
    close("returns", &returns, &longer);
    let both = longer.iter().zip(&valid).filter(|m| *m.0).map(|m| *m.1);
    let mut advantages: Vec<f64> = raw.iter().zip(both).filter(|x| x.1).map(|x| *x.0).collect();
    let m = Moments::of(&dev, (&advantages).into()).unwrap();
    let a = (&mut advantages).into();
    whiten::apply(&dev, a, &m, true, Variance::Unbiased, 1e-8).unwrap();
    close("advantages", &advantages, &valid);

    let offsets = vec![0, new.len() as u32];
    let c = Columns { logp: new, old, reference, entropy: kl.clone(), advantages, offsets };
    let s = clip(0.2, 0.2, None);
    let n = c.logp.len() as f64;
    let (p, dlogp, _) = c.policy(&s, n);
    close("d_new_logp", &dlogp, &valid);
    let vpred = g.kept("vpred", &longer);
    let mut dv = vec![f64::NAN; vpred.len()];
    let (d, v, old, r) =
        ((&mut dv).into(), (&vpred).into(), (&old_values).into(), (&returns).into());
    let tokens = vpred.len() as f64;
    let t = ValueTokens { v, old, returns: r, weights: None };
    let clipped = ValueLoss { clip: Some(0.2), coef: 0.1 };
    let v = value_loss::forward(&dev, d, t, clipped, tokens).unwrap().get().unwrap();
    close("d_vpred", &dv, &longer);
    // The ratio is the slope of the unclipped loss at advantage -1.
    let free = clip(1.0, f64::INFINITY, None);
    let unit = Columns { advantages: vec![-1.0; c.logp.len()], ..c.clone() };
    close("ratio", &unit.policy(&free, 1.0).1, &valid);
    // TRL's approxkl is k2, over all cells, padding too.
    let k2: f64 = c.logp.iter().zip(&c.old).map(|(a, b)| K2.value(*a, *b)).sum();
    for (key, got) in [
        ("pg_loss", p.policy / n),
        ("vf_loss", v.loss / 0.1),
        ("loss", p.loss + v.loss),
        ("pg_clipfrac", (p.clipped_low + p.clipped_high) / n),
        ("vf_clipfrac", v.clipped / tokens),
        ("approxkl", k2 / valid.len() as f64),
    ] {
        assert_close(&format!("{tag}/{key}"), &[got], get(key), 1e-14, 1e-13);
    }

    // f32: the gradients of the rounded columns against a plain version.
    let c = Columns {
        logp: narrow(&c.logp),
        old: narrow(&c.old),
        reference: vec![],
        entropy: narrow(&c.entropy),
        advantages: narrow(&c.advantages),
        offsets: c.offsets,
    };
    let dlogp = c.policy(&s, n).1;
    let plain = (0..c.logp.len()).map(|i| {
        let (a, ratio) = (c.advantages[i], (c.logp[i] - c.old[i]).exp());
        let (free, bound) = (-a * ratio, -a * ratio.clamp(0.8, 1.2));
        if free >= bound { free / n as f32 } else { 0.0 }
    });
    let plain: Vec<f32> = plain.collect();
    let truth = g.kept(&format!("{tag}/d_new_logp"), &valid);
    assert_earned(&format!("{tag}/d_new_logp"), &dlogp, &plain, &truth);
    let [v, old, r] = [&vpred, &old_values, &returns].map(|x| narrow(x));
    let plain = (0..v.len()).map(|i| {
        let bound = v[i].clamp(old[i] - 0.2, old[i] + 0.2);
        let (free, clipped) = ((v[i] - r[i]).powi(2), (bound - r[i]).powi(2));
        if free >= clipped { 0.1 * (v[i] - r[i]) / tokens as f32 } else { 0.0 }
    });
    let plain: Vec<f32> = plain.collect();
    let mut dv = vec![f32::NAN; v.len()];
    let (d, v, old, r) = ((&mut dv).into(), (&v).into(), (&old).into(), (&r).into());
    let t = ValueTokens { v, old, returns: r, weights: None };
    value_loss::forward(&dev, d, t, clipped, tokens).unwrap().get().unwrap();
    let truth = g.kept(&format!("{tag}/d_vpred"), &longer);
    assert_earned(&format!("{tag}/d_vpred"), &dv, &plain, &truth);
}

#[test]
fn the_whole_chain_is_that_of_trl() {
    let g = Golden::open("pure/ppo.safetensors");
    chain(&g, "default", K1, false, 1.0);
    chain(&g, "k3", K3, false, 1.0);
    chain(&g, "k1_whiten", K1, true, 1.0);
    chain(&g, "k3_whiten_g099", K3, true, 0.99);
    g.all_read(&[]);
}
