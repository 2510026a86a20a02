//! Matrix products of a linear layer: `y = x Wᵀ + b` and its two gradients.
//!
//! Every output element is one chain of fused multiply-adds over the reduced axis in ascending
//! order (see [`crate::device::cpu::gemm`]), so a row of `y` has the same bits whatever the number
//! of rows, threads, or the instruction set; and a weight gradient has the same bits however its
//! rows are split into micro-batches.

use crate::{
    device::{
        Buffer, Device, Float, View, ViewMut,
        cpu::gemm::{self, Lhs, Rhs},
    },
    error::Result,
    shape, simd,
};

/// A weight `[n, k]` packed for [`forward`]: once for each optimizer step.
#[derive(Debug)]
pub struct Packed<F: 'static> {
    panels: Buffer<'static, F>,
    n: usize,
    k: usize,
}

impl<F: Float> Packed<F> {
    /// Room for a weight of `n` outputs and `k` inputs.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is no room.
    pub fn new(dev: &Device, n: usize, k: usize) -> Result<Self> {
        let panels = Buffer::new(dev, "a packed weight", gemm::packed_len(k, n))?;
        Ok(Self { panels, n, k })
    }

    /// Outputs.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// The panels, to multiply by a part of them.
    #[must_use]
    pub fn panels(&self) -> View<'_, F> {
        self.panels.view()
    }

    /// Copies `w` `[n, k]` in.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `w` is not `n * k` long.
    pub fn pack(&mut self, dev: &Device, w: View<'_, F>) -> Result<()> {
        let cpu = dev.on_cpu("matmul::pack")?;
        shape::check("matmul::pack", "w", &[self.n, self.k], w.len())?;
        gemm::pack(cpu, self.panels.host_mut(), w.host(), self.n, self.k);
        Ok(())
    }
}

/// `y = x Wᵀ (+ bias)`: `x` `[m, k]`, `y` `[m, n]`, `bias` `[n]`. `2 m n k` FLOPs.
///
/// The bias is added after the chain, with one more rounding.
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit.
pub fn forward<F: Float>(
    dev: &Device,
    y: ViewMut<'_, F>,
    x: View<'_, F>,
    w: &Packed<F>,
    bias: Option<View<'_, F>>,
) -> Result<()> {
    let cpu = dev.on_cpu("matmul")?;
    let (n, k) = (w.n, w.k);
    let m = shape::rows("matmul", "x", x.len(), k)?;
    shape::check("matmul", "y", &[m, n], y.len())?;
    if let Some(bias) = bias {
        shape::check("matmul", "bias", &[n], bias.len())?;
    }
    let (a, b) = (Lhs::rows(x.host(), k), Rhs::Packed(w.panels.host()));
    gemm::product(cpu, y.host(), n, (m, n, k), a, b, false, bias.map(View::host));
    Ok(())
}

/// `dx (+)= dy W`: `dy` `[m, n]`, `w` `[n, k]`, `dx` `[m, k]`; `add` adds to what `dx` holds.
/// `2 m n k` FLOPs.
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit.
pub fn backward_input<F: Float>(
    dev: &Device,
    dx: ViewMut<'_, F>,
    dy: View<'_, F>,
    w: View<'_, F>,
    (n, k): (usize, usize),
    add: bool,
) -> Result<()> {
    let cpu = dev.on_cpu("matmul::backward_input")?;
    let m = shape::rows("matmul::backward_input", "dy", dy.len(), n)?;
    shape::check("matmul::backward_input", "w", &[n, k], w.len())?;
    shape::check("matmul::backward_input", "dx", &[m, k], dx.len())?;
    let (a, b) = (Lhs::rows(dy.host(), n), Rhs::Rows { data: w.host(), ld: k });
    gemm::product(cpu, dx.host(), k, (m, k, n), a, b, add, None);
    Ok(())
}

/// `dw += dyᵀ x` and `dbias += sum_rows dy`: `dy` `[m, n]`, `x` `[m, k]`, `dw` `[n, k]`,
/// `dbias` `[n]`. The sums run over rows in ascending order, continuing from what is there.
///
/// # Errors
/// [`crate::Error::Shape`] if a buffer does not fit.
pub fn backward_weight<F: Float>(
    dev: &Device,
    dw: ViewMut<'_, F>,
    dbias: Option<ViewMut<'_, F>>,
    dy: View<'_, F>,
    x: View<'_, F>,
    (n, k): (usize, usize),
) -> Result<()> {
    let cpu = dev.on_cpu("matmul::backward_weight")?;
    let m = shape::rows("matmul::backward_weight", "dy", dy.len(), n)?;
    shape::check("matmul::backward_weight", "x", &[m, k], x.len())?;
    shape::check("matmul::backward_weight", "dw", &[n, k], dw.len())?;
    if let Some(dbias) = &dbias {
        shape::check("matmul::backward_weight", "dbias", &[n], dbias.len())?;
    }
    let (dy, x) = (dy.host(), x.host());
    let (a, b) = (Lhs::columns(dy, n), Rhs::Rows { data: x, ld: k });
    gemm::product(cpu, dw.host(), k, (n, k, m), a, b, true, None);
    if let Some(dbias) = dbias {
        cpu.rows(n, 64, (dbias.host(), 1), |range, dbias| {
            for r in 0..m {
                add_row(cpu.isa(), dbias, &dy[r * n..][range.clone()]);
            }
        });
    }
    Ok(())
}

simd! {
    fn add_row[F: Float](sum: &mut [F], row: &[F]) {
        for (sum, x) in sum.iter_mut().zip(row) {
            *sum += *x;
        }
    }
}
