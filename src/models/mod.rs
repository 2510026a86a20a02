//! Models: one transformer block that computes every family, forward and backward.
//!
//! A family is data: [`Spec`] says what the block computes, [`Family`] maps the Hugging Face names
//! of its weights to ours. To add one, write `models/<name>.rs` and name it in [`FAMILIES`].

mod activations;
mod adapter;
mod axis;
mod batch;
mod block;
mod config;
mod family;
mod folder;
mod gemma2;
mod gemma3;
mod gpt2;
mod gpt_neox;
mod gpt_oss;
mod granite;
mod heads;
mod kind;
mod lfm2;
mod linear;
mod llama;
mod load;
mod mistral;
mod mixer;
mod mixture;
mod model;
mod norm;
mod olmo2;
mod params;
mod pass;
mod peft;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_5;
mod qwen3_5_moe;
mod qwen3_moe;
mod qwen3_next;
mod rope;
mod save;
mod smollm3;
mod spec;
mod transformer;
mod weights;

pub use activations::{Activations, BatchRows, Cache, Keep, PassOptions, PassShape};
pub use batch::{Batch, Staged};
pub use config::Config;
pub use family::{Family, StoredOrder, StoredWeight};
pub use heads::{LossColumns, Sampler};
pub use kind::ParamKind;
pub use linear::Linear;
pub use model::{Master, Model, Residency, adapter_bytes, bytes};
pub use params::{Factor, FactorSide, Layout, ParamTensor, Params, WEIGHTS};
pub use pass::Pass;
pub use peft::{ADAPTER_CONFIG, AdapterConfig, AdapterStart, LoraOptions};
use save::adapter_tensor;
pub use save::{
    Named, adapter_config_text, adapter_count, config_text, count, named, save, tensor_at,
    write_weights,
};
pub use spec::{
    AdapterSite, AdapterSpec, BlockKind, BlockNorms, Experts, Head, LayerSpec, Mixer, Mlp, Norm,
    QkNorm, QueryScale, Scales, Spec, StateMixer, Widths,
};

pub use load::{ADAPTER_FILE, load, load_as, text_folder};
pub use weights::{LoadOptions, WEIGHTS_FILE};

/// All model families, found by `model_type` in `config.json`.
pub const FAMILIES: &[&Family] = &[
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &gpt2::FAMILY,
    &gpt_neox::FAMILY,
    &gpt_oss::FAMILY,
    &granite::FAMILY,
    &lfm2::FAMILY,
    &llama::FAMILY,
    &mistral::FAMILY,
    &mistral::MINISTRAL,
    &mistral::MINISTRAL3,
    &olmo2::FAMILY,
    &olmo2::OLMO3,
    &phi3::FAMILY,
    &qwen2::FAMILY,
    &qwen2_moe::FAMILY,
    &qwen3::FAMILY,
    &qwen3_5::FAMILY,
    &qwen3_5_moe::FAMILY,
    &qwen3_moe::FAMILY,
    &qwen3_next::FAMILY,
    &smollm3::FAMILY,
];
