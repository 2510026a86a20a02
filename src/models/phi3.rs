//! Phi 3 and 4-mini (Abdin et al. 2024): Llama with fused projections, partly rotating heads and
//! frequencies by LongRoPE.

use super::{
    BlockKind, Config, Family, ParamKind, Spec, StoredWeight, family::by_rows, llama,
    rope::RopeDefaults,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    causal_lm: "Phi3ForCausalLM",
    sequence_classification: "Phi3ForSequenceClassification",
    weights: &[WEIGHTS],
    computes: &["sliding_window", "partial_rotary_factor"],
    spec,
    ..llama::FAMILY
};

const WEIGHTS: &[StoredWeight] = &[
    by_rows(ParamKind::Embedding, &["embed_tokens.weight"]),
    by_rows(ParamKind::Norm1, &["layers.{}.input_layernorm.weight"]),
    by_rows(ParamKind::Qkv, &["layers.{}.self_attn.qkv_proj.weight"]),
    by_rows(ParamKind::Out, &["layers.{}.self_attn.o_proj.weight"]),
    by_rows(ParamKind::Norm2, &["layers.{}.post_attention_layernorm.weight"]),
    by_rows(ParamKind::Up, &["layers.{}.mlp.gate_up_proj.weight"]),
    by_rows(ParamKind::Down, &["layers.{}.mlp.down_proj.weight"]),
    by_rows(ParamKind::FinalNorm, &["norm.weight"]),
];

fn spec(c: &Config) -> Result<Spec> {
    const PARTIAL: &str = "partial_rotary_factor";
    c.must_be("attention_bias", false)?;
    let window = c.window(None)?;
    let defaults = RopeDefaults { also: &[PARTIAL], ..RopeDefaults::default() };
    let base = Spec { ropes: vec![c.rope(defaults)?], ..llama::shape(c)? };
    let rotary_dim = c.rotary_dim(base.head_dim, PARTIAL, 1.0)?;
    let norm_eps = c.f64_or("rms_norm_eps", 1e-5)?;
    Ok(Spec { rotary_dim, norm_eps, blocks: vec![BlockKind::attention(window, Some(0))], ..base })
}
