//! Every CUDA kernel at the sizes of an 8B model (hidden 4096, MLP 14,336, vocabulary 128,256) and
//! 8,192 tokens: device time by events, random data, buffers rotated past the cache, beside a copy
//! in the same run. Matrix products at those of Qwen2.5, beside cuBLASLt. Attention of 16,384
//! tokens, and of a step over 1 GB of cache.
//!
//! `cargo bench --bench gpu` runs all, `cargo bench --bench gpu -- norm` a part; `$WARPO_RESULTS`
//! names a JSON file for the results, which takes each as it comes and keeps the others. Without a
//! GPU it says so; with `$WARPO_SIM`, a library of the simulator, it runs tiny sizes there, which
//! measures nothing.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)]

#[path = "gpu/attention.rs"]
mod attention;
#[path = "gpu/cublaslt.rs"]
mod cublaslt;
#[path = "gpu/gradients.rs"]
mod gradients;
#[path = "gpu/heads.rs"]
mod heads;
#[path = "gpu/products.rs"]
mod products;
mod support;

use std::{cell::RefCell, time::Duration};

use criterion::Criterion;
use half::bf16;
use serde_json::{Value, json};
use warpo::{
    device::{Buffer, Cuda, Device, Element},
    ops::{
        activation::{self, Activation},
        adamw,
        bradley_terry::{self, Pairs},
        embedding, gae, grad_norm, next_ids, nll,
        norm::{self, Norm, NormGrads, NormKept, NormOut, NormSpec},
        policy_loss::{self, PolicyLoss, PolicyTokens},
        residual,
        rope::{self, Rope, Table},
        sample, scale,
        sequence_loss::Offsets,
        value_loss::{self, ValueLoss, ValueTokens},
        whiten::{self, Moments, Variance},
    },
    rng::{Philox, Purpose, Stream},
};

use attention::attention;
use gradients::gradients;
use heads::heads;
use products::products;
use support::ResultsFile;

/// More than one round of these is larger than any cache.
const SETS: usize = 4;

struct Sizes {
    rows: usize,
    hidden: usize,
    mlp: usize,
    head_dim: usize,
    vocab: usize,
    /// Rows of a decoding step.
    batch: usize,
    weights: usize,
    /// Of a step's rollouts.
    tokens: usize,
}

const SIZES: Sizes = Sizes {
    rows: 8192,
    hidden: 4096,
    mlp: 14_336,
    head_dim: 128,
    vocab: 128_256,
    batch: 256,
    weights: 500_000_000,
    tokens: 16_000_000,
};
const TINY: Sizes = Sizes {
    rows: 9,
    hidden: 64,
    mlp: 80,
    head_dim: 16,
    vocab: 99,
    batch: 2,
    weights: 5000,
    tokens: 2000,
};

struct Bench {
    criterion: Criterion,
    dev: Device,
    sizes: Sizes,
    /// On the simulator, which only shows that the benches run.
    tiny: bool,
    /// Bytes a second, read and written.
    copy: f64,
    results: ResultsFile,
}

impl Bench {
    fn cuda(&self) -> &Cuda {
        let Device::Cuda(cuda) = &self.dev else { panic!("{:?}", self.dev) };
        cuda
    }

    /// Whether the command line asks for this, as criterion reads it.
    fn wanted(&self, name: &str) -> bool {
        let mut words = std::env::args().skip(1).filter(|word| !word.starts_with('-'));
        words.next().is_none_or(|word| name.contains(&word))
    }

