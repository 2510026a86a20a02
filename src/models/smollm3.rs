//! SmolLM3 (Hugging Face 2025): Llama without rotary positions in some layers, every fourth where
//! `no_rope_layers` does not say.

use super::{Config, Family, Spec, llama, qwen2};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "smollm3",
    causal_lm: "SmolLM3ForCausalLM",
    sequence_classification: "SmolLM3ForSequenceClassification",
    computes: &["use_sliding_window", "sliding_window", "layer_types", "no_rope_layers"],
    spec,
    ..llama::FAMILY
};

fn spec(c: &Config) -> Result<Spec> {
    let (base, mut blocks) = (llama::spec(c)?, qwen2::blocks(c)?);
    let every = c.usize_or("no_rope_layer_interval", 4)?;
    for (l, rotates) in rotates(c, base.layers, every)?.into_iter().enumerate() {
        blocks[l].rope = rotates.then_some(0);
    }
    Ok(Spec { blocks, tied: c.bool_or("tie_word_embeddings", true)?, ..base })
}

/// `no_rope_layers`, whose 1 says that a layer rotates, against its name.
fn rotates(c: &Config, layers: usize, every: usize) -> Result<Vec<bool>> {
    const KEY: &str = "no_rope_layers";
    let Some(v) = c.get(KEY) else {
        return Ok((1..=layers).map(|l| !l.is_multiple_of(every.max(1))).collect());
    };
    let all = v.as_array().filter(|all| all.len() == layers);
    let flag = |v: &serde_json::Value| v.as_u64().filter(|n| *n <= 1).map(|n| n == 1);
    let all = all.and_then(|all| all.iter().map(flag).collect());
    all.ok_or_else(|| c.wrong(KEY, &format!("0 or 1 for each of {layers} layers"), v))
}
