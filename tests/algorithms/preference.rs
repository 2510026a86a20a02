//! Algorithms over pairs: their settings are the losses of TRL, OpenRLHF and open-instruct; the
//! whole step counts, in every order; and a policy learns what people chose.

use std::path::Path;

use half::bf16;
use warpo::{
    Error,
    algorithms::{Algorithm, Columns, Metrics, MicroBatch},
    device::{Device, Element},
    models::{Batch, Head, Model, Pass},
    rollout::Scorer,
    train::Silent,
};

use crate::support::{
    assert_bits, assert_close, golden,
    golden::Golden,
    host,
    losses::{build, finish, policy_loss},
    randn, room_on,
    runs::trainer_on,
    sim, temp_dir,
};

/// Completions of these lengths, chosen and rejected in turn.
fn columns(lens: &[usize]) -> (Columns<f32>, Vec<f32>) {
    let n = lens.iter().sum();
    let logp =
        |name: &str| randn::<f64>(name, n).iter().map(|x| -(x.abs() + 0.05) as f32).collect();
    let mut offsets = vec![0];
    lens.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + *n as u32));
    let c = Columns {
        samples: (0..lens.len() as u64).collect(),
        offsets,
        weights: vec![1.0; n],
        ref_logp: logp("reference"),
        ..Columns::default()
    };
    (c, logp("logp"))
}

const LENS: [usize; 10] = [3, 1, 1, 4, 5, 2, 7, 7, 2, 6];

/// Loss and gradient as a step has them, `per` pairs a micro-batch.
fn step(a: &mut dyn Algorithm, c: &Columns<f32>, logp: &[f32], per: usize) -> (f64, Vec<f32>) {
    let needs = a.needs();
    let mut c = c.clone();
    if needs.old_logp {
        c.old_logp = logp.to_vec();
    }
    if !needs.reference {
        c.ref_logp = Vec::new();
    }
    a.prepare(&Device::cpu(), &mut c, &mut Metrics::new()).unwrap();
    let d = policy_loss(a, &c, logp, None, 2 * per);
    (finish(a)["loss"], d)
}

fn loss(name: &str, own: &[&str], c: &Columns<f32>, logp: &[f32], per: usize) -> (f64, Vec<f32>) {
    step(&mut *build(name, own).unwrap(), c, logp, per)
}

/// Settings of the rows of the golden file.
const ROWS: [(&str, &str, &[&str]); 38] = [
    ("sigmoid", "dpo", &[]),
    ("sigmoid_label_smoothing", "dpo", &["label_smoothing=0.1"]),
    ("sigmoid_norm", "dpo", &["loss_type=sigmoid_norm"]),
    ("hinge", "dpo", &["loss_type=hinge"]),
    ("ipo_trl", "dpo", &["loss_type=ipo"]),
    ("ipo_openrlhf", "dpo", &["loss_type=ipo_sum"]),
    ("robust", "dpo", &["loss_type=robust", "label_smoothing=0.1"]),
    ("exo_pair", "dpo", &["loss_type=exo_pair"]),
    ("nca_pair", "dpo", &["loss_type=nca_pair"]),
    ("bco_pair", "dpo", &["loss_type=bco_pair"]),
    ("sppo_hard", "dpo", &["loss_type=sppo_hard"]),
    ("apo_zero", "dpo", &["loss_type=apo_zero"]),
    ("apo_down", "dpo", &["loss_type=apo_down"]),
    ("discopop", "dpo", &["loss_type=discopop"]),
    ("aot", "dpo", &["loss_type=aot"]),
    ("aot_unpaired", "dpo", &["loss_type=aot_unpaired"]),
    ("sigmoid_plus_sft", "dpo", &["sft_coef=0.5"]),
    ("f_forward_kl", "dpo", &["f_divergence=forward_kl"]),
    ("f_js_divergence", "dpo", &["f_divergence=js_divergence"]),
    ("f_alpha_divergence_half", "dpo", &["f_divergence=alpha_divergence"]),
    ("f_alpha_divergence_2", "dpo", &["f_divergence=alpha_divergence", "f_alpha=2"]),
    ("wpo_plain", "dpo", &["wpo=true"]),
    ("ld_dpo", "dpo", &["ld_alpha=0.5"]),
    ("reference_free", "dpo", &["reference_free=true"]),
    ("sft", "dpo", &["loss_weights=[0]", "sft_coef=1"]),
    ("simpo", "simpo", &[]),
    ("simpo_label_smoothing", "simpo", &["label_smoothing=0.1"]),
    ("alphapo", "simpo", &["alpha=0.25"]),
    ("cpo_simpo", "simpo", &["sft_coef=1"]),
    ("cpo", "cpo", &[]),
    ("cpo_hinge", "cpo", &["loss_type=hinge"]),
    ("cpo_ipo", "cpo", &["loss_type=ipo"]),
    ("slic", "cpo", &["loss_type=hinge", "beta=1", "sft_coef=0"]),
    ("orpo", "orpo", &[]),
    // The same by other settings.
    ("reference_free", "cpo", &["sft_coef=0"]),
    ("sigmoid", "dpo", &["f_divergence=alpha_divergence", "f_alpha=1"]),
    ("sigmoid", "dpo", &["ld_alpha=1"]),
    ("sigmoid", "dpo", &["loss_type=[\"sigmoid\", \"hinge\"]", "loss_weights=[1, 0]"]),
];

