//! G11: hostile files are errors: no panic, no call of more than a second, no memory beyond four
//! times the file and the room that its target names.
//!
//! Each target runs over `fuzz/seeds/NAME`, then for a while over mutations of what it has seen: a
//! mutant whose answer is new joins the seeds. `WARPO_SOAK=60` gives each 60 seconds; `fuzz/soak`
//! does the same under libFuzzer, led by coverage.

mod mutate;
mod targets;

use std::{
    cell::Cell,
    collections::HashSet,
    fs,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::{Arc, Mutex, Once},
    time::{Duration, Instant},
};

use mutate::Mutator;
use targets::{TARGETS, Target};

use crate::support::{memory, root, temp_dir};

/// Seconds over mutants, unless `WARPO_SOAK` says otherwise.
const SECONDS: u64 = 2;

/// A call that takes longer is a hang. Other tests take the same cores: the quickest of three
/// counts.
const HANG: Duration = Duration::from_secs(1);

thread_local! {
    /// This thread asks: a panic is its finding, or the product catches it.
    static ASKS: Cell<bool> = const { Cell::new(false) };
}

/// Panics of a target are not printed: a backtrace takes more memory than any input.
fn be_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |about| {
            if !ASKS.get() {
                loud(about);
            }
        }));
    });
}

/// What is wrong with a target's answer to an input, or what the answer is, and what it took.
fn ask(target: &Target, dir: &Path, input: &[u8]) -> Result<(String, Duration, usize), String> {
    // What ends the process leaves its input here.
    targets::put(dir, "input", input);
    be_quiet();
    let mut quickest = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        ASKS.set(true);
        let run = || panic::catch_unwind(AssertUnwindSafe(|| (target.run)(dir, input)));
        let (answer, bytes) = memory::most(run);
        ASKS.set(false);
        quickest = quickest.min(start.elapsed());
        let answer = answer.map_err(|_| "panics".to_owned())?;
        let most = 4 * input.len() + target.room;
        if bytes > most {
            return Err(format!("takes {bytes} bytes for {}, wanted {most}", input.len()));
        }
        if quickest <= HANG {
            return Ok((answer, quickest, bytes));
        }
    }
    Err(format!("takes {quickest:?}"))
}

/// Ends the process if one call takes minutes.
fn watch(name: &'static str) -> Arc<Mutex<Instant>> {
    let started = Arc::new(Mutex::new(Instant::now()));
    let seen = Arc::downgrade(&started);
    std::thread::spawn(move || {
        while let Some(started) = seen.upgrade() {
            if started.lock().unwrap().elapsed() > Duration::from_secs(120) {
                eprintln!("{name} does not end: see target/tmp/fuzz_{name}/input");
                std::process::abort();
            }
            drop(started);
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    started
}

/// An answer without its numbers: what is new in it is a branch that was not taken before.
fn shape(answer: &str) -> String {
    answer.chars().filter(|c| !c.is_ascii_digit()).take(400).collect()
}

fn hostile(name: &'static str) {
    let target = TARGETS.iter().find(|t| t.name == name).unwrap();
    let dir = temp_dir(&format!("fuzz_{name}"));
    (target.prepare)(&dir);
    let started = watch(name);
    let (mut slowest, mut largest) = (Duration::ZERO, 0);
    let mut try_one = |input: &[u8], what: &str| {
        *started.lock().unwrap() = Instant::now();
        match ask(target, &dir, input) {
            Ok((answer, time, bytes)) => {
                slowest = slowest.max(time);
                largest = largest.max(bytes);
                answer
            }
            Err(wrong) => {
                let kept = dir.join("finding");
                fs::write(&kept, input).unwrap();
                panic!("{name} {wrong}: {what}, {} ({})", kept.display(), input.escape_ascii());
            }
        }
    };
    let mut files: Vec<_> = fs::read_dir(root().join("fuzz/seeds").join(name))
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 5, "seeds of {name}");
    let mut answers = HashSet::new();
    let mut known = Vec::new();
    for file in &files {
        let seed = fs::read(file).unwrap();
        answers.insert(shape(&try_one(&seed, &file.display().to_string())));
        known.push(seed);
    }
    let seconds = std::env::var("WARPO_SOAK").map_or(SECONDS, |s| s.parse().unwrap());
    let (until, mut runs) = (Instant::now() + Duration::from_secs(seconds), 0_u64);
    let mut mutator = Mutator::new(name);
    while Instant::now() < until {
        let mutant = mutator.mutant(&known, files.len());
        runs += 1;
        if answers.insert(shape(&try_one(&mutant, &format!("mutant {runs}")))) && known.len() < 5000
        {
            known.push(mutant);
        }
    }
    println!(
        "{name}: {} seeds, {runs} mutants, {} answers; at most {slowest:?} and {largest} bytes",
        files.len(),
        answers.len(),
    );
}

macro_rules! hostile {
    ($($test:ident: $name:literal;)*) => {
        $(
            #[test]
            fn $test() {
                hostile($name);
            }
        )*

        #[test]
        fn every_target_has_a_test() {
            assert_eq!(TARGETS.iter().map(|t| t.name).collect::<Vec<_>>(), [$($name),*]);
        }
    };
}

hostile! {
    hostile_safetensors_headers_are_errors: "safetensors_header";
    hostile_shard_indices_are_errors: "shard_index";
    hostile_model_configs_are_errors: "model_config";
    hostile_tokenizers_are_errors: "tokenizer";
    hostile_generation_configs_are_errors: "generation_config";
    hostile_checkpoint_manifests_are_errors: "checkpoint_manifest";
    hostile_dataset_lines_are_errors: "dataset_line";
    hostile_toml_is_an_error: "toml";
    hostile_settings_are_errors: "set_pair";
    hostile_rollouts_are_errors: "rollouts";
    hostile_metrics_are_errors: "metrics";
    hostile_chat_templates_are_errors: "chat_template";
    hostile_run_records_are_errors: "run_record";
}

/// What a target does wrong is seen: each rule with a target that breaks it.
#[test]
fn what_is_wrong_with_a_target_is_seen() {
    let dir = temp_dir("fuzz_rules");
    let wrong = |run| {
        let target = Target { name: "wrong", room: 1 << 16, prepare: |_| (), run };
        ask(&target, &dir, b"input").map(|(answer, ..)| answer)
    };
    assert_eq!(wrong(|_, input| format!("{}", input.len())), Ok("5".into()));
    assert_eq!(wrong(|_, input| input[5].to_string()), Err("panics".into()));
    let large = wrong(|_, _| String::from_utf8_lossy(&vec![b'a'; 70_000]).into_owned());
    assert_eq!(large, Err("takes 140000 bytes for 5, wanted 65556".into()));
    let slow = wrong(|_, _| {
        std::thread::sleep(HANG + Duration::from_millis(10));
        String::new()
    });
    assert!(slow.unwrap_err().starts_with("takes 1."));
}
