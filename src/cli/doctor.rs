//! `warpo doctor`: what this machine offers, and what is missing.

use std::path::Path;

use crate::{device::Device, device::cpu::Isa, error::Result};

/// Show devices, threads, instruction sets, and what is missing for CUDA
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_args: &Args) -> Result<()> {
    let device = Device::cpu();
    let isas: Vec<String> = Isa::available().iter().map(ToString::to_string).collect();
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    let text = format!(
        "warpo {}\ndevice: {}\ninstruction sets: {}\ncuda: not usable: this version has no CUDA \
         kernels; {}\n",
        env!("CARGO_PKG_VERSION"),
        device.describe(),
        isas.join(", "),
        if driver { "an NVIDIA driver is installed" } else { "no NVIDIA driver is installed" },
    );
    super::print(&text)
}
