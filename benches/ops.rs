//! Every op, forward and backward, at the sizes of GPT-2 small (hidden 768, 12 heads of 64,
//! vocabulary 50,257) and 2,048 tokens, and at decoding sizes.
//!
//! `cargo bench --bench ops` runs all, `cargo bench --bench ops -- matmul` one group.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use criterion::{Criterion, criterion_group, criterion_main};
use support::{Work, bench, device, fma, moves, randn};
use warpo::{
    device::{Arena, Buffer, View, ViewMut},
    ops::{
        activation::{self, Activation},
        adamw,
        attention::{self, KvLayer, PAGE, Segment, Shape},
        bradley_terry::{self, Pairs},
        delta_rule::{self, DeltaGrads, DeltaInputs, DeltaKept, DeltaOut, DeltaShape},
        embedding,
        experts::{self, PairRows, Stack, StackGrads},
        gae,
        gate::{self, Gate, Strided},
        grad_norm,
        kl::KlEstimator,
        logprob::{self, LmHead, LogitSettings, Outputs, Slopes},
        matmul::{self, Packed},
        nll,
        norm::{self, Norm, NormGrads, NormKept, NormOut, NormSpec},
        policy_loss::{self, KlTerm, KlWeight, PolicyLoss, PolicyTokens, Surrogate},
        residual,
        rope::{self, Rope, Table},
        routing::{self, Router, Routes},
        sample::{self, Draws},
        scalar_head, scale,
        sequence_loss::Offsets,
        short_conv::{self, ConvKept, ConvSpec, Sequences},
        value_loss::{self, ValueLoss, ValueTokens},
        whiten::{self, Moments, Variance},
    },
    rng::{Purpose, Stream},
};

const ROWS: usize = 2048;
const HIDDEN: usize = 768;
const MLP: usize = 3072;
const VOCAB: usize = 50_257;

fn matmul(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("matmul");
    for (m, n, k) in [(ROWS, MLP, HIDDEN), (ROWS, HIDDEN, MLP), (512, 768, 256), (8, MLP, HIDDEN)] {
        let (x, w, mut y) = (randn(1, m * k), randn(2, n * k), vec![0.0; m * n]);
        let mut packed = Packed::new(dev, n, k).unwrap();
        packed.pack(dev, (&w).into()).unwrap();
        let name = |what: &str| format!("{what}/cpu/f32/{m}x{n}x{k}");
        let work = fma(m * n * k);
        bench(&mut g, &name("forward"), work, || {
            matmul::forward(dev, (&mut y).into(), (&x).into(), &packed, None, None).unwrap();
        });
        let (dy, mut dx, mut dw) = (randn(3, m * n), vec![0.0; m * k], vec![0.0; n * k]);
        bench(&mut g, &name("backward_input"), work, || {
            let (dx, dy) = ((&mut dx).into(), (&dy).into());
            matmul::backward_input(dev, dx, dy, (&w).into(), (n, k)).unwrap();
        });
        bench(&mut g, &name("backward_weight"), work, || {
            let (dw, dy) = ((&mut dw).into(), (&dy).into());
            matmul::backward_weight(dev, dw, None, dy, (&x).into(), (n, k)).unwrap();
        });
    }
}

