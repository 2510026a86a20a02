//! PPO: what becomes of scores and log-probs, whatever the order and the micro-batches; and that it
//! learns.

use std::{collections::BTreeMap, path::Path};

use half::bf16;
use warpo::{
    Error,
    algorithms::{Algorithm, Columns, Metrics},
    device::{Device, Element},
    models::{self, Batch, Config, Head, Model, ParamKind, Residency},
    rollout::Scorer,
    train::Silent,
};

use crate::support::{
    assert_bits, assert_close, host,
    losses::{build, finish, policy_loss, scalar_loss},
    randn, room_on,
    runs::trainer_on,
    sim, temp_dir, wide,
};

const LENS: [usize; 5] = [3, 1, 6, 2, 4];

/// A step's columns as a rollout leaves them.
fn columns() -> Columns<f32> {
    let n = LENS.iter().sum();
    let ends = LENS.iter().scan(0, |at, n| {
        *at += *n as u32;
        Some(*at)
    });
    let logp = |name: &str| -> Vec<f32> {
        randn::<f64>(name, n).iter().map(|x| -(x.abs() + 0.1) as f32).collect()
    };
    Columns {
        samples: (0..LENS.len() as u64).collect(),
        offsets: std::iter::once(0).chain(ends).collect(),
        old_logp: logp("old"),
        ref_logp: logp("reference"),
        old_values: randn("values", n),
        scores: randn("scores", LENS.len()),
        stopped: vec![true, false, true, true, false],
        ..Columns::default()
    }
}

fn ppo(pairs: &[&str]) -> Box<dyn Algorithm> {
    build("ppo", &[&["reward_model=judge"], pairs].concat()).unwrap()
}

fn prepare(a: &mut dyn Algorithm, c: &mut Columns<f32>) -> BTreeMap<&'static str, f64> {
    let mut out = Metrics::new();
    a.prepare(&Device::cpu(), c, &mut out).unwrap();
    out.into_iter().collect()
}

/// What a first pass over prepared columns gives: gradients and metrics. Log-probs and values are
/// off those of the rollout, each by an amount of its own.
fn first_pass(a: &mut dyn Algorithm, c: &Columns<f32>, per: usize) -> Gradients {
    let off = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| x + 0.5 * (31.0 * x).sin()).collect() };
    let dlogp = policy_loss(a, c, &off(&c.old_logp), None, per);
    let dvalue = scalar_loss(a, c, &off(&c.old_values), per);
    Gradients { dlogp, dvalue, metrics: finish(a) }
}

struct Gradients {
    dlogp: Vec<f32>,
    dvalue: Vec<f32>,
    metrics: BTreeMap<&'static str, f64>,
}

#[track_caller]
fn assert_metrics(a: &BTreeMap<&str, f64>, b: &BTreeMap<&str, f64>, except: &[&str]) {
    assert!(a.keys().eq(b.keys()));
    for (name, x) in a.iter().filter(|(name, _)| !except.contains(name)) {
        // sums of some twenty f64 numbers in another order
        assert_close(name, &[b[name]], &[*x], 1e-13, 1e-13);
    }
}

