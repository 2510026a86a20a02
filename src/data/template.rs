//! The chat template of a model folder: where it comes from, and what it is told.

use std::{
    path::Path,
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use super::jinja::{self, Rendering, Template, Variable};
use crate::{
    device::file,
    error::{Error, Result},
};

/// Templates of our own, for models that have none.
pub const BUILT_IN: [(&str, &str); 6] = [
    ("chatml", include_str!("templates/chatml.jinja")),
    ("gemma", include_str!("templates/gemma.jinja")),
    ("llama3", include_str!("templates/llama3.jinja")),
    ("mistral", include_str!("templates/mistral.jinja")),
    ("vicuna", include_str!("templates/vicuna.jinja")),
    ("zephyr", include_str!("templates/zephyr.jinja")),
];

/// Roles that a template may put into a token, as in `<|user|>`.
pub(super) const ROLES: [&str; 6] =
    ["system", "developer", "user", "assistant", "tool", "function"];

/// Bytes of the largest file that a template is read from.
const MAX_FILE: u64 = 16 << 20;

/// The day that templates are told in training, so that a run is the same tomorrow.
const DAY: &str = "2026-01-01";

/// Tokens that `tokenizer_config.json` names for templates.
const TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A chat template, parsed when it is first asked for: most work on a model needs none.
#[derive(Debug)]
pub struct ChatTemplate {
    /// The file or the built-in template, for messages.
    place: String,
    source: String,
    /// The one for conversations with tools, if that is another.
    with_tools: Option<String>,
    parsed: [OnceLock<Result<Template, String>>; 2],
    /// Names and texts of the special tokens.
    tokens: Vec<(&'static str, String)>,
    /// What `strftime_now` tells, in seconds since 1970.
    now: i64,
    chosen: bool,
}

/// What a template renders.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// A list of messages.
    pub messages: &'a Value,
    pub tools: Option<&'a Value>,
    /// More variables, as `enable_thinking`.
    pub variables: Option<&'a Map<String, Value>>,
}

/// How a rendering ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With the last message.
    Whole,
    /// With what comes before the model's answer.
    Prompt,
    /// Within the last message, which goes on.
    Open,
}

impl ChatTemplate {
    /// The template of a model folder, in the order of `transformers`: `chat_template.jinja`, else
    /// `chat_template` in `tokenizer_config.json`; or, before these, `named`: a built-in one or a
    /// file. `bos` is written before a built-in one if the tokenizer puts it before texts.
    pub fn open(dir: &Path, named: Option<&str>, bos: bool) -> Result<Option<Self>> {
        let read = |path: &Path| file::read_text(path, MAX_FILE);
        let json = |name: &str| -> Value {
            let text = read(&dir.join(name)).unwrap_or_default();
            serde_json::from_str(&text).unwrap_or(Value::Null)
        };
        let (config, path) = (json("tokenizer_config.json"), dir.join("chat_template.jinja"));
        let (place, source, with_tools) = if let Some(name) = named {
            let built_in = BUILT_IN.iter().find(|(n, _)| *n == name);
            let source = match built_in {
                Some((_, text)) if bos => format!("{{{{- bos_token -}}}}\n{text}"),
                Some((_, text)) => (*text).to_owned(),
                None => read(Path::new(name)).map_err(|e| {
                    let known: Vec<&str> = BUILT_IN.iter().map(|(n, _)| *n).collect();
                    let want = format!("one of {}, or a file ({e})", known.join(", "));
                    Error::config("chat_template", want, name)
                })?,
            };
            (name.to_owned(), source, None)
        } else if path.exists() {
            (path.display().to_string(), read(&path)?, None)
        } else {
            let named = |name: &str| match &config["chat_template"] {
                Value::Array(all) => {
                    let found = all.iter().find(|t| t["name"] == name)?;
                    found["template"].as_str().map(str::to_owned)
                }
                Value::Object(all) => all.get(name)?.as_str().map(str::to_owned),
                one if name == "default" => one.as_str().map(str::to_owned),
                _ => None,
            };
            let path = dir.join("tokenizer_config.json").display().to_string();
            match (named("default"), named("tool_use")) {
                (Some(source), with_tools) => (path, source, with_tools),
                (None, _) => return Ok(None),
            }
        };
        let map = json("special_tokens_map.json");
        let text = |v: &Value| v.as_str().or_else(|| v["content"].as_str()).map(str::to_owned);
        let token =
            |name: &'static str| Some((name, text(&config[name]).or_else(|| text(&map[name]))?));
        let tokens = TOKENS.into_iter().filter_map(token).collect();
        let now = jinja::noon(DAY).unwrap_or(0);
        let (parsed, chosen) = (Default::default(), named.is_some());
        Ok(Some(Self { place, source, with_tools, parsed, tokens, now, chosen }))
    }

