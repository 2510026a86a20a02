//! Lists of rewards in a run: what is logged is what was scored, a failure stops the step and keeps
//! nothing of it, and rows that a reward cannot read are refused before the first.

use std::{fs, path::Path};

use serde_json::Value;
use warpo::Error;

use crate::support::{
    runs::{assert_same, metrics, outcome, small, train},
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
