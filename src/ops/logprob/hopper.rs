//! The LM head on Hopper: its tiles and the tensor maps of its operands.

use super::{CHUNK, Draws, Forward, Slopes, cuda::Part, sample::Lists};
use crate::{
    device::{
        Arch, Cuda, Element, View, ViewMut,
        cuda::{
            Launch, Map, Swizzle, Tiles,
            kernels::{logprob_sm90 as kernel, matmul_sm90},
        },
    },
    error::{Error, Result},
    ops::matmul,
};

/// k of a stage.
const DEPTH: usize = 64;

/// A tile of `kernels/logprob_sm90.cu`. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tile {
    /// 128 x 256, in clusters of two blocks
    Many,
    /// 128 x 128
    Mid,
    /// 64 x 128
    Few,
}

impl Tile {
    /// That which multiplies the fewest rows for nothing.
    pub(super) fn of(rows: usize) -> Self {
        match rows {
            0..=64 => Self::Few,
            65..=128 => Self::Mid,
            _ => Self::Many,
        }
    }

    /// For all rows and chunks, with lists of a sampler's top if `top`; and its rows and columns.
    fn launch(
        self,
        cuda: &Cuda,
        rows: usize,
        vocab: usize,
        top: bool,
    ) -> Result<(Launch, [usize; 2])> {
        let (high, wide, stages, cluster) = match self {
            Self::Many => (128, 256, 4, 2),
            Self::Mid if top => (128, 128, 5, 1),
            Self::Mid => (128, 128, 6, 1),
            Self::Few => (64, 128, 8, 1),
        };
        let groups = rows.div_ceil(high * cluster).saturating_mul(vocab.div_ceil(CHUNK));
        let most = (cuda.processors() as usize / cluster).max(1);
        // Stages with two barriers each, which begin on multiples of 16 bytes; lists of 16 rows a
        // warp.
        let barriers = usize::next_multiple_of(stages, 2) * 16;
        let lists = if top { high / 16 * Lists::room(16) } else { 0 };
        let shared = stages * (high + wide) * DEPTH * 2 + barriers + lists;
        Ok((Launch::row(groups.min(most) * cluster, shared)?, [high, wide]))
    }
}

/// A matrix `[rows, cols]` whose rows are `width` long, in boxes of `high` rows.
fn operand<'a, T: Element>(
    cuda: &Cuda,
    x: View<'a, T>,
    (rows, cols, width): (usize, usize, usize),
    high: usize,
) -> Result<Map<'a>> {
    if T::NAME != half::bf16::NAME {
        let reason = format!("`logprob` has no kernel for {}", T::NAME);
        return Err(Error::Device { wanted: "cuda".into(), reason });
    }
    cuda.map(x, Tiles::of_matrix([rows, cols], width, [high, DEPTH], Swizzle::Bytes128))
}

/// A matrix `[rows, cols]` that is written.
fn result<'a, T: Element>(
    cuda: &Cuda,
    y: ViewMut<'a, T>,
    (rows, cols): (usize, usize),
) -> Result<Map<'a>> {
    let boxes = Tiles::of_matrix([rows, cols], cols, [DEPTH, DEPTH], Swizzle::Bytes128);
    cuda.map_mut(y, boxes)
}

/// Partials, hidden states, the head, targets; rows, vocabulary, d; scale and cap.
type Forwards<T> = fn(
    &Cuda,
    Launch,
    ViewMut<'_, <T as Element>::Acc>,
    Map<'_>,
    Map<'_>,
    View<'_, u32>,
    usize,
    usize,
    usize,
    <T as Element>::Acc,
    <T as Element>::Acc,
) -> Result<()>;

/// Writes the partials of all rows and chunks.
#[allow(clippy::too_many_arguments)]
pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    tile: Tile,
    partial: ViewMut<'_, T::Acc>,
    h: View<'_, T>,
    w: View<'_, T>,
    targets: View<'_, u32>,
    (vocab, d): (usize, usize),
    (scale, cap): (T::Acc, T::Acc),
) -> Result<()> {
    let rows = targets.len();
    let run: Forwards<T> = match tile {
        Tile::Many => kernel::forward_128x256::<T>,
        Tile::Mid => kernel::forward_128x128::<T>,
        Tile::Few => kernel::forward_64x128::<T>,
    };
    let (launch, [high, wide]) = tile.launch(cuda, rows, vocab, false)?;
    let h = operand(cuda, h, (rows, d, d), high)?;
    let w = operand(cuda, w, (vocab, d, d), wide / 2)?;
    run(cuda, launch, partial, h, w, targets, rows, vocab, d, scale, cap)
}

