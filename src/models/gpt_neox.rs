//! GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023): LayerNorm and biases, attention
//! and MLP in parallel, a quarter of each head rotates, query, key and value stored head by head.

use super::{
    BlockKind, Config, Family, Mlp, Norm, ParamKind, Spec,
    family::{by_heads, by_rows},
    llama,
    rope::RopeDefaults,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "gpt_neox",
    causal_lm: "GPTNeoXForCausalLM",
    sequence_classification: "GPTNeoXForSequenceClassification",
    prefix: "gpt_neox.",
    weights: &[&[
        by_rows(ParamKind::Embedding, &["embed_in.weight"]),
        by_rows(ParamKind::Norm1, &["layers.{}.input_layernorm.weight"]),
        by_rows(ParamKind::Norm1Bias, &["layers.{}.input_layernorm.bias"]),
        by_heads(ParamKind::Qkv, &["layers.{}.attention.query_key_value.weight"]),
        by_heads(ParamKind::QkvBias, &["layers.{}.attention.query_key_value.bias"]),
        by_rows(ParamKind::Out, &["layers.{}.attention.dense.weight"]),
        by_rows(ParamKind::OutBias, &["layers.{}.attention.dense.bias"]),
        by_rows(ParamKind::Norm2, &["layers.{}.post_attention_layernorm.weight"]),
        by_rows(ParamKind::Norm2Bias, &["layers.{}.post_attention_layernorm.bias"]),
        by_rows(ParamKind::Up, &["layers.{}.mlp.dense_h_to_4h.weight"]),
        by_rows(ParamKind::UpBias, &["layers.{}.mlp.dense_h_to_4h.bias"]),
        by_rows(ParamKind::Down, &["layers.{}.mlp.dense_4h_to_h.weight"]),
        by_rows(ParamKind::DownBias, &["layers.{}.mlp.dense_4h_to_h.bias"]),
        by_rows(ParamKind::FinalNorm, &["final_layer_norm.weight"]),
        by_rows(ParamKind::FinalNormBias, &["final_layer_norm.bias"]),
        by_rows(ParamKind::LmHead, &["embed_out.weight"]),
    ]],
    ignored: &[".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"],
    computes: &["rotary_pct", "partial_rotary_factor"],
    spec,
};

fn spec(c: &Config) -> Result<Spec> {
    if c.get("rope_theta").is_some() && c.get("rope_parameters").is_none() {
        return Err(c.unsupported("rope_theta", "rotary_emb_base"));
    }
    let theta = c.f64_or("rotary_emb_base", 10_000.0)?;
    let defaults = RopeDefaults { theta, also: &["partial_rotary_factor"] };
    let base = Spec { ropes: vec![c.rope(defaults)?], ..llama::shape(c)? };
    let bias = c.bool_or("attention_bias", true)?;
    Ok(Spec {
        kv_heads: base.q_heads,
        rotary_dim: c.rotary_dim(base.head_dim, "rotary_pct", 0.25)?,
        blocks: vec![BlockKind::attention(None, Some(0))],
        norm: Norm::Layer,
        norm_eps: c.f64_or("layer_norm_eps", 1e-5)?,
        parallel: c.bool_or("use_parallel_residual", true)?,
        mlp: Mlp::Plain(c.activation("hidden_act", "gelu")?),
        experts: None,
        state_mixer: None,
        attention_gate: false,
        sinks: false,
        qkv_bias: bias,
        out_bias: bias,
        mlp_bias: true,
        ..base
    })
}
