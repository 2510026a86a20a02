//! A process that answers lines: one JSON line in, one out. It is kept running, begun again if it
//! dies, and ended with Warpo: its input ends then.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use serde_json::Value;

use super::{Options, RewardInput, Stop};
use crate::{data::RowColumns, device::kill_group, error::Result};

/// Longest answer, in bytes.
const LONGEST: u64 = 64 << 20;

/// The end of what a process says on its standard error is told, up to so many bytes.
const TOLD: usize = 4096;

/// How a process is begun and how long it is waited for.
pub struct LineProcess {
    command: Vec<String>,
    timeout: Duration,
    /// Times that a question is asked again.
    retries: usize,
    running: Option<Running>,
}

struct Running {
    child: Child,
    questions: mpsc::Sender<String>,
    answers: mpsc::Receiver<String>,
    errors: Arc<Mutex<Vec<u8>>>,
}

/// Why an answer did not come.
enum Unanswered {
    /// The next try may have it.
    Retry(String),
    /// What answers has failed, and says so.
    Told(String),
}

impl LineProcess {
    /// `timeout_s` (60) and `retries` (2) beside a command.
    pub fn of(command: Vec<String>, options: &mut Options<'_>) -> Result<Self> {
        let timeout = Duration::from_secs_f64(options.number("timeout_s", 60.0, (0.01, 1e6))?);
        let retries = options.number("retries", 2.0, (0.0, 100.0))? as usize;
        Ok(Self { command, timeout, retries, running: None })
    }

    /// The answer to a question that `read` understands.
    pub fn ask<T>(
        &mut self,
        question: &Value,
        read: impl Fn(&Value) -> Option<T>,
        stop: &Stop<'_>,
    ) -> Result<T, String> {
        let mut causes = Vec::new();
        for _ in 0..=self.retries {
            match self.try_once(question, &read, stop) {
                Ok(answer) => return Ok(answer),
                Err(Unanswered::Told(cause)) => return Err(cause),
                Err(Unanswered::Retry(cause)) => {
                    // Whatever it answers later would be taken for the next answer.
                    self.running = None;
                    causes.push(cause);
                }
            }
        }
        Err(format!("{} (tried {} times)", causes.pop().unwrap_or_default(), self.retries + 1))
    }

    fn try_once<T>(
        &mut self,
        question: &Value,
        read: impl Fn(&Value) -> Option<T>,
        stop: &Stop<'_>,
    ) -> Result<T, Unanswered> {
        let running = match self.running.take() {
            Some(running) => running,
            None => Running::begin(&self.command).map_err(Unanswered::Retry)?,
        };
        let running = self.running.insert(running);
        if let Ok(line) = running.answers.try_recv() {
            let line: String = line.trim_end().chars().take(200).collect();
            let cause = "it wrote more than one line for a question";
            return Err(Unanswered::Told(format!("{cause}: {line:?}")));
        }
        // The answer does not come if this fails.
        let _ = running.questions.send(format!("{question}\n"));
        let answer = stop.wait(&running.answers, self.timeout).map_err(Unanswered::Told)?;
        let line = match answer {
            Ok(line) => line,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let seconds = self.timeout.as_secs_f64();
                let cause = format!("no answer within {seconds} s{}", running.said());
                return Err(Unanswered::Retry(cause));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = running.child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                let cause = format!("the process ended ({status}){}", running.said());
                return Err(Unanswered::Retry(cause));
            }
        };
        let answer = json(&line);
        if let Some(cause) = answer.as_ref().and_then(|a| a.get("error")).filter(|e| !e.is_null()) {
            let cause = cause.as_str().map_or_else(|| cause.to_string(), str::to_owned);
            return Err(Unanswered::Told(cause));
        }
        answer.as_ref().and_then(read).ok_or_else(|| {
            let line: String = line.trim_end().chars().take(200).collect();
            Unanswered::Retry(format!("the answer {line:?} is no score{}", running.said()))
        })
    }
}

