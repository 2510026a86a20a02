//! Small runs on disk: data, settings, comparing what they leave.

use std::{
    collections::BTreeMap,
    fmt::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use warpo::{
    Result,
    algorithms::{ALGORITHMS, AlgorithmEntry},
    config,
    device::{Device, Element},
    rng::{Philox, Purpose},
    train::{self, Settings, Silent, Trainer},
};

use super::golden;

/// An algorithm by name.
pub fn entry(name: &str) -> &'static AlgorithmEntry {
    ALGORITHMS.iter().find(|e| e.name == name).unwrap()
}

/// Ids in 3..113 (the vocabulary of `llama_tied`; 54 is its EOS), `len` of them.
fn ids(stream: u64, len: usize) -> Vec<u32> {
    let draw = Philox::new(7, stream, 0, Purpose::Init);
    (0..len).map(|i| 3 + draw.below(i as u32, 110)).collect()
}

/// Writes pre-tokenised data for an algorithm: `n` examples of ragged length.
pub fn data(dir: &Path, algorithm: &str, n: usize) -> PathBuf {
    let path = dir.join(format!("{algorithm}.jsonl"));
    let mut text = String::new();
    for i in 0..n as u64 {
        let len = |k: u64| 2 + (i * 7 + k * 5) as usize % 13;
        match algorithm {
            "sft" => writeln!(text, "{{\"input_ids\": {:?}}}", ids(i, len(0) + 3)),
            "reward" | "dpo" | "simpo" | "cpo" | "orpo" => writeln!(
                text,
                "{{\"prompt_ids\": {:?}, \"chosen_ids\": {:?}, \"rejected_ids\": {:?}}}",
                ids(i, len(0)),
                ids(i + 1000, len(1)),
                ids(i + 2000, len(2))
            ),
            "kto" => writeln!(
                text,
                "{{\"input_ids\": {:?}, \"output_ids\": {:?}, \"label\": {}}}",
                ids(i, len(0)),
                ids(i + 1000, len(1)),
                i % 3 == 1
            ),
            _ => writeln!(text, "{{\"input_ids\": {:?}}}", ids(i, len(0))),
        }
        .unwrap();
    }
    std::fs::write(&path, text).unwrap();
    path
}

/// `key=value` settings of a small run of an algorithm: 40 steps that are just over 2 epochs.
pub fn small(dir: &Path, algorithm: &str, out: &Path) -> Vec<String> {
    let mut pairs = vec![
        format!("model={}", golden::path("llama_tied").display()),
        format!("data={}", data(dir, algorithm, 77).display()),
        format!("out={}", out.display()),
        "steps=40".into(),
        "batch_size=4".into(),
        "learning_rate=0.003".into(),
        "warmup_steps=3".into(),
        "weight_decay=0.01".into(),
        "eos_id=54".into(),
        "micro_batch_tokens=40".into(),
    ];
    let own: &[&str] = match algorithm {
        "ppo" => &["ppo_epochs=2"],
        "grpo" | "rloo" => &["grpo_epochs=2", "samples_per_prompt=2", "kl_coef=0.05"],
        "reinforce++" => &["grpo_epochs=2"],
        _ => return pairs,
    };
    pairs.extend([
        format!("reward_model={}", golden::path("llama_tied/rm").display()),
        "max_new_tokens=6".into(),
        "temperature=0.9".into(),
        "minibatches=2".into(),
        "kl_target=0.5".into(),
        "rollout_slots=3".into(),
    ]);
    pairs.extend(own.iter().map(|pair| pair.to_string()));
    pairs
}

/// Runs `warpo train` in this process; later pairs win.
pub fn train(algorithm: &str, pairs: &[String]) -> Result<PathBuf> {
    let (entry, mut settings) = (entry(algorithm), Settings::default());
    let mut section = (entry.section)();
    for pair in pairs {
        config::set_pair(&mut [&mut settings, &mut *section], pair)?;
    }
    train::run(entry, &settings, &*section, &mut Silent)
}

/// A small run in memory, on one thread; later pairs win.
pub fn trainer(dir: &Path, algorithm: &str, more: &[&str]) -> Result<Trainer<f32>> {
    let (settings, ..) = settings(dir, algorithm, more)?;
    let dev = Device::from_name(&settings.device, settings.threads)?;
    trainer_on(&dev, dir, algorithm, more)
}

/// The same on a device.
pub fn trainer_on<T: Element<Acc = f32>>(
    dev: &Device,
    dir: &Path,
    algorithm: &str,
    more: &[&str],
) -> Result<Trainer<T>> {
    let (settings, section) = settings(dir, algorithm, more)?;
    Trainer::new(dev, settings, (entry(algorithm).build)(&*section)?)
}

fn settings(
    dir: &Path,
    algorithm: &str,
    more: &[&str],
) -> Result<(Settings, Box<dyn config::Section>)> {
    let (entry, mut settings) = (entry(algorithm), Settings::default());
    let mut section = (entry.section)();
    let mut pairs = small(dir, algorithm, &dir.join("run"));
    pairs.push("threads=1".into());
    for pair in pairs.iter().map(String::as_str).chain(more.iter().copied()) {
        config::set_pair(&mut [&mut settings, &mut *section], pair)?;
    }
    Ok((settings, section))
}

/// The `warpo` command.
pub fn warpo(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warpo"));
    // Tests leave nothing in the user's folder, and ask no server.
    command.args(args).stdin(Stdio::null()).env("WARPO_CACHE", "off").env("HF_HUB_OFFLINE", "1");
    command
}

/// `warpo train` as a command.
pub fn train_command(algorithm: &str, pairs: &[String]) -> Command {
    let mut command = warpo(&["train", algorithm]);
    for pair in pairs {
        command.args(["--set", pair]);
    }
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// The bytes of what a finished run must leave, by file: models, last checkpoint, metrics,
/// rollouts.
pub fn outcome(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    let mut take = |dir: &str| {
        let Ok(entries) = std::fs::read_dir(run.join(dir)) else { return };
        for e in entries {
            let path = e.unwrap().path();
            let name = format!("{dir}/{}", path.file_name().unwrap().to_str().unwrap());
            if path.is_file() {
                out.insert(name, std::fs::read(path).unwrap());
            }
        }
    };
    ["final", "final-value", "checkpoints/step-40", "rollouts"].into_iter().for_each(&mut take);
    out.insert("metrics.jsonl".into(), std::fs::read(run.join("metrics.jsonl")).unwrap());
    out
}

/// The same files with the same bytes.
#[track_caller]
pub fn assert_same(what: &str, a: &BTreeMap<String, Vec<u8>>, b: &BTreeMap<String, Vec<u8>>) {
    let names = |m: &BTreeMap<String, Vec<u8>>| m.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(a), names(b), "{what}: files");
    for (name, bytes) in a {
        let at = bytes.iter().zip(&b[name]).position(|(x, y)| x != y);
        assert!(bytes == &b[name], "{what}: {name} differs, first at byte {at:?}");
    }
}

/// Copies a folder.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for e in std::fs::read_dir(from).unwrap() {
        let path = e.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

/// Metrics of a run, one object a step.
pub fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}
