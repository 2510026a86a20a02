//! Methods of texts, lists and dicts. Those that change a value are refused: a template does not
//! change the conversation.

use super::{
    chars::{Chars, Fuel, char_of},
    lexer::is_space,
    value::{Datum, Done},
};

/// What a call was given, evaluated.
#[derive(Debug, Default)]
pub struct Given {
    pub positional: Vec<Datum>,
    pub named: Vec<(String, Datum)>,
}

impl Given {
    /// An argument by its place or name; both are taken out.
    pub fn take(&mut self, name: &str) -> Option<Datum> {
        if !self.positional.is_empty() {
            return Some(self.positional.remove(0));
        }
        let at = self.named.iter().position(|(n, _)| n == name)?;
        Some(self.named.remove(at).1)
    }

    /// An argument that has to be there.
    pub fn need(&mut self, name: &str) -> Done<Datum> {
        self.take(name).ok_or_else(|| format!("missing argument `{name}`"))
    }

    /// A text that has to be there.
    pub fn text(&mut self, name: &str) -> Done<Chars> {
        match self.need(name)? {
            Datum::Text(text) => Ok(text),
            other => Err(format!("`{name}` is {}, wanted a text", other.kind())),
        }
    }

    /// A whole number, if it is there and not None.
    pub fn integer(&mut self, name: &str) -> Done<Option<i64>> {
        match self.take(name) {
            None | Some(Datum::None) => Ok(None),
            Some(v) => match v.integer() {
                Some(n) => Ok(Some(n)),
                None => Err(format!("`{name}` is {}, wanted a number", v.kind())),
            },
        }
    }

    /// Whether an argument is there and true.
    pub fn flag(&mut self, name: &str) -> bool {
        self.take(name).is_some_and(|v| v.truth())
    }

    /// Refuses arguments that were not taken.
    pub fn end(self) -> Done<()> {
        match (self.positional.is_empty(), self.named.first()) {
            (true, None) => Ok(()),
            (true, Some((name, _))) => Err(format!("unexpected argument `{name}`")),
            _ => Err("an argument too many".into()),
        }
    }
}

const OF_TEXT: &[&str] = &[
    "capitalize",
    "count",
    "endswith",
    "find",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "isupper",
    "join",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "title",
    "upper",
];

/// Methods that change what they are called on.
const CHANGES: &[&str] = &[
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
];

/// Whether a value has this method; that one which changes it is asked for is an error.
pub fn has(of: &Datum, name: &str) -> Done<bool> {
    let (own, changes): (&[&str], &[&str]) = match of {
        Datum::Text(_) => (OF_TEXT, &[]),
        Datum::List(_) => (&["count", "index"], CHANGES),
        Datum::Dict(_) => (
            &["get", "items", "keys", "values"],
            &["clear", "pop", "popitem", "setdefault", "update"],
        ),
        _ => (&[], &[]),
    };
    if changes.contains(&name) {
        let kind = of.kind();
        return Err(format!("'{name}' of a {kind}: a template changes nothing that it is given"));
    }
    Ok(own.contains(&name))
}

/// Calls a method.
pub fn call(of: &Datum, name: &str, mut given: Given, fuel: &Fuel) -> Done<Datum> {
    let out = match of {
        Datum::Text(text) => of_text(text, name, &mut given, fuel)?,
        Datum::List(all) => {
            let what = given.need("value")?;
            let mut found = Vec::new();
            for (i, item) in all.items.iter().enumerate() {
                if item.equals(&what, fuel)? {
                    found.push(i);
                }
            }
            match (name, found.first()) {
                ("count", _) => Datum::Integer(found.len() as i64),
                (_, Some(i)) => Datum::Integer(*i as i64),
                _ => return Err("the value is not in the list".into()),
            }
        }
        Datum::Dict(all) => match name {
            "get" => {
                let key = given.need("key")?;
                let default = given.take("default").unwrap_or(Datum::None);
                all.get(&key, fuel)?.cloned().unwrap_or(default)
            }
            "items" => items(of, fuel)?,
            _ => {
                let values = name == "values";
                let one = |(k, v): &(Datum, Datum)| if values { v.clone() } else { k.clone() };
                Datum::list(all.entries.iter().map(one).collect(), fuel)?
            }
        },
        _ => return Err(format!("'{}' has no method '{name}'", of.kind())),
    };
    given.end().map_err(|e| format!("{name}(): {e}"))?;
    Ok(out)
}

/// Pairs of key and value.
pub fn items(of: &Datum, fuel: &Fuel) -> Done<Datum> {
    match of {
        Datum::Dict(all) => {
            let pair = |(k, v): &(Datum, Datum)| Datum::tuple(vec![k.clone(), v.clone()], fuel);
            Datum::list(all.entries.iter().map(pair).collect::<Done<_>>()?, fuel)
        }
        Datum::Undefined(_) => Datum::list(Vec::new(), fuel),
        _ => Err("Can only get item pairs from a mapping.".into()),
    }
}

