//! `warpo plan`: what a run takes of a device's memory, for machines that are not there too.

use half::bf16;

use super::train::{self, Told};
use crate::{
    algorithms::Algorithm,
    device::{
        Cuda, Device, Element,
        cuda::{GPUS, GpuSpec},
    },
    error::{Error, Result},
    models::Spec,
    train::{
        Settings,
        job::{self, Job},
        plan::{self, Plan, Work},
    },
};

/// Print the memory of a run by model and phase, and the largest micro-batch that fits; nothing is
/// run, and the model's folder needs no weights
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    told: Told,
    #[arg(long, value_name = "NAME", help = gpus())]
    gpu: Option<String>,
    /// Memory of the device, as 141GB or 80GiB, if another than it has
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
}

/// What is left to the driver, its context and the kernels of a GPU that is not there.
const DRIVER: usize = 1 << 30;

fn gpus() -> String {
    let names: Vec<&str> = GPUS.iter().map(|m| m.key).collect();
    format!("A GPU that need not be there: {}", names.join(", "))
}

pub(super) fn run(args: &Args) -> Result<()> {
    let (entry, settings, section) = train::settings(&args.told)?;
    let (dev, own) = match &args.gpu {
        Some(name) => {
            let machine = find(name)?;
            (Device::Cuda(Cuda::planned(machine)?), Some(machine.memory - DRIVER))
        }
        None => {
            let dev = Device::from_name(&settings.device, settings.threads)?;
            let own = dev.free_memory()?;
            (dev, own)
        }
    };
    let memory = args.memory.as_deref().map(size).transpose()?.or(own);
    let algorithm = (entry.build)(&*section)?;
    let text = match dev {
        Device::Cpu(_) => describe::<f32>(&dev, settings, algorithm, memory),
        Device::Cuda(_) => describe::<bf16>(&dev, settings, algorithm, memory),
    };
    super::print(&text?)
}

fn find(name: &str) -> Result<GpuSpec> {
    GPUS.iter().find(|m| m.key == name).copied().ok_or_else(|| {
        let known: Vec<&str> = GPUS.iter().map(|m| m.key).collect();
        Error::config("--gpu", format!("one of {}", known.join(", ")), name)
    })
}

/// Bytes of `141GB`, `80GiB`, `512MiB` or a plain number.
fn size(text: &str) -> Result<usize> {
    let wrong = || Error::config("--memory", "a size as 141GB, 80GiB or 512MiB", text);
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit {
        "" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => f64::from(1 << 20),
        "GiB" => f64::from(1 << 30),
        "TiB" => 1024.0 * f64::from(1 << 30),
        _ => return Err(wrong()),
    };
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    if !(number > 0.0 && number.is_finite()) {
        return Err(wrong());
    }
    Ok((number * unit) as usize)
}

/// The specs of the model and of the judge, and sizes for them.
struct Run<'a> {
    dev: &'a Device,
    settings: Settings,
    algorithm: Box<dyn Algorithm>,
    policy: Spec,
    judge: Option<Spec>,
    /// Tokens of the longest text or prompt.
    longest: usize,
    /// Where that comes from.
    source: &'static str,
}

impl<'a> Run<'a> {
    fn new(dev: &'a Device, settings: Settings, algorithm: Box<dyn Algorithm>) -> Result<Self> {
        let needs = algorithm.needs();
        let (policy, judge) = job::specs(&settings, &needs)?;
        if settings.data.is_empty() {
            let longest = job::max_length(&settings, &needs, &policy)?;
            let source = "max_length, as there is no data";
            return Ok(Self { dev, settings, algorithm, policy, judge, longest, source });
        }
        let job = Job::new(settings, algorithm)?;
        let new = plan::sampling(&needs).map_or(0, |s| s.max_new_tokens);
        let (longest, source) = (job.work.longest - new, "the data");
        let Job { settings, algorithm, .. } = job;
        Ok(Self { dev, settings, algorithm, policy, judge, longest, source })
    }

    /// With other sizes of a micro-batch.
    fn plan<T: Element>(&self, rows: usize) -> Result<(Work, Plan)> {
        let settings = Settings { micro_batch_tokens: rows, ..self.settings.clone() };
        let needs = self.algorithm.needs();
        let work = Work::new(&settings, &needs, self.longest);
        let specs = (&self.policy, self.judge.as_ref());
        let plan = Plan::new::<T>(self.dev, &settings, &needs, &work, specs)?;
        Ok((work, plan))
    }

    /// The most tokens of a micro-batch in this memory; none if the smallest does not fit.
    fn largest<T: Element>(&self, memory: usize) -> Result<Option<usize>> {
        let fits = |rows| self.plan::<T>(rows).map(|(_, plan)| plan.total() <= memory);
        let least = self.plan::<T>(1)?.0.micro_batch.rows;
        if !fits(least)? {
            return Ok(None);
        }
        let (mut low, mut high) = (least, least.max(1 << 26));
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            if fits(middle)? { low = middle } else { high = middle }
        }
        Ok(Some(low))
    }
}

fn describe<T: Element>(
    dev: &Device,
    settings: Settings,
    algorithm: Box<dyn Algorithm>,
    memory: Option<usize>,
) -> Result<String> {
    let run = Run::new(dev, settings, algorithm)?;
    let (work, plan) = run.plan::<T>(run.settings.micro_batch_tokens)?;
    let mut text = format!("device: {}\n", dev.describe());
    text += &format!(
        "sizes: micro-batches of up to {} tokens, sequences of up to {} (by {})\n\n",
        work.micro_batch.rows, work.longest, run.source
    );
    let mut row = |name: &str, what: &str, bytes: usize| {
        text += &format!("{name:<24}{what:<20}{:>15}  {:>10}\n", bytes, size_of(bytes));
    };
    row_of_heads(&mut row, &plan);
    row("all phases share", "", plan.shared());
    row("total", "", plan.total());
    text += "\nThe driver's own memory is not counted; of a --gpu 1 GiB is left to it.\n";
    let Some(memory) = memory else { return Ok(text) };
    text += &match run.largest::<T>(memory)? {
        Some(rows) => format!(
            "In {} fit micro_batch_tokens of up to {rows}: {} of {}.\n",
            size_of(memory),
            size_of(run.plan::<T>(rows)?.1.total()),
            size_of(memory)
        ),
        None => {
            let least = run.plan::<T>(1)?;
            let hint = if run.settings.recompute { "" } else { " `recompute = true` takes less." };
            format!(
                "It does not fit {}: micro-batches of {} tokens, the least, take {}.{hint}\n",
                size_of(memory),
                least.0.micro_batch.rows,
                size_of(least.1.total())
            )
        }
    };
    Ok(text)
}

/// Models by what they hold, then phases.
fn row_of_heads(row: &mut impl FnMut(&str, &str, usize), plan: &Plan) {
    let mut last = "";
    for part in &plan.parts {
        row(if part.role == last { "" } else { part.role }, part.what, part.bytes);
        last = part.role;
    }
    row("for the whole run", "", plan.fixed());
    for (phase, bytes) in &plan.phases {
        row(phase, "", *bytes);
    }
}

fn size_of(bytes: usize) -> String {
    let (mut size, mut unit) = (bytes as f64, "B");
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if size >= 1024.0 {
            (size, unit) = (size / 1024.0, larger);
        }
    }
    format!("{size:.2} {unit}")
}
