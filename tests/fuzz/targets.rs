//! What a fuzzer feeds: a function for each kind of file that may be anybody's. `tests/fuzz` runs
//! them over seeds and mutations of these, `fuzz/` under libFuzzer.

use std::{
    fmt::Debug,
    fs,
    path::Path,
    sync::{LazyLock, OnceLock},
};

use sha2::{Digest, Sha256};
use warpo::{
    ALGORITHMS, Device, Head, Model, Result, Settings, Tokenizer, config, data,
    device::Cpu,
    eval::report,
    storage::Disk,
    train::{checkpoint, metrics::StepLines},
};

/// A kind of file.
pub struct Target {
    pub name: &'static str,
    /// Bytes that it may take beside four times its input.
    pub room: usize,
    /// Writes the files that stand around the hostile one.
    pub prepare: fn(&Path),
    /// Reads a hostile file, and says what came of it.
    pub run: fn(&Path, &[u8]) -> String,
}

// A value of JSON has 72 bytes: lists of small numbers are the worst of inputs.
const ROOM: usize = 1 << 20;
// A regex has up to 10 MiB, and automata beside it.
const REGEX: usize = 64 << 20;
// A conversation is JSON, then values of a template, then text, of up to 40 bytes a byte.
const CHATS: usize = 16 << 20;
// What a template may write and hold.
const TEMPLATE: usize = 100 << 20;
// The page itself is copied a few times.
const PAGE: usize = 4 << 20;

pub const TARGETS: &[Target] = &[
    Target { name: "safetensors_header", room: ROOM, prepare: a_config, run: safetensors_header },
    Target { name: "shard_index", room: ROOM, prepare: a_shard, run: shard_index },
    Target { name: "model_config", room: ROOM, prepare: weights, run: model_config },
    Target { name: "tokenizer", room: REGEX, prepare: nothing, run: tokenizer },
    Target { name: "generation_config", room: REGEX, prepare: a_tokenizer, run: generation_config },
    Target { name: "checkpoint_manifest", room: ROOM, prepare: a_checkpoint, run: manifest },
    Target { name: "dataset_line", room: CHATS, prepare: nothing, run: dataset_line },
    Target { name: "toml", room: ROOM, prepare: nothing, run: toml },
    Target { name: "set_pair", room: ROOM, prepare: nothing, run: set_pair },
    Target { name: "rollouts", room: PAGE, prepare: a_run, run: rollouts },
    Target { name: "metrics", room: PAGE, prepare: nothing, run: metrics },
    Target { name: "chat_template", room: TEMPLATE, prepare: nothing, run: chat_template },
    Target { name: "run_record", room: PAGE, prepare: a_run, run: run_record },
];

macro_rules! seed {
    ($path:literal) => {
        include_bytes!(concat!("../../fuzz/seeds/", $path))
    };
}

/// A file that is made anew: ext4 writes to the disk at once what replaces a file's content.
pub fn put(dir: &Path, name: &str, bytes: &[u8]) {
    let path = dir.join(name);
    let _ = fs::remove_file(&path);
    fs::write(path, bytes).unwrap();
}

/// What came, in words: an error is as good as a result.
fn told<T: Debug>(result: Result<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => error.to_string(),
    }
}

fn nothing(_: &Path) {}

fn a_config(dir: &Path) {
    put(dir, "config.json", seed!("model_config/gpt2"));
}

fn weights(dir: &Path) {
    put(dir, "model.safetensors", seed!("safetensors_header/gpt2.safetensors"));
}

fn a_shard(dir: &Path) {
    a_config(dir);
    put(dir, "model-00001-of-00001.safetensors", seed!("safetensors_header/gpt2.safetensors"));
}

fn a_tokenizer(dir: &Path) {
    put(dir, "tokenizer.json", seed!("tokenizer/bpe"));
}

