//! `http`: a server that scores, in the form of OpenRLHF's remote reward model: it is sent
//! `{"query": [prompt and completion], "prompts": [..], "completions": [..], "columns": {name:
//! [..]}}` and answers `{"rewards": [..]}`. Plain HTTP/1.1; there is no TLS here: https is refused.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Options, RewardFailure, RewardInput, SampleReward, Stop, process};
use crate::{
    data::{ColumnsRead, RowColumns},
    error::Result,
};

/// Longest answer, in bytes.
const LONGEST: usize = 64 << 20;

struct HttpReward {
    /// Host and port.
    host: String,
    path: String,
    /// The column that is sent as `labels`, too.
    labels: Option<String>,
    /// Samples of a request; 0 takes all of a step.
    batch: usize,
    timeout: Duration,
    retries: u32,
}

/// `url`; `labels`, a column to send under that name; `batch_size` (0: all of a step); `timeout_s`
/// (60) of a request; `retries` (3), with a pause that begins at 0.2 s and doubles.
pub fn http(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let url: String = options.need("url")?;
    let Some(rest) = url.strip_prefix("http://") else {
        let why = if url.starts_with("https://") { "; there is no TLS here" } else { "" };
        return Err(options.error(format!("`url` is {url:?}, wanted http://host:port/path{why}")));
    };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if host.is_empty() || url.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(options.error(format!("`url` is {url:?}, wanted http://host:port/path")));
    }
    let port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    Ok(Box::new(HttpReward {
        host: if port { host.to_owned() } else { format!("{host}:80") },
        path: if path.is_empty() { "/".into() } else { path.to_owned() },
        labels: options.take("labels")?,
        batch: options.take("batch_size")?.unwrap_or(0),
        timeout: Duration::from_secs_f64(options.number("timeout_s", 60.0, (0.01, 1e6))?),
        retries: options.number("retries", 3.0, (0.0, 20.0))? as u32,
    }))
}

impl HttpReward {
    /// The answer to a request: its status and its body.
    fn post(&self, body: &str, stop: &Stop<'_>) -> Result<(u16, Vec<u8>), String> {
        let end = Instant::now() + self.timeout;
        let left = || {
            let late = || format!("no answer within {} s", self.timeout.as_secs_f64());
            end.checked_duration_since(Instant::now()).filter(|t| !t.is_zero()).ok_or_else(late)
        };
        let io = |e: std::io::Error| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                format!("no answer within {} s", self.timeout.as_secs_f64())
            }
            _ => e.to_string(),
        };
        let mut last = "no such host".to_owned();
        let mut stream = None;
        for address in self.host.to_socket_addrs().map_err(io)? {
            match TcpStream::connect_timeout(&address, left()?) {
                Ok(connected) => {
                    stream = Some(connected);
                    break;
                }
                Err(e) => last = io(e),
            }
        }
        let mut stream = stream.ok_or(last)?;
        let head = format!(
            "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            self.path,
            self.host,
            body.len()
        );
        stream.set_write_timeout(Some(left()?)).map_err(io)?;
        stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(body.as_bytes()))
            .map_err(io)?;
        let (mut answer, mut piece) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            if let Some(whole) = whole(&answer)? {
                return Ok(whole);
            }
            stop.check()?;
            stream.set_read_timeout(Some(left()?.min(Stop::EVERY))).map_err(io)?;
            match stream.read(&mut piece) {
                Ok(0) => return ended(&answer),
                Ok(n) => answer.extend_from_slice(&piece[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) => return Err(io(e)),
            }
            if answer.len() > LONGEST {
                return Err(format!("the answer has more than {LONGEST} bytes"));
            }
        }
    }

    fn ask(&self, samples: &[RewardInput], stop: &Stop<'_>) -> Result<Vec<f64>, String> {
        let [prompts, completions, columns] = process::lists(samples);
        let query = |s: &RewardInput| Value::String(format!("{}{}", s.prompt, s.completion));
        let query: Vec<Value> = samples.iter().map(query).collect();
        let mut body = json!({
            "query": query, "prompts": prompts, "completions": completions, "columns": columns,
        });
        if let Some(name) = &self.labels {
            body["labels"] = body["columns"][name].clone();
        }
        let body = body.to_string();
        let (mut pause, mut tries) = (Duration::from_millis(200), 0);
        loop {
            let cause = match self.post(&body, stop) {
                Ok((200, answer)) => {
                    let answer = serde_json::from_slice::<Value>(&answer).ok();
                    let rewards = answer.as_ref().and_then(|a| a.get("rewards"));
                    match rewards.and_then(|r| process::scores(r, samples.len())) {
                        Some(scores) => return Ok(scores),
                        None => format!("the answer has no `rewards` of {} samples", samples.len()),
                    }
                }
                Ok((status, answer)) => {
                    let text = String::from_utf8_lossy(&answer);
                    let text: String = text.trim().chars().take(300).collect();
                    let cause = format!("status {status}: {text}");
                    if (400..500).contains(&status) && ![408, 425, 429].contains(&status) {
                        // The same request would be as wrong again.
                        return Err(format!("{}: {cause}", self.host));
                    }
                    cause
                }
                Err(cause) => cause,
            };
            tries += 1;
            if tries > self.retries {
                return Err(format!("{}: {cause} (tried {tries} times)", self.host));
            }
            stop.sleep(pause)?;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }
}

