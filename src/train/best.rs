//! The best evaluation of a run so far, and how many came since.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use serde_json::Value;

use super::Settings;
use crate::{
    algorithms::{Metrics, SHARED_METRICS},
    error::{Error, Result},
};

/// What [`Settings::keep_best`] asks for.
#[derive(Clone, Debug)]
pub struct Best {
    metric: String,
    /// Evaluations without a better one after which the run ends.
    patience: Option<u64>,
    pub value: Option<f64>,
    /// Evaluations since.
    pub since: u64,
}

impl Best {
    /// With nothing heard yet; none if none is asked for.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no metric of an evaluation, or nothing is evaluated.
    pub fn new(s: &Settings, evaluates: bool) -> Result<Option<Self>> {
        let Some(metric) = s.keep_best.clone() else {
            let unread = s.patience.map(|n| Error::config("patience", "none without keep_best", n));
            return unread.map_or(Ok(None), Err);
        };
        let mut known = SHARED_METRICS.iter().map(|m| m.0).filter(|m| m.starts_with("eval_"));
        if !known.clone().any(|m| m == metric) {
            let want = known.by_ref().collect::<Vec<_>>().join(", ");
            return Err(Error::config("keep_best", format!("one of {want}"), metric));
        }
        if !evaluates {
            return Err(Error::config("keep_best", "none without eval_data", metric));
        }
        Ok(Some(Self { metric, patience: s.patience, value: None, since: 0 }))
    }

    /// Hears the metrics of a step; says whether they are of the best evaluation so far.
    ///
    /// # Errors
    /// [`Error::Config`] if the evaluation has another metric.
    pub fn hear(&mut self, metrics: &Metrics) -> Result<bool> {
        let found = metrics.iter().find(|(name, _)| *name == self.metric);
        let Some((_, value)) = found else {
            let all = metrics.iter().filter(|m| m.0.starts_with("eval_")).map(|m| m.0);
            let want = format!("one of {}", all.collect::<Vec<_>>().join(", "));
            return Err(Error::config("keep_best", want, &self.metric));
        };
        Ok(self.take(*value))
    }

    fn take(&mut self, value: f64) -> bool {
        let higher = self.metric.ends_with("accuracy");
        let better = self.value.is_none_or(|best| if higher { value > best } else { value < best });
        if better {
            (self.value, self.since) = (Some(value), 0);
        } else {
            self.since += 1;
        }
        better
    }

    /// Hears what `metrics.jsonl` has of the steps up to `step`.
    pub fn recall(&mut self, path: &Path, step: u64) -> Result<()> {
        let Ok(file) = File::open(path) else { return Ok(()) };
        for line in BufReader::new(file).lines() {
            let line = line.map_err(Error::io("read", path))?;
            let Ok(line) = serde_json::from_str::<Value>(&line) else { break };
            if line["step"].as_u64().is_none_or(|at| at > step) {
                break;
            }
            line[&*self.metric].as_f64().map(|value| self.take(value));
        }
        Ok(())
    }

    /// Whether the run ends for want of a better evaluation.
    pub fn is_over(&self) -> bool {
        self.patience.is_some_and(|n| self.since >= n)
    }

    /// What it is of.
    pub fn describe(&self) -> String {
        format!("{} {:?}", self.metric, self.value.unwrap_or(f64::NAN))
    }
}
