//! Files of the Hub over HTTPS, into the cache that its own tools read: asked for only by a name
//! that the user gave.
//!
//! Everything that a server says is anybody's: names of files, sizes, checksums and bodies are
//! bounded and checked before they are believed, and a file gets its name when its content has the
//! checksum that the repository has of it (SHA-256 of large files, the SHA-1 of a git blob of
//! others).

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde_json::Value;
use sha1::{Digest, Sha1};
use ureq::{Agent, Body, config::RedirectAuthHeaders, http::Response};

use super::{Choose, RepoKind, list_of};
use crate::{
    digest::{hex, sha256},
    error::{Error, Result},
    storage::{Disk, Storage, append_all, check_room, uninterrupted, write_file},
};

/// Bytes of the longest list of files that is read, and files of the longest one.
const MAX_LIST: u64 = 16 << 20;
const MAX_FILES: usize = 10_000;

/// Times that a connection may break off, or bring less than this many bytes, in a row.
const TRIES: u32 = 5;
const PROGRESS: u64 = 64 << 10;

/// Where files come from, and where they go.
#[derive(Clone, Debug)]
pub struct HubClient {
    /// As `https://huggingface.co`.
    pub endpoint: String,
    /// The folder of the Hub's own cache.
    pub cache: PathBuf,
    /// Sent to the endpoint alone.
    pub token: Option<String>,
    /// Before the second try; twice as long before each that follows.
    pub pause: Duration,
    /// How long a server may say nothing.
    pub patience: Duration,
}

/// A file of a repository, as the server lists it.
#[derive(Debug)]
struct RemoteFile {
    name: String,
    size: u64,
    /// SHA-256, or SHA-1 of a git blob.
    sum: String,
}

/// Why an answer did not bring a whole file.
enum Failure {
    /// It may come again.
    Broken(String),
    Fatal(Error),
}

impl HubClient {
    /// Downloads the files that `choose` picks of all names of a repository, and gives them their
    /// place in the cache; `seen` hears the name of a file, and how many bytes of how many are
    /// here.
    pub fn download(
        &self,
        kind: RepoKind,
        name: &str,
        choose: Choose<'_>,
        seen: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<()> {
        let (repo, revision) = name.split_once('@').unwrap_or((name, "main"));
        let listed = self.list(kind, repo, revision);
        let (commit, files) = listed.map_err(|e| {
            Error::file(name, format!("is no file or folder here, nor to be had from the Hub: {e}"))
        })?;
        let names: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
        let wanted = choose(&names);
        if wanted.is_empty() {
            let what = match kind {
                RepoKind::Model => "model: wanted config.json and *.safetensors",
                RepoKind::Dataset => "data file",
            };
            let names = names.iter().take(20).map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(Error::file(repo, format!("has on the Hub no {what}; it has {names}")));
        }
        let folder = self.cache.join(kind.folder(repo));
        let blobs = folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(Error::io("create", &blobs))?;
        // One process at a time: each goes on with what another left.
        let lock = folder.join("warpo.lock");
        let held = File::create(&lock).and_then(|file| file.lock().map(|()| file));
        let _held = held.map_err(Error::io("lock", &lock))?;
        for file in files.iter().filter(|file| wanted.contains(&file.name)) {
            let url = format!(
                "{}{repo}/resolve/{commit}/{}",
                self.base(kind),
                file.name.split('/').map(escaped).collect::<Vec<_>>().join("/")
            );
            self.blob(file, &url, &blobs, seen)?;
        }
        let list = list_of(&folder, &commit);
        let parent = list.parent().unwrap_or(&folder);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        write_file(&Disk, &list, names.join("\n").as_bytes())?;
        // All are here: a snapshot has what was wanted, or is not there.
        let snapshot = folder.join("snapshots").join(&commit);
        for file in files.iter().filter(|file| wanted.contains(&file.name)) {
            let link = snapshot.join(&file.name);
            let parent = link.parent().unwrap_or(&snapshot);
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
            let up = "../".repeat(file.name.matches('/').count() + 2);
            if !link.exists() {
                let _ = fs::remove_file(&link);
                let blob = format!("{up}blobs/{}", file.sum);
                std::os::unix::fs::symlink(blob, &link).map_err(Error::io("create", &link))?;
            }
        }
        if revision != commit {
            let refs = folder.join("refs");
            fs::create_dir_all(&refs).map_err(Error::io("create", &refs))?;
            write_file(&Disk, &refs.join(revision), commit.as_bytes())?;
        }
        Ok(())
    }

    /// The address in front of a repository's name.
    fn base(&self, kind: RepoKind) -> String {
        let datasets = if kind == RepoKind::Dataset { "datasets/" } else { "" };
        format!("{}/{datasets}", self.endpoint.trim_end_matches('/'))
    }

    /// Asks for an address, from byte `from` on.
    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let agent: Agent = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(self.endpoint.starts_with("https://"))
            .max_redirects(5)
            // A repository that was renamed answers so.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(self.patience))
            .timeout_recv_response(Some(self.patience))
            .timeout_per_read(Some(self.patience))
            .user_agent(concat!("warpo/", env!("CARGO_PKG_VERSION")))
            // A length is that of the file.
            .accept_encoding("identity")
            .build()
            .into();
        let mut request = agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let fatal = |message: String| Err(Failure::Fatal(Error::file(url, message)));
        let answer = match request.call() {
            Ok(answer) => answer,
            Err(e @ (ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::HostNotFound))
            | Err(e @ (ureq::Error::ConnectionFailed | ureq::Error::Protocol(_))) => {
                return Err(Failure::Broken(e.to_string()));
            }
            Err(e) => return fatal(format!("cannot be asked for: {e}")),
        };
        match answer.status().as_u16() {
            200 | 206 => Ok(answer),
            401 | 403 => fatal(match self.token {
                Some(_) => "is refused with this HF_TOKEN: accept its terms on the Hub, or take \
                            another token"
                    .into(),
                None => "is refused: it does not exist, is not public, or has terms to accept; \
                         HF_TOKEN has the token of your account"
                    .into(),
            }),
            404 => fatal("is not on the Hub".into()),
            416 => Err(Failure::Broken("it has fewer bytes than are here".into())),
            code @ (408 | 425 | 429 | 500..) => Err(Failure::Broken(format!("it answers {code}"))),
            code => fatal(format!("answers with status {code}, wanted 200")),
        }
    }

