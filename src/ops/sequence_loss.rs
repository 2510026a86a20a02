//! What all losses over sequences share: a loss is a pure function of the log-probs of a unit's
//! sequences, summed over tokens: of one sequence, or of a pair. It is written once in Rust, in
//! f64, and once in CUDA (`kernels/include/sequence_loss.cuh`). Everything else (shapes, sums over
//! tokens, gradients of tokens, launch, profile) is in this file.
//!
//! To add a loss: as `token_loss` says, with `SequenceLoss` in the place of `TokenLoss`.

use super::token_loss::Sums;
use crate::{
    device::{
        Cuda, Device, Float, Pending, View, ViewMut, Work,
        cuda::{Launch, Parts},
    },
    error::Result,
    shape,
};

/// Where the tokens of each sequence begin `[sequences + 1]`, from 0.
#[derive(Clone, Copy, Debug)]
pub struct Offsets<'a> {
    /// In host memory, where they are checked.
    pub host: &'a [u32],
    /// The same, where the device reads them.
    pub view: View<'a, u32>,
}

/// Columns of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct SequenceColumns<'a, F> {
    /// Log-prob of each token under the policy `[tokens]`.
    pub logp: View<'a, F>,
    /// The same under the reference; 0 without one.
    pub ref_logp: Option<View<'a, F>>,
    /// Weight of each token in its sequence's log-ratio; 1 without.
    pub weights: Option<View<'a, F>>,
    pub offsets: Offsets<'a>,
}

/// The log-probs of a sequence, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SequenceSums {
    /// `sum_t w_t (logp_t - ref_t)`
    pub ratio: f64,
    /// `sum_t logp_t`
    pub logp: f64,
    /// Its tokens.
    pub tokens: f64,
}

/// Derivatives of a loss in the first two sums of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SequenceGrads {
    pub ratio: f64,
    pub logp: f64,
}

/// A loss over units of `U` sequences that lie side by side.
pub(super) struct SequenceLoss<'a, F, const U: usize> {
    pub op: &'static str,
    pub columns: SequenceColumns<'a, F>,
    /// A number of each unit `[units]`, 0 without.
    pub single: (&'static str, Option<View<'a, F>>),
    /// `[tokens]`
    pub dlogp: ViewMut<'a, F>,
}

/// What a kernel is launched with.
pub(super) struct SequenceLaunch<'a, F> {
    pub cuda: &'a Cuda,
    pub launch: Launch,
    pub dlogp: ViewMut<'a, F>,
    /// Sums of each block.
    pub partial: ViewMut<'a, f64>,
    pub units: usize,
    /// Units of a block.
    pub share: usize,
}

impl<F: Float> SequenceColumns<'_, F> {
    /// The sums of sequence `s`; columns are in host memory.
    pub fn sequence(&self, s: usize) -> SequenceSums {
        let span = self.offsets.host[s] as usize..self.offsets.host[s + 1] as usize;
        let mut sums = SequenceSums { tokens: span.len() as f64, ..SequenceSums::default() };
        for t in span {
            let logp = self.logp.host()[t].f64();
            let reference = self.ref_logp.map_or(0.0, |r| r.host()[t].f64());
            sums.logp += logp;
            sums.ratio += self.weight(t) * (logp - reference);
        }
        sums
    }

    fn weight(&self, t: usize) -> f64 {
        self.weights.map_or(1.0, |w| w.host()[t].f64())
    }
}

impl<F: Float, const U: usize> SequenceLoss<'_, F, U> {
    /// Writes `dlogp_t = w_t d loss / d ratio + d loss / d logp` of each token's sequence, and
    /// returns the sums. `unit` computes the derivatives and sums of a unit from its sequences and
    /// its own number; `launch` launches the kernel that does the same.
    pub(super) fn run<S: Sums<N>, const N: usize>(
        self,
        dev: &Device,
        unit: impl Fn([SequenceSums; U], f64) -> ([SequenceGrads; U], S),
        launch: impl FnOnce(SequenceLaunch<'_, F>) -> Result<()>,
    ) -> Result<Pending<S>> {
        let Self { op, columns, single: (name, single), dlogp } = self;
        let (tokens, offsets) = (columns.logp.len(), columns.offsets.host);
        let units = shape::rows(op, "sequences", offsets.len().saturating_sub(1), U)?;
        shape::offsets(op, offsets, tokens)?;
        shape::check(op, "offsets", &[offsets.len()], columns.offsets.view.len())?;
        shape::check(op, "dlogp", &[tokens], dlogp.len())?;
        let mut elements = 2 * tokens;
        for (name, view) in [("ref_logp", columns.ref_logp), ("weights", columns.weights)] {
            shape::check(op, name, &[tokens], view.map_or(tokens, |view| view.len()))?;
            elements += view.map_or(0, |view| view.len());
        }
        shape::check(op, name, &[units], single.map_or(units, |view| view.len()))?;
        let _op = dev.op(op, || Work::moves::<F>(elements));
        match dev {
            Device::Cpu(_) => {
                let (dlogp, mut sums) = (dlogp.host(), S::default());
                for u in 0..units {
                    let x = std::array::from_fn(|k| columns.sequence(U * u + k));
                    let (grads, more) = unit(x, single.map_or(0.0, |x| x.host()[u].f64()));
                    sums.add(1.0, &more);
                    for (k, g) in grads.iter().enumerate() {
                        let s = U * u + k;
                        for t in offsets[s] as usize..offsets[s + 1] as usize {
                            dlogp[t] = F::of(columns.weight(t) * g.ratio + g.logp);
                        }
                    }
                }
                Ok(Pending::now(sums))
            }
            Device::Cuda(cuda) => {
                let parts = Parts::of_blocks(units);
                let sums = cuda.sums(parts, S::MAXIMA, |row, partial, share| {
                    launch(SequenceLaunch { cuda, launch: row, dlogp, partial, units, share })
                })?;
                Ok(sums.map(S::of))
            }
        }
    }
}
