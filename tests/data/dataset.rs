//! Records to token sequences: what is learned, what is cut, and that all of it is counted; and the
//! order in which examples are drawn.

use std::path::Path;

use warpo::{
    Error,
    data::{
        self, DataPlace, Dataset, DatasetStats, DrawOrder, Limits, Located, Record, Sequence,
        Tokenizer,
    },
    train::{self, Observer, Settings},
};

use crate::support::{
    golden,
    runs::{entry, small, warpo},
    temp_dir,
};

/// The tokenizer of the quick-start: BOS 1, EOS 2.
fn tokenizer() -> Tokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart/model");
    Tokenizer::open(&dir).unwrap()
}

fn located(records: impl IntoIterator<Item = Record>) -> Vec<Located> {
    let at = |(record, line)| Located { place: place(line), record, columns: Default::default() };
    records.into_iter().zip(1..).map(at).collect()
}

fn place(line: usize) -> DataPlace {
    DataPlace { path: Path::new("data.jsonl").into(), line }
}

const LIMITS: Limits = Limits { max_length: 100, vocab: 512, eos: Some(2), skip_bad: 0 };

fn text(s: &str) -> Record {
    Record::Text { text: s.into() }
}

fn labelled(s: &str, label: i32) -> Record {
    Record::Labelled { text: s.into(), label: label.into() }
}

fn completion(prompt: &str, completion: &str) -> Record {
    Record::Completion { prompt: prompt.into(), completion: completion.into() }
}

fn preference(prompt: &str, chosen: &str, rejected: &str, margin: Option<f64>) -> Record {
    let text = str::to_owned;
    Record::Preference {
        prompt: text(prompt),
        chosen: text(chosen),
        rejected: text(rejected),
        margin,
    }
}

/// The text of a line.
fn learned(line: usize, ids: &[u32], learn: &[(usize, usize)]) -> Sequence {
    let predicted = learn.iter().map(|(from, to)| *from..*to).collect();
    Sequence { ids: ids.to_vec(), predicted, place: place(line) }
}

/// Ids of all sequences.
fn all_ids(data: &Dataset) -> Vec<&[u32]> {
    data.sequences.iter().map(|s| &s.ids[..]).collect()
}

fn ids(n: std::ops::Range<u32>) -> Record {
    Record::Ids { input_ids: n.collect() }
}

#[test]
fn texts_are_learned_whole_and_completions_after_their_prompt() {
    let t = tokenizer();
    let (prompt, end) =
        (t.encode_start("Once upon").unwrap(), t.encode_continuation(" a time").unwrap());
    let joined = [&prompt[..], &end, &[2]].concat();
    let whole = [&t.encode_start("Once upon a time").unwrap()[..], &[2]].concat();
    let one = |record: Record, completion_only| {
        data::texts(&located([record]), Some(&t), LIMITS, completion_only)
            .unwrap()
            .sequences
            .remove(0)
    };
    for record in [text("Once upon a time"), labelled("Once upon a time", 7)] {
        for only in [true, false] {
            let want = learned(1, &whole, &[(1, whole.len())]);
            assert_eq!(one(record.clone(), only), want);
        }
    }
    for record in
        [completion("Once upon", " a time"), preference("Once upon", " a time", " a day", None)]
    {
        let n = joined.len();
        let want = |from| learned(1, &joined, &[(from, n)]);
        assert_eq!(one(record.clone(), true), want(prompt.len()));
        assert_eq!(one(record, false), want(1));
    }
    // ids are taken as they are: no BOS, no EOS; -100 is not learned, the first token never
    let learn = vec![true, false, true, true, false];
    let record = Record::LabelledIds { input_ids: vec![9, 8, 7, 6, 5], learn };
    assert_eq!(one(record, true), learned(1, &[9, 8, 7, 6, 5], &[(2, 3), (3, 4)]));
    assert_eq!(one(ids(5..8), true), learned(1, &[5, 6, 7], &[(1, 3)]));
    // without an EOS id nothing is appended
    let limits = Limits { eos: None, ..LIMITS };
    let texts = data::texts(&located([text("a")]), Some(&t), limits, true).unwrap();
    assert_eq!(texts.sequences[0].ids, t.encode_start("a").unwrap());
}

