//! Property 2 and G4: the log-prob that is recorded when a token is sampled is the one of the
//! training forward, bit for bit; and no sample sees the batch it was made in.

use std::collections::BTreeSet;

use half::bf16;
use warpo::{
    Error,
    device::{Cpu, Device, Element, Float},
    models::{self, Batch, Head, LoadOptions, Model, ParamKind, Params, Pass},
    ops::sample,
    rng::{Philox, Purpose, Stream},
    rollout::{Completion, GenerationConfig, Generator, Prompt},
};

use crate::{
    models::golden::{folders, forward, load, load_for, on_device},
    support::{
        PARAMS, assert_bits, devices, golden, host, keep_all, pass_room, room, room_on, sim,
    },
};

const STREAM: Stream = Stream { seed: 5, step: 3, purpose: Purpose::Sample };

/// `n` prompts of ragged length, 1 to 40: shorter and longer than a page of the cache. Every third
/// is asked for twice.
pub fn prompts(n: u64, vocab: usize) -> Vec<Prompt> {
    let ids = |i: u64| {
        let draw = Philox::new(11, i - u64::from(i % 3 == 1), 0, Purpose::Init);
        (0..1 + draw.below(1000, 40)).map(|t| draw.below(t, vocab as u32)).collect()
    };
    (0..n).map(|i| Prompt { sample: 100 + i, ids: ids(i) }).collect()
}

/// Tokens of a prompt of [`prompts`] and its completion, at most.
const LONGEST: usize = 96;

pub fn settings(sampling: sample::SamplingParams, max_new_tokens: usize) -> GenerationConfig {
    GenerationConfig { sampling, max_new_tokens, stop_ids: Vec::new(), stream: STREAM }
}

/// Completions by `slots` slots and passes of `rows` rows, in just the memory that was planned.
pub fn generate<T: Element>(
    dev: &Device,
    model: &Model<T>,
    prompts: &[Prompt],
    settings: &GenerationConfig,
    (slots, rows): (usize, usize),
) -> Vec<Completion<T::Acc>> {
    let generator = Generator::for_prompts(prompts, settings.max_new_tokens, slots, rows);
    let bytes = generator.plan::<T>(dev, model.spec(), &settings.sampling).unwrap();
    let mut arena = room_on(dev, bytes);
    let scope = arena.scope();
    generator.run(dev, model, &scope, prompts, settings, |_| Ok(())).unwrap()
}

/// Log-probs of the completions by the training pass, `per` sequences a micro-batch. The loss that
/// reads them ends the pass.
pub fn trained<T: Element>(
    dev: &Device,
    model: &Model<T>,
    prompts: &[Prompt],
    completions: &[Completion<T::Acc>],
    temperature: T::Acc,
    per: usize,
) -> Vec<T::Acc> {
    let mut grads = Params::zeros(dev, "gradients", model.trained()).unwrap();
    let (mut out, mut batch) = (Vec::new(), Batch::default());
    for (prompts, completions) in prompts.chunks(per).zip(completions.chunks(per)) {
        batch.clear();
        for (p, c) in prompts.iter().zip(completions) {
            batch.push_predicted(&[&p.ids[..], &c.ids].concat(), p.ids.len());
        }
        let mut arena = pass_room(dev, model, &batch, keep_all(false));
        let scope = arena.scope();
        let done = Pass::new(dev, model, &scope, &batch).at(temperature).train(
            &mut grads,
            keep_all(false),
            |c| {
                out.extend(dev.read(c.y)?);
                Err(Error::value("enough", "no backward pass", "a forward pass"))
            },
        );
        assert!(done.unwrap_err().to_string().starts_with("enough"));
    }
    out
}

pub fn logprobs<F: Float>(completions: &[Completion<F>]) -> Vec<F> {
    completions.iter().flat_map(|c| c.logprobs.clone()).collect()
}

pub const FILTERS: [sample::SamplingParams; 4] = [
    sample::SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 },
    sample::SamplingParams { temperature: 1.0, top_k: 5, top_p: 1.0, min_p: 0.0 },
    sample::SamplingParams { temperature: 1.0, top_k: 0, top_p: 0.8, min_p: 0.0 },
    sample::SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.1 },
];

