//! A checkpoint as a model: what a run had learned by then, as a folder that anyone can load.

use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::Dtype;

use super::{
    checkpoint::{self, LoadedCheckpoint},
    export::{ExportPlan, ExportedFrom, export, is_whole},
    manifest::RunState,
    storage::Disk,
};
use crate::{
    device::{Device, Element, reserve},
    error::{Error, Result},
    models::{Config, Head, Model, Residency},
};

/// Whether a folder is a checkpoint, and no model.
pub fn is_checkpoint(dir: &Path) -> bool {
    dir.join("state.json").is_file() && !dir.join("config.json").exists()
}

/// The model folder that `dir` stands for: itself, or `RUN/step-N` for a checkpoint, which is
/// written if it is not there yet, as `told` hears.
pub fn model_folder(dir: &Path, told: impl Fn(&str)) -> Result<PathBuf> {
    if !is_checkpoint(dir) {
        return Ok(dir.to_owned());
    }
    let real = std::fs::canonicalize(dir).map_err(Error::io("open", dir))?;
    let (run, name) = (real.parent().and_then(Path::parent), real.file_name());
    let (Some(run), Some(name)) = (run, name) else {
        return Err(Error::file(dir, "is no checkpoint in a run's folder"));
    };
    let (read, to) = (ReadCheckpoint::open(dir)?, run.join(name));
    if !is_whole(&Disk, &to, &read.of()) {
        told(&format!("writing the model of {} to {}", dir.display(), to.display()));
        match read.state.run.precision == f32::NAME {
            true => read.export::<f32>(&Device::cpu(), None, None, &to)?,
            false => read.export::<bf16>(&Device::from_name("cuda", 0)?, None, None, &to)?,
        }
    }
    Ok(to)
}

/// Writes the model that a run had trained in this role by a checkpoint, its first one if none is
/// named, into the folder `to`; in `dtype`, or in that of the run's export.
///
/// # Errors
/// [`Error::File`] if the checkpoint does not verify, or was trained on another kind of device
/// (whose weights may be padded); [`Error::Config`] if it has no such role.
pub fn export_checkpoint<T: Element<Acc = f32>>(
    dev: &Device,
    dir: &Path,
    role: Option<&str>,
    dtype: Option<Dtype>,
    to: &Path,
) -> Result<()> {
    ReadCheckpoint::open(dir)?.export::<T>(dev, role, dtype, to)
}

/// A checkpoint that verified.
struct ReadCheckpoint {
    loaded: LoadedCheckpoint,
    state: RunState,
    plan: ExportPlan,
    /// Its `state.json`, for messages.
    file: PathBuf,
}

impl ReadCheckpoint {
    fn open(dir: &Path) -> Result<Self> {
        let (loaded, file) = (checkpoint::load(&Disk, dir)?, dir.join("state.json"));
        let mut state: RunState = serde_json::from_value(loaded.state.clone())
            .map_err(|e| Error::file(&file, format!("is not the state of a run: {e}")))?;
        match state.export.take() {
            Some(plan) => Ok(Self { loaded, state, plan, file }),
            None => Err(Error::file(&file, "does not say how its models are exported")),
        }
    }

    fn of(&self) -> ExportedFrom {
        let (step, run) = (self.loaded.step, self.state.run.digest());
        ExportedFrom { step, run, eos: self.plan.eos }
    }

    /// See [`export_checkpoint`].
    fn export<T: Element<Acc = f32>>(
        &self,
        dev: &Device,
        role: Option<&str>,
        dtype: Option<Dtype>,
        to: &Path,
    ) -> Result<()> {
        let (was, is) = (&self.state.run.precision, T::NAME);
        if was != is {
            let message = format!("models were computed in {was}, this device computes in {is}");
            return Err(Error::file(&self.file, message));
        }
        let roles = &self.plan.roles;
        let Some(known) = roles.iter().find(|r| role.is_none_or(|name| r.name == name)) else {
            let all: Vec<&str> = roles.iter().map(|r| &*r.name).collect();
            return Err(Error::config("--role", all.join(" or "), role.unwrap_or("none")));
        };
        let head = if known.scalar { Head::Scalar } else { Head::Lm };
        let config = Config::parse(&known.config, &self.file)?;
        let mut model = Model::<T>::zeros(dev, config, head, Residency::Trained)?;
        let len = model.master()?.len();
        let mut numbers = reserve("the weights of a checkpoint", len)?;
        numbers.resize(len, 0.0);
        self.loaded.read(&Disk, &known.name, "weights", &mut numbers)?;
        model.set_master(dev, &numbers)?;
        let model = (dev, &model, dtype.unwrap_or(known.dtype));
        export(&Disk, model, (&self.plan.from, to), &self.of(), &self.plan.new)
    }
}
