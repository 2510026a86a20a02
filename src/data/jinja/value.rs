//! Values of a template, as Python has them.

use std::{
    cell::{Cell, RefCell},
    cmp::Ordering,
    rc::Rc,
};

use serde_json::Value;

use super::chars::{Chars, Fuel};

/// The deepest nesting of lists and dicts.
const MAX_DEPTH: usize = 64;

/// Units of fuel that an item of a list costs.
const SLOT: usize = 8;

/// What the evaluation of a template gives: a message if it fails.
pub type Done<T> = Result<T, String>;

/// A value.
#[derive(Clone, Debug)]
pub enum Datum {
    /// With what is said where it cannot stand.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Integer(i64),
    Number(f64),
    Text(Chars),
    List(Rc<List>),
    Dict(Rc<Dict>),
    Namespace(Rc<RefCell<Vec<(String, Datum)>>>),
    /// A macro by its number, and the frame of variables around it.
    Macro(usize, usize),
    Function(&'static str),
    Method(Box<Datum>, Rc<str>),
    Loop(Rc<LoopState>),
}

/// Items, never changed.
#[derive(Debug)]
pub struct List {
    pub items: Vec<Datum>,
    depth: usize,
    /// A tuple, which is shown otherwise and equals no list.
    tuple: bool,
}

/// Keys and values in the order of insertion, never changed.
#[derive(Debug)]
pub struct Dict {
    pub entries: Vec<(Datum, Datum)>,
    depth: usize,
}

/// `loop` within a loop.
#[derive(Debug)]
pub struct LoopState {
    pub items: Rc<List>,
    pub index: Cell<usize>,
    /// Which of the loops that run.
    pub level: usize,
    /// Loops of the same statement around it.
    pub depth: usize,
}

impl Datum {
    pub fn undefined(hint: impl Into<Rc<str>>) -> Self {
        Self::Undefined(hint.into())
    }

    /// Text that the template wrote.
    pub fn written(text: &str) -> Self {
        Self::Text(Chars::written(text))
    }

    /// A value of the conversation.
    pub fn given(json: &Value, fuel: &Fuel) -> Done<Self> {
        Ok(match json {
            Value::Null => Self::None,
            Value::Bool(b) => Self::Bool(*b),
            Value::Number(n) => match n.as_i64() {
                Some(n) => Self::Integer(n),
                None => Self::Number(n.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => {
                fuel.spend(text.len() + 8)?;
                Self::Text(Chars::given(text))
            }
            Value::Array(all) => {
                let items = all.iter().map(|v| Self::given(v, fuel)).collect::<Done<_>>()?;
                Self::list(items, fuel)?
            }
            Value::Object(all) => {
                let entry = |(k, v): (&String, &Value)| {
                    fuel.spend(k.len() + 8)?;
                    Ok((Self::Text(Chars::given(k)), Self::given(v, fuel)?))
                };
                Self::dict(all.iter().map(entry).collect::<Done<_>>()?, fuel)?
            }
        })
    }

    fn depth(&self) -> Done<usize> {
        match self {
            Self::List(all) => Ok(all.depth),
            Self::Dict(all) => Ok(all.depth),
            // What changes would make circles.
            Self::Namespace(_) | Self::Loop(_) => {
                Err(format!("{} within another value", self.kind()))
            }
            Self::Method(of, _) => of.depth().map(|d| d + 1),
            _ => Ok(0),
        }
    }

    fn above<'a>(all: impl Iterator<Item = &'a Self>) -> Done<usize> {
        let depth = 1 + all.map(Self::depth).try_fold(0, |max, d| Done::Ok(d?.max(max)))?;
        if depth > MAX_DEPTH {
            return Err(format!("lists are nested more than {MAX_DEPTH} deep"));
        }
        Ok(depth)
    }

    /// A list of these items, which are paid for.
    pub fn list(items: Vec<Self>, fuel: &Fuel) -> Done<Self> {
        Self::sequence(items, false, fuel)
    }

    /// A tuple of these items, which are paid for.
    pub fn tuple(items: Vec<Self>, fuel: &Fuel) -> Done<Self> {
        Self::sequence(items, true, fuel)
    }

    fn sequence(items: Vec<Self>, tuple: bool, fuel: &Fuel) -> Done<Self> {
        fuel.spend(SLOT * (1 + items.len()))?;
        let depth = Self::above(items.iter())?;
        Ok(Self::List(Rc::new(List { items, depth, tuple })))
    }

    /// A dict of these entries, which are paid for; of two with one key the last one counts.
    pub fn dict(all: Vec<(Self, Self)>, fuel: &Fuel) -> Done<Self> {
        fuel.spend(SLOT * (1 + 2 * all.len()))?;
        let depth = Self::above(all.iter().flat_map(|(k, v)| [k, v]))?;
        let mut entries: Vec<(Self, Self)> = Vec::with_capacity(all.len());
        for (key, value) in all {
            if matches!(key, Self::List(_) | Self::Dict(_) | Self::Undefined(_)) {
                return Err(format!("{} is no key", key.kind()));
            }
            fuel.spend(entries.len())?;
            let mut before = None;
            for (i, (k, _)) in entries.iter().enumerate() {
                if k.equals(&key, fuel)? {
                    before = Some(i);
                }
            }
            match before {
                Some(i) => entries[i].1 = value,
                None => entries.push((key, value)),
            }
        }
        Ok(Self::Dict(Rc::new(Dict { entries, depth })))
    }

    /// Whether it may become an attribute of a namespace.
    pub fn can_be_kept(&self) -> Done<()> {
        self.depth().map(drop)
    }

    /// Python's name of its type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Integer(_) => "int",
            Self::Number(_) => "float",
            Self::Text(_) => "str",
            Self::List(_) => "list",
            Self::Dict(_) => "dict",
            Self::Namespace(_) => "namespace",
            Self::Macro(..) => "macro",
            Self::Function(_) | Self::Method(..) => "function",
            Self::Loop(_) => "loop",
        }
    }