/// Sides of a golden file without their padding, side by side.
fn packed(g: &Golden, seed: &str, [chosen, rejected]: [&str; 2]) -> Vec<f64> {
    let rows = |key: &str, side: &str| -> Vec<Vec<f64>> {
        let lens = g.ints(&format!("{seed}/pref_in/{side}_len"));
        let x = g.get(&format!("{seed}/{key}"));
        x.chunks(9).zip(lens).map(|(x, n)| x[..n as usize].to_vec()).collect()
    };
    let (chosen, rejected) = (rows(chosen, "chosen"), rows(rejected, "rejected"));
    chosen.iter().zip(&rejected).flat_map(|(c, r)| [&c[..], r].concat()).collect()
}

#[test]
fn settings_lead_to_the_losses_of_other_systems() {
    let g = Golden::open("pure/preference.safetensors");
    for seed in ["s0", "s7"] {
        let f32s = |x: Vec<f64>| x.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        let lens = ["chosen", "rejected"].map(|side| g.ints(&format!("{seed}/pref_in/{side}_len")));
        let mut offsets = vec![0];
        for n in lens[0].iter().zip(&lens[1]).flat_map(|(c, r)| [*c, *r]) {
            offsets.push(offsets[offsets.len() - 1] + n as u32);
        }
        let logp = f32s(packed(&g, seed, ["pref_in/chosen", "pref_in/rejected"]));
        let c = Columns {
            samples: (0..16).collect(),
            weights: vec![1.0; logp.len()],
            offsets,
            ref_logp: f32s(packed(&g, seed, ["pref_in/ref_chosen", "pref_in/ref_rejected"])),
            ..Columns::default()
        };
        for (row, algorithm, own) in ROWS {
            let what = format!("{seed} {row} {own:?}");
            let (got, d) = loss(algorithm, own, &c, &logp, 3);
            let key = |name: &str| format!("pref/{row}/{name}");
            let want = g.scalar(&format!("{seed}/{}", key("loss")));
            assert_close(&what, &[got], &[want], 1e-5, 1e-5);
            let want = packed(&g, seed, [&key("d_chosen"), &key("d_rejected")]);
            assert_close(&what, &d, &want, 1e-5, 1e-5);
            // Held-out pairs have the loss of training.
            let a = build(algorithm, own).unwrap();
            let mut held = c.clone();
            if !a.needs().reference {
                held.ref_logp = Vec::new();
            }
            let all = MicroBatch::new(&held, 0..16);
            let eval = a.evaluate(&Device::cpu(), &all, (&logp).into()).unwrap();
            assert_close(&what, &[eval[0].1], &[got], 1e-12, 1e-12);
            assert_eq!((eval[0].0, eval[1].0), ("eval_loss", "eval_accuracy"));
        }
    }
    // Unpaired rows have a test of their own; the masks are those of the lengths.
    let prefixes = ["s0/pref/kto", "s7/pref/kto", "s0/pref_in/", "s7/pref_in/"];
    let unpaired = ["s0/pref/apo_zero_unpaired", "s7/pref/apo_zero_unpaired"];
    g.all_read(&[&prefixes[..], &unpaired].concat());
}

