//! The LM head fused with log-prob gathering: the logits of all tokens are never held.
//!
//! `x = h Wᵀ`, `z = cap tanh(x / cap) / temperature`, or `x / temperature` without a cap,
//! `lse = log sum_v e^z_v`, `logp = z_target - lse`, `entropy = -sum_v p_v log p_v`,
//! `p = e^(z - lse)`.
//!
//! The vocabulary is visited in chunks of [`CHUNK`] from column 0, merged online (Milakov and
//! Gimelshein 2018); chunks, lanes and merge order depend on nothing but the vocabulary. So a
//! token's log-prob has the same bits in training, in scoring, and when it is sampled.

mod hopper;
mod sample;

pub use sample::{Draws, Sampled, Top, sample, sample_scratch_len};

use std::ops::Range;

use crate::{
    device::{
        Cuda, Device, Element, Float, View, ViewMut, Work,
        cpu::{
            Cpu, Isa,
            gemm::{self, Lhs, NR, Rhs},
            math::{self, LANES},
        },
        cuda::{Launch, kernels::logprob as kernel},
    },
    error::{Error, Result},
    ops::matmul::{self, Weight},
    shape, simd,
};

/// Columns of the vocabulary that are visited together.
pub const CHUNK: usize = 1024;

/// Rows of a forward tile: its logits of one chunk stay in the cache.
const TILE: usize = 48;

/// Rows that [`forward`] takes at a time.
const WAVE: usize = 16_384;

/// How logits are made of the products `h Wᵀ`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings<F> {
    /// Divides them.
    pub temperature: F,
    /// Bounds them before: `cap tanh(x / cap)`.
    pub softcap: Option<F>,
}

impl<F: Float> Default for Settings<F> {
    /// The products themselves.
    fn default() -> Self {
        Self::at(F::ONE)
    }
}

impl<F: Float> Settings<F> {
    /// Without a cap.
    #[must_use]
    pub fn at(temperature: F) -> Self {
        Self { temperature, softcap: None }
    }

    fn validate(&self, op: &str) -> Result<()> {
        let numbers =
            [("temperature", Some(self.temperature)), ("soft-cap of logits", self.softcap)];
        for (name, x) in numbers.into_iter().filter_map(|(name, x)| Some((name, x?))) {
            if !(x > F::ZERO && x.is_finite()) {
                return Err(Error::value(format!("{op}: {name}"), "a positive number", x));
            }
        }
        Ok(())
    }

    fn scale(&self) -> F {
        F::ONE / self.temperature
    }

    /// As kernels take it: 0 is none.
    fn cap(&self) -> F {
        self.softcap.unwrap_or(F::ZERO)
    }

    /// `1 / cap`, 0 without one.
    fn inverse(&self) -> F {
        self.softcap.map_or(F::ZERO, |cap| F::ONE / cap)
    }
}

/// Elements of scratch that [`forward`] needs: on the CPU a chunk of logits a row, on a CUDA device
/// four numbers a row and chunk.
#[must_use]
pub fn scratch_len(rows: usize, vocab: usize) -> usize {
    rows.min(WAVE) * width(vocab).max(PARTIAL * vocab.div_ceil(CHUNK))
}

/// Numbers that a kernel writes of a row and chunk.
const PARTIAL: usize = 4;

/// Logits of a row that the CPU holds.
fn width(vocab: usize) -> usize {
    CHUNK.min(vocab.next_multiple_of(NR))
}

