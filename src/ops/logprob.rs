//! The LM head fused with log-prob gathering: the logits of all tokens are never held.
//!
//! `z = h Wᵀ / temperature`, `lse = log sum_v e^z_v`, `logp = z_target - lse`,
//! `entropy = -sum_v p_v log p_v`, `p = e^(z - lse)`.
//!
//! The vocabulary is visited in chunks of [`CHUNK`] from column 0, merged online (Milakov and
//! Gimelshein 2018); chunks, lanes and merge order depend on nothing but the vocabulary. So a
//! token's log-prob has the same bits in training, in scoring, and when it is sampled.

use crate::{
    device::{
        Device, Float, View, ViewMut,
        cpu::{
            Isa,
            gemm::{self, Lhs, NR, Rhs},
            math::{self, LANES},
        },
    },
    error::{Error, Result},
    ops::matmul::Packed,
    shape, simd,
};

/// Columns of the vocabulary that are visited together.
pub const CHUNK: usize = 1024;

/// Rows of a forward tile: its logits of one chunk stay in the cache.
const TILE: usize = 48;

/// Elements of scratch that [`forward`] and [`backward`] need.
#[must_use]
pub fn scratch_len(rows: usize, vocab: usize) -> usize {
    rows * CHUNK.min(vocab.next_multiple_of(NR))
}

fn check<F: Float>(op: &'static str, targets: &[u32], vocab: usize, temperature: F) -> Result<()> {
    if !(temperature > F::ZERO && temperature.is_finite()) {
        return Err(Error::value(format!("{op}: temperature"), "a positive number", temperature));
    }
    match targets.iter().position(|t| *t as usize >= vocab) {
        None => Ok(()),
        Some(r) => {
            let what = format!("{op}: target of row {r}");
            Err(Error::value(what, format!("less than {vocab}"), targets[r]))
        }
    }
}

/// Writes `logp` and `lse` `[rows]`, and `entropy` `[rows]` in nats if given, from hidden states `h`
/// `[rows, d]`, the packed head `w` `[vocab, d]` and `targets` `[rows]`. `2 rows vocab d` FLOPs.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] for a target beyond the vocabulary
/// or a temperature that is not positive.
#[allow(clippy::too_many_arguments)]
pub fn forward<F: Float>(
    dev: &Device,
    logp: ViewMut<'_, F>,
    lse: ViewMut<'_, F>,
    entropy: Option<ViewMut<'_, F>>,
    h: View<'_, F>,
    w: &Packed<F>,
    targets: View<'_, u32>,
    temperature: F,
    scratch: ViewMut<'_, F>,
) -> Result<()> {
    const OP: &str = "logprob";
    let cpu = dev.on_cpu(OP)?;
    let (rows, vocab, d) = (targets.len(), w.n(), w.k());
    shape::check(OP, "h", &[rows, d], h.len())?;
    let targets = targets.host();
    check(OP, targets, vocab, temperature)?;
    let out = Outputs::new(OP, logp, lse, entropy, rows)?;
    let (h, panels, width) = (h.host(), w.view().host(), scratch_len(1, vocab));
    let scratch = room(OP, scratch, rows * width)?;
    let scale = F::ONE / temperature;
    cpu.rows(rows, 12, (out.rows(), (scratch, width)), |range, (mut out, z)| {
        for t0 in (0..range.len()).step_by(TILE) {
            let (m, first) = (TILE.min(range.len() - t0), range.start + t0);
            let mut state = [Online::EMPTY; TILE];
            for v0 in (0..vocab).step_by(CHUNK) {
                let n = CHUNK.min(vocab - v0);
                let z = &mut z[t0 * width..(t0 + m) * width];
                let a = Lhs::rows(&h[first * d..], d);
                let b = Rhs::Packed(&panels[v0 * d..][..gemm::packed_len(d, n)]);
                gemm::serial(cpu.isa(), z, width, (m, n, d), a, b, false);
                for (r, state) in state.iter_mut().enumerate().take(m) {
                    let target = (targets[first + r] as usize).checked_sub(v0);
                    state.visit(cpu.isa(), &z[r * width..][..n], scale, target);
                }
            }
            state[..m].iter().enumerate().for_each(|(r, s)| s.finish(&mut out, t0 + r));
        }
    });
    Ok(())
}

