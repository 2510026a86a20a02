//! Operators of Python.

use super::{
    chars::{Chars, Fuel},
    predicates,
    value::{Datum, Done},
};

/// `-a`
pub fn negative(a: &Datum) -> Done<Datum> {
    match (a.defined()?.integer().map(i64::checked_neg), a) {
        (Some(Some(n)), _) => Ok(Datum::Integer(n)),
        (None, Datum::Number(x)) => Ok(Datum::Number(-x)),
        _ => Err(format!("bad operand type for unary -: '{}'", a.kind())),
    }
}

/// `a == b`, `a in b` and the like.
pub fn compare(sign: &str, a: &Datum, b: &Datum, fuel: &Fuel) -> Done<bool> {
    match sign {
        "==" => a.equals(b, fuel),
        "!=" => Ok(!a.equals(b, fuel)?),
        "in" => predicates::contains(b, a, fuel),
        "not in" => Ok(!predicates::contains(b, a, fuel)?),
        "<" => Ok(a.compare(b, fuel)?.is_lt()),
        "<=" => Ok(a.compare(b, fuel)?.is_le()),
        ">" => Ok(a.compare(b, fuel)?.is_gt()),
        _ => Ok(a.compare(b, fuel)?.is_ge()),
    }
}

/// `a + b` and the like.
pub fn binary(sign: &str, a: &Datum, b: &Datum, fuel: &Fuel) -> Done<Datum> {
    if sign == "~" {
        let (a, b) = (a.text(fuel)?, b.text(fuel)?);
        return Ok(Datum::Text(Chars::join(&[a.as_slice(), b.as_slice()], fuel)?));
    }
    let (a, b) = (a.defined()?, b.defined()?);
    let wrong = || {
        let (a, b) = (a.kind(), b.kind());
        Err(format!("unsupported operand type(s) for {sign}: '{a}' and '{b}'"))
    };
    match (sign, a, b) {
        ("+", Datum::Text(x), Datum::Text(y)) => {
            // One that is safe for HTML makes the other so, whatever `autoescape` says.
            let safe = x.safe || y.safe;
            let [x, y] =
                if safe { [x.escaped(fuel)?, y.escaped(fuel)?] } else { [x.clone(), y.clone()] };
            let sum = Chars::join(&[x.as_slice(), y.as_slice()], fuel)?;
            return Ok(Datum::Text(sum.with_safety(safe)));
        }
        ("+", Datum::Text(_), other) => {
            return Err(format!("can only concatenate str (not \"{}\") to str", other.kind()));
        }
        ("+", Datum::List(x), Datum::List(y)) => {
            fuel.spend(8 * (x.items.len() + y.items.len()))?;
            return Datum::list([&x.items[..], &y.items[..]].concat(), fuel);
        }
        ("*", Datum::Text(text), n) | ("*", n, Datum::Text(text)) if n.integer().is_some() => {
            let n = usize::try_from(n.integer().unwrap_or(0)).unwrap_or(0);
            fuel.spend(text.len().saturating_mul(n).saturating_add(8))?;
            return Ok(Datum::Text(text.as_slice().repeat(n).into()));
        }
        ("*", Datum::List(all), n) | ("*", n, Datum::List(all)) if n.integer().is_some() => {
            let n = usize::try_from(n.integer().unwrap_or(0)).unwrap_or(0);
            fuel.spend(all.items.len().saturating_mul(n).saturating_mul(8))?;
            return Datum::list(vec![&all.items[..]; n].concat(), fuel);
        }
        _ => {}
    }
    let (Some(x), Some(y)) = (a.number(), b.number()) else { return wrong() };
    let zero = || Err("division by zero".to_owned());
    if sign == "/" {
        return if y == 0.0 { zero() } else { Ok(Datum::Number(x / y)) };
    }
    if let (Some(x), Some(y)) = (a.integer(), b.integer()) {
        let n = match sign {
            "+" => x.checked_add(y),
            "-" => x.checked_sub(y),
            "*" => x.checked_mul(y),
            "//" | "%" if y == 0 => return zero(),
            "//" => x.checked_div_euclid(y).map(|q| q - i64::from(y < 0 && x.rem_euclid(y) != 0)),
            "%" => x.checked_rem_euclid(y).map(|r| if y < 0 && r != 0 { r + y } else { r }),
            _ if y < 0 => return Ok(Datum::Number(libm::pow(x as f64, y as f64))),
            _ => u32::try_from(y).ok().and_then(|y| x.checked_pow(y)),
        };
        return n.map(Datum::Integer).ok_or_else(|| format!("{x} {sign} {y} is out of range"));
    }
    Ok(Datum::Number(match sign {
        "+" => x + y,
        "-" => x - y,
        "*" => x * y,
        "//" | "%" if y == 0.0 => return zero(),
        "//" => (x / y).floor(),
        "%" => x - y * (x / y).floor(),
        _ => libm::pow(x, y),
    }))
}
