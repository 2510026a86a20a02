//! `--profile`: where the time of a command goes.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use super::{say, warn};
use crate::{
    device::{Device, Profile},
    error::{Error, Result},
};

/// Whether a command says where its time goes.
#[derive(Debug, clap::Args)]
pub(super) struct Profiling {
    /// Write a trace of phases, ops and kernels to FILE, for <https://ui.perfetto.dev>, and print
    /// tables of them
    #[arg(long = "profile", value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Profiling {
    /// Runs `work` on the device. What it did is told also if it fails or is stopped.
    pub(super) fn on<R>(&self, dev: Device, work: impl FnOnce(&Device) -> Result<R>) -> Result<R> {
        let Some(file) = &self.file else { return work(&dev) };
        // A file that cannot be written is refused before hours of work, not after.
        File::create(file).map_err(Error::io("create", file))?;
        let (dev, profile) = dev.profiled();
        let done = work(&dev);
        match (done, tell(&profile, file)) {
            (Err(e), Err(also)) => {
                warn(&also.to_string());
                Err(e)
            }
            (done, told) => done.and_then(|result| told.map(|()| result)),
        }
    }
}

fn tell(profile: &Profile, file: &Path) -> Result<()> {
    let report = profile.report()?;
    // What was refused before it began has no tables.
    if !report.ops.is_empty() {
        say(&format!("\n{report}\n"));
    }
    profile.write_chrome(file)
}
