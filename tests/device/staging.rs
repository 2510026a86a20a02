//! What goes between host and device: writes through the ring, counts of calls, and many threads at
//! once.

use std::thread;

use warpo::device::{
    Arena, Buffer, Cuda, Device, Pending, ViewMut,
    cuda::{Calls, Launch, Parts, Ring, Swizzle, Tiles, kernels::norm as kernel},
};

use crate::support::{
    host, refusal,
    sim::{self, Order, Sim},
};

/// A device whose writes go through `ring`, and a handle to it.
fn device(sim: &Sim, slots: usize, bytes: usize) -> (Device, Cuda) {
    let Device::Cuda(cuda) = sim.device(Order::default()) else { panic!("no cuda device") };
    let cuda = cuda.with_ring(Ring { slots, bytes }).unwrap();
    (Device::Cuda(cuda.clone()), cuda)
}

fn bytes(seed: usize, n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 256 + seed * 31) as u8).collect()
}

#[test]
fn a_write_does_not_need_its_source_any_more() {
    sim::check(|sim| {
        let (dev, cuda) = device(sim, 2, 4096);
        let mut y = Buffer::<u8>::zeros(&dev, "y", 3000).unwrap();
        let begin = cuda.calls();
        let mut source = bytes(1, 1000);
        dev.write(y.view_mut().range(0..1000), &source).unwrap();
        source.fill(0xEE);
        dev.write(y.view_mut().range(1000..2000), &source).unwrap();
        drop(source);
        dev.write(y.view_mut().range(2000..3000), &bytes(2, 1000)).unwrap();
        assert_eq!(cuda.calls() - begin, Calls { writes: 3, ..Calls::default() });
        let want = [bytes(1, 1000), vec![0xEE; 1000], bytes(2, 1000)].concat();
        assert_eq!(dev.read(y.view()).unwrap(), want);
    });
}

