//! Text of a template to tokens, with the white space that Jinja takes out.
//!
//! Source: `jinja2/lexer.py` 3.1 with `trim_blocks` and `lstrip_blocks`, as `transformers` sets
//! them.

/// A word of a tag, or text between tags.
#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// Text that is written as it is.
    Data(String),
    /// `{{`
    Print,
    /// `}}`
    PrintEnd,
    /// `{%`
    Tag,
    /// `%}`
    TagEnd,
    Name(String),
    Text(String),
    Integer(i64),
    Number(f64),
    /// An operator or a bracket.
    Sign(&'static str),
    /// The end of the template.
    End,
}

/// Operators and brackets, longer ones first.
const SIGNS: [&str; 28] = [
    "**", "//", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "(", ")", "[", "]", "{", "}",
    ".", ",", ":", "|", "=", "<", ">", ";", "!", "&",
];

/// The most tokens of one tag: a tree of an expression is not deeper, so that no stack overflows.
const MAX_TAG: usize = 600;

/// Cuts a template into tokens, each with its line.
pub fn tokens(source: &str) -> Result<Vec<(Token, usize)>, String> {
    let lines = source.replace("\r\n", "\n").replace('\r', "\n");
    let lines = lines.strip_suffix('\n').unwrap_or(&lines);
    let mut lexer = Lexer { rest: lines, line: 1, starts_line: true, out: Vec::new() };
    lexer.run().map_err(|e| format!("{e} in line {}", lexer.line))?;
    lexer.out.push((Token::End, lexer.line));
    Ok(lexer.out)
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    /// Nothing stands before `rest` in its line.
    starts_line: bool,
    out: Vec<(Token, usize)>,
}

/// White space as Python has it.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

impl<'a> Lexer<'a> {
    fn push(&mut self, token: Token) {
        self.out.push((token, self.line));
    }

    /// Goes on behind the first `bytes` bytes.
    fn advance(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.line += taken.matches('\n').count();
        if let Some(last) = taken.chars().last() {
            self.starts_line = last == '\n';
        }
        self.rest = rest;
        taken
    }

    fn skip_space(&mut self) {
        self.advance(self.rest.len() - self.rest.trim_start_matches(is_space).len());
    }

    fn run(&mut self) -> Result<(), String> {
        while !self.rest.is_empty() {
            let mut braces = self.rest.match_indices('{').map(|(at, _)| at);
            let kind =
                |at: usize| ["{{", "{%", "{#"].into_iter().find(|k| self.rest[at..].starts_with(k));
            let first = braces.find_map(|at| kind(at).map(|kind| (at, kind)));
            let Some((at, kind)) = first else {
                self.push(Token::Data(self.rest.to_owned()));
                self.rest = "";
                return Ok(());
            };
            self.data(at, kind);
            self.advance(2);
            let sign = self.rest.starts_with(['-', '+']) && (kind != "{{" || !self.plus());
            if sign {
                self.advance(1);
            }
            match kind {
                "{#" => self.comment()?,
                "{%" if self.is_raw() => self.raw()?,
                "{%" => {
                    self.push(Token::Tag);
                    self.words("%}")?;
                }
                _ => {
                    self.push(Token::Print);
                    self.words("}}")?;
                }
            }
        }
        Ok(())
    }

    fn plus(&self) -> bool {
        self.rest.starts_with('+')
    }

    /// Takes the text before a tag, without the white space that the tag takes out.
    fn data(&mut self, at: usize, kind: &str) {
        let (text, tag) = (&self.rest[..at], &self.rest[at + 2..]);
        let starts_line = self.starts_line;
        let kept = if tag.starts_with('-') {
            text.trim_end_matches(is_space)
        } else if tag.starts_with('+') || kind == "{{" {
            text
        } else {
            let line = text.rfind('\n').map_or(0, |at| at + 1);
            let blank = text[line..].chars().all(is_space);
            if blank && (line > 0 || starts_line) { &text[..line] } else { text }
        };
        if !kept.is_empty() {
            self.push(Token::Data(kept.to_owned()));
        }
        self.advance(at);
    }

    /// Takes what ends a tag: `end`, with a sign before it, and white space behind.
    fn closes(&mut self, end: &str) -> bool {
        let bare = self.rest.trim_start_matches(is_space);
        let space = self.rest.len() - bare.len();
        for (sign, length) in [("-", 1), ("+", 1), ("", 0)] {
            if bare.strip_prefix(sign).is_some_and(|b| b.starts_with(end))
                && !(sign == "+" && end == "}}")
            {
                self.advance(space + length + end.len());
                match sign {
                    "-" => self.skip_space(),
                    "" if end != "}}" && self.rest.starts_with('\n') => drop(self.advance(1)),
                    _ => {}
                }
                return true;
            }
        }
        false
    }

    fn comment(&mut self) -> Result<(), String> {
        let end = self.rest.find("#}").ok_or("a comment does not end")?;
        let signed = self.rest[..end].ends_with(['-', '+']);
        self.advance(end - usize::from(signed));
        self.closes("#}");
        Ok(())
    }

