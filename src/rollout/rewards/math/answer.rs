//! Tokens to answers, and which answers are the same.

use super::{
    lexer::{AnswerToken, TokenKind, tokens},
    number::{Exact, Rational},
    units,
};

/// An answer, as far as it is understood.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What stands before `=` or `∈`: x, f(x), (x, y).
    name: Vec<TokenKind>,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    /// A number or a polynomial, and its unit, if one is there.
    Quantity(Exact, Option<String>),
    /// Items between brackets, or in none (both are spaces): `(1, 2)`, `[0, 1)`, `⦃1, 2⦄`, `1, 2`.
    List { brackets: [char; 2], items: Vec<Answer> },
    /// Parts of a set, joined by ∪.
    Union(Vec<Answer>),
    /// All else: the same if its tokens are.
    Tokens(Vec<TokenKind>),
}

/// Deepest nesting of lists.
const DEEPEST: usize = 8;

impl Answer {
    /// Reads an answer; none if nothing is there, or it has a brace without its other.
    pub fn read(text: &str) -> Option<Self> {
        let text = undelimited(text);
        let all = tokens(text)?;
        let says = |t: &AnswerToken| !matches!(&t.kind, TokenKind::Mark(c) if "{}+-−".contains(*c));
        all.iter().any(says).then(|| Self::of(&all, DEEPEST))
    }

    fn of(all: &[AnswerToken], depth: usize) -> Self {
        let (name, rest) = named(all);
        let name = name.iter().map(|t| t.kind.clone()).collect();
        Self { name, content: Content::of(rest, depth) }
    }

    /// Whether two answers say the same. A name or a unit that only one of them has is not
    /// compared.
    pub fn equals(&self, other: &Self) -> bool {
        let named = self.name.is_empty() || other.name.is_empty() || self.name == other.name;
        named && self.content.equals(&other.content)
    }
}

