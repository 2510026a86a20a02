//! The simulator of `kernels/sim` in tests: compiles it with g++, runs a test on it plain and under
//! the sanitizers, and holds an op's kernels to the CPU's f64.

use std::{
    any::type_name,
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
};

use bytemuck::Pod;
use half::bf16;
use warpo::{
    Result,
    device::{Buffer, Cuda, Device, Element, Float, View, ViewMut},
};

pub use warpo::device::{Arch, cuda::Order};

use super::{assert_close, assert_earned_to, host, randn};

mod build;
#[allow(clippy::duplicate_mod)]
#[path = "../../kernels/scan.rs"]
pub mod scan;

use build::{Build, run};

pub use build::files;

/// How the kernels are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Hash)]
pub enum Variant {
    Plain,
    /// AddressSanitizer and UndefinedBehaviorSanitizer.
    Address,
    /// ThreadSanitizer.
    Thread,
    /// Not at all: a GPU runs what nvcc compiled.
    Gpu,
}

impl Variant {
    const SIMULATED: [Self; 3] = [Self::Plain, Self::Address, Self::Thread];

    fn name(self) -> &'static str {
        ["plain", "address", "thread", "gpu"][self as usize]
    }

    /// Flags of the kernels, and what tells sim.cpp of them: it is not sanitized itself.
    fn flags(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Plain | Self::Gpu => (&[], &[]),
            Self::Address => {
                (&["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], &["-DSIM_ASAN"])
            }
            Self::Thread => (&["-fsanitize=thread"], &["-DSIM_TSAN"]),
        }
    }
}

/// The simulator in one variant, of an Ampere GPU unless told otherwise.
pub struct Sim {
    pub variant: Variant,
    pub arch: Arch,
    library: PathBuf,
}

/// `all` runs tests at their full size, and kernels under the sanitizers and in many orders. A test
/// sets it to a variant and its library in the processes that it starts.
const SIM: &str = "WARPO_SIM";

/// Runs the kernels of all tests on this GPU, `cuda:0`, and not on the simulator.
const GPU: &str = "WARPO_GPU";

/// Runs `test` plain in this process and, where `WARPO_SIM=all` asks for them, under each sanitizer
/// in a process of its own, as a sanitizer must be loaded before everything else; or on a GPU only,
/// where `$WARPO_GPU` names one. The closure stands directly in the `#[test]` function.
pub fn check<F: Fn(&Sim)>(test: F) {
    if let Some(gpu) = Sim::of_gpu() {
        return test(&gpu);
    }
    if let Some(sim) = Sim::of_child() {
        return test(&sim);
    }
    for sim in Variant::SIMULATED.into_iter().filter_map(Sim::build) {
        if sim.variant == Variant::Plain {
            test(&sim);
        } else {
            let (ok, text) = sim.child(test_name::<F>());
            assert!(ok && text.contains("1 passed"), "under {:?}:\n{text}", sim.variant);
        }
    }
}

/// Runs `test` on sm_80 and, where `WARPO_SIM=all` asks for it, on every architecture that the
/// simulator plays, without sanitizers, which look at single kernels; or on a GPU, where
/// `$WARPO_GPU` names one.
pub fn on_devices(mut test: impl FnMut(&Device)) {
    if let Some(gpu) = Sim::of_gpu() {
        return test(&gpu.device(Order::default()));
    }
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let archs = if all() { &[Arch::Sm80, Arch::Sm90][..] } else { &[Arch::Sm80] };
    for &arch in archs {
        test(&sim.device_as(Order::default(), arch));
    }
}

/// Whether the sanitizers and all orders are asked for.
fn all() -> bool {
    std::env::var(SIM).is_ok_and(|value| value == "all")
}

/// Whether tests run at their full size, as CI and a GPU ask for.
pub fn full() -> bool {
    [SIM, GPU].iter().any(|name| std::env::var_os(name).is_some())
}

/// The first cases, the most telling ones, or all of them where tests run at their full size.
pub fn cases<T, const N: usize>(few: usize, all: [T; N]) -> impl Iterator<Item = T> {
    all.into_iter().take(if full() { N } else { few })
}

