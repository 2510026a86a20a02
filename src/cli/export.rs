//! `warpo export`: a model folder of a checkpoint, or of another one in another dtype.

use std::path::{Path, PathBuf};

use crate::{
    config,
    device::Device,
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
}

pub(super) fn run(args: &ExportArgs) -> Result<()> {
    let dtype: SaveDtype = config::read("--save-dtype", &args.save_dtype.clone().into())?;
    let (from, out, role) = (&args.from, &args.out, args.role.as_deref());
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if out.exists() || !parent.is_dir() {
        let want = format!("a new folder in one that is there, not in {}", parent.display());
        let want = if out.exists() { "a folder that is not there yet" } else { &*want };
        return Err(Error::config("--out", want, out.display()));
    }
    match (train::is_checkpoint(from), role) {
        (true, _) => train::export_checkpoint(from, role, dtype.known(), out)?,
        (false, None) => train::export_again::<f32>(&Device::cpu(), from, dtype, out)?,
        (false, Some(role)) => {
            return Err(Error::config("--role", "none for a folder of one model", role));
        }
    }
    super::print(&format!("{}\n", out.display()))
}
