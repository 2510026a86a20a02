//! Algorithms that compare the samples of a prompt: settings and presets are the losses of TRL,
//! verl, OpenRLHF, NeMo RL and prime-rl; advantages by hand; the whole step counts, in every order;
//! and a policy learns.

mod refusals;

use std::collections::BTreeMap;

use half::bf16;
use warpo::{
    algorithms::{ALGORITHMS, Algorithm, Columns, GreedySample, Metrics},
    config,
    device::Device,
    train::Settings,
};

use super::ppo::learns;
use crate::support::{
    assert_bits, assert_close,
    golden::Golden,
    host,
    losses::{build, finish, policy_loss},
    narrow, randn,
    runs::entry,
    sim, temp_dir, wide,
};

/// What `prepare` reports.
fn prepare(a: &mut dyn Algorithm, c: &mut Columns<f32>) -> BTreeMap<&'static str, f64> {
    let mut out = Metrics::new();
    a.prepare(&Device::cpu(), c, &mut out).unwrap();
    out.into_iter().collect()
}

/// An algorithm with the values of a preset, then with others.
fn preset(name: &str, preset: &str, more: &[&str]) -> Box<dyn Algorithm> {
    let entry = entry(name);
    let (mut settings, mut section) = Settings::of_preset(entry, Some(preset)).unwrap();
    for pair in [&["reward_model=judge"], more].concat() {
        config::set_pair(&mut [&mut settings, &mut *section], pair).unwrap();
    }
    (entry.build)(&*section).unwrap()
}

/// Rows of the golden file that a preset leads to, with the group size of the file.
const PRESETS: &[(&str, &str, &str, &[&str])] = &[
    ("trl/dapo", "grpo", "trl", &[]),
    ("deepseek_r1/grpo", "grpo", "deepseek-r1", &[]),
    ("trl/dr_grpo", "grpo", "dr-grpo", &["max_new_tokens=12"]),
    // 9 tokens at most, of which the last 4 are too long
    ("paper/dapo", "grpo", "dapo", &["max_new_tokens=9", "overlong_share=0.4444444444444444"]),
    ("trl/gspo", "grpo", "gspo", &[]),
    ("trl/cispo", "grpo", "cispo", &[]),
    ("trl/sapo", "grpo", "sapo", &[]),
    ("prime/default", "grpo", "dppo", &[]),
    ("trl/vespo", "grpo", "vespo", &[]),
    ("prime/maxrl", "grpo", "max-rl", &[]),
    ("verl/vanilla_token-mean", "grpo", "verl", &[]),
    ("openrlhf/ppo_token", "grpo", "openrlhf", &["kl_coef=0"]),
    ("nemo/grpo", "grpo", "nemo", &[]),
    ("trl/rloo_kl", "rloo", "trl", &[]),
    ("nemo/reinforce_pp", "reinforce++", "nemo", &[]),
    ("verl/rloo", "rloo", "verl", &[]),
    ("verl/reinforce_pp_kl", "reinforce++", "verl", &[]),
    ("openrlhf/reinforce", "reinforce++", "openrlhf", &[]),
];

