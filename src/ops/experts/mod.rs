//! Products of a mixture of experts: each row by the weights of the experts that it chose.
//!
//! The pairs of a row and an expert lie sorted by expert ([`Routes`]), so that an expert's are rows
//! that follow each other. Every sum is the chain of [`super::matmul`]: a pair has the same bits
//! whatever else is there. The gradient of an expert's weights sums its pairs in ascending order;
//! an expert without pairs has none, and nothing is added to it. Which pairs there are only the
//! device knows. Kernels are those of `mma.sync` on Hopper, too.

mod cuda;

use crate::{
    device::{
        Cpu, Device, Element, Float, View, ViewMut, Work,
        cpu::{
            gemm::{self, Lhs, Product, Rhs},
            math,
        },
        cuda::{Launch, kernels::experts as kernel},
    },
    error::{Error, Result},
    ops::{
        activation::Glu,
        matmul::{Weight, eights},
        routing::Routes,
    },
    shape, simd,
};

/// An operand with a row for each sorted pair.
pub enum PairRows<'a, T> {
    /// `[pairs, cols]`, sorted.
    Sorted(View<'a, T>),
    /// `x` `[rows, cols]`, of which each pair reads its own row. The CPU puts them in order in
    /// `room` `[pairs, cols]`; a CUDA device leaves it alone.
    Gathered { x: View<'a, T>, room: ViewMut<'a, T> },
}

impl<'a, T: Element> PairRows<'a, T> {
    fn check(
        &self,
        (op, arg): (&'static str, &'static str),
        routes: &Routes<'_, T::Acc>,
        cols: usize,
    ) -> Result<()> {
        match self {
            Self::Sorted(x) => shape::check(op, arg, &[routes.len(), cols], x.len()),
            Self::Gathered { x, room } => {
                shape::check(op, arg, &[routes.row_count(), cols], x.len())?;
                shape::check(op, "room", &[routes.len(), cols], room.len())
            }
        }
    }

    /// The rows in order.
    fn host(self, cpu: &Cpu, routes: &Routes<'_, T::Acc>, cols: usize) -> Result<&'a [T::Acc]> {
        match self {
            Self::Sorted(x) => Ok(x.float()?.host()),
            Self::Gathered { x, room } => {
                let (x, rows, room) = (x.float()?.host(), routes.rows.host(), room.float()?.host());
                cpu.rows(routes.len(), 16, (&mut *room, cols), |range, room| {
                    for (to, r) in room.chunks_exact_mut(cols).zip(&rows[range]) {
                        to.copy_from_slice(&x[*r as usize * cols..][..cols]);
                    }
                });
                Ok(room)
            }
        }
    }

    /// As kernels read it: with the row of each pair where there is no row for each.
    fn device(self, routes: &'a Routes<'_, T::Acc>) -> (View<'a, T>, Option<View<'a, u32>>) {
        match self {
            Self::Sorted(x) => (x, None),
            Self::Gathered { x, .. } => (x, Some(routes.rows.view())),
        }
    }
}

/// Weights `[experts, n, k]` and what is added to their outputs, `[experts, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a, T> {
    pub weight: Weight<'a, T>,
    pub bias: Option<View<'a, T>>,
}

impl<'a, T: Element> Stack<'a, T> {
    fn check(&self, op: &'static str, experts: usize) -> Result<(usize, usize)> {
        let (n, k) = (self.weight.n(), self.weight.k());
        if self.weight.count() != experts {
            let want = experts.to_string();
            return Err(Error::value(format!("{op}: weights"), want, self.weight.count()));
        }
        self.bias.map_or(Ok(()), |b| shape::check(op, "bias", &[experts, n], b.len()))?;
        Ok((n, k))
    }
}

/// What all experts of a pass do, for a profile: each weight is read once.
fn work<T: Element>(routes: &Routes<'_, T::Acc>, n: usize, k: usize) -> Work {
    let (m, experts) = (routes.len(), routes.router.experts.min(routes.len()));
    Work::moves::<T>(m * (n + k) + experts * n * k).product(m, n, k)
}

