//! What a run leaves at its end: a model that is this run's, whole, and nobody else's.

use std::{fs, path::Path, process::Command};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

use crate::support::{
    assert_bits, golden,
    runs::{assert_same, copy, metrics, outcome, small, train, warpo},
    temp_dir,
};

fn run(dir: &Path, algorithm: &str, name: &str, more: &[&str]) -> warpo::Result<()> {
    let mut pairs = small(dir, algorithm, &dir.join(name));
    pairs.extend(["steps=3", "checkpoint_every=1"].iter().chain(more).map(|s| s.to_string()));
    train(algorithm, &pairs).map(drop)
}

/// Two fixed faults: a folder `final` was taken for the run's model because it was there.
#[test]
fn a_model_that_is_stale_or_damaged_is_exported_again() {
    let dir = temp_dir("export_again");
    run(&dir, "sft", "a", &[]).unwrap();
    run(&dir, "sft", "b", &["learning_rate=0.001"]).unwrap();
    let (model, want) = (dir.join("a/final"), outcome(&dir.join("a")));
    let weights = model.join("model.safetensors");
    let spoilt: [&dyn Fn(); 5] = [
        // another run's, as a kill between the last checkpoint and the export leaves it
        &|| copy(&dir.join("b/final"), &model),
        // what a power cut may leave of a file that nobody synced
        &|| fs::write(&weights, b"").unwrap(),
        &|| {
            let mut bytes = fs::read(&weights).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&weights, bytes).unwrap();
        },
        &|| fs::remove_file(model.join("warpo.json")).unwrap(),
        // opening it would wait for ever
        &|| {
            fs::remove_file(&weights).unwrap();
            assert!(Command::new("mkfifo").arg(&weights).status().unwrap().success());
        },
    ];
    for spoil in spoilt {
        spoil();
        run(&dir, "sft", "a", &[]).unwrap();
        assert_same("exported again", &outcome(&dir.join("a")), &want);
    }
}

