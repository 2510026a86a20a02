//! The micro-kernels against the definition: one chain of fused multiply-adds per output.

use warpo::device::{
    Cpu, Float,
    cpu::{
        Isa,
        gemm::{self, Lhs, Product, Rhs},
    },
};

use crate::support::{assert_bits, devices, randn};

fn chain<F: Float>(
    c: &[F],
    (m, n, k): (usize, usize, usize),
    a: impl Fn(usize, usize) -> F,
    b: impl Fn(usize, usize) -> F,
    add: bool,
) -> Vec<F> {
    let mut out = c.to_vec();
    for i in 0..m {
        for j in 0..n {
            let start = if add { c[i * n + j] } else { F::ZERO };
            out[i * n + j] = (0..k).fold(start, |s, k| a(i, k).mul_add(b(k, j), s));
        }
    }
    out
}

fn all_forms<F: Float>(sizes: &[(usize, usize, usize)]) {
    for &(m, n, k) in sizes {
        let x: Vec<F> = randn("x", m * k);
        let w: Vec<F> = randn("w", n * k);
        let c0: Vec<F> = randn("c", m * n);
        for (add, at) in [(false, false), (false, true), (true, false), (true, true)] {
            let a = |i: usize, p: usize| if at { x[p * m + i] } else { x[i * k + p] };
            let lhs = if at { Lhs::columns(&x, m) } else { Lhs::rows(&x, k) };
            let nt = chain(&c0, (m, n, k), a, |p, j| w[j * k + p], add);
            let nn = chain(&c0, (m, n, k), a, |p, j| w[p * n + j], add);
            for dev in devices() {
                let cpu = dev.on_cpu("gemm").unwrap();
                let mut panels = vec![F::ZERO; gemm::packed_len(k, n)];
                gemm::pack(cpu, &mut panels, &w, n, k);
                for (name, rhs, want) in [
                    ("packed", Rhs::Packed(&panels), &nt),
                    ("columns", Rhs::Columns { data: &w, ld: k }, &nt),
                    ("rows", Rhs::Rows { data: &w, ld: n }, &nn),
                ] {
                    let what = format!("{m}x{n}x{k} {name} add={add} at={at} {dev:?}");
                    let product = Product::new((m, n, k), lhs, rhs).continuing(add);
                    let mut c = c0.clone();
                    gemm::product(cpu, &mut c, n, product);
                    assert_bits(&what, &c, want);
                    let mut c = c0.clone();
                    gemm::serial(cpu.isa(), &mut c, n, product);
                    assert_bits(&what, &c, want);
                }
            }
        }
    }
}

#[test]
fn is_one_fused_chain_per_output() {
    let sizes =
        [(0, 3, 4), (3, 0, 4), (1, 1, 1), (2, 5, 0), (13, 33, 17), (12, 32, 256), (7, 31, 257)];
    all_forms::<f32>(&sizes);
    all_forms::<f64>(&sizes);
    all_forms::<f32>(&[(61, 97, 300)]);
    // more than one block of rows and of k, and a left operand that is copied on the way
    all_forms::<f32>(&[(250, 40, 270), (770, 5, 33)]);
    all_forms::<f64>(&[(250, 40, 270)]);
}

/// Property 1 for the matrix product: a row has the same bits for every M, thread count and
/// instruction set.
#[test]
fn rows_do_not_see_their_batch() {
    let (n, k) = (97, 193);
    let x: Vec<f32> = randn("x", 200 * k);
    let w: Vec<f32> = randn("w", n * k);
    let mut want = vec![0.0; 200 * n];
    let b = Rhs::Columns { data: &w, ld: k };
    let cpu = Cpu::with_isa(1, Isa::portable());
    gemm::product(&cpu, &mut want, n, Product::new((200, n, k), Lhs::rows(&x, k), b));
    for dev in devices() {
        let cpu = dev.on_cpu("gemm").unwrap();
        for m in [1, 2, 3, 5, 8, 11, 12, 13, 31, 48, 49, 100] {
            let from = 200 - m; // rows at the end, so that tiles start elsewhere
            let mut c = vec![0.0; m * n];
            let a = Lhs::rows(&x[from * k..], k);
            gemm::product(cpu, &mut c, n, Product::new((m, n, k), a, b));
            assert_bits(&format!("m={m} {dev:?}"), &c, &want[from * n..]);
        }
    }
}
