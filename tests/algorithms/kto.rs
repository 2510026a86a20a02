//! KTO: the losses of TRL, the KL of mismatched prompts, and that a policy learns what is good.

use std::path::Path;

use half::bf16;
use warpo::{
    algorithms::{Columns, Metrics},
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

/// Loss and gradient, `per` completions a micro-batch.
fn step(own: &[&str], c: &Columns<f32>, logp: &[f32], per: usize) -> (f64, Vec<f32>) {
    let mut a = build("kto", own).unwrap();
    a.prepare(&Device::cpu(), &mut c.clone(), &mut Metrics::new()).unwrap();
    let d = policy_loss(&mut *a, c, logp, None, per);
    (finish(&mut *a)["loss"], d)
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let g = Golden::open("pure/preference.safetensors");
    for seed in ["s0", "s7"] {
        let get = |key: &str| g.get(&format!("{seed}/pref_in/{key}"));
        let labels = get("label");
        // Row i is the chosen completion of pair i if it is good, else the rejected one.
        let rows = |keys: [String; 2]| -> Vec<Vec<f64>> {
            let row = |i: usize| {
                let side = usize::from(labels[i] == 0.0);
                let n = get(["chosen_len", "rejected_len"][side])[i] as usize;
                g.get(&keys[side])[9 * i..9 * i + n].to_vec()
            };
            (0..8).map(row).collect()
        };
        let inputs = |names: [&str; 2]| rows(names.map(|name| format!("{seed}/pref_in/{name}")));
        let narrow = |x: Vec<Vec<f64>>| x.concat().iter().map(|x| *x as f32).collect::<Vec<f32>>();
        let logp = inputs(["chosen", "rejected"]);
        let mut offsets = vec![0];
        logp.iter().for_each(|row| offsets.push(offsets[offsets.len() - 1] + row.len() as u32));
        let kl = get("kl_policy").iter().zip(get("kl_ref")).map(|(p, r)| p - r).sum::<f64>() / 8.0;
        // In one file the KL is positive, in the other below 0.
        assert_eq!(kl > 0.0, seed == "s0");
        let c = Columns {
            offsets,
            ref_logp: narrow(inputs(["ref_chosen", "ref_rejected"])),
            labels: labels.iter().map(|l| *l as f32).collect(),
            mismatched_kl: Some(kl),
            ..Columns::default()
        };
        let logp = narrow(logp);
        for (row, own) in [
            ("kto", &[][..]),
            ("kto_weighted", &["desirable_weight=1.33", "undesirable_weight=0.9"]),
            ("kto_zero_kl", &["baseline=zero"]),
            ("apo_zero_unpaired", &["baseline=zero"]),
        ] {
            let (loss, d) = step(own, &c, &logp, 3);
            let want = g.scalar(&format!("{seed}/pref/{row}/loss"));
            assert_close(row, &[loss], &[want], 1e-6, 1e-6);
            let want = rows(["d_chosen", "d_rejected"].map(|k| format!("{seed}/pref/{row}/{k}")));
            assert_close(row, &d, &want.concat(), 1e-7, 1e-5);
        }
    }
}

fn columns(lens: &[usize]) -> (Columns<f32>, Vec<f32>) {
    let n = lens.iter().sum();
    let logp = |name: &str| randn::<f64>(name, n).iter().map(|x| -x.abs() as f32).collect();
    let mut offsets = vec![0];
    lens.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + *n as u32));
    let c = Columns {
        samples: (0..lens.len() as u64).collect(),
        offsets,
        ref_logp: logp("reference"),
        labels: (0..lens.len()).map(|i| f32::from(u8::from(i % 3 != 1))).collect(),
        mismatched_kl: Some(0.3),
        ..Columns::default()
    };
    (c, logp("logp"))
}

/// Properties 4 and 9: neither micro-batches, nor order, nor repetition change the mean; a bad
/// number shows, in the KL, too.
#[test]
fn the_whole_step_counts() {
    let (c, logp) = columns(&[3, 1, 6, 2, 4]);
    let (want, d) = step(&[], &c, &logp, 5);
    for per in 1..5 {
        let (split, same) = step(&[], &c, &logp, per);
        assert_bits("d", &same, &d);
        assert_close("loss", &[split], &[want], 0.0, 1e-14);
    }
    for order in [&[3, 1, 4, 0, 2][..], &[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]] {
        let moved: Vec<f32> =
            order.iter().flat_map(|s| logp[c.span(&(*s..s + 1))].to_vec()).collect();
        let (got, _) = step(&[], &c.subset(order), &moved, 2);
        assert_close("order", &[got], &[want], 0.0, 1e-13);
    }
    for t in 0..logp.len() {
        let mut bad = logp.clone();
        bad[t] = f32::NAN;
        assert!(step(&[], &c, &bad, 2).0.is_nan());
    }
    let bad = Columns { mismatched_kl: Some(f64::NAN), ..c };
    assert!(step(&[], &bad, &logp, 2).0.is_nan());
}

