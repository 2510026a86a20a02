//! Gradient norm, clipping and the search for bad numbers.

use warpo::{
    device::{Buffer, Device, Float, View},
    ops::grad_norm::{self, clip_scale},
};

use crate::support::{assert_bits, assert_close, devices, host, randn, sim, wide};

/// Elements of a block, and of the group of blocks that is added up at once.
const BLOCK: usize = 4096;
const GROUP: usize = 256 * BLOCK;

fn norm<F: Float>(dev: &Device, x: View<'_, F>) -> f64 {
    grad_norm::norm(dev, x).unwrap().get().unwrap()
}

fn first_bad<F: Float>(dev: &Device, x: View<'_, F>) -> Option<usize> {
    grad_norm::first_bad(dev, x).unwrap().get().unwrap()
}

#[test]
fn hand_worked() {
    let dev = Device::cpu();
    assert_eq!(norm(&dev, [3.0, -4.0][..].into()), 5.0);
    assert_eq!(norm::<f32>(&dev, [][..].into()), 0.0);
    // as many blocks as there are, none forgotten, none twice: sqrt(n / 4)
    for n in [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP + 3]
    {
        let x = vec![0.5f32; n];
        assert_close(
            &format!("{n}"),
            &[norm(&dev, (&x).into())],
            &[(n as f64 / 4.0).sqrt()],
            0.0,
            1e-7,
        );
    }
    assert_close("clipped", &[clip_scale(4.0, 1.0)], &[1.0 / 4.000_001], 0.0, 1e-15);
    assert_eq!(clip_scale(0.5, 1.0), 1.0);
    assert_eq!(clip_scale(1.0, 1.0), 1.0 / 1.000_001); // as PyTorch
    assert_eq!(clip_scale(0.0, 1.0), 1.0);
    assert_eq!(clip_scale(1e9, 0.0), 1.0, "0 is off");
}

#[test]
fn is_the_norm() {
    for n in [1, 31, 5000, 100_003] {
        let x: Vec<f32> = randn("x", n);
        let truth = wide(&x).iter().map(|x| x * x).sum::<f64>().sqrt();
        let got = norm(&Device::cpu(), (&x).into());
        // Sums of 256 positive numbers in f32, each rounding at most 6e-8, half of that in a root.
        assert_close(&format!("{n} f32"), &[got], &[truth], 0.0, 256.0 * 6e-8);
        let got = norm(&Device::cpu(), (&wide(&x)).into());
        assert_close(&format!("{n} f64"), &[got], &[truth], 0.0, 1e-13);
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let all: Vec<f32> = randn("x", GROUP + 5003);
    for n in [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7, GROUP + 5003] {
        let want = norm(&devices()[0], all[..n].into());
        for dev in devices() {
            assert_bits(&format!("{n} {dev:?}"), &[norm(&dev, all[..n].into())], &[want]);
        }
    }
}

#[test]
fn the_first_bad_number_is_found_anywhere() {
    let n = 2 * BLOCK + 19;
    let mut x: Vec<f32> = randn("x", n);
    x[5] = f32::MAX;
    x[6] = -f32::MIN_POSITIVE / 8.0;
    let dev = Device::cpu();
    assert_eq!(first_bad(&dev, (&x).into()), None);
    assert_eq!(first_bad::<f32>(&dev, [][..].into()), None);
    for i in 0..n {
        let good = x[i];
        x[i] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i % 3];
        assert_eq!(first_bad(&dev, (&x).into()), Some(i));
        assert!(!norm(&dev, (&x).into()).is_finite(), "{i}");
        x[i] = good;
    }
    for dev in devices() {
        for i in [0, 15, 16, BLOCK - 1, BLOCK, n - 1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = x.clone();
                x[n - 1] = f32::NAN; // a later one does not matter
                x[i] = bad;
                assert_eq!(first_bad(&dev, (&x).into()), Some(i), "{bad} {dev:?}");
            }
        }
    }
}

#[test]
fn a_bad_norm_is_not_hidden_by_clipping() {
    assert!(clip_scale(f64::NAN, 1.0).is_nan());
    assert_eq!(clip_scale(f64::INFINITY, 1.0), 0.0);
}

/// No elements, one, those around a packet, a chunk, the chunks that a block adds together, a
/// group.
#[test]
fn the_kernels_have_the_bits_of_the_cpu() {
    let all: Vec<f32> = randn("x", GROUP + 5003);
    sim::check(|sim| {
        for n in [0, 1, 3, 4, 67, BLOCK - 1, BLOCK, BLOCK + 1, 129 * BLOCK + 6] {
            for order in sim.orders() {
                let dev = sim.device(order);
                let x = Buffer::of(&dev, "x", &all[..n]).unwrap();
                let want = norm(host(), all[..n].into());
                assert_bits(&format!("{n} {order:?}"), &[norm(&dev, x.view())], &[want]);
                assert_eq!(first_bad(&dev, x.view()), None);
            }
        }
        // Two groups are two blocks, whose sums are added in order.
        let dev = sim.device(sim.orders()[1]);
        let x = Buffer::of(&dev, "x", &all).unwrap();
        assert_bits("two groups", &[norm(&dev, x.view())], &[norm(host(), (&all).into())]);
    });
}

#[test]
fn the_kernel_finds_the_first_bad_number_anywhere() {
    let n = 9 * BLOCK + 19;
    let clean: Vec<f32> = randn("x", n);
    sim::check(|sim| {
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let orders = sim.orders().into_iter().cycle();
        for (i, order) in [0, 15, 16, BLOCK - 1, BLOCK, 9 * BLOCK, n - 1].iter().zip(orders) {
            let (dev, mut x) = (sim.device(order), clean.clone());
            x[n - 1] = f32::NAN; // a later one does not matter
            x[n - 3000] = f32::NAN;
            x[*i] = bad[i % 3];
            let x = Buffer::of(&dev, "x", &x).unwrap();
            assert_eq!(first_bad(&dev, x.view()), Some((*i).min(n - 3000)), "{order:?}");
            assert!(!norm(&dev, x.view()).is_finite());
        }
    });
}
