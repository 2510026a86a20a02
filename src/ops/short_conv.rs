//! Causal depthwise convolutions over a few rows (LFM2, and before the delta rule of Qwen3.5):
//! `u[t, c] = sum_j w[c, j] x[t - taps + 1 + j, c]`, zeros before a sequence, and `y = u` or
//! `silu(u)`.
//!
//! A sequence that is continued has its last `taps - 1` rows in a slot of a state, so that the same
//! products are added in the same order as in a whole sequence.

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cpu::Cpu,
        cuda::{Launch, kernels::short_conv as kernel},
    },
    error::{Error, Result},
    shape, simd,
};

use super::gate::{Strided, check_rows, floats, rows_of};

/// What is convolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvSpec {
    pub channels: usize,
    /// Rows that one sees, its own included.
    pub taps: usize,
    /// The result goes through `silu`.
    pub silu: bool,
}

/// Rows of a sequence, new ones of which may be a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct SequenceSpan {
    /// Its first row.
    pub at: u32,
    pub rows: u32,
    /// Position of the first in the sequence.
    pub first: u32,
    /// Where the sequence's state is, if there is any.
    pub slot: u32,
}

/// Words of a [`SequenceSpan`].
pub const SPAN_WORDS: usize = 4;

/// The sequences of a pass, and what they left: none where all are whole.
pub struct Sequences<'a, S> {
    /// [`SequenceSpan`]s in ascending order of rows, [`SPAN_WORDS`] words each.
    pub spans: View<'a, u32>,
    /// Of each slot, or empty. A sequence that begins at position 0 reads nothing.
    pub state: ViewMut<'a, S>,
}

impl<S> Sequences<'_, S> {
    pub fn count(&self) -> usize {
        self.spans.len() / SPAN_WORDS
    }
}

/// The spans of `rows` rows on the CPU.
pub(super) fn spans<'a>(op: &str, words: View<'a, u32>, rows: usize) -> Result<&'a [SequenceSpan]> {
    let spans: &[SequenceSpan] = bytemuck::cast_slice(words.host());
    let end = spans.iter().try_fold(0, |at, s| (s.at == at).then_some(at + s.rows));
    if end.map(|end| end as usize) != Some(rows) {
        let want = format!("sequences that follow each other up to row {rows}");
        return Err(Error::value(format!("{op}: spans"), want, format!("{spans:?}")));
    }
    Ok(spans)
}

/// Most taps that the kernels take.
const MOST_TAPS: usize = kernel::TAPS;

/// Whether `dev` convolves so.
pub fn supported(dev: &Device, spec: ConvSpec) -> Result<()> {
    if matches!(dev, Device::Cuda(_)) && spec.taps > MOST_TAPS {
        let want = format!("at most {MOST_TAPS} on a CUDA device");
        return Err(Error::value("taps of a convolution", want, spec.taps));
    }
    Ok(())
}

/// Elements of the state of a sequence.
pub fn state_len(spec: ConvSpec) -> usize {
    spec.taps.saturating_sub(1) * spec.channels
}

impl ConvSpec {
    fn check<T: Element>(
        self,
        op: &'static str,
        y: usize,
        x: Strided<View<'_, T>>,
        w: usize,
    ) -> Result<usize> {
        let rows = rows_of((op, "x"), x, self.channels)?;
        shape::check(op, "y", &[rows, self.channels], y)?;
        shape::check(op, "w", &[self.channels, self.taps], w)?;
        Ok(rows)
    }
}

/// Writes `y` `[rows, channels]`, and what each sequence leaves to its state. `w` is `[channels,
/// taps]`, a slot of the state `[taps - 1, channels]`.
///
/// Reads x, writes y.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Value`] if a buffer does not fit.
pub fn forward<T: Element>(
    dev: &Device,
    spec: ConvSpec,
    y: ViewMut<'_, T>,
    x: Strided<View<'_, T>>,
    w: View<'_, T>,
    of: Sequences<'_, T>,
) -> Result<()> {
    const OP: &str = "short_conv";
    let rows = spec.check(OP, y.len(), x, w.len())?;
    let ConvSpec { channels, taps, silu } = spec;
    let slots = of.state.len() / state_len(spec).max(1);
    shape::check(OP, "state", &[slots, taps - 1, channels], of.state.len())?;
    supported(dev, spec)?;
    let count = of.count();
    let _op = dev.op(OP, || Work::moves::<T>(2 * rows * channels));
    match dev {
        _ if rows == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let all = spans(OP, of.spans, rows)?;
            let (x, state) = (floats(x)?, of.state.float()?.host());
            let inputs = ConvInputs { spec, x, state, by_tap: by_tap(spec, w.float()?.host()) };
            inputs.forward(cpu, y.float()?.host(), all);
            for s in all.iter().filter(|_| slots > 0) {
                leave(spec, x, s, &mut state[s.slot as usize * state_len(spec)..]);
            }
            Ok(())
        }
        Device::Cuda(cuda) => {
            let blocks = channels.div_ceil(kernel::THREADS);
            let launch = Launch::row(blocks * count, 0)?;
            let state = (slots > 0).then_some(of.state);
            let Strided { data: x, first: x_first, stride: x_stride } = x;
            let silu = silu.into();
            kernel::Forward {
                y,
                state,
                x,
                w,
                spans: of.spans,
                channels,
                taps,
                silu,
                x_first,
                x_stride,
                blocks,
            }
            .launch(cuda, launch)
        }
    }
}