#[test]
fn what_is_cut_or_left_out_is_counted() {
    let limits = Limits { max_length: 4, ..LIMITS };
    let never = Record::LabelledIds { input_ids: vec![1, 2, 3], learn: vec![true, false, false] };
    let late = Record::LabelledIds {
        input_ids: vec![1, 2, 3, 4, 5, 6],
        learn: vec![false, false, false, false, true, true],
    };
    let across = Record::LabelledIds {
        input_ids: vec![1, 2, 3, 4, 5, 6],
        learn: vec![false, true, false, true, true, true],
    };
    let records = [ids(0..4), ids(0..5), ids(0..1), ids(0..0), never, late, across];
    let texts = data::texts(&located(records), None, limits, true).unwrap();
    let want = [
        learned(1, &[0, 1, 2, 3], &[(1, 4)]),
        learned(2, &[0, 1, 2, 3], &[(1, 4)]),
        learned(7, &[1, 2, 3, 4], &[(1, 2), (3, 4)]),
    ];
    assert_eq!(texts.sequences, want);
    assert_eq!(texts.stats, DatasetStats { examples: 3, tokens: 12, truncated: 3, dropped: 4 });
    let said = |d: &Dataset| d.omissions.iter().map(ToString::to_string).collect::<Vec<_>>();
    let want = [
        "2 examples are cut at the end: longer than max_length (the first: data.jsonl:2)",
        "3 examples are dropped: nothing to learn (the first: data.jsonl:3)",
        "1 example is dropped: nothing to learn within max_length (data.jsonl:6)",
    ];
    assert_eq!(said(&texts), want);

    // of a pair either side may be cut; two equal sides teach nothing
    let pair = |chosen: &[u32], rejected: &[u32]| Record::PreferenceIds {
        prompt: vec![7, 8],
        chosen: chosen.to_vec(),
        rejected: rejected.to_vec(),
        margin: None,
    };
    let records = [
        pair(&[1, 2], &[3]),
        pair(&[1], &[2, 3, 4]),
        pair(&[1, 2, 3], &[1, 2, 4]),
        pair(&[5], &[5]),
    ];
    let pairs = data::pairs(&located(records), None, limits, 0).unwrap();
    let side = |line, ids: &[u32]| learned(line, ids, &[(2, ids.len())]);
    let want =
        [side(1, &[7, 8, 1, 2]), side(1, &[7, 8, 3]), side(2, &[7, 8, 1]), side(2, &[7, 8, 2, 3])];
    assert_eq!((&pairs.sequences[..], &pairs.margins[..]), (&want[..], &[None, None][..]));
    let want = DatasetStats { examples: 2, tokens: 14, truncated: 2, dropped: 2 };
    assert_eq!(pairs.stats, want);
    let want = [
        "1 example is cut at the end: longer than max_length (data.jsonl:2)",
        "1 example is dropped: chosen and rejected are equal within max_length (data.jsonl:3)",
        "1 example is dropped: chosen and rejected are equal (data.jsonl:4)",
    ];
    assert_eq!(said(&pairs), want);

    // prompts lose their beginning
    let prompts =
        data::prompts(&located([ids(0..6), ids(0..2), ids(0..0)]), None, limits, None).unwrap();
    assert_eq!(all_ids(&prompts), [&[2, 3, 4, 5][..], &[0, 1]]);
    assert_eq!(prompts.stats, DatasetStats { examples: 2, tokens: 6, truncated: 1, dropped: 1 });
    let want = [
        "1 example is cut at the beginning: longer than max_length (data.jsonl:1)",
        "1 example is dropped: no tokens (data.jsonl:3)",
    ];
    assert_eq!(said(&prompts), want);
}

