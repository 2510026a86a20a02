//! Drawing tokens: the distribution, equal bits in any company, the top of a row.

use warpo::{
    Error, Result,
    device::{Buffer, Device, Element, Float, cuda::Order},
    ops::{
        logprob::{self, CHUNK, LmHead, LogitSettings, Outputs, Sampled, Top},
        matmul::Packed,
        sample::Draws,
    },
    rng::{Purpose, Stream},
};

use super::{Head, forward_by};
use crate::support::{
    assert_bits, assert_close, assert_nan_only, devices, gather, narrow, randn, refusal, shuffled,
    sim::{self, Case, Lab},
};

/// Tokens and log-probs of each row of h.
fn sample<F: Float>(
    dev: &Device,
    h: &[F],
    head: &Head<F>,
    settings: LogitSettings<F>,
    stream: Option<Stream>,
    samples: &[u64],
) -> (Vec<u32>, Vec<F>) {
    sample_top(dev, h, head, settings, stream, samples, 0).0
}

/// Tokens and log-probs.
type Chosen<F> = (Vec<u32>, Vec<F>);

/// Those of each row of h, and of its top `k`, 0 for none.
fn sample_top<F: Float>(
    dev: &Device,
    h: &[F],
    head: &Head<F>,
    settings: LogitSettings<F>,
    stream: Option<Stream>,
    samples: &[u64],
    k: usize,
) -> (Chosen<F>, Chosen<F>) {
    let rows = samples.len();
    let positions = vec![5; rows];
    let [mut drawn, mut top] =
        [rows, rows * k].map(|n| (vec![u32::MAX; n], vec![F::of(f64::NAN); n]));
    let mut lse = vec![F::of(f64::NAN); rows];
    let mut scratch = vec![F::ZERO; logprob::sample_scratch_len(rows, head.packed.n(), k)];
    let out = Sampled {
        tokens: (&mut drawn.0).into(),
        logp: (&mut drawn.1).into(),
        lse: (&mut lse).into(),
        top: (k > 0).then(|| Top { k, tokens: (&mut top.0).into(), logp: (&mut top.1).into() }),
    };
    let draws = Draws { stream, samples: samples.into(), positions: (&positions).into() };
    let (head, scratch) = (head.with(settings), (&mut scratch).into());
    logprob::sample(dev, out, h.into(), head, draws, scratch).unwrap();
    (drawn, top)
}

const STREAM: Stream = Stream { seed: 11, step: 3, purpose: Purpose::Sample };

/// Pearson's test: a sum over 17 tokens, of which 16 are free, is above 39.25 once in 1000 times.
#[test]
fn tokens_are_drawn_from_the_distribution() {
    let (dev, vocab, n) = (Device::cpu(), 17, 20_000);
    let z: Vec<f64> = randn("z", vocab);
    let settings = LogitSettings { temperature: 0.8, softcap: Some(2.0) };
    let ids: Vec<u64> = (0..n as u64).collect();
    let (h, head) = (z.repeat(n), Head::identity(vocab));
    let (tokens, logp) = sample(&dev, &h, &head, settings, Some(STREAM), &ids);
    let (mut counts, mut p) = (vec![0.0; vocab], vec![f64::NAN; vocab]);
    for (token, logp) in tokens.iter().zip(&logp) {
        counts[*token as usize] += 1.0;
        p[*token as usize] = logp.exp();
    }
    assert_close("sum of all", &[p.iter().sum::<f64>()], &[1.0], 1e-12, 0.0);
    let off = |(count, p): (&f64, &f64)| (count - p * n as f64).powi(2) / (p * n as f64);
    let sum: f64 = counts.iter().zip(&p).map(off).sum();
    assert!(sum < 39.25, "{sum}: {counts:?}");
}

