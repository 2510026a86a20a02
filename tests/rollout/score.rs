//! Scoring: the same numbers packed as alone, whatever the neighbours; entropy; rewards at the last
//! token.

use warpo::{
    Error,
    device::{Device, Float},
    models::{Batch, Head, LossColumns, Model, Pass},
    rollout::{Scorer, last_scores},
};

use crate::{
    models::golden::{forward, load},
    support::{assert_bits, assert_close, devices, host, keep_all, params, pass_room, room, wide},
};

fn ids(sequence: usize, len: usize) -> Vec<u32> {
    (0..len).map(|t| ((13 * sequence + 7 * t + t * t) % 101) as u32).collect()
}

/// Lengths around those of a tile and a page.
fn documents() -> Vec<Vec<u32>> {
    [5, 1, 2, 32, 33, 7, 31, 50, 64, 3].iter().enumerate().map(|(s, n)| ids(s, *n)).collect()
}

/// Log-probs and entropies of each document's tokens from the second on.
fn logprobs<F: Float>(
    dev: &Device,
    model: &Model<F>,
    documents: &[Vec<u32>],
    scorer: Scorer,
    t: F,
) -> (Vec<F>, Vec<F>) {
    let mut arena = room(scorer.plan::<F>(host(), model.spec(), model.head()).unwrap());
    let (mut logp, mut entropy, mut batch) = (Vec::new(), Vec::new(), Batch::default());
    for group in scorer.groups(documents.iter().map(Vec::len)) {
        batch.clear();
        documents[group].iter().for_each(|d| batch.push_predicted(d, 1));
        let (scope, entropy) = (arena.scope(), Some(&mut entropy));
        Pass::new(dev, model, &scope, &batch).at(t).score(&mut logp, entropy).unwrap();
    }
    (logp, entropy)
}

fn scores<F: Float>(
    dev: &Device,
    model: &Model<F>,
    documents: &[Vec<u32>],
    scorer: Scorer,
) -> Vec<F> {
    let mut arena = room(scorer.plan::<F>(host(), model.spec(), model.head()).unwrap());
    let all: Vec<&[u32]> = documents.iter().map(Vec::as_slice).collect();
    last_scores(dev, model, &mut arena, scorer, &all).unwrap()
}

const ALONE: Scorer = Scorer { rows: 64, sequences: 1 };

#[test]
fn rows_do_not_see_their_batch() {
    for name in ["gpt2", "llama"] {
        let (policy, judge) =
            (load::<f32>(name, Head::Lm), load::<f32>(&format!("{name}/rm"), Head::Scalar));
        let (all, dev) = (documents(), Device::cpu());
        let (logp, entropy) = logprobs(&dev, &policy, &all, ALONE, 0.7);
        let want = scores(&dev, &judge, &all, ALONE);
        assert_eq!((logp.len(), want.len()), (all.iter().map(|d| d.len() - 1).sum(), all.len()));
        let scorers = [(64, 3), (100, 100), (1000, 4), (1000, 100)];
        let own = scorers.map(|s| (dev.clone(), s));
        for (dev, (rows, sequences)) in
            own.into_iter().chain(devices().into_iter().map(|d| (d, (1000, 100))))
        {
            let scorer = Scorer { rows, sequences };
            let what = format!("{name} {dev:?} {scorer:?}");
            let (l, e) = logprobs(&dev, &policy, &all, scorer, 0.7);
            assert_bits(&what, &l, &logp);
            assert_bits(&what, &e, &entropy);
            assert_bits(&what, &scores(&dev, &judge, &all, scorer), &want);
        }
    }
}

/// A document that changes, NaN weights under its tokens included, changes no bit of another.
#[test]
fn a_document_does_not_see_its_neighbours() {
    let (dev, mut model) = (Device::cpu(), load::<f32>("llama", Head::Lm));
    let h = model.spec().hidden;
    let rows = model
        .params_mut()
        .unwrap()
        .get_mut(warpo::models::ParamKind::Embedding, None)
        .unwrap()
        .host();
    rows[140 * h..141 * h].fill(f32::NAN); // token 140 is in no other document
    let packed = Scorer { rows: 1000, sequences: 100 };
    let all = documents();
    let want = logprobs(&dev, &model, &all, packed, 1.0);
    assert!(want.0.iter().all(|x| x.is_finite()));
    let mut at = 0;
    for changed in 0..all.len() {
        let own = at..at + all[changed].len() - 1;
        at = own.end;
        for (n, fill) in [(all[changed].len(), 140), (all[changed].len(), 17), (1, 140), (64, 99)] {
            let mut other = all.clone();
            other[changed] = vec![fill; n];
            let got = logprobs(&dev, &model, &other, packed, 1.0);
            for (got, want) in [(&got.0, &want.0), (&got.1, &want.1)] {
                let rest = [&got[..own.start], &got[own.start + n - 1..]].concat();
                let want = [&want[..own.start], &want[own.end..]].concat();
                assert_bits(&format!("document {changed} of {n} times {fill}"), &rest, &want);
            }
        }
    }
}

