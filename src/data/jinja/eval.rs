//! Evaluates the tree of a template.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

use super::{
    access,
    ast::{Arguments, Expr, ForLoop, Stmt, StmtKind, Target, Tree},
    chars::{Fuel, GENERATED},
    filters,
    methods::{self, Given},
    operators,
    predicates::{self, brief},
    strftime,
    value::{Datum, Done, LoopState},
};

/// Evaluations within each other: each takes less than 1 kB of stack.
const MAX_DEPTH: usize = 900;

/// The most that `range` gives, as in Jinja's sandbox.
const MAX_RANGE: i64 = 100_000;

/// Where a statement leads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

/// Variables, and the frame in which those are found that are not here.
struct Frame<'a> {
    names: HashMap<&'a str, Datum>,
    parent: usize,
}

/// A template that runs.
pub struct Interpreter<'a> {
    tree: &'a Tree,
    fuel: &'a Fuel,
    /// Seconds since 1970 that `strftime_now` tells.
    now: i64,
    frames: Vec<Frame<'a>>,
    /// The frame that names are looked up in first.
    frame: usize,
    loops: Vec<&'a ForLoop>,
    out: Vec<u32>,
    depth: usize,
}

impl<'a> Interpreter<'a> {
    pub fn new(tree: &'a Tree, variables: Vec<(&'a str, Datum)>, now: i64, fuel: &'a Fuel) -> Self {
        let frames = vec![Frame { names: variables.into_iter().collect(), parent: 0 }];
        Self { tree, fuel, now, frames, frame: 0, loops: Vec::new(), out: Vec::new(), depth: 0 }
    }

    /// What the template writes.
    pub fn run(mut self) -> Done<Vec<u32>> {
        self.block(&self.tree.body)?;
        Ok(self.out)
    }

    /// Runs in a frame of its own above `parent`.
    fn framed<T>(&mut self, parent: usize, run: impl FnOnce(&mut Self) -> Done<T>) -> Done<T> {
        self.fuel.spend(8)?;
        let before = std::mem::replace(&mut self.frame, self.frames.len());
        self.frames.push(Frame { names: HashMap::new(), parent });
        let done = run(self);
        self.frames.truncate(self.frame);
        self.frame = before;
        done
    }

    /// What `run` writes.
    fn captured(&mut self, run: impl FnOnce(&mut Self) -> Done<()>) -> Done<Vec<u32>> {
        let before = std::mem::take(&mut self.out);
        run(self)?;
        Ok(std::mem::replace(&mut self.out, before))
    }

    fn deeper<T>(&mut self, run: impl FnOnce(&mut Self) -> Done<T>) -> Done<T> {
        self.fuel.spend(8)?;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("the template calls itself too deep".into());
        }
        let done = run(self);
        self.depth -= 1;
        done
    }

    fn write(&mut self, text: &[u32]) -> Done<()> {
        self.fuel.spend(text.len())?;
        self.out.extend(text);
        Ok(())
    }

    fn block(&mut self, body: &'a [Stmt]) -> Done<Flow> {
        for stmt in body {
            let flow = self.deeper(|s| s.statement(&stmt.kind)).map_err(|e| {
                // The innermost line is told.
                if e.contains(" in line ") { e } else { format!("{e} in line {}", stmt.line) }
            })?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, stmt: &'a StmtKind) -> Done<Flow> {
        match stmt {
            StmtKind::Data(text) => self.write(text.as_slice())?,
            StmtKind::Print(e) => {
                let text = self.eval(e)?.text(self.fuel)?;
                self.write(text.as_slice())?;
            }
            StmtKind::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.eval(condition)?.truth() {
                        return self.block(body);
                    }
                }
                return self.block(otherwise);
            }
            StmtKind::For(all) => {
                let items = self.eval(&all.items)?;
                self.for_loop(all, &items, 0)?;
            }
            StmtKind::Set(target, e) => {
                let value = self.eval(e)?;
                self.assign(target, value)?;
            }
            StmtKind::SetBlock(target, filters, body) => {
                let text = self.inner(body)?;
                let value = self.filtered(Datum::Text(text.into()), filters)?;
                self.assign(target, value)?;
            }
            StmtKind::Macro(id) => {
                let name = &self.tree.macros[*id].name;
                self.set(name, Datum::Macro(*id, 0));
            }
            StmtKind::CallBlock(call, id) => {
                let caller = Datum::Macro(*id, self.frame);
                let Expr::Call(what, arguments) = call else { return Ok(Flow::Next) };
                let (what, given) = (self.eval(what)?, self.arguments(arguments)?);
                let text = self.call(&what, given, Some(caller))?.text(self.fuel)?;
                self.write(text.as_slice())?;
            }
            StmtKind::FilterBlock(filters, body) => {
                let text = self.inner(body)?;
                let value = self.filtered(Datum::Text(text.into()), filters)?;
                self.write(value.text(self.fuel)?.as_slice())?;
            }
            StmtKind::With(all, body) => {
                return self.framed(self.frame, |s| {
                    for (target, e) in all {
                        let value = s.eval(e)?;
                        s.assign(target, value)?;
                    }
                    s.block(body)
                });
            }
            StmtKind::Generation(body) => {
                let mut text = self.inner(body)?;
                text.iter_mut().for_each(|c| *c |= GENERATED);
                self.write(&text)?;
            }
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    /// What a block with variables of its own writes.
    fn inner(&mut self, body: &'a [Stmt]) -> Done<Vec<u32>> {
        self.captured(|s| s.framed(s.frame, |s| s.block(body).map(drop)))
    }

    fn filtered(&mut self, mut value: Datum, all: &'a [(String, Arguments)]) -> Done<Datum> {
        for (name, arguments) in all {
            let given = self.arguments(arguments)?;
            value = filters::apply(&value, name, given, self.fuel)?;
        }
        Ok(value)
    }

    fn for_loop(&mut self, all: &'a ForLoop, items: &Datum, depth: usize) -> Done<()> {
        let mut items = items.items(self.fuel)?;
        if let Some(condition) = &all.condition {
            let mut kept = Vec::new();
            for item in &items.items {
                let keeps = self.framed(self.frame, |s| {
                    s.assign(&all.target, item.clone())?;
                    Ok(s.eval(condition)?.truth())
                })?;
                if keeps {
                    kept.push(item.clone());
                }
            }
            items = Datum::list(kept, self.fuel)?.items(self.fuel)?;
        }
        if items.items.is_empty() {
            return self.framed(self.frame, |s| s.block(&all.otherwise).map(drop));
        }
        let level = self.loops.len();
        self.loops.push(all);
        let state = LoopState { items: items.clone(), index: Cell::new(0), level, depth };
        let state = Rc::new(state);
        for (i, item) in items.items.iter().enumerate() {
            state.index.set(i);
            let flow = self.framed(self.frame, |s| {
                s.set("loop", Datum::Loop(state.clone()));
                s.assign(&all.target, item.clone())?;
                s.block(&all.body)
            })?;
            if flow == Flow::Break {
                break;
            }
        }
        self.loops.truncate(level);
        Ok(())
    }

    fn set(&mut self, name: &'a str, value: Datum) {
        self.frames[self.frame].names.insert(name, value);
    }

    fn assign(&mut self, target: &'a Target, value: Datum) -> Done<()> {
        match target {
            Target::Name(name) => self.set(name, value),
            Target::Attribute(name, attribute) => {
                let Datum::Namespace(all) = self.lookup(name)? else {
                    return Err(format!("cannot assign attribute on non-namespace `{name}`"));
                };
                value.can_be_kept()?;
                let mut all = all.borrow_mut();
                self.fuel.spend(8 + all.len())?;
                match all.iter_mut().find(|(n, _)| n == attribute) {
                    Some((_, old)) => *old = value,
                    None => all.push((attribute.clone(), value)),
                }
            }
            Target::Many(targets) => {
                let all = value.defined()?.items(self.fuel)?;
                if all.items.len() != targets.len() {
                    let (n, m) = (all.items.len(), targets.len());
                    return Err(format!("cannot unpack {n} values to {m}"));
                }
                for (target, value) in targets.iter().zip(&all.items) {
                    self.assign(target, value.clone())?;
                }
            }
        }
        Ok(())
    }

    fn lookup(&self, name: &str) -> Done<Datum> {
        let mut at = self.frame;
        loop {
            self.fuel.spend(2)?;
            let frame = &self.frames[at];
            if let Some(value) = frame.names.get(name) {
                return Ok(value.clone());
            }
            if at == 0 {
                break;
            }
            at = frame.parent;
        }
        const FUNCTIONS: [&str; 5] =
            ["range", "dict", "namespace", "raise_exception", "strftime_now"];
        let function = FUNCTIONS.iter().find(|f| **f == name);
        Ok(function.map_or_else(
            || Datum::undefined(format!("'{}' is undefined", brief(name))),
            |f| Datum::Function(f),
        ))
    }

    fn arguments(&mut self, all: &'a Arguments) -> Done<Given> {
        let mut given = Given::default();
        for e in &all.positional {
            given.positional.push(self.eval(e)?);
        }
        for (name, e) in &all.named {
            given.named.push((name.clone(), self.eval(e)?));
        }
        if let Some(e) = &all.spread[0] {
            let list = self.eval(e)?.items(self.fuel)?;
            self.fuel.spend(8 * list.items.len())?;
            given.positional.extend(list.items.iter().cloned());
        }
        if let Some(e) = &all.spread[1] {
            let Datum::Dict(all) = self.eval(e)? else {
                return Err("argument after ** must be a mapping".into());
            };
            self.fuel.spend(16 * all.entries.len())?;
            for (key, value) in &all.entries {
                given.named.push((key.text(self.fuel)?.plain(), value.clone()));
            }
        }
        Ok(given)
    }

    fn eval(&mut self, e: &'a Expr) -> Done<Datum> {
        self.deeper(|s| s.expression(e))
    }

    fn expression(&mut self, e: &'a Expr) -> Done<Datum> {
        Ok(match e {
            Expr::Undefined => Datum::undefined("the condition was false, and there is no `else`"),
            Expr::None => Datum::None,
            Expr::Bool(b) => Datum::Bool(*b),
            Expr::Integer(n) => Datum::Integer(*n),
            Expr::Number(x) => Datum::Number(*x),
            Expr::Text(text) => Datum::Text(text.clone()),
            Expr::Name(name) => self.lookup(name)?,
            Expr::List(all) => {
                let items = all.iter().map(|e| self.eval(e)).collect::<Done<_>>()?;
                Datum::list(items, self.fuel)?
            }
            Expr::Tuple(all) => {
                let items = all.iter().map(|e| self.eval(e)).collect::<Done<_>>()?;
                Datum::tuple(items, self.fuel)?
            }
            Expr::Dict(all) => {
                let entry = |(k, v): &'a (Expr, Expr)| Ok((self.eval(k)?, self.eval(v)?));
                let entries = all.iter().map(entry).collect::<Done<_>>()?;
                Datum::dict(entries, self.fuel)?
            }
            Expr::Attribute(of, name) => {
                let of = self.eval(of)?;
                access::attribute(&of, name, self.fuel)?
            }
            Expr::Item(of, key) => {
                let (of, key) = (self.eval(of)?, self.eval(key)?);
                access::item(&of, &key, self.fuel)?
            }
            Expr::Slice(of, parts) => {
                let of = self.eval(of)?;
                let mut values = [const { None }; 3];
                for (value, part) in values.iter_mut().zip(parts) {
                    *value = part.as_ref().map(|e| self.eval(e)).transpose()?;
                }
                access::slice(&of, values, self.fuel)?
            }
            Expr::Call(what, arguments) => {
                let (what, given) = (self.eval(what)?, self.arguments(arguments)?);
                self.call(&what, given, None)?
            }
            Expr::Filter(of, name, arguments) => {
                let (of, given) = (self.eval(of)?, self.arguments(arguments)?);
                filters::apply(&of, name, given, self.fuel)?
            }
            Expr::Test(of, name, arguments, negative) => {
                let (of, given) = (self.eval(of)?, self.arguments(arguments)?);
                Datum::Bool(predicates::test(&of, name, given, self.fuel)? != *negative)
            }
            Expr::Not(e) => Datum::Bool(!self.eval(e)?.truth()),
            Expr::Negative(e) => operators::negative(&self.eval(e)?)?,
            Expr::Binary(sign, a, b) => {
                let (a, b) = (self.eval(a)?, self.eval(b)?);
                operators::binary(sign, &a, &b, self.fuel)?
            }
            Expr::And(a, b) | Expr::Or(a, b) => {
                let first = self.eval(a)?;
                let decided = first.truth() == matches!(e, Expr::Or(..));
                if decided { first } else { self.eval(b)? }
            }
            Expr::Compare(first, rest) => {
                let mut left = self.eval(first)?;
                for (sign, e) in rest {
                    let right = self.eval(e)?;
                    if !operators::compare(sign, &left, &right, self.fuel)? {
                        return Ok(Datum::Bool(false));
                    }
                    left = right;
                }
                Datum::Bool(true)
            }
            Expr::If(a, condition, b) => {
                let holds = self.eval(condition)?.truth();
                self.eval(if holds { a } else { b })?
            }
        })
    }

    fn call(&mut self, what: &Datum, mut given: Given, caller: Option<Datum>) -> Done<Datum> {
        match what {
            Datum::Macro(id, frame) => self.call_macro((*id, *frame), given, caller),
            Datum::Method(of, name) => methods::call(of, name, given, self.fuel),
            Datum::Loop(state) => {
                let all = self.loops.get(state.level).copied().filter(|all| all.recursive);
                let all = all.ok_or("the loop is not recursive")?;
                let items = given.need("iterable")?;
                let depth = state.depth + 1;
                let text = self.captured(|s| s.for_loop(all, &items, depth))?;
                Ok(Datum::Text(text.into()))
            }
            Datum::Function(name) => self.function(name, given),
            Datum::Undefined(hint) => Err(hint.to_string()),
            _ => Err(format!("'{}' object is not callable", what.kind())),
        }
    }

    fn call_macro(
        &mut self,
        (id, parent): (usize, usize),
        mut given: Given,
        caller: Option<Datum>,
    ) -> Done<Datum> {
        let all = &self.tree.macros[id];
        // A caller that outlived its call block has no variables.
        let parent = if parent < self.frames.len() { parent } else { 0 };
        let text = self.captured(|s| {
            s.framed(parent, |s| {
                for (name, default) in &all.parameters {
                    let value = match (given.take(name), default) {
                        (Some(value), _) => value,
                        (None, Some(default)) => s.eval(default)?,
                        (None, None) => {
                            Datum::undefined(format!("parameter '{name}' was not provided"))
                        }
                    };
                    s.set(name, value);
                }
                given.end().map_err(|e| format!("macro `{}`: {e}", brief(&all.name)))?;
                if let Some(caller) = caller {
                    s.set("caller", caller);
                }
                s.block(&all.body).map(drop)
            })
        })?;
        Ok(Datum::Text(text.into()))
    }

    fn function(&mut self, name: &str, mut given: Given) -> Done<Datum> {
        match name {
            "raise_exception" => Err(given.need("message")?.text(self.fuel)?.plain()),
            "strftime_now" => {
                let text = strftime::strftime(self.now, &given.text("format")?.plain())?;
                self.fuel.spend(text.len())?;
                Ok(Datum::written(&text))
            }
            "range" => {
                let first = given.integer("start")?.ok_or("range() has no argument")?;
                let (start, stop) = match given.integer("stop")? {
                    None => (0, first),
                    Some(stop) => (first, stop),
                };
                let step = given.integer("step")?.unwrap_or(1);
                if step == 0 {
                    return Err("range() arg 3 must not be zero".into());
                }
                let span = if step > 0 { stop.checked_sub(start) } else { start.checked_sub(stop) };
                let n = span.ok_or("range() is too long")?.max(0) as u64;
                let n = n.div_ceil(step.unsigned_abs());
                if n > MAX_RANGE as u64 {
                    return Err(format!("range() of {n} numbers, wanted at most {MAX_RANGE}"));
                }
                self.fuel.spend(8 * n as usize)?;
                let items = (0..n as i64).map(|i| Datum::Integer(start + i * step)).collect();
                Datum::list(items, self.fuel)
            }
            _ => {
                let mut entries = Vec::new();
                match given.take("mapping") {
                    None => {}
                    Some(Datum::Dict(all)) => {
                        self.fuel.spend(all.entries.len())?;
                        entries.extend(all.entries.iter().cloned());
                    }
                    Some(other) => return Err(format!("{name}() of a {}", other.kind())),
                }
                for (key, value) in std::mem::take(&mut given.named) {
                    entries.push((Datum::written(&key), value));
                }
                given.end()?;
                let Datum::Dict(all) = Datum::dict(entries, self.fuel)? else {
                    return Ok(Datum::None);
                };
                if name == "dict" {
                    return Ok(Datum::Dict(all));
                }
                let text = |k: &Datum| Done::Ok(k.text(self.fuel)?.plain());
                let all = all.entries.iter().map(|(k, v)| Done::Ok((text(k)?, v.clone())));
                Ok(Datum::Namespace(Rc::new(RefCell::new(all.collect::<Done<_>>()?))))
            }
        }
    }
}
