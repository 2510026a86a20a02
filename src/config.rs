//! Configuration: one block declares a struct, its defaults, its TOML and its help.
//!
//! Keys are flat and have the field's names, the same in a file and in `--set key=value`. An
//! unknown key is refused with the nearest known one.

pub mod elsewhere;

use std::{any::Any, collections::BTreeMap, fmt::Debug, path::PathBuf};

use toml::Value;

use crate::error::{Error, Result};

/// One setting, for help and templates.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Its name, in a file and in `--set`.
    pub name: &'static str,
    /// The values that it takes, in words.
    pub kind: String,
    /// Its value now, in TOML.
    pub value: String,
    /// Its meaning, with the default's source.
    pub doc: &'static str,
}

/// A group of settings, made by [`settings!`](crate::settings).
pub trait Section: Any + Debug + Send {
    /// All keys with their present values.
    fn keys(&self) -> Vec<Key>;
    /// Sets a key; `None` if it is not of this section.
    fn set(&mut self, key: &str, value: &Value) -> Option<Result<()>>;
    /// Checks the range of every value, and that those without a default were given.
    fn validate(&self) -> Result<()>;
    /// Lets the owner downcast to its struct.
    fn as_any(&self) -> &dyn Any;
}

/// A type that a setting can have.
pub trait Field: Sized {
    /// Accepted values, for messages: "a number".
    fn kind() -> String;
    /// Reads a TOML value.
    fn parse(value: &Value) -> Option<Self>;
    fn show(&self) -> String;
}

macro_rules! fields {
    ($($t:ty: $kind:expr, $parse:expr, $show:expr;)*) => {$(
        impl Field for $t {
            fn kind() -> String {
                $kind.into()
            }
            fn parse(value: &Value) -> Option<Self> {
                let parse: fn(&Value) -> Option<Self> = $parse;
                parse(value)
            }
            fn show(&self) -> String {
                let show: fn(&Self) -> String = $show;
                show(self)
            }
        }
    )*};
}

// TOML has 64 bits with a sign.
const WHOLE: &str = "a whole number, 0 or more, below 2^63";

fields! {
    bool: "true or false", Value::as_bool, Self::to_string;
    u32: WHOLE, |v| v.as_integer()?.try_into().ok(), Self::to_string;
    u64: WHOLE, |v| v.as_integer()?.try_into().ok(), Self::to_string;
    usize: WHOLE, |v| v.as_integer()?.try_into().ok(), Self::to_string;
    f64: "a number", number, |x| format!("{x:?}");
    String: "a text", |v| v.as_str().map(Self::from), |s| Value::String(s.clone()).to_string();
    PathBuf: "a path", |v| v.as_str().map(Self::from),
        |p| Value::String(p.to_string_lossy().into_owned()).to_string();
}

impl Field for BTreeMap<String, String> {
    fn kind() -> String {
        "texts by name: { name = \"text\" }".into()
    }
    fn parse(value: &Value) -> Option<Self> {
        let text = |(k, v): (&String, &Value)| Some((k.clone(), v.as_str()?.to_owned()));
        value.as_table()?.iter().map(text).collect()
    }
    fn show(&self) -> String {
        let table = self.iter().map(|(k, v)| (k.clone(), Value::String(v.clone()))).collect();
        Value::Table(table).to_string()
    }
}

fn number(value: &Value) -> Option<f64> {
    let x = value.as_float().or_else(|| value.as_integer().map(|i| i as f64))?;
    x.is_finite().then_some(x)
}

impl<T: Field> Field for Option<T> {
    fn kind() -> String {
        format!("{}, or \"none\"", T::kind())
    }
    fn parse(value: &Value) -> Option<Self> {
        if value.as_str() == Some("none") { Some(None) } else { T::parse(value).map(Some) }
    }
    fn show(&self) -> String {
        self.as_ref().map_or("\"none\"".into(), Field::show)
    }
}

impl<T: Field> Field for Vec<T> {
    fn kind() -> String {
        format!("a list, each {}", T::kind())
    }
    fn parse(value: &Value) -> Option<Self> {
        match value {
            Value::Array(items) => items.iter().map(T::parse).collect(),
            one => T::parse(one).map(|x| vec![x]),
        }
    }
    fn show(&self) -> String {
        format!("[{}]", self.iter().map(Field::show).collect::<Vec<_>>().join(", "))
    }
}

