//! Qwen 1.5 and 2 with experts (Yang et al. 2024): Qwen 2 with those of Qwen 3 Next, the weights of
//! a row's experts as they are.

use super::{Config, Family, Spec, llama, qwen3_next};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2_moe",
    causal_lm: "Qwen2MoeForCausalLM",
    sequence_classification: "Qwen2MoeForSequenceClassification",
    weights: &[qwen3_next::EXPERTS, llama::WEIGHTS],
    computes: &["num_experts", "num_local_experts"],
    spec,
    ..llama::FAMILY
};

fn spec(c: &Config) -> Result<Spec> {
    let c = &c.with_defaults(&[
        ("num_key_value_heads", 16),
        ("max_position_embeddings", 32768),
        // All its blocks have experts.
        ("intermediate_size", 1),
        ("num_experts", 60),
        ("num_experts_per_tok", 4),
        ("moe_intermediate_size", 1408),
        ("shared_expert_intermediate_size", 5632),
    ]);
    let qkv_bias = c.bool_or("qkv_bias", true)?;
    let base = Spec { qkv_bias, out_bias: false, ..llama::spec(c)? };
    qwen3_next::shared(c, base, false)
}
