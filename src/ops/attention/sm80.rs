//! Attention on sm_80: blocks and shared memory of its kernels.

use super::Shape;
use crate::{
    device::{
        Cuda, Element,
        cuda::{
            Launch,
            kernels::{attention, attention_backward as gradient},
        },
    },
    error::Result,
};

/// Positions of a page, and of a step of attention.
pub(super) const PAGE: usize = attention::PAGE;

fn blocks(cuda: &Cuda, shape: &Shape) -> usize {
    // So many share a multiprocessor, by their registers.
    let beside = if shape.head_dim <= 128 { 3 } else { 1 };
    cuda.processors() as usize * beside
}

/// Threads of all blocks.
pub(super) fn threads(cuda: &Cuda, shape: &Shape) -> usize {
    blocks(cuda, shape) * attention::THREADS
}

pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    shape: &Shape,
    args: attention::Forward<'_, T>,
) -> Result<()> {
    // Queries, keys and values.
    let shared = 3 * 64 * shape.head_dim.next_multiple_of(64) * 2;
    let blocks = (args.count * shape.kv_heads).min(blocks(cuda, shape));
    args.launch(cuda, shape.head_dim, Launch::row(blocks, shared)?)
}

/// Positions of a tile of keys, and rows of a tile of queries.
pub(super) fn backward_tile(shape: &Shape) -> usize {
    if shape.head_dim <= 128 { gradient::TILE } else { gradient::TILE_256 }
}

pub(super) fn backward<T: Element>(
    cuda: &Cuda,
    shape: &Shape,
    args: gradient::Dqkv<'_, T>,
) -> Result<()> {
    let (d, size) = (shape.head_dim, backward_tile(shape));
    // Keys, values, queries twice and dout; then weights and their gradients.
    let shared = (5 * size * d.next_multiple_of(64) + 2 * size * 64) * 2;
    let blocks = (args.count * shape.kv_heads).min(cuda.processors() as usize);
    args.launch(cuda, d, Launch::row(blocks, shared)?.together())
}