/// Property 4, to the bit: a pair's gradient does not depend on its micro-batch.
#[test]
fn whole_step_denominators() {
    let (c, logp) = columns(&LENS);
    for (row, algorithm, own) in ROWS {
        let (whole, d) = loss(algorithm, own, &c, &logp, 5);
        for per in 1..5 {
            let (split, same) = loss(algorithm, own, &c, &logp, per);
            assert_bits(row, &same, &d);
            assert_close(row, &[split], &[whole], 1e-14, 1e-14);
        }
    }
}

#[test]
fn order_and_repetition_do_not_change_the_mean() {
    let (c, logp) = columns(&LENS);
    for (row, algorithm, own) in ROWS {
        let (want, d) = loss(algorithm, own, &c, &logp, 5);
        let pick = |order: &[usize]| {
            let order: Vec<usize> = order.iter().flat_map(|i| [2 * i, 2 * i + 1]).collect();
            let of = |s: &usize| logp[c.span(&(*s..s + 1))].to_vec();
            let logp: Vec<f32> = order.iter().flat_map(of).collect();
            let mut chosen = c.subset(&order);
            chosen.samples = (0..order.len() as u64).collect();
            loss(algorithm, own, &chosen, &logp, order.len() / 2)
        };
        let (permuted, moved) = pick(&[3, 1, 4, 0, 2]);
        assert_close(row, &[permuted], &[want], 1e-14, 1e-13);
        assert_bits(row, &moved[..14], &d[c.span(&(6..8))]);
        let (twice, half) = pick(&[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]);
        assert_close(row, &[twice], &[want], 1e-14, 1e-13);
        // Ranks of equal numbers are any: only their sum is known.
        let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>();
        assert_close(row, &[sum(&half)], &[sum(&d)], 1e-6, 1e-6);
    }
}

/// A reference that is the policy leaves DPO at log 2 and accuracy 0; a shift of both changes
/// nothing; chosen completions are pulled up, rejected ones down.
#[test]
fn only_the_ratio_to_the_reference_counts() {
    let (mut c, logp) = columns(&LENS);
    c.ref_logp.clone_from(&logp);
    let mut a = build("dpo", &[]).unwrap();
    let d = policy_loss(&mut *a, &c, &logp, None, 4);
    let m = finish(&mut *a);
    assert_eq!((m["accuracy"], m["reward_margin"]), (0.0, 0.0));
    assert_close("loss", &[m["loss"]], &[2f64.ln()], 0.0, 1e-15);
    for s in 0..LENS.len() {
        let up = if s % 2 == 0 { -1.0 } else { 1.0 };
        assert!(d[c.span(&(s..s + 1))].iter().all(|d| d * up > 0.0), "{s}: {d:?}");
    }
    let up = |x: &[f32]| x.iter().map(|x| x - 2.0).collect::<Vec<f32>>();
    let (c, logp) = columns(&LENS);
    let (want, d) = loss("dpo", &[], &c, &logp, 5);
    let moved = Columns { ref_logp: up(&c.ref_logp), ..c };
    let (same, moved) = loss("dpo", &[], &moved, &up(&logp), 5);
    assert_close("shifted", &[same], &[want], 1e-6, 1e-6);
    let d: Vec<f64> = d.iter().map(|d| f64::from(*d)).collect();
    assert_close("shifted", &moved, &d, 1e-6, 1e-5);
}

/// A margin is what z has to exceed: one of all of z leaves log 2. Kinds without a z refuse it.
#[test]
fn margins_are_subtracted_or_refused() {
    let (mut c, logp) = columns(&LENS[..4]);
    let sum = |x: &[f32], s: usize| x[c.span(&(s..s + 1))].iter().sum::<f32>();
    let ratio = |s: usize| sum(&logp, s) - sum(&c.ref_logp, s);
    let z: Vec<f32> = (0..2).map(|i| 0.1 * (ratio(2 * i) - ratio(2 * i + 1))).collect();
    c.margins = z;
    let (got, _) = loss("dpo", &[], &c, &logp, 1);
    assert_close("margin", &[got], &[2f64.ln()], 0.0, 1e-6);
    for kind in ["ipo", "apo_zero"] {
        let mut a = build("dpo", &[&format!("loss_type={kind}")]).unwrap();
        let (micro, mut d) = (MicroBatch::new(&c, 0..4), vec![0.0; logp.len()]);
        let done =
            a.policy_loss(host(), &micro, (&logp).into(), None, (&mut d).into(), None).unwrap_err();
        let text = done.to_string();
        assert!(text.starts_with("margins of pairs: got a column `margin`, wanted none"), "{text}");
    }
}

