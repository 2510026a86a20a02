//! Rotary position embedding (Su et al. 2021): in each head, the pair `(x[i], x[i + d/2])` is
//! rotated by the angle `position * inv_freq[i]` (the "rotate half" pairing of Hugging Face).

use crate::{
    device::{
        Buffer, Device, Element, Float, View, ViewMut, Work,
        cuda::{self, Launch, kernels::rope as kernel},
    },
    error::{Error, Result},
    shape, simd,
};

/// How the angles depend on the position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `f[i] = theta^(-2i/d)`, before [`Frequencies`] change it.
    pub theta: f64,
    pub frequencies: Frequencies,
    /// On cosines and sines (Peng et al. 2023, the square root of 1 / t in eq. 15).
    pub attention_factor: f64,
}

/// What becomes of the frequencies `f[i]` of a model that sees longer texts than those that it was
/// pretrained on.
#[derive(Clone, Debug, PartialEq)]
pub enum Frequencies {
    Plain,
    /// `f / factor` (Chen et al. 2023).
    Linear {
        factor: f64,
    },
    /// A larger theta: `theta (factor L / max_position - (factor - 1))^(d / (d - 2))`, L being
    /// `longest`, at least `max_position` ("NTK-aware", bloc97 2023).
    Dynamic {
        factor: f64,
        max_position: f64,
        /// The longest sequence of the run: one for all rows, so that no row sees another.
        longest: f64,
    },
    /// Llama 3.1: wavelengths longer than `original / low_freq_factor` are stretched by `factor`,
    /// those shorter than `original / high_freq_factor` are kept, with a linear blend between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        /// Positions before the stretch.
        original: f64,
    },
    /// Stretched by `factor` but for those that turn often in `original` positions: more than
    /// `beta_fast` times, with a blend down to `beta_slow` times (Peng et al. 2023, section 3.2).
    Yarn {
        factor: f64,
        original: f64,
        beta_fast: f64,
        beta_slow: f64,
        /// Rounds the ends of the blend to whole pairs.
        truncate: bool,
    },
    /// `f[i] / factors[i]` (LongRoPE, Ding et al. 2024).
    Listed {
        factors: Vec<f64>,
    },
}

impl Rope {
    /// Without any change of frequencies.
    pub const fn plain(theta: f64) -> Self {
        Self { theta, frequencies: Frequencies::Plain, attention_factor: 1.0 }
    }

    /// The angle per position of each of the `d / 2` pairs of `d` channels that rotate.
    pub fn inv_freq(&self, d: usize) -> Vec<f64> {
        let width = d as f64;
        let theta = match self.frequencies {
            Frequencies::Dynamic { factor, max_position, longest } => {
                let grown = factor * longest.max(max_position) / max_position - (factor - 1.0);
                self.theta * libm::pow(grown, width / (width - 2.0))
            }
            _ => self.theta,
        };
        let frequency = |i: usize| {
            let f = libm::pow(theta, -2.0 * i as f64 / width);
            match &self.frequencies {
                Frequencies::Plain | Frequencies::Dynamic { .. } => f,
                Frequencies::Linear { factor } => f / factor,
                Frequencies::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                    let turns = original * f / std::f64::consts::TAU;
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0.0, 1.0);
                    f * keep + f / factor * (1.0 - keep)
                }
                Frequencies::Yarn { factor, original, beta_fast, beta_slow, truncate } => {
                    // The pair that turns so often.
                    let pair = |turns: f64| {
                        let length = libm::log(original / (turns * std::f64::consts::TAU));
                        width * length / (2.0 * libm::log(theta))
                    };
                    let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
                    if *truncate {
                        (low, high) = (low.floor(), high.ceil());
                    }
                    (low, high) = (low.max(0.0), high.min(width - 1.0));
                    if low == high {
                        high += 0.001;
                    }
                    let stretch = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f * (1.0 - stretch) + f / factor * stretch
                }
                Frequencies::Listed { factors } => f / factors.get(i).copied().unwrap_or(1.0),
            }
        };
        (0..d / 2).map(frequency).collect()
    }
}

/// Cosines and sines of all positions, computed in f64 and rounded once.
#[derive(Debug)]
pub struct Table<F: 'static> {
    /// `[positions][head_dim / 2]` pairs of cosine and sine, as two planes per row
    rows: Buffer<'static, F>,
    half: usize,
    positions: usize,
}

impl<F: Float> Table<F> {
    /// For heads of `head_dim` and positions below `positions`.
    pub fn new(dev: &Device, rope: &Rope, head_dim: usize, positions: usize) -> Result<Self> {
        Self::wide(dev, rope, (head_dim, head_dim), positions)
    }

    /// For `d` channels of a head of `width`: the first half of them at the beginning of its first
    /// half, the others at that of its second. What is beside them is not rotated.
    pub fn wide(
        dev: &Device,
        rope: &Rope,
        (d, width): (usize, usize),
        positions: usize,
    ) -> Result<Self> {
        let freq = rope.inv_freq(d);
        Self::of(dev, (freq.len().max(width / 2), positions), |p, i| {
            let Some(f) = freq.get(i) else { return (0.0, 1.0) };
            let (sin, cos) = libm::sincos(p as f64 * f);
            (sin * rope.attention_factor, cos * rope.attention_factor)
        })
    }

