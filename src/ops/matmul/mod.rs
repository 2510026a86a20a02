//! Matrix products of a linear layer, `y = x Wᵀ + b + r`, and its two gradients.
//!
//! On the CPU every output element is one chain of fused multiply-adds over the reduced axis in
//! ascending order (see [`crate::device::cpu::gemm`]). On a CUDA device it is one chain of tensor
//! core products of 16 along that axis, in bf16 with f32 sums. On both a row of `y` has the same
//! bits whatever the number of rows, threads, tiles, or the instruction set. On the CPU a weight
//! gradient has the same bits however its rows are split into micro-batches; on a CUDA device it is
//! the sum of the sums of each.

pub mod launch;
mod schedule;
pub(in crate::ops) mod sm90;

pub use schedule::TileShape;

use crate::{
    device::{
        Buffer, Device, Element, Float, View, ViewMut, Work,
        cpu::gemm::{self, Lhs, Product, Rhs},
    },
    error::{Error, Result},
    ops::{
        activation::{self, Activation},
        residual,
    },
    shape, simd,
};

/// A weight `[n, k]` as [`forward`] reads it: in panels on the CPU, by rows on a CUDA device. Or a
/// stack of them, one after the other, for [`experts`](super::experts).
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a, T> {
    data: View<'a, T>,
    count: usize,
    n: usize,
    k: usize,
}

impl<'a, T: Element> Weight<'a, T> {
    /// A weight as it is stored, for a CUDA device.
    pub fn rows(dev: &Device, w: View<'a, T>, sides: (usize, usize)) -> Result<Self> {
        Self::stack(dev, w, 1, sides)
    }

    /// `count` weights as they are stored, for a CUDA device.
    pub fn stack(
        dev: &Device,
        w: View<'a, T>,
        count: usize,
        (n, k): (usize, usize),
    ) -> Result<Self> {
        if let Device::Cpu(_) = dev {
            let reason = "it reads packed weights, not rows".into();
            return Err(Error::Device { wanted: "cpu".into(), reason });
        }
        shape::check("matmul", "w", &[count, n, k], w.len())?;
        Ok(Self { data: w, count, n, k })
    }

    /// Sides of the only one.
    fn sides(&self, op: &str) -> Result<(usize, usize)> {
        match self.count {
            1 => Ok((self.n, self.k)),
            n => Err(Error::value(format!("{op}: weights"), "1", n)),
        }
    }

    /// Weights in the stack.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Weight `i` of the stack.
    ///
    /// # Panics
    /// If there is none.
    pub fn at(&self, i: usize) -> View<'a, T> {
        let each = self.data.len() / self.count;
        self.data.range(i * each..(i + 1) * each)
    }

    pub fn n(&self) -> usize {
        self.n
    }

    pub fn k(&self) -> usize {
        self.k
    }

    /// Panels, to multiply by a part of them; `[n, k]` on a CUDA device.
    pub fn view(&self) -> View<'a, T> {
        self.data
    }
}

impl<'a, T: Element> From<&'a Packed<T>> for Weight<'a, T> {
    fn from(p: &'a Packed<T>) -> Self {
        Self { data: p.data.view(), count: p.count, n: p.n, k: p.k }
    }
}

/// A [`Weight`] in memory of its own, made anew after each optimizer step: what the CPU needs.
#[derive(Debug)]
pub struct Packed<T: 'static> {
    data: Buffer<'static, T>,
    count: usize,
    n: usize,
    k: usize,
}

impl<T: Element> Packed<T> {
    /// Room for a weight of `n` outputs and `k` inputs.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is no room, [`crate::Error::Value`] if `k` is no multiple
    /// of 8 on a CUDA device.
    pub fn new(dev: &Device, n: usize, k: usize) -> Result<Self> {
        Self::stack(dev, 1, n, k)
    }

    /// Room for a stack of `count` such weights.
    pub fn stack(dev: &Device, count: usize, n: usize, k: usize) -> Result<Self> {
        if let Device::Cuda(_) = dev {
            eights("matmul", 0, k)?;
        }
        let len = count.saturating_mul(Self::len(dev, n, k));
        Ok(Self { data: Buffer::new(dev, "a packed weight", len)?, count, n, k })
    }

    fn len(dev: &Device, n: usize, k: usize) -> usize {
        match dev {
            Device::Cpu(_) => gemm::packed_len(k, n),
            Device::Cuda(_) => n.saturating_mul(k),
        }
    }

    /// Bytes that it takes.
    pub fn bytes(dev: &Device, n: usize, k: usize) -> usize {
        Self::len(dev, n, k).saturating_mul(size_of::<T>())
    }