/// [`forward`] from logits `h Wᵀ` `[rows, vocab]` that [`super::matmul::forward`] made: the same
/// bits.
///
/// # Errors
/// As [`forward`].
pub fn from_logits<F: Float>(
    dev: &Device,
    logp: ViewMut<'_, F>,
    lse: ViewMut<'_, F>,
    entropy: Option<ViewMut<'_, F>>,
    logits: View<'_, F>,
    targets: View<'_, u32>,
    temperature: F,
) -> Result<()> {
    const OP: &str = "logprob::from_logits";
    let cpu = dev.on_cpu(OP)?;
    let rows = targets.len();
    let vocab = logits.len().checked_div(rows).unwrap_or(0);
    shape::check(OP, "logits", &[rows, vocab], logits.len())?;
    let (targets, logits) = (targets.host(), logits.host());
    check(OP, targets, vocab, temperature)?;
    let out = Outputs::new(OP, logp, lse, entropy, rows)?;
    let scale = F::ONE / temperature;
    cpu.rows(rows, 1, out.rows(), |range, mut out| {
        for (i, r) in range.enumerate() {
            let mut state = Online::EMPTY;
            for (c, z) in logits[r * vocab..][..vocab].chunks(CHUNK).enumerate() {
                let target = (targets[r] as usize).checked_sub(c * CHUNK);
                state.visit(cpu.isa(), z, scale, target);
            }
            state.finish(&mut out, i);
        }
    });
    Ok(())
}

/// What [`backward`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a, F: 'static> {
    /// Hidden states `[rows, d]`.
    pub h: View<'a, F>,
    /// The head, packed.
    pub packed: &'a Packed<F>,
    /// The head `[vocab, d]`.
    pub w: View<'a, F>,
    /// `[rows]`
    pub targets: View<'a, u32>,
    /// As [`forward`] wrote it, `[rows]`.
    pub lse: View<'a, F>,
    /// As [`forward`] wrote it, `[rows]`; read with `dentropy`.
    pub entropy: Option<View<'a, F>>,
    /// As given to [`forward`].
    pub temperature: F,
}

/// Writes `dh` `[rows, d]` and adds to `dw` `[vocab, d]`, if given, from `dlogp` and `dentropy`
/// `[rows]`. Logits are recomputed chunk by chunk: `6 rows vocab d` FLOPs.
///
/// `dz_v = (dlogp (1{v = target} - p_v) - dentropy p_v (z_v - lse + entropy)) / temperature`
///
/// Each element of `dw` is one chain over rows in ascending order, each of `dh` one over the
/// vocabulary.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] as [`forward`], or if `dentropy`
/// comes without `entropy`.
pub fn backward<F: Float>(
    dev: &Device,
    dh: ViewMut<'_, F>,
    dw: Option<ViewMut<'_, F>>,
    dlogp: View<'_, F>,
    dentropy: Option<View<'_, F>>,
    f: Forward<'_, F>,
    scratch: ViewMut<'_, F>,
) -> Result<()> {
    const OP: &str = "logprob::backward";
    let cpu = dev.on_cpu(OP)?;
    let (rows, vocab, d) = (f.targets.len(), f.packed.n(), f.packed.k());
    shape::check(OP, "h", &[rows, d], f.h.len())?;
    shape::check(OP, "dh", &[rows, d], dh.len())?;
    shape::check(OP, "w", &[vocab, d], f.w.len())?;
    shape::check(OP, "dlogp", &[rows], dlogp.len())?;
    shape::check(OP, "lse", &[rows], f.lse.len())?;
    if let Some(dw) = &dw {
        shape::check(OP, "dw", &[vocab, d], dw.len())?;
    }
    let dentropy = match (dentropy, f.entropy) {
        (None, _) => None,
        (Some(_), None) => return Err(Error::value(OP, "entropy with dentropy", "none")),
        (Some(dentropy), Some(entropy)) => {
            shape::check(OP, "dentropy", &[rows], dentropy.len())?;
            shape::check(OP, "entropy", &[rows], entropy.len())?;
            Some((dentropy.host(), entropy.host()))
        }
    };
    let (dh, mut dw, dlogp) = (dh.host(), dw.map(ViewMut::host), dlogp.host());
    let (h, w, targets, lse) = (f.h.host(), f.w.host(), f.targets.host(), f.lse.host());
    check(OP, targets, vocab, f.temperature)?;
    let (panels, width) = (f.packed.view().host(), scratch_len(1, vocab));
    let dz = room(OP, scratch, rows * width)?;
    let scale = F::ONE / f.temperature;
    for v0 in (0..vocab).step_by(CHUNK) {
        let n = CHUNK.min(vocab - v0);
        let b = Rhs::Packed(&panels[v0 * d..][..gemm::packed_len(d, n)]);
        gemm::product(cpu, dz, width, (rows, n, d), Lhs::rows(h, d), b, false, None);
        cpu.rows(rows, 4, (&mut *dz, width), |range, dz| {
            for (dz, r) in dz.chunks_exact_mut(width).zip(range) {
                let dz = &mut dz[..n];
                let (dent, ent) = dentropy.map_or((F::ZERO, F::ZERO), |(d, e)| (d[r], e[r]));
                logit_gradient(cpu.isa(), dz, scale, lse[r], dlogp[r], dent, ent);
                let target = (targets[r] as usize).checked_sub(v0);
                if let Some(z) = target.and_then(|t| dz.get_mut(t)) {
                    *z += dlogp[r] * scale;
                }
            }
        });
        let rhs = Rhs::Rows { data: &w[v0 * d..], ld: d };
        gemm::product(cpu, dh, d, (rows, d, n), Lhs::rows(dz, width), rhs, v0 > 0, None);
        if let Some(dw) = &mut dw {
            let (a, b) = (Lhs::columns(dz, width), Rhs::Rows { data: h, ld: d });
            gemm::product(cpu, &mut dw[v0 * d..(v0 + n) * d], d, (n, d, rows), a, b, true, None);
        }
    }
    Ok(())
}

