//! Adapters on the command line: `--adapter` is the folder of the adapter in every way, and what
//! cannot be is named.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::feed;
use crate::support::{
    runs::{copy, warpo},
    temp_dir,
};

const MODEL: &str = "examples/quickstart/model";

/// Trains an adapter of the quick-start's model on two texts; what is written on standard error.
fn train(dir: &Path, algorithm: &str, more: &[&str]) -> (PathBuf, String) {
    let (data, out) = (dir.join("data.jsonl"), dir.join(format!("{algorithm}_run")));
    let text = match algorithm {
        "sft" => "{\"prompt\": \"Once\", \"completion\": \" upon\"}\n".repeat(4),
        _ => "{\"prompt\": \"a\", \"chosen\": \" good\", \"rejected\": \" bad\"}\n".repeat(4),
    };
    fs::write(&data, text).unwrap();
    let mut command = warpo(&["train", algorithm, "--data"]);
    command.arg(&data).arg("--out").arg(&out).args(["--steps", "3", "--batch-size", "4"]);
    let rate = ["--learning-rate", "0.01", "--warmup-steps", "0", "--device", "cpu"];
    if !more.contains(&"--model") {
        command.args(["--model", MODEL]);
    }
    let done = command.args(rate).args(more).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.success(), out.join("final").exists(), "{said}");
    (out.join("final"), said)
}

fn said(args: &[&str]) -> (bool, String) {
    let done = warpo(args).output().unwrap();
    (done.status.success(), String::from_utf8(done.stderr).unwrap())
}

/// An adapter has the tokenizer, template and record of its training, beside its base or merged.
#[test]
fn an_adapter_brings_its_own_texts() {
    let dir = temp_dir("cli_adapter_texts");
    let (final_dir, _) = train(&dir, "sft", &["--lora-rank", "2", "--set", "chat_template=zephyr"]);
    let adapter = final_dir.to_str().unwrap();
    let input = "{\"prompt\": \"Once\"}\n";
    let generate = |args: &[&str]| {
        let all = [&["generate", "--temperature", "0", "--max-new-tokens", "5"], args].concat();
        feed(&all, input).stdout
    };
    let own = generate(&["--model", adapter]);
    assert_eq!(own, generate(&["--model", MODEL, "--adapter", adapter]));
    assert_ne!(own, generate(&["--model", MODEL]));
    let score = |args: &[&str]| {
        let text = "{\"text\": \"Once upon\"}\n";
        let out = feed(&[&["score", "--eos"], args].concat(), text).stdout;
        let row: Value = serde_json::from_slice(&out).unwrap();
        row["logprob"].to_string() + &row["ids"].to_string()
    };
    assert_eq!(score(&["--model", adapter]), score(&["--model", MODEL, "--adapter", adapter]));
    let chat = |args: &[&str]| {
        let fixed = ["chat", "--temperature", "0", "--max-new-tokens", "5"];
        feed(&[&fixed, args].concat(), "Hi\n")
    };
    let (one, two) = (chat(&["--model", adapter]), chat(&["--model", MODEL, "--adapter", adapter]));
    assert!(one.status.success(), "{}", String::from_utf8_lossy(&one.stderr));
    assert_eq!(one.stdout, two.stdout);
    // Merged from either side it is one folder.
    let merged = |name: &str, args: &[&str]| {
        let to = dir.join(name);
        let all = [&["export"], args, &["--merge", "--out", to.to_str().unwrap()]].concat();
        let (ok, said) = said(&all);
        assert!(ok, "{said}");
        to
    };
    let (a, b) = (merged("a", &[adapter]), merged("b", &[MODEL, "--adapter", adapter]));
    for file in fs::read_dir(&a).unwrap() {
        let name = file.unwrap().file_name();
        assert_eq!(fs::read(a.join(&name)).unwrap(), fs::read(b.join(&name)).unwrap(), "{name:?}");
    }
    assert!(a.join("chat_template.jinja").exists() && !a.join("adapter_config.json").exists());
}

