//! JSONL files: one object a line, the format told by its columns.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Read, stdin},
    path::Path,
    sync::Arc,
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::chat::{Chat, ChatText, not_json};
use crate::error::{Error, Result};

/// The longest line that is read, in bytes.
const MAX_LINE: u64 = 64 << 20;

/// One line of a data file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Record {
    /// `text`
    Text { text: String },
    /// `text`, `label`: people's judgement of it, the higher the better
    Labelled { text: String, label: f64 },
    /// `prompt` (or `question`), `completion` (or `response`, `answer`)
    Completion { prompt: String, completion: String },
    /// `prompt`, `chosen`, `rejected`, and `margin` if there is one
    Preference { prompt: String, chosen: String, rejected: String, margin: Option<f64> },
    /// `prompt`
    Prompt { prompt: String },
    /// A completion, and `label`: people's judgement of it, the higher the better
    Judged { completion: Box<Record>, label: f64 },
    /// `input_ids`, `labels`: -100 is not learned
    LabelledIds { input_ids: Vec<u32>, learn: Vec<bool> },
    /// `input_ids`
    Ids { input_ids: Vec<u32> },
    /// `input_ids`, `output_ids`: a prompt and its continuation, as `warpo generate` writes them
    CompletionIds { prompt: Vec<u32>, completion: Vec<u32> },
    /// `prompt_ids`, `chosen_ids`, `rejected_ids`
    PreferenceIds { prompt: Vec<u32>, chosen: Vec<u32>, rejected: Vec<u32>, margin: Option<f64> },
    /// `messages`
    Messages(ChatText),
    /// `prompt` as messages
    ChatPrompt(ChatText),
    /// `prompt` and `completion` as messages; of the completion those alone
    ChatCompletion { prompt: ChatText, completion: String },
    /// `chosen` and `rejected` as messages, behind those of `prompt` if that is there
    ChatPreference {
        prompt: Option<ChatText>,
        chosen: ChatText,
        rejected: String,
        margin: Option<f64>,
    },
}

impl Record {
    /// What was judged, or the record itself.
    pub fn content(&self) -> &Self {
        match self {
            Self::Judged { completion, .. } => completion,
            other => other,
        }
    }

