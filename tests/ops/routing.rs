//! Top-k routing: hand-worked rows, a naive sort in f64, central differences, bits.

use warpo::{
    Result,
    device::{Buffer, Device, Element, Float},
    ops::{
        matmul,
        routing::{self, Router, Routes},
    },
};

use crate::support::{
    OP, assert_bits, assert_close, devices, gradcheck, inner, randn, refusal, room, room_on,
    sim::{self, Case, Lab},
};

/// What a pass over rows of logits makes, read back.
#[derive(Debug, PartialEq)]
struct Routed<F> {
    chosen: Vec<u32>,
    weights: Vec<F>,
    offsets: Vec<u32>,
    rows: Vec<u32>,
    pairs: Vec<u32>,
    places: Vec<u32>,
}

fn with<F: Float, R>(
    dev: &Device,
    router: Router,
    logits: &[F],
    then: impl FnOnce(&Routes<'_, F>) -> R,
) -> R {
    let mut arena = room(1 << 20);
    let scope = arena.scope();
    let rows = logits.len() / router.experts;
    let mut routes = Routes::new(dev, &scope, router, rows).unwrap();
    routes.logits.host_mut().copy_from_slice(logits);
    routing::forward(dev, &mut routes).unwrap();
    then(&routes)
}

fn route<F: Float>(dev: &Device, router: Router, logits: &[F]) -> Routed<F> {
    with(dev, router, logits, |r| Routed {
        chosen: r.chosen.host().to_vec(),
        weights: r.weights.host().to_vec(),
        offsets: r.offsets.host().to_vec(),
        rows: r.rows.host().to_vec(),
        pairs: r.pairs.host().to_vec(),
        places: r.places.host().to_vec(),
    })
}

fn router(experts: usize, top: usize, renormalised: bool) -> Router {
    Router { experts, top, renormalised }
}

#[test]
fn hand_worked() {
    let dev = Device::cpu();
    let (ln2, ln3) = (2f64.ln(), 3f64.ln());
    // The largest two of each row; of equals the lower expert.
    let logits = [0.0, ln3, ln2, 0.0, 7.0, 7.0, 7.0, 7.0, ln3, 0.0, 0.0, 0.0];
    let r = route(&dev, router(4, 2, true), &logits);
    assert_eq!(r.chosen, [1, 2, 0, 1, 0, 1]);
    assert_close("weights", &r.weights, &[0.6, 0.4, 0.5, 0.5, 0.75, 0.25], 0.0, 1e-15);
    assert_eq!(r.offsets, [0, 2, 5, 6, 6], "expert 3 has none");
    assert_eq!(r.rows, [1, 2, 0, 1, 2, 0]);
    assert_eq!(r.pairs, [2, 4, 0, 3, 5, 1]);
    assert_eq!(r.places, [2, 5, 0, 3, 1, 4]);
    let r = route(&dev, router(4, 2, false), &logits);
    let over_all = [3.0 / 7.0, 2.0 / 7.0, 0.25, 0.25, 0.5, 1.0 / 6.0];
    assert_close("weights over all", &r.weights, &over_all, 0.0, 1e-15);

    // Rows of two by two pairs: 0.6 * 3 + 0.4 * 10 and so on, onto 100 and 200.
    with(&dev, router(4, 2, true), &logits[..8], |routes| {
        // Sorted: expert 0 has row 1, expert 1 rows 0 and 1, expert 2 row 0.
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 20.0];
        let (mut y, onto) = ([1.0; 4], [100.0, 200.0, 300.0, 400.0]);
        let to = (&mut y[..]).into();
        routing::combine(&dev, routes, to, x[..].into(), Some(onto[..].into()), true).unwrap();
        assert_close("y", &y, &[105.8, 210.4, 303.0, 404.0], 0.0, 1e-15);
        let to = (&mut y[..]).into();
        routing::combine(&dev, routes, to, x[..].into(), None, false).unwrap();
        assert_close("added", &y, &[118.8, 234.4, 309.0, 412.0], 0.0, 1e-15);
    });

    // Two rows of two experts, both at the first: 2 (1 p_0 + 0 p_1), p_0 = 3 / 4 and 2 / 3.
    with(&dev, router(2, 1, true), &[ln3, 0.0, ln2, 0.0], |routes| {
        let mut column = [0.0; 2];
        routing::balance(&dev, routes, (&mut column[..]).into()).unwrap();
        assert_close("balance", &column, &[1.5, 4.0 / 3.0], 0.0, 1e-15);
        // d (2 p_0) = 2 p_0 p_1; the one weight is 1 whatever the logits are.
        let mut d = [9.0; 4];
        let to = (&mut d[..]).into();
        routing::backward(&dev, routes, to, [5.0, 7.0][..].into(), 1.0).unwrap();
        let want = [0.375, -0.375, 4.0 / 9.0, -4.0 / 9.0];
        assert_close("of balance", &d, &want, 1e-15, 1e-15);
    });
}

