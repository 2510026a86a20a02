//! The relatives of PPO's clipped loss, of tokens and of sequences: the values and gradients of
//! TRL, verl, OpenRLHF, NeMo RL, prime-rl, SkyRL and open-instruct, hand-worked sequences,
//! derivatives, kernels.

use warpo::{
    device::{Float, View},
    ops::{
        kl::KlEstimator::{K1, K2, K3},
        policy_loss::{
            self, Distance, KlWeight, PolicyLoss, PolicySums, PolicyTokens,
            RatioLevel::{self, Sequence, SequenceSum},
            Surrogate::{self, Cispo, Dppo, DppoRatio, Gmpo, Likelihood, Sapo, Vespo},
        },
        sequence_loss::Offsets,
    },
};

use super::{Columns, clip, kl, list};
use crate::support::{
    OP, assert_bits, assert_close, assert_nan_only,
    golden::Golden,
    gradcheck, host, randn,
    sim::{self, FloatCase, Lab},
};

fn of(surrogate: Surrogate) -> PolicyLoss {
    PolicyLoss { surrogate, ..PolicyLoss::default() }
}

fn at(ratio: RatioLevel, s: PolicyLoss) -> PolicyLoss {
    PolicyLoss { ratio, ..s }
}

/// The mean of the means of sequences.
fn means(s: PolicyLoss) -> PolicyLoss {
    PolicyLoss { sequence_means: true, ..s }
}

const SAPO: Surrogate = Sapo { positive: 1.0, negative: 1.05 };
const VESPO: Surrogate = Vespo { positive: [2.0, 3.0], negative: [3.0, 2.0] };

const fn tv(limit: f64, cap: f64) -> Surrogate {
    Dppo { distance: Distance::Tv, low: limit, high: limit, cap }
}

const fn through_ratio(limit: f64, square: f64) -> Surrogate {
    DppoRatio { low: limit, high: limit, square }
}

/// How a row of the golden file sums over sequences of the step.
enum Over {
    Tokens,
    Sequences,
}

