//! Advantages without a value model: the rewards of a prompt's samples against each other.

use std::ops::Range;

crate::choices! {
    /// What becomes of the reward of a sample.
    pub enum Advantage {
        Group = "group",
        Mean = "mean",
        Batch = "batch",
        LeaveOneOut = "leave_one_out",
        LeaveOneOutStd = "leave_one_out_std",
        Opo = "opo",
        MaxRl = "max_rl",
        Return = "return",
        Remax = "remax",
        Token = "token",
        Gpg = "gpg",
    }
}

impl Advantage {
    /// The least samples of a prompt that it compares.
    pub fn least_group(self) -> usize {
        match self {
            Self::Return | Self::Remax | Self::Token => 1,
            Self::LeaveOneOutStd => 3,
            _ => 2,
        }
    }

    /// Whether it is one of tokens, not of samples: [`Advantage::of_tokens`].
    pub fn is_of_tokens(self) -> bool {
        matches!(self, Self::Return | Self::Remax | Self::Token)
    }

    /// The advantage of each token of a sample from the tokens' rewards, of which the last one has
    /// the score, too, and what the greedy sample of the prompt scored.
    pub fn of_tokens(self, rewards: &[f32], score: f64, greedy: f64) -> Vec<f32> {
        let last = rewards.len().saturating_sub(1);
        let mut out: Vec<f32> = rewards.to_vec();
        if self == Self::Token {
            out[..last].iter_mut().for_each(|r| *r = (f64::from(*r) + score) as f32);
            return out;
        }
        let baseline = if self == Self::Remax { greedy } else { 0.0 };
        let mut sum = 0.0;
        for r in out.iter_mut().rev() {
            sum += f64::from(*r);
            *r = (sum - baseline) as f32;
        }
        out
    }

    /// The advantage of each sample from its reward and length; the samples of a prompt, `group` of
    /// them, lie side by side. All are exactly 0 where the rewards of a group are equal.
    pub fn of(self, rewards: &[f64], lens: &[usize], group: usize, epsilon: f64) -> Vec<f64> {
        let all = match self {
            Self::Gpg => {
                rewards.iter().filter(|r| **r != 0.0).count() as f64 / rewards.len() as f64
            }
            _ => std(rewards) + epsilon,
        };
        let each = groups(rewards, group).flat_map(|g| {
            let (r, n) = (&rewards[g.clone()], &lens[g]);
            if equal(r) { vec![0.0; r.len()] } else { self.in_group(r, n, all, epsilon) }
        });
        each.collect()
    }

    fn in_group(self, r: &[f64], lens: &[usize], all: f64, epsilon: f64) -> Vec<f64> {
        let mean = mean(r);
        let centred = |scale: f64| r.iter().map(|x| (x - mean) / scale).collect();
        let others = |i: usize| -> Vec<f64> { [&r[..i], &r[i + 1..]].concat() };
        match self {
            Self::Group => centred(std(r) + epsilon),
            Self::Batch | Self::Gpg => centred(all),
            Self::Mean | Self::Return | Self::Remax | Self::Token => centred(1.0),
            Self::LeaveOneOut => {
                r.iter().enumerate().map(|(i, x)| x - self::mean(&others(i))).collect()
            }
            Self::LeaveOneOutStd => {
                let one = |(i, x): (usize, &f64)| {
                    let others = others(i);
                    let scale = if equal(&others) { 1.0 } else { std(&others) + epsilon };
                    (x - self::mean(&others)) / scale
                };
                r.iter().enumerate().map(one).collect()
            }
            Self::Opo => {
                let weighted: f64 = r.iter().zip(lens).map(|(x, n)| x * *n as f64).sum();
                let baseline = weighted / lens.iter().sum::<usize>() as f64;
                r.iter().map(|x| x - baseline).collect()
            }
            Self::MaxRl if mean > 0.0 => centred(mean),
            // A mean that is no number shows.
            Self::MaxRl => r.iter().map(|_| if mean.is_nan() { mean } else { 0.0 }).collect(),
        }
    }
}

/// To mean 0 and standard deviation 1, over that plus epsilon; equal ones to 0.
pub fn normalize(x: &mut [f64], epsilon: f64) {
    let (mean, scale) = (mean(x), std(x) + epsilon);
    let is_equal = equal(x);
    x.iter_mut().for_each(|x| *x = if is_equal { 0.0 } else { (*x - mean) / scale });
}

/// The samples of each prompt.
fn groups(rewards: &[f64], group: usize) -> impl Iterator<Item = Range<usize>> {
    let n = rewards.len();
    (0..n).step_by(group.max(1)).map(move |i| i..(i + group.max(1)).min(n))
}

/// How many groups have equal rewards, and the mean standard deviation of a group.
pub fn spread(rewards: &[f64], group: usize) -> (f64, f64) {
    let all: Vec<f64> = groups(rewards, group).map(|g| std(&rewards[g])).collect();
    let flat = groups(rewards, group).filter(|g| equal(&rewards[g.clone()])).count();
    (flat as f64, mean(&all))
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// The unbiased standard deviation; 0 of one number, and of equal ones.
fn std(x: &[f64]) -> f64 {
    if equal(x) {
        return 0.0;
    }
    let mean = mean(x);
    let squares: f64 = x.iter().map(|x| (x - mean) * (x - mean)).sum();
    (squares / (x.len() - 1) as f64).sqrt()
}

fn equal(x: &[f64]) -> bool {
    x.iter().all(|y| *y == x[0])
}
