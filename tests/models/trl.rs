//! A minibatch of PPO, and pairs of DPO, against TRL in float64: advantages, losses and gradients.

use warpo::{
    device::Device,
    models::{Batch, Head, LossColumns, Pass},
    ops::{
        gae,
        kl::KlEstimator,
        policy_loss::{self, PolicyLoss, PolicyTokens},
        preference_loss::{self, PairCounts, PreferenceKind, PreferenceLoss},
        sequence_loss::{Offsets, SequenceColumns},
        value_loss::{self, ValueLoss, ValueTokens},
        whiten::{self, Moments, Variance},
    },
    rollout::{Scorer, last_scores},
};

use super::golden::{MODELS, assert_gradients, load, stored, unpad};
use crate::support::{assert_close, golden::Golden, host, keep_all, params, pass_room, room};

/// A minibatch of TRL's PPOTrainer. TRL adds the score at `reward_slot`, the padding after the
/// response (its last token if there is no room), and keeps a value there: `valid_p1` is `valid`
/// and that kind. Our trainer adds the score at the last token and has no such kind. So these
/// columns are laid out as TRL's are; every op that turns them into losses is ours.
struct Minibatch {
    /// Prompt and response of each row.
    rows: Vec<Vec<u32>>,
    /// Tokens of each response.
    lens: Vec<usize>,
    /// Padded length of a response.
    cols: usize,
}

impl Minibatch {
    fn of(g: &Golden) -> Self {
        let rows = unpad(g, "query_responses", "attention_mask");
        let (prompts, responses) =
            (unpad(g, "queries", "query_mask"), unpad(g, "responses", "response_mask"));
        let both = prompts.iter().zip(&responses);
        assert_eq!(rows, both.map(|(p, r)| [&p[..], r].concat()).collect::<Vec<_>>());
        let (lens, cols) = (responses.iter().map(Vec::len).collect(), g.shape("responses")[1]);
        let this = Self { rows, lens, cols };
        let last: Vec<i64> = this.lens.iter().map(|n| *n as i64 - 1).collect();
        assert_eq!(g.ints("seq_last"), last);
        this
    }

    /// Columns of row `b` with `extra` kinds after its tokens, where there is room.
    fn len(&self, b: usize, extra: usize) -> usize {
        (self.lens[b] + extra).min(self.cols)
    }

    fn tokens(&self, extra: usize) -> usize {
        (0..self.lens.len()).map(|b| self.len(b, extra)).sum()
    }

    fn offsets(&self, extra: usize) -> Vec<u32> {
        let sum = |b| (0..b).map(|b| self.len(b, extra) as u32).sum();
        (0..=self.lens.len()).map(sum).collect()
    }

    /// `[rows, cols]` without padding.
    fn packed(&self, x: &[f64], extra: usize) -> Vec<f64> {
        let rows = x.chunks(self.cols).enumerate();
        rows.flat_map(|(b, x)| x[..self.len(b, extra)].to_vec()).collect()
    }

    /// The reverse, with `pad` as padding.
    fn padded(&self, x: &[f64], extra: usize, pad: f64) -> Vec<f64> {
        let offsets = self.offsets(extra);
        let row = |w: &[u32]| {
            let mut row = x[w[0] as usize..w[1] as usize].to_vec();
            row.resize(self.cols, pad);
            row
        };
        offsets.windows(2).flat_map(row).collect()
    }

    /// Advantages of tokens and returns of tokens and kinds, from the stored log-probs and values.
    fn estimate(&self, g: &Golden, tag: &str) -> (Vec<f64>, Vec<f64>) {
        let key = |name: &str| format!("{tag}{name}");
        let same = |name: &str, x: &[f64], extra: usize| {
            let x = self.padded(x, extra, 0.0);
            assert_close(&key(name), &x, g.get(&key(name)), 1e-12, 1e-12);
        };
        let ones = |extra| self.padded(&vec![1.0; self.tokens(extra)], extra, 0.0);
        assert_eq!((g.get(&key("valid")), g.get(&key("valid_p1"))), (&ones(0)[..], &ones(1)[..]));
        let estimator = if tag.is_empty() { KlEstimator::K1 } else { KlEstimator::K3 };
        let column = |name| self.packed(g.get(name), 0);
        let (old, reference) = (column("old_logprobs"), column("ref_logprobs"));
        let kl: Vec<f64> =
            old.iter().zip(&reference).map(|(l, r)| estimator.value(*l, *r)).collect();
        same("kl", &kl, 0);

        let mut rewards: Vec<f64> = self.padded(&kl, 0, 0.0).iter().map(|k| -0.05 * k).collect();
        for (b, score) in g.get("scores").iter().enumerate() {
            let kind = self.lens[b].min(self.cols - 1);
            assert_eq!(g.ints(&key("reward_slot"))[b], kind as i64);
            rewards[b * self.cols + kind] += score;
        }
        let (dev, mut rewards) = (Device::cpu(), self.packed(&rewards, 1));
        if tag == "k3w/" {
            let moments = Moments::of(&dev, (&rewards).into()).unwrap();
            let unbiased = Variance::Unbiased;
            whiten::apply(&dev, (&mut rewards).into(), &moments, false, unbiased, 1e-8).unwrap();
        }
        same("rewards", &rewards, 1);

        let values = self.packed(g.get(&key("values")), 1);
        let (mut advantages, mut returns) = (vec![0.0; values.len()], vec![0.0; values.len()]);
        let offsets = self.offsets(1);
        let of = gae::RewardColumns {
            rewards: (&rewards).into(),
            values: (&values).into(),
            offsets: (&offsets).into(),
            gamma: 1.0,
            lambda: 0.95,
        };
        gae::forward(&dev, (&mut advantages).into(), (&mut returns).into(), of).unwrap();
        same("raw_advantages", &advantages, 1);
        same("returns", &returns, 1);

        let mut advantages = self.packed(&self.padded(&advantages, 1, 0.0), 0);
        let (moments, unbiased) =
            (Moments::of(&dev, (&advantages).into()).unwrap(), Variance::Unbiased);
        whiten::apply(&dev, (&mut advantages).into(), &moments, true, unbiased, 1e-8).unwrap();
        same("advantages", &advantages, 0);
        (advantages, returns)
    }
}

