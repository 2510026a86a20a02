//! What benches share: the machine's own ceilings, measured in the same run, and a line beside
//! criterion's that relates a time to them.

#![allow(dead_code, clippy::print_stdout, clippy::unwrap_used)]

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::{Duration, Instant},
};

use criterion::{BenchmarkGroup, Throughput, measurement::WallTime};
use serde_json::{Value, json};
use warpo::{
    device::{Arch, Cpu, Cuda, Device, cuda::Order, profile::Peaks},
    rng::{Philox, Purpose},
};

/// What one call does.
#[derive(Clone, Copy, Default)]
pub struct Work {
    /// Floating-point operations, a multiply-add counted as two.
    pub flops: f64,
    /// Bytes that must be read or written, each once.
    pub bytes: f64,
}

/// `n` multiply-adds.
pub fn fma(n: usize) -> Work {
    Work { flops: 2.0 * n as f64, bytes: 0.0 }
}

/// `n` f32 numbers read or written.
pub fn moves(n: usize) -> Work {
    Work { flops: 0.0, bytes: 4.0 * n as f64 }
}

/// The ceilings of this machine.
pub fn peak() -> Peaks {
    static PEAK: OnceLock<Peaks> = OnceLock::new();
    *PEAK.get_or_init(|| {
        let peak = Peaks::measured(device().on_cpu("peak").unwrap());
        println!(
            "peak of {}: {:.1} GFLOP/s, copy {:.1} GB/s",
            device().describe(),
            peak.flops / 1e9,
            peak.bytes / 1e9
        );
        peak
    })
}

/// The device of all benches: one pool for the process.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| Device::Cpu(Cpu::new(0)))
}

/// The GPU that is measured, or the simulator in the library that `$WARPO_SIM` names, where a bench
/// only shows that it runs; and whether it is that. Where there is neither the process says so and
/// ends, failing if `$WARPO_GPU` is set.
pub fn gpu() -> (Device, bool) {
    let simulator = std::env::var_os("WARPO_SIM");
    let dev = match simulator.as_ref().map(Path::new) {
        Some(library) => Cuda::simulated(library, Order::default(), Arch::Sm80).map(Device::Cuda),
        None => Device::from_name("cuda", 0),
    };
    match dev {
        Ok(dev) => (dev, simulator.is_some()),
        Err(e) => {
            println!("nothing is measured: {e}");
            std::process::exit(i32::from(std::env::var_os("WARPO_GPU").is_some()));
        }
    }
}

/// What nvidia-smi says of the card now; nothing if there is none.
pub fn card() -> String {
    let fields =
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu";
    let mut command = Command::new("nvidia-smi");
    command.arg(format!("--query-gpu={fields}")).arg("--format=csv,noheader");
    let said = command.output().map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    format!("{fields}: {}", said.unwrap_or_default())
}

/// `n` numbers from N(0, 1).
pub fn randn(stream: u64, n: usize) -> Vec<f32> {
    let draw = Philox::new(1, stream, 0, Purpose::Init);
    (0..n).map(|i| draw.normal(i as u32) as f32).collect()
}

/// Measures `f` and prints its rate and share of the peak under criterion's own lines.
pub fn bench(group: &mut BenchmarkGroup<'_, WallTime>, id: &str, work: Work, mut f: impl FnMut()) {
    let peak = peak();
    let amount = if work.flops > 0.0 { work.flops } else { work.bytes };
    // criterion calls them elements; they are FLOPs, or bytes
    group.throughput(Throughput::Elements(amount as u64));
    let seconds = RefCell::new(Vec::new());
    group.bench_function(id, |b| {
        b.iter_custom(|n| {
            let start = Instant::now();
            for _ in 0..n {
                f();
            }
            let took = start.elapsed();
            seconds.borrow_mut().push(took.as_secs_f64() / n as f64);
            took
        });
    });
    let mut all = seconds.into_inner();
    all.sort_by(f64::total_cmp);
    let Some(median) = all.get(all.len() / 2) else { return };
    let mut line = format!("    {:>10.3?}", Duration::from_secs_f64(*median));
    for (amount, unit, peak) in
        [(work.flops, "GFLOP/s", peak.flops), (work.bytes, "GB/s", peak.bytes)]
    {
        if amount > 0.0 {
            let rate = amount / median;
            line += &format!("  {:.1} {unit}, {:.0} % of peak", rate / 1e9, 100.0 * rate / peak);
        }
    }
    println!("{line}");
}

/// The results of a bench, in the JSON file that `$WARPO_RESULTS` names: each is written when it
/// comes, so that a bench that is cut short loses none. Those that the file has of this device stay
/// until they are measured anew.
pub struct ResultsFile {
    path: Option<PathBuf>,
    /// What is written before them.
    pub head: Value,
    /// What they are called.
    list: &'static str,
    all: Vec<Value>,
}

impl ResultsFile {
    pub fn of(dev: &Device, list: &'static str) -> Self {
        let path = std::env::var_os("WARPO_RESULTS").map(PathBuf::from);
        let head = json!({ "device": dev.describe(), "card": card() });
        let text = path.as_ref().and_then(|path| std::fs::read_to_string(path).ok());
        let older = text.and_then(|text| serde_json::from_str::<Value>(&text).ok());
        let older = older.filter(|older| older["device"] == head["device"]);
        let all = older.and_then(|older| older[list].as_array().cloned()).unwrap_or_default();
        Self { path, head, list, all }
    }

    pub fn keep(&mut self, result: Value) {
        self.all.retain(|older| older["name"] != result["name"]);
        self.all.push(result);
        let Some(path) = &self.path else { return };
        let mut whole = self.head.clone();
        whole[self.list] = json!(self.all);
        let text = serde_json::to_string_pretty(&whole).unwrap() + "\n";
        // Aside first: who is killed between leaves the older ones.
        let aside = path.with_extension("tmp");
        std::fs::write(&aside, text).unwrap();
        std::fs::rename(&aside, path).unwrap();
    }
}
