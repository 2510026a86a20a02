//! gpt-oss (OpenAI 2025): a mixture of experts in every block, with biases everywhere, a sink
//! beside the scores of each head, and a window in every other block. Released files are MXFP4,
//! which is refused; converted to bf16 they load.

use super::{
    BlockKind, Config, Experts, Family, ParamKind as K, Spec, StoredOrder, StoredWeight,
    family::{by_rows, ordered},
    llama,
    rope::RopeDefaults,
};
use crate::{
    error::Result,
    ops::{
        activation::{Activation, Glu},
        routing::Router,
    },
};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt_oss",
    causal_lm: "GptOssForCausalLM",
    sequence_classification: "GptOssForSequenceClassification",
    weights: &[WEIGHTS],
    computes: &["sliding_window", "layer_types", "num_experts", "num_local_experts"],
    spec,
    ..llama::FAMILY
};

const WEIGHTS: &[StoredWeight] = &[
    by_rows(K::Embedding, &["embed_tokens.weight"]),
    by_rows(K::Norm1, &["layers.{}.input_layernorm.weight"]),
    llama::QKV,
    llama::QKV_BIAS,
    by_rows(K::Sinks, &["layers.{}.self_attn.sinks"]),
    by_rows(K::Out, &["layers.{}.self_attn.o_proj.weight"]),
    by_rows(K::OutBias, &["layers.{}.self_attn.o_proj.bias"]),
    by_rows(K::Norm2, &["layers.{}.post_attention_layernorm.weight"]),
    by_rows(K::Router, &["layers.{}.mlp.router.weight"]),
    by_rows(K::RouterBias, &["layers.{}.mlp.router.bias"]),
    pairs(K::ExpertsUp, &["layers.{}.mlp.experts.gate_up_proj"]),
    pairs(K::ExpertsUpBias, &["layers.{}.mlp.experts.gate_up_proj_bias"]),
    plain(K::ExpertsDown, &["layers.{}.mlp.experts.down_proj"]),
    plain(K::ExpertsDownBias, &["layers.{}.mlp.experts.down_proj_bias"]),
    by_rows(K::FinalNorm, &["norm.weight"]),
];

const fn pairs(kind: K, names: &'static [&'static str]) -> StoredWeight {
    ordered(kind, names, StoredOrder::ExpertPairs)
}

const fn plain(kind: K, names: &'static [&'static str]) -> StoredWeight {
    ordered(kind, names, StoredOrder::Experts)
}

fn spec(c: &Config) -> Result<Spec> {
    let defaults = RopeDefaults { theta: 150_000.0, ..RopeDefaults::default() };
    // What transformers takes instead is no plain rotation.
    if c.get("rope_parameters").or(c.get("rope_scaling")).is_none() {
        return Err(c.missing("rope_scaling"));
    }
    let norm_eps = c.f64_or("rms_norm_eps", 1e-5)?;
    let base = Spec { ropes: vec![c.rope(defaults)?], norm_eps, ..llama::shape(c)? };
    c.must_be("output_router_logits", false)?;
    let alpha = c.f64_or("swiglu_alpha", 1.702)?;
    if alpha != 1.702 {
        return Err(c.unsupported("swiglu_alpha", "1.702"));
    }
    let limit = c.f64_or("swiglu_limit", 7.0)?;
    if !(limit > 0.0 && limit <= 1e6) {
        return Err(c.wrong("swiglu_limit", "a number above 0, at most 1e6", &limit));
    }
    let experts = match c.usize_opt("num_local_experts")? {
        Some(n) => n,
        None => c.usize_or("num_experts", 128)?,
    };
    let top = c.usize_or("num_experts_per_tok", 4)?;
    let experts = Experts {
        router: Router { experts, top, renormalised: true },
        router_bias: true,
        hidden: base.mlp_hidden,
        glu: Glu { act: Activation::QuickGelu, limit: Some(limit as f32) },
        bias: true,
        shared: false,
        dense: Vec::new(),
    };
    let window = c.window(Some(128))?;
    let sliding = c.sliding(base.layers, |l| l.is_multiple_of(2))?;
    let kind = |sliding| BlockKind::attention(window.filter(|_| sliding), Some(0));
    let bias = c.bool_or("attention_bias", true)?;
    Ok(Spec {
        experts: Some(experts),
        sinks: true,
        qkv_bias: bias,
        out_bias: bias,
        blocks: sliding.into_iter().map(kind).collect(),
        ..base
    })
}