/// A reward model rates as it was trained, wherever its adapter is put on its base.
#[test]
fn a_reward_models_adapter_keeps_its_record() {
    let dir = temp_dir("cli_adapter_reward");
    let (final_dir, _) = train(&dir, "reward", &["--lora-rank", "2"]);
    let adapter = final_dir.to_str().unwrap();
    let rewards = |model: &Path| {
        let out =
            feed(&["score", "--reward-model", model.to_str().unwrap()], "{\"text\": \"a\"}\n");
        let row: Value = serde_json::from_slice(&out.stdout).unwrap();
        row["reward"].as_f64().unwrap()
    };
    let want = rewards(&final_dir);
    for (name, args) in [
        ("plain", &["export", MODEL, "--adapter", adapter][..]),
        ("merged", &["export", MODEL, "--adapter", adapter, "--merge"]),
        ("alone", &["export", adapter, "--merge"]),
    ] {
        let to = dir.join(name);
        let (ok, said) = said(&[args, &["--out", to.to_str().unwrap()]].concat());
        assert!(ok, "{said}");
        assert!((rewards(&to) - want).abs() < 1e-4, "{name}: {} {want}", rewards(&to));
    }
}

#[test]
fn what_an_adapter_cannot_be_is_named() {
    let dir = temp_dir("cli_adapter_wrong");
    let (final_dir, _) = train(&dir, "sft", &["--lora-rank", "2"]);
    let adapter = final_dir.to_str().unwrap();
    // With the files of its base beside it, it is the adapter still.
    let both = dir.join("both");
    copy(&final_dir, &both);
    copy(Path::new(MODEL), &dir.join("base"));
    for name in ["config.json", "model.safetensors"] {
        fs::copy(dir.join("base").join(name), both.join(name)).unwrap();
    }
    let score =
        |model: &str| feed(&["score", "--model", model], "{\"text\": \"Once upon\"}\n").stdout;
    assert_eq!(score(adapter), score(both.to_str().unwrap()));
    // Settings that nothing reads.
    for own in [["--lora-alpha", "3"], ["--lora-rslora", "true"], ["--lora-targets", "q_proj"]] {
        let (_, plain) = train(&dir.join("base"), "sft", &own);
        let key = own[0].trim_start_matches("--").replace('-', "_");
        assert!(plain.contains(&format!("config key `{key}`: got one, wanted none")), "{plain}");
        let (_, beside) =
            train(&dir.join("base"), "sft", &[&["--adapter", adapter], &own[..]].concat());
        assert!(beside.contains(&format!("config key `{key}`")), "{beside}");
    }
    // An adapter of a language model has no head that rates.
    for more in [&["--model", adapter][..], &["--adapter", adapter]] {
        let (_, said) = train(&dir.join("base"), "reward", more);
        assert!(said.contains("adapter_config.json") && said.contains("export --merge"), "{said}");
    }
    // The base is gone.
    let text = fs::read_to_string(final_dir.join("adapter_config.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["base_model_name_or_path"] = "/no/such/base".into();
    fs::write(final_dir.join("adapter_config.json"), json.to_string()).unwrap();
    let (_, gone) = said(&["score", "--model", adapter, "--data", "-"]);
    for told in ["adapter_config.json", "/no/such/base", "--model BASE --adapter DIR"] {
        assert!(gone.contains(told), "{gone}");
    }
}

/// DPO that goes on with an adapter compares with the model below it, and says so.
#[test]
fn the_reference_of_a_trained_adapter_is_said() {
    let dir = temp_dir("cli_adapter_reference");
    let (final_dir, plain) = train(&dir, "sft", &["--lora-rank", "2"]);
    let adapter = final_dir.to_str().unwrap();
    let told = "the reference is the model below the adapter";
    let (_, said) = train(&dir, "dpo", &["--adapter", adapter]);
    assert!(said.contains(told) && !plain.contains(told), "{said}");
    fs::remove_dir_all(dir.join("dpo_run")).unwrap();
    let chosen = format!("reference_model={adapter}");
    let (out, said) = train(&dir, "dpo", &["--adapter", adapter, "--set", &chosen]);
    assert!(!said.contains(told), "{said}");
    let text = fs::read_to_string(out.join("../metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert!((first["loss"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-6, "{first}");
}
