//! The LM head on sm_80: its tiles, by rows.

use super::{CHUNK, lists_bytes};
use crate::{
    device::{
        Cuda, Device, Element,
        cuda::{Launch, kernels::logprob as kernel},
    },
    error::Result,
    ops::matmul,
};

/// Rows of a tile; bytes of its stages, and of its sums where warps share columns.
fn tile(rows: usize) -> (usize, usize) {
    match rows {
        0..=16 => (16, 4 * 64 * (16 + 128) * 2 + 16 * 128 * 4),
        17..=64 => (64, 3 * 64 * (64 + 128) * 2),
        _ => (128, 4 * 32 * (128 + 128) * 2),
    }
}

/// A block for each tile of rows and chunk of the vocabulary.
fn chunks(rows: usize, vocab: usize, tile: usize, shared: usize) -> Result<Launch> {
    Launch::row(rows.div_ceil(tile) * vocab.div_ceil(CHUNK), shared)
}

pub(super) fn forward<T: Element>(cuda: &Cuda, args: kernel::Forward<'_, T>) -> Result<()> {
    let (tile, shared) = tile(args.rows);
    let launch = chunks(args.rows, args.vocab, tile, shared)?;
    args.launch(cuda, tile, launch)
}

pub(super) fn sample<T: Element>(cuda: &Cuda, args: kernel::Sample<'_, T>) -> Result<()> {
    let (tile, shared) = tile(args.rows);
    let launch = chunks(args.rows, args.vocab, tile, shared)?;
    args.launch(cuda, tile, launch)
}

pub(super) fn sample_top<T: Element>(cuda: &Cuda, args: kernel::SampleTop<'_, T>) -> Result<()> {
    let (tile, shared) = match tile(args.rows) {
        (16, shared) => (16, shared + 2 * lists_bytes(8)),
        _ => (64, 4 * 32 * (64 + 128) * 2 + 4 * lists_bytes(16)),
    };
    let launch = chunks(args.rows, args.vocab, tile, shared)?;
    args.launch(cuda, tile, launch)
}

/// Blocks for `rows` x `cols` results by square tiles.
fn square(rows: usize, cols: usize, side: usize) -> usize {
    rows.div_ceil(side) * cols.div_ceil(side)
}

/// Bytes of the stages of a tile of 128 x 128, or of its sums.
const T128X128: usize = 4 * 32 * (128 + 128) * 2;

pub(super) fn gradient<T: Element>(cuda: &Cuda, args: kernel::Gradient<'_, T>) -> Result<()> {
    let launch = Launch::row(square(args.rows, args.width, 128), T128X128)?;
    args.launch(cuda, launch)
}

pub(super) fn hidden<T: Element>(cuda: &Cuda, args: kernel::Hidden<'_, T>) -> Result<()> {
    let many = square(args.rows, args.d, 128) >= cuda.processors() as usize;
    let (side, shared) = if many { (128, T128X128) } else { (64, T128X128 / 2) };
    let launch = Launch::row(square(args.rows, args.d, side), shared)?;
    args.launch(cuda, [side; 2], launch)
}

pub(super) fn weight<T: Element>(
    dev: &Device,
    cuda: &Cuda,
    args: kernel::Weight<'_, T>,
) -> Result<()> {
    if args.width == args.n {
        return matmul::backward_weight(dev, args.dw, None, args.dz, args.h, (args.n, args.d));
    }
    let launch = Launch::row(square(args.n, args.d, 128), T128X128)?;
    args.launch(cuda, launch)
}
