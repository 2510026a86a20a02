//! Names of the Hugging Face Hub, in the cache that its own tools fill: nothing is downloaded here.
//!
//! A snapshot lies at `models--ORG--NAME/snapshots/COMMIT` (`datasets--...`), and `refs/main` there
//! says which commit the name stands for. What lies at a path as it is given comes first.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use crate::{
    device::file,
    error::{Error, Result},
};

/// A name as `ORG/NAME` or `ORG/NAME@REVISION`, and the path in it behind a slash. `None` for paths
/// to what is there, and for what no name looks like.
pub fn name_of(path: &Path) -> Option<(&str, &Path)> {
    let text = path.to_str().filter(|_| !path.exists())?;
    let second = text.match_indices('/').nth(1).map_or(text.len(), |(at, _)| at);
    let (name, rest) = text.split_at(second);
    let part = |part: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        !part.is_empty() && part.chars().all(fits) && !part.starts_with('.')
    };
    let (org, own) = name.split_once('/')?;
    let (own, revision) = own.split_once('@').unwrap_or((own, "main"));
    let is_name = [org, own, revision].into_iter().all(part) && !Path::new(name).exists();
    is_name.then(|| (name, Path::new(rest.trim_start_matches('/'))))
}

/// The folder of a model: the snapshot of a name of the Hub, or the path as it is.
pub fn model(path: &Path) -> Result<PathBuf> {
    match name_of(path) {
        Some((name, rest)) if rest.as_os_str().is_empty() => snapshot("models", name),
        _ => Ok(path.to_owned()),
    }
}

/// The folder of a data set's snapshot.
pub fn dataset(name: &str) -> Result<PathBuf> {
    snapshot("datasets", name)
}

/// Where the Hub's tools keep what they download, as `huggingface_hub` looks for it.
fn cache() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = set("HOME");
    // As there, `~` is the user's folder.
    let full = |path: PathBuf| match (path.strip_prefix("~"), &home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    };
    let own = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE"));
    let base = || set("HF_HOME").or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface")));
    let user = || home.as_ref().map(|home| home.join(".cache/huggingface"));
    own.or_else(|| base().or_else(user).map(|base| base.join("hub"))).map(full)
}

/// The snapshot of a name; `kind` is models or datasets.
fn snapshot(kind: &str, name: &str) -> Result<PathBuf> {
    let Some(cache) = cache() else {
        let message = "is not there, and no HF_HOME or HOME says where the Hub's cache is";
        return Err(Error::file(name, message));
    };
    let (repo, revision) = name.split_once('@').unwrap_or((name, "main"));
    let of = if kind == "datasets" { " --repo-type dataset" } else { "" };
    let get = format!("`hf download {repo}{of}` (pip install huggingface_hub) puts it there");
    let folder = cache.join(format!("{kind}--{}", repo.replace('/', "--")));
    if !folder.is_dir() {
        let looked = folder.display();
        return Err(Error::file(name, format!("is not there, nor is {looked}: {get}")));
    }
    let snapshots = folder.join("snapshots");
    let found: Vec<PathBuf> = match fs::read_dir(&snapshots) {
        Ok(all) => all.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(_) => Vec::new(),
    };
    let meant = file::read_text(&folder.join("refs").join(revision), 4096).ok();
    let commit = meant.as_deref().map_or(revision, str::trim);
    let is_main = revision == "main" && meant.is_none();
    match (found.iter().find(|path| path.ends_with(commit)), &found[..]) {
        (Some(path), _) => Ok(path.clone()),
        (None, [one]) if is_main => Ok(one.clone()),
        (None, _) => {
            let looked = snapshots.display();
            Err(Error::file(name, format!("has no revision {commit} in {looked}: {get}")))
        }
    }
}
