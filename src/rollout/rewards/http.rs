//! `http`: a server that scores, in the form of OpenRLHF's remote reward model: it is sent
//! `{"query": [prompt and completion], "prompts": [..], "completions": [..], "columns": {name:
//! [..]}}` and answers `{"rewards": [..]}`. A redirection is an answer that is not understood.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use ureq::Agent;

use super::{Options, RewardFailure, RewardInput, SampleReward, Stop, process};
use crate::{
    data::{ColumnsRead, RowColumns},
    error::Result,
};

/// Longest answer, in bytes.
const LONGEST: u64 = 64 << 20;

/// Answers after which the same request may be good: too late, too early, too many, and the
/// server's own faults.
const PASSING: [u16; 3] = [408, 425, 429];

struct HttpReward {
    agent: Agent,
    url: String,
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
    let host = ["http://", "https://"].iter().find_map(|scheme| url.strip_prefix(scheme));
    let is_named = host.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'));
    if !is_named || url.parse::<ureq::http::Uri>().is_err() {
        let want = "wanted http://host:port/path, or https";
        return Err(options.error(format!("`url` is {url:?}, {want}")));
    }
    let timeout = Duration::from_secs_f64(options.number("timeout_s", 60.0, (0.01, 1e6))?);
    let agent = Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("warpo/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent();
    Ok(Box::new(HttpReward {
        agent,
        url,
        labels: options.take("labels")?,
        batch: options.take("batch_size")?.unwrap_or(0),
        timeout,
        retries: options.number("retries", 3.0, (0.0, 20.0))? as u32,
    }))
}

impl HttpReward {
    /// The answer to a request: its status and its body.
    fn post(&self, body: &Arc<str>, stop: &Stop<'_>) -> Result<(u16, String), String> {
        let (agent, url, body) = (self.agent.clone(), self.url.clone(), body.clone());
        let (sender, answer) = mpsc::channel();
        // A thread of its own, which nobody has to wait for.
        thread::spawn(move || {
            let sent = agent.post(url).header("content-type", "application/json").send(&*body);
            let read = sent.and_then(|answer| {
                let status = answer.status().as_u16();
                let text = answer.into_body().into_with_config().limit(LONGEST).read_to_string()?;
                Ok((status, text))
            });
            let _ = sender.send(read);
        });
        let read = stop.wait(&answer, Duration::MAX)?;
        let seconds = self.timeout.as_secs_f64();
        match read.map_err(|_| "the request ended without an answer")? {
            Ok(answer) => Ok(answer),
            Err(ureq::Error::Timeout(_)) => Err(format!("no answer within {seconds} s")),
            Err(e) => Err(e.to_string()),
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
        let body: Arc<str> = body.to_string().into();
        let (mut pause, mut tries) = (Duration::from_millis(200), 0);
        loop {
            let cause = match self.post(&body, stop) {
                Ok((200, answer)) => {
                    let answer = serde_json::from_str::<Value>(&answer).ok();
                    let rewards = answer.as_ref().and_then(|a| a.get("rewards"));
                    match rewards.and_then(|r| process::scores(r, samples.len())) {
                        Some(scores) => return Ok(scores),
                        None => format!("the answer has no `rewards` of {} samples", samples.len()),
                    }
                }
                Ok((status, answer)) => {
                    let text: String = answer.trim().chars().take(300).collect();
                    let cause = format!("status {status}: {text}");
                    if status < 500 && !PASSING.contains(&status) {
                        // The same request would be as wrong again.
                        return Err(format!("{}: {cause}", self.url));
                    }
                    cause
                }
                Err(cause) => cause,
            };
            tries += 1;
            if tries > self.retries {
                return Err(format!("{}: {cause} (tried {tries} times)", self.url));
            }
            stop.sleep(pause)?;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }
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