/// Weights `[taps, channels]`.
fn by_tap<F: Float>(spec: ConvSpec, w: &[F]) -> Vec<F> {
    let ConvSpec { channels, taps, .. } = spec;
    (0..taps).flat_map(|j| (0..channels).map(move |c| w[c * taps + j])).collect()
}

/// What a convolution reads on the CPU.
struct ConvInputs<'a, F> {
    spec: ConvSpec,
    x: Strided<View<'a, F>>,
    state: &'a [F],
    by_tap: Vec<F>,
}

impl<F: Float> ConvInputs<'_, F> {
    /// The row `back` rows before row `t` of a span, none before the sequence.
    fn before(&self, s: &SequenceSpan, t: usize, back: usize) -> Option<&[F]> {
        let ConvSpec { channels, taps, .. } = self.spec;
        if back <= t {
            return Some(self.x.row(s.at as usize + t - back, channels));
        }
        if s.first as usize + t < back || self.state.is_empty() {
            return None;
        }
        let slot = &self.state[s.slot as usize * state_len(self.spec)..];
        Some(&slot[(t + taps - 1 - back) * channels..][..channels])
    }

    /// `u` of row `t` of a span.
    fn row(&self, cpu: &Cpu, u: &mut [F], s: &SequenceSpan, t: usize) {
        let ConvSpec { channels, taps, .. } = self.spec;
        u.fill(F::ZERO);
        for j in 0..taps {
            if let Some(x) = self.before(s, t, taps - 1 - j) {
                add_product(cpu.isa(), u, &self.by_tap[j * channels..][..channels], x);
            }
        }
    }

    fn forward(&self, cpu: &Cpu, y: &mut [F], spans: &[SequenceSpan]) {
        let ConvSpec { channels, silu, .. } = self.spec;
        cpu.rows(y.len() / channels, 4096usize.div_ceil(channels), (y, channels), |range, y| {
            for (y, r) in y.chunks_exact_mut(channels).zip(range) {
                let (s, t) = place(spans, r);
                self.row(cpu, y, s, t);
                if silu {
                    silu_row(cpu.isa(), y);
                }
            }
        });
    }
}

/// The span of a row, and which of its rows it is.
fn place(spans: &[SequenceSpan], row: usize) -> (&SequenceSpan, usize) {
    let after = spans.partition_point(|s| s.at as usize <= row);
    // Spans without rows begin where the next one does.
    let s = &spans[after - 1];
    (s, row - s.at as usize)
}

/// Keeps the last rows of a span: in ascending order, as some move up.
fn leave<F: Float>(spec: ConvSpec, x: Strided<View<'_, F>>, s: &SequenceSpan, state: &mut [F]) {
    let ConvSpec { channels, taps, .. } = spec;
    let (first, end) = (s.first as usize, (s.first + s.rows) as usize);
    for j in 0..taps - 1 {
        let to = j * channels..(j + 1) * channels;
        match (end + j + 1).checked_sub(taps) {
            None => state[to].fill(F::ZERO),
            Some(p) if p >= first => {
                state[to].copy_from_slice(x.row(s.at as usize + p - first, channels));
            }
            // The state held the rows before `first`.
            Some(p) => {
                let from = (p + taps - 1 - first) * channels;
                state.copy_within(from..from + channels, to.start);
            }
        }
    }
}

/// Elements of scratch that [`backward`] needs.
pub fn scratch_len(dev: &Device, spec: ConvSpec, rows: usize, sequences: usize) -> usize {
    match dev {
        Device::Cpu(_) => rows * spec.channels,
        Device::Cuda(_) => sequences * spec.taps * spec.channels,
    }
}

/// What [`backward`] reads of the forward pass.
#[derive(Clone, Copy)]
pub struct ConvKept<'a, T> {
    pub x: Strided<View<'a, T>>,
    pub w: View<'a, T>,
    /// Whole sequences.
    pub spans: View<'a, u32>,
}

