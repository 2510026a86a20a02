//! LFM2 (Liquid AI 2025): blocks with a short convolution between two gates, and some with
//! attention.

use super::{
    BlockKind, Config, Family, Mixer, Mlp, ParamKind, QkNorm, Spec, StateMixer, StoredOrder,
    StoredWeight,
    family::{by_rows, ordered},
    llama,
    rope::RopeDefaults,
};
use crate::{error::Result, ops::activation::Activation};

pub(super) const FAMILY: Family = Family {
    model_type: "lfm2",
    causal_lm: "Lfm2ForCausalLM",
    sequence_classification: "Lfm2ForSequenceClassification",
    weights: &[WEIGHTS],
    computes: &["layer_types"],
    spec,
    ..llama::FAMILY
};

const WEIGHTS: &[StoredWeight] = &[
    by_rows(ParamKind::Embedding, &["embed_tokens.weight"]),
    by_rows(ParamKind::Norm1, &["layers.{}.operator_norm.weight"]),
    by_rows(
        ParamKind::Qkv,
        &[
            "layers.{}.self_attn.q_proj.weight",
            "layers.{}.self_attn.k_proj.weight",
            "layers.{}.self_attn.v_proj.weight",
        ],
    ),
    by_rows(ParamKind::QNorm, &["layers.{}.self_attn.q_layernorm.weight"]),
    by_rows(ParamKind::KNorm, &["layers.{}.self_attn.k_layernorm.weight"]),
    by_rows(ParamKind::Out, &["layers.{}.self_attn.out_proj.weight"]),
    by_rows(ParamKind::MixerIn, &["layers.{}.conv.in_proj.weight"]),
    ordered(ParamKind::Conv, &["layers.{}.conv.conv.weight"], StoredOrder::Channels),
    by_rows(ParamKind::MixerOut, &["layers.{}.conv.out_proj.weight"]),
    by_rows(ParamKind::Norm2, &["layers.{}.ffn_norm.weight"]),
    by_rows(
        ParamKind::Up,
        &["layers.{}.feed_forward.w1.weight", "layers.{}.feed_forward.w3.weight"],
    ),
    by_rows(ParamKind::Down, &["layers.{}.feed_forward.w2.weight"]),
    by_rows(ParamKind::FinalNorm, &["embedding_norm.weight"]),
];

fn spec(c: &Config) -> Result<Spec> {
    let inner = match c.usize_opt("block_ff_dim")? {
        Some(inner) => inner,
        None => c.usize("intermediate_size")?,
    };
    let c = &c.with_defaults(&[
        ("intermediate_size", 1),
        ("num_key_value_heads", 8),
        ("max_position_embeddings", 128_000),
    ]);
    for key in ["conv_bias", "attention_bias", "mlp_bias"] {
        c.must_be(key, false)?;
    }
    let rope = c.rope(RopeDefaults { theta: 1e6, ..RopeDefaults::default() })?;
    if let Some(theta) = c.f64_opt("theta")?.filter(|theta| *theta != rope.theta) {
        // transformers does not read it, and others do.
        return Err(c.wrong("theta", &format!("that of the rope, {}", rope.theta), &theta));
    }
    let base = Spec { ropes: vec![rope], ..llama::shape(c)? };
    let tied = c.bool_or("tie_embedding", c.bool_or("tie_word_embeddings", true)?)?;
    let attends = c.indices("full_attn_idxs")?;
    let default = |l: usize| c.get("full_attn_idxs").is_some() && !attends.contains(&l);
    let convolves = c.kinds(base.layers, ["full_attention", "conv"], default)?;
    let kind = |conv| match conv {
        true => BlockKind { mixer: Mixer::State, ..BlockKind::default() },
        false => BlockKind::attention(None, Some(0)),
    };
    Ok(Spec {
        mlp_hidden: mlp_width(c, inner)?,
        mlp: Mlp::Gated(Activation::Silu),
        norm_eps: c.f64_or("norm_eps", 1e-5)?,
        qk_norm: Some(QkNorm::Heads),
        state_mixer: Some(StateMixer::Conv(c.usize_or("conv_L_cache", 3)?)),
        blocks: convolves.into_iter().map(kind).collect(),
        tied,
        ..base
    })
}

/// Width inside the MLP: two thirds of what the config says, times a factor, in whole multiples.
fn mlp_width(c: &Config, inner: usize) -> Result<usize> {
    if !c.bool_or("block_auto_adjust_ff_dim", true)? {
        return Ok(inner);
    }
    let factor = c.f64_opt("block_ffn_dim_multiplier")?.unwrap_or(1.0);
    let of = c.usize_or("block_multiple_of", 256)?;
    let width = factor * inner.saturating_mul(2).div_euclid(3) as f64;
    if of == 0 || !(0.0..=1e9).contains(&width) {
        let want = "above 0, and a factor that is no more than 1e9 columns";
        return Err(c.wrong("block_multiple_of", want, &of));
    }
    Ok((width as usize).next_multiple_of(of))
}
