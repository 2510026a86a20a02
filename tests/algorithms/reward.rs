//! Reward modelling: pairs, margins and centring over the whole step.

use warpo::{Error, algorithms::Columns};

use crate::support::{
    assert_bits, assert_close,
    losses::{build, finish, scalar_loss},
    randn,
};

/// Pairs lie side by side; each sequence has one scalar.
fn columns(pairs: usize, margins: &[f32]) -> Columns<f32> {
    Columns {
        offsets: (0..=2 * pairs as u32).collect(),
        samples: (0..2 * pairs as u64).collect(),
        margins: margins.to_vec(),
        ..Columns::default()
    }
}

/// Loss and gradient, `per` pairs a micro-batch.
fn loss(c: &Columns<f32>, scores: &[f32], per: usize, centre: &str) -> (f64, Vec<f32>) {
    let mut reward = build("reward", &[&format!("center_coef={centre}")]).unwrap();
    let d = scalar_loss(&mut *reward, c, scores, 2 * per);
    (finish(&mut *reward)["loss"], d)
}

#[test]
fn hand_worked() {
    let mut reward = build("reward", &["center_coef=0.5"]).unwrap();
    // differences 0 and 3 - 1 - margin 2: both losses are ln 2; sums 2 and 4
    let d = scalar_loss(&mut *reward, &columns(2, &[0.0, 2.0]), &[1.0, 1.0, 3.0, 1.0], 4);
    // d / d chosen: (-1/2 + 2 * 0.5 * sum) / 2 pairs
    assert_bits("d", &d, &[0.75, 1.25, 1.75, 2.25]);
    let m = finish(&mut *reward);
    let want = 2.0f64.ln() + 0.5 * (4.0 + 16.0) / 2.0;
    assert_close("loss", &[m["loss"]], &[want], 0.0, 1e-15);
    assert_eq!((m["accuracy"], m["reward_margin"], m["reward_mean"]), (0.5, 1.0, 1.5));
    scalar_loss(&mut *reward, &columns(1, &[]), &[2.0, 1.0], 2);
    assert_eq!(finish(&mut *reward)["accuracy"], 1.0, "nothing is left of the step before");
}

/// Property 4: each pair keeps its own margin, and its gradient to the bit.
#[test]
fn whole_step_denominators() {
    let scores: Vec<f32> = randn("scores", 14);
    let margins: Vec<f32> = randn("margins", 7);
    for margins in [&margins[..], &[]] {
        let c = columns(7, margins);
        let (whole, d) = loss(&c, &scores, 7, "0.01");
        for per in 1..7 {
            let (split, same) = loss(&c, &scores, per, "0.01");
            assert_bits("d", &same, &d);
            assert_close("loss", &[split], &[whole], 0.0, 1e-14);
        }
    }
}

#[test]
fn order_and_repetition_do_not_change_the_mean() {
    let scores: Vec<f32> = randn("scores", 10);
    let margins: Vec<f32> = randn("margins", 5);
    let (want, d) = loss(&columns(5, &margins), &scores, 5, "0.1");
    let pick = |order: &[usize]| {
        let margins: Vec<f32> = order.iter().map(|i| margins[*i]).collect();
        let scores: Vec<f32> =
            order.iter().flat_map(|i| [scores[2 * i], scores[2 * i + 1]]).collect();
        loss(&columns(order.len(), &margins), &scores, order.len(), "0.1")
    };
    let (permuted, moved) = pick(&[3, 1, 4, 0, 2]);
    assert_close("permuted", &[permuted], &[want], 0.0, 1e-14);
    assert_bits("permuted", &moved[..2], &d[6..8]);
    let (twice, half) = pick(&[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]);
    assert_close("twice", &[twice], &[want], 0.0, 1e-14);
    let doubled: Vec<f32> = half.iter().map(|d| 2.0 * d).collect();
    assert_bits("twice", &doubled, &[&d[..], &d].concat());
}

/// Only the difference counts, unless scores are centred; and a margin is a shift of it.
#[test]
fn a_shift_of_all_scores_changes_nothing() {
    // exact in f32, shifted or not
    let scores = [0.5, -0.25, 1.5, 2.0, -1.0, 0.75];
    let shifted: Vec<f32> = scores.iter().map(|s| s + 4.0).collect();
    let c = columns(3, &[]);
    let ((a, da), (b, db)) = (loss(&c, &scores, 3, "0"), loss(&c, &shifted, 3, "0"));
    assert_eq!(a.to_bits(), b.to_bits());
    assert_bits("d", &da, &db);
    assert!(loss(&c, &shifted, 3, "0.01").0 > loss(&c, &scores, 3, "0.01").0 + 0.1);
    // chosen pushes up as much as rejected pushes down
    assert!(da.chunks(2).all(|d| d[0] == -d[1] && d[0] < 0.0), "{da:?}");
    let margin = [0.5; 3];
    let lower: Vec<f32> = scores.chunks(2).flat_map(|s| [s[0] - 0.5, s[1]]).collect();
    let (with, _) = loss(&columns(3, &margin), &scores, 3, "0");
    assert_eq!(with.to_bits(), loss(&c, &lower, 3, "0").0.to_bits());
}

/// Property 9: a bad number is not lost in the mean.
#[test]
fn a_bad_number_shows() {
    let (scores, margins): (Vec<f32>, Vec<f32>) = (randn("scores", 6), randn("margins", 3));
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for i in 0..6 {
            let mut bad = scores.clone();
            bad[i] = value;
            let (loss, d) = loss(&columns(3, &margins), &bad, 1, "0.1");
            assert!(!loss.is_finite() && d.iter().any(|d| !d.is_finite()), "{value} {i}");
        }
    }
    for i in 0..3 {
        let mut bad = margins.clone();
        bad[i] = f32::NAN;
        assert!(loss(&columns(3, &bad), &scores, 3, "0").1[2 * i].is_nan());
    }
}

#[test]
fn a_wrong_setting_is_a_wrong_configuration() {
    let error = build("reward", &["center_coef=-0.5"]).map(drop).unwrap_err();
    assert!(matches!(&error, Error::Config { key, .. } if key == "center_coef"), "{error:?}");
    assert_eq!(
        (error.to_string(), error.exit_code()),
        ("config key `center_coef`: got -0.5, wanted 0 or more".into(), 2)
    );
}