/// The score enters at the last token, scaled, then clipped, then less the penalty of a sample that
/// did not end; the KL at every token.
#[test]
fn rewards_are_scores_and_kl() {
    let rewards = |pairs: &[&str]| {
        let mut c = columns();
        prepare(&mut *ppo(&[&["whiten_advantages=false"], pairs].concat()), &mut c);
        c.rewards
    };
    let at_end = |score: &dyn Fn(usize) -> f64| {
        let c = columns();
        let mut out = vec![0.0f32; c.tokens()];
        (0..LENS.len()).for_each(|s| out[c.offsets[s + 1] as usize - 1] = score(s) as f32);
        out
    };
    let c = columns();
    let scores = wide(&c.scores);
    let plain = rewards(&["kl_coef=0"]);
    // -0 where there is no score
    assert_close("plain", &plain, &wide(&at_end(&|s| scores[s])), 0.0, 0.0);
    let shaped = |s: usize| {
        let clipped = (scores[s] * 3.0).clamp(-1.5, 1.5);
        clipped - if c.stopped[s] { 0.0 } else { 0.7 }
    };
    assert!(
        (0..5).any(|s| (scores[s] * 3.0).abs() > 1.5)
            && (0..5).any(|s| (scores[s] * 3.0).abs() < 1.5)
    );
    let all = ["kl_coef=0", "reward_scale=3", "reward_clip=1.5", "missing_eos_penalty=0.7"];
    assert_close("shaped", &rewards(&all), &wide(&at_end(&shaped)), 0.0, 0.0);

    type Kl = fn(f64) -> f64;
    let estimators: [(&str, Kl); 3] =
        [("k1", |d| d), ("k2", |d| d * d / 2.0), ("k3", |d| (-d).exp() - 1.0 + d)];
    for (name, kl) in estimators {
        let with = rewards(&["kl_coef=0.3", &format!("kl_estimator={name}")]);
        let want: Vec<f64> = (0..c.tokens())
            .map(|t| -0.3 * kl(f64::from(c.old_logp[t]) - f64::from(c.ref_logp[t])))
            .zip(wide(&plain))
            .map(|(k, r)| k + r)
            .collect();
        assert_close(name, &with, &want, 1e-7, 1e-7);
    }
    // in the loss, it is not in the reward
    let loss = rewards(&["kl_coef=0.3", "kl_in=loss"]);
    assert_close("in the loss", &loss, &wide(&plain), 0.0, 0.0);
}

/// Rewards to advantages and returns as a step has them, against the formulas in f64: whitening of
/// rewards keeps their mean, that of advantages does not, and returns are of unwhitened advantages.
#[test]
fn advantages_follow_from_rewards() {
    let whitened = |x: &[f64], shift: bool, biased: bool| -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let squares: f64 = x.iter().map(|x| (x - mean) * (x - mean)).sum();
        let var = squares / if biased { n } else { n - 1.0 };
        let back = if shift { 0.0 } else { mean };
        x.iter().map(|x| (x - mean) / (var + 1e-8).sqrt() + back).collect()
    };
    for (rewards, advantages, biased, gamma, lambda) in [
        (true, true, false, 1.0, 0.95),
        (true, false, true, 0.9, 0.5),
        (false, true, true, 0.99, 0.0),
    ] {
        let mut c = columns();
        let values = wide(&c.old_values);
        let variance = if biased { "biased" } else { "unbiased" };
        let pairs = [
            format!("whiten_rewards={rewards}"),
            format!("whiten_advantages={advantages}"),
            format!("whiten_variance={variance}"),
            format!("gamma={gamma}"),
            format!("lambda={lambda}"),
        ];
        let pairs: Vec<&str> = pairs.iter().map(String::as_str).collect();
        prepare(&mut *ppo(&pairs), &mut c);
        let mut plain = columns();
        prepare(&mut *ppo(&["whiten_advantages=false"]), &mut plain);
        let r = wide(&plain.rewards);
        let r = if rewards { whitened(&r, false, biased) } else { r };
        let mut gae = vec![0.0; r.len()];
        for s in c.offsets.windows(2).map(|w| w[0] as usize..w[1] as usize) {
            let (mut next, mut after) = (0.0, 0.0);
            for t in s.rev() {
                let delta = r[t] + gamma * after - values[t];
                gae[t] = delta + gamma * lambda * next;
                (next, after) = (gae[t], values[t]);
            }
        }
        let returns: Vec<f64> = gae.iter().zip(&values).map(|(a, v)| a + v).collect();
        assert_close("rewards", &c.rewards, &r, 1e-6, 1e-6);
        assert_close("returns", &c.returns, &returns, 1e-5, 1e-5);
        let want = if advantages { whitened(&gae, true, biased) } else { gae };
        assert_close("advantages", &c.advantages, &want, 1e-5, 1e-5);
    }
}

