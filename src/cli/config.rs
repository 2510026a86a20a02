//! `warpo config`: a complete commented configuration.

use crate::{algorithms::algorithm, config, error::Result, train::Settings};

/// Print a complete commented configuration of an algorithm
#[derive(Debug, clap::Args)]
pub(super) struct ConfigArgs {
    #[arg(help = super::algorithms())]
    algorithm: String,
}

pub(super) fn run(args: &ConfigArgs) -> Result<()> {
    let entry = algorithm(&args.algorithm)?;
    let (settings, section) = Settings::defaults(entry)?;
    let head = format!("# {}\n# warpo train {} --config THIS_FILE\n\n", entry.about, entry.name);
    super::print(&(head + &config::template(&[&settings, &*section])))
}
