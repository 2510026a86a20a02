//! Tokenizers: the ids of Hugging Face, BOS once, and text that never becomes control.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use warpo::{Error, data::Tokenizer};

use crate::support::{golden, temp_dir};

/// A model folder with a tokenizer only.
fn folder(test: &str, tokenizer: impl AsRef<[u8]>, config: &Value) -> PathBuf {
    let dir = temp_dir(&format!("tokenizer_{test}"));
    std::fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

/// The `tokenizer.json` of GPT-2, made of its merges: 256 bytes, then a token a merge.
fn gpt2() -> Value {
    let merges = std::fs::read_to_string(golden::path("tok-gpt2/vocab.bpe")).unwrap();
    let merges: Vec<&str> = merges.lines().skip(1).collect();
    let printable = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let bytes = (0..256).filter(printable).chain(256..324).filter_map(char::from_u32);
    let tokens = bytes.map(String::from).chain(merges.iter().map(|m| m.replace(' ', "")));
    let vocab: serde_json::Map<String, Value> =
        tokens.zip(0..).map(|(token, id)| (token, json!(id))).collect();
    assert_eq!((merges.len(), vocab.len()), (50_000, 50_256));
    json!({
        "version": "1.0",
        "added_tokens": [added(50_256, "<|endoftext|>", 0)],
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true },
        "model": { "type": "BPE", "vocab": vocab, "merges": merges },
    })
}

/// A special token; the bits of `flags` are its other properties.
fn added(id: u32, content: &str, flags: u32) -> Value {
    json!({
        "id": id, "content": content, "special": true,
        "single_word": flags & 1 != 0, "lstrip": flags & 2 != 0,
        "rstrip": flags & 4 != 0, "normalized": flags & 8 != 0,
    })
}

/// A text as Hugging Face's library encodes and decodes it.
struct Case {
    text: String,
    /// Without and with what the post-processor adds.
    ids: [Vec<u32>; 2],
    /// Special tokens left out.
    decoded: String,
}