fn a_checkpoint(dir: &Path) {
    let step = dir.join("step-1");
    fs::create_dir_all(&step).unwrap();
    put(&step, "model.safetensors", include_bytes!("checkpoint.safetensors"));
    put(&step, "state.json", b"{\"a\":1}");
}

fn a_run(dir: &Path) {
    fs::create_dir_all(dir.join("rollouts")).unwrap();
    put(dir, "metrics.jsonl", seed!("metrics/three"));
    put(&dir.join("rollouts"), "step-1.jsonl", seed!("rollouts/two"));
}

/// Loads the model of a folder, as a policy and as one that gets a scalar head.
fn model(dir: &Path) -> String {
    static HOST: LazyLock<Device> = LazyLock::new(|| Device::Cpu(Cpu::new(1)));
    let of = |head, new| Model::<f32>::load(&HOST, dir, head, new).map(|m| m.spec().clone());
    told(of(Head::Lm, None)) + &told(of(Head::Scalar, Some(1)))
}

fn safetensors_header(dir: &Path, input: &[u8]) -> String {
    put(dir, "model.safetensors", input);
    model(dir)
}

fn shard_index(dir: &Path, input: &[u8]) -> String {
    put(dir, "model.safetensors.index.json", input);
    model(dir)
}

fn model_config(dir: &Path, input: &[u8]) -> String {
    put(dir, "config.json", input);
    model(dir)
}

/// Opens a tokenizer and takes texts and ids there and back.
fn tokens(dir: &Path) -> String {
    let tokenizer = match Tokenizer::open(dir) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return error.to_string(),
    };
    let mut out = format!("{:?}", (tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()));
    for text in ["", "ab a\nb", "<eos>\u{e9}\u{1f600} \0'll 123", &"a".repeat(60)] {
        out += &told(tokenizer.encode_start(text));
        out += &told(tokenizer.encode_continuation(text));
    }
    out += &told(tokenizer.decode(&[0, 1, 2, 7, u32::MAX]));
    out + &told(tokenizer.decode_continuation(&[1], &[2, 3]))
}

fn tokenizer(dir: &Path, input: &[u8]) -> String {
    put(dir, "tokenizer.json", input);
    tokens(dir)
}

/// All files that name special tokens.
fn generation_config(dir: &Path, input: &[u8]) -> String {
    let names = ["generation_config.json", "tokenizer_config.json", "config.json"];
    names.iter().for_each(|name| put(dir, name, input));
    tokens(dir)
}

/// What is no sealed manifest is sealed, so that its fields are read.
fn manifest(dir: &Path, input: &[u8]) -> String {
    let sealed = if input.starts_with(b"{\"sha256\"") {
        input.to_vec()
    } else {
        let hash: String = Sha256::digest(input).iter().map(|b| format!("{b:02x}")).collect();
        [format!("{{\"sha256\":\"{hash}\",\"manifest\":").as_bytes(), input, b"}\n"].concat()
    };
    put(&dir.join("step-1"), "manifest.json", &sealed);
    let loaded = match checkpoint::load_newest(&Disk, dir) {
        Ok(Some(loaded)) => loaded,
        other => return told(other.map(|_| ())),
    };
    let tensors = loaded.tensors().map(|t| {
        // None is longer than its file.
        let n = t.shape.iter().product::<usize>();
        match t.dtype {
            checkpoint::Dtype::F64 | checkpoint::Dtype::U64 => {
                told(loaded.read(&Disk, t.file, t.name, &mut vec![0_u64; n]))
            }
            _ => told(loaded.read(&Disk, t.file, t.name, &mut vec![0_f32; n])),
        }
    });
    format!("{} {:?} {}", loaded.step, loaded.state, tensors.collect::<String>())
}

