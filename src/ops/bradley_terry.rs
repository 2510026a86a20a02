//! The reward model's loss on pairs of which people chose the first.  (Bradley and Terry 1952;
//! margin: Touvron et al. 2023, eq. 2; centring: Eisenstein et al. 2023)
//!
//! `-log sigmoid(chosen - rejected - margin) + centre (chosen + rejected)²`, mean over pairs.

use crate::{
    device::{Device, Float, Later, View, ViewMut, Work, cuda::kernels::bradley_terry as kernel},
    error::Result,
    shape,
};

/// Sums over the pairs of a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    pub pairs: f64,
    /// The loss, divided by the denominator.
    pub loss: f64,
    /// Pairs whose chosen text scores higher.
    pub right: f64,
    pub difference: f64,
    /// All scores, both of each pair.
    pub score: f64,
}

impl Stats {
    /// Adds the next micro-batch.
    pub fn merge(&mut self, o: &Self) {
        self.pairs += o.pairs;
        self.loss += o.loss;
        self.right += o.right;
        self.difference += o.difference;
        self.score += o.score;
    }
}

/// Writes `dscores` `[2 pairs]` and returns the sums. `scores` holds chosen, rejected, chosen, ...;
/// `margins` `[pairs]` or empty; `denominator` is the number of pairs of the whole optimizer step.
///
/// Reads scores and margins, writes as many gradients as scores.
pub fn forward<F: Float>(
    dev: &Device,
    dscores: ViewMut<'_, F>,
    scores: View<'_, F>,
    margins: View<'_, F>,
    centre: f64,
    denominator: f64,
) -> Result<Later<Stats>> {
    let pairs = shape::rows("bradley_terry", "scores", scores.len(), 2)?;
    shape::check("bradley_terry", "dscores", &[pairs, 2], dscores.len())?;
    if !margins.is_empty() {
        shape::check("bradley_terry", "margins", &[pairs], margins.len())?;
    }
    let _op = dev.op("bradley_terry", || Work::moves::<F>(4 * pairs + margins.len()));
    match dev {
        Device::Cpu(_) => {
            let (d, scores, margins) = (dscores.host(), scores.host(), margins.host());
            Ok(Later::now(on_cpu(d, scores, margins, centre, denominator)))
        }
        Device::Cuda(cuda) => {
            let (n, scale) = (scores.len(), 1.0 / denominator);
            let margins = Some(margins).filter(|m| !m.is_empty());
            let sums = cuda.sums(n, 0, |launch, partial, share| {
                let (d, s, m) = (dscores, scores, margins);
                kernel::Forward {
                    dscores: d,
                    partial,
                    scores: s,
                    margins: m,
                    count: n,
                    share,
                    centre,
                    scale,
                }
                .launch(cuda, launch)
            })?;
            let pairs = pairs as f64;
            Ok(sums.map(move |[loss, right, difference, score]| Stats {
                pairs,
                loss,
                right,
                difference,
                score,
            }))
        }
    }
}

fn on_cpu<F: Float>(
    d: &mut [F],
    scores: &[F],
    margins: &[F],
    centre: f64,
    denominator: f64,
) -> Stats {
    let pairs = scores.len() / 2;
    let mut stats = Stats { pairs: pairs as f64, ..Stats::default() };
    for i in 0..pairs {
        let (c, r) = (scores[2 * i].f64(), scores[2 * i + 1].f64());
        let m = c - r - margins.get(i).map_or(0.0, |m| m.f64());
        // -log sigmoid(m) = softplus(-m), written so that neither sign overflows
        let e = libm::exp(-m.abs());
        let loss = (-m).max(0.0) + libm::log1p(e);
        let wrong = if m >= 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) };
        let pull = 2.0 * centre * (c + r);
        stats.loss += (loss + centre * (c + r) * (c + r)) / denominator;
        stats.right += f64::from(u8::from(c > r));
        stats.difference += c - r;
        stats.score += c + r;
        d[2 * i] = F::of((pull - wrong) / denominator);
        d[2 * i + 1] = F::of((pull + wrong) / denominator);
    }
    stats
}
