//! `warpo tokenize` and `warpo chat`, and training on conversations.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{feed, lines, model, refused, run};
use crate::support::temp_dir;

const LINE: &str = r#"{"messages": [{"role": "user", "content": "Hi </s>"}, {"role": "assistant", "content": "Once upon a time"}]}"#;

/// Text and labels of a line: what is learned of it.
fn learned(line: &Value) -> Vec<i64> {
    let labels = line["labels"].as_array().unwrap().iter().map(|l| l.as_i64().unwrap());
    let (ids, labels): (Vec<Value>, Vec<i64>) =
        (line["input_ids"].as_array().unwrap().clone(), labels.collect());
    assert!(labels.iter().zip(&ids).all(|(l, id)| *l == -100 || json!(l) == *id));
    assert_eq!(labels.len(), ids.len());
    labels.into_iter().filter(|l| *l != -100).collect()
}

#[test]
fn tokenize_writes_what_training_sees() {
    let dir = temp_dir("cli_tokenize");
    // no weights
    let folder = dir.join("model");
    fs::create_dir_all(&folder).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(Path::new(&model()).join(name), folder.join(name)).unwrap();
    }
    let folder = folder.display().to_string();
    let all = ["tokenize", "--model", &folder, "--set", "chat_template=\"zephyr\""];
    let with = |more: &[&str], input: &str| {
        let args: Vec<&str> = all.iter().chain(more).copied().collect();
        let out = feed(&args, input);
        (String::from_utf8_lossy(&out.stderr).into_owned(), lines(&out))
    };
    let (warnings, sft) = with(&[], &format!("{LINE}\n{LINE}\n"));
    assert!(warnings.contains("2 texts spell special tokens or marks"), "{warnings}");
    assert!(warnings.contains("<stdin>:1: </s>"), "{warnings}");
    assert_eq!(sft.len(), 2);
    assert_eq!(
        sft[0]["text"],
        "<s> <|user|>\nHi </s></s> \n<|assistant|>\nOnce upon a time</s> \n",
    );
    let ids = learned(&sft[0]);
    assert_eq!((ids.last(), ids.contains(&1)), (Some(&2), false));
    // as text it is learned whole, with one warning
    let text = json!({"text": sft[0]["text"]}).to_string();
    let (warnings, whole) = with(&[], &text);
    assert!(warnings.contains("1 texts spell") && warnings.contains("as `messages`"), "{warnings}");
    assert_eq!(learned(&whole[0]).len() + 1, whole[0]["input_ids"].as_array().unwrap().len());
    // a prompt learns nothing, and is the beginning of what sft learns
    let (_, ppo) = with(&["--algorithm", "ppo"], LINE);
    let prompt = ppo[0]["input_ids"].as_array().unwrap();
    assert!(learned(&ppo[0]).is_empty());
    assert_eq!(prompt[..], sft[0]["input_ids"].as_array().unwrap()[..prompt.len()]);
    let pair = LINE.replace("messages", "chosen").replace("time\"}]", "time\"}], \"rejected\": [{\"role\": \"user\", \"content\": \"Hi </s>\"}, {\"role\": \"assistant\", \"content\": \"No\"}]");
    let (_, pairs) = with(&["--algorithm", "reward"], &pair);
    assert_eq!((pairs.len(), learned(&pairs[0])), (2, ids));
    assert_eq!(pairs[1]["input_ids"].as_array().unwrap().last(), Some(&json!(2)));
    // a template whose marks are no tokens of this model: nothing learned would end an answer
    let other = ["tokenize", "--model", &folder, "--set", "chat_template=\"chatml\""];
    let never = |more: &[&str]| {
        let out = feed(&[&other[..], more].concat(), LINE);
        String::from_utf8_lossy(&out.stderr).contains("no answer will end by itself")
    };
    assert!(never(&[]) && !never(&["--algorithm", "ppo"]));
    assert!(!warnings.contains("no answer will end by itself"), "{warnings}");
    // without a template and with an unknown algorithm
    let (code, text) = refused(&feed(&["tokenize", "--model", &folder], LINE));
    assert_eq!((code, text.contains("has no chat template")), (1, true), "{text}");
    let (code, _) = refused(&feed(&["tokenize", "--model", &folder, "--algorithm", "x"], LINE));
    assert_eq!(code, 2);
}

