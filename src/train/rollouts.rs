//! Records of every sample of a step: `rollouts/step-N.jsonl`.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::{Value, json};

use crate::{
    algorithms::Columns,
    data::Tokenizer,
    error::{Error, Result},
    rollout::{Completion, Prompt},
};

#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    step: u64,
    sample: u64,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    stopped: bool,
    prompt: String,
    text: String,
    pieces: Vec<String>,
    score: f32,
    kl: f64,
    columns: Vec<(&'static str, Vec<f32>)>,
}

impl Rollout {
    /// A sample as the sampler made it.
    pub fn new(step: u64, prompt: &Prompt, c: &Completion<f32>) -> Self {
        Self {
            step,
            sample: c.sample,
            prompt_ids: prompt.ids.clone(),
            ids: c.ids.clone(),
            stopped: c.stopped,
            prompt: String::new(),
            text: String::new(),
            pieces: Vec::new(),
            score: 0.0,
            kl: 0.0,
            columns: Vec::new(),
        }
    }

    /// Adds what was computed of sequence `s`.
    pub fn fill(&mut self, c: &Columns<f32>, s: usize, tokenizer: Option<&Tokenizer>) {
        let span = c.span(&(s..s + 1));
        let part = |x: &[f32]| x.get(span.clone()).unwrap_or_default().to_vec();
        self.columns = vec![
            ("logp", part(&c.old_logp)),
            ("ref_logp", part(&c.ref_logp)),
            ("value", part(&c.old_values)),
            ("reward", part(&c.rewards)),
            ("advantage", part(&c.advantages)),
            ("return", part(&c.returns)),
        ];
        let kl = |t: usize| f64::from(c.old_logp[t]) - f64::from(c.ref_logp[t]);
        self.kl = if c.ref_logp.is_empty() { 0.0 } else { span.map(kl).sum() };
        self.score = c.scores.get(s).copied().unwrap_or_default();
        // Text is for people: a piece that is no whole character shows as a replacement character.
        if let Some(t) = tokenizer {
            self.prompt = t.decode(&self.prompt_ids).unwrap_or_default();
            self.text = t.decode_continuation(&self.prompt_ids, &self.ids).unwrap_or_default();
            // Each after its predecessor, which keeps the space between words.
            let before = self.prompt_ids.last().into_iter().chain(&self.ids);
            let piece = |(b, id): (&u32, &u32)| t.decode_continuation(&[*b], &[*id]);
            let pieces = before.zip(&self.ids).map(piece);
            self.pieces = pieces.map(|p| p.unwrap_or_default()).collect();
        }
    }

    fn json(&self) -> Value {
        let token = |i: usize| {
            let mut one = json!({ "id": self.ids[i], "text": self.pieces.get(i) });
            for (name, column) in &self.columns {
                if let Some(x) = column.get(i) {
                    one[*name] = json!(x);
                }
            }
            one
        };
        json!({
            "step": self.step,
            "sample": self.sample,
            "prompt": self.prompt,
            "text": self.text,
            "score": self.score,
            "kl": self.kl,
            "stopped": self.stopped,
            "prompt_ids": self.prompt_ids,
            "tokens": (0..self.ids.len()).map(token).collect::<Vec<_>>(),
        })
    }
}

/// Writes the records of a step to `dir/step-N.jsonl`, over what an abandoned attempt left.
pub fn write(dir: &Path, step: u64, rollouts: &[Rollout]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let path = dir.join(format!("step-{step}.jsonl"));
    let file = File::create(&path).map_err(Error::io("create", &path))?;
    let mut out = BufWriter::new(file);
    for r in rollouts {
        writeln!(out, "{}", r.json()).map_err(Error::io("write", &path))?;
    }
    out.flush().map_err(Error::io("write", &path))
}
