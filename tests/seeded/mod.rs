//! G20: tests that bite. Each of [`BUGS`] stands in a copy of the tree, behind a switch that only
//! the copy has, and the test that the list names must fail with it:
//! `cargo test -- --ignored every_seeded_bug_is_killed --nocapture`.

mod bugs;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bugs::{BUGS, Bug};

use crate::support::{root, temp_dir};

/// What the copy's product asks to know which mistake to make.
const SWITCH: &str = r#"
/// Whether this run makes a mistake.
#[doc(hidden)]
pub fn seeded(bug: u32) -> bool {
    static BUG: std::sync::OnceLock<Option<u32>> = std::sync::OnceLock::new();
    *BUG.get_or_init(|| std::env::var("WARPO_BUG").ok()?.parse().ok()) == Some(bug)
}
"#;

impl Bug {
    /// What stands before, in and behind the replaced text.
    fn parts(&self) -> [&str; 3] {
        let (before, rest) = self.place.split_once('«').unwrap();
        let (old, after) = rest.split_once('»').unwrap();
        [before, old, after]
    }

    /// The text of its file with the place as `change` writes it.
    fn put(&self, text: &str, change: impl FnOnce(&str) -> String) -> String {
        let [before, old, after] = self.parts();
        let whole = [before, old, after].concat();
        assert_eq!(text.matches(&whole).count(), 1, "{} has once: {whole}", self.file);
        text.replacen(&whole, &[before, &change(old), after].concat(), 1)
    }

    fn is_rust(&self) -> bool {
        self.file.ends_with(".rs")
    }
}

/// The list fits the tree: every place is there once, and every test that is named.
#[test]
fn every_seeded_bug_has_its_place_and_its_test() {
    assert_eq!(BUGS.len(), 27);
    for bug in BUGS {
        let text = fs::read_to_string(root().join(bug.file)).unwrap();
        assert_ne!(bug.put(&text, |_| bug.mistake.into()), text, "{}", bug.what);
        let (module, name) = bug.test.rsplit_once("::").unwrap();
        let file = root().join("tests").join(module.replace("::", "/")).with_extension("rs");
        let tests = fs::read_to_string(&file).unwrap();
        assert!(tests.contains(&format!("fn {name}()")), "{} in {}", bug.test, file.display());
    }
}

/// The tree with all mistakes in it; what has none is a link.
fn copy(to: &Path) {
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name();
        if !["src", "kernels", "target", ".git"].iter().any(|n| name == *n) {
            symlink(root().join(&name), to.join(&name)).unwrap();
        }
    }
    for folder in ["src", "kernels"] {
        files(&root().join(folder), &to.join(folder));
    }
    for (bug, number) in BUGS.iter().zip(1..) {
        if bug.is_rust() {
            let mistake = |old: &str| {
                format!("(if crate::seeded({number}) {{ {} }} else {{ {old} }})", bug.mistake)
            };
            edit(&to.join(bug.file), |text| bug.put(text, mistake));
        }
    }
    edit(&to.join("src/lib.rs"), |text| text.to_owned() + SWITCH);
}

fn edit(path: &Path, change: impl FnOnce(&str) -> String) {
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, change(&text)).unwrap();
}

fn files(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            files(&path, &to);
        } else {
            fs::copy(path, to).unwrap();
        }
    }
}

/// A command under that of `WARPO_UNDER`, if there is one: `nice`, or a lock.
fn under(program: &Path) -> Command {
    let outer = std::env::var("WARPO_UNDER").unwrap_or_default();
    let mut words = outer.split_whitespace();
    match words.next() {
        None => Command::new(program),
        Some(first) => {
            let mut command = Command::new(first);
            command.args(words).arg(program);
            command
        }
    }
}

/// The test program of the copy, in a target folder of its own: cargo cannot tell it from the
/// tree's. Objects of kernels are those of the tree.
fn build(copy: &Path) -> PathBuf {
    let tmp = copy.parent().unwrap();
    let target = tmp.with_file_name("seeded");
    let (ours, theirs) = (tmp.join("sim"), target.join("tmp/sim"));
    fs::create_dir_all(target.join("tmp")).unwrap();
    if ours.exists() && !theirs.exists() {
        symlink(ours, theirs).unwrap();
    }
    let mut cargo = under(Path::new(env!("CARGO")));
    cargo.args(["test", "--no-run", "--locked", "--test", "warpo", "--message-format=json"]);
    cargo.current_dir(copy).env("CARGO_TARGET_DIR", target);
    let done = cargo.env("WARPO_KERNELS", "none").stderr(Stdio::inherit()).output().unwrap();
    assert!(done.status.success(), "the copy does not build");
    let text = String::from_utf8(done.stdout).unwrap();
    let messages =
        text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut programs = messages.filter_map(|m| Some(m["executable"].as_str()?.to_owned()));
    programs.next_back().unwrap().into()
}

/// Runs tests with a mistake, 0 for none, and says how long they took if all pass.
fn run(program: &Path, copy: &Path, bug: usize, tests: &[&str]) -> Result<Duration, String> {
    let (start, log) = (Instant::now(), copy.join("log"));
    let mut command = under(program);
    command.args(tests).args(["--exact", "--test-threads=2"]).env("WARPO_BUG", bug.to_string());
    command.env("CARGO_MANIFEST_DIR", copy).env("RUST_BACKTRACE", "0").current_dir(copy);
    command.stdout(fs::File::create(&log).unwrap()).stderr(Stdio::null());
    let status = command.status().unwrap();
    let log = fs::read_to_string(log).unwrap();
    if status.success() {
        assert!(log.contains(&format!("test result: ok. {} passed", tests.len())), "{log}");
        return Ok(start.elapsed());
    }
    // A test that fails says so; else the program ended for another reason.
    let why = log.lines().skip_while(|line| !line.contains("panicked at")).nth(1).unwrap_or(&log);
    Err(why.chars().take(100).collect())
}

#[test]
#[ignore = "builds a copy of the tree and runs, for each mistake, some of its tests: ten minutes"]
fn every_seeded_bug_is_killed() {
    let dir = temp_dir("seeded");
    copy(&dir);
    let program = build(&dir);
    let mut tests: Vec<&str> = BUGS.iter().map(|bug| bug.test).collect();
    tests.sort_unstable();
    tests.dedup();
    let clean = run(&program, &dir, 0, &tests);
    println!("without a mistake {} tests pass: {:?}", tests.len(), clean.unwrap());
    let mut alive = Vec::new();
    for (bug, number) in BUGS.iter().zip(1..) {
        let file = dir.join(bug.file);
        let before = fs::read_to_string(&file).unwrap();
        if !bug.is_rust() {
            edit(&file, |text| bug.put(text, |_| bug.mistake.into()));
        }
        match run(&program, &dir, number, &[bug.test]) {
            Err(why) => println!("{number:2} {}: killed by {}: {why}", bug.what, bug.test),
            Ok(_) => alive.push(format!("{number} {}, with {}", bug.what, bug.test)),
        }
        fs::write(&file, before).unwrap();
    }
    println!("{} of {}", BUGS.len() - alive.len(), BUGS.len());
    assert!(alive.is_empty(), "these live: {alive:#?}");
}