/// In bf16 on every device: equal bits drawn as logits are made or from whole rows of them,
/// greedily too; of models whose heads are narrower than the kernels', and whose vocabulary is odd.
#[test]
fn rollout_equals_training_on_a_device() {
    sim::on_devices(|dev| {
        for name in &on_device().collect::<Vec<_>>() {
            let options = LoadOptions { longest: Some(LONGEST), ..LoadOptions::frozen(Head::Lm) };
            let model: Model<bf16> = models::load(dev, &golden::path(name), options).unwrap();
            let prompts = prompts(if sim::full() { 5 } else { 3 }, model.spec().vocab);
            let all =
                sample::SamplingParams { temperature: 0.7, top_k: 40, top_p: 0.9, min_p: 0.01 };
            let mut drawn = Vec::new();
            for (sampling, slots, rows, per) in [
                (FILTERS[0], 2, 41, 5),
                (FILTERS[0], 5, 512, 1),
                (all, 3, 64, 2),
                (sample::SamplingParams::greedy(), 5, 37, 5),
            ] {
                let settings = settings(sampling, 6);
                let done = generate(dev, &model, &prompts, &settings, (slots, rows));
                let t = if sampling.temperature == 0.0 { 1.0 } else { sampling.temperature };
                let what = format!("{name} {sampling:?} {slots} slots {rows} rows");
                let ours = logprobs(&done);
                assert_bits(&what, &ours, &trained(dev, &model, &prompts, &done, t, per));
                let other = trained(dev, &model, &prompts, &done, t * 1.01, per);
                assert!(ours != other, "{what}: another temperature has other log-probs");
                drawn.push(done);
            }
            assert!(drawn[0] == drawn[1], "{name}: slots and rows change no token");
            assert!(drawn[0] != drawn[2] && drawn[0] != drawn[3], "{name}: filters do");
        }
    });
}

/// A device is a pass ahead of the host: a sample that a stop id ends has a row too many, and
/// nobody sees it. Whatever the slots and the filters, samples are those that nothing ends, cut off
/// behind the first stop id.
#[test]
fn rows_in_vain_leave_no_trace_on_a_device() {
    sim::on_devices(|dev| {
        let Device::Cuda(cuda) = dev else { unreachable!() };
        let model = Model::<bf16>::load(dev, &golden::path("llama"), Head::Lm, None).unwrap();
        let (prompts, most) = (prompts(9, model.spec().vocab), 6);
        for filter in [FILTERS[0], sample::SamplingParams { top_k: 40, top_p: 0.95, ..FILTERS[0] }]
        {
            let free = generate(dev, &model, &prompts, &settings(filter, most), (5, 64));
            let mut settings = settings(filter, most);
            settings.stop_ids = (0..model.spec().vocab as u32).step_by(7).collect();
            let cut = free.into_iter().map(|c| {
                let end = c.ids.iter().position(|id| settings.stop_ids.contains(id));
                let n = end.map_or(most, |i| i + 1);
                let (ids, logprobs) = (c.ids[..n].to_vec(), c.logprobs[..n].to_vec());
                Completion { ids, logprobs, stopped: end.is_some(), ..c }
            });
            let want: Vec<Completion<f32>> = cut.collect();
            let lens: BTreeSet<usize> = want.iter().map(|c| c.ids.len()).collect();
            assert!(lens.len() > 2 && want.iter().any(|c| !c.stopped), "{lens:?}");
            for (slots, rows) in sim::cases(2, [(1, 1), (9, 512), (3, 64)]) {
                let what = format!("{slots} slots, {rows} rows, {filter:?}");
                let generator = Generator::for_prompts(&prompts, most, slots, rows);
                let bytes = generator.plan::<bf16>(dev, model.spec(), &filter).unwrap();
                let (mut arena, mut heard) = (room_on(dev, bytes), Vec::new());
                let scope = arena.scope();
                let hear = |made: &[_]| {
                    heard.push(made.len());
                    Ok(())
                };
                let before = cuda.calls();
                let done = generator.run(dev, &model, &scope, &prompts, &settings, hear);
                let waits = (cuda.calls() - before).waits;
                for (ours, want) in done.unwrap().iter().zip(&want) {
                    assert_eq!(
                        (ours.sample, &ours.ids, ours.stopped),
                        (want.sample, &want.ids, want.stopped),
                        "{what}"
                    );
                    assert_bits(&what, &ours.logprobs, &want.logprobs);
                }
                let all: usize = want.iter().map(|c| c.ids.len()).sum();
                assert_eq!(heard.iter().sum::<usize>(), all, "{what}");
                assert!(heard.iter().all(|made| (1..=slots).contains(made)), "{what}: {heard:?}");
                // For a last pass of rows in vain nobody waits; where a sample is alone there is
                // one behind each stop.
                let ended_early = want.iter().rev().skip(1).filter(|c| c.ids.len() < most).count();
                let vain = if slots == 1 { ended_early } else { 0 };
                if slots == 1 || slots == prompts.len() {
                    assert_eq!(waits as usize, heard.len() + vain, "{what}");
                }
            }
        }
    });
}

