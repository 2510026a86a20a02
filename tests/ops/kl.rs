//! Estimators of the KL: hand-worked values, goldens, and their gradients against the exact one,
//! by enumerating every sequence of a tiny vocabulary.

use warpo::{
    device::{Device, Float},
    ops::{
        gae,
        kl::KlEstimator::{self, K1, K2, K3},
        policy_loss::{self, KlTerm, KlWeight, PolicyLoss, PolicyTokens},
        sequence_loss::Offsets,
    },
};

use crate::support::{assert_close, assert_earned, golden::Golden, gradcheck, narrow, randn};

#[test]
fn hand_worked() {
    let ln2 = 2f64.ln();
    // the policy gives the token twice the reference's probability, then half of it
    for (k, logp, value, slope) in [
        (K1, ln2, ln2, 1.0),
        (K2, ln2, ln2 * ln2 / 2.0, ln2),
        (K3, ln2, ln2 - 0.5, 0.5),
        (K1, -ln2, -ln2, 1.0),
        (K2, -ln2, ln2 * ln2 / 2.0, -ln2),
        (K3, -ln2, 1.0 - ln2, -1.0),
        (K1, 0.0, 0.0, 1.0),
        (K2, 0.0, 0.0, 0.0),
        (K3, 0.0, 0.0, 0.0),
    ] {
        let what = format!("{k:?} {logp}");
        assert_close(&what, &[k.value(logp - 3.0, -3.0)], &[value], 1e-15, 1e-15);
        assert_close(&what, &[k.slope(logp - 3.0, -3.0)], &[slope], 1e-15, 1e-15);
    }
}

#[test]
fn values_and_slopes_are_those_of_pytorch() {
    let g = Golden::open("pure/kl.safetensors");
    let (logp, reference) = (g.get("logp"), g.get("ref"));
    fn each<F: Float>(f: impl Fn(F, F) -> F, a: &[F], b: &[F]) -> Vec<F> {
        a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()
    }
    let (a, b) = (narrow(logp), narrow(reference));
    let plain = |k, a: f32, b: f32| match k {
        K1 => (a - b, 1.0),
        K2 => (0.5 * (a - b) * (a - b), a - b),
        K3 => ((b - a).exp() - 1.0 - (b - a), 1.0 - (b - a).exp()),
    };
    for (name, k) in [("k1", K1), ("k2", K2), ("k3", K3)] {
        let (value, slope) = (g.get(name), g.get(&format!("d_{name}")));
        // e^-d - 1 cancels: what is near 1 is exact to 1e-16
        let got = each(|a, b| k.value(a, b), logp, reference);
        assert_close(name, &got, value, 1e-15, 1e-15);
        let got = each(|a, b| k.slope(a, b), logp, reference);
        assert_close(name, &got, slope, 1e-15, 1e-15);
        let got = each(|a, b| k.value(a, b), &a, &b);
        assert_earned(name, &got, &each(|a, b| plain(k, a, b).0, &a, &b), value);
        let got = each(|a, b| k.slope(a, b), &a, &b);
        assert_earned(name, &got, &each(|a, b| plain(k, a, b).1, &a, &b), slope);
    }
    g.all_read(&[]);
}

#[test]
fn gradients() {
    let (logp, reference): (Vec<f64>, Vec<f64>) = (randn("logp", 30), randn("ref", 30));
    for k in [K1, K2, K3] {
        let at = |f: fn(KlEstimator, f64, f64) -> f64, x: &[f64]| -> Vec<f64> {
            x.iter().zip(&reference).map(|(a, b)| f(k, *a, *b)).collect()
        };
        let slope = at(KlEstimator::slope, &logp);
        let sum = |x: &[f64]| at(KlEstimator::value, x).iter().sum();
        gradcheck(&format!("{k:?}"), &logp, &slope, crate::support::OP, sum);
    }
}

#[test]
fn a_nan_is_not_hidden() {
    for k in [K1, K2, K3] {
        assert!(k.value(f64::NAN, -1.0).is_nan() && k.value(-1.0, f64::NAN).is_nan(), "{k:?}");
    }
    for k in [K2, K3] {
        assert!(k.slope(f64::NAN, -1.0).is_nan() && k.slope(-1.0, f64::NAN).is_nan(), "{k:?}");
    }
}

/// Tokens of the vocabulary.
const V: usize = 8;

/// A model of sequences of two tokens: logits of the first `[V]`, then of the second for each
/// first `[V, V]`.
fn log_softmax(theta: &[f64]) -> Vec<f64> {
    let row = |z: &[f64]| {
        let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
        z.iter().map(|z| z - lse).collect::<Vec<f64>>()
    };
    theta.chunks(V).flat_map(row).collect()
}

/// Both predictions of the sequence (a, b), as indices of the log-probs.
fn places() -> Vec<[usize; 2]> {
    (0..V).flat_map(|a| (0..V).map(move |b| [a, V + a * V + b])).collect()
}

/// From the mean of `sum_t dlogp_t d logp_t / d theta` over all sequences, each weighted by its
/// probability: the expected gradient.
fn expected(logp: &[f64], dlogp: &[f64]) -> Vec<f64> {
    let mut grad = vec![0.0; logp.len()];
    for (s, places) in places().iter().enumerate() {
        let probability: f64 = places.iter().map(|p| logp[*p]).sum::<f64>().exp();
        for (t, place) in places.iter().enumerate() {
            let row = place / V * V;
            for u in row..row + V {
                let indicator = f64::from(u8::from(u == *place));
                grad[u] += probability * dlogp[2 * s + t] * (indicator - logp[u].exp());
            }
        }
    }
    grad
}

