//! The operations. One file an op: contract, shape checks, CPU code (generic over f32 and f64),
//! forward and hand-written backward together.
//!
//! Gradients of weights are added to (`+=`), gradients of activations are written (`=`): a weight
//! is used by many micro-batches, an activation by one.

pub mod activation;
pub mod attention;
pub mod embedding;
pub mod layer_norm;
pub mod logprob;
pub mod matmul;
pub mod residual;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod scalar_head;
