//! The report of a run: one HTML page with curves, samples and a rollout browser, that needs no
//! network.
//!
//! It reads what a run leaves in its folder (`run.json`, `metrics.jsonl`, `timing.jsonl`,
//! `config.toml`, `rollouts/`), or, in a folder of runs, what each of them left and `summary.json`.
//! A run that is still going or was killed can be reported too: a torn last line is left out.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::{
    algorithms::{ALGORITHMS, SHARED_METRICS},
    device::file,
    error::{Error, Result},
};

const PAGE: &str = include_str!("report/page.html");
const PLACE: &str = "/*DATA*/";

/// The largest file of a run that is read.
const LIMIT: u64 = 1 << 30;

/// Samples of one step that a page holds.
const PER_STEP: usize = 32;

/// Writes the report of `run` to `page`, with about `samples` rollouts in it, evenly spread over
/// the runs that have any and their steps.
pub fn report(run: &Path, page: &Path, samples: usize) -> Result<()> {
    let runs = runs(run)?;
    let with_rollouts = runs.iter().filter(|dir| dir.join("rollouts").is_dir()).count();
    let each = samples / with_rollouts.max(1);
    let parts = runs.iter().map(|dir| part(dir, each)).collect::<Result<Vec<_>>>()?;
    let summary = json_file(&run.join("summary.json"))?;
    let name = |p: &Path| {
        let whole = fs::canonicalize(p).unwrap_or_else(|_| p.into());
        whole.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
    };
    let data = json!({
        "title": name(run),
        "lead": format!("{} of Warpo under {}", count(runs.len(), "run"), run.display()),
        "version": concat!("warpo ", env!("CARGO_PKG_VERSION")),
        "summary": summary,
        "runs": parts,
    });
    // In a script element only `</` and `<!` could end the data or change its meaning.
    let text = data.to_string().replace('<', "\\u003c");
    fs::write(page, PAGE.replacen(PLACE, &text, 1)).map_err(Error::io("write", page))
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// The folder itself if it holds a run, else those in it, in the order in which they were started.
fn runs(dir: &Path) -> Result<Vec<PathBuf>> {
    let is_run = |p: &Path| p.join("metrics.jsonl").exists();
    if is_run(dir) {
        return Ok(vec![dir.into()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        if is_run(&path) {
            let started = json_file(&path.join("run.json"))?["started"].as_f64().unwrap_or(0.0);
            found.push((started, path));
        }
    }
    if found.is_empty() {
        return Err(Error::file(dir, "holds no run: metrics.jsonl is neither here nor one below"));
    }
    found.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    Ok(found.into_iter().map(|f| f.1).collect())
}

fn text_file(path: &Path) -> Result<Option<String>> {
    match file::read_text(path, LIMIT) {
        Ok(text) => Ok(Some(text)),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Null if the file is not there.
fn json_file(path: &Path) -> Result<Value> {
    let Some(text) = text_file(path)? else { return Ok(Value::Null) };
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not JSON: {e}")))
}

/// The objects of a JSONL file. A last line without its end is being written, or was when the
/// process died.
fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = text_file(path)?.unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(i, line): (usize, &str)| {
        let message = |e| Error::Data { path: path.into(), line: i + 1, message: e };
        serde_json::from_str(line).map_err(|e| message(format!("not JSON: {e}")))
    };
    whole.lines().enumerate().map(parse).collect()
}

/// One column for each key, null where a line lacks it.
fn columns(lines: &[Value]) -> Map<String, Value> {
    let mut out: Map<String, Value> = Map::new();
    for (i, line) in lines.iter().enumerate() {
        for (key, value) in line.as_object().into_iter().flatten().filter(|(_, v)| v.is_number()) {
            let column = out.entry(key.clone()).or_insert_with(|| json!([]));
            if let Value::Array(column) = column {
                column.resize(i, Value::Null);
                column.push(short(value));
            }
        }
    }
    for column in out.values_mut() {
        if let Value::Array(column) = column {
            column.resize(lines.len(), Value::Null);
        }
    }
    out
}

/// Five significant digits: more would not be seen, and would double the page.
fn short(v: &Value) -> Value {
    let Some(x) = v.as_f64().filter(|_| !v.is_u64()) else { return v.clone() };
    format!("{x:.4e}").parse::<f64>().map_or(Value::Null, Value::from)
}

fn part(dir: &Path, samples: usize) -> Result<Value> {
    let about = json_file(&dir.join("run.json"))?;
    let entry = ALGORITHMS.iter().find(|e| about["algorithm"] == e.name);
    let own = entry.iter().flat_map(|e| e.metrics.iter().copied());
    let meanings: BTreeMap<&str, &str> = own.chain([SHARED_METRICS]).flatten().copied().collect();
    // A resumed run did some steps again: the last time counts.
    let again = lines(&dir.join("timing.jsonl"))?.into_iter();
    let timing: BTreeMap<u64, Value> =
        again.filter_map(|t| Some((t["step"].as_u64()?, t))).collect();
    let timing: Vec<Value> = timing.into_values().collect();
    let phases: Vec<Value> = timing.iter().map(|t| t["phases"].clone()).collect();
    let mut times = columns(&timing);
    times.insert("phases".into(), columns(&phases).into());
    let (rollouts, total) = rollouts(&dir.join("rollouts"), samples)?;
    let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let metrics = columns(&lines(&dir.join("metrics.jsonl"))?);
    // A run that is not at its end says so.
    let last = metrics.get("step").and_then(|s| s.as_array()?.last()?.as_u64()).unwrap_or(0);
    let unfinished = about["steps"].as_u64().filter(|steps| last < *steps);
    let unfinished = unfinished.map(|steps| format!("{last} of {steps} steps so far"));
    Ok(json!({
        "name": name,
        "unfinished": unfinished,
        "about": entry.map(|e| e.about),
        "facts": facts(&about),
        "meanings": meanings,
        "metrics": metrics,
        "timing": times,
        "rollouts": rollouts,
        "rollouts_total": total,
        "config": text_file(&dir.join("config.toml"))?,
    }))
}

/// Names and values of `run.json`.
fn facts(about: &Value) -> Vec<[String; 2]> {
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let hidden = |key: &str| matches!(key, "started" | "steps");
    let all = about.as_object().into_iter().flatten();
    all.filter(|(k, _)| !hidden(k)).map(|(k, v)| [k.replace('_', " "), text(v)]).collect()
}

/// About `samples` rollouts from evenly spaced steps, the first and the last among them; and how
/// many the folder has.
fn rollouts(dir: &Path, samples: usize) -> Result<(Vec<Value>, usize)> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok((Vec::new(), 0)) };
    let mut steps: Vec<(u64, PathBuf)> = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let stem = path.file_stem().map_or("", |s| s.to_str().unwrap_or_default());
        let step = stem.strip_prefix("step-").and_then(|n| n.parse().ok());
        steps.extend(step.map(|s| (s, path)));
    }
    steps.sort();
    let per = match steps.first() {
        Some((_, path)) => lines(path)?.len(),
        None => return Ok((Vec::new(), 0)),
    };
    let shown = PER_STEP.min(per).max(1);
    let wanted = (samples / shown).clamp(1, steps.len());
    // From the last step backwards, so that one step is the last.
    let at = |i: usize| steps.len() - 1 - i * (steps.len() - 1) / (wanted - 1).max(1);
    let mut out = Vec::with_capacity(wanted);
    for i in (0..wanted).rev() {
        let (step, path) = &steps[at(i)];
        let all = lines(path)?;
        let few: Vec<Value> = all.iter().take(shown).map(sample).collect();
        out.push(json!({ "step": step, "of": all.len(), "samples": few }));
    }
    Ok((out, per * steps.len()))
}

/// A rollout by columns, which is a third of its size by tokens.
fn sample(r: &Value) -> Value {
    let tokens = r["tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let all = |key: &str| tokens.iter().map(|t| short(&t[key])).collect::<Vec<_>>();
    let first = tokens.first().and_then(Value::as_object).cloned().unwrap_or_default();
    let numbers = first.keys().filter(|k| !matches!(k.as_str(), "id" | "text"));
    let columns: Map<String, Value> = numbers.map(|k| (k.clone(), all(k).into())).collect();
    json!({
        "sample": r["sample"], "prompt": r["prompt"], "text": r["text"], "score": short(&r["score"]),
        "log_ratio": short(&r["log_ratio"]), "stopped": r["stopped"], "ids": all("id"),
        "pieces": tokens.iter().map(|t| t["text"].clone()).collect::<Vec<_>>(),
        "columns": columns,
    })
}
