//! The gradient's kernels: against the CPU, in one order, and what they refuse.

use half::bf16;
use warpo::{
    device::{Buffer, Element},
    ops::attention::{self, Partition, Segment, SegmentBatch, Shape},
};

use super::{Case, Part, assert_same, shape, shared::Group};
use crate::support::{
    randn, refusal,
    sim::{self, Arch, Lab, Order, Sim, Variant},
};

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
fn backward_cases() -> impl Iterator<Item = (Shape, Vec<usize>)> {
    let all = [
        (shape(7, 1, 64), vec![9, 10, 0, 30]),
        (shape(4, 2, 80), vec![33, 70]),
        (shape(2, 1, 96), vec![66]),
        (shape(6, 2, 128), vec![21, 65]),
        (shape(3, 1, 256), vec![33, 40]),
        // A warp's last row sees all of its columns but the first.
        (Shape { window: Some(63), ..shape(1, 1, 64) }, vec![130]),
        // A warp's first row sees all of its columns but the last.
        (shape(8, 1, 64), vec![40]),
        (Shape { window: Some(1), ..shape(2, 1, 64) }, vec![70]),
        (shape(1, 1, 64), vec![1, 63, 64, 65, 130]),
        (Shape { window: Some(65), softcap: Some(2.0), ..shape(3, 1, 64) }, vec![200]),
    ];
    sim::cases(8, all)
}

#[test]
fn kernels_go_backward_as_the_cpu() {
    sim::check(|sim| {
        for (s, lens) in backward_cases() {
            sim.hold_bf16(&Differentiate::Whole(s, lens));
        }
    });
}

/// In the first case a prompt's first keys have less to do than the next, which wait for them.
fn shared_backward_cases() -> impl Iterator<Item = Group> {
    let all = [
        (Shape { window: Some(21), ..shape(6, 3, 64) }, 130, [64, 3, 0]),
        (shape(3, 1, 64), 70, [3, 0, 31]),
        (Shape { softcap: Some(2.0), ..shape(3, 1, 80) }, 65, [30, 1, 0]),
        (shape(2, 1, 64), 64, [1, 65, 3]),
        (Shape { window: Some(21), ..shape(4, 2, 64) }, 37, [5, 1, 60]),
        (Shape { window: Some(40), ..shape(3, 1, 256) }, 45, [3, 20, 0]),
    ];
    sim::cases(4, all).map(|(shape, prompt, rest)| Group { shape, prompt, rest })
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
fn backward_in_any_company(sim: &Sim, arch: Arch) {
    let dev = sim.device_as(Order { threads: 3, blocks: 1 }, arch);
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
    sim::check(|sim| backward_in_any_company(sim, Arch::Sm80));
}

/// A bad number of `dout` or of a query, key or value, in every other sequence: the rest feels
/// nothing, and the gradients of the bad row's head are bad. It is the row behind the first
/// sequence's last, so that a tile of those rows that is brought whole brings it too.
fn backward_keeps_nan(sim: &Sim, arch: Arch) {
    let dev = sim.device_as(Order::default(), arch);
    let (s, lens) = (shape(2, 2, 64), [5, 70, 6]);
    let case = Case::<bf16>::random(&dev, s.clone(), &lens);
    let dout = vec![bf16::ONE; 81 * 128];
    let clean = case.backward(&dev, &case.whole(), &dout);
    let cols = s.qkv_cols();
    for column in [0, 128, 256, cols] {
        let (mut dout, mut qkv) = (dout.clone(), case.qkv.clone());
        match column == cols {
            true => dout[5 * 128] = bf16::NAN,
            false => qkv[1][column] = bf16::NAN,
        }
        let bad = Case::new(&dev, s.clone(), qkv);
        let got = bad.backward(&dev, &bad.whole(), &dout);
        assert_same("before", &got[..5 * cols], &clean[..5 * cols]);
        assert_same("after", &got[75 * cols..], &clean[75 * cols..]);
        // Columns of the other head.
        for (got, clean) in got.chunks_exact(64).zip(clean.chunks_exact(64)).skip(1).step_by(2) {
            assert_same("the other head", got, clean);
        }
        let own = &got[5 * cols..][..64];
        assert!(own.iter().all(|x| x.is_nan()), "{column}: a NaN was lost");
    }
}

#[test]
fn a_nan_of_backward_kernels_stays_in_its_sequence() {
    sim::check(|sim| backward_keeps_nan(sim, Arch::Sm80));
}

/// Where all that a row sees has scores far below zero, e^-lse is no number: what is not seen, and
/// rows and keys of a tile that are not there, must not be weighed by it.
fn backward_stays_finite(sim: &Sim, arch: Arch) {
    let dev = sim.device_as(Order::default(), arch);
    for window in [None, Some(40)] {
        let shape = Shape { scale: 10.0, window, ..shape(3, 1, 64) };
        let group = Group { shape, prompt: 70, rest: [1, 80, 3] };
        let mut qkv = group.qkv::<bf16>(1.0);
        for row in qkv.iter_mut().flat_map(|x| x.chunks_exact_mut(320)) {
            // Queries are positive, keys negative.
            row[..192].iter_mut().for_each(|x| *x = x.max(-*x));
            row[192..256].iter_mut().for_each(|x| *x = x.min(-*x));
        }
        let (out, lse, case, segments) = group.run_on(&dev, qkv);
        assert!(lse.iter().all(|l| *l < -100.0), "{lse:?}");
        let (dout, qkv) = (vec![bf16::ONE; out.len()], case.qkv.concat());
        let dqkv = case.gradient(&dev, &segments, [&dout, &out, &qkv], &lse);
        assert!(dqkv.iter().all(|x| x.is_finite()), "window {window:?}");
    }
}

#[test]
fn gradients_of_kernels_are_finite_where_scores_are_far_below_zero() {
    let Some(sim) = Sim::plain() else { return };
    backward_stays_finite(&sim, Arch::Sm80);
    backward_stays_finite(&sim, Arch::Sm90);
}

#[test]
fn what_backward_kernels_cannot_take_is_refused() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let dev = sim.device(Order::default());
    let refused = |s: &Shape, rows: usize, partition: Option<usize>| {
        let segments = |rows: usize| {
            [Segment { first: 0, rows: rows as u32, at: 0, pages: 0..1, prefix: None }]
        };
        let room = |n: usize| Buffer::<bf16>::zeros(&dev, "test", rows * n).unwrap();
        let (out, qkv, dout) = (s.q_heads * s.head_dim, s.qkv_cols(), s.q_heads * s.head_dim);
        let [mut dqkv, dout, out, qkv] = [qkv, dout, out, qkv].map(room);
        let lse = Buffer::<f32>::zeros(&dev, "test", rows * s.q_heads).unwrap();
        let need = attention::backward_scratch_len(s, rows);
        let mut scratch = Buffer::<f32>::zeros(&dev, "test", need).unwrap();
        let partition =
            partition.map(|rows| Partition::new(&dev, s, &segments(rows), &[0], 1).unwrap());
        let words =
            Buffer::of(&dev, "test", partition.as_ref().map_or(&[], |p| p.words())).unwrap();
        let (own, list) = (segments(rows), Buffer::<u32>::zeros(&dev, "test", 1).unwrap());
        let partition = partition.as_ref().map(|p| (p, words.view()));
        let work = SegmentBatch { partition, ..SegmentBatch::new(&own, list.view()) };
        let (dqkv, scratch, lse) = (dqkv.view_mut(), scratch.view_mut(), lse.view());
        let (dout, out, qkv) = (dout.view(), out.view(), qkv.view());
        let e = attention::backward(
            &dev,
            attention::BackwardArgs { dqkv, dout, out, qkv, lse, scratch },
            work,
            s,
        );
        refusal(e).replace("attention::backward: ", "")
    };
    let is = "head_dim on a CUDA device: got 72, wanted one of [64, 80, 96, 128, 256]";
    assert_eq!(refused(&shape(1, 1, 72), 3, Some(3)), is);
    let is = "query heads of a KV head on a CUDA device: got 65, wanted at most 64";
    assert_eq!(refused(&shape(65, 1, 64), 3, Some(3)), is);
    let is = "partition on a CUDA device: got none, wanted that of the segments";
    assert_eq!(refused(&shape(1, 1, 64), 3, None), is);
    let says = refused(&shape(1, 1, 64), 3, Some(4));
    let of =
        |n: usize| format!("that of {n} rows, 1/1 heads of 64, no window, 1 pages of 64, on sm_80");
    assert_eq!(says, format!("partition: got {}, wanted {}", of(4), of(3)));
    let negative = Shape { scale: -1.0, ..shape(1, 1, 64) };
    let is = "scale on a CUDA device: got -1, wanted a positive number";
    assert_eq!(refused(&negative, 3, Some(3)), is);
}