/// An answer without the signs of formulas around it, and the stop of a sentence behind it.
fn undelimited(text: &str) -> &str {
    let mut text = text.trim();
    loop {
        let before = text;
        let pairs =
            [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`")];
        for (open, close) in pairs {
            let inside = text.strip_prefix(open).and_then(|t| t.strip_suffix(close));
            if let Some(inside) = inside.filter(|t| !t.contains(open)) {
                text = inside.trim();
            }
        }
        // 0.333... goes on.
        let stops: &[char] = if text.ends_with("..") { &[] } else { &['.', ',', ';', ':'] };
        for stop in stops.iter().copied() {
            text = text.strip_suffix(stop).unwrap_or(text).trim_end();
        }
        if text == before {
            return text;
        }
    }
}

fn mark(t: &AnswerToken) -> Option<char> {
    if let TokenKind::Mark(c) = t.kind { Some(c) } else { None }
}

fn is_command(t: &AnswerToken, name: &str) -> bool {
    matches!(&t.kind, TokenKind::Command(c) if c == name)
}

fn opens(t: &AnswerToken) -> bool {
    mark(t).is_some_and(|c| "([{⦃".contains(c)) || is_command(t, "langle")
}

fn closes(t: &AnswerToken) -> bool {
    mark(t).is_some_and(|c| ")]}⦄".contains(c)) || is_command(t, "rangle")
}

/// Parts of `all` between the tokens outside of all brackets that `splits` names.
fn split(all: &[AnswerToken], splits: impl Fn(&AnswerToken) -> bool) -> Vec<&[AnswerToken]> {
    let (mut depth, mut from, mut parts) = (0_i32, 0, Vec::new());
    for (at, t) in all.iter().enumerate() {
        depth += i32::from(opens(t)) - i32::from(closes(t));
        if depth == 0 && !closes(t) && splits(t) {
            parts.push(&all[from..at]);
            from = at + 1;
        }
    }
    parts.push(&all[from..]);
    parts
}

/// The name of what an answer gives, and the rest.
fn named(all: &[AnswerToken]) -> (&[AnswerToken], &[AnswerToken]) {
    let equals = |t: &AnswerToken| mark(t) == Some('=') || is_command(t, "in");
    let parts = split(all, equals);
    let [name, rest] = parts[..] else { return (&[], all) };
    let mut before = None;
    let is_name = |t: &AnswerToken| {
        let index = before == Some('_') || before == Some('{');
        let ok = match &t.kind {
            TokenKind::Word { text, .. } => text.chars().count() == 1,
            TokenKind::Mark(c) => "(),_{}'".contains(*c),
            TokenKind::Number(_) => index,
            TokenKind::Command(name) => GREEK.contains(&&**name),
        };
        before = mark(t);
        ok
    };
    let begins = name.first().is_some_and(|t| !matches!(t.kind, TokenKind::Number(_)));
    if begins && !rest.is_empty() && name.iter().all(is_name) { (name, rest) } else { (&[], all) }
}

/// Letters that are commands; π is a number.
const GREEK: &[&str] = &[
    "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "phi", "varphi", "psi",
    "omega", "rho", "sigma", "tau",
];

impl Content {
    fn of(all: &[AnswerToken], depth: usize) -> Self {
        let opaque = || Self::Tokens(simple(all));
        let Some(depth) = depth.checked_sub(1) else { return opaque() };
        let read = |parts: Vec<&[AnswerToken]>| -> Option<Vec<Answer>> {
            let whole = parts.iter().all(|part| !part.is_empty());
            whole.then(|| parts.into_iter().map(|part| Answer::of(part, depth)).collect())
        };
        let parts = split(all, |t| is_command(t, "cup"));
        if parts.len() > 1 {
            return read(parts).map_or_else(opaque, Self::Union);
        }
        let comma = |t: &AnswerToken| mark(t) == Some(',');
        if let Some((brackets, inside)) = bracketed(all) {
            let parts = split(inside, comma);
            if brackets == ['(', ')'] && parts.len() == 1 {
                return Self::of(inside, depth);
            }
            if brackets != ['{', '}'] {
                let items = read(parts);
                return items.map_or_else(opaque, |items| Self::List { brackets, items });
            }
            return Self::of(inside, depth);
        }
        let parts = split(all, comma);
        if parts.len() > 1 {
            let brackets = [' ', ' '];
            return read(parts).map_or_else(opaque, |items| Self::List { brackets, items });
        }
        quantity(all).map_or_else(opaque, |(value, unit)| Self::Quantity(value, unit))
    }

    fn equals(&self, other: &Self) -> bool {
        let all = |a: &[Answer], b: &[Answer]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.equals(b))
        };
        match (self, other) {
            (Self::Quantity(a, unit), Self::Quantity(b, other)) => {
                let percent = |unit: &Option<String>| unit.as_deref() == Some("%");
                let hundredth = |x: &Exact| x.mul(&Exact::rational(Rational::new(1, 100)?));
                match (unit, other) {
                    (Some(x), Some(y)) => x == y && a == b,
                    (None, None) => a == b,
                    // 50% is 1/2; of a number that is asked for in percent, it is 50.
                    _ => {
                        let (of_a, of_b) = (percent(unit), percent(other));
                        a == b
                            || of_a && hundredth(a).as_ref() == Some(b)
                            || of_b && hundredth(b).as_ref() == Some(a)
                    }
                }
            }
            (Self::List { brackets, items }, Self::List { brackets: others, items: other }) => {
                const SET: [char; 2] = ['⦃', '⦄'];
                const BARE: [char; 2] = [' ', ' '];
                match [*brackets, *others] {
                    [SET, SET | BARE] | [BARE, SET] => same_set(items, other),
                    [a, b] => a == b && all(items, other),
                }
            }
            (Self::Union(a), Self::Union(b)) => same_set(a, b),
            (Self::Tokens(a), Self::Tokens(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_token(a, b))
            }
            _ => false,
        }
    }
}

/// The same items in whatever order.
fn same_set(a: &[Answer], b: &[Answer]) -> bool {
    let mut left: Vec<&Answer> = b.iter().collect();
    let takes = |item: &Answer| {
        let at = left.iter().position(|other| item.equals(other));
        at.map(|at| left.swap_remove(at)).is_some()
    };
    a.len() == b.len() && a.iter().all(takes)
}

/// The brackets around all of the tokens, and what is inside.
fn bracketed(all: &[AnswerToken]) -> Option<([char; 2], &[AnswerToken])> {
    let (first, last) = (all.first()?, all.last()?);
    let (mut depth, end) = (0, all.len() - 1);
    let closes_first = all.iter().position(|t| {
        depth += i32::from(opens(t)) - i32::from(closes(t));
        depth == 0
    });
    let whole = end > 0 && opens(first) && closes(last) && closes_first == Some(end);
    let of = |t: &AnswerToken, angle: char| mark(t).unwrap_or(angle);
    whole.then(|| ([of(first, '<'), of(last, '>')], &all[1..end]))
}

/// Tokens as they are compared: braces around one are none.
fn simple(all: &[AnswerToken]) -> Vec<TokenKind> {
    let mut out: Vec<TokenKind> = Vec::new();
    for t in all {
        let one = out.len() >= 2 && out[out.len() - 2] == TokenKind::Mark('{');
        if mark(t) == Some('}') && one {
            out.remove(out.len() - 2);
        } else {
            out.push(t.kind.clone());
        }
    }
    out
}

fn same_token(a: &TokenKind, b: &TokenKind) -> bool {
    match (a, b) {
        (TokenKind::Number(a), TokenKind::Number(b)) => {
            let value = |n: &str| Rational::decimal(n);
            a == b || value(a).is_some_and(|x| value(b) == Some(x))
        }
        (TokenKind::Word { text: a, .. }, TokenKind::Word { text: b, .. }) => same_word(a, b),
        _ => a == b,
    }
}

/// Case tells variables, choices and symbols as CO and Co apart, not longer words, nor whether one
/// begins a sentence.
fn same_word(a: &str, b: &str) -> bool {
    let rest = |word: &str| word.chars().skip(1).collect::<String>();
    let (count, same) = (a.chars().count(), a.to_lowercase() == b.to_lowercase());
    a == b || same && (count > 3 || count > 1 && rest(a) == rest(b))
}

/// The value of tokens, and its unit.
fn quantity(all: &[AnswerToken]) -> Option<(Exact, Option<String>)> {
    let sign = |t: &AnswerToken| mark(t) == Some('-') || mark(t) == Some('+');
    let (mut rest, mut negative) = (all, false);
    let currency = |t: &AnswerToken| match t.kind {
        TokenKind::Mark('$') => Some("dollar"),
        TokenKind::Mark('£') | TokenKind::Mark('€') | TokenKind::Mark('¥') => {
            mark(t).map(|c| match c {
                '£' => "pound",
                '€' => "euro",
                _ => "yen",
            })
        }
        _ => None,
    };
    // -$5 and $-5
    let mut before = None;
    if let [s, c, ..] = rest
        && sign(s)
        && let Some(name) = currency(c)
    {
        (negative, before, rest) = (mark(s) == Some('-'), Some(name), &rest[2..]);
    } else if let Some(name) = rest.first().and_then(currency) {
        (before, rest) = (Some(name), &rest[1..]);
    }
    let mut reader = Reader { rest, divided: false, room: 32 };
    let value = reader.sum()?;
    let rest = reader.rest;
    let (scale, unit) = units::read(rest)?;
    let scaled = value.mul(&Exact::rational(Rational::whole(scale)))?;
    let value = if negative { scaled.neg() } else { scaled };
    let unit = match (before, unit) {
        (Some(a), Some(b)) if a != b => return None,
        (a, b) => a.map(str::to_owned).or(b),
    };
    Some((value, unit))
}

/// Reads an expression.
struct Reader<'a> {
    rest: &'a [AnswerToken],
    /// The last factor was divided by, without a fraction bar.
    divided: bool,
    /// Brackets that may still open inside of those that are open.
    room: usize,
}

impl Reader<'_> {
    fn next_mark(&self) -> Option<char> {
        self.rest.first().and_then(mark)
    }

    fn take(&mut self, c: char) -> bool {
        let found = self.next_mark() == Some(c);
        self.rest = &self.rest[usize::from(found)..];
        found
    }

    fn take_command(&mut self, name: &str) -> bool {
        let found = self.rest.first().is_some_and(|t| is_command(t, name));
        self.rest = &self.rest[usize::from(found)..];
        found
    }

    fn sum(&mut self) -> Option<Exact> {
        let negative = self.take('-');
        if !negative {
            self.take('+');
        }
        let mut sum = self.product()?;
        if negative {
            sum = sum.neg();
        }
        loop {
            if self.take('+') {
                sum = sum.add(&self.product()?)?;
            } else if self.take('-') {
                sum = sum.add(&self.product()?.neg())?;
            } else {
                return Some(sum);
            }
        }
    }

    fn product(&mut self) -> Option<Exact> {
        let mut product = self.factor(true)?;
        self.divided = false;
        loop {
            if self.take('*')
                || self.take_command("times")
                || self.take_command("cdot")
                || self.takes_x()
            {
                product = product.mul(&self.factor(true)?)?;
                self.divided = false;
            } else if self.take('/') || self.take_command("div") {
                product = product.mul(&self.factor(true)?.recip()?)?;
                self.divided = true;
            } else if self.goes_on() {
                // 1/2x may be (1/2)x or 1/(2x).
                if self.divided {
                    return None;
                }
                product = product.mul(&self.factor(false)?)?;
            } else {
                return Some(product);
            }
        }
    }

    /// Takes an x that is a sign of multiplication: 1.2 x 10^3.
    fn takes_x(&mut self) -> bool {
        let [x, ten, power, ..] = self.rest else { return false };
        let is_x = matches!(&x.kind, TokenKind::Word { text, roman: false } if text == "x");
        let is_ten = ten.kind == TokenKind::Number("10".into()) && mark(power) == Some('^');
        if is_x && is_ten {
            self.rest = &self.rest[1..];
        }
        is_x && is_ten
    }

    /// Whether a factor without a sign of multiplication follows.
    fn goes_on(&self) -> bool {
        self.rest.first().is_some_and(|t| match &t.kind {
            TokenKind::Mark(c) => "({".contains(*c),
            TokenKind::Command(name) => {
                ["frac", "sqrt", "pi"].contains(&&**name) || GREEK.contains(&&**name)
            }
            TokenKind::Word { text, roman: false } => {
                text.chars().count() == 1 || ["pi", "sqrt"].contains(&&**text)
            }
            _ => false,
        })
    }

    /// A factor with its power; `first` in its product, or behind a sign.
    fn factor(&mut self, first: bool) -> Option<Exact> {
        let mut value = self.primary(first)?;
        let degrees = |t: &AnswerToken| is_command(t, "circ") || is_command(t, "degree");
        let is_power = match self.rest {
            [hat, power, ..] if mark(hat) == Some('^') => {
                let inside = self.rest.get(2).filter(|_| mark(power) == Some('{'));
                !degrees(inside.unwrap_or(power))
            }
            _ => false,
        };
        if is_power {
            self.take('^');
            let negative = self.take('-');
            let power = match self.rest.first().map(|t| &t.kind)? {
                TokenKind::Number(_) => self.literal()?,
                TokenKind::Mark('{') | TokenKind::Mark('(') => self.primary(true)?.as_rational()?,
                _ => return None,
            };
            let power = Exact::rational(power);
            value = value.pow(if negative { power.neg() } else { power }.as_rational()?)?;
        }
        while self.take('!') {
            let n = value.as_rational()?.as_whole().filter(|n| (0..=33).contains(n))?;
            value = Exact::rational(Rational::whole((1..=n).product()));
        }
        Some(value)
    }

    fn literal(&mut self) -> Option<Rational> {
        let TokenKind::Number(digits) = &self.rest.first()?.kind else { return None };
        self.rest = &self.rest[1..];
        Rational::decimal(digits)
    }

    fn primary(&mut self, first: bool) -> Option<Exact> {
        match &self.rest.first()?.kind {
            TokenKind::Number(digits) if first => {
                let whole = digits.bytes().all(|c| c.is_ascii_digit());
                let n = self.literal()?;
                match whole.then(|| self.part()) {
                    None | Some(None) => Some(Exact::rational(n)),
                    Some(Some(part)) => Exact::rational(n).add(&Exact::rational(part?)),
                }
            }
            TokenKind::Mark(open @ ('(' | '{')) => {
                let close = if *open == '(' { ')' } else { '}' };
                self.room = self.room.checked_sub(1)?;
                self.take(*open);
                let divided = std::mem::take(&mut self.divided);
                let inside = self.sum()?;
                (self.divided, self.room) = (divided, self.room + 1);
                self.take(close).then_some(inside)
            }
            TokenKind::Command(name) => {
                let name = name.clone();
                self.rest = &self.rest[1..];
                match &*name {
                    "frac" => {
                        let above = self.braced()?;
                        above.mul(&self.braced()?.recip()?)
                    }
                    "sqrt" => self.root(),
                    "pi" => Some(Exact::symbol('π')),
                    "infty" => Some(Exact::symbol('∞')),
                    _ => {
                        let at = GREEK.iter().position(|greek| *greek == name)? as u32;
                        // Letters of no alphabet stand for these.
                        char::from_u32(0xE000 + at).map(Exact::symbol)
                    }
                }
            }
            TokenKind::Word { text, roman } => {
                let (word, mut letters) = (text.clone(), text.chars());
                let (letter, one) = (letters.next()?, letters.next().is_none());
                self.rest = &self.rest[1..];
                match &*word {
                    _ if one && (first || !roman) => Some(Exact::symbol(letter)),
                    "pi" => Some(Exact::symbol('π')),
                    "sqrt" => self.root(),
                    "infinity" | "inf" => Some(Exact::symbol('∞')),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    fn braced(&mut self) -> Option<Exact> {
        if self.next_mark() == Some('{') { self.primary(true) } else { None }
    }

    /// What stands behind the sign of a root.
    fn root(&mut self) -> Option<Exact> {
        let mut degree = 2;
        if self.take('[') {
            degree = u32::try_from(self.literal()?.as_whole()?).ok()?;
            if !self.take(']') {
                return None;
            }
        }
        let inside = match self.next_mark() {
            Some('{') | Some('(') => self.primary(true)?,
            _ => return None,
        };
        match degree {
            2 => inside.sqrt(),
            3..=100 => inside.root(degree),
            _ => None,
        }
    }

    /// The fraction of a mixed number, if one follows a whole number: it is below 1. A larger one
    /// makes no number at all.
    fn part(&mut self) -> Option<Option<Rational>> {
        let literal = |t: &AnswerToken| match &t.kind {
            TokenKind::Number(n) if n.bytes().all(|c| c.is_ascii_digit()) => n.parse::<i128>().ok(),
            _ => None,
        };
        let braces = |t: &AnswerToken, c: char| mark(t) == Some(c);
        let (above, below, length) = match self.rest {
            [a, bar, b, ..] if a.spaced && mark(bar) == Some('/') => (literal(a)?, literal(b)?, 3),
            [frac, o, a, c, o2, b, c2, ..]
                if is_command(frac, "frac")
                    && (braces(o, '{') && braces(c, '}') && braces(o2, '{') && braces(c2, '}')) =>
            {
                (literal(a)?, literal(b)?, 7)
            }
            _ => return None,
        };
        self.rest = &self.rest[length..];
        Some(Rational::new(above, below).filter(|_| 0 < above && above < below))
    }
}
