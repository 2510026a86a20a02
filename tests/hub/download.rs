//! Downloads of names of the Hub, from a server on this machine that may do anything.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sha1::Digest;
use warpo::hub::{HubClient, RepoKind, model_files};

use crate::support::{golden, runs::warpo, temp_dir};

/// What a server is asked.
#[derive(Clone, Debug)]
struct Asked {
    path: String,
    from: usize,
    token: Option<String>,
    host: String,
}

/// An answer: status, more headers, body, and how much of it is sent.
struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
    /// The connection ends after so many bytes.
    sent: usize,
    /// It goes on until the client leaves.
    endless: bool,
    /// Before the body.
    waits: Duration,
}

fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    let (body, headers) = (body.into(), String::new());
    Answer { status, headers, body, sent: usize::MAX, endless: false, waits: Duration::ZERO }
}

/// A server, and all that it was asked.
struct Server {
    endpoint: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    fn new(answers: impl Fn(&Asked, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (all, answers) = (asked.clone(), Arc::new(answers));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (all, answers) = (all.clone(), answers.clone());
                thread::spawn(move || serve(&stream.unwrap(), &all, &*answers));
            }
        });
        Self { endpoint, asked }
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    fn client(&self, cache: &Path) -> HubClient {
        HubClient {
            endpoint: self.endpoint.clone(),
            cache: cache.to_owned(),
            token: Some("hf_secret".into()),
            pause: Duration::from_millis(1),
            patience: Duration::from_millis(300),
        }
    }
}

fn serve(stream: &TcpStream, all: &Mutex<Vec<Asked>>, answers: &dyn Fn(&Asked, usize) -> Answer) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let mut asked = Asked { path, from: 0, token: None, host: String::new() };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        match &*name.to_lowercase() {
            "range" => asked.from = value[6..value.len() - 1].parse().unwrap(),
            "authorization" => asked.token = Some(value.into()),
            "host" => asked.host = value.into(),
            _ => {}
        }
    }
    let count = {
        let mut all = all.lock().unwrap();
        all.push(asked.clone());
        all.len()
    };
    let Answer { status, headers, body, sent, endless, waits } = answers(&asked, count);
    let (mut out, len) = (stream, body.len());
    let size = if endless { String::new() } else { format!("Content-Length: {len}\r\n") };
    let head = format!("HTTP/1.1 {status} X\r\n{size}{headers}Connection: close\r\n\r\n");
    out.write_all(head.as_bytes()).unwrap();
    thread::sleep(waits);
    let _ = out.write_all(&body[..sent.min(len)]);
    while endless && out.write_all(&[7; 4096]).is_ok() {}
}

/// A repository: names and contents; those that begin with "large" are of Git LFS.
type Files = Vec<(&'static str, Vec<u8>)>;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn sum(name: &str, content: &[u8]) -> String {
    match is_large(name) {
        true => hex(sha2::Sha256::digest(content)),
        false => {
            let head = format!("blob {}\0", content.len());
            hex(sha1::Sha1::digest([head.as_bytes(), content].concat()))
        }
    }
}

fn listed(files: &Files) -> Value {
    let one = |(name, content): &(&str, Vec<u8>)| {
        let (size, sum) = (content.len(), sum(name, content));
        match is_large(name) {
            true => json!({ "rfilename": name, "size": 130, "blobId": "ab".repeat(20),
                            "lfs": { "sha256": sum, "size": size, "pointerSize": 130 } }),
            false => json!({ "rfilename": name, "size": size, "blobId": sum }),
        }
    };
    json!({ "sha": COMMIT, "siblings": files.iter().map(one).collect::<Vec<_>>() })
}

/// Answers as the Hub does.
fn honest(files: &Files, asked: &Asked) -> Answer {
    if asked.path.starts_with("/api/") {
        return answer(200, listed(files).to_string());
    }
    let name = asked.path.split_once(&format!("/resolve/{COMMIT}/")).unwrap().1;
    let Some((_, content)) = files.iter().find(|(n, _)| *n == name) else {
        return answer(404, "");
    };
    let mut part = answer(if asked.from > 0 { 206 } else { 200 }, &content[asked.from..]);
    let n = content.len();
    if asked.from > 0 {
        part.headers = format!("Content-Range: bytes {}-{}/{n}\r\n", asked.from, n - 1);
    }
    part
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * i / 7) as u8).collect()
}