/// Adaptive KL (Ziegler et al. 2019): coef *= 1 + clip(kl / target - 1, ±0.2) n / horizon, from the
/// next step on.
#[test]
fn the_kl_coefficient_adapts_as_the_formula() {
    let mut c = columns();
    let kl = prepare(&mut *ppo(&[]), &mut c)["kl"];
    let by_hand: f64 =
        c.old_logp.iter().zip(&c.ref_logp).map(|(l, r)| f64::from(*l) - f64::from(*r)).sum();
    assert_close("kl", &[kl], &[by_hand / 5.0], 0.0, 1e-14);
    let small = kl.abs() * 0.05;
    for (target, error) in [(kl.abs() / 1.1, 0.1), (small, 0.2), (kl.abs() * 50.0, -0.2)] {
        // a KL below 0 is far below any target
        let error = if kl > 0.0 { error } else { -0.2 };
        let mut a = ppo(&[&format!("kl_target={target}"), "kl_horizon=50", "kl_coef=0.4"]);
        let mut want = 0.4;
        for _ in 0..3 {
            let coef = prepare(&mut *a, &mut columns())["kl_coef"];
            assert_close("kl_coef", &[coef], &[want], 0.0, 1e-12);
            finish(&mut *a);
            want *= 1.0 + error * 5.0 / 50.0;
        }
        // a restart goes on from there
        let mut again = ppo(&["kl_coef=0.4"]);
        again.restore(&a.state()).unwrap();
        assert_close(
            "restored",
            &[prepare(&mut *again, &mut columns())["kl_coef"]],
            &[want],
            0.0,
            1e-12,
        );
    }
    // A fixed fault: with more samples a step than the horizon, the penalty became a reward.
    let mut fast = ppo(&["kl_target=1e6", "kl_horizon=1", "kl_coef=0.4"]);
    for want in [0.4, 0.4 * 0.8, 0.4 * 0.8 * 0.8] {
        let coef = prepare(&mut *fast, &mut columns())["kl_coef"];
        assert_close("kl_coef", &[coef], &[want], 0.0, 1e-12);
        finish(&mut *fast);
    }
    let error = ppo(&[]).restore(&serde_json::json!({})).unwrap_err().to_string();
    assert_eq!(error, "state of ppo: got {}, wanted a number `kl_coef`");
}

/// Property 2: while nothing has been learned, the ratio is 1 and nothing is clipped.
#[test]
fn the_first_ratio_is_one() {
    let (mut a, mut c) = (ppo(&[]), columns());
    prepare(&mut *a, &mut c);
    let d = policy_loss(&mut *a, &c, &c.old_logp, None, 2);
    let n = c.tokens() as f64;
    let want: Vec<f64> = c.advantages.iter().map(|a| -f64::from(*a) / n).collect();
    assert_close("d", &d, &want, 0.0, 1e-7);
    scalar_loss(&mut *a, &c, &c.old_values, 5);
    let m = finish(&mut *a);
    for name in ["clip_fraction", "approx_kl", "max_log_ratio", "value_clip_fraction"] {
        assert_eq!(m[name], 0.0, "{name}");
    }
    // whitened advantages have mean 0
    assert!(m["policy_loss"].abs() < 1e-7, "{}", m["policy_loss"]);
}

/// Property 4, for gradients of policy and value and for every metric.
#[test]
fn whole_step_denominators() {
    let mut c = columns();
    let mut a = ppo(&["kl_in=loss", "dual_clip=1.3"]);
    prepare(&mut *a, &mut c);
    let whole = first_pass(&mut *a, &c, 5);
    assert!(whole.metrics["clip_fraction_low"] > 0.0 && whole.metrics["value_clip_fraction"] > 0.0);
    for per in 1..5 {
        let split = first_pass(&mut *a, &c, per);
        assert_bits("d log-prob", &split.dlogp, &whole.dlogp);
        assert_bits("d value", &split.dvalue, &whole.dvalue);
        assert_metrics(&whole.metrics, &split.metrics, &[]);
    }
}

#[test]
fn order_and_repetition_do_not_change_the_mean() {
    // an unbiased variance would know how often a sample is there
    let pairs = ["whiten_variance=biased"];
    let run = |mut c: Columns<f32>| {
        let mut a = ppo(&pairs);
        let before = prepare(&mut *a, &mut c);
        (before, first_pass(&mut *a, &c, 3), c)
    };
    let (before, pass, c) = run(columns());
    let twice: Vec<usize> = (0..5).chain(0..5).collect();
    for (order, times) in [(&[2, 4, 0, 3, 1][..], 1.0), (&twice, 2.0)] {
        let (same, moved, other) = run(columns().subset(order));
        let picked = c.subset(order);
        assert_metrics(&before, &same, &[]);
        // moments summed in another order, rounded to f32
        assert_close("advantages", &other.advantages, &wide(&picked.advantages), 1e-6, 1e-6);
        assert_bits("returns", &other.returns, &picked.returns);
        let follow = |d: &[f32]| -> Vec<f64> {
            let rows = order.iter().flat_map(|s| d[c.span(&(*s..s + 1))].to_vec());
            rows.map(|d| f64::from(d) / times).collect()
        };
        assert_close("d log-prob", &moved.dlogp, &follow(&pass.dlogp), 1e-7, 1e-6);
        assert_close("d value", &moved.dvalue, &follow(&pass.dvalue), 1e-7, 1e-6);
        for name in ["policy_loss", "value_loss", "clip_fraction", "approx_kl"] {
            assert_close(name, &[moved.metrics[name]], &[pass.metrics[name]], 1e-6, 1e-6);
        }
    }
}