#[test]
fn sampled_tokens_do_not_see_their_batch() {
    let (rows, vocab, d) = (50, 2500, 7);
    let (h, w): (Vec<f32>, Vec<f32>) = (randn("h", rows * d), randn("w", vocab * d));
    let settings = LogitSettings { temperature: 0.8, softcap: Some(3.0) };
    let ids: Vec<u64> = (0..rows as u64).map(|r| r << 33 | 7).collect();
    for stream in [None, Some(STREAM)] {
        for dev in devices() {
            let head = Head::new(&dev, &w, vocab);
            let (tokens, logp) = sample(&dev, &h, &head, settings, stream, &ids);
            assert_bits("logp", &logp, &forward_by(&dev, &h, &head, &tokens, settings).logp);
            let order = &shuffled("order", rows)[..13];
            let (h, ids) = (gather(&h, d, order), gather(&ids, 1, order));
            let (part, of_part) = sample(&dev, &h, &head, settings, stream, &ids);
            assert_eq!(part, gather(&tokens, 1, order));
            assert_bits("logp", &of_part, &gather(&logp, 1, order));
        }
    }
    // Of equals the lowest id.
    let flat = Head::new(&Device::cpu(), &[0.0f32; 9], 9);
    let (tokens, logp) =
        sample(&Device::cpu(), &[1.0], &flat, LogitSettings::default(), None, &[1]);
    assert_eq!((tokens, logp), (vec![0], vec![-(9f32.ln())]));
}

/// Numbers of which products and short sums are exact, in bf16 too: many are equal, and there are
/// zeros of both signs.
fn quarters(name: &str, n: usize) -> Vec<f64> {
    randn::<f64>(name, n).iter().map(|x| (x * 3.0).round() / 4.0).collect()
}

/// The `k` first of all tokens of each row of `h` `[rows, d]`, sorted.
fn sorted(h: &[f64], w: &[f64], d: usize, k: usize) -> Vec<u32> {
    let of_row = |h: &[f64]| {
        let dot = |w: &[f64]| w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>();
        let z: Vec<f64> = w.chunks(d).map(dot).collect();
        let mut ids: Vec<u32> = (0..z.len() as u32).collect();
        // Stable: of equals the lower id is first.
        ids.sort_by(|a, b| match (z[*a as usize], z[*b as usize]) {
            (a, b) if a.is_nan() || b.is_nan() => a.is_nan().cmp(&b.is_nan()),
            (a, b) => b.partial_cmp(&a).unwrap(),
        });
        ids[..k].to_vec()
    };
    h.chunks(d).flat_map(of_row).collect()
}

#[test]
fn the_top_is_that_of_a_sorted_row() {
    let (rows, d, settings) = (50, 2, LogitSettings::at(0.5f32));
    let ids: Vec<u64> = (0..rows as u64).collect();
    for vocab in [1, 5, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 40] {
        let (h, mut w) = (quarters("h", rows * d), quarters("w", vocab * d));
        // The likeliest are found in every part of the vocabulary.
        w.iter_mut().step_by(37).for_each(|x| *x *= 2.0);
        let (h32, w32): (Vec<f32>, Vec<f32>) = (narrow(&h), narrow(&w));
        for dev in devices() {
            let head = Head::new(&dev, &w32, vocab);
            let plain = sample(&dev, &h32, &head, settings, Some(STREAM), &ids);
            for k in [1, 2, 5, 31, 32].into_iter().filter(|k| *k <= vocab) {
                let what = format!("{k} of {vocab}");
                let (drawn, (tokens, logp)) =
                    sample_top(&dev, &h32, &head, settings, Some(STREAM), &ids, k);
                assert_eq!(drawn.0, plain.0, "{what}");
                assert_bits(&what, &drawn.1, &plain.1);
                assert_eq!(tokens, sorted(&h, &w, d, k), "{what}");
                let each: Vec<f32> = h32.chunks(d).flat_map(|h| h.repeat(k)).collect();
                let same = forward_by(&dev, &each, &head, &tokens, settings);
                assert_bits(&what, &logp, &same.logp);
                let order = &shuffled("order", rows)[..13];
                let (h, ids) = (gather(&h32, d, order), gather(&ids, 1, order));
                let (_, part) = sample_top(&dev, &h, &head, settings, None, &ids, k);
                assert_eq!(part.0, gather(&tokens, k, order), "{what}");
                assert_bits(&what, &part.1, &gather(&logp, k, order));
            }
        }
    }
    // Of the next wave too.
    let (h, w, ids) = (quarters("h", 4099), quarters("w", 5), vec![7; 4099]);
    let head = Head::new(&devices()[1], &w, 5);
    let (_, (tokens, _)) =
        sample_top(&devices()[1], &h, &head, LogitSettings::at(1.0), None, &ids, 2);
    assert_eq!(tokens, sorted(&h, &w, 1, 2));
    // 2/4, 1/4, 1/4
    let head = Head::<f64>::identity(3);
    let (z, of_all) = ([0.0, 2f64.ln(), 0.0], LogitSettings::default());
    let (_, (tokens, logp)) = sample_top(&Device::cpu(), &z, &head, of_all, None, &[1], 3);
    assert_eq!(tokens, [1, 0, 2]);
    assert_close("logp", &logp, &[0.5f64.ln(), 0.25f64.ln(), 0.25f64.ln()], 1e-15, 0.0);
}