    /// Rotates nothing and multiplies heads of `width` by `factor` of their position.
    pub fn scaling(
        dev: &Device,
        width: usize,
        positions: usize,
        factor: impl Fn(usize) -> f64,
    ) -> Result<Self> {
        Self::of(dev, (width / 2, positions), |p, _| (0.0, factor(p)))
    }

    /// `turn` gives sine and cosine of a position's pair.
    fn of(
        dev: &Device,
        (half, positions): (usize, usize),
        turn: impl Fn(usize, usize) -> (f64, f64),
    ) -> Result<Self> {
        let mut rows = Buffer::new(dev, "the rotary table", positions * 2 * half)?;
        let fill = |rows: &mut [F]| {
            for (p, row) in rows.chunks_exact_mut((2 * half).max(1)).enumerate() {
                for i in 0..half {
                    let (sin, cos) = turn(p, i);
                    (row[i], row[half + i]) = (F::of(cos), F::of(sin));
                }
            }
        };
        match dev {
            Device::Cpu(_) => fill(rows.host_mut()),
            Device::Cuda(_) => {
                let mut all = vec![F::ZERO; rows.len()];
                fill(&mut all);
                dev.write(rows.view_mut(), &all)?;
            }
        }
        Ok(Self { rows, half, positions })
    }
}

impl<F: Float> Table<F> {
    /// Cosines and sines `[positions, head_dim]`, and how many positions there are.
    pub(super) fn angles(&self) -> (View<'_, F>, usize) {
        (self.rows.view(), self.positions)
    }

    /// Width of the heads that it is for.
    pub(super) fn head_dim(&self) -> usize {
        2 * self.half
    }
}

/// The heads that rotate: the first `heads` of each row of `row_len` elements.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub row_len: usize,
    pub heads: usize,
    pub head_dim: usize,
}

/// Rotates the first `heads` heads of each row of `x` `[rows, row_len]` in place, by the angle of
/// `positions[row]`; in f32 with the same bits on every device. 3 FLOPs an element, which is read
/// and written.
///
/// # Errors
/// [`Error::Shape`] if the heads do not fit the row or the table, [`Error::Value`] for a position
/// beyond the table; on a CUDA device that position's heads become NaN instead.
pub fn forward<T: Element>(
    dev: &Device,
    x: ViewMut<'_, T>,
    heads: Heads,
    positions: View<'_, u32>,
    table: &Table<T::Acc>,
) -> Result<()> {
    let _op = dev.op("rope", || work::<T>(positions.len(), heads));
    rotate(dev, x, heads, positions, table, T::Acc::ONE)
}

/// The gradient of [`forward`], in place: the rotation back.
pub fn backward<T: Element>(
    dev: &Device,
    dx: ViewMut<'_, T>,
    heads: Heads,
    positions: View<'_, u32>,
    table: &Table<T::Acc>,
) -> Result<()> {
    let _op = dev.op("rope::backward", || work::<T>(positions.len(), heads));
    rotate(dev, dx, heads, positions, table, -T::Acc::ONE)
}

fn work<T>(rows: usize, of: Heads) -> Work {
    let elements = rows * of.heads * of.head_dim;
    Work::moves::<T>(2 * elements).flops(3.0 * elements as f64)
}

fn rotate<T: Element>(
    dev: &Device,
    x: ViewMut<'_, T>,
    Heads { row_len, heads, head_dim }: Heads,
    positions: View<'_, u32>,
    table: &Table<T::Acc>,
    sign: T::Acc,
) -> Result<()> {
    let (rows, half) = (positions.len(), head_dim / 2);
    shape::check("rope", "x", &[rows, row_len], x.len())?;
    // An odd head has an element without a partner.
    if half == 0 || head_dim != 2 * table.half || heads > row_len / head_dim {
        return Err(Error::shape("rope", "heads", &[row_len, 2 * table.half], &[heads, head_dim]));
    }
    match dev {
        Device::Cpu(cpu) => {
            let (x, positions, angles) = (x.float()?.host(), positions.host(), table.rows.host());
            if let Some(r) = positions.iter().position(|p| *p as usize >= table.positions) {
                let want = format!("less than {}", table.positions);
                return Err(Error::value(format!("rope: position of row {r}"), want, positions[r]));
            }
            cpu.rows(rows, 16, (x, row_len), |range, x| {
                for (x, p) in x.chunks_exact_mut(row_len.max(1)).zip(&positions[range]) {
                    let row = &angles[*p as usize * 2 * half..][..2 * half];
                    rotate_row(cpu.isa(), &mut x[..heads * head_dim], head_dim, row, sign);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let (angles, entries) = (table.rows.view(), table.positions);
            let begins = [x.address(), angles.address()];
            let width = cuda::width::<T>(&[half, row_len], &begins);
            let launch = Launch::threads(rows * heads * (half / width), kernel::THREADS)?;
            kernel::Rotate {
                x,
                positions,
                table: angles,
                rows,
                row_len,
                heads,
                half,
                entries,
                sign,
                width,
            }
            .launch(cuda, launch)
        }
    }
}

simd! {
    fn rotate_row[F: Float](x: &mut [F], head_dim: usize, angles: &[F], sign: F) {
        let half = head_dim / 2;
        let (cos, sin) = angles.split_at(half);
        for head in x.chunks_exact_mut(head_dim) {
            let (a, b) = head.split_at_mut(half);
            for i in 0..half {
                let s = sin[i] * sign;
                let (u, v) = (a[i], b[i]);
                a[i] = u * cos[i] - v * s;
                b[i] = v * cos[i] + u * s;
            }
        }
    }
}