fn repository() -> Files {
    vec![
        ("README.md", b"not read".to_vec()),
        ("config.json", b"{}".to_vec()),
        ("model.safetensors", bytes(500_000)),
        ("pytorch_model.bin", bytes(10)),
    ]
}

fn download(client: &HubClient) -> Result<Vec<String>, String> {
    let mut seen = Vec::new();
    let mut note = |name: &str, done, total| seen.push(format!("{name} {done}/{total}"));
    let done = client.download(RepoKind::Model, "org/tiny", &model_files, &mut note);
    done.map(|()| seen).map_err(|e| e.to_string())
}

fn folder(cache: &Path) -> PathBuf {
    cache.join("models--org--tiny")
}

/// Files lie as `huggingface_hub` lays them out; those that are not read are not asked for.
#[test]
fn files_get_their_place_in_the_hubs_own_cache() {
    let cache = temp_dir("download_layout");
    let server = Server::new(|asked, _| honest(&repository(), asked));
    let seen = download(&server.client(&cache)).unwrap();
    assert!(seen.last().unwrap().contains("model.safetensors 500000/500000"), "{seen:?}");
    let snapshot = folder(&cache).join("snapshots").join(COMMIT);
    for (name, content) in repository().iter().filter(|f| f.0.contains("config") || is_large(f.0)) {
        let link = fs::read_link(snapshot.join(name)).unwrap();
        assert_eq!(link, Path::new("../../blobs").join(sum(name, content)));
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), *content);
    }
    assert_eq!(fs::read_dir(&snapshot).unwrap().count(), 2);
    assert_eq!(fs::read_to_string(folder(&cache).join("refs/main")).unwrap(), COMMIT);
    let asked = server.asked();
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert_eq!(asked[0].path, "/api/models/org/tiny/revision/main?blobs=true");
    assert!(asked.iter().all(|a| a.token.as_deref() == Some("Bearer hf_secret")));
    // What is there is not asked for again.
    download(&server.client(&cache)).unwrap();
    assert_eq!(server.asked().len(), 4);
}

/// A connection that breaks off, and a process that was ended, cost what was not here yet.
#[test]
fn a_download_goes_on_where_it_ended() {
    let cache = temp_dir("download_resume");
    let content = &repository()[2].1;
    let blobs = folder(&cache).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let aside = blobs.join(format!("{}.incomplete", sum("model.safetensors", content)));
    fs::write(&aside, &content[..1000]).unwrap();
    let server = Server::new(|asked, _| {
        let whole = honest(&repository(), asked);
        // Each connection brings 100 kB.
        let is_large = asked.path.contains("safetensors");
        Answer { sent: if is_large { 100_000 } else { usize::MAX }, ..whole }
    });
    download(&server.client(&cache)).unwrap();
    let from: Vec<usize> =
        server.asked().iter().filter(|a| is_large(&a.path)).map(|a| a.from).collect();
    assert_eq!(from, [1000, 101_000, 201_000, 301_000, 401_000]);
    assert_eq!(
        fs::read(folder(&cache).join("snapshots").join(COMMIT).join("model.safetensors")).unwrap(),
        *content
    );
    // A server that knows no parts: all of it again.
    fs::remove_dir_all(&cache).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::write(&aside, &content[..1000]).unwrap();
    let server = Server::new(|asked, _| honest(&repository(), &Asked { from: 0, ..asked.clone() }));
    download(&server.client(&cache)).unwrap();
    assert_eq!(server.asked().iter().filter(|a| is_large(&a.path)).count(), 1);
}