    /// Tries again what broke off, with pauses; `once` says whether it came further.
    fn patiently<R>(
        &self,
        (url, tries): (&str, u32),
        mut once: impl FnMut() -> (bool, Result<R, Failure>),
    ) -> Result<R> {
        let mut broken = 0;
        loop {
            let why = match once() {
                (_, Ok(done)) => return Ok(done),
                (_, Err(Failure::Fatal(e))) => return Err(e),
                (further, Err(Failure::Broken(why))) => {
                    broken = if further { 0 } else { broken + 1 };
                    why
                }
            };
            if broken == tries {
                let hint =
                    if tries == TRIES { "; the same command goes on where it ended" } else { "" };
                return Err(Error::file(url, format!("broke off {tries} times: {why}{hint}")));
            }
            thread::sleep(self.pause * (1 << broken));
        }
    }

    /// The commit of a revision, and its files.
    fn list(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
    ) -> Result<(String, Vec<RemoteFile>)> {
        let url = format!(
            "{}/api/{}/{repo}/revision/{revision}?blobs=true",
            self.endpoint.trim_end_matches('/'),
            kind.name()
        );
        // Nothing is lost yet: who has no network hears it soon.
        let text = self.patiently((&url, 2), || {
            let read = self.get(&url, 0).and_then(|answer| {
                let mut text = Vec::new();
                let n = answer.into_body().into_reader().take(MAX_LIST + 1).read_to_end(&mut text);
                match n {
                    Ok(n) if n as u64 > MAX_LIST => {
                        let message = format!("has a list of more than {MAX_LIST} bytes");
                        Err(Failure::Fatal(Error::file(&*url, message)))
                    }
                    Ok(_) => Ok(text),
                    Err(e) => Err(Failure::Broken(e.to_string())),
                }
            });
            (false, read)
        })?;
        let wrong = |what: &str| Error::file(&*url, format!("answers with {what}"));
        let all: Value = serde_json::from_slice(&text).map_err(|_| wrong("no JSON"))?;
        let commit = all["sha"].as_str().filter(|sha| is_sum(sha, 40));
        let commit = commit.ok_or_else(|| wrong("no commit"))?.to_owned();
        let files = all["siblings"].as_array().ok_or_else(|| wrong("no list of files"))?;
        if files.len() > MAX_FILES {
            return Err(wrong(&format!("more than {MAX_FILES} files")));
        }
        let read = |file: &Value| {
            let name = file["rfilename"].as_str().unwrap_or_default();
            if !is_safe(name) {
                return Err(wrong(&format!("a file that is called {name:?}")));
            }
            let large = &file["lfs"];
            let (size, sum) = match large.is_object() {
                true => (&large["size"], large["sha256"].as_str().filter(|s| is_sum(s, 64))),
                false => (&file["size"], file["blobId"].as_str().filter(|s| is_sum(s, 40))),
            };
            let (Some(size), Some(sum)) = (size.as_u64(), sum) else {
                return Err(wrong(&format!("no size or checksum of {name:?}")));
            };
            Ok(RemoteFile { name: name.into(), size, sum: sum.into() })
        };
        Ok((commit, files.iter().map(read).collect::<Result<_>>()?))
    }

