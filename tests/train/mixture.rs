//! Weights of files, what is held out, and which files of a folder are read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use warpo::{
    Error,
    algorithms::{Inputs, Needs},
    config,
    data::{ColumnsRead, DrawGroup, DrawOrder, FolderPart, Limits},
    train::{DataFile, Settings, inputs::RunInputs, mixture::SourceRows, source::Source},
};

use crate::support::{
    losses::build,
    runs::{assert_same, outcome, small, train, trainer},
    temp_dir,
};

const LIMITS: Limits = Limits { max_length: 50, vocab: 1000, eos: None, skip_bad: 0 };

fn needs() -> Needs {
    Needs { policy: true, ..Needs::of(Inputs::Texts { completion_only: true }) }
}

fn write(path: &Path, ids: impl IntoIterator<Item = usize>) -> String {
    let lines = ids.into_iter().map(|i| format!("{{\"input_ids\": [1, {i}]}}\n"));
    fs::write(path, lines.collect::<String>()).unwrap();
    path.display().to_string()
}

fn rows(files: &[DataFile], part: FolderPart) -> SourceRows {
    SourceRows::read(files, part, false, &ColumnsRead::None, &Settings::default()).unwrap()
}

/// The second id of each row.
fn ids(rows: &SourceRows) -> Vec<usize> {
    let set = Source::of(rows, &needs(), None, LIMITS, &Settings::default()).unwrap().data;
    set.sequences.iter().map(|s| s.ids[1] as usize).collect()
}

/// How often each example is drawn in these epochs.
fn counts(order: &mut DrawOrder, epochs: std::ops::Range<u64>) -> BTreeMap<usize, usize> {
    let mut all = BTreeMap::new();
    let len = order.len() as u64;
    for i in epochs.start * len..epochs.end * len {
        *all.entry(order.index(i)).or_default() += 1;
    }
    all
}

#[test]
fn a_weight_is_the_draws_of_an_example_in_an_epoch() {
    let groups = || {
        vec![
            DrawGroup::weighted((0..4).collect(), 2.0),
            DrawGroup::weighted((4..14).collect(), 0.5),
            DrawGroup::weighted((14..20).collect(), 1.0),
            DrawGroup::weighted((20..23).collect(), 1.5),
        ]
    };
    let draws: Vec<usize> = groups().iter().map(|g| g.draws).collect();
    assert_eq!(draws, [8, 5, 6, 5]);
    for shuffle in [true, false] {
        let mut order = DrawOrder::weighted(groups(), 7, shuffle);
        for epoch in 0..6 {
            let all = counts(&mut order, epoch..epoch + 1);
            let of = |range: std::ops::Range<usize>| -> Vec<usize> {
                range.map(|i| all.get(&i).copied().unwrap_or(0)).collect()
            };
            assert_eq!(of(0..4), [2; 4]);
            assert_eq!(of(14..20), [1; 6]);
            assert!(of(4..14).iter().all(|n| *n <= 1) && of(4..14).iter().sum::<usize>() == 5);
            let more = of(20..23);
            assert!(more.iter().all(|n| (1..=2).contains(n)) && more.iter().sum::<usize>() == 5);
        }
        // No example comes again before all others of its file: two halves are a whole.
        for epoch in [0, 2, 4] {
            let all = counts(&mut order, epoch..epoch + 2);
            assert!((4..14).all(|i| all[&i] == 1), "{all:?}");
        }
        // 3 epochs of 5 draws are 5 passes over 3 examples.
        assert!((20..23).all(|i| counts(&mut order, 0..3)[&i] == 5));
    }
    // Another half than that of the file's order, another in each pass, another with each seed.
    let half = |seed, epoch| -> BTreeSet<usize> {
        let mut order = DrawOrder::weighted(groups(), seed, true);
        counts(&mut order, epoch..epoch + 1).into_keys().filter(|i| (4..14).contains(i)).collect()
    };
    let all: BTreeSet<_> =
        [half(7, 0), half(7, 2), half(7, 4), half(8, 0), (4..9).collect()].into();
    assert_eq!(all.len(), 5);
    // In any order of asking.
    let mut straight = DrawOrder::weighted(groups(), 7, true);
    let steps: Vec<Vec<usize>> = (0..20).map(|step| straight.batch(step, 7)).collect();
    for step in [13, 2, 19] {
        let mut other = DrawOrder::weighted(groups(), 7, true);
        assert_eq!(other.batch(step, 7), steps[step as usize]);
    }
    // A weight that rounds to nothing draws one.
    assert_eq!(DrawGroup::weighted(vec![3, 4], 0.1).draws, 1);
}

