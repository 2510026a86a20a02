//! Columns of wider rows: copied, or gated by others.
//!
//! A projection may give several things side by side, such as values and what gates them. What
//! follows reads its own columns where they are.

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::math,
        cuda::{Launch, kernels::gate as kernel},
    },
    error::{Error, Result},
    shape, simd,
};

/// What a gate goes through. `kernels/gate.cu` knows them by their places here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `g sigmoid(g)`
    Silu,
    Sigmoid,
    /// Nothing: a product.
    Identity,
}

/// `[rows, cols]` inside `data` `[rows, stride]`: each row's part begins at `first`.
#[derive(Clone, Copy, Debug)]
pub struct Strided<V> {
    pub data: V,
    pub first: usize,
    pub stride: usize,
}

impl<V> Strided<V> {
    /// Rows of `cols` that are all there is.
    pub fn dense(data: V, cols: usize) -> Self {
        Self { data, first: 0, stride: cols }
    }
}

impl<'a, T> Strided<ViewMut<'a, T>> {
    /// The same to read.
    pub fn view(&self) -> Strided<View<'_, T>> {
        let Self { ref data, first, stride } = *self;
        Strided { data: data.view(), first, stride }
    }
}

impl<'a, T> Strided<View<'a, T>> {
    /// Row `r` of `cols` on the CPU.
    pub(super) fn row(&self, r: usize, cols: usize) -> &'a [T] {
        &self.data.host()[r * self.stride + self.first..][..cols]
    }
}

/// Checks that `of` holds rows of `cols`, and says how many.
pub(super) fn rows_of<T>(
    (op, name): (&'static str, &'static str),
    of: Strided<View<'_, T>>,
    cols: usize,
) -> Result<usize> {
    let Strided { data, first, stride } = of;
    if cols == 0 || first + cols > stride || !data.len().is_multiple_of(stride) {
        let what = format!("{op}: elements of `{name}` from column {first}");
        let want = format!("rows of {stride} that hold {cols} columns there");
        return Err(Error::value(what, want, data.len()));
    }
    Ok(data.len() / stride)
}

/// Checks that `of` holds `rows` rows of `cols`.
pub(super) fn check_rows<T>(
    (op, name): (&'static str, &'static str),
    of: Strided<View<'_, T>>,
    cols: usize,
    rows: usize,
) -> Result<()> {
    match rows_of((op, name), of, cols)? {
        got if got == rows => Ok(()),
        got => Err(Error::value(format!("{op}: rows of `{name}`"), rows.to_string(), got)),
    }
}

/// Checks that all have as many rows of `cols`.
fn same<T: Element, const N: usize>(
    op: &'static str,
    cols: usize,
    all: [(&'static str, Strided<View<'_, T>>); N],
) -> Result<usize> {
    let rows = rows_of((op, all[0].0), all[0].1, cols)?;
    all.into_iter().try_for_each(|(name, of)| check_rows((op, name), of, cols, rows))?;
    Ok(rows)
}

/// Rows of a task.
fn grain(cols: usize) -> usize {
    4096usize.div_ceil(cols.max(1))
}