#[test]
fn bad_input_of_a_draw_is_refused() {
    let (head, dev) = (Head::new(&Device::cpu(), &[1.0f32; 6], 3), Device::cpu());
    // Tokens, logp, lse, h, samples, positions, scratch, top tokens, top logp.
    let good = [2, 2, 2, 4, 2, 2, logprob::sample_scratch_len(2, 3, 2), 4, 4];
    let run_top = |n: [usize; 9], settings, k| {
        let (mut tokens, h) = (vec![7; n[0]], vec![1.0; n[3]]);
        let (mut logp, mut lse, mut scratch) = (vec![0.0; n[1]], vec![0.0; n[2]], vec![0.0; n[6]]);
        let (samples, positions) = (vec![0; n[4]], vec![0; n[5]]);
        let (mut ids, mut best) = (vec![0; n[7]], vec![0.0; n[8]]);
        let top = Some(Top { k, tokens: (&mut ids).into(), logp: (&mut best).into() });
        let (logp, lse) = ((&mut logp).into(), (&mut lse).into());
        let out = Sampled { tokens: (&mut tokens).into(), logp, lse, top };
        let (samples, positions) = ((&samples).into(), (&positions).into());
        let draws = Draws { stream: Some(STREAM), samples, positions };
        let (h, scratch) = ((&h).into(), (&mut scratch).into());
        logprob::sample(&dev, out, h, head.with(settings), draws, scratch)
    };
    let run = |n, settings| run_top(n, settings, 2);
    run(good, LogitSettings::default()).unwrap();
    let names =
        ["h", "logp", "lse", "h", "samples", "positions", "scratch", "top tokens", "top logp"];
    for (i, name) in names.iter().enumerate() {
        let mut n = good;
        n[i] -= 1;
        let e = refusal(run(n, LogitSettings::default()));
        assert!(e.starts_with(&format!("logprob::sample: `{name}` has shape [")), "{i}: {e}");
    }
    for (temperature, softcap, name) in
        [(0.0, None, "temperature"), (1.0, Some(-1.0), "soft-cap of logits")]
    {
        let e = refusal(run(good, LogitSettings { temperature, softcap }));
        assert!(e.starts_with(&format!("logprob::sample: {name}: got ")), "{e}");
        assert!(e.ends_with("wanted a positive number"), "{e}");
    }
    for k in [0, 4] {
        let e = refusal(run_top(good, LogitSettings::default(), k));
        assert_eq!(e, format!("logprob::sample: top k: got {k}, wanted 1 to 3"));
    }
    let head = Head::new(&dev, &[1.0f32; 40], 40);
    let mut out = [vec![0.0; 33], vec![0.0], vec![0.0], vec![0.0; 4000]];
    let [best, logp, lse, scratch] = out.each_mut().map(Into::into);
    let (mut ids, mut tokens) = ([0; 33], [0]);
    let top = Some(Top { k: 33, tokens: ids[..].as_mut().into(), logp: best });
    let out = Sampled { tokens: tokens[..].as_mut().into(), logp, lse, top };
    let draws = Draws { stream: None, samples: [0][..].into(), positions: [0][..].into() };
    let (h, head) = ([1.0][..].into(), head.with(LogitSettings::default()));
    let e = refusal(logprob::sample(&dev, out, h, head, draws, scratch));
    assert_eq!(e, "logprob::sample: top k: got 33, wanted 1 to 32");
}

#[test]
fn a_nan_has_a_token_but_no_log_prob() {
    let (dev, settings) = (Device::cpu(), LogitSettings::at(0.9));
    let (mut h, w): (Vec<f32>, Vec<f32>) = (randn("h", 20), randn("w", 33 * 4));
    let (head, ids) = (Head::new(&dev, &w, 33), [1, 2, 3, 4, 5]);
    let (tokens, clean) = sample(&dev, &h, &head, settings, Some(STREAM), &ids);
    h[9] = f32::NAN;
    let (again, logp) = sample(&dev, &h, &head, settings, Some(STREAM), &ids);
    assert_nan_only("logp", &logp, &clean, 2..3);
    assert_eq!((&again[..2], &again[3..]), (&tokens[..2], &tokens[3..]));
    assert_eq!(again[2], 0);
    draw_beside_a_nan(&dev, &[(5, 33), (50, 1030)]);
}