/// The rows of the golden file, their advantages, and the loss here.
fn rows() -> Vec<(&'static str, &'static str, PolicyLoss, Over)> {
    use Over::{Sequences, Tokens};
    let ppo = clip(0.2, 0.2, None);
    let dual = clip(0.2, 0.2, Some(3.0));
    let with = |s, coef, estimator, weight| PolicyLoss { kl: kl(coef, estimator, weight), ..s };
    let cispo = |low, high| of(Cispo { low, high });
    let dppo_kl = of(Dppo { distance: Distance::Kl, low: 0.02, high: 0.02, cap: 20.0 });
    let gspo = means(at(Sequence, ppo));
    vec![
        ("trl/grpo", "trl_group", means(ppo), Sequences),
        ("trl/dapo", "trl_group", ppo, Tokens),
        ("trl/dapo_batch", "trl_batch", ppo, Tokens),
        ("trl/dapo_clip_higher", "trl_group", clip(0.2, 0.28, None), Tokens),
        ("trl/dapo_delta", "trl_group", clip(0.2, 0.2, Some(1.5)), Tokens),
        ("trl/dapo_beta", "trl_group", with(ppo, 0.04, K3, KlWeight::Ratio), Tokens),
        ("trl/dapo_beta_biased", "trl_group", with(ppo, 0.04, K3, KlWeight::One), Tokens),
        ("trl/gspo", "trl_group", means(at(Sequence, clip(3e-4, 4e-4, None))), Sequences),
        ("trl/gspo_wide", "trl_group", gspo, Sequences),
        ("trl/cispo", "trl_group", cispo(1.0, 4.0), Tokens),
        ("trl/cispo_tight", "trl_group", cispo(1.0, 0.15), Tokens),
        ("trl/sapo", "trl_group", means(of(SAPO)), Sequences),
        ("trl/luspo", "trl_group", at(Sequence, clip(2e-3, 2.5e-3, None)), Sequences),
        ("trl/vespo", "trl_group", of(VESPO), Tokens),
        ("trl/dapo_entropy", "trl_group", PolicyLoss { entropy_coef: 0.01, ..ppo }, Tokens),
        ("trl/rloo", "rloo", means(at(SequenceSum, ppo)), Sequences),
        ("trl/rloo_kl", "rloo_trl_kl", means(at(SequenceSum, ppo)), Sequences),
        ("trl/gmpo", "trl_group", means(of(Gmpo { low: 0.4, high: 0.4 })), Sequences),
        ("deepseekmath/grpo", "verl_grpo", means(with(ppo, 0.04, K3, KlWeight::One)), Sequences),
        (
            "deepseek_r1/grpo",
            "verl_grpo",
            means(with(clip(10.0, 10.0, None), 0.001, K3, KlWeight::One)),
            Sequences,
        ),
        ("paper/dapo", "dapo", clip(0.2, 0.28, None), Tokens),
        ("verl/vanilla_token-mean", "verl_grpo", dual, Tokens),
        ("verl/vanilla_seq-mean-token-sum", "verl_grpo", dual, Sequences),
        ("verl/vanilla_dual_1.5", "verl_grpo", clip(0.2, 0.2, Some(1.5)), Tokens),
        ("verl/gspo", "verl_grpo", gspo, Sequences),
        ("verl/cispo", "verl_grpo", cispo(0.2, 0.2), Tokens),
        ("verl/sapo", "verl_grpo", means(of(SAPO)), Sequences),
        ("verl/dppo_tv", "verl_grpo", of(tv(0.2, 20.0)), Tokens),
        ("verl/dppo_tv_c3", "verl_grpo", of(tv(0.2, 3.0)), Tokens),
        ("verl/dppo_tv_tight", "verl_grpo", of(tv(0.05, 20.0)), Tokens),
        ("verl/dppo_kl", "verl_grpo", dppo_kl, Tokens),
        ("verl/gpg", "gpg", of(Likelihood), Tokens),
        ("verl/remax", "remax_verl", dual, Tokens),
        ("nemo/reinforce", "nemo_grpo", of(Likelihood), Tokens),
        ("nemo/reinforce_pp", "reinforce_pp_nemo", ppo, Tokens),
        ("nemo/reinforce_pp_baseline", "reinforce_pp_baseline_nemo", ppo, Tokens),
        ("trl/rloo_norm", "rloo_norm", means(at(SequenceSum, ppo)), Sequences),
        ("verl/opo", "opo", dual, Tokens),
        ("verl/rloo", "rloo", dual, Tokens),
        ("verl/reinforce_pp", "reinforce_pp_verl", dual, Tokens),
        ("verl/reinforce_pp_kl", "reinforce_pp_verl_kl", dual, Tokens),
        ("verl/reinforce_pp_baseline", "reinforce_pp_baseline_verl", dual, Tokens),
        ("verl/geo_mean", "verl_grpo", means(of(Gmpo { low: 0.2, high: 0.2 })), Sequences),
        ("prime/default", "dr_grpo", of(through_ratio(0.2, 1e-3)), Tokens),
        ("prime/default_tight", "dr_grpo", of(through_ratio(0.05, 1e-3)), Tokens),
        ("prime/maxrl", "maxrl_prime", of(through_ratio(0.2, 1e-3)), Tokens),
        ("skyrl/dppo_tv", "verl_grpo", of(through_ratio(0.2, 0.0)), Tokens),
        ("nemo/grpo", "nemo_grpo", with(ppo, 0.01, K3, KlWeight::Score), Tokens),
        ("nemo/grpo_k1", "nemo_grpo", with(ppo, 0.01, K1, KlWeight::Score), Tokens),
        ("nemo/grpo_k2", "nemo_grpo", with(ppo, 0.01, K2, KlWeight::Score), Tokens),
        ("nemo/gspo", "nemo_grpo", with(gspo, 0.01, K3, KlWeight::Score), Sequences),
        ("nemo/cispo", "nemo_grpo", cispo(0.2, 0.2), Tokens),
        ("openrlhf/ppo_token", "openrlhf_group_norm", ppo, Tokens),
        ("openrlhf/ppo_sample", "openrlhf_group_norm", means(ppo), Sequences),
        ("openrlhf/ppo_dual", "openrlhf_group_norm", dual, Tokens),
        ("openrlhf/gspo", "openrlhf_group_norm", gspo, Sequences),
        ("openrlhf/reinforce", "reinforce_pp_openrlhf", ppo, Tokens),
        ("openrlhf/reinforce_baseline", "reinforce_pp_baseline_openrlhf", ppo, Tokens),
        ("openinstruct/cispo", "openrlhf_group_norm", cispo(1.0, 0.272), Tokens),
    ]
}

