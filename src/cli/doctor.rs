//! `warpo doctor`: what this machine offers, and what is missing.

use crate::{
    device::{Cuda, Device, cpu::Isa},
    error::Result,
    ops::attention,
};

/// Show devices, threads, instruction sets, and what is missing for CUDA
#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {}

pub(super) fn run(_args: &DoctorArgs) -> Result<()> {
    let device = Device::cpu();
    let isas: Vec<String> = Isa::available().iter().map(ToString::to_string).collect();
    let mut text = format!(
        "warpo {}\ndevice: {}\ninstruction sets: {}\n",
        env!("CARGO_PKG_VERSION"),
        device.describe(),
        isas.join(", "),
    );
    for line in Cuda::survey() {
        text += &format!("cuda: {line}\n");
    }
    for i in 0.. {
        let Ok(cuda) = Cuda::new(i) else { break };
        for [head, blocks, meant] in attention::resident(&Device::Cuda(cuda))? {
            let what = format!("decoding with heads of {head}: {blocks} blocks a multiprocessor");
            text += &format!("cuda: cuda:{i}, {what}, meant for {meant}\n");
        }
    }
    super::print(&text)
}
