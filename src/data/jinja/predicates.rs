//! Tests: `value is name(argument)`.

use super::{
    access,
    chars::{Fuel, char_of},
    methods::Given,
    value::{Datum, Done},
};

/// Whether `value` passes a test.
pub fn test(value: &Datum, name: &str, mut given: Given, fuel: &Fuel) -> Done<bool> {
    fuel.spend(8)?;
    let number = |given: &mut Given| -> Done<i64> {
        value.integer().zip(given.need("number")?.integer()).map_or_else(
            || Err(format!("`{name}` of a {}", value.kind())),
            |(a, b)| a.checked_rem(b).ok_or_else(|| "division by zero".into()),
        )
    };
    let cased = |is: fn(char) -> bool, isnt: fn(char) -> bool| match value {
        Datum::Text(text) => {
            fuel.spend(text.len())?;
            let has =
                |f: fn(char) -> bool| text.as_slice().iter().filter_map(|c| char_of(*c)).any(f);
            Done::Ok(has(is) && !has(isnt))
        }
        _ => Ok(false),
    };
    let passes = match name {
        "defined" => !matches!(value, Datum::Undefined(_)),
        "undefined" => matches!(value, Datum::Undefined(_)),
        "none" => matches!(value, Datum::None),
        "boolean" => matches!(value, Datum::Bool(_)),
        "true" => matches!(value, Datum::Bool(true)),
        "false" => matches!(value, Datum::Bool(false)),
        "integer" => matches!(value, Datum::Integer(_)),
        "float" => matches!(value, Datum::Number(_)),
        "number" => value.number().is_some(),
        "string" => matches!(value, Datum::Text(_)),
        "mapping" => matches!(value, Datum::Dict(_)),
        "sequence" => access::length(value).is_ok(),
        "iterable" => access::length(value).is_ok(),
        "callable" => {
            matches!(value, Datum::Macro(..) | Datum::Function(_) | Datum::Method(..))
        }
        "lower" => cased(char::is_lowercase, char::is_uppercase)?,
        "upper" => cased(char::is_uppercase, char::is_lowercase)?,
        "odd" | "even" => {
            let n = value.integer().ok_or_else(|| format!("`{name}` of a {}", value.kind()))?;
            (n % 2 != 0) == (name == "odd")
        }
        "divisibleby" => number(&mut given)? == 0,
        "eq" | "==" | "equalto" => value.equals(&given.need("other")?, fuel)?,
        "ne" | "!=" => !value.equals(&given.need("other")?, fuel)?,
        "sameas" => {
            let other = given.need("other")?;
            value.kind() == other.kind() && value.equals(&other, fuel)?
        }
        "lt" | "lessthan" => value.compare(&given.need("other")?, fuel)?.is_lt(),
        "le" => value.compare(&given.need("other")?, fuel)?.is_le(),
        "gt" | "greaterthan" => value.compare(&given.need("other")?, fuel)?.is_gt(),
        "ge" => value.compare(&given.need("other")?, fuel)?.is_ge(),
        "in" => contains(&given.need("seq")?, value, fuel)?,
        _ => return Err(format!("there is no test `{}`", brief(name))),
    };
    given.end().map_err(|e| format!("{name}: {e}"))?;
    Ok(passes)
}

/// The beginning of a name, for messages.
pub fn brief(name: &str) -> String {
    name.chars().take(60).collect()
}

/// `what in of`
pub fn contains(of: &Datum, what: &Datum, fuel: &Fuel) -> Done<bool> {
    match (of, what) {
        (Datum::Text(text), Datum::Text(part)) => {
            Ok(text.find(part.as_slice(), 0, fuel)?.is_some())
        }
        (Datum::Text(_), other) => {
            let kind = other.defined()?.kind();
            Err(format!("'in <string>' requires string as left operand, not {kind}"))
        }
        (Datum::Dict(all), key) => Ok(all.get(key, fuel)?.is_some()),
        (Datum::List(_) | Datum::Undefined(_), what) => {
            for item in &of.items(fuel)?.items {
                if item.equals(what, fuel)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        _ => Err(format!("argument of type '{}' is not iterable", of.kind())),
    }
}