/// Reads lines and makes of them all that steps are made of.
fn dataset_line(dir: &Path, input: &[u8]) -> String {
    static WORDS: OnceLock<Tokenizer> = OnceLock::new();
    let words = WORDS.get_or_init(|| {
        let folder = dir.join("words");
        fs::create_dir_all(&folder).unwrap();
        a_tokenizer(&folder);
        let mut words = Tokenizer::open(&folder).unwrap();
        words.set_template(&folder, Some("chatml")).unwrap();
        words
    });
    put(dir, "data.csv", input);
    let table = told(data::read(&dir.join("data.csv")));
    put(dir, "data.jsonl", input);
    let records = match data::read(&dir.join("data.jsonl")) {
        Ok(records) => records,
        Err(error) => return table + &error.to_string(),
    };
    let (words, limits) =
        (Some(words), data::Limits { max_length: 16, vocab: 7, eos: Some(0), skip_bad: 0 });
    table
        + &told(data::texts(&records, words, limits, true))
        + &told(data::texts(&records, None, limits, false))
        + &told(data::pairs(&records, words, limits, 1))
        + &told(data::prompts(&records, words, limits, Some(2)))
        + &told(data::scored(&records, words, limits).map(|d| (d.len(), d.digest())))
}

/// Gives every algorithm's settings to `set`.
fn settings(set: impl Fn(&mut [&mut dyn config::Section]) -> Result<()>) -> String {
    let each = ALGORITHMS.iter().map(|entry| {
        let (mut shared, mut own) = Settings::defaults(entry)?;
        set(&mut [&mut shared, &mut *own])?;
        config::Section::validate(&shared)?;
        own.validate()?;
        Ok(config::template(&[&shared, &*own]))
    });
    each.map(told).collect()
}

fn toml(_: &Path, input: &[u8]) -> String {
    let text = String::from_utf8_lossy(input);
    settings(|sections| config::set_all(sections, &text, "hostile.toml"))
}

fn set_pair(_: &Path, input: &[u8]) -> String {
    let text = String::from_utf8_lossy(input);
    settings(|sections| config::set_pair(sections, &text))
}

fn page(dir: &Path) -> String {
    let _ = fs::remove_file(dir.join("page.html"));
    told(report(dir, &dir.join("page.html"), 40))
}

fn rollouts(dir: &Path, input: &[u8]) -> String {
    put(&dir.join("rollouts"), "step-2.jsonl", input);
    page(dir)
}

fn metrics(dir: &Path, input: &[u8]) -> String {
    put(dir, "metrics.jsonl", input);
    put(dir, "timing.jsonl", input);
    let page = page(dir);
    page + &told(StepLines::open(&Disk, dir.join("metrics.jsonl"), 2).map(|lines| lines.last))
}

/// Parses a template, renders it, and asks for what is learned.
fn chat_template(_: &Path, input: &[u8]) -> String {
    let source = String::from_utf8_lossy(input);
    let template = match data::jinja::Template::parse(&source) {
        Ok(template) => template,
        Err(error) => return error,
    };
    let messages = serde_json::json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a <b>"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": 1.5}}]},
        {"role": "tool", "content": "\u{e9}"},
        {"role": "assistant", "content": "ok", "reasoning_content": "why"},
    ]);
    let tools = serde_json::json!([{"name": "f", "parameters": {"a": null}}]);
    let render = |messages| {
        let variables = [
            ("messages", messages),
            ("tools", data::jinja::Variable::Given(&tools)),
            ("bos_token", data::jinja::Variable::Written("<s>")),
            ("add_generation_prompt", data::jinja::Variable::Bool(true)),
        ];
        let told =
            |r: data::jinja::Rendering| format!("{:?} {:?}", r.generated.len(), r.text.len());
        template.render(&variables, 0).map_or_else(|e| e, told)
    };
    let open = render(data::jinja::Variable::Unfinished(&messages));
    render(data::jinja::Variable::Given(&messages)) + &open
}

fn run_record(dir: &Path, input: &[u8]) -> String {
    put(dir, "run.json", input);
    put(dir, "summary.json", input);
    page(dir)
}
