//! G5: gradients of whole models under every loss, against central differences in f64 over all of
//! at least 3,000 weights. Inputs keep clear of the kinks: clips and maxima.

use warpo::{
    device::{Cpu, Device, View, ViewMut},
    models::{Batch, Config, Head, LossColumns, Model, ParamKind, Params, Pass, Residency},
    ops::{
        bradley_terry::{self, Pairs},
        kl::KlEstimator,
        nll,
        policy_loss::{self, KlTerm, KlWeight, PolicyLoss, PolicyTokens, Surrogate},
        sequence_loss::Offsets,
        value_loss::{self, ValueLoss, ValueTokens},
    },
    rollout::Scorer,
};

use crate::support::{host, inner, keep_all, params, pass_room, randn, room};

/// LayerNorm, learned positions, biases, tied head.
const GPT2: &str = r#"{"model_type": "gpt2", "vocab_size": 37, "n_embd": 16, "n_layer": 1, "n_head": 2,
    "n_inner": 40, "n_positions": 18}"#;

/// Grouped queries wider than the stream, biases everywhere, a head of its own.
const LLAMA: &str = r#"{"model_type": "llama", "vocab_size": 29, "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "intermediate_size": 27, "max_position_embeddings": 128, "attention_bias": true,
    "mlp_bias": true}"#;

/// Tied head; positions stretched, blended and kept as in Llama 3.1.
const LLAMA3: &str = r#"{"model_type": "llama", "vocab_size": 41, "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 37, "max_position_embeddings": 128, "tie_word_embeddings": true,
    "rope_theta": 100.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}"#;

const MODELS: [(&str, &str); 3] = [("gpt2", GPT2), ("llama", LLAMA), ("llama3", LLAMA3)];

/// The weights of a model from N(0, 0.3²), norms around 1.
fn model(config: &str, head: Head) -> Model<f64> {
    let config = Config::parse(config, "config.json").unwrap();
    let mut model = Model::zeros(host(), config, head, Residency::Frozen).unwrap();
    for t in model.params().layout().clone().tensors() {
        let norm = matches!(t.kind, ParamKind::Norm1 | ParamKind::Norm2 | ParamKind::FinalNorm);
        let centre = if norm { 1.0 } else { 0.0 };
        let draws: Vec<f64> = randn(&t.name(), t.len());
        let weights = model.params_mut().unwrap().tensor_mut(t).host();
        weights.iter_mut().zip(draws).for_each(|(w, x)| *w = centre + 0.3 * x);
    }
    model.repack(&device()).unwrap();
    model
}

/// One thread: the passes are small.
fn device() -> Device {
    Device::Cpu(Cpu::new(1))
}

fn ids(lens: &[usize], vocab: usize) -> Vec<Vec<u32>> {
    let draw = |s: usize, t: usize| ((7 * s + 11 * t + t * t) % vocab) as u32;
    lens.iter().enumerate().map(|(s, n)| (0..*n).map(|t| draw(s, t)).collect()).collect()
}

/// Central differences of `losses` in every weight: |a - n| <= 1e-8 + 1e-5 |n| for each loss.
fn sweep(
    what: &str,
    model: &mut Model<f64>,
    grads: &[(&str, Params<f64>)],
    mut losses: impl FnMut(&Model<f64>) -> Vec<f64>,
) {
    let (dev, layout) = (device(), model.params().layout().clone());
    let count: usize = layout.tensors().iter().map(|t| t.len()).sum();
    assert!(count >= 3000, "{what}: {count}");
    for t in layout.tensors() {
        let mut largest = vec![0.0f64; grads.len()];
        for i in t.offset..t.offset + t.len() {
            let at = model.params().flat().host()[i];
            let h = 6e-6 * at.abs().max(1.0);
            let mut loss_at = |x: f64| {
                model.params_mut().unwrap().flat_mut().host()[i] = x;
                model.repack(&dev).unwrap();
                losses(model)
            };
            let (high, low) = (loss_at(at + h), loss_at(at - h));
            model.params_mut().unwrap().flat_mut().host()[i] = at;
            for (k, (loss, grads)) in grads.iter().enumerate() {
                let (a, n) = (grads.flat().host()[i], (high[k] - low[k]) / (2.0 * h));
                let e = (a - n).abs();
                assert!(
                    e <= 1e-8 + 1e-5 * n.abs(),
                    "{what} {loss}: {}[{}]: gradient {a:e}, central difference {n:e}, error {e:.3e}",
                    t.name(),
                    i - t.offset
                );
                largest[k] = largest[k].max(a.abs());
            }
        }
        assert!(largest.iter().all(|g| *g > 1e-6), "{what}: {} is not trained", t.name());
    }
    model.repack(&dev).unwrap();
}

