//! Results that may still be under way: their values, what they cost, and what may happen before
//! they are read.

use warpo::{
    device::{Arena, Buffer, Cuda, Device, Pending, cuda::Ring},
    ops::{grad_norm, nll},
};

use crate::support::{
    host, randn, refusal,
    sim::{self, Order, Sim},
};

/// A device with counts of its own, and a handle to it.
fn device(sim: &Sim) -> (Device, Cuda) {
    let Device::Cuda(cuda) = sim.device(Order::default()) else { panic!("no cuda device") };
    let cuda = cuda.with_ring(Ring { slots: 2, bytes: 256 }).unwrap();
    (Device::Cuda(cuda.clone()), cuda)
}

fn numbers(from: u32, n: usize) -> Vec<u32> {
    (from..).take(n).collect()
}

#[test]
fn on_the_cpu_it_is_there() {
    let x = vec![1.0f32, 2.0, 3.0];
    let later = host().read_later((&x).into()).unwrap();
    assert_eq!(format!("{later:?}"), "Pending([1.0, 2.0, 3.0])");
    let sum = later.map(|x| x.iter().sum::<f32>());
    assert_eq!(format!("{sum:?}"), "Pending(6.0)");
    assert_eq!(sum.map(|sum| sum.to_string()).get().unwrap(), "6");
    assert_eq!(Pending::now(7).get().unwrap(), 7);
}

#[test]
fn one_wait_brings_all_that_were_issued_before() {
    sim::check(|sim| {
        let (dev, cuda) = device(sim);
        let buffers: Vec<Buffer<'_, u32>> =
            (0..20).map(|i| Buffer::of(&dev, "x", &numbers(i, 40 * i as usize)).unwrap()).collect();
        let begin = cuda.calls();
        let mut laters: Vec<_> =
            buffers.iter().map(|x| dev.read_later(x.view()).unwrap()).collect();
        let after = cuda.calls() - begin;
        assert_eq!((after.reads, after.waits), (19, 0), "there is nothing to read of the first");
        assert_eq!(format!("{:?}", laters[1]), "Pending(on a device)");
        // In any order.
        assert_eq!(laters.remove(7).get().unwrap(), numbers(7, 280));
        let late = dev.read_later(buffers[7].view()).unwrap().map(|x| x.len());
        for (i, later) in (0..20).filter(|i| *i != 7).zip(laters) {
            assert_eq!(later.get().unwrap(), numbers(i, 40 * i as usize));
        }
        assert_eq!((cuda.calls() - begin).waits, 1);
        assert_eq!(late.get().unwrap(), 280);
        assert_eq!((cuda.calls() - begin).waits, 2, "issued after the first wait");
        // Whoever waits.
        let waits: [&dyn Fn(); 2] =
            [&|| cuda.synchronize().unwrap(), &|| drop(dev.read(buffers[1].view()).unwrap())];
        for (i, wait) in (3..).zip(waits) {
            let later = dev.read_later(buffers[3].view()).unwrap();
            wait();
            assert_eq!(later.get().unwrap(), numbers(3, 120));
            assert_eq!((cuda.calls() - begin).waits, i);
        }
    });
}

/// A wait goes up to the first milestone behind what it is for, and brings what was issued before
/// that.
#[test]
fn a_milestone_divides_what_waits_bring() {
    sim::check(|sim| {
        let (dev, cuda) = device(sim);
        let mut x = Buffer::<u32>::zeros(&dev, "x", 100).unwrap();
        let read = |x: &mut Buffer<'_, u32>, from| {
            dev.write(x.view_mut(), &numbers(from, 100)).unwrap();
            dev.read_later(x.view()).unwrap()
        };
        let begin = cuda.calls();
        let waits = || (cuda.calls() - begin).waits;
        let [a, b] = [1, 2].map(|from| read(&mut x, from));
        dev.milestone().unwrap();
        dev.milestone().unwrap();
        let c = read(&mut x, 3);
        dev.milestone().unwrap();
        let [d, e] = [4, 5].map(|from| read(&mut x, from));
        assert_eq!(waits(), 0, "to set a milestone is no wait");
        assert_eq!((a.get().unwrap(), waits()), (numbers(1, 100), 1));
        assert_eq!((b.get().unwrap(), waits()), (numbers(2, 100), 1));
        // Behind a later one all is there that is before it.
        assert_eq!((d.get().unwrap(), waits()), (numbers(4, 100), 2));
        assert_eq!((c.get().unwrap(), waits()), (numbers(3, 100), 2));
        assert_eq!((e.get().unwrap(), waits()), (numbers(5, 100), 2));

        // One ahead, again and again, also where nobody wants the numbers; and a wait for all in
        // between.
        let events = || format!("{cuda:?}").matches("Event(").count();
        let (mut before, had) = (None, events());
        for from in 12..40 {
            let now = read(&mut x, from);
            dev.milestone().unwrap();
            let before: Option<Pending<Vec<u32>>> = before.replace(now);
            match from % 4 {
                0 => cuda.synchronize().unwrap(),
                1 => drop(before),
                _ => {
                    let had = waits();
                    assert_eq!(before.unwrap().get().unwrap(), numbers(from - 1, 100));
                    assert_eq!(waits() - had, 1, "{from}");
                }
            }
        }
        assert!(events() <= had + 1, "events are used again: {} after {had}", events());
        host().milestone().unwrap();
    });
}