/// The launches of a pass are made before the host waits for the one before it, with one wait a
/// pass; until then `progress` hears what it hears on the CPU.
#[test]
fn a_device_is_a_pass_ahead() {
    fn run<T: Element>(dev: &Device, mut hear: impl FnMut(usize)) -> usize {
        let model = Model::<T>::load(dev, &golden::path("llama"), Head::Lm, None).unwrap();
        let (prompts, settings) = (prompts(3, model.spec().vocab), settings(FILTERS[0], 4));
        let generator = Generator::for_prompts(&prompts, 4, 2, 128);
        let bytes = generator.plan::<T>(dev, model.spec(), &settings.sampling).unwrap();
        let mut arena = room_on(dev, bytes);
        let mut heard = 0;
        let hear = |made: &[_]| {
            heard += made.len();
            hear(made.len());
            Ok(())
        };
        let scope = arena.scope();
        generator.run(dev, &model, &scope, &prompts, &settings, hear).unwrap();
        heard
    }
    let mut on_cpu = Vec::new();
    assert_eq!(run::<f32>(host(), |made| on_cpu.push(made)), 12);
    assert_eq!(on_cpu, [2, 2, 2, 2, 1, 1, 1, 1]);
    sim::on_devices(|dev| {
        let Device::Cuda(cuda) = dev else { unreachable!() };
        let mut heard = Vec::new();
        run::<bf16>(dev, |made| heard.push((made, cuda.calls())));
        assert_eq!(heard.iter().map(|(made, _)| *made).collect::<Vec<_>>(), on_cpu);
        let since = |i: usize| heard[i].1 - heard[i - 1].1;
        for i in 1..8 {
            // While pass i + 1 is there, the host waits for pass i.
            let (reads, more) = (since(i).reads, since(i).launches > 0);
            assert_eq!(
                (since(i).waits, reads, more),
                if i < 7 { (1, 2, true) } else { (1, 0, false) }
            );
        }
    });
}

/// What is queued is dropped by who wants no more, and by an error of a later pass; the device goes
/// on with other work.
#[test]
fn a_queued_pass_is_dropped_cleanly() {
    sim::on_devices(|dev| {
        let model = Model::<bf16>::load(dev, &golden::path("llama"), Head::Lm, None).unwrap();
        let prompts = prompts(6, model.spec().vocab);
        let generator = Generator::for_prompts(&prompts, 5, 3, 64);
        let settings = settings(FILTERS[0], 5);
        let want = generate(dev, &model, &prompts, &settings, (6, 512));
        let mut arena = room_on(dev, generator.plan::<bf16>(dev, model.spec(), &PARAMS).unwrap());
        for enough in [1, 3, 4] {
            let mut passes = 0;
            let stop = |_: &[_]| {
                passes += 1;
                if passes < enough { Ok(()) } else { Err(Error::value("passes", "more", "enough")) }
            };
            let scope = arena.scope();
            let done = generator.run(dev, &model, &scope, &prompts, &settings, stop);
            assert!(done.unwrap_err().to_string().starts_with("passes"));
            assert_eq!(passes, enough);
        }
        let scope = arena.scope();
        let done = generator.run(dev, &model, &scope, &prompts, &settings, |_| Ok(()));
        assert!(done.unwrap() == want);
        drop(scope);

        // Room for passes of two rows: the second has the whole of a longer prompt, before the
        // first is heard of.
        let two: Vec<Prompt> =
            [2, 30].map(|n| Prompt { sample: 1, ids: vec![5; n] }).into_iter().collect();
        let settings = GenerationConfig { max_new_tokens: 1, ..settings };
        let small = Generator { slots: 1, max_len: 31, rows: 2 };
        let bytes = small.plan::<bf16>(dev, model.spec(), &PARAMS).unwrap();
        let (mut small, mut heard) = (room_on(dev, bytes), 0);
        let larger = Generator { slots: 1, max_len: 31, rows: 30 };
        let hear = |_: &[_]| {
            heard += 1;
            Ok(())
        };
        let scope = small.scope();
        let e = larger.run(dev, &model, &scope, &two, &settings, hear).unwrap_err();
        assert!(matches!(e, Error::Memory { .. }) && heard == 0, "{e} {heard}");
        drop(scope);
        let scope = arena.scope();
        let done = generator.run(dev, &model, &scope, &prompts[..1], &settings, |_| Ok(()));
        assert_eq!(done.unwrap()[0].ids, want[0].ids[..1]);
    });
}

