//! Linear layers: hand-worked values, central differences, bits that depend on neither batch nor
//! micro-batches. The chain of multiply-adds itself is held by `tests/device/gemm.rs`.

use warpo::{
    Result,
    device::{Arch, Buffer, Device, Element, Float, cuda::Order},
    ops::{
        activation::Activation,
        matmul::{self, Epilogue, Packed, TileShape, launch},
    },
};

use crate::support::{
    OP, assert_bits, assert_earned, assert_nan_only, devices, gather, gradcheck, host, inner,
    randn, refusal, shuffled,
    sim::{self, Case, Lab, Sim, Variant},
    wide,
};

fn packed<F: Float>(dev: &Device, w: &[F], (n, k): (usize, usize)) -> Packed<F> {
    let mut packed = Packed::new(host(), n, k).unwrap();
    packed.pack(dev, w.into()).unwrap();
    packed
}

fn forward<F: Float>(dev: &Device, x: &[F], w: &Packed<F>, bias: Option<&[F]>) -> Vec<F> {
    let mut y = vec![F::of(f64::NAN); x.len() / w.k() * w.n()];
    matmul::forward(dev, (&mut y).into(), x.into(), w, bias.map(Into::into), None).unwrap();
    y
}

#[test]
fn hand_worked() {
    let dev = Device::cpu();
    let (x, w, dy) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.5, -1.0, 2.0, 0.0, 10.0], [1.0, 2.0, 3.0]);
    let p = packed(&dev, &w, (3, 2));
    assert_eq!((p.n(), p.k()), (3, 2));
    assert_eq!(forward(&dev, &x, &p, None), [2.0, 3.0, 20.0, 5.0, 5.0, 40.0]);
    let y = forward(&dev, &x, &p, Some(&[100.0, 200.0, 300.0]));
    assert_eq!(y, [102.0, 203.0, 320.0, 105.0, 205.0, 340.0]);
    let mut dx = [10.0; 2];
    let (dx_, dy_, w_) = ((&mut dx[..]).into(), dy[..].into(), w[..].into());
    matmul::backward_input(&dev, dx_, dy_, w_, (3, 2)).unwrap();
    assert_eq!(dx, [-1.0, 34.5]);
    let (mut dw, mut dbias) = ([10.0; 6], [100.0; 3]);
    for bias in [None, Some((&mut dbias[..]).into())] {
        let (dw, dy, x) = ((&mut dw[..]).into(), dy[..].into(), x[..2].into());
        matmul::backward_weight(&dev, dw, bias, dy, x, (3, 2)).unwrap();
    }
    assert_eq!(dw, [12.0, 14.0, 14.0, 18.0, 16.0, 22.0], "added twice");
    assert_eq!(dbias, [101.0, 102.0, 103.0]);
}

#[test]
fn gradients() {
    let dev = Device::cpu();
    for (m, n, k) in [(1, 1, 1), (3, 7, 5), (5, 33, 2), (13, 67, 3)] {
        let (x, w): (Vec<f64>, Vec<f64>) = (randn("x", m * k), randn("w", n * k));
        let (bias, dy): (Vec<f64>, Vec<f64>) = (randn("b", n), randn("dy", m * n));
        let sizes = (n, k);
        let mut dx = vec![f64::NAN; m * k];
        let (dy_, w_) = ((&dy).into(), (&w).into());
        matmul::backward_input(&dev, (&mut dx).into(), dy_, w_, sizes).unwrap();
        let (mut dw, mut db) = (vec![0.5; n * k], vec![0.5; n]);
        let (dw_, db_) = ((&mut dw).into(), Some((&mut db).into()));
        matmul::backward_weight(&dev, dw_, db_, (&dy).into(), (&x).into(), sizes).unwrap();
        dw.iter_mut().chain(&mut db).for_each(|d| *d -= 0.5);
        let f = |x: &[f64], w: &[f64], b: &[f64]| {
            inner(&forward(&dev, x, &packed(&dev, w, sizes), Some(b)), &dy)
        };
        gradcheck("dx", &x, &dx, OP, |x| f(x, &w, &bias));
        gradcheck("dw", &w, &dw, OP, |w| f(&x, w, &bias));
        gradcheck("dbias", &bias, &db, OP, |b| f(&x, &w, b));
    }
}

