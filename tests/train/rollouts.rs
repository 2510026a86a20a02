//! Properties 5 and 6 of the samples that a step is made of: lengths decide what is learned, and
//! the tokens that were sampled are the tokens that are trained on.

use std::path::Path;

use serde_json::Value;
use warpo::{
    device::Device,
    models::{Batch, Head, Model, Pass},
    rollout::Scorer,
};

use crate::support::{
    golden, host, room,
    runs::{metrics, small, train},
    temp_dir,
};

/// The records of all samples of a run.
fn rollouts(run: &Path) -> Vec<Value> {
    let mut all = Vec::new();
    for step in 1.. {
        let Ok(text) = std::fs::read_to_string(run.join(format!("rollouts/step-{step}.jsonl")))
        else {
            break;
        };
        all.extend(text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()));
    }
    all
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// Property 5: whatever ids a text is made of (0, which others pad with; the EOS, inside and at the
/// end), every token counts once, and none beyond its end.
#[test]
fn masks_come_from_lengths() {
    let dir = temp_dir("masks");
    let learned = |eos: u32| {
        let data = dir.join(format!("{eos}.jsonl"));
        let texts = [vec![7, 0, 0, eos, 0], vec![eos; 4], vec![0; 3], vec![5, 6, eos, 8, 9, eos]];
        let text: String = texts.iter().map(|t| format!("{{\"input_ids\": {t:?}}}\n")).collect();
        std::fs::write(&data, text).unwrap();
        let run = dir.join(format!("run_{eos}"));
        let mut pairs = small(&dir, "sft", &run);
        pairs.push(format!("data={}", data.display()));
        pairs.extend([format!("eos_id={eos}"), "steps=1".into(), "shuffle=false".into()]);
        train("sft", &pairs).unwrap();
        metrics(&run)[0].clone()
    };
    for eos in [54, 0] {
        let m = learned(eos);
        assert_eq!((m["tokens"].as_f64(), m["learned_tokens"].as_f64()), (Some(18.0), Some(14.0)));
    }

    // PPO: samples that were cut off and samples that ended count their own tokens, no more.
    let run = dir.join("ppo");
    let mut pairs = small(&dir, "ppo", &run);
    // some ids that end a sample, so that both kinds are there
    pairs.extend(["stop_ids=[5, 17, 23, 31, 60, 77, 90]".into(), "batch_size=16".into()]);
    pairs.extend(["steps=3".into(), "kl_target=none".into()]);
    train("ppo", &pairs).unwrap();
    let all = rollouts(&run);
    let stopped = |r: &&Value| r["stopped"] == true;
    let ended = all.iter().filter(stopped).count();
    assert!(ended > 0 && ended < all.len(), "{ended} of {}", all.len());
    for (m, step) in metrics(&run).iter().zip(all.chunks(16)) {
        let lens: Vec<usize> = step.iter().map(|r| r["tokens"].as_array().unwrap().len()).collect();
        let new: usize = lens.iter().sum();
        let prompts: usize = step.iter().map(|r| ids(&r["prompt_ids"]).len()).sum();
        assert_eq!(m["response_tokens"].as_f64(), Some(new as f64 / 16.0));
        assert_eq!(m["tokens"].as_f64(), Some((prompts + new) as f64));
        for (r, len) in step.iter().zip(lens) {
            assert!(r["stopped"] == true || len == 6, "cut off at max_new_tokens");
            let last = r["tokens"][len - 1]["id"].as_u64().unwrap();
            let stops = [54, 5, 17, 23, 31, 60, 77, 90].contains(&last);
            assert_eq!(r["stopped"] == true, stops, "the id that ends a sample is its last token");
        }
    }
}

/// Property 6: the recorded ids, scored as they are, give the recorded log-probs to the bit: no
/// text came between sampling and training.
#[test]
fn token_in_token_out() {
    let dir = temp_dir("tokens");
    let run = dir.join("run");
    let mut pairs = small(&dir, "ppo", &run);
    pairs.extend(["learning_rate=0".into(), "steps=5".into(), "temperature=1".into()]);
    train("ppo", &pairs).unwrap();
    let dev = Device::cpu();
    let model = Model::<f32>::load(&dev, &golden::path("llama_tied"), Head::Lm, None).unwrap();
    let scorer = Scorer { rows: 64, sequences: 1 };
    let mut arena = room(scorer.plan::<f32>(host(), model.spec(), model.head()).unwrap());
    let all = rollouts(&run);
    assert_eq!(all.len(), 20);
    for r in all {
        let prompt = ids(&r["prompt_ids"]);
        let tokens = r["tokens"].as_array().unwrap();
        let new: Vec<u32> = tokens.iter().map(|t| t["id"].as_u64().unwrap() as u32).collect();
        let recorded: Vec<f32> =
            tokens.iter().map(|t| t["logp"].as_f64().unwrap() as f32).collect();
        let mut batch = Batch::default();
        batch.push_predicted(&[&prompt[..], &new].concat(), prompt.len());
        let mut logp = Vec::new();
        Pass::new(&dev, &model, &arena.scope(), &batch).score(&mut logp, None).unwrap();
        crate::support::assert_bits("log-probs", &logp, &recorded);
    }
}
