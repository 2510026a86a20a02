//! `--profile`: the trace, the tables, and that neither depends on how a command ends.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Output,
};

use serde_json::Value;

use super::{feed, model, refused, run};
use crate::support::{
    golden,
    runs::{data, small, warpo},
    sim::{Sim, Variant},
    temp_dir,
};

/// What a trace has of a kind.
struct Names(BTreeSet<String>);

impl Names {
    /// From a trace file, which must be whole.
    #[track_caller]
    fn of(file: &Path, kind: &str) -> Self {
        let text = std::fs::read_to_string(file).unwrap();
        let all: Value = serde_json::from_str(&text).unwrap();
        let events = all["traceEvents"].as_array().unwrap().iter();
        let names = events.filter(|e| e["cat"] == kind).map(|e| e["name"].as_str().unwrap());
        Self(names.map(str::to_owned).collect())
    }

    #[track_caller]
    fn have(&self, wanted: &[&str]) {
        for name in wanted {
            assert!(self.0.contains(*name), "no {name} in {:?}", self.0);
        }
    }

    /// These and no others.
    #[track_caller]
    fn are(&self, wanted: &[&str]) {
        self.have(wanted);
        assert_eq!(self.0.len(), wanted.len(), "{wanted:?} and more: {:?}", self.0);
    }
}

/// `warpo train` with `--profile`; later pairs win.
fn train(algorithm: &str, file: &Path, pairs: &[String], envs: &[(&str, &Path)]) -> Output {
    let mut command = warpo(&["train", algorithm, "--profile", file.to_str().unwrap()]);
    for pair in pairs {
        command.args(["--set", pair]);
    }
    command.envs(envs.iter().copied()).output().unwrap()
}

/// What a command said to people, when it did not fail.
#[track_caller]
fn said(out: &Output) -> String {
    let text = String::from_utf8(out.stderr.clone()).unwrap();
    assert!(out.status.success(), "{text}");
    text
}

/// Phases of every run.
const RUN: [&str; 9] =
    ["load", "step", "forward", "head", "loss", "backward", "update", "checkpoint", "export"];

/// Phases and ops of each algorithm are in the trace and in the tables.
#[test]
fn a_run_says_where_its_time_goes() {
    let dir = temp_dir("cli_profile");
    let held_out = format!("eval_data={}", data(&dir, "sft", 5).display());
    let cases: [(&str, &[&str], &[&str]); 3] = [
        ("sft", &["policy gradient", "evaluate"], &["nll", "logprob", "logprob::backward"]),
        ("reward", &["reward gradient"], &["bradley_terry", "scalar_head"]),
        (
            "ppo",
            &["sample", "prefill", "decode", "score", "policy gradient", "value gradient"],
            &["gae", "policy_loss", "value_loss", "sample"],
        ),
    ];
    for (algorithm, phases, ops) in cases {
        let file = dir.join(format!("{algorithm}.json"));
        let mut pairs = small(&dir, algorithm, &dir.join(algorithm));
        pairs.push("steps=2".into());
        pairs.extend((algorithm == "sft").then(|| held_out.clone()));
        let text = said(&train(algorithm, &file, &pairs, &[]));
        let phases = [&RUN[..], phases].concat();
        Names::of(&file, "phase").are(&phases);
        let ops = [&["matmul", "attention", "attention::backward", "adamw"], ops].concat();
        Names::of(&file, "op").have(&ops);
        for name in [phases, ops].concat() {
            assert!(text.lines().any(|l| l.starts_with(&format!("{name} "))), "{name}:\n{text}");
        }
        assert!(text.contains("peaks as measured: "), "{text}");
    }
}

