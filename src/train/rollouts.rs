//! Records of every sample of a step: `rollouts/step-N.jsonl`.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::{Value, json};

use super::source::StepData;
use crate::{
    data::Tokenizer,
    error::{Error, Result},
};

/// Writes the samples of a step to `dir/step-N.jsonl`, over what an abandoned attempt left.
pub fn write(dir: &Path, step: u64, data: &StepData, tokenizer: Option<&Tokenizer>) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let path = dir.join(format!("step-{step}.jsonl"));
    let file = File::create(&path).map_err(Error::io("create", &path))?;
    let mut out = BufWriter::new(file);
    for s in 0..data.sequences.len() {
        writeln!(out, "{}", record(step, data, s, tokenizer)).map_err(Error::io("write", &path))?;
    }
    out.flush().map_err(Error::io("write", &path))
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
    let kl = |t: usize| f64::from(c.old_logp[t]) - f64::from(c.ref_logp[t]);
    let kl: f64 = if c.ref_logp.is_empty() { 0.0 } else { span.clone().map(kl).sum() };
    let whole = tokenizer.map(|t| t.decode(prompt).unwrap_or_default());
    json!({
        "step": step,
        "sample": c.samples[s],
        "prompt": whole.unwrap_or_default(),
        "text": text(prompt, ids).unwrap_or_default(),
        "score": c.scores.get(s).copied().unwrap_or_default(),
        "kl": kl,
        "stopped": c.stopped[s],
        "prompt_ids": prompt,
        "tokens": (0..ids.len()).map(token).collect::<Vec<_>>(),
    })
}