    /// Names a special token that no file of the tokenizer names.
    pub fn name_token(&mut self, name: &'static str, text: Option<String>) {
        let known = self.tokens.iter().any(|(n, _)| *n == name);
        self.tokens.extend(text.filter(|_| !known).map(|text| (name, text)));
    }

    /// From now on templates are told the time, not the same day always.
    pub fn tell_the_time(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.now = now.map_or(self.now, |t| t.as_secs() as i64);
    }

    /// All that decides what it writes.
    pub fn identity(&self) -> String {
        let Self { source, with_tools, tokens, now, .. } = self;
        format!("{source:?} {with_tools:?} {tokens:?} {now}")
    }

    /// The source of a template that is not the model's own, which a trained model takes along.
    pub fn chosen(&self) -> Option<&str> {
        self.chosen.then_some(&*self.source)
    }

    /// Whether it may write this token by itself: the source spells it, or what stands around a
    /// role in it. A word is none: texts have it, too.
    pub fn marks_with(&self, token: &str) -> bool {
        let around = |source: &str, role: &&str| {
            let part = |text: &str| !text.is_empty() && source.contains(text);
            token.split_once(role).is_some_and(|(left, right)| part(left) && part(right))
        };
        let writes = |source: &String| {
            source.contains(token) || ROLES.iter().any(|role| around(source, role))
        };
        let is_word = token.chars().all(|c| c.is_alphanumeric() || c == '_' || c.is_whitespace());
        let sources = [Some(&self.source), self.with_tools.as_ref()];
        !is_word && token.chars().count() > 1 && sources.into_iter().flatten().any(writes)
    }

    /// Its name, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    fn template(&self, tools: bool) -> Result<&Template, String> {
        let (i, source) = match &self.with_tools {
            Some(source) if tools => (1, source),
            _ => (0, &self.source),
        };
        self.parsed[i].get_or_init(|| Template::parse(source)).as_ref().map_err(Clone::clone)
    }

    /// Whether `generation` blocks say what is learned of a conversation.
    pub fn generates(&self, of: &Conversation<'_>) -> Result<bool, String> {
        Ok(self.template(of.tools.is_some())?.generates())
    }

    /// Renders a conversation; the error is the template's own, or says what is wrong with it.
    pub fn render(&self, of: &Conversation<'_>, ending: Ending) -> Result<Rendering, String> {
        if of.messages.as_array().is_none_or(Vec::is_empty) {
            return Err("there are no messages".into());
        }
        let null = Value::Null;
        let messages = match ending {
            Ending::Open => Variable::Unfinished(of.messages),
            _ => Variable::Given(of.messages),
        };
        let tokens = self.tokens.iter().map(|(name, text)| (*name, Variable::Written(text)));
        let more = of.variables.into_iter().flatten();
        let more = more.map(|(name, value)| (&**name, Variable::Given(value)));
        let mut all: Vec<(&str, Variable<'_>)> = tokens.chain(more).collect();
        all.extend([
            ("messages", messages),
            ("tools", Variable::Given(of.tools.unwrap_or(&null))),
            ("documents", Variable::Given(&null)),
            ("add_generation_prompt", Variable::Bool(ending == Ending::Prompt)),
        ]);
        self.template(of.tools.is_some())?.render(&all, self.now)
    }
}
