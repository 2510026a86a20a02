//! JSONL files: one object a line, the format told by its columns.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, stdin},
    path::Path,
    sync::Arc,
};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The longest line that is read, in bytes: parsed, a list of small numbers has 36 times its text.
const MAX_LINE: u64 = 16 << 20;

/// One line of a data file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Record {
    /// `text`
    Text { text: String },
    /// `text`, `label`: people's judgement of it
    Labelled { text: String, label: i64 },
    /// `prompt`, `completion`
    Completion { prompt: String, completion: String },
    /// `prompt`, `chosen`, `rejected`, and `margin` if there is one
    Preference { prompt: String, chosen: String, rejected: String, margin: Option<f64> },
    /// `prompt`
    Prompt { prompt: String },
    /// `input_ids`, `labels`: -100 is not learned
    LabelledIds { input_ids: Vec<u32>, learn: Vec<bool> },
    /// `input_ids`
    Ids { input_ids: Vec<u32> },
    /// `input_ids`, `output_ids`: a prompt and its continuation, as `warpo generate` writes them
    CompletionIds { prompt: Vec<u32>, completion: Vec<u32> },
    /// `prompt_ids`, `chosen_ids`, `rejected_ids`
    PreferenceIds { prompt: Vec<u32>, chosen: Vec<u32>, rejected: Vec<u32>, margin: Option<f64> },
}

impl Record {
    /// Its format, for messages.
    pub fn format(&self) -> &'static str {
        match self {
            Self::Text { .. } => "text",
            Self::Labelled { .. } => "text, label",
            Self::Completion { .. } => "prompt, completion",
            Self::Preference { .. } => "prompt, chosen, rejected",
            Self::Prompt { .. } => "prompt",
            Self::LabelledIds { .. } => "input_ids, labels",
            Self::Ids { .. } => "input_ids",
            Self::CompletionIds { .. } => "input_ids, output_ids",
            Self::PreferenceIds { .. } => "prompt_ids, chosen_ids, rejected_ids",
        }
    }
}

/// A line of a data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataPlace {
    /// The file, or `<stdin>`.
    pub path: Arc<Path>,
    /// Its line, from 1.
    pub line: usize,
}

impl std::fmt::Display for DataPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

/// A record and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    pub place: DataPlace,
    pub record: Record,
}

impl Located {
    /// An error about this record.
    pub fn error(&self, message: impl Into<String>) -> Error {
        let DataPlace { path, line } = &self.place;
        Error::Data { path: path.to_path_buf(), line: *line, message: message.into() }
    }
}

/// Reads a JSONL file, or standard input for `-`. Blank lines are skipped, unknown columns are
/// ignored, and all lines must have the format of the first.
pub fn read(path: &Path) -> Result<Vec<Located>> {
    let (path, mut reader): (Arc<Path>, Box<dyn BufRead>) = if path == Path::new("-") {
        (Path::new("<stdin>").into(), Box::new(BufReader::new(stdin())))
    } else {
        let file = File::open(path).map_err(Error::io("open", path))?;
        (path.into(), Box::new(BufReader::new(file)))
    };
    let mut out: Vec<Located> = Vec::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let n = (&mut reader).take(MAX_LINE + 1).read_until(b'\n', &mut bytes);
        if n.map_err(Error::io("read", &*path))? == 0 {
            break;
        }
        let bad = |message: String| Error::Data { path: path.to_path_buf(), line, message };
        if bytes.len() as u64 > MAX_LINE {
            return Err(bad(format!("longer than {MAX_LINE} bytes")));
        }
        let text = std::str::from_utf8(&bytes)
            .map_err(|e| bad(format!("not UTF-8 at byte {}", e.valid_up_to() + 1)))?;
        // A byte order mark is no content.
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            continue;
        }
        let json: Value = serde_json::from_str(text).map_err(|e| bad(not_json(&e)))?;
        let Value::Object(columns) = json else {
            return Err(bad(format!("wanted a JSON object, got {}", brief(&json))));
        };
        let record = parse(&columns).map_err(bad)?;
        if let Some(first) = out.first() {
            let (want, got) = (first.record.format(), record.format());
            if want != got {
                let line = first.place.line;
                let message = format!("has columns {got}, wanted {want} as in line {line}");
                return Err(bad(message));
            }
        }
        out.push(Located { place: DataPlace { path: path.clone(), line }, record });
    }
    if out.is_empty() {
        return Err(Error::file(&*path, "has no records, wanted JSON objects, one a line"));
    }
    Ok(out)
}

/// The parser's message without its "line 1", which would contradict the file's line.
fn not_json(e: &serde_json::Error) -> String {
    let (text, column) = (e.to_string(), e.column());
    let what = text.split(" at line ").next().unwrap_or_default();
    format!("not JSON: {what} at column {column}")
}

fn brief(v: &Value) -> String {
    let text = v.to_string();
    if text.chars().count() <= 60 {
        text
    } else {
        text.chars().take(57).chain("...".chars()).collect()
    }
}