#[test]
fn f32_is_as_exact_as_a_plain_sum() {
    let (dev, m, n, k) = (Device::cpu(), 7, 40, 500);
    let (x, w): (Vec<f32>, Vec<f32>) = (randn("x", m * k), randn("w", n * k));
    let bias: Vec<f32> = randn("b", n);
    let at = |r: usize, c: usize| x[r * k..][..k].iter().zip(&w[c * k..][..k]);
    let cells = || (0..m).flat_map(|r| (0..n).map(move |c| (r, c)));
    let plain = cells().map(|(r, c)| at(r, c).map(|(x, w)| x * w).sum::<f32>() + bias[c]);
    let truth = forward(&dev, &wide(&x), &packed(&dev, &wide(&w), (n, k)), Some(&wide(&bias)));
    let exact = |(r, c)| at(r, c).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
    let definition: Vec<f64> = cells().map(|(r, c)| exact((r, c)) + f64::from(bias[c])).collect();
    crate::support::assert_close("f64", &truth, &definition, 1e-12, 1e-12);
    let y = forward(&dev, &x, &packed(&dev, &w, (n, k)), Some(&bias));
    assert_earned("y", &y, &plain.collect::<Vec<_>>(), &truth);
}

/// Panels have 32 columns, tiles up to 12 rows, tasks of dbias 64 columns.
#[test]
fn rows_do_not_see_their_batch() {
    let m = 61;
    for (n, k) in [(1, 5), (31, 8), (32, 17), (33, 40), (97, 300)] {
        let (x, w): (Vec<f32>, Vec<f32>) = (randn("x", m * k), randn("w", n * k));
        let (bias, dy): (Vec<f32>, Vec<f32>) = (randn("b", n), randn("dy", m * n));
        let one = &devices()[0];
        let alone =
            |r: usize| forward(one, &x[r * k..][..k], &packed(one, &w, (n, k)), Some(&bias));
        let y: Vec<f32> = (0..m).flat_map(alone).collect();
        let chain = |i: usize| {
            let (r, c) = (i / k, i % k);
            (0..n).fold(0.0, |s, j| dy[r * n + j].mul_add(w[j * k + c], s))
        };
        let dx: Vec<f32> = (0..m * k).map(chain).collect();
        let order = shuffled("order", m);
        for dev in devices() {
            let p = packed(&dev, &w, (n, k));
            for rows in [0, 1, 11, 12, 13, 31, m] {
                let (at, what) = (m - rows, format!("{n}x{k} {rows} {dev:?}"));
                assert_bits(&what, &forward(&dev, &x[at * k..], &p, Some(&bias)), &y[at * n..]);
                let mut got = vec![f32::NAN; rows * k];
                let (dy, w) = (dy[at * n..].into(), (&w).into());
                matmul::backward_input(&dev, (&mut got).into(), dy, w, (n, k)).unwrap();
                assert_bits(&what, &got, &dx[at * k..]);
            }
            let got = forward(&dev, &gather(&x, k, &order), &p, Some(&bias));
            assert_bits("permuted", &got, &gather(&y, n, &order));
        }
    }
}