/// Property 9: a bad number is not lost in the mean.
#[test]
fn a_bad_number_shows() {
    let (c, logp) = columns(&LENS[..6]);
    for (row, algorithm, own) in ROWS.iter().filter(|row| row.0 != "sft") {
        for t in 0..logp.len() {
            let mut bad = logp.clone();
            bad[t] = f32::NAN;
            let (loss, _) = loss(algorithm, own, &c, &bad, 1);
            // An SFT loss alone does not read what was rejected.
            assert!(!loss.is_finite(), "{row} {t}: {loss}");
        }
    }
}

#[test]
fn a_wrong_setting_is_a_wrong_configuration() {
    for (name, own, want) in [
        ("dpo", &["beta=0"][..], "config key `beta`: got 0, wanted above 0"),
        (
            "dpo",
            &["label_smoothing=0.5"],
            "config key `label_smoothing`: got 0.5, wanted from 0 to below 0.5",
        ),
        (
            "dpo",
            &["loss_type=[\"aot\", \"hinge\"]"],
            "config key `loss_type`: got [\"aot\", \"hinge\"], wanted 1 to 3 losses; aot and \
             aot_unpaired alone",
        ),
        (
            "dpo",
            &["loss_weights=[1, 2]"],
            "config key `loss_weights`: got [1.0, 2.0], wanted none, or one for each of 1 losses",
        ),
        (
            "dpo",
            &["loss_type=hinge", "label_smoothing=0.1"],
            "config key `label_smoothing`: got 0.1, wanted 0: nothing here reads it",
        ),
        (
            "dpo",
            &["discopop_tau=0.1"],
            "config key `discopop_tau`: got 0.1, wanted 0.05: nothing here reads it",
        ),
        (
            "dpo",
            &["loss_type=ipo", "f_divergence=forward_kl"],
            "config key `f_divergence`: got \"forward_kl\", wanted \"reverse_kl\" beside the loss \
             \"ipo\"",
        ),
        (
            "dpo",
            &["f_alpha=0.3"],
            "config key `f_alpha`: got 0.3, wanted 0.5: nothing here reads it",
        ),
        (
            "cpo",
            &["loss_type=hinge", "label_smoothing=0.1"],
            "config key `label_smoothing`: got 0.1, wanted 0: nothing here reads it",
        ),
        (
            "dpo",
            &["loss_type=aot", "sft_coef=0.5"],
            "config key `sft_coef`: got another value, wanted its default with aot",
        ),
        (
            "dpo",
            &["reference_model=x", "reference_free=true"],
            "config key `reference_model`: got a folder, wanted none with reference_free",
        ),
        (
            "cpo",
            &["loss_type=simpo"],
            "config key `loss_type`: got \"simpo\", wanted one of [\"sigmoid\", \"hinge\", \"ipo\"]",
        ),
    ] {
        let error = build(name, own).map(drop).unwrap_err();
        assert!(matches!(&error, Error::Config { .. }), "{error:?}");
        assert_eq!(error.to_string(), want);
    }
}

/// Two completions of one prompt; people chose one of them.
fn pair(dir: &Path, chosen: u32, rejected: u32) -> String {
    let data = dir.join("pair.jsonl");
    let line = format!(
        "{{\"prompt_ids\": [5, 9, 11], \"chosen_ids\": [{chosen}, 7], \"rejected_ids\": [{rejected}]}}\n"
    );
    std::fs::write(&data, line).unwrap();
    format!("data={}", data.display())
}

/// Log-prob of a completion of that prompt.
fn logp<T: Element<Acc = f32>>(dev: &Device, model: &Model<T>, completion: &[u32]) -> f32 {
    let mut batch = Batch::default();
    batch.push_predicted(&[&[5, 9, 11], completion].concat(), 3);
    let scorer = Scorer { rows: 8, sequences: 1 };
    let mut arena = room_on(dev, scorer.plan::<T>(dev, model.spec(), model.head()).unwrap());
    let (mut logp, scope) = (Vec::new(), arena.scope());
    Pass::new(dev, model, &scope, &batch).score(&mut logp, None).unwrap();
    logp.iter().sum()
}