/// Writes the partials of all rows and chunks, with the best token of each, and the lists.
#[allow(clippy::too_many_arguments)]
pub(super) fn sample<T: Element>(
    cuda: &Cuda,
    partial: ViewMut<'_, T::Acc>,
    lists: Option<Lists<'_>>,
    h: View<'_, T>,
    w: View<'_, T>,
    draws: Draws<'_>,
    (vocab, d): (usize, usize),
    (scale, cap): (T::Acc, T::Acc),
) -> Result<()> {
    let Draws { samples, positions, .. } = draws;
    let (rows, (seed, step, purpose, greedy)) = (samples.len(), draws.words());
    // The widest tile leaves no room for lists.
    let tile = Tile::of(if lists.is_some() { rows.min(128) } else { rows });
    let (launch, [high, wide]) = tile.launch(cuda, rows, vocab, lists.is_some())?;
    let h = operand(cuda, h, (rows, d, d), high)?;
    let w = operand(cuda, w, (vocab, d, d), wide / 2)?;
    if let Some(Lists { keys, k }) = lists {
        let run = match tile {
            Tile::Few => kernel::sample_top_64x128::<T>,
            _ => kernel::sample_top_128x128::<T>,
        };
        return run(
            cuda, launch, partial, keys, h, w, samples, positions, rows, vocab, d, scale, cap,
            seed, step, purpose, greedy, k,
        );
    }
    let run = match tile {
        Tile::Many => kernel::sample_128x256::<T>,
        Tile::Mid => kernel::sample_128x128::<T>,
        Tile::Few => kernel::sample_64x128::<T>,
    };
    run(
        cuda, launch, partial, h, w, samples, positions, rows, vocab, d, scale, cap, seed, step,
        purpose, greedy,
    )
}

/// What a slice of the vocabulary, whose head is `f.w`, adds to the gradients.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward<T: Element>(
    cuda: &Cuda,
    dh: ViewMut<'_, T>,
    dw: Option<ViewMut<'_, T::Acc>>,
    slopes: &Slopes<'_, T::Acc>,
    f: Forward<'_, T>,
    part: Part,
    mut dz: ViewMut<'_, T>,
    sums: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let Part { first, n, width, last } = part;
    let (rows, d) = (f.targets.len(), f.packed.k());
    let (scale, cap) = (f.settings.scale(), f.settings.cap());
    let [tile, ..] = matmul::TileShape::all(Arch::Sm90);
    let launch = tile.launch(cuda, rows, width, false)?;
    let h = operand(cuda, f.h, (rows, d, d), 128)?;
    let w = operand(cuda, f.w, (n, d, d), 128)?;
    let to = result(cuda, dz.reborrow(), (rows, width))?;
    let (targets, lse, dlogp) = (f.targets, f.lse, slopes.dlogp);
    kernel::Gradient::<T> {
        dz: to,
        h,
        w,
        targets,
        lse,
        dlogp,
        entropy: f.entropy,
        dentropy: slopes.dentropy,
        rows,
        n,
        width,
        first,
        d,
        scale,
        cap,
    }
    .launch(cuda, launch)?;
    let tile = matmul::TileShape::of_backward(cuda, rows, d);
    let launch = tile.launch(cuda, rows, d, false)?;
    let left = operand(cuda, dz.view(), (rows, width, width), 128)?;
    let w = operand(cuda, f.w, (n, d, d), DEPTH)?;
    let to = result(cuda, dh, (rows, d))?;
    let (begins, ends) = (usize::from(first == 0), usize::from(last));
    kernel::Hidden::<T> { dh: to, sums, dz: left, w, rows, n, d, first: begins, last: ends }
        .launch(cuda, tile.size, launch)?;
    let Some(dw) = dw else { return Ok(()) };
    let tile = matmul::TileShape::of_backward(cuda, n, d);
    let launch = tile.launch(cuda, n, d, false)?;
    let left = operand(cuda, dz.view(), (rows, n, width), DEPTH)?;
    let h = operand(cuda, f.h, (rows, d, d), DEPTH)?;
    matmul_sm90::BackwardWeight::<T> { dw, dbias: None, dy: left, x: h, m: rows, n, k: d }
        .launch(cuda, tile.size, launch)
}