fn check_targets(op: &str, targets: &[u32], vocab: usize) -> Result<()> {
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
/// Reads h and the head.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] for a temperature or a cap that is not
/// positive, or a target beyond the vocabulary; on a CUDA device its log-prob becomes NaN instead. There
/// [`Error::Device`] as [`super::matmul::forward`].
#[allow(clippy::too_many_arguments)]
pub fn forward<'a, T: Element>(
    dev: &Device,
    logp: ViewMut<'_, T::Acc>,
    lse: ViewMut<'_, T::Acc>,
    entropy: Option<ViewMut<'_, T::Acc>>,
    h: View<'_, T>,
    w: impl Into<Weight<'a, T>>,
    targets: View<'_, u32>,
    settings: Settings<T::Acc>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "logprob";
    let w = w.into();
    let (rows, vocab, d) = (targets.len(), w.n(), w.k());
    shape::check(OP, "h", &[rows, d], h.len())?;
    settings.validate(OP)?;
    let _op = dev.op(OP, || Work::moves::<T>((rows + vocab) * d).product(rows, vocab, d));
    let mut out = Outputs::new(OP, logp, lse, entropy, rows)?;
    let mut scratch = scratch.scratch(OP, scratch_len(rows, vocab))?;
    if let Device::Cpu(_) = dev {
        check_targets(OP, targets.host(), vocab)?;
    }
    for first in (0..rows).step_by(WAVE) {
        let wave = first..rows.min(first + WAVE);
        let out = out.range(wave.clone());
        let h = h.range(wave.start * d..wave.end * d);
        let (targets, scratch) = (targets.range(wave), scratch.reborrow());
        match dev {
            Device::Cpu(cpu) => {
                let (h, panels) = (h.float()?.host(), w.view().float()?.host());
                on_cpu(cpu, out.host(), h, panels, (vocab, d), targets.host(), settings, scratch);
            }
            Device::Cuda(cuda) => on_cuda(cuda, out, h, w, targets, settings, scratch)?,
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn on_cpu<F: Float>(
    cpu: &Cpu,
    out: OutputRows<'_, F>,
    h: &[F],
    panels: &[F],
    (vocab, d): (usize, usize),
    targets: &[u32],
    settings: Settings<F>,
    scratch: ViewMut<'_, F>,
) {
    let (rows, width, scale) = (targets.len(), width(vocab), settings.scale());
    let scratch = &mut scratch.host()[..rows * width];
    cpu.rows(rows, 12, (out, (scratch, width)), |range, (mut out, z)| {
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
                    let z = &mut z[r * width..][..n];
                    bend(cpu.isa(), z, settings);
                    state.visit(cpu.isa(), z, scale, target);
                }
            }
            state[..m].iter().enumerate().for_each(|(r, s)| s.finish(&mut out, t0 + r));
        }
    });
}

/// Rows of a tile; bytes of its stages, and of its sums where warps share columns.
fn tile(rows: usize) -> (usize, usize) {
    match rows {
        0..=16 => (16, 4 * 64 * (16 + 128) * 2 + 16 * 128 * 4),
        17..=64 => (64, 3 * 64 * (64 + 128) * 2),
        _ => (128, 4 * 32 * (128 + 128) * 2),
    }
}

/// Chunks by tiles of rows, then the chunks of each row.
fn on_cuda<T: Element>(
    cuda: &Cuda,
    out: Outputs<'_, T::Acc>,
    h: View<'_, T>,
    w: Weight<'_, T>,
    targets: View<'_, u32>,
    settings: Settings<T::Acc>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (rows, vocab, d) = (targets.len(), w.n(), w.k());
    let mut partial = scratch.range(0..rows * vocab.div_ceil(CHUNK) * PARTIAL);
    let (to, weights) = (partial.reborrow(), w.view());
    let (scale, cap) = (settings.scale(), settings.cap());
    if cuda.hopper() {
        let tile = hopper::Tile::of(rows);
        hopper::forward(cuda, tile, to, h, weights, targets, (vocab, d), (scale, cap))?;
    } else {
        ampere(cuda, to, h, weights, targets, (vocab, d), (scale, cap))?;
    }
    let launch = Launch::row(rows.div_ceil(kernel::WARPS), 0)?;
    let Outputs { logp, lse, entropy } = out;
    kernel::merge(cuda, launch, logp, lse, entropy, partial.view(), targets, rows, vocab)
}