/// The model of a checkpoint is that of a run of so many steps, by the command and wherever a model
/// is named.
#[test]
fn a_checkpoint_is_a_model() {
    let dir = temp_dir("export_checkpoint");
    run(&dir, "ppo", "a", &["schedule=constant", "checkpoint_every=2"]).unwrap();
    run(&dir, "ppo", "short", &["schedule=constant", "steps=2"]).unwrap();
    let (at, path) =
        (dir.join("a/checkpoints/step-2"), |name: &str| dir.join(name).display().to_string());
    let at = at.display().to_string();
    let export = |from: &str, to: &str, more: &[&str]| {
        let to = path(to);
        let done = warpo(&[&["export", from, "--out", &to], more].concat()).output().unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    let bytes = |model: &str| fs::read(dir.join(model).join("model.safetensors")).unwrap();
    let files = |model: &str| {
        let all = fs::read_dir(dir.join(model)).unwrap().map(|f| f.unwrap().file_name());
        all.collect::<std::collections::BTreeSet<_>>()
    };
    for (to, more, want) in
        [("policy", &[][..], "short/final"), ("value", &["--role", "value"], "short/final-value")]
    {
        assert_eq!(export(&at, to, more), (Some(0), String::new()));
        assert_eq!((bytes(to), files(to)), (bytes(want), files(want)), "{to}");
    }
    assert_ne!(bytes("policy"), bytes("a/final"));

    let score = |model: &str| {
        let data = dir.join("ppo.jsonl").display().to_string();
        let done = warpo(&["score", "--model", model, "--data", &data]).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        (done.stdout, String::from_utf8(done.stderr).unwrap().contains("writing the model of"))
    };
    let (want, _) = score(&path("policy"));
    assert_eq!(score(&at), (want.clone(), true));
    assert_eq!(score(&at), (want.clone(), false), "it is there by now");
    // one that is damaged is written again
    fs::write(dir.join("a/step-2/model.safetensors"), "").unwrap();
    assert_eq!(score(&at), (want, true));
    // and is trained on
    let out = path("next");
    let args = ["train", "ppo", "--model", &at, "--reward-model", &at];
    let e = warpo(&[&args[..], &["--data", &path("ppo.jsonl"), "--out", &out]].concat())
        .output()
        .unwrap()
        .stderr;
    assert!(String::from_utf8(e).unwrap().contains("a/step-2"), "the folder that stands for it");

    // the checkpoint may go, its model stays; what is of no run is left alone
    fs::rename(&at, path("aside")).unwrap();
    assert!(!score(&at).1);
    fs::rename(path("aside"), &at).unwrap();
    copy(&dir.join("a/checkpoints/step-3"), &dir.join("a/checkpoints/step-7"));
    copy(&golden::path("llama_tied"), &dir.join("a/step-7"));
    let e = warpo(&["chat", "--model", &path("a/checkpoints/step-7")]).output().unwrap().stderr;
    assert!(String::from_utf8(e).unwrap().contains("a/step-7: is no model of"));
    assert!(bytes("a/step-7") == fs::read(golden::path("llama_tied/model.safetensors")).unwrap());
    // elsewhere than in a run it is no name of a model
    copy(&dir.join("a/checkpoints/step-3"), &dir.join("b/c/final"));
    let data = path("ppo.jsonl");
    let args = ["score", "--model", &path("b/c/final"), "--data", &data];
    let e = warpo(&args).output().unwrap().stderr;
    assert!(String::from_utf8(e).unwrap().contains("it is a checkpoint: `warpo export`"));

    let (code, e) = export(&at, "other", &["--role", "reward"]);
    assert!(code == Some(2) && e.contains("`--role`: got reward, wanted policy or value"), "{e}");
    let (code, e) = export(&at, "policy", &[]);
    assert!(code == Some(2) && e.contains("wanted a folder that is not there yet"), "{e}");
    let policy = dir.join("a/checkpoints/step-2/policy.safetensors");
    let mut damaged = fs::read(&policy).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&policy, damaged).unwrap();
    let (code, e) = export(&at, "other", &[]);
    assert!(code == Some(1) && e.contains("policy.safetensors"), "{e}");
    assert!(!dir.join("other").exists());
}

/// A model folder in another dtype, what is beside the weights being the same.
#[test]
fn a_model_folder_is_exported_in_another_dtype() {
    let dir = temp_dir("export_dtype_again");
    run(&dir, "reward", "a", &[]).unwrap();
    let from = dir.join("a/final");
    let export = |to: &Path, dtype: &str| {
        let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
        let args = ["export", from, "--out", to, "--save-dtype", dtype];
        warpo(&args).output().unwrap()
    };
    let (same, half) = (dir.join("same"), dir.join("half"));
    assert!(export(&same, "auto").status.success());
    for file in fs::read_dir(&from).unwrap().map(|file| file.unwrap().file_name()) {
        let read = |dir: &Path| fs::read(dir.join(&file)).unwrap();
        assert!(read(&same) == read(&from), "{file:?}");
    }
    assert!(export(&half, "bfloat16").status.success());
    let config = fs::read_to_string(half.join("config.json")).unwrap();
    assert!(config.contains("bfloat16") && config.contains("ForSequenceClassification"));
    let (plain, rounded) = (tensors(&from), tensors(&half));
    assert_eq!(plain.len(), rounded.len());
    for ((name, _, x), (_, dtype, y)) in plain.iter().zip(&rounded) {
        assert_eq!(*dtype, Dtype::BF16, "{name}");
        let x: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        assert_bits(name, &x, y);
    }
    let e = String::from_utf8(export(&dir.join("x"), "int8").stderr).unwrap();
    assert!(e.contains("`--save-dtype`: got \"int8\", wanted one of"), "{e}");
}

