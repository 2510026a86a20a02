//! Filters: `value | name(arguments)`.

use std::cmp::Ordering;

use super::{
    access,
    chars::{Chars, Fuel, char_of},
    json,
    methods::{self, Given},
    predicates::{self, brief},
    value::{Datum, Done},
};

/// Applies a filter.
pub fn apply(value: &Datum, name: &str, mut given: Given, fuel: &Fuel) -> Done<Datum> {
    fuel.spend(8)?;
    let text = || value.text(fuel);
    let out = match name {
        "tojson" => json::to_json(value, &mut given, fuel)?,
        "string" => Datum::Text(text()?),
        "safe" => Datum::Text(text()?.with_safety(true)),
        "escape" | "e" => Datum::Text(text()?.escaped(fuel)?),
        "trim" => match given.take("chars") {
            None | Some(Datum::None) => Datum::Text(text()?.stripped((true, true), fuel)?),
            Some(chars) => {
                let given = Given { positional: vec![chars], ..Given::default() };
                methods::call(&Datum::Text(text()?), "strip", given, fuel)?
            }
        },
        "upper" | "lower" | "capitalize" => {
            methods::call(&Datum::Text(text()?), name, Given::default(), fuel)?
        }
        "title" => {
            let starts = |c: char| c.is_whitespace() || "-({[<".contains(c);
            Datum::Text(methods::capitalized(&text()?, starts, fuel)?)
        }
        "replace" => {
            let (from, to) = (given.need("old")?.text(fuel)?, given.need("new")?.text(fuel)?);
            let count = given.integer("count")?.and_then(|n| usize::try_from(n).ok());
            Datum::Text(methods::replace(&text()?, &from, &to, count, fuel)?)
        }
        "indent" => indent(&text()?, &mut given, fuel)?,
        "join" => {
            let between = match given.take("d") {
                None => Chars::written(""),
                Some(d) => d.text(fuel)?,
            };
            let items = match given.take("attribute") {
                None => value.clone(),
                Some(name) => attributes(value, &name, None, fuel)?,
            };
            methods::join(&items, &between, false, fuel)?
        }
        "length" | "count" => Datum::Integer(access::length(value)? as i64),
        "default" | "d" => {
            let default = given.take("default_value").unwrap_or_else(|| Datum::written(""));
            let falsy = given.flag("boolean");
            let missing = matches!(value, Datum::Undefined(_)) || falsy && !value.truth();
            if missing { default } else { value.clone() }
        }
        "items" => methods::items(value, fuel)?,
        "dictsort" => dictsort(value, &mut given, fuel)?,
        "list" => Datum::list(value.items(fuel)?.items.clone(), fuel)?,
        "first" | "last" => {
            let all = value.items(fuel)?;
            let item = if name == "first" { all.items.first() } else { all.items.last() };
            let none = || Datum::undefined(format!("No {name} item, sequence was empty."));
            item.cloned().unwrap_or_else(none)
        }
        "reverse" => {
            let mut all = value.items(fuel)?.items.clone();
            all.reverse();
            let list = Datum::list(all, fuel)?;
            match value {
                Datum::Text(_) => methods::join(&list, &Chars::written(""), true, fuel)?,
                _ => list,
            }
        }
        // Nothing of nothing, whatever it is.
        "map" | "select" | "reject" | "selectattr" | "rejectattr" if !value.truth() => {
            given = Given::default();
            Datum::list(Vec::new(), fuel)?
        }
        "map" => map(value, &mut given, fuel)?,
        "select" | "reject" | "selectattr" | "rejectattr" => select(value, name, &mut given, fuel)?,
        "sort" => sort(value, &mut given, fuel)?,
        "unique" => {
            let mut all: Vec<Datum> = Vec::new();
            for item in &value.items(fuel)?.items {
                if !predicates::contains(&Datum::list(all.clone(), fuel)?, item, fuel)? {
                    all.push(item.clone());
                }
            }
            Datum::list(all, fuel)?
        }
        "min" | "max" => {
            let mut best: Option<Datum> = None;
            for item in &value.items(fuel)?.items {
                let order = best.as_ref().map(|b| item.compare(b, fuel)).transpose()?;
                let want = if name == "min" { Ordering::Less } else { Ordering::Greater };
                if order.is_none_or(|o| o == want) {
                    best = Some(item.clone());
                }
            }
            best.unwrap_or_else(|| Datum::undefined("there are no items"))
        }
        "sum" => {
            let start = given.take("start").unwrap_or(Datum::Integer(0));
            let (mut whole, mut sum) = (start.integer(), start.number());
            for item in &value.items(fuel)?.items {
                fuel.spend(1)?;
                whole = whole.zip(item.integer()).and_then(|(a, b)| a.checked_add(b));
                sum = sum.zip(item.number()).map(|(a, b)| a + b);
            }
            match (whole, sum) {
                (Some(n), _) => Datum::Integer(n),
                (None, Some(x)) => Datum::Number(x),
                _ => return Err("`sum` of what are no numbers".into()),
            }
        }
        "int" => {
            let default = given.take("default").unwrap_or(Datum::Integer(0));
            let float = |x: f64| (x.abs() < 9e18).then_some(x as i64);
            let n = match value {
                Datum::Text(text) if text.len() <= 400 => {
                    let text = text.plain();
                    let text = text.trim();
                    text.parse().ok().or_else(|| text.parse().ok().and_then(float))
                }
                Datum::Number(x) => float(*x),
                other => other.integer(),
            };
            n.map_or(default, Datum::Integer)
        }
        "float" => {
            let default = given.take("default").unwrap_or(Datum::Number(0.0));
            let x = match value {
                Datum::Text(text) if text.len() <= 400 => text.plain().trim().parse().ok(),
                other => other.number(),
            };
            x.map_or(default, Datum::Number)
        }
        "abs" => match value {
            Datum::Number(x) => Datum::Number(x.abs()),
            _ => match value.integer().and_then(i64::checked_abs) {
                Some(n) => Datum::Integer(n),
                None => return Err(format!("bad operand type for abs(): '{}'", value.kind())),
            },
        },
        "round" => {
            let digits = given.integer("precision")?.unwrap_or(0).clamp(0, 15) as usize;
            let x = value.number().ok_or_else(|| format!("`round` of a {}", value.kind()))?;
            let text = format!("{x:.digits$}");
            Datum::Number(text.parse().unwrap_or(x))
        }
        "attr" => {
            let name = given.text("name")?.plain();
            match value {
                // As Python's attributes, items are none.
                Datum::Dict(_) => Datum::undefined("a dict has no attributes"),
                _ => access::attribute(value, &name, fuel)?,
            }
        }
        "wordcount" => {
            let words = methods::call(&Datum::Text(text()?), "split", Given::default(), fuel)?;
            Datum::Integer(access::length(&words)? as i64)
        }
        _ => return Err(format!("there is no filter `{}`", brief(name))),
    };
    given.end().map_err(|e| format!("{name}: {e}"))?;
    Ok(out)
}

