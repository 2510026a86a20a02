//! Models: one transformer block that computes every family, forward and backward.
//!
//! A family is data: [`Spec`] says what the block computes, [`Family`] maps the Hugging Face names
//! of its weights to ours. To add one, write `models/<name>.rs` and name it in [`FAMILIES`].

mod batch;
mod config;
mod gpt2;
mod llama;
mod model;
mod params;
mod spec;
mod transformer;
mod trunk;
mod weights;

pub use batch::{Batch, Staged};
pub use config::Config;
pub use model::{Head, Master, Model, Use, bytes};
pub use params::{Layout, Params, Slot, Tensor};
pub use spec::{Family, Mlp, Norm, Position, Spec, Widths};
pub use transformer::{Activations, Cache, Extent, Gradients, Keep, Rows, Selected};
pub use trunk::Trunk;
pub use weights::{Named, count, load, named, save, tensor_at};

/// All model families, found by `model_type` in `config.json`.
pub const FAMILIES: &[&Family] = &[&gpt2::FAMILY, &llama::FAMILY];