/// 8 experts, 2 for a row, of half the width of the MLP: as many FLOPs as that.
fn mixture(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("experts");
    let (router, pairs) = (Router { experts: 8, top: 2, renormalised: true }, 2 * ROWS);
    let (n, k) = (MLP / 2, HIDDEN);
    let mut arena = Arena::new(dev, 1 << 24).unwrap();
    let scope = arena.scope();
    let mut routes = Routes::new(dev, &scope, router, ROWS).unwrap();
    routes.logits.host_mut().copy_from_slice(&randn(1, ROWS * 8));
    routing::forward(dev, &mut routes).unwrap();
    bench(&mut g, "route/cpu/f32/2048x8_top_2", moves(ROWS * 8), || {
        routing::forward(dev, &mut routes).unwrap();
    });
    let (x, w) = (randn(2, ROWS * k), randn(3, 8 * n * k));
    let (mut room, mut y) = (vec![0.0; pairs * k], randn(4, pairs * n));
    let mut packed = Packed::stack(dev, 8, n, k).unwrap();
    packed.pack(dev, (&w).into()).unwrap();
    let stack = Stack { weight: (&packed).into(), bias: None };
    let (name, work) = (|what: &str| format!("{what}/cpu/f32/2048x2x{n}x{k}"), fma(pairs * n * k));
    let all = randn(5, pairs * k);
    bench(&mut g, &name("forward"), work, || {
        experts::forward(dev, &routes, (&mut y).into(), (&all).into(), stack).unwrap();
    });
    bench(&mut g, &name("backward_input"), work, || {
        let dy = PairRows::Sorted((&y).into());
        let (dx, w) = ((&mut room).into(), (&w).into());
        experts::backward_input(dev, &routes, dx, dy, w, (n, k)).unwrap();
    });
    let mut dw = vec![0.0; 8 * n * k];
    bench(&mut g, &name("backward_weight"), work, || {
        let (dy, x) = ((&y).into(), (&x).into());
        let x = PairRows::Gathered { x, room: (&mut room).into() };
        let grads = StackGrads { dw: (&mut dw).into(), dbias: None };
        experts::backward_weight(dev, &routes, grads, PairRows::Sorted(dy), x, (n, k)).unwrap();
    });
    let mut out = vec![0.0; ROWS * k];
    bench(&mut g, "combine/cpu/f32/2048x2x768", moves(4 * ROWS * k), || {
        let (y, x) = ((&mut out).into(), (&all).into());
        routing::combine(dev, &routes, y, x, None, true).unwrap();
    });
}

fn attention(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("attention");
    for (q_heads, kv_heads, head_dim, len) in
        [(12, 12, 64, 128), (12, 12, 64, 1024), (8, 2, 128, 512)]
    {
        let scale = 1.0 / (head_dim as f64).sqrt();
        let shape = Shape { q_heads, kv_heads, head_dim, scale, softcap: None, window: None };
        let (cols, out_cols) = (shape.qkv_cols(), q_heads * head_dim);
        let (n, per) = (ROWS / len, len.div_ceil(PAGE));
        let segments: Vec<Segment> = (0..n)
            .map(|i| Segment {
                first: 0,
                rows: len as u32,
                at: (i * len) as u32,
                pages: (i * per) as u32..((i + 1) * per) as u32,
                prefix: None,
            })
            .collect();
        let pages: Vec<u32> = (0..(n * per) as u32).collect();
        let mut arena = Arena::new(dev, 1 << 28).unwrap();
        let scope = arena.scope();
        let mut kv = KvLayer::new(&scope, &shape, PAGE, n * per).unwrap();
        let (mut qkv, mut out) = (randn(1, ROWS * cols), vec![0.0; ROWS * out_cols]);
        let mut lse = vec![0.0; ROWS * q_heads];
        let name = |what: &str| format!("{what}/cpu/f32/{n}x{len}x{q_heads}:{kv_heads}x{head_dim}");
        let work = attention::SegmentBatch::new(&segments, &pages);
        bench(&mut g, &name("append"), moves(4 * ROWS * kv_heads * head_dim), || {
            attention::append(dev, &mut kv, (&mut qkv).into(), work, &shape, None).unwrap();
        });
        let visible = n * len * (len + 1) / 2;
        bench(&mut g, &name("forward"), fma(2 * q_heads * head_dim * visible), || {
            let (out, lse) = ((&mut out).into(), (&mut lse).into());
            let qkv = (&qkv).into();
            attention::forward(
                dev,
                attention::ForwardOutputs { out, lse, scratch: (&mut [][..]).into() },
                qkv,
                &kv,
                work,
                &shape,
            )
            .unwrap();
        });
        let (dout, mut dqkv) = (randn(2, ROWS * out_cols), vec![0.0; ROWS * cols]);
        let mut scratch = vec![0.0; attention::backward_scratch_len(&shape, ROWS)];
        bench(&mut g, &name("backward"), fma(5 * q_heads * head_dim * visible), || {
            attention::backward(
                dev,
                attention::BackwardArgs {
                    dqkv: (&mut dqkv).into(),
                    dout: (&dout).into(),
                    out: (&out).into(),
                    qkv: (&qkv).into(),
                    lse: (&lse).into(),
                    scratch: (&mut scratch).into(),
                },
                work,
                &shape,
            )
            .unwrap();
        });
        // One new row of each of 64 sequences against a full cache of one of them.
        let decode: Vec<Segment> = (0..64)
            .map(|i| Segment {
                first: len as u32 - 1,
                rows: 1,
                at: i,
                pages: 0..per as u32,
                prefix: None,
            })
            .collect();
        let decode = attention::SegmentBatch::new(&decode, &pages);
        let read = Work { flops: 0.0, bytes: 64.0 * 8.0 * (len * kv_heads * head_dim) as f64 };
        bench(&mut g, &name("decode"), read, || {
            let (out, lse) =
                ((&mut out[..64 * out_cols]).into(), (&mut lse[..64 * q_heads]).into());
            let qkv = View::from(&qkv[..64 * cols]);
            attention::forward(
                dev,
                attention::ForwardOutputs { out, lse, scratch: (&mut [][..]).into() },
                qkv,
                &kv,
                decode,
                &shape,
            )
            .unwrap();
        });
    }
}

