//! Mistral (Jiang et al. 2023) and Ministral: Llama with a window, in all layers or in those that
//! `layer_types` names.

use super::{BlockKind, Config, Family, Spec, llama};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    causal_lm: "MistralForCausalLM",
    sequence_classification: "MistralForSequenceClassification",
    computes: &["sliding_window"],
    spec,
    ..llama::FAMILY
};

pub(super) const MINISTRAL: Family = Family {
    model_type: "ministral",
    causal_lm: "MinistralForCausalLM",
    sequence_classification: "MinistralForSequenceClassification",
    computes: &["sliding_window", "layer_types"],
    spec,
    ..llama::FAMILY
};

fn spec(c: &Config) -> Result<Spec> {
    let base = llama::spec(c)?;
    let window = c.window(Some(4096))?;
    let sliding = c.sliding(base.layers, |_| true)?;
    let kind = |sliding| BlockKind { window: window.filter(|_| sliding), rope: Some(0) };
    Ok(Spec { blocks: sliding.into_iter().map(kind).collect(), ..base })
}
