//! What algorithms share that learn from pairs of completions: one loss over the log-probs of
//! whole completions, its metrics, and the pairing by rank of AOT. An algorithm adds its settings.

use std::path::PathBuf;

use super::{Algorithm, Column, Columns, Inputs, Metrics, MicroBatch, Needs};
use crate::{
    device::{Device, Pending, View, ViewMut},
    error::{Error, Result},
    ops::{
        nll,
        preference_loss::{self, PairCounts, PreferenceLoss, PreferenceSums},
        sequence_loss::{SequenceColumns, SequenceSums},
    },
};

/// The frozen model that log-ratios are to.
#[derive(Clone, Debug, PartialEq)]
pub enum Reference {
    /// None: log-probs themselves are compared.
    None,
    /// The policy as the run begins.
    Copy,
    /// A model in a folder.
    Folder(PathBuf),
}

/// Optimal transport: what is compared is paired by rank over the step. (Melnyk et al. 2024)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranked {
    /// The policy's log-ratios of chosen to rejected with the reference's.
    Paired,
    /// The log-ratios of chosen completions with those of rejected ones.
    Unpaired,
}

/// An algorithm over pairs.
#[derive(Debug)]
pub struct Preference {
    loss: PreferenceLoss,
    reference: Reference,
    /// Weight of the tokens of a completion beyond the length of the other one.
    pub tail: Option<f64>,
    pub ranked: Option<Ranked>,
    /// One for each micro-batch.
    stats: Vec<Pending<PreferenceSums>>,
}

/// Metrics of pairs.
pub const METRICS: &[(&str, &str)] = &[
    ("loss", "Mean of the loss over the step's pairs, with its SFT term."),
    ("accuracy", "Pairs of the step whose chosen completion has the larger reward."),
    ("reward_margin", "Mean of the chosen reward less the rejected one."),
    (
        "chosen_reward",
        "Mean of beta times the log-ratio of a chosen completion, as the loss has it.",
    ),
    ("rejected_reward", "The same of rejected completions."),
    ("chosen_logp", "Mean log-prob of a whole chosen completion, in nats."),
    ("rejected_logp", "The same of rejected completions."),
    ("pair_weight", "Mean weight of a pair (with wpo)."),
];

/// Sequences 2 i of all.
fn chosen(c: &Columns<f32>) -> impl Iterator<Item = usize> {
    (0..c.sequences()).step_by(2)
}

/// Counts that means of a step divide by.
fn counts(c: &Columns<f32>) -> PairCounts {
    let chosen_tokens: usize = chosen(c).map(|s| c.span(&(s..s + 1)).len()).sum();
    PairCounts { pairs: c.sequences() as f64 / 2.0, chosen_tokens: chosen_tokens as f64 }
}

/// Lets tokens of a completion beyond the length of the other one weigh `alpha`. (LD-DPO: Liu et
/// al. 2024)
fn weigh_tail(c: &mut Columns<f32>, alpha: f64) {
    for s in 0..c.sequences() {
        let shared = c.span(&(s ^ 1..(s ^ 1) + 1)).len();
        let own = c.span(&(s..s + 1));
        c.weights[own].iter_mut().skip(shared).for_each(|w| *w = alpha as f32);
    }
}

impl Preference {
    pub fn new(loss: PreferenceLoss, reference: Reference) -> Self {
        Self { loss, reference, tail: None, ranked: None, stats: Vec::new() }
    }