/// Eight orders of threads and blocks, the natural one first.
pub fn orders() -> Vec<Order> {
    (0..8).map(|i| Order { threads: i, blocks: i % 4 }).collect()
}

/// The name of the test function around a closure.
pub fn test_name<F>() -> &'static str {
    let name = type_name::<F>().trim_end_matches("::{{closure}}");
    name.split_once("::").unwrap().1
}

impl Sim {
    /// The one that this process was started for.
    pub fn of_child() -> Option<Self> {
        let value = std::env::var(SIM).ok()?;
        let (name, library) = value.split_once(':')?;
        let variant = Variant::SIMULATED.into_iter().find(|v| v.name() == name)?;
        Some(Self::of(variant, library.into()))
    }

    /// A GPU, where one is named.
    pub fn of_gpu() -> Option<Self> {
        let there = std::env::var_os(GPU).is_some();
        there.then(|| Self::of(Variant::Gpu, PathBuf::new()))
    }

    /// For tests that no sanitizer looks at: a GPU, where one is named, or the simulator.
    pub fn plain() -> Option<Self> {
        Self::of_gpu().or_else(Self::of_child).or_else(|| Self::build(Variant::Plain))
    }

    /// Compiles it, unless that was done before; none without g++, nor with a sanitizer that
    /// nobody asks for.
    pub fn build(variant: Variant) -> Option<Self> {
        if variant != Variant::Plain && !all() {
            return None;
        }
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Ok(version) = Command::new("g++").arg("--version").output() else {
            let text = "g++ was not found: the kernels are not tested on the simulator";
            assert!(std::env::var("WARPO_KERNELS").as_deref() != Ok("require"), "{text}");
            println!("{text}");
            return None;
        };
        let library = Build::new(variant, &version.stdout).library();
        Some(Self::of(variant, library))
    }

    fn of(variant: Variant, library: PathBuf) -> Self {
        Self { variant, arch: Arch::Sm80, library }
    }

    /// The simulator of a Hopper GPU; a GPU is what it is.
    pub fn hopper(&self) -> Self {
        Self { arch: Arch::Sm90, library: self.library.clone(), ..*self }
    }

    /// A device that runs threads and blocks in `order`; a GPU has its own.
    pub fn device(&self, order: Order) -> Device {
        self.device_as(order, self.arch)
    }

    /// The same of another architecture.
    pub fn device_as(&self, order: Order, arch: Arch) -> Device {
        static ONE: OnceLock<Device> = OnceLock::new();
        if self.variant == Variant::Gpu {
            let name = std::env::var(GPU).unwrap();
            return ONE.get_or_init(|| Device::from_name(&name, 0).unwrap()).clone();
        }
        Device::Cuda(Cuda::simulated(&self.library, order, arch).unwrap())
    }

    /// Orders of threads and blocks, the natural one first: a sanitizer looks at one order and
    /// infers the others.
    pub fn orders(&self) -> Vec<Order> {
        let mut orders = orders();
        orders.truncate(match self.variant {
            Variant::Address | Variant::Thread => 2,
            Variant::Plain if !all() => 2,
            Variant::Plain | Variant::Gpu => 8,
        });
        orders
    }

    pub fn library(&self) -> &Path {
        &self.library
    }

    /// Whether test `name` passes in a process of its own on this simulator, and what it printed.
    pub fn child(&self, name: &str) -> (bool, String) {
        self.child_with(name, &[])
    }

