//! Settings as flags of their own: `--learning-rate 1e-5` is `--set learning_rate=1e-5`.

use std::ffi::OsString;

use clap::Command;

/// Commands that take the settings of an algorithm.
const COMMANDS: [&str; 2] = ["train", "plan"];

/// The arguments of a process, in which each flag that such a command does not know has become
/// `--set`. A flag without a value is true.
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
    while let Some(arg) = args.next() {
        let flag = arg.to_str().and_then(|text| text.strip_prefix("--"));
        let (name, given) = match flag {
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
            let next = if takes_value && given.is_none() { args.next() } else { None };
            all.push(arg);
            all.extend(next);
            continue;
        }
        let text = |next: &OsString| next.to_str().is_some_and(|text| !text.starts_with("--"));
        let next = if given.is_none() { args.next_if(text) } else { None };
        let next = next.map(|next| next.to_string_lossy().into_owned());
        let value = given.or(next).unwrap_or_else(|| "true".into());
        all.push("--set".into());
        all.push(format!("{}={value}", name.replace('-', "_")).into());
    }
    all.into_iter().chain(args).collect()
}
