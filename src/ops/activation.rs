//! Activation functions, plain and gated (SwiGLU and its relatives: Shazeer 2020).

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::Isa,
        cuda::{self, Launch, kernels::activation as kernel},
    },
    error::Result,
    shape, simd,
};

/// An elementwise activation. `kernels/activation.cu` knows them by their places here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: Hugging Face's `gelu_new` and
    /// `gelu_pytorch_tanh` (Hendrycks and Gimpel 2016)
    GeluTanh,
    /// `x/2 (1 + erf(x / sqrt(2)))`
    Gelu,
    /// `x sigmoid(x)`
    Silu,
    /// `max(x, 0)`
    Relu,
    /// `x sigmoid(1.702 x)`
    QuickGelu,
}

impl Activation {
    /// The activation of a `config.json`.
    pub fn from_hf_name(name: &str) -> Option<Self> {
        Some(match name {
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "gelu" => Self::Gelu,
            "silu" | "swish" => Self::Silu,
            "relu" => Self::Relu,
            "quick_gelu" => Self::QuickGelu,
            _ => return None,
        })
    }
}

/// A gated activation: `act(gate) * up`, or, with a limit, `act(min(gate, limit)) * (1 + clamp(up,
/// -limit, limit))` (gpt-oss), where nothing flows back through what was cut off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Glu {
    pub act: Activation,
    /// More than 0.
    pub limit: Option<f32>,
}

impl Glu {
    /// Limits, and what is added to `up`.
    fn bounds<F: Float>(self) -> (F, F) {
        let limit = self.limit.map(f64::from);
        (F::of(limit.unwrap_or(f64::INFINITY)), if limit.is_some() { F::ONE } else { F::ZERO })
    }

    /// The limit as kernels take it, 0 for none.
    pub(super) fn kernel_limit<F: Element>(self) -> F {
        F::of(self.limit.map_or(0.0, f64::from))
    }

    /// A row of it.
    pub(super) fn row<F: Float>(self, isa: Isa, y: &mut [F], gate: &[F], up: &[F]) {
        gated(isa, self.act, self.bounds(), y, gate, up);
    }

    /// The gradients of a row, in `d` side by side, as gate and up are in `gate_up`.
    pub(super) fn row_backward<F: Float>(self, isa: Isa, d: &mut [F], dy: &[F], gate_up: &[F]) {
        gated_row_backward(isa, self.act, self.bounds(), d, dy, gate_up);
    }
}

/// Elements of a task: enough work to be worth handing over.
const GRAIN: usize = 2048;

/// `y = act(x)`, elementwise.
///
/// Reads x, writes y.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ, [`crate::Error::Device`] if a buffer does not
/// begin at a multiple of 16 bytes on a CUDA device.
pub fn forward<T: Element>(
    dev: &Device,
    act: Activation,
    y: ViewMut<'_, T>,
    x: View<'_, T>,
) -> Result<()> {
    shape::check("activation", "y", &[x.len()], y.len())?;
    let _op = dev.op("activation", || Work::moves::<T>(2 * x.len()));
    match dev {
        Device::Cpu(cpu) => {
            let (y, x) = (y.float()?.host(), x.float()?.host());
            cpu.rows(y.len(), GRAIN, (y, 1), |range, y| plain(cpu.isa(), act, y, &x[range]));
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::packets::<T>(x.len(), kernel::THREADS)?;
            kernel::Forward { y, x, count: x.len() as u64, act: act as usize }.launch(cuda, launch)
        }
    }
}