    /// Random numbers, the same million again and again.
    fn input<T: Element>(&self, stream: u64, n: usize) -> Buffer<'static, T> {
        let draw = Philox::new(1, stream, 0, Purpose::Init);
        let some: Vec<T> = (0..n.min(1 << 20) as u32).map(|i| T::of(draw.normal(i))).collect();
        let all: Vec<T> = some.iter().copied().cycle().take(n).collect();
        Buffer::of(&self.dev, "bench", &all).unwrap()
    }

    fn inputs<T: Element>(&self, stream: u64, n: usize) -> [Buffer<'static, T>; SETS] {
        std::array::from_fn(|i| self.input(stream + 100 * i as u64, n))
    }

    /// Measures `f`, which computes `flops` FLOPs, as [`Bench::run`].
    fn compute(&mut self, name: &str, flops: f64, bytes: usize, f: impl FnMut(&Device, usize)) {
        let Some(mut result) = self.measure(name, bytes, f) else { return };
        let rate = flops / result["microseconds"].as_f64().unwrap() / 1e6;
        println!("    {rate:>10.1} TFLOP/s");
        result["TFLOP/s"] = json!(rate);
        self.results.keep(result);
    }

    /// Measures `f`, which moves `bytes` bytes and is given the set to work on.
    fn run(&mut self, name: &str, bytes: usize, f: impl FnMut(&Device, usize)) {
        if let Some(result) = self.measure(name, bytes, f) {
            self.results.keep(result);
        }
    }

    /// The same, unless the command line does not ask for it.
    fn measure(
        &mut self,
        name: &str,
        bytes: usize,
        mut f: impl FnMut(&Device, usize),
    ) -> Option<Value> {
        let (cuda, dev, seconds) = (self.cuda().clone(), self.dev.clone(), RefCell::new(vec![]));
        let mut set = 0;
        self.criterion.bench_function(name, |b| {
            b.iter_custom(|n| {
                let work = || {
                    for _ in 0..n {
                        set = (set + 1) % SETS;
                        f(&dev, set);
                    }
                    Ok(())
                };
                let took = cuda.time(work).unwrap();
                seconds.borrow_mut().push(took / n as f64);
                Duration::from_secs_f64(took)
            });
        });
        let mut all = seconds.into_inner();
        all.sort_by(f64::total_cmp);
        let median = all.get(all.len() / 2)?;
        let rate = bytes as f64 / median;
        let (us, gb, share) = (median * 1e6, rate / 1e9, rate / self.copy);
        println!("    {us:>10.1} us  {gb:>7.0} GB/s  {:>4.0} % of a copy", 100.0 * share);
        Some(json!({
            "name": name, "microseconds": us, "bytes": bytes, "GB/s": gb, "of a copy": share,
        }))
    }
}

/// Bytes a second that a copy of device memory reads and writes.
fn copy(b: &Bench) -> f64 {
    let n = 4 * b.sizes.rows * b.sizes.hidden;
    let (x, mut y) = (b.inputs::<f32>(1, n), b.inputs::<f32>(2, n));
    let mut one = |i: usize| {
        let copy = || b.dev.copy(y[i % SETS].view_mut(), x[i % SETS].view());
        b.cuda().time(copy).unwrap()
    };
    let mut all: Vec<f64> = (0..20).map(&mut one).collect();
    all.sort_by(f64::total_cmp);
    8.0 * n as f64 / all[all.len() / 2]
}

fn norms(b: &mut Bench) {
    let Sizes { rows, hidden, .. } = b.sizes;
    let n = rows * hidden;
    let (x, mut y, dy) = (b.inputs::<bf16>(1, n), b.inputs::<bf16>(2, n), b.inputs::<bf16>(3, n));
    let (w, bias) = (b.input::<bf16>(4, hidden), b.input::<bf16>(5, hidden));
    let [mut mean, mut rstd] = [6, 7].map(|i| b.input::<f32>(i, rows));
    let [mut dw, mut db] = [8, 9].map(|i| b.input::<f32>(i, hidden));
    for (name, norm) in [("rms", Norm::Rms), ("layer", Norm::Layer)] {
        let spec = NormSpec { norm, one_plus: false, eps: 1e-5, heads: 1, unpadded: None };
        let layer = norm == Norm::Layer;
        let mut scratch = b.input::<f32>(10, norm::scratch_len(norm, rows, hidden));
        b.run(&format!("norm/{name}/forward"), 4 * n, |dev, i| {
            let (y, mean, rstd) = (y[i].view_mut().into(), mean.view_mut(), rstd.view_mut());
            let b = layer.then(|| bias.view());
            norm::forward(dev, spec, NormOut { y, mean, rstd }, x[i].view(), w.view(), b).unwrap();
        });
        b.run(&format!("norm/{name}/backward"), 6 * n, |dev, i| {
            let (dx, dw, scratch) = (y[i].view_mut(), dw.view_mut(), scratch.view_mut());
            let db = layer.then(|| db.view_mut());
            let grads = NormGrads { dx, add: false, dw: Some(dw), db, scratch };
            let (w, mean, rstd) = (w.view(), mean.view(), rstd.view());
            let kept = NormKept { x: x[i].view().into(), w, mean, rstd };
            norm::backward(dev, spec, grads, dy[i].view(), kept).unwrap();
        });
    }
}

