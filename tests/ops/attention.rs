//! Attention: hand-worked values, the definition, central differences, and bits that depend on
//! neither batch, chunks, pages nor what else is in the cache.

use std::ops::Range;

use warpo::{
    device::{Arena, Device, Float, Scope},
    ops::attention::{self, KvLayer, MAX_HEAD_DIM, PAGE, Segment, Shape},
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only, assert_norm, devices, gradcheck,
    inner, randn, refusal, room, shuffled, wide,
};

fn shape(q_heads: usize, kv_heads: usize, head_dim: usize) -> Shape {
    Shape { q_heads, kv_heads, head_dim, scale: 0.7 / (head_dim as f64).sqrt() }
}

/// Sequences, and where their pages are in the cache.
struct Case<F> {
    shape: Shape,
    qkv: Vec<Vec<F>>,
    list: Vec<u32>,
    pages: Vec<Range<u32>>,
}

/// Rows of a batch: positions of a sequence.
type Part = (usize, Range<usize>);

impl<F: Float> Case<F> {
    fn new(shape: Shape, qkv: Vec<Vec<F>>) -> Self {
        let (mut pages, mut next) = (Vec::new(), 0);
        for x in &qkv {
            let n = (x.len() / shape.qkv_cols()).div_ceil(PAGE) as u32;
            pages.push(next..next + n);
            next += n;
        }
        // Pages stand in no order, with gaps.
        let list = shuffled("pages", next as usize + 3).iter().map(|p| *p as u32).collect();
        Self { shape, qkv, list, pages }
    }

    fn random(shape: Shape, lens: &[usize]) -> Self {
        let cols = shape.qkv_cols();
        let qkv = lens.iter().enumerate().map(|(i, n)| randn(&format!("qkv{i}"), n * cols));
        Self::new(shape, qkv.collect())
    }

    fn rows(&self, s: usize) -> usize {
        self.qkv[s].len() / self.shape.qkv_cols()
    }

    fn whole(&self) -> Vec<Part> {
        (0..self.qkv.len()).map(|s| (s, 0..self.rows(s))).collect()
    }

    fn room(&self) -> Arena {
        let layer = |s: &Scope<'_>| KvLayer::<F>::new(s, &self.shape, self.list.len()).map(drop);
        room(Arena::plan(layer).unwrap())
    }

    /// A cache full of NaN, as if other sequences had gone bad.
    fn cache<'s>(&self, dev: &Device, scope: &'s Scope<'_>) -> KvLayer<'s, F> {
        let total = self.list.len();
        let mut kv = KvLayer::new(scope, &self.shape, total).unwrap();
        let bad = vec![F::of(f64::NAN); total * PAGE * self.shape.qkv_cols()];
        let (rows, all) = ((total * PAGE) as u32, (0..total as u32).collect::<Vec<_>>());
        let segment = Segment { first: 0, rows, at: 0, pages: 0..total as u32 };
        let (bad, all) = ((&bad).into(), (&all).into());
        attention::append(dev, &mut kv, bad, &[segment], all, &self.shape).unwrap();
        kv
    }

    fn segments(&self, batch: &[Part]) -> Vec<Segment> {
        let mut at = 0;
        let segment = |(s, positions): &Part| {
            let rows = positions.len() as u32;
            at += rows;
            let pages = self.pages[*s].clone();
            Segment { first: positions.start as u32, rows, at: at - rows, pages }
        };
        batch.iter().map(segment).collect()
    }

    /// Appends a batch to the cache and attends: `out` and `lse` of its rows.
    fn step(&self, dev: &Device, kv: &mut KvLayer<'_, F>, batch: &[Part]) -> (Vec<F>, Vec<F>) {
        let (s, cols) = (&self.shape, self.shape.qkv_cols());
        let rows = |(s, p): &Part| self.qkv[*s][p.start * cols..p.end * cols].to_vec();
        let qkv: Vec<F> = batch.iter().flat_map(rows).collect();
        let (segments, list) = (self.segments(batch), (&self.list).into());
        attention::append(dev, kv, (&qkv).into(), &segments, list, s).unwrap();
        let n = qkv.len() / cols;
        let mut out = vec![F::of(f64::NAN); n * s.q_heads * s.head_dim];
        let mut lse = vec![F::of(f64::NAN); n * s.q_heads];
        let (o, l) = ((&mut out).into(), (&mut lse).into());
        attention::forward(dev, o, l, (&qkv).into(), kv, &segments, list, s).unwrap();
        (out, lse)
    }

