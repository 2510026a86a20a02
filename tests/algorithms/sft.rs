//! Supervised fine-tuning: the mean over the whole step, whatever its order and its micro-batches.

use warpo::algorithms::Columns;

use crate::support::{
    assert_bits, assert_close,
    losses::{build, finish, policy_loss},
    randn,
};

fn columns(lens: &[u32]) -> Columns<f32> {
    let ends = lens.iter().scan(0, |at, n| {
        *at += n;
        Some(*at)
    });
    let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
    let n = offsets[lens.len()] as usize;
    let samples = (0..lens.len() as u64).collect();
    Columns { weights: vec![1.0; n], offsets, samples, ..Columns::default() }
}

const LENS: [u32; 6] = [3, 1, 7, 2, 5, 4];

/// Loss and gradient, `per` sequences a micro-batch.
fn loss(c: &Columns<f32>, logp: &[f32], per: usize) -> (f64, Vec<f32>) {
    let mut sft = build("sft", &[]).unwrap();
    let d = policy_loss(&mut *sft, c, logp, None, per);
    (finish(&mut *sft)["loss"], d)
}

#[test]
fn hand_worked() {
    let mut sft = build("sft", &[]).unwrap();
    let d = policy_loss(&mut *sft, &columns(&[2, 1]), &[-1.0, -2.0, -3.0], None, 1);
    assert_bits("d", &d, &[-1.0f32 / 3.0; 3]);
    let m = finish(&mut *sft);
    assert_eq!((m["loss"], m["learned_tokens"]), (2.0, 3.0));
    assert_close("perplexity", &[m["perplexity"]], &[2.0f64.exp()], 0.0, 1e-15);
    // a step later, nothing is left of it
    policy_loss(&mut *sft, &columns(&[1]), &[-5.0], None, 1);
    assert_eq!(finish(&mut *sft)["loss"], 5.0);
}

/// Tokens of probability 1 / 2, 1 / 4 and 1, over the three of the step.
#[test]
fn hand_worked_dft() {
    let mut sft = build("sft", &["dft=true"]).unwrap();
    let ln2 = std::f32::consts::LN_2;
    let d = policy_loss(&mut *sft, &columns(&[2, 1]), &[-ln2, -2.0 * ln2, 0.0], None, 1);
    let d: Vec<f64> = d.into_iter().map(f64::from).collect();
    assert_close("d", &d, &[-1.0 / 6.0, -1.0 / 12.0, -1.0 / 3.0], 0.0, 1e-6);
    let m = finish(&mut *sft);
    assert_close("loss", &[m["loss"]], &[2f64.ln() / 3.0], 0.0, 1e-6);
    assert!(!m.contains_key("perplexity"), "e to this loss is none");
}

/// Property 4: a micro-batch changes no bit of a token's gradient, and of the loss only rounding.
#[test]
fn whole_step_denominators() {
    let c = columns(&LENS);
    let logp: Vec<f32> = randn("logp", c.tokens());
    let (whole, d) = loss(&c, &logp, 6);
    for per in 1..6 {
        let (split, same) = loss(&c, &logp, per);
        assert_bits("d", &same, &d);
        assert_close("loss", &[split], &[whole], 0.0, 1e-14);
    }
}

#[test]
fn order_and_repetition_do_not_change_the_mean() {
    let c = columns(&LENS);
    let logp: Vec<f32> = randn("logp", c.tokens());
    let (want, d) = loss(&c, &logp, 6);
    let order = [4, 0, 5, 2, 1, 3];
    let shuffled = c.subset(&order);
    let logp_of = |order: &[usize]| -> Vec<f32> {
        order.iter().flat_map(|s| logp[c.span(&(*s..s + 1))].to_vec()).collect()
    };
    let (loss_of, same) = loss(&shuffled, &logp_of(&order), 6);
    assert_close("permuted", &[loss_of], &[want], 0.0, 1e-14);
    assert_bits("permuted", &same, &d);
    let twice: Vec<usize> = (0..6).chain(0..6).collect();
    let (loss_of, half) = loss(&c.subset(&twice), &logp_of(&twice), 6);
    assert_close("twice", &[loss_of], &[want], 0.0, 1e-14);
    let doubled: Vec<f32> = half.iter().map(|d| 2.0 * d).collect();
    assert_bits("twice", &doubled, &[&d[..], &d].concat());
}

/// Property 9: a bad number is not lost in the mean.
#[test]
fn a_bad_number_shows() {
    let c = columns(&LENS);
    let logp: Vec<f32> = randn("logp", c.tokens());
    for t in 0..c.tokens() {
        let mut bad = logp.clone();
        bad[t] = f32::NAN;
        assert!(loss(&c, &bad, 2).0.is_nan());
        let mut weights = c.clone();
        weights.weights[t] = f32::NAN;
        assert!(loss(&weights, &logp, 2).1.iter().any(|d| d.is_nan()));
    }
}