#[test]
fn pairs_hold_prompt_and_completion_with_eos() {
    let t = tokenizer();
    let join = |completion: &str| {
        let (p, c) =
            (t.encode_start("A story:").unwrap(), t.encode_continuation(completion).unwrap());
        [&p[..], &c, &[2]].concat()
    };
    let records = [
        preference("A story:", " good", " bad", Some(1.5)),
        preference("A story:", "", " bad", None),
    ];
    let pairs = data::pairs(&located(records), Some(&t), LIMITS, 0).unwrap();
    let want = [join(" good"), join(" bad"), join(""), join(" bad")];
    assert_eq!(all_ids(&pairs), want);
    assert_eq!(pairs.margins, [Some(1.5), None]);
    let start = t.encode_start("A story:").unwrap().len();
    for s in &pairs.sequences {
        assert_eq!(s.predicted, std::slice::from_ref(&(start..s.ids.len())));
    }
    let tokens = want.iter().map(Vec::len).sum();
    assert_eq!(pairs.stats, DatasetStats { examples: 2, tokens, truncated: 0, dropped: 0 });
    // ids are taken as they are
    let (prompt, chosen, rejected) = (vec![9], vec![1], vec![]);
    let record = Record::PreferenceIds { prompt, chosen, rejected, margin: Some(-2.0) };
    let pairs = data::pairs(&located([record]), None, LIMITS, 0).unwrap();
    assert_eq!(pairs.sequences, [learned(1, &[9, 1], &[(1, 2)]), learned(1, &[9], &[])]);
    assert_eq!(pairs.margins, [Some(-2.0)]);
}

/// Every text with the highest label once (the shorter side repeats), drawn by the seed alone.
#[test]
fn labelled_texts_are_paired_each_once() {
    let t = tokenizer();
    let whole = |s: &str| [&t.encode_start(s).unwrap()[..], &[2]].concat();
    let good: Vec<String> = (0..20).map(|i| format!("good {i}")).collect();
    let bad: Vec<String> = (0..7).map(|i| format!("bad {i}")).collect();
    let records =
        located(good.iter().map(|s| labelled(s, 1)).chain(bad.iter().map(|s| labelled(s, -1))));
    let draw = |seed| data::pairs(&records, Some(&t), LIMITS, seed).unwrap();
    let pairs = draw(3);
    assert_eq!((pairs.len(), pairs.stats.dropped), (20, 0));
    let side = |i| pairs.sequences.iter().skip(i).step_by(2).map(|s| s.ids.clone());
    let mut chosen: Vec<_> = side(0).collect();
    assert!(chosen != good.iter().map(|s| whole(s)).collect::<Vec<_>>(), "they are drawn");
    chosen.sort();
    let mut want: Vec<_> = good.iter().map(|s| whole(s)).collect();
    want.sort();
    assert_eq!(chosen, want);
    for s in &bad {
        let times = side(1).filter(|ids| *ids == whole(s)).count();
        assert!((2..=3).contains(&times), "{s}: {times}");
    }
    assert_eq!(draw(3), pairs);
    assert_ne!(draw(4), pairs);
    assert!(pairs.margins.iter().all(Option::is_none));
    // each says which two lines it was drawn from: the good ones are 1 to 20
    for i in 0..pairs.len() {
        let [good, bad] = pairs.example(i) else { panic!("a pair is two sequences") };
        assert_eq!(good.ids, whole(&format!("good {}", good.place.line - 1)));
        assert_eq!(bad.ids, whole(&format!("bad {}", bad.place.line - 21)));
    }
}

/// A fixed bug: preferences were lost where labelled texts stood beside them, and texts with labels
/// between the extremes were left out without being counted.
#[test]
fn preferences_stay_beside_labelled_texts_and_middle_labels_are_counted() {
    let t = tokenizer();
    let records = located([
        preference("p", " c", " r", None),
        labelled("five", 5),
        labelled("three", 3),
        labelled("four", 4),
        labelled("one", 1),
    ]);
    let pairs = data::pairs(&records, Some(&t), LIMITS, 0).unwrap();
    assert_eq!((pairs.len(), pairs.stats.examples, pairs.stats.dropped), (2, 2, 2));
    let want = "2 examples are dropped: a label between the lowest and the highest (the first: data.jsonl:3)";
    assert_eq!(pairs.omissions[0].to_string(), want);
    let whole = |s: &str| [&t.encode_start(s).unwrap()[..], &[2]].concat();
    assert_eq!(all_ids(&pairs)[2..], [whole("five"), whole("one")]);
    let error = data::pairs(&records[1..2], Some(&t), LIMITS, 0).unwrap_err().to_string();
    assert_eq!(error, "labels of all texts: got only 5, wanted two or more");
}

