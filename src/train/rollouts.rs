//! Records of every sample of a step: `rollouts/step-N.jsonl`.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{
    source::StepData,
    storage::{Disk, Storage, write_file},
};
use crate::{
    data::Tokenizer,
    error::{Error, Result},
};

/// Writes the samples of a step to `dir/step-N.jsonl`, over what an abandoned attempt left.
pub fn write(dir: &Path, step: u64, data: &StepData, tokenizer: Option<&Tokenizer>) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let lines = (0..data.sequences.len()).map(|s| record(step, data, s, tokenizer));
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    write_file(&Disk, &dir.join(format!("step-{step}.jsonl")), text.as_bytes())
}

/// Removes the samples of later steps, which are of an attempt that was given up or of another run.
pub fn cut(dir: &Path, step: u64) -> Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    for name in Disk.list(dir).map_err(Error::io("list", dir))? {
        let at = name.strip_prefix("step-").and_then(|n| n.strip_suffix(".jsonl"));
        if at.and_then(|n| n.parse::<u64>().ok()).is_some_and(|at| at > step) {
            let path = dir.join(name);
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// The record of sequence `s`. Text is for people: a piece that is no whole character shows as a
/// replacement character.
fn record(step: u64, data: &StepData, s: usize, tokenizer: Option<&Tokenizer>) -> Value {
    let (c, sequence) = (&data.columns, &data.sequences[s]);
    let span = c.span(&(s..s + 1));
    let (prompt, ids) = sequence.ids.split_at(sequence.ids.len() - span.len());
    let columns = [
        ("logp", &c.old_logp),
        ("ref_logp", &c.ref_logp),
        ("value", &c.old_values),
        ("reward", &c.rewards),
        ("advantage", &c.advantages),
        ("return", &c.returns),
    ];
    let text = |before: &[u32], ids: &[u32]| {
        tokenizer.map(|t| t.decode_continuation(before, ids).unwrap_or_default())
    };
    // Each piece after its predecessor, which keeps the space between words.
    let before = prompt.last().into_iter().chain(ids);
    let pieces: Vec<_> = before.zip(ids).map(|(b, id)| text(&[*b], &[*id])).collect();
    let token = |i: usize| {
        let mut one = json!({ "id": ids[i], "text": pieces[i] });
        for (name, column) in columns {
            if let Some(x) = column.get(span.start + i) {
                one[name] = json!(x);
            }
        }
        one
    };
    // log(policy / reference) of the whole sample, whatever estimator of the KL is trained with
    let ratio = |t: usize| f64::from(c.old_logp[t]) - f64::from(c.ref_logp[t]);
    let ratio: f64 = if c.ref_logp.is_empty() { 0.0 } else { span.clone().map(ratio).sum() };
    let whole = tokenizer.map(|t| t.decode(prompt).unwrap_or_default());
    let mut all = json!({
        "step": step,
        "sample": c.samples[s],
        "prompt": whole.unwrap_or_default(),
        "text": text(prompt, ids).unwrap_or_default(),
        "score": c.scores.get(s).copied().unwrap_or_default(),
        "log_ratio": ratio,
        "stopped": c.stopped[s],
        "prompt_ids": prompt,
        "tokens": (0..ids.len()).map(token).collect::<Vec<_>>(),
    });
    for (name, scores) in &data.parts {
        all[*name] = json!(scores[s]);
    }
    all
}