/// Tokens and log-probs of rows of `h` and a head `w` `[vocab, 8]`, and their top `k`, 0 for none.
fn drawn_on<T: Element>(
    dev: &Device,
    h: &[f64],
    w: &[f64],
    k: usize,
) -> (Chosen<T::Acc>, Chosen<T::Acc>) {
    let (rows, vocab, d) = (h.len() / 8, w.len() / 8, 8);
    let of = |x: &[f64]| {
        let x: Vec<T> = x.iter().map(|x| T::of(*x)).collect();
        Buffer::of(dev, "test", &x).unwrap()
    };
    let (h, w) = (of(h), of(w));
    let mut packed = Packed::new(dev, vocab, d).unwrap();
    packed.pack(dev, w.view()).unwrap();
    let samples = Buffer::of(dev, "test", &(0..rows as u64).collect::<Vec<_>>()).unwrap();
    let positions = Buffer::of(dev, "test", &vec![5u32; rows]).unwrap();
    let room = |n| Buffer::<T::Acc>::new(dev, "test", n).unwrap();
    let [mut tokens, mut ids] =
        [rows, rows * k].map(|n| Buffer::<u32>::new(dev, "test", n).unwrap());
    let [mut logp, mut lse, mut best] = [rows, rows, rows * k].map(room);
    let mut scratch = room(logprob::sample_scratch_len(rows, vocab, k));
    let top = (k > 0).then(|| Top { k, tokens: ids.view_mut(), logp: best.view_mut() });
    let (tokens_, logp_, lse_) = (tokens.view_mut(), logp.view_mut(), lse.view_mut());
    let out = Sampled { tokens: tokens_, logp: logp_, lse: lse_, top };
    let (samples, positions) = (samples.view(), positions.view());
    let draws = Draws { stream: Some(STREAM), samples, positions };
    let head = LmHead { w: (&packed).into(), settings: LogitSettings::at(Element::of(4.0)) };
    logprob::sample(dev, out, h.view(), head, draws, scratch.view_mut()).unwrap();
    let both = |ids: &Buffer<'_, u32>, x: &Buffer<'_, T::Acc>| {
        (dev.read(ids.view()).unwrap(), dev.read(x.view()).unwrap())
    };
    (both(&tokens, &logp), both(&ids, &best))
}

fn draw_beside_a_nan(dev: &Device, shapes: &[(usize, usize)]) {
    let (cpu, host) = (matches!(dev, Device::Cpu(_)), |x: Vec<f32>| x);
    let run = |h: &[f64], w: &[f64], k| match cpu {
        true => drawn_on::<f32>(dev, h, w, k),
        false => drawn_on::<half::bf16>(dev, h, w, k),
    };
    for (rows, vocab) in shapes.iter().copied() {
        let (mut h, mut w) = (quarters("h", rows * 8), quarters("w", vocab * 8));
        let k = 9.min(vocab);
        let (drawn, top) = run(&h, &w, k);
        h[2 * 8 + 5] = f64::NAN;
        for with in [0, k] {
            let (again, of_nan) = run(&h, &w, with);
            assert_nan_only("logp", &again.1, &drawn.1, 2..3);
            assert_eq!(again.0[2], 0);
            assert_eq!((&again.0[..2], &again.0[3..]), (&drawn.0[..2], &drawn.0[3..]));
            if with > 0 {
                assert_nan_only("top", &host(of_nan.1), &top.1, 2 * k..3 * k);
                assert_eq!(of_nan.0, sorted(&h, &w, 8, k));
            }
        }
        // Of a token, in all rows: it is the last of all.
        h[2 * 8 + 5] = 1.0;
        w[8 * (vocab / 2)] = f64::NAN;
        let (_, (tokens, logp)) = run(&h, &w, k);
        assert_eq!(tokens, sorted(&h, &w, 8, k));
        assert!(logp.iter().all(|x| x.is_nan()), "{logp:?}");
    }
}

/// In all tiles, with the top of each row and without.
#[test]
fn kernels_have_a_token_but_no_log_prob_for_a_nan() {
    sim::check(|sim| {
        draw_beside_a_nan(&sim.device(Order::default()), &[(5, 131), (20, 9), (70, 1030)]);
    });
}

