//! One pass over a micro-batch: gradients add up to those of the whole step, whatever the split.

use warpo::{
    Error,
    device::{Device, Float},
    models::{Batch, Head, LossColumns, Model, Params, Pass, PassShape},
};

use crate::{
    models::golden::{MODELS, load},
    support::{assert_bits, devices, host, keep_all, params, pass_bytes, pass_room, randn, room},
};

/// Ragged sequences, and from which token each is learned.
fn sequences() -> Vec<(Vec<u32>, usize)> {
    let ids = |s: usize, n: usize| (0..n).map(|t| ((5 * s + 3 * t + t * t) % 90) as u32).collect();
    let lens = [(9, 2), (2, 1), (35, 30), (1, 1), (17, 1), (5, 4), (33, 1), (12, 6)];
    lens.iter().enumerate().map(|(s, (n, from))| (ids(s, *n), *from)).collect()
}

/// Gradients of `sum w logp + v entropy` over all learned tokens (or of `sum w y` over last
/// tokens), in micro-batches of `per` sequences, all in memory for the largest.
fn gradients<F: Float>(dev: &Device, model: &Model<F>, per: usize) -> (Params<F>, Vec<F>) {
    let all = sequences();
    let policy = model.head() == Head::Lm;
    let mut batches: Vec<Batch> = Vec::new();
    for group in all.chunks(per) {
        let mut batch = Batch::default();
        for (ids, from) in group {
            if policy { batch.push_predicted(ids, *from) } else { batch.push_last(ids) }
        }
        batches.push(batch);
    }
    let rows = batches.iter().map(Batch::len).max().unwrap();
    let mut arena = room(pass_bytes(dev, model, PassShape::whole(rows, per), keep_all(policy)));
    let (w, v): (Vec<F>, Vec<F>) = (randn("w", 400), randn("v", 400));
    let (mut grads, mut outputs) = (params(model.params().layout()), Vec::new());
    for batch in &batches {
        let at = outputs.len();
        let scope = arena.scope();
        let fill = |d: &mut [F], x: &[F]| d.copy_from_slice(&x[at..at + d.len()]);
        if policy {
            Pass::new(dev, model, &scope, batch)
                .at(F::of(0.7))
                .train(&mut grads, keep_all(true), |c| {
                    fill(c.dy.host(), &w);
                    fill(c.dentropy.unwrap().host(), &v);
                    outputs.extend_from_slice(c.y.host());
                    Ok(())
                })
                .unwrap();
        } else {
            Pass::new(dev, model, &scope, batch)
                .train(&mut grads, keep_all(false), |LossColumns { y, dy, .. }| {
                    fill(dy.host(), &w);
                    outputs.extend_from_slice(y.host());
                    Ok(())
                })
                .unwrap();
        }
    }
    (grads, outputs)
}

fn check<F: Float>(name: &str, head: Head, tolerance: f64) {
    let (dev, model) = (Device::cpu(), load::<F>(name, head));
    let (whole, outputs) = gradients(&dev, &model, 8);
    let truth = whole.flat().host();
    let norm = truth.iter().map(|g| g.f64() * g.f64()).sum::<f64>().sqrt();
    for per in [1, 2, 3, 4] {
        let (split, same) = gradients(&dev, &model, per);
        assert_bits(&format!("{name} {per} a micro-batch"), &same, &outputs);
        let off = split.flat().host().iter().zip(truth);
        let off = off.map(|(a, b)| (a.f64() - b.f64()).powi(2)).sum::<f64>().sqrt();
        assert!(off <= tolerance * norm, "{name} {head:?} {per}: {:e}", off / norm);
    }
}

/// Property 4: the same gradient however the step is split, but for the rounding of sums; and the
/// outputs to the bit. Relative to its norm: 1e-12 in f64, and 1e-5 in f32 (G5).
#[test]
fn whole_step_denominators() {
    for name in MODELS {
        check::<f64>(name, Head::Lm, 1e-12);
        check::<f64>(&format!("{name}/rm"), Head::Scalar, 1e-12);
        check::<f32>(name, Head::Lm, 1e-5);
        check::<f32>(&format!("{name}/rm"), Head::Scalar, 1e-5);
    }
}

/// Threads and instruction sets change no bit of a gradient.
#[test]
fn gradients_do_not_see_their_device() {
    for (name, head) in [("gpt2", Head::Lm), ("llama/rm", Head::Scalar)] {
        let model = load::<f32>(name, head);
        let (want, _) = gradients(&Device::cpu(), &model, 4);
        for dev in devices() {
            let (got, _) = gradients(&dev, &model, 4);
            assert_bits(&format!("{name} {dev:?}"), got.flat().host(), want.flat().host());
        }
    }
}

/// What follows the last learned token is not computed, and what is not learned has no gradient:
/// only the tokens before it, as context, matter.
#[test]
fn only_what_is_read_is_computed() {
    let (dev, model) = (Device::cpu(), load::<f32>("llama", Head::Lm));
    let run = |ids: &[u32], learn: std::ops::Range<usize>| {
        let mut batch = Batch::default();
        batch.push_masked(ids, &[learn]);
        let mut arena = pass_room(host(), &model, &batch, keep_all(false));
        let (scope, mut grads) = (arena.scope(), params(model.params().layout()));
        let mut logp = Vec::new();
        Pass::new(&dev, &model, &scope, &batch)
            .train(&mut grads, keep_all(false), |c| {
                logp = c.y.host().to_vec();
                c.dy.host().fill(1.0);
                Ok(())
            })
            .unwrap();
        drop(scope);
        (logp, grads.flat().host().to_vec(), batch.len())
    };
    let (logp, grads, rows) = run(&[3, 4, 5, 6, 7, 8], 2..4);
    assert_eq!((logp.len(), rows), (2, 3), "the last learned token and those after it have no row");
    let (same, others, _) = run(&[3, 4, 5, 6, 60, 61], 2..4);
    assert_bits("log-probs", &same, &logp);
    assert_bits("gradients", &others, &grads);
    // the first token is never predicted, whatever is asked for
    let (all, _, _) = run(&[3, 4, 5], 0..9);
    assert_eq!(all.len(), 2);
}

/// A pass larger than its plan says so; it takes no more memory.
#[test]
fn the_plan_is_kept() {
    let (dev, model) = (Device::cpu(), load::<f32>("gpt2", Head::Lm));
    let mut arena = room(pass_bytes(&dev, &model, PassShape::whole(8, 1), keep_all(false)));
    let (mut batch, mut grads) = (Batch::default(), params(model.params().layout()));
    batch.push_predicted(&[1; 9], 1);
    let mut run = |batch: &Batch| {
        let scope = arena.scope();
        Pass::new(&dev, &model, &scope, batch).train(&mut grads, keep_all(false), |c| {
            c.dy.host().fill(0.0);
            Ok(())
        })
    };
    run(&batch).unwrap();
    batch.clear();
    batch.push_predicted(&[1; 20], 1);
    let error = run(&batch).unwrap_err();
    assert!(matches!(error, Error::Memory { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("micro_batch_tokens"));
}