/// The same of settings.
const ROWS: &[(&str, &str, &[&str])] = &[
    ("trl/grpo", "grpo", &["aggregation=sequences"]),
    ("trl/dapo", "grpo", &[]),
    ("trl/dapo_batch", "grpo", &["advantage=batch"]),
    ("trl/dapo_clip_higher", "grpo", &["clip_range_high=0.28"]),
    ("trl/dapo_delta", "grpo", &["dual_clip=1.5"]),
    ("trl/dapo_beta", "grpo", &["kl_coef=0.04"]),
    ("trl/dapo_beta_biased", "grpo", &["kl_coef=0.04", "kl_weight=one"]),
    ("trl/gspo_wide", "grpo", &["ratio=sequence", "aggregation=sequences"]),
    ("trl/cispo_tight", "grpo", &["policy_loss=cispo", "clip_range=1", "clip_range_high=0.15"]),
    (
        "trl/luspo",
        "grpo",
        &[
            "ratio=sequence",
            "aggregation=constant",
            "aggregation_tokens=1",
            "clip_range=2e-3",
            "clip_range_high=2.5e-3",
        ],
    ),
    ("trl/dapo_entropy", "grpo", &["entropy_coef=0.01"]),
    ("trl/rloo", "rloo", &["kl_coef=0"]),
    ("trl/rloo_norm", "rloo", &["kl_coef=0", "normalize_advantages=true"]),
    ("trl/gmpo", "grpo", &["policy_loss=gmpo", "clip_range=0.4", "aggregation=sequences"]),
    (
        "deepseekmath/grpo",
        "grpo",
        &["advantage_epsilon=1e-6", "aggregation=sequences", "kl_coef=0.04", "kl_weight=one"],
    ),
    (
        "verl/vanilla_seq-mean-token-sum",
        "grpo",
        &["advantage_epsilon=1e-6", "dual_clip=3", "aggregation=constant", "aggregation_tokens=1"],
    ),
    ("verl/vanilla_dual_1.5", "grpo", &["advantage_epsilon=1e-6", "dual_clip=1.5"]),
    ("verl/cispo", "grpo", &["advantage_epsilon=1e-6", "policy_loss=cispo"]),
    ("verl/sapo", "grpo", &["advantage_epsilon=1e-6", "policy_loss=sapo", "aggregation=sequences"]),
    ("verl/dppo_tv", "grpo", &["advantage_epsilon=1e-6", "policy_loss=dppo_tv"]),
    ("verl/dppo_tv_c3", "grpo", &["advantage_epsilon=1e-6", "policy_loss=dppo_tv", "ratio_cap=3"]),
    (
        "verl/dppo_tv_tight",
        "grpo",
        &["advantage_epsilon=1e-6", "policy_loss=dppo_tv", "clip_range=0.05"],
    ),
    ("verl/dppo_kl", "grpo", &["advantage_epsilon=1e-6", "policy_loss=dppo_kl", "clip_range=0.02"]),
    ("verl/gpg", "grpo", &["advantage=gpg", "policy_loss=likelihood"]),
    ("verl/remax", "grpo", &["advantage=remax", "dual_clip=3"]),
    (
        "nemo/reinforce",
        "grpo",
        &["@nemo", "kl_coef=0", "kl_weight=ratio", "policy_loss=likelihood"],
    ),
    ("nemo/reinforce_pp_baseline", "reinforce++", &["@nemo", "kl_coef=0", "advantage=mean"]),
    ("verl/opo", "grpo", &["advantage=opo", "dual_clip=3"]),
    ("verl/reinforce_pp", "reinforce++", &["kl_coef=0", "dual_clip=3"]),
    (
        "verl/reinforce_pp_baseline",
        "reinforce++",
        &["kl_coef=0", "dual_clip=3", "advantage=mean", "samples_per_prompt=4"],
    ),
    (
        "verl/geo_mean",
        "grpo",
        &["advantage_epsilon=1e-6", "policy_loss=gmpo", "aggregation=sequences"],
    ),
    ("prime/default_tight", "grpo", &["advantage=mean", "policy_loss=dppo", "clip_range=0.05"]),
    ("skyrl/dppo_tv", "grpo", &["advantage_epsilon=1e-6", "policy_loss=dppo", "square_coef=0"]),
    ("nemo/grpo_k1", "grpo", &["@nemo", "kl_estimator=k1"]),
    ("nemo/grpo_k2", "grpo", &["@nemo", "kl_estimator=k2"]),
    ("nemo/gspo", "grpo", &["@nemo", "ratio=sequence", "aggregation=sequences"]),
    ("nemo/cispo", "grpo", &["@nemo", "kl_coef=0", "policy_loss=cispo", "kl_weight=score"]),
    ("openrlhf/ppo_sample", "grpo", &["advantage_epsilon=1e-9", "aggregation=sequences"]),
    ("openrlhf/ppo_dual", "grpo", &["advantage_epsilon=1e-9", "dual_clip=3"]),
    (
        "openrlhf/gspo",
        "grpo",
        &["advantage_epsilon=1e-9", "ratio=sequence", "aggregation=sequences"],
    ),
    (
        "openrlhf/reinforce_baseline",
        "reinforce++",
        &["kl_coef=0", "advantage=mean", "whiten_variance=biased", "samples_per_prompt=4"],
    ),
    (
        "openinstruct/cispo",
        "grpo",
        &["advantage_epsilon=1e-9", "policy_loss=cispo", "clip_range=1", "clip_range_high=0.272"],
    ),
];

