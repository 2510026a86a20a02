//! Generation and an iteration of PPO on a GPU, of models with the shapes of Qwen2.5 and random
//! weights: seconds of each phase beside the least that the device's data sheet allows, and memory
//! beside the plan.
//!
//! `cargo bench --bench engine` runs all, `cargo bench --bench engine -- 0.5b` one;
//! `$WARPO_RESULTS` names a JSON file for the results, which takes each as it comes and keeps the
//! others. Without a GPU it says so. With `$WARPO_SIM`, a library of the simulator, or with
//! `--test` it runs a tiny model, which measures nothing.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)]

#[path = "engine/folder.rs"]
mod folder;
mod support;

use std::{path::Path, time::Instant};

use half::bf16;
use serde_json::{Value, json};
use warpo::{
    algorithms::{ALGORITHMS, Algorithm},
    config,
    device::{Arena, Device},
    models::{Config, Head, Layout, Model, Spec},
    ops::sample::SamplingParams,
    rng::{Purpose, Stream},
    rollout::{GenerationConfig, Generator, Prompt},
    train::{Settings, Silent, Trainer, inputs::RunInputs},
};

use folder::{Folder, ids};
use support::ResultsFile;

/// Of a Llama model with a tied head.
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    pub vocab: usize,
}

/// Of Qwen2.5, without its biases.
const SHAPES: [Shape; 2] = [
    Shape {
        name: "0.5b",
        hidden: 896,
        layers: 24,
        q_heads: 14,
        kv_heads: 2,
        head_dim: 64,
        mlp: 4864,
        vocab: 151_936,
    },
    Shape {
        name: "1.5b",
        hidden: 1536,
        layers: 28,
        q_heads: 12,
        kv_heads: 2,
        head_dim: 128,
        mlp: 8960,
        vocab: 151_936,
    },
];
const TINY: Shape = Shape {
    name: "tiny",
    hidden: 64,
    layers: 2,
    q_heads: 4,
    kv_heads: 2,
    head_dim: 16,
    mlp: 96,
    vocab: 99,
};

/// Of an iteration: samples, each of a prompt of its own; tokens of a prompt; new tokens of a
/// sample, which never ends by itself; tokens of a micro-batch, halved until it fits.
pub struct Work {
    pub batch: usize,
    pub prompt: usize,
    pub new: usize,
    pub micro: usize,
}

const WORK: Work = Work { batch: 256, prompt: 128, new: 128, micro: 16_384 };
const TINY_WORK: Work = Work { batch: 4, prompt: 6, new: 3, micro: 24 };

/// The first warms up.
const ITERATIONS: usize = 3;

/// What a device can do at most, by its data sheet.
#[derive(Clone, Copy)]
struct Peak {
    /// Of bf16, dense, a second.
    flops: f64,
    /// Bytes of device memory a second.
    bandwidth: f64,
}

fn peak(device: &str) -> Option<Peak> {
    // PCIe and NVL cards have other clocks.
    let slower = ["PCIe", "NVL"].iter().any(|kind| device.contains(kind));
    let known = [("H200", 4.8e12), ("H100", 3.35e12)].into_iter();
    let of = |(_, bandwidth)| Peak { flops: 989e12, bandwidth };
    known.filter(|k| !slower && device.contains(k.0)).map(of).next()
}

/// Seconds that sampling, scoring and updating take at least.
fn bounds(spec: &Spec, work: &Work, peak: Peak) -> [f64; 3] {
    let [b, p, r] = [work.batch, work.prompt, work.new].map(|n| n as f64);
    let size = |n: usize| n as f64;
    // FLOPs a token: two for each weight. As many bytes have the weights in bf16.
    let (blocks, head) =
        (Layout::new(spec, Head::Lm).block_flops(), 2.0 * size(spec.hidden * spec.vocab));
    // Causal attention of a sequence, forward; the backward pass has 2.5 times as many.
    let attention = |t: f64| 2.0 * size(spec.q_heads * spec.head_dim * spec.layers) * t * t;
    let forward = |t: f64| b * (blocks * t + attention(t));
    let kv = 4.0 * size(spec.layers * spec.kv_heads * spec.head_dim);

    // All prompts in one go; then a step for each further token. Its products take what their FLOPs
    // or the weights' bytes take, and its attention what the cache's bytes take.
    let prefill = (forward(p) + b * head) / peak.flops;
    let products = f64::max(b * (blocks + head) / peak.flops, (blocks + head) / peak.bandwidth);
    let step = |i: usize| products + b * kv * (p + size(i)) / peak.bandwidth;
    let sample = prefill + (1..work.new).map(step).sum::<f64>();

    // Nothing follows the last token. Reference, reward and value model; the first has logits.
    let t = p + r - 1.0;
    let score = (3.0 * forward(t) + b * r * head) / peak.flops;

    // Policy and value model, forward and backward; the logits' gradients need the logits again,
    // which nobody keeps, but they are not counted. AdamW reads weights, moments and gradients and
    // writes all but the last: 28 bytes.
    let both = 2.0 * b * (3.0 * blocks * t + 3.5 * attention(t)) + 3.0 * b * r * head;
    let weights = (blocks + head) / 2.0;
    let update = both / peak.flops + 2.0 * 28.0 * weights / peak.bandwidth;
    [sample, score, update]
}