/// Writes the partials of all rows and chunks.
fn ampere<T: Element>(
    cuda: &Cuda,
    partial: ViewMut<'_, T::Acc>,
    h: View<'_, T>,
    w: View<'_, T>,
    targets: View<'_, u32>,
    (vocab, d): (usize, usize),
    (scale, cap): (T::Acc, T::Acc),
) -> Result<()> {
    let rows = targets.len();
    let (tile, shared) = tile(rows);
    let run: Forwards<T> = match tile {
        16 => kernel::forward_16,
        64 => kernel::forward_64,
        _ => kernel::forward_128,
    };
    let launch = Launch::row(rows.div_ceil(tile) * vocab.div_ceil(CHUNK), shared)?;
    run(cuda, launch, partial, h, w, targets, rows, vocab, d, scale, cap)
}

/// Partials, hidden states, the head, targets; rows, vocabulary, d; scale and cap.
type Forwards<T> = fn(
    &Cuda,
    Launch,
    ViewMut<'_, <T as Element>::Acc>,
    View<'_, T>,
    View<'_, T>,
    View<'_, u32>,
    usize,
    usize,
    usize,
    <T as Element>::Acc,
    <T as Element>::Acc,
) -> Result<()>;

/// [`forward`] from logits `h Wᵀ` `[rows, vocab]`: in f32 the same bits, if
/// [`super::matmul::forward`] made them on the CPU.
///
/// Reads the logits.
///
/// # Errors
/// As [`forward`].
pub fn from_logits<T: Element>(
    dev: &Device,
    logp: ViewMut<'_, T::Acc>,
    lse: ViewMut<'_, T::Acc>,
    entropy: Option<ViewMut<'_, T::Acc>>,
    logits: View<'_, T>,
    targets: View<'_, u32>,
    settings: Settings<T::Acc>,
) -> Result<()> {
    const OP: &str = "logprob::from_logits";
    let rows = targets.len();
    let vocab = logits.len().checked_div(rows).unwrap_or(0);
    shape::check(OP, "logits", &[rows, vocab], logits.len())?;
    settings.validate(OP)?;
    let _op = dev.op(OP, || Work::moves::<T>(rows * vocab));
    let out = Outputs::new(OP, logp, lse, entropy, rows)?;
    let scale = settings.scale();
    match dev {
        Device::Cpu(cpu) => {
            let (targets, logits) = (targets.host(), logits.float()?.host());
            check_targets(OP, targets, vocab)?;
            cpu.rows(rows, 1, out.host(), |range, mut out| {
                for (i, r) in range.enumerate() {
                    let mut state = Online::EMPTY;
                    for (c, x) in logits[r * vocab..][..vocab].chunks(CHUNK).enumerate() {
                        let target = (targets[r] as usize).checked_sub(c * CHUNK);
                        if settings.softcap.is_none() {
                            state.visit(cpu.isa(), x, scale, target);
                            continue;
                        }
                        let mut z = [T::Acc::ZERO; CHUNK];
                        let z = &mut z[..x.len()];
                        z.copy_from_slice(x);
                        bend(cpu.isa(), z, settings);
                        state.visit(cpu.isa(), z, scale, target);
                    }
                    state.finish(&mut out, i);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row(rows, vocab.div_ceil(CHUNK) * PARTIAL * 4)?;
            let Outputs { logp, lse, entropy } = out;
            let cap = settings.cap();
            kernel::from_logits(
                cuda, launch, logp, lse, entropy, logits, targets, vocab, scale, cap,
            )
        }
    }
}

/// What [`backward`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a, T: Element> {
    /// Hidden states `[rows, d]`.
    pub h: View<'a, T>,
    /// The head as [`forward`] reads it.
    pub packed: Weight<'a, T>,
    /// The head `[vocab, d]`.
    pub w: View<'a, T>,
    /// `[rows]`
    pub targets: View<'a, u32>,
    /// As [`forward`] wrote it, `[rows]`.
    pub lse: View<'a, T::Acc>,
    /// As [`forward`] wrote it, `[rows]`; read with `dentropy`.
    pub entropy: Option<View<'a, T::Acc>>,
    /// As given to [`forward`].
    pub settings: Settings<T::Acc>,
}

impl<T: Element> Forward<'_, T> {
    /// Of [`backward`], with a gradient of the head or without.
    fn work(&self, weight: bool) -> Work {
        let (rows, vocab, d) = (self.targets.len(), self.packed.n(), self.packed.k());
        let dw = Work::moves::<T::Acc>(if weight { 2 * vocab * d } else { 0 });
        Work::moves::<T>((2 * rows + vocab) * d).and(dw).product(3 * rows, vocab, d)
    }
}

/// Rows that [`backward`] takes at a time.
const BACKWARD_WAVE: usize = 8192;

/// Columns of the vocabulary whose gradient it holds on a CUDA device.
const SLICE: usize = 8192;

/// Elements of scratch that [`backward`] needs: on the CPU a chunk of logits a row, on a CUDA device a slice of
/// them in half as many bytes, and the gradient of the hidden states so far.
#[must_use]
pub fn backward_scratch_len(rows: usize, vocab: usize, d: usize) -> usize {
    rows.min(BACKWARD_WAVE) * width(vocab).max(slice(vocab) / 2 + d)
}

fn slice(vocab: usize) -> usize {
    SLICE.min(vocab.next_multiple_of(8))
}

/// Writes `dh` `[rows, d]` and adds to `dw` `[vocab, d]`, if given, from `dlogp` and `dentropy`
/// `[rows]`. Logits are recomputed a part at a time: `6 rows vocab d` FLOPs.
///
/// `dx_v = (dlogp (1{v = target} - p_v) - dentropy p_v (z_v - lse + entropy)) s_v / temperature`,
/// `s_v = 1 - tanh^2(x_v / cap)`, 1 without a cap.
///
/// On the CPU each element of `dw` is one chain over rows in ascending order, each of `dh` one over the
/// vocabulary. On a CUDA device `dx` is rounded to `T`; a chain of `dw` has at most 8192 rows, one of `dh` 8192
/// columns, and the chains are added in ascending order.
///
/// Reads h and the head, writes dh, reads and writes dw.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] as [`forward`], or if `dentropy`
/// comes without `entropy`. On a CUDA device [`Error::Device`] as [`forward`], and a target beyond the
/// vocabulary is none of its columns.
pub fn backward<T: Element>(
    dev: &Device,
    mut dh: ViewMut<'_, T>,
    mut dw: Option<ViewMut<'_, T::Acc>>,
    dlogp: View<'_, T::Acc>,
    dentropy: Option<View<'_, T::Acc>>,
    f: Forward<'_, T>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "logprob::backward";
    let (rows, vocab, d) = (f.targets.len(), f.packed.n(), f.packed.k());
    shape::check(OP, "h", &[rows, d], f.h.len())?;
    shape::check(OP, "dh", &[rows, d], dh.len())?;
    shape::check(OP, "w", &[vocab, d], f.w.len())?;
    shape::check(OP, "dlogp", &[rows], dlogp.len())?;
    shape::check(OP, "lse", &[rows], f.lse.len())?;
    if let Some(dw) = &dw {
        shape::check(OP, "dw", &[vocab, d], dw.len())?;
    }
    let entropy = match (dentropy, f.entropy) {
        (None, _) => None,
        (Some(_), None) => return Err(Error::value(OP, "entropy with dentropy", "none")),
        (Some(dentropy), Some(entropy)) => {
            shape::check(OP, "dentropy", &[rows], dentropy.len())?;
            shape::check(OP, "entropy", &[rows], entropy.len())?;
            Some(entropy)
        }
    };
    f.settings.validate(OP)?;
    if let Device::Cpu(_) = dev {
        check_targets(OP, f.targets.host(), vocab)?;
    }
    let _op = dev.op(OP, || f.work(dw.is_some()));
    let mut scratch = scratch.scratch(OP, backward_scratch_len(rows, vocab, d))?;
    for first in (0..rows).step_by(BACKWARD_WAVE) {
        let wave = first..rows.min(first + BACKWARD_WAVE);
        let hidden = wave.start * d..wave.end * d;
        let slopes = Slopes {
            dlogp: dlogp.range(wave.clone()),
            dentropy: dentropy.map(|x| x.range(wave.clone())),
        };
        let f = Forward {
            h: f.h.range(hidden.clone()),
            targets: f.targets.range(wave.clone()),
            lse: f.lse.range(wave.clone()),
            entropy: entropy.map(|x| x.range(wave.clone())),
            ..f
        };
        let dh = dh.reborrow().range(hidden);
        let (dw, scratch) = (dw.as_mut().map(ViewMut::reborrow), scratch.reborrow());
        match dev {
            Device::Cpu(cpu) => backward_on_cpu(cpu, dh, dw, slopes, f, scratch)?,
            Device::Cuda(cuda) => backward_on_cuda(dev, cuda, dh, dw, slopes, f, scratch)?,
        }
    }
    Ok(())
}

/// What came back to the outputs of [`forward`].
struct Slopes<'a, F> {
    dlogp: View<'a, F>,
    dentropy: Option<View<'a, F>>,
}