fn indent(text: &Chars, given: &mut Given, fuel: &Fuel) -> Done<Datum> {
    let width = match given.take("width") {
        None => vec![u32::from(' '); 4],
        Some(Datum::Text(width)) => width.as_slice().to_vec(),
        Some(n) => {
            let n = n.integer().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
            fuel.spend(n)?;
            vec![u32::from(' '); n]
        }
    };
    let (first, blank) = (given.flag("first"), given.flag("blank"));
    let mut out = Vec::new();
    let all: Vec<&[u32]> = text.as_slice().split(|c| char_of(*c) == Some('\n')).collect();
    for (i, line) in all.iter().enumerate() {
        fuel.spend(line.len() + 1)?;
        if i > 0 {
            out.push('\n'.into());
        }
        if (i > 0 && (blank || !line.is_empty())) || (i == 0 && first) {
            fuel.spend(width.len())?;
            out.extend(&width);
        }
        out.extend(*line);
    }
    Ok(Datum::Text(out.into()))
}

/// `a.b.0` of a value, as filters name attributes; undefined where a part of it is.
fn path(value: &Datum, name: &Datum, fuel: &Fuel) -> Done<Datum> {
    let Datum::Text(name) = name else { return access::item(value, name, fuel) };
    fuel.spend(name.len())?;
    let mut at = value.clone();
    for part in name.plain().split('.') {
        if matches!(at, Datum::Undefined(_)) {
            return Ok(at);
        }
        let key = match part.parse() {
            Ok(n) => Datum::Integer(n),
            Err(_) => Datum::written(part),
        };
        at = access::item(&at, &key, fuel)?;
    }
    Ok(at)
}

