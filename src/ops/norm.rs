//! RMSNorm and LayerNorm over rows: `y[r,c] = n[r,c] * w[c] (+ b[c])`.
//!
//! * [`Norm::Rms`]: `n = x * rstd`, `rstd[r] = 1 / sqrt(mean_c x[r,c]² + eps)`.
//!   (Zhang and Sennrich 2019, eq. 4)
//! * [`Norm::Layer`]: `n = (x - mean) * rstd`, `rstd[r] = 1 / sqrt(var_c x[r,c] + eps)`, variance
//!   biased.  (Ba et al. 2016, eq. 4)

use std::{borrow::Cow, ops::Range};

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::math,
        cuda::{self, Launch, kernels::norm as kernel},
    },
    error::{Error, Result},
    shape, simd,
};

/// The kernels know it by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    Rms = 0,
    /// LayerNorm, with or without a bias.
    Layer = 1,
}

impl Norm {
    /// Sums over rows that the backward pass keeps for each column: of `dw`, and of `db`.
    fn sums(self) -> usize {
        self as usize + 1
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    pub norm: Norm,
    /// Multiplies by `1 + w` (Gemma), not by `w`.
    pub one_plus: bool,
    pub eps: f64,
    /// Rows of `w.len()` elements that lie side by side, such as a token's heads; 1 otherwise.
    pub heads: usize,
    /// Elements over which means run, where a device pads rows with zeros (RMSNorm alone).
    pub unpadded: Option<usize>,
}

/// `[tokens, heads, cols]` inside `data` `[tokens, stride]`: a token's rows begin at `first`. Made
/// from a view alone, rows lie back to back.
#[derive(Clone, Copy, Debug)]
pub struct NormRows<V> {
    pub data: V,
    pub first: usize,
    pub stride: Option<usize>,
}

impl<'a, T> From<View<'a, T>> for NormRows<View<'a, T>> {
    fn from(data: View<'a, T>) -> Self {
        Self { data, first: 0, stride: None }
    }
}

impl<'a, T> From<ViewMut<'a, T>> for NormRows<ViewMut<'a, T>> {
    fn from(data: ViewMut<'a, T>) -> Self {
        Self { data, first: 0, stride: None }
    }
}

/// What [`forward`] writes.
pub struct NormOut<'a, T: Element> {
    pub y: NormRows<ViewMut<'a, T>>,
    /// `[tokens, heads]`; LayerNorm's alone.
    pub mean: ViewMut<'a, T::Acc>,
    /// `[tokens, heads]`
    pub rstd: ViewMut<'a, T::Acc>,
}

/// What [`backward`] reads of the forward pass.
#[derive(Clone, Copy)]
pub struct NormKept<'a, T: Element> {
    pub x: NormRows<View<'a, T>>,
    /// `[cols]`
    pub w: View<'a, T>,
    /// As in [`NormOut`].
    pub mean: View<'a, T::Acc>,
    pub rstd: View<'a, T::Acc>,
}

/// What [`backward`] writes.
pub struct NormGrads<'a, T: Element> {
    /// Rows where `x` has them.
    pub dx: ViewMut<'a, T>,
    /// Adds to `dx`, as to the gradient of a residual stream.
    pub add: bool,
    /// `[cols]`, added to; none if the weight is frozen, and so its bias.
    pub dw: Option<ViewMut<'a, T::Acc>>,
    /// `[cols]`, added to; LayerNorm's alone.
    pub db: Option<ViewMut<'a, T::Acc>>,
    /// [`scratch_len`] elements.
    pub scratch: ViewMut<'a, T::Acc>,
}

