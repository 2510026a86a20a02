//! Rewards that read a text and a row.

use serde_json::{Value, json};

use super::{rewards, sample, score, score_all};
use crate::support::temp_dir;

fn is(toml: &str, completion: &str, columns: &Value) -> bool {
    match score(toml, completion, columns).unwrap() {
        1.0 => true,
        0.0 => false,
        other => panic!("{other}"),
    }
}

#[test]
fn math_compares_with_a_column() {
    let math = r#"{ kind = "math" }"#;
    assert!(is(math, r"\boxed{0.5}", &json!({"answer": "1/2"})));
    assert!(is(math, "#### 72", &json!({"ground_truth": 72})));
    assert!(is(math, "#### 72", &json!({"answer": "6 * 12 = 72\n#### 72"})));
    assert!(is(math, "#### 0.5", &json!({"answer": r"half: \boxed{\frac12}"})));
    assert!(!is(math, "#### 6", &json!({"answer": "6 * 12 = 72\n#### 72"})));
    assert!(!is(math, "72", &json!({"answer": "72"})));
    assert!(is(r#"{ kind = "math", column = "c" }"#, "#### 2", &json!({"c": 2.0, "answer": "3"})));
    let strict = r#"{ kind = "math", missing = "error" }"#;
    assert!(is(strict, "#### 2", &json!({"answer": "2"})));
    let e = score(strict, "2", &json!({"answer": "2"})).unwrap_err();
    assert_eq!(
        e.to_string(),
        "the reward `math` failed at sample 3: it has no answer in \\boxed{} or behind ####"
    );
}

/// A row that a reward cannot read is refused before the first step.
#[test]
fn rows_are_checked() {
    let math = rewards(r#"{ kind = "math" }"#).unwrap();
    let admit = |row: Value| math.admit(row.as_object().unwrap());
    let wanted = |e: &str| Err(format!("{e}, wanted by the reward `math`"));
    assert_eq!(admit(json!({"answer": "2"})), Ok(()));
    assert_eq!(admit(json!({})), wanted("has no column `answer` or `ground_truth`"));
    let both = json!({"answer": "2", "ground_truth": "2"});
    assert_eq!(admit(both), wanted("has `answer` and `ground_truth`: say which by `column`"));
    assert_eq!(
        admit(json!({"answer": [2]})),
        wanted("has [2] as `answer`, wanted a text or a number")
    );
    for nothing in ["", " ", r"\boxed{}", "####", "{", "$$"] {
        let want = wanted(&format!("has {nothing:?} as its answer, which says nothing"));
        assert_eq!(admit(json!({"answer": nothing})), want);
    }
    let exact = rewards(r#"{ kind = "exact", column = "c" }"#).unwrap();
    let e = exact.admit(json!({"answer": "2"}).as_object().unwrap()).unwrap_err();
    assert_eq!(e, "has no column `c`, wanted by the reward `exact`");
    let labels = rewards(r#"{ kind = "http", url = "http://a", labels = "c" }"#).unwrap();
    assert!(labels.admit(json!({"answer": "2"}).as_object().unwrap()).is_err());
    for kind in
        [r#"{ kind = "http", url = "http://a" }"#, r#"{ kind = "command", command = ["a"] }"#]
    {
        let all = rewards(kind).unwrap();
        assert_eq!(all.admit(json!({"answer": "2"}).as_object().unwrap()), Ok(()));
        let e = all.admit(json!({"completion": "2"}).as_object().unwrap()).unwrap_err();
        assert!(e.contains("`completion`"), "{e}");
    }
}

#[test]
fn exact_reads_all_white_space_as_one() {
    let row = json!({"answer": "The  cat\n sat"});
    let exact = r#"{ kind = "exact" }"#;
    assert!(is(exact, " The cat sat\n", &row));
    assert!(!is(exact, "the cat sat", &row));
    assert!(!is(exact, "The catsat", &row));
    assert!(!is(exact, "The cat sat down", &row));
    assert!(is(r#"{ kind = "exact", case = false }"#, "the CAT sat", &row));
    assert!(is(exact, "7", &json!({"answer": 7})));
}

#[test]
fn regex_matches_somewhere() {
    let regex = r#"{ kind = "regex", pattern = '^\d+ cats?$' }"#;
    assert!(is(regex, "12 cats", &json!({})));
    assert!(!is(regex, "12 cats!", &json!({})));
    assert!(is(r#"{ kind = "regex", pattern = "cat" }"#, "a cat", &json!({})));
    // Linear: a pattern that others take forever for.
    let slow = r#"{ kind = "regex", pattern = '^(a+)+$' }"#;
    assert!(!is(slow, &("a".repeat(100_000) + "b"), &json!({})));
}

#[test]
fn format_wants_one_thought_and_an_answer() {
    let format = r#"{ kind = "format" }"#;
    for (text, want) in [
        ("<think>a</think> b", true),
        ("\n<think>\na\n</think>\nb", true),
        ("<think></think>b", true),
        ("<think>a</think>", false),
        ("<think>a</think> \n", false),
        ("<think>a b", false),
        ("a</think> b", false),
        ("c <think>a</think> b", false),
        ("<think>a</think> b <think>c</think>", false),
        ("<think>a</think> b</think>", false),
        ("<think><think>a</think> b", false),
        ("b", false),
        ("", false),
    ] {
        assert_eq!(is(format, text, &json!({})), want, "{text}");
    }
    // A template that began the thought.
    let begun = |prompt: &str, completion: &str| {
        let mut one = sample(3, completion, &json!({}));
        one.prompt = prompt.into();
        score_all(&mut rewards(format).unwrap(), &[one]).unwrap()[0]
    };
    assert_eq!(begun("Q<think>\n", "a</think> b"), 1.0);
    assert_eq!(begun("Q<think>\n", "<think>a</think> b"), 0.0);
    assert_eq!(begun("Q", "a</think> b"), 0.0);
    let tagged = r#"{ kind = "format", think = "plan", answer = "answer" }"#;
    for (text, want) in [
        ("<plan>a</plan><answer>b</answer>", true),
        ("<plan>a</plan>\n<answer>b</answer>\n", true),
        ("<plan>a</plan><answer>b</answer> c", false),
        ("<plan>a</plan> c <answer>b</answer>", false),
        ("<plan>a</plan><answer> </answer>", false),
        ("<plan>a</plan> b", false),
        ("<think>a</think><answer>b</answer>", false),
    ] {
        assert_eq!(is(tagged, text, &json!({})), want, "{text}");
    }
}

/// A sample here has five tokens.
#[test]
fn length_is_a_linear_penalty() {
    for (keys, want) in [
        ("target = 5", 0.0),
        ("target = 10", -0.5),
        ("target = 4", -0.25),
        ("target = 2", -1.0),
        ("max = 5", 0.0),
        ("max = 4", -1.0),
        ("max = 6, buffer = 4", -0.75),
        ("max = 5, buffer = 4", -1.0),
        ("max = 9, buffer = 4", 0.0),
        ("max = 7, buffer = 7", -5.0 / 7.0),
    ] {
        let got = score(&format!(r#"{{ kind = "length", {keys} }}"#), "", &json!({})).unwrap();
        assert_eq!(got.to_bits(), f64::to_bits(want), "{keys}: {got}");
    }
}

#[test]
fn repetition_is_the_share_of_ngrams_that_come_again() {
    for (keys, text, want) in [
        ("", "a b c d", 0.0),
        ("", "a b", 0.0),
        ("", "", 0.0),
        // Of 4 trigrams 2 differ.
        ("", "a b a b a b", -0.5),
        ("", "A b a B a b", -0.5),
        ("ngram = 1", "a a a a", -0.75),
        ("ngram = 2, max_penalty = -2.0", "a b a b a", -1.0),
        ("ngram = 2, max_penalty = 0.0", "a b a b a", 0.0),
    ] {
        let toml = format!(
            r#"{{ kind = "repetition"{}{keys} }}"#,
            if keys.is_empty() { "" } else { ", " }
        );
        assert_eq!(score(&toml, text, &json!({})).unwrap(), want, "{keys} {text}");
    }
}

#[test]
fn json_schema_checks_all_of_a_sample_or_its_last_block() {
    let dir = temp_dir("json_schema");
    let schema = |name: &str, text: &str| {
        let file = dir.join(name);
        std::fs::write(&file, text).unwrap();
        format!(r#"{{ kind = "json_schema", file = "{}" }}"#, file.display())
    };
    let person = r##"{"type": "object", "required": ["name", "age"], "additionalProperties": false,
        "properties": {"name": {"type": "string", "pattern": "^(a+)+$"},
            "age": {"$ref": "#/$defs/age"}}, "$defs": {"age": {"type": "integer", "minimum": 0}}}"##;
    let person = schema("person.json", person);
    let long = format!(r#"{{"name": "{}b", "age": 3}}"#, "a".repeat(50_000));
    for (text, want) in [
        (r#"{"name": "aa", "age": 3}"#, true),
        (" {\"name\": \"a\", \"age\": 3}\n", true),
        ("So:\n```json\n{\"name\": \"a\", \"age\": 3}\n```\nDone.", true),
        ("```\n{\"name\": \"a\", \"age\": 3}\n```\n```\n{}\n```", false),
        (r#"{"name": "a", "age": -3}"#, false),
        (r#"{"name": "a", "age": "3"}"#, false),
        (r#"{"name": "a"}"#, false),
        (r#"{"name": "a", "age": 3, "x": 1}"#, false),
        (r#"So: {"name": "a", "age": 3}"#, false),
        (r#"{"name": "a", "age": 3"#, false),
        ("", false),
        // Linear in its length.
        (&long, false),
    ] {
        assert_eq!(is(&person, text, &json!({})), want, "{}", &text[..text.len().min(80)]);
    }
    for (name, text, want) in [
        ("a.json", "{", "EOF while parsing"),
        ("b.json", r#"{"type": "thing"}"#, "no schema"),
        ("c.json", r#"{"$ref": "http://127.0.0.1:1/s.json"}"#, "no schema"),
        ("d.json", r#"{"$ref": "file:///etc/passwd"}"#, "no schema"),
        ("e.json", r#"{"pattern": "(a)\\1"}"#, "no schema"),
    ] {
        let e = rewards(&schema(name, text)).err().unwrap().to_string();
        assert!(e.contains(name) && e.contains(want), "{e}");
    }
}
