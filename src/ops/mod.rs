//! The operations. One file an op: contract, shape checks, CPU code (generic over f32 and f64),
//! forward and hand-written backward together.
//!
//! Gradients of weights are added to (`+=`), gradients of activations are written (`=`): a weight
//! is used by many micro-batches, an activation by one. Per-token columns of losses are packed:
//! the tokens of all sequences back to back, no padding, no mask.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod bradley_terry;
pub mod delta_rule;
pub mod embedding;
pub mod experts;
pub mod gae;
pub mod gate;
pub mod grad_norm;
pub mod kl;
pub mod kto_loss;
pub mod logprob;
pub mod matmul;
pub mod next_ids;
pub mod nll;
pub mod norm;
pub mod policy_loss;
pub mod preference_loss;
pub mod residual;
pub mod rope;
pub mod routing;
pub mod sample;
pub mod scalar_head;
pub mod scale;
pub mod sequence_loss;
pub mod short_conv;
pub mod sinks;
mod token_loss;
pub mod value_loss;
pub mod whiten;
