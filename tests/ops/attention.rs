//! Attention: hand-worked values, the definition, central differences, and bits that depend on
//! neither batch, chunks, pages nor what else is in the cache.

use std::ops::Range;

use half::bf16;
use warpo::{
    device::{Arena, Buffer, Device, Element, Float, Scope},
    ops::{
        attention::{self, KvLayer, MAX_HEAD_DIM, PAGE, Parts, Segment, Shape, Work},
        rope::{self, Rope, Table},
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only, assert_norm, devices, gradcheck,
    host, inner, randn, refusal, room, shuffled,
    sim::{self, Lab, Machine, Order, Sim, Variant},
    wide,
};

fn shape(q_heads: usize, kv_heads: usize, head_dim: usize) -> Shape {
    let scale = 0.7 / (head_dim as f64).sqrt();
    Shape { q_heads, kv_heads, head_dim, scale, softcap: None, window: None }
}

/// Sequences, and where their pages are in the cache.
struct Case<T> {
    shape: Shape,
    qkv: Vec<Vec<T>>,
    page: usize,
    list: Vec<u32>,
    pages: Vec<Range<u32>>,
}

/// Rows of a batch: positions of a sequence.
type Part = (usize, Range<usize>);

impl<T: Element> Case<T> {
    fn new(dev: &Device, shape: Shape, qkv: Vec<Vec<T>>) -> Self {
        let (mut pages, mut next, page) = (Vec::new(), 0, shape.page(dev));
        for x in &qkv {
            let n = (x.len() / shape.qkv_cols()).div_ceil(page) as u32;
            pages.push(next..next + n);
            next += n;
        }
        // Pages stand in no order, with gaps.
        let list = shuffled("pages", next as usize + 3).iter().map(|p| *p as u32).collect();
        Self { shape, qkv, page, list, pages }
    }

    fn random(dev: &Device, shape: Shape, lens: &[usize]) -> Self {
        let cols = shape.qkv_cols();
        let of = |(i, n): (usize, &usize)| -> Vec<T> {
            randn::<f64>(&format!("qkv{i}"), n * cols).into_iter().map(T::of).collect()
        };
        Self::new(dev, shape, lens.iter().enumerate().map(of).collect())
    }

    fn rows(&self, s: usize) -> usize {
        self.qkv[s].len() / self.shape.qkv_cols()
    }

    fn whole(&self) -> Vec<Part> {
        (0..self.qkv.len()).map(|s| (s, 0..self.rows(s))).collect()
    }

    fn room(&self, dev: &Device) -> Arena {
        let (page, pages) = (self.page, self.list.len());
        let layer = |s: &Scope<'_>| KvLayer::<T>::new(s, &self.shape, page, pages).map(drop);
        Arena::new(dev, Arena::plan(layer).unwrap()).unwrap()
    }

    /// A cache full of NaN, as if other sequences had gone bad.
    fn cache<'s>(&self, dev: &Device, scope: &'s Scope<'_>) -> KvLayer<'s, T> {
        let total = self.list.len();
        let mut kv = KvLayer::new(scope, &self.shape, self.page, total).unwrap();
        let bad = vec![T::of(f64::NAN); total * self.page * self.shape.qkv_cols()];
        let (rows, all) = ((total * self.page) as u32, (0..total as u32).collect::<Vec<_>>());
        let segment = [Segment { first: 0, rows, at: 0, pages: 0..total as u32, prefix: None }];
        self.with_work(dev, &segment, &all, |work| {
            let mut bad = Buffer::of(dev, "test", &bad).unwrap();
            attention::append(dev, &mut kv, bad.view_mut(), work, &self.shape, None).unwrap();
        });
        kv
    }

    fn segments(&self, batch: &[Part]) -> Vec<Segment> {
        let mut at = 0;
        let segment = |(s, positions): &Part| {
            let rows = positions.len() as u32;
            at += rows;
            let (first, pages) = (positions.start as u32, self.pages[*s].clone());
            Segment { first, rows, at: at - rows, pages, prefix: None }
        };
        batch.iter().map(segment).collect()
    }

    fn with_work<R>(
        &self,
        dev: &Device,
        segments: &[Segment],
        list: &[u32],
        f: impl FnOnce(Work<'_>) -> R,
    ) -> R {
        let pages = list.iter().max().map_or(0, |most| *most as usize + 1);
        let parts = Parts::new(dev, &self.shape, segments, list, pages).unwrap();
        let words = Buffer::of(dev, "test", parts.words()).unwrap();
        let pages = Buffer::of(dev, "test", list).unwrap();
        f(Work { parts: Some((&parts, words.view())), ..Work::new(segments, pages.view()) })
    }

    /// Appends a batch to the cache and attends: `out` and `lse` of its rows.
    fn step(&self, dev: &Device, kv: &mut KvLayer<'_, T>, batch: &[Part]) -> (Vec<T>, Vec<T::Acc>) {
        let cols = self.shape.qkv_cols();
        let rows = |(s, p): &Part| self.qkv[*s][p.start * cols..p.end * cols].to_vec();
        let qkv: Vec<T> = batch.iter().flat_map(rows).collect();
        self.attend(dev, kv, &self.segments(batch), &self.list, &qkv)
    }

    fn attend(
        &self,
        dev: &Device,
        kv: &mut KvLayer<'_, T>,
        segments: &[Segment],
        list: &[u32],
        qkv: &[T],
    ) -> (Vec<T>, Vec<T::Acc>) {
        let mut buffer = Buffer::of(dev, "test", qkv).unwrap();
        self.with_work(dev, segments, list, |work| {
            attention::append(dev, kv, buffer.view_mut(), work, &self.shape, None).unwrap();
        });
        self.look(dev, kv, segments, list, qkv)
    }

    /// Attends to what is in the cache.
    fn look(
        &self,
        dev: &Device,
        kv: &KvLayer<'_, T>,
        segments: &[Segment],
        list: &[u32],
        qkv: &[T],
    ) -> (Vec<T>, Vec<T::Acc>) {
        let (s, n) = (&self.shape, qkv.len() / self.shape.qkv_cols());
        let qkv = Buffer::of(dev, "test", qkv).unwrap();
        let mut out = Buffer::new(dev, "test", n * s.q_heads * s.head_dim).unwrap();
        let mut lse = Buffer::new(dev, "test", n * s.q_heads).unwrap();
        let singles = segments.iter().filter(|s| s.rows == 1).count();
        let longest = segments.iter().map(|s| (s.first + s.rows) as usize).max().unwrap_or(0);
        let need = attention::forward_scratch_len(dev, s, singles, longest);
        let mut scratch = Buffer::new(dev, "test", need).unwrap();
        self.with_work(dev, segments, list, |work| {
            let (o, l, scratch) = (out.view_mut(), lse.view_mut(), scratch.view_mut());
            attention::forward(dev, o, l, qkv.view(), kv, work, s, scratch).unwrap();
        });
        (dev.read(out.view()).unwrap(), dev.read(lse.view()).unwrap())
    }

    /// One batch on a fresh cache.
    fn forward(&self, dev: &Device, batch: &[Part]) -> (Vec<T>, Vec<T::Acc>) {
        let mut arena = self.room(dev);
        let scope = arena.scope();
        self.step(dev, &mut self.cache(dev, &scope), batch)
    }

    /// dqkv of a batch of whole sequences.
    fn backward(&self, dev: &Device, batch: &[Part], dout: &[T]) -> Vec<T> {
        let (out, lse) = self.forward(dev, batch);
        let qkv: Vec<T> = batch.iter().flat_map(|(s, _)| self.qkv[*s].clone()).collect();
        self.gradient(dev, &self.segments(batch), [dout, &out, &qkv], &lse)
    }

    fn gradient(
        &self,
        dev: &Device,
        segments: &[Segment],
        inputs: [&[T]; 3],
        lse: &[T::Acc],
    ) -> Vec<T> {
        let s = &self.shape;
        let [dout, out, qkv] = inputs.map(|x| Buffer::of(dev, "test", x).unwrap());
        let lse = Buffer::of(dev, "test", lse).unwrap();
        let mut dqkv = Buffer::new(dev, "test", qkv.len()).unwrap();
        let need = attention::backward_scratch_len(s, lse.len() / s.q_heads);
        let mut scratch = Buffer::new(dev, "test", need).unwrap();
        self.with_work(dev, segments, &self.list, |work| {
            let (dqkv, scratch) = (dqkv.view_mut(), scratch.view_mut());
            let (dout, out, qkv) = (dout.view(), out.view(), qkv.view());
            attention::backward(dev, dqkv, dout, out, qkv, lse.view(), work, s, scratch).unwrap();
        });
        dev.read(dqkv.view()).unwrap()
    }
}

#[test]
fn hand_worked() {
    // One key-value head of width 1, two query heads. Row 1 of head 0 sees scores 0 and ln 3:
    // weights 1/4 and 3/4; head 1 sees 0 and -ln 3.
    let ln3 = 3f64.ln();
    let shape = Shape { scale: 0.5, ..shape(2, 1, 1) };
    let qkv = vec![5.0, 7.0, 0.0, 2.0, 1.0, -1.0, 2.0 * ln3, 6.0];
    let case = Case::new(host(), shape, vec![qkv]);
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
            let from = s.window.map_or(0, |w| (r + 1).saturating_sub(w as usize));
            let score = |j: usize| {
                let z = dot(head(r, h), key(j)) * F::of(s.scale);
                s.softcap.map_or(z, |cap| F::of(cap) * (z / F::of(cap)).tanh())
            };
            let z: Vec<F> =
                (0..=r).map(|j| if j < from { F::NEG_INFINITY } else { score(j) }).collect();
            let top = z.iter().fold(F::NEG_INFINITY, |m, z| m.max_nan(*z));
            let sum = z.iter().fold(F::ZERO, |s, z| s + (*z - top).exp());
            lse.push(top + sum.ln());
            let weight = |j: usize| (z[j] - top).exp() / sum;
            let element = |i: usize| (from..=r).fold(F::ZERO, |s, j| s + weight(j) * value(j)[i]);
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
        (Shape { softcap: Some(0.9), ..shape(4, 2, 8) }, vec![5, 67]),
        (Shape { window: Some(1), ..shape(2, 1, 8) }, vec![5, 67]),
        (Shape { window: Some(33), softcap: Some(2.0), ..shape(2, 1, 8) }, vec![1, 40, 131]),
    ] {
        let what = format!("{s:?} {lens:?}");
        let case = Case::<f32>::random(host(), s.clone(), &lens);
        let exact = Case::new(host(), s.clone(), case.qkv.iter().map(|x| wide(x)).collect());
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
        (Shape { softcap: Some(0.5), ..shape(2, 2, 3) }, vec![3, 5]),
        (Shape { window: Some(33), softcap: Some(2.0), ..shape(2, 1, 1) }, vec![35, 70]),
        (Shape { window: Some(1), ..shape(2, 1, 1) }, vec![35]),
    ] {
        let case = Case::<f64>::random(host(), s.clone(), &lens);
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
                let case = Case::new(host(), s.clone(), vec![own.to_vec()]);
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
    let case = Case::<f32>::random(host(), s.clone(), &[70, 3]);
    let dout: Vec<f32> = randn("dout", 73 * 64);
    let ours = case.backward(&Device::cpu(), &case.whole(), &dout);
    let exact = Case::new(host(), s, case.qkv.iter().map(|x| wide(x)).collect());
    let truth = exact.backward(&Device::cpu(), &exact.whole(), &wide(&dout));
    assert_norm("dqkv", &ours, &truth, 1e-5);
}

/// Sequences of a batch, of which the first is attended to `chunk` rows at a time, with others that run at other
/// speeds or without: each row has the bits that it has in one piece on `one`.
fn chunks_have_the_bits_of_the_whole<T: Element>(
    one: &Device,
    devices: &[Device],
    s: &Shape,
    lens: [usize; 3],
    chunks: &[usize],
) {
    let case = Case::<T>::random(one, s.clone(), &lens);
    let (out_cols, heads) = (s.q_heads * s.head_dim, s.q_heads);
    let alone = |i: usize| case.forward(one, &[(i, 0..lens[i])]);
    let want: Vec<(Vec<T>, Vec<T::Acc>)> = (0..3).map(alone).collect();
    for dev in devices {
        for (&chunk, others) in chunks.iter().flat_map(|c| [(c, false), (c, true)]) {
            let mut arena = case.room(dev);
            let scope = arena.scope();
            let mut kv = case.cache(dev, &scope);
            for start in (0..lens[0]).step_by(chunk) {
                // The others stand before and after in the batch.
                let mut batch = vec![(0, start..lens[0].min(start + chunk))];
                for (s, slower) in [(1, 2), (2, 1)] {
                    let at = |p: usize| lens[s].min(p / slower);
                    let part = at(start)..at(start + chunk);
                    if others && !part.is_empty() {
                        batch.insert(if s == 1 { 0 } else { batch.len() }, (s, part));
                    }
                }
                let (out, lse) = case.step(dev, &mut kv, &batch);
                let mut row = 0;
                for (s, part) in batch {
                    let what = format!("chunk {chunk}, {others}, {s}, {part:?} {dev:?}");
                    let (n, (o, l)) = (part.len(), &want[s]);
                    let got = &out[row * out_cols..(row + n) * out_cols];
                    assert_same(&what, got, &o[part.start * out_cols..part.end * out_cols]);
                    let got = &lse[row * heads..(row + n) * heads];
                    assert_same(&what, got, &l[part.start * heads..part.end * heads]);
                    row += n;
                }
            }
        }
    }
}

/// Properties 1 and 2: prefill in chunks and decoding one by one, alone or among others, give the
/// bits of the whole sequence.
#[test]
fn chunks_and_decoding_have_the_bits_of_the_whole() {
    let (s, all) = (shape(4, 2, 20), devices());
    for s in [s.clone(), Shape { window: Some(40), ..s }] {
        let chunks = [1, 2, 31, 32, 33];
        chunks_have_the_bits_of_the_whole::<f32>(&all[0], &all, &s, [77, 40, 65], &chunks);
    }
}

/// Whole sequences in any company, forward and backward.
#[test]
fn rows_do_not_see_their_batch() {
    let (s, lens) = (shape(4, 2, 20), [50, 1, 33, 24, 25]);
    let case = Case::<f32>::random(host(), s.clone(), &lens);
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
    let case = Case::<f32>::random(host(), s.clone(), &[5, 40, 6]);
    let (cols, width) = (s.qkv_cols(), 8);
    let clean = case.forward(&dev, &case.whole()).0;
    let with = |row: usize, column: usize| {
        let mut qkv = case.qkv.clone();
        qkv[1][row * cols + column] = f32::NAN;
        let case = Case::new(host(), s.clone(), qkv);
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
    let mut kv = KvLayer::<f32>::new(&scope, &s, PAGE, 2).unwrap();
    let (mut qkv, work) = (vec![0.0; 30], Work::new(segments, list));
    let append = attention::append(&dev, &mut kv, (&mut qkv).into(), work, &s, None);
    let x = (&qkv).into();
    let (mut out, mut lse) = (vec![0.0; 10], vec![0.0; 10]);
    let (out, lse, none) = ((&mut out).into(), (&mut lse).into(), (&mut [][..]).into());
    let forward = attention::forward(&dev, out, lse, x, &kv, work, &s, none);
    [refusal(append), refusal(forward)]
}

#[test]
fn segments_that_do_not_fit_are_refused() {
    let segment = |first, rows, at, pages| Segment { first, rows, at, pages, prefix: None };
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
        Work::new(segments, &[][..]),
        s,
        (&mut scratch).into(),
    ))
}

#[test]
fn bad_input_of_backward_is_refused() {
    let segment = |first, rows, at| Segment { first, rows, at, pages: 0..1, prefix: None };
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
        assert!(says.contains("wanted heads in whole groups, head_dim from 1 to 256"), "{says}");
    }
    let (dev, s) = (Device::cpu(), shape(2, 1, 2));
    let mut arena = room(1 << 16);
    let scope = arena.scope();
    let mut kv = KvLayer::<f32>::new(&scope, &s, PAGE, 1).unwrap();
    let one = [Segment { first: 0, rows: 3, at: 0, pages: 0..1, prefix: None }];
    let (mut x, list) = (vec![0.0; 24], [0u32]);
    let work = Work::new(&one, &list[..]);
    let e = attention::append(&dev, &mut kv, (&mut x[..23]).into(), work, &s, None);
    assert_eq!(refusal(e), "attention::append: `qkv` has shape [23], wanted [2, 8]");
    for (out, lse, qkv, says) in [
        (11, 6, 24, "`out` has shape [11], wanted [3, 4]"),
        (12, 5, 24, "`lse` has shape [5], wanted [3, 2]"),
        (12, 6, 23, "`qkv` has shape [23], wanted [2, 8]"),
    ] {
        let (mut out, mut lse) = (vec![0.0; out], vec![0.0; lse]);
        let (o, l, x) = ((&mut out).into(), (&mut lse).into(), x[..qkv].into());
        let e = attention::forward(&dev, o, l, x, &kv, work, &s, (&mut [][..]).into());
        assert_eq!(refusal(e), format!("attention: {says}"));
    }
    let e = KvLayer::<f32>::new(&scope, &s, PAGE, 1 << 20).unwrap_err().to_string();
    assert!(e.starts_with("KV cache, keys needs 268435"), "{e}");
}

