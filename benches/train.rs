//! Whole phases on random GPT-2 models of the size `tiny` of `benches/peers` (4 layers, hidden 256,
//! vocabulary 5,000): generation, a training step of SFT, an iteration of PPO.
//!
//! `cargo bench --bench train`; the share of the peak counts matrix products only.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

mod support;

use std::{
    cell::RefCell,
    fmt::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use support::{Work, bench, device, randn};
use warpo::{
    algorithms::ALGORITHMS,
    config,
    device::Arena,
    models::{self, Config, Head, Layout, Model, ParamKind, Residency},
    ops::sample,
    ops::sample::SamplingParams,
    rng::{Philox, Purpose, Stream},
    rollout::{GenerationConfig, Generator, Prompt},
    train::{Settings, Silent, Trainer},
};

const CONFIG: &str = r#"{
    "model_type": "gpt2", "vocab_size": 5000, "n_positions": 256, "n_embd": 256, "n_layer": 4,
    "n_head": 4
}"#;

/// A model with an MLP, and one with 8 experts of which 2 of half its width take its place.
const DENSE: &str = r#"{
    "model_type": "qwen3", "vocab_size": 5000, "max_position_embeddings": 256, "hidden_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 1024
}"#;
const MIXTURE: &str = r#"{
    "model_type": "qwen3_moe", "vocab_size": 5000, "max_position_embeddings": 256,
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64,
    "intermediate_size": 1024, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 512, "norm_topk_prob": true
}"#;

fn random(head: Head) -> Model<f32> {
    random_of(CONFIG, head)
}

fn random_of(config: &str, head: Head) -> Model<f32> {
    let config = Config::parse(config, "config.json").unwrap();
    let mut model = Model::zeros(device(), config, head, Residency::Frozen).unwrap();
    let layout = model.params().layout().clone();
    for (i, t) in layout.tensors().iter().enumerate() {
        let to = model.params_mut().unwrap().tensor_mut(t).host();
        match t.kind {
            ParamKind::Norm1 | ParamKind::Norm2 | ParamKind::FinalNorm => to.fill(1.0),
            ParamKind::QNorm | ParamKind::KNorm => to.fill(1.0),
            _ if t.facts.decays => {
                to.iter_mut().zip(randn(i as u64, t.len())).for_each(|(w, x)| *w = 0.02 * x);
            }
            _ => {}
        }
    }
    model.repack(device()).unwrap();
    model
}

fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("warpo-bench-{}", std::process::id())).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn ids(stream: u64, n: usize) -> Vec<u32> {
    let draw = Philox::new(2, stream, 0, Purpose::Init);
    (0..n as u32).map(|i| 3 + draw.below(i, 4997)).collect()
}

fn trainer(algorithm: &str, len: usize, more: &[&str]) -> Trainer<f32> {
    trainer_of(&random(Head::Lm), algorithm, len, more)
}

fn trainer_of(policy: &Model<f32>, algorithm: &str, len: usize, more: &[&str]) -> Trainer<f32> {
    let (model, judge) = (folder("model"), folder("judge"));
    models::save(device(), policy, &model).unwrap();
    models::save(device(), &random(Head::Scalar), &judge).unwrap();
    let data = folder("data").join(format!("{algorithm}.jsonl"));
    let text = (0..64).fold(String::new(), |mut text, i| {
        writeln!(text, "{{\"input_ids\": {:?}}}", ids(i, len)).unwrap();
        text
    });
    std::fs::write(&data, text).unwrap();
    let entry = ALGORITHMS.iter().find(|e| e.name == algorithm).unwrap();
    let (mut settings, mut section) = (Settings::default(), (entry.section)());
    let (model, data, judge) = (model.display(), data.display(), judge.display());
    let mut pairs = vec![format!("model={model}"), format!("data={data}"), "steps=1000000".into()];
    if algorithm == "ppo" {
        pairs.push(format!("reward_model={judge}"));
    }
    for pair in pairs.iter().map(String::as_str).chain(more.iter().copied()) {
        config::set_pair(&mut [&mut settings, &mut *section], pair).unwrap();
    }
    Trainer::new(device(), settings, (entry.build)(&*section).unwrap()).unwrap()
}

/// FLOPs of matrix products over `tokens` tokens, of which `predicted` go through the LM head.
fn flops(model: &Model<f32>, tokens: usize, predicted: usize) -> f64 {
    let spec = model.spec();
    tokens as f64 * Layout::new(spec, Head::Lm).block_flops()
        + 2.0 * (predicted * spec.vocab * spec.hidden) as f64
}

