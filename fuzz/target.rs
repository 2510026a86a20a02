//! Every target is this program; its name says what it feeds.

#![no_main]

use std::{path::PathBuf, sync::LazyLock};

#[path = "../tests/fuzz/targets.rs"]
#[allow(dead_code)]
mod targets;

use targets::{TARGETS, Target};

static TARGET: LazyLock<(&Target, PathBuf)> = LazyLock::new(|| {
    let name = env!("CARGO_BIN_NAME");
    let target = TARGETS.iter().find(|t| t.name == name).expect("a target of this name");
    let dir = std::env::temp_dir().join(format!("warpo-fuzz-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    (target.prepare)(&dir);
    // libFuzzer makes every panic a crash; those that the product catches are none.
    std::panic::set_hook(Box::new(|_| ()));
    (target, dir)
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let (target, dir) = &*TARGET;
    (target.run)(dir, input);
});