struct Bench {
    dev: Device,
    peak: Option<Peak>,
    results: ResultsFile,
}

/// Seconds of each measured call, by phase.
struct Phase {
    name: &'static str,
    seconds: Vec<f64>,
    /// The least.
    bound: Option<f64>,
    /// That a call makes or reads.
    tokens: usize,
}

impl Phase {
    fn mean(&self) -> f64 {
        self.seconds.iter().sum::<f64>() / self.seconds.len() as f64
    }

    fn print(&self) {
        let (mean, tokens) = (self.mean(), self.tokens as f64);
        let bound = self.bound.map_or(String::new(), |b| {
            format!("  bound {b:>8.4} s, {:>5.1} % reached", 100.0 * b / mean)
        });
        println!("    {:<10}{mean:>10.4} s  {:>10.0} tokens/s{bound}", self.name, tokens / mean);
    }

    fn json(&self) -> Value {
        let rate = self.tokens as f64 / self.mean();
        json!({
            "name": self.name, "seconds": self.seconds, "bound": self.bound,
            "of the bound": self.bound.map(|b| b / self.mean()), "tokens/s": rate,
        })
    }
}

/// Settings and algorithm of PPO on what the folder holds, with `micro` tokens a micro-batch.
fn ppo(folder: &Folder, work: &Work, micro: usize) -> (Settings, Box<dyn Algorithm>) {
    let entry = ALGORITHMS.iter().find(|e| e.name == "ppo").unwrap();
    let (mut settings, mut section) = (Settings::default(), (entry.section)());
    for pair in [
        format!("model={}", folder.model().display()),
        format!("reward_model={}", folder.judge().display()),
        format!("data={}", folder.prompts().display()),
        format!("steps={ITERATIONS}"),
        format!("batch_size={}", work.batch),
        format!("rollout_slots={}", work.batch),
        format!("max_new_tokens={}", work.new),
        format!("micro_batch_tokens={micro}"),
        "learning_rate=1e-6".into(),
        "temperature=1.0".into(),
        "ppo_epochs=1".into(),
        "minibatches=1".into(),
    ] {
        config::set_pair(&mut [&mut settings, &mut *section], &pair).unwrap();
    }
    (settings, (entry.build)(&*section).unwrap())
}

/// Bytes of a run.
fn planned(dev: &Device, (settings, algorithm): (Settings, Box<dyn Algorithm>)) -> usize {
    RunInputs::new(settings, algorithm).unwrap().plan::<bf16>(dev).unwrap().total()
}