/// With gamma and lambda 1 a constant on all scores reaches all tokens alike, and whitening takes
/// it away; a factor on scores and values too.
#[test]
fn a_shift_or_scale_of_all_rewards_changes_nothing() {
    let advantages = |shift: f32, scale: f32| {
        let mut c = columns();
        c.scores.iter_mut().for_each(|s| *s = *s * scale + shift);
        c.old_values.iter_mut().for_each(|v| *v *= scale);
        prepare(&mut *ppo(&["lambda=1", "kl_coef=0"]), &mut c);
        c.advantages
    };
    let want = wide(&advantages(0.0, 1.0));
    // f32 columns: a shift by 8 costs three bits
    assert_close("shift", &advantages(8.0, 1.0), &want, 1e-5, 1e-5);
    assert_close("scale", &advantages(0.0, 16.0), &want, 1e-6, 1e-6);
    // without whitening it is the plain shift
    let raw = |shift: f32| {
        let mut c = columns();
        c.scores.iter_mut().for_each(|s| *s += shift);
        prepare(&mut *ppo(&["lambda=1", "kl_coef=0", "whiten_advantages=false"]), &mut c);
        c.advantages
    };
    let moved: Vec<f64> = raw(0.0).iter().map(|a| f64::from(*a) + 8.0).collect();
    assert_close("raw", &raw(8.0), &moved, 1e-6, 1e-6);
}

/// Property 9: a bad number in any column shows in a gradient, and nothing panics over it.
#[test]
fn a_bad_number_shows() {
    for pairs in [&[][..], &["kl_in=loss"], &["whiten_advantages=false", "value_clip=none"]] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for column in ["old_logp", "ref_logp", "old_values", "scores"] {
                let n = if column == "scores" { LENS.len() } else { columns().tokens() };
                for i in 0..n {
                    let (mut a, mut c) = (ppo(pairs), columns());
                    let x = match column {
                        "old_logp" => &mut c.old_logp,
                        "ref_logp" => &mut c.ref_logp,
                        "old_values" => &mut c.old_values,
                        _ => &mut c.scores,
                    };
                    x[i] = value;
                    prepare(&mut *a, &mut c);
                    let good = columns();
                    let mut d = policy_loss(&mut *a, &c, &good.old_logp, None, 2);
                    d.extend(scalar_loss(&mut *a, &c, &good.old_values, 2));
                    let shows = d.iter().any(|d| !d.is_finite());
                    // e^-inf is a ratio of 0: the trainer sees the number itself
                    let zero = column == "old_logp" && value == f32::INFINITY;
                    assert!(shows || zero, "{pairs:?} {value} in {column}[{i}]");
                }
            }
        }
    }
}

