//! Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases on queries, keys and values, and a window
//! from some layer on where `use_sliding_window` says so.

use super::{BlockKind, Config, Family, Spec, llama};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    causal_lm: "Qwen2ForCausalLM",
    sequence_classification: "Qwen2ForSequenceClassification",
    computes: COMPUTES,
    spec,
    ..llama::FAMILY
};

pub(super) const COMPUTES: &[&str] = &["use_sliding_window", "sliding_window", "layer_types"];

fn spec(c: &Config) -> Result<Spec> {
    let blocks = blocks(c)?;
    Ok(Spec { qkv_bias: true, out_bias: false, blocks, ..llama::spec(c)? })
}

/// Windows of the layers from `max_window_layers` on, or of those that `layer_types` names.
pub(super) fn blocks(c: &Config) -> Result<Vec<BlockKind>> {
    let used = c.bool_or("use_sliding_window", false)?;
    let window = if used { c.window(Some(4096))? } else { None };
    let from = c.usize_or("max_window_layers", 28)?;
    let sliding = c.sliding(c.usize("num_hidden_layers")?, |l| window.is_some() && l >= from)?;
    if let (true, None) = (sliding.contains(&true), window) {
        return Err(c.unsupported("layer_types", "full_attention without a window"));
    }
    let window = |sliding: bool| window.filter(|_| sliding);
    let kind = |sliding| BlockKind::attention(window(sliding), Some(0));
    Ok(sliding.into_iter().map(kind).collect())
}
