//! How a batch is divided among blocks, and for what.

use half::bf16;
use warpo::{
    device::{Arena, Buffer, Device, Scope},
    ops::attention::{self, KvLayer, Partition, Segment, SegmentBatch, Shape},
};

use super::{Case, assert_same, shape};
use crate::support::{
    assert_norm, host, refusal,
    sim::{self, Arch, Order, Sim, Variant},
};

/// What the words of a batch are, those of runs and of the backward pass aside.
fn tiles_of(dev: &Device, s: &Shape, rows: &[(u32, u32)], lists: &[&[u32]]) -> Vec<[u32; 8]> {
    let (mut at, mut start, mut segments) = (0, 0, Vec::new());
    for ((first, rows), list) in rows.iter().zip(lists) {
        let pages = start..start + list.len() as u32;
        segments.push(Segment { first: *first, rows: *rows, at, pages, prefix: None });
        (at, start) = (at + rows, start + list.len() as u32);
    }
    let partition = Partition::new(dev, s, &segments, &lists.concat(), 99).unwrap();
    // None begins at 0, so there are none of the backward pass; runs of up to 64 rows follow.
    let runs: u32 = rows.iter().map(|(_, n)| n.div_ceil(64)).sum();
    let (tiles, rest) = partition.words().as_chunks::<8>();
    let (all, words) = (8 * tiles.len() + rest.len(), 5 * runs as usize);
    tiles[..(all - words) / 8].to_vec()
}

/// Pages in common are read once, long rows are split where others are done long before, and long
/// segments do not widen what single rows are computed by.
#[test]
fn a_batch_is_divided_by_what_it_shares() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let dev = sim.hopper().device(Order::default());
    let (s, gives, takes) = (shape(7, 1, 64), |i: u32| (i + 1) << 16, |n: u32| n << 8);
    assert_eq!((s.page(&dev), shape(2, 1, 256).page(&dev)), (128, 64));
    let plain = tiles_of(&dev, &s, &[(127, 1), (250, 9), (120, 19)], &[&[3], &[0, 1, 2], &[4, 5]]);
    let want = [
        [0, 1, 127, 0, 0, 1, 0, 0],
        [1, 9, 250, 1, 0, 3, 0, 0],
        [10, 18, 120, 4, 0, 2, 0, 0],
        [28, 1, 138, 4, 0, 2, 0, 0],
    ];
    assert_eq!(plain, want);
    // Two groups whose first page is that of all.
    let lists: [&[u32]; 4] = [&[0, 1, 2, 3], &[0, 1, 2, 4], &[0, 5, 6, 7], &[0, 5, 6, 8]];
    let groups = tiles_of(&dev, &s, &[(400, 1), (400, 1), (390, 1), (500, 1)], &lists);
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
    let split = tiles_of(&dev, &s, &[(100, 1), (2400, 1)], &[&[0], &long]);
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
    let alike = tiles_of(&dev, &windowed, &[(400, 1), (401, 1)], &[&[0, 1, 2, 3], &[0, 1, 2, 4]]);
    assert_eq!(alike, [[0, 1, 400, 0, 1, 4, 0, 0], [1, 1, 401, 4, 1, 4, 0, 0]]);
}

