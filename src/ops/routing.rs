//! Which experts a row goes to, and how what they make of it comes together (top-k routing: Shazeer
//! et al. 2017).
//!
//! A row's k largest logits are chosen, of equals the lower expert; a NaN is the largest, so that
//! it shows in the weights. These are a softmax over the k, which is what it comes to when
//! probabilities over all experts are made to sum to 1 again, or the probabilities over all. Pairs
//! of a row and an expert of its own are then sorted by expert, by row within it:
//! [`experts`](super::experts) multiplies each expert's by its weights. Counts stay on the device.

use crate::{
    device::{
        Buffer, Device, Element, Float, Scope, View, ViewMut, Work,
        cpu::math,
        cuda::{self, Launch, kernels::routing as kernel},
    },
    error::{Error, Result},
    shape, simd,
};

/// The most experts.
pub const MAX_EXPERTS: usize = 1024;

/// How rows choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Router {
    pub experts: usize,
    /// Experts of a row, 1 to all.
    pub top: usize,
    /// A row's weights sum to 1: a softmax over those that it chose. Without, over all.
    pub renormalised: bool,
}

/// Where each row goes, of a pass over `rows` rows with `pairs = rows * top`.
#[derive(Debug)]
pub struct Routes<'s, F> {
    pub router: Router,
    /// `[rows, experts]`, to be written before [`forward`] reads them.
    pub logits: Buffer<'s, F>,
    /// `[rows, top]`, the largest logit first.
    pub chosen: Buffer<'s, u32>,
    /// `[rows, top]`
    pub weights: Buffer<'s, F>,
    /// `[experts + 1]`: expert `e` has the sorted pairs from `offsets[e]` to `offsets[e + 1]`.
    pub offsets: Buffer<'s, u32>,
    /// `[pairs]`: the row of each sorted pair.
    pub rows: Buffer<'s, u32>,
    /// `[pairs]`: `row * top + slot` of each sorted pair.
    pub pairs: Buffer<'s, u32>,
    /// `[rows, top]`: where each pair is among the sorted ones.
    pub places: Buffer<'s, u32>,
    /// Pairs of each expert in each share of them, then where these begin: a CUDA device's.
    counts: Buffer<'s, u32>,
}

impl<'s, F: Float> Routes<'s, F> {
    /// Room for those of `rows` rows.
    ///
    /// # Errors
    /// [`Error::Value`] if there are no experts, more than [`MAX_EXPERTS`], or fewer than a row
    /// chooses.
    pub fn new(dev: &Device, scope: &'s Scope<'_>, router: Router, rows: usize) -> Result<Self> {
        let Router { experts, top, .. } = router;
        for (what, n, most) in
            [("experts", experts, MAX_EXPERTS), ("experts of a row", top, experts)]
        {
            if n == 0 || n > most {
                return Err(Error::value(what, format!("1 to {most}"), n));
            }
        }
        let pairs = rows.saturating_mul(top);
        let shares = if let Device::Cuda(_) = dev { pairs.div_ceil(kernel::SHARE) } else { 0 };
        Ok(Self {
            router,
            logits: scope.alloc("router logits", rows.saturating_mul(experts))?,
            chosen: scope.alloc("chosen experts", pairs)?,
            weights: scope.alloc("weights of experts", pairs)?,
            offsets: scope.alloc("offsets of experts", experts + 1)?,
            rows: scope.alloc("rows by expert", pairs)?,
            pairs: scope.alloc("pairs by expert", pairs)?,
            places: scope.alloc("places of pairs", pairs)?,
            counts: scope.alloc("counts of experts", shares * experts)?,
        })
    }

    /// Pairs of a row and an expert.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows of the pass.
    pub fn row_count(&self) -> usize {
        self.len() / self.router.top
    }

    /// The sorted pairs of each expert that has some, in host memory: its number, and the first
    /// and the end.
    pub(super) fn segments(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let ends = self.offsets.host().windows(2).enumerate();
        ends.map(|(e, at)| (e, at[0] as usize, at[1] as usize)).filter(|(_, at, end)| at < end)
    }
}