/// A gated delta rule of Qwen3.5-0.8B, 16 heads of 128, and what is around it: four sequences.
fn mixers(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("delta_rule");
    let shape = DeltaShape { key_heads: 16, value_heads: 16, key_dim: 128, value_dim: 128 };
    let (cols, values, heads) = (shape.qkv_cols(), shape.values(), shape.value_heads);
    let len = ROWS as u32 / 4;
    let spans: Vec<u32> = (0..4).flat_map(|i| [i * len, len, 0, i]).collect();
    let (x, w, mut y) = (randn(1, ROWS * cols), randn(2, cols * 4), vec![0.0; ROWS * cols]);
    let spec = ConvSpec { channels: cols, taps: 4, silu: true };
    let none = || ViewMut::from(&mut [][..]);
    bench(&mut g, "short_conv/cpu/f32/2048x6144x4", moves(2 * ROWS * cols), || {
        let (of, x) = (Sequences { spans: (&spans).into(), state: none() }, (&x).into());
        let x = Strided::dense(x, cols);
        short_conv::forward(dev, spec, (&mut y).into(), x, (&w).into(), of).unwrap();
    });
    let (mut dx, mut dw, mut scratch) =
        (vec![0.0; ROWS * cols], vec![0.0; cols * 4], vec![0.0; ROWS * cols]);
    bench(&mut g, "short_conv_backward/cpu/f32/2048x6144x4", moves(3 * ROWS * cols), || {
        let x = Strided::dense((&x).into(), cols);
        let kept = ConvKept { x, w: (&w).into(), spans: (&spans).into() };
        let to = (Strided::dense((&mut dx).into(), cols), (&mut dw).into());
        short_conv::backward(dev, spec, to, (&y).into(), kept, (&mut scratch).into()).unwrap();
    });
    let (gates, rate, bias) = (randn(3, ROWS * 2 * heads), randn(4, heads), randn(5, heads));
    let inputs = DeltaInputs {
        qkv: (&x).into(),
        gates: Strided::dense((&gates).into(), 2 * heads),
        rate: (&rate).into(),
        bias: (&bias).into(),
    };
    let (mut out, mut errors) = (vec![0.0; ROWS * values], vec![0.0; ROWS * values]);
    let work = fma(3 * ROWS * shape.state_len());
    bench(&mut g, "forward/cpu/f32/2048x16x128x128", work, || {
        let to = DeltaOut {
            out: (&mut out).into(),
            errors: (&mut errors).into(),
            scratch: (&mut scratch).into(),
        };
        let of = Sequences { spans: (&spans).into(), state: none() };
        delta_rule::forward(dev, shape, to, inputs, of).unwrap();
    });
    let mut scratch = vec![0.0; delta_rule::backward_scratch_len(shape, ROWS)];
    let (mut dgates, mut drate, mut dbias) =
        (vec![0.0; ROWS * 2 * heads], vec![0.0; heads], vec![0.0; heads]);
    let work = fma(8 * ROWS * shape.state_len());
    bench(&mut g, "backward/cpu/f32/2048x16x128x128", work, || {
        let to = DeltaGrads {
            dqkv: (&mut dx).into(),
            dgates: Strided::dense((&mut dgates).into(), 2 * heads),
            drate: (&mut drate).into(),
            dbias: (&mut dbias).into(),
            scratch: (&mut scratch).into(),
        };
        let kept = DeltaKept { errors: (&errors).into(), spans: (&spans).into() };
        delta_rule::backward(dev, shape, to, (&out).into(), inputs, kept).unwrap();
    });
    let (z, mut y) = (randn(6, ROWS * values), vec![0.0; ROWS * values]);
    let [z, x] = [(&z).into(), (&out).into()].map(|x| Strided::dense(x, values));
    bench(&mut g, "gate/cpu/f32/2048x2048", moves(3 * ROWS * values), || {
        let y = Strided::dense((&mut y).into(), values);
        gate::forward(dev, Gate::Silu, y, x, z, values).unwrap();
    });
}

