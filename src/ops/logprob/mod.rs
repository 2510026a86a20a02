//! The LM head fused with log-prob gathering: the logits of all tokens are never held.
//!
//! `x = h Wᵀ`, `z = cap tanh(x / cap) / temperature`, or `x / temperature` without a cap,
//! `lse = log sum_v e^z_v`, `logp = z_target - lse`, `entropy = -sum_v p_v log p_v`,
//! `p = e^(z - lse)`.
//!
//! The vocabulary is visited in chunks of [`CHUNK`] from column 0, merged online (Milakov and
//! Gimelshein 2018); chunks, lanes and merge order depend on nothing but the vocabulary. So a
//! token's log-prob has the same bits in training, in scoring, and when it is sampled.

mod cpu;
mod cuda;
mod sample;
mod sm80;
mod sm90;

pub use sample::{Sampled, Top, sample, sample_scratch_len};

use std::ops::Range;

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::gemm::NR,
        cuda::{Launch, kernels::logprob as kernel},
    },
    error::{Error, Result},
    ops::matmul::Weight,
    shape,
};

/// Columns of the vocabulary that are visited together.
pub const CHUNK: usize = 1024;

/// Rows that [`forward`] takes at a time.
const WAVE: usize = 16_384;

/// How logits are made of the products `h Wᵀ`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitSettings<F> {
    pub temperature: F,
    /// Bounds them before: `cap tanh(x / cap)`.
    pub softcap: Option<F>,
}

impl<F: Float> Default for LogitSettings<F> {
    fn default() -> Self {
        Self::at(F::ONE)
    }
}

impl<F: Float> LogitSettings<F> {
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

/// The head's weight `[vocab, d]`, and what is made of its products.
#[derive(Clone, Copy, Debug)]
pub struct LmHead<'a, T: Element> {
    pub w: Weight<'a, T>,
    pub settings: LogitSettings<T::Acc>,
}

/// Elements of scratch that [`forward`] needs: on the CPU a chunk of logits a row, on a CUDA device
/// four numbers a row and chunk.
pub fn scratch_len(rows: usize, vocab: usize) -> usize {
    rows.min(WAVE) * width(vocab).max(PARTIAL * vocab.div_ceil(CHUNK))
}

/// Bytes of shared memory in which a warp has the lists of so many rows, and eight rows of a tile.
const fn lists_bytes(rows: usize) -> usize {
    8 * (128 + 8) * 4 + rows * kernel::MOST * size_of::<u64>()
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

/// Writes `out` from hidden states `h` `[rows, d]`, the head and `targets` `[rows]`.
/// `2 rows vocab d` FLOPs.
///
/// Reads h and the head.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] for a temperature or a cap that is
/// not positive, or a target beyond the vocabulary; on a CUDA device its log-prob becomes NaN
/// instead. There [`Error::Device`] as [`super::matmul::forward`].
pub fn forward<T: Element>(
    dev: &Device,
    mut out: Outputs<'_, T::Acc>,
    h: View<'_, T>,
    head: LmHead<'_, T>,
    targets: View<'_, u32>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "logprob";
    let (rows, vocab, d) = (targets.len(), head.w.n(), head.w.k());
    shape::check(OP, "h", &[rows, d], h.len())?;
    head.settings.validate(OP)?;
    out.check(OP, rows)?;
    let _op = dev.op(OP, || Work::moves::<T>((rows + vocab) * d).product(rows, vocab, d));
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
            Device::Cpu(cpu) => cpu::forward(cpu, out, h, head, targets, scratch)?,
            Device::Cuda(cuda) => cuda::forward(cuda, out, h, head, targets, scratch)?,
        }
    }
    Ok(())
}

/// [`forward`] from logits `h Wᵀ` `[rows, vocab]`: in f32 the same bits, if
/// [`super::matmul::forward`] made them on the CPU.
///
/// Reads the logits.
pub fn from_logits<T: Element>(
    dev: &Device,
    out: Outputs<'_, T::Acc>,
    logits: View<'_, T>,
    targets: View<'_, u32>,
    settings: LogitSettings<T::Acc>,
) -> Result<()> {
    const OP: &str = "logprob::from_logits";
    let rows = targets.len();
    let vocab = logits.len().checked_div(rows).unwrap_or(0);
    shape::check(OP, "logits", &[rows, vocab], logits.len())?;
    settings.validate(OP)?;
    out.check(OP, rows)?;
    let _op = dev.op(OP, || Work::moves::<T>(rows * vocab));
    let scale = settings.scale();
    match dev {
        Device::Cpu(cpu) => {
            let (targets, logits) = (targets.host(), logits.float()?.host());
            check_targets(OP, targets, vocab)?;
            cpu::from_logits(cpu, out.host(), logits, targets, settings);
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row(rows, vocab.div_ceil(CHUNK) * PARTIAL * 4)?;
            let Outputs { logp, lse, entropy } = out;
            let cap = settings.cap();
            kernel::FromLogits { logp, lse, entropy, z: logits, targets, vocab, scale, cap }
                .launch(cuda, launch)
        }
    }
}

/// What [`backward`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a, T: Element> {
    /// Hidden states `[rows, d]`.
    pub h: View<'a, T>,
    /// As [`forward`] reads it.
    pub head: LmHead<'a, T>,
    /// The head's weight by rows `[vocab, d]`.
    pub w: View<'a, T>,
    /// `[rows]`
    pub targets: View<'a, u32>,
    /// As [`forward`] wrote it, `[rows]`.
    pub lse: View<'a, T::Acc>,
    /// As [`forward`] wrote it, `[rows]`; read with `dentropy`.
    pub entropy: Option<View<'a, T::Acc>>,
}