#[test]
fn weights_are_settings_and_change_what_a_step_draws() {
    let dir = temp_dir("mixture_weights");
    let (a, b) = (write(&dir.join("a.jsonl"), 0..4), write(&dir.join("b.jsonl"), 10..20));
    let source = |data: &str| -> Result<Source, Error> {
        let mut s = Settings { batch_size: 13, ..Settings::default() };
        config::set_pair(&mut [&mut s], &format!("data={data}"))?;
        Source::load(&s.data, &needs(), None, LIMITS, &s)
    };
    let mut plain = source(&format!("[{a:?}, {b:?}]")).unwrap();
    let mut same = source(&format!("[{{path={a:?}}}, {{path={b:?}, weight=1}}]")).unwrap();
    assert_eq!((plain.epoch(), &plain.weights), (14, &None));
    assert_eq!(plain.digest(), same.digest());
    assert_eq!(plain.digest(), plain.data.digest());
    assert_eq!(plain.draw(3).sequences, same.draw(3).sequences);
    let mut heavy =
        source(&format!("[{{path={a:?}, weight=2}}, {{path={b:?}, weight=0.5}}]")).unwrap();
    assert_eq!((heavy.epoch(), heavy.draws(), heavy.data.len()), (13, 13, 14));
    let want = format!("an epoch draws 8 of 4 from {a}, 5 of 10 from {b}");
    assert_eq!(heavy.weights.as_ref(), Some(&want));
    assert_ne!(heavy.digest(), plain.digest());
    let drawn = heavy.draw(0).sequences;
    assert_eq!(drawn.iter().filter(|s| s.ids[1] < 10).count(), 8);
    // what cannot be meant is refused by name
    for (data, want) in [
        (format!("[{{path={a:?}, weight=0}}]"), "with a weight above 0, at most 100"),
        (format!("[{{path={a:?}, wait=2}}]"), "with a weight above 0, at most 100"),
        ("[{weight=2}]".into(), "with a weight above 0, at most 100"),
        (format!("[{{path={a:?}, weight=2}}, {a:?}]"), "wanted each file once, where one has"),
    ] {
        let e = source(&data).map(drop).unwrap_err();
        let Error::Config { key, .. } = &e else { panic!("{e}") };
        assert!(key == "data" && e.to_string().contains(want), "{data}: {e}");
    }
    // An epoch is as long as its draws: 2 x 2 x 77 examples in steps of 4.
    let mut s = Settings::default();
    let mut pairs = small(&dir, "sft", &dir.join("run"));
    let path = dir.join("sft.jsonl");
    pairs.push(format!("data=[{{path={path:?}, weight=2}}]"));
    pairs.extend(["steps=0".into(), "epochs=2".into()]);
    for pair in &pairs {
        config::set_pair(&mut [&mut s], pair).unwrap();
    }
    assert_eq!(RunInputs::new(s, build("sft", &[]).unwrap()).unwrap().steps, 77);
    // A config that was written is read again.
    let mut s = Settings::default();
    let pair = format!("data=[{{path={a:?}, weight=2.5}}, {b:?}]");
    config::set_pair(&mut [&mut s], &pair).unwrap();
    let (text, mut again) = (config::template(&[&s]), Settings::default());
    config::set_all(&mut [&mut again], &text, "config.toml").unwrap();
    assert_eq!((again.data[0].weight, again.data), (2.5, s.data));
}

