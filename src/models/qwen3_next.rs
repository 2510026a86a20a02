//! Qwen 3 Next (Qwen team 2025): the blocks of Qwen 3.5, whose MLPs are experts, and beside those
//! that a row chooses one of all rows behind a gate.

use super::{
    Config, Experts, Family, ParamKind, Spec, StoredOrder, StoredWeight,
    family::{by_rows, ordered},
    llama, qwen3_5, qwen3_moe,
};
use crate::{error::Result, ops::routing::Router};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_next",
    causal_lm: "Qwen3NextForCausalLM",
    sequence_classification: "Qwen3NextForSequenceClassification",
    weights: &[MIXER, EXPERTS, qwen3_5::WEIGHTS],
    computes: COMPUTES,
    spec,
    ..llama::FAMILY
};

pub(super) const COMPUTES: &[&str] =
    &["layer_types", "partial_rotary_factor", "num_experts", "num_local_experts"];

const MIXER: &[StoredWeight] = &[ordered(
    ParamKind::MixerIn,
    &["layers.{}.linear_attn.in_proj_qkvz.weight", "layers.{}.linear_attn.in_proj_ba.weight"],
    StoredOrder::KeyHeads,
)];

/// Of blocks with experts of which one has all rows.
pub(super) const EXPERTS: &[StoredWeight] = &[
    by_rows(ParamKind::Router, &["layers.{}.mlp.gate.weight"]),
    by_rows(
        ParamKind::ExpertsUp,
        &["layers.{}.mlp.experts.{e}.gate_proj.weight", "layers.{}.mlp.experts.{e}.up_proj.weight"],
    ),
    by_rows(ParamKind::ExpertsDown, &["layers.{}.mlp.experts.{e}.down_proj.weight"]),
    by_rows(ParamKind::SharedGate, &["layers.{}.mlp.shared_expert_gate.weight"]),
    by_rows(
        ParamKind::Up,
        &[
            "layers.{}.mlp.shared_expert.gate_proj.weight",
            "layers.{}.mlp.shared_expert.up_proj.weight",
        ],
    ),
    by_rows(ParamKind::Down, &["layers.{}.mlp.shared_expert.down_proj.weight"]),
];

fn spec(c: &Config) -> Result<Spec> {
    let c = &c.with_defaults(&[
        ("num_key_value_heads", 2),
        // All its blocks have experts.
        ("intermediate_size", 1),
        ("num_experts", 512),
        ("num_experts_per_tok", 10),
        ("moe_intermediate_size", 512),
        ("shared_expert_intermediate_size", 512),
    ]);
    shared(c, qwen3_5::spec(c)?, true)
}

/// `base` with experts in each block, of which one has all rows; `renormalised` if the config does
/// not say.
pub(super) fn shared(c: &Config, base: Spec, renormalised: bool) -> Result<Spec> {
    let renormalised = c.bool_or("norm_topk_prob", renormalised)?;
    let Some(e) = qwen3_moe::experts(c, base.layers)?.filter(|e| e.dense.is_empty()) else {
        // A block without would have an MLP of another width, under other names.
        let listed = !c.indices("mlp_only_layers")?.is_empty();
        let key = if listed { "mlp_only_layers" } else { "decoder_sparse_step" };
        return Err(c.unsupported(key, "experts in every block"));
    };
    let router = Router { renormalised, ..e.router };
    let mlp_hidden = c.usize("shared_expert_intermediate_size")?;
    Ok(Spec { experts: Some(Experts { router, shared: true, ..e }), mlp_hidden, ..base })
}
