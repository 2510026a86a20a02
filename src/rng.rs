//! Philox 4x32-10 (Salmon et al. 2011): random numbers that are addressed, not consumed.
//!
//! A number is a pure function of (seed, step, sample, position, purpose), so no draw depends on
//! batch order, micro-batch split, thread count or what was drawn before. The CUDA kernels use the
//! same function and give the same numbers.

/// What a draw is for. Distinct purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Choosing the next token.
    Sample = 1,
    /// The order of the training rows in an epoch.
    Shuffle = 2,
    /// The order of minibatches inside a PPO step.
    Minibatch = 3,
    /// Initial weights of a new head.
    Init = 4,
    /// Drawing preference pairs from labelled texts.
    Pairs = 5,
    /// Choosing the next token of a sample that rates a policy: no draw of its training.
    Evaluate = 6,
}

/// What a batch of draws shares; each of them adds its sample and its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step, from 0.
    pub step: u64,
    /// What the draws are for.
    pub purpose: Purpose,
}

impl Stream {
    /// The draws of samples that are made outside of a run.
    pub fn of_seed(seed: u64) -> Self {
        Self { seed, step: 0, purpose: Purpose::Sample }
    }

    /// The draws of one sample.
    pub fn sample(self, sample: u64) -> Philox {
        Philox::new(self.seed, self.step, sample, self.purpose)
    }
}

/// A stream of draws for one (seed, step, sample, purpose); index it by position.
#[derive(Clone, Copy, Debug)]
pub struct Philox {
    key: [u32; 2],
    step: u32,
    sample: u64,
    purpose: u32,
}

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// The bare block function: ten rounds over a 128-bit counter.
pub fn philox4x32(mut ctr: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(M0) * u64::from(ctr[0]);
        let p1 = u64::from(M1) * u64::from(ctr[2]);
        ctr = [
            (p1 >> 32) as u32 ^ ctr[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ ctr[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
    }
    ctr
}

impl Philox {
    /// The stream of `sample` at `step`. Only the low 28 bits of `step` are used; the purpose
    /// takes the other 4, so streams cannot meet.
    pub fn new(seed: u64, step: u64, sample: u64, purpose: Purpose) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            step: step as u32 & 0x0FFF_FFFF,
            sample,
            purpose: purpose as u32,
        }
    }

    /// Four independent 32-bit words at `position`.
    pub fn block(&self, position: u32) -> [u32; 4] {
        let s = self.sample;
        philox4x32([position, self.step | self.purpose << 28, s as u32, (s >> 32) as u32], self.key)
    }

    /// Uniform in [0, 1) with 24 bits, exact in f32.
    pub fn uniform(&self, position: u32) -> f32 {
        (self.block(position)[0] >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Standard normal (Box-Muller in f64, so every platform agrees to the last rounding).
    pub fn normal(&self, position: u32) -> f64 {
        let b = self.block(position);
        // (0, 1]: the logarithm stays finite
        let u = (f64::from(b[0]) + 1.0) / 4_294_967_296.0;
        let v = f64::from(b[1]) / 4_294_967_296.0;
        (-2.0 * libm::log(u)).sqrt() * libm::cos(std::f64::consts::TAU * v)
    }

    /// Uniform integer in `0..n`, without bias (Lemire 2019; 64-bit product, so the bias is
    /// below 2^-32 for any `n` that fits in 32 bits).
    pub fn below(&self, position: u32, n: u32) -> u32 {
        let b = self.block(position);
        let word = u64::from(b[0]) | u64::from(b[1]) << 32;
        ((u128::from(word) * u128::from(n)) >> 64) as u32
    }

    /// A permutation of `0..n`: Fisher-Yates on addressed draws.
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u32, i as u32 + 1) as usize);
        }
        order
    }
}