    /// One batch on a fresh cache.
    fn forward(&self, dev: &Device, batch: &[Part]) -> (Vec<F>, Vec<F>) {
        let mut arena = self.room();
        let scope = arena.scope();
        self.step(dev, &mut self.cache(dev, &scope), batch)
    }

    /// dqkv of a batch of whole sequences.
    fn backward(&self, dev: &Device, batch: &[Part], dout: &[F]) -> Vec<F> {
        let (out, lse) = self.forward(dev, batch);
        let qkv: Vec<F> = batch.iter().flat_map(|(s, _)| self.qkv[*s].clone()).collect();
        let mut dqkv = vec![F::of(f64::NAN); qkv.len()];
        let need = attention::scratch_len(&self.shape, lse.len() / self.shape.q_heads);
        let mut scratch = vec![F::of(f64::NAN); need];
        attention::backward(
            dev,
            (&mut dqkv).into(),
            dout.into(),
            (&out).into(),
            (&qkv).into(),
            (&lse).into(),
            &self.segments(batch),
            &self.shape,
            (&mut scratch).into(),
        )
        .unwrap();
        dqkv
    }
}

#[test]
fn hand_worked() {
    // One key-value head of width 1, two query heads. Row 1 of head 0 sees scores 0 and ln 3:
    // weights 1/4 and 3/4; head 1 sees 0 and -ln 3.
    let ln3 = 3f64.ln();
    let shape = Shape { q_heads: 2, kv_heads: 1, head_dim: 1, scale: 0.5 };
    let qkv = vec![5.0, 7.0, 0.0, 2.0, 1.0, -1.0, 2.0 * ln3, 6.0];
    let case = Case::new(shape, vec![qkv]);
    let (out, lse) = case.forward(&Device::cpu(), &case.whole());
    assert_close("out", &out, &[2.0, 2.0, 5.0, 3.0], 1e-14, 0.0);
    assert_close("lse", &lse, &[0.0, 0.0, 4f64.ln(), (4.0 / 3.0f64).ln()], 1e-15, 1e-15);
}

/// Softmax over all earlier positions, written plainly.
fn plain<F: Float>(s: &Shape, qkv: &[F]) -> (Vec<F>, Vec<F>) {
    let (d, cols, group) = (s.head_dim, s.qkv_cols(), s.q_heads / s.kv_heads);
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    let dot = |a: &[F], b: &[F]| a.iter().zip(b).fold(F::ZERO, |s, (a, b)| s + *a * *b);
    for r in 0..qkv.len() / cols {
        for h in 0..s.q_heads {
            let head = |row: usize, at: usize| &qkv[row * cols + at * d..][..d];
            let key = |j: usize| head(j, s.q_heads + h / group);
            let value = |j: usize| head(j, s.q_heads + s.kv_heads + h / group);
            let z: Vec<F> = (0..=r).map(|j| dot(head(r, h), key(j)) * F::of(s.scale)).collect();
            let top = z.iter().fold(F::NEG_INFINITY, |m, z| m.max_nan(*z));
            let sum = z.iter().fold(F::ZERO, |s, z| s + (*z - top).exp());
            lse.push(top + sum.ln());
            let weight = |j: usize| (z[j] - top).exp() / sum;
            let element = |i: usize| (0..=r).fold(F::ZERO, |s, j| s + weight(j) * value(j)[i]);
            out.extend((0..d).map(element));
        }
    }
    (out, lse)
}