fn parse(c: &Map<String, Value>) -> Result<Record, String> {
    let has = |key: &str| c.get(key).is_some_and(|v| !v.is_null());
    let text = |key: &str| match &c[key] {
        Value::String(s) => Ok(s.clone()),
        other => Err(format!("`{key}` is {}, wanted a text", brief(other))),
    };
    let ids = |key: &str| numbers(key, &c[key]);
    let margin = || match c.get("margin") {
        None | Some(Value::Null) => Ok(None),
        Some(v) => {
            let m = v.as_f64().filter(|m| m.is_finite());
            m.map(Some).ok_or_else(|| format!("`margin` is {}, wanted a number", brief(v)))
        }
    };
    if has("prompt_ids") && has("chosen_ids") && has("rejected_ids") {
        let (prompt, chosen, rejected) =
            (ids("prompt_ids")?, ids("chosen_ids")?, ids("rejected_ids")?);
        return Ok(Record::PreferenceIds { prompt, chosen, rejected, margin: margin()? });
    }
    if has("input_ids") {
        let input_ids = ids("input_ids")?;
        if has("output_ids") {
            return Ok(Record::CompletionIds { prompt: input_ids, completion: ids("output_ids")? });
        }
        if !has("labels") {
            return Ok(Record::Ids { input_ids });
        }
        let learn = labels(&c["labels"], &input_ids)?;
        return Ok(Record::LabelledIds { input_ids, learn });
    }
    if has("chosen") && has("rejected") {
        let (chosen, rejected) = (text("chosen")?, text("rejected")?);
        if has("prompt") {
            return Ok(Record::Preference {
                prompt: text("prompt")?,
                chosen,
                rejected,
                margin: margin()?,
            });
        }
        return transcripts(&chosen, &rejected, margin()?);
    }
    if has("prompt") && has("completion") {
        return Ok(Record::Completion { prompt: text("prompt")?, completion: text("completion")? });
    }
    if has("prompt") {
        return Ok(Record::Prompt { prompt: text("prompt")? });
    }
    if has("text") && has("label") {
        let label = match &c["label"] {
            Value::Bool(b) => i64::from(*b),
            v => v
                .as_i64()
                .ok_or_else(|| format!("`label` is {}, wanted a whole number", brief(v)))?,
        };
        return Ok(Record::Labelled { text: text("text")?, label });
    }
    if has("text") {
        return Ok(Record::Text { text: text("text")? });
    }
    let found: Vec<&String> = c.keys().collect();
    if has("messages") {
        return Err(format!("has columns {found:?}: chat messages are not supported yet"));
    }
    Err(format!(
        "has columns {found:?}, wanted text | text, label | prompt | prompt, completion | \
         [prompt,] chosen, rejected | input_ids[, labels | output_ids] | prompt_ids, chosen_ids, rejected_ids"
    ))
}

fn numbers(key: &str, v: &Value) -> Result<Vec<u32>, String> {
    let wrong = |v: &Value| format!("`{key}` has {}, wanted token ids", brief(v));
    let Value::Array(all) = v else { return Err(wrong(v)) };
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| wrong(v));
    all.iter().map(id).collect()
}

fn labels(v: &Value, ids: &[u32]) -> Result<Vec<bool>, String> {
    let Value::Array(all) = v else {
        return Err(format!("`labels` is {}, wanted a list", brief(v)));
    };
    if all.len() != ids.len() {
        return Err(format!("`labels` has {} numbers, `input_ids` {}", all.len(), ids.len()));
    }
    let one = |(i, (label, id)): (usize, (&Value, &u32))| match label.as_i64() {
        Some(-100) => Ok(false),
        Some(n) if n == i64::from(*id) => Ok(true),
        _ => Err(format!("`labels`[{i}] is {}, wanted -100 or the token's id {id}", brief(label))),
    };
    all.iter().zip(ids).enumerate().map(one).collect()
}

/// Two transcripts without a prompt (the HH format): the prompt is what they share, up to and with
/// the last "\n\nAssistant:" in it.
fn transcripts(chosen: &str, rejected: &str, margin: Option<f64>) -> Result<Record, String> {
    const TURN: &str = "\n\nAssistant:";
    let same = chosen.bytes().zip(rejected.bytes()).take_while(|(a, b)| a == b).count();
    let Some(at) =
        chosen.as_bytes()[..same].windows(TURN.len()).rposition(|w| w == TURN.as_bytes())
    else {
        return Err(
            "has `chosen` and `rejected`, wanted a `prompt`, or transcripts that share one \
                    up to \"\\n\\nAssistant:\""
                .into(),
        );
    };
    let at = at + TURN.len();
    Ok(Record::Preference {
        prompt: chosen[..at].into(),
        chosen: chosen[at..].into(),
        rejected: rejected[at..].into(),
        margin,
    })
}