fn lm_head(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("logprob");
    g.sample_size(10);
    for (rows, vocab, d) in [(512, VOCAB, HIDDEN), (2048, 5000, 256)] {
        let (h, w) = (randn(1, rows * d), randn(2, vocab * d));
        let mut packed = Packed::new(dev, vocab, d).unwrap();
        packed.pack(dev, (&w).into()).unwrap();
        let targets: Vec<u32> = (0..rows as u32).map(|r| r * 7 % vocab as u32).collect();
        let (mut logp, mut lse, mut entropy) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows]);
        let mut scratch = vec![0.0; logprob::backward_scratch_len(rows, vocab, d)];
        let head = LmHead { w: (&packed).into(), settings: LogitSettings::at(0.7) };
        let name = |what: &str| format!("{what}/cpu/f32/{rows}x{vocab}x{d}");
        bench(&mut g, &name("forward"), fma(rows * vocab * d), || {
            let entropy = Some((&mut entropy).into());
            let out = Outputs { logp: (&mut logp).into(), lse: (&mut lse).into(), entropy };
            let (h, targets, room) = ((&h).into(), (&targets).into(), (&mut scratch).into());
            logprob::forward(dev, out, h, head, targets, room).unwrap();
        });
        let (dlogp, mut dh, mut dw) = (randn(3, rows), vec![0.0; rows * d], vec![0.0; vocab * d]);
        bench(&mut g, &name("backward"), fma(3 * rows * vocab * d), || {
            let f = logprob::Forward {
                h: (&h).into(),
                head,
                w: (&w).into(),
                targets: (&targets).into(),
                lse: (&lse).into(),
                entropy: None,
            };
            let (dh, dw) = ((&mut dh).into(), Some((&mut dw).into()));
            let slopes = Slopes { dlogp: (&dlogp).into(), dentropy: None };
            logprob::backward(dev, dh, dw, slopes, f, (&mut scratch).into()).unwrap();
        });
    }
}