/// A prompt and what follows it three times, once with the prompt's rows shared and once with each its own.
#[derive(Clone)]
struct Group {
    shape: Shape,
    prompt: usize,
    rest: [usize; 3],
}

impl Group {
    /// Rows of the prompt, then of what follows, the same numbers whatever the device.
    fn qkv<T: Element>(&self, scale: f64) -> Vec<Vec<T>> {
        let rows = [self.prompt].into_iter().chain(self.rest);
        let cols = self.shape.qkv_cols();
        let of = |(i, n): (usize, usize)| -> Vec<T> {
            let all: Vec<f64> = randn(&format!("group{i}"), n * cols);
            all.into_iter().map(|x| T::of(scale * x)).collect()
        };
        rows.enumerate().map(of).collect()
    }

    /// The rows of whole sequences, each with the prompt.
    fn whole<T: Element>(&self) -> Vec<Vec<T>> {
        let all = self.qkv::<T>(1.0);
        (1..4).map(|i| [&all[0][..], &all[i]].concat()).collect()
    }

    /// Segments and pages of one prompt and three that share it: its whole pages are listed again.
    fn shared(&self, page: usize) -> (Vec<Segment>, Vec<u32>, usize) {
        let (mut list, mut segments, mut next) = (Vec::<u32>::new(), Vec::new(), 0u32);
        let mut at = 0;
        for (i, n) in [self.prompt].into_iter().chain(self.rest).enumerate() {
            let (first, prefix) = if i == 0 { (0, None) } else { (self.prompt, Some(0)) };
            let (start, used) = (list.len(), (first + n).div_ceil(page));
            for p in 0..used {
                if i > 0 && (p + 1) * page <= first {
                    list.push(list[p]);
                } else {
                    list.push(next);
                    next += 1;
                }
            }
            let (pages, rows) = (start as u32..list.len() as u32, n as u32);
            segments.push(Segment { first: first as u32, rows, at, pages, prefix });
            at += rows;
        }
        (segments, list, next as usize)
    }