/// Whichever one people chose, the policy comes to prefer it, by every algorithm.
fn learns<T: Element<Acc = f32>>(dev: &Device, runs: &[(&str, &[&str])], model: &str, dir: &Path) {
    let model = format!("model={}", golden::path(model).display());
    for (algorithm, own) in runs {
        for [chosen, rejected] in [[20, 30], [30, 20]] {
            let data = pair(dir, chosen, rejected);
            let fixed =
                [&data[..], &model, "batch_size=1", "learning_rate=0.003", "warmup_steps=0"];
            let more = [&fixed[..], own].concat();
            let mut t = trainer_on::<T>(dev, dir, algorithm, &more).unwrap();
            let lead = |p: &Model<T>| logp(dev, p, &[chosen, 7]) - logp(dev, p, &[rejected]);
            let before = lead(t.policy().unwrap());
            let mut last = t.step(&mut Silent).unwrap();
            (0..7).for_each(|_| last = t.step(&mut Silent).unwrap());
            let after = lead(t.policy().unwrap());
            let what = format!("{algorithm} {own:?} {chosen}: from {before} to {after}");
            assert!(after > before + 1.0, "{what}");
            let margin = last.metrics.iter().find(|m| m.0 == "reward_margin").unwrap().1;
            println!("{what}, margin {margin}");
        }
    }
}

#[test]
fn a_policy_comes_to_prefer_what_people_chose() {
    // From a margin of 0 the loss of DiscoPOP falls to both sides; doubted labels bound the margin.
    let taught = |row: &&(&'static str, _, _)| {
        !["sft", "discopop", "simpo_label_smoothing"].contains(&row.0)
    };
    let runs: Vec<(&str, &[&str])> = ROWS.iter().filter(taught).map(|row| (row.1, row.2)).collect();
    learns::<f32>(host(), &runs, "llama_tied", &temp_dir("preference_learns"));
}

/// The same in bf16 on a device.
#[test]
fn a_policy_on_a_device_comes_to_prefer_what_people_chose() {
    let dir = temp_dir("preference_learns_on_a_device");
    let runs: [(&str, &[&str]); 2] = [("dpo", &[]), ("orpo", &["beta=1"])];
    sim::on_devices(|dev| learns::<bf16>(dev, &runs, "llama", &dir));
}

/// The log-probs of a step are those of the completions, without their prompts, under the policy
/// and under a reference from a folder.
#[test]
fn completions_count_and_prompts_do_not() {
    let dir = temp_dir("preference_prompts");
    let other = dir.join("other");
    let mut reference =
        Model::<f32>::load(host(), &golden::path("llama_tied"), Head::Lm, None).unwrap();
    let flat = reference.params_mut().unwrap().flat_mut().host();
    flat.iter_mut().enumerate().for_each(|(i, w)| *w *= 1.0 + 0.1 * (i as f32).sin());
    reference.repack(host()).unwrap();
    std::fs::create_dir_all(&other).unwrap();
    warpo::models::save(host(), &reference, &other).unwrap();
    let (data, folder) = (pair(&dir, 20, 30), format!("reference_model={}", other.display()));
    let more = [&data[..], &folder, "batch_size=1", "learning_rate=0"];
    let mut t = trainer_on::<f32>(host(), &dir, "dpo", &more).unwrap();
    let metrics = t.step(&mut Silent).unwrap().metrics;
    let is = |name| metrics.iter().find(|m| m.0 == name).unwrap().1;
    let policy = t.policy().unwrap();
    let [chosen, rejected] = [&[20, 7][..], &[30]].map(|c| {
        let [policy, reference] = [policy, &reference].map(|m| f64::from(logp(host(), m, c)));
        assert!((policy - reference).abs() > 1e-3);
        (policy, 0.1 * (policy - reference))
    });
    let got = [is("chosen_logp"), is("rejected_logp"), is("chosen_reward"), is("rejected_reward")];
    assert_close("step", &got, &[chosen.0, rejected.0, chosen.1, rejected.1], 1e-5, 1e-5);
}
