//! GPT-2 (Radford et al. 2019): LayerNorm, learned positions, plain MLP, biases everywhere, tied
//! head, weights stored `[in, out]`.

use super::{
    BlockKind, BlockNorms, Config, Family, Mlp, Norm, ParamKind, Scales, Spec,
    family::{by_columns, by_rows},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "gpt2",
    causal_lm: "GPT2LMHeadModel",
    sequence_classification: "GPT2ForSequenceClassification",
    prefix: "transformer.",
    weights: &[&[
        by_rows(ParamKind::Embedding, &["wte.weight"]),
        by_rows(ParamKind::Positions, &["wpe.weight"]),
        by_rows(ParamKind::Norm1, &["h.{}.ln_1.weight"]),
        by_rows(ParamKind::Norm1Bias, &["h.{}.ln_1.bias"]),
        by_columns(ParamKind::Qkv, &["h.{}.attn.c_attn.weight"]),
        by_rows(ParamKind::QkvBias, &["h.{}.attn.c_attn.bias"]),
        by_columns(ParamKind::Out, &["h.{}.attn.c_proj.weight"]),
        by_rows(ParamKind::OutBias, &["h.{}.attn.c_proj.bias"]),
        by_rows(ParamKind::Norm2, &["h.{}.ln_2.weight"]),
        by_rows(ParamKind::Norm2Bias, &["h.{}.ln_2.bias"]),
        by_columns(ParamKind::Up, &["h.{}.mlp.c_fc.weight"]),
        by_rows(ParamKind::UpBias, &["h.{}.mlp.c_fc.bias"]),
        by_columns(ParamKind::Down, &["h.{}.mlp.c_proj.weight"]),
        by_rows(ParamKind::DownBias, &["h.{}.mlp.c_proj.bias"]),
        by_rows(ParamKind::FinalNorm, &["ln_f.weight"]),
        by_rows(ParamKind::FinalNormBias, &["ln_f.bias"]),
    ]],
    ignored: &[".attn.bias", ".attn.masked_bias"],
    computes: &[],
    spec,
};

fn spec(c: &Config) -> Result<Spec> {
    for (key, want) in [
        ("scale_attn_by_inverse_layer_idx", false),
        ("reorder_and_upcast_attn", false),
        ("add_cross_attention", false),
    ] {
        c.must_be(key, want)?;
    }
    if !c.bool_or("scale_attn_weights", true)? {
        return Err(c.unsupported("scale_attn_weights", "true"));
    }
    let hidden = c.usize("n_embd")?;
    let heads = c.usize("n_head")?;
    let head_dim = c.divide("n_embd", hidden, "n_head", heads)?;
    Ok(Spec {
        vocab: c.usize("vocab_size")?,
        hidden,
        layers: c.usize("n_layer")?,
        q_heads: heads,
        kv_heads: heads,
        head_dim,
        mlp_hidden: c.usize_opt("n_inner")?.unwrap_or(hidden.saturating_mul(4)),
        max_positions: c.usize("n_positions")?,
        learned_positions: true,
        ropes: Vec::new(),
        rotary_dim: head_dim,
        blocks: vec![BlockKind::default()],
        norm: Norm::Layer,
        norm_eps: c.f64_or("layer_norm_epsilon", 1e-5)?,
        norm_one_plus: false,
        block_norms: BlockNorms::Before,
        qk_norm: None,
        parallel: false,
        mlp: Mlp::Plain(c.activation("activation_function", "gelu_new")?),
        experts: None,
        state_mixer: None,
        attention_gate: false,
        sinks: false,
        qkv_bias: true,
        out_bias: true,
        mlp_bias: true,
        tied: c.bool_or("tie_word_embeddings", true)?,
        scales: Scales::NONE,
        query_scale: None,
        unpadded: None,
        adapter: None,
    })
}