    /// `out`, `lse` and, where asked, the gradient, of the prompt's rows and of what follows.
    fn run<T: Element>(&self, dev: &Device) -> (Vec<T>, Vec<T::Acc>, Case<T>, Vec<Segment>) {
        self.run_on(dev, self.qkv(1.0))
    }

    fn run_on<T: Element>(
        &self,
        dev: &Device,
        qkv: Vec<Vec<T>>,
    ) -> (Vec<T>, Vec<T::Acc>, Case<T>, Vec<Segment>) {
        let mut case = Case::new(dev, self.shape.clone(), qkv);
        let (segments, list, pages) = self.shared(case.page);
        case.list = list;
        let layer = |s: &Scope<'_>| KvLayer::<T>::new(s, &self.shape, case.page, pages).map(drop);
        let mut arena = Arena::new(dev, Arena::plan(layer).unwrap()).unwrap();
        let scope = arena.scope();
        let mut kv = KvLayer::new(&scope, &self.shape, case.page, pages).unwrap();
        let (out, lse) = case.attend(dev, &mut kv, &segments, &case.list, &case.qkv.concat());
        (out, lse, case, segments)
    }

    /// The last row of each sequence, decoded when the others are in the cache, has the bits of training.
    fn decodes<T: Element>(&self, dev: &Device) {
        let before = Self { rest: self.rest.map(|n| n - 1), ..self.clone() };
        let case = Case::new(dev, self.shape.clone(), self.qkv::<T>(1.0));
        let (segments, list, pages) = self.shared(case.page);
        let layer = |s: &Scope<'_>| KvLayer::<T>::new(s, &self.shape, case.page, pages).map(drop);
        let mut arena = Arena::new(dev, Arena::plan(layer).unwrap()).unwrap();
        let scope = arena.scope();
        let mut kv = KvLayer::new(&scope, &self.shape, case.page, pages).unwrap();
        // All rows but the last, with room for it.
        let (mut first, _, _) = before.shared(case.page);
        for (s, with) in first.iter_mut().zip(&segments) {
            s.pages = with.pages.clone();
        }
        let (cols, mut qkv, mut last) = (self.shape.qkv_cols(), Vec::new(), Vec::new());
        for (i, x) in case.qkv.iter().enumerate() {
            let end = if i == 0 { x.len() } else { x.len() - cols };
            qkv.extend_from_slice(&x[..end]);
            last.extend_from_slice(&x[end..]);
        }
        case.attend(dev, &mut kv, &first, &list, &qkv);
        let rows: Vec<Segment> = (1..4)
            .map(|i| Segment {
                first: (self.prompt + self.rest[i - 1] - 1) as u32,
                rows: 1,
                at: i as u32 - 1,
                pages: segments[i].pages.clone(),
                prefix: None,
            })
            .collect();
        let (out, lse) = case.attend(dev, &mut kv, &rows, &list, &last);
        let whole = Case::new(dev, self.shape.clone(), self.whole::<T>());
        for i in 0..3 {
            let (want, want_lse) = whole.forward(dev, &[(i, 0..self.prompt + self.rest[i])]);
            let what = format!("{i} of {} + {:?}, {:?}", self.prompt, self.rest, self.shape);
            let (width, heads) = (out.len() / 3, lse.len() / 3);
            assert_same(&what, &out[i * width..][..width], &want[want.len() - width..]);
            assert_same(&what, &lse[i * heads..][..heads], &want_lse[want_lse.len() - heads..]);
        }
    }