    fn is_raw(&self) -> bool {
        let after = self.rest.trim_start_matches(is_space).strip_prefix("raw");
        let after = after.map(|a| a.trim_start_matches(is_space));
        after.is_some_and(|a| a.trim_start_matches('-').starts_with("%}"))
    }

    fn raw(&mut self) -> Result<(), String> {
        let at = self.rest.find("raw").unwrap_or_default();
        self.advance(at + 3);
        self.closes("%}");
        let mut from = 0;
        while let Some(at) = self.rest[from..].find("{%").map(|at| from + at) {
            let tag = self.rest[at + 2..].trim_start_matches(['-', '+']);
            let tag = tag.trim_start_matches(is_space);
            if tag.starts_with("endraw") {
                let end = self.rest.len() - tag.len() + "endraw".len();
                self.data(at, "{%");
                self.advance(end - at);
                return if self.closes("%}") {
                    Ok(())
                } else {
                    Err("`endraw` does not end".into())
                };
            }
            from = at + 2;
        }
        Err("a `raw` block does not end".into())
    }

    /// The words of a tag up to `end`.
    fn words(&mut self, end: &str) -> Result<(), String> {
        let from = self.out.len();
        // Within brackets a brace is no end of the tag.
        let mut depth = 0_usize;
        loop {
            if depth == 0 && self.closes(end) {
                self.push(if end == "}}" { Token::PrintEnd } else { Token::TagEnd });
                return Ok(());
            }
            self.skip_space();
            if self.out.len() - from > MAX_TAG {
                return Err(format!("a tag has more than {MAX_TAG} words"));
            }
            let Some(c) = self.rest.chars().next() else { return Err("a tag does not end".into()) };
            if c.is_alphabetic() || c == '_' {
                let word = |c: char| c.is_alphanumeric() || c == '_';
                let end = self.rest.find(|c| !word(c)).unwrap_or(self.rest.len());
                let name = self.advance(end).to_owned();
                self.push(Token::Name(name));
            } else if c.is_ascii_digit() {
                self.number()?;
            } else if c == '"' || c == '\'' {
                let text = self.text(c)?;
                self.push(Token::Text(text));
            } else {
                let sign = SIGNS.iter().find(|sign| self.rest.starts_with(**sign));
                let sign = *sign.ok_or_else(|| format!("unexpected {c:?}"))?;
                match sign {
                    "(" | "[" | "{" => depth += 1,
                    ")" | "]" | "}" => depth = depth.checked_sub(1).ok_or("a bracket too many")?,
                    _ => {}
                }
                self.advance(sign.len());
                self.push(Token::Sign(sign));
            }
        }
    }

    fn number(&mut self) -> Result<(), String> {
        let digits =
            |text: &str| text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
        let mut end = digits(self.rest);
        let mut float = false;
        if let Some(after) = self.rest[end..].strip_prefix('.')
            && after.starts_with(|c: char| c.is_ascii_digit())
        {
            (end, float) = (end + 1 + digits(after), true);
        }
        if self.rest[end..].starts_with(['e', 'E']) {
            let sign = usize::from(self.rest[end + 1..].starts_with(['+', '-']));
            let n = digits(&self.rest[end + 1 + sign..]);
            if n > 0 {
                (end, float) = (end + 1 + sign + n, true);
            }
        }
        let text = self.advance(end).replace('_', "");
        let wrong = || format!("{} is no number", text.chars().take(40).collect::<String>());
        let token = match float {
            true => Token::Number(text.parse().map_err(|_| wrong())?),
            false => Token::Integer(text.parse().map_err(|_| wrong())?),
        };
        self.push(token);
        Ok(())
    }

    /// A literal, its escapes resolved.
    fn text(&mut self, quote: char) -> Result<String, String> {
        let mut out = String::new();
        let mut all = self.rest.char_indices().skip(1);
        while let Some((at, c)) = all.next() {
            if c == quote {
                self.advance(at + 1);
                return Ok(out);
            }
            if c != '\\' {
                out.push(c);
                continue;
            }
            let Some((_, c)) = all.next() else { break };
            let mut code = |digits: usize| {
                let hex: String = all.by_ref().take(digits).map(|(_, c)| c).collect();
                let code = u32::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == digits);
                code.and_then(char::from_u32).ok_or_else(|| format!("`{hex}` is no character"))
            };
            match c {
                'n' => out.push('\n'),
                't' => out.push('\t'),
                'r' => out.push('\r'),
                'a' => out.push('\u{7}'),
                'b' => out.push('\u{8}'),
                'f' => out.push('\u{c}'),
                'v' => out.push('\u{b}'),
                '0' => out.push('\0'),
                '\\' | '\'' | '"' => out.push(c),
                '\n' => {}
                'x' => out.push(code(2)?),
                'u' => out.push(code(4)?),
                'U' => out.push(code(8)?),
                c => out.extend(['\\', c]),
            }
        }
        Err("a text does not end".into())
    }
}
