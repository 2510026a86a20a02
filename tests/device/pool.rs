//! The thread pool, through `Cpu::run` and `Cpu::rows`: every task and row once, panics reported
//! and survived.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicUsize, Ordering},
    thread::ThreadId,
    time::{Duration, Instant},
};

use warpo::device::Cpu;

fn counters(n: usize) -> Vec<AtomicUsize> {
    (0..n).map(|_| AtomicUsize::new(0)).collect()
}

fn counts(x: &[AtomicUsize]) -> Vec<usize> {
    x.iter().map(|x| x.load(Ordering::Relaxed)).collect()
}

/// Waits until `n` threads are here. A pool that never brings them fails, but does not hang.
fn meet(here: &AtomicUsize, n: usize) {
    here.fetch_add(1, Ordering::SeqCst);
    let start = Instant::now();
    while here.load(Ordering::SeqCst) < n && start.elapsed() < Duration::from_secs(10) {
        std::thread::yield_now();
    }
    assert!(here.load(Ordering::SeqCst) >= n, "{n} threads were to meet");
}

#[test]
fn every_task_runs_once() {
    for threads in [1, 2, 3, 8] {
        let cpu = Cpu::new(threads);
        assert_eq!(cpu.threads(), threads);
        for tasks in [0, 1, 2, 3, 7, 1000] {
            let seen = counters(tasks);
            cpu.run(tasks, |i| {
                seen[i].fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(counts(&seen), vec![1; tasks], "{threads} threads");
        }
    }
    assert!(Cpu::new(0).threads() >= 1);
}

#[test]
fn all_threads_work() {
    // Each task waits for two others, so three threads must be inside at once.
    let (cpu, here, ids) = (Cpu::new(3), AtomicUsize::new(0), std::sync::Mutex::new(Vec::new()));
    cpu.run(3, |_| {
        meet(&here, 3);
        ids.lock().unwrap().push(std::thread::current().id());
    });
    let mut ids: Vec<ThreadId> = ids.into_inner().unwrap();
    ids.sort_by_key(|id| format!("{id:?}"));
    ids.dedup();
    assert_eq!(ids.len(), 3);
    assert!(ids.contains(&std::thread::current().id()), "the caller works too");
}

#[test]
fn every_row_is_handed_out_once() {
    for threads in [1, 3] {
        let cpu = Cpu::new(threads);
        for rows in [0, 1, 2, 11, 12, 13, 97, 1000] {
            for grain in [0, 1, 5, 12, 5000] {
                let (mut a, mut b) = (vec![0u32; rows], vec![0u32; 3 * rows]);
                let (parts, mut c) = (AtomicUsize::new(0), vec![0u32; rows]);
                let out = ((&mut a[..], 1), (&mut b[..], 3), Some((&mut c[..], 1)));
                cpu.rows(rows, grain, out, |range, (a, b, c)| {
                    parts.fetch_add(1, Ordering::Relaxed);
                    let c = c.unwrap();
                    assert_eq!(
                        (a.len(), b.len(), c.len()),
                        (range.len(), 3 * range.len(), a.len())
                    );
                    assert!(range.len() >= grain.min(rows) || range.end == rows);
                    for (i, r) in range.enumerate() {
                        a[i] += 1 + r as u32;
                        b[3 * i + 2] += 1 + r as u32;
                        c[i] += 1;
                    }
                });
                let what = format!("{rows} rows, grain {grain}, {threads} threads");
                let want: Vec<u32> = (1..=rows as u32).collect();
                assert_eq!(a, want, "{what}");
                assert_eq!(
                    b.iter().skip(2).step_by(3).copied().collect::<Vec<_>>(),
                    want,
                    "{what}"
                );
                assert_eq!(c, vec![1; rows], "{what}");
                assert!(parts.into_inner() <= 4 * threads, "{what}");
            }
        }
    }
}

#[test]
fn an_output_that_may_be_absent_stays_absent() {
    let mut a = [0; 5];
    let none: Option<(&mut [u32], usize)> = None;
    Cpu::new(2).rows(5, 1, ((&mut a[..], 1), none), |_, (a, none)| {
        assert!(none.is_none());
        a.fill(1);
    });
    assert_eq!(a, [1; 5]);
}

#[test]
fn a_wrong_length_panics() {
    let mut a = [0; 5];
    let run = || Cpu::new(2).rows(3, 1, (&mut a[..], 2), |_, _| {});
    let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().contains("an output of 3 rows of 2"));
}

#[test]
fn a_task_may_run_tasks() {
    for threads in [1, 3] {
        let (cpu, seen) = (Cpu::new(threads), counters(5 * 7));
        cpu.run(5, |i| {
            cpu.run(7, |j| {
                seen[7 * i + j].fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(counts(&seen), [1; 35]);
        // and the caller's next job is parallel again
        let here = AtomicUsize::new(0);
        cpu.run(threads, |_| meet(&here, threads));
    }
}

#[test]
fn callers_on_many_threads_take_turns() {
    let (cpu, seen) = (Cpu::new(3), counters(50));
    std::thread::scope(|s| {
        for _ in 0..4 {
            let cpu = cpu.clone();
            let seen = &seen;
            s.spawn(move || {
                for _ in 0..100 {
                    cpu.run(50, |i| {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(counts(&seen), [400; 50]);
}

/// Whoever panics, the caller hears of it and the next job is clean.
/// When the caller and a worker had panicked together, the next job used to be blamed.
#[test]
fn a_panic_is_reported_and_the_pool_lives_on() {
    for threads in [1, 2, 3] {
        let cpu = Cpu::new(threads);
        let caller = std::thread::current().id();
        for (who, caller_panics, workers_panic) in
            [("workers", false, true), ("caller", true, false), ("all", true, true)]
        {
            if threads == 1 && who == "workers" {
                continue;
            }
            let here = AtomicUsize::new(0);
            let run = || {
                cpu.run(threads, |_| {
                    // All threads are inside before one panics.
                    meet(&here, threads);
                    let mine = std::thread::current().id() == caller;
                    assert!(!(if mine { caller_panics } else { workers_panic }), "as told");
                });
            };
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "{who} of {threads}");
            let seen = counters(100);
            cpu.run(100, |i| {
                seen[i].fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(counts(&seen), [1; 100], "after {who} of {threads}");
        }
    }
}

#[test]
fn clones_share_their_threads_and_outlive_each_other() {
    let first = Cpu::new(3);
    let second = first.clone();
    drop(first);
    let seen = counters(10);
    second.run(10, |i| {
        seen[i].fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(counts(&seen), [1; 10]);
}
