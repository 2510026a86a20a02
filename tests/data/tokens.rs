//! Tokens that were made once are found again, are the same, and are not believed.

use std::{fs, path::Path};

use warpo::{
    Result, Tokenizer,
    data::{
        self, ColumnsRead, DataInput, ExampleKind, Limits, ReadOptions, Sequence, Split, TokenJob,
        Tokens,
    },
    rng::{Philox, Purpose},
};

use crate::support::{
    golden,
    runs::{assert_same, outcome, small, train_command},
    temp_dir,
};

const LIMITS: Limits = Limits { max_length: 40, vocab: 1000, eos: None, skip_bad: 2 };

/// A model folder's tokenizer.
fn tokenizer() -> Tokenizer {
    Tokenizer::open(&golden::path("../../examples/quickstart/model")).unwrap()
}

/// Rows of each kind; the texts of some are long, bad or equal.
fn lines(kind: ExampleKind) -> String {
    let text = |i: usize| format!("row {i}: {}", "the cat sat on it. ".repeat(i % 13));
    let row = |i: usize| match kind {
        _ if i == 77 => "{\"nothing\": 1}".to_owned(),
        ExampleKind::Texts { .. } | ExampleKind::Scored => {
            format!("{{\"prompt\": {:?}, \"completion\": {:?}}}", text(i), text(i + 5))
        }
        ExampleKind::Pairs { .. } if i.is_multiple_of(3) => format!(
            "{{\"prompt\": {:?}, \"chosen\": {:?}, \"rejected\": {:?}, \"margin\": {}.5}}",
            text(i),
            text(i + 1),
            text(i + 2 - 2 * (i % 2)),
            i
        ),
        ExampleKind::Pairs { .. } => format!(
            "{{\"prompt\": {:?}, \"chosen\": {:?}, \"rejected\": {:?}}}",
            text(i),
            text(i + 1),
            text(i + 1)
        ),
        ExampleKind::Judged => {
            format!(
                "{{\"prompt\": {:?}, \"completion\": {:?}, \"label\": {}}}",
                text(i),
                text(i),
                i % 4
            )
        }
        ExampleKind::Prompts { .. } => format!("{{\"prompt\": {:?}, \"answer\": {i}}}", text(i)),
    };
    (0..1000).map(|i| row(i) + "\n").collect()
}

const KINDS: [ExampleKind; 6] = [
    ExampleKind::Texts { completion_only: true },
    ExampleKind::Pairs { seed: 3, policy: true },
    ExampleKind::Pairs { seed: 3, policy: false },
    ExampleKind::Judged,
    ExampleKind::Prompts { tokens: None },
    ExampleKind::Scored,
];

/// Everything that is known of a store.
fn told(tokens: &Tokens) -> String {
    let s = &tokens.store;
    let all: Vec<Sequence> = s.sequences().collect();
    let each: Vec<_> =
        (0..s.len()).map(|i| (s.margin(i), s.label(i), s.file(i), s.columns(i))).collect();
    let omissions: Vec<String> = s.omissions().map(|o| o.to_string()).collect();
    format!("{all:?} {each:?} {omissions:?} {:?} {:?}", s.about, s.first_margin())
}

fn inputs(path: &Path) -> Vec<DataInput> {
    data::find(path, &ReadOptions::default()).unwrap().inputs
}

/// Rows as all at once and in memory; from a file; from a file that was there: the same.
#[test]
fn tokens_from_the_cache_are_those_that_were_made() {
    let (dir, t) = (temp_dir("tokens_same"), tokenizer());
    let limits = Limits { vocab: t.vocab(), ..LIMITS };
    let skip = ReadOptions { skip_bad: 2, ..ReadOptions::default() };
    for (i, kind) in KINDS.into_iter().enumerate() {
        let path = dir.join(format!("{i}.jsonl"));
        fs::write(&path, lines(kind)).unwrap();
        let (inputs, cache) = (inputs(&path), dir.join("cache"));
        let has_columns = matches!(kind, ExampleKind::Prompts { .. });
        let rewards = if has_columns { ColumnsRead::All } else { ColumnsRead::None };
        let skip = ReadOptions { rewards, ..skip.clone() };
        let job = TokenJob {
            inputs: &inputs,
            options: &skip,
            tokenizer: Some(&t),
            limits,
            kind,
            split: None,
        };
        let run = |cache: Option<&Path>| job.run(cache, &mut |_, _| {}).unwrap();
        let (memory, made, found) = (run(None), run(Some(&cache)), run(Some(&cache)));
        assert_eq!([memory.cached, made.cached, found.cached], [false, false, true], "{kind:?}");
        assert_eq!(told(&memory), told(&made), "{kind:?}");
        assert_eq!(told(&made), told(&found), "{kind:?}");
        let records = data::read_as(&path, &skip).unwrap();
        let plain = data::examples(&records, Some(&t), limits, kind).unwrap();
        let store = &found.store;
        assert!(store.sequences().eq(plain.sequences.iter().cloned()), "{kind:?}");
        assert_eq!(store.len(), plain.len(), "{kind:?}");
        assert_eq!(store.digest() == plain.digest(), !has_columns, "{kind:?}");
        assert_eq!(store.columns(5).get("answer").is_some(), has_columns, "{kind:?}");
        assert_eq!((store.about.stats, store.longest()), (plain.stats, plain.longest()));
        assert!((0..store.len()).map_while(|i| store.label(i)).eq(plain.labels.iter().copied()));
        assert_eq!(store.omissions().collect::<Vec<_>>(), plain.omissions, "{kind:?}");
        assert_eq!((store.about.unread.count, store.about.records), (1, 999), "{kind:?}");
    }
}

