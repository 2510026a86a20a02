//! Exact numbers: sums of rationals times square roots and symbols. Every result is exact or, where
//! it would leave 127 bits or the form, none.

use std::collections::BTreeMap;

/// A rational in lowest terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rational {
    num: i128,
    /// Above 0.
    den: i128,
}

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Rational {
    pub const ONE: Self = Self { num: 1, den: 1 };

    /// `num / den`.
    pub fn new(num: i128, den: i128) -> Option<Self> {
        // A divisor of both fits where they do, and -2^127 has no opposite.
        let divisor = i128::try_from(gcd(num.unsigned_abs(), den.unsigned_abs())).ok()?;
        let sign = if den < 0 { -1 } else { 1 };
        if den == 0 || num == i128::MIN || den == i128::MIN {
            return None;
        }
        Some(Self { num: sign * (num / divisor), den: sign * (den / divisor) })
    }

    pub fn whole(n: i128) -> Self {
        Self { num: n, den: 1 }
    }

    /// Reads digits with at most one point, and a power of ten behind `e`.
    pub fn decimal(text: &str) -> Option<Self> {
        let (digits, power) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
        let part = part.trim_end_matches('0');
        let all = format!("{whole}{part}");
        let all = all.trim_start_matches('0');
        let num: i128 = if all.is_empty() { 0 } else { all.parse().ok()? };
        let power = power.parse::<i32>().ok()?.checked_sub(i32::try_from(part.len()).ok()?)?;
        if num == 0 {
            return Some(Self::whole(0));
        }
        let scale = 10_i128.checked_pow(power.unsigned_abs())?;
        if power < 0 { Self::new(num, scale) } else { Some(Self::whole(num.checked_mul(scale)?)) }
    }

    fn add(self, other: Self) -> Option<Self> {
        let (a, b) = (self.num.checked_mul(other.den)?, other.num.checked_mul(self.den)?);
        Self::new(a.checked_add(b)?, self.den.checked_mul(other.den)?)
    }

    fn mul(self, other: Self) -> Option<Self> {
        // Across first: the product may fit where the products of both parts do not.
        let (a, b) = (Self::new(self.num, other.den)?, Self::new(other.num, self.den)?);
        Self::new(a.num.checked_mul(b.num)?, a.den.checked_mul(b.den)?)
    }

    fn recip(self) -> Option<Self> {
        Self::new(self.den, self.num)
    }

    /// The number, if it is whole.
    pub fn as_whole(self) -> Option<i128> {
        (self.den == 1).then_some(self.num)
    }
}

/// A product of the square root of a number without square factors and of powers of symbols.
type Monomial = (u128, BTreeMap<char, i32>);

/// A sum of monomials, each times a rational that is not 0: two are equal if they are the same.
/// Different roots are independent over the rationals; a symbol, as x or π, is known by its name
/// alone, except i, whose square is -1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exact(BTreeMap<Monomial, Rational>);

/// More terms are not multiplied out.
const MOST_TERMS: usize = 64;

impl Exact {
    pub fn rational(r: Rational) -> Self {
        Self::term((1, BTreeMap::new()), r)
    }

    pub fn symbol(name: char) -> Self {
        Self::term((1, BTreeMap::from([(name, 1)])), Rational::ONE)
    }

    fn term(of: Monomial, r: Rational) -> Self {
        Self(if r.num == 0 { BTreeMap::new() } else { BTreeMap::from([(of, r)]) })
    }

    /// The number, if it is rational.
    pub fn as_rational(&self) -> Option<Rational> {
        match self.0.iter().next() {
            None => Some(Rational::whole(0)),
            Some(((1, symbols), r)) if self.0.len() == 1 && symbols.is_empty() => Some(*r),
            _ => None,
        }
    }

    pub fn add(mut self, other: &Self) -> Option<Self> {
        for (of, r) in &other.0 {
            let sum = self.0.get(of).map_or(Some(*r), |have| have.add(*r))?;
            match sum.num {
                0 => self.0.remove(of),
                _ => self.0.insert(of.clone(), sum),
            };
        }
        (self.0.len() <= MOST_TERMS).then_some(self)
    }

    pub fn neg(mut self) -> Self {
        // No numerator is -2^127.
        self.0.values_mut().for_each(|r| r.num = -r.num);
        self
    }

