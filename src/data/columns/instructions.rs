//! Instructions, and what is told before a conversation.

use serde_json::{Value, json};

use super::{COMPLETIONS, DataRow};
use crate::data::{chat::ChatText, records::Record};

impl DataRow<'_> {
    /// Refuses what instructions have a place for and other records have not: it would be left out.
    pub(super) fn is_all_placed(&self) -> Result<(), String> {
        let has = |key: &&&str| self.has(key);
        let told = ["chosen", "messages", "conversations", "prompt", "question"];
        let Some(of) = told.iter().find(has).filter(|_| !has(&&"instruction") && !has(&&"text"))
        else {
            return Ok(());
        };
        let empty = |key: &str| [r#""""#, "[]", "{}"].contains(&self.columns[key].get());
        let talks = told.iter().any(|key| self.is_chat(key));
        let asks = self.has("prompt") || self.has("question");
        let opens = |key: &str| key == "system" && (talks || self.is_told() && asks);
        let left = ["system", "context", "input", "history"];
        match left.iter().filter(has).find(|key| !empty(key) && !opens(key)) {
            None => Ok(()),
            Some(&"system") if asks => Err(format!(
                "has `system`, for which `{of}` has no place where the model has no chat template: \
                 name one (chat_template), write it there, or take it out"
            )),
            Some(key) => Err(format!(
                "has `{key}`, for which `{of}` has no place: write it there, or take it out"
            )),
        }
    }

    /// Whether texts are a conversation, which a `system` column opens. One that is empty does not,
    /// but all rows of a file are of one kind.
    pub(super) fn is_told(&self) -> bool {
        self.options.chats && self.columns.contains_key("system")
    }

    /// A text of ours, empty if it is not there.
    fn part(&self, key: &str) -> Result<String, String> {
        if self.has(key) { self.text(key) } else { Ok(String::new()) }
    }

    /// A conversation with the `system` column before it.
    pub(super) fn opened(&self, chat: ChatText) -> Result<ChatText, String> {
        let told = self.part("system")?;
        if told.is_empty() {
            return Ok(chat);
        }
        let first: Option<Vec<Value>> = serde_json::from_str(&chat.messages).ok();
        let first = first.and_then(|all| all.into_iter().next()).unwrap_or_default();
        if first["role"] == "system" || first["from"] == "system" {
            return Err("has `system`, and its conversation begins with one, wanted one".into());
        }
        let rest = chat.messages.trim_start().strip_prefix('[').unwrap_or_default().trim_start();
        let comma = if rest.starts_with(']') { "" } else { "," };
        let told = json!({"role": "system", "content": told});
        Ok(chat.with(&format!("[{told}{comma}{rest}")))
    }

    /// The prompt of an instruction: a text under the headings that Alpaca made customary, and what
    /// the user asks.
    fn instruction(&self) -> Result<(String, String), String> {
        let history = self.has("history") && self.columns["history"].get() != "[]";
        if history {
            return Err("has a `history`, wanted the conversation as `messages`".into());
        }
        let (system, told) = (self.part("system")?, self.text("instruction")?);
        let input = self.one_of(&["input", "context"])?;
        let input = input.map_or(Ok(String::new()), |key| self.part(key))?;
        let headed = |heading: &str, text: &str| match text {
            "" => String::new(),
            text => format!("### {heading}:\n{text}\n\n"),
        };
        let before = if system.is_empty() { String::new() } else { format!("{system}\n\n") };
        let (told_text, input_text) = (headed("Instruction", &told), headed("Input", &input));
        let text = format!("{before}{told_text}{input_text}### Response:\n");
        let asked = if input.is_empty() { told } else { format!("{told}\n\n{input}") };
        Ok((text, asked))
    }

    /// An instruction with what follows it. It is a conversation where the model has a template.
    pub(super) fn instructed(&self) -> Result<Record, String> {
        let (text, asked) = self.instruction()?;
        let prompt = if self.options.chats { Told::Asked(asked) } else { Told::Text(text) };
        self.answered(prompt, &["completion", "output", "response", "answer"])
    }

    /// What a text asks, as a conversation, with what follows it.
    pub(super) fn asked(&self, key: &str) -> Result<Record, String> {
        self.answered(Told::Asked(self.text(key)?), &COMPLETIONS)
    }

    /// A prompt with what follows it: nothing, an answer, or two of which one was chosen.
    fn answered(&self, prompt: Told, names: &[&'static str]) -> Result<Record, String> {
        let chat = |asked: String| {
            let messages = json!([{"role": "user", "content": asked}]).to_string();
            let tools = self.has("tools").then(|| self.columns["tools"].get().to_owned());
            self.opened(ChatText { messages, tools, variables: None })
        };
        let answer = |text: String| json!([{"role": "assistant", "content": text}]).to_string();
        if self.has("chosen") {
            let (chosen, rejected) = (self.text("chosen")?, self.text("rejected")?);
            let margin = self.margin()?;
            return Ok(match prompt {
                Told::Text(prompt) => Record::Preference { prompt, chosen, rejected, margin },
                Told::Asked(asked) => {
                    let chat = chat(asked)?;
                    Record::ChatPreference {
                        chosen: chat.with(&answer(chosen)),
                        rejected: answer(rejected),
                        prompt: Some(chat),
                        margin,
                    }
                }
            });
        }
        let output = self.one_of(names)?.map(|key| self.text(key)).transpose()?;
        match (output, prompt) {
            (None, Told::Text(prompt)) => Ok(Record::Prompt { prompt }),
            (None, Told::Asked(asked)) => Ok(Record::ChatPrompt(chat(asked)?)),
            (Some(completion), Told::Text(prompt)) => {
                self.judged(Record::Completion { prompt, completion })
            }
            (Some(completion), Told::Asked(asked)) => {
                let (prompt, completion) = (chat(asked)?, answer(completion));
                self.judged(Record::ChatCompletion { prompt, completion })
            }
        }
    }
}

/// What is asked.
enum Told {
    /// As it stands.
    Text(String),
    /// By the user of a conversation.
    Asked(String),
}
