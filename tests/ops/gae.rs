//! Advantage estimation: hand-worked sequences, goldens, what one sequence may not do to another.

use warpo::{
    device::{Buffer, Device, Float},
    ops::gae,
};

use crate::support::{
    assert_bits, assert_close, assert_earned, assert_refuses,
    golden::Golden,
    host, narrow, randn, refusal,
    sim::{self, Column, FloatCase, Lab, rounded},
    zeros,
};

/// Advantages and returns.
fn forward<F: Float>(
    rewards: &[F],
    values: &[F],
    offsets: &[u32],
    gamma: f64,
    lambda: f64,
) -> (Vec<F>, Vec<F>) {
    forward_on(host(), 0, [rewards, values], offsets, gamma, lambda).unwrap()
}

/// The same of columns that begin `first` elements into their memory.
fn forward_on<F: Float>(
    dev: &Device,
    first: usize,
    columns: [&[F]; 2],
    offsets: &[u32],
    gamma: f64,
    lambda: f64,
) -> warpo::Result<(Vec<F>, Vec<F>)> {
    let [mut advantages, mut returns] =
        [(); 2].map(|()| Column::room(dev, first, columns[0].len()));
    let [rewards, values] = columns.map(|x| Column::of(dev, first, x));
    let (a, ret) = (advantages.view_mut(), returns.view_mut());
    let (rewards, values) = (rewards.view(), values.view());
    let offsets = Buffer::of(dev, "offsets", offsets)?;
    let (gamma, lambda) = (F::of(gamma), F::of(lambda));
    let offsets = offsets.view();
    gae::forward(dev, a, ret, gae::RewardColumns { rewards, values, offsets, gamma, lambda })?;
    Ok((advantages.read(), returns.read()))
}

/// Sequences of three, none and two tokens.
const REWARDS: [f64; 5] = [1.0, 0.0, 2.0, -1.0, 3.0];
const VALUES: [f64; 5] = [2.0, 4.0, 1.0, 8.0, 2.0];
const OFFSETS: [u32; 4] = [0, 3, 3, 5];

#[test]
fn hand_worked() {
    // gamma = lambda = 1/2, from the end:
    //   2 - 1 = 1;  0 + 1/2 - 4 + 1/4 * 1 = -3.25;  1 + 4/2 - 2 + 1/4 * -3.25 = 0.1875
    //   3 - 2 = 1;  -1 + 2/2 - 8 + 1/4 * 1 = -7.75
    let (advantages, returns) = forward(&REWARDS, &VALUES, &OFFSETS, 0.5, 0.5);
    assert_eq!(advantages, [0.1875, -3.25, 1.0, -7.75, 1.0]);
    assert_eq!(returns, [2.1875, 0.75, 2.0, 0.25, 3.0]);
    // lambda 1: the discounted rewards to come, less the value
    let (advantages, returns) = forward(&REWARDS, &VALUES, &OFFSETS, 0.5, 1.0);
    assert_eq!(returns, [1.5, 1.0, 2.0, 0.5, 3.0]);
    assert_eq!(advantages, [-0.5, -3.0, 1.0, -7.5, 1.0]);
    // lambda 0: one step ahead
    let (advantages, returns) = forward(&REWARDS, &VALUES, &OFFSETS, 0.5, 0.0);
    assert_eq!(returns, [3.0, 0.5, 2.0, 0.0, 3.0]);
    assert_eq!(advantages, [1.0, -3.5, 1.0, -8.0, 1.0]);
    // gamma 0: each reward for itself
    assert_eq!(forward(&REWARDS, &VALUES, &OFFSETS, 0.0, 0.9).1, REWARDS);
    for offsets in [&[][..], &[0], &[0, 0, 0]] {
        assert!(forward::<f64>(&[], &[], offsets, 1.0, 0.95).0.is_empty());
    }
}

