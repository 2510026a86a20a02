//! Qwen 3.5 with experts (Qwen team 2026), its text part: Qwen 3.5 with those of Qwen 3 Next.

use super::{Config, Family, Spec, llama, qwen3_5, qwen3_next};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_5_moe_text",
    causal_lm: "Qwen3_5MoeForCausalLM",
    sequence_classification: "Qwen3_5MoeForSequenceClassification",
    weights: &[qwen3_next::EXPERTS, qwen3_5::WEIGHTS],
    computes: qwen3_next::COMPUTES,
    spec,
    ..llama::FAMILY
};

fn spec(c: &Config) -> Result<Spec> {
    let c = &c.with_defaults(&[
        ("num_key_value_heads", 2),
        ("num_experts", 256),
        ("num_experts_per_tok", 8),
        ("moe_intermediate_size", 512),
        ("shared_expert_intermediate_size", 512),
        // All its blocks have experts.
        ("intermediate_size", 1),
    ]);
    // It has no key for another rule.
    c.must_be("norm_topk_prob", true)?;
    qwen3_next::shared(c, qwen3_5::spec(c)?, true)
}