/// Per-token columns for the losses of a policy, made from its own log-probs.
struct PolicyColumns {
    weights: Vec<f64>,
    old: Vec<f64>,
    reference: Vec<f64>,
    advantages: Vec<f64>,
}

impl PolicyColumns {
    fn new(logp: &[f64]) -> Self {
        // e^x is 1.05, 0.95, 1.65, 0.55, 0.22, 2.46: inside and outside the clip range 0.8 to 1.2,
        // on both sides of the dual clip 1.5.
        let log_ratios = [0.05, -0.05, 0.5, -0.6, -1.5, 0.9];
        let cycle = |x: &[f64]| x.iter().copied().cycle().take(logp.len()).collect::<Vec<_>>();
        let minus = |d: Vec<f64>| logp.iter().zip(d).map(|(l, d)| l - d).collect();
        Self {
            weights: cycle(&[1.0, 0.5, 2.0, 0.7]),
            old: minus(cycle(&log_ratios)),
            reference: minus(cycle(&[0.3, -0.4, 0.1, 0.7, -0.2])),
            advantages: cycle(&[1.3, -0.8, -0.6, 1.7, -0.9, 0.4, 2.1]),
        }
    }

    fn sft(&self, logp: View<'_, f64>, dlogp: ViewMut<'_, f64>) -> f64 {
        let denominator = self.weights.iter().sum();
        nll::forward(&device(), dlogp, logp, (&self.weights).into(), denominator)
            .unwrap()
            .get()
            .unwrap()
    }

    fn ppo(
        &self,
        logp: View<'_, f64>,
        entropy: View<'_, f64>,
        dlogp: ViewMut<'_, f64>,
        dentropy: ViewMut<'_, f64>,
    ) -> policy_loss::PolicySums {
        let weight = KlWeight::Ratio;
        let kl = Some(KlTerm { coef: 0.2, estimator: KlEstimator::K3, weight });
        let surrogate = Surrogate::Clip { low: 0.2, high: 0.2, dual: Some(1.5) };
        let settings = PolicyLoss { surrogate, kl, entropy_coef: 0.1, ..PolicyLoss::default() };
        let ends = [0, logp.len() as u32];
        let tokens = PolicyTokens {
            logp,
            old_logp: (&self.old).into(),
            ref_logp: Some((&self.reference).into()),
            entropy: Some(entropy),
            advantages: (&self.advantages).into(),
            weights: None,
            offsets: Offsets { host: &ends, view: (&ends[..]).into() },
        };
        let n = logp.len() as f64;
        policy_loss::forward(&device(), dlogp, Some(dentropy), tokens, &settings, n)
            .unwrap()
            .get()
            .unwrap()
    }
}