impl<T: Element> Forward<'_, T> {
    /// Work of [`backward`], with the gradient of the head or without.
    fn work(&self, weight: bool) -> Work {
        let (rows, vocab, d) = (self.targets.len(), self.head.w.n(), self.head.w.k());
        let dw = Work::moves::<T::Acc>(if weight { 2 * vocab * d } else { 0 });
        Work::moves::<T>((2 * rows + vocab) * d).and(dw).product(3 * rows, vocab, d)
    }
}

/// Rows that [`backward`] takes at a time.
const BACKWARD_WAVE: usize = 8192;

/// Columns of the vocabulary whose gradient it holds on a CUDA device.
const SLICE: usize = 8192;

/// Elements of scratch that [`backward`] needs: on the CPU a chunk of logits a row, on a CUDA
/// device a slice of them in half as many bytes, and the gradient of the hidden states so far.
pub fn backward_scratch_len(rows: usize, vocab: usize, d: usize) -> usize {
    rows.min(BACKWARD_WAVE) * width(vocab).max(slice(vocab) / 2 + d)
}

fn slice(vocab: usize) -> usize {
    SLICE.min(vocab.next_multiple_of(8))
}

/// Writes `dh` `[rows, d]` and adds to `dw` `[vocab, d]`, if given, from the slopes. Logits are
/// recomputed a part at a time: `6 rows vocab d` FLOPs.
///
/// `dx_v = (dlogp (1{v = target} - p_v) - dentropy p_v (z_v - lse + entropy)) s_v / temperature`,
/// `s_v = 1 - tanh^2(x_v / cap)`, 1 without a cap.
///
/// On the CPU each element of `dw` is one chain over rows in ascending order, each of `dh` one over
/// the vocabulary. On a CUDA device `dx` is rounded to `T`; a chain of `dw` has at most 8192 rows,
/// one of `dh` 8192 columns, and the chains are added in ascending order.
///
/// Reads h and the head, writes dh, reads and writes dw.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] as [`forward`], or if `dentropy`
/// comes without `entropy`. On a CUDA device [`Error::Device`] as [`forward`], and a target beyond
/// the vocabulary is none of its columns.
pub fn backward<T: Element>(
    dev: &Device,
    mut dh: ViewMut<'_, T>,
    mut dw: Option<ViewMut<'_, T::Acc>>,
    slopes: Slopes<'_, T::Acc>,
    f: Forward<'_, T>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "logprob::backward";
    let (rows, vocab, d) = (f.targets.len(), f.head.w.n(), f.head.w.k());
    shape::check(OP, "h", &[rows, d], f.h.len())?;
    shape::check(OP, "dh", &[rows, d], dh.len())?;
    shape::check(OP, "w", &[vocab, d], f.w.len())?;
    shape::check(OP, "dlogp", &[rows], slopes.dlogp.len())?;
    shape::check(OP, "lse", &[rows], f.lse.len())?;
    if let Some(dw) = &dw {
        shape::check(OP, "dw", &[vocab, d], dw.len())?;
    }
    let entropy = match (slopes.dentropy, f.entropy) {
        (None, _) => None,
        (Some(_), None) => return Err(Error::value(OP, "entropy with dentropy", "none")),
        (Some(dentropy), Some(entropy)) => {
            shape::check(OP, "dentropy", &[rows], dentropy.len())?;
            shape::check(OP, "entropy", &[rows], entropy.len())?;
            Some(entropy)
        }
    };
    f.head.settings.validate(OP)?;
    if let Device::Cpu(_) = dev {
        check_targets(OP, f.targets.host(), vocab)?;
    }
    let _op = dev.op(OP, || f.work(dw.is_some()));
    let mut scratch = scratch.scratch(OP, backward_scratch_len(rows, vocab, d))?;
    for first in (0..rows).step_by(BACKWARD_WAVE) {
        let wave = first..rows.min(first + BACKWARD_WAVE);
        let hidden = wave.start * d..wave.end * d;
        let slopes = Slopes {
            dlogp: slopes.dlogp.range(wave.clone()),
            dentropy: slopes.dentropy.map(|x| x.range(wave.clone())),
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
            Device::Cpu(cpu) => cpu::backward(cpu, dh, dw, slopes, f, scratch)?,
            Device::Cuda(cuda) => cuda::backward(dev, cuda, (dh, dw), slopes, f, scratch)?,
        }
    }
    Ok(())
}

/// The gradients of [`Outputs`].
#[derive(Clone, Copy, Debug)]
pub struct Slopes<'a, F> {
    /// `[rows]`
    pub dlogp: View<'a, F>,
    /// `[rows]`
    pub dentropy: Option<View<'a, F>>,
}

/// What [`forward`] writes of each row.
#[derive(Debug)]
pub struct Outputs<'a, F> {
    /// Log-prob of the target, `[rows]`.
    pub logp: ViewMut<'a, F>,
    /// `[rows]`
    pub lse: ViewMut<'a, F>,
    /// In nats, `[rows]`.
    pub entropy: Option<ViewMut<'a, F>>,
}

/// [`Outputs`] in host memory, as rows of one element.
type OutputRows<'a, F> = ((&'a mut [F], usize), (&'a mut [F], usize), Option<(&'a mut [F], usize)>);

impl<'a, F: Float> Outputs<'a, F> {
    fn check(&self, op: &'static str, rows: usize) -> Result<()> {
        shape::check(op, "logp", &[rows], self.logp.len())?;
        shape::check(op, "lse", &[rows], self.lse.len())?;
        self.entropy.as_ref().map_or(Ok(()), |x| shape::check(op, "entropy", &[rows], x.len()))
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
