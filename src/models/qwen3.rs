//! Qwen 3 (Yang et al. 2025): Llama with norms of each query and key head.

use super::{Config, Family, QkNorm, Spec, llama, qwen2};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    causal_lm: "Qwen3ForCausalLM",
    sequence_classification: "Qwen3ForSequenceClassification",
    computes: qwen2::COMPUTES,
    spec,
    ..llama::FAMILY
};

pub(super) fn spec(c: &Config) -> Result<Spec> {
    let base = Spec { qk_norm: Some(QkNorm::Heads), ..llama::spec(c)? };
    // Its heads have a width of their own.
    let head_dim = c.usize_or("head_dim", 128)?;
    Ok(Spec { head_dim, rotary_dim: head_dim, blocks: qwen2::blocks(c)?, ..base })
}
