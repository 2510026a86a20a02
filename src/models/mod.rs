//! Models: one transformer block that computes every family, forward and backward.
//!
//! A family is data: [`Spec`] says what the block computes, [`Family`] maps the Hugging Face names
//! of its weights to ours. To add one, write `models/<name>.rs` and name it in [`FAMILIES`].

mod batch;
mod config;
mod family;
mod gpt2;
mod heads;
mod linear;
mod llama;
mod model;
mod norm;
mod params;
mod pass;
mod save;
mod spec;
mod transformer;
mod weights;

pub use batch::{Batch, Staged};
pub use config::Config;
pub use family::{Family, StoredWeight};
pub use heads::{LossColumns, Sampler};
pub use linear::Linear;
pub use model::{Master, Model, Residency, bytes};
pub use params::{Layout, ParamKind, ParamTensor, Params, WEIGHTS};
pub use pass::Pass;
pub use save::{Named, config_text, count, named, save, tensor_at, write_weights};
pub use spec::{Head, LayerSpec, Mlp, Norm, Position, Spec, Widths};
pub use transformer::{Activations, BatchRows, Cache, Keep, PassOptions, PassShape};
pub use weights::{WEIGHTS_FILE, load};

/// All model families, found by `model_type` in `config.json`.
pub const FAMILIES: &[&Family] = &[&gpt2::FAMILY, &llama::FAMILY];
