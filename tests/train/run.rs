//! Properties 2, 4, 7, 8 and 9 of whole runs: what a run leaves does not depend on how often it was
//! stopped, on threads or on micro-batches, and a bad number never reaches the weights.

use std::{path::Path, time::Duration};

use warpo::{
    Error, Result,
    algorithms::{Algorithm, MicroBatch, Needs},
    config,
    device::{Device, View, ViewMut},
    rng::{Philox, Purpose},
    train::{Settings, Silent, Trainer},
};

use crate::support::{
    assert_bits, assert_close, golden, host, root,
    runs::{
        assert_same, copy, data, entry, metrics, outcome, small, train, train_command, trainer,
    },
    sim, temp_dir,
};

/// G1: a run that is resumed from the checkpoint of any of its 40 steps ends with the bytes of the
/// straight run: weights, moments, metrics, rollouts. Resumed runs use another number of threads.
/// By default the steps are the first, those around an epoch's end and the last.
fn resumes_at_every_step(algorithm: &str) {
    let dir = temp_dir(&format!("resume_{algorithm}"));
    let (straight, resumed) = (dir.join("straight"), dir.join("resumed"));
    let pairs = small(&dir, algorithm, &straight);
    let with = |more: &[&str]| {
        [&pairs[..], &more.iter().map(|s| s.to_string()).collect::<Vec<_>>()].concat()
    };
    train(algorithm, &with(&["checkpoint_every=1", "keep_checkpoints=50", "threads=1"])).unwrap();
    let wanted = outcome(&straight);
    assert_eq!(metrics(&straight).len(), 40);
    for step in (1..=40).filter(|s| sim::full() || [1, 19, 20, 21, 40].contains(s)) {
        let _ = std::fs::remove_dir_all(&resumed);
        let name = format!("checkpoints/step-{step}");
        copy(&straight.join(&name), &resumed.join(&name));
        for kept in ["metrics.jsonl", "rollouts"] {
            let from = straight.join(kept);
            if from.is_dir() {
                copy(&from, &resumed.join(kept));
            } else if from.exists() {
                std::fs::copy(&from, resumed.join(kept)).unwrap();
            }
        }
        let out = format!("out={}", resumed.display());
        train(algorithm, &with(&[&out, "checkpoint_every=0", "threads=2"])).unwrap();
        assert_same(&format!("{algorithm} resumed at {step}"), &wanted, &outcome(&resumed));
    }
}

#[test]
fn sft_resumes_at_every_step() {
    resumes_at_every_step("sft");
}

#[test]
fn reward_resumes_at_every_step() {
    resumes_at_every_step("reward");
}

#[test]
fn kto_resumes_at_every_step() {
    resumes_at_every_step("kto");
}

#[test]
fn dpo_resumes_at_every_step() {
    resumes_at_every_step("dpo");
}

#[test]
fn ppo_resumes_at_every_step() {
    resumes_at_every_step("ppo");
}

#[test]
fn grpo_resumes_at_every_step() {
    resumes_at_every_step("grpo");
}

/// G2, G8: SIGKILL, SIGTERM and SIGINT at random instants; the same command goes on, and ends with
/// the bytes of the straight run.
#[test]
fn nothing_is_lost_when_a_run_is_killed() {
    let dir = temp_dir("killed");
    let (straight, killed) = (dir.join("straight"), dir.join("killed"));
    train("ppo", &small(&dir, "ppo", &straight)).unwrap();
    let mut pairs = small(&dir, "ppo", &killed);
    pairs.push("checkpoint_every=2".into());
    let draw = Philox::new(1, 0, 0, Purpose::Pairs);
    let (mut codes, mut kills, mut resumed) = (Vec::new(), 0, 0);
    let saved =
        || std::fs::read_dir(killed.join("checkpoints")).is_ok_and(|mut d| d.next().is_some());
    let finished = (0..200).any(|attempt| {
        resumed += usize::from(saved());
        let mut child = train_command("ppo", &pairs).spawn().unwrap();
        if attempt == 0 {
            // One kill at least falls between two checkpoints.
            crate::support::wait_for(&killed.join("checkpoints/step-2/manifest.json"));
        }
        let wait = Duration::from_millis(u64::from(draw.below(attempt, 120)));
        std::thread::sleep(wait);
        let signal = ["KILL", "TERM", "INT"][attempt as usize % 3];
        kills += 1;
        let sent = std::process::Command::new("kill")
            .args(["-s", signal, &child.id().to_string()])
            .output()
            .unwrap();
        let status = child.wait().unwrap();
        codes.push((signal, status.code()));
        // A signal before the handlers are there ends the process as any other program.
        let expected = match signal {
            "KILL" => [None, Some(0)].to_vec(),
            "TERM" => [None, Some(143), Some(0)].to_vec(),
            _ => [None, Some(130), Some(0)].to_vec(),
        };
        assert!(expected.contains(&status.code()), "{signal}: {status} ({sent:?})");
        status.success()
    });
    if !finished {
        assert!(train_command("ppo", &pairs).status().unwrap().success());
    }
    assert!(resumed > 0, "no run was resumed: {codes:?}");
    assert_same(
        &format!("after {kills} signals {codes:?}"),
        &outcome(&straight),
        &outcome(&killed),
    );
}