fn generate(c: &mut Criterion) {
    let (dev, model) = (device(), random(Head::Lm));
    let prompts: Vec<Prompt> =
        (0..32).map(|sample| Prompt { sample, ids: ids(sample, 32) }).collect();
    let settings = GenerationConfig {
        sampling: sample::SamplingParams::default(),
        max_new_tokens: 64,
        stop_ids: Vec::new(),
        stream: Stream { seed: 0, step: 0, purpose: Purpose::Sample },
    };
    let generator = Generator::for_prompts(&prompts, 64, 32, 1024);
    let mut arena = Arena::new(
        dev,
        generator.plan::<f32>(dev, model.spec(), &SamplingParams::default()).unwrap(),
    )
    .unwrap();
    let mut g = c.benchmark_group("rollout");
    g.sample_size(10).sampling_mode(SamplingMode::Flat);
    let work = Work { flops: flops(&model, 32 * 95, 32 * 64), bytes: 0.0 };
    bench(&mut g, "generate/cpu/f32/tiny/32x(32+64)", work, || {
        let scope = arena.scope();
        generator.run(dev, &model, &scope, &prompts, &settings, |_| Ok(())).unwrap();
    });
}

fn sft(c: &mut Criterion) {
    let mut t = trainer("sft", 128, &["batch_size=16", "micro_batch_tokens=2048"]);
    let mut g = c.benchmark_group("train");
    g.sample_size(10).sampling_mode(SamplingMode::Flat);
    let work = Work { flops: 3.0 * flops(t.policy().unwrap(), 16 * 127, 16 * 127), bytes: 0.0 };
    bench(&mut g, "sft_step/cpu/f32/tiny/16x128", work, || {
        t.step(&mut Silent).unwrap();
    });
}

/// A step of a mixture of experts beside one of the model that multiplies as much for a token, in
/// turn: the time of the first, and its share of the second.
fn mixture(c: &mut Criterion) {
    let mut g = c.benchmark_group("train");
    g.sample_size(10).sampling_mode(SamplingMode::Flat);
    let more = ["batch_size=16", "micro_batch_tokens=2048"];
    let mut both =
        [DENSE, MIXTURE].map(|config| trainer_of(&random_of(config, Head::Lm), "sft", 128, &more));
    let shares = RefCell::new(Vec::new());
    g.bench_function("sft_step/cpu/f32/8_experts_top_2/16x128", |b| {
        b.iter_custom(|n| {
            let steps = (0..n).map(|_| {
                let mut times = [0.0; 2];
                // Each in turn comes first: it finds the caches as the other left them.
                let first = shares.borrow().len() % 2;
                for i in [first, 1 - first] {
                    let start = Instant::now();
                    both[i].step(&mut Silent).unwrap();
                    times[i] = start.elapsed().as_secs_f64();
                }
                shares.borrow_mut().push(times[1] / times[0]);
                Duration::from_secs_f64(times[1])
            });
            steps.sum()
        });
    });
    let mut all = shares.into_inner();
    all.sort_by(f64::total_cmp);
    if let Some(median) = all.get(all.len() / 2) {
        println!("    {median:.2} of the step of the dense model with the same active size");
    }
}

fn ppo(c: &mut Criterion) {
    let more = ["batch_size=32", "max_new_tokens=64", "temperature=1.0", "ppo_epochs=4"];
    let mut t = trainer("ppo", 32, &[&more[..], &["minibatches=4"]].concat());
    let mut g = c.benchmark_group("train");
    g.sample_size(10).sampling_mode(SamplingMode::Flat);
    let (policy, value) = (t.policy().unwrap(), t.scalar().unwrap());
    let (tokens, new) = (32 * 95, 32 * 64);
    // sampling and reference; values and rewards; then four passes of both trained models
    let once = 2.0 * flops(policy, tokens, new) + 2.0 * flops(value, tokens, 0);
    let passes = 12.0 * (flops(policy, tokens, new) + flops(value, tokens, 0));
    let work = Work { flops: once + passes, bytes: 0.0 };
    bench(&mut g, "ppo_iteration/cpu/f32/tiny/32x(32+64)", work, || {
        t.step(&mut Silent).unwrap();
    });
}

criterion_group!(benches, generate, sft, mixture, ppo);
criterion_main!(benches);
