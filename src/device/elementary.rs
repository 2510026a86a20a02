//! Elementary functions in plain arithmetic, so that they vectorise and give the same bits on
//! every machine.
//!
//! `exp`, `ln` and `tanh` are within 2 ulp of the true value over the whole range of f32
//! (measured by `tests/device/math.rs` against f64).

/// e^x. Cephes-style: x = n ln2 + r, a degree-5 polynomial in r, then scaling by 2^n in two steps
/// so that results below the normal range round instead of vanishing. Below -104 it is 0; above
/// 88.73 infinity; NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Written as selects, not branches, to vectorise.
    let c = if x > 89.0 { 89.0 } else { x };
    let c = if c < -104.0 { -104.0 } else { c };
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let n = c.mul_add(std::f32::consts::LOG2_E, MAGIC) - MAGIC;
    // ln 2 in two parts, so that n * HI is exact
    let r = n.mul_add(-0.693_359_4, c);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let n = n as i32; // NaN becomes 0 here, and p stays NaN
    let half = n >> 1;
    let scale = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    p * scale(half) * scale(n - half)
}

/// Natural logarithm of a positive number (Cephes polynomial). 0 gives -inf, negatives NaN.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    // Subnormals are scaled into the normal range first.
    let tiny = x < f32::MIN_POSITIVE;
    let scaled = if tiny { x * 8_388_608.0 } else { x };
    let bits = scaled.to_bits() as i32;
    // m in [sqrt(1/2), sqrt(2)), x = m * 2^e
    let e = (bits - 0x3F35_04F3) >> 23;
    let m = f32::from_bits((bits - (e << 23)) as u32);
    let e = e as f32 - if tiny { 23.0 } else { 0.0 };
    let f = m - 1.0;
    let z = f * f;
    let p = 7.037_683_6e-2f32;
    let p = p.mul_add(f, -1.151_461e-1);
    let p = p.mul_add(f, 1.167_699_9e-1);
    let p = p.mul_add(f, -1.242_014_1e-1);
    let p = p.mul_add(f, 1.424_932_3e-1);
    let p = p.mul_add(f, -1.666_805_8e-1);
    let p = p.mul_add(f, 2.000_071_5e-1);
    let p = p.mul_add(f, -2.499_999_4e-1);
    let p = p.mul_add(f, 0.333_333_3);
    let y = p * f * z;
    let y = e.mul_add(-2.121_944_4e-4, y);
    let y = z.mul_add(-0.5, y);
    let y = f + y;
    let y = e.mul_add(0.693_359_4, y);
    let y = if x == f32::INFINITY { f32::INFINITY } else { y };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    if x < 0.0 || x.is_nan() { f32::NAN } else { y }
}

/// Hyperbolic tangent: an odd polynomial below 0.625 (Cephes), else 1 - 2 / (e^2|x| + 1).
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let z = x * x;
    let p = -5.704_988_7e-3f32;
    let p = p.mul_add(z, 2.063_908_8e-2);
    let p = p.mul_add(z, -5.373_971_4e-2);
    let p = p.mul_add(z, 1.333_144_2e-1);
    let p = p.mul_add(z, -0.333_332_8);
    let small = (p * z).mul_add(x, x);
    let c = if a > 10.0 { 10.0 } else { a };
    let big = 1.0 - 2.0 / (exp(2.0 * c) + 1.0);
    let big = if a.is_nan() { f32::NAN } else { big };
    if a < 0.625 { small } else { big.copysign(x) }
}

/// Error function in f64 (the f32 version rounds it): the Maclaurin series below 2, the Laplace
/// continued fraction above; both to about 1e-15.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return x;
    }
    let y = if a < 2.5 {
        // erf(a) = 2/sqrt(pi) e^{-a^2} sum_n 2^n a^{2n+1} / (2n+1)!!: all terms positive
        let mut term = a;
        let mut sum = a;
        let mut n = 0.0;
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * a * a / (2.0 * n + 1.0);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * libm::exp(-a * a) * sum
    } else if a < 6.0 {
        // erfc(a) = e^{-a^2} / sqrt(pi) * 1/(a + (1/2)/(a + 1/(a + (3/2)/(a + ...))))
        let mut f = a;
        for k in (1..=60).rev() {
            f = a + 0.5 * f64::from(k) / f;
        }
        1.0 - libm::exp(-a * a) / (f * std::f64::consts::PI.sqrt())
    } else {
        1.0
    };
    y.copysign(x)
}
