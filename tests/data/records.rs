//! JSONL: the format is told by the columns; a line that does not fit is named, with what was
//! wanted.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::Stdio,
};

use warpo::{
    Error,
    data::{self, Record},
};

use crate::support::{golden, runs::warpo, temp_dir};

fn file(test: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = temp_dir(&format!("records_{test}")).join("data.jsonl");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The message of a file that must be refused, with its path left out.
#[track_caller]
fn refused(test: &str, bytes: impl AsRef<[u8]>) -> String {
    let path = file(test, bytes);
    data::read(&path).unwrap_err().to_string().replace(path.to_str().unwrap(), "FILE")
}

#[test]
fn the_format_is_told_by_the_columns() {
    let text = |s: &str| s.to_owned();
    let preference = |margin| Record::Preference {
        prompt: text("p"),
        chosen: text("c"),
        rejected: text("r"),
        margin,
    };
    let preference_ids = |margin| Record::PreferenceIds {
        prompt: vec![1],
        chosen: vec![2, 3],
        rejected: vec![],
        margin,
    };
    let ids = vec![5, 6, 7];
    for (line, format, record) in [
        (r#"{"text": "a"}"#, "text", Record::Text { text: text("a") }),
        (
            r#"{"text": "a", "label": -3}"#,
            "text, label",
            Record::Labelled { text: text("a"), label: -3.0 },
        ),
        (
            r#"{"label": true, "text": "a"}"#,
            "text, label",
            Record::Labelled { text: text("a"), label: 1.0 },
        ),
        (
            r#"{"text": "a", "label": " Negative"}"#,
            "text, label",
            Record::Labelled { text: text("a"), label: 0.0 },
        ),
        (
            r#"{"text": "a", "label": "4.5"}"#,
            "text, label",
            Record::Labelled { text: text("a"), label: 4.5 },
        ),
        (
            r#"{"response": "c", "prompt": "p"}"#,
            "prompt, completion",
            Record::Completion { prompt: text("p"), completion: text("c") },
        ),
        (
            r#"{"question": "p", "answer": "c\ud83d\ude42"}"#,
            "prompt, completion",
            Record::Completion { prompt: text("p"), completion: text("c🙂") },
        ),
        (r#"{"question": "p"}"#, "prompt", Record::Prompt { prompt: text("p") }),
        (r#"{"prompt": "p"}"#, "prompt", Record::Prompt { prompt: text("p") }),
        (
            r#"{"completion": "c", "prompt": "p"}"#,
            "prompt, completion",
            Record::Completion { prompt: text("p"), completion: text("c") },
        ),
        (
            r#"{"prompt": "p", "chosen": "c", "rejected": "r"}"#,
            "prompt, chosen, rejected",
            preference(None),
        ),
        (
            r#"{"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}"#,
            "prompt, chosen, rejected",
            preference(Some(2.0)),
        ),
        (
            r#"{"prompt": "p", "chosen": "c", "rejected": "r", "margin": null}"#,
            "prompt, chosen, rejected",
            preference(None),
        ),
        (r#"{"input_ids": [5, 6, 7]}"#, "input_ids", Record::Ids { input_ids: ids.clone() }),
        (
            r#"{"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}"#,
            "input_ids, labels",
            Record::LabelledIds { input_ids: ids, learn: vec![false, true, false] },
        ),
        (
            r#"{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [], "margin": 0.5}"#,
            "prompt_ids, chosen_ids, rejected_ids",
            preference_ids(Some(0.5)),
        ),
        // unknown columns are ignored, and so are known ones that are null
        (
            r#"{"prompt": "p", "completion": "bad", "label": false}"#,
            "prompt, completion, label",
            Record::Judged {
                completion: Box::new(Record::Completion {
                    prompt: text("p"),
                    completion: text("bad"),
                }),
                label: 0.0,
            },
        ),
        (
            r#"{"input_ids": [5], "output_ids": [6], "label": 1}"#,
            "input_ids, output_ids, label",
            Record::Judged {
                completion: Box::new(Record::CompletionIds {
                    prompt: vec![5],
                    completion: vec![6],
                }),
                label: 1.0,
            },
        ),
        (r#"{"text": "a", "score": [1], "label": null}"#, "text", Record::Text { text: text("a") }),
        (
            r#"{"text": "t", "prompt": "p", "messages": []}"#,
            "prompt",
            Record::Prompt { prompt: text("p") },
        ),
    ] {
        let path = file("format", line);
        let read = data::read(&path).unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!((&read[0].record, read[0].place.line), (&record, 1), "{line}");
        assert_eq!((record.format(), &*read[0].place.path), (format, &*path));
    }
}

/// The HH format: two transcripts, of which the prompt is what they share, up to and with the last
/// turn of the assistant in it.
#[test]
fn transcripts_are_split_where_they_part() {
    let read = |chosen: &str, rejected: &str| {
        let line = serde_json::json!({ "chosen": chosen, "rejected": rejected }).to_string();
        data::read(&file("transcripts", line)).unwrap().remove(0).record
    };
    let want = |prompt: &str, chosen: &str, rejected: &str| Record::Preference {
        prompt: prompt.into(),
        chosen: chosen.into(),
        rejected: rejected.into(),
        margin: None,
    };
    let start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?\n\nAssistant:";
    assert_eq!(
        read(&format!("{start} So."), &format!("{start} Söder.")),
        want(start, " So.", " Söder.")
    );
    // characters that share their first byte only
    assert_eq!(read(&format!("{start} é"), &format!("{start} è")), want(start, " é", " è"));
    // more turns after the one where they part
    let (yes, no) = (" Yes.\n\nHuman: Ok\n\nAssistant: Bye", " No.\n\nHuman: Ok\n\nAssistant: Bye");
    assert_eq!(read(&format!("{start}{yes}"), &format!("{start}{no}")), want(start, yes, no));
    let alone = refused("transcripts", r#"{"chosen": "a", "rejected": "b"}"#);
    let want = "FILE:1: has `chosen` and `rejected`, wanted a `prompt`, or transcripts that share \
                one up to \"\\n\\nAssistant:\"";
    assert_eq!(alone, want);
}

#[test]
fn a_bad_line_is_named() {
    let long = format!(r#"{{"text": {:?}}}"#, vec![1234567; 20]);
    for (line, want) in [
        ("nope", "not JSON: expected ident at column 2"),
        (r#"{"text": "a""#, "not JSON: EOF while parsing an object at column 12"),
        (r#"{"text": "a"} {"#, "not JSON: trailing characters at column 15"),
        ("7", "wanted a JSON object, got 7"),
        (r#""text""#, r#"wanted a JSON object, got "text""#),
        (r#"{"text": 5}"#, "`text` is 5, wanted a text"),
        (r#"{"prompt": ["p"]}"#, r#"`prompt` is ["p"], wanted a text"#),
        (
            &long,
            "`text` is [1234567, 1234567, 1234567, 1234567, 1234567, 1234567, 12..., wanted a text",
        ),
        (r#"{"prompt": "p", "completion": {}}"#, "`completion` is {}, wanted a text"),
        (
            r#"{"text": "a", "label": "soso"}"#,
            "`label` is \"soso\", wanted a number, true or false, positive or negative, good or bad",
        ),
        (r#"{"text": "a", "text": "b"}"#, "has column \"text\" twice"),
        (
            r#"{"text": "\ud800"}"#,
            "`text` is \"\\ud800\": not JSON: unexpected end of hex escape at column 8",
        ),
        (
            r#"{"prompt": "p", "chosen": "c", "rejected": "r", "margin": "2"}"#,
            "`margin` is \"2\", wanted a number",
        ),
        // a number that f32, in which it is computed with, has not
        (
            r#"{"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1e39}"#,
            "`margin` is 1e39, wanted a number",
        ),
        (
            r#"{"text": null}"#,
            "has columns [\"text\" (null)], wanted messages | conversations | text | text, label | \
             prompt | prompt, completion[, label] | instruction[, input], output | [prompt,] chosen, rejected | \
             input_ids[, labels | output_ids] | prompt_ids, chosen_ids, rejected_ids; \
             other names are told by columns = { prompt = \"...\" }",
        ),
        (r#"{"input_ids": 7}"#, "`input_ids` has 7, wanted token ids"),
        (r#"{"input_ids": [1, -2]}"#, "`input_ids` has -2, wanted token ids"),
        (r#"{"input_ids": [1.5]}"#, "`input_ids` has 1.5, wanted token ids"),
        (r#"{"input_ids": [4294967296]}"#, "`input_ids` has 4294967296, wanted token ids"),
        (r#"{"input_ids": ["a"]}"#, "`input_ids` has \"a\", wanted token ids"),
        (r#"{"input_ids": [1], "labels": 1}"#, "`labels` is 1, wanted a list"),
        (r#"{"input_ids": [1, 2], "labels": [1]}"#, "`labels` has 1 numbers, `input_ids` 2"),
        (
            r#"{"input_ids": [1, 2], "labels": [-100, 3]}"#,
            "`labels`[1] is 3, wanted -100 or the token's id 2",
        ),
        (
            r#"{"input_ids": [1], "labels": [null]}"#,
            "`labels`[0] is null, wanted -100 or the token's id 1",
        ),
        (
            r#"{"prompt": "p", "completion": "c", "label": "soso"}"#,
            "`label` is \"soso\", wanted a number, true or false, positive or negative, good or bad",
        ),
        (r#"{"messages": {}}"#, "`messages` is {}, wanted a list of messages"),
        (r#"{"chosen": "c", "instruction": "i"}"#, "has `chosen` without `rejected`"),
        (
            r#"{"prompt": [], "completion": "c"}"#,
            "`completion` is \"c\", wanted a list of messages",
        ),
        (r#"{"chosen": [], "rejected": "c"}"#, "`rejected` is \"c\", wanted a list of messages"),
        (
            r#"{"prompt": "p", "chosen": [{"role": "user", "content": "q"}], "rejected": []}"#,
            "has a text as `prompt`, with which `chosen` does not open",
        ),
    ] {
        assert_eq!(refused("bad_line", line), format!("FILE:1: {want}"), "{line}");
        // the number counts blank lines too
        let late = format!("\n  \n{line}\n");
        assert!(refused("bad_line", &late).starts_with("FILE:3: "), "{line}");
    }
    let error = data::read(&file("bad_line", "x")).unwrap_err();
    assert!(matches!(error, Error::Data { line: 1, .. }), "{error:?}");
}

#[test]
fn all_lines_have_the_format_of_the_first() {
    let mixed = "{\"prompt\": \"p\"}\n\n{\"prompt\": \"p\", \"completion\": \"c\"}\n";
    let want = "FILE:3: has columns prompt, completion, wanted prompt as in line 1";
    assert_eq!(refused("mixed", mixed), want);
    let late = "\n{\"text\": \"a\"}\n{\"text\": \"a\", \"label\": 1}";
    let want = "FILE:3: has columns text, label, wanted text as in line 2";
    assert_eq!(refused("mixed", late), want);
}

#[test]
fn marks_blank_lines_and_line_ends_are_no_content() {
    let text =
        "\u{feff}{\"text\": \"a\"}\r\n\r\n  \t\n  {\"text\": \"b\\n\"}  \r\n{\"text\": \"c\"}";
    let read = data::read(&file("blank", text)).unwrap();
    let texts: Vec<(usize, Record)> = read.into_iter().map(|r| (r.place.line, r.record)).collect();
    let text = |s: &str| Record::Text { text: s.into() };
    assert_eq!(texts, [(1, text("a")), (4, text("b\n")), (5, text("c"))]);
}

#[test]
fn files_that_are_no_text_are_named() {
    let mut bytes = b"{\"text\": \"a\"}\n{\"text\": \"".to_vec();
    bytes.extend(b"\xff\"}\n");
    assert_eq!(refused("utf8", &bytes), "FILE:2: not UTF-8 at byte 11");
    for empty in ["", "\n", "\u{feff}", " \r\n \n"] {
        let want = "FILE: has no records, wanted JSON objects, one a line";
        assert_eq!(refused("utf8", empty), want);
    }
    let missing = Path::new("/nowhere/data.jsonl");
    let want = "cannot open /nowhere/data.jsonl: No such file or directory (os error 2)";
    assert_eq!(data::read(missing).unwrap_err().to_string(), want);
    // a line without an end, longer than is read: the file is sparse
    let path = file("utf8", "{\"text\": \"a\"}\n");
    let open = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    open.set_len((64 << 20) + 100).unwrap();
    let error = data::read(&path).unwrap_err().to_string();
    assert_eq!(error, format!("{}:2: longer than 67108864 bytes", path.display()));
}

#[test]
fn a_dash_is_standard_input() {
    let model = golden::path("llama_tied").display().to_string();
    let score = |text: &str| {
        let mut child = warpo(&["score", "--model", &model, "--data", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let out = child.wait_with_output().unwrap();
        let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let (code, out, _) = score("{\"input_ids\": [5, 6]}\n{\"input_ids\": [7, 8, 9]}\n");
    assert_eq!((code, out.lines().count()), (Some(0), 2), "{out}");
    assert!(out.contains("\"input_ids\":[7,8,9]"), "{out}");
    let (code, out, error) = score("{\"input_ids\": [5, 6]}\n{\"input_ids\": [7, 8.5]}\n");
    assert_eq!((code, &*out), (Some(1), ""));
    assert_eq!(error, "error: <stdin>:2: `input_ids` has 8.5, wanted token ids\n");
}