    /// A row has the bits that it has in a sequence of its own.
    fn has_the_bits_of_whole_sequences<T: Element>(&self, dev: &Device) {
        let (out, lse, ..) = self.run::<T>(dev);
        let whole = Case::new(dev, self.shape.clone(), self.whole::<T>());
        let (width, heads) = (self.shape.q_heads * self.shape.head_dim, self.shape.q_heads);
        let mut at = self.prompt;
        for (i, n) in self.rest.into_iter().enumerate() {
            let (want, want_lse) = whole.forward(dev, &[(i, 0..self.prompt + n)]);
            let name = format!("{i} of {} + {:?}, {:?}", self.prompt, self.rest, self.shape);
            for (rows, from) in [(0..self.prompt, 0), (at..at + n, self.prompt)] {
                let (m, what) = (rows.len(), format!("{name}, {rows:?}"));
                let got = &out[rows.start * width..rows.end * width];
                assert_same(&what, got, &want[from * width..(from + m) * width]);
                let got = &lse[rows.start * heads..rows.end * heads];
                assert_same(&what, got, &want_lse[from * heads..(from + m) * heads]);
            }
            at += n;
        }
    }
}

#[track_caller]
fn assert_same<T: Element>(what: &str, got: &[T], want: &[T]) {
    let (a, b) = (bytemuck::cast_slice::<T, u8>(got), bytemuck::cast_slice::<T, u8>(want));
    if let Some(i) = a.iter().zip(b).position(|(a, b)| a != b) {
        let i = i / size_of::<T>();
        panic!("{what}: element {i} is {:?}, wanted {:?}", got[i], want[i]);
    }
    assert_eq!(a.len(), b.len(), "{what}");
}

const GROUPS: [(usize, [usize; 3]); 4] =
    [(1, [1, 2, 3]), (32, [1, 40, 33]), (37, [5, 1, 60]), (70, [3, 0, 31])];

#[test]
fn a_shared_prompt_has_the_bits_of_its_own() {
    for (prompt, rest) in GROUPS {
        for window in [None, Some(21)] {
            let shape = Shape { window, ..shape(4, 2, 20) };
            Group { shape, prompt, rest }.has_the_bits_of_whole_sequences::<f32>(host());
        }
    }
}

/// The gradient of what is shared is the sum over those that share it.
#[test]
fn gradients_of_a_shared_prompt_are_those_of_whole_sequences() {
    for (prompt, rest) in GROUPS {
        for window in [None, Some(21)] {
            let shape = Shape { window, ..shape(4, 2, 3) };
            let group = Group { shape: shape.clone(), prompt, rest };
            let (out, lse, case, segments) = group.run::<f64>(host());
            let width = shape.q_heads * shape.head_dim;
            let dout: Vec<f64> = randn("dout", out.len());
            let qkv = case.qkv.concat();
            let got = case.gradient(host(), &segments, [&dout, &out, &qkv], &lse);
            let (cols, from) = (shape.qkv_cols(), prompt * width);
            let mut want = vec![0.0; qkv.len()];
            let whole = Case::new(host(), shape.clone(), group.whole::<f64>());
            let mut at = prompt;
            for (i, n) in rest.into_iter().enumerate() {
                // The prompt's own share once.
                let own = if i == 0 { dout[..from].to_vec() } else { vec![0.0; from] };
                let dout = [&own[..], &dout[at * width..(at + n) * width]].concat();
                let dqkv = whole.backward(host(), &[(i, 0..prompt + n)], &dout);
                let (head, tail) = dqkv.split_at(prompt * cols);
                want[..prompt * cols].iter_mut().zip(head).for_each(|(w, x)| *w += x);
                want[at * cols..(at + n) * cols].copy_from_slice(tail);
                at += n;
            }
            assert_close(&format!("{prompt} {rest:?} {window:?}"), &got, &want, 1e-12, 1e-12);
        }
    }
}

/// Forward at one shape, with sequences of these lengths.
struct Attend {
    shape: Shape,
    lens: Vec<usize>,
}

impl sim::Case for Attend {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let (dev, s, rows) = (lab.dev(), &self.shape, self.lens.iter().sum::<usize>());
        let all = dev.read(lab.rows::<T>("qkv", rows, s.qkv_cols()).view())?;
        let mut rest = &all[..];
        let of = |n: &usize| {
            let (own, after) = rest.split_at(n * s.qkv_cols());
            rest = after;
            own.to_vec()
        };
        let case = Case::new(dev, s.clone(), self.lens.iter().map(of).collect());
        let (out, lse) = case.forward(dev, &case.whole());
        lab.by_row("out", &Buffer::of(dev, "test", &out)?);
        lab.by_row("lse", &Buffer::of(dev, "test", &lse)?);
        Ok(())
    }
}

/// All widths of heads, groups that do not divide a tile, lengths around a page.
#[test]
fn kernels_attend_as_the_cpu() {
    sim::check(|sim| {
        for (s, lens) in [
            (shape(1, 1, 64), vec![1, 63, 64, 65]),
            (shape(7, 1, 64), vec![9, 10, 0, 130]),
            (shape(4, 2, 80), vec![33, 70]),
            (shape(2, 1, 96), vec![66]),
            (shape(6, 2, 128), vec![21, 65]),
            (shape(2, 1, 256), vec![40, 70]),
            (Shape { window: Some(1), ..shape(2, 1, 64) }, vec![70]),
            (Shape { window: Some(65), softcap: Some(2.0), ..shape(3, 1, 64) }, vec![200]),
        ] {
            sim.hold_bf16(&Attend { shape: s, lens });
        }
    });
}

#[test]
fn kernels_give_chunks_and_decoding_the_bits_of_the_whole() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        let chunks: &[usize] = if sim.variant == Variant::Plain { &[1, 21, 64, 65] } else { &[40] };
        let s = shape(3, 1, 64);
        for s in [s.clone(), Shape { window: Some(70), ..s }] {
            let all = [dev.clone()];
            chunks_have_the_bits_of_the_whole::<bf16>(&dev, &all, &s, [150, 40, 131], chunks);
        }
    });
}