/// Groups of 1, 2, 3 and 4, heads around a panel of 32, lengths around a page and a tile of 24.
#[test]
fn is_the_definition() {
    let dev = Device::cpu();
    for (s, lens) in [
        (shape(1, 1, 1), vec![1, 2, 31, 32, 33]),
        (shape(3, 1, 33), vec![23, 24, 25]),
        (shape(4, 2, 8), vec![5, 0, 67, 1]),
        (shape(2, 2, 31), vec![49]),
        (shape(4, 1, 32), vec![64, 65]),
        (shape(2, 1, MAX_HEAD_DIM), vec![37]),
    ] {
        let what = format!("{s:?} {lens:?}");
        let case = Case::<f32>::random(s.clone(), &lens);
        let exact = Case::new(s.clone(), case.qkv.iter().map(|x| wide(x)).collect());
        let (out, lse) = exact.forward(&dev, &exact.whole());
        let all = |f: &dyn Fn(usize) -> (Vec<f64>, Vec<f64>)| {
            let (o, l): (Vec<_>, Vec<_>) = (0..lens.len()).map(f).unzip();
            (o.concat(), l.concat())
        };
        let (truth, truth_lse) = all(&|i| plain(&s, &exact.qkv[i]));
        assert_close(&what, &out, &truth, 1e-13, 1e-13);
        assert_close(&what, &lse, &truth_lse, 1e-13, 1e-13);
        let (plain32, plain_lse): (Vec<_>, Vec<_>) = case.qkv.iter().map(|x| plain(&s, x)).unzip();
        let (out, lse) = case.forward(&dev, &case.whole());
        assert_earned(&what, &out, &plain32.concat(), &truth);
        assert_earned(&what, &lse, &plain_lse.concat(), &truth_lse);
    }
}

#[test]
fn gradients() {
    let dev = Device::cpu();
    // The last crosses a panel of keys and a tile of 48 queries.
    for (s, lens) in [
        (shape(1, 1, 1), vec![1]),
        (shape(2, 2, 3), vec![3, 1, 5]),
        (shape(4, 2, 2), vec![2, 7]),
        (shape(3, 1, 33), vec![2]),
        (shape(2, 1, 1), vec![35, 51]),
    ] {
        let case = Case::<f64>::random(s.clone(), &lens);
        let rows: usize = lens.iter().sum();
        let dout: Vec<f64> = randn("dout", rows * s.q_heads * s.head_dim);
        let dqkv = case.backward(&dev, &case.whole(), &dout);
        let loss = |flat: &[f64]| {
            let mut rest = flat;
            let mut total = 0.0;
            for (i, n) in lens.iter().enumerate() {
                let (own, after) = rest.split_at(n * s.qkv_cols());
                rest = after;
                let from = lens[..i].iter().sum::<usize>() * s.q_heads * s.head_dim;
                let case = Case::new(s.clone(), vec![own.to_vec()]);
                let out = case.forward(&dev, &case.whole()).0;
                total += inner(&out, &dout[from..from + out.len()]);
            }
            total
        };
        gradcheck(&format!("{s:?} {lens:?}"), &case.qkv.concat(), &dqkv, OP, loss);
    }
}

#[test]
fn f32_gradients_are_near_those_of_f64() {
    let s = shape(4, 2, 16);
    let case = Case::<f32>::random(s.clone(), &[70, 3]);
    let dout: Vec<f32> = randn("dout", 73 * 64);
    let ours = case.backward(&Device::cpu(), &case.whole(), &dout);
    let exact = Case::new(s, case.qkv.iter().map(|x| wide(x)).collect());
    let truth = exact.backward(&Device::cpu(), &exact.whole(), &wide(&dout));
    assert_norm("dqkv", &ours, &truth, 1e-5);
}

