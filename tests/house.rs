//! Rules of the house: who may name whom, where `unsafe` may stand, how large things may be.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

const LAYERS: &[(&str, u32)] = &[
    ("error", 0),
    ("digest", 0),
    ("shape", 1),
    ("rng", 1),
    ("config", 1),
    ("device", 10),
    ("storage", 12),
    ("hub", 15),
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

/// All files that are written by hand, Rust and CUDA.
fn written() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for dir in ["src", "tests", "benches", "kernels"] {
        files_of(&root().join(dir), &["rs", "cu", "cuh", "h", "cpp"], &mut files);
    }
    files
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Comments end within 100 columns, in Rust and in CUDA.
#[test]
fn comments_end_within_100_columns() {
    for path in written() {
        let text = std::fs::read_to_string(&path).unwrap();
        for (i, line) in text.lines().enumerate() {
            let long = line.contains("//") && line.chars().count() > 100;
            let code = line.contains("http") || !line.trim_start().starts_with("//");
            assert!(!long || code, "{}:{} is too long", path.display(), i + 1);
        }
    }
}

/// Every test that a table of README.md, kernels/README.md or SECURITY.md names is there.
#[test]
fn the_readmes_name_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("tests"), &mut files);
    let tests: String = files.iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
    let tables = [
        ("README.md", "| property | test |", 10),
        ("kernels/README.md", "| on a simulated device | test |", 7),
        ("SECURITY.md", "| promise | test |", 10),
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

/// SECURITY.md says of each direct dependency why it is here, and of nothing else.
#[test]
fn every_direct_dependency_has_its_reason() {
    let text = |file: &str| std::fs::read_to_string(root().join(file)).unwrap();
    let (manifest, security) = (text("Cargo.toml"), text("SECURITY.md"));
    let mut wanted: Vec<&str> = manifest
        .split("\n[")
        .filter(|section| section.split(']').next().unwrap().ends_with("dependencies"))
        .flat_map(|section| section.lines().filter_map(|line| line.split_once(" = ")))
        .map(|(name, _)| name)
        .collect();
    wanted.sort_unstable();
    wanted.dedup();
    let table = security.split("| crate |").nth(1).unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let cells: Vec<Vec<&str>> =
        rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect();
    assert!(cells.iter().all(|row| row.len() == 4 && row.iter().all(|cell| !cell.is_empty())));
    assert_eq!(cells.iter().map(|row| row[0]).collect::<Vec<_>>(), wanted);
    assert!(wanted.contains(&"serde") && wanted.contains(&"criterion"));
}

/// Nothing in `src` opens a connection or starts a program but rewards that a config names;
/// `deny.toml` refuses crates that would.
#[test]
fn nothing_reaches_for_the_network() {
    const SOCKETS: &[&str] = &[
        "TcpStream",
        "TcpListener",
        "UdpSocket",
        "UnixStream",
        "UnixListener",
        "UnixDatagram",
        "ToSocketAddrs",
        "socket",
        "getaddrinfo",
        "execv",
        "execve",
        "execvp",
        "fork",
        "posix_spawn",
    ];
    let (mut connect, mut start, mut ask) = (Vec::new(), Vec::new(), Vec::new());
    for (file, text) in all() {
        let text = code(&text);
        if text.split(|c| !is_word(c)).any(|word| word == "ureq") {
            ask.push(file.clone());
        }
        if text.split(|c| !is_word(c)).any(|word| SOCKETS.contains(&word)) {
            connect.push(file.clone());
        }
        let program = text.contains("process::Command") || text.contains("libc::system");
        let imported =
            paths(&text).iter().any(|(path, _)| path.join("::") == "std::process::Command");
        if program || imported {
            start.push(file);
        }
    }
    assert_only(&[], connect, "files that open connections");
    assert_only(&["hub/download.rs", "rollout/rewards/http.rs"], ask, "files that speak HTTP");
    let rewards = ["rollout/rewards/code.rs", "rollout/rewards/process.rs"];
    assert_only(&rewards, start, "files that start programs");
}

/// No file is longer than 600 lines.
#[test]
fn files_end_within_600_lines() {
    const LEFT: &[&str] = &[];
    let mut long = Vec::new();
    for path in written() {
        if std::fs::read_to_string(&path).unwrap().lines().count() > 600 {
            long.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
        }
    }
    assert_only(LEFT, long, "files of more than 600 lines");
}

/// No function takes more than 6 arguments besides `self`: a struct with named fields takes the
/// place of a long list.
#[test]
fn functions_have_at_most_6_arguments() {
    const LEFT: &[&str] = &[];
    let mut long = Vec::new();
    for (file, text) in all() {
        let text = code(&text);
        for (at, _) in text.match_indices("fn ") {
            let list = parameters(&text[at..]);
            if list.iter().filter(|p| !p.ends_with("self")).count() > 6 {
                long.push(file.clone());
            }
        }
    }
    assert_only(LEFT, long, "files with functions of more than 6 arguments");
}

/// Every kernel is launched from the struct that `build.rs` writes for it, whose fields have names;
/// no function of a kernel's module is called or passed on.
#[test]
fn kernels_are_launched_with_named_arguments() {
    const LEFT: &[&str] = &[];
    let mut positional = Vec::new();
    for (file, text) in all() {
        let text = code(&text);
        let paths = paths(&text);
        let aliases = paths.iter().filter(|(path, name)| {
            !name.is_empty() && path.iter().rev().nth(1).is_some_and(|p| p == "kernels")
        });
        for alias in aliases.map(|(_, alias)| alias) {
            let prefix = format!("{alias}::");
            if text.split(&prefix).skip(1).any(|rest| rest.starts_with(|c: char| c.is_lowercase()))
            {
                positional.push(file.clone());
            }
        }
    }
    assert_only(LEFT, positional, "files that launch kernels with positional arguments");
}

/// The files of a folder use each other in one direction: what two of them share stands below both.
#[test]
fn files_of_a_folder_form_no_circle() {
    const LEFT: &[&str] = &[];
    let files: Vec<(Vec<String>, Paths)> = all()
        .into_iter()
        .map(|(file, text)| {
            let stem = file.trim_end_matches(".rs").trim_end_matches("/mod");
            (stem.split('/').map(String::from).collect(), paths(&code(&text)))
        })
        .collect();
    // Folder, user, used.
    let mut edges = BTreeSet::new();
    for (from, uses) in &files {
        for (path, _) in uses {
            let to = resolve(&files, from, path);
            let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
            if let (Some(user), Some(used)) = (from.get(shared), to.get(shared)) {
                edges.insert((from[..shared].join("/"), user.clone(), used.clone()));
            }
        }
    }
    let mut reached = edges.clone();
    loop {
        let before = reached.len();
        let farther: Vec<_> = reached
            .iter()
            .flat_map(|(folder, user, by)| {
                let next = edges.iter().filter(move |e| e.0 == *folder && e.1 == *by);
                next.map(move |e| (folder.clone(), user.clone(), e.2.clone()))
            })
            .collect();
        reached.extend(farther);
        if reached.len() == before {
            break;
        }
    }
    let back: Vec<_> = edges
        .iter()
        .filter(|(f, a, b)| reached.contains(&(f.clone(), b.clone(), a.clone())))
        .collect();
    let folders = back.iter().map(|edge| edge.0.clone()).collect();
    assert_only(LEFT, folders, &format!("folders with a circle, {back:?}"));
}

/// Every public function of an op is called from another file of `src`.
#[test]
fn ops_have_callers() {
    // Tests hold the tables of tiles and of angles to what these say.
    let files: Vec<(String, String)> = all().into_iter().map(|(f, t)| (f, code(&t))).collect();
    const LEFT: &[&str] = &["clocks"];
    let mut idle = Vec::new();
    for (file, text) in files.iter().filter(|(file, _)| file.starts_with("ops/")) {
        for name in text.split("pub fn ").skip(1).filter_map(|t| t.split(|c| !is_word(c)).next()) {
            let words = |text: &str| text.split(|c| !is_word(c)).any(|word| word == name);
            if !files.iter().any(|(other, text)| other != file && words(text)) {
                idle.push(name.to_owned());
            }
        }
    }
    assert_only(LEFT, idle, "functions that only their own file and tests call");
}

/// No two types of the crate share a name.
#[test]
fn type_names_are_used_once() {
    const LEFT: &[&str] = &[];
    let (mut seen, mut twice) = (BTreeSet::new(), Vec::new());
    for (_, text) in all() {
        for line in code(&text).lines() {
            let mut words = line.split_whitespace().skip_while(|w| w.starts_with("pub"));
            let named = match words.next() {
                Some("struct" | "enum" | "trait" | "union") => true,
                // Indented, it belongs to a trait.
                Some("type") => !line.starts_with(' '),
                _ => false,
            };
            let name = words.next().and_then(|w| w.split(|c| !is_word(c)).next()).unwrap_or("");
            if named && !name.is_empty() && !seen.insert(name.to_owned()) {
                twice.push(name.to_owned());
            }
        }
    }
    assert_only(LEFT, twice, "types whose name is used twice");
}

/// What breaks a rule is what `left` lists, and what no longer breaks it leaves the list.
#[track_caller]
fn assert_only(left: &[&str], mut found: Vec<String>, what: &str) {
    found.sort();
    found.dedup();
    let new: Vec<_> = found.iter().filter(|f| !left.contains(&f.as_str())).collect();
    assert!(new.is_empty(), "{what}: {new:#?}");
    let gone: Vec<_> = left.iter().filter(|l| !found.iter().any(|f| f == *l)).collect();
    assert!(gone.is_empty(), "{what}: delete from LEFT what is in order now: {gone:#?}");
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Rust without its comments and what stands in its literals.
fn code(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    let end = |rest: &str, from: usize, mark: &str| {
        rest[from..].find(mark).map_or(rest.len(), |at| from + at + mark.len())
    };
    while let Some(c) = rest.chars().next() {
        let hashes =
            rest.strip_prefix('r').map_or(0, |r| r.len() - r.trim_start_matches('#').len());
        let after = out.ends_with(is_word) && !out.ends_with('b');
        let raw = !after && rest.starts_with('r') && rest[1 + hashes..].starts_with('"');
        let skip = if rest.starts_with("//") {
            end(rest, 0, "\n") - 1
        } else if raw {
            end(rest, hashes + 2, &format!("\"{}", "#".repeat(hashes)))
        } else if c == '"' || rest.starts_with("'\\") {
            // Up to the mark that no backslash precedes.
            let mut escaped = false;
            let close = |x: char| {
                let ends = x == c && !escaped;
                escaped = x == '\\' && !escaped;
                ends
            };
            rest[1..].find(close).unwrap() + 2
        } else if c == '\'' && rest.chars().nth(2) == Some('\'') {
            end(rest, 1, "'")
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        if !rest.starts_with("//") {
            out += "\"\"";
        }
        rest = &rest[skip..];
    }
    out
}

/// The parameters of the function whose `fn` begins `text`.
fn parameters(text: &str) -> Vec<&str> {
    let (mut depth, mut from, mut list) = (0, None, Vec::new());
    for (at, c) in text.char_indices() {
        let arrow = c == '>' && text[..at].ends_with(['-', '=']);
        match c {
            '(' if depth == 0 => from = Some(at + 1),
            ',' | ')' if depth == 1 && from.is_some() => {
                list.extend(from.map(|from| text[from..at].trim()).filter(|p| !p.is_empty()));
                from = Some(at + 1);
            }
            _ => {}
        }
        depth += i32::from("([{<".contains(c)) - i32::from(")]}>".contains(c) && !arrow);
        if depth == 0 && from.is_some() {
            break;
        }
    }
    list
}

/// Paths, with the name under which a `use` makes each known.
type Paths = Vec<(Vec<String>, String)>;

/// The paths that are imported, and those that begin at the crate or at a module above.
fn paths(text: &str) -> Paths {
    let mut all = Vec::new();
    for start in ["use ", "crate::", "super::"] {
        for (at, _) in text.match_indices(start) {
            let begins = !text[..at].ends_with(|c| is_word(c) || c == ':');
            if begins {
                let mut found = Vec::new();
                match &text[at..] {
                    import if start == "use " => tree(&import[start.len()..], &[], &mut found),
                    path => tree(path, &[], &mut found),
                };
                if start != "use " {
                    found.iter_mut().for_each(|(_, name)| name.clear());
                }
                all.append(&mut found);
            }
        }
    }
    all
}

/// Reads the paths of `a::{b, c::d as e}` and gives what follows them.
fn tree<'a>(text: &'a str, above: &[String], all: &mut Paths) -> &'a str {
    let mut path = above.to_vec();
    let mut rest = text.trim_start();
    loop {
        if let Some(group) = rest.strip_prefix('{') {
            rest = group.trim_start();
            while !rest.starts_with('}') && !rest.is_empty() {
                let after = tree(rest, &path, all).trim_start();
                rest = after.strip_prefix(',').unwrap_or(after).trim_start();
                if after.len() == rest.len() && !rest.starts_with('}') {
                    return "";
                }
            }
            return rest.strip_prefix('}').unwrap_or("");
        }
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        path.push(rest[..end].to_owned());
        rest = rest[end..].trim_start_matches('*');
        let Some(next) = rest.strip_prefix("::") else { break };
        rest = next;
    }
    let mut name = path.last().cloned().unwrap_or_default();
    if let Some(alias) = rest.strip_prefix(" as ") {
        let end = alias.find(|c| !is_word(c)).unwrap_or(alias.len());
        name = alias[..end].to_owned();
        rest = &alias[end..];
    }
    all.push((path, name));
    rest
}

/// The file that `path` leads to when `from` names it; what a module imports from a file below it
/// stands in that file.
fn resolve(files: &[(Vec<String>, Paths)], from: &[String], path: &[String]) -> Vec<String> {
    let file = |at: &[String]| files.iter().find(|(file, _)| file == at);
    let mut at = from.to_vec();
    for word in path {
        match word.as_str() {
            "crate" => at.clear(),
            "super" => drop(at.pop()),
            "self" => {}
            _ => at.push(word.clone()),
        }
        if at.is_empty() || file(&at).is_some() {
            continue;
        }
        at.pop();
        let imports = file(&at).into_iter().flat_map(|(_, uses)| uses);
        let below = |path: &[String]| file(&[&at, &path[..1]].concat()).is_some();
        return match imports.into_iter().find(|(path, name)| name == word && below(path)) {
            Some((path, _)) => resolve(files, &at, path),
            None => at,
        };
    }
    at
}