/// What a server may say, and what is said of it. Nothing gets its name, and no file remains that
/// would be believed.
#[test]
fn what_a_server_says_is_not_believed() {
    type Hostile = fn(&Asked, usize) -> Answer;
    let renamed = |name: &'static str| {
        move |asked: &Asked, _| {
            let mut files = repository();
            files[1].0 = name;
            honest(&files, asked)
        }
    };
    type Answers = Box<dyn Fn(&Asked, usize) -> Answer + Send + Sync>;
    let all: [(&str, Answers); 16] = [
        ("is refused with this HF_TOKEN", Box::new(|_, _| answer(401, ""))),
        (
            "is no file or folder here, nor to be had from the Hub: ",
            Box::new(|_, _| answer(404, "")),
        ),
        ("broke off 2 times: it answers 503", Box::new(|_, _| answer(503, ""))),
        ("answers with status 418", Box::new(|_, _| answer(418, ""))),
        ("answers with no JSON", Box::new(|_, _| answer(200, "<html>"))),
        ("answers with no commit", Box::new(|_, _| answer(200, "{\"sha\": \"../x\"}"))),
        ("a file that is called \"../../x\"", Box::new(renamed("../../x"))),
        ("a file that is called \"/etc/x\"", Box::new(renamed("/etc/x"))),
        ("a file that is called \"a\\\\..\\\\b\"", Box::new(renamed("a\\..\\b"))),
        ("has on the Hub no model", Box::new(renamed("other.json"))),
        (
            "no size or checksum",
            Box::new(|_, _| {
                answer(
                    200,
                    json!({ "sha": COMMIT, "siblings": [{ "rfilename": "a" }] }).to_string(),
                )
            }),
        ),
        (
            "a list of more than 16777216 bytes",
            Box::new(|_, _| Answer { endless: true, ..answer(200, "") }),
        ),
        (
            "too many redirects",
            Box::new(|asked, _| Answer {
                headers: format!("Location: http://{}{}\r\n", asked.host, asked.path),
                ..answer(302, "")
            }),
        ),
        (
            "has the checksum",
            Box::new(|asked, _| {
                let mut said = honest(&repository(), asked);
                if !asked.path.starts_with("/api/") {
                    said.body[0] ^= 1;
                }
                said
            }),
        ),
        (
            "sends more than the",
            Box::new(
                (|asked, _| match asked.path.starts_with("/api/") {
                    true => honest(&repository(), asked),
                    false => Answer { endless: true, ..answer(200, "") },
                }) as Hostile,
            ),
        ),
        (
            "broke off 2 times: timeout",
            Box::new(|asked, _| Answer {
                waits: Duration::from_secs(3),
                ..honest(&repository(), asked)
            }),
        ),
    ];
    for (i, (want, answers)) in all.into_iter().enumerate() {
        let (cache, start) = (temp_dir(&format!("download_hostile_{i}")), Instant::now());
        let server = Server::new(answers);
        let e = download(&server.client(&cache)).unwrap_err();
        assert!(e.contains(want), "{e}, wanted {want}");
        assert!(start.elapsed() < Duration::from_secs(20), "{want}");
        assert!(!folder(&cache).join("snapshots").exists(), "{want}");
        let blobs = fs::read_dir(folder(&cache).join("blobs"));
        let named =
            blobs.into_iter().flatten().map(|e| e.unwrap().file_name().into_string().unwrap());
        let config = sum("config.json", b"{}");
        let left: Vec<String> = named.filter(|name| *name != config).collect();
        assert!(left.is_empty(), "{want}: {left:?}");
    }
}

/// The token goes to the server that the user named, and to none that this one names.
#[test]
fn a_token_stays_with_its_server() {
    let cache = temp_dir("download_token");
    let server = Server::new(|asked, _| {
        let there = asked.host.starts_with("localhost");
        match asked.path.starts_with("/api/") || there {
            true => honest(&repository(), asked),
            false => Answer {
                headers: format!(
                    "Location: http://{}{}\r\n",
                    asked.host.replace("127.0.0.1", "localhost"),
                    asked.path
                ),
                ..answer(302, "")
            },
        }
    });
    download(&server.client(&cache)).unwrap();
    let elsewhere: Vec<Asked> =
        server.asked().into_iter().filter(|a| a.host.starts_with("localhost")).collect();
    assert_eq!(elsewhere.len(), 2);
    assert!(elsewhere.iter().all(|a| a.token.is_none()), "{elsewhere:?}");
    // A repository that was renamed leads to another path of the server, which has the token.
    let cache = temp_dir("download_renamed");
    let server = Server::new(|asked, _| match asked.path.strip_prefix("/moved") {
        Some(path) => honest(&repository(), &Asked { path: path.into(), ..asked.clone() }),
        None => Answer {
            headers: format!("Location: http://{}/moved{}\r\n", asked.host, asked.path),
            ..answer(307, "")
        },
    });
    download(&server.client(&cache)).unwrap();
    let moved: Vec<Asked> =
        server.asked().into_iter().filter(|a| a.path.starts_with("/moved")).collect();
    assert!(moved.len() >= 2 && moved.iter().all(|a| a.token.is_some()), "{moved:?}");
}

