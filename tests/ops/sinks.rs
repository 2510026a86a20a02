//! Attention sinks: hand-worked heads, a plain softmax with one logit more, central differences
//! through attention, bits.

use warpo::{
    Result,
    device::{Buffer, Device, Element},
    ops::{
        attention::{
            self, BackwardArgs, ForwardOutputs, KvLayer, PAGE, Segment, SegmentBatch, Shape,
        },
        sinks,
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_nan_only, devices, gradcheck, inner, randn, refusal,
    room,
    sim::{self, Case, Lab},
};

#[test]
fn hand_worked() {
    let (dev, ln3) = (Device::cpu(), 3f64.ln());
    // Two heads of two: the positions keep 3 / 4, and a half.
    let (mut out, mut lse) = ([4.0, 8.0, 2.0, -6.0], [ln3, 5.0]);
    sinks::forward(&dev, (&mut out[..]).into(), (&mut lse[..]).into(), [0.0, 5.0][..].into())
        .unwrap();
    assert_close("out", &out, &[3.0, 6.0, 1.0, -3.0], 0.0, 1e-15);
    assert_close("lse", &lse, &[4f64.ln(), 5.0 + 2f64.ln()], 0.0, 1e-15);
    // 1 / 4 and 1 / 2 of dout . out go to the sinks.
    let (mut d, dout) = ([100.0, 100.0], [1.0, 10.0, 2.0, 2.0]);
    let to = (&mut d[..]).into();
    let (out, lse) = (out[..].into(), lse[..].into());
    sinks::backward(&dev, to, dout[..].into(), out, lse, [0.0, 5.0][..].into()).unwrap();
    assert_close("dsinks", &d, &[100.0 - 63.0 / 4.0, 102.0], 0.0, 1e-15);
}

const SHAPE: Shape =
    Shape { q_heads: 4, kv_heads: 2, head_dim: 6, scale: 0.7, softcap: None, window: Some(5) };
const ROWS: usize = 9;

/// Attention with sinks, and its gradients for `dout`, on the CPU.
fn attend(qkv: &[f64], sink: &[f64], dout: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let dev = Device::cpu();
    let mut arena = room(1 << 20);
    let scope = arena.scope();
    let segments = [Segment {
        first: 0,
        rows: ROWS as u32,
        at: 0,
        pages: 0..ROWS.div_ceil(PAGE) as u32,
        prefix: None,
    }];
    let pages: Vec<u32> = (0..1).collect();
    let batch = SegmentBatch::new(&segments, &pages);
    let mut kv = KvLayer::new(&scope, &SHAPE, PAGE, 1).unwrap();
    let mut qkv = qkv.to_vec();
    attention::append(&dev, &mut kv, (&mut qkv).into(), batch, &SHAPE, None).unwrap();
    let (mut out, mut lse) = (vec![0.0; dout.len()], vec![0.0; ROWS * SHAPE.q_heads]);
    let to = ForwardOutputs {
        out: (&mut out).into(),
        lse: (&mut lse).into(),
        scratch: (&mut [][..]).into(),
    };
    attention::forward(&dev, to, (&qkv).into(), &kv, batch, &SHAPE).unwrap();
    sinks::forward(&dev, (&mut out).into(), (&mut lse).into(), sink.into()).unwrap();
    let (mut dqkv, mut dsink) = (vec![0.0; qkv.len()], vec![0.0; sink.len()]);
    let mut scratch = vec![0.0; attention::backward_scratch_len(&SHAPE, ROWS)];
    let args = BackwardArgs {
        dqkv: (&mut dqkv).into(),
        dout: dout.into(),
        out: (&out).into(),
        qkv: (&qkv).into(),
        lse: (&lse).into(),
        scratch: (&mut scratch).into(),
    };
    attention::backward(&dev, args, batch, &SHAPE).unwrap();
    let (out_, lse_) = ((&out).into(), (&lse).into());
    sinks::backward(&dev, (&mut dsink).into(), dout.into(), out_, lse_, sink.into()).unwrap();
    (out, dqkv, dsink)
}

/// A softmax over the visible scores and one logit more, whose part is dropped.
fn naive(qkv: &[f64], sink: &[f64]) -> Vec<f64> {
    let Shape { q_heads, kv_heads, head_dim: d, scale, window, .. } = SHAPE;
    let cols = SHAPE.qkv_cols();
    let part = |r: usize, head: usize| &qkv[r * cols + head * d..][..d];
    let mut out = Vec::new();
    for r in 0..ROWS {
        for h in 0..q_heads {
            let g = h * kv_heads / q_heads;
            let seen: Vec<usize> = (0..=r).filter(|j| r - j < window.unwrap() as usize).collect();
            let e = |j: &usize| (scale * inner(part(r, h), part(*j, q_heads + g))).exp();
            let all = sink[h].exp() + seen.iter().map(e).sum::<f64>();
            let at = |c: usize| {
                seen.iter().map(|j| e(j) / all * part(*j, q_heads + kv_heads + g)[c]).sum::<f64>()
            };
            out.extend((0..d).map(at));
        }
    }
    out
}

#[test]
fn attention_with_sinks_is_a_softmax_with_one_logit_more() {
    let qkv: Vec<f64> = randn("qkv", ROWS * SHAPE.qkv_cols());
    let (sink, dout): (Vec<f64>, _) = (vec![-2.0, 0.5, 3.0, 9.0], randn::<f64>("dout", ROWS * 24));
    let (out, dqkv, dsink) = attend(&qkv, &sink, &dout);
    assert_close("out", &out, &naive(&qkv, &sink), 1e-13, 1e-12);
    gradcheck("qkv", &qkv, &dqkv, OP, |x| inner(&naive(x, &sink), &dout));
    gradcheck("sinks", &sink, &dsink, OP, |s| inner(&naive(&qkv, s), &dout));
}

/// Tasks have 16 rows. A NaN stays where it is.
#[test]
fn rows_do_not_see_their_batch() {
    let (rows, heads, d) = (40, 3, 5);
    let run = |dev: &Device, out: &[f32], lse: &[f32]| {
        let (mut out, mut lse) = (out.to_vec(), lse.to_vec());
        let sink = [0.1f32, -3.0, 2.0];
        sinks::forward(dev, (&mut out).into(), (&mut lse).into(), sink[..].into()).unwrap();
        (out, lse)
    };
    let (out, mut lse): (Vec<f32>, Vec<f32>) =
        (randn("out", rows * heads * d), randn("lse", rows * heads));
    let whole = run(&devices()[0], &out, &lse);
    for dev in devices() {
        for n in [0, 1, 15, 16, 17, 40] {
            let at = (rows - n) * heads;
            let part = run(&dev, &out[at * d..], &lse[at..]);
            assert_bits("out", &part.0, &whole.0[at * d..]);
            assert_bits("lse", &part.1, &whole.1[at..]);
        }
    }
    lse[7] = f32::NAN;
    let bad = run(&Device::cpu(), &out, &lse);
    assert_nan_only("out", &bad.0, &whole.0, 7 * d..8 * d);
    assert_nan_only("lse", &bad.1, &whole.1, 7..8);
}

#[test]
fn wrong_shapes_are_refused() {
    let dev = Device::cpu();
    let (mut out, mut lse, mut d) = ([0.0f32; 12], [0.0f32; 4], [0.0f32; 3]);
    let (o, l) = ((&mut out[..11]).into(), (&mut lse[..]).into());
    let e = refusal(sinks::forward(&dev, o, l, [0.0; 2][..].into()));
    assert_eq!(e, "sinks: `out` has shape [11], wanted [2, 2, 2]");
    let (o, l) = ((&mut out[..]).into(), (&mut lse[..3]).into());
    let e = refusal(sinks::forward(&dev, o, l, [0.0; 2][..].into()));
    assert_eq!(e, "sinks: `lse` has shape [3], wanted [1, 2]");
    let mut back = |n: usize, m: usize| {
        let (out, lse) = (out[..].into(), lse[..].into());
        let d = (&mut d[..m]).into();
        refusal(sinks::backward(&dev, d, [0.0; 12][..n].into(), out, lse, [0.0; 2][..].into()))
    };
    assert_eq!(back(11, 2), "sinks::backward: `dout` has shape [11], wanted [2, 2, 3]");
    assert_eq!(back(12, 3), "sinks::backward: `dsinks` has shape [3], wanted [2]");
}

struct Sinks {
    rows: usize,
    heads: usize,
    d: usize,
}

impl Case for Sinks {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let Self { rows, heads, d } = *self;
        let dev = lab.dev();
        let (mut out, sink) = (lab.rows::<T>("out", rows, heads * d), lab.input("sinks", heads));
        let mut lse = lab.spread::<T::Acc>("lse", rows, heads, (0.0, 4.0));
        sinks::forward(dev, out.view_mut(), lse.view_mut(), sink.view())?;
        lab.by_row("out", &out);
        lab.by_row("lse", &lse);
        let dout = lab.rows::<T>("dout", rows, heads * d);
        let (out, mut lse) = (lab.rows::<T>("out", rows, heads * d), lse);
        // As large as one with sinks at least.
        let large: Vec<T::Acc> = dev
            .read(lab.rows::<T::Acc>("large", rows, heads).view())?
            .iter()
            .map(|x| T::Acc::of(2.0 + x.f64().abs()))
            .collect();
        dev.write(lse.view_mut(), &large)?;
        let mut d: Buffer<'static, T::Acc> = lab.input("dsinks", heads);
        let (dout, out) = (dout.view(), out.view());
        sinks::backward(dev, d.view_mut(), dout, out, lse.view(), sink.view())?;
        lab.sum("dsinks", &d);
        Ok(())
    }
}

#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, heads, d) in [(0, 2, 8), (1, 1, 8), (37, 3, 64), (130, 4, 24), (9, 2, 5)] {
            sim.hold(&Sinks { rows, heads, d });
        }
        sim.hold_rows(37, |rows| Sinks { rows, heads: 3, d: 16 });
    });
}
