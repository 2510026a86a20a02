//! Products by a tile, whichever the table would take: what ops launch, and what tests hold to each
//! other's bits. Sizes are trusted, and no size is 0.

use super::{After, Tile, hopper};
use crate::{
    device::{Arch, Cuda, Element, View, ViewMut, cuda::kernels::matmul as kernel},
    error::Result,
};

#[doc(hidden)]
#[allow(missing_docs, clippy::missing_errors_doc, clippy::too_many_arguments)]
impl Tile {
    pub fn forward<T: Element>(
        self,
        cuda: &Cuda,
        y: ViewMut<'_, T>,
        x: View<'_, T>,
        w: View<'_, T>,
        bias: Option<View<'_, T>>,
        residual: Option<View<'_, T>>,
        (m, n, k): (usize, usize, usize),
    ) -> Result<()> {
        if cuda.arch() == Arch::Sm90 {
            return hopper::forward(self, cuda, y, x, w, bias, residual, (m, n, k));
        }
        let run = match self {
            Self::Wide => kernel::forward_128x128,
            Self::Mid => kernel::forward_64x64,
            Self::Few => kernel::forward_64x32,
            Self::Fewest => kernel::forward_16x32,
        };
        run(cuda, self.launch(cuda, m, n, false)?, y, x, w, bias, residual, m, n, k)
    }

    pub fn activated<T: Element>(
        self,
        cuda: &Cuda,
        after: After,
        y: ViewMut<'_, T>,
        up: ViewMut<'_, T>,
        x: View<'_, T>,
        w: View<'_, T>,
        bias: Option<View<'_, T>>,
        (m, cols, k): (usize, usize, usize),
    ) -> Result<()> {
        if cuda.arch() == Arch::Sm90 {
            return hopper::activated(self, cuda, after, y, up, x, w, bias, (m, cols, k));
        }
        let run = match (self, after.gated) {
            (Self::Wide, false) => kernel::activated_128x128,
            (Self::Mid, false) => kernel::activated_64x64,
            (Self::Few, false) => kernel::activated_64x32,
            (Self::Fewest, false) => kernel::activated_16x32,
            (Self::Wide, true) => kernel::gated_128x128,
            (Self::Mid, true) => kernel::gated_64x64,
            (Self::Few, true) => kernel::gated_64x32,
            (Self::Fewest, true) => kernel::gated_16x32,
        };
        let launch = self.launch(cuda, m, cols, after.gated)?;
        run(cuda, launch, y, up, x, w, bias, m, cols, k, after.act as usize)
    }

    /// [`Tile::Wide`], or else [`Tile::Mid`].
    pub fn backward_input<T: Element>(
        self,
        cuda: &Cuda,
        dx: ViewMut<'_, T>,
        dy: View<'_, T>,
        w: View<'_, T>,
        (m, n, k): (usize, usize, usize),
    ) -> Result<()> {
        if cuda.arch() == Arch::Sm90 {
            return hopper::backward_input(self, cuda, dx, dy, w, (m, n, k));
        }
        let run = match self {
            Self::Wide => kernel::backward_input_128x128,
            _ => kernel::backward_input_64x64,
        };
        run(cuda, self.launch(cuda, m, k, false)?, dx, dy, w, m, n, k)
    }

    /// [`Tile::Wide`], or else [`Tile::Mid`].
    pub fn backward_weight<T: Element>(
        self,
        cuda: &Cuda,
        dw: ViewMut<'_, T::Acc>,
        dbias: Option<ViewMut<'_, T::Acc>>,
        dy: View<'_, T>,
        x: View<'_, T>,
        (m, n, k): (usize, usize, usize),
    ) -> Result<()> {
        if cuda.arch() == Arch::Sm90 {
            return hopper::backward_weight(self, cuda, dw, dbias, dy, x, (m, n, k));
        }
        let run = match self {
            Self::Wide => kernel::backward_weight_128x128,
            _ => kernel::backward_weight_64x64,
        };
        run(cuda, self.launch(cuda, n, k, false)?, dw, dbias, dy, x, m, n, k)
    }
}
