//! Columns of the formats that other projects use, and what is refused by name.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use warpo::data::{self, Chat, ChatText, ReadOptions, Record};

use crate::support::temp_dir;

fn file(test: &str, row: &Value) -> PathBuf {
    let path = temp_dir(&format!("columns_{test}")).join("data.jsonl");
    fs::write(&path, row.to_string()).unwrap();
    path
}

/// The record of a row, or its error.
fn read(test: &str, row: &Value, options: &ReadOptions) -> Result<Record, String> {
    let mut all = data::read_as(&file(test, row), options).map_err(|e| e.to_string())?;
    Ok(all.remove(0).record)
}

fn with_template() -> ReadOptions {
    ReadOptions { chats: true, ..ReadOptions::default() }
}

fn renamed(pairs: &[(&str, &str)]) -> ReadOptions {
    let columns = pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    ReadOptions { columns, ..ReadOptions::default() }
}

fn chat(text: &str) -> Chat {
    Chat::read(&ChatText { messages: text.into(), ..ChatText::default() }).unwrap()
}

fn completion(prompt: &str, completion: &str) -> Record {
    Record::Completion { prompt: prompt.into(), completion: completion.into() }
}

#[test]
fn instructions_are_texts_or_conversations() {
    let plain = ReadOptions::default();
    let row =
        json!({"instruction": "Add.", "input": "1 2", "output": "3", "text": "### all of it"});
    let text = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n";
    assert_eq!(read("instruction", &row, &plain), Ok(completion(text, "3")));
    // Dolly's names; an empty input is none
    let row = json!({"instruction": "Add.", "context": "", "response": "3", "category": "x"});
    let text = "### Instruction:\nAdd.\n\n### Response:\n";
    assert_eq!(read("instruction", &row, &plain), Ok(completion(text, "3")));
    let row = json!({"instruction": "Add.", "system": "Be brief."});
    let prompt = format!("Be brief.\n\n{text}");
    assert_eq!(read("instruction", &row, &plain), Ok(Record::Prompt { prompt }));
    let row = json!({"instruction": "Add.", "chosen": "3", "rejected": "4", "margin": 2});
    let (prompt, chosen, rejected) = (text.into(), "3".into(), "4".into());
    let want = Record::Preference { prompt, chosen, rejected, margin: Some(2.0) };
    assert_eq!(read("instruction", &row, &plain), Ok(want));
    let row = json!({"instruction": "Add.", "output": "4", "label": false});
    let judged = |completion| Record::Judged { completion: Box::new(completion), label: 0.0 };
    assert_eq!(read("instruction", &row, &plain), Ok(judged(completion(text, "4"))));
    let row = json!({"messages": [{"role": "user", "content": "a"}], "label": "bad"});
    let messages = row["messages"].to_string();
    let want = judged(Record::Messages(ChatText { messages, ..ChatText::default() }));
    assert_eq!(read("instruction", &row, &plain), Ok(want));
    // with a template
    let row = json!({
        "instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [],
    });
    let asked = json!([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n\n1 2"},
    ]);
    let answer = |text: &str| json!([{"role": "assistant", "content": text}]).to_string();
    let prompt = ChatText { messages: asked.to_string(), ..ChatText::default() };
    let want = Record::ChatCompletion { prompt, completion: answer("3") };
    assert_eq!(read("instruction", &row, &with_template()), Ok(want));
    let row = json!({"instruction": "Add.", "chosen": "3", "rejected": "4"});
    let asked = json!([{"role": "user", "content": "Add."}]).to_string();
    let prompt = ChatText { messages: asked, ..ChatText::default() };
    let chosen = prompt.with(&answer("3"));
    let (prompt, rejected) = (Some(prompt), answer("4"));
    let want = Record::ChatPreference { prompt, chosen, rejected, margin: None };
    assert_eq!(read("instruction", &row, &with_template()), Ok(want));
}

