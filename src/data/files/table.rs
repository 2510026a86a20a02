//! Tables: CSV (RFC 4180) and TSV, whose first row names the columns.

use serde_json::{Map, Value};

use super::{Take, lines::Lines};
use crate::{
    data::{options::ReadOptions, unique},
    error::{Error, Result},
};

/// Whether a row of a table goes on in the next line: a text in quotes does. Quotes are those of a
/// cell that begins with one; there a quote stands twice.
#[derive(Default)]
struct Quotes {
    inside: bool,
    /// A byte of the cell was read that did not begin it, or ended its quotes.
    behind: bool,
}

impl Quotes {
    /// Reads on, a byte once.
    fn goes_on(&mut self, bytes: &[u8], by: u8) -> bool {
        for b in bytes {
            match b {
                b'"' if self.inside => (self.inside, self.behind) = (false, false),
                _ if self.inside => {}
                b'"' if !self.behind => self.inside = true,
                b => self.behind = *b != by,
            }
        }
        self.inside
    }
}

/// The rows of a table whose first one names its columns.
pub(super) fn table(
    mut lines: Lines<'_>,
    by: u8,
    options: &ReadOptions,
    take: &mut Take<'_>,
) -> Result<()> {
    let mut header: Option<Vec<String>> = None;
    loop {
        lines.bytes.clear();
        let first = lines.line + 1;
        let (mut quotes, mut read) = (Quotes::default(), 0);
        while lines.more()? {
            let opens = lines.line == 1 && lines.bytes.starts_with("\u{feff}".as_bytes());
            read = read.max(if opens { "\u{feff}".len() } else { 0 });
            if !quotes.goes_on(&lines.bytes[read..], by) {
                break;
            }
            read = lines.bytes.len();
        }
        if lines.bytes.is_empty() {
            let none = || Error::file(lines.name, "is empty, wanted a line that names the columns");
            return header.map(drop).ok_or_else(none);
        }
        let text = match lines.text() {
            Ok(text) => text.trim_start_matches('\u{feff}'),
            // What follows is read: rows end where their bytes say so.
            Err(e) if header.is_some() => {
                take(first, Err(e))?;
                continue;
            }
            Err(e) => return Err(lines.error(first, e)),
        };
        if text.trim().is_empty() {
            continue;
        }
        // It may have taken all rows behind it.
        if quotes.inside {
            return Err(lines.error(first, "has a quote that does not end".into()));
        }
        let row = cells(text.trim_end_matches(['\n', '\r']), by);
        let Some(header) = &header else {
            let row = row.map_err(|e| lines.error(first, e))?;
            if let Some(i) = (1..row.len()).find(|i| row[..*i].contains(&row[*i])) {
                return Err(lines.error(first, format!("has column {:?} twice", row[i])));
            }
            header = Some(row);
            continue;
        };
        match row.and_then(|row| object(header, row, options)) {
            Ok(object) => take(first, Ok(&object.to_string()))?,
            Err(e) => take(first, Err(e))?,
        }
    }
}

/// A row as an object.
fn object(header: &[String], row: Vec<String>, options: &ReadOptions) -> Result<Value, String> {
    if row.len() != header.len() {
        return Err(format!("has {} cells, wanted {} as the header", row.len(), header.len()));
    }
    let read =
        |(name, cell): (&String, String)| Ok((name.clone(), value(options.ours(name), cell)?));
    header.iter().zip(row).map(read).collect::<Result<Map<_, _>, String>>().map(Value::Object)
}

/// The cells of a row.
fn cells(row: &str, by: u8) -> Result<Vec<String>, String> {
    let (mut all, mut rest) = (Vec::new(), row);
    loop {
        let mut cell = String::new();
        if let Some(mut quoted) = rest.strip_prefix('"') {
            loop {
                let end = quoted.find('"').ok_or("has a quote that does not end")?;
                cell += &quoted[..end];
                quoted = &quoted[end + 1..];
                match quoted.strip_prefix('"') {
                    Some(more) => (cell, quoted) = (cell + "\"", more),
                    None => break,
                }
            }
            rest = quoted;
        } else {
            let end = rest.bytes().position(|b| b == by).unwrap_or(rest.len());
            cell += &rest[..end];
            rest = &rest[end..];
        }
        all.push(cell);
        match rest.as_bytes().first() {
            None => return Ok(all),
            Some(b) if *b == by => rest = &rest[1..],
            Some(_) => return Err(format!("has text behind the quotes of cell {}", all.len())),
        }
    }
}

/// A cell of one of our columns: text, but for those that are lists or numbers, and for messages.
fn value(column: &str, cell: String) -> Result<Value, String> {
    let is_list =
        |v: &Value| v.as_array().is_some_and(|all| all.iter().all(|m| m["role"].is_string()));
    Ok(match column {
        "prompt" | "completion" | "chosen" | "rejected" if cell.trim_start().starts_with("[{") => {
            let python = |key: &str| cell.trim_start().starts_with(&format!("[{{'{key}'"));
            match unique::parse(cell.trim()) {
                Ok(list) if is_list(&list) => list,
                _ if python("role") || python("content") => {
                    return Err(format!(
                        "`{column}` has messages as Python prints them, wanted JSON"
                    ));
                }
                _ => Value::String(cell),
            }
        }
        "messages"
        | "conversations"
        | "tools"
        | "chat_template_kwargs"
        | "history"
        | "margin"
        | "label"
        | "labels"
        | "input_ids"
        | "output_ids"
        | "prompt_ids"
        | "chosen_ids"
        | "rejected_ids" => match cell.trim() {
            "" => Value::Null,
            text => unique::parse(text).unwrap_or(Value::String(cell)),
        },
        _ => Value::String(cell),
    })
}