/// `dx = dy act'(x)`, elementwise.
///
/// Reads both, writes dx.
pub fn backward<T: Element>(
    dev: &Device,
    act: Activation,
    dx: ViewMut<'_, T>,
    dy: View<'_, T>,
    x: View<'_, T>,
) -> Result<()> {
    shape::check("activation::backward", "dx", &[x.len()], dx.len())?;
    shape::check("activation::backward", "dy", &[x.len()], dy.len())?;
    let _op = dev.op("activation::backward", || Work::moves::<T>(3 * x.len()));
    match dev {
        Device::Cpu(cpu) => {
            let (dx, dy, x) = (dx.float()?.host(), dy.float()?.host(), x.float()?.host());
            cpu.rows(dx.len(), GRAIN, (dx, 1), |range, dx| {
                plain_backward(cpu.isa(), act, dx, &dy[range.clone()], &x[range]);
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::packets::<T>(x.len(), kernel::THREADS)?;
            kernel::Backward { dx, dy, x, count: x.len() as u64, act: act as usize }
                .launch(cuda, launch)
        }
    }
}

/// `y = act(gate) * up`: `gate_up` `[rows, 2 cols]` holds gate and up side by side, `y`
/// `[rows, cols]`.
///
/// Reads `2 * rows * cols` elements, writes half as many.
pub fn gated_forward<T: Element>(
    dev: &Device,
    act: Activation,
    y: ViewMut<'_, T>,
    gate_up: View<'_, T>,
    cols: usize,
) -> Result<()> {
    let rows = shape::rows("gated activation", "y", y.len(), cols)?;
    shape::check("gated activation", "gate_up", &[rows, 2 * cols], gate_up.len())?;
    let _op = dev.op("activation::gated_forward", || Work::moves::<T>(3 * rows * cols));
    match dev {
        Device::Cpu(cpu) => {
            let (y, x) = (y.float()?.host(), gate_up.float()?.host());
            cpu.rows(rows, GRAIN.div_ceil(cols), (y, cols), |range, y| {
                let x = x[range.start * 2 * cols..].chunks(2 * cols);
                for (y, x) in y.chunks_exact_mut(cols).zip(x) {
                    let (gate, up) = x.split_at(cols);
                    Glu { act, limit: None }.row(cpu.isa(), y, gate, up);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let width = cuda::width::<T>(&[cols], &[y.address(), gate_up.address()]);
            let launch = Launch::threads(rows * (cols / width), kernel::THREADS)?;
            kernel::GatedForward { y, gate_up, rows, cols, act: act as usize, width }
                .launch(cuda, launch)
        }
    }
}

/// Gradients of [`gated_forward`]: `dgate = dy up act'(gate)`, `dup = dy act(gate)`, side by side.
///
/// Reads `3 * rows * cols` elements, writes `2 * rows * cols`.
pub fn gated_backward<T: Element>(
    dev: &Device,
    act: Activation,
    dgate_up: ViewMut<'_, T>,
    dy: View<'_, T>,
    gate_up: View<'_, T>,
    cols: usize,
) -> Result<()> {
    let rows = shape::rows("gated activation::backward", "dy", dy.len(), cols)?;
    shape::check("gated activation::backward", "gate_up", &[rows, 2 * cols], gate_up.len())?;
    shape::check("gated activation::backward", "dgate_up", &[rows, 2 * cols], dgate_up.len())?;
    let _op = dev.op("activation::gated_backward", || Work::moves::<T>(5 * rows * cols));
    match dev {
        Device::Cpu(cpu) => {
            let dx = dgate_up.float()?.host();
            let (dy, x) = (dy.float()?.host(), gate_up.float()?.host());
            cpu.rows(rows, GRAIN.div_ceil(cols), (dx, 2 * cols), |range, dx| {
                for (dx, r) in dx.chunks_exact_mut(2 * cols).zip(range) {
                    let (dy, x) = (&dy[r * cols..][..cols], &x[r * 2 * cols..][..2 * cols]);
                    Glu { act, limit: None }.row_backward(cpu.isa(), dx, dy, x);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let begins = [dgate_up.address(), dy.address(), gate_up.address()];
            let width = cuda::width::<T>(&[cols], &begins);
            let launch = Launch::threads(rows * (cols / width), kernel::THREADS)?;
            let act = act as usize;
            kernel::GatedBackward { dgate_up, dy, gate_up, rows, cols, act, width }
                .launch(cuda, launch)
        }
    }
}

/// Calls `$f` with the activation as a constant, so that each loop is compiled for one function.
macro_rules! with {
    ($act:expr, |$value:ident| $body:expr) => {
        match $act {
            Activation::GeluTanh => {
                let $value = gelu_tanh;
                $body
            }
            Activation::Gelu => {
                let $value = gelu;
                $body
            }
            Activation::Silu => {
                let $value = silu;
                $body
            }
            Activation::Relu => {
                let $value = relu;
                $body
            }
            Activation::QuickGelu => {
                let $value = quick_gelu;
                $body
            }
        }
    };
}

simd! {
    fn plain[F: Float](act: Activation, y: &mut [F], x: &[F]) {
        with!(act, |f| for (y, x) in y.iter_mut().zip(x) {
            *y = f(*x).0;
        });
    }

    fn plain_backward[F: Float](act: Activation, dx: &mut [F], dy: &[F], x: &[F]) {
        with!(act, |f| for i in 0..dx.len() {
            dx[i] = dy[i] * f(x[i]).1;
        });
    }

    fn gated[F: Float](
        act: Activation, bounds: (F, F), y: &mut [F], gate: &[F], up: &[F],
    ) {
        let (limit, more) = bounds;
        with!(act, |f| for i in 0..y.len() {
            y[i] = f(gate[i].min(limit)).0 * (up[i].clamp(-limit, limit) + more);
        });
    }

    fn gated_row_backward[F: Float](
        act: Activation, bounds: (F, F), d: &mut [F], dy: &[F], gate_up: &[F],
    ) {
        let (limit, more) = bounds;
        let (dgate, dup) = d.split_at_mut(dy.len());
        let (gate, up) = gate_up.split_at(dy.len());
        with!(act, |f| for i in 0..dy.len() {
            let (y, slope) = f(gate[i].min(limit));
            let (d, most) = (dy[i] * (up[i].clamp(-limit, limit) + more) * slope, up[i].abs());
            dgate[i] = if gate[i] > limit { F::ZERO } else { d };
            dup[i] = if most > limit { F::ZERO } else { dy[i] * y };
        });
    }
}

/// Each returns the value and the derivative.
#[inline(always)]
fn gelu_tanh<F: Float>(x: F) -> (F, F) {
    let (c, a) = (F::of((2.0 / std::f64::consts::PI).sqrt()), F::of(0.044_715));
    let (half, one) = (F::of(0.5), F::ONE);
    let x2 = x * x;
    let t = (c * x * (a * x2 + one)).tanh();
    let inner = c * (F::of(3.0) * a * x2 + one);
    (half * x * (one + t), half * (one + t) + half * x * (one - t * t) * inner)
}

#[inline(always)]
fn gelu<F: Float>(x: F) -> (F, F) {
    let (half, one) = (F::of(0.5), F::ONE);
    let cdf = half * (one + (x * F::of(std::f64::consts::FRAC_1_SQRT_2)).erf());
    let pdf = (-half * x * x).exp() * F::of(1.0 / (2.0 * std::f64::consts::PI).sqrt());
    (x * cdf, cdf + x * pdf)
}

#[inline(always)]
fn silu<F: Float>(x: F) -> (F, F) {
    let s = x.sigmoid();
    (x * s, s * (F::ONE + x * (F::ONE - s)))
}

#[inline(always)]
fn relu<F: Float>(x: F) -> (F, F) {
    if x > F::ZERO { (x, F::ONE) } else { (x * F::ZERO, F::ZERO) }
}

#[inline(always)]
fn quick_gelu<F: Float>(x: F) -> (F, F) {
    let k = F::of(1.702);
    let s = (k * x).sigmoid();
    (x * s, s * (F::ONE + k * x * (F::ONE - s)))
}