/// Loss and gradient in f64.
#[test]
fn losses_are_those_of_other_systems() {
    let g = Golden::open("pure/policy.safetensors");
    for seed in ["s0", "s7"] {
        let lens = g.ints(&format!("{seed}/in/lengths"));
        let mask: Vec<bool> = lens.iter().flat_map(|n| (0..9).map(move |t| t < *n)).collect();
        let mut offsets = vec![0];
        lens.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + *n as u32));
        let tokens = |key: &str| g.kept(&format!("{seed}/{key}"), &mask);
        let columns = |advantages: &str, anchor: &str| {
            let key = format!("{seed}/adv/{advantages}");
            let a = g.get(&key);
            let spread = || a.iter().flat_map(|a| [*a; 9]).zip(&mask).filter(|x| *x.1);
            Columns {
                logp: tokens("in/logp"),
                old: tokens(anchor),
                reference: tokens("in/ref_logp"),
                entropy: tokens("in/entropy"),
                advantages: match a.len() {
                    12 => spread().map(|x| x.0).collect(),
                    _ => g.kept(&key, &mask),
                },
                offsets: offsets.clone(),
            }
        };
        for (row, advantages, s, over) in rows() {
            let what = format!("{seed} {row}");
            let other = row.starts_with("prime") || row.starts_with("skyrl");
            let c = columns(advantages, if other { "in/rollout_logp" } else { "in/old_logp" });
            let n = match over {
                Over::Tokens => c.logp.len() as f64,
                Over::Sequences => 12.0,
            };
            let (sums, d, _) = c.policy(&s, n);
            let want = g.scalar(&format!("{seed}/pg/{row}/loss"));
            assert_close(&what, &[sums.loss], &[want], 1e-12, 1e-12);
            assert_close(&what, &d, &tokens(&format!("pg/{row}/d_logp")), 1e-12, 1e-12);
        }
        let c = columns("dr_grpo", "in/old_logp");
        let (sums, d, _) = c.policy(&clip(0.2, 0.2, None), 12.0 * 12.0);
        let want = g.scalar(&format!("{seed}/pg/trl/dr_grpo/loss"));
        assert_close("trl/dr_grpo", &[sums.loss], &[want], 1e-12, 1e-12);
        assert_close("trl/dr_grpo", &d, &tokens("pg/trl/dr_grpo/d_logp"), 1e-12, 1e-12);
    }
    g.all_read(&["s0/in/rewards", "s7/in/rewards", "s0/in/greedy", "s7/in/greedy"]);
}

/// Every surrogate, at every level that it reads.
fn surrogates() -> Vec<PolicyLoss> {
    let dual = clip(0.2, 0.3, Some(1.5));
    let cispo = of(Cispo { low: 0.3, high: 0.2 });
    let gmpo = of(Gmpo { low: 0.3, high: 0.2 });
    let dppo_kl = of(Dppo { distance: Distance::Kl, low: 0.01, high: 0.02, cap: 1.5 });
    let (dppo, ratio) = (of(tv(0.05, 1.5)), of(through_ratio(0.05, 0.1)));
    let mut all = vec![gmpo, of(VESPO), dppo, dppo_kl, ratio, of(Likelihood)];
    for level in [RatioLevel::Token, Sequence, SequenceSum] {
        all.extend([dual, cispo, of(SAPO)].map(|s| at(level, s)));
    }
    let kl = kl(0.3, K3, KlWeight::Ratio);
    let more = all.iter().map(|s| means(PolicyLoss { kl, entropy_coef: 0.05, ..*s }));
    all.iter().copied().chain(more.clone()).collect()
}

/// Sequences of these lengths, log-probs below 0, one advantage a sequence.
fn sequences<F: Float>(lens: &[usize]) -> Columns<F> {
    let n: usize = lens.iter().sum();
    let wide = |name: &str| randn::<f64>(name, n);
    let logp: Vec<f64> = wide("old").iter().map(|x| -x.abs() - 0.5).collect();
    let moved = logp.iter().zip(wide("moved")).map(|(l, m)| (l + 0.2 * m).min(-0.01)).collect();
    let each = randn::<f64>("adv", lens.len());
    let advantages = each.iter().zip(lens).flat_map(|(a, n)| std::iter::repeat_n(*a, *n)).collect();
    let mut offsets = vec![0];
    lens.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + *n as u32));
    let narrow = |x: Vec<f64>| x.iter().map(|x| F::of(f64::from(*x as f32))).collect();
    Columns {
        logp: narrow(moved),
        old: narrow(logp),
        reference: narrow(wide("ref").iter().map(|x| -x.abs()).collect()),
        entropy: narrow(wide("entropy")),
        advantages: narrow(advantages),
        offsets,
    }
}

