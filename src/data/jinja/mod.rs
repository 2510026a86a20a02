//! Chat templates: Jinja as `transformers` renders it, under limits.
//!
//! A template is a program that comes with a model, so it may be anybody's. It sees the
//! conversation and nothing else: no file, no other template, no clock but the one that it is told.
//! The length of its source bounds the parser, `Fuel` bounds the time and the memory of a
//! rendering, and a rendering knows of each character whether the template or the conversation
//! wrote it.
//!
//! An engine of our own: the fuel of `minijinja` 3.1 bounds neither time nor memory. Lists that
//! share their items take it minutes and gigabytes where they are compared, shown or added up, and
//! the process ends where a namespace holds itself.
//!
//! Source: `jinja2` 3.1 and `transformers/utils/chat_template_utils.py` 5.23 (`trim_blocks`,
//! `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, `tojson` without escapes,
//! `generation` blocks, an immutable sandbox).

mod access;
mod ast;
mod chars;
mod eval;
mod filters;
mod json;
mod lexer;
mod methods;
mod operators;
mod parser;
mod predicates;
mod strftime;
mod value;

use std::ops::Range;

use serde_json::Value;

use ast::Tree;
use chars::{Chars, END, Fuel, GENERATED, GIVEN, char_of};
use eval::Interpreter;
use value::Datum;

pub use strftime::noon;

/// Bytes of the longest template; real ones have up to 30 kB.
const MAX_SOURCE: usize = 256 << 10;

/// Units of fuel of every rendering: 4 bytes of text each.
const FUEL: u64 = 5_000_000;

/// More units for each byte of the conversation: a template reads it some dozens of times.
const FUEL_PER_BYTE: u64 = 40;

/// A parsed chat template.
#[derive(Debug)]
pub struct Template {
    tree: Tree,
}

/// A variable of a template.
#[derive(Clone, Copy, Debug)]
pub enum Variable<'a> {
    /// Text that counts as the template's own, as that of BOS.
    Written(&'a str),
    /// A part of the conversation.
    Given(&'a Value),
    /// Messages of which the last one goes on: the rendering ends with its text.
    Unfinished(&'a Value),
    Bool(bool),
}

/// What a template wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendering {
    pub text: String,
    /// Bytes that stood in the conversation, ascending, apart.
    pub given: Vec<Range<usize>>,
    /// Bytes that `generation` blocks wrote, ascending, apart.
    pub generated: Vec<Range<usize>>,
}

impl Template {
    /// Parses a template; the error says what is wrong with it, and in which line.
    pub fn parse(source: &str) -> Result<Self, String> {
        if source.len() > MAX_SOURCE {
            return Err(format!("has {} bytes, wanted at most {MAX_SOURCE}", source.len()));
        }
        Ok(Self { tree: parser::parse(source)? })
    }

    /// Whether it says by `generation` blocks what a model writes.
    pub fn generates(&self) -> bool {
        self.tree.generates
    }

    /// Renders these variables at a time in seconds since 1970.
    pub fn render<'a>(
        &'a self,
        variables: &[(&'a str, Variable<'_>)],
        now: i64,
    ) -> Result<Rendering, String> {
        let bytes = |v: &Variable<'_>| match v {
            Variable::Given(json) | Variable::Unfinished(json) => size(json),
            _ => 0,
        };
        let bytes: u64 = variables.iter().map(|(_, v)| bytes(v)).sum();
        let fuel = Fuel::new(FUEL + FUEL_PER_BYTE * bytes);
        let datum = |(name, variable): (&'a str, Variable<'_>)| {
            let value = match variable {
                Variable::Written(text) => Datum::written(text),
                Variable::Given(json) => Datum::given(json, &fuel)?,
                Variable::Unfinished(json) => unfinished(&Datum::given(json, &fuel)?, &fuel)?,
                Variable::Bool(b) => Datum::Bool(b),
            };
            Ok((name, value))
        };
        let mut ends = variables.iter();
        let variables = variables.iter().copied().map(datum).collect::<Result<_, String>>()?;
        let goes_on = ends.any(|v| matches!(v.1, Variable::Unfinished(_)));
        let mut chars = Interpreter::new(&self.tree, variables, now, &fuel).run()?;
        if goes_on {
            cut(&mut chars)?;
        }
        Ok(rendering(&chars))
    }
}

/// Bytes of the texts of a value, and of all else in it.
fn size(json: &Value) -> u64 {
    match json {
        Value::String(text) => text.len() as u64,
        Value::Array(all) => all.iter().map(|v| 8 + size(v)).sum(),
        Value::Object(all) => all.iter().map(|(k, v)| 8 + k.len() as u64 + size(v)).sum(),
        _ => 8,
    }
}

/// Messages with the end of the last text marked, as `continue_final_message` does.
fn unfinished(messages: &Datum, fuel: &Fuel) -> Result<Datum, String> {
    let none = || "the last message has no text that could go on".to_owned();
    let marked = |value: &Datum| match value {
        Datum::Text(text) => {
            let end = [END, ' '.into()];
            Chars::join(&[text.as_slice(), &end], fuel).map(Datum::Text)
        }
        _ => Err(none()),
    };
    // With the value of a key replaced.
    let with = |of: &Datum, name: &str, new: &dyn Fn(&Datum) -> Result<Datum, String>| {
        let Datum::Dict(all) = of else { return Err(none()) };
        let new = new(all.named(name, fuel)?.ok_or_else(none)?)?;
        let mut entries = all.entries.clone();
        entries.push((Datum::written(name), new));
        Datum::dict(entries, fuel)
    };
    let last = |of: &Datum, at: &dyn Fn(&Datum) -> bool, new: &dyn Fn(&Datum) -> _| {
        let Datum::List(all) = of else { return Err(none()) };
        let at = all.items.iter().rposition(at).ok_or_else(none)?;
        let mut items = all.items.clone();
        items[at] = new(&items[at])?;
        Datum::list(items, fuel)
    };
    let has_text = |part: &Datum| match part {
        Datum::Dict(all) => all.named("text", fuel).is_ok_and(|text| text.is_some()),
        _ => false,
    };
    let part = |part: &Datum| with(part, "text", &marked);
    let content = |content: &Datum| match content {
        Datum::List(_) => last(content, &has_text, &part),
        text => marked(text),
    };
    last(messages, &|_| true, &|message| with(message, "content", &content))
}

/// Ends a rendering where the last message does; without the white space that the template took.
fn cut(chars: &mut Vec<u32>) -> Result<(), String> {
    let at = chars.iter().rposition(|c| char_of(*c).is_none());
    let at = at.ok_or("the last message does not appear in what the template writes")?;
    let whole = chars.get(at + 1).is_some_and(|c| char_of(*c) == Some(' '));
    chars.truncate(at);
    let space = |c: &u32| char_of(*c).is_some_and(lexer::is_space);
    while !whole && chars.last().is_some_and(space) {
        chars.pop();
    }
    Ok(())
}

/// Takes what is known of characters apart from them.
fn rendering(chars: &[u32]) -> Rendering {
    let mut out = Rendering::default();
    out.text.reserve(chars.len());
    for c in chars {
        let Some(plain) = char_of(*c) else { continue };
        let start = out.text.len();
        out.text.push(plain);
        for (flag, ranges) in [(GIVEN, &mut out.given), (GENERATED, &mut out.generated)] {
            if c & flag != 0 {
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = out.text.len(),
                    _ => ranges.push(start..out.text.len()),
                }
            }
        }
    }
    out
}
