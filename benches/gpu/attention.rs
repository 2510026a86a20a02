//! Attention over packed sequences of 16,384 tokens in all, and of a decoding step over more than 1
//! GB of keys and values.

use half::bf16;
use warpo::{
    device::{Arena, Buffer, Scope},
    ops::attention::{self, KvLayer, Partition, Segment, SegmentBatch, Shape},
};

use super::Bench;

/// Width of a head, heads: hidden 2048, as the published figures have it.
const HEADS: [(usize, usize); 2] = [(64, 32), (128, 16)];
const TOKENS: usize = 16_384;
const LENS: [usize; 3] = [1024, 4096, 16_384];
/// A model's heads of queries, of keys, and their width; sequences, positions of each.
const DECODED: [(&str, [usize; 3], usize, usize); 3] = [
    ("qwen-0.5b", [14, 2, 64], 512, 4096),
    ("llama-8b", [32, 8, 128], 64, 4096),
    ("llama-8b", [32, 8, 128], 512, 512),
];

pub fn attention(b: &mut Bench) {
    let (heads, tokens, lens) =
        if b.tiny { (&[(64, 2)][..], 70, &[35][..]) } else { (&HEADS[..], TOKENS, &LENS[..]) };
    for &(head_dim, heads) in heads {
        for &n in lens {
            let name = format!("attention/forward/{head_dim}/{n}");
            if b.wanted(&name) {
                Step { heads: [heads, heads, head_dim], count: tokens / n, len: n, rows: n }
                    .run(b, &name);
            }
        }
    }
    let tiny = [("tiny", [4, 2, 64], 2, 70)];
    for &(model, heads, count, len) in if b.tiny { &tiny[..] } else { &DECODED[..] } {
        let name = format!("attention/decode/{model}/{count}x{len}");
        if b.wanted(&name) {
            Step { heads, count, len, rows: 1 }.run(b, &name);
        }
    }
}

/// `count` sequences of `len` positions, of which the last `rows` are computed.
struct Step {
    /// Heads of queries, of keys, and their width.
    heads: [usize; 3],
    count: usize,
    len: usize,
    rows: usize,
}

impl Step {
    fn run(&self, b: &mut Bench, name: &str) {
        let &Self { heads: [q_heads, kv_heads, head_dim], count, len, rows } = self;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let shape = Shape { q_heads, kv_heads, head_dim, scale, softcap: None, window: None };
        let (dev, page) = (b.dev.clone(), shape.page(&b.dev));
        let own = len.div_ceil(page);
        let layer = |s: &Scope<'_>| KvLayer::<bf16>::new(s, &shape, page, count * own).map(drop);
        let mut arena = Arena::new(&dev, Arena::plan(layer).unwrap()).unwrap();
        let scope = arena.scope();
        let mut kv = KvLayer::<bf16>::new(&scope, &shape, page, count * own).unwrap();
        // Pages in no order.
        let pages = (count * own) as u32;
        let odd = (pages / 3 * 2 + 1..).find(|n| gcd(*n, pages) == 1).unwrap();
        let ids: Vec<u32> =
            (0..pages).map(|i| (u64::from(i) * u64::from(odd) % u64::from(pages)) as u32).collect();
        let list = Buffer::of(&dev, "pages", &ids).unwrap();
        let mut qkv = b.input::<bf16>(1, (count * rows).max(len) * shape.qkv_cols());
        let segment = |at: usize, first: usize, rows: usize, s: usize| Segment {
            first: first as u32,
            rows: rows as u32,
            at: at as u32,
            pages: (s * own) as u32..((s + 1) * own) as u32,
            prefix: None,
        };
        // Each sequence's keys and values.
        for s in 0..count {
            let one = [segment(0, 0, len, s)];
            let partition = Partition::new(&dev, &shape, &one, &ids, count * own).unwrap();
            let words = Buffer::of(&dev, "partition", partition.words()).unwrap();
            let work = SegmentBatch {
                partition: Some((&partition, words.view())),
                ..SegmentBatch::new(&one, list.view())
            };
            let x = qkv.view_mut().range(0..len * shape.qkv_cols());
            attention::append(&dev, &mut kv, x, work, &shape, None).unwrap();
        }
        let all: Vec<Segment> =
            (0..count).map(|s| segment(s * rows, len - rows, rows, s)).collect();
        let partition = Partition::new(&dev, &shape, &all, &ids, count * own).unwrap();
        let words = Buffer::of(&dev, "partition", partition.words()).unwrap();
        let work = SegmentBatch {
            partition: Some((&partition, words.view())),
            ..SegmentBatch::new(&all, list.view())
        };
        let n = count * rows;
        let mut out = Buffer::<bf16>::zeros(&dev, "out", n * q_heads * head_dim).unwrap();
        let mut lse = Buffer::<f32>::zeros(&dev, "lse", n * q_heads).unwrap();
        let scratch = attention::forward_scratch_len(&dev, &shape, count, len);
        let mut scratch = Buffer::<f32>::zeros(&dev, "scratch", scratch).unwrap();
        // Pairs of a query and a position that it sees.
        let pairs = count * (len - rows) * rows + count * rows * (rows + 1) / 2;
        let flops = 4.0 * (pairs * q_heads * head_dim) as f64;
        let bytes = 4 * n * q_heads * head_dim + 4 * count * len * kv_heads * head_dim;
        b.compute(name, flops, bytes, |dev, _| {
            let (o, l, room) = (out.view_mut(), lse.view_mut(), scratch.view_mut());
            let x = qkv.view().range(0..n * shape.qkv_cols());
            attention::forward(
                dev,
                attention::ForwardOutputs { out: o, lse: l, scratch: room },
                x,
                &kv,
                work,
                &shape,
            )
            .unwrap();
        });
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}