#[test]
fn ppo_losses_and_gradients_are_those_of_trl() {
    for name in MODELS {
        let g = Golden::open(&format!("{name}/ppo.safetensors"));
        let m = Minibatch::of(&g);
        let scalar = |key: String| g.scalar(&key);
        let mut policy_loss = std::collections::HashMap::new();

        let model = load::<f64>(name, Head::Lm);
        let (mut batch, mut grads) = (Batch::default(), params(model.params().layout()));
        m.rows.iter().zip(&m.lens).for_each(|(r, n)| batch.push_predicted(r, r.len() - n));
        let (dev, mut memory) = (Device::cpu(), pass_room(host(), &model, &batch, keep_all(false)));
        let scope = memory.scope();
        Pass::new(&dev, &model, &scope, &batch)
            .train(&mut grads, keep_all(false), |mut c| {
                let logp = c.y.host();
                let want = m.packed(g.get("new_logprobs"), 0);
                assert_close("new_logprobs", logp, &want, 1e-11, 1e-10);
                let (old, n) = (m.packed(g.get("old_logprobs"), 0), logp.len() as f64);
                // k1 last: its gradient goes on
                for tag in ["k3w/", ""] {
                    let (advantages, _) = m.estimate(&g, tag);
                    let ends = [0, logp.len() as u32];
                    let tokens = PolicyTokens {
                        logp: c.y,
                        old_logp: (&old).into(),
                        ref_logp: None,
                        entropy: None,
                        advantages: (&advantages).into(),
                        weights: None,
                        offsets: Offsets { host: &ends, view: (&ends[..]).into() },
                    };
                    let s = PolicyLoss::default();
                    let s =
                        policy_loss::forward(&dev, c.dy.reborrow(), None, tokens, &s, n)?.get()?;
                    let close = |key: &str, x: f64| {
                        let key = format!("{tag}{key}");
                        assert_close(&key, &[x], &[g.scalar(&key)], 1e-11, 1e-10);
                    };
                    close("pg_loss", s.loss);
                    close("pg_clipfrac", (s.clipped_low + s.clipped_high) / n);
                    assert!(s.clipped_low + s.clipped_high > 0.0, "{name}: nothing is clipped");
                    // TRL's approxkl is k2, over the padding too.
                    let k2 = logp.iter().zip(&old).map(|(l, o)| KlEstimator::K2.value(*l, *o));
                    close("approxkl", k2.sum::<f64>() / (m.lens.len() * m.cols) as f64);
                    let ratio: Vec<f64> =
                        logp.iter().zip(&old).map(|(l, o)| (l - o).exp()).collect();
                    let want = g.get(&format!("{tag}ratio"));
                    assert_close("ratio", &m.padded(&ratio, 0, 1.0), want, 1e-11, 1e-10);
                    policy_loss.insert(tag, s.loss);
                }
                Ok(())
            })
            .unwrap();
        assert_gradients(&g, "grad_policy/", (&model, &grads), stored(name));

        let model = load::<f64>(&format!("{name}/rm"), Head::Scalar);
        let (mut batch, mut grads) = (Batch::default(), params(model.params().layout()));
        for (b, row) in m.rows.iter().enumerate() {
            // The kind after the response: the row of its last token, "before" a padding token.
            let start = row.len() - m.lens[b];
            let kinds = start..start + m.len(b, 1);
            batch.push_masked(&[row, &[0][..]].concat(), &[kinds]);
        }
        let (n, mut memory) =
            (m.tokens(1) as f64, pass_room(host(), &model, &batch, keep_all(false)));
        let scope = memory.scope();
        Pass::new(&dev, &model, &scope, &batch)
            .train(&mut grads, keep_all(false), |LossColumns { y, mut dy, .. }| {
                assert_close("vpred", y.host(), &m.packed(g.get("vpred"), 1), 1e-11, 1e-10);
                for tag in ["k3w/", ""] {
                    let (_, returns) = m.estimate(&g, tag);
                    let old = m.packed(g.get(&format!("{tag}values")), 1);
                    let (old, returns) = ((&old).into(), (&returns).into());
                    let t = ValueTokens { v: y, old, returns, weights: None };
                    let s = ValueLoss { clip: Some(0.2), coef: 0.1 };
                    let s = value_loss::forward(&dev, dy.reborrow(), t, s, n)?.get()?;
                    let vf = scalar(format!("{tag}vf_loss"));
                    assert_close("vf_loss", &[s.loss], &[0.1 * vf], 1e-11, 1e-10);
                    let clipped = scalar(format!("{tag}vf_clipfrac"));
                    assert_close("vf_clipfrac", &[s.clipped / n], &[clipped], 0.0, 1e-14);
                    let loss = policy_loss[tag] + s.loss;
                    assert_close("loss", &[loss], &[scalar(format!("{tag}loss"))], 1e-11, 1e-10);
                }
                Ok(())
            })
            .unwrap();
        assert_gradients(&g, "grad_value/", (&model, &grads), stored(name));

        let rows: Vec<&[u32]> = m.rows.iter().map(Vec::as_slice).collect();
        let scorer = Scorer { rows: 64, sequences: 4 };
        let mut arena = room(scorer.plan::<f64>(host(), model.spec(), model.head()).unwrap());
        let scores = last_scores(&dev, &model, &mut arena, scorer, &rows).unwrap();
        assert_close("scores", &scores, g.get("scores"), 1e-11, 1e-10);
        g.all_read(&[]);
    }
}

