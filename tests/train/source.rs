//! The sequences of a step, and the columns that models fill for any source.

use std::sync::{Arc, Mutex};

use warpo::{
    Result,
    algorithms::{Algorithm, Columns, Inputs, Metrics, MicroBatch, Needs, Sampling},
    config,
    data::{Limits, Sequence},
    device::{Device, View, ViewMut},
    models::{Batch, Head, Model, Pass},
    rollout::{Completion, Scorer},
    train::{
        DataFile, Settings, Silent, Trainer,
        source::{Source, StepData},
    },
};

use crate::support::{assert_bits, golden, host, losses::build, room, runs::small, temp_dir};

const TEXTS: Inputs = Inputs::Texts { completion_only: true };
const LIMITS: Limits = Limits { max_length: 50, vocab: 100, eos: None, skip_bad: 0 };

/// A source of these files in file order, `batch` examples a step; `policy`: heads read tokens.
fn load(test: &str, needs: &Needs, files: &[&str], batch: usize) -> Result<Source> {
    let dir = temp_dir(&format!("source_{test}"));
    let names: Vec<String> =
        (0..files.len()).map(|i| dir.join(format!("{i}.jsonl")).display().to_string()).collect();
    names.iter().zip(files).for_each(|(name, text)| std::fs::write(name, text).unwrap());
    let settings = Settings { batch_size: batch, shuffle: false, ..Settings::default() };
    let names: Vec<_> = names.iter().map(DataFile::from).collect();
    Source::load(&names, needs, None, LIMITS, &settings)
}

fn policy(inputs: Inputs) -> Needs {
    Needs { policy: true, ..Needs::of(inputs) }
}

fn ids(data: &StepData) -> Vec<&[u32]> {
    data.sequences.iter().map(|s| &s.ids[..]).collect()
}

#[test]
fn texts_become_sequences_with_a_weight_a_token() {
    let files = [
        "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5]}\n",
        "{\"input_ids\": [6, 7, 8, 9], \"labels\": [-100, 7, -100, 9]}\n",
    ];
    let mut all = load("texts", &policy(TEXTS), &files, 2).unwrap();
    assert_eq!((all.data.len(), all.data.longest()), (3, 4));
    let data = all.draw(2, 2);
    assert_eq!(ids(&data), [&[6, 7, 8, 9][..], &[1, 2, 3]]);
    let predicted = |i: usize| &data.sequences[i].predicted[..];
    assert_eq!((predicted(0), predicted(1)), (&[1..2, 3..4][..], std::slice::from_ref(&(1..3))));
    assert!(data.sequences.iter().all(|s: &Sequence| s.tokens() == 2));
    let c = data.columns;
    assert_eq!((c.samples, c.offsets, c.weights), (vec![2, 3], vec![0, 2, 4], vec![1.0; 4]));
}

/// A head that reads the last token has one number a sequence, a policy one a predicted token.
#[test]
fn pairs_lie_side_by_side_with_their_margin() {
    let pair = |p: u32, c: u32, r: u32, m: &str| {
        format!("{{\"prompt_ids\": [{p}], \"chosen_ids\": [{c}], \"rejected_ids\": [{r}, 9]{m}}}\n")
    };
    let text = pair(4, 5, 6, "") + &pair(1, 2, 3, ", \"margin\": 0.5") + &pair(7, 8, 9, "");
    let mut all = load("pairs", &Needs::of(Inputs::Pairs), &[&text], 2).unwrap();
    let data = all.draw(0, 2);
    assert_eq!(ids(&data), [&[4, 5][..], &[4, 6, 9], &[1, 2], &[1, 3, 9]]);
    let c = data.columns;
    // A pair without a margin has margin 0 beside one that has it.
    assert_eq!((c.offsets, c.margins), (vec![0, 1, 2, 3, 4], vec![0.0, 0.5]));
    assert_eq!((c.samples, c.weights.len()), (vec![0, 1, 2, 3], 0));
    let c = all.draw(2, 2).columns;
    assert_eq!((c.samples, c.margins.len()), (vec![4, 5, 6, 7], 0));
    let c = load("pairs", &policy(Inputs::Pairs), &[&text], 2).unwrap().draw(0, 2).columns;
    assert_eq!((c.offsets, c.weights), (vec![0, 1, 3, 4, 6], vec![1.0; 6]));
}

/// A loss that reads no margin refuses data that has one, before a step is made.
#[test]
fn a_margin_that_is_not_read_is_refused() {
    let pair = |m: &str| {
        format!("{{\"prompt_ids\": [1], \"chosen_ids\": [2], \"rejected_ids\": [3]{m}}}\n")
    };
    let needs = |own: &str| build("dpo", &[own]).unwrap().needs();
    let text = pair("") + &pair(", \"margin\": 0.5");
    for own in ["loss_type=ipo", "loss_type=aot", "loss_type=[\"sigmoid\", \"apo_zero\"]"] {
        let e = load("margin", &needs(own), &[&text], 2).map(drop).unwrap_err().to_string();
        assert!(e.contains(":2: has a `margin`, which this loss does not read"), "{own}: {e}");
        assert!(load("margin", &needs(own), &[&pair("")], 1).is_ok());
    }
    assert!(load("margin", &needs("loss_type=hinge"), &[&text], 2).is_ok());
}