/// An enum whose variants are texts in a config.
///
/// ```
/// warpo::choices! {
///     /// Which way.
///     pub enum Way { Up = "up", Down = "down" }
/// }
/// ```
#[macro_export]
macro_rules! choices {
    ($(#[$meta:meta])* pub enum $name:ident {
        $($(#[$vmeta:meta])* $variant:ident = $text:literal),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum $name { $($(#[$vmeta])* $variant),* }

        impl $crate::config::Field for $name {
            fn kind() -> String {
                format!("one of {:?}", [$($text),*])
            }
            fn parse(value: &$crate::config::Value_) -> Option<Self> {
                match value.as_str()? {
                    $($text => Some(Self::$variant),)*
                    _ => None,
                }
            }
            fn show(&self) -> String {
                match self { $(Self::$variant => format!("{:?}", $text)),* }
            }
        }
    };
}

#[doc(hidden)]
pub use toml::Value as Value_;

/// Declares a section: docs, defaults and ranges beside each field. It may begin with `parts`,
/// which are sections themselves: their keys stand beside its own.
///
/// ```
/// warpo::settings! {
///     /// How to walk.
///     pub struct Walk {
///         /// Steps a minute.
///         pub pace: f64 = 100.0 => "above 0" if |pace| *pace > 0.0,
///         /// Whistling.
///         pub whistle: bool = false,
///     }
/// }
/// let mut walk = Walk::default();
/// assert_eq!(walk.pace, 100.0);
/// let error = warpo::config::set_pair(&mut [&mut walk], "pace=-3").unwrap_err();
/// assert_eq!(error.to_string(), "config key `pace`: got -3, wanted above 0");
/// ```
#[macro_export]
macro_rules! settings {
    ($(#[$meta:meta])* pub struct $name:ident {
        $(parts { $(pub $part:ident: $section:ty),* $(,)? })?
        $($(#[doc = $doc:literal])* pub $field:ident: $ty:ty = $default:expr
            $(=> $want:literal if $check:expr)?),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $($(pub $part: $section,)*)?
            $($(#[doc = $doc])* pub $field: $ty),*
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $($($part: <$section>::default(),)*)?
                    $($field: $default),*
                }
            }
        }

        impl $crate::config::Section for $name {
            fn keys(&self) -> Vec<$crate::config::Key> {
                let parts: &[&dyn $crate::config::Section] = &[$($(&self.$part),*)?];
                let parts = parts.iter().flat_map(|part| part.keys());
                parts.chain([$($crate::config::Key {
                    name: $crate::config::key_name(stringify!($field)),
                    kind: [<$ty as $crate::config::Field>::kind() $(, $want.to_owned())?].join("; "),
                    value: $crate::config::Field::show(&self.$field),
                    doc: concat!($($doc, "\n"),*),
                }),*]).collect()
            }
            fn set(&mut self, key: &str, value: &$crate::config::Value_) -> Option<$crate::Result<()>> {
                $($(if let Some(done) = self.$part.set(key, value) {
                    return Some(done);
                })*)?
                $(if key == $crate::config::key_name(stringify!($field)) {
                    let found: $crate::Result<$ty> = $crate::config::read(key, value);
                    $(let found = found.and_then(|x| {
                        let check: fn(&$ty) -> bool = $check;
                        // A setting that must be given has a default out of range, in templates.
                        let default: $ty = $default;
                        let shown = $crate::config::Field::show;
                        let ok = check(&x) || shown(&x) == shown(&default);
                        if ok { Ok(x) } else { Err($crate::Error::config(key, $want, value)) }
                    });)?
                    return Some(found.map(|x| self.$field = x));
                })*
                None
            }
            fn validate(&self) -> $crate::Result<()> {
                $($(self.$part.validate()?;)*)?
                $($({
                    let check: fn(&$ty) -> bool = $check;
                    if !check(&self.$field) {
                        let got = $crate::config::Field::show(&self.$field);
                        let key = $crate::config::key_name(stringify!($field));
                        return Err($crate::Error::config(key, $want, got));
                    }
                })?)*
                Ok(())
            }
            fn as_any(&self) -> &dyn std::any::Any {
                self
            }
        }
    };
}

/// The key of a field: `lambda_` is `lambda`, for fields that would be keywords.
#[doc(hidden)]
pub fn key_name(field: &'static str) -> &'static str {
    field.trim_end_matches('_')
}

/// Parses a value, with a message that names the key.
#[doc(hidden)]
pub fn read<T: Field>(key: &str, value: &Value) -> Result<T> {
    T::parse(value).ok_or_else(|| Error::config(key, T::kind(), value))
}

/// Sets one key in whichever section has it.
pub fn set(sections: &mut [&mut dyn Section], key: &str, value: &Value) -> Result<()> {
    for section in sections.iter_mut() {
        if let Some(done) = section.set(key, value) {
            return done;
        }
    }
    let hint = match value {
        Value::Table(_) => Some(format!("keys stand by themselves: leave out `[{key}]`")),
        _ => nearest(sections, key).map(|name| format!("did you mean `{name}`?")),
    };
    Err(Error::Config { key: key.into(), message: "there is no such key".into(), hint })
}

/// The known key that a user most likely meant.
fn nearest(sections: &[&mut dyn Section], key: &str) -> Option<&'static str> {
    let names: Vec<&'static str> = sections.iter().flat_map(|s| s.keys()).map(|k| k.name).collect();
    let other = elsewhere::ours(key, |name| names.contains(&name));
    let near = names.into_iter().map(|n| (distance(key, n), n)).min();
    let near = near.filter(|(d, n)| *d <= 2.max(n.len() / 3)).map(|(_, n)| n);
    other.or(near)
}

/// Sets all keys of a TOML text; `name` is the file, for messages.
pub fn set_all(sections: &mut [&mut dyn Section], text: &str, name: &str) -> Result<()> {
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| Error::Config {
        key: name.into(),
        message: format!("not TOML: {}", e.to_string().trim_end()),
        hint: None,
    })?;
    for (key, value) in &table {
        set(sections, key, value).map_err(|e| locate(e, text, name))?;
    }
    Ok(())
}

/// Adds file and line to an error about a key.
fn locate(e: Error, text: &str, name: &str) -> Error {
    let Error::Config { key, message, hint } = e else { return e };
    let is_key = |l: &str| l.trim_start().split(['=', ' ', '\t']).next() == Some(key.as_str());
    let line = text.lines().position(is_key).map_or(String::new(), |i| format!(":{}", i + 1));
    Error::Config { message: format!("{message} ({name}{line})"), key, hint }
}

/// Sets `key=value`; a value that is not TOML is taken as text.
pub fn set_pair(sections: &mut [&mut dyn Section], pair: &str) -> Result<()> {
    let Some((key, value)) = pair.split_once('=') else {
        return Err(Error::Config {
            key: pair.into(),
            message: "wanted key=value".into(),
            hint: None,
        });
    };
    let (key, text) = (key.trim(), value.trim());
    let parsed = format!("x = {text}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("x"));
    let plain = || Value::String(text.to_owned());
    let value = parsed.unwrap_or_else(plain);
    set(sections, key, &value).or_else(|e| {
        // A text that looks like a number or a date is still a text where the key takes one.
        if !matches!(value, Value::Array(_) | Value::Table(_))
            && set(sections, key, &plain()).is_ok()
        {
            Ok(())
        } else {
            Err(e)
        }
    })
}

/// A complete commented TOML file of the present values.
pub fn template(sections: &[&dyn Section]) -> String {
    let mut out = String::new();
    for key in sections.iter().flat_map(|s| s.keys()) {
        for line in key.doc.trim().lines() {
            out += &format!("# {}\n", line.trim());
        }
        out += &format!("# ({})\n{} = {}\n\n", key.kind, key.name, key.value);
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// Edits between two words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let up = row[j + 1];
            row[j + 1] = (corner + usize::from(x != *y)).min(up + 1).min(row[j] + 1);
            corner = up;
        }
    }
    row[b.len()]
}