#[test]
fn kernels_on_hopper_have_a_token_but_no_log_prob_for_a_nan() {
    sim::check(|sim| {
        let dev = sim.hopper().device(Order::default());
        draw_beside_a_nan(&dev, &[(5, 1030), (70, 9), (130, 131)]);
    });
}

/// Tokens drawn at one shape, and that forward gives them the same log-probs.
#[derive(Clone, Copy)]
struct Drawn {
    rows: usize,
    vocab: usize,
    d: usize,
    softcap: Option<f64>,
    greedy: bool,
    /// Of the top, 0 for none.
    k: usize,
}

impl Case for Drawn {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let Self { rows, vocab, d, softcap, greedy, k } = *self;
        let (dev, number) = (lab.dev(), <T::Acc as Element>::of);
        let (h, w) = (lab.rows::<T>("h", rows, d), lab.input::<T>("w", vocab * d));
        let settings = LogitSettings { temperature: number(0.75), softcap: softcap.map(number) };
        let mut packed = Packed::new(dev, vocab, d)?;
        packed.pack(dev, w.view())?;
        let samples: Vec<u64> = dev
            .read(lab.ids("samples", rows, 1000).view())?
            .iter()
            .map(|s| u64::from(*s))
            .collect();
        let samples = Buffer::of(dev, "test", &samples)?;
        let positions = lab.ids("positions", rows, 50);
        let [mut tokens, mut ids] = [rows, rows * k].map(|n| lab.room::<u32>(n));
        let [mut logp, mut lse, mut again] = [(); 3].map(|()| lab.room::<T::Acc>(rows));
        let mut best = lab.room::<T::Acc>(rows * k);
        let mut scratch = lab.room::<T::Acc>(logprob::sample_scratch_len(rows, vocab, k));
        let (tokens_, logp_, lse_) = (tokens.view_mut(), logp.view_mut(), lse.view_mut());
        let top = (k > 0).then(|| Top { k, tokens: ids.view_mut(), logp: best.view_mut() });
        let out = Sampled { tokens: tokens_, logp: logp_, lse: lse_, top };
        let stream = (!greedy).then_some(STREAM);
        let draws = Draws { stream, samples: samples.view(), positions: positions.view() };
        let head = LmHead { w: (&packed).into(), settings };
        logprob::sample(dev, out, h.view(), head, draws, scratch.view_mut())?;
        let mut hold = |tokens: &[u32], logp: &[T::Acc]| {
            let targets = Buffer::of(dev, "test", tokens)?;
            let out = Outputs { logp: again.view_mut(), lse: lse.view_mut(), entropy: None };
            logprob::forward(dev, out, h.view(), head, targets.view(), scratch.view_mut())?;
            let same = bytes(logp) == bytes(&dev.read(again.view())?);
            assert!(same, "forward says something else");
            Ok::<_, Error>(())
        };
        hold(&dev.read(tokens.view())?, &dev.read(logp.view())?)?;
        let (all, of_all) = (dev.read(ids.view())?, dev.read(best.view())?);
        for i in [0, k / 2, k.saturating_sub(1)].into_iter().filter(|i| *i < k) {
            let column: Vec<u32> = all.iter().skip(i).step_by(k).copied().collect();
            let logp: Vec<T::Acc> = of_all.iter().skip(i).step_by(k).copied().collect();
            hold(&column, &logp)?;
        }
        let numbers = |ids: &Buffer<'_, u32>| {
            let ids: Vec<T::Acc> =
                dev.read(ids.view())?.iter().map(|t| number(f64::from(*t))).collect();
            Buffer::of(dev, "test", &ids)
        };
        lab.by_row("tokens", &numbers(&tokens)?);
        lab.by_row("logp", &logp);
        if k > 0 {
            lab.by_row("top tokens", &numbers(&ids)?);
            lab.by_row("top logp", &best);
        }
        Ok(())
    }
}

fn bytes<T: Element>(x: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(x).to_vec()
}