/// Judgements of completions: the highest label is good, the lowest bad, what is between is
/// counted; both sides of a preference have one; nothing that may be bad is learned by SFT.
#[test]
fn judged_completions_are_good_or_bad() {
    let judged = |n: u32, label: f64| Record::Judged {
        completion: Box::new(Record::CompletionIds { prompt: vec![5, 6], completion: vec![n] }),
        label,
    };
    let pair =
        Record::PreferenceIds { prompt: vec![7], chosen: vec![8], rejected: vec![9], margin: None };
    let records = located([judged(20, 2.0), judged(21, 1.0), judged(22, 0.5), pair]);
    let data = data::judged(&records, None, LIMITS).unwrap();
    assert_eq!(all_ids(&data), [&[7, 8][..], &[7, 9], &[5, 6, 20], &[5, 6, 22]]);
    assert_eq!(data.labels, [true, false, true, false]);
    assert_eq!(data.sequences[2].predicted[0], 2..3, "not the prompt");
    assert_eq!((data.len(), data.stats.examples, data.stats.dropped), (4, 4, 1));
    let labels = |labels| Dataset { labels, ..data.clone() }.digest();
    assert_ne!(labels(vec![true, false, true, false]), labels(vec![true, false, false, true]));
    let fail = |records: &[Located]| data::judged(records, None, LIMITS).unwrap_err().to_string();
    assert_eq!(fail(&records[..1]), "labels of all texts: got only 2, wanted two or more");
    let texts = located([ids(3..7)]);
    let want = "has columns input_ids, wanted completions or texts with labels, or preferences";
    assert!(fail(&texts).ends_with(want), "{}", fail(&texts));
    let error = data::texts(&records[..1], None, LIMITS, true).unwrap_err().to_string();
    let want = "has `label` beside a completion: what is bad would be learned";
    assert!(error.ends_with(want), "{error}");
    // It may be scored, and gives its prompt.
    assert_eq!(all_ids(&data::scored(&records[..1], None, LIMITS).unwrap()), [[5, 6, 20]]);
    assert_eq!(all_ids(&data::prompts(&records[..1], None, LIMITS, None).unwrap()), [[5, 6]]);
}

/// A completion of which nothing is left has no log-prob: a policy does not see its pair.
#[test]
fn pairs_without_a_predicted_token_are_left_out_for_a_policy() {
    let pair = |n: u32, rejected: &[u32]| Record::PreferenceIds {
        prompt: vec![5, 6, 7],
        chosen: vec![n],
        rejected: rejected.to_vec(),
        margin: Some(f64::from(n)),
    };
    let records = located([pair(20, &[30]), pair(21, &[]), pair(22, &[31])]);
    let mut data = data::pairs(&records, None, LIMITS, 0).unwrap();
    assert_eq!(data.len(), 3, "a reward model reads all");
    data.keep_predicted();
    assert_eq!(data.margins, [Some(20.0), Some(22.0)]);
    assert_eq!(all_ids(&data)[2..], [[5, 6, 7, 22], [5, 6, 7, 31]]);
    let stats = DatasetStats { examples: 2, tokens: 16, truncated: 0, dropped: 1 };
    assert_eq!(data.stats, stats);
}