/// Samples of one prompt share the pages that it fills, and have the bits of samples that were made
/// one at a time.
#[test]
fn samples_of_one_prompt_share_its_pages_on_a_device() {
    fn check<T: Element>(dev: &Device) {
        let model = Model::<T>::load(dev, &golden::path("llama"), Head::Lm, None).unwrap();
        let ids = |n| Philox::new(7, n, 0, Purpose::Init);
        let prompt =
            |n: u64, len: u32| -> Vec<u32> { (0..len).map(|t| ids(n).below(t, 150)).collect() };
        let (long, other) = (prompt(0, 130), prompt(1, 129));
        let all = [&long, &long, &other, &long, &other, &long];
        let prompts: Vec<Prompt> = all
            .into_iter()
            .zip(0..)
            .map(|(ids, sample)| Prompt { sample, ids: ids.clone() })
            .collect();
        // Half of all tokens end a sample: donors go before those that they gave pages to.
        let mut settings = settings(FILTERS[0], 5);
        settings.stop_ids = (0..75).collect();
        let alone = generate(dev, &model, &prompts, &settings, (1, 130));
        for (slots, rows) in sim::cases(2, [(3, 140), (6, 512), (2, 512)]) {
            let together = generate(dev, &model, &prompts, &settings, (slots, rows));
            assert!(together == alone, "{slots} slots, {rows} rows on {}", dev.describe());
        }
        // Two prompts in a pass that has room for one and the end of another.
        let generator = Generator { slots: 2, max_len: 132, rows: 132 };
        let bytes = generator.plan::<T>(dev, model.spec(), &FILTERS[0]).unwrap();
        let (mut arena, mut heard) = (room_on(dev, bytes), Vec::new());
        let hear = |new: &[_]| {
            heard.push(new.len());
            Ok(())
        };
        settings.max_new_tokens = 2;
        let scope = arena.scope();
        generator.run(dev, &model, &scope, &prompts[..2], &settings, hear).unwrap();
        assert_eq!(heard[0], 2, "{}", dev.describe());
    }
    check::<f32>(&Device::cpu());
    sim::on_devices(check::<bf16>);
}

#[test]
fn rollout_equals_training() {
    let dev = Device::cpu();
    let (mut tokens, mut run) = (0, 0);
    for name in folders() {
        let longest = [vec![0; LONGEST]];
        let model = load_for::<f32>(&name, Head::Lm, &longest);
        let prompts = prompts(12, model.spec().vocab);
        let whole = ["gpt2", "llama_tied"].contains(&&*name);
        let all = if whole { &[0.3, 0.6, 1.0, 1.7][..] } else { &[0.8] };
        for temperature in all.iter().copied() {
            for filter in FILTERS {
                let sampling = sample::SamplingParams { temperature, ..filter };
                let slots = [1, 2, 3, 7, 64][run % 5];
                let rows = [1, 41, 64, 100, 512, 37][run % 6];
                let settings = settings(sampling, 28);
                let done = generate(&dev, &model, &prompts, &settings, (slots, rows));
                let (ours, per) = (logprobs(&done), [1, 3, 12][run % 3]);
                let train = |t: f32| trained(&dev, &model, &prompts, &done, t, per);
                let what = format!("{name} {sampling:?} {slots} slots {rows} rows");
                assert_bits(&what, &ours, &train(temperature));
                // The same check must fail on another distribution, but where a token is certain.
                let other = train(temperature * 1.001);
                let differ = ours.iter().zip(&other).filter(|(a, b)| a.to_bits() != b.to_bits());
                assert!(differ.count() * 4 > ours.len(), "{what}: the check does not bite");
                tokens += ours.len();
                run += 1;
            }
        }
    }
    assert!(tokens >= 10_000, "{tokens}");
}

