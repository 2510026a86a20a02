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
    /// An adapter's folder (LoRA, as PEFT stores it), on the model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Add the adapter to the weights: a model that needs no PEFT, whose logits differ in bits
    #[arg(long)]
    merge: bool,
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
    let checkpoint = train::is_checkpoint(from);
    if checkpoint && (args.merge || args.adapter.is_some()) {
        let want = "a model's or an adapter's folder; export the checkpoint without it first";
        return Err(Error::config("--merge or --adapter", want, from.display()));
    }
    match (checkpoint, role) {
        (true, _) => train::export_checkpoint(from, role, dtype.known(), out)?,
        (false, None) => {
            let config = super::model_config(from, args.adapter.as_ref())?;
            if args.merge && config.adapter().is_none() {
                let want = "an adapter's folder, or --adapter beside a model's";
                return Err(Error::config("--merge", want, from.display()));
            }
            train::export_again::<f32>(&Device::cpu(), (from, config), dtype, args.merge, out)?;
            if args.merge {
                super::note(
                    "merged: W + s B A in the weights' dtype; its logits and those of the adapter on its \
                     base are equal to rounding, not in bits",
                );
            }
        }
        (false, Some(role)) => {
            return Err(Error::config("--role", "none for a folder of one model", role));
        }
    }
    super::print(&format!("{}\n", out.display()))
}