#[test]
fn prompts_come_from_prompts_or_from_the_first_tokens_of_texts() {
    let t = tokenizer();
    let prompt = t.encode_start("Once upon a time").unwrap();
    assert!(prompt.len() > 3);
    let one = |record: Record, tokens| {
        data::prompts(&located([record]), Some(&t), LIMITS, tokens).unwrap().sequences.remove(0)
    };
    for record in [
        Record::Prompt { prompt: "Once upon a time".into() },
        completion("Once upon a time", "x"),
        preference("Once upon a time", "x", "y", None),
    ] {
        // A fixed bug: `prompt_tokens` also cut the prompts of data that has prompts.
        for tokens in [None, Some(3)] {
            let p = one(record.clone(), tokens);
            assert_eq!(p.ids, prompt);
        }
    }
    for record in [text("Once upon a time"), labelled("Once upon a time", 0)] {
        assert_eq!(one(record.clone(), Some(3)).ids, prompt[..3]);
        assert_eq!(one(record.clone(), Some(99)).ids, prompt);
        let error = data::prompts(&located([record.clone()]), Some(&t), LIMITS, None);
        let want = format!(
            "data.jsonl:1: has columns {}, wanted prompts (or `prompt_tokens` to cut them from texts)",
            record.format()
        );
        assert_eq!(error.unwrap_err().to_string(), want);
    }
    assert_eq!(one(ids(5..9), None).ids, [5, 6, 7, 8]);
    assert_eq!(one(ids(5..9), Some(3)).ids, [5, 6, 7]);
}

#[test]
fn a_record_that_does_not_fit_is_named() {
    let t = tokenizer();
    let fail = |record: Record, which: &str, tokenizer: Option<&Tokenizer>| {
        let records = located([ids(5..6), record]);
        let records = &records[1..];
        let error = match which {
            "texts" => data::texts(records, tokenizer, LIMITS, true).map(drop),
            "pairs" => data::pairs(records, tokenizer, LIMITS, 0).map(drop),
            _ => data::prompts(records, tokenizer, LIMITS, Some(3)).map(drop),
        };
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Data { line: 2, .. }), "{error:?}");
        error.to_string().strip_prefix("data.jsonl:2: ").unwrap().to_owned()
    };
    let with = Some(&t);
    let prompt = || Record::Prompt { prompt: "p".into() };
    assert_eq!(fail(prompt(), "texts", with), "has columns prompt, wanted texts to learn");
    let want = "has columns text, wanted preferences, or texts with labels";
    assert_eq!(fail(text("a"), "pairs", with), want);
    let want = "has columns text, wanted prompts (or `prompt_tokens` to cut them from texts)";
    let error = data::prompts(&located([text("a")]), with, LIMITS, None).unwrap_err().to_string();
    assert_eq!(error, format!("data.jsonl:1: {want}"));
    // ids beyond the vocabulary, on any side
    let want = "has token id 512, wanted less than 512";
    assert_eq!(fail(ids(510..513), "texts", None), want);
    assert_eq!(fail(ids(510..513), "prompts", None), want);
    let pair = |prompt: u32, chosen: u32, rejected: u32| Record::PreferenceIds {
        prompt: vec![prompt],
        chosen: vec![chosen],
        rejected: vec![rejected],
        margin: None,
    };
    for record in [pair(512, 1, 2), pair(1, 512, 2), pair(1, 2, 512)] {
        assert_eq!(fail(record, "pairs", None), want);
    }
    let want = "is text, but the model folder has no tokenizer.json";
    for which in ["texts", "pairs", "prompts"] {
        assert_eq!(fail(labelled("a", 1), which, None), want);
    }
}

#[test]
fn the_digest_knows_structure_and_tokens() {
    let digest = |x: &[&[u32]]| {
        let sequences = x.iter().map(|ids| learned(1, ids, &[])).collect();
        Dataset { sequences, ..Dataset::default() }.digest()
    };
    let all = [
        digest(&[&[1, 2], &[3]]),
        digest(&[&[1], &[2, 3]]),
        digest(&[&[1, 2, 3]]),
        digest(&[&[3], &[1, 2]]),
        digest(&[&[1, 2], &[4]]),
        digest(&[&[1, 2], &[3], &[]]),
    ];
    for (i, a) in all.iter().enumerate() {
        assert!(all[..i].iter().all(|b| a != b), "{i}");
    }
}

