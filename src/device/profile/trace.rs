//! A profile as a file for trace viewers. (Trace Event Format,
//! <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>)

use std::{
    cmp::Reverse,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::{Value, json};

use super::{Kind, Work};
use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Track {
    Device,
    /// A thread, counted from 1.
    Host(usize),
}

impl Track {
    fn number(self) -> usize {
        match self {
            Self::Device => 0,
            Self::Host(thread) => thread,
        }
    }
}

/// Whole nanoseconds, so that what is inside of something is so in the file, too.
pub(super) struct TraceEvent {
    kind: Kind,
    name: &'static str,
    track: Track,
    start: u64,
    end: u64,
    work: Work,
}

impl TraceEvent {
    pub(super) fn new(
        kind: Kind,
        name: &'static str,
        track: Track,
        (start, end): (f64, f64),
        work: Work,
    ) -> Self {
        let whole = |seconds: f64| (seconds * 1e9).round() as u64;
        Self { kind, name, track, start: whole(start), end: whole(end), work }
    }

    fn json(&self) -> Value {
        let cat = match self.kind {
            Kind::Phase => "phase",
            Kind::Op => "op",
            Kind::Kernel => "kernel",
        };
        let (ts, dur) = (self.start as f64 / 1e3, self.end.saturating_sub(self.start) as f64 / 1e3);
        let Work { flops, bytes } = self.work;
        let args = match self.kind {
            Kind::Op => json!({ "flops": flops, "bytes": bytes }),
            _ => json!({}),
        };
        let (name, tid) = (self.name, self.track.number());
        json!({ "name": name, "cat": cat, "ph": "X", "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args })
    }
}

/// Writes all events, in order of their tracks and times.
pub(super) fn write(
    path: &Path,
    device: &str,
    events: &mut [TraceEvent],
    dropped: u64,
) -> Result<()> {
    // What contains another event comes before it, where both begin at once.
    events.sort_by_key(|e| (e.track, e.start, Reverse(e.end), e.kind));
    let mut tracks: Vec<Track> = events.iter().map(|e| e.track).collect();
    tracks.dedup();
    let names = tracks.into_iter().map(|track| {
        let name = match track {
            Track::Device => device.to_owned(),
            Track::Host(thread) => format!("host thread {thread}"),
        };
        let tid = track.number();
        json!({ "name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": { "name": name } })
    });
    let file = File::create(path).map_err(Error::io("create", path))?;
    let mut file = BufWriter::new(file);
    let write = || {
        let about = json!({ "device": device, "dropped": dropped });
        write!(file, "{{\"otherData\":{about},\"traceEvents\":[")?;
        let mut comma = "";
        for event in names.chain(events.iter().map(TraceEvent::json)) {
            write!(file, "{comma}\n{event}")?;
            comma = ",";
        }
        writeln!(file, "\n]}}")?;
        file.flush()
    };
    write().map_err(Error::io("write", path))
}