    fn columns<'a>(
        &self,
        micro: &'a MicroBatch<'_, f32>,
        logp: View<'a, f32>,
    ) -> SequenceColumns<'a, f32> {
        let reference = !micro.columns.ref_logp.is_empty();
        SequenceColumns {
            logp,
            ref_logp: reference.then(|| micro.view(Column::RefLogp)),
            weights: self.tail.map(|_| micro.view(Column::Weights)),
            offsets: micro.offsets(),
        }
    }

    fn forward(
        &self,
        dev: &Device,
        dlogp: ViewMut<'_, f32>,
        micro: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
    ) -> Result<Pending<PreferenceSums>> {
        let margins = Some(micro.view(Column::Margins)).filter(|m| !m.is_empty());
        let without = self.loss.terms.iter().find(|(kind, _)| !kind.has_margin());
        if let (Some(_), Some((kind, _))) = (margins, without) {
            let want = format!("none, which the loss {kind:?} has no place for");
            return Err(Error::value("margins of pairs", want, "a column `margin`"));
        }
        let columns = self.columns(micro, logp);
        preference_loss::forward(dev, dlogp, columns, margins, &self.loss, counts(micro.columns))
    }

    /// The loss of all sequences of a step, paired by rank, and its derivative in the log-prob of
    /// each sequence.
    fn rank(
        &self,
        ranked: Ranked,
        all: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
    ) -> (PreferenceSums, Vec<f64>) {
        let (columns, of) = (self.columns(all, logp), counts(all.columns));
        let x: Vec<_> = (0..all.sequences.len()).map(|s| columns.sequence(s)).collect();
        let order = |key: &dyn Fn(usize) -> f64| {
            let mut order: Vec<usize> = (0..x.len()).step_by(2).collect();
            order.sort_by(|i, j| key(*i).total_cmp(&key(*j)));
            order
        };
        let policy = |i: usize| x[i].logp - x[i + 1].logp;
        let reference = |i: usize| policy(i) - (x[i].ratio - x[i + 1].ratio);
        let by_rank = match ranked {
            Ranked::Paired => [order(&policy), order(&reference)],
            Ranked::Unpaired => [order(&|i| x[i].ratio), order(&|i| x[i + 1].ratio)],
        };
        let (mut sums, mut d, mut loss) = (PreferenceSums::default(), vec![0.0; x.len()], 0.0);
        for (&i, &j) in by_rank[0].iter().zip(&by_rank[1]) {
            let of_ratio = |ratio| SequenceSums { ratio, ..SequenceSums::default() };
            let compared = match ranked {
                Ranked::Paired => [of_ratio(policy(i)), of_ratio(reference(j))],
                Ranked::Unpaired => [x[i], x[j + 1]],
            };
            let ([up, down], of_ranks) = preference_loss::pair(&self.loss, of, compared, 0.0);
            loss += of_ranks.loss;
            d[i] = up.ratio;
            match ranked {
                Ranked::Paired => d[i + 1] = -up.ratio,
                Ranked::Unpaired => d[j + 1] = down.ratio,
            }
            sums.merge(&preference_loss::pair(&self.loss, of, [x[i], x[i + 1]], 0.0).1);
        }
        (PreferenceSums { loss, ..sums }, d)
    }
}

impl Algorithm for Preference {
    fn needs(&self) -> Needs {
        let reference_model = match &self.reference {
            Reference::Folder(dir) => Some(dir.clone()),
            _ => None,
        };
        Needs {
            policy: true,
            reference: self.reference != Reference::None,
            reference_model,
            old_logp: self.ranked.is_some(),
            margins: self.ranked.is_none() && self.loss.terms.iter().all(|(k, _)| k.has_margin()),
            ..Needs::of(Inputs::Pairs)
        }
    }

    fn prepare(&mut self, _dev: &Device, c: &mut Columns<f32>, _out: &mut Metrics) -> Result<()> {
        if let Some(alpha) = self.tail {
            weigh_tail(c, alpha);
        }
        let Some(ranked) = self.ranked else { return Ok(()) };
        let all = MicroBatch::new(c, 0..c.sequences());
        let (sums, d) = self.rank(ranked, &all, (&c.old_logp).into());
        self.stats.push(Pending::now(sums));
        // The one update of the step sees these very log-probs: its gradient is known here.
        let spread =
            |(s, d): (usize, &f64)| std::iter::repeat_n(*d as f32, c.span(&(s..s + 1)).len());
        c.advantages = d.iter().enumerate().flat_map(spread).collect();
        Ok(())
    }

    fn policy_loss(
        &mut self,
        dev: &Device,
        micro: &MicroBatch<'_, f32>,
        logp: View<'_, f32>,
        _entropy: Option<View<'_, f32>>,
        dlogp: ViewMut<'_, f32>,
        _dentropy: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        if self.ranked.is_some() {
            let gradients = micro.view(Column::Advantages);
            return nll::forward(dev, dlogp, logp, gradients, -1.0).map(drop);
        }
        let sums = self.forward(dev, dlogp, micro, logp)?;
        self.stats.push(sums);
        Ok(())
    }

    fn evaluate(
        &self,
        dev: &Device,
        held_out: &MicroBatch<'_, f32>,
        y: View<'_, f32>,
    ) -> Result<Metrics> {
        let mut columns = held_out.columns.clone();
        if let Some(alpha) = self.tail {
            weigh_tail(&mut columns, alpha);
        }
        let all = MicroBatch::new(&columns, held_out.sequences.clone());
        let sums = match self.ranked {
            Some(ranked) => self.rank(ranked, &all, y).0,
            None => self.forward(dev, (&mut vec![0.0; y.len()]).into(), &all, y)?.get()?,
        };
        Ok(vec![("eval_loss", sums.loss), ("eval_accuracy", sums.right / sums.pairs)])
    }

    fn finish(&mut self, out: &mut Metrics) -> Result<()> {
        let mut s = PreferenceSums::default();
        for part in self.stats.drain(..) {
            s.merge(&part.get()?);
        }
        out.push(("loss", s.loss));
        out.push(("accuracy", s.right / s.pairs));
        out.push(("reward_margin", (s.chosen_reward - s.rejected_reward) / s.pairs));
        out.push(("chosen_reward", s.chosen_reward / s.pairs));
        out.push(("rejected_reward", s.rejected_reward / s.pairs));
        out.push(("chosen_logp", s.chosen_logp / s.pairs));
        out.push(("rejected_logp", s.rejected_logp / s.pairs));
        if self.loss.wpo {
            out.push(("pair_weight", s.weight / s.pairs));
        }
        Ok(())
    }
}
