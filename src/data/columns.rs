//! The columns of a row, which tell its format.

mod instructions;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{
    chat::{Chat, ChatText, not_json},
    options::ReadOptions,
    records::Record,
    reward_columns::RowColumns,
};

/// Columns of the widest row.
const MAX_COLUMNS: usize = 4096;

/// Reads the JSON text of a row: its record, and the columns that rewards read; renamed columns
/// that it has are no longer `unseen`.
pub(super) fn read<'a>(
    text: &str,
    options: &'a ReadOptions,
    unseen: &mut BTreeSet<&'a str>,
) -> Result<(Record, Arc<RowColumns>), String> {
    let row: RawRow<'_> = serde_json::from_str(text).map_err(|e| match text.starts_with('{') {
        true => not_json(&e),
        false => match serde_json::from_str::<&RawValue>(text) {
            Ok(other) => format!("wanted a JSON object, got {}", brief(other)),
            Err(e) => not_json(&e),
        },
    })?;
    let kept = Arc::new(row.kept(options)?);
    let mut row = DataRow::of(row, options)?;
    unseen.retain(|ours| !row.columns.contains_key(ours));
    // An answer that a reward reads is no part of a prompt, and may be a number.
    row.columns.retain(|name, _| !ANSWERS.contains(name) || !options.rewards.has(name));
    Ok((row.record()?, kept))
}

fn brief(v: &RawValue) -> String {
    match v.get().char_indices().nth(60) {
        None => v.get().to_owned(),
        Some(_) => v.get().chars().take(57).chain("...".chars()).collect(),
    }
}

/// The columns of a row, each as its JSON text, under the names that they have there.
#[derive(Default)]
struct RawRow<'a> {
    columns: Vec<(String, &'a RawValue)>,
    /// A column that stands more than once.
    twice: Option<String>,
}

/// The columns of a row under our names.
struct DataRow<'a> {
    columns: BTreeMap<&'a str, &'a RawValue>,
    /// All names in the data, and whether the value is null.
    found: Vec<(String, bool)>,
    options: &'a ReadOptions,
}

impl RawRow<'_> {
    /// The columns that rewards read, by our names. No value is null: that is no column.
    fn kept(&self, options: &ReadOptions) -> Result<RowColumns, String> {
        let mut kept = RowColumns::new();
        for (name, value) in &self.columns {
            let name = options.ours(name);
            if options.rewards.has(name) && value.get() != "null" {
                let value = serde_json::from_str(value.get()).map_err(|e| not_json(&e))?;
                kept.insert(name.to_owned(), value);
            }
        }
        Ok(kept)
    }
}

impl<'de> Deserialize<'de> for RawRow<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct RowVisitor;
        impl<'de> Visitor<'de> for RowVisitor {
            type Value = RawRow<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawRow<'de>, A::Error> {
                let (mut row, mut seen) = (RawRow::default(), BTreeSet::new());
                while let Some((name, value)) = map.next_entry::<String, _>()? {
                    if !seen.insert(name.clone()) {
                        row.twice.get_or_insert(name.clone());
                    }
                    row.columns.push((name, value));
                    if row.columns.len() > MAX_COLUMNS {
                        let message = format!("more than {MAX_COLUMNS} columns");
                        return Err(serde::de::Error::custom(message));
                    }
                }
                Ok(row)
            }
        }
        from.deserialize_map(RowVisitor)
    }
}

/// Columns that answer a prompt, or say something of an answer.
const ANSWERS: [&str; 5] = ["completion", "response", "answer", "output", "label"];

/// Names of a completion.
const COMPLETIONS: [&str; 3] = ["completion", "response", "answer"];