fn of_text(text: &Chars, name: &str, given: &mut Given, fuel: &Fuel) -> Done<Datum> {
    let all = |is: &dyn Fn(char) -> bool| {
        fuel.spend(text.len())?;
        let mut chars = text.as_slice().iter().filter_map(|c| char_of(*c)).peekable();
        Done::Ok(Datum::Bool(chars.peek().is_some() && chars.all(is)))
    };
    let cased = |is: fn(char) -> bool, isnt: fn(char) -> bool| {
        fuel.spend(text.len())?;
        let has = |f: fn(char) -> bool| text.as_slice().iter().filter_map(|c| char_of(*c)).any(f);
        Done::Ok(Datum::Bool(has(is) && !has(isnt)))
    };
    Ok(match name {
        "strip" | "lstrip" | "rstrip" => {
            let ends = (name != "rstrip", name != "lstrip");
            match given.take("chars") {
                None | Some(Datum::None) => Datum::Text(text.stripped(ends, fuel)?),
                Some(Datum::Text(set)) => {
                    fuel.spend(text.len().saturating_mul(set.len()))?;
                    let set = set.plain();
                    let drop = |c| char_of(c).is_some_and(|c| set.contains(c));
                    Datum::Text(text.trim(ends, drop, fuel)?)
                }
                Some(other) => return Err(format!("`chars` is {}, wanted a text", other.kind())),
            }
        }
        "split" | "rsplit" => split(text, name == "rsplit", given, fuel)?,
        "splitlines" => lines(text, given.flag("keepends"), fuel)?,
        "partition" | "rpartition" => {
            let sep = given.text("sep")?;
            let found = places(text, &sep, fuel)?;
            let at = if name == "partition" { found.first() } else { found.last() };
            let empty = Chars::written("");
            let parts = match at {
                Some(at) => {
                    let (from, to) = (*at, *at + sep.len());
                    [text.slice(0..from, fuel)?, sep, text.slice(to..text.len(), fuel)?]
                }
                None if name == "partition" => [text.clone(), empty.clone(), empty],
                None => [empty.clone(), empty, text.clone()],
            };
            Datum::tuple(parts.map(Datum::Text).into(), fuel)?
        }
        "startswith" | "endswith" => {
            let part = given.need("prefix")?;
            let parts = match &part {
                Datum::List(all) => all.items.clone(),
                one => vec![one.clone()],
            };
            let mut any = false;
            for part in parts {
                let Datum::Text(part) = &part else {
                    return Err(format!("{name}() of a {}", part.kind()));
                };
                fuel.spend(part.len())?;
                let start = name == "startswith";
                any |= if start { text.starts_with(part) } else { text.ends_with(part) };
            }
            Datum::Bool(any)
        }
        "removeprefix" | "removesuffix" => {
            let part = given.text("part")?;
            fuel.spend(part.len())?;
            let n = text.len();
            match name {
                "removeprefix" if text.starts_with(&part) => {
                    Datum::Text(text.slice(part.len()..n, fuel)?)
                }
                "removesuffix" if text.ends_with(&part) => {
                    Datum::Text(text.slice(0..n - part.len(), fuel)?)
                }
                _ => Datum::Text(text.clone()),
            }
        }
        "replace" => {
            let (from, to) = (given.text("old")?, given.text("new")?);
            let count = given.integer("count")?.and_then(|n| usize::try_from(n).ok());
            Datum::Text(replace(text, &from, &to, count, fuel)?)
        }
        "find" | "rfind" | "index" => {
            let found = places_overlapping(text, &given.text("sub")?, name == "rfind", fuel)?;
            match found {
                Some(at) => Datum::Integer(at as i64),
                None if name == "index" => return Err("substring not found".into()),
                None => Datum::Integer(-1),
            }
        }
        "count" => Datum::Integer(places(text, &given.text("sub")?, fuel)?.len() as i64),
        "join" => join(&given.need("iterable")?, text, true, fuel)?,
        "upper" => Datum::Text(text.mapped(char::to_uppercase, fuel)?),
        "lower" => Datum::Text(text.mapped(char::to_lowercase, fuel)?),
        "capitalize" => Datum::Text(capitalized(text, |_| false, fuel)?),
        "title" => Datum::Text(capitalized(text, |c| !c.is_alphabetic(), fuel)?),
        "isspace" => all(&is_space)?,
        "isdigit" | "isnumeric" => all(&char::is_numeric)?,
        "isalpha" => all(&char::is_alphabetic)?,
        "isalnum" => all(&char::is_alphanumeric)?,
        "isascii" => Datum::Bool(text.len() == 0 || all(&|c: char| c.is_ascii())?.truth()),
        "islower" => cased(char::is_lowercase, char::is_uppercase)?,
        "isupper" => cased(char::is_uppercase, char::is_lowercase)?,
        _ => return Err(format!("'str object' has no attribute '{name}'")),
    })
}

/// Letters behind those for which `starts` says so, and the first, in upper case, others in lower.
pub fn capitalized(text: &Chars, starts: impl Fn(char) -> bool, fuel: &Fuel) -> Done<Chars> {
    let mut first = true;
    text.mapped(
        |c| {
            let upper = std::mem::replace(&mut first, starts(c));
            let both: Vec<char> =
                if upper { c.to_uppercase().collect() } else { c.to_lowercase().collect() };
            both
        },
        fuel,
    )
}