#[test]
fn weight_gradients_do_not_see_micro_batches() {
    let (m, n, k) = (61, 97, 35);
    let (x, dy): (Vec<f32>, Vec<f32>) = (randn("x", m * k), randn("dy", m * n));
    let (dw, dbias): (Vec<f32>, Vec<f32>) = (randn("dw", n * k), randn("db", n));
    let chain = |i: usize| {
        let (j, c) = (i / k, i % k);
        (0..m).fold(dw[i], |s, r| dy[r * n + j].mul_add(x[r * k + c], s))
    };
    let want: Vec<f32> = (0..n * k).map(chain).collect();
    let want_bias: Vec<f32> =
        (0..n).map(|j| (0..m).fold(dbias[j], |s, r| s + dy[r * n + j])).collect();
    for dev in devices() {
        for cuts in [vec![0, m], vec![0, 1, m], vec![0, 0, 12, 13, 60, m]] {
            let (mut sum, mut sum_bias) = (dw.clone(), dbias.clone());
            for part in cuts.windows(2) {
                let dy = dy[part[0] * n..part[1] * n].into();
                let x = x[part[0] * k..part[1] * k].into();
                let (sum, bias) = ((&mut sum).into(), Some((&mut sum_bias).into()));
                matmul::backward_weight(&dev, sum, bias, dy, x, (n, k)).unwrap();
            }
            assert_bits(&format!("dw {cuts:?} {dev:?}"), &sum, &want);
            assert_bits(&format!("dbias {cuts:?} {dev:?}"), &sum_bias, &want_bias);
        }
    }
}

#[test]
fn a_nan_stays_in_its_row() {
    let dev = Device::cpu();
    let (mut x, w): (Vec<f32>, Vec<f32>) = (randn("x", 15 * 9), randn("w", 40 * 9));
    let p = packed(&dev, &w, (40, 9));
    let clean = forward(&dev, &x, &p, None);
    x[7 * 9 + 8] = f32::NAN;
    assert_nan_only("y", &forward(&dev, &x, &p, None), &clean, 280..320);
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, x) = (Device::cpu(), vec![1.0f32; 12]);
    let (mut out, mut dbias) = (vec![0.0f32; 12], vec![0.0; 4]);
    let mut p = Packed::new(host(), 3, 2).unwrap();
    let e = p.pack(&dev, x[..5].into());
    assert_eq!(refusal(e), "matmul::pack: `w` has shape [5], wanted [3, 2]");
    p.pack(&dev, x[..6].into()).unwrap();
    let mut refused = |y: usize, x_: usize, bias: usize| {
        let (y, bias) = ((&mut out[..y]).into(), Some(x[..bias].into()));
        refusal(matmul::forward(&dev, y, x[..x_].into(), &p, bias, None))
    };
    assert_eq!(refused(6, 5, 3), "matmul: `x` has shape [5], wanted [2, 2]");
    assert_eq!(refused(5, 4, 3), "matmul: `y` has shape [5], wanted [2, 3]");
    assert_eq!(refused(6, 4, 2), "matmul: `bias` has shape [2], wanted [3]");
    let mut refused = |dx: usize, dy: usize, w: usize| {
        let (dx, dy, w) = ((&mut out[..dx]).into(), x[..dy].into(), x[..w].into());
        refusal(matmul::backward_input(&dev, dx, dy, w, (3, 2)))
    };
    let what = "matmul::backward_input";
    assert_eq!(refused(4, 5, 6), format!("{what}: `dy` has shape [5], wanted [1, 3]"));
    assert_eq!(refused(4, 6, 5), format!("{what}: `w` has shape [5], wanted [3, 2]"));
    assert_eq!(refused(5, 6, 6), format!("{what}: `dx` has shape [5], wanted [2, 2]"));
    let mut refused = |dw: usize, bias: usize, dy: usize, x_: usize| {
        let (dw, bias) = ((&mut out[..dw]).into(), Some((&mut dbias[..bias]).into()));
        refusal(matmul::backward_weight(&dev, dw, bias, x[..dy].into(), x[..x_].into(), (3, 2)))
    };
    let what = "matmul::backward_weight";
    assert_eq!(refused(6, 3, 5, 4), format!("{what}: `dy` has shape [5], wanted [1, 3]"));
    assert_eq!(refused(6, 3, 6, 5), format!("{what}: `x` has shape [5], wanted [2, 2]"));
    assert_eq!(refused(5, 3, 6, 4), format!("{what}: `dw` has shape [5], wanted [3, 2]"));
    assert_eq!(refused(6, 4, 6, 4), format!("{what}: `dbias` has shape [4], wanted [3]"));
    assert_eq!((out, dbias), (vec![0.0; 12], vec![0.0; 4]), "nothing was written");
}