/// The tokens of the CPU in all tiles, each row's its own whatever the batch.
#[test]
fn kernels_draw_the_tokens_of_the_cpu() {
    sim::check(|sim| {
        let case = |rows, vocab, d| Drawn { rows, vocab, d, softcap: None, greedy: false, k: 0 };
        for case in [case(1, 1, 8), case(16, 127, 40), case(17, 129, 72), case(65, 300, 8)] {
            sim.hold_bf16(&case);
            sim.hold_bf16(&Drawn { softcap: Some(1.5), greedy: true, ..case });
        }
        sim.hold_bf16(&case(0, 5, 8));
        sim.hold_bf16(&case(3, 2100, 8));
        sim.hold_rows_bf16(131, |rows| case(rows, 140, 8));
        sim.hold_rows_bf16(18, |rows| case(rows, 1100, 8));
    });
}

/// The same on Hopper, whose sums are not those of other GPUs: 131 rows take the widest tiles, the
/// last 65 the next.
#[test]
fn kernels_on_hopper_draw_the_tokens_of_the_cpu() {
    sim::check(|sim| {
        let sim = sim.hopper();
        let case = |rows, vocab, d| Drawn { rows, vocab, d, softcap: None, greedy: false, k: 0 };
        for case in [case(1, 1, 8), case(17, 129, 72), case(65, 250, 8)] {
            sim.hold_bf16(&case);
            sim.hold_bf16(&Drawn { softcap: Some(1.5), greedy: true, ..case });
        }
        sim.hold_bf16(&case(0, 5, 8));
        sim.hold_bf16(&case(3, 2100, 8));
        sim.hold_rows_bf16(131, |rows| case(rows, 300, 8));
    });
}

/// The tops of the CPU in both tiles, each row's its own whatever the batch; and where many tokens
/// are equal.
#[test]
fn kernels_have_the_top_of_the_cpu() {
    sim::check(|sim| {
        let case = |rows, vocab, k| Drawn { rows, vocab, d: 8, softcap: None, greedy: false, k };
        for case in [case(1, 1, 1), case(16, 127, 32), case(17, 5, 5), case(3, 1029, 32)] {
            sim.hold_bf16(&case);
        }
        sim.hold_bf16(&Drawn { softcap: Some(1.5), greedy: true, d: 40, ..case(66, 140, 7) });
        sim.hold_bf16(&case(0, 5, 1));
        sim.hold_rows_bf16(67, |rows| case(rows, 140, 32));
        sim.hold_rows_bf16(18, |rows| case(rows, 1100, 9));
        have_the_top_of_equals(&sim.device(Order::default()), &[(16, 1100), (17, 2100)]);
    });
}

/// The same on Hopper, where 131 rows take two of the wide tile, and a block goes on with another
/// chunk.
#[test]
fn kernels_on_hopper_have_the_top_of_the_cpu() {
    sim::check(|sim| {
        let sim = sim.hopper();
        let case = |rows, vocab, k| Drawn { rows, vocab, d: 8, softcap: None, greedy: false, k };
        for case in [case(1, 1, 1), case(17, 129, 32), case(65, 5, 5), case(3, 1029, 32)] {
            sim.hold_bf16(&case);
        }
        sim.hold_bf16(&Drawn { softcap: Some(1.5), greedy: true, d: 72, ..case(5, 250, 7) });
        sim.hold_bf16(&case(0, 5, 1));
        sim.hold_rows_bf16(131, |rows| case(rows, 140, 32));
        have_the_top_of_equals(&sim.device(Order::default()), &[(5, 3100), (65, 1100)]);
    });
}

fn have_the_top_of_equals(dev: &Device, shapes: &[(usize, usize)]) {
    // The least number, divided by the temperature, becomes -0.
    let (h, mut w) = (vec![2f64.powi(-100); 8], vec![0.0; 80]);
    w[3 * 8] = -2f64.powi(-49);
    let (_, (tokens, _)) = drawn_on::<half::bf16>(dev, &h, &w, 6);
    assert_eq!(tokens, [0, 1, 2, 3, 4, 5]);
    for (rows, vocab) in shapes.iter().copied() {
        let (h, w) = (quarters("h", rows * 8), quarters("w", vocab * 8));
        // All but a token in 200 are zeros, of both signs.
        let few: Vec<f64> =
            w.iter().enumerate().map(|(i, x)| if i % 1600 < 8 { *x } else { 0.0 * x }).collect();
        for (w, k) in [(&w, 32), (&few, 20)] {
            let (_, (tokens, _)) = drawn_on::<half::bf16>(dev, &h, w, k);
            assert_eq!(tokens, sorted(&h, w, 8, k), "{k} of {vocab}");
        }
    }
}
