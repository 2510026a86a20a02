//! Generations of NVIDIA GPUs that kernels are compiled for.

/// What a kernel may use; all GPUs of one give the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arch {
    /// Compute capability 8.0, and all that is not 9.0.
    #[default]
    Sm80,
    /// Compute capability 9.0, Hopper: TMA, wgmma and clusters.
    Sm90,
}

impl Arch {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90 => "Hopper",
        }
    }
}