/// A linear layer at one shape, forward and backward.
#[derive(Clone, Copy)]
struct Layer {
    m: usize,
    n: usize,
    k: usize,
    /// With bias and residual.
    full: bool,
}

impl Case for Layer {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let Self { m, n, k, full } = *self;
        let dev = lab.dev();
        let (x, w) = (lab.rows::<T>("x", m, k), lab.input::<T>("w", n * k));
        let (bias, r) = (lab.input::<T>("bias", n), lab.rows::<T>("r", m, n));
        let mut packed = Packed::new(dev, n, k)?;
        packed.pack(dev, w.view())?;
        let mut y = lab.room::<T>(m * n);
        let (b, r) = (full.then(|| bias.view()), full.then(|| r.view()));
        matmul::forward(dev, y.view_mut(), x.view(), &packed, b, r)?;
        lab.by_row("y", &y);
        let dy = lab.rows::<T>("dy", m, n);
        let mut dx = lab.room::<T>(m * k);
        matmul::backward_input(dev, dx.view_mut(), dy.view(), w.view(), (n, k))?;
        lab.by_row("dx", &dx);
        let mut dw = lab.input::<T::Acc>("dw", n * k);
        let mut db = lab.input::<T::Acc>("db", n);
        let bias = full.then(|| db.view_mut());
        matmul::backward_weight(dev, dw.view_mut(), bias, dy.view(), x.view(), (n, k))?;
        lab.sum_of_chain("dw", &dw, m);
        lab.sum_of_chain("db", &db, m);
        Ok(())
    }
}

/// A product and its activation.
#[derive(Clone, Copy)]
struct Activated {
    m: usize,
    cols: usize,
    k: usize,
    epilogue: Epilogue,
}

impl Case for Activated {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let Self { m, cols, k, epilogue } = *self;
        let (dev, n) = (lab.dev(), if epilogue.gated { 2 * cols } else { cols });
        let (x, w) = (lab.rows::<T>("x", m, k), lab.input::<T>("w", n * k));
        let bias = lab.input::<T>("bias", n);
        let mut packed = Packed::new(dev, n, k)?;
        packed.pack(dev, w.view())?;
        let (mut y, mut up) = (lab.room::<T>(m * cols), lab.room::<T>(m * n));
        let (y_, up_) = (y.view_mut(), up.view_mut());
        matmul::activated(dev, epilogue, [y_, up_], x.view(), &packed, Some(bias.view()))?;
        lab.by_row("y", &y);
        lab.by_row("up", &up);
        Ok(())
    }
}

/// As a GPU of sm_80, and as one of Hopper, which has kernels of its own.
fn both(sim: &Sim, test: impl Fn(&Sim)) {
    test(sim);
    if sim.variant != Variant::Gpu {
        test(&sim.hopper());
    }
}

/// Each tile, whole and with edges that no fragment divides; stages of 32, 64 and 128 k.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        both(sim, |sim| {
            let layer = |m, n, k, full| Layer { m, n, k, full };
            sim.hold_bf16(&layer(0, 8, 8, true));
            sim.hold_bf16(&layer(1, 8, 8, true));
            sim.hold_bf16(&layer(16, 40, 264, false));
            sim.hold_bf16(&layer(17, 72, 136, true));
            sim.hold_bf16(&layer(65, 64, 72, true));
            sim.hold_bf16(&layer(131, 264, 72, true));
            sim.hold_bf16(&layer(200, 8, 136, false));
        });
    });
}

/// Sums over many rows, whose losses all go toward zero.
#[test]
fn kernels_of_long_sums_are_as_exact_as_their_chains() {
    sim::check(|sim| both(sim, |sim| sim.hold_bf16(&Layer { m: 2048, n: 16, k: 24, full: true })));
}

