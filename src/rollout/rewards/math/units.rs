//! Units behind numbers.

use super::lexer::{AnswerToken, TokenKind};

/// Units that have more than one name; the first one counts. Symbols of one letter are units in
/// `\text` only: elsewhere they are variables.
const UNITS: &[&[&str]] = &[
    &["mm", "millimeter", "millimetre"],
    &["cm", "centimeter", "centimetre"],
    &["m", "meter", "metre"],
    &["km", "kilometer", "kilometre"],
    &["inch", "in", "inche"],
    &["foot", "ft", "feet"],
    &["yard", "yd"],
    &["mile", "mi"],
    &["mg", "milligram"],
    &["g", "gram"],
    &["kg", "kilogram"],
    &["pound", "lb"],
    &["ounce", "oz"],
    &["ml", "mL", "milliliter", "millilitre"],
    &["liter", "L", "l", "litre"],
    &["ms", "millisecond"],
    &["second", "s", "sec"],
    &["minute", "min"],
    &["hour", "h", "hr"],
    &["day", "d"],
    &["mph"],
    &["kph"],
    &["Hz", "hertz"],
    &["N", "newton"],
    &["J", "joule"],
    &["W", "watt"],
    &["degree", "deg"],
    &["dollar", "usd", "USD"],
    &["euro", "EUR"],
    &["%", "percent"],
];

/// Numbers by which a word multiplies.
const SCALES: &[(&str, i128)] = &[
    ("hundred", 100),
    ("thousand", 1_000),
    ("million", 1_000_000),
    ("billion", 1_000_000_000),
    ("trillion", 1_000_000_000_000),
];

/// Words that are no units: what stands before them is not the whole number.
const NO_UNITS: &[&str] = &[
    "about",
    "above",
    "and",
    "approximately",
    "around",
    "at",
    "base",
    "below",
    "between",
    "but",
    "by",
    "choose",
    "couple",
    "cubed",
    "dozen",
    "dozens",
    "divided",
    "factorial",
    "few",
    "from",
    "gross",
    "half",
    "halves",
    "if",
    "infinity",
    "into",
    "least",
    "less",
    "log",
    "maybe",
    "minus",
    "mod",
    "modulo",
    "more",
    "most",
    "negative",
    "none",
    "not",
    "only",
    "or",
    "over",
    "pairs",
    "pair",
    "per",
    "permille",
    "pi",
    "plus",
    "positive",
    "power",
    "quarter",
    "quarters",
    "remainder",
    "root",
    "score",
    "scores",
    "sin",
    "cos",
    "tan",
    "sec",
    "exp",
    "squared",
    "sqrt",
    "than",
    "then",
    "times",
    "to",
    "twice",
    "undefined",
    "under",
    "unless",
    "until",
    "when",
    "where",
    "while",
    "with",
    "without",
    "wrong",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "third",
    "thirds",
    "fourth",
    "fourths",
    "fifth",
    "fifths",
    "sixth",
    "sixths",
    "seventh",
    "sevenths",
    "eighth",
    "eighths",
    "ninth",
    "ninths",
    "tenth",
    "tenths",
    "hundredth",
    "hundredths",
    "thousandth",
    "thousandths",
    "millionth",
    "millionths",
    "hundreds",
    "thousands",
    "millions",
    "billions",
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "digit",
    "radians",
    "false",
    "true",
    "no",
    "yes",
    "incorrect",
];

/// Reads the tokens behind a number: what they multiply it by, and their unit. None if they are no
/// unit.
pub fn read(rest: &[AnswerToken]) -> Option<(i128, Option<String>)> {
    let (scale, rest) = match rest.first().map(|t| &t.kind) {
        Some(TokenKind::Word { text, .. }) => {
            let scale = SCALES.iter().find(|(word, _)| word == text).map(|s| s.1);
            scale.map_or((1, rest), |scale| (scale, &rest[1..]))
        }
        _ => (1, rest),
    };
    if rest.is_empty() {
        return Some((scale, None));
    }
    let mut all: Vec<String> = Vec::new();
    let (mut at, mut power, mut nouns) = (0, None, 0);
    while let Some(t) = rest.get(at) {
        at += 1;
        let begins = all.is_empty() || all.last().is_some_and(|last| last == "/");
        match &t.kind {
            TokenKind::Mark('%') if all.is_empty() && rest.len() == 1 => all.push("%".into()),
            TokenKind::Mark('^') => {
                let braced = rest.get(at).is_some_and(|t| t.kind == TokenKind::Mark('{'));
                let of = &rest.get(at + usize::from(braced))?.kind;
                let closes = !braced || rest.get(at + 2)?.kind == TokenKind::Mark('}');
                at += if braced { 3 } else { 1 };
                let new = match of {
                    TokenKind::Command(c) if c == "circ" || c == "degree" => {
                        all.is_empty().then(|| "degree".to_owned())?
                    }
                    TokenKind::Number(n) if !begins && n != "1" => format!("{}^{n}", all.pop()?),
                    _ => return None,
                };
                closes.then(|| all.push(new))?;
            }
            TokenKind::Command(c) if c == "degree" && all.is_empty() => all.push("degree".into()),
            TokenKind::Mark('/') if !begins => all.push("/".into()),
            TokenKind::Word { text, .. } if text == "per" && !begins => all.push("/".into()),
            TokenKind::Word { text, .. } if text == "square" || text == "sq" => power = Some("^2"),
            TokenKind::Word { text, .. } if text == "cubic" || text == "cu" => power = Some("^3"),
            TokenKind::Word { text, roman } => {
                let own = all.first().is_some_and(|first| first == "degree") && all.len() == 1;
                let unit = match text.chars().count() {
                    // Degrees Celsius.
                    1 if own && ["C", "F", "K"].contains(&&**text) => text.clone(),
                    _ => {
                        let (unit, known) = unit(text, *roman, t.spaced)?;
                        nouns += usize::from(!known);
                        unit
                    }
                };
                all.push(unit + power.take().unwrap_or_default());
            }
            _ => return None,
        }
    }
    let whole = power.is_none()
        && nouns < 2
        && all.last().is_some_and(|last| last != "/")
        && all.len() <= 5;
    whole.then(|| (scale, Some(all.join(" "))))
}

/// The name of a unit, and whether it is known here.
fn unit(word: &str, roman: bool, spaced: bool) -> Option<(String, bool)> {
    let lower = word.to_lowercase();
    let singular = if lower.len() > 2 { lower.strip_suffix('s').unwrap_or(&lower) } else { &lower };
    let is = |name: &&str| *name == word || *name == singular || **name == *lower;
    if word.chars().count() == 1 && !roman || NO_UNITS.contains(&&*lower) {
        return None;
    }
    if let Some(names) = UNITS.iter().find(|names| names.iter().any(is)) {
        return Some((names[0].to_owned(), true));
    }
    // Any other noun: 5 apples.
    let noun = lower.len() >= 3 && lower.contains(['a', 'e', 'i', 'o', 'u']);
    (noun && (spaced || roman)).then(|| (singular.to_owned(), false))
}