/// Pairs of DPO: log-probs of completions, the losses of TRL, and all gradients of a model.
#[test]
fn dpo_losses_and_gradients_are_those_of_trl() {
    let name = "llama_tied";
    let g = Golden::open(&format!("{name}/dpo.safetensors"));
    let (rows, masks) =
        (unpad(&g, "input_ids", "attention_mask"), unpad(&g, "completion_mask", "attention_mask"));
    // Golden rows: all chosen, then all rejected.
    let pairs = rows.len() / 2;
    let order: Vec<usize> = (0..pairs).flat_map(|i| [i, pairs + i]).collect();
    let model = load::<f64>(name, Head::Lm);
    let (mut batch, mut grads) = (Batch::default(), params(model.params().layout()));
    let (mut offsets, mut chosen_tokens) = (vec![0u32], 0.0);
    for (k, &i) in order.iter().enumerate() {
        let n = masks[i].iter().filter(|m| **m == 1).count();
        batch.push_predicted(&rows[i], rows[i].len() - n);
        offsets.push(offsets[k] + n as u32);
        chosen_tokens += if k % 2 == 0 { n as f64 } else { 0.0 };
    }
    // The log-prob of a completion under the reference is given as a sum: it stands at the first
    // token.
    let mut reference = vec![0.0; offsets[2 * pairs] as usize];
    let sums = g.get("ref_logps");
    order.iter().zip(&offsets).for_each(|(i, o)| reference[*o as usize] = sums[*i]);
    let (dev, mut memory) = (host(), pass_room(host(), &model, &batch, keep_all(false)));
    let scope = memory.scope();
    Pass::new(dev, &model, &scope, &batch)
        .train(&mut grads, keep_all(false), |mut c| {
            let columns = SequenceColumns {
                logp: c.y,
                ref_logp: Some((&reference).into()),
                weights: None,
                offsets: Offsets { host: &offsets, view: (&offsets).into() },
            };
            for (k, &i) in order.iter().enumerate() {
                let got = columns.sequence(k).logp;
                assert_close("logps", &[got], &g.get("logps")[i..=i], 1e-11, 1e-10);
            }
            // DPO last: its gradient goes on.
            for (key, kind) in [
                ("loss_robust", PreferenceKind::Robust),
                ("loss_hinge", PreferenceKind::Hinge),
                ("loss_ipo", PreferenceKind::Ipo),
                ("loss_sigmoid_norm", PreferenceKind::SigmoidNorm),
                ("loss_apo_zero", PreferenceKind::ApoZero),
                ("loss_nca_pair", PreferenceKind::NcaPair),
                ("loss_sppo_hard", PreferenceKind::SppoHard),
                ("loss_sigmoid", PreferenceKind::Sigmoid),
                ("loss", PreferenceKind::Sigmoid),
            ] {
                let robust = kind == PreferenceKind::Robust;
                let s = PreferenceLoss {
                    terms: vec![(kind, 1.0)],
                    label_smoothing: if robust { 0.1 } else { 0.0 },
                    ..PreferenceLoss::default()
                };
                let of = PairCounts { pairs: pairs as f64, chosen_tokens };
                let d = c.dy.reborrow();
                let sums = preference_loss::forward(dev, d, columns, None, &s, of)?.get()?;
                assert_close(key, &[sums.loss], &[g.scalar(key)], 1e-11, 1e-10);
            }
            Ok(())
        })
        .unwrap();
    assert_gradients(&g, "grad/", (&model, &grads), stored(name));
    g.all_read(&[]);
}