    /// The same with environment variables.
    pub fn child_with(&self, name: &str, envs: &[(&str, &str)]) -> (bool, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([name, "--exact", "--include-ignored", "--nocapture"]);
        command.envs(envs.iter().copied());
        command.env(SIM, format!("{}:{}", self.variant.name(), self.library.display()));
        let preload = match self.variant {
            Variant::Plain | Variant::Gpu => None,
            Variant::Address => Some("libasan.so"),
            Variant::Thread => Some("libtsan.so"),
        };
        if let Some(name) = preload {
            let found = run(Command::new("g++").arg(format!("-print-file-name={name}")));
            command.env("LD_PRELOAD", found.trim());
        }
        // Rust's own threads and copies are not the kernels'.
        command.env("ASAN_OPTIONS", "detect_leaks=0");
        command.env("TSAN_OPTIONS", "halt_on_error=1 ignore_noninstrumented_modules=1");
        let done = command.output().unwrap();
        let text = [done.stdout, done.stderr].concat();
        (done.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// Holds a case in bf16 and in f32 to the tolerance rule, and to equal bits in all orders.
    #[track_caller]
    pub fn hold(&self, case: &impl Case) {
        self.hold_in::<bf16>(case);
        self.hold_in::<f32>(case);
    }

    /// The same for a case that has kernels for bf16 only.
    #[track_caller]
    pub fn hold_bf16(&self, case: &impl Case) {
        self.hold_in::<bf16>(case);
    }

    #[track_caller]
    fn hold_in<T: Element>(&self, case: &impl Case) {
        let at = |x: f64| T::of(x).f64();
        let truth = Lab::run(host(), 0, at, |lab| case.run::<f64>(lab));
        let plain = Lab::run(host(), 0, at, |lab| case.run::<f32>(lab));
        self.compare(T::NAME, &truth, &plain, |dev| Lab::run(dev, 0, at, |lab| case.run::<T>(lab)));
    }

    /// The same for a case that is computed in f32 only.
    #[track_caller]
    pub fn hold_f32(&self, case: &impl FloatCase) {
        let at = |x: f64| f64::from(x as f32);
        let truth = Lab::run(host(), 0, at, |lab| case.run::<f64>(lab));
        let plain = Lab::run(host(), 0, at, |lab| case.run::<f32>(lab));
        self.compare("F32", &truth, &plain, |dev| Lab::run(dev, 0, at, |lab| case.run::<f32>(lab)));
    }

    #[track_caller]
    fn compare(
        &self,
        name: &str,
        truth: &[Output],
        plain: &[Output],
        run: impl Fn(&Device) -> Vec<Output>,
    ) {
        let mut first: Option<Vec<Output>> = None;
        for order in self.orders() {
            let ours = run(&self.device(order));
            if let Some(first) = &first {
                for (a, b) in ours.iter().zip(first) {
                    assert!(a.bits == b.bits, "{} {name}: {order:?} shows", a.name);
                }
                continue;
            }
            for ((o, p), t) in ours.iter().zip(plain).zip(truth) {
                let what = format!("{} {name}", o.name);
                if o.sums {
                    assert_close(&what, &o.x, &t.x, 1e-12, 1e-12);
                    continue;
                }
                let rounded: Vec<f32> = p.x.iter().map(|x| (o.round)(*x) as f32).collect();
                let largest = t.x.iter().fold(0.0f64, |m, t| m.max(t.abs()));
                assert_earned_to(o.epsilon * largest, &what, &o.x, &rounded, &t.x);
            }
            first = Some(ours);
        }
    }

    /// In f32 a case has the bits that it has on the CPU.
    #[track_caller]
    pub fn hold_bits(&self, case: &impl Case) {
        let at = |x: f64| f64::from(x as f32);
        let cpu = Lab::run(host(), 0, at, |lab| case.run::<f32>(lab));
        let dev = self.device(Order::default());
        for (ours, cpu) in Lab::run(&dev, 0, at, |lab| case.run::<f32>(lab)).iter().zip(&cpu) {
            assert!(ours.bits == cpu.bits, "{} has not the bits of the CPU", ours.name);
        }
    }

    /// Rows have the same bits wherever they stand and whatever comes before: `case(n)` makes a
    /// case of n rows.
    #[track_caller]
    pub fn hold_rows<C: Case>(&self, all: usize, case: impl Fn(usize) -> C) {
        self.hold_rows_in::<bf16, C>(all, &case);
        self.hold_rows_in::<f32, C>(all, &case);
    }

    /// The same for a case that has kernels for bf16 only.
    #[track_caller]
    pub fn hold_rows_bf16<C: Case>(&self, all: usize, case: impl Fn(usize) -> C) {
        self.hold_rows_in::<bf16, C>(all, &case);
    }

    #[track_caller]
    fn hold_rows_in<T: Element, C: Case>(&self, all: usize, case: &impl Fn(usize) -> C) {
        let dev = self.device(Order::default());
        let at = |x: f64| T::of(x).f64();
        let whole = Lab::run(&dev, 0, at, |lab| case(all).run::<T>(lab));
        for first in cases(2, [1, all / 2, 2, all - 1]) {
            let part = Lab::run(&dev, first, at, |lab| case(all - first).run::<T>(lab));
            for (part, whole) in part.iter().zip(&whole).filter(|(p, _)| p.rows) {
                let at = whole.bits.len() - part.bits.len();
                let what = format!("{} {}: rows from {first}", part.name, T::NAME);
                assert!(part.bits[..] == whole.bits[at..], "{what} see their batch");
            }
        }
    }
}

/// An op at one shape, all its directions: takes its inputs from a [`Lab`] and gives it the
/// outputs.
pub trait Case {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()>;
}

/// The same of an op that is computed in what is stored, f32 on a CUDA device.
pub trait FloatCase {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> Result<()>;
}

/// The distance of 1 from the next number.
fn epsilon<T: Element>() -> f64 {
    match T::NAME {
        "BF16" => 1.0 / 128.0,
        "F32" => f64::from(f32::EPSILON),
        _ => f64::EPSILON,
    }
}

/// Where a case runs: makes its inputs, the same on every device, and keeps its outputs.
pub struct Lab<'a> {
    dev: &'a Device,
    /// The row of the whole batch that comes first.
    first: usize,
    round: fn(f64) -> f64,
    outputs: Vec<Output>,
}

/// What a case computed.
struct Output {
    name: &'static str,
    bits: Vec<u8>,
    x: Vec<f64>,
    /// By row, not summed over rows.
    rows: bool,
    /// Sums that every device makes in f64.
    sums: bool,
    /// Of its type, or more where it is a long sum.
    epsilon: f64,
    round: fn(f64) -> f64,
}

impl<'a> Lab<'a> {
    fn run(
        dev: &'a Device,
        first: usize,
        round: fn(f64) -> f64,
        case: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Vec<Output> {
        let mut lab = Self { dev, first, round, outputs: Vec::new() };
        case(&mut lab).unwrap();
        lab.outputs
    }

    pub fn dev(&self) -> &'a Device {
        self.dev
    }

