//! Examples to sequences and columns.

use warpo::{
    algorithms::{Columns, Inputs, Sampling},
    data::Limits,
    ops::sample,
    train::{
        Settings,
        feed::{Examples, Sequence, order},
    },
};

use crate::support::temp_dir;

const TEXTS: Inputs = Inputs::Texts { completion_only: true };
const LIMITS: Limits = Limits { max_length: 50, vocab: 100, eos: None };

fn load(test: &str, inputs: Inputs, files: &[&str]) -> warpo::Result<Examples> {
    let dir = temp_dir(&format!("feed_{test}"));
    let names: Vec<String> =
        (0..files.len()).map(|i| dir.join(format!("{i}.jsonl")).display().to_string()).collect();
    names.iter().zip(files).for_each(|(name, text)| std::fs::write(name, text).unwrap());
    let settings = Settings::default();
    Examples::load(&names, &inputs, None, LIMITS, &settings).map(|(examples, _)| examples)
}

#[test]
fn texts_become_sequences_with_a_weight_a_token() {
    let files = [
        "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5]}\n",
        "{\"input_ids\": [6, 7, 8, 9], \"labels\": [-100, 7, -100, 9]}\n",
    ];
    let all = load("texts", TEXTS, &files).unwrap();
    assert_eq!((all.len(), all.longest(), all.is_empty()), (3, 4, false));
    let (sequences, columns) = all.sequences(&[2, 0, 2], 40).unwrap();
    let masked = Sequence { ids: vec![6, 7, 8, 9], predicted: vec![1..2, 3..4] };
    let whole = Sequence { ids: vec![1, 2, 3], predicted: std::iter::once(1..3).collect() };
    assert_eq!((masked.tokens(), whole.tokens()), (2, 2));
    assert_eq!(sequences, [masked.clone(), whole, masked]);
    assert_eq!(columns.samples, [40, 41, 42]);
    assert_eq!((columns.offsets, columns.weights), (vec![0, 2, 4, 6], vec![1.0; 6]));
}

#[test]
fn pairs_lie_side_by_side_with_their_margin() {
    let pair = |p: u32, c: u32, r: u32, m: &str| {
        format!("{{\"prompt_ids\": [{p}], \"chosen_ids\": [{c}], \"rejected_ids\": [{r}, 9]{m}}}\n")
    };
    let text = pair(1, 2, 3, ", \"margin\": 0.5") + &pair(4, 5, 6, "") + &pair(7, 8, 9, "");
    let all = load("pairs", Inputs::Pairs, &[&text]).unwrap();
    assert_eq!((all.len(), all.longest()), (3, 3));
    let (sequences, columns) = all.sequences(&[1, 0], 6).unwrap();
    let ids: Vec<&[u32]> = sequences.iter().map(|s| &s.ids[..]).collect();
    assert_eq!(ids, [&[4, 5][..], &[4, 6, 9], &[1, 2], &[1, 3, 9]]);
    // one scalar a sequence; a pair without a margin has margin 0 beside one that has it
    assert_eq!((columns.offsets, columns.margins), (vec![0, 1, 2, 3, 4], vec![0.0, 0.5]));
    assert_eq!(columns.samples, [6, 7, 8, 9]);
    assert!(columns.weights.is_empty());
    assert!(all.sequences(&[1, 2], 0).unwrap().1.margins.is_empty());
}

#[test]
fn prompts_must_be_continued_first() {
    let prompts = Inputs::Prompts(Sampling {
        samples_per_prompt: 1,
        max_new_tokens: 4,
        params: sample::Params::default(),
        slots: 1,
        reward_model: None,
    });
    let all = load("prompts", prompts, &["{\"input_ids\": [1, 2, 3]}\n"]).unwrap();
    assert_eq!((all.len(), all.longest()), (1, 3));
    assert!(all.sequences(&[0], 0).is_none());
}

#[test]
fn data_that_teaches_nothing_is_named() {
    let files = ["{\"input_ids\": [1]}\n{\"input_ids\": []}\n", "{\"input_ids\": [2]}\n"];
    let error = load("nothing", TEXTS, &files).unwrap_err().to_string();
    assert!(
        error.ends_with(": got 3 records, all dropped, wanted at least one example"),
        "{error}"
    );
    assert!(error.contains("0.jsonl, ") && error.contains("1.jsonl: "), "{error}");
    // ids beyond the vocabulary, in the second file
    let files = ["{\"input_ids\": [1, 2]}\n", "\n{\"input_ids\": [1, 100]}\n"];
    let error = load("nothing", TEXTS, &files).unwrap_err().to_string();
    assert!(error.ends_with("1.jsonl:2: has token id 100, wanted less than 100"), "{error}");
}

/// What a checkpoint remembers of the data: every token, and where each sequence ends.
#[test]
fn the_digest_is_of_all_tokens() {
    let digest = |inputs, text: &str| load("digest", inputs, &[text]).unwrap().digest();
    let texts = |text| digest(TEXTS, text);
    let a = texts("{\"input_ids\": [1, 2, 3, 4]}\n");
    assert_eq!(a, texts("\n{\"input_ids\": [1, 2, 3, 4], \"note\": 1}"));
    assert_ne!(a, texts("{\"input_ids\": [1, 2, 3, 5]}"));
    assert_ne!(a, texts("{\"input_ids\": [1, 2]}\n{\"input_ids\": [3, 4]}"));
    let pair = |c, r| {
        let text =
            format!("{{\"prompt_ids\": [1], \"chosen_ids\": [{c}], \"rejected_ids\": [{r}]}}");
        digest(Inputs::Pairs, &text)
    };
    assert_ne!(pair(2, 3), pair(3, 2));
}

#[test]
fn the_order_follows_seed_and_shuffle() {
    let text: String = (0..20).map(|i| format!("{{\"input_ids\": [{i}, 1]}}\n")).collect();
    let all = load("order", TEXTS, &[&text]).unwrap();
    let settings = |seed, shuffle| Settings { seed, shuffle, ..Settings::default() };
    let draw = |s: &Settings| order(&all, s).batch(0, 20);
    assert!(draw(&settings(3, false)).into_iter().eq(0..20));
    assert_ne!(draw(&settings(3, true)), draw(&settings(4, true)));
    assert_eq!(draw(&settings(3, true)), draw(&settings(3, true)));
}

/// A minibatch has the columns of its sequences, in its order; what no loss asked for stays empty.
#[test]
fn a_minibatch_keeps_what_belongs_together() {
    let columns = Columns {
        samples: vec![7, 8, 9],
        offsets: vec![0, 2, 3, 6],
        old_logp: vec![0.0, 1.0, 10.0, 20.0, 21.0, 22.0],
        scores: vec![0.5, 1.5, 2.5],
        stopped: vec![true, false, false],
        ..Columns::default()
    };
    assert_eq!((columns.sequences(), columns.tokens(), columns.span(&(1..3))), (3, 6, 2..6));
    let of: Vec<usize> = (0..6).map(|t| columns.sequence_of(t)).collect();
    assert_eq!(of, [0, 0, 1, 2, 2, 2]);
    let mini = columns.subset(&[2, 0]);
    assert_eq!((mini.samples, mini.offsets), (vec![9, 7], vec![0, 3, 5]));
    assert_eq!(mini.old_logp, [20.0, 21.0, 22.0, 0.0, 1.0]);
    assert_eq!((mini.scores, mini.stopped), (vec![2.5, 0.5], vec![false, true]));
    assert!(mini.ref_logp.is_empty() && mini.weights.is_empty());
}
