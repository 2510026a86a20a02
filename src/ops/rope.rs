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
pub enum Rope {
    /// `inv_freq[i] = theta^(-2i/d)`
    Plain { theta: f64 },
    /// Llama 3.1: wavelengths longer than `original_max_position / low_freq_factor` are stretched
    /// by `factor`, those shorter than `original_max_position / high_freq_factor` are kept, with a
    /// linear blend between.
    #[allow(missing_docs)]
    Llama3 {
        theta: f64,
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position: f64,
    },
}

impl Rope {
    /// The angle per position of each of the `head_dim / 2` pairs.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f64> {
        let (Self::Plain { theta } | Self::Llama3 { theta, .. }) = self;
        let plain = (0..head_dim / 2).map(|i| libm::pow(*theta, -2.0 * i as f64 / head_dim as f64));
        match *self {
            Self::Plain { .. } => plain.collect(),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
                ..
            } => {
                let stretch = |f: f64| {
                    let turns = original_max_position * f / std::f64::consts::TAU;
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0.0, 1.0);
                    f * keep + f / factor * (1.0 - keep)
                };
                plain.map(stretch).collect()
            }
        }
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

    /// For heads of `head_dim` that lie in wider ones: the first half of each at the beginning of a
    /// half of `width`. What is beside them is not rotated.
    pub fn wide(
        dev: &Device,
        rope: &Rope,
        (head_dim, width): (usize, usize),
        positions: usize,
    ) -> Result<Self> {
        let mut freq = rope.inv_freq(head_dim);
        freq.resize(freq.len().max(width / 2), 0.0);
        let half = freq.len();
        let mut rows = Buffer::new(dev, "the rotary table", positions * 2 * half)?;
        let fill = |rows: &mut [F]| {
            for (p, row) in rows.chunks_exact_mut((2 * half).max(1)).enumerate() {
                for (i, f) in freq.iter().enumerate() {
                    let (sin, cos) = libm::sincos(p as f64 * f);
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