fn room<'a, F: Float>(
    op: &'static str,
    scratch: ViewMut<'a, F>,
    need: usize,
) -> Result<&'a mut [F]> {
    if scratch.len() < need {
        return Err(Error::shape(op, "scratch", &[need], &[scratch.len()]));
    }
    Ok(&mut scratch.host()[..need])
}

/// Per-row outputs, whole or a task's part of them.
struct Outputs<'a, F> {
    logp: &'a mut [F],
    lse: &'a mut [F],
    entropy: Option<&'a mut [F]>,
}

/// [`Outputs`] as rows of one element.
type OutputRows<'a, F> = ((&'a mut [F], usize), (&'a mut [F], usize), Option<(&'a mut [F], usize)>);

impl<'a, F: Float> Outputs<'a, F> {
    fn new(
        op: &'static str,
        logp: ViewMut<'a, F>,
        lse: ViewMut<'a, F>,
        entropy: Option<ViewMut<'a, F>>,
        rows: usize,
    ) -> Result<Self> {
        shape::check(op, "logp", &[rows], logp.len())?;
        shape::check(op, "lse", &[rows], lse.len())?;
        if let Some(entropy) = &entropy {
            shape::check(op, "entropy", &[rows], entropy.len())?;
        }
        let entropy = entropy.map(ViewMut::host);
        Ok(Self { logp: logp.host(), lse: lse.host(), entropy })
    }

    fn rows(self) -> OutputRows<'a, F> {
        ((self.logp, 1), (self.lse, 1), self.entropy.map(|e| (e, 1)))
    }
}

/// The parts of [`OutputRows`] that a task gets.
type Parts<'a, F> = (&'a mut [F], &'a mut [F], Option<&'a mut [F]>);

/// Running log-sum-exp of a row.
#[derive(Clone, Copy)]
struct Online<F> {
    top: F,
    /// sum of e^(z - top)
    sum: F,
    /// sum of e^(z - top) (z - top): relative, or large logits would cancel in the entropy
    weighted: F,
    target: F,
}

impl<F: Float> Online<F> {
    const EMPTY: Self =
        Self { top: F::NEG_INFINITY, sum: F::ZERO, weighted: F::ZERO, target: F::ZERO };

    /// Adds a chunk of raw logits; `target` is the row's target relative to the chunk.
    fn visit(&mut self, isa: Isa, raw: &[F], scale: F, target: Option<usize>) {
        if let Some(z) = target.and_then(|t| raw.get(t)) {
            self.target = *z * scale;
        }
        merge(isa, self, raw, scale);
    }

    fn finish(&self, (logp, lse, entropy): &mut Parts<'_, F>, row: usize) {
        lse[row] = self.top + self.sum.ln();
        logp[row] = self.target - lse[row];
        if let Some(entropy) = entropy {
            entropy[row] = self.sum.ln() - self.weighted / self.sum;
        }
    }
}

simd! {
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

    /// All of dz but the target's own `dlogp`.
    fn logit_gradient[F: Float](
        z: &mut [F], scale: F, lse: F, dlogp: F, dentropy: F, entropy: F,
    ) {
        for z in z.iter_mut() {
            let x = *z * scale - lse;
            let p = x.exp();
            *z = -p * scale * (dlogp + dentropy * (x + entropy));
        }
    }
}