fn backward_on_cpu<T: Element>(
    cpu: &Cpu,
    dh: ViewMut<'_, T>,
    dw: Option<ViewMut<'_, T::Acc>>,
    slopes: Slopes<'_, T::Acc>,
    f: Forward<'_, T>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    let (rows, vocab, d) = (f.targets.len(), f.packed.n(), f.packed.k());
    let (dh, mut dw, dlogp) = (dh.float()?.host(), dw.map(ViewMut::host), slopes.dlogp.host());
    let dentropy = slopes.dentropy.map(View::host).zip(f.entropy.map(View::host));
    let (h, w) = (f.h.float()?.host(), f.w.float()?.host());
    let (targets, lse) = (f.targets.host(), f.lse.host());
    let (panels, width) = (f.packed.view().float()?.host(), width(vocab));
    let dz = &mut scratch.host()[..rows * width];
    let (scale, inverse) = (f.settings.scale(), f.settings.inverse());
    let zero = T::Acc::ZERO;
    for v0 in (0..vocab).step_by(CHUNK) {
        let n = CHUNK.min(vocab - v0);
        let b = Rhs::Packed(&panels[v0 * d..][..gemm::packed_len(d, n)]);
        gemm::product(cpu, dz, width, (rows, n, d), Lhs::rows(h, d), b, false, None);
        cpu.rows(rows, 4, (&mut *dz, width), |range, dz| {
            for (dz, r) in dz.chunks_exact_mut(width).zip(range) {
                let dz = &mut dz[..n];
                bend(cpu.isa(), dz, f.settings);
                let (dent, ent) = dentropy.map_or((zero, zero), |(d, e)| (d[r], e[r]));
                let target = (targets[r] as usize).checked_sub(v0).filter(|t| *t < n);
                let own = target.map(|t| dlogp[r] * scale * slope(dz[t] * inverse));
                logit_gradient(cpu.isa(), dz, scale, inverse, lse[r], dlogp[r], dent, ent);
                if let Some((t, own)) = target.zip(own) {
                    dz[t] += own;
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

/// A slice of the vocabulary at a time: the gradient of its logits, then what it adds to that of the hidden states
/// and of the head.
fn backward_on_cuda<T: Element>(
    dev: &Device,
    cuda: &Cuda,
    mut dh: ViewMut<'_, T>,
    mut dw: Option<ViewMut<'_, T::Acc>>,
    slopes: Slopes<'_, T::Acc>,
    f: Forward<'_, T>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    /// Bytes of the stages of a tile of 128 x 128, or of its sums.
    const WIDE: usize = 4 * 32 * (128 + 128) * 2;
    let (rows, vocab, d) = (f.targets.len(), f.packed.n(), f.packed.k());
    let (scale, cap) = (f.settings.scale(), f.settings.cap());
    let (dz, sums) = scratch.split_at(rows * slice(vocab) / 2);
    let (mut dz, mut sums) = (dz.cast::<T>(), sums.range(0..rows * d));
    let tiles = |m: usize, n: usize, side: usize| m.div_ceil(side) * n.div_ceil(side);
    for v0 in (0..vocab).step_by(SLICE) {
        let n = SLICE.min(vocab - v0);
        let (width, part) = (n.next_multiple_of(8), v0 * d..(v0 + n) * d);
        let mut dz = dz.reborrow().range(0..rows * width);
        let w = f.w.range(part.clone());
        if cuda.hopper() {
            let dw = dw.as_mut().map(|dw| dw.reborrow().range(part));
            let part = Part { first: v0, n, width, last: v0 + n == vocab };
            let (f, dh, sums) = (Forward { w, ..f }, dh.reborrow(), sums.reborrow());
            hopper::backward(cuda, dh, dw, &slopes, f, part, dz, sums)?;
            continue;
        }
        let launch = Launch::row(tiles(rows, width, 128), WIDE)?;
        let (dlogp, dentropy) = (slopes.dlogp, slopes.dentropy);
        kernel::gradient(
            cuda,
            launch,
            dz.reborrow(),
            f.h,
            w,
            f.targets,
            f.lse,
            dlogp,
            f.entropy,
            dentropy,
            rows,
            n,
            width,
            v0,
            d,
            scale,
            cap,
        )?;
        let many = tiles(rows, d, 128) >= cuda.processors() as usize;
        let (run, side, shared): (Hidden<T>, _, _) = match many {
            true => (kernel::hidden_128x128, 128, WIDE),
            false => (kernel::hidden_64x64, 64, WIDE / 2),
        };
        let launch = Launch::row(tiles(rows, d, side), shared)?;
        let (first, last) = (usize::from(v0 == 0), usize::from(v0 + n == vocab));
        let (dh, sums) = (dh.reborrow(), sums.reborrow());
        run(cuda, launch, dh, sums, dz.view(), w, rows, n, width, d, first, last)?;
        let Some(dw) = &mut dw else { continue };
        let dw = dw.reborrow().range(part);
        if width == n {
            matmul::backward_weight(dev, dw, None, dz.view(), f.h, (n, d))?;
        } else {
            let launch = Launch::row(tiles(n, d, 128), WIDE)?;
            kernel::weight(cuda, launch, dw, dz.view(), f.h, rows, n, width, d)?;
        }
    }
    Ok(())
}

/// A slice of the vocabulary.
#[derive(Clone, Copy)]
struct Part {
    /// Its first column.
    first: usize,
    /// Columns.
    n: usize,
    /// Columns of their gradient: a multiple of 8.
    width: usize,
    /// Whether no other comes after it.
    last: bool,
}

/// Gradient of the hidden states, sums so far, that of the logits, the head; rows, columns, their width, d; whether
/// it is the first slice, and the last.
type Hidden<T> = fn(
    &Cuda,
    Launch,
    ViewMut<'_, T>,
    ViewMut<'_, <T as Element>::Acc>,
    View<'_, T>,
    View<'_, T>,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
) -> Result<()>;

/// Per-row outputs.
struct Outputs<'a, F> {
    logp: ViewMut<'a, F>,
    lse: ViewMut<'a, F>,
    entropy: Option<ViewMut<'a, F>>,
}

/// [`Outputs`] in host memory, as rows of one element.
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
        Ok(Self { logp, lse, entropy })
    }

    fn range(&mut self, rows: Range<usize>) -> Outputs<'_, F> {
        Outputs {
            logp: self.logp.reborrow().range(rows.clone()),
            lse: self.lse.reborrow().range(rows.clone()),
            entropy: self.entropy.as_mut().map(|e| e.reborrow().range(rows)),
        }
    }

    fn host(self) -> OutputRows<'a, F> {
        ((self.logp.host(), 1), (self.lse.host(), 1), self.entropy.map(|e| (e.host(), 1)))
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

    fn lse(&self) -> F {
        self.top + self.sum.ln()
    }

    fn finish(&self, (logp, lse, entropy): &mut Parts<'_, F>, row: usize) {
        lse[row] = self.lse();
        logp[row] = self.target - lse[row];
        if let Some(entropy) = entropy {
            entropy[row] = self.sum.ln() - self.weighted / self.sum;
        }
    }
}

/// `cap tanh(x / cap)`, if there is a cap.
fn bend<F: Float>(isa: Isa, x: &mut [F], settings: Settings<F>) {
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
    fn logit_gradient[F: Float](
        x: &mut [F], scale: F, inverse: F, lse: F, dlogp: F, dentropy: F, entropy: F,
    ) {
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
