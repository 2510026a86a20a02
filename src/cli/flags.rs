//! Settings as flags of their own: `--learning-rate 1e-5` is `--set learning_rate=1e-5`.

use std::ffi::OsString;

use clap::Command;

use crate::{algorithms::ALGORITHMS, config::Section, train::Settings};

/// Commands that take the settings of an algorithm.
const COMMANDS: [&str; 2] = ["train", "plan"];

/// The arguments of a process, in which each flag that such a command does not know has become
/// `--set`. A switch without a value is true; a flag that is given again is a list.
pub(super) fn as_settings(cli: &Command, args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args = args.peekable();
    let mut all: Vec<OsString> = args.by_ref().take(1).collect();
    let named = args.peek().and_then(|name| name.to_str()).unwrap_or_default();
    let command = cli.find_subcommand(named).filter(|c| COMMANDS.contains(&c.get_name()));
    let Some(command) = command else { return all.into_iter().chain(args).collect() };
    let takes_value = |name: &str| {
        let flag = command.get_arguments().find(|a| a.get_long() == Some(name))?;
        Some(flag.get_action().takes_values())
    };
    let switches = switches();
    let mut given: Vec<(String, Vec<String>)> = Vec::new();
    while let Some(arg) = args.next() {
        let flag = arg.to_str().and_then(|text| text.strip_prefix("--"));
        let (name, value) = match flag {
            Some("") => {
                all.push(arg);
                break;
            }
            None | Some("help") => {
                all.push(arg);
                continue;
            }
            Some(flag) => match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            },
        };
        if let Some(takes_value) = takes_value(name) {
            let next = if takes_value && value.is_none() { args.next() } else { None };
            all.push(arg);
            all.extend(next);
            continue;
        }
        let key = name.replace('-', "_");
        let switch = switches.contains(&&*key);
        let fits = |next: &OsString| match next.to_str() {
            Some(text) => matches!(text, "true" | "false") || !switch && !text.starts_with("--"),
            None => !switch,
        };
        let next = if value.is_none() { args.next_if(fits) } else { None };
        let next = next.map(|next| next.to_string_lossy().into_owned());
        let value = value.or(next).or_else(|| switch.then(|| "true".into()));
        match (given.iter_mut().find(|(of, _)| *of == key), value) {
            (Some((_, values)), value) => values.extend(value),
            (None, value) => given.push((key, value.into_iter().collect())),
        }
    }
    for (key, values) in given {
        all.push("--set".into());
        all.push(match &values[..] {
            // Without a value it is no pair, which the config says.
            [] => key.into(),
            [one] => format!("{key}={one}").into(),
            more => format!(
                "{key}=[{}]",
                more.iter().map(|v| toml_of(v)).collect::<Vec<_>>().join(", ")
            )
            .into(),
        });
    }
    all.into_iter().chain(args).collect()
}

/// A value as TOML: a text, if it is none.
fn toml_of(value: &str) -> String {
    let is_toml = format!("x = {value}").parse::<toml::Table>().is_ok();
    if is_toml { value.to_owned() } else { toml::Value::String(value.to_owned()).to_string() }
}

/// The settings of all algorithms that are true or false.
fn switches() -> Vec<&'static str> {
    let own = ALGORITHMS.iter().flat_map(|entry| (entry.section)().keys());
    let all = Section::keys(&Settings::default()).into_iter().chain(own);
    all.filter(|key| key.kind == "true or false").map(|key| key.name).collect()
}
