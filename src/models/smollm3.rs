//! SmolLM3 (Hugging Face 2025): Llama without rotary positions in some layers, every fourth where
//! `no_rope_layers` does not say.

use super::{BlockKind, Config, Family, Spec, llama, rope::RopeDefaults};
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
    let defaults = RopeDefaults { theta: 2e6, also: &[] };
    let base = Spec { ropes: vec![c.rope(defaults)?], ..llama::shape(c)? };
    let window = if c.bool_or("use_sliding_window", false)? { c.window(None)? } else { None };
    let sliding = c.sliding(base.layers, |_| false)?;
    let every = c.usize_or("no_rope_layer_interval", 4)?;
    let rotates = rotates(c, base.layers, every)?;
    // Where `layer_types` does not say, the layers that do not rotate have the window.
    let said = c.get("layer_types").is_some();
    if let (true, None) = (sliding.contains(&true), window) {
        return Err(c.unsupported("layer_types", "full_attention without a window"));
    }
    let kind = |(rotates, sliding): (bool, bool)| {
        let sliding = if said { sliding } else { !rotates };
        BlockKind::attention(window.filter(|_| sliding), rotates.then_some(0))
    };
    let blocks = rotates.into_iter().zip(sliding).map(kind).collect();
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