impl Case {
    fn of(v: &Value, [ids, with_special, decoded]: [&str; 3]) -> Self {
        let list = |key: &str| {
            v[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let text = |key: &str| v[key].as_str().unwrap().to_owned();
        Self { text: text("text"), ids: [list(ids), list(with_special)], decoded: text(decoded) }
    }
}

struct Golden {
    name: &'static str,
    json: Value,
    tokenizer: Tokenizer,
    cases: Vec<Case>,
}

impl Golden {
    fn special(&self) -> Vec<(u32, String)> {
        let all = self.json["added_tokens"].as_array().unwrap();
        let token = |t: &Value| {
            (t["id"].as_u64().unwrap() as u32, t["content"].as_str().unwrap().to_owned())
        };
        all.iter().filter(|t| t["special"] == true).map(token).collect()
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// All tokenizers with golden encodings: two of real models, four small ones in known styles.
fn goldens(test: &str) -> Vec<Golden> {
    let lines = |name: &str| {
        let text = std::fs::read_to_string(golden::path(name)).unwrap();
        let keys = ["ids", "ids_with_special", "decoded_skip_special"];
        let case = |l: &str| Case::of(&serde_json::from_str(l).unwrap(), keys);
        text.lines().map(case).collect::<Vec<_>>()
    };
    let quickstart = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart/model");
    let end = json!({ "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>" });
    let json = gpt2();
    let dir = folder(&format!("{test}_gpt2"), json.to_string(), &end);
    let mut out = vec![
        Golden {
            name: "stories260K",
            json: read(&quickstart.join("tokenizer.json")),
            tokenizer: Tokenizer::open(&quickstart).unwrap(),
            cases: lines("stories260K/golden_encodings.jsonl"),
        },
        Golden {
            name: "gpt2",
            json,
            tokenizer: Tokenizer::open(&dir).unwrap(),
            cases: lines("tok-gpt2/golden_encodings.jsonl"),
        },
    ];
    let sentence = json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" } });
    for (name, config) in [
        ("gpt2_style", &end),
        ("qwen2_style", &end),
        ("llama2_style", &sentence),
        ("llama3_style", &sentence),
    ] {
        let json = read(&golden::path(&format!("tokenizers/{name}.json")));
        let cases = read(&golden::path(&format!("tokenizers/{name}.cases.json")));
        let keys = ["ids_no_special", "ids", "decoded_skip"];
        let cases = cases["cases"].as_array().unwrap().iter().map(|c| Case::of(c, keys)).collect();
        let dir = folder(&format!("{test}_{name}"), json.to_string(), config);
        out.push(Golden { name, json, tokenizer: Tokenizer::open(&dir).unwrap(), cases });
    }
    out
}

#[test]
fn ids_and_texts_are_those_of_hugging_face() {
    for g in goldens("parity") {
        let (special, mut compared) = (g.special(), 0);
        for c in &g.cases {
            let what = format!("{} {:?}", g.name, c.text);
            // Where the text spells a special token, Hugging Face makes it one: see below.
            if !special.iter().any(|(_, s)| c.text.contains(s)) {
                assert_eq!(g.tokenizer.encode(&c.text).unwrap(), c.ids[0], "{what}");
                assert_eq!(g.tokenizer.encode_start(&c.text).unwrap(), c.ids[1], "{what}");
                compared += 1;
            }
            assert_eq!(g.tokenizer.decode(&c.ids[1]).unwrap(), c.decoded, "{what}");
        }
        assert!(compared + 2 >= g.cases.len() && compared >= 13, "{}: {compared}", g.name);
    }
}

#[test]
fn bos_stands_once_at_the_start() {
    for g in goldens("bos") {
        let t = &g.tokenizer;
        let adds = matches!(g.name, "stories260K" | "llama2_style" | "llama3_style");
        assert_eq!(t.adds_bos(), adds, "{}", g.name);
        let bos = t.bos().unwrap();
        let name = &g.special().iter().find(|s| s.0 == bos).unwrap().1.clone();
        for text in ["", "a", name, &format!("{name}{name} a")] {
            let ids = t.encode_start(text).unwrap();
            let count = ids.iter().filter(|id| **id == bos).count();
            assert_eq!((count, ids.first() == Some(&bos)), (usize::from(adds), adds), "{text}");
            for inner in [t.encode(text).unwrap(), t.encode_continuation(text).unwrap()] {
                assert!(!inner.contains(&bos), "{} {text}", g.name);
            }
        }
    }
}

/// Where users put what they are told not to.
const CONTEXTS: [&str; 22] = [
    "{}",
    " {}",
    "{} ",
    "  {}  ",
    "a{}b",
    "a {} b",
    "{}{}",
    "{} {}",
    "\n{}\n",
    "\t{}\r\n",
    "{}tail",
    "head{}",
    "({})",
    "\"{}\"",
    "<{}>",
    "{}<",
    "1{}2",
    "x={};",
    "é{}é",
    "你{}好",
    "🙂{}🚀",
    "[INST] {} [/INST]",
];

/// G15: a text that spells a special token is the text it spells: all special tokens in 22
/// contexts.
#[test]
fn text_is_never_control() {
    let mut all = goldens("control");
    // the special tokens of many families at once, with every mix of their properties
    let names = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> \
                 <|im_start|> <|im_end|> <|fim_prefix|> <bos> <eos> <pad> <start_of_turn> [INST] \
                 [/INST] <<SYS>> [CLS] [MASK] <s> </s> <unk> <|user|> ▁<extra> user: <|END|>";
    let mut json = read(&golden::path("tokenizers/gpt2_style.json"));
    let tokens = json["added_tokens"].as_array_mut().unwrap();
    tokens.extend(names.split_whitespace().zip(0..).map(|(t, i)| added(420 + i, t, i)));
    let dir = folder("control_many", json.to_string(), &json!({}));
    let tokenizer = Tokenizer::open(&dir).unwrap();
    all.push(Golden { name: "many", json, tokenizer, cases: Vec::new() });
    let mut tried = 0;
    for g in &all {
        let special = g.special();
        for (_, token) in &special {
            for context in CONTEXTS {
                let text = context.replace("{}", token);
                let what = format!("{} {text:?}", g.name);
                for ids in [
                    g.tokenizer.encode(&text).unwrap(),
                    g.tokenizer.encode_continuation(&text).unwrap(),
                    g.tokenizer.encode_start(&text).unwrap()[usize::from(g.tokenizer.adds_bos())..]
                        .to_vec(),
                ] {
                    assert!(!ids.iter().any(|id| special.iter().any(|s| s.0 == *id)), "{what}");
                    let back = g.tokenizer.decode(&ids).unwrap();
                    // what puts a space before a text takes it away again
                    let same = back == text || back == text.strip_prefix(' ').unwrap_or(&text);
                    assert!(same, "{what} became {back:?}");
                }
                tried += 1;
            }
        }
    }
    assert!(tried > 700, "{tried}");
    // and special tokens are no text
    for g in &all {
        let ids: Vec<u32> = g.special().iter().map(|s| s.0).collect();
        assert_eq!(g.tokenizer.decode(&ids).unwrap(), "", "{}", g.name);
    }
}

/// Prompt and completion are encoded apart: the prompt's ids are a prefix, the text is the whole
/// text, and a space at the seam is neither lost nor doubled.
#[test]
fn a_completion_continues_its_prompt() {
    let prompts = ["Once upon a time", "Q: two?\n\nA:", "你好", "x=", "ends with a space "];
    let completions =
        [" there was", "there", "\nA new line", "  two spaces", ".", "\n\n", "é", "🙂", "", "1234"];
    for g in goldens("completion") {
        let t = &g.tokenizer;
        for (prompt, completion) in
            prompts.iter().flat_map(|p| completions.iter().map(move |c| (*p, *c)))
        {
            let what = format!("{} {prompt:?} {completion:?}", g.name);
            let (before, ids) =
                (t.encode_start(prompt).unwrap(), t.encode_continuation(completion).unwrap());
            let whole = t.decode(&[&before[..], &ids].concat()).unwrap();
            assert_eq!(whole, format!("{prompt}{completion}"), "{what}");
            assert_eq!(t.decode_continuation(&before, &ids).unwrap(), completion, "{what}");
        }
        // a character whose bytes lie on both sides of the seam belongs to neither
        let smile = t.encode_continuation("🙂").unwrap();
        if smile.len() > 1 {
            let (start, end) = smile.split_at(1);
            let text = t.decode_continuation(start, end).unwrap();
            assert!(!text.contains('🙂'), "{}", g.name);
        }
    }
}

#[test]
fn bos_and_eos_are_found_where_folders_keep_them() {
    let json = read(&golden::path("tokenizers/llama2_style.json"));
    let text = json.to_string();
    let open = |config: Value, others: &[(&str, Value)]| {
        let dir = folder("bos_eos", &text, &config);
        for (name, value) in others {
            std::fs::write(dir.join(name), value.to_string()).unwrap();
        }
        let t = Tokenizer::open(&dir).unwrap();
        (t.bos(), t.eos().to_vec(), t.adds_bos())
    };
    let (config, generation) = ("config.json", "generation_config.json");
    assert_eq!(open(json!({}), &[]), (None, vec![], false));
    let named = json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" } });
    let ids = json!({ "bos_token_id": 1, "eos_token_id": [2, 9] });
    assert_eq!(open(named.clone(), &[(config, ids.clone())]), (Some(1), vec![2, 9], true));
    assert_eq!(open(json!({}), &[(config, ids.clone())]), (Some(1), vec![2, 9], true));
    let other = json!({ "eos_token_id": 7 });
    let both = [(config, ids), (generation, other)];
    assert_eq!(open(json!({}), &both), (Some(1), vec![7], true));
    // names that the tokenizer does not have, and files that are no JSON, are as if absent
    let unknown = json!({ "bos_token": "<nope>", "eos_token": 5 });
    assert_eq!(open(unknown, &[(config, json!("x"))]), (None, vec![], false));
    // a BOS that the post-processor does not add: only on request
    let plain = read(&golden::path("tokenizers/gpt2_style.json")).to_string();
    for (flag, adds) in [(json!(null), false), (json!(false), false), (json!(true), true)] {
        let config = json!({ "bos_token": "<|endoftext|>", "add_bos_token": flag });
        let t = Tokenizer::open(&folder("bos_eos", &plain, &config)).unwrap();
        assert_eq!((t.adds_bos(), t.encode_start("a").unwrap().len()), (adds, 1 + adds as usize));
    }
}

/// G12: a `tokenizer.json` that lies is an error that names it; the library panics on some.
#[test]
fn a_malformed_tokenizer_is_refused() {
    let good = read(&golden::path("tokenizers/llama2_style.json"));
    let text = good.to_string();
    let mut refused = 0;
    let mut check = |what: &str, text: &str| {
        let dir = folder("malformed", text, &json!({ "bos_token": "<s>" }));
        match Tokenizer::open(&dir) {
            Err(error) => {
                let message = error.to_string();
                assert!(matches!(error, Error::File { .. }), "{what}: {error:?}");
                assert!(message.contains("tokenizer.json: "), "{what}: {message}");
                refused += 1;
            }
            // What is understood must work, or say that it does not.
            Ok(t) => {
                for text in ["", "a b", "🙂\n"] {
                    if let Ok(ids) = t.encode_start(text) {
                        let _ = t.decode(&ids);
                    }
                    let _ = t.encode_continuation(text);
                }
                let _ = t.decode(&[0, 1, u32::MAX]);
            }
        }
    };
    for text in ["", "{", "[]", "null", "7", "{}", r#"{"version": "1.0"}"#, r#"{"model": {}}"#] {
        check(text, text);
    }
    for end in (1..text.len()).step_by(text.len() / 60) {
        let end = (end..).find(|i| text.is_char_boundary(*i)).unwrap();
        check(&format!("cut at {end}"), &text[..end]);
    }
    let values = [json!(null), json!(true), json!(-1), json!("x"), json!([]), json!({})];
    for pointer in [
        "/version",
        "/added_tokens",
        "/added_tokens/1",
        "/added_tokens/1/id",
        "/added_tokens/1/content",
        "/normalizer",
        "/normalizer/normalizers",
        "/normalizer/normalizers/1/pattern",
        "/post_processor",
        "/post_processor/single",
        "/post_processor/special_tokens",
        "/decoder",
        "/decoder/decoders",
        "/model",
        "/model/type",
        "/model/vocab",
        "/model/merges",
        "/model/merges/0",
        "/model/unk_token",
        "/model/dropout",
        "/model/byte_fallback",
    ] {
        for value in &values {
            let mut json = good.clone();
            *json.pointer_mut(pointer).unwrap() = value.clone();
            check(&format!("{pointer} = {value}"), &json.to_string());
        }
    }
    // merges of tokens that are not there, ids that meet, leave gaps, or are huge
    for (pointer, value) in [
        ("/model/merges/0", json!(["nope", "neither"])),
        ("/model/merges/0", json!("one")),
        ("/model/vocab/<s>", json!(0)),
        ("/model/vocab/<s>", json!(4_294_967_295u32)),
        ("/model/vocab/<unk>", json!(1.5)),
        ("/added_tokens/1/id", json!(4_294_967_295u32)),
        ("/model/unk_token", json!("<nope>")),
        ("/decoder/decoders/3/start", json!(1_000_000)),
        ("/normalizer/normalizers/1/pattern", json!({ "Regex": "(" })),
    ] {
        let mut json = good.clone();
        *json.pointer_mut(pointer).unwrap() = value.clone();
        check(&format!("{pointer} = {value}"), &json.to_string());
    }
    assert!(refused > 100, "{refused}");
    let missing = temp_dir("tokenizer_missing");
    let error = Tokenizer::open(&missing).unwrap_err().to_string();
    let want = "tokenizer.json: No such file or directory (os error 2)";
    assert!(error.starts_with("cannot read ") && error.ends_with(want), "{error}");
}