/// Settings of a row; `@NAME` stands for a preset.
fn row(name: &str, pairs: &[&str]) -> Box<dyn Algorithm> {
    let (presets, own): (Vec<&str>, Vec<&str>) = pairs.iter().partition(|p| p.starts_with('@'));
    let own = [&["reward_model=judge", "samples_per_prompt=4"], &own[..]].concat();
    match presets.first() {
        Some(of_preset) => preset(name, &of_preset[1..], &own),
        None => build(name, &own).unwrap(),
    }
}

fn all_rows() -> Vec<(&'static str, Box<dyn Algorithm>)> {
    let settings = ROWS.iter().map(|(golden, name, pairs)| (*golden, row(name, pairs)));
    let presets = PRESETS.iter().map(|(golden, name, of, more)| {
        let more = [&["samples_per_prompt=4"], *more].concat();
        (*golden, preset(name, of, &more))
    });
    settings.chain(presets).collect()
}

/// The step of the golden file, as a rollout leaves it.
fn golden_step(g: &Golden, seed: &str, row: &str) -> (Columns<f32>, Vec<f32>, Vec<f32>) {
    let lens = g.ints(&format!("{seed}/in/lengths"));
    let mask: Vec<bool> = lens.iter().flat_map(|n| (0..9).map(move |t| t < *n)).collect();
    let tokens = |key: &str| narrow(&g.kept(&format!("{seed}/in/{key}"), &mask));
    let other = row.starts_with("prime") || row.starts_with("skyrl");
    let mut offsets = vec![0];
    lens.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + *n as u32));
    let rewards = if row == "prime/maxrl" { "rewards01" } else { "rewards" };
    let c = Columns {
        samples: (0..12).collect(),
        offsets,
        old_logp: tokens(if other { "rollout_logp" } else { "old_logp" }),
        ref_logp: tokens("ref_logp"),
        scores: narrow(g.get(&format!("{seed}/in/{rewards}"))),
        greedy: narrow(g.get(&format!("{seed}/in/greedy_rewards")))
            .into_iter()
            .flat_map(|score| [GreedySample { score, stopped: true, tokens: 1 }; 4])
            .collect(),
        stopped: vec![true; 12],
        ..Columns::default()
    };
    (c, tokens("logp"), tokens("entropy"))
}

/// A step's loss and gradient, `per` sequences a micro-batch, and all metrics.
fn step(
    a: &mut dyn Algorithm,
    mut c: Columns<f32>,
    [logp, entropy]: [&[f32]; 2],
    per: usize,
) -> (BTreeMap<&'static str, f64>, Vec<f32>) {
    let needs = a.needs();
    if !needs.reference {
        c.ref_logp = Vec::new();
    }
    let mut metrics = prepare(a, &mut c);
    let d = policy_loss(a, &c, logp, needs.entropy.then_some(entropy), per);
    metrics.extend(finish(a));
    (metrics, d)
}

