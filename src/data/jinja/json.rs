//! `tojson`: values as `json.dumps(.., ensure_ascii=False)` writes them.

use super::{
    chars::{Chars, Fuel},
    methods::Given,
    value::{Datum, Done, float},
};

/// The filter `tojson`.
pub fn to_json(value: &Datum, given: &mut Given, fuel: &Fuel) -> Done<Datum> {
    let ascii = given.flag("ensure_ascii");
    let indent = match given.take("indent") {
        None | Some(Datum::None) => None,
        Some(Datum::Text(text)) => Some(text.as_slice().to_vec()),
        Some(n) => {
            let n = n.integer().ok_or("`indent` is no number")?;
            let n = usize::try_from(n).unwrap_or(0);
            fuel.spend(n)?;
            Some(vec![u32::from(' '); n])
        }
    };
    let separators = given.take("separators");
    let sorted = given.flag("sort_keys");
    let (item, key) = match separators {
        None | Some(Datum::None) => {
            (Chars::written(if indent.is_some() { "," } else { ", " }), Chars::written(": "))
        }
        Some(Datum::List(all)) => match &all.items[..] {
            [Datum::Text(item), Datum::Text(key)] => (item.clone(), key.clone()),
            _ => return Err("`separators` are two texts".into()),
        },
        Some(_) => return Err("`separators` are two texts".into()),
    };
    let mut json = JsonWriter { fuel, indent, item, key, ascii, sorted, out: Vec::new() };
    json.write(value, 0)?;
    Ok(Datum::Text(json.out.into()))
}

struct JsonWriter<'a> {
    fuel: &'a Fuel,
    indent: Option<Vec<u32>>,
    item: Chars,
    key: Chars,
    ascii: bool,
    sorted: bool,
    out: Vec<u32>,
}

impl JsonWriter<'_> {
    fn put(&mut self, text: &str) -> Done<()> {
        self.fuel.spend(text.len() + 1)?;
        self.out.extend(text.chars().map(u32::from));
        Ok(())
    }

    fn write(&mut self, value: &Datum, depth: usize) -> Done<()> {
        match value {
            Datum::None => self.put("null"),
            Datum::Bool(b) => self.put(if *b { "true" } else { "false" }),
            Datum::Integer(n) => self.put(&n.to_string()),
            Datum::Number(x) => self.put(&match float(*x).as_str() {
                "nan" => "NaN".to_owned(),
                "inf" => "Infinity".to_owned(),
                "-inf" => "-Infinity".to_owned(),
                text => text.to_owned(),
            }),
            Datum::Text(text) => self.text(text),
            Datum::List(all) => {
                self.put("[")?;
                for (i, item) in all.items.iter().enumerate() {
                    self.separate(i, depth)?;
                    self.write(item, depth + 1)?;
                }
                self.close(all.items.len(), depth, "]")
            }
            Datum::Dict(all) => {
                let mut entries: Vec<(Chars, &Datum)> = Vec::new();
                for (key, value) in &all.entries {
                    let key = match key {
                        Datum::Text(text) => text.clone(),
                        Datum::None => Chars::written("null"),
                        Datum::Bool(b) => Chars::written(if *b { "true" } else { "false" }),
                        key => key.text(self.fuel)?,
                    };
                    entries.push((key, value));
                }
                if self.sorted {
                    self.fuel.spend(entries.iter().map(|e| 8 * e.0.len()).sum())?;
                    entries.sort_by_key(|e| e.0.plain());
                }
                self.put("{")?;
                for (i, (key, value)) in entries.iter().enumerate() {
                    self.separate(i, depth)?;
                    self.text(key)?;
                    self.fuel.spend(self.key.len())?;
                    self.out.extend(self.key.as_slice());
                    self.write(value, depth + 1)?;
                }
                self.close(entries.len(), depth, "}")
            }
            other => Err(format!("Object of type {} is not JSON serializable", other.kind())),
        }
    }

    /// What stands before item `i`.
    fn separate(&mut self, i: usize, depth: usize) -> Done<()> {
        if i > 0 {
            self.fuel.spend(self.item.len())?;
            self.out.extend(self.item.as_slice());
        }
        self.line(depth + 1)
    }

    fn close(&mut self, items: usize, depth: usize, end: &str) -> Done<()> {
        if items > 0 {
            self.line(depth)?;
        }
        self.put(end)
    }

    fn line(&mut self, depth: usize) -> Done<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        self.fuel.spend(1 + depth * indent.len())?;
        self.out.push('\n'.into());
        for _ in 0..depth {
            self.out.extend(indent);
        }
        Ok(())
    }

    fn text(&mut self, text: &Chars) -> Done<()> {
        let ascii = self.ascii;
        let escaped = text.mapped(
            |c| {
                let escape = match c {
                    '"' => "\\\"".to_owned(),
                    '\\' => "\\\\".to_owned(),
                    '\n' => "\\n".to_owned(),
                    '\r' => "\\r".to_owned(),
                    '\t' => "\\t".to_owned(),
                    '\u{8}' => "\\b".to_owned(),
                    '\u{c}' => "\\f".to_owned(),
                    c if u32::from(c) < 0x20 => format!("\\u{:04x}", u32::from(c)),
                    c if ascii && !c.is_ascii() => {
                        c.encode_utf16(&mut [0; 2]).iter().map(|u| format!("\\u{u:04x}")).collect()
                    }
                    c => c.to_string(),
                };
                escape.chars().collect::<Vec<_>>()
            },
            self.fuel,
        )?;
        self.put("\"")?;
        self.fuel.spend(escaped.len())?;
        self.out.extend(escaped.as_slice());
        self.put("\"")
    }
}