    /// Its numbers, in the order in which they are multiplied.
    pub fn view(&self) -> View<'_, T> {
        self.data.view()
    }

    pub fn n(&self) -> usize {
        self.n
    }

    pub fn k(&self) -> usize {
        self.k
    }

    /// Copies `w` `[n, k]` in, or all of a stack.
    pub fn pack(&mut self, dev: &Device, w: View<'_, T>) -> Result<()> {
        let Self { count, n, k, .. } = *self;
        let want = [count, n, k];
        shape::check("matmul::pack", "w", &want[usize::from(count == 1)..], w.len())?;
        let _op = dev.op("matmul::pack", || Work::moves::<T>(2 * w.len()));
        match dev {
            Device::Cpu(cpu) => {
                let (to, w) = (self.data.view_mut().float()?.host(), w.float()?.host());
                let each = gemm::packed_len(k, n).max(1);
                for (to, w) in to.chunks_exact_mut(each).zip(w.chunks_exact((n * k).max(1))) {
                    gemm::pack(cpu, to, w, n, k);
                }
                Ok(())
            }
            Device::Cuda(_) => dev.copy(self.data.view_mut(), w),
        }
    }
}

/// What CUDA kernels read 16 bytes of at once.
pub(super) fn eights(op: &str, n: usize, k: usize) -> Result<()> {
    match [n, k].into_iter().find(|x| !x.is_multiple_of(8)) {
        None => Ok(()),
        Some(x) => {
            let what = format!("{op}: sides of a weight on a CUDA device");
            Err(Error::value(what, "multiples of 8", x))
        }
    }
}

/// `n`, or the next number of outputs or inputs that weights may have on `dev`.
pub fn width(dev: &Device, n: usize) -> usize {
    match dev {
        Device::Cpu(_) => n,
        Device::Cuda(_) => n.next_multiple_of(8),
    }
}

/// `y = x Wᵀ (+ bias) (+ residual)`: `x` `[m, k]`, `y` and `residual` `[m, n]`, `bias` `[n]`. `2 m
/// n k` FLOPs.
///
/// Bias and residual are added to the f32 sum, in this order; on the CPU each with one more
/// rounding.
///
/// Reads x, the weight and the residual, writes y.
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit; on a CUDA device [`crate::Error::Device`] if
/// one does not begin at a multiple of 16 bytes, or there is no kernel for its type: there are
/// those for bf16.
pub fn forward<'a, T: Element>(
    dev: &Device,
    mut y: ViewMut<'_, T>,
    x: View<'_, T>,
    w: impl Into<Weight<'a, T>>,
    bias: Option<View<'_, T>>,
    residual: Option<View<'_, T>>,
) -> Result<()> {
    let w = w.into();
    let (n, k) = w.sides("matmul")?;
    let m = shape::rows("matmul", "x", x.len(), k)?;
    shape::check("matmul", "y", &[m, n], y.len())?;
    for (name, view, want) in [("bias", &bias, &[n][..]), ("residual", &residual, &[m, n])] {
        view.as_ref().map_or(Ok(()), |v| shape::check("matmul", name, want, v.len()))?;
    }
    let _op = dev.op("matmul", || {
        let columns = n * if residual.is_some() { 2 } else { 1 };
        Work::moves::<T>(m * (k + columns) + n * k).product(m, n, k)
    });
    if let Device::Cuda(_) = dev {
        eights("matmul", n, k)?;
    }
    match dev {
        Device::Cpu(cpu) => {
            let (a, b) = (x.float()?.host(), w.view().float()?.host());
            let bias = bias.map(View::float).transpose()?.map(View::host);
            let (a, b) = (Lhs::rows(a, k), Rhs::Packed(b));
            gemm::product(
                cpu,
                y.reborrow().float()?.host(),
                n,
                Product { bias, ..Product::new((m, n, k), a, b) },
            );
            residual.map_or(Ok(()), |r| residual::add(dev, y, r))
        }
        Device::Cuda(_) if m == 0 => Ok(()),
        Device::Cuda(cuda) => {
            let w = w.view();
            let product = launch::Forward { y, x, w, bias, residual, m, n, k };
            launch::forward(cuda, TileShape::of(cuda, m, n), product)
        }
    }
}

/// An activation after a product, with or without a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epilogue {
    pub act: Activation,
    /// Whether the product's first half of columns are gates for the second: `act(gate) * partner`.
    pub gated: bool,
}

