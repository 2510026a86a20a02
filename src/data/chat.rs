//! Conversations to token ids: what a model reads, and what it learns of it.
//!
//! A rendering is cut into control tokens and text. A control token stands where the template wrote
//! one; what a message spells is text, whatever it spells. Text is encoded apart on both sides of
//! what is learned, so that the ids of a prompt are those before its answer, bit for bit.

use std::ops::Range;

use serde_json::{Map, Value};

use super::{
    Tokenizer,
    jinja::Rendering,
    template::{ChatTemplate, Conversation, Ending, ROLES},
    unique,
};

/// Bytes of the longest conversation.
const MAX_CHAT: usize = 4 << 20;

/// Bytes that the answers of one conversation may take to be found: half a minute.
const MAX_PREFIXES: usize = 1 << 30;

/// A conversation as a line of data has it: the JSON texts of its columns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatText {
    pub messages: String,
    /// Functions that the model may call.
    pub tools: Option<String>,
    /// More variables of the template.
    pub variables: Option<String>,
}

/// A conversation that was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    messages: Vec<Value>,
    tools: Option<Value>,
    variables: Option<Map<String, Value>>,
}

/// Ids, and which of them are learned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatIds {
    pub ids: Vec<u32>,
    /// Ascending, apart; without the first id.
    pub learned: Vec<Range<usize>>,
}

impl ChatText {
    /// These messages with the same tools and variables.
    pub fn with(&self, messages: &str) -> Self {
        Self { messages: messages.to_owned(), ..self.clone() }
    }
}

fn role(message: &Value) -> &str {
    message["role"].as_str().unwrap_or_default()
}

impl Chat {
    /// Messages without tools.
    pub fn of(messages: Vec<Value>) -> Self {
        Self { messages, ..Self::default() }
    }

    /// Reads and checks a conversation.
    pub fn read(text: &ChatText) -> Result<Self, String> {
        let messages = messages(&text.messages)?;
        let json = |name: &str, text: &Option<String>| -> Result<Option<Value>, String> {
            let read = |text: &String| match bounded(text)? {
                // Some data sets have JSON in a text.
                Value::String(inner) => bounded(&inner),
                value => Ok(value),
            };
            text.as_ref().map(read).transpose().map_err(|e| format!("`{name}`: {e}"))
        };
        let tools = json("tools", &text.tools)?;
        let tools = tools.filter(|t| !t.is_null() && t.as_array().is_none_or(|t| !t.is_empty()));
        if tools.as_ref().is_some_and(|t| !t.is_array()) {
            return Err("`tools` is no list".into());
        }
        let variables = match json("chat_template_kwargs", &text.variables)? {
            None | Some(Value::Null) => None,
            Some(Value::Object(all)) => Some(all),
            Some(_) => return Err("`chat_template_kwargs` is no object".into()),
        };
        Ok(Self { messages, tools, variables })
    }

    /// Adds messages at the end.
    pub fn extend(&mut self, more: Vec<Value>) {
        self.messages.extend(more);
    }

    /// With these behind, which may begin with it once more.
    pub fn followed_by(&self, more: Vec<Value>) -> Self {
        let mut all = self.clone();
        all.messages.extend(match more.strip_prefix(&self.messages[..]) {
            Some(rest) if !self.messages.is_empty() => rest.to_vec(),
            _ => more,
        });
        all
    }

    /// Messages.
    pub fn count(&self) -> usize {
        self.messages.len()
    }

    /// Takes the model's own message from the end, if one is there.
    pub fn without_answer(mut self) -> Self {
        if self.messages.last().is_some_and(|m| role(m) == "assistant") {
            self.messages.pop();
        }
        self
    }

    /// The first messages.
    pub fn first(mut self, count: usize) -> Self {
        self.messages.truncate(count);
        self
    }

    /// The number of messages that two conversations have in common at their beginning, without
    /// their last ones.
    pub fn shared(&self, other: &Self) -> usize {
        let most = self.count().min(other.count()).saturating_sub(1);
        let both = self.messages.iter().zip(&other.messages).take(most);
        both.take_while(|(a, b)| a == b).count()
    }

    /// The text of the first message that is not the system's.
    pub fn opening(&self) -> Option<&str> {
        self.messages.iter().find(|m| role(m) != "system")?["content"].as_str()
    }