/// What is said of the data when a run begins.
#[derive(Default)]
struct Notes(Vec<String>);

impl Observer for Notes {
    fn note(&mut self, line: &str) {
        self.0.push(line.into());
    }
}

#[test]
fn a_run_and_a_command_say_what_was_cut() {
    let dir = temp_dir("examples_said");
    let mut settings = Settings::default();
    let mut pairs = small(&dir, "sft", &dir.join("run"));
    pairs.extend(["max_length=10".into(), "steps=1".into()]);
    let path = dir.join("more.jsonl");
    std::fs::write(&path, "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [5]}\n").unwrap();
    pairs.push(format!("data=[{:?}, {:?}]", dir.join("sft.jsonl"), path));
    for pair in &pairs {
        warpo::config::set_pair(&mut [&mut settings], pair).unwrap();
    }
    let (sft, mut notes) = (entry("sft"), Notes::default());
    train::run(sft, &settings, &*(sft.section)(), &mut notes).unwrap();
    // 77 examples of 5 to 17 tokens
    let lens = (0..77).map(|i| 2 + (i * 7) % 13 + 3);
    let long = lens.clone().filter(|n| *n > 10).count();
    let tokens = lens.map(|n| n.min(10)).sum::<usize>() + 3;
    let want = format!("data: 78 examples, {tokens} tokens, {long} truncated, 1 dropped");
    assert!(notes.0.contains(&want), "{want}: {:?}", notes.0);

    let long = dir.join("long.jsonl");
    let line = format!("{{\"input_ids\": {:?}}}\n", vec![5; 127]);
    std::fs::write(&long, line).unwrap();
    let model = golden::path("llama_tied");
    let (model, long) = (model.to_str().unwrap(), long.to_str().unwrap());
    let args = ["generate", "--model", model, "--data", long, "--max-new-tokens", "3"];
    let out = warpo(&args).output().unwrap();
    let error = String::from_utf8(out.stderr).unwrap();
    let want = "warning: 1 prompts lost their beginning: longer than 125 tokens\n";
    assert!(out.status.success() && error.contains(want), "{error}");
}

#[test]
fn every_epoch_is_a_permutation_of_its_own() {
    for len in [1, 2, 7, 100] {
        let mut order = DrawOrder::new(len, 3, true);
        let epochs: Vec<Vec<usize>> = (0..4)
            .map(|e| (0..len as u64).map(|i| order.index(e * len as u64 + i)).collect())
            .collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..len), "{epoch:?}");
        }
        if len == 100 {
            assert!(epochs.windows(2).all(|w| w[0] != w[1]));
            assert!(!epochs[0].iter().copied().eq(0..len), "it is shuffled");
            let other = DrawOrder::new(len, 4, true).batch(0, len);
            assert_ne!(epochs[0], other, "the seed decides");
        }
    }
}

#[test]
fn file_order_on_request() {
    let mut order = DrawOrder::new(3, 9, false);
    assert_eq!(order.batch(0, 4), [0, 1, 2, 0]);
    assert_eq!(order.batch(1, 4), [1, 2, 0, 1]);
}

/// Steps flow over the ends of epochs, and any step can be asked for first, or again.
#[test]
fn randomness_is_addressed_not_consumed() {
    let mut straight = DrawOrder::new(10, 5, true);
    let steps: Vec<Vec<usize>> = (0..25).map(|s| straight.batch(s, 4)).collect();
    let all = steps.concat();
    for epoch in all.chunks_exact(10) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..10));
    }
    for step in (0..25).rev() {
        assert_eq!(DrawOrder::new(10, 5, true).batch(step, 4), steps[step as usize]);
        assert_eq!(straight.batch(step, 4), steps[step as usize]);
    }
    // another batch size draws the same examples in the same order
    let mut other = DrawOrder::new(10, 5, true);
    assert_eq!((0..20).flat_map(|s| other.batch(s, 5)).collect::<Vec<_>>(), all);
}
