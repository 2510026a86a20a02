//! `warpo config`: a complete commented configuration.

use crate::{algorithms::algorithm, config, error::Result, train::Settings};

/// Print a complete commented configuration of an algorithm
#[derive(Debug, clap::Args)]
pub(super) struct ConfigArgs {
    #[arg(help = super::algorithms())]
    algorithm: String,
    /// Settings of another system; the printed file names those that there are
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
}

pub(super) fn run(args: &ConfigArgs) -> Result<()> {
    let entry = algorithm(&args.algorithm)?;
    let (settings, section) = Settings::of_preset(entry, args.preset.as_deref())?;
    let mut head = format!("# {}\n# warpo train {} --config THIS_FILE\n", entry.about, entry.name);
    for preset in entry.presets {
        let chosen = args.preset.as_deref() == Some(preset.name);
        let mark = if chosen { ", which is this" } else { "" };
        head += &format!("# --preset {}{mark}: {}\n", preset.name, preset.about);
    }
    super::print(&(head + "\n" + &config::template(&[&settings, &*section])))
}