    fn render(
        &self,
        template: &ChatTemplate,
        count: usize,
        ending: Ending,
    ) -> Result<Rendering, String> {
        let messages = Value::Array(self.messages[..count].to_vec());
        let (tools, variables) = (self.tools.as_ref(), self.variables.as_ref());
        let of = Conversation { messages: &messages, tools, variables };
        template.render(&of, ending).map_err(|e| format!("{}: {e}", template.place()))
    }

    /// The ids before the model's answer, or those of a last message of its own, which goes on.
    pub fn prompt(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
        let template = tokenizer.template()?;
        let goes_on = self.messages.last().is_some_and(|m| role(m) == "assistant");
        let ending = if goes_on { Ending::Open } else { Ending::Prompt };
        let rendering = self.render(template, self.count(), ending)?;
        Ok(encode(tokenizer, &rendering, &[])?.ids)
    }

    /// The ids of the conversation; the messages of the model's own from message `from` on are
    /// learned. With `ends`, what a template writes behind the last turn is left out.
    pub fn learned(
        &self,
        tokenizer: &Tokenizer,
        from: usize,
        ends: bool,
    ) -> Result<ChatIds, String> {
        let template = tokenizer.template()?;
        let mut whole = self.render(template, self.count(), Ending::Whole)?;
        let (tools, variables) = (self.tools.as_ref(), self.variables.as_ref());
        let of = Conversation { messages: &Value::Null, tools, variables };
        let spans = match template.generates(&of)? {
            true => {
                let start = self.start(template, &whole, from)?;
                let mut spans = whole.generated.clone();
                spans.iter_mut().for_each(|s| s.start = s.start.max(start));
                spans.retain(|s| s.start < s.end);
                spans
            }
            false => self.answers(tokenizer, &whole, from)?,
        };
        if ends && self.messages.last().is_some_and(|m| role(m) == "assistant") {
            let end = end_of_turn(&controls(tokenizer, &whole), &whole, 0..whole.text.len());
            whole.text.truncate(end);
        }
        encode(tokenizer, &whole, &spans)
    }

    /// Where message `from` begins.
    fn start(
        &self,
        template: &ChatTemplate,
        whole: &Rendering,
        from: usize,
    ) -> Result<usize, String> {
        if from == 0 {
            return Ok(0);
        }
        let answers = self.messages.get(from).is_some_and(|m| role(m) == "assistant");
        let ending = if answers { Ending::Prompt } else { Ending::Whole };
        let before = self.render(template, from, ending)?;
        self.prefix(&before, whole, from)
    }

    /// The length of the rendering of the first messages, with which the whole one has to begin.
    fn prefix(&self, part: &Rendering, whole: &Rendering, count: usize) -> Result<usize, String> {
        if whole.text.starts_with(&part.text) {
            return Ok(part.text.len());
        }
        let same = part.text.bytes().zip(whole.text.bytes()).take_while(|(a, b)| a == b).count();
        let near = |text: &str| {
            let from = same.saturating_sub(20);
            let from = (0..=from).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text[from..].chars().take(50).collect::<String>()
        };
        Err(format!(
            "the template writes the first {count} messages otherwise once more follow ({:?}, then {:?}): \
             it needs `generation` blocks, or a line of data for each answer",
            near(&part.text),
            near(&whole.text)
        ))
    }

    /// What the model wrote of a rendering: from where a prompt ends to the end of its turn.
    fn answers(
        &self,
        tokenizer: &Tokenizer,
        whole: &Rendering,
        from: usize,
    ) -> Result<Vec<Range<usize>>, String> {
        let (template, controls) = (tokenizer.template()?, controls(tokenizer, whole));
        let mut spans = Vec::new();
        let answers = (from..self.count()).filter(|at| role(&self.messages[*at]) == "assistant");
        let answers: Vec<usize> = answers.collect();
        if answers.len().saturating_mul(whole.text.len()) > MAX_PREFIXES {
            return Err(format!(
                "has {} answers in {} bytes, and each takes a rendering of all before it: the \
                 template needs `generation` blocks, or the conversation a few lines of data",
                answers.len(),
                whole.text.len()
            ));
        }
        for at in answers {
            if at == 0 {
                return Err("the first message is an answer: there is no prompt to it, and the \
                            template has no `generation` blocks"
                    .into());
            }
            let before = self.render(template, at, Ending::Prompt)?;
            let start = self.prefix(&before, whole, at)?;
            let end = match at + 1 == self.count() {
                true => whole.text.len(),
                false => {
                    let upto = self.render(template, at + 1, Ending::Whole)?;
                    self.prefix(&upto, whole, at + 1)?
                }
            };
            spans.push(start..end_of_turn(&controls, whole, start..end));
        }
        Ok(spans)
    }
}