/// A run with weights goes on where it was, bit for bit, and not with other weights.
#[test]
fn a_weighted_run_resumes_exactly() {
    let dir = temp_dir("mixture_resume");
    let run = |name: &str, weight: f64, more: &[&str]| {
        let mut pairs = small(&dir, "sft", &dir.join(name));
        let other = write(&dir.join("b.jsonl"), 60..70);
        let first = dir.join("sft.jsonl").display().to_string();
        pairs.push(format!(
            "data=[{{path={first:?}, weight=0.3}}, {{path={other:?}, weight={weight}}}]"
        ));
        pairs.extend(["steps=8".into(), "checkpoint_every=3".into(), "keep_checkpoints=9".into()]);
        pairs.extend(more.iter().map(|p| (*p).to_owned()));
        train("sft", &pairs)
    };
    run("straight", 1.5, &[]).unwrap();
    run("broken", 1.5, &[]).unwrap();
    for step in [6, 8] {
        fs::remove_dir_all(dir.join(format!("broken/checkpoints/step-{step}"))).unwrap();
    }
    fs::remove_dir_all(dir.join("broken/final")).unwrap();
    run("broken", 1.5, &[]).unwrap();
    assert_same("weighted", &outcome(&dir.join("straight")), &outcome(&dir.join("broken")));
    let e = run("broken", 1.6, &[]).unwrap_err();
    let Error::Config { key, .. } = &e else { panic!("{e}") };
    assert_eq!(key, "data");
}

/// Which side a row is on follows from its content and the seed: other rows, and their order, move
/// none, and equal rows stay together whatever people said of them.
#[test]
fn a_row_is_held_out_by_its_content() {
    let dir = temp_dir("mixture_split");
    let path = dir.join("a.jsonl");
    let split = |ids_of: &mut dyn Iterator<Item = usize>, share: f64, seed: u64| {
        let mut all = rows(&[write(&path, ids_of).into()], FolderPart::Training);
        let out = all.hold_out(share, seed).unwrap();
        assert!(all.notes[0].starts_with("validation_split holds out "), "{:?}", all.notes);
        (
            ids(&all).into_iter().collect::<BTreeSet<_>>(),
            ids(&out).into_iter().collect::<BTreeSet<_>>(),
        )
    };
    let (kept, out) = split(&mut (0..600), 0.1, 0);
    assert!(kept.is_disjoint(&out) && kept.len() + out.len() == 600);
    assert!((40..80).contains(&out.len()), "{}", out.len());
    // in another order, and with each row twice
    assert_eq!(split(&mut (0..600).rev(), 0.1, 0).1, out);
    assert_eq!(split(&mut (0..1200).map(|i| i / 2), 0.1, 0).1, out);
    // fewer and more rows
    let half = split(&mut (0..300), 0.1, 0).1;
    assert_eq!(half, out.iter().copied().filter(|i| *i < 300).collect());
    assert_ne!(split(&mut (0..600), 0.1, 1).1, out);
    // a count, and one at least
    assert_eq!(split(&mut (0..600), 7.0, 0).1.len(), 7);
    assert_eq!(split(&mut (0..4), 0.001, 0).1.len(), 1);
    // labels, and white space of JSON
    let text = (0..40).map(|i| {
        let chat = |space: &str| format!("[{{\"role\":{space}\"user\", \"content\": \"q{i}\"}}, {{\"role\": \"assistant\", \"content\": \"a\"}}]");
        format!("{{\"messages\": {}, \"label\": 1}}\n{{\"messages\": {}, \"label\": 0}}\n", chat(""), chat("  "))
    });
    fs::write(&path, text.collect::<String>()).unwrap();
    let mut all = rows(&[path.display().to_string().into()], FolderPart::Training);
    let out = all.hold_out(0.3, 0).unwrap();
    let lines: Vec<usize> = out.rows.iter().map(|row| (row.place.line - 1) / 2).collect();
    assert!(!lines.is_empty() && lines.chunks(2).all(|pair| pair[0] == pair[1]), "{lines:?}");
    // nothing would be left
    let mut same = rows(&[write(&path, [5; 9]).into()], FolderPart::Training);
    let e = same.hold_out(0.5, 0).unwrap_err().to_string();
    assert!(e.contains("less than all of the 9 rows"), "{e}");
}