/// Log-prob of each token of `ids` after the first `prompt`, summed.
fn logp<T: Element<Acc = f32>>(dev: &Device, m: &Model<T>, prompt: &[u32], rest: &[u32]) -> f64 {
    let mut batch = Batch::default();
    batch.push_predicted(&[prompt, rest].concat(), prompt.len());
    let scorer = Scorer { rows: 16, sequences: 1 };
    let mut arena = room_on(dev, scorer.plan::<T>(dev, m.spec(), m.head()).unwrap());
    let (mut logp, scope) = (Vec::new(), arena.scope());
    Pass::new(dev, m, &scope, &batch).score(&mut logp, None).unwrap();
    logp.iter().map(|x| f64::from(*x)).sum()
}

const PROMPTS: [&[u32]; 3] = [&[5, 9, 11], &[7], &[12, 13]];
const COMPLETIONS: [&[u32]; 3] = [&[20, 21, 22], &[30, 31], &[40]];

fn data(dir: &Path, labels: [bool; 3]) -> String {
    let path = dir.join("judged.jsonl");
    let line = |i: usize| {
        let (prompt, completion, label) = (PROMPTS[i], COMPLETIONS[i], labels[i]);
        format!(
            "{{\"input_ids\": {prompt:?}, \"output_ids\": {completion:?}, \"label\": {label}}}\n"
        )
    };
    std::fs::write(&path, (0..3).map(line).collect::<String>()).unwrap();
    format!("data={}", path.display())
}

/// The KL is that of each prompt with the completion before it, cut where the longest sequence
/// ends, under policy and reference as they are at the step.
#[test]
fn the_kl_is_of_mismatched_prompts() {
    let dir = temp_dir("kto_kl");
    let data = data(&dir, [true, false, true]);
    let more = [&data[..], "batch_size=3", "shuffle=false", "learning_rate=0.01", "warmup_steps=0"];
    let mut t = trainer_on::<f32>(host(), &dir, "kto", &more).unwrap();
    let kl = |m: &[(&'static str, f64)]| m.iter().find(|m| m.0 == "kl").unwrap().1;
    let first = t.step(&mut Silent).unwrap().metrics;
    assert_eq!(kl(&first), 0.0, "the policy is the reference");
    let reference =
        Model::<f32>::load(host(), &golden::path("llama_tied"), Head::Lm, None).unwrap();
    let pairs = [(0, &[40][..]), (1, &[20, 21, 22]), (2, &[30, 31])];
    let of = |m: &Model<f32>| -> f64 {
        pairs.iter().map(|(i, rest)| logp(host(), m, PROMPTS[*i], rest)).sum()
    };
    let want = (of(t.policy().unwrap()) - of(&reference)) / 3.0;
    let second = t.step(&mut Silent).unwrap().metrics;
    assert!(want.abs() > 0.01);
    assert_close("kl", &[kl(&second)], &[want], 1e-5, 1e-5);
    let error = trainer_on::<f32>(host(), &dir, "kto", &[&data[..], "batch_size=1"]).err().unwrap();
    let want = "config key `batch_size`: got 1, wanted 2 or more: the KL is that of a prompt with \
                the completion of another";
    assert_eq!(error.to_string(), want);
}

/// Good completions become likelier than they were, bad ones less likely, whichever they are.
fn learns<T: Element<Acc = f32>>(dev: &Device, model: &str, dir: &Path) {
    let model = format!("model={}", golden::path(model).display());
    for (labels, own) in
        [([true, false, true], "baseline=kl"), ([false, true, false], "baseline=zero")]
    {
        let data = data(dir, labels);
        let fixed =
            [&data[..], &model, own, "batch_size=3", "learning_rate=0.003", "warmup_steps=0"];
        let mut t = trainer_on::<T>(dev, dir, "kto", &fixed).unwrap();
        let now = |m: &Model<T>| [0, 1, 2].map(|i| logp(dev, m, PROMPTS[i], COMPLETIONS[i]));
        let before = now(t.policy().unwrap());
        (0..8).for_each(|_| drop(t.step(&mut Silent).unwrap()));
        let after = now(t.policy().unwrap());
        for i in 0..3 {
            let up = after[i] - before[i];
            assert!(
                (up > 0.3) == labels[i] && (up < -0.3) != labels[i],
                "{own} {before:?} {after:?}"
            );
        }
    }
}

#[test]
fn a_policy_learns_what_is_good() {
    learns::<f32>(host(), "llama_tied", &temp_dir("kto_learns"));
}

/// The same in bf16 on a device.
#[test]
fn a_policy_on_a_device_learns_what_is_good() {
    let dir = temp_dir("kto_learns_on_a_device");
    sim::on_devices(|dev| learns::<bf16>(dev, "llama", &dir));
}