/// Reads a JSON text of bounded length.
fn bounded(text: &str) -> Result<Value, String> {
    if text.len() > MAX_CHAT {
        return Err(format!("a conversation has {} bytes, wanted at most {MAX_CHAT}", text.len()));
    }
    unique::parse(text).map_err(|e| not_json(&e))
}

/// The parser's message without its "line 1", which would contradict the file's line.
pub(super) fn not_json(e: &serde_json::Error) -> String {
    let (text, column) = (e.to_string(), e.column());
    let what = text.split(" at line ").next().unwrap_or_default();
    format!("not JSON: {what} at column {column}")
}

/// Reads a list of messages, each with a role, as templates get them: without keys that are null,
/// and with one name for what a model thought.
pub fn messages(text: &str) -> Result<Vec<Value>, String> {
    let Value::Array(mut all) = bounded(text)? else {
        return Err("messages are no list".into());
    };
    for (i, message) in all.iter_mut().enumerate() {
        let wrong = |what: &str| format!("message {} {what}", i + 1);
        let Value::Object(fields) = message else { return Err(wrong("is no object")) };
        fields.retain(|_, v| !v.is_null());
        named_as_ours(fields).map_err(|e| wrong(&e))?;
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(wrong("has no `role`"));
        }
        if fields.get("weight").is_some_and(|w| w.as_f64() != Some(1.0)) {
            return Err(wrong("has a `weight`, wanted 1 or none: all answers are learned alike"));
        }
        let content = fields.get("content").unwrap_or(&Value::Null);
        if !content.is_string() && !content.is_array() && !content.is_null() {
            return Err(wrong("has a `content` that is neither a text nor a list of parts"));
        }
        let names = ["reasoning_content", "thinking", "reasoning"];
        if let Some(thought) = names.iter().find_map(|n| fields.get(*n)).cloned() {
            for name in ["reasoning_content", "thinking"] {
                fields.entry(name).or_insert_with(|| thought.clone());
            }
        }
    }
    Ok(all)
}

/// Gives a message of ShareGPT's (`from`, `value`) the names that templates know.
fn named_as_ours(fields: &mut Map<String, Value>) -> Result<(), String> {
    let Some(from) = fields.get("from").and_then(Value::as_str) else { return Ok(()) };
    if fields.contains_key("role") || !fields.contains_key("value") {
        return Ok(());
    }
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" | "chatgpt" | "bing" | "bard" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        other => {
            return Err(format!("is from {other:?}, wanted human, gpt, system or observation"));
        }
    };
    let value = fields.remove("value").unwrap_or_default();
    fields.remove("from");
    fields.insert("role".into(), role.into());
    fields.insert("content".into(), value);
    Ok(())
}

