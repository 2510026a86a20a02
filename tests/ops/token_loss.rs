//! What all losses over tokens share: weights. Each loss's own file has its values.

use warpo::{
    device::{Buffer, Device, Float},
    ops::{
        bradley_terry::{self, PairSums, Pairs},
        policy_loss::{self, PolicyLoss, PolicySums, PolicyTokens, Surrogate},
        sequence_loss::Offsets,
        value_loss::{self, ValueLoss, ValueSums, ValueTokens},
    },
};

use crate::support::{
    assert_close, host, randn, refusal,
    sim::{self, Column, FloatCase, Lab, rounded},
};

#[derive(Debug)]
struct Losses<F> {
    ppo: (PolicySums, Vec<F>),
    value: (ValueSums, Vec<F>),
    pairs: (PairSums, Vec<F>),
}

/// All losses over `n` tokens or `n / 2` pairs.
fn losses<F: Float>(
    dev: &Device,
    columns: &[Vec<F>; 4],
    weights: Option<&[F]>,
) -> warpo::Result<Losses<F>> {
    let [a, b, c, d] = columns.each_ref().map(|x| Column::of(dev, 1, x));
    let n = columns[0].len();
    let half = weights.map(|w| Column::of(dev, 1, &w[..n / 2]));
    let weights = weights.map(|w| Column::of(dev, 1, w));
    let weights = weights.as_ref().map(Column::view);
    let ends = [0, n as u32];
    let offsets = Buffer::of(dev, "offsets", &ends)?;
    let mut out = [(); 3].map(|()| Column::room(dev, 1, n));
    let [dlogp, dv, dscores] = &mut out;
    let t = PolicyTokens {
        logp: a.view(),
        old_logp: b.view(),
        ref_logp: None,
        entropy: Some(c.view()),
        advantages: d.view(),
        weights,
        offsets: Offsets { host: &ends, view: offsets.view() },
    };
    let surrogate = Surrogate::Clip { low: 0.2, high: 0.3, dual: Some(1.5) };
    let s = PolicyLoss { surrogate, entropy_coef: 0.5, ..PolicyLoss::default() };
    let ppo = policy_loss::forward(dev, dlogp.view_mut(), None, t, &s, 7.0)?.get()?;
    let t = ValueTokens { v: a.view(), old: b.view(), returns: c.view(), weights };
    let s = ValueLoss { clip: Some(0.2), coef: 0.5 };
    let value = value_loss::forward(dev, dv.view_mut(), t, s, 7.0)?.get()?;
    let none = Column::of(dev, 0, &[]);
    let weights = half.as_ref().map(Column::view);
    let t = Pairs { scores: a.view(), margins: none.view(), weights };
    let pairs = bradley_terry::forward(dev, dscores.view_mut(), t, 0.1, 7.0)?.get()?;
    let [dlogp, dv, dscores] = out.each_ref().map(Column::read);
    Ok(Losses { ppo: (ppo, dlogp), value: (value, dv), pairs: (pairs, dscores) })
}

fn columns<F: Float>(n: usize) -> [Vec<F>; 4] {
    ["a", "b", "c", "d"].map(|name| randn(name, n))
}

/// A weight of 2 counts as a token that is there twice, one of 0 as none.
#[test]
fn a_weight_repeats_its_token() {
    let columns = columns::<f64>(4);
    let ours = losses(host(), &columns, Some(&[2.0, 0.0, 1.0, 1.0])).unwrap();
    let twice = columns.each_ref().map(|x| vec![x[0], x[0], x[2], x[3]]);
    let want = losses(host(), &twice, None).unwrap();
    let plain = losses(host(), &columns, None).unwrap();
    let ppo = |s: &PolicySums| [s.tokens, s.loss, s.policy, s.entropy, s.approx_kl, s.clipped_low];
    let value = |s: &ValueSums| [s.tokens, s.loss, s.value, s.clipped, s.squared_error];
    assert_close("ppo", &ppo(&ours.ppo.0), &ppo(&want.ppo.0), 1e-15, 1e-14);
    assert_close("value", &value(&ours.value.0), &value(&want.value.0), 1e-15, 1e-14);
    for (ours, plain) in [(&ours.ppo.1, &plain.ppo.1), (&ours.value.1, &plain.value.1)] {
        let weighted = [2.0 * plain[0], 0.0, plain[2], plain[3]];
        assert_close("gradients", ours, &weighted, 0.0, 0.0);
    }
    let (ours, plain) = (ours.pairs, plain.pairs.1);
    assert_eq!(ours.0.pairs, 2.0, "the first pair twice");
    assert_close("pairs", &ours.1, &[2.0 * plain[0], 2.0 * plain[1], 0.0, 0.0], 0.0, 0.0);
}

struct Weighted(usize);

impl FloatCase for Weighted {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let columns = ["a", "b", "c", "d"].map(|name| rounded(name, self.0));
        let weights = rounded::<F>("weights", self.0);
        let Losses { ppo, value, pairs } = losses(lab.dev(), &columns, Some(&weights))?;
        lab.sums("sums", &[ppo.0.tokens, ppo.0.loss, value.0.tokens, value.0.loss]);
        lab.sums("pairs", &[pairs.0.pairs, pairs.0.loss, pairs.0.score]);
        lab.column("dlogp", &ppo.1);
        lab.column("dv", &value.1);
        lab.column("dscores", &pairs.1);
        Ok(())
    }
}

#[test]
fn kernels_weight_tokens_as_the_cpu() {
    sim::check(|sim| [2, 6, 1030].into_iter().for_each(|n| sim.hold_f32(&Weighted(n))));
}

#[test]
fn as_many_weights_as_tokens_are_wanted() {
    let e = refusal(losses(host(), &columns::<f32>(4), Some(&[1.0; 3])));
    assert_eq!(e, "policy_loss: `weights` has shape [3], wanted [4]");
}
