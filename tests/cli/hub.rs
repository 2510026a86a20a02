//! Names of the Hub in its local cache.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use super::{lines, refused};
use crate::support::{
    golden,
    runs::{copy, warpo},
    temp_dir,
};

/// A snapshot of a model or a data set, as `huggingface_hub` lays it out: the files are links.
fn snapshot(cache: &Path, name: &str, commit: &str, files: &[(&str, &Path)]) {
    let folder = cache.join(name).join("snapshots").join(commit);
    let blobs = cache.join(name).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    for (i, (file, from)) in files.iter().enumerate() {
        let (blob, link) = (blobs.join(format!("{commit}-{i}")), folder.join(file));
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        fs::copy(from, &blob).unwrap();
        std::os::unix::fs::symlink(blob, link).unwrap();
    }
}

fn refer(cache: &Path, name: &str, reference: &str, commit: &str) {
    fs::create_dir_all(cache.join(name).join("refs")).unwrap();
    fs::write(cache.join(name).join("refs").join(reference), commit).unwrap();
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = warpo(args);
    for name in ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    command.env("HOME", dir.join("nobody")).current_dir(dir);
    command
}

fn tokenized(out: &Output) -> usize {
    lines(out).len()
}

#[test]
fn names_of_the_hub_are_found_in_its_cache() {
    let dir = temp_dir("hub");
    let cache = dir.join("home/hub");
    let model = golden::path("llama_tied");
    let (config, weights) = (model.join("config.json"), model.join("model.safetensors"));
    let files = [("config.json", &*config), ("model.safetensors", &*weights)];
    snapshot(&cache, "models--org--Tiny-1.5", "abc1", &files);
    snapshot(&cache, "models--org--Tiny-1.5", "abc2", &files[..1]);
    refer(&cache, "models--org--Tiny-1.5", "main", "abc1\n");
    let put = |name: &str, rows: usize| {
        let text = "{\"input_ids\": [5, 6, 7]}\n".repeat(rows);
        fs::write(dir.join(name), text).unwrap();
        dir.join(name)
    };
    let (one, two, three) = (put("1.jsonl", 1), put("2.jsonl", 2), put("3.jsonl", 3));
    let infos = put("4.jsonl", 4);
    let set = [
        ("data/train-00000-of-00001.jsonl", &*two),
        ("data/test-00000-of-00001.jsonl", &*three),
        ("dataset_infos.json", &*infos),
    ];
    snapshot(&cache, "datasets--org--rows", "d1", &set);
    let sets = [("main/train.jsonl", &*one), ("socratic/train.jsonl", &*three)];
    snapshot(&cache, "datasets--org--two", "d2", &sets);
    let run = |model: &str, data: &str| {
        let args = ["tokenize", "--model", model, "--data", data];
        command(&dir, &args).env("HF_HOME", dir.join("home")).output().unwrap()
    };
    let out = run("org/Tiny-1.5", "1.jsonl");
    assert_eq!(tokenized(&out), 1);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("org/Tiny-1.5 is ") && said.contains("snapshots/abc1"), "{said}");
    let out = run("org/Tiny-1.5@abc2", "1.jsonl");
    assert!(String::from_utf8(out.stderr).unwrap().contains("snapshots/abc2"));
    // The files of training alone, and those that are named.
    let out = run("org/Tiny-1.5", "org/rows");
    assert_eq!(tokenized(&out), 2);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("warning: not read: ") && said.contains("data/test-00000"), "{said}");
    assert_eq!(tokenized(&run("org/Tiny-1.5", "org/rows/data/test-*")), 3);
    assert_eq!(tokenized(&run("org/Tiny-1.5", "org/two/socratic")), 3);
    assert_eq!(tokenized(&run("org/Tiny-1.5", "org/two/main/train.jsonl")), 1);
    let (code, e) = refused(&run("org/Tiny-1.5", "org/two"));
    assert!(code == 1 && e.contains("has data in main, socratic: say which one"), "{e}");
    // Where the cache is, in the order in which the Hub's own tools look.
    let args = ["tokenize", "--model", "org/Tiny-1.5", "--data", "1.jsonl"];
    let with = |name: &str, value: &Path| command(&dir, &args).env(name, value).output().unwrap();
    assert_eq!(tokenized(&with("HF_HUB_CACHE", &cache)), 1);
    let home = dir.join("user/.cache/huggingface");
    copy(&dir.join("home"), &home);
    assert_eq!(tokenized(&with("HOME", &dir.join("user"))), 1);
    assert_eq!(tokenized(&with("XDG_CACHE_HOME", &dir.join("user/.cache"))), 1);
    let mut both = command(&dir, &args);
    both.env("HF_HUB_CACHE", dir.join("empty")).env("HF_HOME", dir.join("home"));
    assert!(refused(&both.output().unwrap()).1.contains("empty/models--org--Tiny-1.5"));
    // A folder of that name comes first.
    fs::create_dir_all(dir.join("org/Tiny-1.5")).unwrap();
    let (_, e) = refused(&run("org/Tiny-1.5", "1.jsonl"));
    assert!(e.contains("cannot read org/Tiny-1.5/config.json"), "{e}");
}

#[test]
fn what_is_not_in_the_cache_is_said_with_the_way_to_get_it() {
    let dir = temp_dir("hub_missing");
    let cache = dir.join("cache");
    fs::create_dir_all(cache.join("models--org--torn/snapshots")).unwrap();
    refer(&cache, "models--org--torn", "main", "abc");
    let model = golden::path("llama_tied").display().to_string();
    let run = |args: &[&str]| {
        refused(&command(&dir, args).env("HF_HUB_CACHE", &cache).output().unwrap()).1
    };
    for command in ["tokenize", "generate", "score", "chat"] {
        let mut args = vec![command, "--model", "Qwen/Qwen2.5-0.5B"];
        args.extend((command != "chat").then_some(["--data", "x.jsonl"]).into_iter().flatten());
        let e = run(&args);
        let looked = cache.join("models--Qwen--Qwen2.5-0.5B");
        assert!(
            e.contains(&format!("Qwen/Qwen2.5-0.5B: is not there, nor is {}", looked.display())),
            "{e}"
        );
        assert!(e.contains("`hf download Qwen/Qwen2.5-0.5B`"), "{e}");
    }
    let e = run(&["train", "sft", "--model", "org/torn", "--data", "x.jsonl"]);
    assert!(e.contains("org/torn: has no revision abc in "), "{e}");
    let reward = "reward_model=org/gone";
    let e = run(&["train", "ppo", "--model", &model, "--data", "x.jsonl", "--set", reward]);
    assert!(e.contains("org/gone: is not there, nor is "), "{e}");
    let e = run(&["tokenize", "--model", &model, "--data", "org/rows"]);
    assert!(e.contains("`hf download org/rows --repo-type dataset`"), "{e}");
    // A file that is not there is no name.
    let e = run(&["tokenize", "--model", &model, "--data", "org/rows.jsonl"]);
    assert!(e.contains("cannot open org/rows.jsonl: No such file"), "{e}");
    let e = run(&["tokenize", "--model", &model, "--data", "../rows"]);
    assert!(e.contains("cannot open ../rows: No such file"), "{e}");
}
