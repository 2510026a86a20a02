//! Prompts whose rows are shared have the bits of those that are not, and queries and keys that are
//! turned on the way.

use warpo::{
    device::{Arena, Buffer, Device, Element, Scope},
    ops::{
        attention::{self, KvLayer, Segment, Shape},
        rope::{self, Rope, Table},
    },
};

use super::{Case, assert_same, shape};
use crate::support::{assert_close, host, randn};

/// A prompt and what follows it three times, once with the prompt's rows shared and once with each
/// its own.
#[derive(Clone)]
pub(super) struct Group {
    pub(super) shape: Shape,
    pub(super) prompt: usize,
    pub(super) rest: [usize; 3],
}

impl Group {
    /// Rows of the prompt, then of what follows, the same numbers whatever the device.
    pub(super) fn qkv<T: Element>(&self, scale: f64) -> Vec<Vec<T>> {
        let rows = [self.prompt].into_iter().chain(self.rest);
        let cols = self.shape.qkv_cols();
        let of = |(i, n): (usize, usize)| -> Vec<T> {
            let all: Vec<f64> = randn(&format!("group{i}"), n * cols);
            all.into_iter().map(|x| T::of(scale * x)).collect()
        };
        rows.enumerate().map(of).collect()
    }

    /// The rows of whole sequences, each with the prompt.
    pub(super) fn whole<T: Element>(&self) -> Vec<Vec<T>> {
        let all = self.qkv::<T>(1.0);
        (1..4).map(|i| [&all[0][..], &all[i]].concat()).collect()
    }

    /// Segments and pages of one prompt and three that share it: its whole pages are listed again.
    pub(super) fn shared(&self, page: usize) -> (Vec<Segment>, Vec<u32>, usize) {
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
    pub(super) fn run<T: Element>(
        &self,
        dev: &Device,
    ) -> (Vec<T>, Vec<T::Acc>, Case<T>, Vec<Segment>) {
        self.run_on(dev, self.qkv(1.0))
    }

    pub(super) fn run_on<T: Element>(
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

    /// The last row of each sequence, decoded when the others are in the cache, has the bits of
    /// training.
    pub(super) fn decodes<T: Element>(&self, dev: &Device) {
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
    pub(super) fn has_the_bits_of_whole_sequences<T: Element>(&self, dev: &Device) {
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

/// Queries and keys that are turned while they are appended have the bits of those that `rope`
/// turned before, the copies of a prompt too; a position beyond the table is NaN.
pub(super) fn turns_as_rope<T: Element>(dev: &Device) {
    let (s, prompt, rest) = (shape(6, 2, 80), 70, [5, 0, 66]);
    let group = Group { shape: s.clone(), prompt, rest };
    let case = Case::new(dev, s.clone(), group.qkv::<T>(1.0));
    let (segments, list, pages) = group.shared(case.page);
    let (cols, d) = (s.qkv_cols(), s.head_dim);
    let plain = Rope::plain(100.0);
    let positions: Vec<u32> = segments.iter().flat_map(|s| s.first..s.first + s.rows).collect();
    let positions = Buffer::of(dev, "test", &positions).unwrap();
    let run = |before: bool, entries: usize| {
        let table = Table::<T::Acc>::new(dev, &plain, d, entries).unwrap();
        let mut qkv = Buffer::of(dev, "test", &case.qkv.concat()).unwrap();
        if before {
            let (x, heads) = (qkv.view_mut(), s.q_heads + s.kv_heads);
            let heads = rope::Heads { row_len: cols, heads, head_dim: d };
            rope::forward(dev, x, heads, positions.view(), &table).unwrap();
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