/// Another way to compute the same numbers, f64, is seen by the check too.
#[test]
fn another_computation_is_not_bit_equal() {
    let (dev, model) = (Device::cpu(), load::<f32>("llama_tied", Head::Lm));
    let prompts = prompts(12, model.spec().vocab);
    let done = generate(&dev, &model, &prompts, &settings(FILTERS[0], 10), (4, 64));
    let wide: Vec<Completion<f64>> = done
        .iter()
        .map(|c| Completion {
            sample: c.sample,
            ids: c.ids.clone(),
            logprobs: Vec::new(),
            stopped: false,
        })
        .collect();
    let other = trained(&dev, &load::<f64>("llama_tied", Head::Lm), &prompts, &wide, 1.0, 4);
    let ours = logprobs(&done);
    let worst = ours.iter().zip(&other).map(|(a, b)| (f64::from(*a) - b).abs());
    let worst = worst.fold(0.0, f64::max);
    assert!(worst > 0.0 && worst < 1e-4, "{worst}");
    let same = ours.iter().zip(&other).filter(|(a, b)| a.to_bits() == (**b as f32).to_bits());
    assert!(same.count() < ours.len());
}

/// Properties 1 and 3: slots, rows of a pass, order, threads and instruction set change no bit.
#[test]
fn samples_do_not_see_their_batch() {
    for name in ["gpt2", "llama_tied"] {
        let model = load::<f32>(name, Head::Lm);
        let prompts = prompts(9, model.spec().vocab);
        let settings = settings(sample::SamplingParams { top_p: 0.9, ..FILTERS[0] }, 8);
        let want = generate(&Device::cpu(), &model, &prompts, &settings, (64, 4096));
        let sizes = [(1, 1), (2, 41), (3, 64), (7, 100), (64, 37)];
        let own = (1..=3).flat_map(|t| sizes.map(|s| (Device::Cpu(Cpu::new(t)), s)));
        // the portable set is slow: one size each
        let every = devices().into_iter().map(|d| (d, (3, 64)));
        for (run, (dev, size)) in own.chain(every).enumerate() {
            let order = match run % 3 {
                0 => (0..prompts.len()).collect(),
                1 => (0..prompts.len()).rev().collect(),
                _ => Philox::new(1, run as u64, 0, Purpose::Shuffle).permutation(prompts.len()),
            };
            let shuffled: Vec<Prompt> = order.iter().map(|i| prompts[*i].clone()).collect();
            let done = generate(&dev, &model, &shuffled, &settings, size);
            for (c, i) in done.iter().zip(order) {
                let what = format!("{name} {dev:?} {size:?} sample {}", c.sample);
                assert_eq!((c.sample, &c.ids), (want[i].sample, &want[i].ids), "{what}");
                assert_bits(&what, &c.logprobs, &want[i].logprobs);
            }
        }
        // a prompt alone
        let alone = generate(&Device::cpu(), &model, &prompts[4..5], &settings, (1, 1));
        assert_eq!(alone[0], want[4]);
    }
}

/// Prompts share pages if they are equal, not if they are equally long.
#[test]
fn prompts_that_differ_share_no_pages() {
    let (dev, model) = (Device::cpu(), load::<f32>("llama_tied", Head::Lm));
    let ids = |first: u32| std::iter::once(first).chain(10..50).collect();
    let prompts = [3, 4].map(|i| Prompt { sample: u64::from(i), ids: ids(i) });
    let settings = settings(FILTERS[0], 6);
    let both = generate(&dev, &model, &prompts, &settings, (2, 128));
    for (prompt, c) in prompts.iter().zip(&both) {
        let alone = generate(&dev, &model, std::slice::from_ref(prompt), &settings, (1, 128));
        assert_eq!(alone[0], *c);
    }
}