/// Writes `y`, and `mean` and `rstd` for [`backward`]. `w` and `b` are `[cols]`.
///
/// Reads x, writes y: `2 * rows * cols` elements.
pub fn forward<'a, T: Element>(
    dev: &Device,
    spec: NormSpec,
    out: NormOut<'_, T>,
    x: impl Into<NormRows<View<'a, T>>>,
    w: View<'_, T>,
    b: Option<View<'_, T>>,
) -> Result<()> {
    const OP: &str = "norm";
    let NormOut { y, mean, rstd } = out;
    let (x, layer) = (x.into(), spec.norm == Norm::Layer);
    let at = NormLayout::new(OP, spec, rstd.len(), w.len())?;
    let x_stride = at.stride::<T>(dev, (OP, "x"), x.first, x.stride, x.data.len())?;
    let y_stride = at.stride::<T>(dev, (OP, "y"), y.first, y.stride, y.data.len())?;
    at.check_layer(OP, spec.norm, mean.len(), ("b", b.map(|b| b.len())))?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * at.rows * at.cols));
    match dev {
        Device::Cpu(cpu) => {
            let (rstd, eps) = (rstd.host(), <T::Acc as Element>::of(spec.eps));
            let n = <T::Acc as Element>::of(at.unpadded as f64);
            let (data, w) = (x.data.float()?.host(), weight(spec, w.float()?.host()));
            let zeros = vec![T::Acc::ZERO; at.cols];
            let b = b.map(View::float).transpose()?.map_or(&zeros[..], View::host);
            let out = (
                (y.data.float()?.host(), y_stride),
                layer.then(|| (mean.host(), at.heads)),
                (rstd, at.heads),
            );
            cpu.rows(at.tokens, at.task(), out, |range, (out, mut mean, rstd)| {
                for (i, r) in at.rows_of(range).enumerate() {
                    let x = &data[at.begin(r, x.first, x_stride)..][..at.cols];
                    let y = &mut out[at.begin(i, y.first, y_stride)..][..at.cols];
                    match &mut mean {
                        None => rstd[i] = rms_row(cpu.isa(), y, x, &w, (n, eps)),
                        Some(mean) => {
                            (mean[i], rstd[i]) = layer_row(cpu.isa(), y, x, &w, b, eps);
                        }
                    }
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let group = cuda::group::<T>(OP, at.cols, kernel::ELEMENTS, kernel::THREADS)?;
            let blocks = at.rows.div_ceil(kernel::THREADS / group);
            let launch = Launch::row(blocks, kernel::THREADS / 32 * 4)?;
            kernel::Forward {
                y: after_mut(y.data, y.first),
                mean: layer.then_some(mean),
                rstd,
                x: after(x.data, x.first),
                w,
                b,
                rows: at.rows,
                cols: at.cols,
                unpadded: at.unpadded,
                heads: at.heads,
                x_stride,
                y_stride,
                one_plus: spec.one_plus.into(),
                eps: <T::Acc as Element>::of(spec.eps),
                group,
            }
            .launch(cuda, spec.norm as usize, launch)
        }
    }
}

/// Elements of scratch that [`backward`] needs: sums of `dw`, and of `db`, over parts of the rows.
pub fn scratch_len(norm: Norm, rows: usize, cols: usize) -> usize {
    norm.sums() * rows.div_ceil(kernel::SHARE) * cols
}

/// Writes `dx` and adds to `dw` and `db`, in an order that depends on the number of rows only; on
/// the CPU in ascending row order. With `n` as above and `g = dy w`:
///
/// * RMSNorm: `dx = rstd (g - n mean_c(g n))`
/// * LayerNorm: `dx = rstd (g - mean_c(g) - n mean_c(g n))`, `db += sum_r dy`
/// * both: `dw += sum_r dy n`
///
/// Reads dy and x, writes dx: `3 * rows * cols` elements; adding reads dx, too.
pub fn backward<'a, T: Element>(
    dev: &Device,
    spec: NormSpec,
    grads: NormGrads<'_, T>,
    dy: impl Into<NormRows<View<'a, T>>>,
    kept: NormKept<'_, T>,
) -> Result<()> {
    const OP: &str = "norm::backward";
    let NormGrads { dx, add, dw, db, scratch } = grads;
    let NormKept { x, w, mean, rstd } = kept;
    let (dy, layer) = (dy.into(), spec.norm == Norm::Layer);
    let at = NormLayout::new(OP, spec, rstd.len(), w.len())?;
    let x_stride = at.stride::<T>(dev, (OP, "x"), x.first, x.stride, x.data.len())?;
    at.stride::<T>(dev, (OP, "dx"), x.first, x.stride, dx.len())?;
    let y_stride = at.stride::<T>(dev, (OP, "dy"), dy.first, dy.stride, dy.data.len())?;
    dw.as_ref().map_or(Ok(()), |dw| shape::check(OP, "dw", &[at.cols], dw.len()))?;
    at.check_layer(OP, spec.norm, mean.len(), ("db", db.as_ref().map(ViewMut::len)))?;
    let mut partial = scratch.scratch(OP, scratch_len(spec.norm, at.rows, at.cols))?;
    let _op = dev.op(OP, || Work::moves::<T>(at.rows * at.cols * if add { 4 } else { 3 }));
    match dev {
        Device::Cpu(cpu) => {
            let (xs, dys, rstd) = (x.data.float()?.host(), dy.data.float()?.host(), rstd.host());
            let (w, mean) = (weight(spec, w.float()?.host()), mean.host());
            let n = <T::Acc as Element>::of(at.unpadded as f64);
            let x_row = |r: usize| &xs[at.begin(r, x.first, x_stride)..][..at.cols];
            let dy_row = |r: usize| &dys[at.begin(r, dy.first, y_stride)..][..at.cols];
            let dx = (dx.float()?.host(), x_stride);
            cpu.rows(at.tokens, at.task(), dx, |range, dx| {
                for (i, r) in at.rows_of(range).enumerate() {
                    let dx = &mut dx[at.begin(i, x.first, x_stride)..][..at.cols];
                    let kept = (if layer { mean[r] } else { n }, rstd[r]);
                    let back = if layer { layer_backward_row } else { rms_backward_row };
                    back(cpu.isa(), dx, dy_row(r), x_row(r), &w, kept, add);
                }
            });
            let Some(dw) = dw else { return Ok(()) };
            // By columns, so that each weight's sum runs over rows in order on one thread.
            let out = ((dw.host(), 1), db.map(|db| (db.host(), 1)));
            cpu.rows(at.cols, 64, out, |range, (dw, mut db)| {
                for r in 0..at.rows {
                    let (dy, x) = (&dy_row(r)[range.clone()], &x_row(r)[range.clone()]);
                    // Less 0 keeps all bits.
                    let mean = if layer { mean[r] } else { T::Acc::ZERO };
                    add_weight_row(cpu.isa(), dw, dy, x, mean, rstd[r]);
                    if let Some(db) = &mut db {
                        add_row(cpu.isa(), db, dy);
                    }
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let group = cuda::group::<T>(OP, at.cols, kernel::ELEMENTS, kernel::THREADS)?;
            let parts = at.rows.div_ceil(kernel::SHARE);
            let room = spec.norm.sums() * kernel::THREADS / 32 + kernel::THREADS / group * at.cols;
            kernel::Backward {
                dx: after_mut(dx, x.first),
                partial: partial.reborrow(),
                dy: after(dy.data, dy.first),
                x: after(x.data, x.first),
                w,
                mean: layer.then_some(mean),
                rstd,
                rows: at.rows,
                cols: at.cols,
                unpadded: at.unpadded,
                heads: at.heads,
                x_stride,
                y_stride,
                one_plus: spec.one_plus.into(),
                group,
                add: add.into(),
            }
            .launch(cuda, spec.norm as usize, Launch::row(parts, room * 4)?)?;
            let Some(dw) = dw else { return Ok(()) };
            let mut launch = Launch::row(at.cols.div_ceil(32), kernel::THREADS * 4)?;
            // A row of blocks for dw, one for db.
            launch.blocks[1] = if db.is_some() { 2 } else { 1 };
            let (partial, cols) = (partial.view(), at.cols);
            kernel::AddPartials { dw, db, partial, count: parts, cols }.launch(cuda, launch)
        }
    }
}

/// Where rows are: tokens of `heads` rows of `cols` elements.
struct NormLayout {
    tokens: usize,
    heads: usize,
    rows: usize,
    cols: usize,
    /// Elements over which means run.
    unpadded: usize,
}

impl NormLayout {
    fn new(op: &'static str, spec: NormSpec, rows: usize, cols: usize) -> Result<Self> {
        let tokens = shape::rows(op, "rstd", rows, spec.heads)?;
        let unpadded = spec.unpadded.unwrap_or(cols);
        let least = if spec.norm == Norm::Rms { cols.min(1) } else { cols };
        if !(least..=cols).contains(&unpadded) {
            let want = format!("{least} to {cols}");
            return Err(Error::value(format!("{op}: unpadded elements of a row"), want, unpadded));
        }
        Ok(Self { tokens, heads: spec.heads, rows, cols, unpadded })
    }

    /// From a token's rows to the next one's in a buffer of `len` elements, if they are inside it.
    fn stride<T: Element>(
        &self,
        dev: &Device,
        (op, arg): (&'static str, &'static str),
        first: usize,
        stride: Option<usize>,
        len: usize,
    ) -> Result<usize> {
        let width = self.heads * self.cols;
        let Some(stride) = stride else {
            return shape::check(op, arg, &[self.rows, self.cols], len).map(|()| width);
        };
        shape::check(op, arg, &[self.tokens, stride], len)?;
        let packet = if let Device::Cuda(_) = dev { 16 / size_of::<T>() } else { 1 };
        if first + width > stride || !stride.is_multiple_of(packet) {
            let want = format!("{} or more, a multiple of {packet}", first + width);
            return Err(Error::value(format!("{op}: stride of `{arg}`"), want, stride));
        }
        Ok(stride)
    }

    /// LayerNorm has a mean of each row, and may have a bias.
    fn check_layer(
        &self,
        op: &'static str,
        norm: Norm,
        mean: usize,
        (bias, len): (&'static str, Option<usize>),
    ) -> Result<()> {
        let cols = match norm {
            Norm::Rms => 0,
            Norm::Layer => {
                shape::check(op, "mean", &[self.rows], mean)?;
                self.cols
            }
        };
        len.map_or(Ok(()), |len| shape::check(op, bias, &[cols], len))
    }

    /// Tokens of a task of about 16 rows.
    fn task(&self) -> usize {
        (16 / self.heads).max(1)
    }

    fn rows_of(&self, tokens: Range<usize>) -> Range<usize> {
        tokens.start * self.heads..tokens.end * self.heads
    }

    /// Where row `r` begins.
    fn begin(&self, r: usize, first: usize, stride: usize) -> usize {
        r / self.heads * stride + first + r % self.heads * self.cols
    }
}

fn after<T>(view: View<'_, T>, first: usize) -> View<'_, T> {
    view.range(first.min(view.len())..view.len())
}

fn after_mut<T>(view: ViewMut<'_, T>, first: usize) -> ViewMut<'_, T> {
    let len = view.len();
    view.range(first.min(len)..len)
}

/// What rows are multiplied by.
fn weight<F: Float>(spec: NormSpec, w: &[F]) -> Cow<'_, [F]> {
    if spec.one_plus { w.iter().map(|w| F::ONE + *w).collect() } else { w.into() }
}

/// `1 / sqrt(x)`; NaN where squares overflowed, which would give 0: a row of zeros is a good number
/// that says nothing.
#[inline(always)]
fn reciprocal_root<F: Float>(x: F) -> F {
    let r = F::ONE / x.sqrt();
    r + F::ZERO / r
}

simd! {
    fn rms_row[F: Float](y: &mut [F], x: &[F], w: &[F], by: (F, F)) -> F {
        let (n, eps) = by;
        let rstd = reciprocal_root(math::dot(x, x) / n + eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = *x * rstd * *w;
        }
        rstd
    }

    fn layer_row[F: Float](y: &mut [F], x: &[F], w: &[F], b: &[F], eps: F) -> (F, F) {
        let n = F::of(x.len() as f64);
        let mean = math::sum_by(x.len(), |i| x[i]) / n;
        let var = math::sum_by(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
        let rstd = reciprocal_root(var + eps);
        for i in 0..y.len() {
            y[i] = ((x[i] - mean) * rstd).mul_add(w[i], b[i]);
        }
        (mean, rstd)
    }

    fn rms_backward_row[F: Float](
        dx: &mut [F], dy: &[F], x: &[F], w: &[F], kept: (F, F), add: bool
    ) {
        let (n, rstd) = kept;
        let mean = math::sum_by(x.len(), |i| dy[i] * w[i] * x[i]) / n;
        let pull = mean * rstd * rstd;
        for i in 0..dx.len() {
            let d = (dy[i] * w[i] - x[i] * pull) * rstd;
            dx[i] = if add { dx[i] + d } else { d };
        }
    }

    fn layer_backward_row[F: Float](
        dx: &mut [F], dy: &[F], x: &[F], w: &[F], kept: (F, F), add: bool
    ) {
        let (mean, rstd) = kept;
        let n = F::of(x.len() as f64);
        let g = math::sum_by(x.len(), |i| dy[i] * w[i]) / n;
        let gn = math::sum_by(x.len(), |i| dy[i] * w[i] * ((x[i] - mean) * rstd)) / n;
        for i in 0..dx.len() {
            let d = (dy[i] * w[i] - g - (x[i] - mean) * rstd * gn) * rstd;
            dx[i] = if add { dx[i] + d } else { d };
        }
    }

    fn add_weight_row[F: Float](dw: &mut [F], dy: &[F], x: &[F], mean: F, rstd: F) {
        for i in 0..dw.len() {
            dw[i] = dy[i].mul_add((x[i] - mean) * rstd, dw[i]);
        }
    }

    fn add_row[F: Float](sum: &mut [F], row: &[F]) {
        for (sum, x) in sum.iter_mut().zip(row) {
            *sum += *x;
        }
    }
}