/// A run that fails has its trace and its tables, and the error comes last.
#[test]
fn a_run_that_fails_says_it_too() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let dir = temp_dir("cli_profile_fails");
    let (file, out) = (dir.join("trace.json"), dir.join("run"));
    std::fs::create_dir_all(out.join("rollouts")).unwrap();
    std::os::unix::fs::symlink("/dev/full", out.join("rollouts/step-1.jsonl.tmp")).unwrap();
    let (code, text) = refused(&train("ppo", &file, &small(&dir, "ppo", &out), &[]));
    assert_eq!(code, 1, "{text}");
    let (tables, error) = text.split_once("error: ").unwrap();
    assert!(tables.contains("\nmatmul ") && error.contains("step-1.jsonl"), "{text}");
    Names::of(&file, "phase").have(&["step", "update"]);
}

/// A file that cannot be written is named before anything is done for it, also where it can be
/// created.
#[test]
fn a_profile_that_cannot_be_written_is_refused_at_once() {
    let dir = temp_dir("cli_profile_refused");
    let (file, out) = (dir.join("no/such/trace.json"), dir.join("run"));
    let (code, text) = refused(&train("sft", &file, &small(&dir, "sft", &out), &[]));
    let wanted = format!("error: cannot create {}: ", file.display());
    assert!(code == 1 && text.starts_with(&wanted) && !out.exists(), "{text}");
    let (file, input) = (file.to_str().unwrap(), "{\"prompt\": \"Once\"}\n");
    for command in ["generate", "score"] {
        let (code, text) =
            refused(&feed(&[command, "--model", &model(), "--profile", file], input));
        assert!(code == 1 && text.starts_with(&wanted), "{text}");
    }
    // What is refused has nothing to tell.
    let file = dir.join("trace.json");
    let (code, text) = refused(&train("sft", &file, &["steps=1".into()], &[]));
    assert!(code == 2 && text.starts_with("error: "), "{text}");
    Names::of(&file, "phase").are(&[]);
    let out = dir.join("quickstart").display().to_string();
    let (code, text) = refused(&run(&["quickstart", "--out", &out, "--set", "threads=3"]));
    assert!(code == 2 && text.contains("of all stages: --device, --threads"), "{text}");
}

/// What a command writes is the same with a profile.
#[test]
fn generate_and_score_have_profiles() {
    let file = temp_dir("cli_profile_generate").join("trace.json");
    let (m, profile) = (model(), ["--profile", file.to_str().unwrap()]);
    let input = "{\"prompt\": \"Once upon\"}\n{\"prompt\": \"Lily\"}\n";
    let generate = ["generate", "--model", &m, "--max-new-tokens", "3"];
    let plain = feed(&generate, input).stdout;
    let out = feed(&[&generate[..], &profile].concat(), input);
    assert!(said(&out).contains("\nlogprob::from_logits "), "{}", said(&out));
    assert_eq!(out.stdout, plain);
    Names::of(&file, "phase").are(&["prefill", "decode"]);

    let score = ["score", "--model", &m];
    let input = String::from_utf8(plain).unwrap();
    let plain = feed(&score, &input).stdout;
    let out = feed(&[&score[..], &profile].concat(), &input);
    assert!(said(&out).contains("\nlogprob "), "{}", said(&out));
    assert_eq!(out.stdout, plain);
    Names::of(&file, "phase").are(&["forward", "head"]);
}

/// On a CUDA device there are kernels, too.
#[test]
fn a_run_on_a_device_names_its_kernels() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let dir = temp_dir("cli_profile_sim");
    let (file, mut pairs) = (dir.join("trace.json"), small(&dir, "sft", &dir.join("run")));
    let model: PathBuf = golden::path("llama");
    pairs.extend([format!("model={}", model.display()), "steps=1".into(), "device=sim".into()]);
    let text = said(&train("sft", &file, &pairs, &[("WARPO_SIM", sim.library())]));
    Names::of(&file, "phase").have(&[&RUN[..], &["policy gradient"]].concat());
    Names::of(&file, "op").have(&["matmul", "attention", "adamw"]);
    let kernels = ["norm_forward_0_bf16", "rope_rotate_bf16", "copy from the device"];
    Names::of(&file, "kernel").have(&kernels);
    assert!(text.contains("\n  norm_forward_0_bf16 "), "{text}");
    assert!(text.contains("a kernel runs in"), "{text}");
}