/// Whatever the tokens are made of is in their name.
#[test]
fn other_settings_make_other_tokens() {
    let (dir, t) = (temp_dir("tokens_key"), tokenizer());
    let (path, cache) = (dir.join("a.jsonl"), dir.join("cache"));
    fs::write(&path, "{\"text\": \"one two three\"}\n{\"text\": \"four\"}\n").unwrap();
    let (all, options) = (inputs(&path), ReadOptions::default());
    let job = TokenJob {
        inputs: &all,
        options: &options,
        tokenizer: Some(&t),
        limits: Limits { vocab: t.vocab(), ..LIMITS },
        kind: ExampleKind::Texts { completion_only: true },
        split: None,
    };
    let cached = |job: &TokenJob<'_>| job.run(Some(&cache), &mut |_, _| {}).unwrap().cached;
    assert!(!cached(&job) && cached(&job));
    let mut chatml = tokenizer();
    chatml.set_template(&dir, Some("chatml")).unwrap();
    let chats = ReadOptions { chats: true, ..ReadOptions::default() };
    let limits = |change: &dyn Fn(&mut Limits)| {
        let mut limits = job.limits;
        change(&mut limits);
        limits
    };
    let split = |seed| Some(Split { share: 1.0, seed, held_out: true });
    let others = [
        TokenJob { tokenizer: Some(&chatml), ..job.clone() },
        TokenJob { options: &chats, ..job.clone() },
        TokenJob { limits: limits(&|l| l.max_length = 2), ..job.clone() },
        TokenJob { limits: limits(&|l| l.eos = Some(1)), ..job.clone() },
        TokenJob { limits: limits(&|l| l.vocab += 1), ..job.clone() },
        TokenJob { kind: ExampleKind::Texts { completion_only: false }, ..job.clone() },
        TokenJob { kind: ExampleKind::Scored, ..job.clone() },
        TokenJob { split: split(1), ..job.clone() },
        TokenJob { split: split(2), ..job.clone() },
    ];
    for (i, other) in others.iter().enumerate() {
        assert!(!cached(other) && cached(other), "{i}");
    }
    // Content counts, not the time of the file; so does the name, which messages have.
    let text = fs::read(&path).unwrap();
    fs::write(&path, &text).unwrap();
    assert!(cached(&job));
    fs::write(&path, [&text[..], b"{\"text\": \"five\"}\n"].concat()).unwrap();
    let longer = inputs(&path);
    assert!(!cached(&TokenJob { inputs: &longer, ..job.clone() }));
    let other = dir.join("b.jsonl");
    fs::write(&other, &text).unwrap();
    let named = inputs(&other);
    assert!(!cached(&TokenJob { inputs: &named, ..job.clone() }));
}

/// The only entry of a cache.
fn entry(cache: &Path) -> std::path::PathBuf {
    let all: Vec<_> =
        fs::read_dir(cache.join("tokens")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0].clone()
}

