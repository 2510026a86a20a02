//! Gemma 2 (Gemma Team 2024): norms of `1 + w` before and after attention and MLP, embeddings
//! times sqrt(hidden), soft-caps of scores and logits, a window in every other layer.

use super::{
    BlockKind, BlockNorms, Config, Family, Mlp, ParamKind, Scales, Spec, StoredWeight,
    family::by_rows, llama, rope::RopeDefaults,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "gemma2",
    causal_lm: "Gemma2ForCausalLM",
    sequence_classification: "Gemma2ForSequenceClassification",
    weights: &[WEIGHTS],
    computes: &[
        "sliding_window",
        "layer_types",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ],
    spec,
    ..llama::FAMILY
};

pub(super) const WEIGHTS: &[StoredWeight] = &[
    by_rows(ParamKind::Embedding, &["embed_tokens.weight"]),
    by_rows(ParamKind::Norm1, &["layers.{}.input_layernorm.weight"]),
    llama::QKV,
    llama::QKV_BIAS,
    by_rows(ParamKind::QNorm, &["layers.{}.self_attn.q_norm.weight"]),
    by_rows(ParamKind::KNorm, &["layers.{}.self_attn.k_norm.weight"]),
    by_rows(ParamKind::Out, &["layers.{}.self_attn.o_proj.weight"]),
    by_rows(ParamKind::OutBias, &["layers.{}.self_attn.o_proj.bias"]),
    by_rows(ParamKind::PostNorm1, &["layers.{}.post_attention_layernorm.weight"]),
    by_rows(ParamKind::Norm2, &["layers.{}.pre_feedforward_layernorm.weight"]),
    by_rows(ParamKind::Up, &["layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"]),
    by_rows(ParamKind::Down, &["layers.{}.mlp.down_proj.weight"]),
    by_rows(ParamKind::PostNorm2, &["layers.{}.post_feedforward_layernorm.weight"]),
    by_rows(ParamKind::FinalNorm, &["norm.weight"]),
];

fn spec(c: &Config) -> Result<Spec> {
    let cap = |key, default| {
        let given = c.json().contains_key(key);
        Ok(if given { c.f64_opt(key)? } else { Some(default) })
    };
    let base = Spec { ropes: vec![c.rope(RopeDefaults::default())?], ..common(c)? };
    let window = c.window(Some(4096))?;
    let sliding = c.sliding(base.layers, |l| l.is_multiple_of(2))?;
    let kind = |sliding| BlockKind::attention(window.filter(|_| sliding), Some(0));
    let scales = Scales {
        score_cap: cap("attn_logit_softcapping", 50.0)?,
        logit_cap: cap("final_logit_softcapping", 30.0)?,
        ..base.scales
    };
    Ok(Spec { blocks: sliding.into_iter().map(kind).collect(), scales, ..base })
}

/// What Gemma 2 and 3 have in common: all but rotary embeddings.
pub(super) fn common(c: &Config) -> Result<Spec> {
    let base = llama::shape(c)?;
    let head_dim = c.usize_or("head_dim", 256)?;
    let divisor = c.f64_or("query_pre_attn_scalar", 256.0)?;
    Ok(Spec {
        head_dim,
        rotary_dim: head_dim,
        norm_one_plus: true,
        block_norms: BlockNorms::Around,
        // Its key is `hidden_activation`; `hidden_act`, if it is there, says what it once was.
        mlp: Mlp::Gated(c.activation("hidden_activation", "gelu_pytorch_tanh")?),
        mlp_bias: false,
        tied: c.bool_or("tie_word_embeddings", true)?,
        scales: Scales {
            embedding: (base.hidden as f64).sqrt(),
            scores: Some(1.0 / divisor.sqrt()),
            ..Scales::NONE
        },
        ..base
    })
}
