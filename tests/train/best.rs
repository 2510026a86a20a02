//! The best evaluation of a run: its model is kept, and a run without a better one ends.

use std::{fs, path::Path};

use warpo::{Error, train::Silent};

use crate::support::{
    runs::{metrics, small, train, trainer},
    temp_dir,
};

/// Texts that the run never sees: what it learns by heart makes them less likely.
fn pairs(dir: &Path, name: &str, more: &[&str]) -> Vec<String> {
    let held_out = dir.join("held_out.jsonl");
    fs::write(&held_out, "{\"input_ids\": [5, 6, 7, 99, 40, 3, 71, 5, 80]}\n").unwrap();
    let mut pairs = small(dir, "sft", &dir.join(name));
    pairs.push(format!("eval_data={}", held_out.display()));
    pairs.extend(
        ["schedule=constant", "eval_every=2", "steps=20", "learning_rate=0.05"].map(String::from),
    );
    pairs.extend(more.iter().map(|s| s.to_string()));
    pairs
}

fn weights(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("model.safetensors")).unwrap()
}

/// Steps that were evaluated, each with its loss.
fn losses(run: &Path) -> Vec<(u64, f64)> {
    let all = metrics(run).into_iter();
    all.filter_map(|m| Some((m["step"].as_u64()?, m["eval_loss"].as_f64()?))).collect()
}

#[test]
fn the_best_model_is_kept_and_a_run_without_a_better_one_ends() {
    let dir = temp_dir("best");
    let kept = dir.join("kept");
    train("sft", &pairs(&dir, "kept", &["keep_best=eval_loss"])).unwrap();
    let all = losses(&kept);
    assert!(all.iter().map(|l| l.0).eq((2..=20).step_by(2)));
    let (best, _) = all.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(best < 20, "{all:?}");
    let of_steps = |steps: u64| {
        let name = format!("of-{steps}");
        train("sft", &pairs(&dir, &name, &[&format!("steps={steps}")])).unwrap();
        weights(&dir.join(name).join("final"))
    };
    assert!(weights(&kept.join("best")) == of_steps(best));
    assert!(weights(&kept.join("best")) != weights(&kept.join("final")));

    // the first evaluation that is not better than those before it
    let (mut lowest, mut before) = (f64::INFINITY, 0);
    let worse = all.iter().find(|(step, loss)| {
        let worse = *loss >= lowest;
        if !worse {
            (lowest, before) = (*loss, *step);
        }
        worse
    });
    let end = worse.unwrap().0;
    let patience = ["keep_best=eval_loss", "patience=1", "checkpoint_every=1"];
    let again = || train("sft", &pairs(&dir, "ended", &patience)).map(drop);
    again().unwrap();
    let ended = dir.join("ended");
    assert_eq!(losses(&ended), all[..end as usize / 2]);
    assert!(weights(&ended.join("final")) == of_steps(end));
    assert!(weights(&ended.join("best")) == of_steps(before));
    // it is over, also if it was stopped before the export, or a step before its end
    let left = || {
        let of = |name: &str| fs::read(ended.join(name)).unwrap();
        ["final/model.safetensors", "best/model.safetensors", "metrics.jsonl"].map(of)
    };
    let want = left();
    for gone in ["final", &format!("checkpoints/step-{end}")] {
        fs::remove_dir_all(ended.join(gone)).unwrap();
        again().unwrap();
        assert!(left() == want, "without {gone}");
    }
}

/// Without `eval_every` a run evaluates at each end of an epoch: 77 texts, 4 a step.
#[test]
fn epochs_end_with_an_evaluation() {
    let dir = temp_dir("best_epochs");
    train("sft", &pairs(&dir, "run", &["eval_every=0", "steps=45"])).unwrap();
    let steps: Vec<u64> = losses(&dir.join("run")).iter().map(|l| l.0).collect();
    assert_eq!(steps, [20, 39, 45]);
}

/// The memory of a run holds a held-out text that is longer than all it is trained on.
#[test]
fn a_long_held_out_text_has_room() {
    let dir = temp_dir("best_long");
    let long = dir.join("long.jsonl");
    for algorithm in ["sft", "reward", "dpo"] {
        let ids = format!("{:?}", [7; 120]);
        let row = match algorithm {
            "sft" => format!("{{\"input_ids\": {ids}}}"),
            _ => format!("{{\"prompt_ids\": {ids}, \"chosen_ids\": [5], \"rejected_ids\": [6]}}"),
        };
        fs::write(&long, row).unwrap();
        let more = [&format!("eval_data={}", long.display())[..], "micro_batch_tokens=1"];
        let mut trainer = trainer(&dir, algorithm, &more).unwrap();
        trainer.step(&mut Silent).unwrap();
        assert!(trainer.evaluate().unwrap().iter().any(|m| m.0 == "eval_loss"), "{algorithm}");
    }
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let dir = temp_dir("best_refused");
    for (more, key, says) in [
        (&["keep_best=loss"][..], "keep_best", "one of eval_loss, eval_perplexity, eval_accuracy"),
        (&["keep_best=eval_loss", "eval_data=[]"], "keep_best", "none without eval_data"),
        (&["keep_best=eval_accuracy"], "keep_best", "one of eval_loss, eval_perplexity"),
        (&["patience=2"], "patience", "none without keep_best"),
        (&["keep_best=eval_loss", "patience=0"], "patience", "1 or more"),
    ] {
        let e = train("sft", &pairs(&dir, "run", more)).unwrap_err();
        let Error::Config { key: k, message, .. } = &e else { panic!("{e}") };
        assert!(k == key && message.contains(says), "{e}");
    }
}
