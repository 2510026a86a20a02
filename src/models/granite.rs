//! Granite 3 (Granite Team 2024): Llama with factors on embeddings, attention scores, what blocks
//! add to the residual stream, and logits.

use super::{Config, Family, Scales, Spec, llama};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "granite",
    causal_lm: "GraniteForCausalLM",
    // transformers has no such class: the backbone with `score.weight`.
    sequence_classification: "GraniteForSequenceClassification",
    computes: &[
        "embedding_multiplier",
        "attention_multiplier",
        "residual_multiplier",
        "logits_scaling",
    ],
    spec,
    ..llama::FAMILY
};

fn spec(c: &Config) -> Result<Spec> {
    let scales = Scales {
        embedding: c.f64_or("embedding_multiplier", 1.0)?,
        residual: c.f64_or("residual_multiplier", 1.0)?,
        scores: Some(c.f64_or("attention_multiplier", 1.0)?),
        logits: c.f64_or("logits_scaling", 1.0)?,
        ..Scales::NONE
    };
    Ok(Spec { scales, ..llama::spec(c)? })
}
