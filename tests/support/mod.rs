//! What tests share: random numbers, tolerances that are earned, central differences, goldens.

#![allow(dead_code)]

pub mod disk;
pub mod golden;
pub mod losses;
pub mod memory;
pub mod raw;
pub mod runs;
pub mod sim;

use std::sync::{Arc, OnceLock};

use warpo::{
    device::{Arena, Cpu, Device, Element, Float, cpu::Isa},
    models::{Batch, Keep, Layout, Model, Params, Pass, PassOptions, PassShape},
    ops::sample,
    rng::{Philox, Purpose},
};

/// The checkout that tests find their files in: where cargo, or a bundle that left it, says that it
/// is.
pub fn root() -> std::path::PathBuf {
    place("CARGO_MANIFEST_DIR", env!("CARGO_MANIFEST_DIR"))
}

/// What a variable says now, or what it said when this was compiled.
fn place(variable: &str, built: &str) -> std::path::PathBuf {
    std::env::var_os(variable).map_or_else(|| built.into(), Into::into)
}

/// An empty folder for one test; tests run in parallel, so `name` is the test's.
pub fn temp_dir(name: &str) -> std::path::PathBuf {
    let dir = place("CARGO_TARGET_TMPDIR", env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Runs an ignored test of this binary as a process of its own, with `WARPO_TEST_DIR` set to `dir`.
/// Such a test returns at once without the variable.
pub fn process(test: &str, dir: &std::path::Path) -> std::process::Child {
    std::process::Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--ignored", "--nocapture"])
        .env("WARPO_TEST_DIR", dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until a process has made a file.
pub fn wait_for(path: &std::path::Path) {
    for _ in 0..2000 {
        if path.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("{path:?} did not appear in 10 s");
}

/// A device whose memory tests allocate on.
pub fn host() -> &'static Device {
    static HOST: OnceLock<Device> = OnceLock::new();
    HOST.get_or_init(|| Device::Cpu(Cpu::new(1)))
}

/// An arena of `bytes` bytes.
pub fn room(bytes: usize) -> Arena {
    room_on(host(), bytes)
}

/// The same on a device.
pub fn room_on(dev: &Device, bytes: usize) -> Arena {
    Arena::new(dev, bytes).unwrap()
}

/// How tests draw, where a plan asks: on the CPU it needs the same room for all.
pub const PARAMS: sample::SamplingParams =
    sample::SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// A training pass that keeps all blocks.
pub fn keep_all(entropy: bool) -> PassOptions {
    PassOptions { entropy, keep: Keep::All, balance: 0.0 }
}

/// Bytes of a pass of this shape.
pub fn pass_bytes<T: Element>(
    dev: &Device,
    model: &Model<T>,
    shape: PassShape,
    options: PassOptions,
) -> usize {
    let model = (model.spec(), model.head());
    Arena::plan(|scope| Pass::<T>::plan(dev, scope, model, shape, options)).unwrap()
}

/// Memory for one pass over `batch`.
pub fn pass_room<T: Element>(
    dev: &Device,
    model: &Model<T>,
    batch: &Batch,
    options: PassOptions,
) -> Arena {
    room_on(dev, pass_bytes(dev, model, batch.shape(), options))
}

/// Zeros in a layout, for gradients.
pub fn params<F: Float>(layout: &Arc<Layout>) -> Params<F> {
    Params::zeros(host(), "gradients", layout).unwrap()
}

/// Devices whose results must be equal to the bit: every instruction set, 1 to 3 threads.
pub fn devices() -> Vec<Device> {
    let isas = Isa::available().iter();
    isas.flat_map(|isa| [1, 3].map(|t| Device::Cpu(Cpu::with_isa(t, *isa)))).collect()
}

/// `n` numbers from N(0, 1); asymmetric, no two alike. `name` decides the stream.
pub fn randn<F: Float>(name: &str, n: usize) -> Vec<F> {
    let seed = name.bytes().fold(5381u64, |h, b| h.wrapping_mul(33) ^ u64::from(b));
    let s = Philox::new(seed, 0, 0, Purpose::Init);
    (0..n).map(|i| F::of(s.normal(i as u32))).collect()
}

/// A permutation of `0..n`.
pub fn shuffled(name: &str, n: usize) -> Vec<usize> {
    let keys: Vec<f64> = randn(name, n);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| keys[*a].total_cmp(&keys[*b]));
    order
}

/// The rows `order` of `x` `[rows, cols]`, in that order.
pub fn gather<T: Copy>(x: &[T], cols: usize, order: &[usize]) -> Vec<T> {
    order.iter().flat_map(|r| &x[r * cols..][..cols]).copied().collect()
}

/// What an op's error says.
#[track_caller]
pub fn refusal<T: std::fmt::Debug>(result: warpo::Result<T>) -> String {
    result.unwrap_err().to_string()
}

/// Runs an op with each argument of `shapes`, `"x [2, 3] w [3]"`, one element short and one long;
/// `run` makes arguments of the lengths that it gets. The error names op and argument, what came
/// and what was wanted, which may count its rows from the argument itself. A scratch may be long.
#[track_caller]
pub fn assert_refuses<T: std::fmt::Debug, const N: usize>(
    op: &str,
    shapes: &str,
    mut run: impl FnMut([usize; N]) -> warpo::Result<T>,
) {
    let shapes: Vec<(&str, Vec<usize>)> = shapes
        .trim_end_matches(']')
        .split(']')
        .map(|one| one.trim().split_once(" [").unwrap())
        .map(|(name, dims)| (name, dims.split(", ").map(|n| n.parse().unwrap()).collect()))
        .collect();
    let good: [usize; N] = std::array::from_fn(|i| shapes[i].1.iter().product());
    assert_eq!(shapes.len(), N);
    run(good).unwrap();
    for (i, (name, shape)) in shapes.iter().enumerate() {
        let long = good[i] + usize::from(*name != "scratch");
        for len in [good[i] - 1, long].into_iter().filter(|len| *len != good[i]) {
            let mut lens = good;
            lens[i] = len;
            let says = refusal(run(lens));
            let mut own = shape.clone();
            own[0] = len / own[1..].iter().product::<usize>();
            let is = [shape, &own]
                .map(|want| format!("{op}: `{name}` has shape [{len}], wanted {want:?}"));
            assert!(is.contains(&says), "{says}, wanted one of {is:?}");
        }
    }
}

/// Zeros of these lengths.
pub fn zeros<const N: usize>(lens: [usize; N]) -> [Vec<f32>; N] {
    lens.map(|n| vec![0.0; n])
}

/// f64 copies.
pub fn wide<F: Float>(x: &[F]) -> Vec<f64> {
    x.iter().map(|x| x.f64()).collect()
}

/// f32 copies.
pub fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

fn worst(x: &[f64], truth: &[f64]) -> f64 {
    assert_eq!(x.len(), truth.len());
    // `f64::max` would drop NaN
    x.iter()
        .zip(truth)
        .map(|(a, t)| (a - t).abs())
        .fold(0.0, |m: f64, e| if e > m || e.is_nan() { e } else { m })
}

/// Ours may be at most twice as far from the f64 truth as a plain low-precision version, plus one
/// rounding: f32 epsilon times the largest |truth|.
#[track_caller]
pub fn assert_earned<F: Float>(what: &str, ours: &[F], plain: &[f32], truth: &[f64]) {
    let largest = truth.iter().fold(0.0f64, |m, t| m.max(t.abs()));
    assert_earned_to(f64::from(f32::EPSILON) * largest, what, ours, plain, truth);
}

/// As [`assert_earned`], where one rounding is more than that of the output.
#[track_caller]
pub fn assert_earned_to<F: Float>(
    one_ulp: f64,
    what: &str,
    ours: &[F],
    plain: &[f32],
    truth: &[f64],
) {
    let allowed = 2.0 * worst(&wide(plain), truth) + one_ulp;
    let got = worst(&wide(ours), truth);
    assert!(got <= allowed, "{what}: max error {got:.3e} > allowed {allowed:.3e}");
}

/// |ours - truth| <= abs + rel * |truth| elementwise; NaN fails.
#[track_caller]
pub fn assert_close<F: Float>(what: &str, ours: &[F], truth: &[f64], abs: f64, rel: f64) {
    assert_eq!(ours.len(), truth.len(), "{what}: lengths");
    for (i, (a, t)) in ours.iter().zip(truth).enumerate() {
        let (a, e) = (a.f64(), (a.f64() - t).abs());
        assert!(e <= abs + rel * t.abs(), "{what}[{i}]: got {a:e}, wanted {t:e}, error {e:.3e}");
    }
}

/// Equal to the bit, NaN included.
#[track_caller]
pub fn assert_bits<F: Float>(what: &str, a: &[F], b: &[F]) {
    assert_eq!(a.len(), b.len(), "{what}: lengths");
    let (x, y) = (bytemuck::cast_slice::<F, u8>(a), bytemuck::cast_slice::<F, u8>(b));
    if x != y {
        let i = a.iter().zip(b).position(|(a, b)| bytemuck::bytes_of(a) != bytemuck::bytes_of(b));
        let i = i.unwrap();
        panic!("{what}: bits differ first at {i}: {:e} and {:e}", a[i].f64(), b[i].f64());
    }
}

/// The norm of the error, relative to the norm of the truth (goal G5: 1e-5 for gradients in f32).
#[track_caller]
pub fn assert_norm<F: Float>(what: &str, ours: &[F], truth: &[f64], allowed: f64) {
    assert_eq!(ours.len(), truth.len(), "{what}: lengths");
    let errors: Vec<f64> = ours.iter().zip(truth).map(|(a, t)| a.f64() - t).collect();
    let got = (inner(&errors, &errors) / inner(truth, truth)).sqrt();
    assert!(got <= allowed, "{what}: relative error {got:.3e} > {allowed:e}");
}

/// The elements of `bad` are NaN, all others have the bits of `clean`.
#[track_caller]
pub fn assert_nan_only<F: Float>(what: &str, got: &[F], clean: &[F], bad: std::ops::Range<usize>) {
    assert!(clean.iter().all(|x| x.is_finite()), "{what}: a bad number without a cause");
    assert!(got[bad.clone()].iter().all(|x| x.is_nan()), "{what}: a NaN was lost");
    assert_bits(what, &got[..bad.start], &clean[..bad.start]);
    assert_bits(what, &got[bad.end..], &clean[bad.end..]);
}

/// Checks `grad` of `f` at `x` by central differences in f64, every element:
/// step 6e-6 * max(1, |x|), |a - n| <= abs + rel * |n|  (goal G5: 1e-8 and 1e-6 for an op).
#[track_caller]
pub fn gradcheck(
    what: &str,
    x: &[f64],
    grad: &[f64],
    (abs, rel): (f64, f64),
    mut f: impl FnMut(&[f64]) -> f64,
) {
    assert_eq!(x.len(), grad.len(), "{what}: lengths");
    let mut x = x.to_vec();
    for i in 0..x.len() {
        let at = x[i];
        let h = 6e-6 * at.abs().max(1.0);
        x[i] = at + h;
        let high = f(&x);
        x[i] = at - h;
        let low = f(&x);
        x[i] = at;
        let n = (high - low) / (2.0 * h);
        let e = (grad[i] - n).abs();
        assert!(
            e <= abs + rel * n.abs(),
            "{what}[{i}]: gradient {:e}, central difference {n:e}, error {e:.3e}",
            grad[i]
        );
    }
}

/// The tolerances of G5 for a single op.
pub const OP: (f64, f64) = (1e-8, 1e-6);

/// Σ a b in f64: the scalar whose gradient is the given cotangent.
pub fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
