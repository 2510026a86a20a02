//! A checkpoint as a model: what a run had learned by then, as a folder that anyone can load.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use half::bf16;
use safetensors::Dtype;

use super::{
    checkpoint::{self, LoadedCheckpoint},
    export::{ExportPlan, ExportedFrom, export, is_of, is_whole},
    manifest::RunState,
};
use crate::{
    device::{Device, Element, file, reserve},
    error::{Error, Result},
    models::{ADAPTER_CONFIG, AdapterConfig, AdapterStart, Config, Head, Model, Residency},
    storage::Disk,
};

/// The largest `state.json` that is read.
const LIMIT: u64 = 16 << 20;

/// Whether a folder is a checkpoint, and no model.
pub fn is_checkpoint(dir: &Path) -> bool {
    dir.join("state.json").is_file() && !dir.join("config.json").exists()
}

/// Whether a path is that of a checkpoint in a run's folder, be it there or not.
pub fn is_of_checkpoint(dir: &Path) -> bool {
    place(dir).is_some()
}

/// The model folder that `dir` stands for: itself, or `RUN/step-N` for `RUN/checkpoints/step-N`,
/// which is written if it is not there yet, as `told` hears. It stays when the checkpoint goes.
pub fn model_folder(dir: &Path, told: impl Fn(&str)) -> Result<PathBuf> {
    let Some((run, name)) = place(dir) else { return Ok(dir.to_owned()) };
    let to = run.join(name);
    let made = ["config.json", ADAPTER_CONFIG].iter().any(|name| to.join(name).exists());
    if !dir.exists() && made {
        return Ok(to);
    }
    if !is_checkpoint(dir) {
        return Ok(dir.to_owned());
    }
    // One process writes it, others wait.
    let lock = run.join("exports.lock");
    let held = File::create(&lock).map_err(Error::io("create", &lock))?;
    held.lock().map_err(Error::io("lock", &lock))?;
    let path = dir.join("state.json");
    let (state, _) = read_state(&serde_json::from_str(&file::read_text(&path, LIMIT)?), &path)?;
    let plan = state.export.as_ref();
    let known = plan.is_some_and(|plan| is_whole(&Disk, &to, &of(&state, plan)));
    if !known {
        if to.exists() && !is_of(&to, &state.run.digest()) {
            let message = format!("is no model of {}, and is in its place", dir.display());
            return Err(Error::file(to, message));
        }
        told(&format!("writing the model of {} to {}", dir.display(), to.display()));
        export_checkpoint(dir, None, None, &to)?;
    }
    Ok(to)
}

/// The run of `RUN/checkpoints/step-N`, and the last name.
fn place(dir: &Path) -> Option<(PathBuf, String)> {
    let name = dir.file_name()?.to_str()?.to_owned();
    let all = dir.parent()?;
    let fits = name.starts_with("step-") && all.file_name()? == "checkpoints";
    let run = all.parent().filter(|run| !run.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fits.then(|| (run.to_owned(), name))
}

/// Writes the model that a run had trained in this role by a checkpoint, its first one if none is
/// named, into the folder `to`; in `dtype`, or in that of the run's export. It is read on the kind
/// of device that it was trained on, where weights have the same padding.
///
/// # Errors
/// [`Error::File`] if the checkpoint does not verify; [`Error::Config`] if it has no such role.
pub fn export_checkpoint(
    dir: &Path,
    role: Option<&str>,
    dtype: Option<Dtype>,
    to: &Path,
) -> Result<()> {
    let (loaded, path) = (checkpoint::load(&Disk, dir)?, dir.join("state.json"));
    let (state, plan) = read_state(&Ok(loaded.state.clone()), &path)?;
    let Some(plan) = plan else {
        return Err(Error::file(path, "does not say how its models are exported"));
    };
    if !plan.from.is_dir() {
        let message = "is not there any more: tokenizer and the like of this model come from it";
        return Err(Error::file(plan.from, message));
    }
    let read = ReadCheckpoint { loaded, state, plan, path };
    match read.state.run.precision == f32::NAME {
        true => read.export::<f32>(&Device::cpu(), role, dtype, to),
        false => read.export::<bf16>(&Device::from_name("cuda", 0)?, role, dtype, to),
    }
}

fn read_state(
    json: &serde_json::Result<serde_json::Value>,
    path: &Path,
) -> Result<(RunState, Option<ExportPlan>)> {
    let wrong =
        |e: &dyn std::fmt::Display| Error::file(path, format!("is not the state of a run: {e}"));
    let json = json.as_ref().map_err(|e| wrong(e))?.clone();
    let state: RunState = serde_json::from_value(json).map_err(|e| wrong(&e))?;
    let plan = state.export.clone();
    Ok((state, plan))
}

fn of(state: &RunState, plan: &ExportPlan) -> ExportedFrom {
    ExportedFrom { step: state.step, run: state.run.digest(), eos: plan.eos }
}

/// A checkpoint that verified.
struct ReadCheckpoint {
    loaded: LoadedCheckpoint,
    state: RunState,
    plan: ExportPlan,
    /// Its `state.json`, for messages.
    path: PathBuf,
}

impl ReadCheckpoint {
    /// See [`export_checkpoint`].
    fn export<T: Element<Acc = f32>>(
        &self,
        dev: &Device,
        role: Option<&str>,
        dtype: Option<Dtype>,
        to: &Path,
    ) -> Result<()> {
        let roles = &self.plan.roles;
        let Some(known) = roles.iter().find(|r| role.is_none_or(|name| r.name == name)) else {
            let all: Vec<&str> = roles.iter().map(|r| &*r.name).collect();
            return Err(Error::config("--role", all.join(" or "), role.unwrap_or("none")));
        };
        let head = if known.scalar { Head::Scalar } else { Head::Lm };
        let mut config = Config::parse(&known.config, &self.path)?;
        if let Some(text) = &known.adapter {
            // Its weights are read below.
            let adapter = AdapterConfig::parse(text, &self.path, AdapterStart::Seed(0))?;
            config = config.with_adapter(adapter)?;
        }
        let mut model = Model::<T>::zeros(dev, config, head, Residency::Trained)?;
        let len = model.master()?.len();
        let mut numbers = reserve("the weights of a checkpoint", len)?;
        numbers.resize(len, 0.0);
        self.loaded.read(&Disk, &known.name, "weights", &mut numbers)?;
        model.set_master(dev, &numbers)?;
        let model = (dev, &model, dtype.unwrap_or(known.dtype));
        let of = of(&self.state, &self.plan);
        export(&Disk, model, (&self.plan.from, to), &of, &self.plan.new)
    }
}
