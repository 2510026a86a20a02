//! cuBLASLt: how products are told to it, and, on a GPU that has the library, what it answers.

use half::bf16;
use warpo::{
    device::{
        Buffer, Device,
        cuda::{
            Order,
            cublaslt::{Matrix, Of, Product},
        },
    },
    ops::matmul::{self, Packed},
    rng::{Philox, Purpose},
};

use crate::support::{
    refusal,
    sim::{Sim, Variant},
};

const ALL: [Of; 3] = [Of::Forward, Of::BackwardInput, Of::BackwardWeight];

/// Whole numbers from -4 to 4: their sums of products are exact in any order.
fn numbers(stream: u64, n: usize) -> Vec<f32> {
    let draw = Philox::new(5, stream, 0, Purpose::Init);
    (0..n).map(|i| draw.below(i as u32, 9) as f32 - 4.0).collect()
}

/// The operands of a product, in the order of its formula, and the product, by rows.
fn product(p: &Product) -> [Vec<f32>; 3] {
    let Product { of, m, n, k } = *p;
    let (x, w, dy) = (numbers(1, m * k), numbers(2, n * k), numbers(3, m * n));
    let sum = |count: usize, f: &dyn Fn(usize) -> f32| (0..count).map(f).sum::<f32>();
    let each = |rows: usize, cols: usize, f: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
        (0..rows * cols).map(|i| f(i / cols, i % cols)).collect()
    };
    match of {
        Of::Forward => {
            let y = each(m, n, &|i, j| sum(k, &|l| x[i * k + l] * w[j * k + l]));
            [x, w, y]
        }
        Of::BackwardInput => {
            let dx = each(m, k, &|i, j| sum(n, &|l| dy[i * n + l] * w[l * k + j]));
            [dy, w, dx]
        }
        Of::BackwardWeight => {
            let dw = each(n, k, &|i, j| sum(m, &|l| dy[l * n + i] * x[l * k + j]));
            [dy, x, dw]
        }
    }
}

#[test]
fn a_product_by_columns_is_the_product_by_rows() {
    for of in ALL {
        let p = Product { of, m: 5, n: 3, k: 7 };
        let [left, right, want] = product(&p);
        let [a, b, d] = p.by_columns();
        // op(X)[i, j] of a matrix that lies by columns.
        let at = |x: &[f32], m: Matrix, i: usize, j: usize| match m.transposed {
            true => x[i * m.rows + j],
            false => x[j * m.rows + i],
        };
        let inner = if a.transposed { a.rows } else { a.cols };
        let mut out = vec![f32::NAN; d.rows * d.cols];
        for (i, j) in (0..d.rows).flat_map(|i| (0..d.cols).map(move |j| (i, j))) {
            out[j * d.rows + i] =
                (0..inner).map(|l| at(&right, a, i, l) * at(&left, b, l, j)).sum();
        }
        assert_eq!(out, want, "{of:?}");
    }
}

#[test]
fn without_a_gpu_or_the_library_cublaslt_is_refused() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let Device::Cuda(cuda) = sim.device(Order::default()) else { panic!("no CUDA device") };
    let e = refusal(cuda.cublaslt());
    let reasons = [
        "libcublasLt.so.13 was not found: cuBLASLt is not installed",
        "NVIDIA's libraries need a GPU",
    ];
    let start = "device `cuda` is not available: ";
    assert!(reasons.iter().any(|r| e == format!("{start}{r}")), "{e}");
    assert!(cuda.provider().is_none());
    assert_eq!(refusal(cuda.with_cublaslt()), e);
}

/// On a GPU that has the library.
#[test]
fn the_kernels_of_cublaslt_compute_products_and_one_is_pinned() {
    let Some(gpu) = Sim::of_gpu() else { return };
    let dev = gpu.device(Order::default());
    let Device::Cuda(cuda) = &dev else { panic!("{dev:?}") };
    let lt = match cuda.cublaslt() {
        Ok(lt) => lt,
        Err(e) => return println!("{e}"),
    };
    println!("cuBLASLt {}", lt.version());
    for of in ALL {
        let p = Product { of, m: 192, n: 136, k: 328 };
        let [left, right, want] = product(&p);
        let half = |x: &[f32]| {
            let x: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
            Buffer::of(&dev, "test", &x).unwrap()
        };
        let (left, right) = (half(&left), half(&right));
        let operands = (left.view(), right.view());
        let algorithms = lt.algorithms(&p).unwrap();
        assert!(!algorithms.is_empty(), "{of:?}");
        for algorithm in &algorithms {
            let (out, want) = if of == Of::BackwardWeight {
                let mut out = Buffer::of(&dev, "dw", &vec![1.0f32; want.len()]).unwrap();
                lt.product(&p, algorithm, out.view_mut(), operands, true).unwrap();
                let want: Vec<f32> = want.iter().map(|x| x + 1.0).collect();
                (dev.read(out.view()).unwrap(), want)
            } else {
                let mut out = Buffer::<bf16>::new(&dev, "y", want.len()).unwrap();
                lt.product(&p, algorithm, out.view_mut(), operands, false).unwrap();
                let out = dev.read(out.view()).unwrap();
                let want = want.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
                (out.into_iter().map(bf16::to_f32).collect(), want)
            };
            assert!(out == want, "{of:?}, {algorithm}");
        }
        for (n, k) in [(1536, 896), (896, 4864)] {
            let pinned = lt.pinned(of, n, k).unwrap();
            assert!(pinned.is_none_or(|algorithm| algorithm.whole()));
            println!("{of:?} of {n} x {k}: {}", pinned.map_or("none".into(), |a| a.to_string()));
        }
    }
    // Ops that may use it: rows that do not see their batch.
    let fast = Device::Cuda(cuda.clone().with_cublaslt().unwrap());
    let (m, n, k) = (129, 1536, 896);
    let random = |stream, n| {
        let draw = Philox::new(5, stream, 0, Purpose::Init);
        let x: Vec<bf16> = (0..n).map(|i| bf16::from_f64(draw.normal(i as u32))).collect();
        Buffer::of(&fast, "test", &x).unwrap()
    };
    let (x, mut w) = (random(1, m * k), Packed::new(&fast, n, k).unwrap());
    w.pack(&fast, random(2, n * k).view()).unwrap();
    let rows = |m: usize| {
        let mut y = Buffer::<bf16>::new(&fast, "y", m * n).unwrap();
        let x = x.view().range(0..m * k);
        matmul::forward(&fast, y.view_mut(), x, &w, None, None).unwrap();
        fast.read(y.view()).unwrap()
    };
    let all = rows(m);
    for m in [1, 64, 128] {
        assert!(all.starts_with(&rows(m)), "{m} rows");
    }
}