    /// The message of an undefined value.
    pub fn defined(&self) -> Done<&Self> {
        match self {
            Self::Undefined(hint) => Err(hint.to_string()),
            _ => Ok(self),
        }
    }

    pub fn truth(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(b) => *b,
            Self::Integer(n) => *n != 0,
            Self::Number(x) => *x != 0.0,
            Self::Text(text) => text.len() > 0,
            Self::List(all) => !all.items.is_empty(),
            Self::Dict(all) => !all.entries.is_empty(),
            _ => true,
        }
    }

    /// As a whole number, as which Python takes a bool, too.
    pub fn integer(&self) -> Option<i64> {
        match self {
            Self::Bool(b) => Some(i64::from(*b)),
            Self::Integer(n) => Some(*n),
            _ => None,
        }
    }

    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Number(x) => Some(*x),
            _ => self.integer().map(|n| n as f64),
        }
    }

    /// `==`
    pub fn equals(&self, other: &Self, fuel: &Fuel) -> Done<bool> {
        fuel.spend(1)?;
        Ok(match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Text(a), Self::Text(b)) => a.equals(b, fuel)?,
            (Self::List(a), Self::List(b)) => {
                if a.items.len() != b.items.len() || a.tuple != b.tuple {
                    return Ok(false);
                }
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b, fuel)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Self::Dict(a), Self::Dict(b)) => {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (key, value) in &a.entries {
                    match b.get(key, fuel)? {
                        Some(other) if value.equals(other, fuel)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Macro(a, _), Self::Macro(b, _)) => a == b,
            (Self::Function(a), Self::Function(b)) => a == b,
            _ => match (self.integer(), other.integer()) {
                (Some(a), Some(b)) => a == b,
                _ => self.number().is_some_and(|a| other.number() == Some(a)),
            },
        })
    }

    /// The order of two values, which Python has of numbers, texts and lists only.
    pub fn compare(&self, other: &Self, fuel: &Fuel) -> Done<Ordering> {
        fuel.spend(1)?;
        let none = || {
            let (a, b) = (self.defined()?.kind(), other.defined()?.kind());
            Err(format!("'<' not supported between instances of '{a}' and '{b}'"))
        };
        match (self, other) {
            (Self::Text(a), Self::Text(b)) => {
                fuel.spend(a.len().min(b.len()))?;
                Ok(a.plain().cmp(&b.plain()))
            }
            (Self::List(a), Self::List(b)) => {
                for (a, b) in a.items.iter().zip(&b.items) {
                    let order = a.compare(b, fuel)?;
                    if order.is_ne() {
                        return Ok(order);
                    }
                }
                Ok(a.items.len().cmp(&b.items.len()))
            }
            _ => match (self.integer(), other.integer(), self.number(), other.number()) {
                (Some(a), Some(b), ..) => Ok(a.cmp(&b)),
                (.., Some(a), Some(b)) => a.partial_cmp(&b).map_or_else(none, Ok),
                _ => none(),
            },
        }
    }

    /// What a loop visits.
    pub fn items(&self, fuel: &Fuel) -> Done<Rc<List>> {
        let of = |items| match Self::list(items, fuel)? {
            Self::List(list) => Ok(list),
            _ => Err(String::new()),
        };
        match self {
            Self::List(list) => Ok(list.clone()),
            Self::Undefined(_) => of(Vec::new()),
            Self::Dict(all) => {
                fuel.spend(all.entries.len())?;
                of(all.entries.iter().map(|(k, _)| k.clone()).collect())
            }
            Self::Text(text) => {
                fuel.spend(10 * text.len())?;
                of(text.as_slice().iter().map(|c| Self::Text(vec![*c].into())).collect())
            }
            _ => Err(format!("'{}' object is not iterable", self.kind())),
        }
    }

    /// `str(value)`
    pub fn text(&self, fuel: &Fuel) -> Done<Chars> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::Undefined(_) => Ok(Chars::written("")),
            _ => {
                let mut out = Vec::new();
                self.represent(&mut out, fuel)?;
                Ok(out.into())
            }
        }
    }

    /// Appends `repr(value)`.
    fn represent(&self, out: &mut Vec<u32>, fuel: &Fuel) -> Done<()> {
        let mut put = |text: &str| {
            fuel.spend(text.len() + 1)?;
            out.extend(text.chars().map(u32::from));
            Done::Ok(())
        };
        match self {
            Self::Undefined(_) => put("Undefined"),
            Self::None => put("None"),
            Self::Bool(b) => put(if *b { "True" } else { "False" }),
            Self::Integer(n) => put(&n.to_string()),
            Self::Number(x) => put(&float(*x)),
            Self::Text(text) => quoted(text, out, fuel),
            Self::List(all) => {
                put(if all.tuple { "(" } else { "[" })?;
                for (i, item) in all.items.iter().enumerate() {
                    comma(i, out);
                    item.represent(out, fuel)?;
                }
                if all.tuple && all.items.len() == 1 {
                    out.push(','.into());
                }
                out.push(if all.tuple { ')' } else { ']' }.into());
                Ok(())
            }
            Self::Dict(all) => {
                put("{")?;
                for (i, (key, value)) in all.entries.iter().enumerate() {
                    comma(i, out);
                    key.represent(out, fuel)?;
                    out.extend([':', ' '].map(u32::from));
                    value.represent(out, fuel)?;
                }
                out.push('}'.into());
                Ok(())
            }
            _ => put(&format!("<{}>", self.kind())),
        }
    }
}