fn elementwise(b: &mut Bench) {
    let Sizes { rows, hidden, mlp, head_dim, vocab, .. } = b.sizes;
    let n = rows * mlp;
    let (x, mut dx) = (b.inputs::<bf16>(1, 2 * n), b.inputs::<bf16>(2, 2 * n));
    let (dy, mut y) = (b.inputs::<bf16>(3, n), b.inputs::<bf16>(4, n));
    b.run("activation/swiglu", 6 * n, |dev, i| {
        let (y, x) = (y[i].view_mut(), x[i].view());
        activation::gated_forward(dev, Activation::Silu, y, x, mlp).unwrap();
    });
    b.run("activation/swiglu_backward", 10 * n, |dev, i| {
        let (dx, dy, x) = (dx[i].view_mut(), dy[i].view(), x[i].view());
        activation::gated_backward(dev, Activation::Silu, dx, dy, x, mlp).unwrap();
    });
    b.run("activation/gelu", 4 * n, |dev, i| {
        let x = x[i].view().range(0..n);
        activation::forward(dev, Activation::GeluTanh, y[i].view_mut(), x).unwrap();
    });
    b.run("activation/gelu_backward", 6 * n, |dev, i| {
        let (dx, dy, x) = (y[i].view_mut(), dy[i].view(), x[i].view().range(0..n));
        activation::backward(dev, Activation::GeluTanh, dx, dy, x).unwrap();
    });
    let n = rows * hidden;
    b.run("residual", 6 * n, |dev, i| {
        let (y, x) = (y[i].view_mut().range(0..n), x[i].view().range(0..n));
        residual::add(dev, y, x).unwrap();
    });
    b.run("scale", 4 * n, |dev, i| {
        scale::in_place(dev, y[i].view_mut().range(0..n), 1.0 + 1e-7, None).unwrap();
    });
    let table = Table::<f32>::new(&b.dev, &Rope::plain(1e4), head_dim, rows).unwrap();
    let positions = Buffer::of(&b.dev, "positions", &Vec::from_iter(0..rows as u32)).unwrap();
    b.run("rope", 4 * n, |dev, i| {
        let (x, at) = (y[i].view_mut().range(0..n), positions.view());
        let heads = rope::Heads { row_len: hidden, heads: hidden / head_dim, head_dim };
        rope::forward(dev, x, heads, at, &table).unwrap();
    });
    drop((x, dx));
    // Words of a text: few ids are most of it.
    let draw = Philox::new(1, 9, 0, Purpose::Init);
    let square = |i| f64::from(draw.uniform(i)) * f64::from(draw.uniform(i));
    let word = |i| (square(i) * square(i) * vocab as f64) as u32;
    let ids = Buffer::of(&b.dev, "ids", &Vec::from_iter((0..rows as u32).map(word))).unwrap();
    let words = b.input::<bf16>(5, vocab * hidden);
    b.run("embedding/forward", 4 * n, |dev, i| {
        let y = y[i].view_mut().range(0..n);
        embedding::forward(dev, y, ids.view(), words.view(), false).unwrap();
    });
    let mut dwords = b.input::<f32>(6, vocab * hidden);
    let mut order = Buffer::new(&b.dev, "order", embedding::scratch_len(rows)).unwrap();
    // Beside dy, the rows of the ids that there are, read and written.
    b.run("embedding/backward", 2 * n, |dev, i| {
        let (d, order, dy) = (dwords.view_mut(), order.view_mut(), dy[i].view().range(0..n));
        embedding::backward(dev, d, order, ids.view(), dy, hidden).unwrap();
    });
}

/// Columns of one number a token, 64 MB each. What returns sums is not waited for.
fn losses(b: &mut Bench) {
    let n = b.sizes.tokens;
    let [x, y, z] = [1, 2, 3].map(|i| b.inputs::<f32>(i, n));
    let (mut d, mut e) = (b.inputs::<f32>(4, n), b.inputs::<f32>(5, n));
    let settings = PolicyLoss::default();
    let ends: Vec<u32> = (0..=1000).map(|i| i * (n as u32 / 1000)).collect();
    let offsets = Buffer::of(&b.dev, "offsets", &ends).unwrap();
    let denominator = n as f64;
    b.run("policy_loss", 16 * n, |dev, i| {
        let (logp, old_logp, advantages) = (x[i].view(), y[i].view(), z[i].view());
        let t = PolicyTokens {
            logp,
            old_logp,
            ref_logp: None,
            entropy: None,
            advantages,
            weights: None,
            offsets: Offsets { host: &ends, view: offsets.view() },
        };
        drop(policy_loss::forward(dev, d[i].view_mut(), None, t, &settings, denominator).unwrap());
    });
    b.run("value_loss", 16 * n, |dev, i| {
        let (v, old, returns) = (x[i].view(), y[i].view(), z[i].view());
        let t = ValueTokens { v, old, returns, weights: None };
        let s = ValueLoss { clip: Some(0.2), coef: 0.5 };
        drop(value_loss::forward(dev, d[i].view_mut(), t, s, denominator).unwrap());
    });
    b.run("nll", 12 * n, |dev, i| {
        let (d, x, y) = (d[i].view_mut(), x[i].view(), y[i].view());
        drop(nll::forward(dev, d, x, y, denominator).unwrap());
    });
    let none = Buffer::<f32>::zeros(&b.dev, "margins", 0).unwrap();
    b.run("bradley_terry", 8 * n, |dev, i| {
        let t = Pairs { scores: x[i].view(), margins: none.view(), weights: None };
        drop(bradley_terry::forward(dev, d[i].view_mut(), t, 0.0, denominator).unwrap());
    });
    let offsets: Vec<u32> = (0..n as u32).step_by(500).chain([n as u32]).collect();
    let offsets = Buffer::of(&b.dev, "offsets", &offsets).unwrap();
    b.run("gae", 16 * n, |dev, i| {
        let (a, ret, r, v) = (d[i].view_mut(), e[i].view_mut(), x[i].view(), y[i].view());
        let of = gae::RewardColumns {
            rewards: r,
            values: v,
            offsets: offsets.view(),
            gamma: 1.0,
            lambda: 0.95,
        };
        gae::forward(dev, a, ret, of).unwrap();
    });
    b.run("whiten", 12 * n, |dev, i| {
        let moments = Moments::of(dev, d[i].view()).unwrap();
        let variance = Variance::Unbiased;
        whiten::apply(dev, d[i].view_mut(), &moments, true, variance, 1e-8).unwrap();
    });
}

