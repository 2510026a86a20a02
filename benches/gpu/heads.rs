//! Log-probs of chosen tokens through the LM heads of Qwen2.5, and their gradients; the draw of the
//! next token, and the likeliest ones; the head of a value or reward model.

use half::bf16;
use warpo::{
    device::Buffer,
    ops::{
        logprob::{self, Forward, LmHead, LogitSettings, Outputs, Sampled, Slopes, Top},
        matmul::Packed,
        sample::Draws,
        scalar_head,
    },
    rng::{Philox, Purpose, Stream},
};

use super::{Bench, Sizes};

/// Hidden size, vocabulary.
const MODELS: [(&str, usize, usize); 3] =
    [("0.5b", 896, 151_936), ("1.5b", 1536, 151_936), ("7b", 3584, 152_064)];
const TOKENS: [usize; 4] = [2048, 4096, 8192, 16_384];
const DECODED: [usize; 3] = [1, 16, 64];
/// Of the likeliest tokens, 0 for none.
const TOPS: [(&str, usize); 3] = [("sample", 0), ("top5", 5), ("top32", 32)];

pub fn heads(b: &mut Bench) {
    let models = if b.tiny { &[("tiny", 64, 200)][..] } else { &MODELS };
    let (tokens, decoded) = if b.tiny { (&[9][..], &[1][..]) } else { (&TOKENS[..], &DECODED[..]) };
    for &(model, hidden, vocab) in models {
        let wanted =
            |direction: &str, n: &usize| b.wanted(&format!("logprob/{direction}/{model}/{n}"));
        let any = tokens.iter().chain(decoded).any(|n| {
            let of_all = wanted("forward", n) || wanted("backward", n);
            of_all || TOPS.iter().any(|(name, _)| wanted(name, n))
        });
        if any {
            head(b, model, [hidden, vocab], tokens, decoded);
        }
    }
    scalar_heads(b);
}

fn scalar_heads(b: &mut Bench) {
    let Sizes { rows, hidden, .. } = b.sizes;
    let n = rows * hidden;
    let (h, mut dh) = (b.inputs::<bf16>(1, n), b.inputs::<bf16>(2, n));
    let (w, mut dw) = (b.input::<bf16>(3, hidden), b.input::<f32>(4, hidden));
    let [mut y, dy] = [5, 6].map(|i| b.input::<f32>(i, rows));
    b.run("scalar_head/forward", 2 * n, |dev, i| {
        scalar_head::forward(dev, y.view_mut(), h[i].view(), w.view()).unwrap();
    });
    b.run("scalar_head/backward", 4 * n, |dev, i| {
        let (dh, dw) = (dh[i].view_mut(), dw.view_mut());
        scalar_head::backward(dev, dh, dw, dy.view(), h[i].view(), w.view()).unwrap();
    });
}