/// Properties 1 and 2: prefill in chunks and decoding one by one, alone or among others, give the
/// bits of the whole sequence.
#[test]
fn chunks_and_decoding_have_the_bits_of_the_whole() {
    let (s, lens) = (shape(4, 2, 20), [77, 40, 65]);
    let case = Case::<f32>::random(s.clone(), &lens);
    let (out_cols, heads) = (s.q_heads * s.head_dim, s.q_heads);
    let alone = |i: usize| case.forward(&devices()[0], &[(i, 0..lens[i])]);
    let want: Vec<(Vec<f32>, Vec<f32>)> = (0..3).map(alone).collect();
    for dev in devices() {
        for chunk in [1, 2, 31, 32, 33] {
            for others in [false, true] {
                let mut arena = case.room();
                let scope = arena.scope();
                let mut kv = case.cache(&dev, &scope);
                for start in (0..lens[0]).step_by(chunk) {
                    // The others run at other speeds, before and after in the batch.
                    let mut batch = vec![(0, start..lens[0].min(start + chunk))];
                    for (s, slower) in [(1, 2), (2, 1)] {
                        let at = |p: usize| lens[s].min(p / slower);
                        let part = at(start)..at(start + chunk);
                        if others && !part.is_empty() {
                            batch.insert(if s == 1 { 0 } else { batch.len() }, (s, part));
                        }
                    }
                    let (out, lse) = case.step(&dev, &mut kv, &batch);
                    let mut row = 0;
                    for (s, part) in batch {
                        let what = format!("chunk {chunk}, {others}, {s}, {part:?} {dev:?}");
                        let (n, (o, l)) = (part.len(), &want[s]);
                        let got = &out[row * out_cols..(row + n) * out_cols];
                        assert_bits(&what, got, &o[part.start * out_cols..part.end * out_cols]);
                        let got = &lse[row * heads..(row + n) * heads];
                        assert_bits(&what, got, &l[part.start * heads..part.end * heads]);
                        row += n;
                    }
                }
            }
        }
    }
}

/// Whole sequences in any company, forward and backward.
#[test]
fn rows_do_not_see_their_batch() {
    let (s, lens) = (shape(4, 2, 20), [50, 1, 33, 24, 25]);
    let case = Case::<f32>::random(s.clone(), &lens);
    let width = s.q_heads * s.head_dim;
    let dout: Vec<Vec<f32>> =
        (0..lens.len()).map(|i| randn(&format!("dout{i}"), lens[i] * width)).collect();
    let one = &devices()[0];
    let whole = |i: usize| vec![(i, 0..lens[i])];
    let out: Vec<_> = (0..lens.len()).map(|i| case.forward(one, &whole(i)).0).collect();
    let dqkv: Vec<_> = (0..lens.len()).map(|i| case.backward(one, &whole(i), &dout[i])).collect();
    for dev in devices() {
        for order in [vec![], vec![1], vec![0, 1, 2, 3, 4], vec![3, 1, 4, 0, 2], vec![2, 0]] {
            let what = format!("{order:?} {dev:?}");
            let batch: Vec<Part> = order.iter().flat_map(|i| whole(*i)).collect();
            let pick = |x: &[Vec<f32>]| {
                order.iter().flat_map(|i: &usize| x[*i].clone()).collect::<Vec<f32>>()
            };
            assert_bits(&what, &case.forward(&dev, &batch).0, &pick(&out));
            assert_bits(&what, &case.backward(&dev, &batch, &pick(&dout)), &pick(&dqkv));
        }
    }
}