/// Writes `dx[s, c] = sum_j w[c, j] du[s + taps - 1 - j, c]` and adds `dw[c, j] += sum_t du[t, c]
/// x[t - taps + 1 + j, c]`, where `du = dy` or `dy silu'(u)`: on the CPU in ascending order of
/// rows, on a CUDA device sequence by sequence.
///
/// Reads dy and x, writes dx.
pub fn backward<T: Element>(
    dev: &Device,
    spec: ConvSpec,
    (dx, dw): (Strided<ViewMut<'_, T>>, ViewMut<'_, T::Acc>),
    dy: View<'_, T>,
    kept: ConvKept<'_, T>,
    scratch: ViewMut<'_, T::Acc>,
) -> Result<()> {
    const OP: &str = "short_conv::backward";
    let ConvKept { x, w, spans: words } = kept;
    let rows = spec.check(OP, dy.len(), x, w.len())?;
    let ConvSpec { channels, taps, silu } = spec;
    shape::check(OP, "dw", &[channels, taps], dw.len())?;
    check_rows((OP, "dx"), dx.view(), channels, rows)?;
    let count = words.len() / SPAN_WORDS;
    let scratch = scratch.scratch(OP, scratch_len(dev, spec, rows, count))?;
    let _op = dev.op(OP, || Work::moves::<T>(3 * rows * channels));
    match dev {
        _ if rows == 0 => Ok(()),
        Device::Cpu(cpu) => {
            let spans = spans(OP, words, rows)?;
            let by_tap = by_tap(spec, w.float()?.host());
            let inputs = ConvInputs { spec, x: floats(x)?, state: &[], by_tap };
            let (du, dy) = (scratch.host(), dy.float()?.host());
            let task = 4096usize.div_ceil(channels);
            cpu.rows(rows, task, (&mut *du, channels), |range, du| {
                for (du, r) in du.chunks_exact_mut(channels).zip(range) {
                    let (s, t) = place(spans, r);
                    let dy = &dy[r * channels..][..channels];
                    if silu {
                        inputs.row(cpu, du, s, t);
                        silu_back(cpu.isa(), du, dy);
                    } else {
                        du.copy_from_slice(dy);
                    }
                }
            });
            let (du, first, stride) = (&*du, dx.first, dx.stride);
            cpu.rows(rows, task, (dx.data.float()?.host(), stride), |range, dx| {
                for (dx, r) in dx.chunks_exact_mut(stride).zip(range) {
                    let (s, t) = place(spans, r);
                    let dx = &mut dx[first..][..channels];
                    dx.fill(<T::Acc as Float>::ZERO);
                    for j in (0..taps).filter(|j| t + taps - 1 - j < s.rows as usize) {
                        let du = &du[(r + taps - 1 - j) * channels..][..channels];
                        add_product(cpu.isa(), dx, &inputs.by_tap[j * channels..][..channels], du);
                    }
                }
            });
            cpu.rows(channels, 64, (dw.host(), taps), |range, dw| {
                // By taps, so that channels lie side by side.
                let n = range.len();
                let mut sums: Vec<T::Acc> =
                    (0..taps * n).map(|i| dw[i % n * taps + i / n]).collect();
                for s in spans {
                    for t in 0..s.rows as usize {
                        let du = &du[(s.at as usize + t) * channels..][range.clone()];
                        for j in (0..taps).filter(|j| taps - 1 - j <= t) {
                            let x = inputs.x.row(s.at as usize + t + j + 1 - taps, channels);
                            let sum = &mut sums[j * n..][..n];
                            add_product(cpu.isa(), sum, du, &x[range.clone()]);
                        }
                    }
                }
                sums.iter().enumerate().for_each(|(i, x)| dw[i % n * taps + i / n] = *x);
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let blocks = channels.div_ceil(kernel::THREADS);
            let launch = Launch::row(blocks * count, 0)?;
            let (d_first, d_stride) = (dx.first, dx.stride);
            let Strided { data: x, first: x_first, stride: x_stride } = x;
            let mut partial = scratch;
            kernel::Backward {
                dx: dx.data,
                partial: partial.reborrow(),
                dy,
                x,
                w,
                spans: words,
                channels,
                taps,
                silu: silu.into(),
                x_first,
                x_stride,
                d_first,
                d_stride,
                blocks,
            }
            .launch(cuda, launch)?;
            let launch = Launch::threads(channels * taps, kernel::THREADS)?;
            kernel::Sum { dw, partial: partial.view(), channels, taps, sequences: count }
                .launch(cuda, launch)
        }
    }
}

simd! {
    /// `u += w x`
    fn add_product[F: Float](u: &mut [F], w: &[F], x: &[F]) {
        for ((u, w), x) in u.iter_mut().zip(w).zip(x) {
            *u = w.mul_add(*x, *u);
        }
    }

    fn silu_row[F: Float](u: &mut [F]) {
        for u in u {
            *u *= u.sigmoid();
        }
    }

    /// `dy silu'(u)` in the place of `u`.
    fn silu_back[F: Float](u: &mut [F], dy: &[F]) {
        for (u, dy) in u.iter_mut().zip(dy) {
            let s = u.sigmoid();
            *u = *dy * (s * (F::ONE + *u * (F::ONE - s)));
        }
    }
}