/// Each setting reaches its op: it changes the gradient it should.
#[test]
fn settings_reach_the_loss() {
    // one token: ratio e^0.25 = 1.284, advantage given by the score
    let one = |score: f32, log_ratio: f32, pairs: &[&str]| {
        let mut c = Columns {
            samples: vec![0],
            offsets: vec![0, 1],
            old_logp: vec![-1.0],
            ref_logp: vec![-1.0],
            old_values: vec![0.0],
            scores: vec![score],
            stopped: vec![true],
            ..Columns::default()
        };
        let mut a = ppo(&[&["whiten_advantages=false", "kl_coef=0"], pairs].concat());
        prepare(&mut *a, &mut c);
        let d = policy_loss(&mut *a, &c, &[-1.0 + log_ratio], Some(&[2.0]), 1);
        let v = scalar_loss(&mut *a, &c, &[0.5], 1);
        (d[0], v[0], finish(&mut *a))
    };
    let ratio = 0.25f32.exp();
    assert_eq!(one(1.0, 0.25, &[]).0, 0.0);
    assert_eq!(one(1.0, 0.25, &["clip_range=0.3"]).0, -ratio);
    assert_eq!(one(1.0, 0.25, &["clip_range_high=0.3"]).0, -ratio);
    assert_eq!(one(-1.0, -0.25, &["clip_range_high=0.3"]).0, 0.0);
    assert_eq!(one(-1.0, 0.25, &["dual_clip=1.1"]).0, 0.0);
    assert_eq!(one(-1.0, 0.25, &["dual_clip=1.5"]).0, ratio);
    // value 0.5, return 1, old value 0: within 0.2 the clipped error is the larger one
    assert_eq!(one(1.0, 0.0, &[]).1, 0.0);
    assert_eq!(one(1.0, 0.0, &["value_clip=none"]).1, 0.1 * -0.5);
    assert_eq!(one(1.0, 0.0, &["value_clip=none", "value_coef=1"]).1, -0.5);
    let bonus = one(1.0, 0.0, &["entropy_coef=0.5"]).2;
    assert_eq!((bonus["entropy"], bonus["policy_loss"]), (2.0, -1.0));
    assert_eq!(bonus["loss"] - bonus["value_loss"], -1.0 - 0.5 * 2.0);
    assert!(ppo(&["entropy_coef=0.5"]).needs().entropy && !ppo(&[]).needs().entropy);
    let needs = ppo(&["ppo_epochs=3", "minibatches=2"]).needs();
    assert_eq!((needs.epochs, needs.minibatches), (3, 2));
}

#[test]
fn a_wrong_setting_is_a_wrong_configuration() {
    for (pair, want) in [
        ("samples_per_prompt=0", "from 1 to 1000000"),
        ("max_new_tokens=0", "1 or more"),
        ("rollout_slots=0", "1 or more"),
        ("temperature=0", "0.001 to 100: PPO needs a distribution"),
        ("top_p=0", "above 0, up to 1"),
        ("top_p=1.5", "above 0, up to 1"),
        ("min_p=-0.1", "from 0 to 1"),
        ("clip_range=0", "above 0"),
        ("clip_range_high=0", "above 0"),
        ("dual_clip=1", "above 1"),
        ("value_clip=0", "above 0"),
        ("gamma=1.1", "from 0 to 1"),
        ("lambda=-0.1", "from 0 to 1"),
        ("ppo_epochs=0", "1 or more"),
        ("minibatches=0", "1 or more"),
        ("kl_target=0", "above 0"),
        ("kl_horizon=0", "above 0"),
        ("reward_clip=-1", "above 0"),
        ("value_learning_rate=-1", "0 or more"),
        ("kl_coef=-0.1", "0 or more"),
        ("value_coef=-1", "0 or more"),
        ("entropy_coef=-0.01", "0 or more"),
        ("missing_eos_penalty=-1", "0 or more"),
        ("reward_model=", "a folder with a reward model, or `rewards`"),
    ] {
        let (key, got) = pair.split_once('=').unwrap();
        let got = if key == "reward_model" { "\"\"" } else { got };
        let Err(error) = build("ppo", &["reward_model=judge", pair]) else { panic!("{pair}") };
        assert!(matches!(&error, Error::Config { key: k, .. } if k == key), "{pair}: {error:?}");
        assert_eq!(error.to_string(), format!("config key `{key}`: got {got}, wanted {want}"));
    }
}

/// A model over two tokens whose last score is 1 after `arm` and 0 after the other.
fn judge(dir: &Path, arm: usize) {
    let mut judge = Model::<f32>::zeros(
        host(),
        Config::parse(BANDIT, "config.json").unwrap(),
        Head::Scalar,
        Residency::Frozen,
    )
    .unwrap();
    let h = judge.spec().hidden;
    let params = judge.params_mut().unwrap();
    for slot in [ParamKind::Norm1, ParamKind::Norm2] {
        params.get_mut(slot, Some(0)).unwrap().host().fill(1.0);
    }
    params.get_mut(ParamKind::FinalNorm, None).unwrap().host().fill(1.0);
    // blocks add 0; RMSNorm brings the one of a one-hot row to sqrt(hidden)
    let embedding = params.get_mut(ParamKind::Embedding, None).unwrap().host();
    (embedding[0], embedding[h + 1]) = (1.0, 1.0);
    params.get_mut(ParamKind::Score, None).unwrap().host()[arm] = 1.0 / (h as f32).sqrt();
    models::save(host(), &judge, dir).unwrap();
}