#[test]
fn settings_and_presets_lead_to_the_losses_of_other_systems() {
    let g = Golden::open("pure/policy.safetensors");
    for seed in ["s0", "s7"] {
        for (row, mut a) in all_rows() {
            let what = format!("{seed} {row}");
            let (c, logp, entropy) = golden_step(&g, seed, row);
            let mask: Vec<bool> = (0..12)
                .flat_map(|s| (0..9).map(move |t| (s, t)))
                .map(|(s, t)| t < c.span(&(s..s + 1)).len())
                .collect();
            let (m, d) = step(&mut *a, c, [&logp, &entropy], 5);
            let want = g.scalar(&format!("{seed}/pg/{row}/loss"));
            assert_close(&what, &[m["loss"]], &[want], 2e-6, 1e-5);
            let want = g.kept(&format!("{seed}/pg/{row}/d_logp"), &mask);
            assert_close(&what, &d, &want, 2e-6, 1e-5);
        }
    }
    // Advantages that are only those of a loss are tested with it; GSPO of verl is that of TRL.
    let prefixes = ["adv/", "pg/verl/gspo"].map(|key| ["s0", "s7"].map(|s| format!("{s}/{key}")));
    let prefixes = prefixes.concat();
    g.all_read(&prefixes.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Every preset is held by a golden loss, its values are settings, and it is said whose it is.
#[test]
fn every_preset_is_held() {
    for e in ALGORITHMS {
        for p in e.presets {
            assert!(PRESETS.iter().any(|row| (row.1, row.2) == (e.name, p.name)), "{}", p.name);
            assert!(p.about.len() > 10 && !p.about.ends_with('.'), "{}", p.about);
            let (settings, section) = Settings::of_preset(e, Some(p.name)).unwrap();
            let keys = [config::Section::keys(&settings), section.keys()].concat();
            for (key, _) in p.values {
                assert!(keys.iter().any(|k| k.name == *key), "{}: {key}", p.name);
            }
        }
    }
    let error = Settings::of_preset(entry("grpo"), Some("dappo")).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "config key `--preset`: grpo has no `dappo`");
    assert!(error.hint().unwrap().contains("trl, deepseek-r1, dr-grpo, dapo, gspo"));
    let error = Settings::of_preset(entry("sft"), Some("trl")).map(drop).unwrap_err();
    assert_eq!(error.hint().unwrap(), "known are: none");
}

/// Three groups of two, of which the last has equal rewards, and one sample was cut off.
const LENS: [usize; 6] = [3, 1, 6, 2, 4, 5];

fn columns() -> (Columns<f32>, [Vec<f32>; 2]) {
    let n = LENS.iter().sum();
    let logp = |name: &str| -> Vec<f32> {
        randn::<f64>(name, n).iter().map(|x| -(x.abs() + 0.1) as f32).collect()
    };
    let mut offsets = vec![0];
    LENS.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + *n as u32));
    let old = logp("old");
    let off = |x: &f32| (x + 0.3 * (31.0 * x).sin()).min(-0.01);
    let new = old.iter().map(off).collect();
    let c = Columns {
        samples: (0..6).collect(),
        offsets,
        weights: vec![1.0; n],
        old_logp: old,
        ref_logp: logp("reference"),
        scores: vec![1.0, 3.0, -2.0, 0.5, 0.1, 0.1],
        stopped: vec![true, true, false, true, true, true],
        ..Columns::default()
    };
    (c, [new, logp("entropy")])
}

fn grpo(pairs: &[&str]) -> Box<dyn Algorithm> {
    build("grpo", &[&["reward_model=judge", "samples_per_prompt=2"], pairs].concat()).unwrap()
}

/// The advantage of each sample, and what is reported.
fn advantages(a: &mut dyn Algorithm) -> (Vec<f32>, BTreeMap<&'static str, f64>) {
    let (mut c, _) = columns();
    c.ref_logp = Vec::new();
    let metrics = prepare(a, &mut c);
    let each = (0..6).map(|s| {
        let own = &c.advantages[c.span(&(s..s + 1))];
        assert!(own.iter().all(|a| a.to_bits() == own[0].to_bits()), "{own:?}");
        own[0]
    });
    (each.collect(), metrics)
}