#[test]
fn every_weight_of_a_policy_has_the_gradient_of_sft_and_ppo() {
    const T: f64 = 0.7;
    for (name, config) in MODELS {
        let (dev, mut m) = (device(), model(config, Head::Lm));
        let mut batch = Batch::default();
        for (s, from) in ids(&[7, 4, 2], m.spec().vocab).iter().zip([3, 1, 1]) {
            batch.push_predicted(s, from);
        }
        let scorer = Scorer { rows: batch.len(), sequences: batch.sequences() };
        let mut arena = room(scorer.plan::<f64>(host(), m.spec(), m.head()).unwrap());
        let mut forward = |m: &Model<f64>| {
            let (mut logp, mut entropy) = (Vec::new(), Vec::new());
            let (scope, h) = (arena.scope(), Some(&mut entropy));
            Pass::new(&dev, m, &scope, &batch).at(T).score(&mut logp, h).unwrap();
            (logp, entropy)
        };
        let columns = PolicyColumns::new(&forward(&m).0);
        let grads = |ppo: bool| {
            let mut arena = pass_room(host(), &m, &batch, keep_all(true));
            let (scope, mut grads) = (arena.scope(), params(m.params().layout()));
            Pass::new(&dev, &m, &scope, &batch)
                .at(T)
                .train(&mut grads, keep_all(true), |mut c| {
                    let mut dentropy = c.dentropy.unwrap();
                    let (d, dh) = (c.dy.reborrow(), dentropy.reborrow());
                    let s = columns.ppo(c.y, c.entropy.unwrap(), d, dh);
                    let active = [s.clipped_low, s.clipped_high, s.dual_clipped];
                    assert!(active.iter().all(|n| *n > 0.0), "{name}: {active:?}");
                    if !ppo {
                        dentropy.host().fill(0.0);
                        columns.sft(c.y, c.dy);
                    }
                    Ok(())
                })
                .unwrap();
            grads
        };
        let grads = [("sft", grads(false)), ("ppo", grads(true))];
        sweep(name, &mut m, &grads, |m| {
            let (logp, entropy) = forward(m);
            let (mut d, mut dh) = (vec![0.0; logp.len()], vec![0.0; logp.len()]);
            let sft = columns.sft((&logp).into(), (&mut d).into());
            let (logp, entropy) = ((&logp).into(), (&entropy).into());
            vec![sft, columns.ppo(logp, entropy, (&mut d).into(), (&mut dh).into()).loss]
        });
    }
}

/// Bradley-Terry on the last scalar of each sequence, two sequences a pair.
fn reward(scores: View<'_, f64>, d: ViewMut<'_, f64>) -> f64 {
    let margins = [0.3, -0.2];
    let t = Pairs { scores, margins: margins[..].into(), weights: None };
    let s = bradley_terry::forward(&device(), d, t, 0.05, 2.0);
    s.unwrap().get().unwrap().loss
}

/// Old values and returns around the values of a model.
struct ValueColumns {
    old: Vec<f64>,
    returns: Vec<f64>,
}

impl ValueColumns {
    fn new(values: &[f64]) -> Self {
        let plus = |d: &[f64]| values.iter().zip(d.iter().cycle()).map(|(v, d)| v + d).collect();
        // The clip at 0.2 is active where the old value is far and the return beyond.
        Self { old: plus(&[0.05, -0.5, 0.7, -0.1]), returns: plus(&[0.4, -1.0, 0.7]) }
    }

    fn loss(&self, v: View<'_, f64>, d: ViewMut<'_, f64>) -> value_loss::ValueSums {
        let (old, returns) = ((&self.old).into(), (&self.returns).into());
        let t = ValueTokens { v, old, returns, weights: None };
        let (s, n) = (ValueLoss { clip: Some(0.2), coef: 0.5 }, v.len() as f64);
        value_loss::forward(&device(), d, t, s, n).unwrap().get().unwrap()
    }
}