#[test]
fn a_validation_split_is_evaluated_and_refused_where_it_means_nothing() {
    let dir = temp_dir("mixture_evaluated");
    let mut run = trainer(&dir, "sft", &["validation_split=20"]).unwrap();
    let metrics = run.evaluate().unwrap();
    assert!(metrics.iter().any(|(name, x)| *name == "eval_loss" && x.is_finite()), "{metrics:?}");
    let mut settings = Settings::default();
    let mut pairs = small(&dir, "sft", &dir.join("run"));
    pairs.push("validation_split=20".into());
    for pair in &pairs {
        config::set_pair(&mut [&mut settings], pair).unwrap();
    }
    let inputs = RunInputs::new(settings, build("sft", &[]).unwrap()).unwrap();
    let held_out = inputs.held_out.unwrap();
    assert_eq!((inputs.source.data.len(), held_out.data.len()), (57, 20));
    let places =
        |s: &Source| -> BTreeSet<usize> { s.data.sequences.iter().map(|s| s.place.line).collect() };
    assert!(places(&inputs.source).is_disjoint(&places(&held_out)));
    let want = "validation_split holds out 20 of 77 rows, 57 are trained on";
    assert!(inputs.warnings.iter().any(|text| text == want), "{:?}", inputs.warnings);
    let file = write(&dir.join("out.jsonl"), 0..4);
    let refusal = |more: &[&str], algorithm| {
        let e = trainer(&dir, algorithm, more).map(drop).unwrap_err();
        let Error::Config { key, .. } = &e else { panic!("{e}") };
        assert_eq!(key, "validation_split", "{e}");
        e.to_string()
    };
    let e = refusal(&["validation_split=0.1", &format!("eval_data={file}")], "sft");
    assert!(e.contains("wanted 0 beside eval_data, which is"), "{e}");
    assert!(refusal(&["validation_split=0.1"], "ppo").contains("samples"));
    for bad in ["1.5", "-0.1", "1e16"] {
        let e = refusal(&[&format!("validation_split={bad}")], "sft");
        assert!(e.contains("from 0 to below 1, or a whole number"), "{e}");
    }
    assert!(refusal(&["validation_split=77"], "sft").contains("less than all of the 77 rows"));
}

/// Of a folder, what is kept apart to test on is not trained on.
#[test]
fn files_to_test_on_are_left_out_of_a_folder() {
    let dir = temp_dir("mixture_folder");
    for (i, name) in
        ["train.jsonl", "test-00000-of-00001.jsonl", "Validation.jsonl", "testimony.jsonl"]
            .iter()
            .enumerate()
    {
        write(&dir.join(name), [i, i]);
    }
    let folder: DataFile = dir.display().to_string().into();
    let all = rows(std::slice::from_ref(&folder), FolderPart::Training);
    assert_eq!(ids(&all), [3, 3, 0, 0]);
    assert!(all.notes[0].starts_with("not read: "), "{:?}", all.notes);
    assert!(
        all.notes[0].contains("Validation.jsonl, ")
            && all.notes[0].contains("test-00000-of-00001.jsonl")
    );
    assert_eq!(ids(&rows(std::slice::from_ref(&folder), FolderPart::HeldOut)), [2, 2, 1, 1]);
    // By their names, by a pattern, and where there is nothing else, they are read.
    let named: DataFile = dir.join("test-*").display().to_string().into();
    assert_eq!(ids(&rows(&[named], FolderPart::Training)), [1, 1]);
    fs::remove_file(dir.join("train.jsonl")).unwrap();
    fs::remove_file(dir.join("testimony.jsonl")).unwrap();
    let all = rows(&[folder], FolderPart::Training);
    assert_eq!((ids(&all), all.notes.len()), (vec![2, 2, 1, 1], 0));
}