/// The cases of `kernels_go_backward_as_the_cpu`, and more keys than a tile of Hopper's.
#[test]
fn kernels_on_hopper_go_backward_as_the_cpu() {
    sim::check(|sim| {
        let sim = sim.hopper();
        let more = [
            (shape(7, 1, 64), vec![150, 20]),
            (shape(2, 1, 80), vec![140]),
            (shape(3, 1, 96), vec![131]),
            (shape(5, 1, 128), vec![140, 13]),
            (Shape { window: Some(70), softcap: Some(2.0), ..shape(3, 1, 256) }, vec![150]),
            // The last query of a tile sees all of a warp's keys but the first.
            (Shape { window: Some(79), ..shape(1, 1, 64) }, vec![130]),
            (shape(1, 1, 64), vec![127, 128, 129, 300]),
            (shape(2, 1, 256), vec![65, 130]),
            (Shape { window: Some(1), ..shape(3, 1, 128) }, vec![140]),
            (Shape { window: Some(64), ..shape(1, 1, 128) }, vec![290]),
        ];
        for (s, lens) in backward_cases().chain(sim::cases(6, more)) {
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
            Group { shape: shape(3, 1, 256), prompt: 70, rest: [3, 0, 65] },
            Group { shape: shape(2, 1, 64), prompt: 128, rest: [1, 130, 3] },
            Group { shape: Shape { window, ..shape(3, 1, 64) }, prompt: 260, rest: [160, 4, 2] },
        ];
        for group in shared_backward_cases().chain(sim::cases(2, more)) {
            sim.hold_bf16(&Differentiate::Shared(group));
        }
    });
}

#[test]
fn rows_of_backward_kernels_on_hopper_do_not_see_their_batch() {
    sim::check(|sim| backward_in_any_company(sim, Arch::Sm90));
}

#[test]
fn a_nan_of_backward_kernels_on_hopper_stays_in_its_sequence() {
    sim::check(|sim| backward_keeps_nan(sim, Arch::Sm90));
}