    /// Its texts; those of messages are the JSON texts of their lists.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let texts: [&str; 3] = match self.content() {
            Self::Text { text } | Self::Labelled { text, .. } => [text, "", ""],
            Self::Completion { prompt, completion } => [prompt, completion, ""],
            Self::Preference { prompt, chosen, rejected, .. } => [prompt, chosen, rejected],
            Self::Prompt { prompt } => [prompt, "", ""],
            Self::Messages(chat) | Self::ChatPrompt(chat) => [&chat.messages, "", ""],
            Self::ChatCompletion { prompt, completion } => [&prompt.messages, completion, ""],
            Self::ChatPreference { prompt, chosen, rejected, .. } => {
                [prompt.as_ref().map_or("", |p| &p.messages), &chosen.messages, rejected]
            }
            _ => [""; 3],
        };
        texts.into_iter().filter(|text| !text.is_empty())
    }

    /// Whether it is made of messages, which need a chat template.
    pub fn is_chat(&self) -> bool {
        matches!(
            self.content(),
            Self::Messages(_)
                | Self::ChatPrompt(_)
                | Self::ChatCompletion { .. }
                | Self::ChatPreference { .. }
        )
    }

    /// Its format, for messages.
    pub fn format(&self) -> &'static str {
        match self {
            Self::Text { .. } => "text",
            Self::Labelled { .. } => "text, label",
            Self::Completion { .. } => "prompt, completion",
            Self::Preference { .. } => "prompt, chosen, rejected",
            Self::Prompt { .. } => "prompt",
            Self::Judged { completion, .. } => match &**completion {
                Self::CompletionIds { .. } => "input_ids, output_ids, label",
                Self::ChatCompletion { .. } => "prompt, completion, label (messages)",
                _ => "prompt, completion, label",
            },
            Self::LabelledIds { .. } => "input_ids, labels",
            Self::Ids { .. } => "input_ids",
            Self::CompletionIds { .. } => "input_ids, output_ids",
            Self::PreferenceIds { .. } => "prompt_ids, chosen_ids, rejected_ids",
            Self::Messages(_) => "messages",
            Self::ChatPrompt(_) => "prompt (messages)",
            Self::ChatCompletion { .. } => "prompt, completion (messages)",
            Self::ChatPreference { .. } => "chosen, rejected (messages)",
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
        if !text.starts_with('{') {
            let other: &RawValue = serde_json::from_str(text).map_err(|e| bad(not_json(&e)))?;
            return Err(bad(format!("wanted a JSON object, got {}", brief(other))));
        }
        let row: RawRecord<'_> = serde_json::from_str(text).map_err(|e| bad(not_json(&e)))?;
        let record = row.record().map_err(bad)?;
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

fn brief(v: &RawValue) -> String {
    match v.get().char_indices().nth(60) {
        None => v.get().to_owned(),
        Some(_) => v.get().chars().take(57).chain("...".chars()).collect(),
    }
}

/// What records are made of.
const COLUMNS: [&str; 19] = [
    "text",
    "label",
    "prompt",
    "question",
    "completion",
    "response",
    "answer",
    "chosen",
    "rejected",
    "margin",
    "input_ids",
    "output_ids",
    "labels",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "messages",
    "tools",
    "chat_template_kwargs",
];

/// The columns of a line, each as its JSON text: what no record is made of takes no memory.
#[derive(Default)]
struct RawRecord<'a> {
    columns: BTreeMap<String, &'a RawValue>,
    /// A few others, for messages.
    others: BTreeMap<String, &'a RawValue>,
    /// A column that stands more than once.
    twice: Option<String>,
}

impl<'de> Deserialize<'de> for RawRecord<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct RawVisitor;
        impl<'de> Visitor<'de> for RawVisitor {
            type Value = RawRecord<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawRecord<'de>, A::Error> {
                let mut row = RawRecord::default();
                while let Some((name, value)) = map.next_entry::<String, _>()? {
                    let known = COLUMNS.contains(&&*name);
                    if !known && row.others.len() == 20 {
                        continue;
                    }
                    let of = if known { &mut row.columns } else { &mut row.others };
                    if of.insert(name.clone(), value).is_some() && known {
                        row.twice.get_or_insert(name);
                    }
                }
                Ok(row)
            }
        }
        from.deserialize_map(RawVisitor)
    }
}

/// Other names of a completion.
const COMPLETIONS: [&str; 3] = ["completion", "response", "answer"];