#[test]
fn writes_go_round_the_ring() {
    sim::check(|sim| {
        for (slots, slot) in [(1, 1), (1, 64), (2, 100), (3, 64), (2, 1000), (4, 4096)] {
            let (dev, cuda) = device(sim, slots, slot);
            let sizes = [1, 0, 63, 64, 65, 1, 1, 200, 999, 1000, 1001, 5, 3333, 127];
            let total: usize = sizes.iter().sum();
            let mut y = Buffer::<u8>::zeros(&dev, "y", total).unwrap();
            let begin = cuda.calls();
            let (mut rest, mut want): (ViewMut<'_, u8>, _) = (y.view_mut(), Vec::new());
            for (i, n) in sizes.into_iter().enumerate() {
                let (part, behind) = rest.split_at(n);
                dev.write(part, &bytes(i, n)).unwrap();
                want.extend(bytes(i, n));
                rest = behind;
            }
            let calls = cuda.calls() - begin;
            assert_eq!((calls.writes, calls.waits), (13, 0), "nothing to write is not a write");
            assert_eq!(dev.read(y.view()).unwrap(), want, "{slots} slots of {slot} bytes");
            // The last write of a place counts.
            for i in 0..30 {
                dev.write(y.view_mut().range(0..40), &bytes(i, 40)).unwrap();
            }
            assert_eq!(dev.read(y.view().range(0..40)).unwrap(), bytes(29, 40));
            assert!(cuda.pinned_bytes() == slots * slot);
        }
    });
}

#[test]
fn a_ring_has_slots_and_bytes() {
    sim::check(|sim| {
        for (slots, bytes) in [(0, 8), (8, 0)] {
            let Device::Cuda(cuda) = sim.device(Order::default()) else { panic!("no cuda device") };
            let got = format!("a ring of {slots} slots of {bytes} bytes, wanted at least 1 of 1");
            let e = refusal(cuda.with_ring(Ring { slots, bytes }));
            assert_eq!(e, format!("device `cuda` is not available: {got}"));
        }
    });
}

#[test]
fn calls_are_counted() {
    sim::check(|sim| {
        let (dev, cuda) = device(sim, 2, 4096);
        assert_eq!(cuda.calls(), Calls::default());
        let mut x = Buffer::<f32>::zeros(&dev, "x", 64).unwrap();
        let mut y = Buffer::<f32>::zeros(&dev, "y", 64).unwrap();
        let fills = cuda.calls();
        assert_eq!(fills, Calls { fills: 2, ..Calls::default() });
        let of = |what: &mut dyn FnMut()| {
            let before = cuda.calls();
            what();
            cuda.calls() - before
        };
        let none = Calls::default();
        let mut launch = |blocks| {
            let launch = Launch::row(blocks, kernel::THREADS * 4).unwrap();
            kernel::AddPartials {
                dw: y.view_mut(),
                db: None,
                partial: x.view(),
                count: 1,
                cols: 32 * blocks,
            }
            .launch(&cuda, launch)
            .unwrap();
        };
        assert_eq!(of(&mut || launch(2)), Calls { launches: 1, ..none });
        assert_eq!(of(&mut || launch(0)), none);
        let wait = Calls { waits: 1, ..none };
        assert_eq!(of(&mut || cuda.synchronize().unwrap()), wait);
        assert_eq!(of(&mut || assert!(cuda.time(|| Ok(())).unwrap() >= 0.0)), wait);
        assert_eq!(of(&mut || drop(dev.read(x.view()).unwrap())), Calls { reads: 1, ..wait });
        let later = &mut || drop(dev.read_later(x.view()).unwrap());
        assert_eq!(of(later), Calls { reads: 1, ..none });
        let copy = &mut || dev.copy(y.view_mut(), x.view()).unwrap();
        assert_eq!(of(copy), Calls { copies: 1, ..none });
        assert_eq!(of(&mut || dev.zero(x.view_mut()).unwrap()), Calls { fills: 1, ..none });
        let write = &mut || dev.write(x.view_mut(), &[1.0; 64]).unwrap();
        assert_eq!(of(write), Calls { writes: 1, ..none });
        assert_eq!(of(&mut || drop(Buffer::<u8>::new(&dev, "z", 9).unwrap())), wait);
        // Of nothing, nothing is asked.
        let empty = &mut || {
            dev.write(x.view_mut().range(3..3), &[]).unwrap();
            dev.zero(x.view_mut().range(3..3)).unwrap();
            dev.copy(y.view_mut().range(0..0), x.view().range(3..3)).unwrap();
            assert!(dev.read(x.view().range(3..3)).unwrap().is_empty());
            assert!(dev.read_later(x.view().range(3..3)).unwrap().get().unwrap().is_empty());
        };
        assert_eq!(of(empty), none);
        // Poison and redzones of debug builds are not.
        let mut arena = Arena::new(&dev, 1 << 12).unwrap();
        let scope = &mut || drop(arena.scope().alloc::<f32>("x", 100).unwrap());
        assert_eq!(of(scope), none);
        // Clones share the counts; what was counted later is never less.
        let clone = cuda.clone();
        assert_eq!(of(&mut || clone.synchronize().unwrap()), wait);
        assert_eq!(fills - cuda.calls(), none);
    });
}

#[test]
fn zero_sets_all_bytes() {
    sim::check(|sim| {
        for dev in [host(), &device(sim, 2, 64).0] {
            let mut x = Buffer::of(dev, "x", &[1.5f32; 100]).unwrap();
            dev.zero(x.view_mut().range(3..90)).unwrap();
            let want = [vec![1.5; 3], vec![0.0; 87], vec![1.5; 10]].concat();
            assert_eq!(dev.read(x.view()).unwrap(), want);
        }
        let (dev, _) = device(sim, 2, 64);
        let e = refusal(dev.zero((&mut vec![1.0f32; 3]).into()));
        assert_eq!(e, "device `cuda` is not available: a buffer is in host memory");
    });
}

#[test]
fn threads_share_a_device() {
    sim::check(|sim| {
        let (dev, _) = device(sim, 2, 128);
        thread::scope(|s| {
            for t in 0..4 {
                let dev = &dev;
                s.spawn(move || {
                    let mut x = Buffer::<u8>::zeros(dev, "x", 300).unwrap();
                    let laters = (0..20).map(|i| {
                        dev.write(x.view_mut(), &bytes(t * 20 + i, 300)).unwrap();
                        let later = dev.read_later(x.view()).unwrap();
                        if i % 7 == 3 {
                            assert_eq!(dev.read(x.view()).unwrap(), bytes(t * 20 + i, 300));
                        }
                        later
                    });
                    for (i, later) in laters.collect::<Vec<_>>().into_iter().enumerate() {
                        assert_eq!(later.get().unwrap(), bytes(t * 20 + i, 300));
                    }
                });
            }
        });
    });
}

/// A GPU's driver refuses all calls on a thread that has not entered the context of the device, as
/// no thread has that did nothing before, or something with another device; the simulator does as
/// well.
#[test]
fn a_thread_that_did_nothing_before_may_ask_for_anything() {
    sim::check(|sim| {
        let (dev, cuda) = device(sim, 2, 4096);
        let other = sim.device(Order { threads: 1, blocks: 1 });
        let x = Buffer::of(&dev, "x", &[half::bf16::ONE; 64 * 64]).unwrap();
        let tiles = Tiles::of_matrix([64, 64], 64, [64, 64], Swizzle::Bytes128);
        let fresh = |what: &str, call: &(dyn Fn() -> warpo::Result<()> + Sync)| {
            let alone = thread::scope(|scope| scope.spawn(call).join().unwrap());
            alone.unwrap_or_else(|e| panic!("{what}: {e}"));
            other.read(Buffer::<u8>::zeros(&other, "y", 9).unwrap().view()).unwrap();
            call().unwrap_or_else(|e| panic!("{what} after another device: {e}"));
        };
        fresh("map", &|| cuda.map(x.view(), tiles).map(|_| ()));
        fresh("alloc and free", &|| Buffer::<f32>::new(&dev, "y", 9).map(|_| ()));
        fresh("fill", &|| Buffer::<f32>::zeros(&dev, "y", 9).map(|_| ()));
        fresh("write and read", &|| dev.read(Buffer::of(&dev, "y", &[1.0f32])?.view()).map(|_| ()));
        fresh("copy", &|| {
            let mut y = Buffer::<half::bf16>::new(&dev, "y", 64 * 64)?;
            dev.copy(y.view_mut(), x.view())
        });
        fresh("milestone and read", &|| {
            let later = dev.read_later(x.view())?;
            dev.milestone()?;
            later.get().map(|_| ())
        });
        fresh("time", &|| cuda.time(|| Ok(())).map(|_| ()));
        fresh("wait", &|| cuda.synchronize());
        fresh("free memory", &|| dev.free_memory().map(|_| ()));
        fresh("ring", &|| cuda.clone().with_ring(Ring { slots: 1, bytes: 64 }).map(|_| ()));
        fresh("launch", &|| {
            cuda.sums::<1>(Parts::of(0), 0, |_, _, _| Ok(())).and_then(Pending::get).map(|_| ())
        });
    });
}