fn norms(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("norm");
    let n = ROWS * HIDDEN;
    let (x, w, b, dy) = (randn(1, n), randn(2, HIDDEN), randn(3, HIDDEN), randn(4, n));
    let (mut y, mut dx) = (vec![0.0; n], vec![0.0; n]);
    let (mut mean, mut rstd) = (vec![0.0; ROWS], vec![0.0; ROWS]);
    let (mut dw, mut db) = (vec![0.0; HIDDEN], vec![0.0; HIDDEN]);
    for (name, norm) in [("rms", Norm::Rms), ("layer", Norm::Layer)] {
        let spec = NormSpec { norm, one_plus: false, eps: 1e-5, heads: 1, unpadded: None };
        let layer = norm == Norm::Layer;
        let mut scratch = vec![0.0; norm::scratch_len(norm, ROWS, HIDDEN)];
        bench(&mut g, &format!("norm/{name}/forward/cpu/f32/2048x768"), moves(2 * n), || {
            let y = ViewMut::from(&mut y).into();
            let out = NormOut { y, mean: (&mut mean).into(), rstd: (&mut rstd).into() };
            let b = layer.then(|| (&b).into());
            norm::forward(dev, spec, out, View::from(&x), (&w).into(), b).unwrap();
        });
        bench(&mut g, &format!("norm/{name}/backward/cpu/f32/2048x768"), moves(3 * n), || {
            let (dx, dw, scratch) = ((&mut dx).into(), (&mut dw).into(), (&mut scratch).into());
            let db = layer.then(|| (&mut db).into());
            let grads = NormGrads { dx, add: false, dw: Some(dw), db, scratch };
            let (w, mean, rstd) = ((&w).into(), (&mean).into(), (&rstd).into());
            let kept = NormKept { x: View::from(&x).into(), w, mean, rstd };
            norm::backward(dev, spec, grads, View::from(&dy), kept).unwrap();
        });
    }
}

fn elementwise(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("elementwise");
    let n = ROWS * MLP;
    let (x, up, dy) = (randn(1, n), randn(2, 2 * n), randn(3, n));
    let (mut y, mut dx) = (vec![0.0; n], vec![0.0; 2 * n]);
    for (name, act) in [("gelu_tanh", Activation::GeluTanh), ("silu", Activation::Silu)] {
        bench(&mut g, &format!("{name}/forward/cpu/f32/2048x3072"), moves(2 * n), || {
            activation::forward(dev, act, (&mut y).into(), (&x).into()).unwrap();
        });
        bench(&mut g, &format!("{name}/backward/cpu/f32/2048x3072"), moves(3 * n), || {
            let dx = (&mut dx[..n]).into();
            activation::backward(dev, act, dx, (&dy).into(), (&x).into()).unwrap();
        });
    }
    bench(&mut g, "swiglu/forward/cpu/f32/2048x3072", moves(3 * n), || {
        let act = Activation::Silu;
        activation::gated_forward(dev, act, (&mut y).into(), (&up).into(), MLP).unwrap();
    });
    bench(&mut g, "swiglu/backward/cpu/f32/2048x3072", moves(5 * n), || {
        let (act, dx) = (Activation::Silu, (&mut dx).into());
        activation::gated_backward(dev, act, dx, (&dy).into(), (&up).into(), MLP).unwrap();
    });
    bench(&mut g, "residual/add/cpu/f32/2048x3072", moves(3 * n), || {
        residual::add(dev, (&mut y).into(), (&x).into()).unwrap();
    });
    bench(&mut g, "scale/cpu/f32/2048x3072", moves(2 * n), || {
        scale::in_place(dev, (&mut y).into(), 1.0 + 1e-7, None).unwrap();
    });
    let (table, ids) =
        (randn(4, VOCAB * HIDDEN), (0..ROWS as u32).map(|r| r * 17).collect::<Vec<_>>());
    let (mut rows, mut dtable) = (vec![0.0; ROWS * HIDDEN], vec![0.0; VOCAB * HIDDEN]);
    let mut order = vec![0; embedding::scratch_len(ROWS)];
    bench(&mut g, "embedding/forward/cpu/f32/2048x768", moves(2 * ROWS * HIDDEN), || {
        embedding::forward(dev, (&mut rows).into(), (&ids).into(), (&table).into(), false).unwrap();
    });
    bench(&mut g, "embedding/backward/cpu/f32/2048x768", moves(3 * ROWS * HIDDEN), || {
        let (d, ids, order) = ((&mut dtable).into(), (&ids).into(), (&mut order).into());
        embedding::backward(dev, d, order, ids, (&rows).into(), HIDDEN).unwrap();
    });
    let turn = Table::new(dev, &Rope::plain(1e4), 64, ROWS).unwrap();
    let positions: Vec<u32> = (0..ROWS as u32).collect();
    bench(&mut g, "rope/forward/cpu/f32/2048x12x64", moves(2 * ROWS * HIDDEN), || {
        let x = (&mut rows).into();
        let heads = rope::Heads { row_len: HIDDEN, heads: 12, head_dim: 64 };
        rope::forward(dev, x, heads, (&positions).into(), &turn).unwrap();
    });
    bench(&mut g, "scalar_head/forward/cpu/f32/2048x768", moves(ROWS * HIDDEN), || {
        let (y, h) = ((&mut y[..ROWS]).into(), (&rows).into());
        scalar_head::forward(dev, y, h, (&table[..HIDDEN]).into()).unwrap();
    });
    bench(&mut g, "scalar_head/backward/cpu/f32/2048x768", moves(2 * ROWS * HIDDEN), || {
        let (dh, dw) = ((&mut dx[..ROWS * HIDDEN]).into(), (&mut dtable[..HIDDEN]).into());
        let (dy, w) = ((&dy[..ROWS]).into(), (&table[..HIDDEN]).into());
        scalar_head::backward(dev, dh, dw, dy, (&rows).into(), w).unwrap();
    });
}