    pub fn mul(&self, other: &Self) -> Option<Self> {
        let mut all = Self(BTreeMap::new());
        for ((root, symbols), r) in &self.0 {
            for ((other_root, other_symbols), s) in &other.0 {
                // √a √b = g √(a/g b/g)
                let g = gcd(*root, *other_root);
                let mut value = r.mul(*s)?.mul(Rational::whole(i128::try_from(g).ok()?))?;
                let root = (root / g).checked_mul(other_root / g)?;
                let mut product = symbols.clone();
                for (name, power) in other_symbols {
                    let sum = product.get(name).copied().unwrap_or(0).checked_add(*power)?;
                    product.insert(*name, sum);
                }
                if let Some(power) = product.get_mut(&'i') {
                    if power.rem_euclid(4) >= 2 {
                        value.num = -value.num;
                    }
                    *power = power.rem_euclid(2);
                }
                product.retain(|_, power| *power != 0);
                all = all.add(&Self::term((root, product), value))?;
            }
        }
        Some(all)
    }

    /// One over it: of one term, or of two of which the difference of squares is one.
    pub fn recip(&self) -> Option<Self> {
        let mut terms = self.0.iter();
        match (terms.next(), terms.next(), terms.next()) {
            (Some(((root, symbols), r)), None, None) => {
                // 1/√a = √a / a
                let below = Rational::whole(i128::try_from(*root).ok()?).mul(*r)?;
                let symbols = symbols.iter().map(|(name, power)| (*name, -power)).collect();
                let inverse = Self::term((*root, symbols), below.recip()?);
                // Brings the power of i into its range.
                inverse.mul(&Self::rational(Rational::ONE))
            }
            (Some((a, r)), Some((b, s)), None) => {
                let conjugate = Self::term(a.clone(), *r).add(&Self::term(b.clone(), *s).neg())?;
                let product = self.mul(&conjugate)?;
                if product.0.len() == 1 { conjugate.mul(&product.recip()?) } else { None }
            }
            _ => None,
        }
    }

    /// It to the power of a rational: whole, or half of whole.
    pub fn pow(&self, power: Rational) -> Option<Self> {
        match (power.num, power.den) {
            (0, _) if self.0.is_empty() => None,
            (n, 1) if n < 0 => self.recip()?.pow(Rational::whole(-n)),
            (n, 1) if n <= 1000 => {
                let (mut n, mut base) = (n, self.clone());
                let mut result = Self::rational(Rational::ONE);
                while n > 0 {
                    if n % 2 == 1 {
                        result = result.mul(&base)?;
                    }
                    n /= 2;
                    if n > 0 {
                        base = base.mul(&base)?;
                    }
                }
                Some(result)
            }
            (n, 2) => self.sqrt()?.pow(Rational::whole(n)),
            _ => None,
        }
    }

    /// The square root of a rational.
    pub fn sqrt(&self) -> Option<Self> {
        let r = self.as_rational()?;
        if r.num == 0 {
            return Some(self.clone());
        }
        // √(p/q) = √(pq) / q
        let (out, left) = square_part(r.num.unsigned_abs().checked_mul(r.den.unsigned_abs())?)?;
        let value = Rational::new(i128::try_from(out).ok()?, r.den)?;
        let root = Self::term((left, BTreeMap::new()), value);
        if r.num < 0 { root.mul(&Self::symbol('i')) } else { Some(root) }
    }

    /// The root of a rational that has one, of a degree above 2: its numerator and denominator are
    /// powers.
    pub fn root(&self, degree: u32) -> Option<Self> {
        let r = self.as_rational()?;
        let of = |n: u128| {
            // The first whose power is not below n.
            let (mut low, mut high) = (0_u128, n);
            while low < high {
                let middle = low + (high - low) / 2;
                if power(middle, degree) < n { low = middle + 1 } else { high = middle }
            }
            (power(low, degree) == n).then_some(low)
        };
        let (num, den) = (of(r.num.unsigned_abs())?, of(r.den.unsigned_abs())?);
        let root = Rational::new(i128::try_from(num).ok()?, i128::try_from(den).ok()?)?;
        match (r.num < 0, degree % 2) {
            (false, _) => Some(Self::rational(root)),
            (true, 1) => Some(Self::rational(root).neg()),
            _ => None,
        }
    }
}

fn power(x: u128, n: u32) -> u128 {
    x.checked_pow(n).unwrap_or(u128::MAX)
}

/// `(a, b)` with n = a² b, b without square factors; n is above 0.
fn square_part(mut n: u128) -> Option<(u128, u128)> {
    let (mut out, mut left, mut d) = (1_u128, 1_u128, 2_u128);
    while d <= 10_000 && d * d <= n {
        while n.is_multiple_of(d * d) {
            n /= d * d;
            out = out.checked_mul(d)?;
        }
        if n.is_multiple_of(d) {
            n /= d;
            left *= d;
        }
        d += 1;
    }
    let root = n.isqrt();
    if root * root == n {
        return Some((out.checked_mul(root)?, left));
    }
    // Two equal factors above 10^4 and a third one are more than 10^12.
    (n < 1_000_000_000_000).then_some(())?;
    Some((out, left.checked_mul(n)?))
}
