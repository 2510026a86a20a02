//! Tokenizers: the ids of Hugging Face, BOS once, and text that never becomes control.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use warpo::{
    Error,
    data::{Kept, Tokenizer},
};

use crate::support::{golden, runs::warpo, temp_dir};

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
    // a BOS that the post-processor does not add is not added, whatever the config says: a server
    // that reads the folder adds none
    let plain = read(&golden::path("tokenizers/gpt2_style.json")).to_string();
    for flag in [json!(null), json!(false), json!(true)] {
        let config = json!({ "bos_token": "<|endoftext|>", "add_bos_token": flag });
        let t = Tokenizer::open(&folder("bos_eos", &plain, &config)).unwrap();
        assert_eq!((t.adds_bos(), t.encode_start("a").unwrap().len()), (false, 1));
    }
}

/// Ids that are kept of a long text are those of the whole text; few more are made.
#[test]
fn a_part_of_a_long_text_has_the_ids_of_the_whole() {
    let words =
        "The printer jams. 🙂 naïve 12345 你好\n\n  double  spaces aaaaaaaaaaaaa ".repeat(80);
    let texts = [words.clone(), "a".repeat(9001), words.replace([' ', '\n'], "")];
    for g in goldens("part") {
        for (text, room) in texts.iter().flat_map(|t| [1, 7, 64, 500].map(|room| (t, room))) {
            let t = &g.tokenizer;
            let what = format!("{} {room} of {}", g.name, text.len());
            let whole = t.encode_start(text).unwrap();
            let rest = t.encode_continuation(text).unwrap();
            if rest.len().min(whole.len()) <= room + 1 {
                continue;
            }
            let first = t.encode_start_within(text, room, Kept::First).unwrap();
            assert_eq!(first[..room], whole[..room], "{what}");
            let last = t.encode_start_within(text, room, Kept::Last).unwrap();
            // the end of a run of letters depends on where the run begins
            if text.contains(' ') {
                assert_eq!(last[last.len() - room..], whole[whole.len() - room..], "{what}");
            }
            let next = t.encode_continuation_within(text, room).unwrap();
            assert_eq!(next[..room], rest[..room], "{what}");
            for part in [first, last, next] {
                // few more where the text is much longer
                assert!(part.len() > room && (room > 64 || part.len() < room + 4), "{what}");
            }
        }
        // what fits is whole
        let short = g.tokenizer.encode_start_within("a b", 64, Kept::Last).unwrap();
        assert_eq!(short, g.tokenizer.encode_start("a b").unwrap());
    }
}

/// A text has one encoding, whose size is bounded by the text's.
#[test]
fn a_tokenizer_that_draws_or_grows_is_refused() {
    let good = read(&golden::path("tokenizers/llama2_style.json"));
    let refused = |pointer: &str, value: Value| {
        let mut json = good.clone();
        *json.pointer_mut(pointer).unwrap() = value;
        let dir = folder("grows", json.to_string(), &json!({}));
        Tokenizer::open(&dir)
            .map(drop)
            .map_err(|e| e.to_string().split(": ").nth(1).unwrap().to_owned())
    };
    let replace = |pattern: &str, content: &str| json!({ "type": "Replace", "pattern": { "String": pattern }, "content": content });
    let sequence = |all: Vec<Value>| json!({ "type": "Sequence", "normalizers": all });
    let any = json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "x".repeat(300) });
    // a map of one entry, 300 bytes long, after a trie of none
    let map = [&[0, 0, 0, 0][..], &[b'x'; 300], &[0]].concat();
    let map = json!({ "type": "Precompiled", "precompiled_charsmap": base64(&map) });
    for (value, steps) in [
        (replace("a", &"a".repeat(257)), "257 bytes of one in 1 steps"),
        (replace("", &"a".repeat(257)), "258 bytes of one in 1 steps"),
        (sequence(vec![replace("a", "aa"); 9]), "512 bytes of one in 9 steps"),
        (sequence(vec![sequence(vec![replace("a", "b"); 33]); 2]), "1 bytes of one in 66 steps"),
        (any, "301 bytes of one in 1 steps"),
        (map, "300 bytes of one in 1 steps"),
    ] {
        let want = format!("`normalizer` makes up to {steps}, wanted at most 256 in 64");
        assert_eq!(refused("/normalizer", value), Err(want));
    }
    let prefix = json!({ "type": "Prepend", "prepend": "x".repeat(65) });
    let want = "`normalizer` prepends 65 bytes, wanted at most 64";
    assert_eq!(refused("/normalizer", sequence(vec![prefix])), Err(want.into()));
    let want = "`model.dropout` is 0.3, wanted none";
    assert_eq!(refused("/model/dropout", json!(0.3)), Err(want.into()));
    let grown = json!({ "type": "Sequence", "decoders": vec![replace("a", "aa"); 9] });
    let want = "`decoder` makes up to 512 bytes of one in 9 steps, wanted at most 256 in 64";
    assert_eq!(refused("/decoder", grown), Err(want.into()));
    // what published tokenizers do
    for fine in [json!(null), replace(" ", "\u{2581}"), sequence(vec![replace("a", "aa"); 8])] {
        assert_eq!(refused("/normalizer", fine), Ok(()));
    }
    for fine in [json!(null), json!(0.0)] {
        assert_eq!(refused("/model/dropout", fine), Ok(()));
    }
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |chunk: &[u8]| {
        let bits = (0..3).fold(0u32, |n, i| n << 8 | u32::from(*chunk.get(i).unwrap_or(&0)));
        let letter = |i: u32| char::from(LETTERS[(bits >> (18 - 6 * i) & 63) as usize]);
        (0..4).map(|i| if i as usize <= chunk.len() { letter(i) } else { '=' }).collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}

/// The library panics on this one: an error says so, and nothing else is printed.
#[test]
fn a_panic_of_the_library_is_silent() {
    let mut json = read(&golden::path("tokenizers/llama2_style.json"));
    json["pre_tokenizer"] = json!({ "type": "FixedLength", "length": 0 });
    let model = temp_dir("silent_panic");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden::path("llama_tied").join(file), model.join(file)).unwrap();
    }
    std::fs::write(model.join("tokenizer.json"), json.to_string()).unwrap();
    let data = model.join("data.jsonl");
    std::fs::write(&data, "{\"text\": \"a\"}").unwrap();
    let [dir, data] = [&model, &data].map(|p| p.to_str().unwrap());
    let out = warpo(&["score", "--model", dir, "--data", data]).output().unwrap();
    let want = format!("error: {dir}/tokenizer.json: cannot encode a text: the tokenizer failed\n");
    assert_eq!((out.status.code(), String::from_utf8(out.stderr).unwrap()), (Some(1), want));
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