#[test]
fn kernels_activate_as_exactly_as_plain_ones() {
    use Activation as A;
    let all = [A::GeluTanh, A::Gelu, A::Silu, A::Relu, A::QuickGelu];
    sim::check(|sim| {
        both(sim, |sim| {
            for (i, act) in all.into_iter().enumerate() {
                for gated in [false, true] {
                    // Every tile gets every activation, in turn with and without a gate.
                    let at = (i + usize::from(gated)) % 4;
                    let (m, cols) = [(3, 24), (33, 40), (66, 40), (129, 136)][at];
                    let epilogue = Epilogue { act, gated };
                    sim.hold_bf16(&Activated { m, cols, k: 72, epilogue });
                }
            }
        });
    });
}

/// 300 rows take the widest tiles, the last 150 the next, the last one the narrowest.
#[test]
fn kernel_rows_do_not_see_their_batch() {
    sim::check(|sim| {
        both(sim, |sim| {
            sim.hold_rows_bf16(300, |m| Layer { m, n: 72, k: 40, full: true });
            sim.hold_rows_bf16(90, |m| Layer { m, n: 40, k: 24, full: false });
            let epilogue = Epilogue { act: Activation::Silu, gated: true };
            sim.hold_rows_bf16(140, |m| Activated { m, cols: 72, k: 40, epilogue });
        });
    });
}

/// The same rows in all tiles, some with more of them than multiprocessors, some with edges: to the
/// bit. What the table takes on this GPU plays no part.
#[test]
fn kernels_of_all_tiles_have_the_same_bits() {
    sim::check(|sim| {
        both(sim, |sim| {
            let dev = sim.device(Order::default());
            let Device::Cuda(cuda) = &dev else { panic!("{dev:?}") };
            let mut shapes = vec![(21, 80, 136), (385, 272, 40)];
            if sim.variant == Variant::Gpu {
                // Long chains, which no simulator has the time for: that the wgmma of all widths
                // add in one order is nowhere promised.
                for k in [3584, 18_944] {
                    shapes.extend([1, 64, 128, 300].map(|m| (m, 272, k)));
                }
            }
            for (m, n, k) in shapes {
                let of = |name, n| {
                    let x: Vec<half::bf16> =
                        randn(name, n).iter().map(|x| Element::of(*x)).collect();
                    Buffer::of(&dev, "test", &x).unwrap()
                };
                let (x, w, r) = (of("x", m * k), of("w", n * k), of("r", m * n));
                let (bias, dy) = (of("bias", n), of("dy", m * n));
                let mut packed = Packed::new(&dev, n, k).unwrap();
                packed.pack(&dev, w.view()).unwrap();
                let mut first: Option<Vec<Vec<u8>>> = None;
                for tile in TileShape::all(cuda.arch()) {
                    let mut y = Buffer::new(&dev, "y", m * n).unwrap();
                    let (bias, residual) = (Some(bias.view()), Some(r.view()));
                    let (x, w, y_) = (x.view(), w.view(), y.view_mut());
                    let product = launch::Forward { y: y_, x, w, bias, residual, m, n, k };
                    launch::forward(cuda, tile, product).unwrap();
                    let mut all = vec![bytes(&dev, &y)];
                    for gated in [false, true] {
                        let cols = if gated { n / 2 } else { n };
                        let mut up = Buffer::new(&dev, "up", m * n).unwrap();
                        let mut y = Buffer::new(&dev, "y", m * cols).unwrap();
                        let act = Activation::GeluTanh as usize;
                        let product = launch::Activated {
                            y: y.view_mut(),
                            up: up.view_mut(),
                            x,
                            w,
                            bias,
                            m,
                            n: cols,
                            k,
                            act,
                        };
                        launch::activated(cuda, tile, gated, product).unwrap();
                        all.extend([bytes(&dev, &up), bytes(&dev, &y)]);
                    }
                    let first = first.get_or_insert_with(|| all.clone());
                    assert!(all == *first, "{:?} of {m} x {n} x {k}", tile.size);
                }
                let mut first: Option<Vec<Vec<u8>>> = None;
                for tile in &TileShape::all(cuda.arch())[..2] {
                    let mut dx = Buffer::<half::bf16>::new(&dev, "dx", m * k).unwrap();
                    let (x, w, dy) = (x.view(), w.view(), dy.view());
                    let product = launch::BackwardInput { dx: dx.view_mut(), dy, w, m, n, k };
                    launch::backward_input(cuda, tile, product).unwrap();
                    let mut dw = Buffer::<f32>::zeros(&dev, "dw", n * k).unwrap();
                    let mut db = Buffer::<f32>::zeros(&dev, "db", n).unwrap();
                    let (dw_, dbias) = (dw.view_mut(), Some(db.view_mut()));
                    let product = launch::BackwardWeight { dw: dw_, dbias, dy, x, m, n, k };
                    launch::backward_weight(cuda, tile, product).unwrap();
                    let all = vec![bytes(&dev, &dx), bytes(&dev, &dw), bytes(&dev, &db)];
                    let first = first.get_or_insert_with(|| all.clone());
                    assert!(all == *first, "gradients by {:?} of {m} x {n} x {k}", tile.size);
                }
            }
        });
    });
}