    /// Downloads a file to its place among the blobs, if it is not there.
    fn blob(
        &self,
        file: &RemoteFile,
        url: &str,
        blobs: &Path,
        seen: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<()> {
        let RemoteFile { name, size, sum } = file;
        let (blob, aside) = (blobs.join(sum), blobs.join(format!("{sum}.incomplete")));
        let len = |path: &Path| fs::metadata(path).map_or(0, |about| about.len());
        if blob.exists() && len(&blob) == *size {
            return Ok(());
        }
        check_room(&Disk, name, blobs, size.saturating_sub(len(&aside)))?;
        seen(name, len(&aside), *size);
        self.patiently((url, TRIES), || {
            let before = len(&aside);
            let done = self.rest(url, &aside, *size, &mut |done| seen(name, done, *size));
            (len(&aside) >= before + PROGRESS, done)
        })?;
        let mut from = File::open(&aside).map_err(Error::io("open", &aside))?;
        let got = match sum.len() {
            64 => sha256(&mut from).map(|(sum, _)| hex(sum)),
            _ => git_blob(&mut from, *size),
        };
        let got = got.map_err(Error::io("read", &aside))?;
        if got != *sum {
            let _ = Disk.remove(&aside);
            let message = format!("has the checksum {got}, wanted {sum}: it is deleted");
            return Err(Error::file(url, message));
        }
        Disk.rename(&aside, &blob).map_err(Error::io("write", &blob))?;
        Disk.sync_dir(blobs).map_err(Error::io("write", blobs))
    }

    /// Appends what is missing of a file.
    fn rest(
        &self,
        url: &str,
        aside: &Path,
        size: u64,
        seen: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let io = |e| Failure::Fatal(Error::io("write", aside)(e));
        let mut at = fs::metadata(aside).map_or(0, |about| about.len());
        if at > size {
            at = 0;
        }
        if at < size || size == 0 {
            let answer = self.get(url, at)?;
            // Without a part the file comes from its beginning.
            let part = answer.headers().get("content-range").and_then(|v| v.to_str().ok());
            let part = part.filter(|_| answer.status() == 206).map(str::to_owned);
            match part {
                Some(part) if !part.starts_with(&format!("bytes {at}-")) => {
                    let message = format!("sends {part:?}, wanted what follows byte {at}");
                    return Err(Failure::Fatal(Error::file(url, message)));
                }
                Some(_) => {}
                None => at = 0,
            }
            let mut out = uninterrupted(|| Disk.append_after(aside, at)).map_err(io)?;
            let (mut body, mut buffer) = (answer.into_body().into_reader(), vec![0; 1 << 17]);
            loop {
                let n = match uninterrupted(|| body.read(&mut buffer)) {
                    Ok(0) => break,
                    Ok(n) => n,
                    Err(e) => return Err(Failure::Broken(e.to_string())),
                };
                at += n as u64;
                if at > size {
                    let _ = Disk.remove(aside);
                    let message = format!("sends more than the {size} bytes that it has");
                    return Err(Failure::Fatal(Error::file(url, message)));
                }
                append_all(&mut *out, &buffer[..n]).map_err(io)?;
                seen(at);
            }
            out.sync().map_err(io)?;
        }
        match at == size {
            true => Ok(()),
            false => Err(Failure::Broken(format!("it ended after {at} of {size} bytes"))),
        }
    }
}

/// A part of an address.
fn escaped(part: &str) -> String {
    let one = |b: u8| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(b).to_string()
        }
        b => format!("%{b:02X}"),
    };
    part.bytes().map(one).collect()
}

/// A checksum of so many digits.
fn is_sum(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a name stays within its folder.
fn is_safe(name: &str) -> bool {
    let part = |part: &str| {
        let control = part.chars().any(|c| c.is_control() || c == '\\');
        !matches!(part, "" | "." | "..") && part.len() <= 255 && !control
    };
    name.split('/').all(part) && name.split('/').count() <= 16
}

/// What git calls a file of this size.
fn git_blob(from: &mut impl Read, size: u64) -> std::io::Result<String> {
    let (mut hash, mut buffer) = (Sha1::new(), vec![0; 1 << 17]);
    hash.update(format!("blob {size}\0"));
    loop {
        match uninterrupted(|| from.read(&mut buffer))? {
            0 => return Ok(hex(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}