/// Property 8, on purpose: the first signal lets the step finish, commits and says so.
#[test]
fn a_signal_commits_the_step_and_exits_with_its_code() {
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let dir = temp_dir(&format!("signal_{signal}"));
        let run = dir.join("run");
        let mut pairs = small(&dir, "sft", &run);
        pairs.extend(["steps=1000000".into(), "checkpoint_every=0".into()]);
        let mut child = train_command("sft", &pairs).spawn().unwrap();
        crate::support::wait_for(&run.join("metrics.jsonl"));
        std::process::Command::new("kill")
            .args(["-s", signal, &child.id().to_string()])
            .status()
            .unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        let steps = metrics(&run).len();
        assert!(run.join(format!("checkpoints/step-{steps}/manifest.json")).exists(), "{steps}");
        assert!(!run.join("final").exists());
    }
}

#[test]
fn a_second_trainer_in_the_folder_is_refused() {
    let dir = temp_dir("second");
    let run = dir.join("run");
    let mut pairs = small(&dir, "sft", &run);
    pairs.push("steps=1000000".into());
    let mut first = train_command("sft", &pairs).spawn().unwrap();
    crate::support::wait_for(&run.join("metrics.jsonl"));
    assert_eq!(train_command("sft", &pairs).status().unwrap().code(), Some(5));
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn other_settings_or_data_do_not_resume() {
    let dir = temp_dir("other_settings");
    let run = dir.join("run");
    let pairs = small(&dir, "sft", &run);
    let with = |pair: &str| [&pairs[..], &[pair.to_owned()]].concat();
    train("sft", &with("steps=40")).unwrap();
    let error = train("sft", &with("learning_rate=0.5")).unwrap_err();
    assert!(matches!(&error, Error::Config { key, .. } if key == "learning_rate"), "{error}");
    assert!(error.to_string().contains("0.003") && error.to_string().contains("0.5"), "{error}");
    data(&dir, "sft", 76);
    let error = train("sft", &pairs).unwrap_err();
    assert!(matches!(&error, Error::Config { key, .. } if key == "data"), "{error}");
    let error = train("reward", &small(&dir, "reward", &run)).unwrap_err();
    assert!(matches!(&error, Error::Config { key, .. } if key == "algorithm"), "{error}");
}

/// A run goes on for longer than it was to: with a constant rate as if it had been so long from the
/// start, else by the course of the longer run from there on, which is said and kept.
#[test]
fn a_run_is_extended() {
    let dir = temp_dir("extended");
    let pairs = |name: &str, more: &[&str]| {
        let mut pairs = small(&dir, "sft", &dir.join(name));
        pairs.extend(more.iter().map(|s| s.to_string()));
        pairs
    };
    let constant = |name: &str, steps: &str| pairs(name, &["schedule=constant", steps]);
    let (short, whole) = (dir.join("short"), dir.join("whole"));
    train("sft", &constant("short", "steps=25")).unwrap();
    train("sft", &constant("whole", "steps=40")).unwrap();
    train("sft", &constant("short", "steps=40")).unwrap();
    let weights = |run: &Path| std::fs::read(run.join("final/model.safetensors")).unwrap();
    assert!(weights(&short) == weights(&whole));
    assert_eq!(metrics(&short), metrics(&whole));
    let about = |key: &str| -> serde_json::Value {
        let text = std::fs::read_to_string(short.join("run.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()[key].clone()
    };
    let first = serde_json::json!({ "at": 25, "settings": { "steps": ["25", "40"] } });
    assert_eq!(about("extended"), serde_json::json!([first]));
    // again, with another course
    train("sft", &pairs("short", &["schedule=linear", "steps=50", "warmup_steps=0"])).unwrap();
    let course = ["schedule", "steps", "warmup_steps"]
        .map(|key| about("extended")[1]["settings"][key].clone());
    let course = course.map(|pair| pair.to_string());
    assert_eq!(
        course,
        ["[\"\\\"constant\\\"\",\"\\\"linear\\\"\"]", "[\"40\",\"50\"]", "[\"3\",\"0\"]"]
    );
    let rates: Vec<f64> =
        metrics(&short).iter().map(|m| m["learning_rate"].as_f64().unwrap()).collect();
    assert_eq!(rates.len(), 50);
    let got = [rates[39], rates[40], rates[49]];
    assert_close("rates", &got, &[0.003, 0.003 * 0.2, 0.003 * 0.02], 0.0, 1e-12);
    // no longer run, or another one that is longer, is none of it
    for (more, key) in [
        (&["schedule=linear", "steps=50", "warmup_steps=1"][..], "warmup_steps"),
        (&["schedule=linear", "steps=45", "warmup_steps=0"], "steps"),
        (&["schedule=linear", "steps=60", "weight_decay=0.5"], "weight_decay"),
    ] {
        let e = train("sft", &pairs("short", more)).unwrap_err();
        assert!(matches!(&e, Error::Config { key: k, .. } if k == key), "{e}");
    }
}

/// Nor do other models under the same name, another mask, or other margins. A fixed bug: only the
/// tokens were compared.
#[test]
fn other_models_masks_or_margins_do_not_resume() {
    let dir = temp_dir("other_models");
    let refused = |run: &Path, algorithm: &str, pairs: &[String]| {
        let error = train(algorithm, pairs).unwrap_err();
        let Error::Config { key, message, .. } = &error else { panic!("{error}") };
        assert!(message.starts_with(&format!("{} holds a run with", run.display())), "{message}");
        key.clone()
    };
    // another reward model, then another policy, in the same folders
    let (model, judge) = (dir.join("model"), dir.join("judge"));
    copy(&golden::path("llama_tied"), &model);
    copy(&golden::path("llama_tied/rm"), &judge);
    let run = dir.join("ppo");
    let mut pairs = small(&dir, "ppo", &run);
    pairs.push(format!("model={}", model.display()));
    pairs.push(format!("reward_model={}", judge.display()));
    pairs.push("steps=2".into());
    train("ppo", &pairs).unwrap();
    for (folder, key) in [(&judge, "reward_model"), (&model, "policy")] {
        let file = folder.join("model.safetensors");
        let whole = std::fs::read(&file).unwrap();
        let mut changed = whole.clone();
        let last = changed.len() - 4;
        changed[last..].copy_from_slice(&0.25f32.to_le_bytes());
        std::fs::write(&file, changed).unwrap();
        assert_eq!(refused(&run, "ppo", &pairs), key);
        std::fs::write(&file, whole).unwrap();
    }
    // the same ones, elsewhere
    let data = dir.join("ppo.jsonl");
    for (from, key) in [(&model, "model"), (&judge, "reward_model"), (&data, "data")] {
        let to = from.with_file_name(format!("moved-{key}.jsonl"));
        std::fs::rename(from, &to).unwrap();
        pairs.push(format!("{key}={}", to.display()));
    }
    train("ppo", &pairs).unwrap();
    // the same tokens, of which others are learned
    let run = dir.join("sft");
    let pairs = small(&dir, "sft", &run);
    let line = |labels: &str| format!("{{\"input_ids\": [5, 6, 7], \"labels\": {labels}}}\n");
    std::fs::write(dir.join("sft.jsonl"), line("[5, 6, 7]")).unwrap();
    train("sft", &pairs).unwrap();
    std::fs::write(dir.join("sft.jsonl"), line("[5, -100, 7]")).unwrap();
    assert_eq!(refused(&run, "sft", &pairs), "data");
    // the same pairs, of which people were surer
    let run = dir.join("reward");
    let pairs = small(&dir, "reward", &run);
    let line = |margin: f64| {
        let ids = "\"prompt_ids\": [5], \"chosen_ids\": [6], \"rejected_ids\": [7]";
        format!("{{{ids}, \"margin\": {margin}}}\n")
    };
    std::fs::write(dir.join("reward.jsonl"), line(1.0)).unwrap();
    train("reward", &pairs).unwrap();
    std::fs::write(dir.join("reward.jsonl"), line(1.5)).unwrap();
    assert_eq!(refused(&run, "reward", &pairs), "data");
}

/// Weights and tokens do not tell all of a run: which function of them it is, where texts end, and
/// what it is evaluated on are compared, too.
#[test]
fn another_spec_end_or_held_out_text_does_not_resume() {
    let dir = temp_dir("other_ends");
    let (model, held_out, run) = (dir.join("model"), dir.join("held_out.jsonl"), dir.join("run"));
    copy(&root().join("examples/quickstart/model"), &model);
    let mut pairs = small(&dir, "sft", &run);
    let more = [("model", &model), ("eval_data", &held_out)];
    pairs.extend(more.map(|(key, path)| format!("{key}={}", path.display())));
    pairs.extend(["eos_id=none", "steps=2", "batch_size=2"].map(str::to_owned));
    std::fs::write(&held_out, "{\"input_ids\": [5, 6, 7]}\n").unwrap();
    train("sft", &pairs).unwrap();
    for (file, from, to, want) in [
        (model.join("config.json"), "1e-05", "1e-06", "policy"),
        (model.join("tokenizer_config.json"), "\"</s>\"", "\"<unk>\"", "eos"),
        (held_out, "7", "8", "eval_data"),
    ] {
        let whole = std::fs::read_to_string(&file).unwrap();
        assert!(whole.contains(from), "{}", file.display());
        std::fs::write(&file, whole.replace(from, to)).unwrap();
        let error = train("sft", &pairs).unwrap_err();
        let Error::Config { key, message, .. } = &error else { panic!("{error}") };
        assert!(key == want && message.contains("holds a run with"), "{key}: {message}");
        std::fs::write(&file, whole).unwrap();
    }
    train("sft", &pairs).unwrap();
}

/// A finished run that is started again changes nothing; a refused one leaves nothing.
#[test]
fn a_finished_or_refused_run_leaves_its_folder_alone() {
    let dir = temp_dir("finished");
    let run = dir.join("run");
    let pairs = small(&dir, "sft", &run);
    let listing = || {
        let mut all: Vec<_> = std::fs::read_dir(&run)
            .unwrap()
            .map(|e| e.unwrap())
            .map(|e| (e.file_name(), e.metadata().unwrap().modified().unwrap()))
            .filter(|(name, _)| name != "lock")
            .collect();
        all.sort();
        all
    };
    train("sft", &pairs).unwrap();
    let before = listing();
    assert_eq!(train("sft", &pairs).unwrap(), run.join("final"));
    assert_eq!(listing(), before);
    // without its model it is exported again
    std::fs::remove_dir_all(run.join("final")).unwrap();
    train("sft", &pairs).unwrap();
    assert!(run.join("final/model.safetensors").exists());
    let refused = dir.join("refused");
    let mut pairs = small(&dir, "sft", &refused);
    pairs.push("data=none.jsonl".into());
    train("sft", &pairs).unwrap_err();
    assert!(!refused.exists());
}

/// Property 4: splitting a step into micro-batches changes nothing but rounding.
#[test]
fn whole_step_denominators() {
    for algorithm in ["sft", "reward", "dpo", "kto", "ppo", "grpo"] {
        let dir = temp_dir(&format!("micro_{algorithm}"));
        let losses = |tokens: usize| {
            let run = dir.join(tokens.to_string());
            let mut pairs = small(&dir, algorithm, &run);
            pairs.extend([format!("micro_batch_tokens={tokens}"), "steps=3".into()]);
            pairs.push("batch_size=16".into());
            train(algorithm, &pairs).unwrap();
            metrics(&run)
        };
        let (whole, split) = (losses(4096), losses(1));
        for (a, b) in whole.iter().zip(&split) {
            for name in ["loss", "grad_norm"] {
                let (a, b) = (a[name].as_f64().unwrap(), b[name].as_f64().unwrap());
                assert!((a - b).abs() <= 2e-5 * a.abs(), "{algorithm} {name}: {a} and {b}");
            }
            assert_eq!(a["tokens"], b["tokens"]);
        }
    }
}

/// Property 4, to the bit: neither the split of a step into micro-batches nor a long held-out text
/// changes a weight. Two fixed bugs: a tied embedding took the gradients of the LM head and of the
/// tokens in turn by micro-batch; a held-out text made micro-batches as long as itself.
#[test]
fn neither_the_split_nor_held_out_texts_change_a_weight() {
    let dir = temp_dir("split");
    let long = dir.join("long.jsonl");
    std::fs::write(&long, format!("{{\"input_ids\": {:?}}}", [7; 100])).unwrap();
    for (algorithm, model) in [
        ("sft", "llama_tied"),
        ("sft", "llama"),
        ("sft", "gpt2"),
        ("reward", "llama_tied"),
        ("dpo", "llama_tied"),
        ("kto", "llama_tied"),
        ("ppo", "llama_tied"),
        ("rloo", "llama_tied"),
    ] {
        let weights = |more: &str| {
            let model = format!("model={}", golden::path(model).display());
            let more = [&model, "batch_size=16", "warmup_steps=0", more];
            let mut trainer = trainer(&dir, algorithm, &more).unwrap();
            for _ in 0..3 {
                trainer.step(&mut Silent).unwrap();
            }
            let trained = trainer.policy().into_iter().chain(trainer.scalar());
            trained.flat_map(|m| m.master().unwrap().host().to_vec()).collect::<Vec<f32>>()
        };
        let whole = weights("micro_batch_tokens=4096");
        for more in ["micro_batch_tokens=90", "micro_batch_tokens=1"] {
            assert_bits(&format!("{algorithm} {model} {more}"), &weights(more), &whole);
        }
        if algorithm == "sft" {
            let held_out = weights(&format!("eval_data={}", long.display()));
            assert_bits(&format!("{model} beside a long text"), &held_out, &whole);
        }
    }
}

/// Property 2, and soak G19: at learning rate 0 the policy stays the reference, so every KL is
/// exactly 0, nothing is clipped, and the weights end as they began.
#[test]
fn rollout_equals_training_when_nothing_is_learned() {
    let dir = temp_dir("soak");
    let run = dir.join("run");
    let mut pairs = small(&dir, "ppo", &run);
    pairs.extend(["learning_rate=0".into(), "steps=60".into(), "kl_target=none".into()]);
    train("ppo", &pairs).unwrap();
    for m in metrics(&run) {
        for name in ["kl", "kl_per_token", "clip_fraction", "approx_kl", "max_log_ratio"] {
            assert_eq!(m[name].as_f64(), Some(0.0), "step {}: {name}", m["step"]);
        }
    }
    let read = |p: &Path| {
        let bytes = std::fs::read(p.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<_> =
            file.tensors().into_iter().map(|(n, t)| (n, t.data().to_vec())).collect();
        all.sort();
        all
    };
    let (before, after) = (read(&golden::path("llama_tied")), read(&run.join("final")));
    let skip = |n: &str| n == "lm_head.weight"; // tied: saved once
    let keep =
        |v: Vec<(String, Vec<u8>)>| v.into_iter().filter(|x| !skip(&x.0)).collect::<Vec<_>>();
    assert_eq!(keep(before), keep(after));
}

/// Property 9: a step whose numbers blow up is stopped before its update; the checkpoint before it
/// stays, and so does the line of metrics before it.
#[test]
fn a_bad_number_stops_the_step() {
    let dir = temp_dir("bad_number");
    let run = dir.join("run");
    let mut pairs = small(&dir, "sft", &run);
    pairs.extend(["learning_rate=1e30", "warmup_steps=0", "checkpoint_every=1"].map(String::from));
    let error = train("sft", &pairs).unwrap_err();
    let Error::BadNumber { step, what, .. } = &error else { panic!("{error}") };
    // weights of 1e30 overflow in the first norm
    assert_eq!((*step, what.as_str()), (2, "log-prob"));
    assert_eq!(error.exit_code(), 4);
    assert_eq!(metrics(&run).len(), 1);
    assert!(run.join("checkpoints/step-1/manifest.json").exists());
    assert!(!run.join("checkpoints/step-2").exists());
}

/// Property 9: weights that are no numbers any more are never saved. A fixed bug: a step size
/// beyond f32 was applied, committed and exported.
#[test]
fn a_bad_weight_is_never_saved() {
    // The second update of a step sees what the first left: of PPO there are four.
    for (algorithm, name) in [("sft", "policy"), ("reward", "reward"), ("ppo", "policy")] {
        let dir = temp_dir(&format!("bad_weight_{algorithm}"));
        let run = dir.join("run");
        let mut pairs = small(&dir, algorithm, &run);
        pairs.extend(["learning_rate=1e39", "warmup_steps=0", "steps=1"].map(String::from));
        let error = train(algorithm, &pairs).unwrap_err();
        let Error::BadNumber { step: 1, what, value, .. } = &error else { panic!("{error}") };
        assert!(what.starts_with("the new weight of model.embed_tokens.weight"), "{what}");
        assert!(what.ends_with(&format!("of the {name} model")) && !value.is_finite(), "{error}");
        assert!(!run.join("checkpoints").exists() && !run.join("final").exists());
    }
}

/// An algorithm whose loss gives one sample a bad gradient.
struct Poison {
    sample: u64,
    value: f32,
}

impl Algorithm for Poison {
    fn needs(&self) -> Needs {
        let sft = entry("sft");
        (sft.build)(&*(sft.section)()).unwrap().needs()
    }

    fn policy_loss(
        &mut self,
        _: &Device,
        micro: &MicroBatch<'_, f32>,
        _: View<'_, f32>,
        _: Option<View<'_, f32>>,
        dlogp: ViewMut<'_, f32>,
        _: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        let dlogp = dlogp.host();
        dlogp.fill(0.1);
        for s in micro.sequences.clone() {
            if micro.columns.samples[s] == self.sample {
                let tokens = micro.columns.span(&(s..s + 1));
                dlogp[tokens.end - 1 - micro.tokens().start] = self.value;
            }
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut Vec<(&'static str, f64)>) -> warpo::Result<()> {
        Ok(())
    }
}

/// Property 9: whichever sample of a step is bad, in whichever micro-batch, it is named.
#[test]
fn the_bad_sample_is_named() {
    let dir = temp_dir("bad_sample");
    let mut settings = Settings::default();
    for pair in small(&dir, "sft", &dir.join("run")) {
        config::set_pair(&mut [&mut settings], &pair).unwrap();
    }
    settings.warmup_steps = 0;
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for sample in 0..12 {
            let poison = Box::new(Poison { sample, value });
            let mut trainer = Trainer::<f32>::new(host(), settings.clone(), poison).unwrap();
            let before = trainer.policy().unwrap().params().flat().host().to_vec();
            let mut step = 0;
            let error = loop {
                step += 1;
                match trainer.step(&mut Silent) {
                    Ok(_) => assert!(step < 4),
                    Err(error) => break error,
                }
            };
            let Error::BadNumber { step: at, what, samples, places, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!(places.len(), 1);
            let line: usize = places[0].rsplit(':').next().unwrap().parse().unwrap();
            assert!(places[0].contains("sft.jsonl:") && (1..=77).contains(&line), "{places:?}");
            assert_eq!((*at, what.as_str()), (step, "d loss / d log-prob"));
            assert_eq!(samples[..], [sample], "{value}");
            assert_eq!(step, sample / 4 + 1);
            let after = trainer.policy().unwrap().params().flat().host();
            assert_eq!(step == 1, before == after, "only the steps before the bad one update");
        }
    }
}
