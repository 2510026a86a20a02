//! What the trained model makes of data that it is not trained on.

use super::Trainer;
use crate::{
    algorithms::Metrics,
    device::Element,
    error::Result,
    models::Pass,
    ops::bradley_terry::{self, Pairs},
};

impl<T: Element<Acc = f32>> Trainer<T> {
    /// Loss, and accuracy of a reward model, on the held-out data.
    pub fn evaluate(&mut self) -> Result<Metrics> {
        let Some(held_out) = &self.job.held_out else { return Ok(Metrics::new()) };
        let _phase = self.dev.span("evaluate");
        let all: Vec<usize> = (0..held_out.len()).collect();
        let Some((sequences, columns)) = held_out.sequences(&all, 0) else {
            return Ok(Metrics::new());
        };
        let (scorer, dev) = (self.job.work.scorer(), &self.dev);
        let mut out = Vec::new();
        for group in scorer.groups(sequences.iter().map(|s| s.ids.len())) {
            self.batch.clear();
            for s in &sequences[group] {
                match &self.policy {
                    Some(_) => self.batch.push_masked(&s.ids, &s.predicted),
                    None => self.batch.push_last(&s.ids),
                }
            }
            let scope = self.arena.scope();
            if let Some(role) = self.policy.as_ref().or(self.scalar.as_ref()) {
                Pass::new(dev, &role.model, &scope, &self.batch).score(&mut out, None)?;
            }
        }
        if self.policy.is_some() {
            let nll = -out.iter().map(|x| f64::from(*x)).sum::<f64>() / out.len() as f64;
            return Ok(vec![("eval_loss", nll), ("eval_perplexity", libm::exp(nll))]);
        }
        let pairs = (out.len() / 2) as f64;
        let mut d = vec![0.0; out.len()];
        let (scores, margins) = ((&out).into(), (&columns.margins).into());
        let t = Pairs { scores, margins, weights: None };
        let stats = bradley_terry::forward(&self.host, (&mut d).into(), t, 0.0, pairs)?.get()?;
        Ok(vec![("eval_loss", stats.loss), ("eval_accuracy", stats.right / pairs)])
    }
}