fn losses(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("loss");
    let n = 64 * 1024;
    let col = |s: u64| randn(s, n);
    let (logp, old, reference, adv) = (col(1), col(2), col(3), col(4));
    let (mut d, mut e) = (vec![0.0; n], vec![0.0; n]);
    let weight = KlWeight::Ratio;
    let kl = Some(KlTerm { coef: 0.05, estimator: KlEstimator::K3, weight });
    let surrogate = Surrogate::Clip { low: 0.2, high: 0.28, dual: Some(3.0) };
    let settings = PolicyLoss { surrogate, kl, entropy_coef: 0.01, ..PolicyLoss::default() };
    let ends: Vec<u32> = (0..=64).map(|i| i * 1024).collect();
    bench(&mut g, "policy_loss/cpu/f32/65536", moves(7 * n), || {
        let tokens = PolicyTokens {
            logp: (&logp).into(),
            old_logp: (&old).into(),
            ref_logp: Some((&reference).into()),
            entropy: Some((&adv).into()),
            advantages: (&adv).into(),
            weights: None,
            offsets: Offsets { host: &ends, view: (&ends[..]).into() },
        };
        let (d, e) = ((&mut d).into(), Some((&mut e).into()));
        policy_loss::forward(dev, d, e, tokens, &settings, n as f64).unwrap().get().unwrap();
    });
    bench(&mut g, "value_loss/cpu/f32/65536", moves(4 * n), || {
        let (v, old, returns) = ((&logp).into(), (&old).into(), (&adv).into());
        let t = ValueTokens { v, old, returns, weights: None };
        let s = ValueLoss { clip: Some(0.2), coef: 0.1 };
        value_loss::forward(dev, (&mut d).into(), t, s, n as f64).unwrap().get().unwrap();
    });
    bench(&mut g, "nll/cpu/f32/65536", moves(3 * n), || {
        nll::forward(dev, (&mut d).into(), (&logp).into(), (&old).into(), n as f64)
            .unwrap()
            .get()
            .unwrap();
    });
    bench(&mut g, "bradley_terry/cpu/f32/65536", moves(2 * n), || {
        let t = Pairs { scores: (&logp).into(), margins: View::from(&[][..]), weights: None };
        bradley_terry::forward(dev, (&mut d).into(), t, 0.01, n as f64 / 2.0)
            .unwrap()
            .get()
            .unwrap();
    });
    let offsets: Vec<u32> = (0..=n as u32).step_by(256).collect();
    bench(&mut g, "gae/cpu/f32/65536", moves(4 * n), || {
        let (a, r) = ((&mut d).into(), (&mut e).into());
        let of = gae::RewardColumns {
            rewards: (&logp).into(),
            values: (&old).into(),
            offsets: (&offsets).into(),
            gamma: 1.0,
            lambda: 0.95,
        };
        gae::forward(dev, a, r, of).unwrap();
    });
    bench(&mut g, "whiten/cpu/f32/65536", moves(4 * n), || {
        let moments = Moments::of(dev, View::from(&d)).unwrap();
        whiten::apply(dev, (&mut d).into(), &moments, true, Variance::Unbiased, 1e-8).unwrap();
    });
    let (mut sum, a) = (0.0f32, KlEstimator::K3);
    bench(&mut g, "kl/cpu/f32/65536", moves(2 * n), || {
        sum += logp.iter().zip(&old).map(|(l, r)| a.value(*l, *r)).sum::<f32>();
        std::hint::black_box(sum);
    });
}