fn bytes<T: Element>(dev: &Device, x: &Buffer<'_, T>) -> Vec<u8> {
    bytemuck::cast_slice(&dev.read(x.view()).unwrap()).to_vec()
}

/// Prints with `--nocapture` what counting predicts for an H200: the best tile, its speed, and what
/// the next one loses.
#[test]
fn the_table_ranks_tiles_for_every_shape() {
    println!("{:>8} {:>7} {:>6} {:>10} {:>8} {:>9}", "m", "n", "k", "tile", "TFLOP/s", "next");
    for (m, n, k, sm80, sm90) in [
        (1, 896, 896, [16, 32], [64, 32]),
        (16, 3584, 3584, [16, 32], [64, 64]),
        (64, 3584, 18_944, [64, 32], [64, 64]),
        (128, 3584, 3584, [64, 64], [64, 64]),
        (2048, 896, 4864, [128, 128], [128, 128]),
        (4096, 896, 896, [128, 128], [128, 256]),
        (4096, 4096, 4096, [128, 128], [128, 256]),
        (8192, 8192, 8192, [128, 128], [128, 256]),
        (16_384, 9728, 896, [128, 128], [128, 256]),
        (16_384, 37_888, 3584, [128, 128], [128, 256]),
        (1_000_000, 152_064, 3584, [128, 128], [128, 256]),
    ] {
        assert_eq!(TileShape::ranked(Arch::Sm80, 108, m, n)[0].size, sm80, "{m} x {n}");
        let [first, next, ..] = TileShape::ranked(Arch::Sm90, 132, m, n);
        assert_eq!(first.size, sm90, "{m} x {n}");
        let clocks = |tile: &TileShape| tile.clocks(Arch::Sm90, 132, [m, n, k]) as f64;
        // At 1.755 GHz.
        let rate = 2e-12 * (m * n * k) as f64 / (clocks(first) / 1.755e9);
        let loss = format!("{:?} {:.2}x", next.size, clocks(next) / clocks(first));
        println!("{m:8} {n:7} {k:6} {:>10} {rate:8.0} {loss:>12}", format!("{:?}", first.size));
    }
}

#[test]
fn kernels_refuse_what_they_cannot_take() {
    sim::check(|sim| {
        let dev = sim.device(Order::default());
        let e = refusal(Packed::<half::bf16>::new(&dev, 8, 9));
        assert_eq!(e, "matmul: sides of a weight on a CUDA device: got 9, wanted multiples of 8");
        both(sim, |sim| {
            let dev = sim.device(Order::default());
            let x = Buffer::<f32>::zeros(&dev, "x", 64).unwrap();
            let w = Packed::<f32>::new(&dev, 8, 8).unwrap();
            let mut y = Buffer::<f32>::zeros(&dev, "y", 64).unwrap();
            let e = refusal(matmul::forward(&dev, y.view_mut(), x.view(), &w, None, None));
            assert!(e.ends_with("has no kernel for F32"), "{e}");
        });
    });
}
