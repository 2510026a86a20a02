//! Lists of rewards in a run: what is logged is what was scored, a failure stops the step and keeps
//! nothing of it, and rows that a reward cannot read are refused before the first.

use std::{fs, path::Path};

use serde_json::Value;
use warpo::Error;

use crate::support::{
    runs::{assert_same, metrics, outcome, small, train, warpo},
    temp_dir,
};

const SUMS: &str = r#"{"prompt": "1 + 1 =", "answer": "2", "level": "a"}
{"prompt": "1 + 2 =", "answer": "3", "level": "b"}
{"prompt": "2 + 2 =", "answer": "4", "level": "c"}
"#;

/// Settings of a run of the quick-start's model on sums.
fn sums(dir: &Path, algorithm: &str, out: &str, rewards: &str) -> Vec<String> {
    let data = dir.join("sums.jsonl");
    fs::write(&data, SUMS).unwrap();
    let mut pairs = small(dir, algorithm, &dir.join(out));
    pairs.retain(|p| !p.starts_with("eos_id") && !p.starts_with("reward_model"));
    pairs.extend([
        "model=examples/quickstart/model".into(),
        format!("data={}", data.display()),
        "steps=3".into(),
        "micro_batch_tokens=256".into(),
        "kl_target=none".into(),
        "checkpoint_every=1".into(),
        format!("rewards=[{rewards}]"),
    ]);
    pairs
}

const LIST: &str = r#"{ kind = "regex", name = "e", pattern = "e", weight = 2.0 },
    { kind = "math", weight = 0.5 }, { kind = "length", target = 4, weight = -1.0 }"#;

/// Every algorithm that samples takes the list. The score of a sample is the weighted sum of what
/// its rewards say of the text that was sampled; rollouts and metrics have each.
#[test]
fn what_is_logged_is_what_was_scored() {
    let dir = temp_dir("rewards_logged");
    for algorithm in ["grpo", "rloo", "reinforce++", "ppo"] {
        let mut pairs = sums(&dir, algorithm, algorithm, LIST);
        if algorithm == "ppo" {
            pairs.push("value_init=policy".into());
        }
        train(algorithm, &pairs).unwrap();
        let run = dir.join(algorithm);
        for (m, step) in metrics(&run).iter().zip(1..) {
            let file = run.join(format!("rollouts/step-{step}.jsonl"));
            let text = fs::read_to_string(file).unwrap();
            let all: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
            let number = |r: &Value, key: &str| r[key].as_f64().unwrap();
            for r in &all {
                let has_e = r["text"].as_str().unwrap().contains('e');
                assert_eq!(number(r, "reward_e"), f64::from(u8::from(has_e)), "{r}");
                let tokens = r["tokens"].as_array().unwrap().len() as f64;
                assert_eq!(number(r, "reward_length"), 0.0 - ((tokens - 4.0).abs() / 4.0).min(1.0));
                let sum = 2.0 * number(r, "reward_e") + 0.5 * number(r, "reward_math")
                    - number(r, "reward_length");
                assert!((number(r, "score") - sum).abs() < 1e-6, "{r}");
            }
            for key in ["reward_e", "reward_math", "reward_length", "score"] {
                let mean = all.iter().map(|r| number(r, key)).sum::<f64>() / all.len() as f64;
                assert!((number(m, key) - mean).abs() < 1e-6, "{algorithm}: {key} of {m}");
            }
            assert!(all.iter().any(|r| number(r, "reward_e") == 1.0), "no sample has an e");
        }
    }
}

/// A run that was stopped between steps ends with the bytes of one that was not; the threads of
/// rewards change nothing.
#[test]
fn a_run_with_rewards_resumes() {
    let dir = temp_dir("rewards_resume");
    train("grpo", &sums(&dir, "grpo", "whole", LIST)).unwrap();
    let mut pairs = sums(&dir, "grpo", "parts", LIST);
    pairs.push("steps=1".into());
    train("grpo", &pairs).unwrap();
    train("grpo", &sums(&dir, "grpo", "parts", LIST)).unwrap();
    let only = |run: &str| {
        let mut all = outcome(&dir.join(run));
        all.retain(|name, _| name.starts_with("final") || name.starts_with("rollouts"));
        all
    };
    assert_same("resumed", &only("whole"), &only("parts"));
    assert!(only("whole").len() > 3);
}