/// d loss / d logp of the tokens of all sequences, as the policy loss writes it on the first pass.
fn loss_gradient(
    logp: &[f64],
    reference: &[f64],
    advantages: &[f64],
    kl: Option<KlTerm>,
) -> Vec<f64> {
    let column = |x: &[f64]| places().concat().iter().map(|p| x[*p]).collect::<Vec<f64>>();
    let (logp, reference) = (column(logp), column(reference));
    let mut dlogp = vec![f64::NAN; logp.len()];
    let ends = [0, logp.len() as u32];
    let tokens = PolicyTokens {
        logp: (&logp).into(),
        old_logp: (&logp).into(),
        ref_logp: Some((&reference).into()),
        entropy: None,
        advantages: advantages.into(),
        weights: None,
        offsets: Offsets { host: &ends, view: (&ends[..]).into() },
    };
    let s = PolicyLoss { kl, ..PolicyLoss::default() };
    policy_loss::forward(&Device::cpu(), (&mut dlogp).into(), None, tokens, &s, 1.0)
        .unwrap()
        .get()
        .unwrap();
    dlogp
}

/// KL of one prediction.
fn kl_of(logp: &[f64], reference: &[f64], row: usize) -> f64 {
    (row * V..(row + 1) * V).map(|i| logp[i].exp() * (logp[i] - reference[i])).sum()
}

/// In the loss, the KL of each prediction counts, for the prefixes that were sampled: the mean
/// gradient is that of `KL(first) + sum_a p(a) KL(second | a)` with `p(a)` held fixed.
#[test]
fn in_the_loss_the_mean_gradient_is_the_exact_one() {
    let theta: Vec<f64> = randn("theta", V + V * V);
    let (logp, reference) = (log_softmax(&theta), log_softmax(&randn("ref", V + V * V)));
    let fixed: Vec<f64> = logp[..V].iter().map(|l| l.exp()).collect();
    let objective = |theta: &[f64]| {
        let logp = log_softmax(theta);
        let second = |a: usize| fixed[a] * kl_of(&logp, &reference, 1 + a);
        kl_of(&logp, &reference, 0) + (0..V).map(second).sum::<f64>()
    };
    let exact: Vec<f64> = (0..theta.len())
        .map(|i| {
            let row = i / V;
            let weight = if row == 0 { 1.0 } else { fixed[row - 1] };
            weight * logp[i].exp() * (logp[i] - reference[i] - kl_of(&logp, &reference, row))
        })
        .collect();
    gradcheck("the exact gradient", &theta, &exact, crate::support::OP, objective);

    let zeros = vec![0.0; 2 * V * V];
    let mean = |estimator, weight| {
        let term = KlTerm { coef: 1.0, estimator, weight };
        expected(&logp, &loss_gradient(&logp, &reference, &zeros, Some(term)))
    };
    for k in [K1, K3] {
        for weight in [KlWeight::Ratio, KlWeight::Score] {
            assert_close(&format!("{k:?} {weight:?}"), &mean(k, weight), &exact, 1e-10, 0.0);
        }
    }
    // Without the weight: k1 pulls nowhere, k2 is right, k3 follows the KL the other way round.
    assert_close("k1", &mean(K1, KlWeight::One), &vec![0.0; exact.len()], 1e-10, 0.0);
    assert_close("k2", &mean(K2, KlWeight::One), &exact, 1e-10, 0.0);
    let reversed: Vec<f64> = (0..theta.len())
        .map(|i| {
            let weight = if i < V { 1.0 } else { fixed[i / V - 1] };
            weight * (logp[i].exp() - reference[i].exp())
        })
        .collect();
    assert_close("k3", &mean(K3, KlWeight::One), &reversed, 1e-10, 0.0);
    let far = |x: &[f64]| x.iter().zip(&exact).any(|(a, b)| (a - b).abs() > 1e-2);
    assert!(far(&reversed) && far(&mean(K2, KlWeight::Ratio)) && far(&vec![0.0; exact.len()]));
}

/// In the reward, with gamma and lambda 1 and no value model, the mean policy gradient is that of
/// the KL of whole sequences, later tokens included: only k1 does that.
#[test]
fn in_the_reward_k1_gives_the_gradient_of_the_sequence_kl() {
    let theta: Vec<f64> = randn("theta", V + V * V);
    let (logp, reference) = (log_softmax(&theta), log_softmax(&randn("ref", V + V * V)));
    let objective = |theta: &[f64]| {
        let logp = log_softmax(theta);
        let second = |a: usize| logp[a].exp() * kl_of(&logp, &reference, 1 + a);
        kl_of(&logp, &reference, 0) + (0..V).map(second).sum::<f64>()
    };
    let mean = |k: KlEstimator| {
        let rewards: Vec<f64> =
            places().concat().iter().map(|p| -k.value(logp[*p], reference[*p])).collect();
        let n = rewards.len();
        let offsets: Vec<u32> = (0..=n as u32).step_by(2).collect();
        let (mut advantages, mut returns) = (vec![f64::NAN; n], vec![f64::NAN; n]);
        let (a, r, values) = ((&mut advantages).into(), (&mut returns).into(), vec![0.0; n]);
        let (values, offsets) = ((&values).into(), (&offsets).into());
        let dev = Device::cpu();
        let of = gae::RewardColumns {
            rewards: (&rewards).into(),
            values,
            offsets,
            gamma: 1.0,
            lambda: 1.0,
        };
        gae::forward(&dev, a, r, of).unwrap();
        expected(&logp, &loss_gradient(&logp, &reference, &advantages, None))
    };
    gradcheck("k1", &theta, &mean(K1), crate::support::OP, objective);
    let far = |x: &[f64]| x.iter().zip(mean(K1)).any(|(a, b)| (a - b).abs() > 1e-2);
    assert!(far(&mean(K2)) && far(&mean(K3)));
}