#[test]
fn a_partition_of_others_is_refused() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let dev = sim.device(Order::default());
    let s = shape(2, 1, 64);
    let case = Case::<bf16>::random(&dev, s.clone(), &[5]);
    let mut arena = case.room(&dev);
    let scope = arena.scope();
    let mut kv = case.cache(&dev, &scope);
    let segment = |prefix| [Segment { first: 0, rows: 5, at: 0, pages: 0..1, prefix }];
    let own = segment(None);
    let mut says = |made: &Device, shape: &Shape, segments: &[Segment]| {
        let partition = Partition::new(made, shape, segments, &[0], 1).unwrap();
        let words = Buffer::of(&dev, "test", partition.words()).unwrap();
        let list = Buffer::of(&dev, "test", &[0u32]).unwrap();
        let work = SegmentBatch {
            partition: Some((&partition, words.view())),
            ..SegmentBatch::new(&own, list.view())
        };
        let mut qkv = Buffer::of(&dev, "test", &case.qkv[0]).unwrap();
        refusal(attention::append(&dev, &mut kv, qkv.view_mut(), work, &s, None))
    };
    let mut refused = |made: &Device, shape: &Shape, segments: &[Segment]| {
        let e = says(made, shape, segments);
        assert!(e.starts_with("attention::append: partition: got "), "{e}");
    };
    let windowed = Shape { window: Some(3), ..s.clone() };
    refused(&dev, &windowed, &own);
    refused(&dev, &shape(4, 1, 64), &own);
    refused(host(), &s, &own);
    refused(&sim.hopper().device(Order::default()), &s, &own);
    let fewer = [Segment { rows: 4, ..own[0].clone() }];
    refused(&dev, &s, &fewer);
    // As many rows, but others: backward has nothing to do for rows that do not begin their
    // sequence.
    let late = [Segment { first: 3, ..own[0].clone() }];
    let of = |first: u32| {
        format!("Segment {{ first: {first}, rows: 5, at: 0, pages: 0..1, prefix: None }}")
    };
    let want =
        format!("attention::append: segment 0 of the partition: got {}, wanted {}", of(3), of(0));
    assert_eq!(says(&dev, &s, &late), want);
    let two = [fewer[0].clone(), Segment { first: 0, rows: 1, at: 4, pages: 0..1, prefix: None }];
    let e = says(&dev, &s, &two);
    assert!(e.starts_with("attention::append: segment 0 of the partition: got Segment { "), "{e}");
    let empty = Segment { first: 0, rows: 0, at: 5, pages: 0..0, prefix: None };
    let e = says(&dev, &s, &[own[0].clone(), empty]);
    assert!(e.starts_with("attention::append: segment 1 of the partition: got Segment { "), "{e}");
    assert!(e.ends_with(", wanted none"), "{e}");
    // What a batch must not be.
    let bad = |segments: &[Segment], list: &[u32]| {
        refusal(Partition::new(&dev, &s, segments, list, 1).map(drop))
    };
    assert_eq!(
        bad(&own, &[1]),
        "attention::Partition: page id of segment 0: got 1, wanted less than 1"
    );
    let says = bad(&segment(Some(7)), &[0]);
    assert!(
        says.starts_with("attention::Partition: prefix of segment 0: got 7, wanted "),
        "{says}"
    );
    let says = bad(&own, &[]);
    assert!(
        says.starts_with("attention::Partition: pages of segment 0: got 0..1, wanted "),
        "{says}"
    );
}

/// Sequences whose first pages are the same, and how many positions each has after those.
struct Alike<'a> {
    pages: usize,
    own: &'a [usize],
}