impl Bench {
    fn model(&mut self, shape: &Shape, work: &Work) {
        println!(
            "{}: {} prompts of {} tokens, {} new ones each",
            shape.name, work.batch, work.prompt, work.new
        );
        let folder = Folder::new(shape, work);
        let (_, spec) = Config::read(&folder.model()).unwrap().spec().unwrap();
        let bounds = self.peak.map(|peak| bounds(&spec, work, peak));
        let generate = Phase {
            name: "generate",
            seconds: self.generate(&folder.model(), shape, work),
            bound: bounds.map(|b| b[0]),
            tokens: work.batch * work.new,
        };
        generate.print();
        let mut result = json!({
            "name": shape.name, "batch": work.batch, "prompt": work.prompt, "new": work.new,
            "micro_batch_tokens": work.micro, "hidden": shape.hidden, "layers": shape.layers,
            "q_heads": shape.q_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
            "mlp": shape.mlp, "vocab": shape.vocab,
        });
        let mut phases = vec![generate.json()];
        result["phases"] = json!(phases);
        self.results.keep(result.clone());
        let free = self.dev.free_memory().unwrap();
        let takes = |micro| planned(&self.dev, ppo(&folder, work, micro));
        // Kernels take room, too, when they are first called.
        let fits = |micro: &usize| free.is_none_or(|free| takes(*micro) + (1 << 30) < free);
        let halved = std::iter::successors(Some(work.micro), |micro| Some(micro / 2));
        let micro = halved.take_while(|micro| *micro >= work.prompt + work.new).find(fits);
        if let Some(micro) = micro {
            let (settings, algorithm) = ppo(&folder, work, micro);
            let mut trainer = Trainer::<bf16>::new(&self.dev, settings, algorithm).unwrap();
            for phase in iterations(&mut trainer, bounds, work) {
                phase.print();
                phases.push(phase.json());
            }
            let planned = trainer.memory().total();
            let now = self.dev.free_memory().unwrap();
            let taken = free.zip(now).map(|(before, now)| before.saturating_sub(now));
            let gib = |bytes: usize| format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64);
            let beside = taken.map_or(String::new(), |t| format!(", {} less are free", gib(t)));
            println!(
                "    memory: {} planned{beside}; micro-batches of {micro} tokens",
                gib(planned)
            );
            result["micro_batch_tokens"] = json!(micro);
            result["memory"] = json!({ "planned": planned, "taken": taken });
        } else {
            println!("    PPO does not fit {free:?} bytes");
        }
        result["phases"] = json!(phases);
        self.results.keep(result);
    }

    /// Seconds of generation alone.
    fn generate(&self, dir: &Path, shape: &Shape, work: &Work) -> Vec<f64> {
        let dev = &self.dev;
        let model = Model::<bf16>::load(dev, dir, Head::Lm, None).unwrap();
        let prompt = |sample| Prompt { sample, ids: ids(shape, work, sample) };
        let prompts: Vec<Prompt> = (0..work.batch as u64).map(prompt).collect();
        let generator = Generator::for_prompts(&prompts, work.new, work.batch, work.micro);
        let plan = generator.plan::<bf16>(dev, model.spec(), &SamplingParams::default()).unwrap();
        let mut arena = Arena::new(dev, plan).unwrap();
        let mut run = |step| {
            let settings = GenerationConfig {
                sampling: SamplingParams::default(),
                max_new_tokens: work.new,
                stop_ids: Vec::new(),
                stream: Stream { seed: 0, step, purpose: Purpose::Sample },
            };
            let (scope, start) = (arena.scope(), Instant::now());
            let done = generator.run(dev, &model, &scope, &prompts, &settings, |_| Ok(())).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            assert!(done.iter().all(|c| c.ids.len() == work.new));
            seconds
        };
        (0..ITERATIONS as u64).map(&mut run).skip(1).collect()
    }
}

/// Phases of PPO's iterations, and whole ones.
fn iterations(trainer: &mut Trainer<bf16>, bounds: Option<[f64; 3]>, work: &Work) -> [Phase; 4] {
    let tokens = work.batch * (work.prompt + work.new);
    let phase = |name, tokens, bound| Phase { name, seconds: Vec::new(), bound, tokens };
    let mut phases = [
        phase("sample", work.batch * work.new, bounds.map(|b| b[0])),
        phase("score", tokens, bounds.map(|b| b[1])),
        phase("update", tokens, bounds.map(|b| b[2])),
        phase("iteration", tokens, bounds.map(|b| b.iter().sum())),
    ];
    for i in 0..ITERATIONS {
        let start = Instant::now();
        let report = trainer.step(&mut Silent).unwrap();
        let whole = ("iteration", start.elapsed().as_secs_f64());
        if i > 0 {
            for phase in &mut phases {
                let all = report.seconds.iter().chain([&whole]);
                phase.seconds.extend(all.filter(|s| s.0 == phase.name).map(|s| s.1));
            }
        }
    }
    phases
}

fn main() {
    let (dev, simulated) = support::gpu();
    println!("{}", dev.describe());
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| {
        let mut words = arguments.iter().filter(|word| !word.starts_with('-'));
        words.next().is_none_or(|word| name.contains(word.as_str()))
    };
    let peak = peak(&dev.describe());
    let mut results = ResultsFile::of(&dev, "models");
    results.head["peak"] =
        json!(peak.map(|p| json!({ "FLOP/s": p.flops, "bytes/s": p.bandwidth })));
    let mut b = Bench { dev, peak, results };
    if simulated || arguments.iter().any(|word| word == "--test") {
        b.model(&TINY, &TINY_WORK);
    } else {
        SHAPES.iter().filter(|s| wanted(s.name)).for_each(|s| b.model(s, &WORK));
    }
}