/// The commands: names of models and of data, progress, offline, and hints.
#[test]
fn commands_download_what_is_not_here() {
    let dir = temp_dir("download_commands");
    let model = golden::path("llama_tied");
    let read = move |name: &str| fs::read(model.join(name)).unwrap();
    let server = Server::new(move |asked, _| {
        if asked.path.contains("/secret/") {
            return answer(401, "");
        }
        let rows = "{\"input_ids\": [5, 6, 7]}\n".repeat(3).into_bytes();
        let files = match asked.path.contains("/datasets/") {
            true => vec![
                ("data/train.jsonl", rows.clone()),
                ("data/test.jsonl", rows),
                ("data/more.jsonl", b"{\"input_ids\": [8, 9]}\n".to_vec()),
                ("x.py", bytes(9)),
            ],
            false => vec![
                ("config.json", read("config.json")),
                ("model.safetensors", read("model.safetensors")),
            ],
        };
        honest(&files, asked)
    });
    let tokenize = |model: &str, data: &str, offline: bool| {
        let mut command = warpo(&["tokenize", "--model", model, "--data", data]);
        command.env("HF_HOME", dir.join("home")).env("HF_ENDPOINT", &server.endpoint);
        command.env_remove("HF_HUB_CACHE").env_remove("HF_TOKEN").current_dir(&dir);
        if !offline {
            command.env_remove("HF_HUB_OFFLINE");
        }
        let out = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (out.status.success(), text(&out.stdout), text(&out.stderr))
    };
    let (done, _, said) = tokenize("org/tiny", "org/rows", true);
    assert!(!done && said.contains("HF_HUB_OFFLINE forbids to download it"), "{said}");
    assert!(server.asked().is_empty());
    let (done, rows, said) = tokenize("org/tiny", "org/rows", false);
    assert!(done && rows.lines().count() == 4, "{said}");
    assert!(said.contains("org/rows is not here: downloads it from http://127.0.0.1"), "{said}");
    let paths: Vec<String> = server.asked().into_iter().map(|a| a.path).collect();
    // Files of the same content are one blob.
    let rows = format!("/datasets/org/rows/resolve/{COMMIT}/data/train.jsonl");
    assert!(paths.len() == 6 && paths.contains(&rows), "{paths:?}");
    // Once is enough, and then no server is needed.
    assert!(tokenize("org/tiny", "org/rows", true).0);
    assert!(tokenize("org/tiny", "org/rows", false).0);
    assert_eq!(server.asked().len(), 6);
    let (done, _, said) = tokenize("org/tiny", "secret/rows", false);
    assert!(!done && said.contains("HF_TOKEN has the token of your account"), "{said}");
    // A data file that is not there is no name.
    let (done, _, said) = tokenize("org/tiny", "org/rows.jsonl", false);
    assert!(!done && said.contains("cannot open org/rows.jsonl"), "{said}");
    assert_eq!(server.asked().len(), 7);
    // Who has a part of a data set is not given it as the whole.
    let count = |data: &str| tokenize("org/tiny", data, false).1.lines().count();
    assert_eq!(count("org/parts/data/train.jsonl"), 3);
    // A pattern takes what is called a test, too.
    for (all, rows) in [("org/parts", 4), ("org/parts/data", 4), ("org/parts/data/*.jsonl", 7)] {
        assert_eq!(count(all), rows, "{all}");
    }
    // A model whose weights are gone, with a list of its files and without, is not here.
    let tiny = dir.join("home/hub/models--org--tiny");
    let weights = tiny.join("snapshots").join(COMMIT).join("model.safetensors");
    for with_list in [true, false] {
        fs::remove_file(&weights).unwrap();
        if !with_list {
            fs::remove_dir_all(tiny.join("warpo")).unwrap();
        }
        assert!(tokenize("org/tiny", "org/rows", false).0 && weights.exists(), "{with_list}");
    }
}
