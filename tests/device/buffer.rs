//! Buffers and views: what they hold, share and refuse.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::support::{host, temp_dir};
use warpo::device::{Buffer, View, ViewMut, allocations};

#[test]
fn buffers_hold_what_they_were_given() {
    let mut x = Buffer::of(host(), "x", &[1.0f32, 2.0, 3.0]).unwrap();
    assert_eq!((x.len(), x.is_empty(), x.host()), (3, false, &[1.0, 2.0, 3.0][..]));
    x.host_mut()[1] = 5.0;
    x.view_mut().host()[2] = 7.0;
    assert_eq!(x.view().host(), [1.0, 5.0, 7.0]);
    assert_eq!(Buffer::<u64>::zeros(host(), "x", 5).unwrap().host(), [0; 5]);
    for n in [0, 1, 15, 16, 17, 1000] {
        let x = Buffer::<f32>::zeros(host(), "x", n).unwrap();
        assert_eq!((x.len(), x.is_empty()), (n, n == 0));
        assert_eq!(x.host().as_ptr() as usize % 64, 0, "aligned to a cache line");
    }
}

#[test]
#[cfg(debug_assertions)]
fn poisoned_buffers_are_nan() {
    assert!(Buffer::<f32>::new(host(), "x", 100).unwrap().host().iter().all(|x| x.is_nan()));
    assert!(Buffer::<f64>::new(host(), "x", 100).unwrap().host().iter().all(|x| x.is_nan()));
}

#[test]
fn allocations_are_counted() {
    // Other tests allocate at the same time: only a lower bound is sure.
    let before = allocations();
    let buffers: Vec<Buffer<'_, u8>> =
        (0..10).map(|n| Buffer::zeros(host(), "x", n).unwrap()).collect();
    assert!(allocations() >= before + buffers.len() as u64);
}

#[test]
fn views_are_windows() {
    let mut x = vec![0, 1, 2, 3, 4, 5, 6];
    let view = View::from(&x);
    assert_eq!((view.len(), view.is_empty()), (7, false));
    assert_eq!(
        (view.range(2..5).host(), view.range(2..5).range(1..2).host()),
        (&[2, 3, 4][..], &[3][..])
    );
    assert!(view.range(7..7).is_empty());
    let mut view = ViewMut::from(&mut x);
    assert_eq!((view.len(), view.is_empty()), (7, false));
    view.reborrow().range(1..3).host().fill(10);
    assert_eq!(view.view().host(), [0, 10, 10, 3, 4, 5, 6]);
    let (low, high) = view.split_at(3);
    assert_eq!((low.len(), high.len()), (3, 4));
    high.host()[0] = 20;
    low.host()[0] = 30;
    assert_eq!(x, [30, 10, 10, 20, 4, 5, 6]);
    let (all, none) = ViewMut::from(&mut x).split_at(7);
    assert!(!all.is_empty() && none.is_empty());
}

#[test]
fn ranges_beyond_a_view_panic_like_slices() {
    let mut x = [0u8; 4];
    for range in [2..5, 5..5, Range { start: 3, end: 2 }] {
        let range = AssertUnwindSafe(|| View::from(&x[..]).range(range.clone()).len());
        assert!(catch_unwind(range).is_err());
    }
    let mut panics = |f: fn(ViewMut<'_, u8>)| {
        assert!(catch_unwind(AssertUnwindSafe(|| f((&mut x[..]).into()))).is_err());
    };
    panics(|v| v.range(2..5).host().fill(1));
    panics(|v| v.split_at(5).0.host().fill(1));
    assert_eq!(x, [0; 4]);
}

#[test]
fn views_may_be_read_on_other_threads() {
    let x = Buffer::of(host(), "x", &(0..100).collect::<Vec<u64>>()).unwrap();
    let view = x.view();
    let sums: Vec<u64> = std::thread::scope(|s| {
        let halves = [0..50, 50..100].map(|r| s.spawn(move || view.range(r).host().iter().sum()));
        halves.map(|t| t.join().unwrap()).into()
    });
    assert_eq!(sums.iter().sum::<u64>(), 99 * 50);
}

/// What a container may still take: files in memory give way. Of version 2, then of version 1.
#[test]
fn a_control_group_says_what_is_left() {
    let dir = temp_dir("control_group");
    let left = |files: &[(&str, &str)]| {
        std::fs::remove_dir_all(&dir).unwrap();
        std::fs::create_dir(&dir).unwrap();
        for (name, text) in files {
            std::fs::write(dir.join(name), text).unwrap();
        }
        warpo::device::free_in_group(&dir)
    };
    let stat = "anon 400\ninactive_file 30\nactive_file 20\nslab_reclaimable 5\n\
                total_inactive_file 40\ntotal_active_file 1\n";
    let v2 = [("memory.current", "500\n"), ("memory.max", "1000\n"), ("memory.stat", stat)];
    assert_eq!(left(&v2), Some(1000 - (500 - 55)));
    assert_eq!(left(&[v2[0], ("memory.max", "max\n"), v2[2]]), None);
    let v1 = [("memory.usage_in_bytes", "500"), ("memory.limit_in_bytes", "450")];
    assert_eq!(left(&v1), Some(0));
    assert_eq!(left(&[v1[0], v1[1], v2[2]]), Some(0));
    assert_eq!(left(&[v1[0], ("memory.limit_in_bytes", "600"), v2[2]]), Some(600 - (500 - 41)));
    assert_eq!(left(&[]), None);
}

#[test]
fn memory_that_there_is_not_is_an_error() {
    let e = warpo::device::reserve::<u64>("a test", 1 << 45).unwrap_err().to_string();
    assert!(e.contains("a test"), "{e}");
    assert!(warpo::device::reserve::<u64>("a test", 3).unwrap().capacity() >= 3);
}