const LENS: [usize; 7] = [3, 1, 0, 9, 5, 12, 2];

/// Where the value has the derivative: not where a gradient is stopped.
#[test]
fn gradients() {
    let c = sequences::<f64>(&LENS);
    for s in surrogates() {
        if matches!(s.surrogate, Cispo { .. } | Vespo { .. } | Dppo { .. }) {
            continue;
        }
        let what = format!("{s:?}");
        let (_, d, dentropy) = c.policy(&s, 7.0);
        let loss = |logp: &[f64], entropy: &[f64]| {
            let c = Columns { logp: logp.to_vec(), entropy: entropy.to_vec(), ..c.clone() };
            c.policy(&s, 7.0).0.loss
        };
        gradcheck(&what, &c.logp, &d, OP, |logp| loss(logp, &c.entropy));
        gradcheck(&what, &c.entropy, &dentropy, OP, |entropy| loss(&c.logp, entropy));
    }
}

/// While nothing has been learned, every loss is REINFORCE: the derivative of a token is -A.
#[test]
fn the_first_pass_is_reinforce() {
    let mut c = sequences::<f32>(&LENS);
    c.old = c.logp.clone();
    for s in surrogates().into_iter().filter(|s| s.kl.is_none()) {
        let (sums, d, _) = c.policy(&s, 1.0);
        let spans = c.offsets.windows(2).map(|w| w[0] as usize..w[1] as usize);
        let want = spans.flat_map(|span| {
            let n = span.len() as f64;
            // the derivative of e^(sum over a sequence), once for each of its tokens
            let gains = s.ratio == SequenceSum && !matches!(s.surrogate, Cispo { .. });
            let times = if gains { n } else { 1.0 };
            c.advantages[span].iter().map(move |a| -f64::from(*a) * times).collect::<Vec<f64>>()
        });
        let want: Vec<f64> = want.collect();
        assert_close(&format!("{s:?}"), &d, &want, 0.0, 1e-7);
        assert_eq!((sums.clipped_low, sums.clipped_high, sums.max_log_ratio), (0.0, 0.0, 0.0));
    }
}

/// Two tokens of log-ratios ln 2 and 0, A = 1: the mean ratio is sqrt 2, the product 2.
#[test]
fn hand_worked_sequences() {
    let ln2 = 2f64.ln();
    let c = Columns {
        logp: vec![-1.0, -2.0],
        old: vec![-1.0 - ln2, -2.0],
        reference: vec![],
        entropy: vec![],
        advantages: vec![1.0; 2],
        offsets: vec![0, 2],
    };
    let free = clip(1.0, 9.0, None);
    let root = 2f64.sqrt();
    let vespo = (3.0 + 2.0 * ln2 - 3.0 * 2.0f64).exp();
    for (s, loss, d) in [
        (at(Sequence, free), -2.0 * root, [-root; 2]),
        (at(SequenceSum, free), -4.0, [-4.0; 2]),
        (means(at(SequenceSum, free)), -2.0, [-2.0; 2]),
        (at(Sequence, clip(0.2, 0.3, None)), -2.6, [0.0; 2]),
        // the first token is clipped at ln 2 / 2, so that the mean is ln 2 / 4
        (of(Gmpo { low: 1.0, high: ln2 / 2.0 }), -2.0 * root.sqrt(), [0.0, -root.sqrt()]),
        (of(VESPO), 3.0 * vespo, [-vespo; 2]),
        // e^-1 is 0.18 above e^-1 / 2
        (of(tv(0.2, 1.5)), 1.5 + 2.0, [-1.5, -1.0]),
        (of(tv(0.1, 1.5)), 2.0, [0.0, -1.0]),
        (of(through_ratio(0.1, 0.5)), 0.5 * ln2 * ln2 - 1.0, [ln2, -1.0]),
    ] {
        let (sums, got, _) = c.policy(&s, 1.0);
        assert_close(&format!("{s:?}"), &[sums.loss], &[loss], 0.0, 1e-14);
        assert_close(&format!("{s:?}"), &got, &d, 0.0, 1e-14);
    }
}