fn attributes(value: &Datum, name: &Datum, default: Option<Datum>, fuel: &Fuel) -> Done<Datum> {
    let one = |item: &Datum| match (path(item, name, fuel)?, &default) {
        (Datum::Undefined(_), Some(default)) => Ok(default.clone()),
        (found, _) => Ok(found),
    };
    let all: Vec<Datum> = value.items(fuel)?.items.iter().map(one).collect::<Done<_>>()?;
    Datum::list(all, fuel)
}

fn map(value: &Datum, given: &mut Given, fuel: &Fuel) -> Done<Datum> {
    if let Some(at) = given.named.iter().position(|(n, _)| n == "attribute") {
        let name = given.named.remove(at).1;
        return attributes(value, &name, given.take("default"), fuel);
    }
    let name = given.text("filter")?.plain();
    let rest = std::mem::take(given);
    let one = |item: &Datum| {
        fuel.spend(8 * (rest.positional.len() + rest.named.len()))?;
        let given = Given { positional: rest.positional.clone(), named: rest.named.clone() };
        apply(item, &name, given, fuel)
    };
    let all: Vec<Datum> = value.items(fuel)?.items.iter().map(one).collect::<Done<_>>()?;
    Datum::list(all, fuel)
}

fn select(value: &Datum, name: &str, given: &mut Given, fuel: &Fuel) -> Done<Datum> {
    let attribute = if name.ends_with("attr") { Some(given.need("attribute")?) } else { None };
    let test = given.take("test").map(|t| t.text(fuel)).transpose()?;
    let rest = std::mem::take(given);
    let mut all = Vec::new();
    for item in &value.items(fuel)?.items {
        let of = attribute.as_ref().map_or_else(|| Ok(item.clone()), |a| path(item, a, fuel))?;
        let passes = match &test {
            None => of.truth(),
            Some(test) => {
                let positional = rest.positional.clone();
                let given = Given { positional, ..Given::default() };
                predicates::test(&of, &test.plain(), given, fuel)?
            }
        };
        if passes == name.starts_with("select") {
            all.push(item.clone());
        }
    }
    Datum::list(all, fuel)
}

/// Sorted by keys; texts without regard to case, unless they are to be regarded.
fn sorted(
    mut all: Vec<(Datum, Datum)>,
    cased: bool,
    reverse: bool,
    fuel: &Fuel,
) -> Done<Vec<Datum>> {
    for (key, _) in &mut all {
        if let Datum::Text(text) = key
            && !cased
        {
            *key = Datum::Text(text.mapped(char::to_lowercase, fuel)?);
        }
    }
    let mut failed = None;
    all.sort_by(|a, b| {
        let order = if failed.is_some() { Ok(Ordering::Equal) } else { a.0.compare(&b.0, fuel) };
        let order = order.unwrap_or_else(|e| {
            failed = Some(e);
            Ordering::Equal
        });
        if reverse { order.reverse() } else { order }
    });
    failed.map_or_else(|| Ok(all.into_iter().map(|(_, item)| item).collect()), Err)
}

fn sort(value: &Datum, given: &mut Given, fuel: &Fuel) -> Done<Datum> {
    let (reverse, cased) = (given.flag("reverse"), given.flag("case_sensitive"));
    let attribute = given.take("attribute");
    let keyed = |item: &Datum| {
        let key = attribute.as_ref().map_or_else(|| Ok(item.clone()), |a| path(item, a, fuel))?;
        Done::Ok((key, item.clone()))
    };
    let all = value.items(fuel)?.items.iter().map(keyed).collect::<Done<_>>()?;
    Datum::list(sorted(all, cased, reverse, fuel)?, fuel)
}

fn dictsort(value: &Datum, given: &mut Given, fuel: &Fuel) -> Done<Datum> {
    let cased = given.flag("case_sensitive");
    let by = given.take("by").map(|b| b.text(fuel)).transpose()?;
    let by_value = by.is_some_and(|b| b.is("value"));
    let reverse = given.flag("reverse");
    let Datum::Dict(all) = value.defined()? else {
        return Err(format!("'{}' object has no attribute 'items'", value.kind()));
    };
    let keyed = |(k, v): &(Datum, Datum)| {
        let key = if by_value { v.clone() } else { k.clone() };
        Ok((key, Datum::tuple(vec![k.clone(), v.clone()], fuel)?))
    };
    let all = all.entries.iter().map(keyed).collect::<Done<_>>()?;
    Datum::list(sorted(all, cased, reverse, fuel)?, fuel)
}
