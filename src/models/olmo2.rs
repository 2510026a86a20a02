//! OLMo 2 and 3 (OLMo Team 2024, 2025): norms after attention and MLP, and of queries and keys
//! over all heads; in OLMo 3 three layers with a window for each without.

use super::{
    BlockKind, BlockNorms, Config, Family, QkNorm, Spec, gemma2, llama, rope::RopeDefaults,
};
use crate::{error::Result, ops::rope::Rope};

pub(super) const FAMILY: Family = Family {
    model_type: "olmo2",
    causal_lm: "Olmo2ForCausalLM",
    sequence_classification: "Olmo2ForSequenceClassification",
    weights: &[gemma2::WEIGHTS],
    spec: |c| Ok(Spec { ropes: vec![c.rope(RopeDefaults::default())?], ..common(c)? }),
    ..llama::FAMILY
};

pub(super) const OLMO3: Family = Family {
    model_type: "olmo3",
    causal_lm: "Olmo3ForCausalLM",
    sequence_classification: "Olmo3ForSequenceClassification",
    weights: &[gemma2::WEIGHTS],
    computes: &["sliding_window", "layer_types"],
    spec,
    ..llama::FAMILY
};

const THETA: RopeDefaults = RopeDefaults { theta: 500_000.0, also: &[] };

fn common(c: &Config) -> Result<Spec> {
    let base = Spec { norm_eps: c.f64_or("rms_norm_eps", 1e-5)?, ..llama::shape(c)? };
    Ok(Spec { block_norms: BlockNorms::After, qk_norm: Some(QkNorm::Rows), ..base })
}

fn spec(c: &Config) -> Result<Spec> {
    let base = common(c)?;
    let window = c.window(Some(4096))?;
    let sliding = c.sliding(base.layers, |l| !(l + 1).is_multiple_of(4))?;
    let kind = |sliding| {
        let rope = Some(usize::from(sliding));
        BlockKind::attention(window.filter(|_| sliding), rope)
    };
    let full = match c.rope_of("full_attention", THETA)? {
        Some(rope) => rope,
        None => c.rope(THETA)?,
    };
    let local = match c.rope_of("sliding_attention", THETA)? {
        Some(rope) => rope,
        // `rope_scaling` is for the others.
        None => Rope::plain(full.theta),
    };
    let blocks = sliding.into_iter().map(kind).collect();
    Ok(Spec { ropes: vec![full, local], blocks, ..base })
}