/// Reads JSON in which numbers may be NaN and Infinity, as Python writes them: as texts.
fn json(line: &str) -> Option<Value> {
    serde_json::from_str(line).ok().or_else(|| {
        let text = line.replace("-Infinity", "\"-inf\"").replace("Infinity", "\"inf\"");
        serde_json::from_str(&text.replace("NaN", "\"nan\"")).ok()
    })
}

/// A number, or one that JSON has not.
pub fn score(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some("nan") => Some(f64::NAN),
        Some("inf") => Some(f64::INFINITY),
        Some("-inf") => Some(f64::NEG_INFINITY),
        _ => value.as_f64(),
    }
}

/// Scores of `count` samples.
pub fn scores(value: &Value, count: usize) -> Option<Vec<f64>> {
    let all: Vec<f64> = value.as_array()?.iter().map(score).collect::<Option<_>>()?;
    (all.len() == count).then_some(all)
}

/// Prompts, completions and columns of samples, each a list.
pub fn lists(samples: &[RewardInput]) -> [Value; 3] {
    let text = |of: fn(&RewardInput) -> &String| -> Value {
        samples.iter().map(|s| Value::String(of(s).clone())).collect::<Vec<_>>().into()
    };
    let mut columns = RowColumns::new();
    for name in samples.iter().flat_map(|s| s.columns.keys()) {
        if !columns.contains_key(name) {
            let value = |s: &RewardInput| s.columns.get(name).cloned().unwrap_or(Value::Null);
            columns.insert(name.clone(), samples.iter().map(value).collect());
        }
    }
    [text(|s| &s.prompt), text(|s| &s.completion), columns.into()]
}

/// Refuses a column whose name a sample's own text has.
pub fn admit(row: &RowColumns) -> Result<(), String> {
    match row.contains_key("completion") {
        true => Err("has a column `completion`, as a sample itself has: rename it".into()),
        false => Ok(()),
    }
}

impl Running {
    fn begin(command: &[String]) -> Result<Self, String> {
        let (program, args) = command.split_first().ok_or("the command is empty")?;
        let begun = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for Warpo, which ends the step first.
            .process_group(0)
            .spawn();
        let mut child = begun.map_err(|e| format!("cannot start {program:?}: {e}"))?;
        let (questions, asked) = mpsc::channel::<String>();
        let (answer, answers) = mpsc::channel();
        let errors = Arc::new(Mutex::new(Vec::new()));
        // Threads of their own: a process that neither reads nor writes blocks nobody else.
        if let Some(mut input) = child.stdin.take() {
            thread::spawn(move || {
                asked.iter().try_for_each(|line| input.write_all(line.as_bytes())).ok();
            });
        }
        if let Some(output) = child.stdout.take() {
            thread::spawn(move || {
                let mut output = BufReader::new(output);
                loop {
                    let mut line = String::new();
                    match output.by_ref().take(LONGEST).read_line(&mut line) {
                        Ok(n) if n > 0 && answer.send(line).is_ok() => {}
                        _ => break,
                    }
                }
            });
        }
        if let Some(mut said) = child.stderr.take() {
            let errors = errors.clone();
            thread::spawn(move || {
                let mut piece = [0; TOLD];
                while let Ok(n @ 1..) = said.read(&mut piece) {
                    let Ok(mut all) = errors.lock() else { break };
                    all.extend_from_slice(&piece[..n]);
                    let surplus = all.len().saturating_sub(TOLD);
                    all.drain(..surplus);
                }
            });
        }
        Ok(Self { child, questions, answers, errors })
    }

    /// The end of its standard error, for messages.
    fn said(&self) -> String {
        // What it wrote last may be on its way.
        thread::sleep(Duration::from_millis(50));
        let said = self.errors.lock().map_or(Vec::new(), |all| all.clone());
        match String::from_utf8_lossy(&said).trim() {
            "" => String::new(),
            said => format!("; it said: {said}"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        kill_group(self.child.id());
        let _ = self.child.wait();
    }
}