impl<'a> DataRow<'a> {
    /// Takes the columns that records are made of. A name of ours that `options` gives to another
    /// column is no longer that of the column which has it in the data.
    fn of(row: RawRow<'a>, options: &'a ReadOptions) -> Result<Self, String> {
        if let Some(name) = row.twice {
            return Err(format!("has column {name:?} twice"));
        }
        let found: Vec<(String, bool)> =
            row.columns.iter().map(|(name, v)| (name.clone(), v.get() == "null")).collect();
        let known = |(name, v): &(String, &'a RawValue)| options.column(name).map(|c| (c, *v));
        Ok(Self { columns: row.columns.iter().filter_map(known).collect(), found, options })
    }

    fn has(&self, key: &str) -> bool {
        self.columns.get(key).is_some_and(|v| v.get() != "null")
    }

    /// Which of these names of one thing is there; more than one is refused. If one of them was
    /// given in the options, it is meant.
    fn one_of(&self, names: &[&'static str]) -> Result<Option<&'static str>, String> {
        let named = |name: &&str| self.options.columns.contains_key(*name);
        if let Some(name) = names.iter().copied().find(named) {
            return Ok(Some(name).filter(|name| self.has(name)));
        }
        let mut there = names.iter().copied().filter(|name| self.has(name));
        let (first, second) = (there.next(), there.next());
        match (first, second) {
            (Some(a), Some(b)) => Err(format!(
                "has `{a}` and `{b}`, wanted one of them; say which: columns = {{ {} = {b:?} }}",
                names[0]
            )),
            _ => Ok(first),
        }
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
        list.is_some_and(|items| items.trim_start().starts_with(['{', ']'])) || self.is_message(key)
    }

    /// Whether a side of a pair is one message, as in ShareGPT's pairs.
    fn is_message(&self, key: &str) -> bool {
        matches!(key, "chosen" | "rejected")
            && self.has(key)
            && self.columns[key].get().starts_with('{')
    }

    /// A list of messages, with what the line has for its template. It is read when it is rendered:
    /// JSON takes many times its text.
    fn chat(&self, key: &str) -> Result<ChatText, String> {
        let text = |key: &str| {
            let value = self.has(key).then(|| self.columns[key].get().to_owned())?;
            Some(match self.is_message(key) {
                true => format!("[{value}]"),
                false => value,
            })
        };
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
        if self.is_message("chosen") && self.is_chat("conversations") {
            prompt = Some(self.opened(self.chat("conversations")?)?);
        } else if self.is_chat("prompt") {
            prompt = Some(self.opened(self.chat("prompt")?)?);
        } else if self.has("prompt") {
            let opening = self.text("prompt")?;
            if Chat::read(&chosen)?.opening() != Some(&opening) {
                return Err("has a text as `prompt`, with which `chosen` does not open".into());
            }
        }
        let margin = self.margin()?;
        if prompt.is_some() {
            return Ok(Record::ChatPreference { prompt, chosen, rejected, margin });
        }
        let rejected = self.opened(chosen.with(&rejected))?.messages;
        let chosen = self.opened(chosen)?;
        Ok(Record::ChatPreference { prompt, chosen, rejected, margin })
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

    /// The record of ids, if there are some.
    fn of_ids(&self) -> Result<Option<Record>, String> {
        let has = |key| self.has(key);
        if has("prompt_ids") && has("chosen_ids") && has("rejected_ids") {
            return Ok(Some(Record::PreferenceIds {
                prompt: self.ids("prompt_ids")?,
                chosen: self.ids("chosen_ids")?,
                rejected: self.ids("rejected_ids")?,
                margin: self.margin()?,
            }));
        }
        if !has("input_ids") {
            return Ok(None);
        }
        let input_ids = self.ids("input_ids")?;
        if has("output_ids") {
            let completion = self.ids("output_ids")?;
            return self.judged(Record::CompletionIds { prompt: input_ids, completion }).map(Some);
        }
        if !has("labels") {
            return Ok(Some(Record::Ids { input_ids }));
        }
        let learn = self.learned(&input_ids)?;
        Ok(Some(Record::LabelledIds { input_ids, learn }))
    }

    /// A completion, with what people said of it, if they did.
    fn judged(&self, completion: Record) -> Result<Record, String> {
        match self.has("label") {
            true => Ok(Record::Judged { completion: Box::new(completion), label: self.label()? }),
            false => Ok(completion),
        }
    }

    fn record(&self) -> Result<Record, String> {
        if let Some(record) = self.of_ids()? {
            return Ok(record);
        }
        self.is_all_placed()?;
        let has = |key| self.has(key);
        let names: &[&str] = if has("text") { &["prompt"] } else { &["prompt", "question"] };
        let asks = || self.one_of(names);
        if has("chosen") != has("rejected") {
            let (one, other) =
                if has("chosen") { ("chosen", "rejected") } else { ("rejected", "chosen") };
            return Err(format!("has `{one}` without `{other}`"));
        }
        if self.is_chat("chosen") || self.is_chat("rejected") {
            return self.chat_preference();
        }
        // Instructions may have their text beside them, as Alpaca's have.
        if has("instruction") && !names.iter().any(|name| has(name)) && !has("messages") {
            return self.instructed();
        }
        if has("chosen") {
            let (chosen, rejected) = (self.text("chosen")?, self.text("rejected")?);
            let margin = self.margin()?;
            if let Some(key) = asks()? {
                if self.is_told() {
                    return self.asked(key);
                }
                let prompt = self.text(key)?;
                return Ok(Record::Preference { prompt, chosen, rejected, margin });
            }
            return transcripts(&chosen, &rejected, margin);
        }
        let talks = self.is_chat("messages") || self.is_chat("conversations");
        // A text beside a conversation is its beginning once more.
        if talks && !self.is_chat("prompt") && !has("text") {
            let Some(key) = self.one_of(&["messages", "conversations"])? else {
                return Err("has no conversation".into());
            };
            return self.judged(Record::Messages(self.opened(self.chat(key)?)?));
        }
        if self.is_chat("prompt") {
            let prompt = self.opened(self.chat("prompt")?)?;
            return match self.one_of(&COMPLETIONS)? {
                Some(key) => {
                    let completion = self.chat(key)?.messages;
                    self.judged(Record::ChatCompletion { prompt, completion })
                }
                None => Ok(Record::ChatPrompt(prompt)),
            };
        }
        if let Some(key) = asks()? {
            if has("instruction") {
                return Err(format!("has `{key}` and `instruction`, wanted one of them"));
            }
            if self.is_told() {
                return self.asked(key);
            }
            let prompt = self.text(key)?;
            return match self.one_of(&COMPLETIONS)? {
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
        if let Some(key) = self.one_of(&["messages", "conversations"])? {
            return Ok(Record::Messages(self.chat(key)?));
        }
        let found = self.found();
        Err(format!(
            "has columns {found}, wanted messages | conversations | text | text, label | prompt | \
             prompt, completion[, label] | instruction[, input], output | [prompt,] chosen, rejected | \
             input_ids[, labels | output_ids] | prompt_ids, chosen_ids, rejected_ids; \
             other names are told by columns = {{ prompt = \"...\" }}"
        ))
    }

    /// The names of the first columns, for messages.
    fn found(&self) -> String {
        let name = |(name, is_null): &(String, bool)| {
            let name: String = name.chars().take(60).collect();
            format!("{name:?}{}", if *is_null { " (null)" } else { "" })
        };
        let mut names: Vec<String> = self.found.iter().take(20).map(name).collect();
        names.extend((self.found.len() > 20).then(|| "...".to_owned()));
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