fn decode_long_sequences(sim: &Sim, machine: Machine) {
    let dev = sim.device_as(Order::default(), machine);
    let plain = matches!(sim.variant, Variant::Plain | Variant::Gpu);
    let len = if plain { 2049 } else { 1090 };
    for window in [None, Some(600)] {
        let case = Case::<bf16>::random(&dev, Shape { window, ..shape(2, 1, 64) }, &[len]);
        let mut arena = case.room(&dev);
        let scope = arena.scope();
        let mut kv = case.cache(&dev, &scope);
        let (out, lse) = case.step(&dev, &mut kv, &case.whole());
        // Once more from the beginning, over pages that hold something.
        let edges = [1, 2, 3, 61, 64, 65, 127, 128, 129, 521, 1021, 1024, 1025, 1031, 1089];
        let mut from = 0;
        for n in edges.into_iter().chain([2039, 2048, 2049]).filter(|n| *n <= len) {
            for part in [from..n - 1, n - 1..n].into_iter().filter(|p| !p.is_empty()) {
                let (row, l) = case.step(&dev, &mut kv, &[(0, part.clone())]);
                let what = format!("{part:?}, window {window:?}");
                assert_same(&what, &row, &out[part.start * 128..part.end * 128]);
                assert_same(&what, &l, &lse[part.start * 2..part.end * 2]);
            }
            from = n;
        }
    }
}

/// At every length around a page and a part, and at primes, a row that is decoded alone has the bits of the row
/// in training, and so has a prompt in pieces.
#[test]
fn kernels_decode_long_sequences_with_the_bits_of_training() {
    sim::check(|sim| decode_long_sequences(sim, Machine::Ampere));
}

#[test]
fn kernels_on_hopper_decode_long_sequences_with_the_bits_of_training() {
    sim::check(|sim| decode_long_sequences(sim, Machine::Hopper));
}

#[test]
fn kernels_give_a_shared_prompt_the_bits_of_its_own() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        for (prompt, rest) in [(1, [1, 2, 3]), (64, [1, 70, 33]), (75, [5, 0, 60])] {
            let group = Group { shape: shape(4, 2, 64), prompt, rest };
            group.has_the_bits_of_whole_sequences::<bf16>(&dev);
        }
    });
}

fn decode_groups(sim: &Sim, machine: Machine) {
    let dev = sim.device_as(Order::default(), machine);
    let plain = matches!(sim.variant, Variant::Plain | Variant::Gpu);
    let page = shape(1, 1, 64).page(&dev);
    let run = |s: &Shape, prompt: usize, rest: [usize; 3]| {
        Group { shape: s.clone(), prompt, rest }.decodes::<bf16>(&dev);
    };
    // A block takes all of the group, a third of it, or the multiprocessors are busy.
    run(&shape(3, 1, 64), 3, [1, page - 1, page - 2]);
    run(&shape(24, 1, 64), page + 1, [1, page, 2]);
    run(&shape(2, 2, 64), page, [1, page - 1, 2]);
    for d in [80, 96, 128] {
        run(&Shape { softcap: Some(2.0), ..shape(2, 1, d) }, page + 1, [1, 3, 2]);
    }
    let wide = shape(2, 1, 256);
    run(&wide, wide.page(&dev) + 1, [1, 3, 2]);
    if plain {
        for prompt in [1024 - page, 1024, 1024 + page, 1100] {
            run(&shape(2, 1, 64), prompt, [1, page - 1, page + 5]);
        }
    }
}

/// The next row of each of three sequences that share a prompt has the bits of training: where the prompt is a part of
/// a page, whole pages, and as long as a part of the softmax or longer; where a block takes all of the group, or some.
#[test]
fn kernels_decode_a_group_with_the_bits_of_training() {
    sim::check(|sim| decode_groups(sim, Machine::Ampere));
}

#[test]
fn kernels_on_hopper_decode_a_group_with_the_bits_of_training() {
    sim::check(|sim| decode_groups(sim, Machine::Hopper));
}

/// Queries and keys that are turned while they are appended have the bits of those that `rope` turned before, the
/// copies of a prompt too; a position beyond the table is NaN.
fn turns_as_rope<T: Element>(dev: &Device) {
    let (s, prompt, rest) = (shape(6, 2, 80), 70, [5, 0, 66]);
    let group = Group { shape: s.clone(), prompt, rest };
    let case = Case::new(dev, s.clone(), group.qkv::<T>(1.0));
    let (segments, list, pages) = group.shared(case.page);
    let (cols, d) = (s.qkv_cols(), s.head_dim);
    let plain = Rope::Plain { theta: 100.0 };
    let positions: Vec<u32> = segments.iter().flat_map(|s| s.first..s.first + s.rows).collect();
    let positions = Buffer::of(dev, "test", &positions).unwrap();
    let run = |before: bool, entries: usize| {
        let table = Table::<T::Acc>::new(dev, &plain, d, entries).unwrap();
        let mut qkv = Buffer::of(dev, "test", &case.qkv.concat()).unwrap();
        if before {
            let (x, heads) = (qkv.view_mut(), s.q_heads + s.kv_heads);
            rope::forward(dev, x, cols, heads, d, positions.view(), &table).unwrap();
        }
        let layer = |l: &Scope<'_>| KvLayer::<T>::new(l, &s, case.page, pages).map(drop);
        let mut arena = Arena::new(dev, Arena::plan(layer).unwrap()).unwrap();
        let scope = arena.scope();
        let mut kv = KvLayer::new(&scope, &s, case.page, pages).unwrap();
        let turn = (!before).then_some((positions.view(), &table));
        case.with_work(dev, &segments, &list, |work| {
            attention::append(dev, &mut kv, qkv.view_mut(), work, &s, turn).unwrap();
        });
        let qkv = dev.read(qkv.view()).unwrap();
        (case.look(dev, &kv, &segments, &list, &qkv).0, qkv)
    };
    let (before, within) = (run(true, 200), run(false, 200));
    assert_same("queries and keys", &within.1, &before.1);
    assert_same("out", &within.0, &before.0);
    if matches!(dev, Device::Cuda(_)) {
        let (beyond, first) = (run(false, 135), 70 + 5 + 65);
        assert_same("before the end", &beyond.1[..first * cols], &before.1[..first * cols]);
        let turned = (s.q_heads + s.kv_heads) * d;
        assert!(beyond.1[first * cols..][..turned].iter().all(|x| x.f64().is_nan()));
        assert_same(
            "values",
            &beyond.1[first * cols + turned..],
            &before.1[first * cols + turned..],
        );
    }
}

#[test]
fn appending_turns_as_rope_does() {
    turns_as_rope::<f32>(host());
}

#[test]
fn kernels_turn_while_they_append() {
    sim::check(|sim| turns_as_rope::<bf16>(&sim.device(Default::default())));
}

/// Both kernels for Hopper, all widths of heads, groups that do not divide a tile, lengths around a page and a tile.
#[test]
fn kernels_on_hopper_attend_as_the_cpu() {
    sim::check(|sim| {
        let sim = sim.hopper();
        for (s, lens) in [
            // One warpgroup, alone and with others after it.
            (shape(1, 1, 64), vec![1, 63, 64]),
            (shape(7, 1, 64), vec![9, 1, 0, 5]),
            (shape(2, 1, 256), vec![32, 7]),
            (shape(6, 2, 128), vec![21, 3]),
            // Two: parts of one and of both, and more than a page.
            (shape(1, 1, 64), vec![1, 127, 65, 130]),
            (shape(7, 1, 64), vec![9, 10, 0, 130, 28]),
            (shape(4, 2, 80), vec![33, 132]),
            (shape(2, 1, 96), vec![130]),
            (shape(6, 2, 128), vec![21, 140]),
            (shape(2, 1, 256), vec![40, 133]),
            (Shape { window: Some(1), ..shape(2, 1, 64) }, vec![140]),
            (Shape { window: Some(65), softcap: Some(2.0), ..shape(3, 1, 64) }, vec![300]),
            (Shape { window: Some(70), softcap: Some(2.0), ..shape(1, 1, 256) }, vec![200]),
        ] {
            sim.hold_bf16(&Attend { shape: s, lens });
        }
    });
}

