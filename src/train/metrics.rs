//! The metrics of each step: `metrics.jsonl` for people and scripts, and an event file for
//! TensorBoard, both in the run's folder.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use super::events::Events;
use crate::error::{Error, Result};

/// The metrics files of a run.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    lines: File,
    events_path: PathBuf,
    events: Events<File>,
}

impl MetricsLog {
    /// Opens the files of the run in `dir`, which exists.
    ///
    /// `resumed` is the step of the checkpoint that was loaded: later lines are cut, so that the
    /// file becomes that of a run without interruption. `None` starts a new file.
    pub fn open(dir: &Path, resumed: Option<u64>) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        let keep = match resumed {
            Some(step) => bytes_until(&path, step)?,
            None => 0,
        };
        let open = OpenOptions::new().append(true).create(true).open(&path);
        let lines = open.map_err(Error::io("create", &path))?;
        lines.set_len(keep).map_err(Error::io("cut", &path))?;
        let (events_path, file) = new_events(dir)?;
        let events = Events::new(file, now(), resumed).map_err(Error::io("write", &events_path))?;
        Ok(Self { path, lines, events_path, events })
    }

    /// Writes the metrics of a step, in the order given; they are in the file when it returns.
    ///
    /// A line is `{"step": 5, "loss": 0.25, "kl": null, "not_finite": {"kl": "NaN"}}`: JSON has no
    /// NaN and no infinity, so such values are null and named. Steps may not decrease.
    pub fn log(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        let mut bad = Map::new();
        for (name, x) in values {
            line.insert((*name).into(), Value::from(*x));
            if !x.is_finite() {
                bad.insert((*name).into(), x.to_string().into());
            }
        }
        if !bad.is_empty() {
            line.insert("not_finite".into(), bad.into());
        }
        let text = format!("{}\n", Value::from(line));
        self.lines.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        let scalars = self.events.scalars(now(), step, values);
        scalars.map_err(Error::io("write", &self.events_path))
    }

    /// Waits until the lines are on the disk. Call it before a checkpoint is saved: then a crash
    /// cannot lose a line of a step that the checkpoint contains.
    pub fn sync(&mut self) -> Result<()> {
        self.lines.sync_data().map_err(Error::io("sync", &self.path))
    }
}

/// Length of the whole lines whose step is at most `step`; what follows the first other line, or
/// one that is torn, is not counted.
fn bytes_until(path: &Path, step: u64) -> Result<u64> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(Error::io("open", path)(e)),
    };
    let (mut reader, mut line, mut keep) = (BufReader::new(file), Vec::new(), 0);
    loop {
        line.clear();
        let n = reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
        let value: Option<Value> = serde_json::from_slice(&line).ok();
        let at = value.and_then(|v| v.get("step")?.as_u64());
        if line.last() != Some(&b'\n') || at.is_none_or(|at| at > step) {
            return Ok(keep);
        }
        keep += n as u64;
    }
}

/// A file whose name TensorBoard looks for and reads after the earlier ones.
fn new_events(dir: &Path) -> Result<(PathBuf, File)> {
    let (seconds, pid) = (now() as u64, std::process::id());
    for count in 0.. {
        let path = dir.join(format!("events.out.tfevents.{seconds:010}.warpo.{pid}.{count}"));
        match OpenOptions::new().append(true).create_new(true).open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            file => return Ok((path.clone(), file.map_err(Error::io("create", path))?)),
        }
    }
    Err(Error::value("event file", "a free name", dir.display()))
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}
