//! Products by a tile, whichever the schedule would take: what ops launch, and what tests hold to
//! each other's bits. Sizes are trusted, and no size is 0.

use super::{TileShape, sm90};
use crate::{
    device::{Arch, Cuda, Element, cuda::kernels::matmul as kernel},
    error::Result,
};

pub use kernel::{Activated, BackwardInput, BackwardWeight, Forward};

pub fn forward<T: Element>(cuda: &Cuda, tile: &TileShape, p: Forward<'_, T>) -> Result<()> {
    if cuda.arch() == Arch::Sm90 {
        return sm90::forward(cuda, tile, p);
    }
    let launch = tile.launch(cuda, p.m, p.n, false)?;
    p.launch(cuda, tile.size, launch)
}

/// `n` counts the columns of `y`; where it is `gated`, the product has twice as many.
pub fn activated<T: Element>(
    cuda: &Cuda,
    tile: &TileShape,
    gated: bool,
    p: Activated<'_, T>,
) -> Result<()> {
    if cuda.arch() == Arch::Sm90 {
        return sm90::activated(cuda, tile, gated, p);
    }
    let launch = tile.launch(cuda, p.m, p.n, gated)?;
    if !gated {
        return p.launch(cuda, tile.size, launch);
    }
    let Activated { y, up, x, w, bias, m, n, k, act } = p;
    kernel::Gated { y, up, x, w, bias, m, n, k, act }.launch(cuda, tile.size, launch)
}

pub fn backward_input<T: Element>(
    cuda: &Cuda,
    tile: &TileShape,
    p: BackwardInput<'_, T>,
) -> Result<()> {
    if cuda.arch() == Arch::Sm90 {
        return sm90::backward_input(cuda, tile, p);
    }
    let launch = tile.launch(cuda, p.m, p.k, false)?;
    p.launch(cuda, tile.size, launch)
}

pub fn backward_weight<T: Element>(
    cuda: &Cuda,
    tile: &TileShape,
    p: BackwardWeight<'_, T>,
) -> Result<()> {
    if cuda.arch() == Arch::Sm90 {
        return sm90::backward_weight(cuda, tile, p);
    }
    let launch = tile.launch(cuda, p.n, p.k, false)?;
    p.launch(cuda, tile.size, launch)
}
