//! An answer as people and models write it, in LaTeX or not, to tokens.

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct AnswerToken {
    pub kind: TokenKind,
    /// Space stands before it.
    pub spaced: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum TokenKind {
    /// Digits, perhaps with a point and a power of ten.
    Number(String),
    /// Letters; `roman` ones stand in `\text` or its like.
    Word { text: String, roman: bool },
    /// A LaTeX command that is not known here by another token, without its backslash.
    Command(String),
    /// Any other character. `⦃ ⦄` are braces that are shown, `{ }` those of LaTeX.
    Mark(char),
}

/// Deepest nesting of an answer that is read.
const DEEPEST: usize = 32;

/// Longest answer that is read, in bytes.
const LONGEST: usize = 4096;

/// Commands that change how their argument looks, not what it says.
const FONTS: &[&str] = &[
    "text",
    "textbf",
    "textit",
    "textrm",
    "textnormal",
    "textsf",
    "texttt",
    "mathrm",
    "mathbf",
    "mathit",
    "mathsf",
    "mathtt",
    "mbox",
    "hbox",
    "operatorname",
    "boldsymbol",
    "bm",
    "emph",
    "underline",
];

/// Commands that say nothing.
const SILENT: &[&str] = &[
    "left",
    "right",
    "big",
    "Big",
    "bigg",
    "Bigg",
    "bigl",
    "bigr",
    "Bigl",
    "Bigr",
    "displaystyle",
    "textstyle",
    "limits",
    "nolimits",
    "rm",
    "bf",
    "it",
];

/// Commands that are spaces.
const SPACES: &[&str] = &["quad", "qquad", "thinspace", "space", "enspace", "hspace"];

/// The tokens of an answer; none if it is too long, too deep or has a brace without its other.
pub fn tokens(text: &str) -> Option<Vec<AnswerToken>> {
    if text.len() > LONGEST {
        return None;
    }
    let mut lexer =
        AnswerLexer { out: Vec::new(), spaced: false, roman: false, depth: 0, brackets: 0 };
    lexer.read(&plain(text))?;
    Some(lexer.out)
}

/// Characters that have more than one spelling in their plainest one.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '−' | '–' | '‐' | '‑' | '﹣' | '－' => out.push('-'),
            '×' => out += "\\times ",
            '·' | '⋅' | '∙' => out += "\\cdot ",
            '÷' => out += "\\div ",
            '√' => {
                // It reaches over all digits of a number.
                let mut digits = String::new();
                while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                    digits.push(digit);
                }
                out += "\\sqrt ";
                out += &if digits.is_empty() { digits } else { format!("{{{digits}}}") };
            }
            'π' => out += "\\pi ",
            '∞' => out += "\\infty ",
            '∪' => out += "\\cup ",
            '≤' => out += "\\le ",
            '≥' => out += "\\ge ",
            '≠' => out += "\\ne ",
            '±' => out += "\\pm ",
            '∅' => out += "\\emptyset ",
            '°' => out += "\\degree ",
            '²' => out += "^2",
            '³' => out += "^3",
            '½' => out += "\\frac{1}{2}",
            '¼' => out += "\\frac{1}{4}",
            '¾' => out += "\\frac{3}{4}",
            '％' => out.push('%'),
            '\u{2009}' | '\u{202f}' | '\u{a0}' => out += "\\,",
            c => out.push(c),
        }
    }
    // The separators of thousands in LaTeX.
    let mut out = out.replace("\\!", "").replace("{,}", "\\,");
    for (at, _) in out.clone().rmatch_indices("\\,") {
        if between_thousands(&out[..at], &out[at + 2..]) {
            out.replace_range(at..at + 2, "");
        }
    }
    out
}

/// One to three digits end `before`, and three begin `after`.
fn between_thousands(before: &str, after: &str) -> bool {
    let digits = |chars: &mut dyn Iterator<Item = char>| {
        chars.take_while(char::is_ascii_digit).take(4).count()
    };
    let before = digits(&mut before.chars().rev());
    // Groups behind it are joined already, for the last is looked at first.
    let after = after.chars().take_while(char::is_ascii_digit).count();
    (1..=3).contains(&before) && after >= 3 && after.is_multiple_of(3)
}

struct AnswerLexer {
    out: Vec<AnswerToken>,
    spaced: bool,
    roman: bool,
    /// Arguments and groups around the present place.
    depth: usize,
    /// Brackets around it, where a comma separates.
    brackets: i32,
}

impl AnswerLexer {
    fn push(&mut self, kind: TokenKind) {
        self.out.push(AnswerToken { kind, spaced: self.spaced });
        self.spaced = false;
    }