fn head(
    b: &mut Bench,
    model: &str,
    [hidden, vocab]: [usize; 2],
    tokens: &[usize],
    decoded: &[usize],
) {
    // Logits of about 1, as a model's are not larger by orders of magnitude.
    let draw = Philox::new(1, 9, 0, Purpose::Init);
    let scale = 1.0 / (hidden as f64).sqrt();
    let some: Vec<bf16> = (0..1_000_003).map(|i| bf16::from_f64(scale * draw.normal(i))).collect();
    let all: Vec<bf16> = some.into_iter().cycle().take(vocab * hidden).collect();
    let w = Buffer::of(&b.dev, "bench", &all).unwrap();
    let mut packed = Packed::new(&b.dev, vocab, hidden).unwrap();
    packed.pack(&b.dev, w.view()).unwrap();
    let mut dw = Buffer::<f32>::zeros(&b.dev, "bench", vocab * hidden).unwrap();
    let head = LmHead { w: (&packed).into(), settings: LogitSettings::default() };
    for &n in tokens.iter().chain(decoded) {
        let h = b.input::<bf16>(1, n * hidden);
        let ids: Vec<u32> = (0..n as u32).map(|i| draw.below(i, vocab as u32)).collect();
        let targets = Buffer::of(&b.dev, "targets", &ids).unwrap();
        let [mut logp, mut lse, dlogp] = [2, 3, 4].map(|i| b.input::<f32>(i, n));
        let mut scratch = b.input::<f32>(5, logprob::scratch_len(n, vocab));
        let (flops, bytes) = (2.0 * (n * vocab * hidden) as f64, 2 * (n + vocab) * hidden);
        b.compute(&format!("logprob/forward/{model}/{n}"), flops, bytes, |dev, _| {
            let out = Outputs { logp: logp.view_mut(), lse: lse.view_mut(), entropy: None };
            let (h, t, room) = (h.view(), targets.view(), scratch.view_mut());
            logprob::forward(dev, out, h, head, t, room).unwrap();
        });
        if decoded.contains(&n) {
            draws(b, model, n, &h, &packed);
        }
        if decoded.contains(&n) && !b.tiny {
            continue;
        }
        let mut dh = b.input::<bf16>(6, n * hidden);
        let mut scratch = b.input::<f32>(7, logprob::backward_scratch_len(n, vocab, hidden));
        // The hidden states and the head are read, their gradients written and added to.
        let bytes = 4 * n * hidden + 10 * vocab * hidden;
        b.compute(&format!("logprob/backward/{model}/{n}"), 3.0 * flops, bytes, |dev, _| {
            let (dh, dw, room) = (dh.view_mut(), dw.view_mut(), scratch.view_mut());
            let (h, w, t, lse) = (h.view(), w.view(), targets.view(), lse.view());
            let forward = Forward { h, head, w, targets: t, lse, entropy: None };
            let slopes = Slopes { dlogp: dlogp.view(), dentropy: None };
            logprob::backward(dev, dh, Some(dw), slopes, forward, room).unwrap();
        });
    }
}

/// The next token of `n` rows, alone and beside the likeliest ones.
fn draws(b: &mut Bench, model: &str, n: usize, h: &Buffer<'_, bf16>, packed: &Packed<bf16>) {
    let (vocab, hidden) = (packed.n(), packed.k());
    let (flops, bytes) = (2.0 * (n * vocab * hidden) as f64, 2 * (n + vocab) * hidden);
    let samples = Buffer::of(&b.dev, "samples", &(0..n as u64).collect::<Vec<_>>()).unwrap();
    let positions = Buffer::of(&b.dev, "positions", &vec![7u32; n]).unwrap();
    let [mut logp, mut lse] = [2, 3].map(|i| b.input::<f32>(i, n));
    let mut tokens = Buffer::<u32>::zeros(&b.dev, "tokens", n).unwrap();
    let stream = Some(Stream { seed: 1, step: 0, purpose: Purpose::Sample });
    for (name, k) in TOPS {
        let mut ids = Buffer::<u32>::zeros(&b.dev, "top", n * k).unwrap();
        let mut best = b.input::<f32>(4, n * k);
        let mut scratch = b.input::<f32>(5, logprob::sample_scratch_len(n, vocab, k));
        b.compute(&format!("logprob/{name}/{model}/{n}"), flops, bytes, |dev, _| {
            let (tokens, logp) = (tokens.view_mut(), logp.view_mut());
            let top = Top { k, tokens: ids.view_mut(), logp: best.view_mut() };
            let top = Some(top).filter(|top| top.k > 0);
            let out = Sampled { tokens, logp, lse: lse.view_mut(), top };
            let (samples, positions) = (samples.view(), positions.view());
            let draws = Draws { stream, samples, positions };
            let (h, room) = (h.view(), scratch.view_mut());
            let head = LmHead { w: packed.into(), settings: LogitSettings::default() };
            logprob::sample(dev, out, h, head, draws, room).unwrap();
        });
    }
}