/// Makes of the logits all else in `routes`.
///
/// Reads the logits.
pub fn forward<F: Float>(dev: &Device, routes: &mut Routes<'_, F>) -> Result<()> {
    let (rows, count) = (routes.row_count(), routes.len());
    let Router { experts, top, renormalised } = routes.router;
    let _op = dev.op("routing", || Work::moves::<F>(rows * experts));
    match dev {
        Device::Cpu(cpu) => {
            let (logits, over_all) = (routes.logits.host(), !renormalised);
            let out = ((routes.chosen.host_mut(), top), (routes.weights.host_mut(), top));
            cpu.rows(rows, 64, out, |range, (chosen, weights)| {
                for (i, r) in range.enumerate() {
                    let (z, at) = (&logits[r * experts..][..experts], i * top..(i + 1) * top);
                    choose(&mut chosen[at.clone()], z);
                    weigh(cpu.isa(), &mut weights[at.clone()], &chosen[at], z, over_all);
                }
            });
            sort(routes);
            Ok(())
        }
        Device::Cuda(cuda) => {
            let Routes {
                logits,
                chosen,
                weights,
                offsets,
                rows: sorted,
                pairs,
                places,
                counts,
                ..
            } = routes;
            kernel::Choose {
                chosen: chosen.view_mut(),
                weights: weights.view_mut(),
                logits: logits.view(),
                rows,
                experts,
                top,
                renormalised: renormalised.into(),
            }
            .launch(cuda, Launch::row(rows.div_ceil(kernel::THREADS / 32), 0)?)?;
            let shares = count.div_ceil(kernel::SHARE);
            let each = Launch::row(shares, kernel::SHARE * 4)?;
            let chosen = chosen.view();
            kernel::Count { counts: counts.view_mut(), chosen, count, experts }
                .launch(cuda, each)?;
            let (starts, offsets) = (counts.view_mut(), offsets.view_mut());
            kernel::Scan { counts: starts, offsets, shares, experts }
                .launch(cuda, Launch::row(1, (experts + 1) * 4)?)?;
            kernel::Place {
                rows: sorted.view_mut(),
                pairs: pairs.view_mut(),
                places: places.view_mut(),
                chosen,
                starts: counts.view(),
                count,
                experts,
                top,
            }
            .launch(cuda, each)
        }
    }
}

/// The places of the largest logits, the first the largest.
fn choose<F: Float>(chosen: &mut [u32], z: &[F]) {
    let above = |a: F, b: F| a > b || (a.is_nan() && !b.is_nan());
    let mut found = 0;
    for (e, x) in z.iter().enumerate() {
        let at = chosen[..found].partition_point(|c| !above(*x, z[*c as usize]));
        if at == chosen.len() {
            continue;
        }
        found = (found + 1).min(chosen.len());
        chosen[at..found].rotate_right(1);
        chosen[at] = e as u32;
    }
}

/// Counting sort: of each expert the pairs in their order.
fn sort<F: Float>(routes: &mut Routes<'_, F>) {
    let (chosen, top) = (routes.chosen.host(), routes.router.top);
    let (offsets, places) = (routes.offsets.host_mut(), routes.places.host_mut());
    offsets.fill(0);
    chosen.iter().for_each(|e| offsets[*e as usize + 1] += 1);
    for e in 1..offsets.len() {
        offsets[e] += offsets[e - 1];
    }
    let mut next = offsets.to_vec();
    let (rows, pairs) = (routes.rows.host_mut(), routes.pairs.host_mut());
    for (pair, e) in chosen.iter().enumerate() {
        let at = next[*e as usize];
        next[*e as usize] += 1;
        places[pair] = at;
        (rows[at as usize], pairs[at as usize]) = ((pair / top) as u32, pair as u32);
    }
}

