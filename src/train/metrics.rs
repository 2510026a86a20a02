//! The metrics of each step: `metrics.jsonl` for people and scripts, and an event file for
//! TensorBoard, both in the run's folder.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use super::events::Events;
use crate::{
    error::{Error, Result},
    storage::{Disk, Storage, StorageFile, append_all},
};

/// A file with one JSON object a line, each of which names its step.
pub struct StepLines {
    pub path: PathBuf,
    file: Box<dyn StorageFile>,
    /// Step of the last line, 0 without one.
    pub last: u64,
}

impl StepLines {
    /// Opens the file for the lines after `step`; what else it has, torn lines too, is cut.
    pub fn open(storage: &dyn Storage, path: PathBuf, step: u64) -> Result<Self> {
        let (keep, last) = whole_lines(storage, &path, step)?;
        let file = storage.append_after(&path, keep).map_err(Error::io("create", &path))?;
        Ok(Self { path, file, last })
    }

    /// Appends a line, all of it at once; it is in the file when this returns.
    pub fn write(&mut self, step: u64, line: &Value) -> Result<()> {
        self.last = step;
        let text = format!("{line}\n");
        append_all(&mut *self.file, text.as_bytes()).map_err(Error::io("write", &self.path))
    }

    /// Waits until the lines are on the disk. Call it before a checkpoint is saved: then a crash
    /// cannot lose a line of a step that the checkpoint contains.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync().map_err(Error::io("sync", &self.path))
    }
}

/// The metrics files of a run.
pub struct MetricsLog {
    pub lines: StepLines,
    events_path: PathBuf,
    events: Events<File>,
}

impl MetricsLog {
    /// Opens the files of the run in `dir`, which exists, to go on after `step`: later lines are
    /// cut, so that the file becomes that of a run without interruption.
    pub fn open(dir: &Path, step: u64) -> Result<Self> {
        let lines = StepLines::open(&Disk, dir.join("metrics.jsonl"), step)?;
        let (events_path, file) = new_events(dir)?;
        // TensorBoard forgets later steps of earlier files, those of another run from 0 too.
        let events =
            Events::new(file, now(), Some(step)).map_err(Error::io("write", &events_path))?;
        Ok(Self { lines, events_path, events })
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
        self.lines.write(step, &line.into())?;
        let scalars = self.events.scalars(now(), step, values);
        scalars.map_err(Error::io("write", &self.events_path))
    }
}

/// Length of the whole lines whose step is at most `step`, and the step of the last; what follows
/// the first other line, or one that is torn, is not counted.
fn whole_lines(storage: &dyn Storage, path: &Path, step: u64) -> Result<(u64, u64)> {
    let file = match storage.open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((0, 0)),
        file => file.map_err(Error::io("open", path))?,
    };
    let (mut reader, mut line, mut keep, mut last) = (BufReader::new(file), Vec::new(), 0, 0);
    loop {
        line.clear();
        let n = reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
        let value: Option<Value> = serde_json::from_slice(&line).ok();
        let at = value.and_then(|v| v.get("step")?.as_u64());
        let at = at.filter(|at| *at <= step && line.last() == Some(&b'\n'));
        let Some(at) = at else { return Ok((keep, last)) };
        (keep, last) = (keep + n as u64, at);
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
