//! Rules of the house: who may name whom, where `unsafe` may stand.

use std::path::{Path, PathBuf};

const LAYERS: &[(&str, u32)] = &[
    ("error", 0),
    ("shape", 1),
    ("rng", 1),
    ("config", 1),
    ("device", 10),
    ("ops", 20),
    ("data", 20),
    ("models", 30),
    ("algorithms", 30),
    ("rollout", 40),
    ("eval", 50),
    ("train", 60),
    ("cli", 70),
];

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    files_of(dir, &["rs"], out);
}

fn files_of(dir: &Path, extensions: &[&str], out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let extension = path.extension().and_then(|e| e.to_str());
        if path.is_dir() {
            files_of(&path, extensions, out);
        } else if extension.is_some_and(|e| extensions.contains(&e)) {
            out.push(path);
        }
    }
}

/// The files of `src`: name and text.
pub fn all() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let name = |p: &PathBuf| p.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
    files.iter().map(|p| (name(p), std::fs::read_to_string(p).unwrap())).collect()
}

fn module(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

fn layer(module: &str) -> Option<u32> {
    LAYERS.iter().find(|l| l.0 == module).map(|l| l.1)
}

/// A module names only itself and modules with a strictly smaller layer number.
#[test]
fn imports_point_down() {
    for (file, text) in all() {
        let from = module(&file);
        if from == "lib" || from == "main" {
            continue;
        }
        let level = layer(from).unwrap_or_else(|| panic!("{file}: `{from}` has no layer"));
        // `use crate::{a::.., b::..}` is flattened by taking every word after `crate::` or at the
        // start of a line inside such braces.
        for part in text.split("crate::").skip(1) {
            let names: Vec<&str> = if let Some(group) = part.strip_prefix('{') {
                let mut depth = 1;
                let end = group
                    .find(|c| {
                        depth += i32::from(c == '{') - i32::from(c == '}');
                        depth == 0
                    })
                    .unwrap_or(group.len());
                let mut depth = 0;
                let top = |c: char| {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    c == ',' && depth == 0
                };
                group[..end].split(top).collect()
            } else {
                vec![part]
            };
            for name in names {
                let word = |c: char| !c.is_alphanumeric() && c != '_';
                let name = name.trim().split(word).next().unwrap();
                let Some(to) = layer(name) else { continue };
                let ok = name == from || to < level;
                assert!(ok, "src/{file} (layer {level}) names crate::{name} (layer {to})");
            }
        }
    }
}

/// `unsafe` lives in `device/` and `ffi/` only.
#[test]
fn unsafe_stays_in_device() {
    for (file, text) in all() {
        if matches!(module(&file), "device" | "ffi") {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let word =
                code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe");
            assert!(!word, "src/{file}:{} has `unsafe`", i + 1);
        }
    }
}

/// Comments end within 100 columns, in Rust and in CUDA.
#[test]
fn comments_end_within_100_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["src", "tests", "benches", "kernels"] {
        files_of(&root.join(dir), &["rs", "cu", "cuh", "h", "cpp"], &mut files);
    }
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        for (i, line) in text.lines().enumerate() {
            let long = line.contains("//") && line.chars().count() > 100;
            let code = line.contains("http") || !line.trim_start().starts_with("//");
            assert!(!long || code, "{}:{} is too long", path.display(), i + 1);
        }
    }
}

/// Every test that a table of README.md or kernels/README.md names is there.
#[test]
fn the_readmes_name_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("tests"), &mut files);
    let tests: String = files.iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
    let tables = [
        ("README.md", "| property | test |", 10),
        ("kernels/README.md", "| on a simulated device | test |", 7),
    ];
    for (file, head, count) in tables {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        let table = text.split(head).nth(1).unwrap();
        let rows: Vec<&str> = table.lines().skip(2).take_while(|l| l.starts_with('|')).collect();
        assert_eq!(rows.len(), count, "rows of {file}");
        for row in rows {
            let names: Vec<&str> =
                row.rsplit('|').nth(1).unwrap().split('`').skip(1).step_by(2).collect();
            assert!(!names.is_empty(), "{row}");
            for name in names {
                let there = tests.lines().any(|l| l.starts_with("fn ") && l.contains(name));
                assert!(there, "no test is called {name}");
            }
        }
    }
}