/// All texts in the JSON text of messages, none if it is wrong.
pub fn chat_texts(json: &str) -> Vec<String> {
    fn walk(value: Value, all: &mut Vec<String>) {
        match value {
            Value::String(text) => all.push(text),
            Value::Array(items) => items.into_iter().for_each(|v| walk(v, all)),
            Value::Object(items) => items.into_iter().for_each(|(_, v)| walk(v, all)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    bounded(json).into_iter().for_each(|v| walk(v, &mut all));
    all
}

/// The end of the turn that ends a part of a rendering: of its last control token, if only white
/// space follows that.
fn end_of_turn(controls: &[Control], of: &Rendering, part: Range<usize>) -> usize {
    let bare = part.start + of.text[part.clone()].trim_end().len();
    // The token may have taken the space behind it.
    let before = controls.partition_point(|c| c.0.start < bare);
    match controls[..before].last() {
        Some((range, _)) if range.end >= bare && range.start >= part.start => {
            range.end.min(part.end)
        }
        _ => part.end,
    }
}

/// The bytes of a control token in a rendering, and its id.
type Control = (Range<usize>, u32);

/// Control tokens that the template wrote: all of their characters, but for a role within.
fn controls(tokenizer: &Tokenizer, of: &Rendering) -> Vec<Control> {
    let is_role = |text: &str| ROLES.iter().any(|role| text.eq_ignore_ascii_case(role));
    let written = |token: &Range<usize>| {
        let first = of.given.partition_point(|g| g.end <= token.start);
        let mut given = of.given[first..].iter().take_while(|g| g.start < token.end);
        given.all(|g| g.start > token.start && g.end < token.end && is_role(&of.text[g.clone()]))
    };
    tokenizer.controls_in(&of.text, written)
}

/// The ids of a rendering of which these bytes are learned. BOS stands first, once, if the
/// tokenizer puts it before texts.
fn encode(
    tokenizer: &Tokenizer,
    of: &Rendering,
    spans: &[Range<usize>],
) -> Result<ChatIds, String> {
    let mut out = ChatIds::default();
    let failed = |e: crate::Error| e.to_string();
    let controls = controls(tokenizer, of);
    let mut cuts: Vec<usize> = spans.iter().flat_map(|s| [s.start, s.end]).collect();
    cuts.extend(tokenizer.cuts_of_marks(&of.text));
    cuts.sort_unstable();
    cuts.dedup();
    let cuts_in = |range: Range<usize>| {
        let (first, last) = (range.start, range.end);
        let inner = cuts.partition_point(|at| *at <= first)..cuts.partition_point(|at| *at < last);
        cuts[inner].iter().copied().chain([last])
    };
    let is_learned = |at: usize| {
        let i = spans.partition_point(|s| s.end <= at);
        spans.get(i).is_some_and(|s| s.start <= at)
    };
    let mut put = |ids: &[u32], at: usize| {
        if out.ids.is_empty()
            && let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos())
            && ids.first() != Some(&bos)
        {
            out.ids.push(bos);
        }
        let new = out.ids.len()..out.ids.len() + ids.len();
        out.ids.extend(ids);
        let new = new.start.max(1)..new.end;
        if is_learned(at) && !new.is_empty() {
            match out.learned.last_mut() {
                Some(last) if last.end == new.start => last.end = new.end,
                _ => out.learned.push(new),
            }
        }
    };
    let mut at = 0;
    let end = of.text.len();
    let rest = controls.iter().map(|(range, id)| (range.clone(), Some(*id)));
    for (control, id) in rest.chain([(end..end, None)]) {
        // Behind a control token a tokenizer may begin anew, behind another cut it does not.
        let mut begins = true;
        if at < control.start.min(end) {
            for cut in cuts_in(at..control.start.min(end)) {
                let text = &of.text[at..cut];
                let ids = match (begins, at) {
                    (true, 0) => tokenizer.encode(text),
                    (true, _) => tokenizer.encode_after_control(text),
                    _ => tokenizer.encode_continuation(text),
                };
                put(&ids.map_err(failed)?, at);
                (at, begins) = (cut, false);
            }
        }
        if let Some(id) = id {
            put(&[id], control.start);
            at = control.end;
        }
    }
    Ok(out)
}

/// The token that ends the model's turn, if its template writes one.
pub fn turn_end(tokenizer: &Tokenizer) -> Option<u32> {
    let template = tokenizer.template().ok()?;
    let message = |role: &str| serde_json::json!({"role": role, "content": "a"});
    let chat = Chat::of(vec![message("user"), message("assistant")]);
    let whole = chat.render(template, 2, Ending::Whole).ok()?;
    let answer = whole.given.last()?.end;
    let end = controls(tokenizer, &whole).into_iter().find(|c| c.0.end > answer)?;
    // Not what begins another turn.
    let text = whole.text.get(answer..end.0.start.max(answer))?;
    text.trim().is_empty().then_some(end.1)
}

/// What the template writes before an answer, but not where it is asked for one: it ignores
/// `add_generation_prompt`.
pub fn unasked_opening(tokenizer: &Tokenizer) -> Option<String> {
    let template = tokenizer.template().ok()?;
    let message = |role: &str| serde_json::json!({"role": role, "content": "a"});
    let chat = Chat::of(vec![message("user"), message("assistant")]);
    let render = |count, ending| chat.render(template, count, ending).ok();
    let (asked, whole) = (render(1, Ending::Prompt)?.text, render(2, Ending::Whole)?);
    if asked != render(1, Ending::Whole)?.text {
        return None;
    }
    let answer = whole.given.last()?.start;
    let opening = whole.text[..answer].strip_prefix(&asked)?;
    (!opening.trim().is_empty()).then(|| opening.to_owned())
}