    /// `n` random numbers that do not belong to a row.
    pub fn input<T: Element>(&self, name: &str, n: usize) -> Buffer<'static, T> {
        self.copy(&randn(name, n))
    }

    /// Random rows.
    pub fn rows<T: Element>(&self, name: &str, rows: usize, cols: usize) -> Buffer<'static, T> {
        self.spread(name, rows, cols, (0.0, 1.0))
    }

    /// Random rows around `centre`, `scale` times as wide.
    pub fn spread<T: Element>(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        (centre, scale): (f64, f64),
    ) -> Buffer<'static, T> {
        let mut all: Vec<f64> = randn(name, (self.first + rows) * cols);
        all.iter_mut().for_each(|x| *x = centre + scale * *x);
        self.copy(&all[self.first * cols..])
    }

    /// For each row a random number below `n`.
    pub fn ids(&self, name: &str, rows: usize, n: usize) -> Buffer<'static, u32> {
        let all: Vec<f64> = randn(name, self.first + rows);
        let ids = all[self.first..].iter().map(|x| (x.abs() * 1e6) as u32 % n as u32);
        Buffer::of(self.dev, "test", &ids.collect::<Vec<_>>()).unwrap()
    }

    /// Room for `n` numbers, NaN.
    pub fn room<T: Pod>(&self, n: usize) -> Buffer<'static, T> {
        Buffer::new(self.dev, "test", n).unwrap()
    }

    fn copy<T: Element>(&self, x: &[f64]) -> Buffer<'static, T> {
        let x: Vec<T> = x.iter().map(|x| T::of((self.round)(*x))).collect();
        Buffer::of(self.dev, "test", &x).unwrap()
    }

    /// Keeps an output that is summed over rows.
    pub fn sum<T: Element>(&mut self, name: &'static str, x: &Buffer<'_, T>) {
        let x = self.dev.read(x.view()).unwrap();
        self.keep(name, &x, false, false);
    }

    /// Keeps an output that is summed over rows from what was rounded to `T`.
    pub fn sum_of<T: Element>(&mut self, name: &'static str, x: &Buffer<'_, T::Acc>) {
        self.sum(name, x);
        if let Some(output) = self.outputs.last_mut() {
            (output.epsilon, output.round) = (epsilon::<T>(), |x| T::of(x).f64());
        }
    }

    /// Keeps an output in f32 that is summed over `n` rows by one chain of a tensor core.
    ///
    /// It takes 16 products at a time. Each of them, and the sum before, loses on average half of
    /// 2^-25 of the largest term (`kernels/sim/tensor_core.h`), and their sum half of 2^-23 when it
    /// is rounded: all toward zero, so that the losses add up and do not cancel as those of a plain
    /// sum do. (17 / 2 / 4 + 1 / 2) 2^-23 are 2.6 epsilon for each 16 rows.
    pub fn sum_of_chain<F: Float>(&mut self, name: &'static str, x: &Buffer<'_, F>, n: usize) {
        self.sum(name, x);
        if let Some(output) = self.outputs.last_mut() {
            output.epsilon *= 1.0 + 2.6 * n.div_ceil(16) as f64;
        }
    }

    /// Keeps an output in f32 that is summed over `n` rows of what is a sum over the rows behind
    /// each: n roundings are in each of them.
    pub fn sum_of_sums<F: Float>(&mut self, name: &'static str, x: &Buffer<'_, F>, n: usize) {
        self.sum(name, x);
        if let Some(output) = self.outputs.last_mut() {
            output.epsilon *= n as f64;
        }
    }

    /// Keeps an output that has a part for each row.
    pub fn by_row<T: Element>(&mut self, name: &'static str, x: &Buffer<'_, T>) {
        let x = self.dev.read(x.view()).unwrap();
        self.keep(name, &x, true, false);
    }

    /// Keeps a column that was read back.
    pub fn column<T: Element>(&mut self, name: &'static str, x: &[T]) {
        self.keep(name, x, false, false);
    }

    /// Keeps sums that every device makes in f64, from the same terms but for their last bits.
    pub fn sums(&mut self, name: &'static str, x: &[f64]) {
        self.keep(name, x, false, true);
    }

    fn keep<T: Element>(&mut self, name: &'static str, x: &[T], rows: bool, sums: bool) {
        self.outputs.push(Output {
            name,
            bits: bytemuck::cast_slice(x).to_vec(),
            x: x.iter().map(|x| x.f64()).collect(),
            rows,
            sums,
            epsilon: epsilon::<T>(),
            round: |x| T::of(x).f64(),
        });
    }
}