/// Head and body of an answer, if its head is there.
fn parts(answer: &[u8]) -> Option<(&str, &[u8])> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    Some((std::str::from_utf8(&answer[..end]).ok()?, &answer[end + 4..]))
}

fn status(head: &str) -> Result<u16, String> {
    let status = head.strip_prefix("HTTP/1.").and_then(|h| h.split(' ').nth(1)?.parse().ok());
    status.ok_or_else(|| "the answer is not HTTP".into())
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

/// Status and body of an answer that says itself where it ends, if all of it is there.
fn whole(answer: &[u8]) -> Result<Option<(u16, Vec<u8>)>, String> {
    let Some((head, body)) = parts(answer) else { return Ok(None) };
    let status = status(head)?;
    if header(head, "transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        return Ok(chunks(body)?.map(|body| (status, body)));
    }
    let Some(length) = header(head, "content-length") else { return Ok(None) };
    let length: usize = length.parse().map_err(|_| "the answer has no length".to_owned())?;
    Ok(body.get(..length).map(|body| (status, body.to_vec())))
}

/// The body of chunks, if the last of them is there.
fn chunks(mut rest: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let mut body = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|w| w == b"\r\n") else { return Ok(None) };
        let size = std::str::from_utf8(&rest[..end]).ok();
        let size = size.and_then(|s| usize::from_str_radix(s.split(';').next()?.trim(), 16).ok());
        let size = size.filter(|n| *n <= LONGEST).ok_or("the answer has a bad chunk")?;
        let Some(chunk) = rest.get(end + 2..end + 2 + size) else { return Ok(None) };
        if size == 0 {
            return Ok(Some(body));
        }
        body.extend_from_slice(chunk);
        let Some(next) = rest.get(end + 4 + size..) else { return Ok(None) };
        rest = next;
    }
}

/// Status and body of an answer that ended with its connection.
fn ended(answer: &[u8]) -> Result<(u16, Vec<u8>), String> {
    let cut = || "the connection ended before the answer did".to_owned();
    let (head, body) = parts(answer).ok_or_else(cut)?;
    let open = header(head, "transfer-encoding").or(header(head, "content-length")).is_none();
    if open { Ok((status(head)?, body.to_vec())) } else { Err(cut()) }
}

impl SampleReward for HttpReward {
    fn columns(&self) -> ColumnsRead {
        ColumnsRead::All
    }

    fn admit(&self, row: &RowColumns) -> Result<(), String> {
        process::admit(row)?;
        match &self.labels {
            Some(name) if !row.contains_key(name) => Err(format!("has no column `{name}`")),
            _ => Ok(()),
        }
    }

    fn takes_all(&self) -> bool {
        true
    }

    fn score(
        &mut self,
        samples: &[RewardInput],
        stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        let size = if self.batch == 0 { samples.len().max(1) } else { self.batch };
        let mut all = Vec::with_capacity(samples.len());
        for (i, part) in samples.chunks(size).enumerate() {
            let failed = |cause| RewardFailure { at: i * size, cause };
            all.extend(self.ask(part, stop).map_err(failed)?);
        }
        Ok(all)
    }
}