/// Never a 0: the run ends with the reward, the sample and its line, and keeps nothing of the step.
#[test]
fn a_reward_that_fails_stops_the_step() {
    let dir = temp_dir("rewards_fail");
    // The first step has 4 samples; the fifth asked fails, again after it was begun anew.
    let code = "import json, sys, os\nfor line in sys.stdin:\n q = json.loads(line)\n \
        n = len(open('COUNT').read()) if os.path.exists('COUNT') else 0\n \
        open('COUNT', 'a').write('x')\n \
        print(json.dumps({'error': 'level ' + q['level']} if n >= 4 else 1.0), flush=True)";
    let code = code.replace("COUNT", &dir.join("count").display().to_string());
    let code = serde_json::to_string(&code).unwrap();
    let list = format!(r#"{{ kind = "command", command = ["python3", "-c", {code}] }}"#);
    let pairs = sums(&dir, "grpo", "run", &list);
    let e = train("grpo", &pairs).unwrap_err();
    let Error::Reward { reward, place, message, .. } = &e else { panic!("{e:?}") };
    assert_eq!(reward, "command");
    assert!(place.as_ref().is_some_and(|p| p.contains("sums.jsonl:")), "{place:?}");
    assert!(message.contains("level "), "{message}");
    let run = dir.join("run");
    assert_eq!(metrics(&run).len(), 1);
    assert!(!run.join("rollouts/step-2.jsonl").exists() && !run.join("final").exists());
}

#[test]
fn rows_that_a_reward_cannot_read_are_refused_at_the_start() {
    let dir = temp_dir("rewards_rows");
    let refused = |list: &str| train("grpo", &sums(&dir, "grpo", "run", list)).unwrap_err();
    let e = refused(r#"{ kind = "exact", column = "solution" }"#).to_string();
    assert!(e.contains("sums.jsonl:1") && e.contains("has no column `solution`"), "{e}");
    let mut both = sums(&dir, "grpo", "run", r#"{ kind = "math" }"#);
    both.push("reward_model=x".into());
    let e = train("grpo", &both).unwrap_err().to_string();
    assert!(e.contains("none beside `rewards`"), "{e}");
    let e = train("ppo", &sums(&dir, "ppo", "run", r#"{ kind = "math" }"#)).unwrap_err();
    assert!(e.to_string().contains("value_init"), "{e}");
    assert!(!dir.join("run/checkpoints").exists());
}

/// Dynamic sampling: a step has prompts whose samples differ, in the order of the data, and others
/// only after the last draw; a run that was stopped goes on with the next prompt.
#[test]
fn prompts_without_spread_give_way_to_the_next_ones() {
    let dir = temp_dir("rewards_dynamic");
    let list = r#"{ kind = "length", target = 4 }, { kind = "regex", name = "e", pattern = "e" }"#;
    let run = |out: &str, more: &[&str]| {
        let mut pairs = sums(&dir, "grpo", out, list);
        pairs.extend(["shuffle=false".into(), "dynamic_sampling=3".into()]);
        pairs.push("dynamic_reward=e".into());
        pairs.extend(more.iter().map(|pair| pair.to_string()));
        train("grpo", &pairs).unwrap();
        dir.join(out)
    };
    let whole = run("whole", &["steps=6"]);
    let (mut drawn, mut filled, mut dropped) = (0, 0, 0);
    for (m, step) in metrics(&whole).iter().zip(1..) {
        let text = fs::read_to_string(whole.join(format!("rollouts/step-{step}.jsonl"))).unwrap();
        let all: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(all.len(), 4);
        let mut last = None;
        for pair in all.chunks(2) {
            let number = |r: &Value, key: &str| r[key].as_f64().unwrap();
            let draw = number(&pair[0], "sample") as u64 / 2;
            assert!(draw >= drawn, "a prompt of an earlier step");
            assert_eq!(pair[1]["sample"].as_u64(), Some(2 * draw + 1));
            let prompt = ["1 + 1 =", "1 + 2 =", "2 + 2 ="][draw as usize % 3];
            assert_eq!(pair[0]["prompt"].as_str().map(|p| p.trim_start()), Some(prompt));
            if number(&pair[0], "reward_e") == number(&pair[1], "reward_e") {
                filled += 1;
                assert_eq!(m["draws"].as_f64(), Some(3.0));
                last = Some(u64::MAX);
            } else {
                assert!(last.is_none_or(|last| last < draw), "the order of the data");
                last = Some(draw);
            }
        }
        let gone = m["dropped_groups"].as_f64().unwrap() as u64;
        dropped += gone;
        drawn += 2 + gone;
    }
    assert!(dropped > 0 && filled > 0 && filled < 12, "{dropped} {filled}");
    run("parts", &["steps=2"]);
    run("parts", &["steps=6"]);
    let only = |run: &str| {
        let mut all = outcome(&dir.join(run));
        all.retain(|name, _| name.starts_with("final") || name.starts_with("rollouts"));
        all
    };
    assert_same("resumed", &only("whole"), &only("parts"));
}

/// ReMax: what the likeliest answer scored is what a sample is compared with.
#[test]
fn remax_compares_with_the_greedy_sample() {
    let dir = temp_dir("rewards_remax");
    let mut pairs = sums(&dir, "grpo", "run", r#"{ kind = "regex", pattern = "e" }"#);
    pairs.extend(["advantage=remax".into(), "steps=1".into(), "kl_coef=0".into()]);
    pairs.extend(["batch_size=24".into(), "learning_rate=0".into()]);
    train("grpo", &pairs).unwrap();
    let score = |text: &str| f64::from(u8::from(text.contains('e')));
    // The greedy samples, of the same weights.
    let greedy = |prompt: &str| {
        let data = dir.join("one.jsonl");
        fs::write(&data, format!("{{\"prompt\": \"{prompt}\"}}\n")).unwrap();
        let model = "examples/quickstart/model";
        let mut command = warpo(&["generate", "--model", model, "--temperature", "0"]);
        command.args(["--max-new-tokens", "6", "--data"]).arg(&data);
        let out = command.output().unwrap();
        let row: Value = serde_json::from_slice(&out.stdout).unwrap();
        score(row["text"].as_str().unwrap())
    };
    let text = fs::read_to_string(dir.join("run/rollouts/step-1.jsonl")).unwrap();
    let mut all = Vec::new();
    for line in text.lines() {
        let r: Value = serde_json::from_str(line).unwrap();
        let tokens = r["tokens"].as_array().unwrap();
        let greedy = greedy(r["prompt"].as_str().unwrap().trim());
        let want = score(r["text"].as_str().unwrap()) - greedy;
        for t in tokens {
            assert!((t["advantage"].as_f64().unwrap() - want).abs() < 1e-6, "{r}");
        }
        all.push(want);
    }
    assert!(all.iter().any(|a| *a != 0.0), "{all:?}");
}