/// Where `part` stands in a text, without overlaps; between all characters if it is empty.
fn places(text: &Chars, part: &Chars, fuel: &Fuel) -> Done<Vec<usize>> {
    let (mut all, mut from) = (Vec::new(), 0);
    while let Some(at) = text.find(part.as_slice(), from, fuel)? {
        fuel.spend(2)?;
        all.push(at);
        from = at + part.len().max(1);
    }
    Ok(all)
}

fn places_overlapping(text: &Chars, part: &Chars, last: bool, fuel: &Fuel) -> Done<Option<usize>> {
    let mut found = text.find(part.as_slice(), 0, fuel)?;
    while let Some(at) = found.filter(|_| last) {
        match text.find(part.as_slice(), at + 1, fuel)? {
            None => break,
            next => found = next,
        }
    }
    Ok(found)
}

/// `text.replace(from, to, count)`
pub fn replace(
    text: &Chars,
    from: &Chars,
    to: &Chars,
    count: Option<usize>,
    fuel: &Fuel,
) -> Done<Chars> {
    let mut found = places(text, from, fuel)?;
    found.truncate(count.unwrap_or(usize::MAX));
    fuel.spend(found.len().saturating_mul(to.len() + 4))?;
    let (all, mut parts, mut start) = (text.as_slice(), Vec::new(), 0);
    for at in found {
        parts.extend([&all[start..at], to.as_slice()]);
        start = at + from.len();
    }
    parts.push(&all[start..]);
    Chars::join(&parts, fuel)
}

fn split(text: &Chars, from_right: bool, given: &mut Given, fuel: &Fuel) -> Done<Datum> {
    let sep = given.take("sep").filter(|s| !matches!(s, Datum::None));
    let most = given.integer("maxsplit")?.and_then(|n| usize::try_from(n).ok());
    let most = most.unwrap_or(usize::MAX);
    let mut parts: Vec<std::ops::Range<usize>> = Vec::new();
    match sep {
        Some(Datum::Text(sep)) => {
            if sep.len() == 0 {
                return Err("empty separator".into());
            }
            let mut found = places(text, &sep, fuel)?;
            if from_right {
                found.drain(..found.len().saturating_sub(most));
            }
            found.truncate(most);
            let mut start = 0;
            for at in found {
                parts.push(start..at);
                start = at + sep.len();
            }
            parts.push(start..text.len());
        }
        Some(other) => return Err(format!("`sep` is {}, wanted a text", other.kind())),
        None if from_right && most < usize::MAX => {
            return Err("rsplit() of white space with a maximum is not supported".into());
        }
        None => {
            fuel.spend(text.len())?;
            let space = |i: usize| char_of(text.as_slice()[i]).is_some_and(is_space);
            let mut at = 0;
            loop {
                while at < text.len() && space(at) {
                    at += 1;
                }
                if at == text.len() {
                    break;
                }
                let start = at;
                if parts.len() == most {
                    let mut end = text.len();
                    while space(end - 1) {
                        end -= 1;
                    }
                    parts.push(start..end);
                    break;
                }
                while at < text.len() && !space(at) {
                    at += 1;
                }
                fuel.spend(8)?;
                parts.push(start..at);
            }
        }
    }
    let part = |range| Ok(Datum::Text(text.slice(range, fuel)?));
    Datum::list(parts.into_iter().map(part).collect::<Done<_>>()?, fuel)
}

fn lines(text: &Chars, keep: bool, fuel: &Fuel) -> Done<Datum> {
    fuel.spend(text.len())?;
    let is = |i: usize, c: char| text.as_slice().get(i).and_then(|x| char_of(*x)) == Some(c);
    let (mut all, mut start) = (Vec::new(), 0);
    for at in 0..text.len() {
        // `\r\n` is one end.
        let ends = is(at, '\n') || is(at, '\r') && !is(at + 1, '\n');
        if ends {
            let before = at - usize::from(at > start && is(at, '\n') && is(at - 1, '\r'));
            let end = if keep { at + 1 } else { before };
            all.push(Datum::Text(text.slice(start..end, fuel)?));
            start = at + 1;
        }
    }
    if start < text.len() {
        all.push(Datum::Text(text.slice(start..text.len(), fuel)?));
    }
    Datum::list(all, fuel)
}

/// Items with a text between; `strict` takes texts only, as Python's method does.
pub fn join(items: &Datum, between: &Chars, strict: bool, fuel: &Fuel) -> Done<Datum> {
    let all = items.items(fuel)?;
    let mut out = Vec::new();
    for (i, item) in all.items.iter().enumerate() {
        if strict && !matches!(item, Datum::Text(_)) {
            return Err(format!("sequence item {i}: expected str, {} found", item.kind()));
        }
        let text = item.text(fuel)?;
        let between = if i > 0 { between.as_slice() } else { &[] };
        fuel.spend(text.len() + between.len())?;
        out.extend(between);
        out.extend(text.as_slice());
    }
    Ok(Datum::Text(out.into()))
}