impl RawRecord<'_> {
    fn has(&self, key: &str) -> bool {
        self.columns.get(key).is_some_and(|v| v.get() != "null")
    }

    fn text(&self, key: &str) -> Result<String, String> {
        let v = self.columns[key];
        let wrong = |e| match v.get().starts_with('"') {
            true => format!("`{key}` is {}: {}", brief(v), not_json(&e)),
            false => format!("`{key}` is {}, wanted a text", brief(v)),
        };
        serde_json::from_str(v.get()).map_err(wrong)
    }

    /// The elements of a list, `None` of another value.
    fn list(&self, key: &str) -> Option<Vec<&RawValue>> {
        serde_json::from_str(self.columns[key].get()).ok()
    }

    /// Whether a column is a list of messages.
    fn is_chat(&self, key: &str) -> bool {
        let list = self.has(key).then(|| self.columns[key].get().strip_prefix('[')).flatten();
        list.is_some_and(|items| items.trim_start().starts_with(['{', ']']))
    }

    /// A list of messages, with what the line has for its template. It is read when it is rendered:
    /// JSON takes many times its text.
    fn chat(&self, key: &str) -> Result<ChatText, String> {
        let text = |key: &str| self.has(key).then(|| self.columns[key].get().to_owned());
        match self.is_chat(key) {
            true => Ok(ChatText {
                messages: text(key).unwrap_or_default(),
                tools: text("tools"),
                variables: text("chat_template_kwargs"),
            }),
            false => {
                Err(format!("`{key}` is {}, wanted a list of messages", brief(self.columns[key])))
            }
        }
    }

    /// Two conversations of which people chose the first. A prompt that is a text has to be how
    /// they open.
    fn chat_preference(&self) -> Result<Record, String> {
        let (chosen, rejected) = (self.chat("chosen")?, self.chat("rejected")?.messages);
        let mut prompt = None;
        if self.is_chat("prompt") {
            prompt = Some(self.chat("prompt")?);
        } else if self.has("prompt") {
            let opening = self.text("prompt")?;
            if Chat::read(&chosen)?.opening() != Some(&opening) {
                return Err("has a text as `prompt`, with which `chosen` does not open".into());
            }
        }
        Ok(Record::ChatPreference { prompt, chosen, rejected, margin: self.margin()? })
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>, String> {
        let v = self.columns[key];
        serde_json::from_str(v.get()).map_err(|_| {
            let bad = |v: &&RawValue| v.get().parse::<u32>().is_err();
            let bad = self.list(key).and_then(|all| all.into_iter().find(bad)).unwrap_or(v);
            format!("`{key}` has {}, wanted token ids", brief(bad))
        })
    }

    /// Which tokens are learned: those whose label is not -100.
    fn learned(&self, ids: &[u32]) -> Result<Vec<bool>, String> {
        let known = serde_json::from_str::<Vec<i64>>(self.columns["labels"].get());
        let fits = |(label, id): (&i64, &u32)| *label == -100 || *label == i64::from(*id);
        if let Ok(all) = known.as_deref()
            && all.len() == ids.len()
            && all.iter().zip(ids).all(fits)
        {
            return Ok(all.iter().map(|label| *label != -100).collect());
        }
        // What is wrong with it.
        let Some(all) = self.list("labels") else {
            return Err(format!("`labels` is {}, wanted a list", brief(self.columns["labels"])));
        };
        if all.len() != ids.len() {
            return Err(format!("`labels` has {} numbers, `input_ids` {}", all.len(), ids.len()));
        }
        let one = |(i, (label, id)): (usize, (&&RawValue, &u32))| match label.get().parse() {
            Ok(-100) => Ok(false),
            Ok(n) if n == i64::from(*id) => Ok(true),
            _ => {
                let got = brief(label);
                Err(format!("`labels`[{i}] is {got}, wanted -100 or the token's id {id}"))
            }
        };
        all.iter().zip(ids).enumerate().map(one).collect()
    }

    fn margin(&self) -> Result<Option<f64>, String> {
        if !self.has("margin") {
            return Ok(None);
        }
        let v = self.columns["margin"];
        // As f32, in which it is computed with.
        let m = serde_json::from_str(v.get()).ok().filter(|m: &f64| (*m as f32).is_finite());
        m.map(Some).ok_or_else(|| format!("`margin` is {}, wanted a number", brief(v)))
    }

    /// A judgement: a number, true or false, or one of the words that data sets have.
    fn label(&self) -> Result<f64, String> {
        let v = self.columns["label"];
        let word = serde_json::from_str::<String>(v.get()).unwrap_or_else(|_| v.get().to_owned());
        let of = match &*word.trim().to_lowercase() {
            "true" | "pos" | "positive" | "good" | "yes" | "chosen" => Some(1.0),
            "false" | "neg" | "negative" | "bad" | "no" | "rejected" => Some(0.0),
            number => number.parse().ok().filter(|x: &f64| x.is_finite()),
        };
        of.ok_or_else(|| {
            let want = "a number, true or false, positive or negative, good or bad";
            format!("`label` is {}, wanted {want}", brief(v))
        })
    }

    /// A completion, with what people said of it, if they did.
    fn judged(&self, completion: Record) -> Result<Record, String> {
        match self.has("label") {
            true => Ok(Record::Judged { completion: Box::new(completion), label: self.label()? }),
            false => Ok(completion),
        }
    }

    fn record(&self) -> Result<Record, String> {
        if let Some(name) = &self.twice {
            return Err(format!("has column {name:?} twice"));
        }
        let has = |key| self.has(key);
        if has("prompt_ids") && has("chosen_ids") && has("rejected_ids") {
            return Ok(Record::PreferenceIds {
                prompt: self.ids("prompt_ids")?,
                chosen: self.ids("chosen_ids")?,
                rejected: self.ids("rejected_ids")?,
                margin: self.margin()?,
            });
        }
        if has("input_ids") {
            let input_ids = self.ids("input_ids")?;
            if has("output_ids") {
                let completion = self.ids("output_ids")?;
                return self.judged(Record::CompletionIds { prompt: input_ids, completion });
            }
            if !has("labels") {
                return Ok(Record::Ids { input_ids });
            }
            let learn = self.learned(&input_ids)?;
            return Ok(Record::LabelledIds { input_ids, learn });
        }
        if self.is_chat("chosen") || self.is_chat("rejected") && has("chosen") {
            if !has("rejected") {
                return Err("has `chosen` without `rejected`".into());
            }
            return self.chat_preference();
        }
        if has("chosen") && has("rejected") {
            let (chosen, rejected) = (self.text("chosen")?, self.text("rejected")?);
            let margin = self.margin()?;
            if let Some(key) = ["prompt", "question"].into_iter().find(|key| has(key)) {
                let prompt = self.text(key)?;
                return Ok(Record::Preference { prompt, chosen, rejected, margin });
            }
            return transcripts(&chosen, &rejected, margin);
        }
        let question = has("question") && !has("text");
        // A text beside a conversation is its beginning once more.
        if self.is_chat("messages") && !self.is_chat("prompt") && !has("text") {
            return Ok(Record::Messages(self.chat("messages")?));
        }
        if self.is_chat("prompt") {
            let prompt = self.chat("prompt")?;
            return match COMPLETIONS.iter().find(|key| self.has(key)) {
                Some(key) => {
                    let completion = self.chat(key)?.messages;
                    self.judged(Record::ChatCompletion { prompt, completion })
                }
                None => Ok(Record::ChatPrompt(prompt)),
            };
        }
        if let Some(prompt) = has("prompt").then_some("prompt").or(question.then_some("question")) {
            let prompt = self.text(prompt)?;
            let completion = COMPLETIONS.iter().find(|key| self.has(key));
            return match completion {
                Some(key) => {
                    self.judged(Record::Completion { prompt, completion: self.text(key)? })
                }
                None => Ok(Record::Prompt { prompt }),
            };
        }
        if has("text") {
            let text = self.text("text")?;
            return match has("label") {
                true => Ok(Record::Labelled { text, label: self.label()? }),
                false => Ok(Record::Text { text }),
            };
        }
        if has("messages") {
            return Ok(Record::Messages(self.chat("messages")?));
        }
        let found = self.found();
        Err(format!(
            "has columns {found}, wanted messages | text | text, label | prompt | \
             prompt, completion[, label] | [prompt,] chosen, rejected | \
             input_ids[, labels | output_ids] | prompt_ids, chosen_ids, rejected_ids"
        ))
    }

    /// The names of the first columns, for messages.
    fn found(&self) -> String {
        let name = |(name, v): (&String, &&RawValue)| {
            let name: String = name.chars().take(60).collect();
            format!("{name:?}{}", if v.get() == "null" { " (null)" } else { "" })
        };
        let all = self.columns.iter().chain(&self.others);
        let mut names: Vec<String> = all.take(20).map(name).collect();
        names.extend((self.others.len() == 20).then(|| "...".to_owned()));
        format!("[{}]", names.join(", "))
    }
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