/// Where the softmax starts anew: a sequence of more than two parts, and a window that begins in one.
#[test]
fn kernels_on_hopper_merge_parts() {
    sim::check(|sim| {
        let sim = sim.hopper();
        for (s, lens) in [
            (shape(1, 1, 64), vec![2100]),
            (shape(1, 1, 256), vec![1040]),
            (Shape { window: Some(1000), ..shape(1, 1, 80) }, vec![1300]),
        ] {
            // A sanitizer looks at fewer rows.
            let lens = if sanitized(&sim) { vec![1030] } else { lens };
            sim.hold_bf16(&Attend { shape: s, lens });
        }
    });
}

/// In chunks and one by one, alone and among others, wide or narrow, rows have the bits of whole sequences.
#[test]
fn kernels_on_hopper_have_the_bits_of_whole_sequences() {
    sim::check(|sim| {
        let dev = sim.hopper().device(Order::default());
        for (s, lens, chunks) in [
            (shape(7, 1, 64), [150, 70, 131], &[1, 9, 10, 50, 129][..]),
            (Shape { window: Some(100), ..shape(4, 2, 128) }, [150, 20, 140], &[1, 33, 150]),
            // In a warp's rows some see all of a page, and the last one not its first position.
            (Shape { window: Some(143), ..shape(1, 1, 64) }, [150, 9, 1], &[33]),
            (shape(2, 1, 256), [70, 33, 66], &[1, 32, 65]),
            // The softmax starts anew at the same positions, wherever a window begins.
            (Shape { window: Some(1060), ..shape(1, 1, 80) }, [1300, 1, 1], &[200, 1030]),
        ] {
            let (lens, chunks) = match sanitized(sim) {
                false => (lens, chunks),
                true => (lens.map(|n| n / 7 + 1), &chunks[..1]),
            };
            let all = [dev.clone()];
            chunks_have_the_bits_of_the_whole::<bf16>(&dev, &all, &s, lens, chunks);
        }
        for (prompt, rest) in [(128, [1, 70, 3]), (130, [5, 1, 60])] {
            for s in [shape(3, 1, 64), Shape { window: Some(50), ..shape(2, 1, 256) }] {
                let shape = if sanitized(sim) { shape(1, 1, 64) } else { s };
                Group { shape, prompt, rest }.has_the_bits_of_whole_sequences::<bf16>(&dev);
            }
        }
    });
}

fn sanitized(sim: &Sim) -> bool {
    matches!(sim.variant, Variant::Address | Variant::Thread)
}

/// Backward at one shape: of sequences of these lengths, or of a prompt and what follows it.
enum Differentiate {
    Whole(Shape, Vec<usize>),
    Shared(Group),
}

impl sim::Case for Differentiate {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let dev = lab.dev();
        let (s, lens) = match self {
            Self::Whole(s, lens) => (s, &lens[..]),
            Self::Shared(g) => (&g.shape, &[&[g.prompt], &g.rest[..]].concat()[..]),
        };
        let rows = lens.iter().sum::<usize>();
        let all = dev.read(lab.rows::<T>("qkv", rows, s.qkv_cols()).view())?;
        let dout = dev.read(lab.rows::<T>("dout", rows, s.q_heads * s.head_dim).view())?;
        let mut rest = &all[..];
        let of = |n: &usize| {
            let (own, after) = rest.split_at(n * s.qkv_cols());
            rest = after;
            own.to_vec()
        };
        let qkv = lens.iter().map(of).collect();
        let dqkv = match self {
            Self::Whole(..) => {
                let case = Case::new(dev, s.clone(), qkv);
                case.backward(dev, &case.whole(), &dout)
            }
            Self::Shared(group) => {
                let (out, lse, case, segments) = group.run_on::<T>(dev, qkv);
                case.gradient(dev, &segments, [&dout, &out, &all], &lse)
            }
        };
        let (q, kv) = (s.q_heads * s.head_dim, s.kv_heads * s.head_dim);
        for (name, columns) in [("dq", 0..q), ("dk", q..q + kv), ("dv", q + kv..q + 2 * kv)] {
            let rows = dqkv.chunks_exact(s.qkv_cols());
            let part: Vec<T> = rows.flat_map(|row| row[columns.clone()].to_vec()).collect();
            lab.by_row(name, &Buffer::of(dev, "test", &part)?);
        }
        Ok(())
    }
}

/// All widths of heads, groups that do not divide a tile, lengths around one, windows and caps.
fn backward_cases() -> Vec<(Shape, Vec<usize>)> {
    vec![
        (shape(1, 1, 64), vec![1, 63, 64, 65, 130]),
        (shape(7, 1, 64), vec![9, 10, 0, 30]),
        // A warp's first row sees all of its columns but the last.
        (shape(8, 1, 64), vec![40]),
        (shape(4, 2, 80), vec![33, 70]),
        (shape(2, 1, 96), vec![66]),
        (shape(6, 2, 128), vec![21, 65]),
        (shape(3, 1, 256), vec![33, 40]),
        (Shape { window: Some(1), ..shape(2, 1, 64) }, vec![70]),
        // A warp's last row sees all of its columns but the first.
        (Shape { window: Some(63), ..shape(1, 1, 64) }, vec![130]),
        (Shape { window: Some(65), softcap: Some(2.0), ..shape(3, 1, 64) }, vec![200]),
    ]
}

#[test]
fn kernels_go_backward_as_the_cpu() {
    sim::check(|sim| {
        for (s, lens) in backward_cases() {
            sim.hold_bf16(&Differentiate::Whole(s, lens));
        }
    });
}

/// In the last case a prompt's first keys have less to do than the next, which wait for them.
fn shared_backward_cases() -> Vec<Group> {
    [
        (shape(2, 1, 64), 64, [1, 65, 3]),
        (shape(3, 1, 64), 70, [3, 0, 31]),
        (Shape { window: Some(21), ..shape(4, 2, 64) }, 37, [5, 1, 60]),
        (Shape { window: Some(21), ..shape(6, 3, 64) }, 130, [64, 3, 0]),
    ]
    .map(|(shape, prompt, rest)| Group { shape, prompt, rest })
    .into()
}

#[test]
fn kernels_go_backward_through_shared_prompts_as_the_cpu() {
    sim::check(|sim| {
        for group in shared_backward_cases() {
            sim.hold_bf16(&Differentiate::Shared(group));
        }
    });
}

/// Whole sequences in any company.
fn backward_in_any_company(sim: &Sim, machine: Machine) {
    let dev = sim.device_as(Order { threads: 3, blocks: 1 }, machine);
    let (s, lens) = (shape(4, 2, 64), [50, 1, 33]);
    let case = Case::<bf16>::random(&dev, s.clone(), &lens);
    let width = s.q_heads * s.head_dim;
    let dout = |i: usize| -> Vec<bf16> {
        let all: Vec<f64> = randn(&format!("dout{i}"), lens[i] * width);
        all.into_iter().map(bf16::from_f64).collect()
    };
    let dqkv: Vec<_> = (0..3).map(|i| case.backward(&dev, &[(i, 0..lens[i])], &dout(i))).collect();
    for order in [vec![0, 1, 2], vec![2, 0]] {
        let batch: Vec<Part> = order.iter().map(|i: &usize| (*i, 0..lens[*i])).collect();
        let all = |x: &dyn Fn(usize) -> Vec<bf16>| -> Vec<bf16> {
            order.iter().flat_map(|i| x(*i)).collect()
        };
        let got = case.backward(&dev, &batch, &all(&dout));
        assert_same(&format!("{order:?}"), &got, &all(&|i| dqkv[i].clone()));
    }
}