/// A bad number spoils the gradients of its token, or of its sequence where the ratio is of these.
#[test]
fn a_nan_stays_in_its_sequence() {
    let clean = sequences::<f32>(&LENS);
    for s in surrogates() {
        let want = clean.policy(&s, 7.0).1;
        let whole =
            s.ratio != RatioLevel::Token || matches!(s.surrogate, Gmpo { .. } | Vespo { .. });
        let bad = if whole { 4..13 } else { 7..8 };
        for column in ["logp", "old"] {
            let mut c = clean.clone();
            *(if column == "old" { &mut c.old[7] } else { &mut c.logp[7] }) = f32::NAN;
            let (sums, mut d, _) = c.policy(&s, 7.0);
            if s.surrogate == Likelihood {
                // Its gradient is that of the advantage, but for terms beside; the sums show it.
                assert!(sums.approx_kl.is_nan());
                assert_bits(
                    column,
                    &[&d[..7], &d[8..]].concat(),
                    &[&want[..7], &want[8..]].concat(),
                );
                continue;
            }
            assert!(sums.loss.is_nan(), "{s:?}");
            if matches!(s.surrogate, Gmpo { .. }) {
                // A clipped token has no gradient, whatever its sequence is.
                assert!(d[7].is_nan());
                d[bad.clone()].fill(f32::NAN);
            }
            assert_nan_only(&format!("{s:?}"), &d, &want, bad.clone());
        }
    }
}

/// A sequence's gradients do not depend on what else is in its micro-batch.
#[test]
fn sequences_do_not_see_each_other() {
    let c = sequences::<f32>(&LENS);
    for s in surrogates() {
        let (whole, d, _) = c.policy(&s, 7.0);
        let mut sum = PolicySums::default();
        for w in c.offsets.windows(2) {
            let span = w[0] as usize..w[1] as usize;
            let (part, one, _) = c.cut(|x| x[span.clone()].to_vec()).policy(&s, 7.0);
            sum.merge(&part);
            assert_bits(&format!("{s:?}"), &one, &d[span]);
        }
        assert_close(&format!("{s:?}"), &list(&sum), &list(&whole), 1e-13, 1e-13);
    }
}

#[test]
fn offsets_that_lead_outside_are_refused() {
    let c = sequences::<f32>(&[3]);
    for (ends, says) in [
        (vec![0, 4], "policy_loss: offsets: got Some(0) to Some(4), wanted 0 to 3"),
        (vec![0, 3, 2], "policy_loss: offsets: got 2 after 3, wanted ascending numbers"),
    ] {
        let c = Columns { offsets: ends, ..c.clone() };
        let error = c.policy_on(host(), 0, &PolicyLoss::default(), 1.0).unwrap_err();
        assert_eq!(error.to_string(), says);
    }
    let (mut d, ends) = (vec![0.0f32; 3], [0, 3]);
    let tokens = PolicyTokens {
        logp: (&c.logp).into(),
        old_logp: (&c.old).into(),
        ref_logp: None,
        entropy: None,
        advantages: (&c.advantages).into(),
        weights: None,
        offsets: Offsets { host: &ends, view: View::from(&ends[..1]) },
    };
    let plain = PolicyLoss::default();
    let error = policy_loss::forward(host(), (&mut d).into(), None, tokens, &plain, 1.0);
    let says = "policy_loss: `offsets` has shape [1], wanted [2]";
    assert_eq!(error.map(drop).unwrap_err().to_string(), says);
}

struct OnSequences<'a> {
    columns: &'a Columns<f32>,
    first: usize,
    settings: PolicyLoss,
}

impl FloatCase for OnSequences<'_> {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let columns = self.columns.map(|x| x.iter().map(|x| F::of(f64::from(*x))).collect());
        let (stats, d, _) = columns.policy_on(lab.dev(), self.first, &self.settings, 7.0)?;
        lab.sums("stats", &list(&stats));
        lab.column("dlogp", &d);
        Ok(())
    }
}

/// Empty sequences, those of one token, around a thread's and a block's tokens; many sequences a
/// block.
#[test]
fn kernels_of_sequences_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        let short = sequences(&LENS);
        for (i, settings) in surrogates().into_iter().enumerate() {
            sim.hold_f32(&OnSequences { columns: &short, first: i % 3, settings });
        }
        let long = sequences(&[255, 256, 0, 257, 700]);
        let many = sequences(&[2; 300]);
        for columns in [&long, &many] {
            for settings in [at(SequenceSum, clip(0.2, 0.3, Some(1.5))), of(VESPO)] {
                sim.hold_f32(&OnSequences { columns, first: 1, settings });
            }
        }
    });
}