#[test]
fn sharegpt_is_read_as_messages() {
    let turns = json!([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]);
    let row = json!({"conversations": turns, "system": "Be \"brief\".", "tools": ""});
    let Ok(Record::Messages(text)) = read("sharegpt", &row, &with_template()) else { panic!() };
    let want = chat(
        r#"[{"role": "system", "content": "Be \"brief\"."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"}]"#,
    );
    assert_eq!(Chat::read(&ChatText { tools: None, ..text }).unwrap(), want);
    // its pairs: each side is one message
    let row = json!({
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "What?"},
    });
    let pair = read("sharegpt", &row, &with_template());
    let Ok(Record::ChatPreference { prompt: Some(prompt), chosen, rejected, .. }) = pair else {
        panic!("{pair:?}")
    };
    let side = |json: &str| chat(json).count();
    assert_eq!(Chat::read(&prompt).unwrap(), chat(r#"[{"role": "user", "content": "Hi"}]"#));
    assert_eq!((side(&chosen.messages), side(&rejected)), (1, 1));
    assert_eq!(chat(&rejected), chat(r#"[{"role": "assistant", "content": "What?"}]"#));
    let text = r#"[{"from": "function_call", "value": "f()"}]"#.to_owned();
    let e = Chat::read(&ChatText { messages: text, ..ChatText::default() }).unwrap_err();
    assert_eq!(e, "message 1 is from \"function_call\", wanted human, gpt, system or observation");
}

#[test]
fn columns_have_the_names_that_they_are_given() {
    let row = json!({"q": "p", "a": "c", "prompt": "another", "answer": "another"});
    let names = renamed(&[("prompt", "q"), ("completion", "a")]);
    assert_eq!(read("renamed", &row, &names), Ok(completion("p", "c")));
    // one of two that could be meant
    let row = json!({"prompt": "p", "response": "r", "answer": "a"});
    let e = read("renamed", &row, &ReadOptions::default()).unwrap_err();
    let want = "has `response` and `answer`, wanted one of them; say which: \
                columns = { completion = \"answer\" }";
    assert!(e.ends_with(want), "{e}");
    let names = renamed(&[("completion", "answer")]);
    assert_eq!(read("renamed", &row, &names), Ok(completion("p", "a")));
    let e = read("renamed", &row, &renamed(&[("completion", "reply")])).unwrap_err();
    let want = "data.jsonl: no row has column \"reply\" (`columns` has it as `completion`)";
    assert!(e.ends_with(want), "{e}");
    // One that some rows do not have is missing there, as under its own name.
    let path = temp_dir("columns_some").join("data.jsonl");
    let pair = |more: &str| {
        format!("{{\"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"r\"{more}}}\n")
    };
    fs::write(&path, pair("") + &pair(", \"gap\": 2")).unwrap();
    let all = data::read_as(&path, &renamed(&[("margin", "gap")])).unwrap();
    let margin = |i: usize| match all[i].record {
        Record::Preference { margin, .. } => margin,
        _ => panic!(),
    };
    assert_eq!([margin(0), margin(1)], [None, Some(2.0)]);
    fs::write(&path, "{\"prompt\": \"p\", \"a\": \"c\"}\n{\"prompt\": \"p\", \"answer\": \"c\"}\n")
        .unwrap();
    let e = data::read_as(&path, &renamed(&[("completion", "a")])).unwrap_err().to_string();
    assert!(e.ends_with(":2: has columns prompt, wanted prompt, completion as in line 1"), "{e}");
    let e = read("renamed", &row, &renamed(&[("completions", "answer")])).unwrap_err();
    assert!(e.contains("config key `columns`: got completions, wanted one of [\"text\""), "{e}");
    let pairs = ReadOptions::of_pairs(&["prompt = q".into(), "completion=a".into()], false);
    assert_eq!(pairs.unwrap(), renamed(&[("prompt", "q"), ("completion", "a")]));
    let e = ReadOptions::of_pairs(&["prompt".into()], false).unwrap_err().to_string();
    assert!(e.contains("`--column`: got prompt"), "{e}");
}

#[test]
fn what_could_be_meant_otherwise_is_refused_by_name() {
    let user = json!([{"role": "user", "content": "a"}]);
    for (row, want) in [
        (
            json!({"prompt": "a", "question": "b"}),
            "has `prompt` and `question`, wanted one of them",
        ),
        (json!({"prompt": "a", "instruction": "b"}), "has `prompt` and `instruction`"),
        (
            json!({"instruction": "a", "output": "b", "response": "c"}),
            "has `output` and `response`, wanted one of them",
        ),
        (
            json!({"messages": user, "conversations": user}),
            "has `messages` and `conversations`, wanted one of them",
        ),
        (json!({"instruction": "a", "history": [["b", "c"]]}), "has a `history`, wanted"),
        (json!({"prompt": "a", "rejected": "b"}), "has `rejected` without `chosen`"),
        // What other formats have a place for is not left out.
        (
            json!({"system": "a", "question": "b", "chosen": "c", "rejected": "d"}),
            "has `system`, for which `chosen` has no place where the model has no chat template",
        ),
        (
            json!({"system": "a", "chosen": "\n\nAssistant: c", "rejected": "\n\nAssistant: d"}),
            "has `system`, for which `chosen` has no place",
        ),
        (
            json!({"messages": [{"role": "system", "content": "b"}], "system": "a"}),
            "has `system`, and its conversation begins with one",
        ),
        (
            json!({"question": "a", "context": "b", "answer": "c"}),
            "has `context`, for which `question` has no place",
        ),
        (json!({"prompt": "a", "history": [["b", "c"]]}), "has `history`, for which `prompt`"),
        (
            json!({"input": "a", "output": "b"}),
            "has columns [\"input\", \"output\"], wanted messages | conversations | text",
        ),
    ] {
        let e = read("otherwise", &row, &ReadOptions::default()).unwrap_err();
        assert!(e.contains(&format!("data.jsonl:1: {want}")), "{e}, wanted {want}");
    }
    let wide: serde_json::Map<String, Value> =
        (0..5000).map(|i| (format!("c{i}"), json!(0))).collect();
    let e = read("otherwise", &Value::Object(wide), &ReadOptions::default()).unwrap_err();
    assert!(e.contains("more than 4096 columns"), "{e}");
}

/// Of two values of one key one would be lost silently, in a message as in a row.
#[test]
fn a_key_twice_is_refused_at_any_depth() {
    let path = temp_dir("columns_twice").join("data.jsonl");
    fs::write(&path, r#"{"text": "a", "id": 1, "id": 2}"#).unwrap();
    let e = data::read(&path).unwrap_err().to_string();
    assert!(e.ends_with("data.jsonl:1: has column \"id\" twice"), "{e}");
    let text = r#"[{"role": "user", "content": "a", "content": "b"}]"#;
    let e = Chat::read(&ChatText { messages: text.into(), ..ChatText::default() }).unwrap_err();
    assert_eq!(e, "not JSON: key \"content\" stands twice at column 49");
    // all else is read as it is
    let text =
        r#"[{"role": "user", "content": "\u00e9", "x": [1, -2, 0.5, true, null, {"y": ""}]}]"#;
    let all: Value = serde_json::from_str(text).unwrap();
    let Value::Array(all) = all else { panic!() };
    assert_eq!(chat(text), Chat::of(all));
}

/// A `system` column opens the conversation that a row is, or becomes where the model has a chat
/// template.
#[test]
fn a_system_column_opens_the_conversation() {
    let with = |row: &Value| read("system", row, &with_template()).unwrap();
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let (told, asked) = (said("system", "Be \"brief\"."), said("user", "Hi"));
    let system = "Be \"brief\".";
    let opened = Chat::of(vec![told.clone(), asked.clone()]);
    let answered = |text: &str| Chat::of(vec![said("assistant", text)]);
    let row = json!({"system": system, "question": "Hi", "chosen": "A", "rejected": "B"});
    let Record::ChatPreference { prompt: Some(prompt), chosen, rejected, .. } = with(&row) else {
        panic!()
    };
    assert_eq!(Chat::read(&prompt).unwrap(), opened);
    assert_eq!((Chat::read(&chosen).unwrap(), chat(&rejected)), (answered("A"), answered("B")));
    for (row, want) in [
        (json!({"system": system, "question": "Hi", "answer": "A"}), &opened),
        (json!({"system": system, "prompt": "Hi", "response": "A"}), &opened),
        (
            json!({"system": system, "prompt": [asked], "completion": [said("assistant", "A")]}),
            &opened,
        ),
        // Empty or null it opens nothing; the row is of the same kind.
        (json!({"system": "", "question": "Hi", "answer": "A"}), &Chat::of(vec![asked.clone()])),
        (json!({"system": null, "question": "Hi", "answer": "A"}), &Chat::of(vec![asked.clone()])),
    ] {
        let Record::ChatCompletion { prompt, completion } = with(&row) else { panic!("{row}") };
        assert_eq!((&Chat::read(&prompt).unwrap(), chat(&completion)), (want, answered("A")));
    }
    for row in
        [json!({"system": system, "prompt": "Hi"}), json!({"system": system, "prompt": [asked]})]
    {
        let Record::ChatPrompt(prompt) = with(&row) else { panic!("{row}") };
        assert_eq!(Chat::read(&prompt).unwrap(), opened);
    }
    let plain = ReadOptions::default();
    let row = json!({"system": system, "messages": [asked]});
    let Ok(Record::Messages(text)) = read("system", &row, &plain) else { panic!() };
    assert_eq!(Chat::read(&text).unwrap(), opened);
    // both sides of a pair of conversations
    let side = |text: &str| json!([asked, said("assistant", text)]);
    let row = json!({"system": system, "chosen": side("A"), "rejected": side("B")});
    let Ok(Record::ChatPreference { prompt: None, chosen, rejected, .. }) =
        read("system", &row, &plain)
    else {
        panic!()
    };
    let whole = |text: &str| Chat::of(vec![told.clone(), asked.clone(), said("assistant", text)]);
    assert_eq!((Chat::read(&chosen).unwrap(), chat(&rejected)), (whole("A"), whole("B")));
    // without a system column texts stay texts
    let row = json!({"question": "Hi", "answer": "A"});
    assert_eq!(with(&row), completion("Hi", "A"));
}
