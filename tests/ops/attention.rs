//! Attention: hand-worked values, the definition, central differences, and bits that depend on
//! neither batch, chunks, pages nor what else is in the cache.

mod backward;
mod cuda;
mod partition;
mod shared;

use std::ops::Range;

use warpo::{
    device::{Arena, Buffer, Device, Element, Float, Scope},
    ops::attention::{self, KvLayer, MAX_HEAD_DIM, PAGE, Partition, Segment, SegmentBatch, Shape},
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, assert_nan_only, assert_norm, assert_refuses,
    devices, gradcheck, host, inner, randn, refusal, room, shuffled, wide, zeros,
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
        f: impl FnOnce(SegmentBatch<'_>) -> R,
    ) -> R {
        let pages = list.iter().max().map_or(0, |most| *most as usize + 1);
        let partition = Partition::new(dev, &self.shape, segments, list, pages).unwrap();
        let words = Buffer::of(dev, "test", partition.words()).unwrap();
        let pages = Buffer::of(dev, "test", list).unwrap();
        let partition = Some((&partition, words.view()));
        f(SegmentBatch { partition, ..SegmentBatch::new(segments, pages.view()) })
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
        self.append(dev, kv, segments, list, qkv);
        self.look(dev, kv, segments, list, qkv)
    }

    fn append(
        &self,
        dev: &Device,
        kv: &mut KvLayer<'_, T>,
        segments: &[Segment],
        list: &[u32],
        qkv: &[T],
    ) {
        let mut buffer = Buffer::of(dev, "test", qkv).unwrap();
        self.with_work(dev, segments, list, |work| {
            attention::append(dev, kv, buffer.view_mut(), work, &self.shape, None).unwrap();
        });
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
            attention::forward(
                dev,
                attention::ForwardOutputs { out: o, lse: l, scratch },
                qkv.view(),
                kv,
                work,
                s,
            )
            .unwrap();
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
            let lse = lse.view();
            let args = attention::BackwardArgs { dqkv, dout, out, qkv, lse, scratch };
            attention::backward(dev, args, work, s).unwrap();
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

/// Sequences of a batch, of which the first is attended to `chunk` rows at a time, with others that
/// run at other speeds or without: each row has the bits that it has in one piece on `one`.
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

/// A weight of 0 does not hide a NaN, so the two must not meet: what later tokens hold stays out of
/// the gradients of earlier queries.
#[test]
fn a_nan_of_later_tokens_stays_out_of_gradients() {
    let (dev, s, bad) = (Device::cpu(), shape(1, 1, 4), 20);
    let case = Case::<f32>::random(host(), s.clone(), &[40]);
    let dout: Vec<f32> = randn("dout", 40 * 4);
    let mut qkv = case.qkv.clone();
    qkv[0][bad * 12 + 8] = f32::NAN;
    let of = |case: &Case<f32>| -> Vec<f32> {
        case.backward(&dev, &case.whole(), &dout)
            .chunks(12)
            .flat_map(|row| &row[..4])
            .copied()
            .collect()
    };
    let (clean, got) = (of(&case), of(&Case::new(host(), s, qkv)));
    assert_nan_only("query", &got, &clean, bad * 4..40 * 4);
}

/// What `append` and `forward` say of these segments, on two pages and ten rows of width 3.
fn refused(segments: &[Segment], list: &[u32]) -> [String; 2] {
    let (dev, s) = (Device::cpu(), shape(1, 1, 1));
    let mut arena = room(1 << 16);
    let scope = arena.scope();
    let mut kv = KvLayer::<f32>::new(&scope, &s, PAGE, 2).unwrap();
    let (mut qkv, work) = (vec![0.0; 30], SegmentBatch::new(segments, list));
    let append = attention::append(&dev, &mut kv, (&mut qkv).into(), work, &s, None);
    let x = (&qkv).into();
    let (mut out, mut lse) = (vec![0.0; 10], vec![0.0; 10]);
    let (out, lse, none) = ((&mut out).into(), (&mut lse).into(), (&mut [][..]).into());
    let forward = attention::forward(
        &dev,
        attention::ForwardOutputs { out, lse, scratch: none },
        x,
        &kv,
        work,
        &s,
    );
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

/// Backward with these lengths of dqkv, dout, out, qkv, lse and scratch.
fn backward(n: [usize; 6], segments: &[Segment], s: &Shape) -> warpo::Result<()> {
    let [mut dqkv, dout, out, qkv, lse, mut scratch] = zeros(n);
    let (dqkv, scratch) = ((&mut dqkv).into(), (&mut scratch).into());
    let (dout, out, qkv, lse) = ((&dout).into(), (&out).into(), (&qkv).into(), (&lse).into());
    let args = attention::BackwardArgs { dqkv, dout, out, qkv, lse, scratch };
    attention::backward(&Device::cpu(), args, SegmentBatch::new(segments, &[][..]), s)
}

#[test]
fn bad_input_of_backward_is_refused() {
    let segment = |first, rows, at| Segment { first, rows, at, pages: 0..1, prefix: None };
    let (s, one) = (shape(1, 1, 1), [segment(0, 10, 0)]);
    assert_refuses(
        "attention::backward",
        "dqkv [10, 3] dout [10, 1] out [10, 1] qkv [10, 3] lse [10, 1] scratch [30]",
        |n| backward(n, &one, &s),
    );
    // Segments that do not line up used to give wrong gradients.
    for (segments, says) in [
        (vec![segment(3, 10, 0)], "first position of segment 0: got 3, wanted 0"),
        (vec![segment(0, 9, 0)], "rows of all segments: got 9, wanted 10"),
        (vec![segment(0, 5, 5), segment(0, 5, 0)], "first row of segment 0: got 5, wanted 0"),
        (vec![segment(0, 5, 0), segment(0, 5, 0)], "first row of segment 1: got 0, wanted 5"),
    ] {
        let got = refusal(backward([30, 10, 10, 30, 10, 30], &segments, &s));
        assert_eq!(got, format!("attention::backward: {says}"));
    }
}

#[test]
fn impossible_heads_and_wrong_buffers_are_refused() {
    let wide = shape(2, 1, MAX_HEAD_DIM + 1);
    for s in [shape(3, 2, 4), shape(1, 0, 4), shape(0, 1, 4), shape(2, 1, 0), wide] {
        let says = refusal(backward([0; 6], &[], &s));
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
    let work = SegmentBatch::new(&one, &list[..]);
    let e = attention::append(&dev, &mut kv, (&mut x[..23]).into(), work, &s, None);
    assert_eq!(refusal(e), "attention::append: `qkv` has shape [23], wanted [2, 8]");
    assert_refuses("attention", "out [3, 4] lse [3, 2] qkv [3, 8]", |n| {
        let [mut out, mut lse, qkv] = zeros(n);
        let (out, lse, scratch) = ((&mut out).into(), (&mut lse).into(), (&mut [][..]).into());
        let to = attention::ForwardOutputs { out, lse, scratch };
        attention::forward(&dev, to, (&qkv).into(), &kv, work, &s)
    });
    let e = KvLayer::<f32>::new(&scope, &s, PAGE, 1 << 20).unwrap_err().to_string();
    assert!(e.starts_with("KV cache, keys needs 268435"), "{e}");
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