/// What a server needs goes along, readable for all whom the umask allows.
#[test]
fn a_model_takes_along_what_a_server_needs() {
    use std::os::unix::fs::PermissionsExt;
    let dir = temp_dir("export_whole");
    let base = dir.join("base");
    copy(&golden::path("llama_tied"), &base);
    for (name, text) in [("chat_template.jinja", "{{ messages }}"), ("LICENSE", "MIT")] {
        fs::write(base.join(name), text).unwrap();
        fs::set_permissions(base.join(name), fs::Permissions::from_mode(0o444)).unwrap();
    }
    run(&dir, "sft", "a", &[&format!("model={}", base.display())]).unwrap();
    let model = dir.join("a/final");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for name in ["chat_template.jinja", "LICENSE", "model.safetensors", "config.json"] {
        assert_eq!(mode(&model.join(name)), mode(&dir.join("a/metrics.jsonl")), "{name}");
    }
}

/// Weights are stored as those that the run began with, or as it is asked: each rounded once.
#[test]
fn a_model_is_stored_in_the_dtype_of_its_base() {
    let dir = temp_dir("export_dtype");
    run(&dir, "sft", "f32", &[]).unwrap();
    let plain = tensors(&dir.join("f32/final"));
    for (name, dtype, round) in [
        ("bfloat16", Dtype::BF16, (|x| bf16::from_f32(x).to_f32()) as fn(f32) -> f32),
        ("float16", Dtype::F16, |x| f16::from_f32(x).to_f32()),
    ] {
        run(&dir, "sft", name, &[&format!("save_dtype={name}")]).unwrap();
        let model = dir.join(name).join("final");
        let config: Value =
            serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["dtype"], name);
        let stored = tensors(&model);
        assert_eq!(stored.len(), plain.len());
        for ((key, of, got), (_, _, exact)) in stored.iter().zip(&plain) {
            assert_eq!(*of, dtype, "{key}");
            let want: Vec<f32> = exact.iter().map(|x| round(*x)).collect();
            assert_bits(key, got, &want);
        }
        // The next run begins with it and stays with it, unless it is told otherwise.
        let base = format!("model={}", model.display());
        run(&dir, "sft", &format!("{name}-next"), &[&base]).unwrap();
        let next = tensors(&dir.join(format!("{name}-next/final")));
        assert!(next.iter().all(|t| t.1 == dtype), "{name}");
        run(&dir, "sft", &format!("{name}-wide"), &[&base, "save_dtype=float32"]).unwrap();
        let wide = tensors(&dir.join(format!("{name}-wide/final")));
        assert!(wide.iter().all(|t| t.1 == Dtype::F32), "{name}");
    }
}

/// Name, dtype and numbers of each tensor of a model's folder.
fn tensors(dir: &Path) -> Vec<(String, Dtype, Vec<f32>)> {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = file.tensors().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let numbers = |t: &TensorView<'_>| -> Vec<f32> {
        let two = |b: &[u8]| [b[0], b[1]];
        match t.dtype() {
            Dtype::F32 => bytemuck::pod_collect_to_vec(t.data()),
            Dtype::BF16 => {
                t.data().chunks(2).map(|b| bf16::from_le_bytes(two(b)).to_f32()).collect()
            }
            _ => t.data().chunks(2).map(|b| f16::from_le_bytes(two(b)).to_f32()).collect(),
        }
    };
    all.into_iter().map(|(name, t)| (name, t.dtype(), numbers(&t))).collect()
}