    fn read(&mut self, mut rest: &str) -> Option<()> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return None;
        }
        while let Some(c) = rest.chars().next() {
            let after = &rest[c.len_utf8()..];
            rest = match c {
                c if c.is_whitespace() || c == '~' => {
                    self.spaced = true;
                    after
                }
                '\\' => self.command(after)?,
                '0'..='9' | '.' if number(rest, self.brackets > 0) > 0 => {
                    let end = number(rest, self.brackets > 0);
                    self.push(TokenKind::Number(rest[..end].replace(',', "")));
                    &rest[end..]
                }
                c if c.is_alphabetic() => {
                    let end = rest.find(|c: char| !c.is_alphabetic()).unwrap_or(rest.len());
                    self.push(TokenKind::Word { text: rest[..end].into(), roman: self.roman });
                    &rest[end..]
                }
                '{' => {
                    let (inside, after) = group(rest)?;
                    self.push(TokenKind::Mark('{'));
                    self.read(inside)?;
                    self.push(TokenKind::Mark('}'));
                    after
                }
                '}' => return None,
                c => {
                    self.brackets += i32::from("([".contains(c)) - i32::from(")]".contains(c));
                    self.push(TokenKind::Mark(c));
                    after
                }
            };
        }
        self.depth -= 1;
        Some(())
    }

    /// Reads what stands behind a backslash, and returns what follows.
    fn command<'a>(&mut self, rest: &'a str) -> Option<&'a str> {
        let end = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        if name.is_empty() {
            let c = rest.chars().next()?;
            let kind = match c {
                ',' | ';' | ':' | ' ' => {
                    self.spaced = true;
                    return Some(&rest[1..]);
                }
                '(' | ')' | '[' | ']' => return Some(&rest[1..]),
                '{' => TokenKind::Mark('⦃'),
                '}' => TokenKind::Mark('⦄'),
                '\\' => TokenKind::Mark('\n'),
                c => TokenKind::Mark(c),
            };
            self.brackets += i32::from(c == '{') - i32::from(c == '}');
            self.push(kind);
            return Some(&rest[c.len_utf8()..]);
        }
        if FONTS.contains(&name) {
            let (inside, after) = argument(after)?;
            let roman = std::mem::replace(&mut self.roman, true);
            self.read(inside)?;
            self.roman = roman;
            return Some(after);
        }
        match name {
            _ if SILENT.contains(&name) => return Some(after),
            _ if SPACES.contains(&name) => self.spaced = true,
            "frac" | "dfrac" | "tfrac" | "cfrac" => {
                self.push(TokenKind::Command("frac".into()));
                let (above, rest) = argument(after)?;
                let (below, rest) = argument(rest)?;
                self.group(above)?;
                self.group(below)?;
                return Some(rest);
            }
            "sqrt" => {
                self.push(TokenKind::Command("sqrt".into()));
                let after = after.trim_start();
                let rest = match after.strip_prefix('[') {
                    None => after,
                    Some(inside) => {
                        let (degree, rest) = inside.split_once(']')?;
                        self.push(TokenKind::Mark('['));
                        self.read(degree)?;
                        self.push(TokenKind::Mark(']'));
                        rest
                    }
                };
                if rest.trim_start().starts_with('(') {
                    return Some(rest);
                }
                let (inside, rest) = argument(rest)?;
                self.group(inside)?;
                return Some(rest);
            }
            _ => {
                let same = match name {
                    "leq" | "leqslant" => "le",
                    "geq" | "geqslant" => "ge",
                    "neq" => "ne",
                    "varnothing" => "emptyset",
                    "lbrace" => return Some(self.shown('⦃', after)),
                    "rbrace" => return Some(self.shown('⦄', after)),
                    "lparen" => return Some(self.shown('(', after)),
                    "rparen" => return Some(self.shown(')', after)),
                    "lbrack" => return Some(self.shown('[', after)),
                    "rbrack" => return Some(self.shown(']', after)),
                    name => name,
                };
                self.push(TokenKind::Command(same.into()));
            }
        }
        Some(after)
    }

    fn shown<'a>(&mut self, c: char, after: &'a str) -> &'a str {
        self.brackets += i32::from("⦃([".contains(c)) - i32::from("⦄)]".contains(c));
        self.push(TokenKind::Mark(c));
        after
    }

    fn group(&mut self, inside: &str) -> Option<()> {
        self.push(TokenKind::Mark('{'));
        self.read(inside)?;
        self.push(TokenKind::Mark('}'));
        Some(())
    }
}

/// Length of the number that begins a text: digits with separators of thousands, unless a comma
/// separates here, a point, and a power of ten.
fn number(text: &str, listed: bool) -> usize {
    let digits = |at: usize| text[at..].bytes().take_while(u8::is_ascii_digit).count();
    let mut end = digits(0);
    if !listed && (1..=3).contains(&end) {
        let mut grouped = end;
        while text[grouped..].starts_with(',') && digits(grouped + 1) == 3 {
            grouped += 4;
        }
        // 1,234,5 is a list.
        let goes_on = text[grouped..].starts_with(',') && digits(grouped + 1) > 0;
        end = if goes_on { end } else { grouped };
    }
    if text[end..].starts_with('.') {
        let part = digits(end + 1);
        if end + part == 0 {
            return 0;
        }
        end += 1 + part;
    }
    if text[end..].starts_with(['e', 'E']) && end > 0 {
        let sign = usize::from(text[end + 1..].starts_with(['-', '+']));
        let power = digits(end + 1 + sign);
        end += if power > 0 { 1 + sign + power } else { 0 };
    }
    end
}

/// What stands inside the braces that begin a text, and what follows them.
pub fn group(text: &str) -> Option<(&str, &str)> {
    let (mut depth, mut escaped) = (0_usize, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' if depth == 1 => return Some((&text[1..at], &text[at + 1..])),
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return None;
        }
    }
    None
}

/// The argument of a command: a group, another command or one character.
fn argument(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    match text.chars().next()? {
        '{' => group(text),
        '\\' => {
            let letters = text[1..].find(|c: char| !c.is_ascii_alphabetic());
            Some(text.split_at(letters.map_or(text.len(), |n| n + 1)))
        }
        '}' => None,
        c => Some(text.split_at(c.len_utf8())),
    }
}