/// A file that was cut, or of which bits changed, is made again; so is one whose checksum was made
/// to fit. Nothing that was changed is trained on, and nothing panics.
#[test]
fn a_damaged_cache_is_made_again() {
    let (dir, t) = (temp_dir("tokens_damaged"), tokenizer());
    let (path, cache) = (dir.join("a.jsonl"), dir.join("cache"));
    let kind = ExampleKind::Pairs { seed: 0, policy: true };
    fs::write(&path, lines(kind).lines().take(40).collect::<Vec<_>>().join("\n")).unwrap();
    let (all, options) = (inputs(&path), ReadOptions::default());
    let limits = Limits { vocab: t.vocab(), ..LIMITS };
    let (tokenizer, split) = (Some(&t), None);
    let job = TokenJob { inputs: &all, options: &options, tokenizer, limits, kind, split };
    let run = || job.run(Some(&cache), &mut |_, _| {}).unwrap();
    let want = told(&run());
    let name = entry(&cache);
    let good = fs::read(&name).unwrap();
    let draw = Philox::new(5, 0, 0, Purpose::Init);
    for i in 0..200u32 {
        let mut bytes = good.clone();
        let at = draw.below(3 * i, bytes.len() as u32) as usize;
        match i % 4 {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << draw.below(3 * i + 1, 8),
            2 => bytes.truncate(at & !3),
            _ => bytes.extend([0; 4]),
        }
        fs::write(&name, &bytes).unwrap();
        let again = run();
        assert!(!again.cached && told(&again) == want, "{i}");
        assert_eq!(fs::read(entry(&cache)).unwrap(), good, "{i}");
    }
    // One that somebody made: the checksum fits.
    let (mut cached, words) = (0, good.len() / 4 - 8);
    for i in 0..400u32 {
        let mut bytes = good[..4 * words].to_vec();
        let at = match i % 2 {
            0 => 4 * draw.below(5000 + 2 * i, words as u32) as usize,
            // the counts
            _ => 4 * (words - 1 - draw.below(5000 + 2 * i, 10) as usize),
        };
        let value = [0, 1, u32::MAX, 1 << 20, 7][draw.below(9000 + i, 5) as usize];
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        use sha2::Digest;
        let sum = sha2::Sha256::digest(&bytes);
        bytes.extend(sum);
        fs::write(&name, &bytes).unwrap();
        let again = run();
        cached += u32::from(again.cached);
        let vocab = t.vocab();
        let sound = |s: Sequence| {
            let end = s.ids.len();
            s.ids.iter().all(|id| (*id as usize) < vocab)
                && s.predicted.iter().all(|r| r.start > 0 && r.start < r.end && r.end <= end)
        };
        assert!(again.store.sequences().all(sound), "{i}");
        told(&again);
    }
    assert!(cached < 300, "{cached} of 400");
}

/// A folder in which nothing can be made is no error.
#[test]
fn a_cache_that_cannot_be_written_is_a_warning() -> Result<()> {
    let (dir, t) = (temp_dir("tokens_readonly"), tokenizer());
    let path = dir.join("a.jsonl");
    let kind = ExampleKind::Texts { completion_only: true };
    fs::write(&path, lines(kind).lines().take(70).collect::<Vec<_>>().join("\n")).unwrap();
    let (all, options) = (inputs(&path), ReadOptions::default());
    let limits = Limits { vocab: t.vocab(), ..LIMITS };
    let (tokenizer, split) = (Some(&t), None);
    let job = TokenJob { inputs: &all, options: &options, tokenizer, limits, kind, split };
    let want = told(&job.run(None, &mut |_, _| {})?);
    // A file has its name: no folder can be made.
    fs::write(dir.join("file"), "").unwrap();
    for cache in [dir.join("file"), Path::new("/proc/self").to_owned()] {
        let made = job.run(Some(&cache), &mut |_, _| {})?;
        let warning = made.warning.as_ref().unwrap();
        assert!(warning.starts_with("tokens are not kept for the next start: cannot create"));
        assert_eq!(told(&made), want);
    }
    Ok(())
}

/// Eight threads that make the same tokens at once all have them, and leave one entry.
#[test]
fn processes_share_a_cache() {
    let (dir, t) = (temp_dir("tokens_shared"), tokenizer());
    let (path, cache) = (dir.join("a.jsonl"), dir.join("cache"));
    let kind = ExampleKind::Texts { completion_only: true };
    fs::write(&path, lines(kind).lines().take(70).collect::<Vec<_>>().join("\n")).unwrap();
    let (all, options) = (inputs(&path), ReadOptions::default());
    let limits = Limits { vocab: t.vocab(), ..LIMITS };
    let (tokenizer, split) = (Some(&t), None);
    let job = TokenJob { inputs: &all, options: &options, tokenizer, limits, kind, split };
    let want = told(&job.run(None, &mut |_, _| {}).unwrap());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let made = job.run(Some(&cache), &mut |_, _| {}).unwrap();
                assert!(made.warning.is_none() && told(&made) == want);
            });
        }
    });
    entry(&cache);
}

/// A run has the same bits without a cache, when it fills one, and when it uses one.
#[test]
fn a_run_has_the_same_bits_with_and_without_a_cache() {
    let dir = temp_dir("tokens_runs");
    let cache = dir.join("cache");
    let run = |name: &str, cache: Option<&Path>| {
        let mut pairs = small(&dir, "dpo", &dir.join(name));
        pairs.extend(["steps=5".to_owned(), "validation_split=9".into()]);
        let mut command = train_command("dpo", &pairs);
        if let Some(cache) = cache {
            command.env("WARPO_CACHE", cache);
        }
        assert!(command.status().unwrap().success(), "{name}");
        outcome(&dir.join(name))
    };
    let without = run("without", None);
    assert!(!cache.exists());
    assert_same("made", &without, &run("made", Some(&cache)));
    assert_eq!(fs::read_dir(cache.join("tokens")).unwrap().count(), 2, "both sides of the split");
    assert_same("found", &without, &run("found", Some(&cache)));
}