fn comma(i: usize, out: &mut Vec<u32>) {
    if i > 0 {
        out.extend([',', ' '].map(u32::from));
    }
}

/// A text as Python shows it in a list.
fn quoted(text: &Chars, out: &mut Vec<u32>, fuel: &Fuel) -> Done<()> {
    fuel.spend(2 * text.len() + 2)?;
    let has = |c: char| text.as_slice().iter().any(|x| super::chars::char_of(*x) == Some(c));
    let quote = if has('\'') && !has('"') { '"' } else { '\'' };
    out.push(quote.into());
    let inner = text.mapped(
        |c| {
            let escape = match c {
                '\n' => "\\n".to_owned(),
                '\r' => "\\r".to_owned(),
                '\t' => "\\t".to_owned(),
                '\\' => "\\\\".to_owned(),
                c if c == quote => format!("\\{c}"),
                c if c.is_control() => format!("\\x{:02x}", u32::from(c)),
                c => c.to_string(),
            };
            escape.chars().collect::<Vec<_>>()
        },
        fuel,
    )?;
    out.extend(inner.as_slice());
    out.push(quote.into());
    Ok(())
}

/// A number as Python writes it: the shortest that reads back, with an exponent outside of 1e-4 to
/// 1e16.
pub fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into();
    }
    let text = format!("{x:?}");
    match text.split_once('e') {
        None => text,
        Some((mantissa, exponent)) => {
            let mantissa = mantissa.strip_suffix(".0").unwrap_or(mantissa);
            let exponent: i32 = exponent.parse().unwrap_or_default();
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.abs())
        }
    }
}

impl Dict {
    /// The value of a key.
    pub fn get(&self, key: &Datum, fuel: &Fuel) -> Done<Option<&Datum>> {
        for (k, value) in &self.entries {
            if k.equals(key, fuel)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// The value of a key that is a text.
    pub fn named(&self, name: &str, fuel: &Fuel) -> Done<Option<&Datum>> {
        fuel.spend(self.entries.len())?;
        let is = |k: &Datum| matches!(k, Datum::Text(text) if text.is(name));
        Ok(self.entries.iter().find(|(k, _)| is(k)).map(|(_, value)| value))
    }
}