/// A bad query spoils its row, a bad key the rows that see it, a bad value those and the rows that
/// share a tile with it (0 times NaN is NaN); other heads and sequences feel nothing.
#[test]
fn a_nan_stays_in_its_sequence() {
    let (dev, s) = (Device::cpu(), shape(2, 2, 4));
    let case = Case::<f32>::random(s.clone(), &[5, 40, 6]);
    let (cols, width) = (s.qkv_cols(), 8);
    let clean = case.forward(&dev, &case.whole()).0;
    let with = |row: usize, column: usize| {
        let mut qkv = case.qkv.clone();
        qkv[1][row * cols + column] = f32::NAN;
        let case = Case::new(s.clone(), qkv);
        case.forward(&dev, &case.whole()).0
    };
    let at = |row: usize, head: usize| (5 + row) * width + head * 4;
    for row in [0, 20, 39] {
        assert_nan_only("query", &with(row, 0), &clean, at(row, 0)..at(row, 1));
        let heads = |out: &[f32], head: usize| -> Vec<f32> {
            out.chunks(4).skip(head).step_by(2).flatten().copied().collect()
        };
        let (got, bad) = (with(row, 3 * 4), (5 + row) * 4..45 * 4);
        assert_nan_only("key", &heads(&got, 1), &heads(&clean, 1), bad);
        assert_bits("the other head", &heads(&got, 0), &heads(&clean, 0));
        let got = with(row, 4 * 4 + 2);
        assert!((row..40).all(|r| got[at(r, 0) + 2].is_nan()), "a NaN was lost");
        assert_bits("the other head", &heads(&got, 1), &heads(&clean, 1));
        assert_bits("before", &got[..5 * width], &clean[..5 * width]);
        assert_bits("after", &got[45 * width..], &clean[45 * width..]);
    }
}

/// What `append` and `forward` say of these segments, on two pages and ten rows of width 3.
fn refused(segments: &[Segment], list: &[u32]) -> [String; 2] {
    let (dev, s) = (Device::cpu(), shape(1, 1, 1));
    let mut arena = room(1 << 16);
    let scope = arena.scope();
    let mut kv = KvLayer::<f32>::new(&scope, &s, 2).unwrap();
    let qkv = vec![0.0; 30];
    let (x, list) = ((&qkv).into(), list.into());
    let append = attention::append(&dev, &mut kv, x, segments, list, &s);
    let (mut out, mut lse) = (vec![0.0; 10], vec![0.0; 10]);
    let (out, lse) = ((&mut out).into(), (&mut lse).into());
    let forward = attention::forward(&dev, out, lse, x, &kv, segments, list, &s);
    [refusal(append), refusal(forward)]
}

#[test]
fn segments_that_do_not_fit_are_refused() {
    let segment = |first, rows, at, pages| Segment { first, rows, at, pages };
    for (segments, says) in [
        (vec![segment(0, 4, 0, 0..1)], ": rows of all segments: got 4, wanted 10"),
        (vec![segment(0, 11, 0, 0..1)], ": rows of all segments: got 11, wanted 10"),
        (vec![], ": rows of all segments: got 0, wanted 10"),
        (
            vec![segment(0, 6, 4, 0..1), segment(0, 4, 0, 1..2)],
            ": first row of segment 0: got 4, wanted 0",
        ),
        (
            vec![segment(0, 5, 0, 0..1), segment(0, 5, 0, 1..2)],
            ": first row of segment 1: got 0, wanted 5",
        ),
        (
            vec![segment(23, 10, 0, 0..1)],
            ": pages of segment 0: got 0..1, wanted 2 within a list of 2",
        ),
        (
            vec![segment(0, 10, 0, 2..3)],
            ": pages of segment 0: got 2..3, wanted 1 within a list of 2",
        ),
        (
            vec![segment(0, 10, 0, 0..1), segment(0, 0, 10, Range { start: 5, end: 0 })],
            ": pages of segment 1: got 5..0, wanted 0 within a list of 2",
        ),
    ] {
        let [append, forward] = refused(&segments, &[0, 1]);
        assert_eq!(append, format!("attention::append{says}"));
        assert_eq!(forward, format!("attention{says}"));
    }
    let [append, forward] = refused(&[segment(0, 10, 0, 1..2)], &[0, 2]);
    let says = ": page id of segment 0: got 2, wanted less than 2";
    assert_eq!(append, format!("attention::append{says}"));
    assert_eq!(forward, format!("attention{says}"));
}

