//! What a profile says in numbers.

use std::fmt;

use super::{Kind, Recorded, Total, Work};

/// What a device can do at most: a GPU by its data sheet, a CPU as measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Operations a second: of a GPU in bf16 with f32 sums, without sparsity; of a CPU
    /// multiply-adds in f32.
    pub flops: f64,
    /// Bytes a second of its memory.
    pub bytes: f64,
}

/// By what the driver calls the whole GPU: TFLOP/s, TB/s.
const PEAKS: [(&str, f64, f64); 5] = [
    ("NVIDIA H200 NVL", 835.0, 4.8),
    ("NVIDIA H200", 989.0, 4.8),
    ("NVIDIA H100 80GB HBM3", 989.0, 3.35),
    ("NVIDIA A100-SXM4-80GB", 312.0, 2.039),
    ("NVIDIA A100-SXM4-40GB", 312.0, 1.555),
];

impl Peaks {
    /// Peaks of the GPU with this name, if they are known. A CPU's depend on its clock, memory and
    /// neighbours, and are measured.
    pub fn of(name: &str) -> Option<Self> {
        let (_, flops, bytes) = PEAKS.into_iter().find(|(of, ..)| *of == name)?;
        Some(Self { flops: flops * 1e12, bytes: bytes * 1e12 })
    }

    /// The least seconds for this work.
    pub fn seconds(&self, work: &Work) -> f64 {
        (work.flops / self.flops).max(work.bytes / self.bytes)
    }
}

/// A phase of the run.
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseRow {
    /// As given to `Device::span`.
    pub name: &'static str,
    pub calls: u64,
    /// By the clock, with the phases inside of it.
    pub whole: f64,
    /// Without them, so that shares add up.
    pub seconds: f64,
    /// Seconds of those in which an op (on a CUDA device a kernel) computes.
    pub busy: f64,
}

/// An op; of ops inside of each other each has its own time and work.
#[derive(Clone, Debug, PartialEq)]
pub struct OpRow {
    /// As given to `Device::op`; empty for kernels outside of ops.
    pub name: &'static str,
    pub calls: u64,
    /// By the clock; on a CUDA device those of its kernels, by events.
    pub seconds: f64,
    /// As ops state it.
    pub work: Work,
    /// On a CUDA device, the longest first.
    pub kernels: Vec<KernelRow>,
}

/// A kernel, or a copy of memory.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelRow {
    /// As in the .cu file.
    pub name: &'static str,
    pub calls: u64,
    pub seconds: f64,
}

/// What took how long, to be printed.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub device: String,
    /// Since the profile began.
    pub seconds: f64,
    /// The device's peaks, where they are known.
    pub peaks: Option<Peaks>,
    pub phases: Vec<PhaseRow>,
    pub ops: Vec<OpRow>,
    /// Events that the trace has no room for; they are in the sums.
    pub dropped: u64,
    /// Whether seconds of ops are those of kernels.
    cuda: bool,
}

fn longest_first<T>(rows: &mut [T], seconds: impl Fn(&T) -> f64) {
    rows.sort_by(|a, b| seconds(b).total_cmp(&seconds(a)));
}

pub(super) fn report(
    device: &str,
    peaks: Option<Peaks>,
    seconds: f64,
    cuda: bool,
    state: &Recorded,
) -> Report {
    let mut ops: Vec<OpRow> = Vec::new();
    let mut phases = Vec::new();
    for (&(kind, name), &Total { calls, whole, seconds, busy, work }) in &state.spans {
        match kind {
            Kind::Phase => phases.push(PhaseRow { name, calls, whole, seconds, busy }),
            _ => ops.push(OpRow { name, calls, seconds: busy, work, kernels: Vec::new() }),
        }
    }
    for (&(op, name), total) in &state.kernels {
        let row = KernelRow { name, calls: total.calls, seconds: total.busy };
        match ops.iter_mut().find(|o| o.name == op) {
            Some(op) => op.kernels.push(row),
            // Outside of all ops, or of one that is not over.
            None => ops.push(OpRow {
                name: op,
                calls: 0,
                seconds: 0.0,
                work: Work::default(),
                kernels: vec![row],
            }),
        }
    }
    for op in &mut ops {
        if cuda {
            op.seconds = op.kernels.iter().map(|k| k.seconds).sum();
        }
        longest_first(&mut op.kernels, |k| k.seconds);
    }
    longest_first(&mut phases, |p: &PhaseRow| p.seconds);
    longest_first(&mut ops, |o| o.seconds);
    Report { device: device.into(), seconds, peaks, phases, ops, dropped: state.dropped, cuda }
}

