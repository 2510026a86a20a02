//! Mistral (Jiang et al. 2023) and Ministral: Llama with a window, in all layers or in those that
//! `layer_types` names; in Ministral 3 queries that grow with their position.

use super::{BlockKind, Config, Family, QueryScale, Spec, llama, rope::RopeDefaults};
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

pub(super) const MINISTRAL3: Family = Family {
    model_type: "ministral3",
    causal_lm: "Ministral3ForCausalLM",
    sequence_classification: "Ministral3ForSequenceClassification",
    computes: &["sliding_window"],
    spec: |c| {
        const BETA: &str = "llama_4_scaling_beta";
        let defaults = RopeDefaults { theta: 1e6, also: &[BETA] };
        let base = Spec { ropes: vec![c.rope(defaults)?], ..llama::shape(c)? };
        let window = c.window(None)?;
        let scale = |(beta, original)| QueryScale { beta, original };
        let query_scale = c.rope_scaling_beta(BETA)?.map(scale);
        let norm_eps = c.f64_or("rms_norm_eps", 1e-5)?;
        let blocks = vec![BlockKind::attention(window, Some(0))];
        Ok(Spec { blocks, norm_eps, query_scale, ..base })
    },
    ..llama::FAMILY
};

fn spec(c: &Config) -> Result<Spec> {
    let base = llama::spec(c)?;
    let window = c.window(Some(4096))?;
    let sliding = c.sliding(base.layers, |_| true)?;
    let kind = |sliding| BlockKind::attention(window.filter(|_| sliding), Some(0));
    Ok(Spec { blocks: sliding.into_iter().map(kind).collect(), ..base })
}