#[test]
fn advantages_by_hand() {
    let root = 0.5f64.sqrt();
    for (pairs, want) in [
        // std of 1 and 3 is sqrt 2, that of -2 and 0.5 is 2.5 / sqrt 2
        (&["advantage_epsilon=0"][..], [-root, root, -root, root]),
        (&["advantage=mean"], [-1.0, 1.0, -1.25, 1.25]),
        (&["advantage=leave_one_out"], [-2.0, 2.0, -2.5, 2.5]),
        // the mean by tokens: (3 * 1 + 1 * 3) / 4, (-2 * 6 + 0.5 * 2) / 8
        (&["advantage=opo"], [-0.5, 1.5, -0.625, 1.875]),
        // the mean of the second group is below 0
        (&["advantage=max_rl"], [-0.5, 0.5, 0.0, 0.0]),
        (&["advantage=mean", "reward_scale=2"], [-2.0, 2.0, -2.5, 2.5]),
        (&["advantage=mean", "missing_eos_penalty=1"], [-1.0, 1.0, -1.75, 1.75]),
        // the third of 6 tokens is at the limit, the first of 3 is at the border of the last half
        (
            &["advantage=mean", "max_new_tokens=6", "overlong_share=0.5", "overlong_coef=3"],
            [-1.0, 1.0, -2.75, 2.75],
        ),
    ] {
        let (got, metrics) = advantages(&mut *grpo(pairs));
        assert_close(&format!("{pairs:?}"), &got[..4], &want, 1e-6, 1e-6);
        if !pairs.iter().any(|p| p.starts_with("overlong")) {
            // Equal rewards are exactly nothing, and are counted.
            assert_bits("equal rewards", &got[4..], &[0.0; 2]);
            assert_eq!(metrics["zero_std_groups"], 1.0, "{pairs:?}");
        }
        if pairs == ["advantage=mean"] {
            let std = (2f64.sqrt() + 2.5 / 2f64.sqrt()) / 3.0;
            assert_close("reward_std", &[metrics["reward_std"]], &[std], 0.0, 1e-12);
        }
    }
    // The others of a group of three are equal: their std divides nothing.
    let mut loo = build(
        "grpo",
        &["reward_model=judge", "samples_per_prompt=3", "advantage=leave_one_out_std"],
    )
    .unwrap();
    let (mut c, _) = columns();
    c.ref_logp = Vec::new();
    c.scores = vec![0.1, 0.1, 3.0, 1.0, 2.0, 4.0];
    prepare(&mut *loo, &mut c);
    let each: Vec<f32> = (0..6).map(|s| c.advantages[c.offsets[s] as usize]).collect();
    let std = |d: f64| d / 2f64.sqrt() + 1e-4;
    let want = [
        (0.1 - 1.55) / std(2.9),
        (0.1 - 1.55) / std(2.9),
        2.9,
        (1.0 - 3.0) / std(2.0),
        (2.0 - 2.5) / std(3.0),
        (4.0 - 1.5) / std(1.0),
    ];
    assert_close("leave_one_out_std", &each, &want, 1e-6, 1e-6);
}

/// By every preset a policy comes to pull the arm that the judge likes.
#[test]
fn a_policy_learns_a_bandit_by_every_preset() {
    for e in ALGORITHMS {
        for (i, p) in e.presets.iter().enumerate() {
            let values: Vec<String> = p.values.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let mut own: Vec<&str> = values.iter().map(String::as_str).collect();
            own.extend(["grpo_epochs=1", "samples_per_prompt=8", "min_learning_rate_ratio=0"]);
            let dir = temp_dir(&format!("bandit_{}_{}", e.name, p.name));
            learns::<f32>(host(), (e.name, &own), i % 2, &dir);
        }
    }
}

