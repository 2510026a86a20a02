//! Names of the Hub that are not in its cache: downloaded, with a bar.

use std::{
    io::IsTerminal,
    path::Path,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    data,
    error::Result,
    hub::{self, RepoKind},
};

/// Between lines of a log.
const EVERY: Duration = Duration::from_secs(5);

/// Downloads a model, if its name is one of the Hub that is not in the cache.
pub(super) fn fetch_model(given: &Path) -> Result<()> {
    match hub::name_of(given) {
        Some((name, rest)) if rest.as_os_str().is_empty() => {
            fetch(RepoKind::Model, (name, rest), &hub::model_files)
        }
        _ => Ok(()),
    }
}

/// Downloads data, if its name is one of the Hub that is not in the cache.
pub(super) fn fetch_data(given: &Path) -> Result<()> {
    let Some((name, rest)) = data::dataset_name(given) else { return Ok(()) };
    fetch(RepoKind::Dataset, (name, rest), &|all| data::dataset_files(all, rest))
}

fn fetch(kind: RepoKind, (name, rest): (&str, &Path), choose: hub::Choose<'_>) -> Result<()> {
    if hub::is_here(kind, name, rest, choose) {
        return Ok(());
    }
    // Where nothing may be downloaded, whoever looks for it says so.
    let Some(client) = hub::client()? else { return Ok(()) };
    super::note(&format!("{name} is not here: downloads it from {}", client.endpoint));
    let terminal = std::io::stderr().is_terminal();
    let (mut shown, mut said) = (None::<(String, ProgressBar)>, Instant::now());
    let done = client.download(kind, name, choose, &mut |file, done, total| {
        if terminal {
            if shown.as_ref().is_none_or(|(of, _)| of != file) {
                shown.iter().for_each(|(_, bar)| bar.finish());
                shown = Some((file.to_owned(), bar(file, total)));
            }
            shown.iter().for_each(|(_, bar)| bar.set_position(done));
        } else if said.elapsed() >= EVERY {
            said = Instant::now();
            super::note(&format!("{file}: {} % of {total} bytes", 100 * done / total.max(1)));
        }
    });
    shown.iter().for_each(|(_, bar)| bar.finish());
    done
}

fn bar(file: &str, total: u64) -> ProgressBar {
    let style = "{prefix} {bar:20} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
    let bar = ProgressBar::new(total).with_prefix(super::plain(file));
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}
