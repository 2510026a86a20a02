//! Attributes, items and slices of values.

use super::{
    chars::{Chars, Fuel},
    methods,
    value::{Datum, Done},
};

/// `of.name`: a method, else an item.
pub fn attribute(of: &Datum, name: &str, fuel: &Fuel) -> Done<Datum> {
    fuel.spend(8)?;
    if methods::has(of, name)? {
        return Ok(Datum::Method(Box::new(of.clone()), name.into()));
    }
    match of {
        Datum::Undefined(hint) => Err(hint.to_string()),
        Datum::Dict(all) => match all.named(name, fuel)? {
            Some(value) => Ok(value.clone()),
            None => Ok(missing(of, name)),
        },
        Datum::Namespace(all) => {
            let all = all.borrow();
            fuel.spend(all.len())?;
            let found = all.iter().find(|(n, _)| n == name);
            Ok(found.map_or_else(|| missing(of, name), |(_, value)| value.clone()))
        }
        Datum::Loop(state) => {
            let (at, n) = (state.index.get(), state.items.items.len());
            let near = |i: Option<usize>| {
                let item = i.and_then(|i| state.items.items.get(i));
                item.cloned().unwrap_or_else(|| Datum::undefined("there is no such item"))
            };
            let count = |n: usize| Datum::Integer(n as i64);
            Ok(match name {
                "index" => count(at + 1),
                "index0" => count(at),
                "revindex" => count(n - at),
                "revindex0" => count(n - at - 1),
                "first" => Datum::Bool(at == 0),
                "last" => Datum::Bool(at + 1 == n),
                "length" => count(n),
                "depth" => count(state.depth + 1),
                "depth0" => count(state.depth),
                "previtem" => near(at.checked_sub(1)),
                "nextitem" => near(Some(at + 1)),
                _ => missing(of, name),
            })
        }
        _ => Ok(missing(of, name)),
    }
}

fn missing(of: &Datum, name: &str) -> Datum {
    let name: String = name.chars().take(60).collect();
    let kind = if matches!(of, Datum::Dict(_) | Datum::List(_) | Datum::Text(_)) {
        format!("'{} object'", of.kind())
    } else {
        format!("'{}'", of.kind())
    };
    Datum::undefined(format!("{kind} has no attribute '{name}'"))
}

/// `of[key]`
pub fn item(of: &Datum, key: &Datum, fuel: &Fuel) -> Done<Datum> {
    fuel.spend(8)?;
    let none = |key: &str| Datum::undefined(format!("{} object has no element {key}", of.kind()));
    match (of, key) {
        (Datum::Undefined(hint), _) => Err(hint.to_string()),
        (Datum::Dict(all), key) => match (all.get(key, fuel)?, key) {
            (Some(value), _) => Ok(value.clone()),
            (None, Datum::Text(name)) => Ok(missing(of, &name.plain())),
            _ => Ok(none("of this key")),
        },
        (Datum::List(_) | Datum::Text(_), key) if key.integer().is_some() => {
            let at = key.integer().unwrap_or_default();
            let n = length(of).unwrap_or(0) as i64;
            let index = if at < 0 { at + n } else { at };
            if index < 0 || index >= n {
                return Ok(none(&at.to_string()));
            }
            let index = index as usize;
            Ok(match of {
                Datum::List(all) => all.items[index].clone(),
                Datum::Text(text) => Datum::Text(text.slice(index..index + 1, fuel)?),
                _ => Datum::None,
            })
        }
        (of, Datum::Text(name)) => attribute(of, &name.plain(), fuel),
        _ => Ok(none("of this key")),
    }
}

/// `len(of)`
pub fn length(of: &Datum) -> Done<usize> {
    match of {
        Datum::Undefined(_) => Ok(0),
        Datum::Text(text) => Ok(text.len()),
        Datum::List(all) => Ok(all.items.len()),
        Datum::Dict(all) => Ok(all.entries.len()),
        _ => Err(format!("object of type '{}' has no len()", of.kind())),
    }
}

/// `of[start:stop:step]`
pub fn slice(of: &Datum, parts: [Option<Datum>; 3], fuel: &Fuel) -> Done<Datum> {
    let mut numbers = [None; 3];
    for (to, part) in numbers.iter_mut().zip(&parts) {
        *to = match part {
            None | Some(Datum::None) => None,
            Some(part) => {
                let n = part.defined()?.integer();
                Some(n.ok_or_else(|| format!("a slice has a {} in it", part.kind()))?)
            }
        };
    }
    let [start, stop, step] = numbers;
    let n = length(of.defined()?)? as i64;
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err("slice step cannot be zero".into());
    }
    let (low, high) = if step > 0 { (0, n) } else { (-1, n - 1) };
    let bound = |x: Option<i64>, default: i64| match x {
        None => default,
        Some(x) if x < 0 => x.saturating_add(n).clamp(low, high),
        Some(x) => x.clamp(low, high),
    };
    let (start, stop) = if step > 0 {
        (bound(start, 0), bound(stop, n))
    } else {
        (bound(start, n - 1), bound(stop, -1))
    };
    let mut chosen = Vec::new();
    let mut at = start;
    while (step > 0 && at < stop) || (step < 0 && at > stop) {
        fuel.spend(1)?;
        chosen.push(at as usize);
        let Some(next) = at.checked_add(step) else { break };
        at = next;
    }
    match of {
        Datum::Text(text) => {
            let all = text.as_slice();
            let chars: Vec<u32> = chosen.iter().map(|i| all[*i]).collect();
            Ok(Datum::Text(Chars::from(chars)))
        }
        Datum::List(all) => {
            Datum::list(chosen.iter().map(|i| all.items[*i].clone()).collect(), fuel)
        }
        _ => Err(format!("'{}' object is not subscriptable", of.kind())),
    }
}