const SHAPES: [(usize, usize, usize); 8] = [
    (1, 1, 1),
    (3, 2, 1),
    (7, 5, 5),
    (40, 8, 2),
    (300, 6, 2),
    (5, 128, 8),
    (65, 33, 32),
    (0, 4, 2),
];

/// Sorts all, and finds places by looking.
#[test]
fn routes_are_those_of_a_plain_sort() {
    for (rows, experts, top) in SHAPES {
        // A step of 1 / 4 makes many equals.
        let coarse = |x: f64| (4.0 * x).round() / 4.0;
        let logits: Vec<f64> =
            randn::<f64>("logits", rows * experts).into_iter().map(coarse).collect();
        for renormalised in [false, true] {
            let mut want = (Vec::new(), Vec::new());
            for z in logits.chunks(experts) {
                let mut order: Vec<usize> = (0..experts).collect();
                // Stable; 0 and -0 are equal.
                order.sort_by(|a, b| z[*b].partial_cmp(&z[*a]).unwrap());
                let own = &order[..top];
                let of: f64 = match renormalised {
                    true => own.iter().map(|e| z[*e].exp()).sum(),
                    false => z.iter().map(|z| z.exp()).sum(),
                };
                want.0.extend(own.iter().map(|e| *e as u32));
                want.1.extend(own.iter().map(|e| z[*e].exp() / of));
            }
            let r = route(&Device::cpu(), router(experts, top, renormalised), &logits);
            assert_eq!(r.chosen, want.0);
            assert_close("weights", &r.weights, &want.1, 0.0, 1e-14);
            let mut pairs: Vec<u32> = (0..(rows * top) as u32).collect();
            pairs.sort_by_key(|p| r.chosen[*p as usize]);
            assert_eq!(r.pairs, pairs, "stable");
            assert_eq!(r.rows, pairs.iter().map(|p| p / top as u32).collect::<Vec<_>>());
            assert!(r.places.iter().enumerate().all(|(p, at)| pairs[*at as usize] == p as u32));
            let before = |e: u32| r.chosen.iter().filter(|c| **c < e).count() as u32;
            assert_eq!(r.offsets, (0..=experts as u32).map(before).collect::<Vec<_>>());
        }
    }
}

/// Of the weights, and of the load-balance loss, whose parts of experts are constants.
#[test]
fn gradients() {
    let dev = Device::cpu();
    for (rows, experts, top) in SHAPES.into_iter().filter(|s| s.0 * s.1 < 700) {
        let logits: Vec<f64> = randn("logits", rows * experts);
        let (cotangent, scale): (Vec<f64>, _) = (randn("dw", rows * top), 0.7);
        for renormalised in [false, true] {
            let router = router(experts, top, renormalised);
            let first = route(&dev, router, &logits);
            let mut sorted = vec![0.0; rows * top];
            first.places.iter().zip(&cotangent).for_each(|(at, d)| sorted[*at as usize] = *d);
            for balance in [0.0, scale] {
                let mut d = vec![f64::NAN; rows * experts];
                with(&dev, router, &logits, |routes| {
                    let dweights = (&sorted).into();
                    routing::backward(&dev, routes, (&mut d).into(), dweights, balance).unwrap();
                });
                let f = |z: &[f64]| {
                    with(&dev, router, z, |routes| {
                        let mut column = vec![0.0; rows];
                        routing::balance(&dev, routes, (&mut column).into()).unwrap();
                        inner(routes.weights.host(), &cotangent)
                            + balance * column.iter().sum::<f64>()
                    })
                };
                gradcheck(&format!("{router:?} {balance}"), &logits, &d, OP, f);
            }
        }
    }
}

/// Where all experts have equal parts the loss is `top`; where all rows crowd, more.
#[test]
fn balance_grows_as_rows_crowd() {
    let dev = Device::cpu();
    let loss = |skew: f64| {
        let mut logits: Vec<f64> = randn("logits", 512 * 8);
        logits.chunks_mut(8).for_each(|z| z[0] += skew);
        with(&dev, router(8, 2, true), &logits, |routes| {
            let mut column = vec![0.0; 512];
            routing::balance(&dev, routes, (&mut column).into()).unwrap();
            column.iter().sum::<f64>() / 512.0
        })
    };
    let (even, skewed, crowded) = (loss(0.0), loss(1.0), loss(9.0));
    assert!((even - 2.0).abs() < 0.02, "{even}");
    assert!(even < skewed && skewed < crowded, "{even} {skewed} {crowded}");
    // Every row at the first, which has almost all probability, and at any other.
    assert!((crowded - 8.0).abs() < 0.1, "{crowded}");
}