/// The router's logits, `logits = x Wᵀ (+ bias)`: `x` `[rows, k]`, the weight `[experts, k]`,
/// `logits` `[rows, experts]` in what sums are kept in, so that the choice does not round.
///
/// Reads x and the weight.
pub fn scores<T: Element>(
    dev: &Device,
    logits: ViewMut<'_, T::Acc>,
    x: View<'_, T>,
    router: Stack<'_, T>,
) -> Result<()> {
    const OP: &str = "experts::scores";
    let (n, k) = router.check(OP, 1)?;
    let m = shape::rows(OP, "x", x.len(), k)?;
    shape::check(OP, "logits", &[m, n], logits.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(m * k + n * k).product(m, n, k));
    match dev {
        Device::Cpu(cpu) => {
            let (a, b) = (x.float()?.host(), router.weight.view().float()?.host());
            let bias = router.bias.map(View::float).transpose()?.map(View::host);
            let product = Product::new((m, n, k), Lhs::rows(a, k), Rhs::Packed(b));
            gemm::product(cpu, logits.host(), n, Product { bias, ..product });
            Ok(())
        }
        Device::Cuda(_) if m == 0 => Ok(()),
        Device::Cuda(cuda) => cuda::scores(cuda, logits, x, router),
    }
}

/// `up = x Wᵀ (+ bias)` by each pair's expert, and `act = glu(up)`, gates in the first half of
/// `up`'s columns: `up` `[pairs, n]`, `act` `[pairs, n / 2]`. `2 pairs n k` FLOPs.
///
/// Reads x and the weights, writes up and act.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit; on a CUDA device [`Error::Device`] if there is no
/// kernel for its type: there are those for bf16.
pub fn activated<T: Element>(
    dev: &Device,
    routes: &Routes<'_, T::Acc>,
    glu: Glu,
    [act, mut up]: [ViewMut<'_, T>; 2],
    x: PairRows<'_, T>,
    w: Stack<'_, T>,
) -> Result<()> {
    const OP: &str = "experts::activated";
    let (n, k) = w.check(OP, routes.router.experts)?;
    let (pairs, cols) = (routes.len(), n / 2);
    x.check((OP, "x"), routes, k)?;
    shape::check(OP, "up", &[pairs, n], up.len())?;
    shape::check(OP, "act", &[pairs, cols], act.len())?;
    let _op = dev.op(OP, || work::<T>(routes, n, k));
    match dev {
        _ if pairs == 0 => Ok(()),
        Device::Cpu(cpu) => {
            multiply(cpu, routes, up.reborrow(), x.host(cpu, routes, k)?, w)?;
            let (act, up) = (act.float()?.host(), up.view().float()?.host());
            cpu.rows(pairs, 2048usize.div_ceil(cols.max(1)), (act, cols), |range, act| {
                for (act, p) in act.chunks_exact_mut(cols).zip(range) {
                    let (gate, up) = up[p * n..][..n].split_at(cols);
                    glu.row(cpu.isa(), act, gate, up);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            eights(OP, cols, k)?;
            cuda::activated(cuda, routes, glu, [act, up], x.device(routes), w)
        }
    }
}

/// `y = x Wᵀ (+ bias)` by each pair's expert: `x` `[pairs, k]`, `y` `[pairs, n]`. `2 pairs n k`
/// FLOPs.
///
/// Reads x and the weights, writes y.
pub fn forward<T: Element>(
    dev: &Device,
    routes: &Routes<'_, T::Acc>,
    y: ViewMut<'_, T>,
    x: View<'_, T>,
    w: Stack<'_, T>,
) -> Result<()> {
    const OP: &str = "experts";
    let (n, k) = w.check(OP, routes.router.experts)?;
    shape::check(OP, "x", &[routes.len(), k], x.len())?;
    shape::check(OP, "y", &[routes.len(), n], y.len())?;
    let _op = dev.op(OP, || work::<T>(routes, n, k));
    match dev {
        _ if routes.is_empty() => Ok(()),
        Device::Cpu(cpu) => multiply(cpu, routes, y, x.float()?.host(), w),
        Device::Cuda(cuda) => {
            eights(OP, n, k)?;
            cuda::forward(cuda, routes, y, x, w)
        }
    }
}

/// Each expert's rows of `x` by its weights, on the CPU.
fn multiply<T: Element>(
    cpu: &Cpu,
    routes: &Routes<'_, T::Acc>,
    y: ViewMut<'_, T>,
    x: &[T::Acc],
    w: Stack<'_, T>,
) -> Result<()> {
    let (n, k) = (w.weight.n(), w.weight.k());
    let bias = w.bias.map(View::float).transpose()?.map(View::host);
    let part = |(e, at, end): (usize, usize, usize)| {
        let (a, b) = (Lhs::rows(&x[at * k..end * k], k), w.weight.at(e).float()?.host());
        let bias = bias.map(|b| &b[e * n..(e + 1) * n]);
        let product = Product::new((end - at, n, k), a, Rhs::Packed(b));
        Ok((at, Product { bias, ..product }))
    };
    let parts = routes.segments().map(part).collect::<Result<Vec<_>>>()?;
    gemm::products(cpu, y.float()?.host(), n, &parts);
    Ok(())
}

/// `dx = dy W` by each pair's expert: `dy` `[pairs, n]`, `w` `[experts, n, k]`, `dx` `[pairs, k]`.
/// `2 pairs n k` FLOPs.
///
/// Reads dy and w, writes dx.
pub fn backward_input<T: Element>(
    dev: &Device,
    routes: &Routes<'_, T::Acc>,
    dx: ViewMut<'_, T>,
    dy: PairRows<'_, T>,
    w: View<'_, T>,
    (n, k): (usize, usize),
) -> Result<()> {
    const OP: &str = "experts::backward_input";
    dy.check((OP, "dy"), routes, n)?;
    shape::check(OP, "w", &[routes.router.experts, n, k], w.len())?;
    shape::check(OP, "dx", &[routes.len(), k], dx.len())?;
    let _op = dev.op(OP, || work::<T>(routes, n, k));
    match dev {
        _ if routes.is_empty() => Ok(()),
        Device::Cpu(cpu) => {
            let (dy, w) = (dy.host(cpu, routes, n)?, w.float()?.host());
            let part = |(e, at, end): (usize, usize, usize)| {
                let a = Lhs::rows(&dy[at * n..end * n], n);
                let b = Rhs::Rows { data: &w[e * n * k..(e + 1) * n * k], ld: k };
                (at, Product::new((end - at, k, n), a, b))
            };
            let parts: Vec<_> = routes.segments().map(part).collect();
            gemm::products(cpu, dx.float()?.host(), k, &parts);
            Ok(())
        }
        Device::Cuda(cuda) => {
            eights(OP, n, k)?;
            cuda::backward_input(cuda, routes, dx, dy.device(routes), w, (n, k))
        }
    }
}

/// Gradients of the weights of all experts, and of their biases.
pub struct StackGrads<'a, F> {
    /// `[experts, n, k]`, added to.
    pub dw: ViewMut<'a, F>,
    /// `[experts, n]`, added to.
    pub dbias: Option<ViewMut<'a, F>>,
}

/// `dw[e] += dyᵀ x` and `dbias[e] += sum dy` over the pairs of each expert, in ascending order, on
/// the CPU continuing from what is there: `dy` `[pairs, n]`, `x` `[pairs, k]`. At most one of them
/// is gathered. `2 pairs n k` FLOPs.
///
/// Reads dy and x, reads and writes dw of the experts that have pairs.
pub fn backward_weight<T: Element>(
    dev: &Device,
    routes: &Routes<'_, T::Acc>,
    grads: StackGrads<'_, T::Acc>,
    dy: PairRows<'_, T>,
    x: PairRows<'_, T>,
    (n, k): (usize, usize),
) -> Result<()> {
    const OP: &str = "experts::backward_weight";
    let StackGrads { dw, dbias } = grads;
    let (pairs, experts) = (routes.len(), routes.router.experts);
    dy.check((OP, "dy"), routes, n)?;
    x.check((OP, "x"), routes, k)?;
    shape::check(OP, "dw", &[experts, n, k], dw.len())?;
    dbias.as_ref().map_or(Ok(()), |d| shape::check(OP, "dbias", &[experts, n], d.len()))?;
    let _op = dev.op(OP, || {
        let sums = Work::moves::<T::Acc>(2 * experts.min(pairs) * n * k);
        Work::moves::<T>(pairs * (n + k)).and(sums).product(pairs, n, k)
    });
    match dev {
        _ if pairs == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let (dy, x) = (dy.host(cpu, routes, n)?, x.host(cpu, routes, k)?);
            let part = |(e, at, end): (usize, usize, usize)| {
                let a = Lhs::columns(&dy[at * n..end * n], n);
                let b = Rhs::Rows { data: &x[at * k..end * k], ld: k };
                (e * n, Product::new((n, k, end - at), a, b).continuing(true))
            };
            let parts: Vec<_> = routes.segments().map(part).collect();
            gemm::products(cpu, dw.host(), k, &parts);
            if let Some(dbias) = dbias {
                add_rows(cpu, routes, dbias.host(), n, |p| (T::Acc::ONE, &dy[p * n..][..n]));
            }
            Ok(())
        }
        Device::Cuda(cuda) => {
            eights(OP, n, k)?;
            let (dy, x) = (dy.device(routes), x.device(routes));
            cuda::backward_weight(cuda, routes, StackGrads { dw, dbias }, dy, x, (n, k))
        }
    }
}

/// `sums[e] += sum of w x` over the pairs of each expert, in ascending order, `(w, x)` that of a
/// pair.
fn add_rows<'a, F: Float>(
    cpu: &Cpu,
    routes: &Routes<'_, F>,
    sums: &mut [F],
    cols: usize,
    row: impl Fn(usize) -> (F, &'a [F]) + Sync,
) {
    let offsets = routes.offsets.host();
    cpu.rows(routes.router.experts, 1, (sums, cols), |experts, sums| {
        for (sum, e) in sums.chunks_exact_mut(cols).zip(experts) {
            for p in offsets[e] as usize..offsets[e + 1] as usize {
                let (w, x) = row(p);
                axpy(cpu.isa(), sum, w, x);
            }
        }
    });
}

/// What [`glu_backward`] writes.
pub struct GluGrads<'a, T: Element> {
    /// `[pairs, cols]`: comes as the gradient of `act` for a weight of 1, and becomes the weight
    /// times `act`, which the gradient of the next product's weights reads.
    pub dact: ViewMut<'a, T>,
    /// `[pairs, 2 cols]`
    pub dup: ViewMut<'a, T>,
    /// `[pairs]`: of the weights, sorted.
    pub dweights: ViewMut<'a, T::Acc>,
}

/// Gradients of [`activated`]'s activation where a pair counts by its weight `w`: `dup = w dact
/// glu'(up)`, `dweights = dact . act`, and `dact` becomes `w act`.
///
/// Reads dact, up and act, writes dact and dup.
pub fn glu_backward<T: Element>(
    dev: &Device,
    routes: &Routes<'_, T::Acc>,
    glu: Glu,
    grads: GluGrads<'_, T>,
    [act, up]: [View<'_, T>; 2],
) -> Result<()> {
    const OP: &str = "experts::glu_backward";
    let GluGrads { dact, dup, dweights } = grads;
    let pairs = routes.len();
    let cols = act.len() / pairs.max(1);
    for (name, len, of) in [("act", act.len(), 1), ("dact", dact.len(), 1), ("up", up.len(), 2)] {
        shape::check(OP, name, &[pairs, of * cols], len)?;
    }
    shape::check(OP, "dup", &[pairs, 2 * cols], dup.len())?;
    shape::check(OP, "dweights", &[pairs], dweights.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(7 * pairs * cols));
    match dev {
        _ if cols == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let (act, up) = (act.float()?.host(), up.float()?.host());
            let (weights, order) = (routes.weights.host(), routes.pairs.host());
            let out = (
                (dact.float()?.host(), cols),
                (dup.float()?.host(), 2 * cols),
                (dweights.host(), 1),
            );
            cpu.rows(pairs, 2048usize.div_ceil(cols), out, |range, (dact, dup, dweights)| {
                for (i, p) in range.enumerate() {
                    let (d, act) = (&mut dact[i * cols..][..cols], &act[p * cols..][..cols]);
                    let w = weights[order[p] as usize];
                    dweights[i] = dot(cpu.isa(), d, act);
                    scale(cpu.isa(), d, w);
                    let (dup, up) = (&mut dup[i * 2 * cols..], &up[p * 2 * cols..]);
                    glu.row_backward(cpu.isa(), &mut dup[..2 * cols], d, &up[..2 * cols]);
                    d.copy_from_slice(act);
                    scale(cpu.isa(), d, w);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let width = crate::device::cuda::width::<T>(&[cols], &[]);
            let launch = Launch::row(pairs.div_ceil(kernel::THREADS / 32), 0)?;
            kernel::GluBackward {
                dup,
                dact,
                dweights,
                act,
                up,
                weights: routes.weights.view(),
                order: routes.pairs.view(),
                pairs,
                cols,
                act_kind: glu.act as usize,
                limit: glu.kernel_limit(),
                width,
            }
            .launch(cuda, launch)
        }
    }
}

/// Gradients of a bias that is added to what a pair counts with by its weight: `dbias[e] += sum of
/// w dy` over the pairs of each expert, in ascending order, and `dweights += dy . bias[e]`, sorted:
/// `dy` `[rows, cols]`, `bias` and `dbias` `[experts, cols]`.
///
/// Reads dy twice for each pair.
pub fn bias_backward<T: Element>(
    dev: &Device,
    routes: &Routes<'_, T::Acc>,
    dbias: Option<ViewMut<'_, T::Acc>>,
    dweights: ViewMut<'_, T::Acc>,
    dy: View<'_, T>,
    bias: View<'_, T>,
) -> Result<()> {
    const OP: &str = "experts::bias_backward";
    let (pairs, experts) = (routes.len(), routes.router.experts);
    let cols = shape::rows(OP, "bias", bias.len(), experts)?;
    shape::check(OP, "dy", &[routes.row_count(), cols], dy.len())?;
    shape::check(OP, "dweights", &[pairs], dweights.len())?;
    dbias.as_ref().map_or(Ok(()), |d| shape::check(OP, "dbias", &[experts, cols], d.len()))?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * pairs * cols));
    match dev {
        _ if pairs * cols == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let (dy, bias) = (dy.float()?.host(), bias.float()?.host());
            let (rows, order) = (routes.rows.host(), routes.pairs.host());
            let (chosen, weights) = (routes.chosen.host(), routes.weights.host());
            let dy_of = |p: usize| &dy[rows[p] as usize * cols..][..cols];
            cpu.rows(pairs, 16, (dweights.host(), 1), |range, dweights| {
                for (d, p) in dweights.iter_mut().zip(range) {
                    let e = chosen[order[p] as usize] as usize;
                    *d += dot(cpu.isa(), dy_of(p), &bias[e * cols..][..cols]);
                }
            });
            if let Some(dbias) = dbias {
                let row = |p: usize| (weights[order[p] as usize], dy_of(p));
                add_rows(cpu, routes, dbias.host(), cols, row);
            }
            Ok(())
        }
        Device::Cuda(cuda) => cuda::bias_backward(cuda, routes, dbias, dweights, dy, bias),
    }
}

simd! {
    fn dot[F: Float](a: &[F], b: &[F]) -> F {
        math::dot(a, b)
    }

    fn scale[F: Float](y: &mut [F], a: F) {
        y.iter_mut().for_each(|y| *y *= a);
    }

    fn axpy[F: Float](y: &mut [F], a: F, x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = a.mul_add(*x, *y);
        }
    }
}
