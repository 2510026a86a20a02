//! Products on Hopper: the tensor maps of their operands and results.

use super::TileShape;
use crate::{
    device::{
        Cuda, Element, View, ViewMut,
        cuda::{
            Map, Swizzle, Tiles,
            kernels::{matmul, matmul_sm90 as kernel},
        },
    },
    error::{Error, Result},
};

/// k of a stage, and columns of a box of results.
pub(in crate::ops) const DEPTH: usize = 64;

fn boxes([rows, cols]: [usize; 2], stride: usize, high: usize) -> Tiles<2> {
    Tiles::of_matrix([rows, cols], stride, [high, DEPTH], Swizzle::Bytes128)
}

/// An operand `[rows, cols]` of `op` whose rows begin `stride` elements apart, in boxes of `high`
/// rows.
pub(in crate::ops) fn operand<'a, T: Element>(
    op: &str,
    cuda: &Cuda,
    x: View<'a, T>,
    dims: [usize; 2],
    stride: usize,
    high: usize,
) -> Result<Map<'a>> {
    if T::NAME != half::bf16::NAME {
        let reason = format!("`{op}` has no kernel for {}", T::NAME);
        return Err(Error::Device { wanted: "cuda".into(), reason });
    }
    cuda.map(x, boxes(dims, stride, high))
}

/// An operand whose rows or columns are multiplied.
fn rows<'a, T: Element>(
    cuda: &Cuda,
    x: View<'a, T>,
    dims: [usize; 2],
    high: usize,
) -> Result<Map<'a>> {
    operand("matmul", cuda, x, dims, dims[1], high)
}

/// A matrix that is written.
pub(in crate::ops) fn result<'a, T: Element>(
    cuda: &Cuda,
    y: ViewMut<'a, T>,
    dims: [usize; 2],
) -> Result<Map<'a>> {
    cuda.map_mut(y, boxes(dims, dims[1], DEPTH))
}

impl TileShape {
    /// Whether its kernels write results without TMA.
    fn direct(&self) -> bool {
        self.cluster == 1
    }
}

pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    tile: &TileShape,
    p: matmul::Forward<'_, T>,
) -> Result<()> {
    let matmul::Forward { y, x, w, bias, residual, m, n, k } = p;
    let ([high, wide], launch) = (tile.size, tile.launch(cuda, m, n, false)?);
    let x = rows(cuda, x, [m, k], high)?;
    let w = rows(cuda, w, [n, k], wide / 2)?;
    if tile.direct() {
        let direct = kernel::ForwardDirect { y, x, w, bias, residual, m, n, k };
        return direct.launch(cuda, tile.size, launch);
    }
    let y = result(cuda, y, [m, n])?;
    kernel::Forward { y, x, w, bias, residual, m, n, k }.launch(cuda, tile.size, launch)
}

pub(super) fn activated<T: Element>(
    cuda: &Cuda,
    tile: &TileShape,
    gated: bool,
    p: matmul::Activated<'_, T>,
) -> Result<()> {
    let matmul::Activated { y, up, x, w, bias, m, n, k, act } = p;
    let cols = if gated { 2 * n } else { n };
    let ([high, wide], launch) = (tile.size, tile.launch(cuda, m, n, gated)?);
    let x = rows(cuda, x, [m, k], high)?;
    let w = rows(cuda, w, [cols, k], wide / 2)?;
    if tile.direct() {
        return match gated {
            false => kernel::ActivatedDirect { y, up, x, w, bias, m, n, k, act }
                .launch(cuda, tile.size, launch),
            true => kernel::GatedDirect { y, up, x, w, bias, m, n, k, act }
                .launch(cuda, tile.size, launch),
        };
    }
    let y = result(cuda, y, [m, n])?;
    // Where there is no gate the second map is not used.
    let [gate, partner] = cuda.map_both(up, boxes([m, n], cols, DEPTH), cols - n)?;
    match gated {
        false => kernel::Activated { y, gate, partner, x, w, bias, m, n, k, act }
            .launch(cuda, tile.size, launch),
        true => kernel::Gated { y, gate, partner, x, w, bias, m, n, k, act }
            .launch(cuda, tile.size, launch),
    }
}

pub(super) fn backward_input<T: Element>(
    cuda: &Cuda,
    tile: &TileShape,
    p: matmul::BackwardInput<'_, T>,
) -> Result<()> {
    let matmul::BackwardInput { dx, dy, w, m, n, k } = p;
    let dy = rows(cuda, dy, [m, n], tile.size[0])?;
    let w = rows(cuda, w, [n, k], DEPTH)?;
    let dx = result(cuda, dx, [m, k])?;
    let launch = tile.launch(cuda, m, k, false)?;
    kernel::BackwardInput { dx, dy, w, m, n, k }.launch(cuda, tile.size, launch)
}

pub(super) fn backward_weight<T: Element>(
    cuda: &Cuda,
    tile: &TileShape,
    p: matmul::BackwardWeight<'_, T>,
) -> Result<()> {
    let matmul::BackwardWeight { dw, dbias, dy, x, m, n, k } = p;
    let dy = rows(cuda, dy, [m, n], DEPTH)?;
    let x = rows(cuda, x, [m, k], DEPTH)?;
    let launch = tile.launch(cuda, n, k, false)?;
    kernel::BackwardWeight::<T> { dw, dbias, dy, x, m, n, k }.launch(cuda, tile.size, launch)
}
