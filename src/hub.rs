//! Names of the Hugging Face Hub, in the cache that its own tools fill, too. Where a name is looked
//! for, nothing is downloaded; commands ask [`client`] for what is not there.
//!
//! A snapshot lies at `models--ORG--NAME/snapshots/COMMIT` (`datasets--...`), and `refs/main` there
//! says which commit the name stands for. What lies at a path as it is given comes first.

mod download;

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

pub use download::HubClient;

use serde_json::Value;

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
        Some((name, rest)) if rest.as_os_str().is_empty() => snapshot(RepoKind::Model, name),
        _ => Ok(path.to_owned()),
    }
}

/// What a name of the Hub stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    Model,
    Dataset,
}

impl RepoKind {
    fn name(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// The folder of a repository in the cache.
    fn folder(self, repo: &str) -> String {
        format!("{}--{}", self.name(), repo.replace('/', "--"))
    }
}

/// The files of a model that are read, of all that its repository has.
pub fn model_files(all: &[String]) -> Vec<String> {
    const READ: [&str; 9] = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
    ];
    let has = |name: &str| all.iter().any(|file| file == name);
    let shard = |name: &str| name.starts_with("model-") && name.ends_with(".safetensors");
    let is_sharded = has("model.safetensors.index.json");
    let is_read = |name: &&String| {
        READ.contains(&name.as_str())
            || match is_sharded {
                true => *name == "model.safetensors.index.json" || shard(name),
                false => *name == "model.safetensors",
            }
    };
    let files: Vec<String> = all.iter().filter(is_read).cloned().collect();
    let has_config = has("config.json") || has("adapter_config.json");
    let is_model = has_config && files.iter().any(|f| f.ends_with(".safetensors"));
    if is_model { files } else { Vec::new() }
}

/// What `choose` picks of the names of a repository's files.
pub type Choose<'a> = &'a dyn Fn(&[String]) -> Vec<String>;

/// Whether the files of a name that `choose` picks are in the cache. Its own tools keep no list of
/// what a repository has: of theirs a model is here with its weights, a data set with the path.
pub fn is_here(kind: RepoKind, name: &str, rest: &Path, choose: Choose<'_>) -> bool {
    let Ok(found) = snapshot(kind, name) else { return false };
    let has = |file: &str| found.join(file).exists();
    if let Some(all) = listed(&found) {
        let wanted = choose(&all);
        return !wanted.is_empty() && wanted.iter().all(|file| has(file));
    }
    match kind {
        RepoKind::Model => match has("adapter_config.json") {
            true => has("adapter_model.safetensors"),
            false => has("config.json") && has_weights(&found),
        },
        RepoKind::Dataset => {
            let is_pattern = rest.to_string_lossy().contains(['*', '?']);
            let rest = if is_pattern { rest.parent().unwrap_or(rest) } else { rest };
            rest.as_os_str().is_empty() || found.join(rest).exists()
        }
    }
}

/// Whether a snapshot has one file of weights, or all shards that its index names.
fn has_weights(found: &Path) -> bool {
    let Ok(text) = file::read_text(&found.join("model.safetensors.index.json"), 64 << 20) else {
        return found.join("model.safetensors").exists();
    };
    let index: Value = serde_json::from_str(&text).unwrap_or_default();
    let shards = index["weight_map"].as_object().into_iter().flat_map(|map| map.values());
    let mut shards = shards.filter_map(Value::as_str).peekable();
    shards.peek().is_some() && shards.all(|shard| found.join(shard).exists())
}

/// Where the names of all files of a commit are kept, beside its snapshot.
fn list_of(repository: &Path, commit: &str) -> PathBuf {
    repository.join("warpo").join(commit)
}

/// The names of all files of a snapshot's commit, if we have downloaded some of them.
fn listed(found: &Path) -> Option<Vec<String>> {
    let list = list_of(found.parent()?.parent()?, found.file_name()?.to_str()?);
    let text = file::read_text(&list, 16 << 20).ok()?;
    Some(text.lines().map(str::to_owned).collect())
}

/// Who downloads, as the user's environment says; `None` where `HF_HUB_OFFLINE` forbids it, or
/// nothing says where the cache is.
pub fn client() -> Result<Option<HubClient>> {
    let set = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
    let Some(cache) = cache().filter(|_| !is_offline()) else { return Ok(None) };
    let token = set("HF_TOKEN").map(|token| token.trim().to_owned());
    if token.iter().any(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
        let message = "has characters that no token has, wanted that of an account of the Hub";
        return Err(Error::file("HF_TOKEN", message));
    }
    let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
    let (pause, patience) = (Duration::from_secs(1), Duration::from_secs(30));
    Ok(Some(HubClient { endpoint, cache, token, pause, patience }))
}

/// Whether the user forbids to ask the Hub, as its own tools read it.
pub fn is_offline() -> bool {
    let on = |v: String| matches!(&*v.to_uppercase(), "1" | "ON" | "YES" | "TRUE");
    env::var("HF_HUB_OFFLINE").is_ok_and(on)
}

/// The folder of a data set's snapshot.
pub fn dataset(name: &str) -> Result<PathBuf> {
    snapshot(RepoKind::Dataset, name)
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

/// The snapshot of a name.
fn snapshot(kind: RepoKind, name: &str) -> Result<PathBuf> {
    let Some(cache) = cache() else {
        let message = "is not there, and no HF_HOME or HOME says where the Hub's cache is";
        return Err(Error::file(name, message));
    };
    let (repo, revision) = name.split_once('@').unwrap_or((name, "main"));
    let of = if kind == RepoKind::Dataset { " --repo-type dataset" } else { "" };
    let forbidden = if is_offline() { "HF_HUB_OFFLINE forbids to download it; " } else { "" };
    let get =
        format!("{forbidden}`hf download {repo}{of}` (pip install huggingface_hub) puts it there");
    let folder = cache.join(kind.folder(repo));
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
