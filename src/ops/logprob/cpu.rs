//! The LM head on the CPU: tiles of rows visit the vocabulary chunk by chunk.

use super::{CHUNK, Forward, LmHead, LogitSettings, OutputRows, Outputs, Slopes, width};
use crate::{
    device::{
        Element, Float, View, ViewMut,
        cpu::{
            Cpu, Isa,
            gemm::{self, Lhs, Product, Rhs},
            math::{self, LANES},
        },
    },
    error::Result,
    simd,
};

/// Rows of a forward tile: its logits of one chunk stay in the cache.
pub(super) const TILE: usize = 48;

/// The head as tiles of rows read it.
pub(super) struct LogitTiles<'a, F> {
    isa: Isa,
    panels: &'a [F],
    vocab: usize,
    d: usize,
    settings: LogitSettings<F>,
}

impl<'a, F: Float> LogitTiles<'a, F> {
    pub(super) fn new<T: Element<Acc = F>>(cpu: &Cpu, head: LmHead<'a, T>) -> Result<Self> {
        let (isa, panels) = (cpu.isa(), head.w.view().float()?.host());
        Ok(Self { isa, panels, vocab: head.w.n(), d: head.w.k(), settings: head.settings })
    }

    /// Makes the logits of `m` rows of `h`, at most [`TILE`], in `z`, a chunk at a time, and shows
    /// each row's with its first column.
    pub(super) fn visit(
        &self,
        h: &[F],
        m: usize,
        z: &mut [F],
        mut each: impl FnMut(usize, usize, &[F]),
    ) {
        let width = width(self.vocab);
        for v0 in (0..self.vocab).step_by(CHUNK) {
            let n = CHUNK.min(self.vocab - v0);
            let a = Lhs::rows(h, self.d);
            let b = Rhs::Packed(&self.panels[v0 * self.d..][..gemm::packed_len(self.d, n)]);
            gemm::serial(self.isa, z, width, Product::new((m, n, self.d), a, b));
            for (r, z) in z.chunks_exact_mut(width).take(m).enumerate() {
                bend(self.isa, &mut z[..n], self.settings);
                each(r, v0, &z[..n]);
            }
        }
    }
}

pub(super) fn forward<T: Element>(
    cpu: &Cpu,
    out: Outputs<'_, T::Acc>,
    h: View<'_, T>,
    head: LmHead<'_, T>,
    targets: View<'_, u32>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (h, targets) = (h.float()?.host(), targets.host());
    let (tiles, d, scale) = (LogitTiles::new(cpu, head)?, head.w.k(), head.settings.scale());
    let (rows, width) = (targets.len(), width(head.w.n()));
    let scratch = &mut scratch.host()[..rows * width];
    cpu.rows(rows, 12, (out.host(), (scratch, width)), |range, (mut out, z)| {
        for t0 in (0..range.len()).step_by(TILE) {
            let (m, first) = (TILE.min(range.len() - t0), range.start + t0);
            let mut state = [Online::EMPTY; TILE];
            tiles.visit(&h[first * d..], m, &mut z[t0 * width..], |r, v0, z| {
                let target = (targets[first + r] as usize).checked_sub(v0);
                state[r].visit(cpu.isa(), z, scale, target);
            });
            state[..m].iter().enumerate().for_each(|(r, s)| s.finish(&mut out, t0 + r));
        }
    });
    Ok(())
}

pub(super) fn from_logits<F: Float>(
    cpu: &Cpu,
    out: OutputRows<'_, F>,
    logits: &[F],
    targets: &[u32],
    settings: LogitSettings<F>,
) {
    let (rows, scale) = (targets.len(), settings.scale());
    let vocab = logits.len().checked_div(rows).unwrap_or(0);
    cpu.rows(rows, 1, out, |range, mut out| {
        for (i, r) in range.enumerate() {
            let mut state = Online::EMPTY;
            for (c, x) in logits[r * vocab..][..vocab].chunks(CHUNK).enumerate() {
                let target = (targets[r] as usize).checked_sub(c * CHUNK);
                if settings.softcap.is_none() {
                    state.visit(cpu.isa(), x, scale, target);
                    continue;
                }
                let mut z = [F::ZERO; CHUNK];
                let z = &mut z[..x.len()];
                z.copy_from_slice(x);
                bend(cpu.isa(), z, settings);
                state.visit(cpu.isa(), z, scale, target);
            }
            state.finish(&mut out, i);
        }
    });
}

