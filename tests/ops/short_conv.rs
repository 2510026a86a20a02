//! Short convolutions: hand-worked rows, central differences, sequences that are continued or
//! packed, bits.

use warpo::{
    Result,
    device::{Buffer, Device, Element, View},
    ops::{
        gate::Strided,
        short_conv::{self, ConvKept, ConvSpec, Sequences},
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_nan_only, devices, gradcheck, host, inner, randn,
    refusal,
    sim::{self, Case, Lab, Order},
};

/// Spans of sequences of so many rows, each from position 0 in a slot of its own.
pub fn whole(lens: &[usize]) -> Vec<u32> {
    let mut at = 0;
    let span = |(slot, len): (usize, &usize)| {
        at += len;
        [(at - len) as u32, *len as u32, 0, slot as u32]
    };
    lens.iter().enumerate().flat_map(span).collect()
}

fn conv<T: Element>(
    dev: &Device,
    spec: ConvSpec,
    x: View<'_, T>,
    w: View<'_, T>,
    spans: View<'_, u32>,
    state: &mut Buffer<'static, T>,
) -> Result<Buffer<'static, T>> {
    let mut y = Buffer::new(dev, "y", x.len())?;
    let of = Sequences { spans, state: state.view_mut() };
    let x = Strided::dense(x, spec.channels);
    short_conv::forward(dev, spec, y.view_mut(), x, w, of)?;
    Ok(y)
}

/// The same on the CPU, of whole sequences.
fn plain(spec: ConvSpec, x: &[f64], w: &[f64], lens: &[usize]) -> Vec<f64> {
    let spans = whole(lens);
    let y = conv(host(), spec, x.into(), w.into(), (&spans).into(), &mut Buffer::none());
    y.unwrap().host().to_vec()
}

#[test]
fn hand_worked() {
    let spec = ConvSpec { channels: 2, taps: 3, silu: false };
    let w = [100.0, 10.0, 1.0, -1.0, 0.0, 2.0];
    // Of a sequence of three rows, and of one of one row.
    let x = [1.0, 1.0, 2.0, 10.0, 3.0, 100.0, 4.0, 1000.0];
    let y = plain(spec, &x, &w, &[3, 1]);
    assert_eq!(y, [1.0, 2.0, 12.0, 20.0, 123.0, 199.0, 4.0, 2000.0]);
    let silu = ConvSpec { silu: true, ..spec };
    let want: Vec<f64> = y.iter().map(|u| u / (1.0 + (-u).exp())).collect();
    assert_close("y", &plain(silu, &x, &w, &[3, 1]), &want, 0.0, 1e-15);
}

const LENS: [usize; 5] = [7, 1, 0, 2, 40];
const ROWS: usize = 50;

#[test]
fn gradients() {
    for (taps, silu) in [(1, false), (2, true), (4, true), (3, false)] {
        let spec = ConvSpec { channels: 3, taps, silu };
        let [x, dy]: [Vec<f64>; 2] = ["x", "dy"].map(|name| randn(name, ROWS * 3));
        let w: Vec<f64> = randn("w", 3 * taps);
        let (spans, mut dx, mut dw) = (whole(&LENS), vec![0.0; ROWS * 3], vec![0.25; 3 * taps]);
        let kept =
            ConvKept { x: Strided::dense((&x).into(), 3), w: (&w).into(), spans: (&spans).into() };
        let mut scratch = vec![0.0; short_conv::scratch_len(host(), spec, ROWS, LENS.len())];
        let to = (Strided::dense((&mut dx).into(), 3), (&mut dw).into());
        short_conv::backward(host(), spec, to, (&dy).into(), kept, (&mut scratch).into()).unwrap();
        dw.iter_mut().for_each(|d| *d -= 0.25);
        gradcheck("x", &x, &dx, OP, |x| inner(&plain(spec, x, &w, &LENS), &dy));
        gradcheck("w", &w, &dw, OP, |w| inner(&plain(spec, &x, w, &LENS), &dy));
    }
}

/// Cut anywhere, a sequence that is continued from its state has the bits of a whole one.
fn continues<T: Element>(dev: &Device) {
    for taps in [1, 2, 4] {
        let (channels, rows) = (5, 11);
        let spec = ConvSpec { channels, taps, silu: true };
        let of = |name, n| {
            let x: Vec<T> = randn::<f64>(name, n).into_iter().map(T::of).collect();
            Buffer::of(dev, "test", &x).unwrap()
        };
        let (x, w) = (of("x", rows * channels), of("w", channels * taps));
        let words = |spans: &[u32]| Buffer::of(dev, "test", spans).unwrap();
        let read = |x: &Buffer<'static, T>| {
            dev.read(x.view()).unwrap().iter().map(|x| x.f64()).collect::<Vec<_>>()
        };
        let spans = words(&whole(&[rows]));
        let run = |rows: std::ops::Range<usize>, spans: &Buffer<'static, u32>, state: &mut _| {
            let x = x.view().range(rows.start * channels..rows.end * channels);
            read(&conv(dev, spec, x, w.view(), spans.view(), state).unwrap())
        };
        let all = run(0..rows, &spans, &mut Buffer::none());
        for cut in 0..rows {
            // NaN in the slots before and behind: none is read.
            let mut state =
                Buffer::of(dev, "test", &vec![T::of(f64::NAN); 3 * (taps - 1) * channels]).unwrap();
            let mut got = Vec::new();
            for r in [0..cut, cut..cut + 1, cut + 1..rows] {
                let span = [0, r.len() as u32, r.start as u32, 1];
                got.extend(run(r, &words(&span), &mut state));
            }
            assert_bits("y", &got, &all);
            let state = read(&state);
            let own = (taps - 1) * channels;
            let [before, at, behind] = [0, 1, 2].map(|i| &state[i * own..][..own]);
            assert!(before.iter().chain(behind).all(|x| x.is_nan()), "beside its slot");
            assert_eq!(at, &read(&x)[(rows + 1 - taps) * channels..]);
        }
    }
}