/// `log softmax(z / T)` and its entropy, against the formulas on all logits.
#[test]
fn logprobs_and_entropy_are_those_of_the_formulas() {
    for name in ["gpt2", "llama_tied"] {
        let model = load::<f64>(name, Head::Lm);
        let (all, vocab) = (documents(), model.spec().vocab);
        for t in [0.3, 1.0, 1.7] {
            let (logp, entropy) = logprobs(&Device::cpu(), &model, &all, ALONE, t);
            let (mut want, mut want_entropy) = (Vec::new(), Vec::new());
            for d in &all {
                let logits = forward(&model, std::slice::from_ref(d)).logits;
                for (z, next) in logits.chunks(vocab).zip(&d[1..]) {
                    let sum: f64 = z.iter().map(|z| (z / t).exp()).sum();
                    let log_p = |v: usize| z[v] / t - sum.ln();
                    want.push(log_p(*next as usize));
                    want_entropy.push(-(0..vocab).map(|v| log_p(v).exp() * log_p(v)).sum::<f64>());
                }
            }
            assert_close(&format!("{name} {t}"), &logp, &want, 1e-12, 1e-12);
            assert_close(&format!("{name} {t}"), &entropy, &want_entropy, 1e-11, 1e-11);
        }
    }
}

/// A reward is the scalar at the last token: of all rows the last, and the one that training sees.
#[test]
fn rewards_are_at_the_last_token() {
    let (dev, judge) = (Device::cpu(), load::<f32>("gpt2/rm", Head::Scalar));
    let all = documents();
    let want = scores(&dev, &judge, &all, ALONE);
    let mut batch = Batch::default();
    // one token more, whose own row is not computed: the scalars before each of the others
    all.iter().for_each(|d| batch.push_predicted(&[d, &[0][..]].concat(), 1));
    let scorer = Scorer { rows: batch.len(), sequences: all.len() };
    let mut arena = room(scorer.plan::<f32>(host(), judge.spec(), judge.head()).unwrap());
    let mut rows = Vec::new();
    Pass::new(&dev, &judge, &arena.scope(), &batch).score(&mut rows, None).unwrap();
    let last: Vec<f32> = batch.offsets()[1..].iter().map(|o| rows[*o as usize - 1]).collect();
    assert_bits("last rows", &last, &want);

    let mut batch = Batch::default();
    all.iter().for_each(|d| batch.push_last(d));
    let mut arena = pass_room(host(), &judge, &batch, keep_all(false));
    let (scope, mut grads) = (arena.scope(), params(judge.params().layout()));
    Pass::new(&dev, &judge, &scope, &batch)
        .train(&mut grads, keep_all(false), |LossColumns { y, dy, .. }| {
            assert_bits("training", y.host(), &want);
            dy.host().fill(0.0);
            Ok(())
        })
        .unwrap();

    // and it is the head's product with what the head reads there
    let (judge, w) = (load::<f64>("gpt2/rm", Head::Scalar), judge.score_head().unwrap().host());
    let hidden = forward(&judge, &all).hidden;
    let mut end = 0;
    let truth: Vec<f64> = all
        .iter()
        .map(|d| {
            end += d.len();
            let h = &hidden[(end - 1) * w.len()..end * w.len()];
            h.iter().zip(wide(w)).map(|(h, w)| h * w).sum()
        })
        .collect();
    assert_close("scores", &scores(&Device::cpu(), &judge, &all, ALONE), &truth, 1e-12, 1e-12);
}

#[test]
fn groups_are_consecutive_and_within_their_sizes() {
    let scorer = Scorer { rows: 10, sequences: 3 };
    let groups = |lens: &[usize]| scorer.groups(lens.iter().copied());
    assert!(groups(&[]).is_empty());
    assert_eq!(groups(&[4, 6, 1, 1, 1, 1, 9]), [0..2, 2..5, 5..7]);
    // what is longer than a pass stands alone, and is refused when it is run
    assert_eq!(groups(&[1, 11, 1]), [0..1, 1..2, 2..3]);
    let (dev, judge) = (Device::cpu(), load::<f32>("gpt2/rm", Head::Scalar));
    let mut arena = room(scorer.plan::<f32>(host(), judge.spec(), judge.head()).unwrap());
    let long = ids(0, 90);
    let error = last_scores(&dev, &judge, &mut arena, scorer, &[&long]).unwrap_err();
    assert!(matches!(error, Error::Memory { .. }), "{error:?}");
}

#[test]
fn what_does_not_fit_is_named() {
    let (dev, policy) = (Device::cpu(), load::<f32>("llama_tied", Head::Lm));
    let fail = |ids: &[u32], t: f32, model: &Model<f32>| {
        let mut arena = room(
            Scorer { rows: 200, sequences: 1 }
                .plan::<f32>(host(), model.spec(), model.head())
                .unwrap(),
        );
        let (mut batch, mut out) = (Batch::default(), Vec::new());
        batch.push_predicted(ids, 1);
        let scope = arena.scope();
        let pass = Pass::new(&dev, model, &scope, &batch).at(t);
        pass.score(&mut out, None).unwrap_err().to_string()
    };
    let last = "logprob: target of row 1: got 113, wanted less than 113";
    assert_eq!(fail(&[1, 2, 113], 1.0, &policy), last);
    let inner = "embedding: id of row 1: got 113, wanted less than 113";
    assert_eq!(fail(&[1, 113, 2], 1.0, &policy), inner);
    let temperature = "logprob: temperature: got 0, wanted a positive number";
    assert_eq!(fail(&[1, 2], 0.0, &policy), temperature);
    let judge = load::<f32>("llama_tied/rm", Head::Scalar);
    let head = "head: got a scalar head, wanted an LM head";
    assert_eq!(fail(&[1, 2], 1.0, &judge), head);
    let long = fail(&[5; 140], 1.0, &policy);
    assert!(long.contains("128"), "{long}");
}