/// `up = x Wᵀ (+ bias)` and `y = act(up)`, or `act(gate) * partner` of its halves: `x` `[m, k]`,
/// `up` `[m, n]`, `y` `[m, n]` or `[m, n / 2]`. The bits are those of [`forward`] and the
/// activation in turn.
pub fn activated<'a, T: Element>(
    dev: &Device,
    epilogue: Epilogue,
    [y, mut up]: [ViewMut<'_, T>; 2],
    x: View<'_, T>,
    w: impl Into<Weight<'a, T>>,
    bias: Option<View<'_, T>>,
) -> Result<()> {
    const OP: &str = "matmul::activated";
    let w = w.into();
    let (n, k) = w.sides(OP)?;
    let m = shape::rows(OP, "x", x.len(), k)?;
    let cols = if epilogue.gated { n / 2 } else { n };
    shape::check(OP, "up", &[m, n], up.len())?;
    shape::check(OP, "y", &[m, cols], y.len())?;
    bias.as_ref().map_or(Ok(()), |b| shape::check(OP, "bias", &[n], b.len()))?;
    let _op = dev.op(OP, || Work::moves::<T>(m * (k + n + cols) + n * k).product(m, n, k));
    match dev {
        Device::Cpu(_) => {
            forward(dev, up.reborrow(), x, w, bias, None)?;
            match epilogue.gated {
                true => activation::gated_forward(dev, epilogue.act, y, up.view(), cols),
                false => activation::forward(dev, epilogue.act, y, up.view()),
            }
        }
        Device::Cuda(_) if m == 0 => Ok(()),
        Device::Cuda(cuda) => {
            eights(OP, cols, k)?;
            let (w, act) = (w.view(), epilogue.act as usize);
            let product = launch::Activated { y, up, x, w, bias, m, n: cols, k, act };
            launch::activated(cuda, TileShape::of(cuda, m, n), epilogue.gated, product)
        }
    }
}

/// `dx = dy W`: `dy` `[m, n]`, `w` `[n, k]`, `dx` `[m, k]`. `2 m n k` FLOPs.
///
/// Reads dy and w, writes dx.
pub fn backward_input<T: Element>(
    dev: &Device,
    dx: ViewMut<'_, T>,
    dy: View<'_, T>,
    w: View<'_, T>,
    (n, k): (usize, usize),
) -> Result<()> {
    const OP: &str = "matmul::backward_input";
    let m = shape::rows(OP, "dy", dy.len(), n)?;
    shape::check(OP, "w", &[n, k], w.len())?;
    shape::check(OP, "dx", &[m, k], dx.len())?;
    let _op = dev.op(OP, || Work::moves::<T>(m * (n + k) + n * k).product(m, n, k));
    match dev {
        Device::Cpu(cpu) => {
            let (dx, dy, w) = (dx.float()?.host(), dy.float()?.host(), w.float()?.host());
            let (a, b) = (Lhs::rows(dy, n), Rhs::Rows { data: w, ld: k });
            gemm::product(cpu, dx, k, Product::new((m, k, n), a, b));
            Ok(())
        }
        Device::Cuda(_) if m == 0 => Ok(()),
        Device::Cuda(cuda) => {
            eights(OP, n, k)?;
            let product = launch::BackwardInput { dx, dy, w, m, n, k };
            launch::backward_input(cuda, TileShape::of_backward(cuda, m, k), product)
        }
    }
}

/// `dw += dyᵀ x` and `dbias += sum_rows dy`: `dy` `[m, n]`, `x` `[m, k]`, `dw` `[n, k]`, `dbias`
/// `[n]`. The sums run over rows in ascending order, on the CPU continuing from what is there.
///
/// Reads dy and x, reads and writes dw.
pub fn backward_weight<T: Element>(
    dev: &Device,
    dw: ViewMut<'_, T::Acc>,
    dbias: Option<ViewMut<'_, T::Acc>>,
    dy: View<'_, T>,
    x: View<'_, T>,
    (n, k): (usize, usize),
) -> Result<()> {
    const OP: &str = "matmul::backward_weight";
    let m = shape::rows(OP, "dy", dy.len(), n)?;
    shape::check(OP, "x", &[m, k], x.len())?;
    shape::check(OP, "dw", &[n, k], dw.len())?;
    if let Some(dbias) = &dbias {
        shape::check(OP, "dbias", &[n], dbias.len())?;
    }
    let _op = dev.op(OP, || {
        Work::moves::<T>(m * (n + k)).and(Work::moves::<T::Acc>(2 * n * k)).product(m, n, k)
    });
    match dev {
        Device::Cpu(cpu) => {
            let (dw, dy, x) = (dw.host(), dy.float()?.host(), x.float()?.host());
            let (a, b) = (Lhs::columns(dy, n), Rhs::Rows { data: x, ld: k });
            gemm::product(cpu, dw, k, Product::new((n, k, m), a, b).continuing(true));
            if let Some(dbias) = dbias {
                cpu.rows(n, 64, (dbias.host(), 1), |range, dbias| {
                    for r in 0..m {
                        add_row(cpu.isa(), dbias, &dy[r * n..][range.clone()]);
                    }
                });
            }
            Ok(())
        }
        Device::Cuda(_) if m == 0 => Ok(()),
        Device::Cuda(cuda) => {
            eights(OP, n, k)?;
            let product = launch::BackwardWeight { dw, dbias, dy, x, m, n, k };
            launch::backward_weight(cuda, TileShape::of_backward(cuda, n, k), product)
        }
    }
}

simd! {
    fn add_row[F: Float](sum: &mut [F], row: &[F]) {
        for (sum, x) in sum.iter_mut().zip(row) {
            *sum += *x;
        }
    }
}
