//! Training runs: the loop, its inputs, its files, and its survival of crashes.
//!
//! # The walk of a token from its line of data to its gradient
//!
//! Fourteen files above the ops:
//!
//! 1. `data/records.rs`: a line of JSONL becomes a record, whose columns tell its format.
//! 2. `data/tokenizer.rs`: its text becomes ids.
//! 3. `data/dataset.rs`: the ids become a sequence, some of whose tokens are predicted; a step
//!    draws sequences.
//! 4. `train/source.rs`: the step's sequences get their columns; prompts are continued first (by
//!    `rollout/engine.rs`).
//! 5. `train/models.rs`: each role's model fills the column that the algorithm asks for, and says
//!    which rows of a sequence its head reads.
//! 6. `train/trainer.rs`: minibatches and micro-batches are cut; each goes through each trained
//!    model.
//! 7. `models/batch.rs`: the sequences of a micro-batch are packed into rows.
//! 8. `models/pass.rs`: forward, loss, backward.
//! 9. `models/transformer.rs`: the blocks.
//! 10. `models/linear.rs`: a linear layer, forward and backward.
//! 11. `models/heads.rs`: hidden state to log-prob or scalar, and its gradient back.
//! 12. `algorithms/columns.rs`: the columns of the micro-batch, where the device reads them.
//! 13. `algorithms/sft.rs`, or another: d loss / d log-prob.
//! 14. `models/params.rs`: the gradient of each weight, flat; `train/models.rs` hands it to AdamW.

pub mod adapters;
mod best;
pub mod checkpoint;
mod checkpoint_model;
pub mod data_file;
pub mod events;
pub mod export;
pub mod guard;
pub mod inputs;
pub mod lock;
pub mod manifest;
pub mod metrics;
pub mod mixture;
pub mod models;
mod observer;
pub mod plan;
pub mod rollouts;
mod run;
pub mod schedule;
pub mod settings;
pub mod signals;
pub mod source;
mod trainer;

pub use checkpoint_model::{export_checkpoint, is_checkpoint, is_of_checkpoint, model_folder};
pub use data_file::DataFile;
pub use export::{appended_eos, export_again};
pub use observer::{Observer, Silent};
pub use run::{run, run_on};
pub use settings::Settings;
pub use trainer::{StepReport, Trainer};