fn sampling(b: &mut Bench) {
    let Sizes { batch, vocab, .. } = b.sizes;
    let n = batch * vocab;
    let z = b.inputs::<bf16>(1, n);
    let mut scratch = b.input::<f32>(2, sample::scratch_len(batch, vocab));
    let samples: Vec<u64> = (0..batch as u64).collect();
    let samples = Buffer::of(&b.dev, "samples", &samples).unwrap();
    let positions = Buffer::of(&b.dev, "positions", &vec![5u32; batch]).unwrap();
    let mut tokens = Buffer::new(&b.dev, "tokens", batch).unwrap();
    let all = sample::SamplingParams::default();
    let stream = Stream { seed: 1, step: 2, purpose: Purpose::Sample };
    for (name, params) in [
        ("sample/greedy", sample::SamplingParams::greedy()),
        ("sample/whole", all),
        ("sample/top_k", sample::SamplingParams { top_k: 50, ..all }),
        ("sample/top_p", sample::SamplingParams { top_p: 0.9, ..all }),
    ] {
        b.run(name, 2 * n, |dev, i| {
            let (t, room) = (tokens.view_mut(), scratch.view_mut());
            let (samples, positions) = (samples.view(), positions.view());
            let draws = sample::Draws { stream: Some(stream), samples, positions };
            sample::next(dev, t, z[i].view(), &params, draws, room).unwrap();
        });
    }
    let mut ids = Buffer::new(&b.dev, "ids", batch).unwrap();
    let rows = Buffer::of(&b.dev, "rows", &Vec::from_iter(0..batch as u32)).unwrap();
    b.run("next_ids", 16 * batch, |dev, _| {
        let (ids, rows, tokens) = (ids.view_mut(), rows.view(), tokens.view());
        next_ids::forward(dev, ids, rows, rows, tokens).unwrap();
    });
}

fn optimizer(b: &mut Bench) {
    let n = b.sizes.weights;
    // Larger than any cache already: one set.
    let (mut p, g) = (b.input::<f32>(1, n), b.input::<f32>(2, n));
    let (mut m, mut v) = (b.input::<f32>(3, n), Buffer::<f32>::zeros(&b.dev, "v", n).unwrap());
    let mut copy = b.input::<bf16>(4, n);
    let starts = Buffer::of(&b.dev, "starts", &[0u32]).unwrap();
    let hyper = adamw::Hyper {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
    };
    b.run("adamw", 30 * n, |dev, _| {
        let (p, m, v) = (p.view_mut(), m.view_mut(), v.view_mut());
        let state = adamw::State { p, m, v, copy: Some(copy.view_mut()), t: 3 };
        adamw::step(dev, state, g.view(), starts.view(), 0.5, &hyper).unwrap();
    });
    b.run("grad_norm", 4 * n, |dev, _| {
        drop(grad_norm::norm(dev, g.view()).unwrap());
    });
    b.run("first_bad", 4 * n, |dev, _| {
        drop(grad_norm::first_bad(dev, g.view()).unwrap());
    });
}

fn main() {
    let (dev, tiny) = support::gpu();
    let sizes = if tiny { TINY } else { SIZES };
    println!("{}", dev.describe());
    let criterion = Criterion::default()
        .sample_size(15)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let results = ResultsFile::of(&dev, "ops");
    let mut b = Bench { criterion, dev, sizes, tiny, copy: f64::NAN, results };
    b.copy = copy(&b);
    println!("a copy moves {:.0} GB/s", b.copy / 1e9);
    b.results.head["copy GB/s"] = json!(b.copy / 1e9);
    let bandwidth = [norms, elementwise, losses, sampling, optimizer];
    for group in bandwidth.into_iter().chain([products, heads, attention, gradients]) {
        group(&mut b);
    }
    b.criterion.final_summary();
}