/// Samples of one prompt differ by their number, and are drawn again by seed, step and purpose.
#[test]
fn randomness_is_addressed_not_consumed() {
    let (dev, model) = (Device::cpu(), load::<f32>("llama_tied", Head::Lm));
    let ids = vec![5, 6, 7];
    let prompts: Vec<Prompt> = (0..16).map(|sample| Prompt { sample, ids: ids.clone() }).collect();
    let draw = |seed, step, purpose| {
        let stream = Stream { seed, step, purpose };
        let settings = GenerationConfig { stream, ..settings(FILTERS[0], 8) };
        let done = generate(&dev, &model, &prompts, &settings, (5, 64));
        done.into_iter().map(|c| c.ids).collect::<Vec<_>>()
    };
    let first = draw(1, 2, Purpose::Sample);
    let mut different = first.clone();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), 16);
    assert_eq!(draw(1, 2, Purpose::Sample), first);
    for (seed, step, purpose) in
        [(2, 2, Purpose::Sample), (1, 3, Purpose::Sample), (1, 2, Purpose::Evaluate)]
    {
        assert_ne!(draw(seed, step, purpose), first);
    }
}

/// Greedy decoding takes the largest logit of the forward pass, and reports log-probs at 1.
#[test]
fn greedy_tokens_are_the_likeliest() {
    let (dev, model) = (Device::cpu(), load::<f32>("gpt2", Head::Lm));
    let (prompts, vocab) = (prompts(8, model.spec().vocab), model.spec().vocab);
    let greedy = sample::SamplingParams::greedy();
    let done = generate(&dev, &model, &prompts, &settings(greedy, 9), (3, 64));
    let train = trained(&dev, &model, &prompts, &done, 1.0, 8);
    assert_bits("log-probs", &logprobs(&done), &train);
    for (p, c) in prompts.iter().zip(&done) {
        let whole = [&p.ids[..], &c.ids].concat();
        let logits = forward(&model, std::slice::from_ref(&whole)).logits;
        for (t, id) in c.ids.iter().enumerate() {
            let row = &logits[(p.ids.len() + t - 1) * vocab..][..vocab];
            let top = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            assert_eq!(*id as usize, top, "sample {} token {t}", p.sample);
        }
    }
}

#[test]
fn a_stop_id_ends_a_sample_and_is_kept() {
    let (dev, model) = (Device::cpu(), load::<f32>("llama_tied", Head::Lm));
    let prompts = prompts(16, model.spec().vocab);
    let free = generate(&dev, &model, &prompts, &settings(FILTERS[0], 20), (4, 64));
    let stop_ids: Vec<u32> = (0..12).map(|i| i * 9).collect();
    let settings = GenerationConfig { stop_ids: stop_ids.clone(), ..settings(FILTERS[0], 20) };
    let done = generate(&dev, &model, &prompts, &settings, (4, 64));
    let (mut stopped, mut whole) = (0, 0);
    for (c, free) in done.iter().zip(&free) {
        let end = free.ids.iter().position(|id| stop_ids.contains(id));
        let n = end.map_or(20, |i| i + 1);
        assert_eq!((&c.ids[..], c.stopped), (&free.ids[..n], end.is_some()));
        assert_bits("log-probs", &c.logprobs, &free.logprobs[..n]);
        *(if c.stopped { &mut stopped } else { &mut whole }) += 1;
    }
    assert!(stopped > 3 && whole > 0, "{stopped} {whole}");
}

/// A slot that a broken sequence left full of NaN serves the next one without a trace, and so does
/// one that was never used (NaN in debug builds).
#[test]
fn what_a_slot_held_does_not_matter() {
    let (dev, mut model) = (Device::cpu(), load::<f32>("llama", Head::Lm));
    let h = model.spec().hidden;
    let embedding = model.params_mut().unwrap().get_mut(ParamKind::Embedding, None).unwrap().host();
    embedding[3 * h..4 * h].fill(f32::NAN); // token 3; the head is not tied
    let bad = |sample| Prompt { sample, ids: [vec![3; 20], vec![9; 20]].concat() };
    let good = |sample: u64| Prompt { sample, ids: (4..14 + sample as u32).collect() };
    let greedy = settings(sample::SamplingParams::greedy(), 6);
    let alone = generate(&dev, &model, &[good(1), good(2)], &greedy, (2, 64));
    assert!(logprobs(&alone).iter().all(|x| x.is_finite()));
    for slots in [1, 2, 3] {
        let prompts = [bad(7), good(1), bad(8), bad(9), good(2), bad(10)];
        let done = generate(&dev, &model, &prompts, &greedy, (slots, 64));
        assert!(done[0].logprobs[0].is_nan());
        assert_eq!((&done[1], &done[4]), (&alone[0], &alone[1]), "{slots} slots");
    }
}

