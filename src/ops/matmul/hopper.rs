//! Products on Hopper: the tensor maps of their operands and results.

use super::{After, Tile};
use crate::{
    device::{
        Cuda, Element, View, ViewMut,
        cuda::{Map, Swizzle, Tiles, kernels::matmul_sm90 as kernel},
    },
    error::{Error, Result},
};

/// k of a stage, and columns of a box of results.
const DEPTH: usize = 64;

fn boxes([rows, cols]: [usize; 2], stride: usize, high: usize) -> Tiles<2> {
    Tiles::of_matrix([rows, cols], stride, [high, DEPTH], Swizzle::Bytes128)
}

/// An operand `[rows, cols]` whose rows or columns are multiplied, in boxes of `high` rows.
fn operand<'a, T: Element>(
    cuda: &Cuda,
    x: View<'a, T>,
    (rows, cols): (usize, usize),
    high: usize,
) -> Result<Map<'a>> {
    if T::NAME != half::bf16::NAME {
        let reason = format!("`matmul` has no kernel for {}", T::NAME);
        return Err(Error::Device { wanted: "cuda".into(), reason });
    }
    cuda.map(x, boxes([rows, cols], cols, high))
}

fn result<'a, T: Element>(
    cuda: &Cuda,
    y: ViewMut<'a, T>,
    (rows, cols): (usize, usize),
) -> Result<Map<'a>> {
    cuda.map_mut(y, boxes([rows, cols], cols, DEPTH))
}

#[allow(clippy::too_many_arguments)]
pub(super) fn forward<T: Element>(
    tile: Tile,
    cuda: &Cuda,
    y: ViewMut<'_, T>,
    x: View<'_, T>,
    w: View<'_, T>,
    bias: Option<View<'_, T>>,
    residual: Option<View<'_, T>>,
    (m, n, k): (usize, usize, usize),
) -> Result<()> {
    let ((rows, cols), launch) = (tile.hopper(), tile.launch(cuda, m, n, false)?);
    let x = operand(cuda, x, (m, k), rows)?;
    let w = operand(cuda, w, (n, k), cols / 2)?;
    let wide = match tile {
        Tile::Fewest => {
            return kernel::ForwardDirect { y, x, w, bias, residual, m, n, k }.launch(
                cuda,
                [64, 32],
                launch,
            );
        }
        Tile::Few => {
            return kernel::ForwardDirect { y, x, w, bias, residual, m, n, k }.launch(
                cuda,
                [64, 64],
                launch,
            );
        }
        Tile::Mid => kernel::forward_128x128,
        Tile::Wide => kernel::forward_128x256,
    };
    wide(cuda, launch, result(cuda, y, (m, n))?, x, w, bias, residual, m, n, k)
}

#[allow(clippy::too_many_arguments)]
pub(super) fn activated<T: Element>(
    tile: Tile,
    cuda: &Cuda,
    after: After,
    y: ViewMut<'_, T>,
    up: ViewMut<'_, T>,
    x: View<'_, T>,
    w: View<'_, T>,
    bias: Option<View<'_, T>>,
    (m, cols, k): (usize, usize, usize),
) -> Result<()> {
    let (gated, act) = (after.gated, after.act as usize);
    let n = if gated { 2 * cols } else { cols };
    let ((rows, wide), launch) = (tile.hopper(), tile.launch(cuda, m, cols, gated)?);
    let x = operand(cuda, x, (m, k), rows)?;
    let w = operand(cuda, w, (n, k), wide / 2)?;
    if let Tile::Few | Tile::Fewest = tile {
        let run = match (tile, gated) {
            (Tile::Few, false) => kernel::activated_direct_64x64,
            (Tile::Few, true) => kernel::gated_direct_64x64,
            (_, false) => kernel::activated_direct_64x32,
            (_, true) => kernel::gated_direct_64x32,
        };
        return run(cuda, launch, y, up, x, w, bias, m, cols, k, act);
    }
    let run = match (tile, gated) {
        (Tile::Mid, false) => kernel::activated_128x128,
        (Tile::Mid, true) => kernel::gated_128x128,
        (_, false) => kernel::activated_128x256,
        (_, true) => kernel::gated_128x256,
    };
    let y = result(cuda, y, (m, cols))?;
    // Where there is no gate the second map is not used.
    let [gate, partner] = cuda.map_both(up, boxes([m, cols], n, DEPTH), n - cols)?;
    run(cuda, launch, y, gate, partner, x, w, bias, m, cols, k, act)
}

pub(super) fn backward_input<T: Element>(
    tile: Tile,
    cuda: &Cuda,
    dx: ViewMut<'_, T>,
    dy: View<'_, T>,
    w: View<'_, T>,
    (m, n, k): (usize, usize, usize),
) -> Result<()> {
    let dy = operand(cuda, dy, (m, n), tile.hopper().0)?;
    let w = operand(cuda, w, (n, k), DEPTH)?;
    let dx = result(cuda, dx, (m, k))?;
    let run = match tile {
        Tile::Wide => kernel::backward_input_128x256,
        _ => kernel::backward_input_128x128,
    };
    run(cuda, tile.launch(cuda, m, k, false)?, dx, dy, w, m, n, k)
}

pub(super) fn backward_weight<T: Element>(
    tile: Tile,
    cuda: &Cuda,
    dw: ViewMut<'_, T::Acc>,
    dbias: Option<ViewMut<'_, T::Acc>>,
    dy: View<'_, T>,
    x: View<'_, T>,
    (m, n, k): (usize, usize, usize),
) -> Result<()> {
    let dy = operand(cuda, dy, (m, n), DEPTH)?;
    let x = operand(cuda, x, (m, k), DEPTH)?;
    let run = match tile {
        Tile::Wide => kernel::backward_weight_128x256::<T>,
        _ => kernel::backward_weight_128x128::<T>,
    };
    run(cuda, tile.launch(cuda, n, k, false)?, dw, dbias, dy, x, m, n, k)
}