/// So it does by the settings that no preset has.
#[test]
fn a_policy_learns_a_bandit_by_other_settings() {
    for (i, own) in [
        &["advantage=remax", "samples_per_prompt=1"][..],
        &["advantage=gpg", "policy_loss=likelihood"],
        &["normalize_advantages=true", "dynamic_sampling=4"],
    ]
    .into_iter()
    .enumerate()
    {
        learns::<f32>(host(), ("grpo", own), i % 2, &temp_dir(&format!("bandit_other_{i}")));
    }
}

/// The same in bf16 on a device.
#[test]
fn a_policy_learns_a_bandit_on_a_device() {
    let own = ["grpo_epochs=1", "samples_per_prompt=8", "ratio=sequence", "aggregation=sequences"];
    sim::on_devices(|dev| learns::<bf16>(dev, ("grpo", &own), 1, &temp_dir("grpo_bandit")));
}

/// A sample that was cut off is compared, but not learned; a step of nothing else has a loss of 0.
#[test]
fn truncated_samples_are_masked() {
    let (c, [logp, entropy]) = columns();
    let run =
        |pairs: &[&str], c: &Columns<f32>| step(&mut *grpo(pairs), c.clone(), [&logp, &entropy], 2);
    let (all, plain) = run(&[], &c);
    let (m, d) = run(&["mask_truncated=true"], &c);
    assert_eq!((m["masked"], all.contains_key("masked")), (1.0, false));
    // 21 tokens of which 6 do not count
    let want: Vec<f64> = wide(&plain)
        .iter()
        .enumerate()
        .map(|(t, d)| if (4..10).contains(&t) { 0.0 } else { d * 21.0 / 15.0 })
        .collect();
    assert_close("masked", &d, &want, 1e-9, 1e-6);
    let (m, d) = run(&["mask_truncated=true", "aggregation=sequences"], &c);
    let (_, means) = run(&["aggregation=sequences"], &c);
    assert_bits("means", &[&d[..4], &d[10..]].concat(), &[&means[..4], &means[10..]].concat());
    assert!(m["loss"].is_finite());
    let none = Columns { stopped: vec![false; 6], ..c };
    let (m, d) = run(&["mask_truncated=true"], &none);
    assert_eq!((m["loss"], m["policy_loss"], m["clip_fraction"]), (0.0, 0.0, 0.0));
    assert!(d.iter().all(|d| *d == 0.0));
}

/// Property 4, to the bit: a sequence's gradient does not depend on its micro-batch.
#[test]
fn whole_step_denominators() {
    let g = Golden::open("pure/policy.safetensors");
    for (row, mut a) in all_rows() {
        let (c, logp, entropy) = golden_step(&g, "s0", row);
        let (whole, d) = step(&mut *a, c.clone(), [&logp, &entropy], 12);
        for per in [1, 3, 7] {
            let (split, same) = step(&mut *a, c.clone(), [&logp, &entropy], per);
            assert_bits(row, &same, &d);
            for (name, x) in &whole {
                assert_close(&format!("{row} {name}"), &[split[name]], &[*x], 1e-13, 1e-13);
            }
        }
    }
}

/// Prompts in another order, and samples of a prompt in another order.
#[test]
fn order_does_not_change_the_mean() {
    let g = Golden::open("pure/policy.safetensors");
    for (row, mut a) in all_rows() {
        let (c, logp, entropy) = golden_step(&g, "s7", row);
        let (whole, d) = step(&mut *a, c.clone(), [&logp, &entropy], 12);
        for order in
            [[8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7], [2, 0, 3, 1, 7, 6, 5, 4, 9, 8, 11, 10]]
        {
            let follow = |x: &[f32]| -> Vec<f32> {
                order.iter().flat_map(|s| x[c.span(&(*s..s + 1))].to_vec()).collect()
            };
            let (moved, other) =
                step(&mut *a, c.subset(&order), [&follow(&logp), &follow(&entropy)], 5);
            assert_close(row, &other, &wide(&follow(&d)), 1e-8, 1e-6);
            for (name, x) in &whole {
                assert_close(&format!("{row} {name}"), &[moved[name]], &[*x], 1e-6, 1e-6);
            }
        }
    }
}

