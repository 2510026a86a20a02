//! Llama 1 to 3 (Touvron et al. 2023, Grattafiori et al. 2024): RMSNorm, rotary positions, grouped
//! queries, SwiGLU, no biases by default.

use super::{
    BlockKind, BlockNorms, Config, Family, Mlp, Norm, ParamKind, Scales, Spec, StoredWeight,
    family::by_rows, rope::RopeDefaults,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    causal_lm: "LlamaForCausalLM",
    sequence_classification: "LlamaForSequenceClassification",
    prefix: "model.",
    weights: &[WEIGHTS],
    ignored: &[".rotary_emb.inv_freq"],
    computes: &[],
    spec,
};

pub(super) const QKV: StoredWeight = by_rows(
    ParamKind::Qkv,
    &[
        "layers.{}.self_attn.q_proj.weight",
        "layers.{}.self_attn.k_proj.weight",
        "layers.{}.self_attn.v_proj.weight",
    ],
);
pub(super) const QKV_BIAS: StoredWeight = by_rows(
    ParamKind::QkvBias,
    &[
        "layers.{}.self_attn.q_proj.bias",
        "layers.{}.self_attn.k_proj.bias",
        "layers.{}.self_attn.v_proj.bias",
    ],
);

/// Its names, which most families have taken over.
pub(super) const WEIGHTS: &[StoredWeight] = &[
    by_rows(ParamKind::Embedding, &["embed_tokens.weight"]),
    by_rows(ParamKind::Norm1, &["layers.{}.input_layernorm.weight"]),
    QKV,
    QKV_BIAS,
    by_rows(ParamKind::QNorm, &["layers.{}.self_attn.q_norm.weight"]),
    by_rows(ParamKind::KNorm, &["layers.{}.self_attn.k_norm.weight"]),
    by_rows(ParamKind::Out, &["layers.{}.self_attn.o_proj.weight"]),
    by_rows(ParamKind::OutBias, &["layers.{}.self_attn.o_proj.bias"]),
    by_rows(ParamKind::Norm2, &["layers.{}.post_attention_layernorm.weight"]),
    by_rows(ParamKind::Up, &["layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"]),
    by_rows(ParamKind::UpBias, &["layers.{}.mlp.gate_proj.bias", "layers.{}.mlp.up_proj.bias"]),
    by_rows(ParamKind::Down, &["layers.{}.mlp.down_proj.weight"]),
    by_rows(ParamKind::DownBias, &["layers.{}.mlp.down_proj.bias"]),
    by_rows(ParamKind::Router, &["layers.{}.mlp.gate.weight"]),
    by_rows(
        ParamKind::ExpertsUp,
        &["layers.{}.mlp.experts.{e}.gate_proj.weight", "layers.{}.mlp.experts.{e}.up_proj.weight"],
    ),
    by_rows(ParamKind::ExpertsDown, &["layers.{}.mlp.experts.{e}.down_proj.weight"]),
    by_rows(ParamKind::FinalNorm, &["norm.weight"]),
];

pub(super) fn spec(c: &Config) -> Result<Spec> {
    Ok(Spec { ropes: vec![c.rope(RopeDefaults::default())?], ..shape(c)? })
}

/// All but the rotary embedding, for families that have others.
pub(super) fn shape(c: &Config) -> Result<Spec> {
    let hidden = c.usize("hidden_size")?;
    let q_heads = c.usize("num_attention_heads")?;
    let attention_bias = c.bool_or("attention_bias", false)?;
    let head_dim = match c.usize_opt("head_dim")? {
        Some(d) => d,
        None => c.divide("hidden_size", hidden, "num_attention_heads", q_heads)?,
    };
    Ok(Spec {
        vocab: c.usize("vocab_size")?,
        hidden,
        layers: c.usize("num_hidden_layers")?,
        q_heads,
        kv_heads: c.usize_or("num_key_value_heads", q_heads)?,
        head_dim,
        mlp_hidden: c.usize("intermediate_size")?,
        max_positions: c.usize_or("max_position_embeddings", 2048)?,
        learned_positions: false,
        ropes: Vec::new(),
        rotary_dim: head_dim,
        blocks: vec![BlockKind::attention(None, Some(0))],
        norm: Norm::Rms,
        norm_eps: c.f64_or("rms_norm_eps", 1e-6)?,
        norm_one_plus: false,
        block_norms: BlockNorms::Before,
        qk_norm: None,
        parallel: false,
        mlp: Mlp::Gated(c.activation("hidden_act", "silu")?),
        experts: None,
        state_mixer: None,
        attention_gate: false,
        sinks: false,
        qkv_bias: attention_bias,
        out_bias: attention_bias,
        mlp_bias: c.bool_or("mlp_bias", false)?,
        tied: c.bool_or("tie_word_embeddings", false)?,
        scales: Scales::NONE,
        query_scale: None,
        unpadded: None,
        adapter: None,
    })
}
