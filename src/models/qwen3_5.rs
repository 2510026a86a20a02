//! Qwen 3.5 (Qwen team 2026), its text part: three blocks in four have a gated delta rule in the
//! place of attention (Yang et al. 2024), whose output is gated in the others.

use super::{
    BlockKind, Config, Family, Mixer, ParamKind, QkNorm, Spec, StateMixer, StoredOrder,
    StoredWeight,
    family::{by_rows, ordered},
    llama,
    rope::RopeDefaults,
};
use crate::{
    error::Result,
    ops::{activation::Activation, delta_rule::DeltaShape},
};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_5_text",
    causal_lm: "Qwen3_5ForCausalLM",
    sequence_classification: "Qwen3_5TextForSequenceClassification",
    weights: &[WEIGHTS],
    computes: COMPUTES,
    spec,
    ..llama::FAMILY
};

const COMPUTES: &[&str] = &["layer_types", "partial_rotary_factor"];

pub(super) const WEIGHTS: &[StoredWeight] = &[
    by_rows(ParamKind::Embedding, &["embed_tokens.weight"]),
    by_rows(ParamKind::Norm1, &["layers.{}.input_layernorm.weight"]),
    ordered(
        ParamKind::Qkv,
        &[
            "layers.{}.self_attn.q_proj.weight",
            "layers.{}.self_attn.k_proj.weight",
            "layers.{}.self_attn.v_proj.weight",
        ],
        StoredOrder::GatedQueries,
    ),
    by_rows(ParamKind::QNorm, &["layers.{}.self_attn.q_norm.weight"]),
    by_rows(ParamKind::KNorm, &["layers.{}.self_attn.k_norm.weight"]),
    by_rows(ParamKind::Out, &["layers.{}.self_attn.o_proj.weight"]),
    by_rows(
        ParamKind::MixerIn,
        &[
            "layers.{}.linear_attn.in_proj_qkv.weight",
            "layers.{}.linear_attn.in_proj_z.weight",
            "layers.{}.linear_attn.in_proj_b.weight",
            "layers.{}.linear_attn.in_proj_a.weight",
        ],
    ),
    ordered(ParamKind::Conv, &["layers.{}.linear_attn.conv1d.weight"], StoredOrder::Channels),
    by_rows(ParamKind::DeltaRate, &["layers.{}.linear_attn.A_log"]),
    by_rows(ParamKind::DeltaBias, &["layers.{}.linear_attn.dt_bias"]),
    by_rows(ParamKind::DeltaNorm, &["layers.{}.linear_attn.norm.weight"]),
    by_rows(ParamKind::MixerOut, &["layers.{}.linear_attn.out_proj.weight"]),
    by_rows(ParamKind::Norm2, &["layers.{}.post_attention_layernorm.weight"]),
    by_rows(ParamKind::Up, &["layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"]),
    by_rows(ParamKind::Down, &["layers.{}.mlp.down_proj.weight"]),
    by_rows(ParamKind::FinalNorm, &["norm.weight"]),
];

pub(super) fn spec(c: &Config) -> Result<Spec> {
    let c = &c.with_defaults(&[
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("max_position_embeddings", 32768),
    ]);
    c.must_be("attention_bias", false)?;
    c.must_be("attn_output_gate", true)?;
    if c.activation("hidden_act", "silu")? != Activation::Silu {
        // Of the convolutions, too.
        return Err(c.unsupported("hidden_act", "silu"));
    }
    // Sections of positions are for images: to text all are one.
    let also = &["partial_rotary_factor", "mrope_section", "mrope_interleaved"];
    let rope = c.rope(RopeDefaults { also, ..RopeDefaults::default() })?;
    let base = Spec { ropes: vec![rope], ..llama::shape(c)? };
    let every = c.usize_or("full_attention_interval", 4)?;
    if every == 0 {
        return Err(c.wrong("full_attention_interval", "1 or more", &every));
    }
    let kinds = ["full_attention", "linear_attention"];
    let linear = c.kinds(base.layers, kinds, |l| !(l + 1).is_multiple_of(every))?;
    let kind = |linear| match linear {
        true => BlockKind { mixer: Mixer::State, ..BlockKind::default() },
        false => BlockKind::attention(None, Some(0)),
    };
    let shape = DeltaShape {
        key_heads: c.usize_or("linear_num_key_heads", 16)?,
        value_heads: c.usize_or("linear_num_value_heads", 32)?,
        key_dim: c.usize_or("linear_key_head_dim", 128)?,
        value_dim: c.usize_or("linear_value_head_dim", 128)?,
    };
    let taps = c.usize_or("linear_conv_kernel_dim", 4)?;
    Ok(Spec {
        rotary_dim: c.rotary_dim(base.head_dim, "partial_rotary_factor", 0.25)?,
        norm_one_plus: true,
        qk_norm: Some(QkNorm::Heads),
        attention_gate: true,
        state_mixer: Some(StateMixer::Delta(shape, taps)),
        blocks: linear.into_iter().map(kind).collect(),
        ..base
    })
}
