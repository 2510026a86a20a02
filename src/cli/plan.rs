//! `warpo plan`: the device memory of a run, also for GPUs known only by their data sheets.

use half::bf16;

use super::train::{self, RunArgs};
use crate::{
    algorithms::Algorithm,
    device::{
        Cuda, Device, Element,
        cuda::{GPUS, GpuSpec},
    },
    error::{Error, Result},
    train::{
        Settings,
        inputs::{self, RunInputs},
        models::{self, PlannedModel},
        plan::{MemoryPlan, PassSizes},
    },
};

/// Print the memory of a run by model and phase, and the largest micro-batch that fits; nothing is
/// run, and the model's folder needs no weights
#[derive(Debug, clap::Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    run: RunArgs,
    #[arg(long, value_name = "NAME", help = gpus())]
    gpu: Option<String>,
    /// Memory of the device, as 141GB or 80GiB, if another than it has
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
}

/// Bytes left to the driver, its context and kernels, on a GPU known by its data sheet.
const DRIVER: usize = 1 << 30;

fn gpus() -> String {
    let names: Vec<&str> = GPUS.iter().map(|m| m.key).collect();
    format!("A GPU that need not be there: {}", names.join(", "))
}

pub(super) fn run(args: &PlanArgs) -> Result<()> {
    let (entry, settings, section) = train::settings(&args.run)?;
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
    let (text, short) = match dev {
        Device::Cpu(_) => describe::<f32>(&dev, settings, algorithm, memory),
        Device::Cuda(_) => describe::<bf16>(&dev, settings, algorithm, memory),
    }?;
    super::print(&text)?;
    short.map_or(Ok(()), Err)
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

/// A run's models, and sizes for them.
struct PlannedRun<'a> {
    dev: &'a Device,
    settings: Settings,
    algorithm: Box<dyn Algorithm>,
    models: Vec<PlannedModel>,
    /// Tokens of the longest text or prompt.
    longest: usize,
    /// Tokens of the longest held-out text.
    held_out: usize,
    /// Source of `longest`, for people.
    source: &'static str,
}

impl<'a> PlannedRun<'a> {
    fn new(dev: &'a Device, settings: Settings, algorithm: Box<dyn Algorithm>) -> Result<Self> {
        let needs = algorithm.needs();
        if settings.data.is_empty() {
            let models = models::planned(&settings, &needs)?;
            let longest = inputs::max_length(&settings, &needs, &models[0].spec)?;
            let source = "max_length, as there is no data";
            return Ok(Self { dev, settings, algorithm, models, longest, held_out: 0, source });
        }
        let new = needs.sampling().map_or(0, |s| s.max_new_tokens);
        let RunInputs { settings, algorithm, models, sizes, .. } =
            RunInputs::new(settings, algorithm)?;
        let PassSizes { longest, held_out, .. } = sizes;
        let (longest, source) = (longest - new, "the data");
        Ok(Self { dev, settings, algorithm, models, longest, held_out, source })
    }

    /// With other sizes of a micro-batch.
    fn plan<T: Element>(&self, rows: usize) -> Result<(PassSizes, MemoryPlan)> {
        let settings = Settings { micro_batch_tokens: rows, ..self.settings.clone() };
        let needs = self.algorithm.needs();
        let sizes = PassSizes::new(&settings, &needs, self.longest, self.held_out);
        let plan = MemoryPlan::new::<T>(self.dev, &settings, &needs, &sizes, &self.models)?;
        Ok((sizes, plan))
    }

    /// The most tokens of a micro-batch in this memory; none if the smallest does not fit.
    fn largest<T: Element>(&self, memory: usize) -> Result<Option<usize>> {
        let fits = |rows| self.plan::<T>(rows).map(|(_, plan)| plan.total() <= memory);
        let least = self.plan::<T>(1)?.0.micro_batch.rows;
        if !fits(least)? {
            return Ok(None);
        }
        // A micro-batch of more rows than a step has is no larger.
        let (mut low, mut high) = (least, self.plan::<T>(usize::MAX)?.0.micro_batch.rows);
        if fits(high)? {
            return Ok(Some(high));
        }
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            if fits(middle)? { low = middle } else { high = middle }
        }
        Ok(Some(low))
    }
}

/// The plan in words, and the error of a run that does not fit.
fn describe<T: Element>(
    dev: &Device,
    settings: Settings,
    algorithm: Box<dyn Algorithm>,
    memory: Option<usize>,
) -> Result<(String, Option<Error>)> {
    let run = PlannedRun::new(dev, settings, algorithm)?;
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
    let Some(memory) = memory else { return Ok((text, None)) };
    let want = plan.total();
    let short = (want > memory).then_some(Error::Memory { what: "the run", want, have: memory });
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
    Ok((text, short))
}

/// Models by what they hold, then phases.
fn row_of_heads(row: &mut impl FnMut(&str, &str, usize), plan: &MemoryPlan) {
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