#[test]
fn chat_answers_each_line_and_knows_what_was_said() {
    let dir = model();
    let all = ["chat", "--model", &dir, "--temperature", "0", "--max-new-tokens", "12"];
    let chat = |more: &[&str], input: &str| {
        let args: Vec<&str> = all.iter().chain(more).copied().collect();
        let out = feed(&args, input);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let vicuna = ["--chat-template", "vicuna"];
    let one = chat(&vicuna, "Once upon a time\n");
    let two = chat(&vicuna, "Once upon a time\n\nThe end\n");
    assert!(two.starts_with(&one) && two.len() > one.len() && one.len() > 5, "{one:?} {two:?}");
    assert_eq!(two, chat(&vicuna, "Once upon a time\nThe end"), "the same again");
    // what was said before is part of the next prompt
    let alone = chat(&vicuna, "The end\n");
    assert_ne!(two[one.len()..], alone);
    let told =
        chat(&["--chat-template", "vicuna", "--system", "Tell of a dog"], "Once upon a time\n");
    assert_ne!(told, one);
    // the answer is that of `generate` to the same messages
    let line = json!({"messages": [{"role": "user", "content": "Once upon a time"}]}).to_string();
    let args = ["generate", "--model", &dir, "--chat-template", "vicuna", "--temperature", "0"];
    let args: Vec<&str> = args.into_iter().chain(["--max-new-tokens", "12"]).collect();
    let generated = lines(&feed(&args, &line)).remove(0);
    assert_eq!(generated["text"].as_str().unwrap().trim_end(), one.trim_end());
    let (code, text) = refused(&feed(&["chat", "--model", &dir], "a\n"));
    assert_eq!((code, text.contains("has no chat template")), (1, true), "{text}");
}

/// A model that was trained on conversations ends its turn as its template ends it, and takes the
/// template along.
#[test]
fn a_model_trained_on_conversations_knows_its_template() {
    let dir = temp_dir("cli_chat_train");
    let (data, out) = (dir.join("data.jsonl"), dir.join("run").display().to_string());
    fs::write(&data, format!("{LINE}\n").repeat(4)).unwrap();
    let (folder, data) = (model(), data.display().to_string());
    let args =
        ["train", "sft", "--model", &folder, "--data", &data, "--out", &out, "--set", "steps=1"];
    let args: Vec<&str> = args.into_iter().chain(["--set", "chat_template=\"zephyr\""]).collect();
    let done = run(&args);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    let last = Path::new(&out).join("final");
    let template = fs::read_to_string(last.join("chat_template.jinja")).unwrap();
    assert!(template.contains("<|assistant|>") && template.starts_with("{{- bos_token -}}"));
    // with it the model needs no setting
    let folder = last.display().to_string();
    let ours = lines(&feed(&["tokenize", "--model", &folder], LINE));
    let args = ["tokenize", "--model", &model(), "--set", "chat_template=\"zephyr\""];
    assert_eq!(ours, lines(&feed(&args, LINE)));
    assert_eq!(warpo::train::appended_eos(&last), Some(2));
}

/// The end of a turn that is no end of a text in the files before becomes one.
#[test]
fn the_end_of_a_turn_ends_a_sample() {
    let dir = temp_dir("cli_chat_eos");
    let (base, data) = (dir.join("base"), dir.join("data.jsonl"));
    crate::support::runs::copy(Path::new(&model()), &base);
    // `<unk>` stands for an end of turn
    fs::write(
        base.join("chat_template.jinja"),
        "{% for m in messages %}{{ m.content }}<unk>{% endfor %}",
    )
    .unwrap();
    fs::write(base.join("generation_config.json"), r#"{"eos_token_id": 2}"#).unwrap();
    fs::write(&data, format!("{LINE}\n").repeat(4)).unwrap();
    let (folder, data) = (base.display().to_string(), data.display().to_string());
    let out = dir.join("run").display().to_string();
    let args =
        ["train", "sft", "--model", &folder, "--data", &data, "--out", &out, "--set", "steps=1"];
    let done = run(&args);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let json = |name: &str| -> Value {
        let text = fs::read_to_string(Path::new(&out).join("final").join(name)).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    assert_eq!(json("generation_config.json")["eos_token_id"], json!([0, 2]));
    assert_eq!(json("config.json")["eos_token_id"], json!([0, 2]));
    assert_eq!(json("tokenizer_config.json")["eos_token"], "</s>");
}

/// What cannot be answered is said, and the conversation goes on without it.
#[test]
fn chat_goes_on_after_a_line_that_it_cannot_answer() {
    let dir = model();
    let all = ["chat", "--model", &dir, "--chat-template", "vicuna", "--temperature", "0"];
    let args: Vec<&str> = all.into_iter().chain(["--max-new-tokens", "12"]).collect();
    let long = "once upon a time ".repeat(400);
    let lines = [b"\xff\xfe no text\n", long.as_bytes(), b"\nOnce upon a time\n"].concat();
    let (out, alone) = (feed(&args, &lines), feed(&args, "Once upon a time\n"));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && alone.status.success(), "{said}");
    assert!(said.contains("not UTF-8 at byte 1"), "{said}");
    assert!(said.contains("tokens, wanted fewer than 512"), "{said}");
    assert_eq!(out.stdout, alone.stdout);
}

/// The bytes of a character are tokens here: an answer may end between them, and is shown whole.
#[test]
fn chat_shows_an_answer_that_ends_within_a_character() {
    let dir = model();
    let line = json!({"messages": [{"role": "user", "content": "Hi"}]}).to_string();
    let mut cut = 0;
    for seed in ["7", "8", "12", "15"] {
        let answer = |command: &str, input: &str| {
            let all = [command, "--model", &dir, "--chat-template", "vicuna", "--seed", seed];
            let hot = ["--temperature", "1000", "--max-new-tokens", "1"];
            feed(&all.into_iter().chain(hot).collect::<Vec<_>>(), input)
        };
        let chat = answer("chat", "Hi\n");
        assert!(chat.status.success());
        let shown = String::from_utf8(chat.stdout).unwrap();
        let text = lines(&answer("generate", &line))[0]["text"].as_str().unwrap().to_owned();
        cut += usize::from(text.ends_with('\u{fffd}'));
        assert_eq!(shown.contains('\u{fffd}'), text.contains('\u{fffd}'), "{seed}: {shown:?}");
    }
    assert!(cut > 0, "no answer ended within a character: take other seeds");
}
