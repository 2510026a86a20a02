//! The number types that ops are generic over: [`Element`]s are stored, [`Float`]s are computed in.

use half::bf16;

use super::elementary as math;

/// What buffers hold: `f32` or `f64`, in which the CPU computes, or `bf16`, which only a CUDA
/// device takes. An op that is generic over it serves both devices.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug {
    /// What sums, statistics and gradients of weights are kept in.
    type Acc: Float;
    /// Name in safetensors spelling: `BF16`, `F32`, `F64`
    const NAME: &'static str;

    /// Rounds from f64.
    fn of(x: f64) -> Self;
    /// Widens to f64.
    fn f64(self) -> f64;
}

impl Element for bf16 {
    type Acc = f32;
    const NAME: &'static str = "BF16";

    /// To nearest, ties to even. `bf16::from_f64` does not see the low half of a f64's mantissa,
    /// and takes what lies just above a tie for one.
    #[inline(always)]
    fn of(x: f64) -> Self {
        let near = x as f32;
        if f64::from(near) == x || !near.is_finite() {
            return bf16::from_f32(near);
        }
        // Toward 0, then odd: whatever was cut off keeps it from being a tie.
        let bits = near.to_bits() - u32::from(f64::from(near).abs() > x.abs());
        bf16::from_f32(f32::from_bits(bits | 1))
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        bf16::to_f64(self)
    }
}

impl Element for f32 {
    type Acc = Self;
    const NAME: &'static str = "F32";

    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }
}

impl Element for f64 {
    type Acc = Self;
    const NAME: &'static str = "F64";

    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
}

/// `f32` or `f64`.
///
/// The transcendental functions of `f32` are our own polynomials: they vectorise, and give the
/// same bits on every machine and instruction set. Those of `f64` are the standard library's.
pub trait Float:
    Element<Acc = Self>
    + PartialOrd
    + Default
    + std::fmt::Display
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    const NEG_INFINITY: Self;

    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn sqrt(self) -> Self;
    fn abs(self) -> Self;
    /// The larger; NaN if `self` is NaN (so that a bad number is not dropped from a maximum).
    fn max_nan(self, other: Self) -> Self;
    /// Exponential; 0 below about -87 in f32.
    fn exp(self) -> Self;
    /// Natural logarithm of a positive number.
    fn ln(self) -> Self;
    fn tanh(self) -> Self;
    fn erf(self) -> Self;
    /// Neither NaN nor infinite.
    fn is_finite(self) -> bool;
    fn is_nan(self) -> bool;

    /// The larger of two numbers, `self` if `other` is NaN.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
    /// The smaller of two numbers, `self` if `other` is NaN.
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        if other < self { other } else { self }
    }
    /// Into `[low, high]`; NaN stays NaN.
    #[inline(always)]
    fn clamp(self, low: Self, high: Self) -> Self {
        self.max(low).min(high)
    }
    /// Logistic function, without overflow or cancellation on either side.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let e = (-self.abs()).exp();
        let s = Self::ONE / (Self::ONE + e);
        if self < Self::ZERO { e * s } else { s }
    }
}

impl Float for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f32::abs(self)
    }
    #[inline(always)]
    fn max_nan(self, other: Self) -> Self {
        if self > other || self.is_nan() { self } else { other }
    }
    #[inline(always)]
    fn exp(self) -> Self {
        math::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        math::ln(self)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        math::tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        math::erf(f64::from(self)) as f32
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f32::is_nan(self)
    }
}

impl Float for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f64::abs(self)
    }
    #[inline(always)]
    fn max_nan(self, other: Self) -> Self {
        if self > other || self.is_nan() { self } else { other }
    }
    #[inline(always)]
    fn exp(self) -> Self {
        libm::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        libm::log(self)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        libm::tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        math::erf(self)
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f64::is_finite(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f64::is_nan(self)
    }
}
