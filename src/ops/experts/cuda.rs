//! Launches of `kernels/experts.cu`. What an expert has to do is not known here: there are as many
//! blocks as there may be tiles, and those beyond the last end at once. Every tile gives the same
//! bits, so any may be taken.

use super::{Stack, StackGrads, kernel};
use crate::{
    device::{
        Arch, Cuda, Element, View, ViewMut,
        cuda::{self, Launch},
    },
    error::Result,
    ops::{activation::Glu, matmul::TileShape, routing::Routes},
};

/// Rows, and of which row each pair's is.
type Gathered<'a, T> = (View<'a, T>, Option<View<'a, u32>>);

/// The tile for products of `n` outputs by the weights of all experts, as if each had equally many
/// pairs, and its launch; gradients have the two largest.
fn tile<F>(
    cuda: &Cuda,
    routes: &Routes<'_, F>,
    n: usize,
    backward: bool,
) -> Result<(&'static TileShape, Launch)> {
    let (pairs, processors) = (routes.pairs.len(), cuda.processors() as usize);
    let busy = routes.router.experts.min(pairs);
    let ranked = TileShape::ranked(Arch::Sm80, processors, pairs.div_ceil(busy), n * busy);
    let large = |t: &&&TileShape| TileShape::all(Arch::Sm80)[..2].iter().any(|l| l.size == t.size);
    let tile = ranked.iter().find(|t| !backward || large(t)).unwrap_or(&ranked[0]);
    let [high, wide] = tile.size;
    let down = (pairs + busy * (high - 1)) / high;
    Ok((tile, tile.row(down * n.div_ceil(wide))?))
}

pub(super) fn scores<T: Element>(
    cuda: &Cuda,
    logits: ViewMut<'_, T::Acc>,
    x: View<'_, T>,
    router: Stack<'_, T>,
) -> Result<()> {
    let Stack { weight, bias } = router;
    let (n, k) = (weight.n(), weight.k());
    let m = x.len() / k;
    let tile = &TileShape::all(Arch::Sm80)[if m <= 16 { 3 } else { 2 }];
    let launch = tile.row(m.div_ceil(tile.size[0]) * n.div_ceil(tile.size[1]))?;
    kernel::Scores { logits, x, w: weight.view(), bias, m, n, k }.launch(cuda, tile.size, launch)
}

pub(super) fn activated<T: Element>(
    cuda: &Cuda,
    routes: &Routes<'_, T::Acc>,
    glu: Glu,
    [y, up]: [ViewMut<'_, T>; 2],
    (x, rows): Gathered<'_, T>,
    w: Stack<'_, T>,
) -> Result<()> {
    let (n, k) = (w.weight.n(), w.weight.k());
    // Half of a tile's columns are gates.
    let (tile, launch) = tile(cuda, routes, n, false)?;
    kernel::Gated {
        y,
        up,
        x,
        w: w.weight.view(),
        bias: w.bias,
        offsets: routes.offsets.view(),
        rows,
        experts: routes.router.experts,
        n: n / 2,
        k,
        act: glu.act as usize,
        limit: glu.kernel_limit(),
    }
    .launch(cuda, tile.size, launch)
}

pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    routes: &Routes<'_, T::Acc>,
    y: ViewMut<'_, T>,
    x: View<'_, T>,
    w: Stack<'_, T>,
) -> Result<()> {
    let (n, k) = (w.weight.n(), w.weight.k());
    let (tile, launch) = tile(cuda, routes, n, false)?;
    let (offsets, experts) = (routes.offsets.view(), routes.router.experts);
    let (w, bias) = (w.weight.view(), w.bias);
    kernel::Forward { y, x, w, bias, offsets, experts, n, k }.launch(cuda, tile.size, launch)
}

pub(super) fn backward_input<T: Element>(
    cuda: &Cuda,
    routes: &Routes<'_, T::Acc>,
    dx: ViewMut<'_, T>,
    (dy, rows): Gathered<'_, T>,
    w: View<'_, T>,
    (n, k): (usize, usize),
) -> Result<()> {
    let (tile, launch) = tile(cuda, routes, k, true)?;
    let (offsets, experts) = (routes.offsets.view(), routes.router.experts);
    kernel::BackwardInput { dx, dy, w, offsets, rows, experts, n, k }
        .launch(cuda, tile.size, launch)
}

pub(super) fn backward_weight<T: Element>(
    cuda: &Cuda,
    routes: &Routes<'_, T::Acc>,
    grads: StackGrads<'_, T::Acc>,
    (dy, dy_rows): Gathered<'_, T>,
    (x, x_rows): Gathered<'_, T>,
    (n, k): (usize, usize),
) -> Result<()> {
    let (StackGrads { dw, dbias }, experts) = (grads, routes.router.experts);
    let tile = &TileShape::all(Arch::Sm80)[usize::from(n.min(k) <= 64)];
    let [high, wide] = tile.size;
    let launch = tile.row(experts * n.div_ceil(high) * k.div_ceil(wide))?;
    let offsets = routes.offsets.view();
    kernel::BackwardWeight { dw, dbias, dy, x, offsets, dy_rows, x_rows, n, k, experts }
        .launch(cuda, tile.size, launch)
}

pub(super) fn bias_backward<T: Element>(
    cuda: &Cuda,
    routes: &Routes<'_, T::Acc>,
    dbias: Option<ViewMut<'_, T::Acc>>,
    dweights: ViewMut<'_, T::Acc>,
    dy: View<'_, T>,
    bias: View<'_, T>,
) -> Result<()> {
    let (pairs, experts) = (routes.len(), routes.router.experts);
    let cols = bias.len() / experts;
    let width = cuda::width::<T>(&[cols], &[dy.address(), bias.address()]);
    let (rows, order) = (routes.rows.view(), routes.pairs.view());
    let (chosen, weights) = (routes.chosen.view(), routes.weights.view());
    let launch = Launch::row(pairs.div_ceil(kernel::THREADS / 32), 0)?;
    kernel::BiasWeights { dweights, dy, bias, rows, order, chosen, pairs, cols, width }
        .launch(cuda, launch)?;
    let Some(dbias) = dbias else { return Ok(()) };
    let launch = Launch::threads(experts * (cols / width), kernel::THREADS)?;
    let offsets = routes.offsets.view();
    kernel::Bias { dbias, dy, weights, offsets, rows, order, experts, cols, width }
        .launch(cuda, launch)
}