fn sampling(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("sample");
    let rows = 32;
    let logits = randn(1, rows * VOCAB);
    let (mut tokens, mut scratch) = (vec![0; rows], vec![0.0; sample::scratch_len(rows, VOCAB)]);
    let samples: Vec<u64> = (0..rows as u64).collect();
    let positions = vec![5; rows];
    let all = sample::SamplingParams::default();
    let stream = Stream { seed: 1, step: 2, purpose: Purpose::Sample };
    for (name, params) in [
        ("greedy", sample::SamplingParams::greedy()),
        ("whole", all),
        ("top_k", sample::SamplingParams { top_k: 50, ..all }),
        ("top_p", sample::SamplingParams { top_p: 0.9, ..all }),
        ("min_p", sample::SamplingParams { min_p: 0.1, ..all }),
    ] {
        bench(&mut g, &format!("{name}/cpu/f32/32x50257"), moves(rows * VOCAB), || {
            let (samples, positions) = ((&samples).into(), (&positions).into());
            let draws = Draws { stream: Some(stream), samples, positions };
            let (t, z, room) = ((&mut tokens).into(), View::from(&logits), (&mut scratch).into());
            sample::next(dev, t, z, &params, draws, room).unwrap();
        });
    }
}

fn optimizer(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("optimizer");
    let n = 16 << 20;
    let (mut p, grad) =
        (Buffer::of(dev, "x", &randn(1, n)).unwrap(), Buffer::of(dev, "x", &randn(2, n)).unwrap());
    let (mut m, mut v) =
        (Buffer::<f32>::zeros(dev, "m", n).unwrap(), Buffer::<f32>::zeros(dev, "v", n).unwrap());
    let hyper = adamw::Hyper {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
    };
    bench(&mut g, "adamw/cpu/f32/16M", moves(7 * n), || {
        let (p, m, v) = (p.view_mut(), m.view_mut(), v.view_mut());
        let state = adamw::State { p, m, v, copy: None, t: 3 };
        adamw::step(dev, state, grad.view(), [0][..].into(), 0.5, &hyper).unwrap();
    });
    bench(&mut g, "grad_norm/cpu/f32/16M", moves(n), || {
        std::hint::black_box(grad_norm::norm(dev, grad.view()).unwrap().get().unwrap());
    });
    bench(&mut g, "first_bad/cpu/f32/16M", moves(n), || {
        std::hint::black_box(grad_norm::first_bad(dev, grad.view()).unwrap().get().unwrap());
    });
}

criterion_group!(
    benches,
    matmul,
    mixture,
    attention,
    mixers,
    lm_head,
    norms,
    elementwise,
    losses,
    sampling,
    optimizer
);
criterion_main!(benches);