/// The last row of each sequence has the same bits, decoded beside the others and as one of two
/// rows, which are never split and read no pages for others; and is right, for one sequence of each
/// group.
fn decode_alike(dev: &Device, s: &Shape, groups: &[Alike<'_>]) {
    let (page, cols, width) = (s.page(dev), s.qkv_cols(), s.q_heads * s.head_dim);
    let lens = groups.iter().flat_map(|g| [&[g.pages * page], g.own].concat());
    let case = Case::<bf16>::random(dev, s.clone(), &lens.collect::<Vec<_>>());
    // The rows of a group's common pages, then those of each sequence.
    let (mut segments, mut list, mut members, mut at) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let (mut next, mut numbers) = (0..9999, 0..);
    for g in groups {
        let common: Vec<u32> = next.by_ref().take(g.pages).collect();
        for (i, n) in [&[g.pages * page], g.own].concat().into_iter().enumerate() {
            let (start, first) = (list.len() as u32, if i > 0 { g.pages * page } else { 0 });
            list.extend(&common);
            list.extend(next.by_ref().take(if i > 0 { n.div_ceil(page) } else { 0 }));
            let (pages, rows) = (start..list.len() as u32, n as u32);
            segments.push(Segment { first: first as u32, rows, at, pages, prefix: None });
            at += rows;
            let number: usize = numbers.next().unwrap();
            members.extend((i > 0).then_some((number, number - i)));
        }
    }
    let layer = |l: &Scope<'_>| KvLayer::<bf16>::new(l, s, page, next.start as usize).map(drop);
    let mut arena = Arena::new(dev, Arena::plan(layer).unwrap()).unwrap();
    let scope = arena.scope();
    let mut kv = KvLayer::new(&scope, s, page, next.start as usize).unwrap();
    case.append(dev, &mut kv, &segments, &list, &case.qkv.concat());
    // The last rows of all, each `n` times.
    let look = |n: u32| {
        let rows = members.iter().zip(0..).map(|((own, _), i)| {
            let Segment { first, rows, pages, .. } = segments[*own].clone();
            Segment { first: first + rows - n, rows: n, at: i * n, pages, prefix: None }
        });
        let of = |(own, _): &(usize, usize)| {
            let row = &case.qkv[*own][case.qkv[*own].len() - cols..];
            row.repeat(n as usize)
        };
        let qkv: Vec<bf16> = members.iter().flat_map(of).collect();
        case.look(dev, &kv, &rows.collect::<Vec<_>>(), &list, &qkv)
    };
    let ((out, lse), (want, want_lse)) = (look(1), look(2));
    for (i, (own, common)) in members.iter().enumerate() {
        let what = format!("sequence {i}, {s:?}");
        let (row, l) = (&out[i * width..][..width], &lse[i * s.q_heads..][..s.q_heads]);
        assert_same(&what, row, &want[(2 * i + 1) * width..][..width]);
        assert_same(&what, l, &want_lse[(2 * i + 1) * s.q_heads..][..s.q_heads]);
        if members.get(i + 1).is_some_and(|(_, c)| c == common) {
            continue;
        }
        let f64s = |x: &[bf16]| -> Vec<f64> { x.iter().map(|x| x.to_f64()).collect() };
        let whole = f64s(&[&case.qkv[*common][..], &case.qkv[*own]].concat());
        let (n, row_of) = (whole.len() / cols, whole[whole.len() - cols..].to_vec());
        let cpu = Case::new(host(), s.clone(), vec![whole]);
        let mut arena = cpu.room(host());
        let scope = arena.scope();
        let mut kv = cpu.cache(host(), &scope);
        cpu.append(host(), &mut kv, &cpu.segments(&cpu.whole()), &cpu.list, &cpu.qkv[0]);
        let (t, t_lse) = cpu.look(host(), &kv, &cpu.segments(&[(0, n - 1..n)]), &cpu.list, &row_of);
        assert_norm(&what, &f64s(row), &t, 0.005);
        assert_norm(&what, l, &t_lse, 1e-6);
    }
}

/// What stands between launches, at each width of heads: groups of several sizes, where a block
/// takes all of one or some; pages in common that are fewer than a part of the softmax, and more;
/// rows that are split, alone and in a group, and rows that are not.
fn decode_in_groups(arch: Arch) {
    let Some(sim) = Sim::plain() else { return };
    let dev = sim.device_as(Order { threads: 5, blocks: 1 }, arch);
    for d in [80, 96, 128, 256] {
        let few = shape(3, 1, d);
        let page = few.page(&dev);
        let part = 1024 / page;
        let (long, short) = ([1, page - 1, page, page + 1, 5], [2, page]);
        decode_alike(
            &dev,
            &shape(16, 1, d),
            &[
                Alike { pages: part + 1, own: &long },
                Alike { pages: 1, own: &short },
                Alike { pages: 0, own: &[70] },
            ],
        );
        if d > 80 && !sim::full() {
            continue;
        }
        // The softmax starts anew just where each goes on alone.
        decode_alike(&dev, &few, &[Alike { pages: part, own: &[1, 2, 3, page] }]);
        // Where others have little to do these are split: one that goes on from what a group has
        // seen, one that does not.
        decode_alike(&dev, &few, &[Alike { pages: 1, own: &[1025 - page, 1024] }]);
        let alone = Alike { pages: 0, own: &[2049] };
        decode_alike(
            &dev,
            &Shape { softcap: Some(2.0), ..few },
            &[alone, Alike { pages: 0, own: &[3] }],
        );
    }
}

#[test]
fn kernels_decode_in_groups_at_all_widths() {
    decode_in_groups(Arch::Sm80);
}

#[test]
fn kernels_on_hopper_decode_in_groups_at_all_widths() {
    decode_in_groups(Arch::Sm90);
}