#[test]
fn ragged_sequences_are_those_of_trl() {
    let g = Golden::open("pure/gae.safetensors");
    let (lengths, cols) = (g.ints("lengths"), g.shape("rewards")[1]);
    let mask: Vec<bool> =
        lengths.iter().flat_map(|n| (0..cols).map(move |t| t < *n as usize)).collect();
    let golden_mask: Vec<bool> = g.ints("mask").iter().map(|m| *m == 1).collect();
    assert_eq!(mask, golden_mask);
    let mut offsets = vec![0];
    lengths.iter().for_each(|n| offsets.push(offsets.last().unwrap() + *n as u32));
    let (rewards, values) = (g.kept("rewards", &mask), g.kept("values", &mask));
    for (gamma, lambda) in [("1.0", "0.95"), ("0.99", "0.95"), ("1.0", "1.0"), ("0.9", "0.0")] {
        let what = format!("g{gamma}_l{lambda}");
        let want = g.kept(&format!("{what}/advantages"), &mask);
        let want_returns = g.kept(&format!("{what}/returns"), &mask);
        let (gamma, lambda): (f64, f64) = (gamma.parse().unwrap(), lambda.parse().unwrap());
        let (advantages, returns) = forward(&rewards, &values, &offsets, gamma, lambda);
        assert_close(&what, &advantages, &want, 1e-14, 1e-14);
        assert_close(&what, &returns, &want_returns, 1e-14, 1e-14);

        let (r, v) = (narrow(&rewards), narrow(&values));
        let (advantages, returns) = forward(&r, &v, &offsets, gamma, lambda);
        let (plain, plain_returns) = plain(&r, &v, &lengths, gamma as f32, lambda as f32);
        assert_earned(&what, &advantages, &plain, &want);
        assert_earned(&what, &returns, &plain_returns, &want_returns);
    }
    g.all_read(&[]);
}

/// The sum of the definition, `A_t = sum_k (gamma lambda)^k delta_{t+k}`, in f32.
fn plain(r: &[f32], v: &[f32], lengths: &[i64], gamma: f32, lambda: f32) -> (Vec<f32>, Vec<f32>) {
    let (mut advantages, mut at) = (Vec::new(), 0);
    for n in lengths.iter().map(|n| *n as usize) {
        let next = |t: usize| if t + 1 < n { v[at + t + 1] } else { 0.0 };
        let delta = |t: usize| r[at + t] + gamma * next(t) - v[at + t];
        let sum = |t: usize| (t..n).map(|k| (gamma * lambda).powi((k - t) as i32) * delta(k)).sum();
        advantages.extend((0..n).map(sum).collect::<Vec<f32>>());
        at += n;
    }
    let returns = advantages.iter().zip(v).map(|(a, v)| a + v).collect();
    (advantages, returns)
}

#[test]
fn sequences_do_not_leak_into_each_other() {
    let (rewards, values): (Vec<f32>, Vec<f32>) = (randn("r", 40), randn("v", 40));
    let offsets = [0, 7, 7, 8, 25, 40];
    let (advantages, returns) = forward(&rewards, &values, &offsets, 0.99, 0.95);
    for w in offsets.windows(2) {
        let at = w[0] as usize..w[1] as usize;
        let (r, v) = (&rewards[at.clone()], &values[at.clone()]);
        let alone = forward(r, v, &[0, r.len() as u32], 0.99, 0.95);
        assert_bits("advantages alone", &alone.0, &advantages[at.clone()]);
        assert_bits("returns alone", &alone.1, &returns[at]);
    }
    // NaN in the fourth sequence reaches its own earlier tokens, and nothing else.
    for column in [0, 1] {
        let mut bad = [rewards.clone(), values.clone()];
        bad[column][20] = f32::NAN;
        let (a, _) = forward(&bad[0], &bad[1], &offsets, 0.99, 0.95);
        assert!(a[8..21].iter().all(|a| a.is_nan()));
        assert_bits("before", &a[..8], &advantages[..8]);
        assert_bits("after", &a[21..], &advantages[21..]);
    }
}

#[test]
fn a_reward_on_the_last_token_reaches_every_token() {
    let base = forward(&REWARDS, &VALUES, &OFFSETS, 1.0, 1.0).0;
    let mut rewards = REWARDS;
    rewards[2] += 16.0;
    let more = forward(&rewards, &VALUES, &OFFSETS, 1.0, 1.0).0;
    let gain: Vec<f64> = more.iter().zip(&base).map(|(a, b)| a - b).collect();
    assert_eq!(gain, [16.0, 16.0, 16.0, 0.0, 0.0]);
}

struct Sequences<'a> {
    first: usize,
    lens: &'a [usize],
    gamma: f64,
    lambda: f64,
}

fn offsets(lens: &[usize]) -> Vec<u32> {
    let mut out = vec![0];
    lens.iter().for_each(|n| out.push(out.last().unwrap() + *n as u32));
    out
}

