//! Tokens of a template to its tree.
//!
//! Source: `jinja2/parser.py` 3.1.

use super::{
    ast::{Arguments, Expr, ForLoop, MacroDef, Stmt, StmtKind, Target, Tree},
    chars::Chars,
    lexer::{self, Token},
};

/// The deepest nesting of brackets and of statements.
const MAX_DEPTH: usize = 60;

type Parsed<T> = Result<T, String>;

/// Parses a template.
pub fn parse(source: &str) -> Parsed<Tree> {
    let tokens = lexer::tokens(source)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, loops: 0, tree: Tree::default() };
    let parsed = parser.block(&[]);
    let line = parser.line();
    parser.tree.body = parsed.map_err(|e| format!("{e} in line {line}"))?.0;
    Ok(parser.tree)
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
    depth: usize,
    /// Loops around the statement.
    loops: usize,
    tree: Tree,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at].0
    }

    /// The token behind that.
    fn after(&self) -> &Token {
        self.tokens.get(self.at + 1).map_or(&Token::End, |t| &t.0)
    }

    fn line(&self) -> usize {
        self.tokens[self.at].1
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at = (self.at + 1).min(self.tokens.len() - 1);
        token
    }

    fn is(&self, sign: &str) -> bool {
        matches!(self.peek(), Token::Sign(s) if *s == sign)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(n) if n == name)
    }

    fn takes(&mut self, sign: &str) -> bool {
        let is = self.is(sign);
        self.at += usize::from(is);
        is
    }

    fn takes_name(&mut self, name: &str) -> bool {
        let is = self.is_name(name);
        self.at += usize::from(is);
        is
    }

    fn expect(&mut self, sign: &str) -> Parsed<()> {
        if self.takes(sign) { Ok(()) } else { Err(self.unexpected(&format!("`{sign}`"))) }
    }

    fn unexpected(&self, want: &str) -> String {
        let got = match self.peek() {
            Token::Name(n) => format!("`{}`", n.chars().take(60).collect::<String>()),
            Token::Sign(s) => format!("`{s}`"),
            Token::Text(_) => "a text".into(),
            Token::Integer(_) | Token::Number(_) => "a number".into(),
            Token::TagEnd | Token::PrintEnd => "the end of the tag".into(),
            _ => "the end of the template".into(),
        };
        format!("got {got}, wanted {want}")
    }

    fn name(&mut self) -> Parsed<String> {
        match self.peek() {
            Token::Name(_) => match self.next() {
                Token::Name(name) => Ok(name),
                _ => Ok(String::new()),
            },
            _ => Err(self.unexpected("a name")),
        }
    }

    fn end_tag(&mut self) -> Parsed<()> {
        match self.peek() {
            Token::TagEnd => {
                self.next();
                Ok(())
            }
            _ => Err(self.unexpected("the end of the tag")),
        }
    }

    /// Parses one level deeper.
    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("is nested more than {MAX_DEPTH} deep"));
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// Statements up to a tag of these names, which is taken with its name.
    fn block(&mut self, ends: &[&str]) -> Parsed<(Vec<Stmt>, String)> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.next() {
                Token::Data(text) => StmtKind::Data(Chars::written(&text)),
                Token::Print => {
                    let e = self.tuple()?;
                    match self.next() {
                        Token::PrintEnd => StmtKind::Print(e),
                        _ => {
                            self.at = self.at.saturating_sub(1);
                            return Err(self.unexpected("`}}`"));
                        }
                    }
                }
                Token::Tag => {
                    let name = self.name()?;
                    if ends.contains(&&*name) {
                        return Ok((body, name));
                    }
                    self.deeper(|p| p.statement(&name))?
                }
                _ if ends.is_empty() => return Ok((body, String::new())),
                _ => return Err(format!("got the end of the template, wanted `{}`", ends[0])),
            };
            body.push(Stmt { line, kind });
        }
    }

    /// Statements up to the tag of this name, which ends at once.
    fn body(&mut self, end: &str) -> Parsed<Vec<Stmt>> {
        self.end_tag()?;
        let (body, _) = self.block(&[end])?;
        self.end_tag()?;
        Ok(body)
    }

    fn statement(&mut self, name: &str) -> Parsed<StmtKind> {
        match name {
            "if" => self.conditional(),
            "for" => self.for_loop(),
            "set" => self.set(),
            "macro" => {
                let name = self.name()?;
                let parameters = self.parameters()?;
                let (loops, body) = (std::mem::take(&mut self.loops), self.body("endmacro")?);
                self.loops = loops;
                self.tree.macros.push(MacroDef { name, parameters, body });
                Ok(StmtKind::Macro(self.tree.macros.len() - 1))
            }
            "call" => {
                let parameters = if self.is("(") { self.parameters()? } else { Vec::new() };
                let call = self.expression()?;
                if !matches!(call, Expr::Call(..)) {
                    return Err("got an expression, wanted a call".into());
                }
                let body = self.body("endcall")?;
                self.tree.macros.push(MacroDef { name: "caller".into(), parameters, body });
                Ok(StmtKind::CallBlock(call, self.tree.macros.len() - 1))
            }
            "filter" => {
                let filters = self.filters(true)?;
                Ok(StmtKind::FilterBlock(filters, self.body("endfilter")?))
            }
            "with" => {
                let mut all = Vec::new();
                while !matches!(self.peek(), Token::TagEnd) {
                    if !all.is_empty() {
                        self.expect(",")?;
                    }
                    let target = self.target()?;
                    self.expect("=")?;
                    all.push((target, self.expression()?));
                }
                Ok(StmtKind::With(all, self.body("endwith")?))
            }
            "generation" => {
                self.tree.generates = true;
                Ok(StmtKind::Generation(self.body("endgeneration")?))
            }
            "break" | "continue" if self.loops == 0 => Err(format!("`{name}` outside of a loop")),
            "break" => self.end_tag().map(|()| StmtKind::Break),
            "continue" => self.end_tag().map(|()| StmtKind::Continue),
            name => Err(format!("there is no tag `{}`", name.chars().take(60).collect::<String>())),
        }
    }

    fn conditional(&mut self) -> Parsed<StmtKind> {
        let (mut branches, mut otherwise) = (Vec::new(), Vec::new());
        let mut condition = self.tuple()?;
        loop {
            self.end_tag()?;
            let (body, end) = self.block(&["endif", "elif", "else"])?;
            branches.push((condition, body));
            match &*end {
                "elif" => condition = self.tuple()?,
                "else" => {
                    otherwise = self.body("endif")?;
                    return Ok(StmtKind::If(branches, otherwise));
                }
                _ => {
                    self.end_tag()?;
                    return Ok(StmtKind::If(branches, otherwise));
                }
            }
        }
    }

    fn for_loop(&mut self) -> Parsed<StmtKind> {
        let target = self.targets()?;
        if !self.takes_name("in") {
            return Err(self.unexpected("`in`"));
        }
        let items = self.tuple_without_if()?;
        let condition = if self.takes_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.takes_name("recursive");
        self.end_tag()?;
        self.loops += 1;
        let (body, end) = self.block(&["endfor", "else"])?;
        self.loops -= 1;
        let otherwise = match &*end {
            "else" => self.body("endfor")?,
            _ => self.end_tag().map(|()| Vec::new())?,
        };
        let all = ForLoop { target, items, condition, recursive, body, otherwise };
        Ok(StmtKind::For(Box::new(all)))
    }

    fn set(&mut self) -> Parsed<StmtKind> {
        let target = self.targets()?;
        if self.takes("=") {
            let value = self.tuple()?;
            self.end_tag()?;
            return Ok(StmtKind::Set(target, value));
        }
        let filters = self.filters(false)?;
        Ok(StmtKind::SetBlock(target, filters, self.body("endset")?))
    }

    /// `name(..) | name(..)`; each after a `|`, or the first without one.
    fn filters(&mut self, mut bare: bool) -> Parsed<Vec<(String, Arguments)>> {
        let mut all = Vec::new();
        while std::mem::take(&mut bare) || self.takes("|") {
            let name = self.name()?;
            let arguments = if self.is("(") { self.arguments()? } else { Arguments::default() };
            all.push((name, arguments));
        }
        Ok(all)
    }

    fn target(&mut self) -> Parsed<Target> {
        if self.takes("(") {
            let all = self.deeper(Self::targets)?;
            self.expect(")")?;
            return Ok(all);
        }
        let name = self.name()?;
        if self.takes(".") {
            return Ok(Target::Attribute(name, self.name()?));
        }
        Ok(Target::Name(name))
    }

    fn targets(&mut self) -> Parsed<Target> {
        let first = self.target()?;
        if !self.is(",") {
            return Ok(first);
        }
        let mut all = vec![first];
        while self.takes(",") {
            if matches!(self.peek(), Token::Name(n) if n == "in") || self.is("=") {
                break;
            }
            all.push(self.target()?);
        }
        Ok(Target::Many(all))
    }

    fn parameters(&mut self) -> Parsed<Vec<(String, Option<Expr>)>> {
        self.expect("(")?;
        let mut all = Vec::new();
        while !self.takes(")") {
            if !all.is_empty() {
                self.expect(",")?;
            }
            let name = self.name()?;
            let default = if self.takes("=") { Some(self.expression()?) } else { None };
            all.push((name, default));
        }
        Ok(all)
    }

    /// An expression, or several with commas between, which are a tuple.
    fn tuple(&mut self) -> Parsed<Expr> {
        self.tuple_of(Self::expression)
    }

    fn tuple_without_if(&mut self) -> Parsed<Expr> {
        self.tuple_of(Self::either)
    }

    fn tuple_of(&mut self, one: fn(&mut Self) -> Parsed<Expr>) -> Parsed<Expr> {
        let first = one(self)?;
        if !self.is(",") {
            return Ok(first);
        }
        let mut all = vec![first];
        while self.takes(",") {
            let ends = matches!(self.peek(), Token::TagEnd | Token::PrintEnd);
            if ends || self.is(")") || self.is("=") {
                break;
            }
            all.push(one(self)?);
        }
        Ok(Expr::Tuple(all))
    }

    fn expression(&mut self) -> Parsed<Expr> {
        self.deeper(|p| {
            let mut e = p.either()?;
            while p.takes_name("if") {
                let condition = p.either()?;
                let other = if p.takes_name("else") { p.expression()? } else { Expr::Undefined };
                e = Expr::If(Box::new(e), Box::new(condition), Box::new(other));
            }
            Ok(e)
        })
    }

    fn either(&mut self) -> Parsed<Expr> {
        let mut e = self.both()?;
        while self.takes_name("or") {
            e = Expr::Or(Box::new(e), Box::new(self.both()?));
        }
        Ok(e)
    }

    fn both(&mut self) -> Parsed<Expr> {
        let mut e = self.negation()?;
        while self.takes_name("and") {
            e = Expr::And(Box::new(e), Box::new(self.negation()?));
        }
        Ok(e)
    }

    fn negation(&mut self) -> Parsed<Expr> {
        match self.takes_name("not") {
            true => Ok(Expr::Not(Box::new(self.deeper(Self::negation)?))),
            false => self.comparison(),
        }
    }

    fn comparison(&mut self) -> Parsed<Expr> {
        let first = self.binary(0)?;
        let mut all = Vec::new();
        loop {
            let sign = ["==", "!=", "<=", ">=", "<", ">"].into_iter().find(|s| self.is(s));
            let sign = if let Some(sign) = sign {
                self.at += 1;
                sign
            } else if self.takes_name("in") {
                "in"
            } else if self.is_name("not") && matches!(self.after(), Token::Name(n) if n == "in") {
                self.at += 2;
                "not in"
            } else {
                break;
            };
            all.push((sign, self.binary(0)?));
        }
        Ok(if all.is_empty() { first } else { Expr::Compare(Box::new(first), all) })
    }

    /// Operators by how tight they bind; all are left-associative, as Jinja has it of `**`, too.
    fn binary(&mut self, level: usize) -> Parsed<Expr> {
        const LEVELS: [&[&str]; 4] = [&["+", "-"], &["~"], &["*", "//", "/", "%"], &["**"]];
        let Some(signs) = LEVELS.get(level) else { return self.unary(true) };
        let mut e = self.binary(level + 1)?;
        while let Some(sign) = signs.iter().find(|s| self.is(s)) {
            self.at += 1;
            e = Expr::Binary(sign, Box::new(e), Box::new(self.binary(level + 1)?));
        }
        Ok(e)
    }

    fn unary(&mut self, filtered: bool) -> Parsed<Expr> {
        let e = if self.takes("-") {
            Expr::Negative(Box::new(self.deeper(|p| p.unary(false))?))
        } else if self.takes("+") {
            self.deeper(|p| p.unary(false))?
        } else {
            let e = self.primary()?;
            self.postfix(e)?
        };
        if filtered { self.filtered(e) } else { Ok(e) }
    }

    fn primary(&mut self) -> Parsed<Expr> {
        match self.next() {
            Token::Name(name) => Ok(match &*name {
                "true" | "True" => Expr::Bool(true),
                "false" | "False" => Expr::Bool(false),
                "none" | "None" => Expr::None,
                _ => Expr::Name(name),
            }),
            Token::Text(mut text) => {
                while let Token::Text(more) = self.peek() {
                    text += more;
                    self.at += 1;
                }
                Ok(Expr::Text(Chars::written(&text)))
            }
            Token::Integer(n) => Ok(Expr::Integer(n)),
            Token::Number(x) => Ok(Expr::Number(x)),
            Token::Sign("(") => {
                if self.takes(")") {
                    return Ok(Expr::Tuple(Vec::new()));
                }
                let e = self.tuple()?;
                self.expect(")")?;
                Ok(e)
            }
            Token::Sign("[") => {
                let mut all = Vec::new();
                while !self.takes("]") {
                    if !all.is_empty() {
                        self.expect(",")?;
                        if self.takes("]") {
                            break;
                        }
                    }
                    all.push(self.expression()?);
                }
                Ok(Expr::List(all))
            }
            Token::Sign("{") => {
                let mut all = Vec::new();
                while !self.takes("}") {
                    if !all.is_empty() {
                        self.expect(",")?;
                        if self.takes("}") {
                            break;
                        }
                    }
                    let key = self.expression()?;
                    self.expect(":")?;
                    all.push((key, self.expression()?));
                }
                Ok(Expr::Dict(all))
            }
            _ => {
                self.at = self.at.saturating_sub(1);
                Err(self.unexpected("an expression"))
            }
        }
    }

    /// `.name`, `[item]` and `(arguments)` after an expression.
    fn postfix(&mut self, mut e: Expr) -> Parsed<Expr> {
        loop {
            if self.takes(".") {
                e = match self.next() {
                    Token::Name(name) => Expr::Attribute(Box::new(e), name),
                    Token::Integer(n) => Expr::Item(Box::new(e), Box::new(Expr::Integer(n))),
                    _ => {
                        self.at = self.at.saturating_sub(1);
                        return Err(self.unexpected("a name"));
                    }
                };
            } else if self.takes("[") {
                e = self.subscript(e)?;
            } else if self.is("(") {
                e = Expr::Call(Box::new(e), self.arguments()?);
            } else {
                return Ok(e);
            }
        }
    }

    fn subscript(&mut self, e: Expr) -> Parsed<Expr> {
        let mut parts = [const { None }; 3];
        let mut colons = 0;
        loop {
            if self.takes("]") {
                break;
            }
            if self.takes(":") {
                colons += 1;
                if colons > 2 {
                    return Err("a slice has more than three parts".into());
                }
                continue;
            }
            if parts[colons].is_some() {
                return Err(self.unexpected("`]`"));
            }
            parts[colons] = Some(Box::new(self.expression()?));
        }
        match (colons, parts) {
            (0, [Some(item), ..]) => Ok(Expr::Item(Box::new(e), item)),
            (0, _) => Err("got `]`, wanted an expression".into()),
            (_, parts) => Ok(Expr::Slice(Box::new(e), parts)),
        }
    }

    /// `| filter`, `is test` and calls of what they give.
    fn filtered(&mut self, mut e: Expr) -> Parsed<Expr> {
        loop {
            if self.takes("|") {
                let name = self.name()?;
                let arguments = if self.is("(") { self.arguments()? } else { Arguments::default() };
                e = Expr::Filter(Box::new(e), name, arguments);
            } else if self.takes_name("is") {
                let negative = self.takes_name("not");
                let name = self.name()?;
                let mut arguments = Arguments::default();
                if self.is("(") {
                    arguments = self.arguments()?;
                } else if self.begins_argument() {
                    let argument = self.primary()?;
                    arguments.positional.push(self.postfix(argument)?);
                }
                e = Expr::Test(Box::new(e), name, arguments, negative);
            } else if self.is("(") {
                e = Expr::Call(Box::new(e), self.arguments()?);
            } else {
                return Ok(e);
            }
        }
    }

    /// Whether an argument of a test without parentheses follows.
    fn begins_argument(&self) -> bool {
        match self.peek() {
            Token::Name(n) => !["else", "or", "and", "if", "is", "in", "not"].contains(&&**n),
            Token::Text(_) | Token::Integer(_) | Token::Number(_) => true,
            Token::Sign(sign) => ["[", "{"].contains(sign),
            _ => false,
        }
    }

    fn arguments(&mut self) -> Parsed<Arguments> {
        self.expect("(")?;
        let mut all = Arguments::default();
        let mut first = true;
        while !self.takes(")") {
            if !std::mem::take(&mut first) {
                self.expect(",")?;
                if self.takes(")") {
                    break;
                }
            }
            let spread = if self.takes("**") { Some(1) } else { self.takes("*").then_some(0) };
            if let Some(i) = spread {
                all.spread[i] = Some(Box::new(self.expression()?));
            } else if let (Token::Name(_), Token::Sign("=")) = (self.peek(), self.after()) {
                let name = self.name()?;
                self.at += 1;
                all.named.push((name, self.expression()?));
            } else {
                all.positional.push(self.expression()?);
            }
        }
        Ok(all)
    }
}