/// Both sides of a pair have one prompt: a mismatched completion is of another.
#[test]
fn mismatched_completions_are_of_other_prompts() {
    let pair = |p: u32, c: u32, r: u32| {
        format!("{{\"prompt_ids\": [{p}], \"chosen_ids\": [{c}], \"rejected_ids\": [{r}]}}\n")
    };
    let needs = build("kto", &[]).unwrap().needs();
    let all = load("kto", &needs, &[&(pair(1, 11, 12) + &pair(2, 21, 22))], 4).unwrap();
    let of = |data: StepData| data.mismatched.into_iter().map(|s| s.ids).collect::<Vec<_>>();
    assert_eq!(of(all.all()), [[1, 22], [1, 22], [2, 12], [2, 12]]);
    // Of one prompt there is nothing else than another completion.
    let one = load("kto", &needs, &[&(pair(1, 11, 12) + &pair(1, 13, 14))], 4).unwrap();
    assert_eq!(of(one.all()), [[1, 14], [1, 11], [1, 12], [1, 13]]);
}

#[test]
fn prompts_are_repeated_and_continued() {
    let sampling = Sampling { samples_per_prompt: 2, ..Sampling::default() };
    let files = ["{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4]}\n"];
    let mut all = load("prompts", &policy(Inputs::Prompts(sampling)), &files, 4).unwrap();
    let mut data = all.draw(6, 2);
    let prompts = data.prompts();
    let named: Vec<(u64, &[u32])> = prompts.iter().map(|p| (p.sample, &p.ids[..])).collect();
    assert_eq!(named, [(12, &[1, 2, 3][..]), (13, &[1, 2, 3]), (14, &[4]), (15, &[4])]);
    let sampled = |(sample, ids): (u64, Vec<u32>)| {
        let logprobs = ids.iter().map(|id| *id as f32).collect();
        Completion { sample, logprobs, stopped: ids.len() < 4, ids }
    };
    let new = [vec![7], vec![8, 9], vec![5, 5, 5, 5], vec![6]];
    data.continue_with((12..).zip(new).map(sampled).collect());
    assert_eq!(ids(&data)[1..3], [&[1, 2, 3, 8, 9][..], &[4, 5, 5, 5, 5]]);
    assert_eq!(data.sequences[1].predicted, std::slice::from_ref(&(3..5)));
    let c = data.columns;
    assert_eq!((c.offsets, c.stopped), (vec![0, 1, 3, 7, 8], vec![true, true, false, true]));
    assert_eq!(c.old_logp, [7.0, 8.0, 9.0, 5.0, 5.0, 5.0, 5.0, 6.0]);
}

#[test]
fn data_that_teaches_nothing_is_named() {
    let load = |files: &[&str]| load("nothing", &policy(TEXTS), files, 1);
    let files = ["{\"input_ids\": [1]}\n{\"input_ids\": []}\n", "{\"input_ids\": [2]}\n"];
    let error = load(&files).unwrap_err().to_string();
    let want = "got 3 records, all dropped: 3 examples are dropped: nothing to learn (the first: ";
    assert!(error.contains(want), "{error}");
    assert!(error.ends_with("0.jsonl:1), wanted at least one example"), "{error}");
    assert!(error.contains("0.jsonl, ") && error.contains("1.jsonl: "), "{error}");
    // ids beyond the vocabulary, in the second file
    let files = ["{\"input_ids\": [1, 2]}\n", "\n{\"input_ids\": [1, 100]}\n"];
    let error = load(&files).unwrap_err().to_string();
    assert!(error.ends_with("1.jsonl:2: has token id 100, wanted less than 100"), "{error}");
}

/// A text that a step had twice would count twice; a prompt has other samples each time.
#[test]
fn a_step_has_each_text_once() {
    let files = ["{\"input_ids\": [1, 2]}\n{\"input_ids\": [3, 4]}\n"];
    let mut texts = load("once", &policy(TEXTS), &files, 8).unwrap();
    assert_eq!(texts.draws(), 2);
    assert_eq!(ids(&texts.draw(0, 2)), [[1, 2], [3, 4]]);
    let mut prompts =
        load("once", &policy(Inputs::Prompts(Sampling::default())), &files, 8).unwrap();
    assert_eq!(prompts.draw(0, 8).sequences.len(), 8);
}