#[test]
fn every_weight_of_a_scalar_model_has_the_gradient_of_reward_and_value_loss() {
    for (name, config) in MODELS {
        let (dev, mut m) = (device(), model(config, Head::Scalar));
        let sequences = ids(&[6, 3, 4, 2], m.spec().vocab);
        // all rows: a token more, whose own row is never computed
        let mut all = Batch::default();
        sequences.iter().for_each(|s| all.push_predicted(&[s, &[0][..]].concat(), 1));
        let last: Vec<usize> = all.offsets()[1..].iter().map(|o| *o as usize - 1).collect();
        let split = |y: &[f64]| -> (Vec<f64>, Vec<f64>) {
            let (ends, values): (Vec<_>, Vec<_>) =
                y.iter().enumerate().partition(|(i, _)| last.contains(i));
            let numbers = |x: Vec<(usize, &f64)>| x.iter().map(|x| *x.1).collect();
            (numbers(ends), numbers(values))
        };
        let scorer = Scorer { rows: all.len(), sequences: all.sequences() };
        let mut arena = room(scorer.plan::<f64>(host(), m.spec(), m.head()).unwrap());
        let mut forward = |m: &Model<f64>| {
            let mut y = Vec::new();
            Pass::new(&dev, m, &arena.scope(), &all).score(&mut y, None).unwrap();
            split(&y)
        };
        let columns = ValueColumns::new(&forward(&m).1);
        let grads = |value: bool| {
            let mut batch = Batch::default();
            for s in &sequences {
                if value { batch.push_predicted(s, 1) } else { batch.push_last(s) }
            }
            let mut arena = pass_room(host(), &m, &batch, keep_all(false));
            let (scope, mut grads) = (arena.scope(), params(m.params().layout()));
            Pass::new(&dev, &m, &scope, &batch)
                .train(&mut grads, keep_all(false), |LossColumns { y, dy, .. }| {
                    if value {
                        let clipped = columns.loss(y, dy).clipped;
                        assert!(clipped > 0.0 && clipped < y.len() as f64, "{name}: {clipped}");
                    } else {
                        reward(y, dy);
                    }
                    Ok(())
                })
                .unwrap();
            grads
        };
        let grads = [("reward", grads(false)), ("value", grads(true))];
        sweep(name, &mut m, &grads, |m| {
            let (scores, values) = forward(m);
            let (mut ds, mut dv) = (vec![0.0; scores.len()], vec![0.0; values.len()]);
            let reward = reward((&scores).into(), (&mut ds).into());
            vec![reward, columns.loss((&values).into(), (&mut dv).into()).loss]
        });
    }
}

/// Two blocks, and sequences of several pages of keys: derivatives along random directions.
#[test]
fn gradients_of_longer_sequences() {
    for (name, config) in MODELS {
        let config = config
            .replace("\"n_layer\": 1", "\"n_layer\": 2")
            .replace("\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2")
            .replace("\"n_positions\": 18", "\"n_positions\": 80");
        let (dev, mut m) = (device(), model(&config, Head::Lm));
        assert_eq!(m.spec().layers, 2);
        let mut batch = Batch::default();
        ids(&[70, 33, 1, 32], m.spec().vocab).iter().for_each(|s| batch.push_predicted(s, 1));
        let weights: Vec<f64> = randn("weights", batch.selected().len());
        let mut arena = pass_room(host(), &m, &batch, keep_all(false));
        let mut run = |m: &Model<f64>| {
            let (scope, mut grads) = (arena.scope(), params(m.params().layout()));
            let mut loss = 0.0;
            Pass::new(&dev, m, &scope, &batch)
                .train(&mut grads, keep_all(false), |c| {
                    let sum = weights.iter().sum();
                    loss = nll::forward(&dev, c.dy, c.y, (&weights).into(), sum)?.get()?;
                    Ok(())
                })
                .unwrap();
            (loss, grads)
        };
        let grads = run(&m).1;
        let start = m.params().flat().host().to_vec();
        for direction in 0..8 {
            let d: Vec<f64> = randn(&format!("direction {direction}"), start.len());
            let mut loss_at = |h: f64| {
                let w = m.params_mut().unwrap().flat_mut().host();
                w.iter_mut().zip(&start).zip(&d).for_each(|((w, s), d)| *w = s + h * d);
                m.repack(&dev).unwrap();
                run(&m).0
            };
            let h = 1e-6;
            let n = (loss_at(h) - loss_at(-h)) / (2.0 * h);
            let a = inner(grads.flat().host(), &d);
            let e = (a - n).abs();
            assert!(e <= 1e-8 + 1e-5 * n.abs(), "{name}: {a:e} and {n:e}, error {e:.3e}");
        }
    }
}