/// `y[r] = sum_j weights[r, j] x[places[r, j]] + onto[r]`, slots in order: `x` `[pairs, cols]`, `y`
/// and `onto` `[rows, cols]`; without `onto` the sum is added to `y`. Not `weighted`, every weight
/// is 1.
///
/// Reads x and onto, writes y.
pub fn combine<T: Element>(
    dev: &Device,
    routes: &Routes<'_, T::Acc>,
    y: ViewMut<'_, T>,
    x: View<'_, T>,
    onto: Option<View<'_, T>>,
    weighted: bool,
) -> Result<()> {
    const OP: &str = "routing::combine";
    let (rows, top) = (routes.row_count(), routes.router.top);
    let cols = y.len() / rows.max(1);
    shape::check(OP, "y", &[rows, cols], y.len())?;
    shape::check(OP, "x", &[rows * top, cols], x.len())?;
    onto.map_or(Ok(()), |onto| shape::check(OP, "onto", &[rows, cols], onto.len()))?;
    let _op = dev.op(OP, || Work::moves::<T>((2 + top) * rows * cols));
    match dev {
        _ if cols == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let (y, x) = (y.float()?.host(), x.float()?.host());
            let onto = onto.map(View::float).transpose()?.map(View::host);
            let (places, weights) = (routes.places.host(), routes.weights.host());
            cpu.rows(rows, 16, (y, cols), |range, y| {
                let mut sum = vec![T::Acc::ZERO; cols];
                for (y, r) in y.chunks_exact_mut(cols).zip(range) {
                    sum.fill(T::Acc::ZERO);
                    for pair in r * top..(r + 1) * top {
                        let x = &x[places[pair] as usize * cols..][..cols];
                        let w = if weighted { weights[pair] } else { T::Acc::ONE };
                        axpy(cpu.isa(), &mut sum, w, x);
                    }
                    if let Some(onto) = onto {
                        y.copy_from_slice(&onto[r * cols..][..cols]);
                    }
                    axpy(cpu.isa(), y, T::Acc::ONE, &sum);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let own = onto.map_or(0, |onto| onto.address());
            let width = cuda::width::<T>(&[cols], &[y.address(), x.address(), own]);
            let launch = Launch::threads(rows * (cols / width), kernel::THREADS)?;
            let weights = weighted.then(|| routes.weights.view());
            let places = routes.places.view();
            kernel::Combine { y, x, onto, places, weights, rows, cols, top, width }
                .launch(cuda, launch)
        }
    }
}

/// The load-balance loss of each row (Fedus et al. 2021, eq. 4, for top-k as in transformers):
/// `column[r] = experts * sum_e f_e p[r, e]`, `f_e` the pairs of expert `e` divided by the rows,
/// `p` the softmax over all experts. The loss is the mean over rows: `top` where all experts have
/// equal parts, more where they have not.
///
/// Reads the logits.
pub fn balance<F: Float>(
    dev: &Device,
    routes: &Routes<'_, F>,
    column: ViewMut<'_, F>,
) -> Result<()> {
    let (rows, experts) = (routes.row_count(), routes.router.experts);
    shape::check("routing::balance", "column", &[rows], column.len())?;
    let _op = dev.op("routing::balance", || Work::moves::<F>(rows * experts));
    match dev {
        Device::Cpu(cpu) => {
            let (loads, logits) = (loads(routes), routes.logits.host());
            cpu.rows(rows, 64, (column.host(), 1), |range, column| {
                let mut p = vec![F::ZERO; experts];
                for (c, r) in column.iter_mut().zip(range) {
                    softmax(cpu.isa(), &mut p, &logits[r * experts..][..experts]);
                    *c = dot(cpu.isa(), &p, &loads);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row(rows.div_ceil(kernel::THREADS / 32), 0)?;
            let (logits, offsets) = (routes.logits.view(), routes.offsets.view());
            kernel::Balance { column, logits, offsets, rows, experts }.launch(cuda, launch)
        }
    }
}

/// `experts * f_e`
fn loads<F: Float>(routes: &Routes<'_, F>) -> Vec<F> {
    let each = routes.router.experts as f64 / routes.row_count() as f64;
    let ends = routes.offsets.host().windows(2);
    ends.map(|at| F::of(f64::from(at[1] - at[0]) * each)).collect()
}

/// Writes `dlogits`, rows [`width`](super::matmul::width)`(dev, experts)` apart which end in
/// zeros, from `dweights`, the gradients of the weights in the order of the sorted pairs, and adds
/// `balance` times the gradient of a row's [`balance`] loss, of which `f` is a constant.
///
/// The choice is a constant. With `p` the softmax that the weights are taken from, over a row's own
/// experts or over all: `dlogits_e = p_e (dweight_e - sum_j weight_j dweight_j)`, `dweight_e = 0`
/// for what was not chosen.
///
/// Reads the logits, writes as many.
pub fn backward<T: Element>(
    dev: &Device,
    routes: &Routes<'_, T::Acc>,
    dlogits: ViewMut<'_, T>,
    dweights: View<'_, T::Acc>,
    balance: f64,
) -> Result<()> {
    const OP: &str = "routing::backward";
    let (rows, Router { experts, top, renormalised }) = (routes.row_count(), routes.router);
    let stride = super::matmul::width(dev, experts);
    shape::check(OP, "dlogits", &[rows, stride], dlogits.len())?;
    shape::check(OP, "dweights", &[routes.len()], dweights.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * rows * experts));
    let scale = <T::Acc as Element>::of(balance);
    match dev {
        Device::Cpu(cpu) => {
            let (d, dweights) = (dlogits.float()?.host(), dweights.host());
            let (places, chosen) = (routes.places.host(), routes.chosen.host());
            let (weights, logits) = (routes.weights.host(), routes.logits.host());
            let loads = if balance > 0.0 { loads(routes) } else { Vec::new() };
            cpu.rows(rows, 64, (d, experts), |range, d| {
                let mut p = vec![T::Acc::ZERO; experts];
                for (d, r) in d.chunks_exact_mut(experts).zip(range) {
                    let own = r * top..(r + 1) * top;
                    if !renormalised || balance > 0.0 {
                        softmax(cpu.isa(), &mut p, &logits[r * experts..][..experts]);
                    }
                    let slots = || own.clone().map(|i| (i, dweights[places[i] as usize]));
                    let mean =
                        slots().fold(T::Acc::ZERO, |sum, (i, dw)| weights[i].mul_add(dw, sum));
                    for e in 0..experts {
                        d[e] = if renormalised { T::Acc::ZERO } else { -p[e] * mean };
                    }
                    for (i, dw) in slots() {
                        d[chosen[i] as usize] = weights[i] * (dw - mean);
                    }
                    if balance > 0.0 {
                        let own = dot(cpu.isa(), &p, &loads);
                        for e in 0..experts {
                            d[e] += scale * p[e] * (loads[e] - own);
                        }
                    }
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row(rows.div_ceil(kernel::THREADS / 32), 0)?;
            kernel::Backward {
                dlogits,
                dweights,
                places: routes.places.view(),
                logits: routes.logits.view(),
                chosen: routes.chosen.view(),
                weights: routes.weights.view(),
                offsets: routes.offsets.view(),
                balance: scale,
                rows,
                experts,
                top,
                renormalised: renormalised.into(),
                stride,
            }
            .launch(cuda, launch)
        }
    }
}

simd! {
    /// The weights of what a row chose.
    fn weigh[F: Float](weights: &mut [F], chosen: &[u32], z: &[F], over_all: bool) {
        let most = z[chosen[0] as usize];
        let mut sum = F::ZERO;
        for (w, e) in weights.iter_mut().zip(chosen) {
            *w = (z[*e as usize] - most).exp();
            sum += *w;
        }
        if over_all {
            sum = math::sum_by(z.len(), |e| (z[e] - most).exp());
        }
        weights.iter_mut().for_each(|w| *w = *w / sum);
    }

    fn softmax[F: Float](p: &mut [F], z: &[F]) {
        let most = math::max(z);
        for (p, z) in p.iter_mut().zip(z) {
            *p = (*z - most).exp();
        }
        let sum = math::sum_by(p.len(), |e| p[e]);
        p.iter_mut().for_each(|p| *p = *p / sum);
    }

    fn dot[F: Float](a: &[F], b: &[F]) -> F {
        math::dot(a, b)
    }

    fn axpy[F: Float](y: &mut [F], a: F, x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = a.mul_add(*x, *y);
        }
    }
}
