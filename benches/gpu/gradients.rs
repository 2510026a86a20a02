//! Attention's gradients over packed sequences of 16,384 tokens in all, and of prompts with eight
//! answers each.

use half::bf16;
use warpo::{
    device::Buffer,
    ops::attention::{self, Partition, Segment, SegmentBatch, Shape},
};

use super::Bench;

/// Width of a head, heads of queries, of keys: hidden 2048, as the published figures have it;
/// Qwen2.5 0.5B; Llama 8B.
const HEADS: [[usize; 3]; 4] = [[64, 32, 32], [128, 16, 16], [64, 14, 2], [128, 32, 8]];
const TOKENS: usize = 16_384;
const LENS: [usize; 4] = [512, 1024, 4096, 16_384];
/// A prompt's positions, and of what follows it.
const GROUP: [usize; 2] = [1024, 128];

pub fn gradients(b: &mut Bench) {
    let heads = if b.tiny { &[[64, 2, 1]][..] } else { &HEADS };
    let (tokens, lens) = if b.tiny { (70, &[35][..]) } else { (TOKENS, &LENS[..]) };
    let [prompt, rest] = if b.tiny { [30, 5] } else { GROUP };
    for &[head_dim, q_heads, kv_heads] in heads {
        let scale = 1.0 / (head_dim as f64).sqrt();
        let shape = Shape { q_heads, kv_heads, head_dim, scale, softcap: None, window: None };
        let name =
            |what: &str| format!("attention/backward/{head_dim}x{q_heads}/{kv_heads}/{what}");
        let segment = |at: usize, first: usize, rows: usize, prefix: Option<usize>| {
            let [at, first, rows] = [at, first, rows].map(|n| n as u32);
            // Pages that nothing reads.
            let pages = 0..(first + rows).div_ceil(64);
            Segment { first, rows, at, pages, prefix: prefix.map(|p| p as u32) }
        };
        for &n in lens {
            let all: Vec<Segment> = (0..tokens / n).map(|i| segment(i * n, 0, n, None)).collect();
            run(b, &name(&n.to_string()), &shape, &all);
        }
        let mut all = Vec::new();
        for g in 0..tokens.div_ceil(prompt + 8 * rest) {
            let (at, before) = (g * (prompt + 8 * rest), all.len());
            all.push(segment(at, 0, prompt, None));
            let follow = |i| segment(at + prompt + i * rest, prompt, rest, Some(before));
            all.extend((0..8).map(follow));
        }
        run(b, &name("shared"), &shape, &all);
    }
}

fn run(b: &mut Bench, name: &str, shape: &Shape, segments: &[Segment]) {
    if !b.wanted(name) {
        return;
    }
    let (dev, width, cols) = (b.dev.clone(), shape.q_heads * shape.head_dim, shape.qkv_cols());
    let rows: usize = segments.iter().map(|s| s.rows as usize).sum();
    let longest = segments.iter().map(|s| s.pages.end as usize).max().unwrap_or(0);
    let partition = Partition::new(&dev, shape, segments, &vec![0; longest], 1).unwrap();
    let words = Buffer::of(&dev, "partition", partition.words()).unwrap();
    let none = Buffer::<u32>::zeros(&dev, "pages", 1).unwrap();
    let work = SegmentBatch {
        partition: Some((&partition, words.view())),
        ..SegmentBatch::new(segments, none.view())
    };
    let [dout, out] = [1, 2].map(|i| b.input::<bf16>(i, rows * width));
    let (qkv, mut dqkv) = (b.input::<bf16>(3, rows * cols), b.input::<bf16>(4, rows * cols));
    // Not the true one, but such that weights are small.
    let lse = Buffer::of(&dev, "lse", &vec![8.0f32; rows * shape.q_heads]).unwrap();
    let need = attention::backward_scratch_len(shape, rows);
    let mut scratch = Buffer::<f32>::zeros(&dev, "scratch", need).unwrap();
    // Pairs of a query and a position that it sees.
    let sees = |s: &Segment| s.rows as usize * (s.first as usize + (s.rows as usize).div_ceil(2));
    let pairs: usize = segments.iter().map(sees).sum();
    let flops = 10.0 * (pairs * width) as f64;
    let bytes = 2 * rows * (2 * width + 2 * cols);
    b.compute(name, flops, bytes, |dev, _| {
        let (dqkv, room) = (dqkv.view_mut(), scratch.view_mut());
        let (dout, out, qkv, lse) = (dout.view(), out.view(), qkv.view(), lse.view());
        attention::backward(
            dev,
            attention::BackwardArgs { dqkv, dout, out, qkv, lse, scratch: room },
            work,
            shape,
        )
        .unwrap();
    });
}
