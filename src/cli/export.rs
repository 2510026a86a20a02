//! `warpo export`: a model folder of a checkpoint, or of another one in another dtype.

use std::path::PathBuf;

use half::bf16;

use super::DeviceArgs;
use crate::{
    device::{Device, Element},
    error::{Error, Result},
    train::{self, settings::SaveDtype},
};

/// Write the model of a checkpoint, or a model folder in another dtype, as a folder that Hugging
/// Face's libraries load
#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    /// A checkpoint (RUN/checkpoints/step-N) or a model's folder
    from: PathBuf,
    /// The new folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// float32, bfloat16 or float16; auto takes that of the run or the model
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    save_dtype: String,
    /// The trained model of a checkpoint of several: policy, value or reward
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    #[command(flatten)]
    place: DeviceArgs,
}

pub(super) fn run(args: &ExportArgs) -> Result<()> {
    let dtype: SaveDtype =
        crate::config::read("--save-dtype", &toml::Value::String(args.save_dtype.clone()))?;
    if args.out.exists() {
        return Err(Error::config("--out", "a folder that is not there yet", args.out.display()));
    }
    args.place.run(|dev| match dev {
        Device::Cpu(_) => run_in::<f32>(args, dev, dtype),
        Device::Cuda(_) => run_in::<bf16>(args, dev, dtype),
    })?;
    super::print(&format!("{}\n", args.out.display()))
}

/// [`run`] with models that compute in `T`.
fn run_in<T: Element<Acc = f32>>(args: &ExportArgs, dev: &Device, dtype: SaveDtype) -> Result<()> {
    let (from, out, role) = (&args.from, &args.out, args.role.as_deref());
    if train::is_checkpoint(from) {
        return train::export_checkpoint::<T>(dev, from, role, dtype.known(), out);
    }
    if let Some(role) = role {
        return Err(Error::config("--role", "none for a folder of one model", role));
    }
    train::export_again::<T>(dev, from, dtype, out)
}
