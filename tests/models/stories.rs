//! A real model, of the quick-start: stories260K against NumPy and Hugging Face's tokenizers. The
//! goldens are rounded to 5 decimals (logits) and 6 (log-probs).

use std::path::PathBuf;

use serde::Deserialize;
use warpo::{
    data::Tokenizer,
    device::{Device, Float},
    models::{Batch, Head, Model, Pass},
    ops::sample,
    rng::{Purpose, Stream},
    rollout::{GenerationConfig, Generator, Prompt, Scorer},
};

use super::golden::forward;
use crate::support::{PARAMS, assert_close, golden, host, room};

#[derive(Deserialize)]
struct Story {
    prompt: String,
    ids: Vec<u32>,
    last_logits: Vec<f64>,
    token_logprobs: Vec<f64>,
    greedy_ids: Vec<u32>,
    greedy_text: String,
}

fn stories() -> Vec<Story> {
    let bytes = std::fs::read(golden::path("stories260K/golden.json")).unwrap();
    let all: Vec<Story> = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(all.len(), 4);
    all
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart/model")
}

fn model<F: Float>() -> Model<F> {
    Model::load(&Device::cpu(), &folder(), Head::Lm, None).unwrap()
}

/// Half a unit of the last decimal, 1e-6 for the goldens' own float32 (7.6e-7 was measured when
/// they were made), and `rounding` for ours: in f32 a millionth of the largest logit, 12.3.
fn logits_and_logprobs<F: Float>(rounding: f64) {
    let model = model::<F>();
    for s in stories() {
        let logits = forward(&model, std::slice::from_ref(&s.ids)).logits;
        let last = &logits[logits.len() - model.spec().vocab..];
        assert_close(&s.prompt, last, &s.last_logits, 6e-6 + rounding, 0.0);
        let mut batch = Batch::default();
        batch.push_predicted(&s.ids, 1);
        let scorer = Scorer { rows: batch.len(), sequences: 1 };
        let mut arena = room(scorer.plan::<F>(host(), model.spec(), model.head()).unwrap());
        let mut logp = Vec::new();
        let (dev, scope) = (Device::cpu(), arena.scope());
        Pass::new(&dev, &model, &scope, &batch).score(&mut logp, None).unwrap();
        assert_close(&s.prompt, &logp, &s.token_logprobs, 1.5e-6 + rounding, 0.0);
    }
}

#[test]
fn logits_and_logprobs_of_a_real_model() {
    logits_and_logprobs::<f64>(0.0);
    logits_and_logprobs::<f32>(1.2e-5);
}

#[test]
fn forty_greedy_tokens_of_a_real_model() {
    let (model, tokenizer) = (model::<f32>(), Tokenizer::open(&folder()).unwrap());
    let stories = stories();
    let prompts: Vec<Prompt> = stories
        .iter()
        .zip(0..)
        .map(|(s, sample)| Prompt { sample, ids: tokenizer.encode_start(&s.prompt).unwrap() })
        .collect();
    let settings = GenerationConfig {
        sampling: sample::SamplingParams::greedy(),
        max_new_tokens: 40,
        stop_ids: vec![1],
        stream: Stream { seed: 0, step: 0, purpose: Purpose::Sample },
    };
    let generator = Generator::for_prompts(&prompts, 40, 4, 8);
    let mut arena = room(generator.plan::<f32>(host(), model.spec(), &PARAMS).unwrap());
    let (dev, scope) = (Device::cpu(), arena.scope());
    let done = generator.run(&dev, &model, &scope, &prompts, &settings, |_| Ok(())).unwrap();
    for ((s, p), c) in stories.iter().zip(&prompts).zip(&done) {
        assert_eq!(p.ids, s.ids, "{}", s.prompt);
        let whole = [&p.ids[..], &c.ids].concat();
        assert_eq!(whole, s.greedy_ids, "{}", s.prompt);
        assert_eq!(tokenizer.decode(&whole).unwrap(), s.greedy_text);
        // the text of what was added, with the space at the seam
        let added = tokenizer.decode_continuation(&p.ids, &c.ids).unwrap();
        assert_eq!(format!("{}{added}", s.prompt), s.greedy_text);
    }
}