/// What a checkpoint remembers of the data: every token, and where each sequence ends.
#[test]
fn the_digest_is_of_all_tokens() {
    let digest =
        |inputs, text: &str| load("digest", &policy(inputs), &[text], 1).unwrap().data.digest();
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

/// Trains a policy on pairs by a loss on their log-probs, and shows the columns that it read.
struct OnPairs {
    needs: Needs,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// Sequences of a micro-batch, its log-probs, those before the step and those of the reference.
type Seen = (std::ops::Range<usize>, [Vec<f32>; 3]);

impl Algorithm for OnPairs {
    fn needs(&self) -> Needs {
        self.needs.clone()
    }

    fn policy_loss(
        &mut self,
        _: &Device,
        micro: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
        _: Option<View<'_, f32>>,
        dlogp: ViewMut<'_, f32>,
        _: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        let (c, tokens, d) = (micro.columns, micro.tokens(), dlogp.host());
        for s in micro.sequences.clone() {
            let span = c.span(&(s..s + 1));
            let own = &mut d[span.start - tokens.start..span.end - tokens.start];
            own.fill(if s % 2 == 0 { -0.1 } else { 0.1 });
        }
        let own = |x: &[f32]| x[tokens.clone()].to_vec();
        let columns = [logp.host().to_vec(), own(&c.old_logp), own(&c.ref_logp)];
        self.seen.lock().unwrap().push((micro.sequences.clone(), columns));
        Ok(())
    }

    fn finish(&mut self, _: &mut Metrics) -> Result<()> {
        Ok(())
    }
}

/// A policy trains on pairs, which stay whole in every micro-batch and minibatch, with log-probs of
/// its own before the step and of the reference, to the bit. Two fixed bugs: its gradient took
/// micro-batches of pairs for such of sequences, so that half of them were lost, and only samples
/// had these columns.
#[test]
fn a_policy_on_pairs_has_the_log_probs_of_itself_and_its_reference() {
    let dir = temp_dir("source_policy_on_pairs");
    let mut settings = Settings::default();
    for pair in small(&dir, "reward", &dir.join("run")) {
        config::set_pair(&mut [&mut settings], &pair).unwrap();
    }
    settings.warmup_steps = 0;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let needs = Needs {
        old_logp: true,
        reference: true,
        epochs: 2,
        minibatches: 2,
        ..policy(Inputs::Pairs)
    };
    let algorithm = Box::new(OnPairs { needs, seen: seen.clone() });
    let mut trainer = Trainer::<f32>::new(host(), settings.clone(), algorithm).unwrap();
    let needs = policy(Inputs::Pairs);
    let limits = Limits { max_length: 128, vocab: 113, eos: None, skip_bad: 0 };
    let mut source = Source::load(&settings.data, &needs, None, limits, &settings).unwrap();
    let dev = Device::cpu();
    let reference = Model::load(&dev, &golden::path("llama_tied"), Head::Lm, None).unwrap();
    let score = |model: &Model<f32>, s: &Sequence| {
        let (mut batch, mut out) = (Batch::default(), Vec::new());
        batch.push_masked(&s.ids, &s.predicted);
        let scorer = Scorer { rows: 64, sequences: 1 };
        let mut arena = room(scorer.plan::<f32>(host(), model.spec(), model.head()).unwrap());
        Pass::new(&dev, model, &arena.scope(), &batch).at(1.0).score(&mut out, None).unwrap();
        out
    };
    for step in 0..2 {
        let data = source.draw(step * 4, 4);
        let before: Vec<[Vec<f32>; 2]> = data
            .sequences
            .iter()
            .map(|s| [score(trainer.policy().unwrap(), s), score(&reference, s)])
            .collect();
        trainer.step(&mut Silent).unwrap();
        let all = std::mem::take(&mut *seen.lock().unwrap());
        let sequences: usize = all.iter().map(|(range, _)| range.len()).sum();
        assert_eq!(sequences, 2 * data.sequences.len(), "two epochs see every sequence");
        assert!(all.iter().all(|(range, _)| range.start % 2 == 0 && range.len() % 2 == 0));
        // Minibatches are drawn: the numbers of both epochs are compared without their order.
        let sorted = |mut x: Vec<u32>| {
            x.sort_unstable();
            x
        };
        for i in 0..2 {
            let got = sorted(all.iter().flat_map(|(_, c)| bits(&c[1 + i])).collect());
            let once: Vec<u32> = before.iter().flat_map(|c| bits(&c[i])).collect();
            assert_eq!(got, sorted([&once[..], &once].concat()), "step {step} column {i}");
        }
        let (_, [logp, old, reference]) = &all[0];
        assert_bits("the first update sees the policy as it was", logp, old);
        assert_eq!(step == 0, old == reference, "the policy leaves its reference");
    }
}

/// A policy without a loss would train on nothing, step after step.
#[test]
fn a_policy_without_a_loss_is_refused_by_name() {
    struct NoLoss;
    impl Algorithm for NoLoss {
        fn needs(&self) -> Needs {
            policy(TEXTS)
        }

        fn finish(&mut self, _: &mut Metrics) -> Result<()> {
            Ok(())
        }
    }
    let dir = temp_dir("source_no_loss");
    let mut settings = Settings::default();
    for pair in small(&dir, "sft", &dir.join("run")) {
        config::set_pair(&mut [&mut settings], &pair).unwrap();
    }
    let mut trainer = Trainer::<f32>::new(host(), settings, Box::new(NoLoss)).unwrap();
    let error = trainer.step(&mut Silent).unwrap_err().to_string();
    assert_eq!(
        error,
        "an algorithm that trains a policy: got none, wanted a policy_loss of its own"
    );
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
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
