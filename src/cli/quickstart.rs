//! `warpo quickstart`: the whole job on a small real model.

use crate::error::Result;

/// Train a small model from real human labels: SFT, reward model, PPO, report
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_args: &Args) -> Result<()> {
    Ok(())
}