#[test]
fn nothing_is_asked_for_and_nothing_comes() {
    let (dev, model) = (Device::cpu(), load::<f32>("llama_tied", Head::Lm));
    let none = generate(&dev, &model, &prompts(3, 50), &settings(FILTERS[0], 0), (2, 64));
    let samples: Vec<u64> = none.iter().map(|c| c.sample).collect();
    assert_eq!(samples, [100, 101, 102]);
    assert!(none.iter().all(|c| c.ids.is_empty() && c.logprobs.is_empty() && !c.stopped));
    assert!(generate(&dev, &model, &[], &settings(FILTERS[0], 4), (2, 64)).is_empty());
}

#[test]
fn what_does_not_fit_is_named() {
    let (dev, model) = (Device::cpu(), load::<f32>("llama_tied", Head::Lm));
    let fail = |ids: Vec<u32>, generator: Generator, settings: &GenerationConfig| {
        let mut arena = room(generator.plan::<f32>(host(), model.spec(), &PARAMS).unwrap());
        let prompts = [Prompt { sample: 1, ids: vec![1] }, Prompt { sample: 42, ids }];
        let scope = arena.scope();
        let error =
            generator.run(&dev, &model, &scope, &prompts, settings, |_| Ok(())).unwrap_err();
        assert!(matches!(error, Error::Value { .. }), "{error:?}");
        error.to_string()
    };
    let five = settings(FILTERS[0], 5);
    let generator = Generator { slots: 2, max_len: 20, rows: 12 };
    assert_eq!(
        fail(vec![], generator, &five),
        "prompt of sample 42: got none, wanted at least one token"
    );
    assert_eq!(
        fail(vec![1; 16], generator, &five),
        "prompt of sample 42: got 21, wanted at most 20 tokens with its completion"
    );
    assert_eq!(
        fail(vec![1; 13], generator, &five),
        "prompt of sample 42: got 13, wanted at most 12 tokens (rows of a pass)"
    );
    let long = Generator { slots: 2, max_len: 500, rows: 300 };
    assert_eq!(
        fail(vec![1; 124], long, &five),
        "prompt of sample 42: got 129, wanted at most 128 tokens with its completion"
    );
    assert_eq!(
        fail(vec![1, 113], generator, &five),
        "embedding: id of row 2: got 113, wanted less than 113"
    );
    let none = Generator { slots: 0, ..generator };
    assert_eq!(fail(vec![1], none, &five), "slots of a generation: got 0, wanted at least one");
    let cold = settings(sample::SamplingParams { temperature: -1.0, ..FILTERS[0] }, 5);
    assert_eq!(fail(vec![1], generator, &cold), "temperature: got -1, wanted 0, or 1e-6 or more");
}

/// Progress hears every new token, and can end the generation.
#[test]
fn progress_is_heard_and_obeyed() {
    let (dev, model) = (Device::cpu(), load::<f32>("llama_tied", Head::Lm));
    let prompts = prompts(5, model.spec().vocab);
    let generator = Generator::for_prompts(&prompts, 6, 2, 64);
    let mut arena = room(generator.plan::<f32>(host(), model.spec(), &PARAMS).unwrap());
    let settings = settings(FILTERS[0], 6);
    let mut heard = 0;
    let mut count = |new: &[_]| {
        heard += new.len();
        Ok(())
    };
    let done = generator.run(&dev, &model, &arena.scope(), &prompts, &settings, &mut count);
    assert_eq!(done.unwrap().len(), 5);
    assert_eq!(heard, 30);
    let mut passes = 0;
    let mut stop = |_: &[_]| {
        passes += 1;
        if passes < 3 { Ok(()) } else { Err(Error::value("passes", "more", "enough")) }
    };
    let done = generator.run(&dev, &model, &arena.scope(), &prompts, &settings, &mut stop);
    assert!(done.unwrap_err().to_string().starts_with("passes"));
    assert_eq!(passes, 3);
}