pub(super) fn backward<T: Element>(
    cpu: &Cpu,
    dh: ViewMut<'_, T>,
    dw: Option<ViewMut<'_, T::Acc>>,
    slopes: Slopes<'_, T::Acc>,
    f: Forward<'_, T>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (rows, vocab, d) = (f.targets.len(), f.head.w.n(), f.head.w.k());
    let (dh, mut dw, dlogp) = (dh.float()?.host(), dw.map(ViewMut::host), slopes.dlogp.host());
    let dentropy = slopes.dentropy.map(View::host).zip(f.entropy.map(View::host));
    let (h, w) = (f.h.float()?.host(), f.w.float()?.host());
    let (targets, lse) = (f.targets.host(), f.lse.host());
    let (panels, width) = (f.head.w.view().float()?.host(), width(vocab));
    let dz = &mut scratch.host()[..rows * width];
    let (scale, inverse) = (f.head.settings.scale(), f.head.settings.inverse());
    let zero = T::Acc::ZERO;
    for v0 in (0..vocab).step_by(CHUNK) {
        let n = CHUNK.min(vocab - v0);
        let b = Rhs::Packed(&panels[v0 * d..][..gemm::packed_len(d, n)]);
        gemm::product(cpu, dz, width, Product::new((rows, n, d), Lhs::rows(h, d), b));
        cpu.rows(rows, 4, (&mut *dz, width), |range, dz| {
            for (dz, r) in dz.chunks_exact_mut(width).zip(range) {
                let dz = &mut dz[..n];
                bend(cpu.isa(), dz, f.head.settings);
                let (dentropy, entropy) = dentropy.map_or((zero, zero), |(d, e)| (d[r], e[r]));
                let row = RowSlopes { lse: lse[r], entropy, dlogp: dlogp[r], dentropy };
                let target = (targets[r] as usize).checked_sub(v0).filter(|t| *t < n);
                let own = target.map(|t| dlogp[r] * scale * slope(dz[t] * inverse));
                logit_gradient(cpu.isa(), dz, scale, inverse, &row);
                if let Some((t, own)) = target.zip(own) {
                    dz[t] += own;
                }
            }
        });
        let rhs = Rhs::Rows { data: &w[v0 * d..], ld: d };
        gemm::product(
            cpu,
            dh,
            d,
            Product::new((rows, d, n), Lhs::rows(dz, width), rhs).continuing(v0 > 0),
        );
        if let Some(dw) = &mut dw {
            let (a, b) = (Lhs::columns(dz, width), Rhs::Rows { data: h, ld: d });
            gemm::product(
                cpu,
                &mut dw[v0 * d..(v0 + n) * d],
                d,
                Product::new((n, d, rows), a, b).continuing(true),
            );
        }
    }
    Ok(())
}

/// What the gradient of a row's logits is made of.
struct RowSlopes<F> {
    lse: F,
    entropy: F,
    dlogp: F,
    dentropy: F,
}

/// The parts of [`OutputRows`] that a task gets.
type ChunkSlices<'a, F> = (&'a mut [F], &'a mut [F], Option<&'a mut [F]>);

/// Running log-sum-exp of a row.
#[derive(Clone, Copy)]
pub(super) struct Online<F> {
    top: F,
    /// sum of e^(z - top)
    sum: F,
    /// sum of e^(z - top) (z - top): relative, or large logits would cancel in the entropy
    weighted: F,
    target: F,
}

impl<F: Float> Online<F> {
    pub(super) const EMPTY: Self =
        Self { top: F::NEG_INFINITY, sum: F::ZERO, weighted: F::ZERO, target: F::ZERO };

    /// Adds a chunk of raw logits; `target` is the row's target relative to the chunk.
    pub(super) fn visit(&mut self, isa: Isa, raw: &[F], scale: F, target: Option<usize>) {
        if let Some(z) = target.and_then(|t| raw.get(t)) {
            self.target = *z * scale;
        }
        merge(isa, self, raw, scale);
    }

    pub(super) fn lse(&self) -> F {
        self.top + self.sum.ln()
    }

    pub(super) fn finish(&self, (logp, lse, entropy): &mut ChunkSlices<'_, F>, row: usize) {
        lse[row] = self.lse();
        logp[row] = self.target - lse[row];
        if let Some(entropy) = entropy {
            entropy[row] = self.sum.ln() - self.weighted / self.sum;
        }
    }
}

/// `cap tanh(x / cap)`, if there is a cap.
pub(super) fn bend<F: Float>(isa: Isa, x: &mut [F], settings: LogitSettings<F>) {
    if let Some(cap) = settings.softcap {
        bend_by(isa, x, cap, settings.inverse());
    }
}

simd! {
    fn bend_by[F: Float](x: &mut [F], cap: F, inverse: F) {
        for x in x.iter_mut() {
            *x = (*x * inverse).tanh() * cap;
        }
    }

    fn merge[F: Float](state: &mut Online<F>, raw: &[F], scale: F) {
        // Rounding is monotonic: the maximum of the products is the product of the maximum.
        let top = state.top.max_nan(math::max(raw) * scale);
        let (mut sum, mut weighted) = ([F::ZERO; LANES], [F::ZERO; LANES]);
        let mut chunks = raw.chunks_exact(LANES);
        for raw in &mut chunks {
            for l in 0..LANES {
                let z = raw[l] * scale - top;
                let e = z.exp();
                sum[l] += e;
                weighted[l] = e.mul_add(z, weighted[l]);
            }
        }
        for (l, raw) in chunks.remainder().iter().enumerate() {
            let z = *raw * scale - top;
            let e = z.exp();
            sum[l] += e;
            weighted[l] = e.mul_add(z, weighted[l]);
        }
        let first = state.top == F::NEG_INFINITY;
        let moved = if first { F::ZERO } else { state.top - top };
        let keep = if first { F::ZERO } else { moved.exp() };
        state.weighted = state.sum.mul_add(moved, state.weighted);
        state.weighted = state.weighted.mul_add(keep, math::tree(weighted));
        state.sum = state.sum.mul_add(keep, math::tree(sum));
        state.top = top;
    }

    /// All of dx but the target's own `dlogp`, from what a cap made of x.
    fn logit_gradient[F: Float](x: &mut [F], scale: F, inverse: F, row: &RowSlopes<F>) {
        let RowSlopes { lse, entropy, dlogp, dentropy } = *row;
        for x in x.iter_mut() {
            let z = *x * scale - lse;
            let p = z.exp();
            *x = -p * scale * (dlogp + dentropy * (z + entropy)) * slope(*x * inverse);
        }
    }
}

/// `1 - tanh^2`: the slope of a cap, 1 where there is none.
#[inline(always)]
fn slope<F: Float>(tanh: F) -> F {
    (F::ONE - tanh) * (F::ONE + tanh)
}