#[test]
fn a_nan_shows_in_its_row() {
    let dev = Device::cpu();
    for renormalised in [false, true] {
        let mut logits: Vec<f32> = randn("logits", 9 * 6);
        let clean = route(&dev, router(6, 2, renormalised), &logits);
        logits[4 * 6 + 5] = f32::NAN;
        let r = route(&dev, router(6, 2, renormalised), &logits);
        assert_eq!(r.chosen[8], 5, "it is chosen");
        assert!(r.weights[8..10].iter().all(|w| w.is_nan()));
        assert_bits("before", &r.weights[..8], &clean.weights[..8]);
        assert_bits("after", &r.weights[10..], &clean.weights[10..]);
    }
}

/// Tasks have 64 rows.
#[test]
fn rows_do_not_see_their_batch() {
    let (rows, router) = (150, router(12, 3, false));
    let logits: Vec<f32> = randn("logits", rows * 12);
    let whole = route(&devices()[0], router, &logits);
    for dev in devices() {
        for n in [0, 1, 63, 64, 65, 150] {
            let part = route(&dev, router, &logits[(rows - n) * 12..]);
            assert_eq!(part.chosen, whole.chosen[(rows - n) * 3..]);
            assert_bits("weights", &part.weights, &whole.weights[(rows - n) * 3..]);
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (dev, mut arena) = (Device::cpu(), room(1 << 16));
    let scope = arena.scope();
    let new = |e, t| refusal(Routes::<f32>::new(&dev, &scope, router(e, t, true), 1).map(drop));
    assert_eq!(new(0, 0), "experts: got 0, wanted 1 to 1024");
    assert_eq!(new(1025, 1), "experts: got 1025, wanted 1 to 1024");
    assert_eq!(new(4, 5), "experts of a row: got 5, wanted 1 to 4");
    assert_eq!(new(4, 0), "experts of a row: got 0, wanted 1 to 4");
    let logits = [1.0f32, 0.0, 0.0, 1.0];
    with(&dev, router(2, 1, true), &logits, |routes| {
        let (mut y, x) = ([0.0f32; 4], [0.0f32; 4]);
        let to = (&mut y[..3]).into();
        let e = refusal(routing::combine(&dev, routes, to, x[..].into(), None, true));
        assert_eq!(e, "routing::combine: `y` has shape [3], wanted [2, 1]");
        let to = (&mut y[..]).into();
        let e = refusal(routing::combine(&dev, routes, to, x[..3].into(), None, true));
        assert_eq!(e, "routing::combine: `x` has shape [3], wanted [2, 2]");
        let to = (&mut y[..3]).into();
        let e = refusal(routing::backward(&dev, routes, to, x[..2].into(), 0.0));
        assert_eq!(e, "routing::backward: `dlogits` has shape [3], wanted [2, 2]");
        let to = (&mut y[..1]).into();
        let e = refusal(routing::balance(&dev, routes, to));
        assert_eq!(e, "routing::balance: `column` has shape [1], wanted [2]");
    });
}

/// All of a router's directions.
#[derive(Clone, Copy, Debug)]
struct Routing {
    rows: usize,
    router: Router,
    cols: usize,
    balance: f64,
}

/// Whole numbers as what is compared.
fn numbers<T: Element>(dev: &Device, x: &Buffer<'_, u32>) -> Vec<T> {
    dev.read(x.view()).unwrap().iter().map(|x| T::of(f64::from(*x))).collect()
}

impl Case for Routing {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let Self { rows, router, cols, balance } = *self;
        let (dev, Router { experts, top, .. }) = (lab.dev(), router);
        let mut arena = room_on(dev, 1 << 20);
        let scope = arena.scope();
        let mut routes = Routes::new(dev, &scope, router, rows)?;
        let logits = lab.rows::<T::Acc>("logits", rows, experts);
        dev.copy(routes.logits.view_mut(), logits.view())?;
        routing::forward(dev, &mut routes)?;
        let chosen = Buffer::of(dev, "test", &numbers::<T::Acc>(dev, &routes.chosen))?;
        lab.by_row("chosen", &chosen);
        lab.by_row("weights", &routes.weights);
        for (name, x) in [
            ("offsets", &routes.offsets),
            ("rows", &routes.rows),
            ("pairs", &routes.pairs),
            ("places", &routes.places),
        ] {
            lab.column(name, &numbers::<T::Acc>(dev, x));
        }
        // Of a row's pairs, put where they belong, so that a part of the batch has the same.
        let own = lab.rows::<T>("x", rows, top * cols);
        let mut x = lab.room::<T>(rows * top * cols);
        let mut dweights = lab.room::<T::Acc>(rows * top);
        let own_d = lab.rows::<T::Acc>("dweights", rows, top);
        let (all, d) = (dev.read(own.view())?, dev.read(own_d.view())?);
        let (mut sorted, mut sorted_d) = (all.clone(), d.clone());
        for (pair, at) in dev.read(routes.places.view())?.into_iter().enumerate() {
            let at = at as usize;
            sorted[at * cols..][..cols].copy_from_slice(&all[pair * cols..][..cols]);
            sorted_d[at] = d[pair];
        }
        dev.write(x.view_mut(), &sorted)?;
        dev.write(dweights.view_mut(), &sorted_d)?;
        let onto = lab.rows::<T>("onto", rows, cols);
        let mut y = lab.room::<T>(rows * cols);
        routing::combine(dev, &routes, y.view_mut(), x.view(), Some(onto.view()), true)?;
        lab.by_row("y", &y);
        routing::combine(dev, &routes, y.view_mut(), x.view(), None, false)?;
        lab.by_row("y twice", &y);
        let mut column = lab.room::<T::Acc>(rows);
        routing::balance(dev, &routes, column.view_mut())?;
        // Parts of experts are the batch's.
        lab.sum("balance", &column);
        let stride = matmul::width(dev, experts);
        let mut dlogits = lab.room::<T>(rows * stride);
        routing::backward(dev, &routes, dlogits.view_mut(), dweights.view(), balance)?;
        let d = dev.read(dlogits.view())?;
        assert!(d.chunks(stride).all(|d| d[experts..].iter().all(|x| x.f64() == 0.0)));
        let d: Vec<T> = d.chunks(stride).flat_map(|d| d[..experts].to_vec()).collect();
        let d = Buffer::of(dev, "test", &d)?;
        if balance > 0.0 {
            lab.sum("dlogits", &d)
        } else {
            lab.by_row("dlogits", &d)
        }
        Ok(())
    }
}

/// One row and one expert, shares of pairs with edges, more experts than lanes and than threads,
/// all of them chosen, rows that are no packets.
#[test]
fn kernels_route_as_plain_ones() {
    sim::check(|sim| {
        for (rows, experts, top, cols) in [
            (1, 1, 1, 8),
            (37, 6, 2, 24),
            (128, 8, 2, 8),
            (129, 8, 2, 5),
            (9, 33, 33, 8),
            (70, 128, 8, 16),
            (3, 300, 4, 12),
            (0, 4, 2, 8),
        ] {
            for renormalised in [false, true] {
                let balance = if renormalised { 0.0 } else { 0.01 };
                let router = router(experts, top, renormalised);
                sim.hold(&Routing { rows, router, cols, balance });
            }
        }
    });
}

#[test]
fn kernel_rows_do_not_see_their_batch() {
    sim::check(|sim| {
        for (experts, top) in [(6, 2), (40, 5)] {
            let router = router(experts, top, experts == 6);
            sim.hold_rows(150, |rows| Routing { rows, router, cols: 16, balance: 0.0 });
        }
    });
}

/// A NaN among the logits shows on a device, too; equals are taken in the order of the CPU.
#[test]
fn kernels_choose_as_the_cpu() {
    sim::check(|sim| {
        let dev = sim.device(Default::default());
        let coarse = |x: f32| (2.0 * x).round() / 2.0;
        let mut logits: Vec<f32> = randn::<f32>("z", 64 * 40).into_iter().map(coarse).collect();
        (logits[7], logits[50], logits[90]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let router = router(40, 7, true);
        let cpu = route(&Device::cpu(), router, &logits);
        let mut arena = room_on(&dev, 1 << 20);
        let scope = arena.scope();
        let mut routes = Routes::<f32>::new(&dev, &scope, router, 64).unwrap();
        dev.write(routes.logits.view_mut(), &logits).unwrap();
        routing::forward(&dev, &mut routes).unwrap();
        assert_eq!(dev.read(routes.chosen.view()).unwrap(), cpu.chosen);
        assert_eq!(dev.read(routes.places.view()).unwrap(), cpu.places);
        assert_eq!((cpu.chosen[0], cpu.chosen[7]), (7, 10));
        let weights = dev.read(routes.weights.view()).unwrap();
        assert!(weights[..14].iter().all(|w| w.is_nan()), "infinity less infinity is none");
        assert!(weights[14..].iter().all(|w| w.is_finite()));
    });
}