/// What a run should know of its model is said: positions that depend on its longest sequence, and
/// parts that are left out.
#[test]
fn a_run_says_what_becomes_of_its_model() {
    let dir = temp_dir("export_notes");
    for (golden, longest, says) in [
        ("phi3_longrope", "20", "its rotary positions depend on the longest sequence, which has"),
        ("gemma3_nested", "20", "its text part is read, all others are left out"),
    ] {
        let data = dir.join("ids.jsonl");
        fs::write(&data, "{\"input_ids\": [5, 6, 7, 8, 9, 10, 11]}\n".repeat(4)).unwrap();
        let (model, out) = (golden::path(golden), dir.join(golden));
        let args = ["train", "sft", "--model", model.to_str().unwrap()];
        let of = ["--data", data.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let more = ["--set", "steps=1", "--set", &format!("max_length={longest}")];
        let done = warpo(&[&args[..], &of, &more].concat()).output().unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(done.status.success() && said.contains(says), "{golden}: {said}");
    }
}

/// A reward model is scored with the EOS that it was trained with.
#[test]
fn a_reward_model_says_which_eos_its_texts_had() {
    let dir = temp_dir("export_appended");
    let lm = golden::path("../../examples/quickstart/model");
    run(&dir, "reward", "a", &["eos_id=7", &format!("model={}", lm.display())]).unwrap();
    assert_eq!(warpo::train::appended_eos(&dir.join("a/final")), Some(7));
    assert_eq!(warpo::train::appended_eos(&golden::path("llama_tied/rm")), None);
    // A text of `score` is rated with it; the language model's numbers do not change.
    let rm = dir.join("a/final");
    let data = dir.join("texts.jsonl");
    fs::write(&data, "{\"text\": \"Once upon a time\"}\n").unwrap();
    let score = |more: &[&str]| -> Value {
        let out =
            warpo(&[&["score", "--data", data.to_str().unwrap()], more].concat()).output().unwrap();
        serde_json::from_slice(&out.stdout).unwrap()
    };
    let (rm, lm) = (rm.to_str().unwrap(), lm.to_str().unwrap());
    let [rated, both] =
        [&["--reward-model", rm][..], &["--model", lm, "--reward-model", rm]].map(score);
    let alone = score(&["--model", lm]);
    assert_eq!(rated["input_ids"].as_array().unwrap().last().unwrap(), 7);
    assert_eq!((&both["reward"], &both["logprobs"]), (&rated["reward"], &alone["logprobs"]));
    assert_eq!(both["input_ids"], alone["input_ids"]);
}

#[test]
fn a_model_that_the_run_reads_is_not_replaced() {
    let dir = temp_dir("export_over");
    run(&dir, "sft", "a", &[]).unwrap();
    fs::remove_dir_all(dir.join("a/checkpoints")).unwrap();
    let want = outcome(&dir.join("a"));
    let model = format!("model={}", dir.join("a/final").display());
    let error = run(&dir, "sft", "a", &[&model]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let error = error.to_string();
    assert!(error.starts_with("config key `out`: got "), "{error}");
    assert!(error.ends_with("a/final, which it reads"), "{error}");
    let have = outcome(&dir.join("a"));
    assert_eq!(have["final/model.safetensors"], want["final/model.safetensors"]);
}

/// A fixed fault: a model that was trained to end with `eos_id` did not say so.
#[test]
fn the_model_says_what_ends_a_text() {
    let dir = temp_dir("export_eos");
    run(&dir, "sft", "a", &["eos_id=77"]).unwrap();
    let config = fs::read_to_string(dir.join("a/final/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["eos_token_id"], 77);
}

/// A run that begins again from nothing, as no checkpoint is there, has only its own lines.
#[test]
fn a_folder_started_anew_has_nothing_of_the_run_before() {
    let dir = temp_dir("export_anew");
    run(&dir, "ppo", "a", &[]).unwrap();
    fs::remove_dir_all(dir.join("a/checkpoints")).unwrap();
    run(&dir, "ppo", "a", &["temperature=0.5", "steps=1"]).unwrap();
    let timing = fs::read_to_string(dir.join("a/timing.jsonl")).unwrap();
    assert_eq!((metrics(&dir.join("a")).len(), timing.lines().count()), (1, 1));
    let rollouts = fs::read_dir(dir.join("a/rollouts")).unwrap().count();
    assert_eq!(rollouts, 1);
}