const BANDIT: &str = r#"{"model_type": "llama", "vocab_size": 2, "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 16}"#;

/// A bandit with two arms: whichever one the judge likes, the policy comes to pull it.
#[test]
fn ppo_learns_a_bandit() {
    for arm in [0, 1] {
        learns::<f32>(&Device::cpu(), ("ppo", PPO), arm, &temp_dir(&format!("bandit_{arm}")));
    }
}

/// The same in bf16 on a device.
#[test]
fn ppo_learns_a_bandit_on_a_device() {
    let mut arm = 0;
    sim::on_devices(|dev| {
        let dir = temp_dir(&format!("bandit_on_a_device_{arm}"));
        learns::<bf16>(dev, ("ppo", PPO), arm, &dir);
        arm += 1;
    });
}

const PPO: &[&str] = &["kl_coef=0", "value_init=policy"];

/// An algorithm with some settings, which ours win over, learns to pull an arm.
pub fn learns<T: Element<Acc = f32>>(
    dev: &Device,
    (algorithm, own): (&str, &[&str]),
    arm: usize,
    dir: &Path,
) {
    let (policy, reward) = (dir.join("policy"), dir.join("judge"));
    std::fs::create_dir_all(&policy).unwrap();
    std::fs::create_dir_all(&reward).unwrap();
    judge(&reward, arm);
    let mut model = Model::<f32>::zeros(
        host(),
        Config::parse(BANDIT, "config.json").unwrap(),
        Head::Lm,
        Residency::Frozen,
    )
    .unwrap();
    for t in model.params().layout().clone().tensors() {
        let x: Vec<f32> = randn(&t.name(), t.len());
        let w = model.params_mut().unwrap().tensor_mut(t).host();
        w.iter_mut().zip(x).for_each(|(w, x)| *w = if t.facts.decays { 0.2 * x } else { 1.0 });
    }
    model.repack(&Device::cpu()).unwrap();
    models::save(host(), &model, &policy).unwrap();
    let data = dir.join("data.jsonl");
    std::fs::write(&data, "{\"input_ids\": [0, 1]}\n").unwrap();

    let more = [
        &format!("model={}", policy.display()),
        &format!("reward_model={}", reward.display()),
        &format!("data={}", data.display()),
        "steps=25",
        "batch_size=32",
        "minibatches=1",
        "learning_rate=0.03",
        "schedule=constant",
        "warmup_steps=0",
        "max_new_tokens=1",
        "temperature=1",
        "kl_target=none",
        "eos_id=none",
        "rollout_slots=32",
        "micro_batch_tokens=128",
    ];
    let more = [own, &more].concat();
    let mut trainer = trainer_on::<T>(dev, dir, algorithm, &more).unwrap();
    let before = probability(dev, trainer.policy().unwrap(), arm);
    assert!((0.05..0.95).contains(&before), "{before}");
    let mut scores: Vec<f64> = Vec::new();
    while scores.len() < 25 && scores.last().is_none_or(|last| *last < 0.98) {
        let report = trainer.step(&mut Silent).unwrap();
        scores.push(report.metrics.iter().find(|m| m.0 == "score").unwrap().1);
    }
    let after = probability(dev, trainer.policy().unwrap(), arm);
    let what =
        format!("{algorithm} {own:?} arm {arm}: from {before} to {after}, scores {scores:?}");
    println!("{what}");
    assert!(after > 0.95, "{what}");
    assert!(scores.len() > 1 && scores[scores.len() - 1] > 0.9, "{scores:?}");
}

/// Of pulling an arm.
fn probability<T: Element<Acc = f32>>(dev: &Device, model: &Model<T>, arm: usize) -> f32 {
    let mut batch = Batch::default();
    batch.push_predicted(&[0, 1, arm as u32], 2);
    let scorer = Scorer { rows: 2, sequences: 1 };
    let mut arena = room_on(dev, scorer.plan::<T>(dev, model.spec(), model.head()).unwrap());
    let (mut logp, scope) = (Vec::new(), arena.scope());
    models::Pass::new(dev, model, &scope, &batch).score(&mut logp, None).unwrap();
    logp[0].exp()
}
