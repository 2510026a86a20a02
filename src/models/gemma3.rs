//! Gemma 3, its text model (Gemma Team 2025): as Gemma 2 with norms of query and key heads instead
//! of soft-caps, five layers with a window and a rotary base of their own for each without.

use super::{BlockKind, Config, Family, QkNorm, Scales, Spec, gemma2, rope::RopeDefaults};
use crate::{error::Result, ops::rope::Rope};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma3_text",
    causal_lm: "Gemma3ForCausalLM",
    sequence_classification: "Gemma3TextForSequenceClassification",
    computes: &[
        "sliding_window",
        "layer_types",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
        "rope_local_base_freq",
    ],
    spec,
    ..gemma2::FAMILY
};

fn spec(c: &Config) -> Result<Spec> {
    // The configs of models with a vision tower leave out what is as in the 4B model.
    let c = &c.with_defaults(&[
        ("vocab_size", 262_208),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("max_position_embeddings", 131_072),
    ]);
    let defaults = RopeDefaults { theta: 1e6, ..RopeDefaults::default() };
    let base = gemma2::common(c)?;
    let window = c.window(Some(4096))?;
    let every = c.usize_or("sliding_window_pattern", 6)?.max(1);
    let sliding = c.sliding(base.layers, |l| !(l + 1).is_multiple_of(every))?;
    let kind = |sliding| {
        let rope = Some(usize::from(sliding));
        BlockKind::attention(window.filter(|_| sliding), rope)
    };
    let full = match c.rope_of("full_attention", defaults)? {
        Some(rope) => rope,
        None => c.rope(defaults)?,
    };
    let local = match c.rope_of("sliding_attention", RopeDefaults::default())? {
        Some(rope) => rope,
        None => Rope::plain(c.f64_or("rope_local_base_freq", 10_000.0)?),
    };
    Ok(Spec {
        qk_norm: Some(QkNorm::Heads),
        ropes: vec![full, local],
        blocks: sliding.into_iter().map(kind).collect(),
        scales: Scales { logit_cap: c.f64_opt("final_logit_softcapping")?, ..base.scales },
        ..base
    })
}