/// A constant on all rewards changes nothing where samples are compared, a factor only where no
/// spread divides.
#[test]
fn a_shift_of_all_rewards_changes_nothing() {
    for (advantage, scales) in
        [("group", false), ("mean", true), ("batch", false), ("leave_one_out", true), ("opo", true)]
    {
        let own = format!("advantage={advantage}");
        let run = |scale: &str, shift: f32| {
            let mut a = grpo(&[&own, "advantage_epsilon=0", &format!("reward_scale={scale}")]);
            let (mut c, _) = columns();
            c.ref_logp = Vec::new();
            c.scores.iter_mut().for_each(|s| *s += shift);
            prepare(&mut *a, &mut c);
            c.advantages
        };
        let want = wide(&run("1", 0.0));
        assert_close(advantage, &run("1", 8.0), &want, 1e-5, 1e-5);
        let factor = if scales { 16.0 } else { 1.0 };
        let want: Vec<f64> = want.iter().map(|a| a * factor).collect();
        assert_close(advantage, &run("16", 0.0), &want, 1e-6, 1e-6);
    }
}

/// Property 9: a bad number shows in the loss or in a gradient.
#[test]
fn a_bad_number_shows() {
    let g = Golden::open("pure/policy.safetensors");
    for (row, mut a) in all_rows() {
        for column in ["old_logp", "scores", "logp"] {
            for i in [0, 7] {
                let (mut c, mut logp, entropy) = golden_step(&g, "s0", row);
                let x = match column {
                    "old_logp" => &mut c.old_logp,
                    "scores" => &mut c.scores,
                    _ => &mut logp,
                };
                x[i] = f32::NAN;
                let (m, d) = step(&mut *a, c, [&logp, &entropy], 5);
                // A likelihood reads no ratio: there a metric of ratios stops the step.
                let shows = d.iter().any(|d| !d.is_finite()) || m.values().any(|x| !x.is_finite());
                assert!(shows, "{row}: NaN in {column}[{i}]");
            }
        }
    }
}

/// What each algorithm asks of the trainer, and what it reports.
#[test]
fn a_reference_is_asked_for_where_a_kl_is() {
    let needs = |name, pairs: &[&str]| {
        build(name, &[&["reward_model=judge"], pairs].concat()).unwrap().needs()
    };
    assert!(!needs("grpo", &[]).reference && needs("grpo", &["kl_coef=0.1"]).reference);
    assert!(needs("rloo", &[]).reference && needs("reinforce++", &[]).reference);
    assert!(needs("grpo", &[]).scalar.is_none() && !needs("grpo", &[]).entropy);
    let both = needs("grpo", &["grpo_epochs=3", "minibatches=2", "entropy_coef=0.1"]);
    assert_eq!((both.epochs, both.minibatches, both.entropy), (3, 2, true));
    assert_eq!(needs("grpo", &[]).sampling().unwrap().samples_per_prompt, 8);
    let (_, metrics) = advantages(&mut *grpo(&[]));
    assert!(!metrics.contains_key("kl"), "{metrics:?}");
    let mut adapts = grpo(&["kl_coef=0.1", "kl_target=0.5"]);
    prepare(&mut *adapts, &mut columns().0);
    finish(&mut *adapts);
    let mut again = grpo(&["kl_coef=0.1", "kl_target=0.5"]);
    again.restore(&adapts.state()).unwrap();
    assert_eq!(again.state(), adapts.state());
    assert_ne!(again.state(), grpo(&["kl_coef=0.1"]).state());
}
