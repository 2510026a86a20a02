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
    }
}

impl Advantage {
    /// The least samples of a prompt that it compares.
    pub fn least_group(self) -> usize {
        match self {
            Self::Return => 1,
            Self::LeaveOneOutStd => 3,
            _ => 2,
        }
    }

    /// The advantage of each sample from its reward and length; the samples of a prompt, `group` of
    /// them, lie side by side. All are exactly 0 where the rewards of a group are equal.
    pub fn of(self, rewards: &[f64], lens: &[usize], group: usize, epsilon: f64) -> Vec<f64> {
        let all = std(rewards);
        let each = groups(rewards, group).flat_map(|g| {
            let (r, n) = (&rewards[g.clone()], &lens[g]);
            match (self, equal(r)) {
                (Self::Return, _) => r.to_vec(),
                (_, true) => vec![0.0; r.len()],
                (_, false) => self.in_group(r, n, all, epsilon),
            }
        });
        each.collect()
    }

    fn in_group(self, r: &[f64], lens: &[usize], all: f64, epsilon: f64) -> Vec<f64> {
        let mean = mean(r);
        let centred = |scale: f64| r.iter().map(|x| (x - mean) / scale).collect();
        let others = |i: usize| -> Vec<f64> { [&r[..i], &r[i + 1..]].concat() };
        match self {
            Self::Group => centred(std(r) + epsilon),
            Self::Batch => centred(all + epsilon),
            Self::Mean | Self::Return => centred(1.0),
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