/// `y = x`, of `cols` columns.
///
/// Reads x, writes y.
///
/// # Errors
/// [`Error::Value`] if rows or columns do not fit.
pub fn copy<T: Element>(
    dev: &Device,
    y: Strided<ViewMut<'_, T>>,
    x: Strided<View<'_, T>>,
    cols: usize,
) -> Result<()> {
    const OP: &str = "gate::copy";
    let rows = same(OP, cols, [("y", y.view()), ("x", x)])?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * rows * cols));
    match dev {
        Device::Cpu(cpu) => {
            cpu.rows(rows, grain(cols), (y.data.host(), y.stride), |range, out| {
                for (out, r) in out.chunks_exact_mut(y.stride).zip(range) {
                    out[y.first..][..cols].copy_from_slice(x.row(r, cols));
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::threads(rows * cols, kernel::THREADS)?;
            let (y_first, y_stride) = (y.first, y.stride);
            let Strided { data: x, first: x_first, stride: x_stride } = x;
            kernel::Copy { y: y.data, x, rows, cols, y_first, y_stride, x_first, x_stride }
                .launch(cuda, launch)
        }
    }
}

/// `y = x act(g)`, of `cols` columns. With `dy` for `x` it is the gradient of `x`.
///
/// Reads x and g, writes y.
pub fn forward<T: Element>(
    dev: &Device,
    act: Gate,
    y: Strided<ViewMut<'_, T>>,
    x: Strided<View<'_, T>>,
    g: Strided<View<'_, T>>,
    cols: usize,
) -> Result<()> {
    const OP: &str = "gate";
    let rows = same(OP, cols, [("y", y.view()), ("x", x), ("g", g)])?;
    let _op = dev.op(OP, || Work::moves::<T>(3 * rows * cols));
    match dev {
        Device::Cpu(cpu) => {
            let (first, stride) = (y.first, y.stride);
            let (x, g) = (floats(x)?, floats(g)?);
            cpu.rows(rows, grain(cols), (y.data.float()?.host(), stride), |range, out| {
                for (out, r) in out.chunks_exact_mut(stride).zip(range) {
                    let out = &mut out[first..][..cols];
                    gated(cpu.isa(), act, out, x.row(r, cols), g.row(r, cols));
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::threads(rows * cols, kernel::THREADS)?;
            let (y_first, y_stride, act) = (y.first, y.stride, act as usize);
            let Strided { data: x, first: x_first, stride: x_stride } = x;
            let Strided { data: g, first: g_first, stride: g_stride } = g;
            kernel::Forward {
                y: y.data,
                x,
                g,
                rows,
                cols,
                y_first,
                y_stride,
                x_first,
                x_stride,
                g_first,
                g_stride,
                act,
            }
            .launch(cuda, launch)
        }
    }
}

/// `dg = dy x act'(g)`, the columns `dy` being all that their rows have.
///
/// Reads dy, x and g, writes dg.
pub fn backward<T: Element>(
    dev: &Device,
    act: Gate,
    dg: Strided<ViewMut<'_, T>>,
    dy: View<'_, T>,
    [x, g]: [Strided<View<'_, T>>; 2],
    cols: usize,
) -> Result<()> {
    const OP: &str = "gate::backward";
    let dense = Strided::dense(dy, cols);
    let rows = same(OP, cols, [("dg", dg.view()), ("dy", dense), ("x", x), ("g", g)])?;
    let _op = dev.op(OP, || Work::moves::<T>(4 * rows * cols));
    match dev {
        Device::Cpu(cpu) => {
            let (first, stride) = (dg.first, dg.stride);
            let (x, g, dy) = (floats(x)?, floats(g)?, floats(dense)?);
            cpu.rows(rows, grain(cols), (dg.data.float()?.host(), stride), |range, out| {
                for (out, r) in out.chunks_exact_mut(stride).zip(range) {
                    let out = &mut out[first..][..cols];
                    let inputs = [dy.row(r, cols), x.row(r, cols), g.row(r, cols)];
                    gated_backward(cpu.isa(), act, out, inputs);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::threads(rows * cols, kernel::THREADS)?;
            let (d_first, d_stride, act) = (dg.first, dg.stride, act as usize);
            let Strided { data: x, first: x_first, stride: x_stride } = x;
            let Strided { data: g, first: g_first, stride: g_stride } = g;
            kernel::Backward {
                dg: dg.data,
                dy,
                x,
                g,
                rows,
                cols,
                d_first,
                d_stride,
                x_first,
                x_stride,
                g_first,
                g_stride,
                act,
            }
            .launch(cuda, launch)
        }
    }
}

/// `y[r,c] = x[r,c] sigmoid(g[r])`: a gate for each row.
///
/// Reads x and g, writes y, `[rows, cols]`.
///
/// # Errors
/// [`Error::Shape`] if x is not as long as y; [`Error::Value`] if it has no whole rows.
pub fn rows<T: Element>(
    dev: &Device,
    y: ViewMut<'_, T>,
    x: View<'_, T>,
    g: View<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "gate::rows";
    let cols = cols_of((OP, "y"), y.len(), g.len())?;
    shape::check(OP, "x", &[g.len(), cols], x.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(2 * x.len()));
    match dev {
        Device::Cpu(cpu) => {
            let (y, x, g) = (y.float()?.host(), x.float()?.host(), g.host());
            cpu.rows(g.len(), grain(cols), (y, cols), |range, y| {
                for (y, r) in y.chunks_exact_mut(cols.max(1)).zip(range) {
                    scaled(cpu.isa(), y, &x[r * cols..][..cols], g[r].sigmoid());
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::threads(x.len(), kernel::THREADS)?;
            kernel::Rows { y, x, rows: g.len(), g, cols }.launch(cuda, launch)
        }
    }
}

/// Turns `dy` into the gradient of `x` of [`rows`], and writes that of its gates:
/// `dg[r] = sigmoid'(g[r]) sum_c dy[r,c] x[r,c]`, in an order of `cols` alone.
///
/// Reads dy, x and g, writes dy and dg.
pub fn rows_backward<T: Element>(
    dev: &Device,
    dy: ViewMut<'_, T>,
    dg: ViewMut<'_, T::Acc>,
    x: View<'_, T>,
    g: View<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "gate::rows_backward";
    let cols = cols_of((OP, "dy"), dy.len(), g.len())?;
    shape::check(OP, "x", &[g.len(), cols], x.len())?;
    shape::check(OP, "dg", &[g.len()], dg.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(3 * x.len()));
    match dev {
        Device::Cpu(cpu) => {
            let (x, g) = (x.float()?.host(), g.host());
            let to = ((dy.float()?.host(), cols), (dg.host(), 1));
            cpu.rows(g.len(), grain(cols), to, |range, (dy, dg)| {
                for ((dy, dg), r) in dy.chunks_exact_mut(cols.max(1)).zip(dg).zip(range) {
                    let s = g[r].sigmoid();
                    *dg = s * (T::Acc::ONE - s) * dot(cpu.isa(), dy, &x[r * cols..][..cols]);
                    times(cpu.isa(), dy, s);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row(g.len().div_ceil(kernel::THREADS / 32), 0)?;
            kernel::RowsBackward { dy, dg, x, rows: g.len(), g, cols }.launch(cuda, launch)
        }
    }
}

/// Columns of a matrix with so many rows.
fn cols_of((op, name): (&'static str, &'static str), len: usize, rows: usize) -> Result<usize> {
    let cols = len / rows.max(1);
    shape::check(op, name, &[rows, cols], len)?;
    Ok(cols)
}

/// The same as the CPU computes with it.
pub(super) fn floats<T: Element>(of: Strided<View<'_, T>>) -> Result<Strided<View<'_, T::Acc>>> {
    let Strided { data, first, stride } = of;
    Ok(Strided { data: data.float()?, first, stride })
}

simd! {
    fn scaled[F: Float](y: &mut [F], x: &[F], s: F) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = *x * s);
    }

    fn times[F: Float](y: &mut [F], s: F) {
        y.iter_mut().for_each(|y| *y *= s);
    }

    fn dot[F: Float](a: &[F], b: &[F]) -> F {
        math::dot(a, b)
    }

    fn gated[F: Float](act: Gate, y: &mut [F], x: &[F], g: &[F]) {
        let all = y.iter_mut().zip(x).zip(g);
        match act {
            Gate::Silu => all.for_each(|((y, x), g)| *y = *x * (*g * g.sigmoid())),
            Gate::Sigmoid => all.for_each(|((y, x), g)| *y = *x * g.sigmoid()),
            Gate::Identity => all.for_each(|((y, x), g)| *y = *x * *g),
        }
    }

    fn gated_backward[F: Float](act: Gate, dg: &mut [F], inputs: [&[F]; 3]) {
        let [dy, x, g] = inputs;
        for (i, dg) in dg.iter_mut().enumerate() {
            let s = g[i].sigmoid();
            let slope = match act {
                Gate::Silu => s * (F::ONE + g[i] * (F::ONE - s)),
                Gate::Sigmoid => s * (F::ONE - s),
                Gate::Identity => F::ONE,
            };
            *dg = dy[i] * x[i] * slope;
        }
    }
}