#[test]
fn a_continued_sequence_has_the_bits_of_a_whole_one() {
    for dev in devices() {
        continues::<f32>(&dev);
    }
}

#[test]
fn sequences_do_not_see_each_other() {
    let spec = ConvSpec { channels: 3, taps: 4, silu: true };
    let (mut x, w): (Vec<f32>, Vec<f32>) = (randn("x", ROWS * 3), randn("w", 12));
    let run = |dev: &Device, x: &[f32], lens: &[usize]| {
        let (spans, mut none) = (whole(lens), Buffer::none());
        let y = conv(dev, spec, x.into(), (&w).into(), (&spans).into(), &mut none);
        y.unwrap().host().to_vec()
    };
    let all = run(&devices()[0], &x, &LENS);
    for dev in devices() {
        let mut parts = Vec::new();
        let mut at = 0;
        for len in LENS {
            parts.extend(run(&dev, &x[at * 3..][..len * 3], &[len]));
            at += len;
        }
        assert_bits("y", &parts, &all);
    }
    // The last row of the first sequence: one number of it is NaN.
    x[19] = f32::NAN;
    assert_nan_only("y", &run(host(), &x, &LENS), &all, 19..20);
}

#[test]
fn wrong_shapes_are_refused() {
    let spec = ConvSpec { channels: 3, taps: 2, silu: false };
    let x = [0.0f32; 12];
    let run = |w: usize, spans: &[u32], state: usize| {
        let mut state = Buffer::zeros(host(), "state", state).unwrap();
        let w = vec![0.0; w];
        refusal(conv(host(), spec, x[..].into(), (&w).into(), spans.into(), &mut state))
    };
    assert_eq!(run(5, &[0, 4, 0, 0], 0), "short_conv: `w` has shape [5], wanted [3, 2]");
    assert_eq!(run(6, &[0, 4, 0, 0], 4), "short_conv: `state` has shape [4], wanted [1, 1, 3]");
    let e = run(6, &[0, 2, 0, 0, 3, 1, 0, 1], 0);
    assert!(e.contains("wanted sequences that follow each other up to row 4"), "{e}");
    let e = run(6, &[0, 3, 0, 0], 0);
    assert!(e.contains("wanted sequences that follow each other up to row 4"), "{e}");
}

struct Conv {
    spec: ConvSpec,
    lens: &'static [usize],
}

impl Case for Conv {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let (dev, Self { spec, lens }) = (lab.dev(), self);
        let (channels, taps, rows) = (spec.channels, spec.taps, lens.iter().sum::<usize>());
        let wide = channels + 3;
        let x = lab.rows::<T>("x", rows, wide);
        let (w, dy) = (lab.input::<T>("w", channels * taps), lab.rows::<T>("dy", rows, channels));
        let spans = Buffer::of(dev, "spans", &whole(lens))?;
        let mut y = lab.room::<T>(rows * channels);
        let mut state = lab.room::<T>(lens.len() * (taps - 1) * channels);
        let x = Strided { data: x.view(), first: 2, stride: wide };
        let of = Sequences { spans: spans.view(), state: state.view_mut() };
        short_conv::forward(dev, *spec, y.view_mut(), x, w.view(), of)?;
        lab.by_row("y", &y);
        lab.by_row("state", &state);
        let (mut dx, mut dw) =
            (Buffer::<T>::zeros(dev, "dx", rows * wide)?, lab.input("dw", channels * taps));
        let mut scratch = lab.room(short_conv::scratch_len(dev, *spec, rows, lens.len()));
        let to = Strided { data: dx.view_mut(), first: 1, stride: wide };
        let kept = ConvKept { x, w: w.view(), spans: spans.view() };
        let to = (to, dw.view_mut());
        short_conv::backward(dev, *spec, to, dy.view(), kept, scratch.view_mut())?;
        lab.by_row("dx", &dx);
        lab.sum("dw", &dw);
        Ok(())
    }
}

#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (channels, taps, silu, lens) in [
            (3, 4, true, &LENS[..]),
            (130, 3, false, &[5, 1, 12]),
            (8, 1, true, &[4]),
            (16, 2, true, &[1, 1, 9]),
        ] {
            sim.hold(&Conv { spec: ConvSpec { channels, taps, silu }, lens });
        }
    });
}

#[test]
fn kernels_continue_with_the_bits_of_whole_sequences() {
    sim::check(|sim| {
        let dev = sim.device(Order::default());
        continues::<f32>(&dev);
        continues::<half::bf16>(&dev);
    });
}

#[test]
fn kernels_refuse_more_taps_than_they_have() {
    sim::on_devices(|dev| {
        let spec = ConvSpec { channels: 8, taps: 5, silu: true };
        let e = refusal(short_conv::supported(dev, spec));
        assert_eq!(e, "taps of a convolution: got 5, wanted at most 4 on a CUDA device");
    });
}