/// What backward says of these lengths of dqkv, dout, out, qkv, lse and scratch.
fn backward_refused(n: [usize; 6], segments: &[Segment], s: &Shape) -> String {
    let [mut dqkv, dout, out, qkv, lse, mut scratch] = n.map(|n| vec![0.0f32; n]);
    refusal(attention::backward(
        &Device::cpu(),
        (&mut dqkv).into(),
        (&dout).into(),
        (&out).into(),
        (&qkv).into(),
        (&lse).into(),
        segments,
        s,
        (&mut scratch).into(),
    ))
}

#[test]
fn bad_input_of_backward_is_refused() {
    let segment = |first, rows, at| Segment { first, rows, at, pages: 0..1 };
    let (s, one) = (shape(1, 1, 1), [segment(0, 10, 0)]);
    for (n, says) in [
        ([29, 10, 10, 30, 10, 30], "`dqkv` has shape [29], wanted [10, 3]"),
        ([30, 9, 10, 30, 10, 30], "`dout` has shape [9], wanted [10, 1]"),
        ([30, 10, 9, 30, 10, 30], "`out` has shape [9], wanted [10, 1]"),
        ([30, 10, 10, 29, 10, 30], "`qkv` has shape [29], wanted [9, 3]"),
        ([30, 10, 10, 30, 9, 30], "`lse` has shape [9], wanted [10, 1]"),
        ([30, 10, 10, 30, 10, 29], "`scratch` has shape [29], wanted [30]"),
    ] {
        assert_eq!(backward_refused(n, &one, &s), format!("attention::backward: {says}"));
    }
    // Segments that do not line up used to give wrong gradients.
    for (segments, says) in [
        (vec![segment(3, 10, 0)], "first position of segment 0: got 3, wanted 0"),
        (vec![segment(0, 9, 0)], "rows of all segments: got 9, wanted 10"),
        (vec![segment(0, 5, 5), segment(0, 5, 0)], "first row of segment 0: got 5, wanted 0"),
        (vec![segment(0, 5, 0), segment(0, 5, 0)], "first row of segment 1: got 0, wanted 5"),
    ] {
        let got = backward_refused([30, 10, 10, 30, 10, 30], &segments, &s);
        assert_eq!(got, format!("attention::backward: {says}"));
    }
}

#[test]
fn impossible_heads_and_wrong_buffers_are_refused() {
    for s in [shape(3, 2, 4), shape(1, 0, 4), shape(2, 1, 0), shape(2, 1, MAX_HEAD_DIM + 1)] {
        let says = backward_refused([0; 6], &[], &s);
        let want = "attention::backward: shape: got Shape { q_heads: ";
        assert!(says.starts_with(want), "{says}");
        assert!(says.ends_with("wanted heads in whole groups, head_dim from 1 to 256"), "{says}");
    }
    let (dev, s) = (Device::cpu(), shape(2, 1, 2));
    let mut arena = room(1 << 16);
    let scope = arena.scope();
    let mut kv = KvLayer::<f32>::new(&scope, &s, 1).unwrap();
    let one = [Segment { first: 0, rows: 3, at: 0, pages: 0..1 }];
    let (x, list) = (vec![0.0; 24], [0u32]);
    let e = attention::append(&dev, &mut kv, x[..23].into(), &one, list[..].into(), &s);
    assert_eq!(refusal(e), "attention::append: `qkv` has shape [23], wanted [2, 8]");
    for (out, lse, qkv, says) in [
        (11, 6, 24, "`out` has shape [11], wanted [3, 4]"),
        (12, 5, 24, "`lse` has shape [5], wanted [3, 2]"),
        (12, 6, 23, "`qkv` has shape [23], wanted [2, 8]"),
    ] {
        let (mut out, mut lse) = (vec![0.0; out], vec![0.0; lse]);
        let (o, l, x) = ((&mut out).into(), (&mut lse).into(), x[..qkv].into());
        let e = attention::forward(&dev, o, l, x, &kv, &one, list[..].into(), &s);
        assert_eq!(refusal(e), format!("attention: {says}"));
    }
    let e = KvLayer::<f32>::new(&scope, &s, 1 << 20).unwrap_err().to_string();
    assert!(e.starts_with("KV cache, keys needs 268435"), "{e}");
}