#[test]
fn rows_of_backward_kernels_do_not_see_their_batch() {
    sim::check(|sim| backward_in_any_company(sim, Machine::Ampere));
}

/// A bad number of `dout` or of a query, key or value, in every other sequence: the rest feels nothing, and the
/// gradients of the bad row's head are bad.
fn backward_keeps_nan(sim: &Sim, machine: Machine) {
    let dev = sim.device_as(Order::default(), machine);
    let (s, lens) = (shape(2, 2, 64), [5, 70, 6]);
    let case = Case::<bf16>::random(&dev, s.clone(), &lens);
    let dout = vec![bf16::ONE; 81 * 128];
    let clean = case.backward(&dev, &case.whole(), &dout);
    let cols = s.qkv_cols();
    for column in [0, 128, 256, cols] {
        let (mut dout, mut qkv) = (dout.clone(), case.qkv.clone());
        // The row 66 of the second sequence.
        match column == cols {
            true => dout[71 * 128] = bf16::NAN,
            false => qkv[1][66 * cols + column] = bf16::NAN,
        }
        let bad = Case::new(&dev, s.clone(), qkv);
        let got = bad.backward(&dev, &bad.whole(), &dout);
        assert_same("before", &got[..5 * cols], &clean[..5 * cols]);
        assert_same("after", &got[75 * cols..], &clean[75 * cols..]);
        // Columns of the other head.
        for (got, clean) in got.chunks_exact(64).zip(clean.chunks_exact(64)).skip(1).step_by(2) {
            assert_same("the other head", got, clean);
        }
        let own = &got[71 * cols..72 * cols];
        assert!(own[..64].iter().all(|x| x.is_nan()), "{column}: a NaN was lost");
    }
}

#[test]
fn a_nan_of_backward_kernels_stays_in_its_sequence() {
    sim::check(|sim| backward_keeps_nan(sim, Machine::Ampere));
}

#[test]
fn what_backward_kernels_cannot_take_is_refused() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let dev = sim.device(Order::default());
    let refused = |s: &Shape, rows: usize, parts: Option<usize>| {
        let segments = |rows: usize| {
            [Segment { first: 0, rows: rows as u32, at: 0, pages: 0..1, prefix: None }]
        };
        let room = |n: usize| Buffer::<bf16>::zeros(&dev, "test", rows * n).unwrap();
        let (out, qkv, dout) = (s.q_heads * s.head_dim, s.qkv_cols(), s.q_heads * s.head_dim);
        let [mut dqkv, dout, out, qkv] = [qkv, dout, out, qkv].map(room);
        let lse = Buffer::<f32>::zeros(&dev, "test", rows * s.q_heads).unwrap();
        let need = attention::backward_scratch_len(s, rows);
        let mut scratch = Buffer::<f32>::zeros(&dev, "test", need).unwrap();
        let parts = parts.map(|rows| Parts::new(&dev, s, &segments(rows), &[0], 1).unwrap());
        let words = Buffer::of(&dev, "test", parts.as_ref().map_or(&[], |p| p.words())).unwrap();
        let (own, list) = (segments(rows), Buffer::<u32>::zeros(&dev, "test", 1).unwrap());
        let parts = parts.as_ref().map(|p| (p, words.view()));
        let work = Work { parts, ..Work::new(&own, list.view()) };
        let (dqkv, scratch, lse) = (dqkv.view_mut(), scratch.view_mut(), lse.view());
        let (dout, out, qkv) = (dout.view(), out.view(), qkv.view());
        let e = attention::backward(&dev, dqkv, dout, out, qkv, lse, work, s, scratch);
        refusal(e).replace("attention::backward: ", "")
    };
    let is = "head_dim on a CUDA device: got 72, wanted one of [64, 80, 96, 128, 256]";
    assert_eq!(refused(&shape(1, 1, 72), 3, Some(3)), is);
    let is = "query heads of a KV head on a CUDA device: got 65, wanted at most 64";
    assert_eq!(refused(&shape(65, 1, 64), 3, Some(3)), is);
    let is = "parts on a CUDA device: got none, wanted those of the segments";
    assert_eq!(refused(&shape(1, 1, 64), 3, None), is);
    let says = refused(&shape(1, 1, 64), 3, Some(4));
    assert!(says.starts_with("parts: got those of Of { rows: 4, "), "{says}");
    assert!(says.contains(", wanted those of Of { rows: 3, "), "{says}");
    let negative = Shape { scale: -1.0, ..shape(1, 1, 64) };
    let is = "scale on a CUDA device: got -1, wanted a positive number";
    assert_eq!(refused(&negative, 3, Some(3)), is);
}

/// What the words of a batch are, those of runs and of the backward pass aside.
fn parts_of(dev: &Device, s: &Shape, rows: &[(u32, u32)], lists: &[&[u32]]) -> Vec<[u32; 8]> {
    let (mut at, mut start, mut segments) = (0, 0, Vec::new());
    for ((first, rows), list) in rows.iter().zip(lists) {
        let pages = start..start + list.len() as u32;
        segments.push(Segment { first: *first, rows: *rows, at, pages, prefix: None });
        (at, start) = (at + rows, start + list.len() as u32);
    }
    let parts = Parts::new(dev, s, &segments, &lists.concat(), 99).unwrap();
    // None begins at 0, so there are none of the backward pass; runs of up to 64 rows follow.
    let runs: u32 = rows.iter().map(|(_, n)| n.div_ceil(64)).sum();
    let (parts, rest) = parts.words().as_chunks::<8>();
    let (all, words) = (8 * parts.len() + rest.len(), 5 * runs as usize);
    parts[..(all - words) / 8].to_vec()
}

