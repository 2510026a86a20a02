//! G2 for all other files of a run's folder: power may be lost at any operation, with any subset of
//! what was not synced.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::json;
use warpo::{
    models::{Head, Model},
    storage::{Storage, write_file},
    train::{
        export::{ExportedFrom, NewCompanions, export, is_whole},
        metrics::StepLines,
    },
};

use super::checkpoint::fates;
use crate::support::{
    disk::{Fault, MemDisk},
    golden, host,
};

/// Loses power before each operation of `work` and after the last, and asks `holds` of every disk
/// that may be left; it is told whether the work was done. Returns the number of disks.
fn crash_everywhere(
    before: &MemDisk,
    most: usize,
    mut work: impl FnMut(&MemDisk) -> warpo::Result<()>,
    holds: impl Fn(&MemDisk, bool, &str),
) -> usize {
    let mut states = 0;
    for at in 1.. {
        let disk = before.snapshot();
        disk.arm(at, Fault::Crash);
        let done = work(&disk).is_ok();
        for fates in fates(&disk.waiting(), at as u64).into_iter().take(most) {
            let what = format!("operation {at}, {fates:?}");
            holds(&disk.after_crash(&fates), done, &what);
            states += 1;
        }
        if done {
            println!("power was lost on {states} disks");
            return states;
        }
    }
    unreachable!()
}

/// A file is as it was or as it shall be; done, it is as it shall be.
#[test]
fn a_file_is_replaced_in_one_event() {
    let path = Path::new("/run.json");
    let disk = MemDisk::new();
    write_file(&disk, path, b"old").unwrap();
    let states = crash_everywhere(
        &disk,
        64,
        |disk| write_file(disk, path, b"a longer new one"),
        |after, done, what| {
            let got = after.get(path);
            assert!(got == b"a longer new one" || (got == b"old" && !done), "{what}: {got:?}");
            write_file(after, path, b"next").unwrap();
            assert_eq!(after.get(path), b"next", "{what}");
        },
    );
    assert!(states > 20, "{states}");
}

/// Lines that were synced stay; what else is there is cut, and the file goes on.
#[test]
fn synced_lines_stay() {
    let path = || PathBuf::from("/metrics.jsonl");
    let line = |step: u64| json!({ "step": step, "loss": step as f64 / 3.0 });
    let write = |disk: &MemDisk, from: u64, to: u64| {
        let mut lines = StepLines::open(disk, path(), from)?;
        (from + 1..=to).try_for_each(|step| lines.write(step, &line(step)))?;
        Ok::<_, warpo::Error>(lines)
    };
    let disk = MemDisk::new();
    write(&disk, 0, 5).unwrap().sync().unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    // A checkpoint of step 3: lines 4 and 5 are of steps that are taken again.
    let states = crash_everywhere(
        &disk,
        64,
        |disk| write(disk, 3, 7).map(drop),
        |after, _, what| {
            let mut lines = StepLines::open(after, path(), 3).unwrap();
            assert_eq!(lines.last, 3, "{what}");
            (4..8).for_each(|step| lines.write(step, &line(step)).unwrap());
            let want: String = (1..8).map(|step| format!("{}\n", line(step))).collect();
            assert_eq!(String::from_utf8(after.get(&path())).unwrap(), want, "{what}");
        },
    );
    assert!(states > 100, "{states}");
}

/// A model has its name once it is whole; else the same export makes it so, over a stale one too.
#[test]
fn a_model_is_whole_or_made_anew() {
    let base = golden::path("llama_tied");
    let model = Model::<f32>::load(host(), &base, Head::Lm, None).unwrap();
    let of = |step| ExportedFrom { step, run: "r".into(), eos: Some(5) };
    let dir = Path::new("/final");
    let write = |disk: &MemDisk, step| {
        let new =
            NewCompanions { eos: vec![5], eos_token: Some("x".into()), ..NewCompanions::default() };
        export(disk, (host(), &model, Dtype::F32), (&base, dir), &of(step), &new)
    };
    let stale = MemDisk::new();
    write(&stale, 1).unwrap();
    for before in [MemDisk::new(), stale] {
        let states = crash_everywhere(
            &before,
            6,
            |disk| write(disk, 2),
            |after, done, what| {
                let whole = is_whole(after, dir, &of(2));
                assert!(whole || !done, "{what}");
                assert!(!is_whole(after, dir, &of(3)), "{what}");
                if !whole {
                    write(after, 2).unwrap();
                    assert!(is_whole(after, dir, &of(2)), "{what}");
                }
            },
        );
        assert!(states > 100, "{states}");
    }
}