impl Report {
    /// Seconds in which an op computes; on a CUDA device a kernel.
    pub fn busy(&self) -> f64 {
        self.ops.iter().map(|o| o.seconds).sum()
    }

    /// The part of its time that an op would need at the device's peak, where that is known.
    pub fn of_peak(&self, op: &OpRow) -> Option<f64> {
        let least = self.peaks?.seconds(&op.work);
        (op.seconds > 0.0 && least > 0.0).then(|| least / op.seconds)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, seconds: all, .. } = self;
        let share = |part: f64, of: f64| match of > 0.0 {
            true => format!("{:.1} %", 100.0 * part / of),
            false => "-".into(),
        };
        let number = |x: f64, digits: usize| match x > 0.0 && x.is_finite() {
            true => format!("{x:.digits$}"),
            false => "-".into(),
        };
        let (busy, idle) = if self.cuda {
            ("a kernel runs in", "no kernel runs")
        } else {
            ("ops compute for", "outside of ops")
        };
        writeln!(f, "{device}: {all:.3} s, {busy} {} of them", share(self.busy(), *all))?;
        match self.peaks {
            Some(Peaks { flops, bytes }) => {
                let (flops, bytes) = (flops / 1e12, bytes / 1e12);
                if self.cuda {
                    writeln!(f, "peaks of the data sheet: {flops} TFLOP/s in bf16, {bytes} TB/s")?;
                } else {
                    let line = format!("{flops:.3} TFLOP/s in f32, a copy of {bytes:.3} TB/s");
                    writeln!(f, "peaks as measured: {line}; in caches there is more")?;
                }
            }
            None => writeln!(f, "peaks of this device are not known")?,
        }
        if !self.phases.is_empty() {
            writeln!(
                f,
                "\n{:40} {:>8} {:>10} {:>10} {:>8} {:>8}",
                "phase", "calls", "s", "own s", "share", "busy"
            )?;
        }
        for PhaseRow { name, calls, whole, seconds, busy } in &self.phases {
            let (part, busy) = (share(*seconds, *all), share(*busy, *seconds));
            writeln!(f, "{name:40} {calls:>8} {whole:>10.3} {seconds:>10.3} {part:>8} {busy:>8}")?;
        }
        writeln!(
            f,
            "\n{:40} {:>8} {:>10} {:>8} {:>9} {:>8} {:>8}",
            "op", "calls", "s", "share", "TFLOP/s", "GB/s", "of peak"
        )?;
        for op in &self.ops {
            let OpRow { name, calls, seconds, work, kernels } = op;
            let name = if name.is_empty() { "(outside of ops)" } else { name };
            let flops = number(work.flops / seconds / 1e12, 3);
            let bytes = number(work.bytes / seconds / 1e9, 1);
            let of_peak = self.of_peak(op).map_or("-".into(), |part| share(part, 1.0));
            writeln!(
                f,
                "{name:40} {calls:>8} {seconds:>10.3} {:>8} {flops:>9} {bytes:>8} {of_peak:>8}",
                share(*seconds, *all)
            )?;
            for KernelRow { name, calls, seconds } in kernels {
                let part = share(*seconds, *all);
                writeln!(f, "  {name:38} {calls:>8} {seconds:>10.3} {part:>8}")?;
            }
        }
        let rest = (all - self.busy()).max(0.0);
        writeln!(f, "{idle:40} {:>8} {rest:>10.3} {:>8}", "", share(rest, *all))?;
        if self.dropped > 0 {
            writeln!(f, "the trace has no room for {} later events", self.dropped)?;
        }
        Ok(())
    }
}