/// Pages in common are read once, long rows are split where others are done long before, and long segments do
/// not widen what single rows are computed by.
#[test]
fn a_batch_is_divided_by_what_it_shares() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let dev = sim.hopper().device(Order::default());
    let (s, gives, takes) = (shape(7, 1, 64), |i: u32| (i + 1) << 16, |n: u32| n << 8);
    assert_eq!((s.page(&dev), shape(2, 1, 256).page(&dev)), (128, 64));
    let plain = parts_of(&dev, &s, &[(127, 1), (250, 9), (120, 19)], &[&[3], &[0, 1, 2], &[4, 5]]);
    let want = [
        [0, 1, 127, 0, 0, 1, 0, 0],
        [1, 9, 250, 1, 0, 3, 0, 0],
        [10, 18, 120, 4, 0, 2, 0, 0],
        [28, 1, 138, 4, 0, 2, 0, 0],
    ];
    assert_eq!(plain, want);
    // Two groups whose first page is that of all.
    let lists: [&[u32]; 4] = [&[0, 1, 2, 3], &[0, 1, 2, 4], &[0, 5, 6, 7], &[0, 5, 6, 8]];
    let groups = parts_of(&dev, &s, &[(400, 1), (400, 1), (390, 1), (500, 1)], &lists);
    let want = [
        [0, 2, 384, 0, 0, 3, 0, gives(0)],
        [2, 2, 384, 8, 0, 3, 2, gives(0)],
        [0, 1, 400, 0, 3, 4, 0, takes(1)],
        [1, 1, 400, 4, 3, 4, 1, takes(1)],
        [2, 1, 390, 8, 3, 4, 2, takes(1)],
        [3, 1, 500, 12, 3, 4, 3, takes(1)],
    ];
    assert_eq!(groups, want);
    // The simulator has three multiprocessors.
    let long: Vec<u32> = (10..30).collect();
    let split = parts_of(&dev, &s, &[(100, 1), (2400, 1)], &[&[0], &long]);
    let want = [
        [1, 1, 2400, 1, 0, 8, 0, gives(0)],
        [1, 1, 2400, 1, 8, 16, 0, 1 | gives(1)],
        [1, 1, 2400, 1, 16, 19, 0, 2 | gives(2)],
        [0, 1, 100, 0, 0, 1, 0, 0],
        [1, 1, 2400, 1, 0, 0, 0, takes(3)],
    ];
    assert_eq!(split, want);
    // A window's row sees what is its own.
    let windowed = Shape { window: Some(200), ..s };
    let alike = parts_of(&dev, &windowed, &[(400, 1), (401, 1)], &[&[0, 1, 2, 3], &[0, 1, 2, 4]]);
    assert_eq!(alike, [[0, 1, 400, 0, 1, 4, 0, 0], [1, 1, 401, 4, 1, 4, 0, 0]]);
}

#[test]
fn parts_of_others_are_refused() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let dev = sim.device(Order::default());
    let s = shape(2, 1, 64);
    let case = Case::<bf16>::random(&dev, s.clone(), &[5]);
    let mut arena = case.room(&dev);
    let scope = arena.scope();
    let mut kv = case.cache(&dev, &scope);
    let segment = |prefix| [Segment { first: 0, rows: 5, at: 0, pages: 0..1, prefix }];
    let own = segment(None);
    let mut refused = |made: &Device, shape: &Shape, segments: &[Segment]| {
        let parts = Parts::new(made, shape, segments, &[0], 1).unwrap();
        let words = Buffer::of(&dev, "test", parts.words()).unwrap();
        let list = Buffer::of(&dev, "test", &[0u32]).unwrap();
        let work = Work { parts: Some((&parts, words.view())), ..Work::new(&own, list.view()) };
        let mut qkv = Buffer::of(&dev, "test", &case.qkv[0]).unwrap();
        let e = refusal(attention::append(&dev, &mut kv, qkv.view_mut(), work, &s, None));
        assert!(e.starts_with("attention::append: parts: got "), "{e}");
    };
    let windowed = Shape { window: Some(3), ..s.clone() };
    refused(&dev, &windowed, &own);
    refused(&dev, &shape(4, 1, 64), &own);
    refused(host(), &s, &own);
    refused(&sim.hopper().device(Order::default()), &s, &own);
    let fewer = [Segment { rows: 4, ..own[0].clone() }];
    refused(&dev, &s, &fewer);
    // What a batch must not be.
    let bad = |segments: &[Segment], list: &[u32]| {
        refusal(Parts::new(&dev, &s, segments, list, 1).map(drop))
    };
    assert_eq!(
        bad(&own, &[1]),
        "attention::Parts: page id of segment 0: got 1, wanted less than 1"
    );
    let says = bad(&segment(Some(7)), &[0]);
    assert!(says.starts_with("attention::Parts: prefix of segment 0: got 7, wanted "), "{says}");
    let says = bad(&own, &[]);
    assert!(says.starts_with("attention::Parts: pages of segment 0: got 0..1, wanted "), "{says}");
}

/// More sequences than blocks, so that a block takes one after the other: each row has the bits that it has alone.
fn blocks_are_used_again(sim: &Sim, machine: Machine) {
    let dev = sim.device_as(Order::default(), machine);
    let count = if sim.variant == Variant::Gpu { 600 } else { 7 };
    let s = shape(8, 4, 64);
    let lens: Vec<usize> =
        (0..count).map(|i| 1 + i * 89 % if count > 7 { 700 } else { 150 }).collect();
    let case = Case::<bf16>::random(&dev, s.clone(), &lens);
    let width = s.q_heads * s.head_dim;
    let mut arena = case.room(&dev);
    let scope = arena.scope();
    let mut kv = case.cache(&dev, &scope);
    let (all, _) = case.step(&dev, &mut kv, &case.whole());
    let last: Vec<Part> = lens.iter().enumerate().map(|(i, n)| (i, n - 1..*n)).collect();
    let (rows, _) = case.step(&dev, &mut kv, &last);
    let mut end = 0;
    for (i, n) in lens.iter().enumerate() {
        end += n;
        let got = &rows[i * width..(i + 1) * width];
        assert_same(&format!("{i}, decoded"), got, &all[(end - 1) * width..end * width]);
        if i % 3 == 0 {
            let (alone, _) = case.forward(&dev, &[(i, 0..*n)]);
            assert_same(&format!("{i}, alone"), &all[(end - n) * width..end * width], &alone);
        }
    }
}

#[test]
fn kernels_use_blocks_again() {
    sim::check(|sim| blocks_are_used_again(sim, Machine::Ampere));
}

#[test]
fn kernels_on_hopper_use_blocks_again() {
    sim::check(|sim| blocks_are_used_again(sim, Machine::Hopper));
}

/// The same, and more keys than a tile of Hopper's.
#[test]
fn kernels_on_hopper_go_backward_as_the_cpu() {
    sim::check(|sim| {
        let sim = sim.hopper();
        let more = [
            (shape(1, 1, 64), vec![127, 128, 129, 300]),
            (shape(7, 1, 64), vec![150, 20]),
            (shape(2, 1, 80), vec![140]),
            (shape(3, 1, 96), vec![131]),
            (shape(5, 1, 128), vec![140, 13]),
            (shape(2, 1, 256), vec![65, 130]),
            (Shape { window: Some(70), softcap: Some(2.0), ..shape(3, 1, 256) }, vec![150]),
            (Shape { window: Some(1), ..shape(3, 1, 128) }, vec![140]),
            (Shape { window: Some(64), ..shape(1, 1, 128) }, vec![290]),
        ];
        for (s, lens) in backward_cases().into_iter().chain(more) {
            sim.hold_bf16(&Differentiate::Whole(s, lens));
        }
    });
}

#[test]
fn kernels_on_hopper_go_backward_through_shared_prompts_as_the_cpu() {
    sim::check(|sim| {
        let sim = sim.hopper();
        let window = Some(150);
        let more = [
            Group { shape: shape(2, 1, 64), prompt: 128, rest: [1, 130, 3] },
            Group { shape: shape(3, 1, 256), prompt: 70, rest: [3, 0, 65] },
            Group { shape: Shape { window, ..shape(3, 1, 64) }, prompt: 260, rest: [160, 4, 2] },
        ];
        for group in shared_backward_cases().into_iter().chain(more) {
            sim.hold_bf16(&Differentiate::Shared(group));
        }
    });
}

#[test]
fn rows_of_backward_kernels_on_hopper_do_not_see_their_batch() {
    sim::check(|sim| backward_in_any_company(sim, Machine::Hopper));
}

#[test]
fn a_nan_of_backward_kernels_on_hopper_stays_in_its_sequence() {
    sim::check(|sim| backward_keeps_nan(sim, Machine::Hopper));
}