#[test]
fn it_keeps_the_value_of_its_time() {
    sim::check(|sim| {
        let (dev, cuda) = device(sim);
        let mut arena = Arena::new(&dev, 1 << 12).unwrap();
        let mut laters = Vec::new();
        for i in 0..5 {
            let scope = arena.scope();
            let mut x: Buffer<'_, u32> = scope.alloc("x", 100).unwrap();
            dev.write(x.view_mut(), &numbers(i, 100)).unwrap();
            laters.push(dev.read_later(x.view()).unwrap());
            dev.zero(x.view_mut()).unwrap();
        }
        drop(arena);
        let x = Buffer::of(&dev, "x", &numbers(9, 100)).unwrap();
        laters.push(dev.read_later(x.view()).unwrap());
        drop((x, dev, cuda));
        for (i, later) in [0, 1, 2, 3, 4, 9].into_iter().zip(laters) {
            assert_eq!(later.get().unwrap(), numbers(i, 100));
        }
    });
}

#[test]
fn one_that_is_dropped_unread_costs_nothing() {
    sim::check(|sim| {
        let (dev, cuda) = device(sim);
        let mut x = Buffer::of(&dev, "x", &numbers(0, 100)).unwrap();
        let begin = cuda.calls();
        drop(dev.read_later(x.view()).unwrap());
        let pinned = cuda.pinned_bytes();
        for i in 1..50 {
            // Of about the same size, in the block of the one before, whose copy is under way.
            drop(dev.read_later(x.view().range(0..70 + i % 30)).unwrap());
            dev.write(x.view_mut(), &numbers(i as u32, 100)).unwrap();
            drop(dev.read_later(x.view()).unwrap().map(|x| x[0]));
        }
        assert_eq!((cuda.calls() - begin).waits, 0);
        let [a, b] = [10, 30].map(|at| dev.read_later(x.view().range(at..at + 70)).unwrap());
        assert_eq!(a.get().unwrap(), numbers(59, 70));
        assert_eq!(b.get().unwrap(), numbers(79, 70));
        assert_eq!((cuda.calls() - begin).waits, 1);
        // One more block: for a short while there were two.
        assert_eq!(cuda.pinned_bytes(), pinned + 512);
    });
}

#[test]
fn sums_of_kernels_are_read_with_one_wait() {
    sim::check(|sim| {
        let (dev, cuda) = device(sim);
        let of = |i: usize| -> (Vec<f32>, Vec<f32>) {
            let (x, w) = (randn(&format!("x{i}"), 500 * i), randn("w", 500 * i));
            let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
            (narrow(x), narrow(w))
        };
        let mut waits = 0;
        for i in 0..4 {
            let (x, w) = of(i);
            let mut d = Buffer::new(&dev, "d", x.len()).unwrap();
            let [a, b] = [&x, &w].map(|x| Buffer::of(&dev, "x", x).unwrap());
            let begin = cuda.calls();
            let loss = nll::forward(&dev, d.view_mut(), a.view(), b.view(), 7.0).unwrap();
            // In the room of the loss, which nobody has read yet.
            let norm = grad_norm::norm(&dev, a.view()).unwrap();
            let bad = grad_norm::first_bad(&dev, d.view()).unwrap();
            assert_eq!((cuda.calls() - begin).waits, 0);
            let all = (loss.get().unwrap(), norm.get().unwrap(), bad.get().unwrap());
            waits += (cuda.calls() - begin).waits;
            let mut own = vec![0.0; x.len()];
            let want = nll::forward(host(), (&mut own).into(), (&x).into(), (&w).into(), 7.0);
            let want = want.unwrap().get().unwrap();
            assert!((all.0 - want).abs() <= 1e-12 * (1.0 + want.abs()), "{} {want}", all.0);
            let want = grad_norm::norm(host(), (&x).into()).unwrap().get().unwrap();
            assert!((all.1 - want).abs() <= 1e-6 * want, "{} {want}", all.1);
            assert_eq!(all.2, None);
        }
        assert_eq!(waits, 4);
    });
}

#[test]
fn host_memory_has_no_copy_under_way() {
    sim::check(|sim| {
        let (dev, _) = device(sim);
        let e = refusal(dev.read_later((&vec![1.0f32; 3]).into()));
        assert_eq!(e, "device `cuda` is not available: a buffer is in host memory");
    });
}