impl FloatCase for Sequences<'_> {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let n = self.lens.iter().sum();
        let (rewards, values): (Vec<F>, Vec<F>) = (rounded("r", n), rounded("v", n));
        let (offsets, columns) = (offsets(self.lens), [&rewards[..], &values]);
        let (gamma, lambda) = (self.gamma, self.lambda);
        let (a, r) = forward_on(lab.dev(), self.first, columns, &offsets, gamma, lambda)?;
        lab.column("advantages", &a);
        lab.column("returns", &r);
        Ok(())
    }
}

/// No sequences, empty ones, one token, those around a warp's and a block's, three chunks of a
/// block.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        let most = [1, 0, 31, 32, 33, 2, 255, 256, 257, 600];
        for (first, lens, gamma, lambda) in [
            (0, &[][..], 1.0, 0.95),
            (0, &[0, 0], 1.0, 0.95),
            (0, &most, 1.0, 0.95),
            (1, &[67, 1, 300], 0.99, 1.0),
            (0, &[5, 40], 0.9, 0.0),
            (0, &[5, 40], 0.0, 0.9),
        ] {
            sim.hold_f32(&Sequences { first, lens, gamma, lambda });
        }
    });
}

/// A sequence has the same bits alone, among others and beside a packet; a NaN reaches its own
/// earlier tokens only.
#[test]
fn kernel_sequences_do_not_see_each_other() {
    sim::check(|sim| {
        let dev = sim.device(sim.orders()[1]);
        let run = |first, [r, v]: [&[f32]; 2], offsets: &[u32]| {
            forward_on(&dev, first, [r, v], offsets, 0.99, 0.95).unwrap()
        };
        let offsets = offsets(&[7, 0, 1, 300, 35]);
        let (r, v): (Vec<f32>, Vec<f32>) = (randn("r", 343), randn("v", 343));
        let (advantages, returns) = run(0, [&r, &v], &offsets);
        for w in offsets.windows(2) {
            let at = w[0] as usize..w[1] as usize;
            let alone = run(1, [&r[at.clone()], &v[at.clone()]], &[0, w[1] - w[0]]);
            assert_bits("advantages alone", &alone.0, &advantages[at.clone()]);
            assert_bits("returns alone", &alone.1, &returns[at]);
        }
        for column in [0, 1] {
            let mut bad = [r.clone(), v.clone()];
            bad[column][290] = f32::NAN;
            let a = run(0, [&bad[0], &bad[1]], &offsets).0;
            assert!(a[8..291].iter().all(|a| a.is_nan()));
            assert_bits("before", &a[..8], &advantages[..8]);
            assert_bits("after", &a[291..], &advantages[291..]);
        }
        // The kernel would follow them out of the columns.
        for (offsets, says) in [
            (&[0, 3, 2, 5][..], "gae: offsets: got 2 after 3, wanted ascending numbers"),
            (&[0, 6], "gae: offsets: got Some(0) to Some(6), wanted 0 to 5"),
        ] {
            let columns = [&r[..5], &v[..5]];
            assert_eq!(refusal(forward_on(&dev, 0, columns, offsets, 1.0, 1.0)), says);
        }
        let says = "device `cuda` is not available: `gae_forward` has no kernel for F64";
        let columns = [&REWARDS[..], &VALUES];
        assert_eq!(refusal(forward_on(&dev, 0, columns, &OFFSETS, 1.0, 1.0)), says);
    });
}

#[test]
fn wrong_columns_and_offsets_are_refused() {
    let forward = |n: [usize; 3], offsets: &[u32]| {
        let ([mut a, mut b, v], [r]) = (zeros(n), zeros([5]));
        let (a, b, r, v) = ((&mut a).into(), (&mut b).into(), (&r).into(), (&v).into());
        let of = gae::RewardColumns {
            rewards: r,
            values: v,
            offsets: offsets.into(),
            gamma: 1.0,
            lambda: 1.0,
        };
        gae::forward(&Device::cpu(), a, b, of)
    };
    assert_refuses("gae", "advantages [5] returns [5] values [5]", |n| forward(n, &[0, 5]));
    for (offsets, says) in [
        (&[0, 3, 2, 5][..], "got 2 after 3, wanted ascending numbers"),
        (&[1, 5], "got Some(1) to Some(5), wanted 0 to 5"),
        (&[0, 4], "got Some(0) to Some(4), wanted 0 to 5"),
        (&[0, 6], "got Some(0) to Some(6), wanted 0 to 5"),
        (&[5], "got Some(5) to Some(5), wanted 0 to 5"),
        (&[], "got None to None, wanted 0 to 5"),
    ] {
        assert_eq!(refusal(forward([5; 3], offsets)), format!("gae: offsets: {says}"));
    }
}
