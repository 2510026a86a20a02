//! Qwen 3 with a mixture of experts (Yang et al. 2025): Qwen 3 whose blocks have experts, but for
//! those that `mlp_only_layers` names or `decoder_sparse_step` leaves out.

use super::{BlockKind, Config, Experts, Family, Spec, llama, qwen3};
use crate::{
    error::Result,
    ops::{activation::Glu, routing::Router},
};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_moe",
    causal_lm: "Qwen3MoeForCausalLM",
    sequence_classification: "Qwen3MoeForSequenceClassification",
    computes: COMPUTES,
    spec,
    ..llama::FAMILY
};

const COMPUTES: &[&str] =
    &["use_sliding_window", "sliding_window", "num_experts", "num_local_experts"];

fn spec(c: &Config) -> Result<Spec> {
    let base = qwen3::spec(c)?;
    let experts = experts(c, base.layers)?;
    // In all layers, unlike in Qwen 3.
    let window = if c.bool_or("use_sliding_window", false)? { c.window(Some(4096))? } else { None };
    Ok(Spec { experts, blocks: vec![BlockKind::attention(window, Some(0))], ..base })
}

/// The experts of a Qwen; none if all its blocks have an MLP.
pub(super) fn experts(c: &Config, layers: usize) -> Result<Option<Experts>> {
    c.check_layers(layers)?;
    // An auxiliary loss, which no training here has.
    c.must_be("output_router_logits", false)?;
    let step = c.usize_or("decoder_sparse_step", 1)?;
    let only = c.indices("mlp_only_layers")?;
    let dense = |l: &usize| only.contains(l) || step == 0 || !(l + 1).is_multiple_of(step);
    let experts = match c.usize_opt("num_local_experts")? {
        Some(n) => n,
        None => c.usize_or("num_experts", 128)?,
    };
    let experts = Experts {
        router: Router {
            experts,
            top: c.usize_or("num_experts_per_tok", 8)?,
            renormalised: c.bool_or("norm_topk_prob", false)?,
        },
        router_bias: false,
        hidden: c.usize_or("moe_intermediate_size", 768)?,
        glu: Glu { act: c.activation("hidden_act", "silu")?, limit: None },
        bias: false,
        shared: false,
        dense: (0..layers).filter(dense).collect(),
    };
    Ok(Some(experts).filter(|e| e.dense.len() < layers))
}
