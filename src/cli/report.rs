//! `warpo report`: a run on one page.

use std::path::PathBuf;

use crate::{error::Result, eval};

/// Write one HTML page with curves, samples and a rollout browser; it needs no network
#[derive(Debug, clap::Args)]
pub(super) struct ReportArgs {
    /// The folder of a run, or of several
    run: PathBuf,
    /// The page [default: RUN/report.html]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// About so many rollouts in the page, evenly spread over the steps
    #[arg(long, value_name = "N", default_value_t = 1000)]
    samples: usize,
}

pub(super) fn run(args: &ReportArgs) -> Result<()> {
    let page = args.out.clone().unwrap_or_else(|| args.run.join("report.html"));
    eval::report(&args.run, &page, args.samples)?;
    super::print(&format!("{}\n", page.display()))
}