/// A column of tokens that may begin anywhere in its memory, NaN around it.
pub struct Column<F: 'static> {
    dev: Device,
    memory: Buffer<'static, F>,
    at: Range<usize>,
}

impl<F: Float> Column<F> {
    /// A copy of `x` that begins `first` elements into its memory.
    pub fn of(dev: &Device, first: usize, x: &[F]) -> Self {
        let nan = |n| vec![F::of(f64::NAN); n];
        let all = [&nan(first), x, &nan(3)].concat();
        let memory = Buffer::of(dev, "test", &all).unwrap();
        Self { dev: dev.clone(), memory, at: first..first + x.len() }
    }

    /// Room for `n` numbers, NaN.
    pub fn room(dev: &Device, first: usize, n: usize) -> Self {
        Self::of(dev, first, &vec![F::of(f64::NAN); n])
    }

    pub fn view(&self) -> View<'_, F> {
        self.memory.view().range(self.at.clone())
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, F> {
        self.memory.view_mut().range(self.at.clone())
    }

    /// What is in it. Nobody wrote beside it.
    #[track_caller]
    pub fn read(&self) -> Vec<F> {
        let all = self.dev.read(self.memory.view()).unwrap();
        let mut around = all[..self.at.start].iter().chain(&all[self.at.end..]);
        assert!(around.all(|x| x.is_nan()), "written beside a column");
        all[self.at.clone()].to_vec()
    }
}

/// `n` random numbers of f32, whatever they are stored in.
pub fn rounded<F: Float>(name: &str, n: usize) -> Vec<F> {
    randn::<f32>(name, n).iter().map(|x| F::of(f64::from(*x))).collect()
}
